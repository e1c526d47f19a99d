//! The producer: takes tasks, has the copy engine bring their K and V, and gathers their Q. Each of its warps has a part of its own.
//!
//! | warp | does |
//! | --- | --- |
//! | 0 | K and V: a box for each piece of a KV run |
//! | 1, 2 | Q: rows of 16-byte chunks through `cp.async` |
//! | 3 | takes tasks, works out their rows, and posts them, several ahead |

use packinfer_abi::{AttentionParams, KvRun, NUM_KV_BOXES, Scheduler, TENSOR_MAP_BYTES, WIDE_TILE_ROWS};

use super::STEP;
use super::shared::{ColumnTile, QueryTile, Ring, Shared};
use crate::attention::task::{Task, row_chunk};
use crate::columns::RunWindow;
use crate::ptx::cp_async::copy_chunk;
use crate::ptx::memory::{fetch_add_global, prefetch_global, store_global};
use crate::ptx::special::{block_index, num_blocks};
use crate::ptx::tma::copy_box;
use crate::ptx::warp::{self, LANES};
use crate::shared_tile::SharedTile;

/// Warps that load what the scheduler warp has posted.
pub const LOADER_WARPS: u32 = 3;

/// Warps that gather Q.
pub const QUERY_WARPS: u32 = 2;

/// A slot past the end of any pool: the copy engine brings zeros from there.
const NO_SLOT: u32 = i32::MAX as u32 - STEP;

/// Does the producer's part until no task is left.
///
/// # Safety
///
/// Reached by all threads of the producer's warpgroup.
#[inline(always)]
pub unsafe fn run<const DIM_BLOCKS: usize>(params: &AttentionParams, shared: Shared<DIM_BLOCKS>, thread: u32) {
    let (warp, lane) = (warp::uniform(thread / LANES), thread % LANES);
    match warp {
        0 => {
            let mut columns = ColumnCopies { shared, k: shared.k_ring(), v: shared.v_ring(), lane };
            for_each_task(params, shared, lane, |task| columns.load(task));
        }
        1 | 2 => {
            let mut ring = shared.query_ring();
            for_each_task(params, shared, lane, |task| {
                ring.wait_empty();
                load_queries(task, shared.queries(), warp - 1, lane);
                ring.fill_by_copies();
            });
        }
        _ => schedule(params, shared, lane),
    }
}

/// Does something for every task that the scheduler warp posts.
#[inline(always)]
unsafe fn for_each_task<const DIM_BLOCKS: usize>(
    params: &AttentionParams,
    shared: Shared<DIM_BLOCKS>,
    lane: u32,
    mut load: impl FnMut(&Task),
) {
    let mut tasks = shared.task_ring();
    loop {
        tasks.wait_full();
        let Some(task) = shared.read_task(params, tasks.stage) else { break };
        load(&task);
        warp::sync();
        tasks.release(lane);
    }
}

/// Takes tasks and posts them, until none is left.
#[inline(always)]
unsafe fn schedule<const DIM_BLOCKS: usize>(params: &AttentionParams, shared: Shared<DIM_BLOCKS>, lane: u32) {
    let num_tasks = params.num_items * params.heads.num_groups;
    let mut tasks = shared.task_ring();
    let mut index = block_index();
    while index < num_tasks {
        let next = if lane == 0 { take_task(params) } else { 0 };
        tasks.wait_empty();
        let task = Task::load(*params, index, shared.rows(tasks.stage));
        for row in 0..WIDE_TILE_ROWS / LANES {
            task.rows.write(params, &task.item, task.head_group, row * LANES + lane);
        }
        if lane == 0 {
            shared.post_task(tasks.stage, Some(&task));
            prefetch_global(params.runs + u64::from(task.item.run_begin) * size_of::<KvRun>() as u64);
        }
        tasks.fill();
        index = warp::uniform(next);
    }
    tasks.wait_empty();
    if lane == 0 {
        shared.post_task(tasks.stage, None);
        leave(params);
    }
    tasks.fill();
}

/// The warp that has the copy engine bring K and V.
struct ColumnCopies<const DIM_BLOCKS: usize> {
    shared: Shared<DIM_BLOCKS>,
    k: Ring<2>,
    v: Ring<2>,
    lane: u32,
}

impl<const DIM_BLOCKS: usize> ColumnCopies<DIM_BLOCKS> {
    /// Brings all columns of a task, step by step: those of K, then those of V.
    #[inline(always)]
    unsafe fn load(&mut self, task: &Task) {
        let (params, item) = (&task.params, &task.item);
        let mut window = RunWindow::new(params, item, self.lane);
        let mut step = item.column_begin;
        while step < item.column_end {
            let end = core::cmp::min(item.column_end, step + STEP);
            let k = BoxCopies {
                tile: self.shared.k(self.k.stage),
                maps: params.kv_maps,
                kv_head: task.kv_head,
                barrier: self.k.full(),
            };
            let v = BoxCopies {
                tile: self.shared.v(self.v.stage),
                maps: params.kv_maps + u64::from(NUM_KV_BOXES * TENSOR_MAP_BYTES),
                kv_head: task.kv_head,
                barrier: self.v.full(),
            };
            self.k.wait_empty();
            k.copy_step(&self.k, &window, step, end, self.lane);
            self.v.wait_empty();
            v.copy_step(&self.v, &window, step, end, self.lane);
            while !window.reaches(end) {
                window.advance(params, item, self.lane);
                k.copy_run(&window, step, end);
                v.copy_run(&window, step, end);
            }
            self.k.advance();
            self.v.advance();
            step += STEP;
        }
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
    /// Starts what the window holds of the columns `step .. end`, and zeros for the rest of the tile.
    #[inline(always)]
    unsafe fn copy_step(&self, ring: &Ring<2>, window: &RunWindow, step: u32, end: u32, lane: u32) {
        if lane == 0 {
            ring.expect(ColumnTile::<DIM_BLOCKS>::BYTES);
            self.copy(NO_SLOT, end - step, STEP);
        }
        self.copy_run(window, step, end);
    }

    /// Starts a copy of the columns `step .. end` that are in the lane's run.
    #[inline(always)]
    unsafe fn copy_run(&self, window: &RunWindow, step: u32, end: u32) {
        let (begin, end) = (core::cmp::max(window.begin, step), core::cmp::min(window.end, end));
        if begin < end {
            self.copy(window.slot.wrapping_add(begin - window.begin), begin - step, end - step);
        }
    }

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

/// Gathers every second block of eight rows of Q, from block `warp` on; zeros for rows that do not exist.
#[inline(always)]
unsafe fn load_queries<const DIM_BLOCKS: usize>(task: &Task, tile: QueryTile<DIM_BLOCKS>, warp: u32, lane: u32) {
    let mut first_row = 8 * warp;
    while first_row < task.item.tile.rows() {
        let destination = tile.chunk_of_lane(first_row, lane);
        for i in 0..8 / SharedTile::<DIM_BLOCKS>::ROWS_AT_ONCE {
            let on = i * SharedTile::<DIM_BLOCKS>::ROWS_AT_ONCE;
            let row = task.rows.read(first_row + on + SharedTile::<DIM_BLOCKS>::row_of_lane(lane));
            let index = if row.exists() { row.index } else { 0 };
            copy_chunk(destination.rows_on(on), row_chunk::<DIM_BLOCKS>(task.params.q, index, lane), row.exists());
        }
        first_row += 8 * QUERY_WARPS;
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
