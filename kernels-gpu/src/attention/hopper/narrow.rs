//! Tiles of few rows: the eight consumer warps share 16 rows and divide the columns, 16 of every 128 each.
//!
//! Little is computed for each byte, so warp-wide products do; what counts is that the producer keeps the copies of whole steps in flight.

use packinfer_abi::NARROW_TILE_ROWS;

use super::consumer::Consumer;
use super::shared::ColumnTile;
use super::{CONSUMER_THREADS, CONSUMER_WARPS, STEP};
use crate::attention::{store, task::Task};
use crate::element::{ELEMENT_BYTES, Element};
use crate::ptx::math;
use crate::ptx::memory::{load_shared_f32, store_global, store_global_f32x2, store_shared_f32, store_shared_f32x2};
use crate::ptx::mma::{Fragment, OperandA};
use crate::ptx::warp;
use crate::rows::WarpView;
use crate::shared_tile::{PANEL_BLOCKS, SharedTile};
use crate::softmax::{OnlineSoftmax, ROWS_PER_LANE, mask, probabilities, row_of_lane, scale_rows};

/// Columns of a warp in each step.
const WARP_COLUMNS: u32 = STEP / CONSUMER_WARPS;
/// Score fragments of a warp in each step, each 8 columns wide.
const SCORE_FRAGMENTS: usize = WARP_COLUMNS as usize / 8;

/// Elements of O that are merged at a time.
const PANEL: u32 = 8 * PANEL_BLOCKS as u32;
/// Bytes between rows of O in the exchange: eight words more than a panel, so that the eight rows that a warp writes at once lie in different banks.
const EXCHANGE_ROW_BYTES: u32 = (PANEL + 8) * 4;
/// Bytes of a warp's rows of O in the exchange.
const EXCHANGE_WARP_BYTES: u32 = NARROW_TILE_ROWS * EXCHANGE_ROW_BYTES;
/// Bytes of the exchange: a panel of O of each warp in float32, and the log-sum-exp of its rows.
pub const EXCHANGE_BYTES: u32 = CONSUMER_WARPS * (EXCHANGE_WARP_BYTES + NARROW_TILE_ROWS * 4);

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
    let exchange = Exchange { base: consumer.shared.exchange() };
    for (panel, fragments) in output[0].chunks_exact(PANEL_BLOCKS).enumerate() {
        consumer.sync_consumers(); // nobody reads the exchange any more
        for half in 0..ROWS_PER_LANE {
            let row = row_of_lane(0, half, lane);
            for (dim, fragment) in fragments.iter().enumerate() {
                let address = exchange.output(warp, row, 8 * dim as u32 + lane % 4 * 2);
                store_shared_f32x2(address, fragment[2 * half], fragment[2 * half + 1]);
            }
            if lane % 4 == 0 {
                store_shared_f32(exchange.lse(warp, row), sums[half].lse_log2);
            }
        }
        consumer.sync_consumers();
        merge_panel::<E, DIM_BLOCKS>(task, &exchange, panel as u32, consumer.thread);
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

/// What the consumer warps found, in shared memory: a panel of O and the log-sum-exp of each one's 16 rows.
struct Exchange {
    base: u32,
}

impl Exchange {
    #[inline(always)]
    fn output(&self, warp: u32, row: u32, element: u32) -> u32 {
        self.base + warp * EXCHANGE_WARP_BYTES + row * EXCHANGE_ROW_BYTES + element * 4
    }

    #[inline(always)]
    fn lse(&self, warp: u32, row: u32) -> u32 {
        self.base + CONSUMER_WARPS * EXCHANGE_WARP_BYTES + (warp * NARROW_TILE_ROWS + row) * 4
    }
}

/// Merges a panel of the eight warps' results by their log-sum-exp and stores it, two elements a thread at a time.
#[inline(always)]
unsafe fn merge_panel<E: Element, const DIM_BLOCKS: usize>(task: &Task, exchange: &Exchange, panel: u32, thread: u32) {
    let dim = 8 * DIM_BLOCKS as u64;
    let rows_at_once = CONSUMER_THREADS / (PANEL / 2);
    let element = thread % (PANEL / 2) * 2;
    for i in 0..NARROW_TILE_ROWS / rows_at_once {
        let row = i * rows_at_once + thread / (PANEL / 2);
        let found = task.rows.read(row);
        if !found.exists() {
            continue;
        }
        let mut lse = [0f32; CONSUMER_WARPS as usize];
        let mut max = f32::NEG_INFINITY;
        for (warp, lse) in lse.iter_mut().enumerate() {
            *lse = load_shared_f32(exchange.lse(warp as u32, row));
            max = math::max(max, *lse);
        }
        let origin = if max == f32::NEG_INFINITY { 0.0 } else { max };
        let (mut total, mut sum) = (0f32, [0f32; 2]);
        for (warp, lse) in lse.iter().enumerate() {
            let weight = math::exp2(lse - origin);
            let address = exchange.output(warp as u32, row, element);
            sum[0] += weight * load_shared_f32(address);
            sum[1] += weight * load_shared_f32(address + 4);
            total += weight;
        }
        let inverse = if total == 0.0 { 0.0 } else { math::reciprocal(total) };
        let (a, b) = (sum[0] * inverse, sum[1] * inverse);
        let element = u64::from(panel * PANEL + element);
        if task.is_direct() {
            store_global(task.params.o + (u64::from(found.index) * dim + element) * u64::from(ELEMENT_BYTES), E::pack(a, b));
        } else {
            store_global_f32x2(task.params.partial_o + (task.partial_index(row) * dim + element) * 4, a, b);
        }
        if element == 0 {
            store::lse(task, row, found.index, origin + math::log2(total));
        }
    }
}
