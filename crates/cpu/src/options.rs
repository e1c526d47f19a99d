//! How attention is computed, besides what the batch says.

use packinfer_batch::AttentionShape;

use crate::CpuError;

/// How attention is computed, besides what the batch says.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Options<'a> {
    /// Factor of the scores before softmax; 1/√head_dim if `None`.
    pub scale: Option<f32>,
    /// Bound of the scaled scores: each score `s` becomes `cap · tanh(s / cap)`.
    pub logit_soft_cap: Option<f32>,
    /// A further logit of each query head, `[num_qo_heads]`, in its softmax, to which no V belongs.
    pub sinks: Option<&'a [f32]>,
}

/// What becomes of the product of a query and a key.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Logits {
    pub scale: f32,
    pub soft_cap: Option<f32>,
}

impl Options<'_> {
    pub(crate) fn check(&self, shape: AttentionShape) -> Result<Logits, CpuError> {
        let scale = self.scale.unwrap_or((shape.head_dim() as f32).sqrt().recip());
        for (what, value) in [("softmax scale", scale), ("logit soft-cap", self.logit_soft_cap.unwrap_or(1.0))] {
            if !value.is_finite() || value <= 0.0 {
                return Err(CpuError::NotPositive { what, value });
            }
        }
        if let Some(sinks) = self.sinks
            && sinks.len() != shape.num_qo_heads() as usize
        {
            let (found, needed) = (sinks.len(), shape.num_qo_heads().into());
            return Err(CpuError::Length { buffer: "sinks", shape: "[num_qo_heads]", found, needed });
        }
        Ok(Logits { scale, soft_cap: self.logit_soft_cap })
    }
}
