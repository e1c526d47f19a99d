//! Two consumers: the scores of a step are started together with the output of the step before, which is still in flight while
//! the softmax of the scores runs: FlashAttention-3's schedule (Shah et al. 2024, section 3). The other consumer has the tensor
//! cores meanwhile. Tiles follow each other without a gap: the first scores of one are started together with the last output of
//! the one before.
//!
//! ```text
//! tensor cores    S₀           S₁ P₀V₀             S₀′ P₁V₁                    S₁′ P₀′V₀′
//! other units         softmax₀         softmax₁            softmax₀′ · store O             softmax₁′
//! ```

use packinfer_abi::TileKind;

use super::super::PAIR;
use super::super::consumer::{Consumer, Queries};
use super::super::helpers::Helpers;
use super::super::shared::Shared;
use super::super::softmax::{LazySoftmax, OfRows};
use super::{Step, Weights, weights_of};
use crate::element::Element;
use crate::ptx::control;
use crate::ptx::mma::Fragment;
use crate::ptx::wgmma::{self, Accumulator, hold_words};
use crate::softmax::{ROWS_PER_LANE, scale_rows};

/// What a consumer has in its registers.
struct State<const DIM_BLOCKS: usize, const FRAGMENTS: usize> {
    /// Of the tile of the step whose scores came last.
    queries: Queries<DIM_BLOCKS>,
    /// Of that step's tile, with that step.
    softmax: LazySoftmax,
    /// Of that step.
    weights: Weights<FRAGMENTS>,
    /// The part of V's ring that these weights are of.
    values: u32,
    /// Of that step's tile, without that step.
    output: [[Fragment; DIM_BLOCKS]; 1],
    /// Whether that step is the first of its tile, so that there is no such output.
    is_first: bool,
    /// Whether K of the step after it has been seen to be there: asked while there is something else to do.
    next_k_is_full: bool,
}

/// Goes through tiles that follow each other without a gap, from the next one on, which is wide. Q and O are of type `E`,
/// products of type `W`.
///
/// # Safety
///
/// Reached by all threads of the consumers.
#[inline(always)]
pub unsafe fn tiles<E: Element, W: Element, const DIM_BLOCKS: usize, const FRAGMENTS: usize, const CAPPED: bool, H: Helpers>(
    consumer: &mut Consumer<DIM_BLOCKS, FRAGMENTS, PAIR, H>,
) where
    [Fragment; FRAGMENTS]: Accumulator<W>,
    [Fragment; DIM_BLOCKS]: Accumulator<W>,
{
    let (mut step, before) = consumer.next_tile();
    let queries = consumer.take_wide_queries::<E>();
    consumer.skip(before);
    let mut state = consumer.first_step::<W, CAPPED>(&step, queries);
    loop {
        while !step.is_last() {
            step.column += Consumer::<DIM_BLOCKS, FRAGMENTS, PAIR, H>::STEP;
            consumer.further_step::<W, CAPPED>(&step, &mut state);
        }
        let (done, values) = (step, state.values);
        let follows = done.behind == 0 && consumer.has_tile_that_follows();
        let factors = if follows {
            (step, _) = consumer.next_tile();
            state.queries = consumer.take_wide_queries::<E>();
            consumer.first_step_of_next::<W, CAPPED>(&step, done.slot, &mut state)
        } else {
            consumer.last_output::<W>(&mut state);
            consumer.finish(done.slot, state.softmax.finish())
        };
        if !follows || !Consumer::<DIM_BLOCKS, FRAGMENTS, PAIR, H>::V_IS_LATE {
            consumer.v.release_stage(values, consumer.lane());
        }
        state.is_first = true;
        scale_rows(&mut state.output, &[factors]);
        consumer.store::<E>(done.slot, &state.output);
        if !follows {
            break;
        }
    }
    consumer.skip(step.behind);
}

