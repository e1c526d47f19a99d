//! The consumers of wide tiles: each takes 64 rows of every tile, a step of columns at a time.
//!
//! The scores of a step are started together with the output of the step before, which is still in flight while the softmax of the scores
//! runs: FlashAttention-3's schedule (Shah et al. 2024, section 3). The other consumer has the tensor cores meanwhile. Tiles follow each
//! other without a gap: the first scores of one are started together with the last output of the one before.
//!
//! ```text
//! tensor cores    S₀           S₁ P₀V₀             S₀′ P₁V₁                    S₁′ P₀′V₀′
//! other units         softmax₀         softmax₁            softmax₀′ · store O             softmax₁′
//! ```

use packinfer_abi::TileKind;

use super::consumer::{Consumer, Queries, WARP_ROWS};
use super::shared::{ColumnTile, STAGED_BLOCKS, SeenSteps, Shared};
use super::softmax::LazySoftmax;
use super::{CONSUMER_THREADS, barrier, epilogue, merge};
use crate::attention::store;
use crate::element::Element;
use crate::ptx::math::opaque;
use crate::ptx::mma::Fragment;
use crate::ptx::wgmma::{self, Accumulator, Descriptor, hold_words};
use crate::ptx::{control, warp, warpgroup};
use crate::shared_tile::PANEL_BLOCKS;
use crate::softmax::{ROWS_PER_LANE, element_of_lane, mask, scale_rows};

/// Rows that a warp merges at once: it may have 16 of them, but partials of four at once leave no registers for the next tile's Q and weights.
const MERGED_ROWS_AT_ONCE: usize = 2;
/// Partials of each that are loaded at once.
const PARTIALS_AHEAD: usize = 4;

/// Exponentials of a step in the element type, two words a fragment of scores: one for each row that the lane holds a part of. Those of two
/// neighbouring fragments are an operand A.
type Weights<const FRAGMENTS: usize> = [[u32; 2]; FRAGMENTS];

/// A step of a tile that some of the consumer's rows see.
#[derive(Clone, Copy)]
struct Step {
    /// The task's slot.
    slot: u32,
    /// First column of the step.
    column: u32,
    /// First column of the last step that these rows see.
    last: u32,
    /// Steps of the tile that come behind it.
    behind: u32,
}

impl Step {
    #[inline(always)]
    fn is_last(&self) -> bool {
        self.column == self.last
    }
}

