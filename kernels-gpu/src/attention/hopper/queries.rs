//! Gathering rows of Q into shared memory, 16 bytes at a time.

use packinfer_abi::DeviceAddress;

use crate::attention::task::row_chunk;
use crate::ptx::cp_async::copy_chunk;
use crate::ptx::warp::{self, LANES};
use crate::rows::{NO_ROW, RowTable};
use crate::shared_tile::{LaneChunk, SharedTile};

/// Where 32 rows of a tile lie in Q: a row a lane, so that copies need not wait for the row table one after the other.
pub(crate) struct QueryRows {
    index: u32,
}

impl QueryRows {
    /// The rows from `first_row` on.
    ///
    /// # Safety
    ///
    /// The table has these rows, and they were written before a barrier.
    #[inline(always)]
    pub unsafe fn read(rows: &RowTable, first_row: u32, lane: u32) -> Self {
        Self { index: rows.index(first_row + lane) }
    }

    /// Starts copies of the rows of `q`, zeros for rows that do not exist.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp; nobody reads or writes the destination until the copies are waited for.
    #[inline(always)]
    pub unsafe fn copy<const DIM_BLOCKS: usize>(&self, q: DeviceAddress, destination: LaneChunk, lane: u32) {
        let lane_row = SharedTile::<DIM_BLOCKS>::row_of_lane(lane);
        for i in 0..LANES / SharedTile::<DIM_BLOCKS>::ROWS_AT_ONCE {
            let rows = i * SharedTile::<DIM_BLOCKS>::ROWS_AT_ONCE;
            let index = warp::shuffle_from(self.index, rows + lane_row);
            let exists = index != NO_ROW;
            copy_chunk(destination.rows_on(rows), row_chunk::<DIM_BLOCKS>(q, if exists { index } else { 0 }, lane), exists);
        }
    }
}
