//! Tiles of few rows: four warps share 16 rows and divide the columns, 16 of every 64 each.
//!
//! A warp copies only the columns that it works on, so warps never wait for each other in the loop: each keeps several steps of
//! copies in flight, which is what saturates memory. At the end the four results are merged through shared memory.

use packinfer_abi::{ATTENTION_THREADS, COLUMN_STEP, NARROW_TILE_ROWS, TILE_SHARED_BYTES};

use super::{Block, WARP_COLUMNS};
use crate::attention::{task::Task, warps::WarpResults};
use crate::columns::ColumnLoader;
use crate::element::Element;
use crate::ptx::control::sync_block;
use crate::ptx::cp_async::{commit_group, wait_group};
use crate::ptx::memory::load_global;
use crate::ptx::mma::{Fragment, OperandA};
use crate::ptx::warp;
use crate::rows::{Row, WarpView};
use crate::shared_tile::SharedTile;
use crate::softmax::{OnlineSoftmax, ROWS_PER_LANE, mask, probabilities, scale_rows, soft_cap};

/// Warps of a block.
const WARPS: u32 = ATTENTION_THREADS / 32;
/// Score fragments of one step of a warp, each 8 columns wide.
const SCORE_FRAGMENTS: usize = WARP_COLUMNS as usize / 8;

/// The K and V of one warp in shared memory: a ring of stages.
struct Ring<const DIM_BLOCKS: usize> {
    base: SharedTile<DIM_BLOCKS>,
}

impl<const DIM_BLOCKS: usize> Ring<DIM_BLOCKS> {
    /// Rows of a stage: the warp's columns of K, then of V.
    const STAGE_ROWS: u32 = 2 * WARP_COLUMNS;
    /// Stages that fill the block's shared memory: 3 for a head dimension of 128, 6 for 64.
    const STAGES: u32 = TILE_SHARED_BYTES / (WARPS * Self::STAGE_ROWS * SharedTile::<DIM_BLOCKS>::ROW_BYTES);

    #[inline(always)]
    fn of_warp(tiles: u32, warp: u32) -> Self {
        Self { base: SharedTile::at(tiles).skip_rows(warp * Self::STAGES * Self::STAGE_ROWS) }
    }

    #[inline(always)]
    fn k(&self, stage: u32) -> SharedTile<DIM_BLOCKS> {
        self.base.skip_rows(stage * Self::STAGE_ROWS)
    }

    #[inline(always)]
    fn v(&self, stage: u32) -> SharedTile<DIM_BLOCKS> {
        self.k(stage).skip_rows(WARP_COLUMNS)
    }
}

/// Does the block's task.
///
/// # Safety
///
/// Reached by all threads of the block, with a valid task of a narrow tile.
#[inline(always)]
pub(crate) unsafe fn run<E: Element, const DIM_BLOCKS: usize>(block: &Block) {
    let Block { task, tiles, thread, warp, lane } = block;
    let (params, item, rows, lane) = (&task.params, &task.item, task.rows, *lane);
    let ring = Ring::<DIM_BLOCKS>::of_warp(*tiles, *warp);
    let warp_column = warp * WARP_COLUMNS;

    let mut loader = ColumnLoader::<DIM_BLOCKS, WARP_COLUMNS>::new(params, item, task.kv_head, lane);
    let mut ahead = item.column_begin + warp_column; // first column of the step that is copied next
    for stage in 0..Ring::<DIM_BLOCKS>::STAGES {
        if ahead < item.column_end {
            loader.load(ahead, ring.k(stage), ring.v(stage));
        }
        commit_group();
        ahead = ahead.saturating_add(COLUMN_STEP);
    }

    if *thread < NARROW_TILE_ROWS {
        rows.write(params, item, task.head_group, *thread);
    }
    sync_block();
    let view = WarpView::of(rows.read(lane % NARROW_TILE_ROWS));
    let [lane_rows] = rows.of_lane::<1>(0, lane);
    let queries = load_queries::<DIM_BLOCKS>(task, lane, &lane_rows);
    let mut softmax = OnlineSoftmax::<1>::new(params.scale_log2);
    let mut output = [[[0f32; 4]; DIM_BLOCKS]; 1];

    let mut stage = 0;
    let mut column = item.column_begin + warp_column;
    while column < item.column_end {
        wait_stage::<DIM_BLOCKS>();
        warp::sync();
        if view.sees_any(column, WARP_COLUMNS) {
            let mut scores = [score::<E, DIM_BLOCKS>(&queries, ring.k(stage), lane)];
            soft_cap(params, &mut scores[0]);
            if !view.sees_all(column, WARP_COLUMNS) {
                mask(&mut scores[0], &lane_rows, column, lane);
            }
            let factors = softmax.update(&mut scores);
            scale_rows(&mut output, &factors);
            accumulate::<E, DIM_BLOCKS>(&mut output[0], &scores[0], ring.v(stage), lane);
        }
        warp::sync(); // all lanes have read the stage
        if ahead < item.column_end {
            loader.load(ahead, ring.k(stage), ring.v(stage));
        }
        commit_group();
        ahead = ahead.saturating_add(COLUMN_STEP);
        stage = if stage + 1 == Ring::<DIM_BLOCKS>::STAGES { 0 } else { stage + 1 };
        column += COLUMN_STEP;
    }
    wait_group::<0>();

    let sums = [softmax.finish(0, 0), softmax.finish(0, 1)];
    scale_rows(&mut output, &[[sums[0].inverse, sums[1].inverse]]);
    // Each warp writes what it found where its ring was, once its lanes have done with that.
    warp::sync();
    let results = WarpResults::<{ WARPS as usize }, DIM_BLOCKS>::at(*tiles, TILE_SHARED_BYTES / WARPS);
    const { assert!(WarpResults::<{ WARPS as usize }, DIM_BLOCKS>::WARP_BYTES <= TILE_SHARED_BYTES / WARPS) };
    results.write(*warp, lane, &output[0], &sums);
    sync_block();
    results.merge::<E>(task, 0, 8 * DIM_BLOCKS as u32, *thread, ATTENTION_THREADS);
}

