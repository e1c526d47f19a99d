//! What is done to KV pools besides attention: slots are copied, and new tokens appended.

use packinfer_batch::{AttentionShape, Rope, RopeLayout};
use packinfer_kv::SlotCopy;

use crate::{CpuError, Element, KvElement, Number};

/// New tokens for a pool.
#[derive(Clone, Copy, Debug)]
pub struct Append<'a, E> {
    /// New K, `[tokens, num_kv_heads, head_dim]`.
    pub k: &'a [E],
    /// New V, like K.
    pub v: &'a [E],
    /// The slot of each token.
    pub slots: &'a [u32],
    /// The position of each token.
    pub positions: &'a [u32],
    /// How K is turned; not at all if `None`.
    pub rope: Option<Rope>,
    /// What K is divided by, `[num_kv_heads]`; 1 if `None`.
    pub k_scales: Option<&'a [f32]>,
    /// What V is divided by, `[num_kv_heads]`; 1 if `None`.
    pub v_scales: Option<&'a [f32]>,
}

/// Copies slots of a pool, one copy after the other.
///
/// # Errors
///
/// A copy that reaches past the last slot.
pub fn copy_slots<K: Number>(pool: &mut [K], elements_per_slot: usize, copies: &[SlotCopy]) -> Result<(), CpuError> {
    let num_slots = pool.len() as u64 / elements_per_slot.max(1) as u64;
    for copy in copies {
        let last = u64::from(copy.from.max(copy.to)) + u64::from(copy.num_slots);
        if last > num_slots {
            return Err(CpuError::NoSuchSlot { slot: last.saturating_sub(1), num_slots });
        }
        let [from, to, len] = [copy.from, copy.to, copy.num_slots].map(|slots| slots as usize * elements_per_slot);
        pool.copy_within(from..from + len, to);
    }
    Ok(())
}

/// Writes new tokens into their slots of a layer's K and V, each `[slots, num_kv_heads, head_dim]`. RoPE is computed in float64;
/// numbers are divided by their scales in float32, then rounded.
///
/// # Errors
///
/// Types or lengths other than the shape's, RoPE that heads of this size cannot have, or slots that the pools do not have.
pub fn append<E: Element, K: KvElement<E>>(
    shape: AttentionShape,
    append: Append<'_, E>,
    k_pool: &mut [K],
    v_pool: &mut [K],
) -> Result<(), CpuError> {
    append.check::<K>(shape, k_pool, v_pool)?;
    let mut k: Vec<f64> = append.k.iter().map(|element| element.to_f64()).collect();
    if let Some(rope) = &append.rope {
        turn(&mut k, shape, rope, append.positions)?;
    }
    let v: Vec<f64> = append.v.iter().map(|element| element.to_f64()).collect();
    let (head_dim, slot_len) = (shape.head_dim() as usize, shape.kv_elements_per_slot() as usize);
    for (new, pool, scales) in [(&k, k_pool, append.k_scales), (&v, v_pool, append.v_scales)] {
        for (token, &slot) in new.chunks_exact(slot_len).zip(append.slots) {
            let slot = &mut pool[slot as usize * slot_len..][..slot_len];
            for (head, (numbers, stored)) in token.chunks_exact(head_dim).zip(slot.chunks_exact_mut(head_dim)).enumerate() {
                let scale = scales.map_or(1.0, |scales| scales[head]);
                for (stored, &number) in stored.iter_mut().zip(numbers) {
                    *stored = K::from_f32(number as f32 / scale);
                }
            }
        }
    }
    Ok(())
}

/// RoPE of tokens, `[tokens, num_kv_heads, head_dim]`, in float64.
///
/// # Errors
///
/// RoPE that heads of this size cannot have, or another number of elements than the positions' tokens have.
pub fn turn(tokens: &mut [f64], shape: AttentionShape, rope: &Rope, positions: &[u32]) -> Result<(), CpuError> {
    rope.check(shape.head_dim())?;
    let slot_len = shape.kv_elements_per_slot();
    check_length("the tokens", "[tokens, num_kv_heads, head_dim]", tokens.len(), positions.len() as u64 * slot_len)?;
    let frequencies: Vec<f64> = rope.frequencies().collect();
    for (token, &position) in tokens.chunks_exact_mut(slot_len as usize).zip(positions) {
        for head in token.chunks_exact_mut(shape.head_dim() as usize) {
            for (pair, frequency) in frequencies.iter().enumerate() {
                let (a, b) = match rope.layout {
                    RopeLayout::HalfSplit => (pair, pair + frequencies.len()),
                    RopeLayout::Interleaved => (2 * pair, 2 * pair + 1),
                };
                let (sin, cos) = (f64::from(position) * frequency).sin_cos();
                (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[b] * cos + head[a] * sin);
            }
        }
    }
    Ok(())
}

impl<E: Element> Append<'_, E> {
    fn check<K: KvElement<E>>(&self, shape: AttentionShape, k_pool: &[K], v_pool: &[K]) -> Result<(), CpuError> {
        if E::DTYPE != shape.dtype() {
            return Err(CpuError::DType { found: E::DTYPE, needed: shape.dtype() });
        }
        if K::KV_DTYPE != shape.kv_dtype() {
            return Err(CpuError::KvDType { found: K::KV_DTYPE, needed: shape.kv_dtype() });
        }
        let (tokens, slot_len) = (self.slots.len() as u64, shape.kv_elements_per_slot());
        for (buffer, elements) in [("new K", self.k), ("new V", self.v)] {
            check_length(buffer, "[tokens, num_kv_heads, head_dim]", elements.len(), tokens * slot_len)?;
        }
        check_length("positions", "[tokens]", self.positions.len(), tokens)?;
        for (buffer, scales) in [("k_scales", self.k_scales), ("v_scales", self.v_scales)] {
            let num_heads = u64::from(shape.num_kv_heads());
            check_length(buffer, "[num_kv_heads]", scales.map_or(num_heads as usize, <[f32]>::len), num_heads)?;
        }
        let num_slots = k_pool.len().min(v_pool.len()) as u64 / slot_len;
        match self.slots.iter().map(|&slot| u64::from(slot)).find(|&slot| slot >= num_slots) {
            Some(slot) => Err(CpuError::NoSuchSlot { slot, num_slots }),
            None => Ok(()),
        }
    }
}

fn check_length(buffer: &'static str, shape: &'static str, found: usize, needed: u64) -> Result<(), CpuError> {
    if found as u64 == needed { Ok(()) } else { Err(CpuError::Length { buffer, shape, found, needed }) }
}
