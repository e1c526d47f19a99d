//! Tensor maps of K and V, which tell the copy engine of `sm_90` devices where slots lie (CUDA driver API, Tensor Map Object Management).

use std::collections::HashMap;
use std::ffi::c_void;
use std::mem::transmute;
use std::sync::Arc;

use cust::sys::{self, CUresult};
use packinfer_abi::{KV_BOX_ELEMENTS, KV_BOX_GROUP, NUM_KV_BOXES, TENSOR_MAP_BYTES};
use packinfer_batch::{AttentionShape, DType, KvLayout};

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

/// The maps of one K and V: [`NUM_KV_BOXES`] of each.
type PairMaps = [TensorMap; 2 * NUM_KV_BOXES as usize];

/// Pairs of K and V that an allocation holds the maps of: the layers of a large model.
const PAIRS_PER_ALLOCATION: usize = 128;
/// Pairs whose maps are kept; past that, all are forgotten, as the tensors seem to be other ones in every run.
const MOST_PAIRS: usize = 64 * PAIRS_PER_ALLOCATION;

/// What maps are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct KvTensors {
    pub shape: AttentionShape,
    pub layout: KvLayout,
    /// Addresses of K and V.
    pub addresses: [u64; 2],
    /// Slots that they have, counted in slot strides.
    pub num_slots: [u64; 2],
}

/// Maps on the device, made when K and V are first seen.
#[derive(Default)]
pub(crate) struct KvMaps {
    addresses: HashMap<KvTensors, u64>,
    allocations: Vec<DeviceBuffer<u8>>,
}

impl KvMaps {
    /// Where the maps of K and V are when the stream gets there. All calls are for streams that wait for each other.
    pub fn get(&mut self, shared: &Arc<Shared>, stream: &Stream, tensors: KvTensors) -> Result<u64, EngineError> {
        if let Some(&address) = self.addresses.get(&tensors) {
            return Ok(address);
        }
        stream.check_not_captured("making the tensor maps of K and V")?;
        let maps = encode(&tensors)?;
        if self.addresses.len() == MOST_PAIRS {
            self.addresses.clear();
        }
        let pair = self.addresses.len();
        if pair == self.allocations.len() * PAIRS_PER_ALLOCATION {
            let num_bytes = PAIRS_PER_ALLOCATION * size_of::<PairMaps>();
            self.allocations.push(DeviceBuffer::zeroed(shared, num_bytes, "tensor maps")?);
        }
        let offset = pair % PAIRS_PER_ALLOCATION * size_of::<PairMaps>();
        let address = self.allocations[pair / PAIRS_PER_ALLOCATION].address() + offset as u64;
        // SAFETY: the allocation has room for the maps there. They are in pageable memory, which the driver copies before it returns;
        // earlier runs that may use maps at this address come before in the order of streams.
        unsafe { sys::cuMemcpyHtoDAsync_v2(address, maps.as_ptr().cast(), size_of::<PairMaps>(), stream.as_raw()) }
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

/// Makes the maps: boxes of 1, 2, 4 … slots of one head, as [`packinfer_abi::AttentionParams::kv_maps`] says.
fn encode(tensors: &KvTensors) -> Result<PairMaps, EngineError> {
    const RANK: usize = 5;
    const INTERLEAVE_NONE: u32 = 0;
    const SWIZZLE_128B: u32 = 3;
    const L2_PROMOTION_256B: u32 = 3;
    const FILL_ZEROS: u32 = 0;
    /// Of the largest box.
    const MOST_GROUPS: u32 = (1 << (NUM_KV_BOXES - 1)) / KV_BOX_GROUP;
    let encode_tiled = encode_tiled()?;
    let shape = tensors.shape;
    let data_type = match shape.dtype() {
        DType::F16 => 6,
        DType::Bf16 => 9,
    };
    let element_bytes = shape.dtype().size_in_bytes();
    let strides = tensors.layout.strides(shape);
    let (slot_bytes, head_bytes) = (strides.slot * element_bytes, strides.head * element_bytes);
    let panel_bytes = u64::from(KV_BOX_ELEMENTS) * element_bytes;
    let panels = shape.head_dim() / KV_BOX_ELEMENTS;
    let strides: [u64; RANK - 1] = [slot_bytes, panel_bytes, u64::from(KV_BOX_GROUP) * slot_bytes, head_bytes];
    let mut maps = [TensorMap([0; TENSOR_MAP_BYTES as usize]); 2 * NUM_KV_BOXES as usize];
    for (index, map) in maps.iter_mut().enumerate() {
        let (tensor, log2) = (index / NUM_KV_BOXES as usize, index % NUM_KV_BOXES as usize);
        let slots = 1 << log2;
        // The slot dimension alone says where the tensor ends: boxes of several groups begin so that all of them exist, and the slots of
        // a run exist for all heads, however far apart these are.
        let dims: [u64; RANK] = [
            u64::from(KV_BOX_ELEMENTS),
            tensors.num_slots[tensor],
            u64::from(panels),
            u64::from(MOST_GROUPS),
            u64::from(shape.num_kv_heads()),
        ];
        let box_dims: [u32; RANK] = if slots < KV_BOX_GROUP {
            [KV_BOX_ELEMENTS, slots, 1, 1, 1]
        } else {
            [KV_BOX_ELEMENTS, KV_BOX_GROUP, panels, slots / KV_BOX_GROUP, 1]
        };
        // SAFETY: the arrays have the lengths that the rank asks for. The driver only writes the map.
        unsafe {
            encode_tiled(
                map,
                data_type,
                RANK as u32,
                tensors.addresses[tensor] as *mut c_void,
                dims.as_ptr(),
                strides.as_ptr(),
                box_dims.as_ptr(),
                [1; RANK].as_ptr(),
                INTERLEAVE_NONE,
                SWIZZLE_128B,
                L2_PROMOTION_256B,
                FILL_ZEROS,
            )
        }
        .doing("making a tensor map")?;
    }
    Ok(maps)
}
