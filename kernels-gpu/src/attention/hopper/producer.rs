//! The producer: takes tasks, has the copy engine bring their K and V, and gathers their Q.
//!
//! | warp | does |
//! | --- | --- |
//! | 0, 1 | K, V: a box for each piece of a KV run |
//! | 2, 3 | Q: rows of 16-byte chunks through `cp.async` |

use packinfer_abi::{AttentionParams, NUM_KV_BOXES, Scheduler, TENSOR_MAP_BYTES, TileKind};

use super::shared::{ColumnTile, QueryTile, Ring, Shared};
use super::{STEP, barrier};
use crate::attention::task::{Task, row_chunk};
use crate::columns::RunWindow;
use crate::ptx::cp_async::copy_chunk;
use crate::ptx::memory::{fetch_add_global, load_shared, store_global, store_shared};
use crate::ptx::special::{block_index, num_blocks};
use crate::ptx::tma::copy_box;
use crate::ptx::{warp, warpgroup};
use crate::shared_tile::SharedTile;

/// Warps that gather Q.
const QUERY_WARPS: u32 = 2;
/// Threads that gather Q.
pub const QUERY_THREADS: u32 = 32 * QUERY_WARPS;
/// Rows of Q that each of these warps gathers of a wide tile.
const QUERY_WARP_ROWS: u32 = 128 / QUERY_WARPS;

/// A slot past the end of any pool: the copy engine brings zeros from there.
const NO_SLOT: u32 = i32::MAX as u32 - STEP;

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
    let v_maps = params.kv_maps + u64::from(NUM_KV_BOXES * TENSOR_MAP_BYTES);
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

        match warp {
            0 => load_columns(&task, &mut k, shared.k(0), params.kv_maps, lane),
            1 => load_columns(&task, &mut v, shared.v(0), v_maps, lane),
            _ => {
                queries.wait_empty();
                load_queries(&task, shared.queries(), warp - 2, lane);
                queries.fill_by_copies();
            }
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

/// Brings all columns of the task's K, or of its V, step by step; `tiles` is the ring's first tile.
#[inline(always)]
unsafe fn load_columns<const DIM_BLOCKS: usize>(
    task: &Task,
    ring: &mut Ring<2>,
    tiles: ColumnTile<DIM_BLOCKS>,
    maps: u64,
    lane: u32,
) {
    let item = &task.item;
    let mut window = RunWindow::new(&task.params, item, lane);
    let mut step = item.column_begin;
    while step < item.column_end {
        let end = core::cmp::min(item.column_end, step + STEP);
        ring.wait_empty();
        let copies = BoxCopies { tile: tiles.skip_tiles(ring.stage), maps, kv_head: task.kv_head, barrier: ring.full() };
        if lane == 0 {
            ring.expect(ColumnTile::<DIM_BLOCKS>::BYTES);
            copies.copy(NO_SLOT, end - step, STEP); // zeros where no column is left
        }
        loop {
            let (begin, end_of_run) = (core::cmp::max(window.begin, step), core::cmp::min(window.end, end));
            if begin < end_of_run {
                copies.copy(window.slot.wrapping_add(begin - window.begin), begin - step, end_of_run - step);
            }
            if window.reaches(end) {
                break;
            }
            window.advance(&task.params, item, lane);
        }
        ring.advance();
        step += STEP;
    }
}

/// How boxes get to a tile.
struct BoxCopies<const DIM_BLOCKS: usize> {
    tile: ColumnTile<DIM_BLOCKS>,
    maps: u64,
    kv_head: u32,
    barrier: u32,
}

impl<const DIM_BLOCKS: usize> BoxCopies<DIM_BLOCKS> {
    /// Starts copies of slots from `slot` on to rows `row .. end` of the tile: the largest box that fits, then the next.
    #[inline(always)]
    unsafe fn copy(&self, mut slot: u32, mut row: u32, end: u32) {
        while row < end {
            let log2 = 31 - (end - row).leading_zeros();
            let map = self.maps + u64::from(log2 * TENSOR_MAP_BYTES);
            for panel in 0..ColumnTile::<DIM_BLOCKS>::PANELS {
                let destination = self.tile.row(row) + panel * ColumnTile::<DIM_BLOCKS>::PANEL_BYTES;
                copy_box(destination, map, [panel * ColumnTile::<DIM_BLOCKS>::PANEL_ELEMENTS, self.kv_head, slot], self.barrier);
            }
            slot += 1 << log2;
            row += 1 << log2;
        }
    }
}

/// Gathers the tile's rows of Q: all that a consumer of this tile kind reads, zeros for those that do not exist.
#[inline(always)]
unsafe fn load_queries<const DIM_BLOCKS: usize>(task: &Task, tile: QueryTile<DIM_BLOCKS>, warp: u32, lane: u32) {
    if task.item.tile == TileKind::Narrow && warp > 0 {
        return; // the first warp's rows hold all of a narrow tile's
    }
    let num_rows = core::cmp::min(task.item.tile.rows(), QUERY_WARP_ROWS);
    let first_row = warp * QUERY_WARP_ROWS;
    let destination = tile.chunk_of_lane(first_row, lane);
    for i in 0..QUERY_WARP_ROWS / SharedTile::<DIM_BLOCKS>::ROWS_AT_ONCE {
        let on = i * SharedTile::<DIM_BLOCKS>::ROWS_AT_ONCE;
        if on < num_rows {
            let row = task.rows.read(first_row + on + SharedTile::<DIM_BLOCKS>::row_of_lane(lane));
            let index = if row.exists() { row.index } else { 0 };
            copy_chunk(destination.rows_on(on), row_chunk::<DIM_BLOCKS>(task.params.q, index, lane), row.exists());
        }
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
