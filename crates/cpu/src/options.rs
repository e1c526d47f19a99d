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
    /// What K is multiplied with, `[num_kv_heads]`; 1 if `None`.
    pub k_scales: Option<&'a [f32]>,
    /// What V is multiplied with, `[num_kv_heads]`; 1 if `None`.
    pub v_scales: Option<&'a [f32]>,
}

/// What becomes of the product of a query and a key.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Logits {
    pub scale: f32,
    pub soft_cap: Option<f32>,
}

impl Options<'_> {
    /// Scale of K of a KV head.
    pub(crate) fn k_scale(&self, kv_head: usize) -> f32 {
        self.k_scales.map_or(1.0, |scales| scales[kv_head])
    }

    /// Scale of V of a KV head.
    pub(crate) fn v_scale(&self, kv_head: usize) -> f32 {
        self.v_scales.map_or(1.0, |scales| scales[kv_head])
    }

    pub(crate) fn check(&self, shape: AttentionShape) -> Result<Logits, CpuError> {
        let scale = self.scale.unwrap_or((shape.head_dim() as f32).sqrt().recip());
        for (what, value) in [("softmax scale", scale), ("logit soft-cap", self.logit_soft_cap.unwrap_or(1.0))] {
            if !value.is_finite() || value <= 0.0 {
                return Err(CpuError::NotPositive { what, value });
            }
        }
        for (buffer, per_head, heads, num_heads) in [
            ("sinks", self.sinks, "[num_qo_heads]", shape.num_qo_heads()),
            ("k_scales", self.k_scales, "[num_kv_heads]", shape.num_kv_heads()),
            ("v_scales", self.v_scales, "[num_kv_heads]", shape.num_kv_heads()),
        ] {
            let found = per_head.map_or(num_heads as usize, <[f32]>::len);
            if found != num_heads as usize {
                return Err(CpuError::Length { buffer, shape: heads, found, needed: num_heads.into() });
            }
        }
        Ok(Logits { scale, soft_cap: self.logit_soft_cap })
    }
}
