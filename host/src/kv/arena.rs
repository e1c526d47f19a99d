//! Device memory for K and V of all layers.

use std::fmt;
use std::marker::PhantomData;

use packinfer_batch::AttentionShape;

use super::KvMemoryError;
use crate::kernels::{Kernel, KernelSource};
use crate::memory::{DeviceBuffer, DeviceSlice};
use crate::{Element, Engine, EngineError, KvElement};

/// K and V of all layers, in one piece of device memory: `[layers, 2, slots, num_kv_heads, head_dim]`, where the 2 are K and V.
/// New tokens come in elements `E`.
///
/// ```no_run
/// use half::bf16;
/// use packinfer::{AttentionShape, DType, Engine, EngineOptions, KvAppend, KvArena, Rope, SlotCopy};
///
/// let engine = Engine::new(EngineOptions::default())?;
/// let stream = engine.stream()?;
/// let shape = AttentionShape::new(32, 8, 128, DType::Bf16)?;
/// let mut arena = KvArena::<bf16>::new(&engine, shape, 32, 65_536)?;
///
/// // A step brings two tokens: the 8th of one request, the 101st of another. Once a step:
/// let slots = engine.upload_append_slots(&[7, 1100], &[7, 100], arena.num_slots(), &stream)?;
/// // Once a layer, whose new K and V are of 2 tokens:
/// let rope = engine.rope(Rope::new(128))?;
/// let (k, v) = (engine.zeros::<bf16>(2 * 8 * 128)?, engine.zeros::<bf16>(2 * 8 * 128)?);
/// let append = KvAppend { rope: Some(&rope), ..KvAppend::new(k.as_slice(), v.as_slice(), &slots) };
/// engine.kv_append(&mut arena, 0, append, &stream)?;
///
/// // The first request moves, in all layers.
/// let copies = engine.upload_copies(&arena, &[SlotCopy { from: 0, to: 4096, num_slots: 8 }], &stream)?;
/// engine.kv_move(&mut arena, &copies, &stream)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct KvArena<E, K = E> {
    elements: DeviceBuffer<K>,
    form: Form,
    pub(super) move_kernel: Kernel,
    pub(super) append_kernel: Kernel,
    new_elements: PhantomData<E>,
}

impl<E: Element, K: KvElement<E>> KvArena<E, K> {
    /// An arena of zeros: for `num_layers` layers of `shape`, each with `num_slots` slots.
    ///
    /// # Errors
    ///
    /// A shape of other element types, no layers or no slots, not enough device memory, or kernels that the driver cannot load.
    pub fn new(engine: &Engine, shape: AttentionShape, num_layers: u32, num_slots: u32) -> Result<Self, EngineError> {
        let form = Form::new::<E, K>(shape, num_layers, num_slots)?;
        let shared = engine.shared();
        shared.enter()?;
        Ok(Self {
            elements: DeviceBuffer::zeroed(shared, form.len(), "a KV arena")?,
            form,
            move_kernel: shared.kernels.get(KernelSource::kv_move())?,
            append_kernel: shared.kernels.get(KernelSource::kv_append(shape))?,
            new_elements: PhantomData,
        })
    }

    /// K and V of a layer, each `[slots, num_kv_heads, head_dim]`, as [`Tensors`](crate::Tensors) takes them.
    ///
    /// # Errors
    ///
    /// No such layer.
    pub fn layer(&self, layer: u32) -> Result<(DeviceSlice<'_, K>, DeviceSlice<'_, K>), EngineError> {
        let [k, v] = self.pool_addresses(layer)?;
        let len = self.elements.len() / self.form.num_pools() as usize;
        // SAFETY: each is one of the arena's equal parts, and freeing the arena waits for the device.
        Ok(unsafe { (DeviceSlice::from_raw(k, len), DeviceSlice::from_raw(v, len)) })
    }

    /// All elements, as [`Self`] orders them.
    pub fn elements(&self) -> &DeviceBuffer<K> {
        &self.elements
    }

    /// As [`Self::elements`], for the host to write.
    pub fn elements_mut(&mut self) -> &mut DeviceBuffer<K> {
        &mut self.elements
    }

    /// Heads, head dimension, element types.
    pub fn shape(&self) -> AttentionShape {
        self.form.shape
    }

    /// Number of layers.
    pub fn num_layers(&self) -> u32 {
        self.form.num_layers
    }

    /// Slots of each layer.
    pub fn num_slots(&self) -> u32 {
        self.form.num_slots
    }

    /// Bytes of a slot of K, and as many of V, in one layer.
    pub fn slot_bytes(&self) -> u64 {
        self.form.slot_bytes()
    }

    pub(super) fn form(&self) -> Form {
        self.form
    }

