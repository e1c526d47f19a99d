//! Merging what the consuming warps found for the rows of a narrow tile, each over columns of its own, through shared memory.
//!
//! First the warps tell each other the log-sum-exp of every row, so that each can give its own output its weight. What is left is
//! a sum of eight. It is made a few rows at a time: most narrow tiles have no more.

use packinfer_abi::NARROW_TILE_ROWS;

use super::{CONSUMER_THREADS, CONSUMER_WARPS};
use crate::attention::{store, task::Task};
use crate::element::{ELEMENT_BYTES, Element};
use crate::ptx::math;
use crate::ptx::memory::{load_shared_f32x2, load_shared_x4, store_global, store_shared_f32, store_shared_f32x2};
use crate::ptx::mma::Fragment;
use crate::rows::{NO_ROW, Row};
use crate::shared_tile::PANEL_ROW_BYTES;
use crate::softmax::{ROWS_PER_LANE, RowSum, row_of_lane};

/// Bytes of 16 rows of a panel.
const STAGING_BYTES: u32 = 16 * PANEL_ROW_BYTES;

const fn max(a: u32, b: u32) -> u32 {
    if a > b { a } else { b }
}

/// Shared memory for the log-sum-exp of all rows by all warps, and behind it for some rows of their output, in float32.
#[derive(Clone, Copy)]
pub struct Exchange<const DIM_BLOCKS: usize> {
    base: u32,
}

impl<const DIM_BLOCKS: usize> Exchange<DIM_BLOCKS> {
    const DIM: u32 = 8 * DIM_BLOCKS as u32;
    /// Eight words between rows keep the rows that a warp writes at once in different banks.
    const ROW_BYTES: u32 = 4 * (Self::DIM + 8);
    /// Rows whose output is exchanged at a time: no more than all threads sum up at once, two elements each.
    pub const ROWS_AT_ONCE: u32 = if 4 * Self::DIM <= 2 * CONSUMER_THREADS { 4 } else { 2 };
    const WARP_BYTES: u32 = max(Self::ROWS_AT_ONCE * Self::ROW_BYTES, STAGING_BYTES);
    const LSE_BYTES: u32 = 4 * CONSUMER_WARPS * NARROW_TILE_ROWS;
    /// Bytes of all of it.
    pub const BYTES: u32 = Self::LSE_BYTES + CONSUMER_WARPS * Self::WARP_BYTES;

    /// The exchange at `base`, which is aligned to 16 bytes.
    #[inline(always)]
    pub fn at(base: u32) -> Self {
        Self { base }
    }

    #[inline(always)]
    fn lse(&self, row: u32) -> u32 {
        self.base + 4 * CONSUMER_WARPS * row
    }

    #[inline(always)]
    fn output(&self, warp: u32, row: u32, column: u32) -> u32 {
        self.base + Self::LSE_BYTES + warp * Self::WARP_BYTES + row * Self::ROW_BYTES + 4 * column
    }

    /// Where a warp may put 16 rows of a panel when no narrow tile is being merged: where its own output is otherwise.
    #[inline(always)]
    pub fn staging(&self, warp: u32) -> u32 {
        self.output(warp, 0, 0)
    }

    /// Tells the others the log-sum-exp of the rows that the lane holds a part of.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp, when nobody reads what was told before; it is read after a barrier.
    #[inline(always)]
    pub unsafe fn tell_lse(&self, warp: u32, lane: u32, sums: &[RowSum; ROWS_PER_LANE]) {
        for (half, sum) in sums.iter().enumerate() {
            if lane % 4 == 0 {
                store_shared_f32(self.lse(row_of_lane(0, half, lane)) + 4 * warp, sum.lse_log2);
            }
        }
    }

