//! Tiles of few rows: four warps share 16 rows and divide the columns, 16 of every 64 each; for a head dimension of 256, 8 of
//! every 32.
//!
//! A warp copies only the columns that it works on, so warps never wait for each other in the loop: each keeps several steps of
//! copies in flight, which is what saturates memory. At the end the four results are merged through shared memory.

use packinfer_abi::{ATTENTION_THREADS, NARROW_TILE_ROWS, TILE_SHARED_BYTES};

use super::{Block, WARPS};
use crate::attention::{task::Task, warps::WarpResults};
use crate::columns::ColumnLoader;
use crate::element::{ELEMENT_BYTES, Element};
use crate::ptx::control::sync_block;
use crate::ptx::cp_async::{commit_group, wait_group};
use crate::ptx::memory::load_global;
use crate::ptx::mma::{Fragment, OperandA};
use crate::ptx::warp;
use crate::rows::{Row, WarpView};
use crate::shared_tile::SharedTile;
use crate::softmax::{Logits, OnlineSoftmax, ROWS_PER_LANE, mask, probabilities, scale_rows, soft_cap};
use crate::stored::Stored;

/// The K and V of one warp in shared memory: a ring of stages. The warp takes `SCORE_FRAGMENTS` fragments of 8 columns a step.
struct Ring<const KV_BLOCKS: usize, const SCORE_FRAGMENTS: usize> {
    base: SharedTile<KV_BLOCKS>,
}

impl<const KV_BLOCKS: usize, const SCORE_FRAGMENTS: usize> Ring<KV_BLOCKS, SCORE_FRAGMENTS> {
    /// Columns that the warp takes a step.
    const COLUMNS: u32 = 8 * SCORE_FRAGMENTS as u32;
    /// Rows of a stage: the warp's columns of K, then of V.
    const STAGE_ROWS: u32 = 2 * Self::COLUMNS;
    /// Stages that fill the block's shared memory: 6 for a head dimension of 64, 4 for 96, 3 for 128, and for 256 with its
    /// shorter steps; in FP8 twice as many, and 3 for 256.
    const STAGES: u32 = TILE_SHARED_BYTES / (WARPS * Self::STAGE_ROWS * SharedTile::<KV_BLOCKS>::ROW_BYTES);

    #[inline(always)]
    fn of_warp(tiles: u32, warp: u32) -> Self {
        Self { base: SharedTile::at(tiles).skip_rows(warp * Self::STAGES * Self::STAGE_ROWS) }
    }

    /// Waits for the oldest of [`Self::STAGES`] groups of copies.
    #[inline(always)]
    fn wait_oldest() {
        const { assert!(matches!(Self::STAGES, 3 | 4 | 6 | 8 | 12)) };
        match Self::STAGES {
            3 => wait_group::<2>(),
            4 => wait_group::<3>(),
            6 => wait_group::<5>(),
            8 => wait_group::<7>(),
            _ => wait_group::<11>(),
        }
    }

    #[inline(always)]
    fn k(&self, stage: u32) -> SharedTile<KV_BLOCKS> {
        self.base.skip_rows(stage * Self::STAGE_ROWS)
    }

    #[inline(always)]
    fn v(&self, stage: u32) -> SharedTile<KV_BLOCKS> {
        self.k(stage).skip_rows(Self::COLUMNS)
    }
}

/// Does the block's task.
///
/// # Safety
///
/// Reached by all threads of the block, with a valid task of a narrow tile.
#[inline(always)]
pub(crate) unsafe fn run<
    E: Element,
    KV: Stored<E>,
    const DIM_BLOCKS: usize,
    const KV_BLOCKS: usize,
    const SCORE_FRAGMENTS: usize,