impl<const DIM_BLOCKS: usize, const FRAGMENTS: usize, H: Helpers> Consumer<'_, DIM_BLOCKS, FRAGMENTS, PAIR, H> {
    /// Whether V of a step comes so late that it is waited for only when its product is to be started, and is let go as soon as
    /// that has ended: where there is room for two of them.
    const V_IS_LATE: bool = Shared::<DIM_BLOCKS, FRAGMENTS, PAIR, H>::V_STAGES == 2;

    /// Whether tiles can follow each other: where O takes so many registers that those for the step from one to the next are not
    /// there, they cannot.
    const FOLLOW: bool = DIM_BLOCKS <= 16;

    /// Whether a wide tile comes next that these rows see from its first step on.
    #[inline(always)]
    unsafe fn has_tile_that_follows(&self) -> bool {
        Self::FOLLOW
            && self.next_kind() == Some(TileKind::Wide)
            && self.shared.seen_steps(self.tasks.stage(), self.index()).before == 0
    }

    /// Takes the warp's rows of the tile's Q, as products take them.
    #[inline(always)]
    unsafe fn take_wide_queries<E: Element>(&mut self) -> Queries<DIM_BLOCKS> {
        let queries = self.take_queries(self.first_row());
        if H::CONVERT && !E::IS_OF_F16 {
            self.scale_queries(self.first_row());
        }
        queries
    }

    /// The scores of a first step, and what comes of them, with no output of a step before to go along with.
    #[inline(always)]
    unsafe fn first_step<W: Element, const CAPPED: bool>(
        &mut self,
        step: &Step,
        queries: Queries<DIM_BLOCKS>,
    ) -> State<DIM_BLOCKS, FRAGMENTS>
    where
        [Fragment; FRAGMENTS]: Accumulator<W>,
    {
        let mut softmax = LazySoftmax::NOTHING;
        let mut scores = [[0f32; 4]; FRAGMENTS];
        self.k.wait_full();
        self.take_turn();
        scores.hold();
        self.start_scores::<W>(&queries, &mut scores);
        self.pass_turn();
        let about = self.about_scores::<CAPPED>(step);
        wgmma::wait_group::<0>();
        self.take_scores::<W, CAPPED>(step, &about, &mut scores);
        let scale_log2 = about.logits.scale_log2;
        softmax.find_origins(scale_log2, &scores);
        softmax.take_in(scale_log2, &mut scores);
        let weights = weights_of::<W, FRAGMENTS>(&scores);
        let values = if Self::V_IS_LATE { self.v.take_early() } else { self.v.take_full() };
        State { queries, softmax, weights, values, output: [[[0f32; 4]; DIM_BLOCKS]], is_first: true, next_k_is_full: false }
    }

    /// A step of the same tile as the step before, whose output is made meanwhile.
    #[inline(always)]
    unsafe fn further_step<W: Element, const CAPPED: bool>(&mut self, step: &Step, state: &mut State<DIM_BLOCKS, FRAGMENTS>)
    where
        [Fragment; FRAGMENTS]: Accumulator<W>,
        [Fragment; DIM_BLOCKS]: Accumulator<W>,
    {
        let mut scores = [[0f32; 4]; FRAGMENTS];
        self.start_step::<W>(state, &mut scores);
        let about = self.about_scores::<CAPPED>(step);
        wgmma::wait_group::<1>();
        self.take_scores::<W, CAPPED>(step, &about, &mut scores);
        let scale_log2 = about.logits.scale_log2;
        let factors = state.softmax.make_room(scale_log2, &scores);
        let values = state.values;
        self.take_in_around_output::<W>(scale_log2, state, &mut scores);
        if !Self::V_IS_LATE {
            self.v.release_stage(values, self.lane());
        }
        state.is_first = false;
        if let Some(factors) = factors {
            scale_rows(&mut state.output, &[factors]);
        }
    }

    /// The first step of a tile that follows another, whose last output is made meanwhile. Returns what that output is to be
    /// multiplied with at the end.
    #[inline(always)]
    unsafe fn first_step_of_next<W: Element, const CAPPED: bool>(
        &mut self,
        step: &Step,
        done_slot: u32,
        state: &mut State<DIM_BLOCKS, FRAGMENTS>,
    ) -> [f32; ROWS_PER_LANE]
    where
        [Fragment; FRAGMENTS]: Accumulator<W>,
        [Fragment; DIM_BLOCKS]: Accumulator<W>,
    {
        let mut scores = [[0f32; 4]; FRAGMENTS];
        self.start_step::<W>(state, &mut scores);
        let about = self.about_scores::<CAPPED>(step);
        let factors = self.finish(done_slot, state.softmax.finish());
        state.softmax = LazySoftmax::NOTHING;
        wgmma::wait_group::<1>();
        self.take_scores::<W, CAPPED>(step, &about, &mut scores);
        let scale_log2 = about.logits.scale_log2;
        state.softmax.find_origins(scale_log2, &scores);
        self.take_in_around_output::<W>(scale_log2, state, &mut scores);
        factors
    }

    /// Starts the scores of a step, and the output of the step before.
    #[inline(always)]
    unsafe fn start_step<W>(&mut self, state: &mut State<DIM_BLOCKS, FRAGMENTS>, scores: &mut [Fragment; FRAGMENTS])
    where
        [Fragment; FRAGMENTS]: Accumulator<W>,
        [Fragment; DIM_BLOCKS]: Accumulator<W>,
    {
        if !state.next_k_is_full {
            self.k.wait_full();
        }
        self.take_turn();
        state.output[0].hold();
        hold_words(&mut state.weights);
        Self::hold(&mut state.queries);
        scores.hold();
        self.start_scores::<W>(&state.queries, scores);
        self.wait_for_late_v(state.values);
        self.start_output::<W, _>(&mut state.output[0], state.is_first, &state.weights, state.values);
        self.pass_turn();
    }

    /// Waits for V of a step whose product is to be started, where that was not done before.
    #[inline(always)]
    unsafe fn wait_for_late_v(&self, values: u32) {
        if Self::V_IS_LATE {
            self.v.wait_taken(values, 0);
        }
    }

    /// Turns scores into weights, the first half of them while the output of the step before is still being made.
    #[inline(always)]
    unsafe fn take_in_around_output<W: Element>(
        &mut self,
        scale_log2: OfRows,
        state: &mut State<DIM_BLOCKS, FRAGMENTS>,
        scores: &mut [Fragment; FRAGMENTS],
    ) where
        [Fragment; FRAGMENTS]: Accumulator<W>,
        [Fragment; DIM_BLOCKS]: Accumulator<W>,
    {
        state.softmax.take_in(scale_log2, &mut scores[..FRAGMENTS / 2]);
        let zero = state.softmax.zero_after();
        let values_before = state.values;
        if Self::V_IS_LATE {
            self.v.wait_taken(values_before, zero);
            state.values = self.v.take_early();
        } else {
            state.values = self.v.take_full_after(zero);
        }
        wgmma::wait_group::<0>();
        state.output[0].hold();
        hold_words(&mut state.weights);
        scores.hold();
        if Self::V_IS_LATE {
            self.v.release_stage(values_before, self.lane());
        }
        control::fence_arithmetic(state.values, self.v.stages());
        state.next_k_is_full = self.k.is_full();
        state.softmax.take_in(scale_log2, &mut scores[FRAGMENTS / 2..]);
        state.weights = weights_of::<W, FRAGMENTS>(scores);
    }

    /// The output of the last step, with no further scores to go along with.
    #[inline(always)]
    unsafe fn last_output<W>(&mut self, state: &mut State<DIM_BLOCKS, FRAGMENTS>)
    where
        [Fragment; DIM_BLOCKS]: Accumulator<W>,
    {
        self.wait_for_late_v(state.values);
        state.output[0].hold();
        hold_words(&mut state.weights);
        self.start_output::<W, _>(&mut state.output[0], state.is_first, &state.weights, state.values);
        wgmma::wait_group::<0>();
        state.output[0].hold();
    }
}
