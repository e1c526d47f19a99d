//! The consumers of narrow tiles: all eight warps share the rows and divide the columns of every step, 16 each; 8 for a head
//! dimension of 256, unless K and V are in FP8.
//!
//! There is little to compute, and much to bring: a step takes the tensor cores a fraction of the time that memory takes for it.
//! So warps wait for nobody but the copy engine, whose next steps are under way meanwhile. At the end the eight results are
//! merged through shared memory.

use packinfer_abi::NARROW_TILE_ROWS;

use super::consumer::{Consumer, Queries, operand_of};
use super::exchange::Exchange;
use super::helpers::Helpers;
use super::shared::{Ring, Shared};
use super::{CONSUMER_WARPS, PAIR};
use crate::element::{ELEMENT_BYTES, Element};
use crate::ptx::memory::load_shared_f32x2;
use crate::ptx::mma::{Fragment, OperandA};
use crate::ptx::warp;
use crate::rows::{NO_ROW, Row};
use crate::shared_tile::{BoxTile, PANEL_BLOCKS};
use crate::softmax::{OnlineSoftmax, ROWS_PER_LANE, mask, probabilities, row_of_lane, scale_rows};
use crate::stored::Stored;

/// Does the next tile, which is narrow, and whose K and V are stored as `KV`, in rows of `CHUNKS` chunks of 16 bytes and steps of
/// `8 * STEP_BLOCKS` columns. A warp takes `SCORE_FRAGMENTS` fragments of 8 columns of a step.
///
/// # Safety
///
/// Reached by all threads of the consumers.
#[inline(always)]
pub unsafe fn tile<
    E: Element,
    KV: Stored<E>,
    const DIM_BLOCKS: usize,
    const FRAGMENTS: usize,
    const CHUNKS: usize,
    const STEP_BLOCKS: usize,
    const SCORE_FRAGMENTS: usize,
    const CAPPED: bool,
    H: Helpers,
>(
    consumer: &mut Consumer<DIM_BLOCKS, FRAGMENTS, PAIR, H>,
) {
    const { assert!(STEP_BLOCKS == CONSUMER_WARPS as usize * SCORE_FRAGMENTS && H::CONVERT == KV::FOUR_NEIGHBOURS) };
    const { assert!(8 * STEP_BLOCKS as u32 == Shared::<DIM_BLOCKS, FRAGMENTS, PAIR, H>::NARROW_STEP) };
    let warp_columns = const { 8 * SCORE_FRAGMENTS as u32 };
    let (slot, lane) = (consumer.tasks.stage(), consumer.lane());
    consumer.note_begin(consumer.shared.task_index(slot));
    let range = consumer.shared.columns(slot);
    let view = consumer.shared.view(slot, 0); // of the first rows, which are all that there are
    let [rows] = consumer.shared.rows(slot).of_lane::<1>(0, lane);
    let [k_factor, v_factor] = KV::FACTORS;
    let logits = consumer.logits::<CAPPED>(slot, k_factor);
    let queries = if H::CONVERT { consumer.take_narrow_queries::<E, KV>() } else { consumer.take_queries(0) };
    let step = Shared::<DIM_BLOCKS, FRAGMENTS, PAIR, H>::NARROW_STEP;
    let mut softmax = OnlineSoftmax::<1>::new(logits.scale_log2);
    let mut output = [[[0f32; 4]; DIM_BLOCKS]];

    let mut column = range.start + consumer.warp * warp_columns;
    for _ in 0..(range.end - range.start).div_ceil(step) {
        let sees_any = warp::any(view.sees_any(column, warp_columns));
        let mut scores = [[[0f32; 4]; SCORE_FRAGMENTS]];
        consumer.narrow_k().wait_full();
        if sees_any {
            scores[0] = score::<E, KV, DIM_BLOCKS, FRAGMENTS, CHUNKS, STEP_BLOCKS, SCORE_FRAGMENTS, H>(consumer, &queries);
        }
        warp::sync();
        consumer.narrow_k().release(lane);
        if sees_any {
            consumer.cap::<CAPPED, SCORE_FRAGMENTS>([logits.soft_cap_log2; ROWS_PER_LANE], &mut scores[0]);
            if warp::any(!view.sees_all(column, warp_columns)) {
                mask(&mut scores[0], &rows, column, lane);
            }
            let factors = softmax.update(&mut scores);
            scale_rows(&mut output, &factors);
        }
        consumer.narrow_v().wait_full();
        if sees_any {
            accumulate::<E, KV, DIM_BLOCKS, FRAGMENTS, CHUNKS, STEP_BLOCKS, SCORE_FRAGMENTS, H>(
                consumer,
                &mut output[0],
                &scores[0],
            );
        }
        warp::sync();
        consumer.narrow_v().release(lane);
        column += step;
    }

    if !Consumer::<DIM_BLOCKS, FRAGMENTS, PAIR, H>::HOLDS_NARROW_QUERIES {
        consumer.queries.release_by_lanes();
    }
    KV::put_in_order(&mut output[0]);
    store::<E, KV, DIM_BLOCKS, FRAGMENTS, H>(consumer, slot, &rows, &softmax, v_factor, &output[0]);
    consumer.tasks.release_by_lanes();
}

