//! Where a warp's rows of a wide tile go, through shared memory.

use super::row_chunk;
use crate::attention::store;
use crate::attention::task::Task;
use crate::element::{ELEMENT_BYTES, Element};
use crate::ptx::cp_async::CHUNK_BYTES;
use crate::ptx::memory::{load_shared_x4, store_global_x4, store_shared};
use crate::ptx::mma::Fragment;
use crate::ptx::warp;
use crate::rows::NO_ROW;
use crate::shared_tile::SharedTile;
use crate::softmax::{OnlineSoftmax, ROWS_PER_LANE, row_of_lane, scale_rows};
use crate::stored::Stored;

/// Elements of a chunk of Q or O.
const CHUNK_ELEMENTS: u32 = CHUNK_BYTES / ELEMENT_BYTES;

/// Finishes the rows of a warp, the tile's from `first_row` on, and stores them. `staging` holds as many rows.
///
/// # Safety
///
/// Reached by all lanes of the warp; no other warp uses the rows of `staging`.
#[inline(always)]
pub unsafe fn rows<E: Element, KV: Stored<E>, const DIM_BLOCKS: usize, const ROW_BLOCKS: usize>(
    task: &Task,
    lane: u32,
    first_row: u32,
    staging: SharedTile<DIM_BLOCKS>,
    softmax: &OnlineSoftmax<ROW_BLOCKS>,
    output: &mut [[Fragment; DIM_BLOCKS]; ROW_BLOCKS],
) {
    let lane_rows = task.rows.of_lane::<ROW_BLOCKS>(first_row, lane);
    let value_scale = KV::scales(&task.params, task.kv_head).value;
    scale_rows(output, &[[value_scale; ROWS_PER_LANE]; ROW_BLOCKS]);
    for fragments in &mut *output {
        KV::put_in_order(fragments);
    }
    scale_rows(output, &store::finish(task, lane, first_row, &lane_rows, softmax.finish()));
    if task.is_direct() {
        direct::<E, KV, DIM_BLOCKS, ROW_BLOCKS>(task, lane, first_row, staging, output);
    } else {
        store::partial(task, lane, first_row, &lane_rows, output, KV::element);
    }
}

/// Stores the warp's rows of O, through its rows of a shared tile so that each store is 16 bytes wide.
///
/// # Safety
///
/// Reached by all lanes of the warp; no other warp uses these rows of the tile.
#[inline(always)]
unsafe fn direct<E: Element, KV: Stored<E>, const DIM_BLOCKS: usize, const ROW_BLOCKS: usize>(
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
                let element = KV::element(dim, lane);
                let address = tile.chunk(row, element / CHUNK_ELEMENTS) + element % CHUNK_ELEMENTS * ELEMENT_BYTES;
                store_shared(address, E::pack(fragment[2 * half], fragment[2 * half + 1]));
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