/// Waits for the oldest stage in flight.
#[inline(always)]
fn wait_stage<const DIM_BLOCKS: usize>() {
    const { assert!(matches!(Ring::<DIM_BLOCKS>::STAGES, 3 | 6)) };
    match Ring::<DIM_BLOCKS>::STAGES {
        3 => wait_group::<2>(),
        _ => wait_group::<5>(),
    }
}

/// Operands A of Q, straight from global memory: there are few rows and each is read once.
#[inline(always)]
unsafe fn load_queries<const DIM_BLOCKS: usize>(
    task: &Task,
    lane: u32,
    rows: &[Row; ROWS_PER_LANE],
) -> [[u32; ROWS_PER_LANE]; DIM_BLOCKS] {
    // `queries[block][half]` are elements 8 block + 2 (lane % 4) and the next of the lane's row `half`.
    let mut queries = [[0u32; ROWS_PER_LANE]; DIM_BLOCKS];
    for (half, row) in rows.iter().enumerate() {
        if row.exists() {
            let address =
                task.params.q + u64::from(row.index) * u64::from(SharedTile::<DIM_BLOCKS>::ROW_BYTES) + u64::from(lane % 4 * 4);
            for (block, words) in queries.iter_mut().enumerate() {
                words[half] = load_global(address + 16 * block as u64);
            }
        }
    }
    queries
}

/// Scores of one step: Q Kᵀ for the warp's 16 columns.
#[inline(always)]
unsafe fn score<E: Element, const DIM_BLOCKS: usize>(
    queries: &[[u32; ROWS_PER_LANE]; DIM_BLOCKS],
    k: SharedTile<DIM_BLOCKS>,
    lane: u32,
) -> [Fragment; SCORE_FRAGMENTS] {
    let mut scores = [[0f32; 4]; SCORE_FRAGMENTS];
    let k = k.columns_by_lane(lane);
    for dim in 0..DIM_BLOCKS / 2 {
        let (left, right) = (&queries[2 * dim], &queries[2 * dim + 1]);
        let a: OperandA = [left[0], left[1], right[0], right[1]];
        let b = SharedTile::<DIM_BLOCKS>::operands_b(k, 0, 2 * dim);
        E::mma(&mut scores[0], a, b[0]);
        E::mma(&mut scores[1], a, b[1]);
    }
    scores
}

/// Adds P V of one step to the output.
#[inline(always)]
unsafe fn accumulate<E: Element, const DIM_BLOCKS: usize>(
    output: &mut [Fragment; DIM_BLOCKS],
    exponentials: &[Fragment; SCORE_FRAGMENTS],
    v: SharedTile<DIM_BLOCKS>,
    lane: u32,
) {
    let v = v.columns_by_lane_transposed(lane);
    let a = probabilities::<E>(&exponentials[0], &exponentials[1]);
    for dim in 0..DIM_BLOCKS / 2 {
        let b = SharedTile::<DIM_BLOCKS>::operands_b_transposed(v, 0, 2 * dim);
        E::mma(&mut output[2 * dim], a, b[0]);
        E::mma(&mut output[2 * dim + 1], a, b[1]);
    }
}
