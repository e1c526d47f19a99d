//! Bringing the rows of Q of a tile: the tokens of its segments, each with the heads of the task's head group.

use packinfer_abi::{RowSegment, TENSOR_MAP_BYTES};

use super::shared::{QueryTile, Ring};
use crate::attention::task::Task;
use crate::ptx::memory::load_global;
use crate::ptx::tma::copy_box;
use crate::ptx::warp::{self, LANES};
use crate::shared_tile::origin_of_panel;

/// Has the copy engine bring the task's Q to `tile`. Rows past the tile's last keep what was there: nothing that is worked out
/// from them is stored.
///
/// # Safety
///
/// Reached by all lanes of the warp; the ring is that of `tile`.
#[inline(always)]
pub unsafe fn load<const DIM_BLOCKS: usize, const ROW_BLOCKS: usize>(
    task: &Task,
    ring: &mut Ring,
    tile: QueryTile<DIM_BLOCKS, ROW_BLOCKS>,
    lane: u32,
) {
    let token_bytes = task.params.heads.heads_per_group * QueryTile::<DIM_BLOCKS, ROW_BLOCKS>::ROW_BYTES;
    let (mut first_token, mut num_tokens) = segment(task, lane);
    // Nobody waits for the description of what is to come, only for what comes.
    ring.wait_empty();
    let (mut tokens_before, mut window) = (0, 0);
    loop {
        let end = warp::sum_up_to(num_tokens, lane);
        let all = warp::shuffle_from(end, LANES - 1);
        if lane == 0 {
            ring.expect_more(all * token_bytes);
        }
        // No box before the barrier knows of its bytes.
        warp::sync();
        let boxes = TokenBoxes { tile, task, barrier: ring.full() };
        boxes.copy(first_token, tokens_before + end - num_tokens, num_tokens);
        tokens_before += all;
        window += LANES;
        if window >= task.item.num_segments {
            break;
        }
        (first_token, num_tokens) = segment(task, window + lane);
    }
    ring.fill_by(lane == 0);
}

/// First token and number of tokens of the tile's segment `index`; no tokens if there is no such segment.
#[inline(always)]
unsafe fn segment(task: &Task, index: u32) -> (u32, u32) {
    if index >= task.item.num_segments {
        return (0, 0);
    }
    let segment = task.params.segments + u64::from(task.item.segment_begin + index) * size_of::<RowSegment>() as u64;
    (
        load_global(segment + core::mem::offset_of!(RowSegment, first_token) as u64),
        load_global(segment + core::mem::offset_of!(RowSegment, num_tokens) as u64),
    )
}

/// How boxes of tokens get to a tile.
struct TokenBoxes<'a, const DIM_BLOCKS: usize, const ROW_BLOCKS: usize> {
    tile: QueryTile<DIM_BLOCKS, ROW_BLOCKS>,
    task: &'a Task,
    barrier: u32,
}

impl<const DIM_BLOCKS: usize, const ROW_BLOCKS: usize> TokenBoxes<'_, DIM_BLOCKS, ROW_BLOCKS> {
    /// Starts copies of `count` tokens from `token` on, which are the tile's from `tile_token` on: for each panel, boxes of
    /// powers of two.
    #[inline(always)]
    unsafe fn copy(&self, mut token: u32, mut tile_token: u32, mut count: u32) {
        let heads_per_group = self.task.params.heads.heads_per_group;
        let first_head = self.task.head_group * heads_per_group;
        while count > 0 {
            let log2 = 31 - count.leading_zeros();
            let map = self.task.params.q_maps + u64::from(log2 * TENSOR_MAP_BYTES);
            for panel in 0..QueryTile::<DIM_BLOCKS, ROW_BLOCKS>::PANELS {
                let row = self.tile.panel_row(panel, tile_token * heads_per_group);
                let [element, of_panel] = origin_of_panel::<DIM_BLOCKS>(panel);
                copy_box(row, map, [element, first_head, of_panel, token, 0], self.barrier);
            }
            token += 1 << log2;
            tile_token += 1 << log2;
            count -= 1 << log2;
        }
    }
}
