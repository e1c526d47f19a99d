//! Tensor maps of Q, K and V, which tell the copy engine of `sm_90` devices where tokens and slots lie (CUDA driver API, Tensor
//! Map Object Management).

use std::collections::HashMap;
use std::ffi::c_void;
use std::hash::Hash;
use std::mem::transmute;
use std::sync::Arc;

use cust::sys::{self, CUresult};
use packinfer_abi::{
    HOPPER_STORED_STEP, KV_BOX_ELEMENTS, KV_BOX_GROUP, NUM_KV_BOXES, NUM_QUERY_BOXES, TALL_TILE_ROWS, TENSOR_MAP_BYTES,
    box_panels, hopper_column_step,
};
use packinfer_batch::{AttentionShape, DType, KvDType, KvLayout};

use crate::EngineError;
use crate::context::Shared;
use crate::entry_point::EntryPoint;
use crate::error::Doing;
use crate::memory::DeviceBuffer;
use crate::stream::Stream;

/// A tensor map as the driver makes it: opaque, aligned to 64 bytes.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct TensorMap([u8; TENSOR_MAP_BYTES as usize]);

/// Dimensions of the tensors.
const RANK: usize = 5;
/// Bytes of a line of the L2 cache.
const CACHE_LINE_BYTES: u64 = 128;

/// Tensors that an allocation holds the maps of: the layers of a large model.
const TENSORS_PER_ALLOCATION: usize = 128;
/// Tensors whose maps are kept; past that, all are forgotten, as the tensors seem to be other ones in every run.
const MOST_TENSORS: usize = 64 * TENSORS_PER_ALLOCATION;

/// K and V that maps are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct MappedKv {
    pub shape: AttentionShape,
    pub layout: KvLayout,
    /// Addresses of K and V.
    pub addresses: [u64; 2],
    /// Slots that they have, counted in slot strides.
    pub num_slots: [u64; 2],
}

/// Q that maps are made for. How many tokens it has does not matter: the plan says which are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct QueryTensor {
    pub shape: AttentionShape,
    pub heads_per_group: u32,
    pub address: u64,
}

/// Maps on the device, made when tensors are first seen.
#[derive(Default)]
pub(crate) struct TensorMaps {
    kv: MapsOf<MappedKv>,
    queries: MapsOf<QueryTensor>,
}

impl TensorMaps {
    /// Where the maps of K and V are when the stream gets there: [`NUM_KV_BOXES`] of K, then of V. All calls are for streams that
    /// wait for each other.
    pub fn kv(&mut self, shared: &Arc<Shared>, stream: &Stream, tensors: MappedKv) -> Result<u64, EngineError> {
        self.kv.get(shared, stream, "making the tensor maps of K and V", tensors, encode_kv)
    }

    /// Where the maps of Q are when the stream gets there: [`NUM_QUERY_BOXES`]. As for [`Self::kv`].
    pub fn queries(&mut self, shared: &Arc<Shared>, stream: &Stream, tensor: QueryTensor) -> Result<u64, EngineError> {
        self.queries.get(shared, stream, "making the tensor maps of Q", tensor, encode_queries)
    }
}

/// Maps of tensors that `T` says all about.
struct MapsOf<T> {
    addresses: HashMap<T, u64>,
    allocations: Vec<DeviceBuffer<u8>>,
}

impl<T> Default for MapsOf<T> {
    fn default() -> Self {
        Self { addresses: HashMap::new(), allocations: Vec::new() }
    }
}

impl<T: Copy + Eq + Hash> MapsOf<T> {
    fn get<const MAPS: usize>(
        &mut self,
        shared: &Arc<Shared>,
        stream: &Stream,
        what: &'static str,
        tensors: T,
        encode: impl FnOnce(&T) -> Result<[TensorMap; MAPS], EngineError>,
    ) -> Result<u64, EngineError> {
        if let Some(&address) = self.addresses.get(&tensors) {
            return Ok(address);
        }
        stream.check_not_captured(what)?;
        let maps = encode(&tensors)?;
        if self.addresses.len() == MOST_TENSORS {
            self.addresses.clear();
        }
        let (index, num_bytes) = (self.addresses.len(), size_of::<[TensorMap; MAPS]>());
        if index == self.allocations.len() * TENSORS_PER_ALLOCATION {
            self.allocations.push(DeviceBuffer::zeroed(shared, TENSORS_PER_ALLOCATION * num_bytes, "tensor maps")?);
        }
        let offset = index % TENSORS_PER_ALLOCATION * num_bytes;
        let address = self.allocations[index / TENSORS_PER_ALLOCATION].address() + offset as u64;
        // SAFETY: the allocation has room for the maps there. They are in pageable memory, which the driver copies before it
        // returns; earlier runs that may use maps at this address come before in the order of streams.
        unsafe { sys::cuMemcpyHtoDAsync_v2(address, maps.as_ptr().cast(), num_bytes, stream.as_raw()) }
            .doing("copying tensor maps to the device")?;
        self.addresses.insert(tensors, address);
        Ok(address)
    }
}

