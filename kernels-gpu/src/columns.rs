//! From a tile's columns to KV slots.

use packinfer_abi::{AttentionParams, DeviceAddress, KvRun, WorkItem};

use crate::ptx::cp_async::copy_chunk;
use crate::ptx::math::opaque;
use crate::ptx::memory::load_global_x2;
use crate::ptx::special::thread_index;
use crate::ptx::warp;
use crate::shared_tile::SharedTile;

/// Walks one column after another, always forward, through the KV runs of a work item.
struct ColumnCursor {
    /// Index of the run after the current one.
    next_run: u32,
    /// One past the last column of the current run.
    run_end: u32,
    /// Slot of a column of the current run, less the column; modulo 2^32.
    slot_bias: u32,
}

impl ColumnCursor {
    #[inline(always)]
    unsafe fn new(params: &AttentionParams, item: &WorkItem) -> Self {
        let run = load_run(params, item.run_begin);
        Self {
            next_run: item.run_begin + 1,
            run_end: item.column_begin + (run.num_slots - item.run_skip),
            slot_bias: run.first_slot.wrapping_add(item.run_skip).wrapping_sub(item.column_begin),
        }
    }

    /// The slot of a column, which must not be smaller than that of the last call.
    #[inline(always)]
    unsafe fn slot(&mut self, params: &AttentionParams, column: u32) -> u32 {
        while column >= self.run_end {
            let run = load_run(params, self.next_run);
            self.next_run += 1;
            self.slot_bias = run.first_slot.wrapping_sub(self.run_end);
            self.run_end += run.num_slots;
        }
        column.wrapping_add(self.slot_bias)
    }
}

#[inline(always)]
unsafe fn load_run(params: &AttentionParams, index: u32) -> KvRun {
    let [first_slot, num_slots] = load_global_x2(params.runs + u64::from(index) * size_of::<KvRun>() as u64);
    KvRun { first_slot, num_slots }
}

/// Loads a warp's share of a work item's K and V: some columns at a time, a power of two up to 32.
///
/// Registers are scarce in the attention loop, so it keeps only what cannot be had again from the kernel's parameters and the
/// thread index.
pub struct ColumnLoader<'a, const DIM_BLOCKS: usize> {
    params: &'a AttentionParams,
    /// Columns at a time: a constant wherever this is inlined.
    columns: u32,
    cursor: ColumnCursor,
    column_end: u32,
    /// Bytes from the first head of a slot to this one: in a uniform register, as it comes from a shuffle.
    head_offset: u32,
}

/// The warp's columns of one step.
pub struct Columns {
    /// Slot of the column that this lane looked up.
    slot: u32,
    /// How many of the columns are in the item's range.
    present: u32,
}

impl<'a, const DIM_BLOCKS: usize> ColumnLoader<'a, DIM_BLOCKS> {
    /// A loader of an item's columns, `columns` at a time.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp; `params` and `item` are valid.
    #[inline(always)]
    pub unsafe fn new(params: &'a AttentionParams, item: &WorkItem, kv_head: u32, columns: u32) -> Self {
        Self {
            params,
            columns,
            cursor: ColumnCursor::new(params, item),
            column_end: item.column_end,
            head_offset: warp::uniform(kv_head * params.kv_head_bytes),
        }
    }

    /// Looks up the warp's columns from `first` on, which must not lie before those of the last call: lane `l` column
    /// `l % columns` of them.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp.
    #[inline(always)]
    pub unsafe fn look_up(&mut self, first: u32) -> Columns {
        let column = core::cmp::min(first + thread_index() % self.columns, self.column_end - 1);
        Columns { slot: self.cursor.slot(self.params, column), present: self.column_end.saturating_sub(first) }
    }

