//! Tiles of many rows: four warps take 32 rows each and share the columns, 64 at a time; for a head dimension of 256, 16 rows and
//! 32 columns.
//!
//! ```text
//! columns   0..64      64..128    128..192
//! copies    ███████    ███████    ███████          two stages of K and V: while the block works on one, the other fills
//! products          QK PV      QK PV      QK PV
//! ```

use packinfer_abi::{TILE_SHARED_BYTES, wide_tile_rows};

use super::{Block, WARPS, epilogue, row_chunk};
use crate::attention::task::Task;
use crate::columns::ColumnLoader;
use crate::element::Element;
use crate::ptx::control::sync_block;
use crate::ptx::cp_async::{CHUNK_BYTES, commit_group, copy_chunk, wait_group};
use crate::ptx::memory::{load_global_x4, store_shared_x4};
use crate::ptx::mma::Fragment;
use crate::ptx::special::thread_index;
use crate::ptx::warp::LANES;
use crate::rows::WarpView;
use crate::shared_tile::{LaneRow, SharedTile};
use crate::softmax::{Logits, OnlineSoftmax, RowSums, mask, probabilities, scale_rows, soft_cap, zero_after};
use crate::stored::{MOST_PRODUCTS, Stored};

/// Steps whose K and V shared memory holds.
const STAGES: u32 = 2;

/// Shared memory of a wide tile whose warps hold `ROW_BLOCKS` blocks of 16 rows each, and take `SCORE_FRAGMENTS` fragments of 8
/// columns a step: Q, then K and V of each stage.
struct Tiles<const DIM_BLOCKS: usize, const KV_BLOCKS: usize, const ROW_BLOCKS: usize, const SCORE_FRAGMENTS: usize> {
    base: u32,
}

impl<const DIM_BLOCKS: usize, const KV_BLOCKS: usize, const ROW_BLOCKS: usize, const SCORE_FRAGMENTS: usize>
    Tiles<DIM_BLOCKS, KV_BLOCKS, ROW_BLOCKS, SCORE_FRAGMENTS>
{
    /// Rows of a warp.
    const WARP_ROWS: u32 = 16 * ROW_BLOCKS as u32;
    /// Columns of a step.
    const STEP: u32 = 8 * SCORE_FRAGMENTS as u32;
    /// Of these, how many a warp copies.
    const WARP_COLUMNS: u32 = Self::STEP / WARPS;
    const ROWS: u32 = WARPS * Self::WARP_ROWS;
    const Q_BYTES: u32 = Self::ROWS * SharedTile::<DIM_BLOCKS>::ROW_BYTES;
    const CHECK: () = {
        assert!(Self::ROWS == wide_tile_rows(8 * DIM_BLOCKS as u32));
        assert!(Self::Q_BYTES + STAGES * 2 * Self::STEP * SharedTile::<KV_BLOCKS>::ROW_BYTES <= TILE_SHARED_BYTES);
    };

    #[inline(always)]
    fn q(&self) -> SharedTile<DIM_BLOCKS> {
        SharedTile::at(self.base)
    }

    #[inline(always)]
    fn k(&self, stage: u32) -> SharedTile<KV_BLOCKS> {
        SharedTile::at(self.base + Self::Q_BYTES).skip_rows(stage * 2 * Self::STEP)
    }

    #[inline(always)]
    fn v(&self, stage: u32) -> SharedTile<KV_BLOCKS> {
        self.k(stage).skip_rows(Self::STEP)
    }
}

/// Does the block's task.
///
/// # Safety
///
/// Reached by all threads of the block, with a valid task of a wide tile.
#[inline(always)]
pub(crate) unsafe fn run<
    E: Element,
    KV: Stored<E>,
    const DIM_BLOCKS: usize,
    const KV_BLOCKS: usize,
    const ROW_BLOCKS: usize,
    const SCORE_FRAGMENTS: usize,
