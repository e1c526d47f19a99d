//! Three consumers: a tile of 192 rows takes two thirds of the bytes from the L2 cache that one of 128 takes for the same
//! products. Each has at most 160 registers a thread, too few for the scores of a step beside the weights of the step before. So
//! a consumer does one after the other, and the other two have the tensor cores meanwhile.
//!
//! ```text
//! consumer 0    S₀ · softmax₀             P₀V₀ S₁ · softmax₁             P₁V₁ S₂ …
//! consumer 1             S₀ · softmax₀             P₀V₀ S₁ · softmax₁             P₁V₁ …
//! consumer 2                      S₀ · softmax₀             P₀V₀ S₁ · softmax₁         …
//! ```
//!
//! With a head dimension of 64, softmaxes are what takes longest. There, the tensor cores sum up the weights, if no log-sum-exps
//! are asked for: V has eight more columns then, of ones.

use super::super::TRIO;
use super::super::consumer::{Consumer, Queries};
use super::super::helpers::NoHelpers;
use super::super::softmax::{LazySoftmax, OfRows};
use super::{Step, Weights, weights_of};
use crate::element::Element;
use crate::ptx::mma::Fragment;
use crate::ptx::wgmma::{self, Accumulator, hold_words};
use crate::softmax::scale_rows;

/// What a consumer has in its registers.
struct State<const OUTPUT_BLOCKS: usize, const FRAGMENTS: usize> {
    /// Of the tile, with the step whose scores came last.
    softmax: LazySoftmax,
    /// Of that step.
    weights: Weights<FRAGMENTS>,
    /// Of the tile, without that step.
    output: [[Fragment; OUTPUT_BLOCKS]; 1],
    /// Whether that step is the first of its tile, so that there is no such output.
    is_first: bool,
}

/// Does the next tile, as a wide one whatever its kind. Its output has `OUTPUT_BLOCKS` blocks of 8 columns: one more than V, if
/// the weights are summed up there. Those are rounded, as they are in the output, so that it is as exact; but a log-sum-exp in
/// bf16 is off by up to 0.002 then.
///
/// # Safety
///
/// Reached by all threads of the consumers.
#[inline(always)]
pub unsafe fn tile<E: Element, const DIM_BLOCKS: usize, const FRAGMENTS: usize, const OUTPUT_BLOCKS: usize, const CAPPED: bool>(
    consumer: &mut Consumer<DIM_BLOCKS, FRAGMENTS, TRIO, NoHelpers>,
) where
    [Fragment; FRAGMENTS]: Accumulator<E>,
    [Fragment; OUTPUT_BLOCKS]: Accumulator<E>,
{
    let (mut step, before) = consumer.next_tile();
    consumer.take_queries(consumer.first_row());
    consumer.skip(before);
    let mut state = consumer.first_step::<E, OUTPUT_BLOCKS, CAPPED>(&step);
    while !step.is_last() {
        step.column += Consumer::<DIM_BLOCKS, FRAGMENTS, TRIO, NoHelpers>::STEP;
        consumer.further_step::<E, OUTPUT_BLOCKS, CAPPED>(&step, &mut state);
    }
    consumer.v.wait_full();
    consumer.add_to_output::<E, OUTPUT_BLOCKS>(&mut state);
    let [output] = &state.output;
    let sums = if OUTPUT_BLOCKS > DIM_BLOCKS {
        let [first, _, second, _] = output[DIM_BLOCKS];
        state.softmax.finish_with([first, second])
    } else {
        state.softmax.finish()
    };
    let mut output = [core::array::from_fn(|block| output[block])];
    scale_rows(&mut output, &[consumer.finish(step.slot, sums)]);
    consumer.store::<E>(step.slot, &output);
    consumer.skip(step.behind);
}

