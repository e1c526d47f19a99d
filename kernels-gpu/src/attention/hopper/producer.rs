//! The producer: takes tasks, and has the copy engine bring their Q, K and V. Its warps have parts of their own.
//!
//! | warp | does |
//! | --- | --- |
//! | 0, 1 | K, V: a box for each piece of a KV run |
//! | 2 | Q: a box for each piece of a row segment; works out the rows of consumer 1 |
//! | 3 | takes tasks, posts them, works out the rows of consumer 0, and of consumer 2 where there are three |

use packinfer_abi::{AttentionParams, KvRun, NUM_KV_BOXES, NUM_QUERY_BOXES, Share, TENSOR_MAP_BYTES};

use super::consumer::{CONSUMER_ROWS, WARPS};
use super::helpers::{Helpers, Tensor};
use super::queries;
use super::queue::{Beginning, NO_TASK, Queue, leave};
use super::shared::{Ring, Shared};
use super::{TRIO, merge};
use crate::attention::task::Task;
use crate::columns::RunWindow;
use crate::ptx::memory::prefetch_global;
use crate::ptx::tma::{copy_box, copy_box_once, prefetch_box, prefetch_map};
use crate::ptx::warp::{self, LANES};
use crate::rows::WarpView;
use crate::shared_tile::{BoxTile, origin_of_panel};

/// Warps that have Q, K and V of posted tasks brought.
pub const LOADER_WARPS: u32 = 3;

/// Warps that work out rows of tasks.
pub const POSTING_WARPS: u32 = 2;

/// A slot past the end of any pool: the copy engine brings zeros from there.
pub const NO_SLOT: u32 = i32::MAX as u32 - (1 << NUM_KV_BOXES);

/// Does the producer's part until no task is left.
///
/// # Safety
///
/// Reached by all threads of the producer's warpgroup.
#[inline(always)]
pub unsafe fn run<const DIM_BLOCKS: usize, const FRAGMENTS: usize, const ROW_BLOCKS: usize, H: Helpers>(
    params: &AttentionParams,
    shared: Shared<DIM_BLOCKS, FRAGMENTS, ROW_BLOCKS, H>,
    thread: u32,
) {
    let (warp, lane) = (warp::uniform(thread / LANES), thread % LANES);
    if thread < 2 * NUM_KV_BOXES {
        prefetch_map(params.kv_maps + u64::from(thread * TENSOR_MAP_BYTES));
    } else if thread - 2 * NUM_KV_BOXES < NUM_QUERY_BOXES {
        prefetch_map(params.q_maps + u64::from((thread - 2 * NUM_KV_BOXES) * TENSOR_MAP_BYTES));
    }
    match warp {
        0 => {
            let (mut loader, near_end) = (H::loader(shared, Tensor::K), shared.near_end());
            let mut items = shared.item_ring();
            while let Some(slot) = shared.next_posted(&items) {
                let task = shared.task(params, slot);
                let at_next = shared.steps_left_at_next(task.item.tile);
                let tell = |steps_left| {
                    if steps_left == at_next {
                        near_end.send();
                    }
                };
                H::load(shared, Tensor::K, &task, &mut loader, lane, tell);
                items.release_by_lanes();
            }
        }
        1 => {
            let mut loader = H::loader(shared, Tensor::V);
            let mut items = shared.item_ring();
            while let Some(slot) = shared.next_posted(&items) {
                H::load(shared, Tensor::V, &shared.task(params, slot), &mut loader, lane, |_| ());
                items.release_by_lanes();
            }
        }
        2 => load_queries(params, shared, lane),
        _ => post_tasks(params, shared, lane),
    }
}

