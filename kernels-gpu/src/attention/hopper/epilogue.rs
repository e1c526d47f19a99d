//! Where a warp's rows of a wide tile go.

use crate::attention::task::Task;
use crate::element::{ELEMENT_BYTES, Element};
use crate::ptx::cp_async::CHUNK_BYTES;
use crate::ptx::memory::{load_shared_x4, store_global_x4, store_global_x4_if};
use crate::ptx::mma::Fragment;
use crate::ptx::warp;
use crate::rows::NO_ROW;
use crate::shared_tile::SharedTile;

/// The most times that a warp goes through rows, to store 16 of them: those of 128 bytes.
const MOST_ROUNDS: usize = 4;

/// Stores the 16 rows of a warp, the tile's from `first_row` on, through shared memory, so that its lanes store `STAGED_BLOCKS`
/// blocks of 8 elements of a row together: 128 bytes, or 32 where there is room for no more.
///
/// # Safety
///
/// Reached by all lanes of the warp; no other warp uses `staging`, which holds 16 rows.
#[inline(always)]
pub unsafe fn direct<E: Element, const DIM_BLOCKS: usize, const STAGED_BLOCKS: usize>(
    task: &Task,
    lane: u32,
    first_row: u32,
    staging: SharedTile<STAGED_BLOCKS>,
    output: &[Fragment; DIM_BLOCKS],
) {
    let chunk = staging.chunk_of_lane(lane);
    let rows_at_once = SharedTile::<STAGED_BLOCKS>::ROWS_AT_ONCE;
    let rounds = (16 / rows_at_once) as usize;
    let mut indices = [NO_ROW; MOST_ROUNDS];
    for (round, index) in indices[..rounds].iter_mut().enumerate() {
        *index = task.rows.index(first_row + round as u32 * rows_at_once + SharedTile::<STAGED_BLOCKS>::row_of_lane(lane));
    }
    for first in (0..DIM_BLOCKS).step_by(STAGED_BLOCKS) {
        warp::sync(); // all lanes have read what was there
        for block in (first..core::cmp::min(first + STAGED_BLOCKS, DIM_BLOCKS)).step_by(2) {
            let word = |i: usize, half: usize| E::pack(output[block + i][2 * half], output[block + i][2 * half + 1]);
            let words = [word(0, 0), word(0, 1), word(1, 0), word(1, 1)];
            SharedTile::<STAGED_BLOCKS>::store_operand_a(staging.rows_by_lane(lane), block - first, words);
        }
        // The last part may hold less of a row than others.
        let byte = first as u32 * CHUNK_BYTES + SharedTile::<STAGED_BLOCKS>::byte_of_lane(lane);
        let is_in_row = byte < DIM_BLOCKS as u32 * CHUNK_BYTES;
        warp::sync();
        for (round, &index) in indices[..rounds].iter().enumerate() {
            if rounds == 1 {
                // Without a branch: what decides it is the same for all parts, so the compiler would take the whole loop,
                // barriers included, into both branches.
                let row = task.params.o + u64::from(index) * (8 * DIM_BLOCKS as u64 * u64::from(ELEMENT_BYTES));
                let words = load_shared_x4(chunk.rows_on(round as u32 * rows_at_once));
                store_global_x4_if(row + u64::from(byte), words, index != NO_ROW && is_in_row);
            } else if index != NO_ROW && is_in_row {
                let row = task.params.o + u64::from(index) * (8 * DIM_BLOCKS as u64 * u64::from(ELEMENT_BYTES));
                store_global_x4(row + u64::from(byte), load_shared_x4(chunk.rows_on(round as u32 * rows_at_once)));
            }
        }
    }
}