impl<const DIM_BLOCKS: usize, const FRAGMENTS: usize, H: Helpers> Consumer<'_, DIM_BLOCKS, FRAGMENTS, PAIR, H> {
    /// Where the warp is with K of narrow tiles.
    #[inline(always)]
    fn narrow_k(&mut self) -> &mut Ring {
        if H::CONVERT { &mut self.stored[0] } else { &mut self.k }
    }

    /// Where the warp is with V of narrow tiles.
    #[inline(always)]
    fn narrow_v(&mut self) -> &mut Ring {
        if H::CONVERT { &mut self.stored[1] } else { &mut self.v }
    }

    /// Whether Q of narrow tiles is held in registers.
    const HOLDS_NARROW_QUERIES: bool = Self::HOLDS_QUERIES || H::CONVERT && DIM_BLOCKS <= 16;

    /// Takes the rows of the tile's Q into registers, in the order that products with `KV` take them in; or if these do not hold
    /// Q, waits until it is there.
    #[inline(always)]
    unsafe fn take_narrow_queries<E, KV: Stored<E>>(&mut self) -> Queries<DIM_BLOCKS> {
        let mut queries = [[0u32; 2]; DIM_BLOCKS];
        self.queries.wait_full();
        if Self::HOLDS_NARROW_QUERIES {
            for block in (0..DIM_BLOCKS).step_by(2) {
                let [a, b, c, d] = self.stored_operand::<E, KV>(block);
                (queries[block], queries[block + 1]) = ([a, b], [c, d]);
            }
            self.queries.release_by_lanes();
        }
        queries
    }

    /// Sixteen elements of the rows of a narrow tile, from `8 * block` on, between taking and releasing its Q.
    #[inline(always)]
    unsafe fn narrow_operand<E, KV: Stored<E>>(&self, queries: &Queries<DIM_BLOCKS>, block: usize) -> OperandA {
        if !H::CONVERT {
            return self.operand_a(queries, block);
        }
        if Self::HOLDS_NARROW_QUERIES { operand_of(queries, block) } else { self.stored_operand::<E, KV>(block) }
    }

    /// The same from shared memory, in the order that products with `KV` take them in.
    #[inline(always)]
    unsafe fn stored_operand<E, KV: Stored<E>>(&self, block: usize) -> OperandA {
        let lane = self.lane();
        let panel = self.shared.queries().panel(block / PANEL_BLOCKS);
        let element = KV::element(block % PANEL_BLOCKS, lane);
        let [[a, c], [b, d]] = core::array::from_fn(|half| {
            let chunk = panel.chunk(row_of_lane(0, half, lane), element / 8);
            load_shared_f32x2(chunk + element % 8 * ELEMENT_BYTES).map(f32::to_bits)
        });
        [a, b, c, d]
    }
}

/// Merges what the warps found, and stores it; V must be multiplied with `v_factor` and its scale.
#[inline(always)]
unsafe fn store<E: Element, KV: Stored<E>, const DIM_BLOCKS: usize, const FRAGMENTS: usize, H: Helpers>(
    consumer: &Consumer<DIM_BLOCKS, FRAGMENTS, PAIR, H>,
    slot: u32,
    rows: &[Row; ROWS_PER_LANE],
    softmax: &OnlineSoftmax<1>,
    v_factor: f32,
    output: &[Fragment; DIM_BLOCKS],
) {
    let task = consumer.shared.task(consumer.params, slot);
    let (warp, lane, exchange) = (consumer.warp, consumer.lane(), consumer.shared.exchange());
    let [sums] = softmax.finish();
    exchange.tell_lse(warp, lane, &sums);
    consumer.meet();
    let [_, v_scale] = consumer.shared.scales(slot);
    let factors = exchange.factors(&task, warp, lane, rows, &sums).map(|factor| factor * (v_scale * v_factor));
    for first_row in (0..NARROW_TILE_ROWS).step_by(Exchange::<DIM_BLOCKS>::ROWS_AT_ONCE as usize) {
        if task.rows.index(first_row) == NO_ROW {
            break;
        }
        if first_row > 0 {
            consumer.meet(); // all have read the rows before
        }
        exchange.write(warp, lane, first_row, output, &factors, KV::element);
        consumer.meet();
        exchange.store_sums::<E>(&task, consumer.thread(), first_row);
    }
    consumer.note_end(task.index);
    warp::sync();
}