/// Takes tasks, posts them and works out the rows of consumer 0, until none is left.
#[inline(always)]
unsafe fn post_tasks<const DIM_BLOCKS: usize, const FRAGMENTS: usize, const ROW_BLOCKS: usize, H: Helpers>(
    params: &AttentionParams,
    shared: Shared<DIM_BLOCKS, FRAGMENTS, ROW_BLOCKS, H>,
    lane: u32,
) {
    let (mut items, mut tasks, mut near_end) = (shared.item_ring(), shared.task_ring(), shared.near_end());
    let (leads, mut is_first) = (lane == 0, true);
    let mut next = Queue::of_block(params).first_task::<H>(params);
    while let Some(index) = next {
        items.wait_empty();
        tasks.wait_empty();
        let stage = tasks.stage();
        let task = Task::load(*params, index, shared.rows(stage));
        if leads {
            shared.post_task(stage, &task);
            prefetch_global(params.runs + u64::from(task.item.run_begin) * size_of::<KvRun>() as u64);
        }
        items.fill_by(leads);
        let posts_scales = leads && Shared::<DIM_BLOCKS, FRAGMENTS, ROW_BLOCKS, H>::IS_SCALED;
        let scales = if posts_scales { task.kv_scales() } else { [1.0; 2] };
        // The ticket of a task after a short one is on its way through memory meanwhile, but for the first task, which nothing is
        // to delay.
        let mut ticket = 0;
        if leads && !is_first && !shared.is_long(stage) {
            ticket = Queue::of_block(params).draw(params);
        }
        write_rows(params, shared, &task, stage, 0, lane);
        if ROW_BLOCKS == TRIO {
            write_rows(params, shared, &task, stage, 2, lane);
        }
        if posts_scales {
            shared.post_scales(stage, scales);
        }
        tasks.fill();

        let mut after = NO_TASK;
        if leads {
            let beginning = if is_first { Some(Beginning::tell(params)) } else { None };
            if shared.is_long(stage) {
                near_end.receive();
            }
            if is_first || shared.is_long(stage) {
                ticket = Queue::of_block(params).draw(params);
            }
            after = task_of_ticket::<H>(params, ticket).unwrap_or(NO_TASK);
            if let Some(beginning) = beginning {
                beginning.complete(params);
            }
        }
        is_first = false;
        let after = warp::uniform(after);
        next = if after == NO_TASK { None } else { Some(after) };
    }
    items.wait_empty();
    tasks.wait_empty();
    let mut share = Share::NONE;
    if leads {
        if is_first {
            Beginning::tell(params).complete(params);
        }
        share = leave::<H>(params);
        shared.post_end(tasks.stage(), share);
    }
    items.fill_by(leads);
    tasks.fill();
    if leads {
        merge::prefetch::<DIM_BLOCKS>(params, share, WARPS * Shared::<DIM_BLOCKS, FRAGMENTS, ROW_BLOCKS, H>::CONSUMERS);
    }
}

/// Has Q of all tasks brought, and works out the rows of consumer 1.
#[inline(always)]
unsafe fn load_queries<const DIM_BLOCKS: usize, const FRAGMENTS: usize, const ROW_BLOCKS: usize, H: Helpers>(
    params: &AttentionParams,
    shared: Shared<DIM_BLOCKS, FRAGMENTS, ROW_BLOCKS, H>,
    lane: u32,
) {
    let (mut queries, mut tasks, mut items) = (shared.query_ring(), shared.task_ring(), shared.item_ring());
    while let Some(slot) = shared.next_posted(&items) {
        tasks.wait_empty();
        let task = shared.task(params, slot);
        if ROW_BLOCKS == TRIO {
            // Q of the tile before is there until its last scores are.
            write_rows(params, shared, &task, slot, 1, lane);
            tasks.fill();
            queries::load(&shared.task(params, slot), &mut queries, shared.queries(), lane);
        } else {
            // Q first: it is what is waited for, where tiles have more than one step.
            queries::load(&task, &mut queries, shared.queries(), lane);
            if task.item.tile.rows() > CONSUMER_ROWS {
                write_rows(params, shared, &task, tasks.stage(), 1, lane);
            }
            tasks.fill();
        }
        items.release_by_lanes();
    }
    tasks.wait_empty();
    tasks.fill();
}