/// `cuTensorMapEncodeTiled`, which `cust`'s bindings do not have. Enums are passed as their numbers.
type EncodeTiled = unsafe extern "C" fn(
    map: *mut TensorMap,
    data_type: u32,
    rank: u32,
    address: *mut c_void,
    dims: *const u64,
    strides: *const u64,
    box_dims: *const u32,
    element_strides: *const u32,
    interleave: u32,
    swizzle: u32,
    l2_promotion: u32,
    out_of_bounds_fill: u32,
) -> CUresult;

fn encode_tiled() -> Result<EncodeTiled, EngineError> {
    static ENTRY_POINT: EntryPoint = EntryPoint::new(c"cuTensorMapEncodeTiled");
    // SAFETY: the driver's entry point of that name has this signature.
    Ok(unsafe { transmute::<usize, EncodeTiled>(ENTRY_POINT.address()?) })
}

/// Makes the maps of K, then of V: boxes of 1, 2, 4 … slots of one head, as [`packinfer_abi::AttentionParams::kv_maps`] says.
fn encode_kv(tensors: &MappedKv) -> Result<[TensorMap; 2 * NUM_KV_BOXES as usize], EngineError> {
    /// Of the largest box.
    const MOST_GROUPS: u32 = (1 << (NUM_KV_BOXES - 1)) / KV_BOX_GROUP;
    let shape = tensors.shape;
    let element_bytes = shape.kv_element_bytes();
    let strides = tensors.layout.strides(shape);
    let (slot_bytes, head_bytes) = (strides.slot * element_bytes, strides.head * element_bytes);
    let row_bytes = u64::from(shape.head_dim()) * element_bytes;
    // As if they were of the type of Q: in FP8, two make one of these.
    let elements = (row_bytes / shape.dtype().size_in_bytes()) as u32;
    let panels = box_panels(elements);
    let step = match shape.kv_dtype() {
        KvDType::Same => hopper_column_step(shape.head_dim()),
        KvDType::E4m3 => HOPPER_STORED_STEP,
    };
    let mut maps = [TensorMap::EMPTY; 2 * NUM_KV_BOXES as usize];
    for (index, map) in maps.iter_mut().enumerate() {
        let (tensor, log2) = (index / NUM_KV_BOXES as usize, index % NUM_KV_BOXES as usize);
        let slots = step.min(1 << log2);
        *map = Boxes {
            dtype: shape.dtype(),
            address: tensors.addresses[tensor],
            // The slot dimension alone says where the tensor ends: boxes of several groups begin so that all of them exist, and
            // the slots of a run exist for all heads, however far apart these are.
            dims: [
                u64::from(elements / panels),
                tensors.num_slots[tensor],
                u64::from(panels),
                u64::from(MOST_GROUPS),
                u64::from(shape.num_kv_heads()),
            ],
            strides: [slot_bytes, panel_bytes(shape), u64::from(KV_BOX_GROUP) * slot_bytes, head_bytes],
            box_dims: if slots < KV_BOX_GROUP {
                [KV_BOX_ELEMENTS, slots, 1, 1, 1]
            } else {
                [KV_BOX_ELEMENTS, KV_BOX_GROUP, panels, slots / KV_BOX_GROUP, 1]
            },
            contiguous_bytes: if slot_bytes == row_bytes { u64::from(slots) * row_bytes } else { row_bytes },
        }
        .encode()?;
    }
    Ok(maps)
}