>(
    block: &Block,
) {
    let stages = const { Ring::<KV_BLOCKS, SCORE_FRAGMENTS>::STAGES };
    let warp_columns = const { Ring::<KV_BLOCKS, SCORE_FRAGMENTS>::COLUMNS };
    let step = WARPS * warp_columns;
    let Block { task, tiles, thread, warp, lane } = block;
    let (params, item, rows, lane) = (&task.params, &task.item, task.rows, *lane);
    let ring = Ring::<KV_BLOCKS, SCORE_FRAGMENTS>::of_warp(*tiles, *warp);
    let warp_column = warp * warp_columns;

    let mut loader = ColumnLoader::<KV_BLOCKS>::new(params, item, task.kv_head, warp_columns);
    let mut ahead = item.column_begin + warp_column; // first column of the step that is copied next
    for stage in 0..stages {
        if ahead < item.column_end {
            loader.load(ahead, ring.k(stage), ring.v(stage));
        }
        commit_group();
        ahead = ahead.saturating_add(step);
    }

    if *thread < NARROW_TILE_ROWS {
        rows.write(params, item, task.head_group, *thread);
    }
    sync_block();
    let view = WarpView::of(rows.read(lane % NARROW_TILE_ROWS));
    let [lane_rows] = rows.of_lane::<1>(0, lane);
    let queries = load_queries::<E, KV, DIM_BLOCKS>(task, lane, &lane_rows);
    let scales = KV::scales(params, task.kv_head);
    let logits = Logits::of(params, scales.key);
    let mut softmax = OnlineSoftmax::<1>::new(logits.scale_log2);
    let mut output = [[[0f32; 4]; DIM_BLOCKS]; 1];

    let mut stage = 0;
    let mut column = item.column_begin + warp_column;
    while column < item.column_end {
        Ring::<KV_BLOCKS, SCORE_FRAGMENTS>::wait_oldest();
        warp::sync();
        if view.sees_any(column, warp_columns) {
            let mut scores = [score::<E, KV, DIM_BLOCKS, KV_BLOCKS, SCORE_FRAGMENTS>(&queries, ring.k(stage), lane)];
            soft_cap(logits, &mut scores[0]);
            if !view.sees_all(column, warp_columns) {
                mask(&mut scores[0], &lane_rows, column, lane);
            }
            let factors = softmax.update(&mut scores);
            scale_rows(&mut output, &factors);
            accumulate::<E, KV, DIM_BLOCKS, KV_BLOCKS, SCORE_FRAGMENTS>(&mut output[0], &scores[0], ring.v(stage), lane);
        }
        warp::sync(); // all lanes have read the stage
        if ahead < item.column_end {
            loader.load(ahead, ring.k(stage), ring.v(stage));
        }
        commit_group();
        ahead = ahead.saturating_add(step);
        stage = if stage + 1 == stages { 0 } else { stage + 1 };
        column += step;
    }
    wait_group::<0>();

    let [sums] = softmax.finish();
    scale_rows(&mut output, &[sums.map(|sum| sum.inverse * scales.value)]);
    KV::put_in_order(&mut output[0]);
    // Each warp writes what it found where its ring was, once its lanes have done with that.
    warp::sync();
    let results = WarpResults::<{ WARPS as usize }, DIM_BLOCKS>::at(*tiles, TILE_SHARED_BYTES / WARPS);
    const { assert!(WarpResults::<{ WARPS as usize }, DIM_BLOCKS>::WARP_BYTES <= TILE_SHARED_BYTES / WARPS) };
    results.write(*warp, lane, &output[0], &sums, KV::element);
    sync_block();
    results.merge::<E>(task, 0, 8 * DIM_BLOCKS as u32, *thread, ATTENTION_THREADS);
}