impl<const DIM_BLOCKS: usize, const FRAGMENTS: usize> Consumer<'_, DIM_BLOCKS, FRAGMENTS, TRIO, NoHelpers> {
    /// Products take Q from shared memory.
    const NO_QUERIES: Queries<DIM_BLOCKS> = [[0; 2]; DIM_BLOCKS];

    /// The first step of a tile.
    #[inline(always)]
    unsafe fn first_step<E: Element, const OUTPUT_BLOCKS: usize, const CAPPED: bool>(
        &mut self,
        step: &Step,
    ) -> State<OUTPUT_BLOCKS, FRAGMENTS>
    where
        [Fragment; FRAGMENTS]: Accumulator<E>,
    {
        let mut softmax = LazySoftmax::NOTHING;
        self.k.wait_full();
        self.take_turn();
        let (scores, scale_log2) = self.scores_in_turn::<E, CAPPED>(step);
        softmax.find_origins(scale_log2, &scores);
        let weights = Self::weigh::<E, OUTPUT_BLOCKS>(&mut softmax, scale_log2, scores);
        State { softmax, weights, output: [[[0f32; 4]; OUTPUT_BLOCKS]], is_first: true }
    }

    /// A step of the same tile as the step before, whose weights go into the output first.
    #[inline(always)]
    unsafe fn further_step<E: Element, const OUTPUT_BLOCKS: usize, const CAPPED: bool>(
        &mut self,
        step: &Step,
        state: &mut State<OUTPUT_BLOCKS, FRAGMENTS>,
    ) where
        [Fragment; FRAGMENTS]: Accumulator<E>,
        [Fragment; OUTPUT_BLOCKS]: Accumulator<E>,
    {
        self.v.wait_full();
        self.k.wait_full();
        self.take_turn();
        self.add_to_output::<E, OUTPUT_BLOCKS>(state);
        let (scores, scale_log2) = self.scores_in_turn::<E, CAPPED>(step);
        if let Some(factors) = state.softmax.make_room(scale_log2, &scores) {
            scale_rows(&mut state.output, &[factors]);
        }
        state.weights = Self::weigh::<E, OUTPUT_BLOCKS>(&mut state.softmax, scale_log2, scores);
    }

    /// The exponentials of a step's scores, which the softmax takes in unless the output has their sums.
    #[inline(always)]
    fn weigh<E: Element, const OUTPUT_BLOCKS: usize>(
        softmax: &mut LazySoftmax,
        scale_log2: OfRows,
        mut scores: [Fragment; FRAGMENTS],
    ) -> Weights<FRAGMENTS> {
        if OUTPUT_BLOCKS > DIM_BLOCKS {
            scores.iter_mut().for_each(|fragment| softmax.exponentials(scale_log2, fragment));
        } else {
            softmax.take_in(scale_log2, &mut scores);
        }
        weights_of::<E, FRAGMENTS>(&scores)
    }

    /// Starts the scores of a step whose K is there, passes the turn on, and waits for them. Returns their scale, too.
    #[inline(always)]
    unsafe fn scores_in_turn<E, const CAPPED: bool>(&mut self, step: &Step) -> ([Fragment; FRAGMENTS], OfRows)
    where
        [Fragment; FRAGMENTS]: Accumulator<E>,
    {
        let mut scores = [[0f32; 4]; FRAGMENTS];
        scores.hold();
        self.start_scores::<E>(&Self::NO_QUERIES, &mut scores);
        self.pass_turn();
        let about = self.about_scores::<CAPPED>(step);
        wgmma::wait_group::<0>();
        self.take_scores::<E, CAPPED>(step, &about, &mut scores);
        (scores, about.logits.scale_log2)
    }

    /// Adds what the weights give to the output, for a V that is there, which is let go.
    #[inline(always)]
    unsafe fn add_to_output<E, const OUTPUT_BLOCKS: usize>(&mut self, state: &mut State<OUTPUT_BLOCKS, FRAGMENTS>)
    where
        [Fragment; OUTPUT_BLOCKS]: Accumulator<E>,
    {
        let [output] = &mut state.output;
        output.hold();
        hold_words(&mut state.weights);
        self.start_output::<E, _>(output, state.is_first, &state.weights, self.v.stage());
        wgmma::wait_group::<0>();
        output.hold();
        state.is_first = false;
        self.v.release(self.lane());
    }
}
