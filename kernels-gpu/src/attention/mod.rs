//! The packed-region attention kernel: one launch does all work items of a plan, of both tile kinds.
//!
//! A thread block takes one work item for one head group: rows are (query token, query head) pairs of any requests, columns are
//! KV slots of any of those, and each row has an interval of columns that it sees. It computes `softmax(scale · Q Kᵀ) V` over the
//! visible columns of the item's range (FlashAttention-2's loop over columns, Dao 2023), and writes O, or a partial to be merged.

pub mod narrow;
mod store;
pub mod wide;

use packinfer_abi::{AttentionParams, DeviceAddress, TILE_SHARED_BYTES, TileKind, WorkItem};

use crate::element::{Bf16, Element, F16};
use crate::ptx::memory::load_global_x4;
use crate::ptx::special::{block_index, dynamic_shared, thread_index};
use crate::ptx::{math, warp};
use crate::rows::RowTable;
use crate::shared_tile::SharedTile;

/// What every thread of a block knows of its work.
pub(crate) struct Task {
    pub params: AttentionParams,
    pub item: WorkItem,
    pub head_group: u32,
    pub kv_head: u32,
    pub rows: RowTable,
    /// Start of [`TILE_SHARED_BYTES`] of shared memory.
    pub tiles: u32,
    pub thread: u32,
    pub warp: u32,
    pub lane: u32,
}

impl Task {
    /// Works the task out anew wherever it is called: what comes after a loop that needs all registers calls it again.
    #[inline(always)]
    unsafe fn of_this_block(params: AttentionParams) -> Self {
        let block = block_index();
        let item_index = math::divide(block, params.heads.num_groups);
        let head_group = block - item_index * params.heads.num_groups;
        let tiles = dynamic_shared();
        let thread = thread_index();
        Self {
            item: load_item(params.items + u64::from(item_index) * size_of::<WorkItem>() as u64),
            head_group,
            kv_head: math::divide(head_group, params.heads.groups_per_kv_head()),
            params,
            rows: RowTable::at(tiles + TILE_SHARED_BYTES),
            tiles,
            thread,
            warp: warp::uniform(thread / 32),
            lane: thread % 32,
        }
    }
}

/// Address of a lane's chunk of row `index` of Q or O.
#[inline(always)]
fn row_chunk<const DIM_BLOCKS: usize>(tensor: DeviceAddress, index: u32, lane: u32) -> DeviceAddress {
    let row_bytes = SharedTile::<DIM_BLOCKS>::ROW_BYTES;
    tensor + u64::from(index) * u64::from(row_bytes) + u64::from(SharedTile::<DIM_BLOCKS>::byte_of_lane(lane))
}

/// Reads a work item: two loads of 16 bytes.
#[inline(always)]
unsafe fn load_item(address: u64) -> WorkItem {
    const { assert!(size_of::<WorkItem>() == 32) };
    let words = [load_global_x4(address), load_global_x4(address + 16)];
    core::mem::transmute(words)
}

#[inline(always)]
unsafe fn attention<E: Element, const DIM_BLOCKS: usize>(params: AttentionParams) {
    let task = Task::of_this_block(params);
    match task.item.tile {
        TileKind::Wide => wide::run::<E, DIM_BLOCKS>(&task),
        TileKind::Narrow => narrow::run::<E, DIM_BLOCKS>(&task),
    }
}

kernel! {
    /// Attention in bf16, head dimension 64.
    #[launch_bounds(threads = 128, blocks_per_sm = 2)]
    fn attention_bf16_d64(params: AttentionParams) {
        attention::<Bf16, 8>(params)
    }

    /// Attention in bf16, head dimension 128.
    #[launch_bounds(threads = 128, blocks_per_sm = 2)]
    fn attention_bf16_d128(params: AttentionParams) {
        attention::<Bf16, 16>(params)
    }

    /// Attention in f16, head dimension 64.
    #[launch_bounds(threads = 128, blocks_per_sm = 2)]
    fn attention_f16_d64(params: AttentionParams) {
        attention::<F16, 8>(params)
    }

    /// Attention in f16, head dimension 128.
    #[launch_bounds(threads = 128, blocks_per_sm = 2)]
    fn attention_f16_d128(params: AttentionParams) {
        attention::<F16, 16>(params)
    }
}
