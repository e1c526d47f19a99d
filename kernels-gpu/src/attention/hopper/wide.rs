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
use super::shared::ColumnTile;
use super::{CONSUMER_THREADS, barrier, epilogue, merge};
use crate::element::Element;
use crate::ptx::mma::Fragment;
use crate::ptx::wgmma::{self, Accumulator, Descriptor, hold_words};
use crate::ptx::{warp, warpgroup};
use crate::shared_tile::PANEL_BLOCKS;
use crate::softmax::{OnlineSoftmax, mask, scale_rows};

/// Rows that a warp merges at once: it may have 16 of them.
const MERGED_ROWS_AT_ONCE: usize = 4;
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
    /// Every row sees the columns from here …
    all_begin: u32,
    /// … to before here.
    all_end: u32,
}

impl Step {
    #[inline(always)]
    fn is_last(&self) -> bool {
        self.column == self.last
    }
}

impl<const DIM_BLOCKS: usize, const FRAGMENTS: usize> Consumer<'_, DIM_BLOCKS, FRAGMENTS> {
    /// Whether a wide tile comes next that these rows see from its first step on, and whose Q can arrive before that of this one is let go.
    #[inline(always)]
    unsafe fn has_tile_that_follows(&self) -> bool {
        Self::HOLDS_QUERIES && self.next_kind() == Some(TileKind::Wide) && {
            let slot = self.tasks.stage();
            self.shared.view(slot, self.index()).steps(self.shared.columns(slot).start, Self::STEP).0 == 0
        }
    }

    /// The first step of the next tile, which is left; its Q has arrived.
    #[inline(always)]
    unsafe fn next_tile(&mut self) -> Step {
        let slot = self.tasks.stage();
        self.note_begin();
        let range = self.shared.columns(slot);
        let view = self.shared.view(slot, self.index());
        let (first, end) = view.steps(range.start, Self::STEP);
        let (all_begin, all_end) = view.all();
        self.tasks.advance();
        Step { slot, column: range.start + first * Self::STEP, last: range.start + (end - 1) * Self::STEP, all_begin, all_end }
    }

    /// Steps of the step's tile that come before it, the first that these rows see.
    #[inline(always)]
    unsafe fn steps_before(&self, step: &Step) -> u32 {
        (step.column - self.shared.columns(step.slot).start) / Self::STEP
    }

    /// Steps of the step's tile that come behind it, the last that these rows see.
    #[inline(always)]
    unsafe fn steps_behind(&self, step: &Step) -> u32 {
        (self.shared.columns(step.slot).end - step.column).div_ceil(Self::STEP) - 1
    }

    /// Starts the scores of the next step of K.
    #[inline(always)]
    unsafe fn start_scores<E>(&mut self, queries: &Queries<DIM_BLOCKS>, scores: &mut [Fragment; FRAGMENTS])
    where
        [Fragment; FRAGMENTS]: Accumulator<E>,
    {
        let k =
            Descriptor::along_sum(self.shared.k(self.k.stage()).row(0, 0), ColumnTile::<DIM_BLOCKS, FRAGMENTS>::EIGHT_ROWS_BYTES);
        wgmma::fence();
        for block in (0..DIM_BLOCKS).step_by(2) {
            let (panel, byte) = ((block / PANEL_BLOCKS) as u32, (block % PANEL_BLOCKS * 16) as u32);
            let k = k.skip(panel * ColumnTile::<DIM_BLOCKS, FRAGMENTS>::PANEL_BYTES + byte);
            self.add_scores::<E>(queries, scores, block, k);
        }
        wgmma::commit_group();
    }

    /// Starts `output += P V` for a step whose V has arrived.
    #[inline(always)]
    unsafe fn start_output<E>(&mut self, output: &mut [Fragment; DIM_BLOCKS], weights: &Weights<FRAGMENTS>, values: u32)
    where
        [Fragment; DIM_BLOCKS]: Accumulator<E>,
    {
        let eight_rows_bytes = ColumnTile::<DIM_BLOCKS, FRAGMENTS>::EIGHT_ROWS_BYTES;
        let half_bytes = ColumnTile::<DIM_BLOCKS, FRAGMENTS>::PANEL_BYTES;
        let v = Descriptor::across_sum(self.shared.v(values).row(0, 0), half_bytes, eight_rows_bytes);
        wgmma::fence();
        for j in 0..FRAGMENTS / 2 {
            let ([a, b], [c, d]) = (weights[2 * j], weights[2 * j + 1]);
            output.add_product([a, b, c, d], v.skip(2 * j as u32 * eight_rows_bytes));
        }
        wgmma::commit_group();
    }

    /// Masks the scores of a step, where some row does not see all of its columns.
    #[inline(always)]
    unsafe fn mask(&self, step: &Step, scores: &mut [Fragment; FRAGMENTS]) {
        if step.column < step.all_begin || step.column + Self::STEP > step.all_end {
            let [rows] = self.shared.rows(step.slot).of_lane::<1>(self.first_row(), self.lane());
            mask(scores, &rows, step.column, self.lane());
        }
    }

    /// Stores the output of a tile; its slot may then be used again.
    #[inline(always)]
    unsafe fn store<E: Element>(&mut self, slot: u32, softmax: &OnlineSoftmax<1>, output: &mut [[Fragment; DIM_BLOCKS]; 1]) {
        let task = self.shared.task(self.params, slot);
        epilogue::store::<E, DIM_BLOCKS>(&task, self.lane(), self.first_row(), softmax, output);
        self.note_end(task.index);
        warp::sync();
        if !task.is_direct() {
            let row = self.first_row() + self.lane() % WARP_ROWS;
            merge::finish_rows::<E, DIM_BLOCKS, MERGED_ROWS_AT_ONCE, PARTIALS_AHEAD>(
                &task,
                self.lane(),
                row,
                self.lane() < WARP_ROWS,
            );
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

/// Walks through steps that follow each other without a gap, from the first of the next tile, which is wide, to the last of this or another.
///
/// # Safety
///
/// Reached by all threads of the consumers.
#[inline(always)]
pub unsafe fn walk<E: Element, const DIM_BLOCKS: usize, const FRAGMENTS: usize, const CAPPED: bool>(
    consumer: &mut Consumer<DIM_BLOCKS, FRAGMENTS>,
) where
    [Fragment; FRAGMENTS]: Accumulator<E>,
    [Fragment; DIM_BLOCKS]: Accumulator<E>,
{
    let mut step = consumer.next_tile();
    let mut queries = consumer.take_queries(consumer.first_row());
    let nothing = OnlineSoftmax::<1>::new(consumer.params.scale_log2);
    let mut softmax = nothing;
    let mut output = [[[0f32; 4]; DIM_BLOCKS]];
    consumer.skip(consumer.steps_before(&step));

    let mut scores = [[[0f32; 4]; FRAGMENTS]];
    consumer.k.wait_full();
    consumer.take_turn();
    scores[0].hold();
    consumer.start_scores::<E>(&queries, &mut scores[0]);
    consumer.pass_turn();
    wgmma::wait_group::<0>();
    scores[0].hold();
    consumer.k.release(consumer.lane());
    consumer.cap::<CAPPED, FRAGMENTS>(&mut scores[0]);
    consumer.mask(&step, &mut scores[0]);
    softmax.update(&mut scores);
    let mut weights = weights_of::<E, FRAGMENTS>(&scores[0]);
    let mut values = consumer.v.take_full();

    loop {
        // The step's scores have become weights; its output is not started yet.
        let done = step;
        if done.is_last() {
            if consumer.steps_behind(&done) > 0 || !consumer.has_tile_that_follows() {
                break;
            }
            step = consumer.next_tile();
            queries = consumer.take_queries(consumer.first_row());
        } else {
            step.column += Consumer::<DIM_BLOCKS, FRAGMENTS>::STEP;
        }

        let mut scores = [[[0f32; 4]; FRAGMENTS]];
        consumer.k.wait_full();
        consumer.take_turn();
        output[0].hold();
        hold_words(&mut weights);
        Consumer::<DIM_BLOCKS, FRAGMENTS>::hold(&mut queries);
        scores[0].hold();
        consumer.start_scores::<E>(&queries, &mut scores[0]);
        consumer.start_output::<E>(&mut output[0], &weights, values);
        consumer.pass_turn();
        wgmma::wait_group::<1>();
        scores[0].hold();
        consumer.k.release(consumer.lane());
        consumer.cap::<CAPPED, FRAGMENTS>(&mut scores[0]);
        consumer.mask(&step, &mut scores[0]);
        let before = softmax;
        if done.is_last() {
            softmax = nothing;
        }
        let factors = softmax.update(&mut scores);
        softmax.settle();
        let next_values = consumer.v.take_full();
        wgmma::wait_group::<0>();
        output[0].hold();
        scores[0].hold();
        consumer.v.release_stage(values, consumer.lane());
        values = next_values;
        weights = weights_of::<E, FRAGMENTS>(&scores[0]);
        if done.is_last() {
            consumer.store::<E>(done.slot, &before, &mut output);
            output = [[[0f32; 4]; DIM_BLOCKS]];
        } else {
            scale_rows(&mut output, &factors);
        }
    }

    consumer.release_queries();
    output[0].hold();
    hold_words(&mut weights);
    consumer.start_output::<E>(&mut output[0], &weights, values);
    wgmma::wait_group::<0>();
    output[0].hold();
    consumer.v.release_stage(values, consumer.lane());
    let behind = consumer.steps_behind(&step);
    consumer.store::<E>(step.slot, &softmax, &mut output);
    consumer.skip(behind);
}

/// The exponentials of a step in the element type.
#[inline(always)]
fn weights_of<E: Element, const FRAGMENTS: usize>(exponentials: &[Fragment; FRAGMENTS]) -> Weights<FRAGMENTS> {
    let mut weights = [[0u32; 2]; FRAGMENTS];
    for (words, fragment) in weights.iter_mut().zip(exponentials) {
        *words = [E::pack(fragment[0], fragment[1]), E::pack(fragment[2], fragment[3])];
    }
    weights
}