/// Works out the rows of a consumer, and what they see.
#[inline(always)]
unsafe fn write_rows<const DIM_BLOCKS: usize, const FRAGMENTS: usize, const ROW_BLOCKS: usize, H: Helpers>(
    params: &AttentionParams,
    shared: Shared<DIM_BLOCKS, FRAGMENTS, ROW_BLOCKS, H>,
    task: &Task,
    stage: u32,
    consumer: u32,
    lane: u32,
) {
    let mut view = WarpView::NOTHING;
    for rows in 0..CONSUMER_ROWS / LANES {
        let row = consumer * CONSUMER_ROWS + rows * LANES + lane;
        task.rows.write(params, &task.item, task.head_group, row);
        view = view.and(WarpView::of(task.rows.read(row)));
    }
    if lane == 0 {
        shared.post_view(stage, consumer, task, view);
    }
}

/// Which steps a warp brings of those of a task, where several warps bring them in turn.
#[derive(Clone, Copy)]
pub struct Turn {
    /// Steps of others that come before its next one.
    before: u32,
    /// Warps.
    warps: u32,
}

impl Turn {
    /// That of warp `index` of so many.
    #[inline(always)]
    pub fn new(index: u32, warps: u32) -> Self {
        Self { before: index, warps }
    }

    #[inline(always)]
    fn is_own(&self) -> bool {
        self.before == 0
    }

    /// On to the next step.
    #[inline(always)]
    fn advance(&mut self) {
        self.before = if self.before == 0 { self.warps - 1 } else { self.before - 1 };
    }
}

/// Brings all columns of a task's K or V, step by step, each in `PARTS` tiles one after the other, or those steps whose turn it
/// is; and calls `at_step`, with one thread, with the steps that are left. `tiles` is the ring's first tile. Where a step has
/// several parts, those of the other tensor lie between them and those of the next. Once the ring has had `settled_bytes`, if
/// there are any, the L2 cache is to give up first what comes.
///
/// # Safety
///
/// Reached by all lanes of a warp of the filling side.
#[inline(always)]
pub unsafe fn load_columns<const DIM_BLOCKS: usize, const ROW_BLOCKS: usize, const PARTS: u32>(
    task: &Task,
    tensor: Tensor,
    ring: &mut Ring,
    tiles: BoxTile<DIM_BLOCKS, ROW_BLOCKS>,
    lane: u32,
    mut turn: Option<Turn>,
    settled_bytes: Option<u32>,
    at_step: impl Fn(u32),
) {
    let columns = BoxTile::<DIM_BLOCKS, ROW_BLOCKS>::ROWS;
    let item = &task.item;
    let maps = match tensor {
        Tensor::K => task.params.kv_maps,
        Tensor::V => task.params.kv_maps + u64::from(NUM_KV_BOXES * TENSOR_MAP_BYTES),
    };
    let mut window = RunWindow::new(&task.params, item, lane);
    let mut step = item.column_begin;
    while step < item.column_end {
        let is_own = turn.is_none_or(|turn| turn.is_own());
        for part in 0..PARTS {
            let begin_of_part = step + part * columns;
            let end = core::cmp::min(item.column_end, begin_of_part + columns);
            if is_own {
                ring.wait_empty();
            }
            let copies = BoxCopies {
                tile: tiles.skip_tiles(ring.stage()),
                maps,
                kv_head: task.kv_head,
                barrier: ring.full(),
                read_once: settled_bytes.is_some_and(|bytes| ring.passed() * BoxTile::<DIM_BLOCKS, ROW_BLOCKS>::BYTES >= bytes),
            };
            if lane == 0 {
                if is_own {
                    ring.expect(BoxTile::<DIM_BLOCKS, ROW_BLOCKS>::BYTES);
                    let filled = if PARTS == 1 { end - begin_of_part } else { end.saturating_sub(begin_of_part) };
                    copies.copy(NO_SLOT, filled, columns); // zeros where no column is left
                }
                if part == 0 {
                    at_step((item.column_end - step).div_ceil(PARTS * columns));
                }
            }
            while PARTS == 1 || begin_of_part < end {
                let (begin, end_of_run) = (core::cmp::max(window.begin, begin_of_part), core::cmp::min(window.end, end));
                if is_own && begin < end_of_run {
                    copies.copy(window.slot_of(begin), begin - begin_of_part, end_of_run - begin_of_part);
                }
                if window.reaches(end) {
                    break;
                }
                window.advance(&task.params, item, lane);
            }
            ring.advance();
        }
        if PARTS > 1 {
            ring.advance_by(PARTS);
        }
        step += PARTS * columns;
        if let Some(turn) = &mut turn {
            turn.advance();
        }
    }
}

