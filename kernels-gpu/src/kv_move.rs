//! Copies KV slots to others, in all pools: K and V of every layer.
//!
//! The host has cut the copies into pieces of at most [`PIECE_VECTORS`]. A warp copies one of them in one pool: all its loads are
//! in flight before the first store, which with 32 warps on a multiprocessor is several times what the memory takes to be busy.
//! Pieces are small because then even a short list, as the move of one request, gives work to all multiprocessors. What passes
//! through is not needed again soon, so caches are asked to give it up first: attention may run beside this.

use packinfer_abi::{KV_MOVE_THREADS, KvCopyPiece, KvMoveParams, PIECE_VECTORS, VECTOR_BYTES};

use crate::ptx::math;
use crate::ptx::memory::{load_global_once_x4, load_global_x4, store_global_once_x4};
use crate::ptx::special::{block_index, thread_index};
use crate::ptx::warp::LANES;

/// Pieces of a block: one for each warp.
const WARPS: u32 = KV_MOVE_THREADS / LANES;
/// Vectors of a piece that a lane copies.
const VECTORS: usize = (PIECE_VECTORS / LANES) as usize;

#[inline(always)]
unsafe fn move_slots(params: KvMoveParams) {
    let blocks_per_pool = params.num_pieces.div_ceil(WARPS);
    let pool = math::divide(block_index(), blocks_per_pool);
    let (warp, lane) = (thread_index() / LANES, thread_index() % LANES);
    let piece = (block_index() - pool * blocks_per_pool) * WARPS + warp;
    if piece >= params.num_pieces {
        return;
    }
    let pool = params.pools + u64::from(pool) * params.pool_bytes;
    let [from_slot, to_slot, skip, num_vectors] =
        load_global_x4(params.pieces + u64::from(piece) * size_of::<KvCopyPiece>() as u64);
    let first_vector = |slot: u32| u64::from(slot) * u64::from(params.slot_vectors) + u64::from(skip);
    let from = pool + first_vector(from_slot) * u64::from(VECTOR_BYTES);
    let to = pool + first_vector(to_slot) * u64::from(VECTOR_BYTES);

    let mut vectors = [[0u32; 4]; VECTORS];
    for (i, vector) in vectors.iter_mut().enumerate() {
        // Past the end, the last one again: loads without conditions are all issued before the first is waited for.
        let index = (lane + i as u32 * LANES).min(num_vectors - 1);
        *vector = load_global_once_x4(from + u64::from(index * VECTOR_BYTES));
    }
    for (i, vector) in vectors.iter().enumerate() {
        let index = lane + i as u32 * LANES;
        if index < num_vectors {
            store_global_once_x4(to + u64::from(index * VECTOR_BYTES), *vector);
        }
    }
}

kernel! {
    /// Copies KV slots.
    #[launch_bounds(threads = 128, blocks_per_sm = 8)]
    fn kv_move(params: KvMoveParams) {
        move_slots(params)
    }
}