>(
    block: &Block,
) {
    const { Tiles::<DIM_BLOCKS, KV_BLOCKS, ROW_BLOCKS, SCORE_FRAGMENTS>::CHECK };
    let step = const { Tiles::<DIM_BLOCKS, KV_BLOCKS, ROW_BLOCKS, SCORE_FRAGMENTS>::STEP };
    let warp_rows = const { Tiles::<DIM_BLOCKS, KV_BLOCKS, ROW_BLOCKS, SCORE_FRAGMENTS>::WARP_ROWS };
    let warp_columns = const { Tiles::<DIM_BLOCKS, KV_BLOCKS, ROW_BLOCKS, SCORE_FRAGMENTS>::WARP_COLUMNS };
    let Block { task, warp, lane, .. } = block;
    let (params, item, warp, lane) = (&task.params, &task.item, *warp, *lane);
    let tiles = Tiles::<DIM_BLOCKS, KV_BLOCKS, ROW_BLOCKS, SCORE_FRAGMENTS> { base: block.tiles };
    let first_row = warp * warp_rows;
    let warp_column = warp * warp_columns;

    let mut loader = ColumnLoader::<KV_BLOCKS>::new(params, item, task.kv_head, warp_columns);
    loader.load(item.column_begin + warp_column, tiles.k(0).skip_rows(warp_column), tiles.v(0).skip_rows(warp_column));
    task.rows.write(params, item, task.head_group, block.thread);
    sync_block();
    load_queries::<E, KV, DIM_BLOCKS, KV_BLOCKS>(task, lane, tiles.q().skip_rows(first_row), first_row, warp_rows);
    commit_group();

    let logits = Logits::of(params, KV::scales(params, task.kv_head).key);
    let mut softmax = OnlineSoftmax::<ROW_BLOCKS>::new(logits.scale_log2);
    let mut output = [[[0f32; 4]; DIM_BLOCKS]; ROW_BLOCKS];

    let mut stage = 0;
    let mut column = item.column_begin;
    while column < item.column_end {
        // Worked out anew in each step, for accumulators leave no registers to keep these in; while it waits, a warp has the
        // time.
        let lane = thread_index() % LANES;
        let view = WarpView::of(task.rows.read(first_row + lane % warp_rows));
        wait_group::<0>();
        sync_block(); // this stage has arrived for all warps, and all have done with the other
        if column + step < item.column_end {
            let (k, v) = (tiles.k(1 - stage), tiles.v(1 - stage));
            loader.load(column + step + warp_column, k.skip_rows(warp_column), v.skip_rows(warp_column));
            commit_group();
        }
        if view.sees_any(column, step) {
            let q = tiles.q().skip_rows(first_row).rows_by_lane(lane);
            let mut scores = score::<E, KV, DIM_BLOCKS, KV_BLOCKS, ROW_BLOCKS, SCORE_FRAGMENTS>(q, tiles.k(stage), lane);
            for scores in &mut scores {
                soft_cap(logits, scores);
            }
            if !view.sees_all(column, step) {
                for (scores, rows) in scores.iter_mut().zip(&task.rows.of_lane::<ROW_BLOCKS>(first_row, lane)) {
                    mask(scores, rows, column, lane);
                }
            }
            let (factors, sums) = softmax.update_by_fragment(&mut scores);
            scale_rows(&mut output, &factors);
            accumulate::<E, KV, DIM_BLOCKS, KV_BLOCKS, ROW_BLOCKS, SCORE_FRAGMENTS>(
                &mut output,
                &scores,
                &sums,
                tiles.v(stage),
                lane,
            );
        }
        stage = 1 - stage;
        column += step;
    }

    let Block { task, tiles, warp, lane, .. } = &Block::this(block.task.params);
    let first_row = warp * warp_rows;
    let staging = SharedTile::at(*tiles).skip_rows(first_row); // the warp's own rows of Q
    epilogue::rows::<E, KV, DIM_BLOCKS, ROW_BLOCKS>(task, *lane, first_row, staging, &softmax, &mut output);
}

/// Brings the warp's rows of Q, its elements in the order in which K is summed over; zeros for rows that do not exist.
#[inline(always)]
unsafe fn load_queries<E: Element, KV: Stored<E>, const DIM_BLOCKS: usize, const KV_BLOCKS: usize>(
    task: &Task,
    lane: u32,
    tile: SharedTile<DIM_BLOCKS>,
    first_row: u32,
    warp_rows: u32,
) {
    if KV::FOUR_NEIGHBOURS {
        permute_queries::<DIM_BLOCKS, KV_BLOCKS>(task, lane, tile, first_row, warp_rows);
    } else {
        copy_queries(task, lane, tile, first_row, warp_rows);
    }
}

