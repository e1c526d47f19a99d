//! Tiles of many rows: each consumer takes 64, and 128 columns a step.
//!
//! The scores of a step are started together with the output of the step before, which is still in flight while the softmax of the scores
//! runs: FlashAttention-3's schedule (Shah et al. 2024, section 3). The other consumer has the tensor cores meanwhile.
//!
//! ```text
//! tensor cores    S₀           S₁ P₀V₀             S₂ P₁V₁             P₂V₂
//! other units         softmax₀         softmax₁            softmax₂
//! ```

use super::consumer::Consumer;
use super::shared::{ColumnTile, QueryTile};
use super::{SCORE_FRAGMENTS, STEP};
use crate::attention::{store, task::Task};
use crate::element::Element;
use crate::ptx::mma::{Fragment, OperandA};
use crate::ptx::wgmma::{self, Accumulator, Descriptor, hold_operands};
use crate::rows::{Row, WarpView};
use crate::shared_tile::{PANEL_BLOCKS, PANEL_ROW_BYTES, SharedTile};
use crate::softmax::{OnlineSoftmax, ROWS_PER_LANE, mask, probabilities, scale_rows};

/// Rows of a consumer.
const CONSUMER_ROWS: u32 = 64;
/// Rows of a warp.
const WARP_ROWS: u32 = 16;
/// Operands A that hold the exponentials of one step, 16 columns each.
const STEP_OPERANDS: usize = STEP as usize / 16;

type Scores = [Fragment; SCORE_FRAGMENTS];

/// Does this consumer's rows of the task.
///
/// # Safety
///
/// Reached by all threads of both consumers, with a valid task of a wide tile.
#[inline(always)]
pub unsafe fn run<E: Element, const DIM_BLOCKS: usize>(consumer: &mut Consumer<DIM_BLOCKS>, task: &Task)
where
    Scores: Accumulator<E>,
    [Fragment; DIM_BLOCKS]: Accumulator<E>,
{
    let item = &task.item;
    let lane = consumer.lane;
    let first_row = consumer.warp * WARP_ROWS;
    let view = view_of_warpgroup(task, consumer.warpgroup, lane);
    let [rows] = task.rows.of_lane::<1>(first_row, lane);
    let q = Descriptor::along_sum(consumer.shared.queries().row(consumer.warpgroup * CONSUMER_ROWS));
    let mut softmax = OnlineSoftmax::<1>::new(task.params.scale_log2);
    let mut output = [[[0f32; 4]; DIM_BLOCKS]];

    // Steps before `first` and from `end` on show nothing to these rows.
    let (first, end) = view.steps(item.column_begin, STEP);
    let num_steps = (item.column_end - item.column_begin).div_ceil(STEP);
    consumer.queries.wait_full();
    consumer.skip_steps(first);
    if first < end {
        let mut column = item.column_begin + first * STEP;
        let mut scores = [[[0f32; 4]; SCORE_FRAGMENTS]];
        consumer.k.wait_full();
        consumer.take_turn();
        scores[0].hold();
        start_scores::<E, DIM_BLOCKS>(&mut scores[0], q, consumer.shared.k(consumer.k.stage));
        consumer.pass_turn();
        wgmma::wait_group::<0>();
        scores[0].hold();
        consumer.k.release(lane);
        mask_step(&mut scores[0], &view, &rows, column, lane);
        softmax.update(&mut scores);
        let mut exponentials = operands::<E>(&scores[0]);

        for _ in first + 1..end {
            column += STEP;
            let mut scores = [[[0f32; 4]; SCORE_FRAGMENTS]];
            consumer.k.wait_full();
            consumer.take_turn();
            output[0].hold();
            hold_operands(&mut exponentials);
            scores[0].hold();
            start_scores::<E, DIM_BLOCKS>(&mut scores[0], q, consumer.shared.k(consumer.k.stage));
            consumer.v.wait_full();
            start_output::<E, DIM_BLOCKS>(&mut output[0], &exponentials, consumer.shared.v(consumer.v.stage));
            consumer.pass_turn();
            wgmma::wait_group::<1>();
            scores[0].hold();
            consumer.k.release(lane);
            mask_step(&mut scores[0], &view, &rows, column, lane);
            let factors = softmax.update(&mut scores);
            wgmma::wait_group::<0>();
            output[0].hold();
            scores[0].hold();
            consumer.v.release(lane);
            exponentials = operands::<E>(&scores[0]);
            scale_rows(&mut output, &factors);
        }

        consumer.v.wait_full();
        output[0].hold();
        hold_operands(&mut exponentials);
        start_output::<E, DIM_BLOCKS>(&mut output[0], &exponentials, consumer.shared.v(consumer.v.stage));
        wgmma::wait_group::<0>();
        output[0].hold();
        consumer.v.release(lane);
    }
    consumer.queries.release(lane);
    consumer.skip_steps(num_steps - end);

    let staging = SharedTile::at(consumer.shared.exchange()).skip_rows(first_row);
    store::rows::<E, DIM_BLOCKS, 1>(task, lane, first_row, staging, &softmax, &mut output);
}

