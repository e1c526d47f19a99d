//! Merging what the warps of a block found for the same rows, each over columns of its own, through shared memory.

use packinfer_abi::NARROW_TILE_ROWS;

use super::{store, task::Task};
use crate::element::{ELEMENT_BYTES, Element};
use crate::ptx::math;
use crate::ptx::memory::{load_shared_f32, store_global, store_global_f32x2, store_shared_f32, store_shared_f32x2};
use crate::ptx::mma::Fragment;
use crate::softmax::{ROWS_PER_LANE, RowSum, row_of_lane};

/// Eight words between rows keep the eight rows that a warp writes at once in different banks.
const ROW_PADDING_BYTES: u32 = 8 * 4;

/// Results of `WARPS` warps in shared memory: for each its rows of `8 * BLOCKS` elements of O in float32, then their log-sum-exp.
#[derive(Clone, Copy)]
pub(crate) struct WarpResults<const WARPS: usize, const BLOCKS: usize> {
    base: u32,
    /// Bytes from one warp's results to the next one's.
    stride: u32,
}

impl<const WARPS: usize, const BLOCKS: usize> WarpResults<WARPS, BLOCKS> {
    const COLUMNS: u32 = 8 * BLOCKS as u32;
    const ROW_BYTES: u32 = Self::COLUMNS * 4 + ROW_PADDING_BYTES;
    /// Bytes of one warp's results.
    pub const WARP_BYTES: u32 = NARROW_TILE_ROWS * (Self::ROW_BYTES + 4);

    /// Results from `base` on, `stride` bytes apart, at least [`Self::WARP_BYTES`] and a multiple of 8.
    #[inline(always)]
    pub fn at(base: u32, stride: u32) -> Self {
        Self { base, stride }
    }

    #[inline(always)]
    fn output(&self, warp: u32, row: u32, column: u32) -> u32 {
        self.base + warp * self.stride + row * Self::ROW_BYTES + column * 4
    }

    #[inline(always)]
    fn lse(&self, warp: u32, row: u32) -> u32 {
        self.base + warp * self.stride + NARROW_TILE_ROWS * Self::ROW_BYTES + row * 4
    }

    /// Writes down a warp's columns of O, already divided by the sums of its rows.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp; the results are read after a barrier. There are `BLOCKS` fragments, and `element` says
    /// which the first of a lane's elements in each is.
    #[inline(always)]
    pub unsafe fn write(
        &self,
        warp: u32,
        lane: u32,
        fragments: &[Fragment],
        sums: &[RowSum; ROWS_PER_LANE],
        element: impl Fn(usize, u32) -> u32,
    ) {
        for (half, sum) in sums.iter().enumerate() {
            let row = row_of_lane(0, half, lane);
            for (block, fragment) in fragments.iter().enumerate() {
                let address = self.output(warp, row, element(block, lane));
                store_shared_f32x2(address, fragment[2 * half], fragment[2 * half + 1]);
            }
            if lane % 4 == 0 {
                store_shared_f32(self.lse(warp, row), sum.lse_log2);
            }
        }
    }

    /// Merges the warps' results by their log-sum-exp and stores them, as columns `first_column ..` of the `dim` of O. The
    /// block's `threads` threads take two elements each at a time.
    ///
    /// # Safety
    ///
    /// Reached by all these threads, after a barrier that followed the writing.
    #[inline(always)]
    pub unsafe fn merge<E: Element>(&self, task: &Task, first_column: u32, dim: u32, thread: u32, threads: u32) {
        // A power of two, so that rows divide the threads. Columns of 96 leave some idle.
        let threads_per_row = const { (Self::COLUMNS / 2).next_power_of_two() };
        let rows_at_once = threads / threads_per_row;
        let column = thread % threads_per_row * 2;
        for i in 0..NARROW_TILE_ROWS / rows_at_once {
            let row = i * rows_at_once + thread / threads_per_row;
            let found = task.rows.read(row);
            if !found.exists() || column >= Self::COLUMNS {
                continue;
            }
            let mut lse = [0f32; WARPS];
            let sink = if task.has_sinks() { store::sink_log2(task, found.index) } else { f32::NEG_INFINITY };
            let mut max = sink;
            for (warp, lse) in lse.iter_mut().enumerate() {
                *lse = load_shared_f32(self.lse(warp as u32, row));
                max = math::max(max, *lse);
            }
            let origin = if max == f32::NEG_INFINITY { 0.0 } else { max };
            let (mut total, mut sum) = (math::exp2(sink - origin), [0f32; 2]);
            for (warp, lse) in lse.iter().enumerate() {
                let weight = math::exp2(lse - origin);
                let address = self.output(warp as u32, row, column);
                sum[0] += weight * load_shared_f32(address);
                sum[1] += weight * load_shared_f32(address + 4);
                total += weight;
            }
            let inverse = if total == 0.0 { 0.0 } else { math::reciprocal(total) };
            let (a, b) = (sum[0] * inverse, sum[1] * inverse);
            let (dim, element) = (u64::from(dim), u64::from(first_column + column));
            if task.is_direct() {
                let address = task.params.o + (u64::from(found.index) * dim + element) * u64::from(ELEMENT_BYTES);
                store_global(address, E::pack(a, b));
            } else {
                store_global_f32x2(task.params.partial_o + (task.partial_index(row) * dim + element) * 4, a, b);
            }
            if task.stores_lse() && first_column + column == 0 {
                store::lse(task, row, found.index, origin + math::log2(total));
            }
        }
    }
}
