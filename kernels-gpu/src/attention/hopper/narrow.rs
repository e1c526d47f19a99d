//! Tiles of few rows: the eight consumer warps share 16 rows and divide the columns, 16 of every 128 each.
//!
//! Little is computed for each byte, so warp-wide products do; what counts is that the producer keeps the copies of whole steps in flight.

use packinfer_abi::NARROW_TILE_ROWS;

use super::consumer::Consumer;
use super::shared::ColumnTile;
use super::{CONSUMER_THREADS, CONSUMER_WARPS, STEP};
use crate::attention::{task::Task, warps::WarpResults};
use crate::element::Element;
use crate::ptx::mma::{Fragment, OperandA};
use crate::ptx::warp;
use crate::rows::WarpView;
use crate::shared_tile::{PANEL_BLOCKS, SharedTile};
use crate::softmax::{OnlineSoftmax, mask, probabilities, scale_rows};

/// Columns of a warp in each step.
const WARP_COLUMNS: u32 = STEP / CONSUMER_WARPS;
/// Score fragments of a warp in each step, each 8 columns wide.
const SCORE_FRAGMENTS: usize = WARP_COLUMNS as usize / 8;

/// Elements of O that are merged at a time.
const PANEL: u32 = 8 * PANEL_BLOCKS as u32;

/// The exchange: a panel of O of each warp.
type Exchange = WarpResults<{ CONSUMER_WARPS as usize }, PANEL_BLOCKS>;
/// Bytes of the exchange.
pub const EXCHANGE_BYTES: u32 = CONSUMER_WARPS * Exchange::WARP_BYTES;

/// Does the task.
///
/// # Safety
///
/// Reached by all threads of both consumers, with a valid task of a narrow tile.
#[inline(always)]
pub unsafe fn run<E: Element, const DIM_BLOCKS: usize>(consumer: &mut Consumer<DIM_BLOCKS>, task: &Task) {
    let item = &task.item;
    let (warp, lane) = (consumer.warp, consumer.lane);
    let view = WarpView::of(task.rows.read(lane % NARROW_TILE_ROWS));
    let [rows] = task.rows.of_lane::<1>(0, lane);
    let mut softmax = OnlineSoftmax::<1>::new(task.params.scale_log2);
    let mut output = [[[0f32; 4]; DIM_BLOCKS]];

    consumer.queries.wait_full();
    let mut queries = [[0u32; 4]; DIM_BLOCKS];
    for i in 0..DIM_BLOCKS / 2 {
        let panel = consumer.shared.queries().panel(2 * i / PANEL_BLOCKS);
        queries[i] = SharedTile::<PANEL_BLOCKS>::operand_a(panel.rows_by_lane(lane), 0, 2 * i % PANEL_BLOCKS);
    }
    warp::sync();
    consumer.queries.release(lane);

    let first_row = warp * WARP_COLUMNS; // of the K and V tiles, whose rows are columns
    let mut column = item.column_begin + first_row;
    let num_steps = (item.column_end - item.column_begin).div_ceil(STEP);
    for _ in 0..num_steps {
        let sees_any = view.sees_any(column, WARP_COLUMNS);
        let mut scores = [[[0f32; 4]; SCORE_FRAGMENTS]];
        consumer.k.wait_full();
        if sees_any {
            score::<E, DIM_BLOCKS>(&mut scores[0], &queries, consumer.shared.k(consumer.k.stage), first_row, lane);
        }
        warp::sync();
        consumer.k.release(lane);
        if sees_any {
            if !view.sees_all(column, WARP_COLUMNS) {
                mask(&mut scores[0], &rows, column, lane);
            }
            let factors = softmax.update(&mut scores);
            scale_rows(&mut output, &factors);
        }
        consumer.v.wait_full();
        if sees_any {
            accumulate::<E, DIM_BLOCKS>(&mut output[0], &scores[0], consumer.shared.v(consumer.v.stage), first_row, lane);
        }
        warp::sync();
        consumer.v.release(lane);
        column += STEP;
    }

    let sums = [softmax.finish(0, 0), softmax.finish(0, 1)];
    scale_rows(&mut output, &[[sums[0].inverse, sums[1].inverse]]);
    let exchange = Exchange::at(consumer.shared.exchange(), Exchange::WARP_BYTES);
    for (panel, fragments) in output[0].chunks_exact(PANEL_BLOCKS).enumerate() {
        consumer.sync_consumers(); // nobody reads the exchange any more
        exchange.write(warp, lane, fragments, &sums);
        consumer.sync_consumers();
        exchange.merge::<E>(task, panel as u32 * PANEL, 8 * DIM_BLOCKS as u32, consumer.thread, CONSUMER_THREADS);
    }
    consumer.sync_consumers(); // the exchange is free
}

/// Scores of one step: Q Kᵀ for the warp's 16 columns.
#[inline(always)]
unsafe fn score<E: Element, const DIM_BLOCKS: usize>(
    scores: &mut [Fragment; SCORE_FRAGMENTS],
    queries: &[OperandA; DIM_BLOCKS],
    k: ColumnTile<DIM_BLOCKS>,
    first_row: u32,
    lane: u32,
) {
    for i in 0..DIM_BLOCKS / 2 {
        let panel = k.panel(2 * i / PANEL_BLOCKS).skip_rows(first_row).columns_by_lane(lane);
        let b = SharedTile::<PANEL_BLOCKS>::operands_b(panel, 0, 2 * i % PANEL_BLOCKS);
        E::mma(&mut scores[0], queries[i], b[0]);
        E::mma(&mut scores[1], queries[i], b[1]);
    }
}

/// Adds P V of one step to the output.
#[inline(always)]
unsafe fn accumulate<E: Element, const DIM_BLOCKS: usize>(
    output: &mut [Fragment; DIM_BLOCKS],
    exponentials: &[Fragment; SCORE_FRAGMENTS],
    v: ColumnTile<DIM_BLOCKS>,
    first_row: u32,
    lane: u32,
) {
    let a = probabilities::<E>(&exponentials[0], &exponentials[1]);
    for i in 0..DIM_BLOCKS / 2 {
        let panel = v.panel(2 * i / PANEL_BLOCKS).skip_rows(first_row).columns_by_lane_transposed(lane);
        let b = SharedTile::<PANEL_BLOCKS>::operands_b_transposed(panel, 0, 2 * i % PANEL_BLOCKS);
        E::mma(&mut output[2 * i], a, b[0]);
        E::mma(&mut output[2 * i + 1], a, b[1]);
    }
}
