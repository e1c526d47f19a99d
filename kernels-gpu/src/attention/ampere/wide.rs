//! Tiles of many rows: four warps take 32 rows each and share the columns, 64 at a time; for a head dimension of 256, 16 rows and 32 columns.
//!
//! ```text
//! columns   0..64      64..128    128..192
//! copies    ███████    ███████    ███████          two stages of K and V: while the block works on one, the other fills
//! products          QK PV      QK PV      QK PV
//! ```

use packinfer_abi::{TILE_SHARED_BYTES, wide_tile_rows};

use super::{Block, WARPS, epilogue};
use crate::attention::task::{Task, row_chunk};
use crate::columns::ColumnLoader;
use crate::element::Element;
use crate::ptx::control::sync_block;
use crate::ptx::cp_async::{commit_group, copy_chunk, wait_group};
use crate::ptx::mma::Fragment;
use crate::rows::WarpView;
use crate::shared_tile::{LaneRow, SharedTile};
use crate::softmax::{OnlineSoftmax, mask, probabilities, scale_rows, soft_cap};

/// Steps whose K and V shared memory holds.
const STAGES: u32 = 2;

/// Shared memory of a wide tile whose warps hold `ROW_BLOCKS` blocks of 16 rows each, and take `SCORE_FRAGMENTS` fragments of 8 columns a
/// step: Q, then K and V of each stage.
struct Tiles<const DIM_BLOCKS: usize, const ROW_BLOCKS: usize, const SCORE_FRAGMENTS: usize> {
    q: SharedTile<DIM_BLOCKS>,
}

impl<const DIM_BLOCKS: usize, const ROW_BLOCKS: usize, const SCORE_FRAGMENTS: usize>
    Tiles<DIM_BLOCKS, ROW_BLOCKS, SCORE_FRAGMENTS>
{
    /// Rows of a warp.
    const WARP_ROWS: u32 = 16 * ROW_BLOCKS as u32;
    /// Columns of a step.
    const STEP: u32 = 8 * SCORE_FRAGMENTS as u32;
    /// Of these, how many a warp copies.
    const WARP_COLUMNS: u32 = Self::STEP / WARPS;
    const ROWS: u32 = WARPS * Self::WARP_ROWS;
    const CHECK: () = {
        assert!(Self::ROWS == wide_tile_rows(8 * DIM_BLOCKS as u32));
        assert!((Self::ROWS + STAGES * 2 * Self::STEP) * SharedTile::<DIM_BLOCKS>::ROW_BYTES <= TILE_SHARED_BYTES);
    };

    #[inline(always)]
    fn k(&self, stage: u32) -> SharedTile<DIM_BLOCKS> {
        self.q.skip_rows(Self::ROWS + stage * 2 * Self::STEP)
    }

    #[inline(always)]
    fn v(&self, stage: u32) -> SharedTile<DIM_BLOCKS> {
        self.k(stage).skip_rows(Self::STEP)
    }
}

/// Does the block's task.
///
/// # Safety
///
/// Reached by all threads of the block, with a valid task of a wide tile.
#[inline(always)]
pub(crate) unsafe fn run<E: Element, const DIM_BLOCKS: usize, const ROW_BLOCKS: usize, const SCORE_FRAGMENTS: usize>(
    block: &Block,
) {
    const { Tiles::<DIM_BLOCKS, ROW_BLOCKS, SCORE_FRAGMENTS>::CHECK };
    let step = const { Tiles::<DIM_BLOCKS, ROW_BLOCKS, SCORE_FRAGMENTS>::STEP };
    let warp_rows = const { Tiles::<DIM_BLOCKS, ROW_BLOCKS, SCORE_FRAGMENTS>::WARP_ROWS };
    let warp_columns = const { Tiles::<DIM_BLOCKS, ROW_BLOCKS, SCORE_FRAGMENTS>::WARP_COLUMNS };
    let Block { task, warp, lane, .. } = block;
    let (params, item, warp, lane) = (&task.params, &task.item, *warp, *lane);
    let tiles = Tiles::<DIM_BLOCKS, ROW_BLOCKS, SCORE_FRAGMENTS> { q: SharedTile::at(block.tiles) };
    let first_row = warp * warp_rows;
    let warp_column = warp * warp_columns;

    let mut loader = ColumnLoader::<DIM_BLOCKS>::new(params, item, task.kv_head, warp_columns);
    loader.load(item.column_begin + warp_column, tiles.k(0).skip_rows(warp_column), tiles.v(0).skip_rows(warp_column));
    task.rows.write(params, item, task.head_group, block.thread);
    sync_block();
    load_queries(task, lane, tiles.q.skip_rows(first_row), first_row, warp_rows);
    commit_group();

    let view = WarpView::of(task.rows.read(first_row + lane % warp_rows));
    let q = tiles.q.skip_rows(first_row).rows_by_lane(lane);
    let mut softmax = OnlineSoftmax::<ROW_BLOCKS>::new(params.scale_log2);
    let mut output = [[[0f32; 4]; DIM_BLOCKS]; ROW_BLOCKS];

    let mut stage = 0;
    let mut column = item.column_begin;
    while column < item.column_end {
        wait_group::<0>();
        sync_block(); // this stage has arrived for all warps, and all have done with the other
        if column + step < item.column_end {
            let (k, v) = (tiles.k(1 - stage), tiles.v(1 - stage));
            loader.load(column + step + warp_column, k.skip_rows(warp_column), v.skip_rows(warp_column));
            commit_group();
        }
        if view.sees_any(column, step) {
            let mut scores = score::<E, DIM_BLOCKS, ROW_BLOCKS, SCORE_FRAGMENTS>(q.opaque(), tiles.k(stage), lane);
            for scores in &mut scores {
                soft_cap(params, scores);
            }
            if !view.sees_all(column, step) {
                for (scores, rows) in scores.iter_mut().zip(&task.rows.of_lane::<ROW_BLOCKS>(first_row, lane)) {
                    mask(scores, rows, column, lane);
                }
            }
            let factors = softmax.update(&mut scores);
            scale_rows(&mut output, &factors);
            accumulate::<E, DIM_BLOCKS, ROW_BLOCKS, SCORE_FRAGMENTS>(&mut output, &scores, tiles.v(stage), lane);
        }
        stage = 1 - stage;
        column += step;
    }

    let Block { task, tiles, warp, lane, .. } = &Block::this(block.task.params);
    let first_row = warp * warp_rows;
    let staging = SharedTile::at(*tiles).skip_rows(first_row); // the warp's own rows of Q
    epilogue::rows::<E, DIM_BLOCKS, ROW_BLOCKS>(task, *lane, first_row, staging, &softmax, &mut output);
}

