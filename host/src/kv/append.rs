//! New tokens' K and V into their slots of one layer, by one launch.

use std::fmt;

use packinfer_abi::{KvAppendParams, RopeLayout, VECTOR_BYTES};
use packinfer_batch::{AttentionShape, KvDType, Rope};

use super::copies::num_blocks;
use super::{AppendSlots, KvArena, KvMemoryError};
use crate::kernels::parameter;
use crate::memory::{DeviceBuffer, DeviceSlice};
use crate::run::check_alignment;
use crate::stream::Stream;
use crate::{Element, Engine, EngineError, KvElement};

/// RoPE with its frequencies on the device, in fixed point: angles are exact to 2^−32 of a turn at whatever position.
pub struct DeviceRope {
    rope: Rope,
    frequencies: DeviceBuffer<u64>,
}

impl DeviceRope {
    /// What it turns, and how far.
    pub fn rope(&self) -> Rope {
        self.rope
    }
}

impl fmt::Debug for DeviceRope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DeviceRope").field(&self.rope).finish()
    }
}

/// What is appended to a layer.
#[derive(Clone, Copy, Debug)]
pub struct KvAppend<'a, E> {
    /// New K, `[tokens, num_kv_heads, head_dim]`.
    pub k: DeviceSlice<'a, E>,
    /// New V, like K.
    pub v: DeviceSlice<'a, E>,
    /// Where the tokens go.
    pub slots: &'a AppendSlots,
    /// How K is turned; not at all if `None`.
    pub rope: Option<&'a DeviceRope>,
    /// What K is divided by where the arena is in FP8, `[num_kv_heads]`: the numbers that attention multiplies with
    /// ([`RunOptions::k_scales`](crate::RunOptions::k_scales)); 1 if `None`.
    pub k_scales: Option<DeviceSlice<'a, f32>>,
    /// As `k_scales`, of V.
    pub v_scales: Option<DeviceSlice<'a, f32>>,
}

impl<'a, E> KvAppend<'a, E> {
    /// K and V as they are.
    pub fn new(k: DeviceSlice<'a, E>, v: DeviceSlice<'a, E>, slots: &'a AppendSlots) -> Self {
        Self { k, v, slots, rope: None, k_scales: None, v_scales: None }
    }
}

impl Engine {
    /// RoPE with its frequencies on the device: make it once.
    ///
    /// # Errors
    ///
    /// A `rotary_dim` that no heads can have turned, a base or a scale that is not finite and greater than 0, or not enough
    /// device memory.
    pub fn rope(&self, rope: Rope) -> Result<DeviceRope, EngineError> {
        rope.check(most_head_dim()).map_err(KvMemoryError::from)?;
        let frequencies: Vec<u64> = rope.fixed_point_frequencies().collect();
        Ok(DeviceRope { rope, frequencies: self.copy_of(&frequencies)? })
    }

    /// Writes the K and V of new tokens into their slots of a layer: one launch, which is given to `stream` and not waited for. K
    /// is turned by RoPE in float32. In FP8 K and V are divided by their heads' scales, then rounded to the nearest, and to ±448
    /// what is beyond.
    ///
    /// # Errors
    ///
    /// No such layer, tensors of other lengths or at addresses that are not multiples of 16, slots that were checked for a larger
    /// pool, scales for an arena that is not in FP8, more elements turned than a head has, objects of another device, or what the
    /// driver reports.
    pub fn kv_append<E: Element, K: KvElement<E>>(
        &self,
        arena: &mut KvArena<E, K>,
        layer: u32,
        append: KvAppend<'_, E>,
        stream: &Stream,
    ) -> Result<(), EngineError> {
        self.check("the stream", stream.shared())?;
        self.check("the arena", arena.elements().shared())?;
        self.check("the list of slots", append.slots.shared())?;
        if let Some(rope) = append.rope {
            self.check("the RoPE", rope.frequencies.shared())?;
        }
        append.check(arena.shape(), arena.num_slots())?;
        let pools = arena.pool_addresses(layer)?;
        let num_tokens = append.slots.num_tokens();
        if num_tokens == 0 {
            return Ok(());
        }
        self.shared().enter()?;
        let params = append.params(arena.shape(), pools, append.slots.read_on(stream)?);
        let vector_elements = VECTOR_BYTES / arena.shape().kv_element_bytes() as u32;
        let blocks = num_blocks("appending tokens", num_tokens.into(), params.blocks_per_token(vector_elements).into())?;
        // SAFETY: the kernel has this one parameter. The list is on the device when the stream gets there, its slots are within
        // the checked pools, and the tensors are of the checked lengths. Freeing any of this memory waits for the device.
        unsafe { arena.append_kernel.launch(blocks, &mut [parameter(&params)], stream) }
    }
}