/// Starts copies of the warp's rows of Q.
#[inline(always)]
unsafe fn copy_queries<const DIM_BLOCKS: usize>(
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

/// Writes the warp's rows of Q, of every 16 elements first the pairs 0, 2, 4, 6, then the others: two chunks, which are one of a
/// tile of half as many.
#[inline(always)]
unsafe fn permute_queries<const DIM_BLOCKS: usize, const KV_BLOCKS: usize>(
    task: &Task,
    lane: u32,
    tile: SharedTile<DIM_BLOCKS>,
    first_row: u32,
    warp_rows: u32,
) {
    for i in 0..warp_rows / SharedTile::<KV_BLOCKS>::ROWS_AT_ONCE {
        let row = i * SharedTile::<KV_BLOCKS>::ROWS_AT_ONCE + SharedTile::<KV_BLOCKS>::row_of_lane(lane);
        let found = task.rows.read(first_row + row);
        for part in 0..SharedTile::<KV_BLOCKS>::PARTS {
            let chunk = 2 * (part * SharedTile::<KV_BLOCKS>::LANES_PER_ROW + lane % SharedTile::<KV_BLOCKS>::LANES_PER_ROW);
            let (mut left, mut right) = ([0; 4], [0; 4]);
            if found.exists() {
                let source = task.params.q
                    + u64::from(found.index) * u64::from(SharedTile::<DIM_BLOCKS>::ROW_BYTES)
                    + u64::from(chunk * CHUNK_BYTES);
                (left, right) = (load_global_x4(source), load_global_x4(source + u64::from(CHUNK_BYTES)));
            }
            store_shared_x4(tile.chunk(row, chunk), [left[0], left[2], right[0], right[2]]);
            store_shared_x4(tile.chunk(row, chunk + 1), [left[1], left[3], right[1], right[3]]);
        }
    }
}

/// Scores of one step: Q Kᵀ for the warp's rows.
#[inline(always)]
unsafe fn score<
    E: Element,
    KV: Stored<E>,
    const DIM_BLOCKS: usize,
    const KV_BLOCKS: usize,
    const ROW_BLOCKS: usize,
    const SCORE_FRAGMENTS: usize,
>(
    q: LaneRow,
    k: SharedTile<KV_BLOCKS>,
    lane: u32,
) -> [[Fragment; SCORE_FRAGMENTS]; ROW_BLOCKS] {
    let mut scores = [[[0f32; 4]; SCORE_FRAGMENTS]; ROW_BLOCKS];
    let k = k.columns_by_lane(lane);
    for load in 0..KV_BLOCKS / 2 {
        let mut a = [[[0u32; 4]; ROW_BLOCKS]; MOST_PRODUCTS];
        for product in 0..KV::PRODUCTS {
            for (block, a) in a[product].iter_mut().enumerate() {
                *a = SharedTile::<DIM_BLOCKS>::operand_a(q, 16 * block, 2 * (KV::PRODUCTS * load + product));
            }
        }
        for pair in 0..SCORE_FRAGMENTS / 2 {
            let loaded = SharedTile::<KV_BLOCKS>::operands_b(k, 16 * pair, 2 * load);
            for product in 0..KV::PRODUCTS {
                let b = KV::keys(loaded, product);
                for block in 0..ROW_BLOCKS {
                    E::mma(&mut scores[block][2 * pair], a[product][block], b[0]);
                    E::mma(&mut scores[block][2 * pair + 1], a[product][block], b[1]);
                }
            }
        }
    }
    scores
}

/// Accumulators of a thread, of O and of scores, with which the assembler was seen to spill: 160 of its 255 registers.
const MANY_ACCUMULATORS: usize = 160;

/// Adds P V of one step to the output. `sums` are those of the exponentials up to each fragment.
#[inline(always)]
unsafe fn accumulate<
    E: Element,
    KV: Stored<E>,
    const DIM_BLOCKS: usize,
    const KV_BLOCKS: usize,
    const ROW_BLOCKS: usize,
    const SCORE_FRAGMENTS: usize,
>(
    output: &mut [[Fragment; DIM_BLOCKS]; ROW_BLOCKS],
    exponentials: &[[Fragment; SCORE_FRAGMENTS]; ROW_BLOCKS],
    sums: &[RowSums<ROW_BLOCKS>; SCORE_FRAGMENTS],
    v: SharedTile<KV_BLOCKS>,
    lane: u32,
) {
    // Products need no sums, so the assembler puts the additions off until after them, and keeps all exponentials for that long.
    // Where accumulators leave too few registers, those of two fragments are to be added up before the first load for the next
    // two.
    let few_registers = const { 4 * ROW_BLOCKS * (DIM_BLOCKS + SCORE_FRAGMENTS) >= MANY_ACCUMULATORS };
    let v = v.columns_by_lane_transposed(lane);
    for pair in 0..SCORE_FRAGMENTS / 2 {
        let first_v = if few_registers && pair > 0 { v.after(zero_after(&sums[2 * pair - 1])) } else { v };
        let mut a = [[0u32; 4]; ROW_BLOCKS];
        for (a, exponentials) in a.iter_mut().zip(exponentials) {
            *a = probabilities::<KV::Weight>(&exponentials[2 * pair], &exponentials[2 * pair + 1]);
        }
        for load in 0..KV_BLOCKS / 2 {
            let v = if load == 0 { first_v } else { v };
            let loaded = SharedTile::<KV_BLOCKS>::operands_b_transposed(v, 16 * pair, 2 * load);
            for product in 0..KV::PRODUCTS {
                let b = KV::values(loaded, product);
                let dim = 2 * (KV::PRODUCTS * load + product);
                for block in 0..ROW_BLOCKS {
                    KV::Weight::mma(&mut output[block][dim], a[block], b[0]);
                    KV::Weight::mma(&mut output[block][dim + 1], a[block], b[1]);
                }
            }
        }
    }
}
