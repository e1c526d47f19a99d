//! Q, K, V in, O and LSE out.

use packinfer_batch::{AttentionShape, KvLayout};

use crate::options::Logits;
use crate::{CpuError, Element, KvElement, Options};

/// What attention reads.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, E, K = E> {
    /// Q, `[tokens, num_qo_heads, head_dim]`.
    pub q: &'a [E],
    /// K, `[slots, num_kv_heads, head_dim]`, or as the batch's [`KvLayout`] says.
    pub k: &'a [K],
    /// V, like K.
    pub v: &'a [K],
    /// How attention is computed.
    pub options: Options<'a>,
}

/// What attention writes.
#[derive(Debug)]
pub struct Outputs<'a, E> {
    /// O, like Q.
    pub o: &'a mut [E],
    /// Log-sum-exp of the logits, those of sinks included, natural logarithm, `[tokens, num_qo_heads]`; or not wanted.
    pub lse: Option<&'a mut [f32]>,
}

impl<E: Element, K: KvElement<E>> Inputs<'_, E, K> {
    /// Checks types, lengths and options.
    pub(crate) fn check(
        &self,
        shape: AttentionShape,
        num_query_tokens: u32,
        kv_layout: KvLayout,
        num_slots: u32,
    ) -> Result<Logits, CpuError> {
        if E::DTYPE != shape.dtype() {
            return Err(CpuError::DType { found: E::DTYPE, needed: shape.dtype() });
        }
        if K::KV_DTYPE != shape.kv_dtype() {
            return Err(CpuError::KvDType { found: K::KV_DTYPE, needed: shape.kv_dtype() });
        }
        check_length("Q", "[tokens, num_qo_heads, head_dim]", self.q.len(), num_query_tokens, shape.qo_elements_per_token())?;
        let needed = kv_layout.num_elements(shape, num_slots);
        for (buffer, elements) in [("K", self.k), ("V", self.v)] {
            if (elements.len() as u64) < needed {
                return Err(CpuError::PoolTooSmall { buffer, found: elements.len(), num_slots, needed });
            }
        }
        self.options.check(shape)
    }
}

impl<E> Outputs<'_, E> {
    pub(crate) fn check(&self, shape: AttentionShape, num_query_tokens: u32) -> Result<(), CpuError> {
        check_length("O", "[tokens, num_qo_heads, head_dim]", self.o.len(), num_query_tokens, shape.qo_elements_per_token())?;
        match &self.lse {
            Some(lse) => check_length("LSE", "[tokens, num_qo_heads]", lse.len(), num_query_tokens, shape.num_qo_heads().into()),
            None => Ok(()),
        }
    }
}

fn check_length(
    buffer: &'static str,
    shape: &'static str,
    found: usize,
    num_query_tokens: u32,
    elements_per_token: u64,
) -> Result<(), CpuError> {
    let needed = u64::from(num_query_tokens) * elements_per_token;
    if found as u64 == needed { Ok(()) } else { Err(CpuError::Length { buffer, shape, found, needed }) }
}