/// How boxes get to a tile.
pub struct BoxCopies<const DIM_BLOCKS: usize, const FRAGMENTS: usize> {
    pub tile: BoxTile<DIM_BLOCKS, FRAGMENTS>,
    /// The tensor maps of K, or of V.
    pub maps: u64,
    pub kv_head: u32,
    /// Counts the bytes that have come.
    pub barrier: u32,
    /// Whether the L2 cache is to give them up first.
    pub read_once: bool,
}

impl<const DIM_BLOCKS: usize, const FRAGMENTS: usize> BoxCopies<DIM_BLOCKS, FRAGMENTS> {
    /// Starts a copy of `2^log2` slots from `slot` on to the tile's rows from `row` on: one box, or one for each panel, which it
    /// must be for less than eight slots.
    ///
    /// # Safety
    ///
    /// `row` is a multiple of eight, or of the number of slots if these are fewer. Nobody uses the tile until its barrier says
    /// so.
    #[inline(always)]
    pub unsafe fn copy_rows(&self, slot: u32, row: u32, log2: u32) {
        let map = self.maps + u64::from(log2 * TENSOR_MAP_BYTES);
        let whole_boxes = BoxTile::<DIM_BLOCKS, FRAGMENTS>::WHOLE_BOXES;
        let boxes = if log2 >= 3 { whole_boxes } else { BoxTile::<DIM_BLOCKS, FRAGMENTS>::PANELS };
        for panel in 0..boxes {
            let [element, of_panel] = origin_of_panel::<DIM_BLOCKS>(panel);
            let (destination, at) = (self.tile.row(row, panel), [element, slot, of_panel, 0, self.kv_head]);
            if self.read_once {
                copy_box_once(destination, map, at, self.barrier);
            } else {
                copy_box(destination, map, at, self.barrier);
            }
        }
    }

    /// Has `2^log2` slots from `slot` on, at least eight, brought to the L2 cache.
    ///
    /// # Safety
    ///
    /// `maps` are those of K, or of V.
    #[inline(always)]
    pub unsafe fn prefetch_rows(maps: u64, slot: u32, kv_head: u32, log2: u32) {
        for panel in 0..BoxTile::<DIM_BLOCKS, FRAGMENTS>::WHOLE_BOXES {
            let [element, of_panel] = origin_of_panel::<DIM_BLOCKS>(panel);
            prefetch_box(maps + u64::from(log2 * TENSOR_MAP_BYTES), [element, slot, of_panel, 0, kv_head]);
        }
    }

    /// Starts copies of slots from `slot` on to rows `row .. end` of the tile: a box of whole rows for as many times eight rows
    /// as there are, or one for each panel where it can have but one; and before and behind them boxes that fit, for each panel.
    #[inline(always)]
    unsafe fn copy(&self, mut slot: u32, mut row: u32, end: u32) {
        while row < end {
            let to_eight = 8 - row % 8;
            let whole_rows = to_eight == 8 && end - row >= 8;
            let log2 = 31 - (if whole_rows { end - row } else { core::cmp::min(end - row, to_eight) }).leading_zeros();
            self.copy_rows(slot, row, log2);
            slot += 1 << log2;
            row += 1 << log2;
        }
    }
}

/// The task that a ticket of the block's queue stands for, or if that queue is empty, one of the other, unless readers take
/// those.
#[inline(always)]
unsafe fn task_of_ticket<H: Helpers>(params: &AttentionParams, ticket: u32) -> Option<u32> {
    let queue = Queue::of_block(params);
    if H::READ {
        return queue.task(params, ticket);
    }
    queue.task(params, ticket).or_else(|| queue.other().task(params, queue.other().draw(params)))
}
