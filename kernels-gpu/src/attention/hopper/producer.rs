//! The producer: takes tasks and gathers their Q, K and V.

use packinfer_abi::{AttentionParams, Scheduler, TileKind};

use super::shared::{QueryTile, Shared};
use super::{STEP, barrier};
use crate::attention::task::{Task, row_chunk};
use crate::columns::ColumnLoader;
use crate::ptx::cp_async::copy_chunk;
use crate::ptx::memory::{fetch_add_global, load_shared, store_global, store_shared};
use crate::ptx::special::{block_index, num_blocks};
use crate::ptx::{warp, warpgroup};
use crate::rows::RowTable;
use crate::shared_tile::SharedTile;

/// Rows, or columns, that each of the producer's four warps loads of 128.
const WARP_SHARE: u32 = STEP / 4;

/// Does the producer's part until no task is left.
///
/// # Safety
///
/// Reached by all threads of the producer's warpgroup.
#[inline(always)]
pub unsafe fn run<const DIM_BLOCKS: usize>(params: &AttentionParams, shared: Shared<DIM_BLOCKS>, thread: u32) {
    let (warp, lane) = (warp::uniform(thread / 32), thread % 32);
    let (mut tasks, mut queries) = (shared.task_ring(), shared.query_ring());
    let (mut k, mut v) = (shared.k_ring(), shared.v_ring());
    let num_tasks = params.num_items * params.heads.num_groups;
    let mut index = block_index();
    while index < num_tasks {
        tasks.wait_empty();
        let task = Task::load(*params, index, shared.rows(tasks.stage));
        task.rows.write(params, &task.item, task.head_group, thread);
        if thread == 0 {
            shared.post_task(tasks.stage, Some(&task));
        }
        tasks.fill();
        let next = if thread == 0 { take_task(params) } else { 0 };
        warpgroup::sync(barrier::PRODUCER, warpgroup::THREADS); // the rows are known to all

        let item = &task.item;
        let mut loader = ColumnLoader::<DIM_BLOCKS, WARP_SHARE>::new(params, item, task.kv_head, warp * WARP_SHARE, lane);
        queries.wait_empty();
        load_queries(&task, shared.queries(), task.rows, warp, lane);
        queries.fill_by_copies();
        let mut column = item.column_begin;
        while column < item.column_end {
            let columns = loader.next(STEP);
            k.wait_empty();
            loader.copy(&columns, params.k, shared.k(k.stage).chunk_of_lane(warp * WARP_SHARE, lane));
            k.fill_by_copies();
            v.wait_empty();
            loader.copy(&columns, params.v, shared.v(v.stage).chunk_of_lane(warp * WARP_SHARE, lane));
            v.fill_by_copies();
            column += STEP;
        }

        if thread == 0 {
            store_shared(shared.next_task(), next);
        }
        warpgroup::sync(barrier::PRODUCER, warpgroup::THREADS);
        index = load_shared(shared.next_task());
    }
    tasks.wait_empty();
    if thread == 0 {
        shared.post_task(tasks.stage, None);
        leave(params);
    }
    tasks.fill();
}

/// Gathers the tile's rows of Q: all that a consumer of this tile kind reads, zeros for those that do not exist.
#[inline(always)]
unsafe fn load_queries<const DIM_BLOCKS: usize>(task: &Task, tile: QueryTile<DIM_BLOCKS>, rows: RowTable, warp: u32, lane: u32) {
    if task.item.tile == TileKind::Narrow && warp > 0 {
        return; // the first warp's share holds all rows of a narrow tile
    }
    let first_row = warp * WARP_SHARE;
    let destination = tile.chunk_of_lane(first_row, lane);
    for i in 0..WARP_SHARE / SharedTile::<DIM_BLOCKS>::ROWS_AT_ONCE {
        let on = i * SharedTile::<DIM_BLOCKS>::ROWS_AT_ONCE;
        let row = rows.read(first_row + on + SharedTile::<DIM_BLOCKS>::row_of_lane(lane));
        let index = if row.exists() { row.index } else { 0 };
        copy_chunk(destination.rows_on(on), row_chunk::<DIM_BLOCKS>(task.params.q, index, lane), row.exists());
    }
}

/// Takes the next task for this block.
#[inline(always)]
unsafe fn take_task(params: &AttentionParams) -> u32 {
    num_blocks() + fetch_add_global(params.scheduler + core::mem::offset_of!(Scheduler, taken) as u64, 1)
}

/// Says that this block takes no more tasks; the last block to say so makes the scheduler ready for the next launch.
#[inline(always)]
unsafe fn leave(params: &AttentionParams) {
    let finished = params.scheduler + core::mem::offset_of!(Scheduler, finished) as u64;
    if fetch_add_global(finished, 1) == num_blocks() - 1 {
        store_global(params.scheduler + core::mem::offset_of!(Scheduler, taken) as u64, 0);
        store_global(finished, 0);
    }
}