impl<E> KvAppend<'_, E> {
    /// Checks everything against an arena.
    fn check(&self, shape: AttentionShape, num_slots: u32) -> Result<(), EngineError> {
        check_pool(self.slots.num_slots(), num_slots)?;
        if let Some(rope) = self.rope {
            rope.rope.check(shape.head_dim()).map_err(KvMemoryError::from)?;
        }
        check_new("new K", &self.k, shape, self.slots.num_tokens())?;
        check_new("new V", &self.v, shape, self.slots.num_tokens())?;
        check_scales("k_scales", self.k_scales, shape)?;
        check_scales("v_scales", self.v_scales, shape)
    }

    fn params(&self, shape: AttentionShape, [k_pool, v_pool]: [u64; 2], [slots, positions]: [u64; 2]) -> KvAppendParams {
        let scales = |scales: Option<DeviceSlice<'_, f32>>| scales.map_or(0, |scales| scales.address);
        KvAppendParams {
            k: self.k.address,
            v: self.v.address,
            k_pool,
            v_pool,
            slots,
            positions,
            frequencies: self.rope.map_or(0, |rope| rope.frequencies.address()),
            k_scales: scales(self.k_scales),
            v_scales: scales(self.v_scales),
            num_kv_heads: shape.num_kv_heads(),
            head_dim: shape.head_dim(),
            rotary_dim: self.rope.map_or(0, |rope| rope.rope.rotary_dim),
            rope_layout: self.rope.map_or(RopeLayout::HalfSplit, |rope| rope.rope.layout),
        }
    }
}

/// The most elements of a head.
fn most_head_dim() -> u32 {
    AttentionShape::HEAD_DIMS.into_iter().max().unwrap_or_default()
}

/// Checks that slots that were checked for `found` slots are within `num_slots`.
fn check_pool(found: u32, num_slots: u32) -> Result<(), KvMemoryError> {
    if found <= num_slots { Ok(()) } else { Err(KvMemoryError::OtherPool { found, num_slots }) }
}

fn check_new<E>(
    tensor: &'static str,
    new: &DeviceSlice<'_, E>,
    shape: AttentionShape,
    num_tokens: u32,
) -> Result<(), EngineError> {
    check_length(tensor, "[tokens, num_kv_heads, head_dim]", new.len, u64::from(num_tokens) * shape.kv_elements_per_slot())?;
    check_alignment(tensor, new.address)
}

fn check_scales(option: &'static str, scales: Option<DeviceSlice<'_, f32>>, shape: AttentionShape) -> Result<(), EngineError> {
    let Some(scales) = scales else { return Ok(()) };
    if shape.kv_dtype() == KvDType::Same {
        return Err(EngineError::NoScales { option });
    }
    check_length(option, "[num_kv_heads]", scales.len, shape.num_kv_heads().into())?;
    check_alignment(option, scales.address)
}

fn check_length(tensor: &'static str, shape: &'static str, found: usize, needed: u64) -> Result<(), KvMemoryError> {
    let found = found as u64;
    if found == needed { Ok(()) } else { Err(KvMemoryError::Length { tensor, shape, found, needed }) }
}

#[cfg(test)]
mod tests {
    use packinfer_batch::DType;

    use super::*;

    /// Memory that nothing reads.
    fn slice<T>(address: u64, len: usize) -> DeviceSlice<'static, T> {
        // SAFETY: it is only looked at where it would lie.
        unsafe { DeviceSlice::from_raw(address, len) }
    }

    fn shape() -> AttentionShape {
        AttentionShape::new(8, 2, 64, DType::F16).expect("a good shape")
    }

    #[test]
    fn new_tokens_have_the_shape_s_length_and_a_good_address() {
        let check = |address, len| check_new::<u16>("new K", &slice(address, len), shape(), 10);
        assert!(check(4096, 10 * 2 * 64).is_ok());
        let error = check(4096, 10 * 2 * 64 - 1).expect_err("too short");
        assert!(
            matches!(error, EngineError::KvMemory(KvMemoryError::Length { tensor: "new K", found: 1279, needed: 1280, .. })),
            "{error}"
        );
        let error = check(4096 + 8, 10 * 2 * 64).expect_err("a bad address");
        assert!(matches!(error, EngineError::Misaligned { tensor: "new K", address: 4104, .. }), "{error}");
    }

    #[test]
    fn scales_are_for_fp8_and_for_each_head() {
        let check = |scales, shape| check_scales("v_scales", scales, shape);
        let fp8 = shape().with_kv_dtype(KvDType::E4m3);
        assert!(check(None, shape()).is_ok() && check(None, fp8).is_ok() && check(Some(slice(64, 2)), fp8).is_ok());
        let error = check(Some(slice(64, 2)), shape()).expect_err("no scales in f16");
        assert!(matches!(error, EngineError::NoScales { option: "v_scales" }), "{error}");
        let error = check(Some(slice(64, 8)), fp8).expect_err("too many");
        assert!(matches!(error, EngineError::KvMemory(KvMemoryError::Length { found: 8, needed: 2, .. })), "{error}");
        assert!(matches!(check(Some(slice(68, 2)), fp8), Err(EngineError::Misaligned { .. })));
    }

    #[test]
    fn slots_are_within_the_pool() {
        assert_eq!(check_pool(10, 10), Ok(()));
        assert_eq!(check_pool(9, 10), Ok(()));
        assert_eq!(check_pool(11, 10), Err(KvMemoryError::OtherPool { found: 11, num_slots: 10 }));
    }
}
