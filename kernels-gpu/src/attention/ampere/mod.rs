//! For the tensor cores of `sm_80` and later: `cp.async`, `ldmatrix`, `mma.sync`. A thread block does one task.
//!
//! The hardware issues blocks in order, so the order of a plan's items, which ends with short ones, balances the device.

mod epilogue;
pub mod narrow;
pub mod wide;

use packinfer_abi::{ATTENTION_THREADS, AttentionParams, DeviceAddress, TILE_SHARED_BYTES, TileKind};

use super::task::{Stamper, Task};
use crate::element::{Bf16, Element, F16};
use crate::ptx::special::{block_index, dynamic_shared, thread_index};
use crate::ptx::warp;
use crate::rows::RowTable;
use crate::shared_tile::SharedTile;
use crate::stored::{AsQueries, E4m3, Stored};

/// Warps of a block.
const WARPS: u32 = ATTENTION_THREADS / 32;

/// What a thread knows of its block.
pub(crate) struct Block {
    pub task: Task,
    /// Start of [`TILE_SHARED_BYTES`] of shared memory.
    pub tiles: u32,
    pub thread: u32,
    pub warp: u32,
    pub lane: u32,
}

impl Block {
    /// Works everything out anew wherever it is called: what comes after a loop that needs all registers calls it again.
    #[inline(always)]
    unsafe fn this(params: AttentionParams) -> Self {
        let tiles = dynamic_shared();
        let thread = thread_index();
        Self {
            task: Task::load(params, block_index(), RowTable::at(tiles + TILE_SHARED_BYTES)),
            tiles,
            thread,
            warp: warp::uniform(thread / 32),
            lane: thread % 32,
        }
    }
}

/// Attention for a head dimension of `8 * DIM_BLOCKS`, K and V in rows of `KV_BLOCKS` chunks. Of wide tiles, a warp holds
/// `ROW_BLOCKS` blocks of 16 rows, and takes `WIDE_FRAGMENTS` fragments of 8 columns a step; of narrow tiles `NARROW_FRAGMENTS`.
#[inline(always)]
unsafe fn attention<
    E: Element,
    KV: Stored<E>,
    const DIM_BLOCKS: usize,
    const KV_BLOCKS: usize,
    const ROW_BLOCKS: usize,
    const WIDE_FRAGMENTS: usize,
    const NARROW_FRAGMENTS: usize,
>(
    params: AttentionParams,
) {
    const { assert!(KV_BLOCKS * KV::PRODUCTS == DIM_BLOCKS) };
    let block = Block::this(params);
    if let Some(stamper) = Stamper::of(&params).filter(|_| block.thread == 0) {
        stamper.begin(block.task.index);
    }
    match block.task.item.tile {
        TileKind::Wide => wide::run::<E, KV, DIM_BLOCKS, KV_BLOCKS, ROW_BLOCKS, WIDE_FRAGMENTS>(&block),
        TileKind::Narrow => narrow::run::<E, KV, DIM_BLOCKS, KV_BLOCKS, NARROW_FRAGMENTS>(&block),
    }
    if let Some(stamper) = Stamper::of(&params).filter(|_| thread_index() == 0) {
        stamper.end(block_index());
    }
}

/// Address of a lane's chunk of row `index` of Q or O.
#[inline(always)]
fn row_chunk<const DIM_BLOCKS: usize>(tensor: DeviceAddress, index: u32, lane: u32) -> DeviceAddress {
    let row_bytes = SharedTile::<DIM_BLOCKS>::ROW_BYTES;
    tensor + u64::from(index) * u64::from(row_bytes) + u64::from(SharedTile::<DIM_BLOCKS>::byte_of_lane(lane))
}