    /// Addresses of K and V of a layer.
    pub(super) fn pool_addresses(&self, layer: u32) -> Result<[u64; 2], KvMemoryError> {
        Ok(self.form.pool_offsets(layer)?.map(|offset| self.elements.address() + offset))
    }
}

/// What there is of an arena, but for its memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Form {
    pub shape: AttentionShape,
    pub num_layers: u32,
    pub num_slots: u32,
}

impl Form {
    /// Checks that there can be such an arena.
    fn new<E: Element, K: KvElement<E>>(shape: AttentionShape, num_layers: u32, num_slots: u32) -> Result<Self, KvMemoryError> {
        let (needed, kv_needed) = (shape.dtype(), shape.kv_dtype());
        if (E::DTYPE, K::KV_DTYPE) != (needed, kv_needed) {
            return Err(KvMemoryError::ElementTypes { found: E::DTYPE, kv_found: K::KV_DTYPE, needed, kv_needed });
        }
        let form = Self { shape, num_layers, num_slots };
        let bytes = u128::from(form.num_pools()) * u128::from(num_slots) * u128::from(form.slot_bytes());
        // What can be allocated is counted by an `isize`.
        let is_countable = isize::try_from(bytes).is_ok_and(|bytes| bytes > 0);
        if is_countable { Ok(form) } else { Err(KvMemoryError::BadArena { num_layers, num_slots }) }
    }

    /// Elements of all layers.
    fn len(&self) -> usize {
        (self.num_pools() * self.pool_bytes() / self.shape.kv_element_bytes()) as usize
    }

    /// Tensors that slots are in: K and V of each layer.
    pub fn num_pools(&self) -> u64 {
        2 * u64::from(self.num_layers)
    }

    /// Bytes of one of them.
    pub fn pool_bytes(&self) -> u64 {
        u64::from(self.num_slots) * self.slot_bytes()
    }

    /// Bytes of a slot in one of them.
    pub fn slot_bytes(&self) -> u64 {
        self.shape.kv_elements_per_slot() * self.shape.kv_element_bytes()
    }

    /// Where K and V of a layer begin, in bytes.
    fn pool_offsets(&self, layer: u32) -> Result<[u64; 2], KvMemoryError> {
        if layer >= self.num_layers {
            return Err(KvMemoryError::NoSuchLayer { layer, num_layers: self.num_layers });
        }
        let k = 2 * u64::from(layer) * self.pool_bytes();
        Ok([k, k + self.pool_bytes()])
    }
}

impl<E, K> fmt::Debug for KvArena<E, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvArena").field("form", &self.form).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use float8::F8E4M3;
    use half::{bf16, f16};
    use packinfer_batch::{DType, KvDType};

    use super::*;

    #[test]
    fn an_arena_has_k_and_v_of_all_layers() {
        let shape = AttentionShape::new(32, 8, 128, DType::Bf16).expect("a good shape");
        let form = Form::new::<bf16, bf16>(shape, 3, 10).expect("a good arena");
        assert_eq!((form.len(), form.slot_bytes()), (3 * 2 * 10 * 8 * 128, 2 * 8 * 128));
        assert_eq!(form.pool_offsets(2), Ok([4 * 20_480, 5 * 20_480]));
        assert_eq!(form.pool_offsets(3), Err(KvMemoryError::NoSuchLayer { layer: 3, num_layers: 3 }));
        let form = Form::new::<bf16, F8E4M3>(shape.with_kv_dtype(KvDType::E4m3), 3, 10).expect("a good arena");
        assert_eq!((form.len(), form.slot_bytes()), (3 * 2 * 10 * 8 * 128, 8 * 128));
    }

    #[test]
    fn arenas_of_nothing_or_too_much_are_errors() {
        let shape = AttentionShape::new(1024, 1024, 256, DType::Bf16).expect("a good shape");
        for (num_layers, num_slots) in [(0, 10), (10, 0), (u32::MAX, u32::MAX), (1 << 13, u32::MAX)] {
            let error = Form::new::<bf16, bf16>(shape, num_layers, num_slots).expect_err("there is no such arena");
            assert_eq!(error, KvMemoryError::BadArena { num_layers, num_slots });
        }
    }

    #[test]
    fn element_types_are_those_of_the_shape() {
        let shape = AttentionShape::new(8, 8, 64, DType::F16).expect("a good shape");
        assert!(Form::new::<f16, f16>(shape, 1, 1).is_ok());
        for form in [Form::new::<bf16, bf16>(shape, 1, 1), Form::new::<f16, F8E4M3>(shape, 1, 1)] {
            assert!(matches!(form, Err(KvMemoryError::ElementTypes { .. })), "{form:?}");
        }
    }
}
