//! For the tensor cores of `sm_80` and later: `cp.async`, `ldmatrix`, `mma.sync`. A thread block does one task.
//!
//! The hardware issues blocks in order, so the order of a plan's items, which ends with short ones, balances the device.

pub mod narrow;
pub mod wide;

use packinfer_abi::{AttentionParams, COLUMN_STEP, TILE_SHARED_BYTES, TileKind};

use super::task::{Stamper, Task};
use crate::element::{Bf16, Element, F16};
use crate::ptx::special::{block_index, dynamic_shared, thread_index};
use crate::ptx::warp;
use crate::rows::RowTable;

/// Columns that a warp loads of each step, a quarter; in narrow tiles also those that it works on.
const WARP_COLUMNS: u32 = COLUMN_STEP / 4;

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

#[inline(always)]
unsafe fn attention<E: Element, const DIM_BLOCKS: usize>(params: AttentionParams) {
    let block = Block::this(params);
    if block.thread == 0 {
        Stamper::of(&params).begin(block_index());
    }
    match block.task.item.tile {
        TileKind::Wide => wide::run::<E, DIM_BLOCKS>(&block),
        TileKind::Narrow => narrow::run::<E, DIM_BLOCKS>(&block),
    }
    if thread_index() == 0 {
        Stamper::of(&params).end(block_index());
    }
}

kernel! {
    /// Attention in bf16, head dimension 64.
    #[launch_bounds(threads = 128, blocks_per_sm = 2)]
    #[expect("bar.sync" = 4, "mma.sync" = 144)]
    fn attention_bf16_d64(params: AttentionParams) {
        attention::<Bf16, 8>(params)
    }

    /// Attention in bf16, head dimension 128.
    #[launch_bounds(threads = 128, blocks_per_sm = 2)]
    #[expect("bar.sync" = 4, "mma.sync" = 288)]
    fn attention_bf16_d128(params: AttentionParams) {
        attention::<Bf16, 16>(params)
    }

    /// Attention in f16, head dimension 64.
    #[launch_bounds(threads = 128, blocks_per_sm = 2)]
    #[expect("bar.sync" = 4, "mma.sync" = 144)]
    fn attention_f16_d64(params: AttentionParams) {
        attention::<F16, 8>(params)
    }

    /// Attention in f16, head dimension 128.
    #[launch_bounds(threads = 128, blocks_per_sm = 2)]
    #[expect("bar.sync" = 4, "mma.sync" = 288)]
    fn attention_f16_d128(params: AttentionParams) {
        attention::<F16, 16>(params)
    }
}