/// Operands A of Q, straight from global memory: there are few rows and each is read once.
#[inline(always)]
unsafe fn load_queries<E: Element, KV: Stored<E>, const DIM_BLOCKS: usize>(
    task: &Task,
    lane: u32,
    rows: &[Row; ROWS_PER_LANE],
) -> [[u32; ROWS_PER_LANE]; DIM_BLOCKS] {
    // `queries[block][half]` are two elements of the lane's row `half`, from `KV::element(block, lane)` on.
    let mut queries = [[0u32; ROWS_PER_LANE]; DIM_BLOCKS];
    for (half, row) in rows.iter().enumerate() {
        if row.exists() {
            let address = task.params.q + u64::from(row.index) * u64::from(SharedTile::<DIM_BLOCKS>::ROW_BYTES);
            for (block, words) in queries.iter_mut().enumerate() {
                words[half] = load_global(address + u64::from(KV::element(block, lane) * ELEMENT_BYTES));
            }
        }
    }
    queries
}

/// Scores of one step: Q Kᵀ for the warp's columns.
#[inline(always)]
unsafe fn score<E: Element, KV: Stored<E>, const DIM_BLOCKS: usize, const KV_BLOCKS: usize, const SCORE_FRAGMENTS: usize>(
    queries: &[[u32; ROWS_PER_LANE]; DIM_BLOCKS],
    k: SharedTile<KV_BLOCKS>,
    lane: u32,
) -> [Fragment; SCORE_FRAGMENTS] {
    let mut scores = [[0f32; 4]; SCORE_FRAGMENTS];
    let a = |dim: usize| -> OperandA {
        let (left, right) = (&queries[2 * dim], &queries[2 * dim + 1]);
        [left[0], left[1], right[0], right[1]]
    };
    if SCORE_FRAGMENTS == 1 {
        let k = k.eight_columns_by_lane(lane);
        const { assert!(SCORE_FRAGMENTS > 1 || KV::PRODUCTS == 1) };
        for pair in 0..KV_BLOCKS / 4 {
            let b = SharedTile::<KV_BLOCKS>::eight_columns(k, 4 * pair);
            E::mma(&mut scores[0], a(2 * pair), b[0]);
            E::mma(&mut scores[0], a(2 * pair + 1), b[1]);
        }
    } else {
        let k = k.columns_by_lane(lane);
        for load in 0..KV_BLOCKS / 2 {
            let loaded = SharedTile::<KV_BLOCKS>::operands_b(k, 0, 2 * load);
            for product in 0..KV::PRODUCTS {
                let b = KV::keys(loaded, product);
                let dim = KV::PRODUCTS * load + product;
                E::mma(&mut scores[0], a(dim), b[0]);
                E::mma(&mut scores[1], a(dim), b[1]);
            }
        }
    }
    scores
}

/// Adds P V of one step to the output.
#[inline(always)]
unsafe fn accumulate<E: Element, KV: Stored<E>, const DIM_BLOCKS: usize, const KV_BLOCKS: usize, const SCORE_FRAGMENTS: usize>(
    output: &mut [Fragment; DIM_BLOCKS],
    exponentials: &[Fragment; SCORE_FRAGMENTS],
    v: SharedTile<KV_BLOCKS>,
    lane: u32,
) {
    if SCORE_FRAGMENTS == 1 {
        let v = v.eight_columns_by_lane(lane);
        let a = probabilities::<E>(&exponentials[0], &[0.0; 4]);
        for dim in 0..KV_BLOCKS / 4 {
            let b = SharedTile::<KV_BLOCKS>::eight_columns_transposed(v, 4 * dim);
            for block in 0..4 {
                E::mma(&mut output[4 * dim + block], a, b[block]);
            }
        }
    } else {
        let v = v.columns_by_lane_transposed(lane);
        let a = probabilities::<KV::Weight>(&exponentials[0], &exponentials[1]);
        for load in 0..KV_BLOCKS / 2 {
            let loaded = SharedTile::<KV_BLOCKS>::operands_b_transposed(v, 0, 2 * load);
            for product in 0..KV::PRODUCTS {
                let b = KV::values(loaded, product);
                let dim = 2 * (KV::PRODUCTS * load + product);
                KV::Weight::mma(&mut output[dim], a, b[0]);
                KV::Weight::mma(&mut output[dim + 1], a, b[1]);
            }
        }
    }
}
