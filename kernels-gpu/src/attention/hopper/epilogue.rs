//! Where a warp's rows of a tile go, straight from its registers.

use crate::attention::{store, task::Task};
use crate::element::Element;
use crate::ptx::memory::store_global_x4;
use crate::ptx::mma::Fragment;
use crate::ptx::warp::transpose_quad;
use crate::rows::Row;
use crate::shared_tile::SharedTile;
use crate::softmax::{OnlineSoftmax, ROWS_PER_LANE, element_of_lane};

/// Finishes the 16 rows of a warp, the tile's from `first_row` on, and stores them.
///
/// # Safety
///
/// Reached by all lanes of the warp.
#[inline(always)]
pub unsafe fn store<E: Element, const DIM_BLOCKS: usize>(
    task: &Task,
    lane: u32,
    first_row: u32,
    softmax: &OnlineSoftmax<1>,
    output: &mut [[Fragment; DIM_BLOCKS]; 1],
) {
    let rows = task.rows.of_lane::<1>(first_row, lane);
    store::finish(task, lane, first_row, &rows, softmax, output);
    if task.is_direct() {
        direct::<E, DIM_BLOCKS>(task, lane, &rows[0], &output[0]);
    } else {
        store::partial(task, lane, first_row, &rows, output, element_of_lane);
    }
}

/// Stores rows of O. The lanes of a quad, which hold two columns of every eight, exchange them so that each has eight in a row: a quad
/// then writes 64 bytes at a time.
#[inline(always)]
unsafe fn direct<E: Element, const DIM_BLOCKS: usize>(
    task: &Task,
    lane: u32,
    rows: &[Row; ROWS_PER_LANE],
    output: &[Fragment; DIM_BLOCKS],
) {
    const { assert!(DIM_BLOCKS % 4 == 0) };
    for (half, row) in rows.iter().enumerate() {
        let row_address = task.params.o + u64::from(row.index) * u64::from(SharedTile::<DIM_BLOCKS>::ROW_BYTES);
        for blocks in (0..DIM_BLOCKS).step_by(4) {
            let pair = |i: usize| E::pack(output[blocks + i][2 * half], output[blocks + i][2 * half + 1]);
            let chunk = transpose_quad([pair(0), pair(1), pair(2), pair(3)], lane);
            if row.exists() {
                store_global_x4(row_address + 16 * (blocks as u64 + u64::from(lane % 4)), chunk);
            }
        }
    }
}