    /// Starts copies of these columns of K or V to rows of a tile; zeros for columns out of the item's range.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp; nobody reads or writes these rows until the copies are waited for.
    #[inline(always)]
    pub unsafe fn copy(&self, columns: &Columns, tensor: DeviceAddress, destination: SharedTile<DIM_BLOCKS>) {
        let lane = thread_index() % warp::LANES;
        let destination = destination.chunk_of_lane(lane);
        // Opaque, or it would be kept as a number of 64 bits across the loop.
        let slot_bytes = opaque(self.params.kv_slot_bytes);
        let chunk = tensor + u64::from(self.head_offset + SharedTile::<DIM_BLOCKS>::byte_of_lane(lane));
        let lane_row = SharedTile::<DIM_BLOCKS>::row_of_lane(lane);
        // Of short rows the warp may go through more at once than it has columns.
        let has_row = SharedTile::<DIM_BLOCKS>::ROWS_AT_ONCE <= self.columns || lane_row < self.columns;
        for i in 0..self.columns.div_ceil(SharedTile::<DIM_BLOCKS>::ROWS_AT_ONCE) {
            let rows = i * SharedTile::<DIM_BLOCKS>::ROWS_AT_ONCE;
            let slot = warp::shuffle_from(columns.slot, rows + lane_row);
            if !has_row {
                continue;
            }
            let source = chunk + u64::from(slot) * u64::from(slot_bytes);
            for part in 0..SharedTile::<DIM_BLOCKS>::PARTS {
                let byte = part * SharedTile::<DIM_BLOCKS>::PART_BYTES;
                copy_chunk(destination.rows_on(rows) + byte, source + u64::from(byte), rows + lane_row < columns.present);
            }
        }
    }

    /// As [`Self::look_up`] and [`Self::copy`] of both K and V.
    ///
    /// # Safety
    ///
    /// As [`Self::copy`].
    #[inline(always)]
    pub unsafe fn load(&mut self, first: u32, k_tile: SharedTile<DIM_BLOCKS>, v_tile: SharedTile<DIM_BLOCKS>) {
        let columns = self.look_up(first);
        self.copy(&columns, self.params.k, k_tile);
        self.copy(&columns, self.params.v, v_tile);
    }
}

/// A run, without slots if there is no such run.
#[cfg(feature = "sm_90a")]
#[inline(always)]
unsafe fn run_or_none(params: &AttentionParams, index: u32) -> KvRun {
    if index < params.num_runs { load_run(params, index) } else { KvRun::default() }
}

/// Up to 32 consecutive KV runs of a work item, one a lane, and the columns that they are.
#[cfg(feature = "sm_90a")]
pub struct RunWindow {
    /// Index of the run after the window.
    next_run: u32,
    /// The lane's run of the next window, on its way while this one is worked on.
    next: KvRun,
    /// Column after the window; the same in all lanes.
    window_end: u32,
    /// Slot of column `begin`.
    pub slot: u32,
    /// First column of the lane's run in the item's range.
    pub begin: u32,
    /// One past its last.
    pub end: u32,
}

#[cfg(feature = "sm_90a")]
impl RunWindow {
    /// The window from the item's first run on.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp; `params` and `item` are valid.
    #[inline(always)]
    pub unsafe fn new(params: &AttentionParams, item: &WorkItem, lane: u32) -> Self {
        let next = run_or_none(params, item.run_begin + lane);
        let mut window = Self { next_run: item.run_begin, next, window_end: item.column_begin, slot: 0, begin: 0, end: 0 };
        window.load(params, item, lane, item.run_skip);
        window
    }

    /// Whether the window holds all columns before `column`.
    #[inline(always)]
    pub fn reaches(&self, column: u32) -> bool {
        self.window_end >= column
    }

    /// The slot of a column of the lane's run.
    #[inline(always)]
    pub fn slot_of(&self, column: u32) -> u32 {
        self.slot.wrapping_add(column.wrapping_sub(self.begin))
    }

    /// On to the next 32 runs.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp; the item has columns past the window.
    #[inline(always)]
    pub unsafe fn advance(&mut self, params: &AttentionParams, item: &WorkItem, lane: u32) {
        self.load(params, item, lane, 0);
    }

    /// Loads the 32 runs from `next_run` on, less the first `skip` slots.
    #[inline(always)]
    unsafe fn load(&mut self, params: &AttentionParams, item: &WorkItem, lane: u32, skip: u32) {
        let run = self.next;
        let skip = if lane == 0 { skip } else { 0 };
        // Columns past the item's range do not matter; cut to them, the sum of 32 runs cannot overflow for long.
        let left = item.column_end - self.window_end;
        let columns = core::cmp::min(run.num_slots - skip, left);
        let mut sum = columns;
        for log2 in 0..5 {
            let below = warp::shuffle_up(sum, 1 << log2);
            if lane >= 1 << log2 {
                sum = core::cmp::min(sum + below, left);
            }
        }
        let before = warp::shuffle_up(sum, 1);
        self.slot = run.first_slot + skip;
        self.begin = self.window_end + if lane == 0 { 0 } else { before };
        self.end = self.window_end + sum;
        self.window_end += warp::shuffle_from(sum, 31);
        self.next_run += warp::LANES;
        let is_last = self.window_end >= item.column_end;
        self.next = run_or_none(params, if is_last { u32::MAX } else { self.next_run + lane });
    }
}
