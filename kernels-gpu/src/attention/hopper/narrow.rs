//! The consumers of narrow tiles: all eight warps share the rows and divide the columns of every step, 16 each; 8 for a head dimension of 256.
//!
//! There is little to compute, and much to bring: a step takes the tensor cores a fraction of the time that memory takes for it. So warps wait for nobody
//! but the copy engine, whose next steps are under way meanwhile. At the end the eight results are merged through shared memory.

use packinfer_abi::NARROW_TILE_ROWS;

use super::consumer::{Consumer, Queries};
use super::exchange::Exchange;
use super::shared::ColumnTile;
use super::{CONSUMER_WARPS, PAIR, merge};
use crate::element::Element;
use crate::ptx::mma::Fragment;
use crate::ptx::warp;
use crate::rows::{NO_ROW, Row};
use crate::softmax::{OnlineSoftmax, ROWS_PER_LANE, mask, probabilities, scale_rows};

/// Rows that each warp sees to the merging of.
const ROWS_OF_WARP: u32 = NARROW_TILE_ROWS / CONSUMER_WARPS;
/// Rows that a warp merges at once: most narrow tiles have no more for it.
const MERGED_ROWS_AT_ONCE: usize = 1;
/// Partials of each that are loaded at once.
const PARTIALS_AHEAD: usize = 8;

/// Does the next tile, which is narrow. A warp takes `SCORE_FRAGMENTS` fragments of 8 columns of a step.
///
/// # Safety
///
/// Reached by all threads of the consumers.
#[inline(always)]
pub unsafe fn tile<
    E: Element,
    const DIM_BLOCKS: usize,
    const FRAGMENTS: usize,
    const SCORE_FRAGMENTS: usize,
    const CAPPED: bool,
>(
    consumer: &mut Consumer<DIM_BLOCKS, FRAGMENTS, PAIR, false>,
) {
    const { assert!(FRAGMENTS == CONSUMER_WARPS as usize * SCORE_FRAGMENTS) };
    let warp_columns = const { 8 * SCORE_FRAGMENTS as u32 };
    let (slot, lane) = (consumer.tasks.stage(), consumer.lane());
    consumer.note_begin(consumer.shared.task_index(slot));
    let range = consumer.shared.columns(slot);
    let view = consumer.shared.view(slot, 0); // of the first rows, which are all that there are
    let [rows] = consumer.shared.rows(slot).of_lane::<1>(0, lane);
    let queries = consumer.take_queries(0);
    let mut softmax = OnlineSoftmax::<1>::new(consumer.params.scale_log2);
    let mut output = [[[0f32; 4]; DIM_BLOCKS]];

    let first_row = consumer.warp * warp_columns; // of the step's K and V
    let mut column = range.start + first_row;
    for _ in 0..(range.end - range.start).div_ceil(Consumer::<DIM_BLOCKS, FRAGMENTS, PAIR, false>::STEP) {
        let sees_any = warp::any(view.sees_any(column, warp_columns));
        let mut scores = [[[0f32; 4]; SCORE_FRAGMENTS]];
        consumer.k.wait_full();
        if sees_any {
            scores[0] = score::<E, DIM_BLOCKS, FRAGMENTS, SCORE_FRAGMENTS>(consumer, &queries, first_row, lane);
        }
        warp::sync();
        consumer.k.release(lane);
        if sees_any {
            consumer.cap::<CAPPED, SCORE_FRAGMENTS>(&mut scores[0]);
            if warp::any(!view.sees_all(column, warp_columns)) {
                mask(&mut scores[0], &rows, column, lane);
            }
            let factors = softmax.update(&mut scores);
            scale_rows(&mut output, &factors);
        }
        consumer.v.wait_full();
        if sees_any {
            accumulate::<E, DIM_BLOCKS, FRAGMENTS, SCORE_FRAGMENTS>(
                &mut output[0],
                &scores[0],
                consumer.shared.v(consumer.v.stage()),
                first_row,
                lane,
            );
        }
        warp::sync();
        consumer.v.release(lane);
        column += Consumer::<DIM_BLOCKS, FRAGMENTS, PAIR, false>::STEP;
    }

    consumer.release_queries();
    store::<E, DIM_BLOCKS, FRAGMENTS>(consumer, slot, &rows, &softmax, &mut output);
    consumer.tasks.release_by_lanes();
}

