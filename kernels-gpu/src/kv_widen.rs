//! Makes K and V in FP8 what Q is, once, for attention whose products would make each of them anew in every tile.
//!
//! Numbers stay what they are, as all of e4m3 are numbers of bf16 and of float16; scales are left to attention. The slots that the
//! plan asks for lie one after the other then, request after request.
//!
//! A block does a few slots of one tensor, and a thread eight elements at a time: a warp loads 256 bytes and stores 512, and has
//! several of each on their way.

use packinfer_abi::{KV_WIDEN_THREADS, KvWidenParams, KvWidenPiece, WIDEN_ELEMENTS};

use crate::e4m3::four_to_f16;
use crate::element::{Bf16, ELEMENT_BYTES, Element, F16};
use crate::ptx::math;
use crate::ptx::memory::{load_global, load_global_once_x2, store_global_x4_if};
use crate::ptx::special::{block_index, thread_index};

/// Parts of a thread that are on their way at a time.
const PARTS: usize = 8;

#[inline(always)]
unsafe fn widen<E: Element>(params: KvWidenParams) {
    let (piece, tensor) = (block_index() / 2, block_index() as usize % 2);
    let piece = params.pieces + u64::from(piece) * size_of::<KvWidenPiece>() as u64;
    let [from_slot, to_slot, num_slots] = [load_global(piece), load_global(piece + 4), load_global(piece + 8)];
    let (from, to) = if tensor == 0 { (params.from[0], params.to[0]) } else { (params.from[1], params.to[1]) };

    let parts_of_head = params.head_dim / WIDEN_ELEMENTS;
    let parts_of_slot = params.num_kv_heads * parts_of_head;
    let num_parts = num_slots * parts_of_slot;
    let address_of = |part: u32| {
        let slot = math::divide(part, parts_of_slot);
        let in_slot = part - slot * parts_of_slot;
        let head = math::divide(in_slot, parts_of_head);
        let element = (in_slot - head * parts_of_head) * WIDEN_ELEMENTS;
        let slot = u64::from(from_slot + slot) * u64::from(params.from_slot_bytes);
        from + slot + u64::from(head * params.from_head_bytes + element)
    };
    let to = to + u64::from(to_slot) * u64::from(parts_of_slot * WIDEN_ELEMENTS * ELEMENT_BYTES);

    let mut first = thread_index();
    while first < num_parts {
        let part_of = |index: usize| first + index as u32 * KV_WIDEN_THREADS;
        let mut stored = [[0u32; 2]; PARTS];
        for (index, stored) in stored.iter_mut().enumerate() {
            // Past the end, the last one again: loads without conditions are all issued before the first is waited for.
            *stored = load_global_once_x2(address_of(part_of(index).min(num_parts - 1)));
        }
        for (index, &[low, high]) in stored.iter().enumerate() {
            let part = part_of(index);
            let ([a, b], [c, d]) = (four_to_f16(low), four_to_f16(high));
            let words = [a, b, c, d].map(|pair| {
                if E::IS_OF_F16 {
                    return pair;
                }
                let [first, second] = F16::unpack(pair);
                E::pack(first, second)
            });
            store_global_x4_if(to + u64::from(part * (WIDEN_ELEMENTS * ELEMENT_BYTES)), words, part < num_parts);
        }
        first += PARTS as u32 * KV_WIDEN_THREADS;
    }
}

kernel! {
    /// Makes K and V in FP8 bf16.
    #[launch_bounds(threads = 128, blocks_per_sm = 8)]
    fn kv_widen_bf16(params: KvWidenParams) {
        widen::<Bf16>(params)
    }

    /// Makes K and V in FP8 float16.
    #[launch_bounds(threads = 128, blocks_per_sm = 8)]
    fn kv_widen_f16(params: KvWidenParams) {
        widen::<F16>(params)
    }
}
