//! Where a warp's rows of a wide tile go.

use crate::attention::task::Task;
use crate::element::{ELEMENT_BYTES, Element};
use crate::ptx::cp_async::CHUNK_BYTES;
use crate::ptx::memory::{load_shared_x4, store_global_x4};
use crate::ptx::mma::Fragment;
use crate::ptx::warp;
use crate::rows::NO_ROW;
use crate::shared_tile::{PANEL_BLOCKS, SharedTile};

/// Stores the 16 rows of a warp, the tile's from `first_row` on, through shared memory, so that its lanes store 128 bytes of a row together.
///
/// # Safety
///
/// Reached by all lanes of the warp; no other warp uses `staging`, which holds 16 rows.
#[inline(always)]
pub unsafe fn direct<E: Element, const DIM_BLOCKS: usize>(
    task: &Task,
    lane: u32,
    first_row: u32,
    staging: SharedTile<PANEL_BLOCKS>,
    output: &[Fragment; DIM_BLOCKS],
) {
    type Panel = SharedTile<PANEL_BLOCKS>;
    const ROUNDS: usize = (16 / Panel::ROWS_AT_ONCE) as usize;
    let chunk = staging.chunk_of_lane(lane);
    let mut indices = [NO_ROW; ROUNDS];
    for (round, index) in indices.iter_mut().enumerate() {
        *index = task.rows.index(first_row + round as u32 * Panel::ROWS_AT_ONCE + Panel::row_of_lane(lane));
    }
    for first in (0..DIM_BLOCKS).step_by(PANEL_BLOCKS) {
        warp::sync(); // all lanes have read what was there
        for block in (first..core::cmp::min(first + PANEL_BLOCKS, DIM_BLOCKS)).step_by(2) {
            let word = |i: usize, half: usize| E::pack(output[block + i][2 * half], output[block + i][2 * half + 1]);
            let words = [word(0, 0), word(0, 1), word(1, 0), word(1, 1)];
            Panel::store_operand_a(staging.rows_by_lane(lane), block - first, words);
        }
        // The last panel may hold less of a row than others.
        let byte = first as u32 * CHUNK_BYTES + Panel::byte_of_lane(lane);
        let is_in_row = byte < DIM_BLOCKS as u32 * CHUNK_BYTES;
        warp::sync();
        for (round, &index) in indices.iter().enumerate() {
            if index != NO_ROW && is_in_row {
                let row = task.params.o + u64::from(index) * (8 * DIM_BLOCKS as u64 * u64::from(ELEMENT_BYTES));
                store_global_x4(row + u64::from(byte), load_shared_x4(chunk.rows_on(round as u32 * Panel::ROWS_AT_ONCE)));
            }
        }
    }
}