/// What the 64 rows of a consumer see.
#[inline(always)]
unsafe fn view_of_warpgroup(task: &Task, warpgroup: u32, lane: u32) -> WarpView {
    let row = warpgroup * CONSUMER_ROWS + lane;
    WarpView::of(task.rows.read(row)).and(WarpView::of(task.rows.read(row + CONSUMER_ROWS / 2)))
}

/// Masks the scores of a step, where some row does not see all of its columns.
#[inline(always)]
fn mask_step(scores: &mut Scores, view: &WarpView, rows: &[Row; ROWS_PER_LANE], column: u32, lane: u32) {
    if !view.sees_all(column, STEP) {
        mask(scores, rows, column, lane);
    }
}

/// The exponentials of a step as operands A.
#[inline(always)]
fn operands<E: Element>(exponentials: &Scores) -> [OperandA; STEP_OPERANDS] {
    let mut operands = [[0u32; 4]; STEP_OPERANDS];
    for (j, operand) in operands.iter_mut().enumerate() {
        *operand = probabilities::<E>(&exponentials[2 * j], &exponentials[2 * j + 1]);
    }
    operands
}

/// Starts `scores = Q Kᵀ` for one step.
#[inline(always)]
unsafe fn start_scores<E, const DIM_BLOCKS: usize>(scores: &mut Scores, q: Descriptor, k: ColumnTile<DIM_BLOCKS>)
where
    Scores: Accumulator<E>,
{
    let k = Descriptor::along_sum(k.row(0));
    wgmma::fence();
    for block in (0..DIM_BLOCKS).step_by(2) {
        let (panel, byte) = ((block / PANEL_BLOCKS) as u32, (block % PANEL_BLOCKS * 16) as u32);
        let a = q.skip(panel * QueryTile::<DIM_BLOCKS>::PANEL_BYTES + byte);
        let b = k.skip(panel * ColumnTile::<DIM_BLOCKS>::PANEL_BYTES + byte);
        scores.add_product_shared(a, b, block > 0);
    }
    wgmma::commit_group();
}

/// Starts `output += P V` for one step.
#[inline(always)]
unsafe fn start_output<E, const DIM_BLOCKS: usize>(
    output: &mut [Fragment; DIM_BLOCKS],
    exponentials: &[OperandA; STEP_OPERANDS],
    v: ColumnTile<DIM_BLOCKS>,
) where
    [Fragment; DIM_BLOCKS]: Accumulator<E>,
{
    let v = Descriptor::across_sum(v.row(0), ColumnTile::<DIM_BLOCKS>::PANEL_BYTES);
    wgmma::fence();
    for (j, a) in exponentials.iter().enumerate() {
        output.add_product(*a, v.skip(16 * j as u32 * PANEL_ROW_BYTES));
    }
    wgmma::commit_group();
}