/// Scores of the warp's columns of the next step.
#[inline(always)]
unsafe fn score<
    E: Element,
    KV: Stored<E>,
    const DIM_BLOCKS: usize,
    const FRAGMENTS: usize,
    const CHUNKS: usize,
    const STEP_BLOCKS: usize,
    const SCORE_FRAGMENTS: usize,
    H: Helpers,
>(
    consumer: &mut Consumer<DIM_BLOCKS, FRAGMENTS, PAIR, H>,
    queries: &Queries<DIM_BLOCKS>,
) -> [Fragment; SCORE_FRAGMENTS] {
    let mut scores = [[0f32; 4]; SCORE_FRAGMENTS];
    let (warp, lane, stage) = (consumer.warp, consumer.lane(), consumer.narrow_k().stage());
    let first_row = warp * 8 * SCORE_FRAGMENTS as u32;
    let tile = consumer.shared.narrow_k::<CHUNKS, STEP_BLOCKS>(stage);
    if SCORE_FRAGMENTS == 1 {
        const { assert!(SCORE_FRAGMENTS > 1 || KV::PRODUCTS == 1) };
        let k = tile.eight_columns_by_lane(first_row, lane);
        for block in (0..DIM_BLOCKS).step_by(4) {
            let [first, second] = BoxTile::<CHUNKS, STEP_BLOCKS>::eight_columns(k, block);
            E::mma(&mut scores[0], consumer.operand_a(queries, block), first);
            E::mma(&mut scores[0], consumer.operand_a(queries, block + 2), second);
        }
        return scores;
    }
    let k = tile.columns_by_lane(first_row, lane);
    for load in 0..DIM_BLOCKS / (2 * KV::PRODUCTS) {
        let loaded = BoxTile::<CHUNKS, STEP_BLOCKS>::operands_b(k, 2 * load);
        for product in 0..KV::PRODUCTS {
            let [left, right] = KV::keys(loaded, product);
            let block = 2 * (KV::PRODUCTS * load + product);
            let a = consumer.narrow_operand::<E, KV>(queries, block);
            E::mma(&mut scores[0], a, left);
            E::mma(&mut scores[1], a, right);
        }
    }
    scores
}

/// Adds P V of the warp's columns of the next step to the output.
#[inline(always)]
unsafe fn accumulate<
    E: Element,
    KV: Stored<E>,
    const DIM_BLOCKS: usize,
    const FRAGMENTS: usize,
    const CHUNKS: usize,
    const STEP_BLOCKS: usize,
    const SCORE_FRAGMENTS: usize,
    H: Helpers,
>(
    consumer: &mut Consumer<DIM_BLOCKS, FRAGMENTS, PAIR, H>,
    output: &mut [Fragment; DIM_BLOCKS],
    exponentials: &[Fragment; SCORE_FRAGMENTS],
) {
    let (warp, lane, stage) = (consumer.warp, consumer.lane(), consumer.narrow_v().stage());
    let first_row = warp * 8 * SCORE_FRAGMENTS as u32;
    let tile = consumer.shared.narrow_v::<CHUNKS, STEP_BLOCKS>(stage);
    if SCORE_FRAGMENTS == 1 {
        // A product sums over 16 columns: the other eight are zeros.
        let weights = probabilities::<E>(&exponentials[0], &[0.0; 4]);
        let v = tile.eight_columns_by_lane(first_row, lane);
        for block in (0..DIM_BLOCKS).step_by(4) {
            let values = BoxTile::<CHUNKS, STEP_BLOCKS>::eight_columns_transposed(v, block);
            for i in 0..4 {
                E::mma(&mut output[block + i], weights, values[i]);
            }
        }
        return;
    }
    let weights = probabilities::<KV::Weight>(&exponentials[0], &exponentials[1]);
    let v = tile.columns_by_lane_transposed(first_row, lane);
    for load in 0..DIM_BLOCKS / (2 * KV::PRODUCTS) {
        let loaded = BoxTile::<CHUNKS, STEP_BLOCKS>::operands_b_transposed(v, 2 * load);
        for product in 0..KV::PRODUCTS {
            let [left, right] = KV::values(loaded, product);
            let block = 2 * (KV::PRODUCTS * load + product);
            KV::Weight::mma(&mut output[block], weights, left);
            KV::Weight::mma(&mut output[block + 1], weights, right);
        }
    }
}