impl<const DIM_BLOCKS: usize, const FRAGMENTS: usize, const BESIDE: bool> Consumer<'_, DIM_BLOCKS, FRAGMENTS, BESIDE> {
    /// Whether V of a step comes so late that it is waited for only when its product is to be started, and is let go as soon as that has ended: where there is room for
    /// two of them.
    const V_IS_LATE: bool = Shared::<DIM_BLOCKS, FRAGMENTS, BESIDE>::V_STAGES == 2;

    /// Whether tiles can follow each other: where O takes so many registers that those for the step from one to the next are not there, they cannot.
    const FOLLOW: bool = DIM_BLOCKS <= 16;

    /// Whether a wide tile comes next that these rows see from its first step on.
    #[inline(always)]
    unsafe fn has_tile_that_follows(&self) -> bool {
        Self::FOLLOW
            && self.next_kind() == Some(TileKind::Wide)
            && self.shared.seen_steps(self.tasks.stage(), self.index()).before == 0
    }

    /// The first step of the next tile, which is left, and how many steps of the tile come before it.
    #[inline(always)]
    unsafe fn next_tile(&mut self) -> (Step, u32) {
        let slot = self.tasks.stage();
        let SeenSteps { first, last, before, behind } = self.shared.seen_steps(slot, self.index());
        self.note_begin(self.shared.task_index(slot));
        self.tasks.advance();
        (Step { slot, column: first, last, behind }, before)
    }

    /// Starts the scores of the next step of K.
    #[inline(always)]
    unsafe fn start_scores<E>(&self, queries: &Queries<DIM_BLOCKS>, scores: &mut [Fragment; FRAGMENTS])
    where
        [Fragment; FRAGMENTS]: Accumulator<E>,
    {
        let k = Descriptor::along_sum(opaque(self.shared.k(0).row(0, 0)), ColumnTile::<DIM_BLOCKS, FRAGMENTS>::EIGHT_ROWS_BYTES)
            .skip(self.k.stage() * ColumnTile::<DIM_BLOCKS, FRAGMENTS>::BYTES);
        wgmma::fence();
        for block in (0..DIM_BLOCKS).step_by(2) {
            let (panel, byte) = ((block / PANEL_BLOCKS) as u32, (block % PANEL_BLOCKS * 16) as u32);
            let k = k.skip(panel * ColumnTile::<DIM_BLOCKS, FRAGMENTS>::PANEL_BYTES + byte);
            self.add_scores::<E>(queries, scores, block, k);
        }
        wgmma::commit_group();
    }

    /// Starts `output += P V`, or `output = P V` where the step is the first of its tile, for a step whose V has arrived.
    #[inline(always)]
    unsafe fn start_output<E>(
        &self,
        output: &mut [Fragment; DIM_BLOCKS],
        is_first: bool,
        weights: &Weights<FRAGMENTS>,
        values: u32,
    ) where
        [Fragment; DIM_BLOCKS]: Accumulator<E>,
    {
        let eight_rows_bytes = ColumnTile::<DIM_BLOCKS, FRAGMENTS>::EIGHT_ROWS_BYTES;
        let half_bytes = ColumnTile::<DIM_BLOCKS, FRAGMENTS>::PANEL_BYTES;
        let v = Descriptor::across_sum(opaque(self.shared.v(0).row(0, 0)), half_bytes, eight_rows_bytes)
            .skip(values * ColumnTile::<DIM_BLOCKS, FRAGMENTS>::BYTES);
        wgmma::fence();
        for j in 0..FRAGMENTS / 2 {
            let ([a, b], [c, d]) = (weights[2 * j], weights[2 * j + 1]);
            output.add_product_across([a, b, c, d], v.skip(2 * j as u32 * eight_rows_bytes), j > 0 || !is_first);
        }
        wgmma::commit_group();
    }

    /// Masks the scores of a step, if some row does not see all of its columns.
    #[inline(always)]
    unsafe fn mask(&self, sees_all: bool, step: &Step, scores: &mut [Fragment; FRAGMENTS]) {
        if !sees_all {
            let [rows] = self.shared.rows(step.slot).of_lane::<1>(self.first_row(), self.lane());
            mask(scores, &rows, step.column, self.lane());
        }
    }

    /// Whether every row sees all columns of a step.
    #[inline(always)]
    unsafe fn sees_all(&self, step: &Step) -> bool {
        self.shared.view(step.slot, self.index()).sees_all(step.column, Self::STEP)
    }

    /// What the rows of a tile's output are to be multiplied with at the end; stores their log-sum-exp.
    #[inline(always)]
    unsafe fn finish(&self, slot: u32, softmax: &LazySoftmax) -> [f32; ROWS_PER_LANE] {
        let task = self.shared.task(self.params, slot);
        let rows = task.rows.of_lane::<1>(self.first_row(), self.lane());
        let [inverse] = store::finish(&task, self.lane(), self.first_row(), &rows, [softmax.finish()]);
        inverse
    }

    /// Stores the output of a tile; its slot may then be used again.
    #[inline(always)]
    unsafe fn store<E: Element>(&mut self, slot: u32, output: &[[Fragment; DIM_BLOCKS]; 1]) {
        let (task, lane, first_row) = (self.shared.task(self.params, slot), self.lane(), self.first_row());
        if task.is_direct() {
            if BESIDE {
                let staging = self.shared.staging(opaque(self.warp));
                epilogue::direct::<E, DIM_BLOCKS, STAGED_BLOCKS>(&task, lane, first_row, staging, &output[0]);
            } else {
                let staging = self.shared.exchange().staging(opaque(self.warp));
                epilogue::direct::<E, DIM_BLOCKS, PANEL_BLOCKS>(&task, lane, first_row, staging, &output[0]);
            }
            self.note_end(task.index);
        } else {
            let rows = task.rows.of_lane::<1>(first_row, lane);
            store::partial(&task, lane, first_row, &rows, output, element_of_lane);
            self.note_end(task.index);
            warp::sync();
            let (row, counts) = (first_row + lane % WARP_ROWS, lane < WARP_ROWS);
            merge::finish_rows::<E, DIM_BLOCKS, MERGED_ROWS_AT_ONCE, PARTIALS_AHEAD>(&task, lane, row, counts);
        }
        self.tasks.release_stage_by_lanes(slot);
    }

    /// Lets `steps` steps go by unused. Nothing that has come before may be left to do: the other consumer may need it out of the way.
    #[inline(always)]
    unsafe fn skip(&mut self, steps: u32) {
        for _ in 0..steps {
            self.take_turn();
            self.pass_turn();
            self.k.wait_full();
            self.k.release(self.lane());
            self.v.wait_full();
            self.v.release(self.lane());
        }
    }

    /// Waits for this warpgroup's turn to start products. The warpgroups take turns step by step, so that one does its softmax
    /// while the other has the tensor cores; both have a turn for every step of every tile.
    #[inline(always)]
    unsafe fn take_turn(&self) {
        warpgroup::sync(barrier::TURN + self.index(), CONSUMER_THREADS);
    }

    /// Ends this warpgroup's turn.
    #[inline(always)]
    unsafe fn pass_turn(&self) {
        warpgroup::arrive(barrier::TURN + 1 - self.index(), CONSUMER_THREADS);
    }

    /// Gives consumer 0 the first turn.
    ///
    /// # Safety
    ///
    /// Reached by all threads of both consumers, before the first tile.
    #[inline(always)]
    pub unsafe fn begin_turns(&self) {
        if self.index() == 1 {
            self.pass_turn();
        }
    }

    /// Takes the last turn that was passed on.
    ///
    /// # Safety
    ///
    /// As [`Self::begin_turns`], after the last tile.
    #[inline(always)]
    pub unsafe fn end_turns(&self) {
        if self.index() == 0 {
            self.take_turn();
        }
    }
}

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