/// Starts copies of the warp's rows of Q; zeros for rows that do not exist.
#[inline(always)]
unsafe fn load_queries<const DIM_BLOCKS: usize>(
    task: &Task,
    lane: u32,
    tile: SharedTile<DIM_BLOCKS>,
    first_row: u32,
    warp_rows: u32,
) {
    let chunk = tile.chunk_of_lane(lane);
    for i in 0..warp_rows / SharedTile::<DIM_BLOCKS>::ROWS_AT_ONCE {
        let rows = i * SharedTile::<DIM_BLOCKS>::ROWS_AT_ONCE;
        let row = task.rows.read(first_row + rows + SharedTile::<DIM_BLOCKS>::row_of_lane(lane));
        let index = if row.exists() { row.index } else { 0 };
        for part in 0..SharedTile::<DIM_BLOCKS>::PARTS {
            let byte = part * SharedTile::<DIM_BLOCKS>::PART_BYTES;
            let source = row_chunk::<DIM_BLOCKS>(task.params.q, index, lane) + u64::from(byte);
            copy_chunk(chunk.rows_on(rows) + byte, source, row.exists());
        }
    }
}

/// Scores of one step: Q Kᵀ for the warp's rows.
#[inline(always)]
unsafe fn score<E: Element, const DIM_BLOCKS: usize, const ROW_BLOCKS: usize, const SCORE_FRAGMENTS: usize>(
    q: LaneRow,
    k: SharedTile<DIM_BLOCKS>,
    lane: u32,
) -> [[Fragment; SCORE_FRAGMENTS]; ROW_BLOCKS] {
    let mut scores = [[[0f32; 4]; SCORE_FRAGMENTS]; ROW_BLOCKS];
    let k = k.columns_by_lane(lane).opaque();
    for dim in 0..DIM_BLOCKS / 2 {
        let mut a = [[0u32; 4]; ROW_BLOCKS];
        for (block, a) in a.iter_mut().enumerate() {
            *a = SharedTile::<DIM_BLOCKS>::operand_a(q, 16 * block, 2 * dim);
        }
        for pair in 0..SCORE_FRAGMENTS / 2 {
            let b = SharedTile::<DIM_BLOCKS>::operands_b(k, 16 * pair, 2 * dim);
            for block in 0..ROW_BLOCKS {
                E::mma(&mut scores[block][2 * pair], a[block], b[0]);
                E::mma(&mut scores[block][2 * pair + 1], a[block], b[1]);
            }
        }
    }
    scores
}

/// Adds P V of one step to the output.
#[inline(always)]
unsafe fn accumulate<E: Element, const DIM_BLOCKS: usize, const ROW_BLOCKS: usize, const SCORE_FRAGMENTS: usize>(
    output: &mut [[Fragment; DIM_BLOCKS]; ROW_BLOCKS],
    exponentials: &[[Fragment; SCORE_FRAGMENTS]; ROW_BLOCKS],
    v: SharedTile<DIM_BLOCKS>,
    lane: u32,
) {
    let v = v.columns_by_lane_transposed(lane);
    for pair in 0..SCORE_FRAGMENTS / 2 {
        let mut a = [[0u32; 4]; ROW_BLOCKS];
        for (a, exponentials) in a.iter_mut().zip(exponentials) {
            *a = probabilities::<E>(&exponentials[2 * pair], &exponentials[2 * pair + 1]);
        }
        for dim in 0..DIM_BLOCKS / 2 {
            let b = SharedTile::<DIM_BLOCKS>::operands_b_transposed(v, 16 * pair, 2 * dim);
            for block in 0..ROW_BLOCKS {
                E::mma(&mut output[block][2 * dim], a[block], b[0]);
                E::mma(&mut output[block][2 * dim + 1], a[block], b[1]);
            }
        }
    }
}