    /// What the warp's outputs, not divided by their sums yet, are multiplied with before they are summed up; stores the
    /// log-sum-exp of the rows.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp, after a barrier that followed [`Self::tell_lse`].
    #[inline(always)]
    pub unsafe fn factors(
        &self,
        task: &Task,
        warp: u32,
        lane: u32,
        rows: &[Row; ROWS_PER_LANE],
        sums: &[RowSum; ROWS_PER_LANE],
    ) -> [f32; ROWS_PER_LANE] {
        let mut factors = [0f32; ROWS_PER_LANE];
        for half in 0..ROWS_PER_LANE {
            if task.rows.index(row_of_lane(0, half, 0)) == NO_ROW {
                break; // there are none behind it
            }
            let (row, sum) = (rows[half], sums[half]);
            let sink = if task.has_sinks() && row.exists() { store::sink_log2(task, row.index) } else { f32::NEG_INFINITY };
            let tile_row = row_of_lane(0, half, lane);
            let told = [load_shared_x4(self.lse(tile_row)), load_shared_x4(self.lse(tile_row) + 16)];
            let lse = told.as_flattened().iter().map(|&word| f32::from_bits(word));
            let max = lse.clone().fold(sink, math::max);
            // A row that has seen nothing has a maximum of −∞, and −∞ − −∞ must not be computed.
            let origin = if max == f32::NEG_INFINITY { 0.0 } else { max };
            let total = lse.fold(math::exp2(sink - origin), |total, lse| total + math::exp2(lse - origin));
            let inverse = if total == 0.0 { 0.0 } else { math::reciprocal(total) };
            factors[half] = sum.inverse * math::exp2(sum.lse_log2 - origin) * inverse;
            if task.stores_lse() && warp == 0 && lane % 4 == 0 && row.exists() {
                store::lse(task, tile_row, row.index, origin + math::log2(total));
            }
        }
        factors
    }

    /// Writes down the warp's output of the rows from `first_row` on, a multiple of [`Self::ROWS_AT_ONCE`], times the
    /// [factors](Self::factors) of the lane's rows. `element` says which the first of a lane's elements in a block of 8 is.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp, when nobody reads what was written before; it is read after a barrier.
    #[inline(always)]
    pub unsafe fn write(
        &self,
        warp: u32,
        lane: u32,
        first_row: u32,
        output: &[Fragment; DIM_BLOCKS],
        factors: &[f32; ROWS_PER_LANE],
        element: impl Fn(usize, u32) -> u32,
    ) {
        let row = (lane / 4).wrapping_sub(first_row % 8);
        if row < Self::ROWS_AT_ONCE {
            for (block, fragment) in output.iter().enumerate() {
                let [a, b] = if first_row < 8 { [fragment[0], fragment[1]] } else { [fragment[2], fragment[3]] };
                let factor = if first_row < 8 { factors[0] } else { factors[1] };
                store_shared_f32x2(self.output(warp, row, element(block, lane)), a * factor, b * factor);
            }
        }
    }

    /// Sums up what was written of the rows from `first_row` on, and stores it: two elements a thread.
    ///
    /// # Safety
    ///
    /// Reached by all threads of the consumers, of which this is `thread`, after a barrier that followed [`Self::write`].
    #[inline(always)]
    pub unsafe fn store_sums<E: Element>(&self, task: &Task, thread: u32, first_row: u32) {
        const { assert!(Self::ROWS_AT_ONCE * Self::DIM <= 2 * CONSUMER_THREADS) };
        let (row, column) = (thread / (Self::DIM / 2), thread % (Self::DIM / 2) * 2);
        let index = if row < Self::ROWS_AT_ONCE { task.rows.index(first_row + row) } else { NO_ROW };
        if index == NO_ROW {
            return;
        }
        let mut sum = [0f32; 2];
        for warp in 0..CONSUMER_WARPS {
            let [a, b] = load_shared_f32x2(self.output(warp, row, column));
            sum = [sum[0] + a, sum[1] + b];
        }
        let element = |row: u64| row * u64::from(Self::DIM) + u64::from(column);
        if task.is_direct() {
            let address = task.params.o + element(u64::from(index)) * u64::from(ELEMENT_BYTES);
            store_global(address, E::pack(sum[0], sum[1]));
        } else {
            store::partial_pair(task.params.partial_o + element(task.partial_index(first_row + row)) * 4, sum);
        }
    }
}