/// Goes through tiles that follow each other without a gap, from the next one on, which is wide.
///
/// # Safety
///
/// Reached by all threads of the consumers.
#[inline(always)]
pub unsafe fn tiles<E: Element, const DIM_BLOCKS: usize, const FRAGMENTS: usize, const CAPPED: bool, const BESIDE: bool>(
    consumer: &mut Consumer<DIM_BLOCKS, FRAGMENTS, BESIDE>,
) where
    [Fragment; FRAGMENTS]: Accumulator<E>,
    [Fragment; DIM_BLOCKS]: Accumulator<E>,
{
    let (mut step, before) = consumer.next_tile();
    let queries = consumer.take_queries(consumer.first_row());
    consumer.skip(before);
    let mut state = consumer.first_step::<E, CAPPED>(&step, queries);
    loop {
        while !step.is_last() {
            step.column += Consumer::<DIM_BLOCKS, FRAGMENTS, BESIDE>::STEP;
            consumer.further_step::<E, CAPPED>(&step, &mut state);
        }
        let (done, values) = (step, state.values);
        let follows = done.behind == 0 && consumer.has_tile_that_follows();
        let factors = if follows {
            (step, _) = consumer.next_tile();
            state.queries = consumer.take_queries(consumer.first_row());
            consumer.first_step_of_next::<E, CAPPED>(&step, done.slot, &mut state)
        } else {
            consumer.last_output::<E>(&mut state);
            consumer.finish(done.slot, &state.softmax)
        };
        if !follows || !Consumer::<DIM_BLOCKS, FRAGMENTS, BESIDE>::V_IS_LATE {
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

impl<const DIM_BLOCKS: usize, const FRAGMENTS: usize, const BESIDE: bool> Consumer<'_, DIM_BLOCKS, FRAGMENTS, BESIDE> {
    /// The scores of a first step, and what comes of them, with no output of a step before to go along with.
    #[inline(always)]
    unsafe fn first_step<E: Element, const CAPPED: bool>(
        &mut self,
        step: &Step,
        queries: Queries<DIM_BLOCKS>,
    ) -> State<DIM_BLOCKS, FRAGMENTS>
    where
        [Fragment; FRAGMENTS]: Accumulator<E>,
    {
        let mut softmax = LazySoftmax::NOTHING;
        let mut scores = [[0f32; 4]; FRAGMENTS];
        self.k.wait_full();
        self.take_turn();
        scores.hold();
        self.start_scores::<E>(&queries, &mut scores);
        self.pass_turn();
        let sees_all = self.sees_all(step);
        wgmma::wait_group::<0>();
        self.take_scores::<E, CAPPED>(step, sees_all, &mut scores);
        softmax.find_origins(self.params.scale_log2, &scores);
        softmax.take_in(self.params.scale_log2, &mut scores);
        let weights = weights_of::<E, FRAGMENTS>(&scores);
        let values = if Self::V_IS_LATE { self.v.take_early() } else { self.v.take_full() };
        State { queries, softmax, weights, values, output: [[[0f32; 4]; DIM_BLOCKS]], is_first: true, next_k_is_full: false }
    }

    /// What comes first when the scores of a step are there: their K is let go, and with the last of a tile its Q.
    #[inline(always)]
    unsafe fn take_scores<E, const CAPPED: bool>(&mut self, step: &Step, sees_all: bool, scores: &mut [Fragment; FRAGMENTS])
    where
        [Fragment; FRAGMENTS]: Accumulator<E>,
    {
        scores.hold();
        self.k.release(self.lane());
        if step.is_last() {
            self.release_queries();
        }
        self.cap::<CAPPED, FRAGMENTS>(scores);
        self.mask(sees_all, step, scores);
    }

    /// A step of the same tile as the step before, whose output is made meanwhile.
    #[inline(always)]
    unsafe fn further_step<E: Element, const CAPPED: bool>(&mut self, step: &Step, state: &mut State<DIM_BLOCKS, FRAGMENTS>)
    where
        [Fragment; FRAGMENTS]: Accumulator<E>,
        [Fragment; DIM_BLOCKS]: Accumulator<E>,
    {
        let mut scores = [[0f32; 4]; FRAGMENTS];
        self.start_step::<E>(state, &mut scores);
        let sees_all = self.sees_all(step);
        wgmma::wait_group::<1>();
        self.take_scores::<E, CAPPED>(step, sees_all, &mut scores);
        let factors = state.softmax.make_room(self.params.scale_log2, &scores);
        let values = state.values;
        self.take_in_around_output::<E>(state, &mut scores);
        if !Self::V_IS_LATE {
            self.v.release_stage(values, self.lane());
        }
        state.is_first = false;
        if let Some(factors) = factors {
            scale_rows(&mut state.output, &[factors]);
        }
    }

    /// The first step of a tile that follows another, whose last output is made meanwhile. Returns what that output is to be multiplied with at the end.
    #[inline(always)]
    unsafe fn first_step_of_next<E: Element, const CAPPED: bool>(
        &mut self,
        step: &Step,
        done_slot: u32,
        state: &mut State<DIM_BLOCKS, FRAGMENTS>,
    ) -> [f32; ROWS_PER_LANE]
    where
        [Fragment; FRAGMENTS]: Accumulator<E>,
        [Fragment; DIM_BLOCKS]: Accumulator<E>,
    {
        let mut scores = [[0f32; 4]; FRAGMENTS];
        self.start_step::<E>(state, &mut scores);
        let sees_all = self.sees_all(step);
        let factors = self.finish(done_slot, &state.softmax);
        state.softmax = LazySoftmax::NOTHING;
        wgmma::wait_group::<1>();
        self.take_scores::<E, CAPPED>(step, sees_all, &mut scores);
        state.softmax.find_origins(self.params.scale_log2, &scores);
        self.take_in_around_output::<E>(state, &mut scores);
        factors
    }

    /// Starts the scores of a step, and the output of the step before.
    #[inline(always)]
    unsafe fn start_step<E>(&mut self, state: &mut State<DIM_BLOCKS, FRAGMENTS>, scores: &mut [Fragment; FRAGMENTS])
    where
        [Fragment; FRAGMENTS]: Accumulator<E>,
        [Fragment; DIM_BLOCKS]: Accumulator<E>,
    {
        if !state.next_k_is_full {
            self.k.wait_full();
        }
        self.take_turn();
        state.output[0].hold();
        hold_words(&mut state.weights);
        Self::hold(&mut state.queries);
        scores.hold();
        self.start_scores::<E>(&state.queries, scores);
        self.wait_for_late_v(state.values);
        self.start_output::<E>(&mut state.output[0], state.is_first, &state.weights, state.values);
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
    unsafe fn take_in_around_output<E: Element>(
        &mut self,
        state: &mut State<DIM_BLOCKS, FRAGMENTS>,
        scores: &mut [Fragment; FRAGMENTS],
    ) where
        [Fragment; FRAGMENTS]: Accumulator<E>,
        [Fragment; DIM_BLOCKS]: Accumulator<E>,
    {
        let scale_log2 = self.params.scale_log2;
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
        state.weights = weights_of::<E, FRAGMENTS>(scores);
    }

    /// The output of the last step, with no further scores to go along with.
    #[inline(always)]
    unsafe fn last_output<E>(&mut self, state: &mut State<DIM_BLOCKS, FRAGMENTS>)
    where
        [Fragment; DIM_BLOCKS]: Accumulator<E>,
    {
        self.wait_for_late_v(state.values);
        state.output[0].hold();
        hold_words(&mut state.weights);
        self.start_output::<E>(&mut state.output[0], state.is_first, &state.weights, state.values);
        wgmma::wait_group::<0>();
        state.output[0].hold();
    }
}

/// Exponentials of a step in the element type.
#[inline(always)]
fn weights_of<E: Element, const FRAGMENTS: usize>(exponentials: &[Fragment; FRAGMENTS]) -> Weights<FRAGMENTS> {
    exponentials.map(|fragment| [E::pack(fragment[0], fragment[1]), E::pack(fragment[2], fragment[3])])
}
