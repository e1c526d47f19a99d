//! Where a tile's results go: O and LSE, or the partial buffers.

use super::task::{Task, row_chunk};
use crate::element::Element;
use crate::ptx::math::divide;
use crate::ptx::memory::{load_global, load_shared_x4, store_global_f32, store_global_f32x2, store_global_x4, store_shared};
use crate::ptx::mma::Fragment;
use crate::ptx::warp;
use crate::rows::{NO_ROW, Row};
use crate::shared_tile::SharedTile;
use crate::softmax::{LN_2, OnlineSoftmax, ROWS_PER_LANE, row_of_lane, scale_rows};

/// Stores the log-sum-exp of a row: of the tile's row `row`, which is row `index` of the output.
///
/// # Safety
///
/// The row exists.
#[inline(always)]
pub unsafe fn lse(task: &Task, row: u32, index: u32, lse_log2: f32) {
    let lse = lse_log2 * LN_2;
    if !task.is_direct() {
        store_global_f32(task.params.partial_lse + 4 * task.partial_index(row), lse);
    } else if task.params.lse != 0 {
        store_global_f32(task.params.lse + 4 * u64::from(index), lse);
    }
}

/// Logarithm to base 2 of the sink of row `index` of the output, if the item is the only one of its rows: else they get it when they are
/// merged. −∞ for none.
///
/// # Safety
///
/// The row exists.
#[inline(always)]
pub unsafe fn sink_log2(task: &Task, index: u32) -> f32 {
    let sinks = task.params.sinks;
    let num_qo_heads = task.params.heads.num_qo_heads;
    let head = index - divide(index, num_qo_heads) * num_qo_heads;
    f32::from_bits(load_global(sinks + 4 * u64::from(head))) / LN_2
}

/// Finishes the rows of a warp, the tile's from `first_row` on, and stores them. `staging` holds as many rows.
///
/// # Safety
///
/// Reached by all lanes of the warp; no other warp uses the rows of `staging`.
#[inline(always)]
pub unsafe fn rows<E: Element, const DIM_BLOCKS: usize, const ROW_BLOCKS: usize>(
    task: &Task,
    lane: u32,
    first_row: u32,
    staging: SharedTile<DIM_BLOCKS>,
    softmax: &OnlineSoftmax<ROW_BLOCKS>,
    output: &mut [[Fragment; DIM_BLOCKS]; ROW_BLOCKS],
) {
    let lane_rows = task.rows.of_lane::<ROW_BLOCKS>(first_row, lane);
    let mut factors = [[0f32; ROWS_PER_LANE]; ROW_BLOCKS];
    for block in 0..ROW_BLOCKS {
        for half in 0..ROWS_PER_LANE {
            let mut sum = softmax.finish(block, half);
            let index = lane_rows[block][half].index;
            if index != NO_ROW {
                if task.has_sinks() {
                    sum = sum.with_sink(sink_log2(task, index));
                }
                if lane % 4 == 0 {
                    lse(task, first_row + row_of_lane(block, half, lane), index, sum.lse_log2);
                }
            }
            factors[block][half] = sum.inverse;
        }
    }
    scale_rows(output, &factors);
    if task.is_direct() {
        direct::<E, DIM_BLOCKS, ROW_BLOCKS>(task, lane, first_row, staging, output);
    } else {
        partial(task, lane, first_row, &lane_rows, output);
    }
}

/// Stores the warp's rows of O, through its rows of a shared tile so that each store is 16 bytes wide.
///
/// # Safety
///
/// Reached by all lanes of the warp; no other warp uses these rows of the tile.
#[inline(always)]
unsafe fn direct<E: Element, const DIM_BLOCKS: usize, const ROW_BLOCKS: usize>(
    task: &Task,
    lane: u32,
    first_row: u32,
    tile: SharedTile<DIM_BLOCKS>,
    output: &[[Fragment; DIM_BLOCKS]; ROW_BLOCKS],
) {
    warp::sync(); // all lanes have read what the tile held
    for (block, fragments) in output.iter().enumerate() {
        for (dim, fragment) in fragments.iter().enumerate() {
            for half in 0..ROWS_PER_LANE {
                let row = row_of_lane(block, half, lane);
                store_shared(tile.chunk(row, dim as u32) + lane % 4 * 4, E::pack(fragment[2 * half], fragment[2 * half + 1]));
            }
        }
    }
    warp::sync();
    let chunk = tile.chunk_of_lane(lane);
    for i in 0..16 * ROW_BLOCKS as u32 / SharedTile::<DIM_BLOCKS>::ROWS_AT_ONCE {
        let rows = i * SharedTile::<DIM_BLOCKS>::ROWS_AT_ONCE;
        let index = task.rows.index(first_row + rows + SharedTile::<DIM_BLOCKS>::row_of_lane(lane));
        if index != NO_ROW {
            for part in 0..SharedTile::<DIM_BLOCKS>::PARTS {
                let byte = part * SharedTile::<DIM_BLOCKS>::PART_BYTES;
                let to = row_chunk::<DIM_BLOCKS>(task.params.o, index, lane) + u64::from(byte);
                store_global_x4(to, load_shared_x4(chunk.rows_on(rows) + byte));
            }
        }
    }
}

/// Stores the warp's rows of a partial O: each quad of lanes writes 32 bytes at a time.
///
/// # Safety
///
/// `rows` are the rows that this lane holds parts of.
#[inline(always)]
unsafe fn partial<const DIM_BLOCKS: usize, const ROW_BLOCKS: usize>(
    task: &Task,
    lane: u32,
    first_row: u32,
    rows: &[[Row; ROWS_PER_LANE]; ROW_BLOCKS],
    output: &[[Fragment; DIM_BLOCKS]; ROW_BLOCKS],
) {
    for block in 0..ROW_BLOCKS {
        for half in 0..ROWS_PER_LANE {
            if rows[block][half].exists() {
                let row = task.partial_index(first_row + row_of_lane(block, half, lane));
                let address = task.params.partial_o + row * (8 * DIM_BLOCKS as u64 * 4) + u64::from(lane % 4 * 8);
                for (dim, fragment) in output[block].iter().enumerate() {
                    store_global_f32x2(address + 32 * dim as u64, fragment[2 * half], fragment[2 * half + 1]);
                }
            }
        }
    }
}