/// Makes the maps of Q: boxes of 1, 2, 4 … tokens of a head group, as [`packinfer_abi::AttentionParams::q_maps`] says.
fn encode_queries(tensor: &QueryTensor) -> Result<[TensorMap; NUM_QUERY_BOXES as usize], EngineError> {
    /// More tokens than a batch has.
    const MOST_TOKENS: u64 = 1 << 31;
    let tokens_of_a_tile = TALL_TILE_ROWS / tensor.heads_per_group.clamp(1, TALL_TILE_ROWS);
    let shape = tensor.shape;
    let row_bytes = u64::from(shape.head_dim()) * shape.dtype().size_in_bytes();
    let token_bytes = u64::from(shape.num_qo_heads()) * row_bytes;
    let panels = box_panels(shape.head_dim());
    let mut maps = [TensorMap::EMPTY; NUM_QUERY_BOXES as usize];
    for (log2, map) in maps.iter_mut().enumerate() {
        *map = Boxes {
            dtype: shape.dtype(),
            address: tensor.address,
            dims: [u64::from(shape.head_dim() / panels), u64::from(shape.num_qo_heads()), u64::from(panels), MOST_TOKENS, 1],
            strides: [row_bytes, panel_bytes(shape), token_bytes, token_bytes],
            box_dims: [KV_BOX_ELEMENTS, tensor.heads_per_group, 1, tokens_of_a_tile.min(1 << log2), 1],
            contiguous_bytes: u64::from(tensor.heads_per_group) * row_bytes,
        }
        .encode()?;
    }
    Ok(maps)
}

/// Bytes of a row of a panel.
fn panel_bytes(shape: AttentionShape) -> u64 {
    u64::from(KV_BOX_ELEMENTS) * shape.dtype().size_in_bytes()
}

impl TensorMap {
    const EMPTY: Self = Self([0; TENSOR_MAP_BYTES as usize]);
}

/// What a map says: a tensor, and the boxes of it that are copied at a time, swizzled by 128 bytes. What lies outside the tensor
/// is zeros.
struct Boxes {
    dtype: DType,
    address: u64,
    /// Elements of each dimension.
    dims: [u64; RANK],
    /// Bytes between neighbours, of every dimension but the first.
    strides: [u64; RANK - 1],
    /// Elements of a box in each dimension.
    box_dims: [u32; RANK],
    /// Bytes of a box that lie one after the other.
    contiguous_bytes: u64,
}

/// What the L2 cache brings from memory besides the sectors of 32 bytes that a box needs: `CUtensorMapL2promotion`.
#[derive(Clone, Copy)]
enum L2Promotion {
    /// Nothing.
    None = 0,
    /// Lines of 128 bytes.
    Bytes128 = 2,
    /// Two lines.
    Bytes256 = 3,
}

impl L2Promotion {
    /// For boxes with so many bytes one after the other.
    fn of(contiguous_bytes: u64) -> Self {
        match contiguous_bytes {
            // The other line of two is of another head.
            CACHE_LINE_BYTES => Self::Bytes128,
            // Rows that do not divide a line: the rest of their lines is of other heads.
            bytes if bytes < CACHE_LINE_BYTES && !CACHE_LINE_BYTES.is_multiple_of(bytes) => Self::None,
            _ => Self::Bytes256,
        }
    }
}

impl Boxes {
    fn encode(&self) -> Result<TensorMap, EngineError> {
        const INTERLEAVE_NONE: u32 = 0;
        const SWIZZLE_128B: u32 = 3;
        const FILL_ZEROS: u32 = 0;
        let encode_tiled = encode_tiled()?;
        let data_type = match self.dtype {
            DType::F16 => 6,
            DType::Bf16 => 9,
        };
        let mut map = TensorMap::EMPTY;
        // SAFETY: the arrays have the lengths that the rank asks for. The driver only writes the map.
        unsafe {
            encode_tiled(
                &mut map,
                data_type,
                RANK as u32,
                self.address as *mut c_void,
                self.dims.as_ptr(),
                self.strides.as_ptr(),
                self.box_dims.as_ptr(),
                [1; RANK].as_ptr(),
                INTERLEAVE_NONE,
                SWIZZLE_128B,
                L2Promotion::of(self.contiguous_bytes) as u32,
                FILL_ZEROS,
            )
        }
        .doing("making a tensor map")?;
        Ok(map)
    }
}