kernel! {
    /// Attention in bf16, head dimension 64.
    #[launch_bounds(threads = 128, blocks_per_sm = 2)]
    #[expect("bar.sync" = 4, "mma.sync" = 144)]
    fn attention_bf16_d64(params: AttentionParams) {
        attention::<Bf16, AsQueries, 8, 8, 2, 8, 2>(params)
    }

    /// Attention in bf16, head dimension 96.
    #[launch_bounds(threads = 128, blocks_per_sm = 2)]
    #[expect("bar.sync" = 4, "mma.sync" = 216)]
    fn attention_bf16_d96(params: AttentionParams) {
        attention::<Bf16, AsQueries, 12, 12, 2, 8, 2>(params)
    }

    /// Attention in bf16, head dimension 128.
    #[launch_bounds(threads = 128, blocks_per_sm = 2)]
    #[expect("bar.sync" = 4, "mma.sync" = 288)]
    fn attention_bf16_d128(params: AttentionParams) {
        attention::<Bf16, AsQueries, 16, 16, 2, 8, 2>(params)
    }

    /// Attention in bf16, head dimension 256.
    #[launch_bounds(threads = 128, blocks_per_sm = 2)]
    #[expect("bar.sync" = 4, "mma.sync" = 176)]
    fn attention_bf16_d256(params: AttentionParams) {
        attention::<Bf16, AsQueries, 32, 32, 1, 4, 1>(params)
    }

    /// Attention in f16, head dimension 64.
    #[launch_bounds(threads = 128, blocks_per_sm = 2)]
    #[expect("bar.sync" = 4, "mma.sync" = 144)]
    fn attention_f16_d64(params: AttentionParams) {
        attention::<F16, AsQueries, 8, 8, 2, 8, 2>(params)
    }

    /// Attention in f16, head dimension 96.
    #[launch_bounds(threads = 128, blocks_per_sm = 2)]
    #[expect("bar.sync" = 4, "mma.sync" = 216)]
    fn attention_f16_d96(params: AttentionParams) {
        attention::<F16, AsQueries, 12, 12, 2, 8, 2>(params)
    }

    /// Attention in f16, head dimension 128.
    #[launch_bounds(threads = 128, blocks_per_sm = 2)]
    #[expect("bar.sync" = 4, "mma.sync" = 288)]
    fn attention_f16_d128(params: AttentionParams) {
        attention::<F16, AsQueries, 16, 16, 2, 8, 2>(params)
    }

    /// Attention in f16, head dimension 256.
    #[launch_bounds(threads = 128, blocks_per_sm = 2)]
    #[expect("bar.sync" = 4, "mma.sync" = 176)]
    fn attention_f16_d256(params: AttentionParams) {
        attention::<F16, AsQueries, 32, 32, 1, 4, 1>(params)
    }

    /// Attention in bf16, K and V in e4m3, head dimension 64.
    #[launch_bounds(threads = 128, blocks_per_sm = 2)]
    #[expect("bar.sync" = 4, "mma.sync" = 144)]
    fn attention_bf16_e4m3_d64(params: AttentionParams) {
        attention::<Bf16, E4m3, 8, 4, 2, 8, 2>(params)
    }

    /// Attention in bf16, K and V in e4m3, head dimension 96.
    #[launch_bounds(threads = 128, blocks_per_sm = 2)]
    #[expect("bar.sync" = 4, "mma.sync" = 120)]
    fn attention_bf16_e4m3_d96(params: AttentionParams) {
        attention::<Bf16, E4m3, 12, 6, 2, 4, 2>(params)
    }

    /// Attention in bf16, K and V in e4m3, head dimension 128.
    #[launch_bounds(threads = 128, blocks_per_sm = 2)]
    #[expect("bar.sync" = 4, "mma.sync" = 160)]
    fn attention_bf16_e4m3_d128(params: AttentionParams) {
        attention::<Bf16, E4m3, 16, 8, 2, 4, 2>(params)
    }

    /// Attention in bf16, K and V in e4m3, head dimension 256.
    #[launch_bounds(threads = 128, blocks_per_sm = 2)]
    #[expect("bar.sync" = 4, "mma.sync" = 320)]
    fn attention_bf16_e4m3_d256(params: AttentionParams) {
        attention::<Bf16, E4m3, 32, 16, 1, 8, 2>(params)
    }

    /// Attention in f16, K and V in e4m3, head dimension 64.
    #[launch_bounds(threads = 128, blocks_per_sm = 2)]
    #[expect("bar.sync" = 4, "mma.sync" = 144)]
    fn attention_f16_e4m3_d64(params: AttentionParams) {
        attention::<F16, E4m3, 8, 4, 2, 8, 2>(params)
    }

    /// Attention in f16, K and V in e4m3, head dimension 96.
    #[launch_bounds(threads = 128, blocks_per_sm = 2)]
    #[expect("bar.sync" = 4, "mma.sync" = 120)]
    fn attention_f16_e4m3_d96(params: AttentionParams) {
        attention::<F16, E4m3, 12, 6, 2, 4, 2>(params)
    }

    /// Attention in f16, K and V in e4m3, head dimension 128.
    #[launch_bounds(threads = 128, blocks_per_sm = 2)]
    #[expect("bar.sync" = 4, "mma.sync" = 160)]
    fn attention_f16_e4m3_d128(params: AttentionParams) {
        attention::<F16, E4m3, 16, 8, 2, 4, 2>(params)
    }

    /// Attention in f16, K and V in e4m3, head dimension 256.
    #[launch_bounds(threads = 128, blocks_per_sm = 2)]
    #[expect("bar.sync" = 4, "mma.sync" = 320)]
    fn attention_f16_e4m3_d256(params: AttentionParams) {
        attention::<F16, E4m3, 32, 16, 1, 8, 2>(params)
    }
}