/// Merges what the warps found, and stores it.
#[inline(always)]
unsafe fn store<E: Element, const DIM_BLOCKS: usize, const FRAGMENTS: usize>(
    consumer: &Consumer<DIM_BLOCKS, FRAGMENTS, PAIR, false>,
    slot: u32,
    rows: &[Row; ROWS_PER_LANE],
    softmax: &OnlineSoftmax<1>,
    output: &mut [[Fragment; DIM_BLOCKS]; 1],
) {
    let task = consumer.shared.task(consumer.params, slot);
    let (warp, lane, exchange) = (consumer.warp, consumer.lane(), consumer.shared.exchange());
    let [sums] = softmax.finish();
    exchange.tell_lse(warp, lane, &sums);
    consumer.meet();
    scale_rows(output, &[exchange.factors(&task, warp, lane, rows, &sums)]);
    for first_row in (0..NARROW_TILE_ROWS).step_by(Exchange::<DIM_BLOCKS>::ROWS_AT_ONCE as usize) {
        if task.rows.index(first_row) == NO_ROW {
            break;
        }
        if first_row > 0 {
            consumer.meet(); // all have read the rows before
        }
        exchange.write(warp, lane, first_row, &output[0]);
        consumer.meet();
        exchange.store_sums::<E>(&task, consumer.thread(), first_row);
    }
    consumer.note_end(task.index);
    warp::sync();
    if !task.is_direct() {
        consumer.meet(); // all have stored their parts of the rows
        let row = warp + CONSUMER_WARPS * (lane % ROWS_OF_WARP);
        merge::finish_rows::<E, DIM_BLOCKS, MERGED_ROWS_AT_ONCE, PARTIALS_AHEAD>(&task, lane, row, lane < ROWS_OF_WARP);
    }
}

/// Scores of the warp's columns, which are the rows of the next step's K from `first_row` on.
#[inline(always)]
unsafe fn score<E: Element, const DIM_BLOCKS: usize, const FRAGMENTS: usize, const SCORE_FRAGMENTS: usize>(
    consumer: &Consumer<DIM_BLOCKS, FRAGMENTS, PAIR, false>,
    queries: &Queries<DIM_BLOCKS>,
    first_row: u32,
    lane: u32,
) -> [Fragment; SCORE_FRAGMENTS] {
    let mut scores = [[0f32; 4]; SCORE_FRAGMENTS];
    let k = consumer.shared.k(consumer.k.stage());
    if SCORE_FRAGMENTS == 1 {
        let k = k.eight_columns_by_lane(first_row, lane);
        for block in (0..DIM_BLOCKS).step_by(4) {
            let [first, second] = ColumnTile::<DIM_BLOCKS, FRAGMENTS>::eight_columns(k, block);
            E::mma(&mut scores[0], consumer.operand_a(queries, block), first);
            E::mma(&mut scores[0], consumer.operand_a(queries, block + 2), second);
        }
        return scores;
    }
    let k = k.columns_by_lane(first_row, lane);
    for block in (0..DIM_BLOCKS).step_by(2) {
        let [left, right] = ColumnTile::<DIM_BLOCKS, FRAGMENTS>::operands_b(k, block);
        let a = consumer.operand_a(queries, block);
        E::mma(&mut scores[0], a, left);
        E::mma(&mut scores[1], a, right);
    }
    scores
}

/// Adds P V of the warp's columns to the output.
#[inline(always)]
unsafe fn accumulate<E: Element, const DIM_BLOCKS: usize, const FRAGMENTS: usize, const SCORE_FRAGMENTS: usize>(
    output: &mut [Fragment; DIM_BLOCKS],
    exponentials: &[Fragment; SCORE_FRAGMENTS],
    v: ColumnTile<DIM_BLOCKS, FRAGMENTS>,
    first_row: u32,
    lane: u32,
) {
    if SCORE_FRAGMENTS == 1 {
        // A product sums over 16 columns: the other eight are zeros.
        let weights = probabilities::<E>(&exponentials[0], &[0.0; 4]);
        let v = v.eight_columns_by_lane(first_row, lane);
        for block in (0..DIM_BLOCKS).step_by(4) {
            let values = ColumnTile::<DIM_BLOCKS, FRAGMENTS>::eight_columns_transposed(v, block);
            for i in 0..4 {
                E::mma(&mut output[block + i], weights, values[i]);
            }
        }
        return;
    }
    let weights = probabilities::<E>(&exponentials[0], &exponentials[1]);
    let v = v.columns_by_lane_transposed(first_row, lane);
    for block in (0..DIM_BLOCKS).step_by(2) {
        let [left, right] = ColumnTile::<DIM_BLOCKS, FRAGMENTS>::operands_b_transposed(v, block);
        E::mma(&mut output[block], weights, left);
        E::mma(&mut output[block + 1], weights, right);
    }
}
