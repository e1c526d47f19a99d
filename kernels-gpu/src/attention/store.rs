//! Where a tile's results go: O and LSE, or the partial buffers.

use core::f32::consts::LOG2_E;

#[cfg(feature = "sm_90a")]
use packinfer_abi::NOT_STORED;

use super::task::Task;
use crate::ptx::math::divide;
#[cfg(not(feature = "sm_90a"))]
use crate::ptx::memory::store_global_f32x2;
use crate::ptx::memory::{load_global, store_global_f32};
#[cfg(feature = "sm_90a")]
use crate::ptx::memory::{store_for_device, store_for_device_x2};
use crate::ptx::mma::Fragment;
use crate::rows::Row;
use crate::softmax::{LN_2, ROWS_PER_LANE, RowFactors, RowSum, row_of_lane};

/// Stores the log-sum-exp of a row: of the tile's row `row`, which is row `index` of the output.
///
/// # Safety
///
/// The row exists, and the task [stores it](Task::stores_lse).
#[inline(always)]
pub unsafe fn lse(task: &Task, row: u32, index: u32, lse_log2: f32) {
    let lse = lse_log2 * LN_2;
    if task.is_direct() {
        store_global_f32(task.params.lse + 4 * u64::from(index), lse);
    } else {
        partial_lse(task.params.partial_lse + 4 * task.partial_index(row), lse);
    }
}

/// Logarithm to base 2 of the sink of row `index` of the output, if the item is the only one of its rows: else they get it when
/// they are merged. −∞ for none.
///
/// # Safety
///
/// The row exists.
#[inline(always)]
pub unsafe fn sink_log2(task: &Task, index: u32) -> f32 {
    let sinks = task.params.sinks;
    let num_qo_heads = task.params.heads.num_qo_heads;
    let head = index - divide(index, num_qo_heads) * num_qo_heads;
    f32::from_bits(load_global(sinks + 4 * u64::from(head))) * LOG2_E
}

/// What the rows of a warp, the tile's from `first_row` on, are to be multiplied with; stores their log-sum-exp.
///
/// # Safety
///
/// Reached by all lanes of the warp; `rows` are the rows that this lane holds parts of.
#[inline(always)]
pub unsafe fn finish<const ROW_BLOCKS: usize>(
    task: &Task,
    lane: u32,
    first_row: u32,
    rows: &[[Row; ROWS_PER_LANE]; ROW_BLOCKS],
    mut sums: [[RowSum; ROWS_PER_LANE]; ROW_BLOCKS],
) -> RowFactors<ROW_BLOCKS> {
    if task.has_sinks() {
        for (sum, row) in sums.as_flattened_mut().iter_mut().zip(rows.as_flattened()) {
            if row.exists() {
                *sum = sum.with_sink(sink_log2(task, row.index));
            }
        }
    }
    if task.stores_lse() && lane % 4 == 0 {
        for block in 0..ROW_BLOCKS {
            for half in 0..ROWS_PER_LANE {
                let row = rows[block][half];
                if row.exists() {
                    lse(task, first_row + row_of_lane(block, half, lane), row.index, sums[block][half].lse_log2);
                }
            }
        }
    }
    sums.map(|sums| sums.map(|sum| sum.inverse))
}

/// Stores the warp's rows of a partial O: each quad of lanes writes 32 bytes at a time. `element` says which the first of a
/// lane's elements in a block of 8 is.
///
/// # Safety
///
/// `rows` are the rows that this lane holds parts of.
#[inline(always)]
pub unsafe fn partial<const DIM_BLOCKS: usize, const ROW_BLOCKS: usize>(
    task: &Task,
    lane: u32,
    first_row: u32,
    rows: &[[Row; ROWS_PER_LANE]; ROW_BLOCKS],
    output: &[[Fragment; DIM_BLOCKS]; ROW_BLOCKS],
    element: impl Fn(usize, u32) -> u32,
) {
    for block in 0..ROW_BLOCKS {
        for half in 0..ROWS_PER_LANE {
            if rows[block][half].exists() {
                let row = task.partial_index(first_row + row_of_lane(block, half, lane));
                let address = task.params.partial_o + row * (8 * DIM_BLOCKS as u64 * 4);
                for (dim, fragment) in output[block].iter().enumerate() {
                    partial_pair(address + 4 * u64::from(element(dim, lane)), [fragment[2 * half], fragment[2 * half + 1]]);
                }
            }
        }
    }
}

/// Stores the log-sum-exp of a partial.
///
/// # Safety
///
/// `address` is that of one.
#[inline(always)]
unsafe fn partial_lse(address: u64, lse: f32) {
    #[cfg(feature = "sm_90a")]
    store_for_device(address, stored(lse));
    #[cfg(not(feature = "sm_90a"))]
    store_global_f32(address, lse);
}

/// Stores two neighbouring elements of a partial.
///
/// # Safety
///
/// `address` is that of the first.
#[inline(always)]
pub unsafe fn partial_pair(address: u64, pair: [f32; 2]) {
    #[cfg(feature = "sm_90a")]
    store_for_device_x2(address, pair.map(|element| stored(element)));
    #[cfg(not(feature = "sm_90a"))]
    store_global_f32x2(address, pair[0], pair[1]);
}

/// A number as partials have it: where it would say that it is [`NOT_STORED`], another NaN.
#[cfg(feature = "sm_90a")]
#[inline(always)]
fn stored(number: f32) -> u32 {
    core::cmp::min(number.to_bits(), NOT_STORED - 1)
}
