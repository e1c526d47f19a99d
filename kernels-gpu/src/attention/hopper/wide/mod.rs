//! The consumers of wide tiles: each takes 64 rows of every tile, a step of columns at a time.
//!
//! What they do with the scores of a step, and when, is another for two consumers, which have [registers](pair) for the scores of
//! two steps, and for [three](trio).

pub mod pair;
pub mod trio;

use super::consumer::{Consumer, Queries};
use super::helpers::Helpers;
use super::shared::{ColumnTile, STAGED_BLOCKS, SeenSteps, Shared};
use super::softmax::LogitsOfRows;
use super::{barrier, epilogue};
use crate::attention::store;
use crate::element::Element;
use crate::ptx::math::opaque;
use crate::ptx::mma::Fragment;
use crate::ptx::warpgroup;
use crate::ptx::wgmma::{self, Accumulator, Descriptor};
use crate::shared_tile::PANEL_BLOCKS;
use crate::softmax::{ROWS_PER_LANE, RowSum, element_of_lane, mask};

/// Exponentials of a step in the element type, two words a fragment of scores: one for each row that the lane holds a part of.
/// Those of two neighbouring fragments are an operand A.
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

/// What is known of the scores of a step before they are there.
struct AboutScores {
    /// Whether every row sees all columns.
    sees_all: bool,
    /// What becomes of them.
    logits: LogitsOfRows,
}

impl Step {
    #[inline(always)]
    fn is_last(&self) -> bool {
        self.column == self.last
    }
}

impl<const DIM_BLOCKS: usize, const FRAGMENTS: usize, const ROW_BLOCKS: usize, H: Helpers>
    Consumer<'_, DIM_BLOCKS, FRAGMENTS, ROW_BLOCKS, H>
{
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

    /// Starts `output += P V`, or `output = P V` where the step is the first of its tile, for a step whose V has arrived. Where
    /// `output` has eight more columns than V, these get the sums of P.
    #[inline(always)]
    unsafe fn start_output<E, const OUTPUT_BLOCKS: usize>(
        &self,
        output: &mut [Fragment; OUTPUT_BLOCKS],
        is_first: bool,
        weights: &Weights<FRAGMENTS>,
        values: u32,
    ) where
        [Fragment; OUTPUT_BLOCKS]: Accumulator<E>,
    {
        let has_sums = const { OUTPUT_BLOCKS > DIM_BLOCKS };
        const { assert!(OUTPUT_BLOCKS == DIM_BLOCKS || Shared::<DIM_BLOCKS, FRAGMENTS, ROW_BLOCKS, H>::HAS_ONES) };
        let eight_rows_bytes = ColumnTile::<DIM_BLOCKS, FRAGMENTS>::EIGHT_ROWS_BYTES;
        let first = opaque(self.shared.v(0).row(0, 0));
        // Where there is a column past the 64th, it is one of V's second half, or the ones, the same for every product.
        let half_bytes =
            if has_sums { opaque(self.shared.ones()) - first } else { ColumnTile::<DIM_BLOCKS, FRAGMENTS>::PANEL_BYTES };
        let skip = |v: Descriptor, bytes| if has_sums { v.skip_in_first_half(bytes) } else { v.skip(bytes) };
        let v = Descriptor::across_sum(first, half_bytes, eight_rows_bytes);
        let v = skip(v, values * ColumnTile::<DIM_BLOCKS, FRAGMENTS>::BYTES);
        wgmma::fence();
        for j in 0..FRAGMENTS / 2 {
            let ([a, b], [c, d]) = (weights[2 * j], weights[2 * j + 1]);
            output.add_product_across([a, b, c, d], skip(v, 2 * j as u32 * eight_rows_bytes), j > 0 || !is_first);
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

    /// Looks up what there is to know of the scores of a step, while they are made.
    #[inline(always)]
    unsafe fn about_scores<const CAPPED: bool>(&self, step: &Step) -> AboutScores {
        AboutScores { sees_all: self.sees_all(step), logits: self.logits_of_rows::<CAPPED>(step.slot) }
    }

    /// What comes first when the scores of a step are there: their K is let go, and with the last of a tile its Q.
    #[inline(always)]
    unsafe fn take_scores<E, const CAPPED: bool>(&mut self, step: &Step, about: &AboutScores, scores: &mut [Fragment; FRAGMENTS])
    where
        [Fragment; FRAGMENTS]: Accumulator<E>,
    {
        scores.hold();
        self.k.release(self.lane());
        if step.is_last() {
            self.release_queries();
        }
        self.cap::<CAPPED, FRAGMENTS>(about.logits.soft_cap_log2, scores);
        self.mask(about.sees_all, step, scores);
    }

    /// What the rows of a tile's output are to be multiplied with at the end; stores their log-sum-exp.
    #[inline(always)]
    unsafe fn finish(&self, slot: u32, sums: [RowSum; ROWS_PER_LANE]) -> [f32; ROWS_PER_LANE] {
        let task = self.shared.task(self.params, slot);
        let rows = task.rows.of_lane::<1>(self.first_row(), self.lane());
        let [inverse] = store::finish(&task, self.lane(), self.first_row(), &rows, [sums]);
        let [_, v_scale] = self.shared.scales(slot);
        inverse.map(|inverse| inverse * v_scale)
    }

    /// Stores the output of a tile; its slot may then be used again.
    #[inline(always)]
    unsafe fn store<E: Element>(&mut self, slot: u32, output: &[[Fragment; DIM_BLOCKS]; 1]) {
        let (task, lane, first_row) = (self.shared.task(self.params, slot), self.lane(), self.first_row());
        if task.is_direct() {
            if H::READ {
                let staging = self.shared.staging::<STAGED_BLOCKS>(opaque(self.warp));
                epilogue::direct::<E, DIM_BLOCKS, STAGED_BLOCKS>(&task, lane, first_row, staging, &output[0]);
            } else {
                let staging = self.shared.staging::<PANEL_BLOCKS>(opaque(self.warp));
                epilogue::direct::<E, DIM_BLOCKS, PANEL_BLOCKS>(&task, lane, first_row, staging, &output[0]);
            }
            self.note_end(task.index);
        } else {
            let rows = task.rows.of_lane::<1>(first_row, lane);
            store::partial(&task, lane, first_row, &rows, output, element_of_lane);
            self.note_end(task.index);
        }
        self.tasks.release_stage_by_lanes(slot);
    }

    /// Lets `steps` steps go by unused. Nothing that has come before may be left to do: other consumers may need it out of the
    /// way.
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

    /// Waits for this warpgroup's turn to start products. The warpgroups take turns step by step, so that one has the tensor
    /// cores while others do their softmax; all have a turn for every step of every tile.
    #[inline(always)]
    unsafe fn take_turn(&self) {
        warpgroup::sync(barrier::TURN + self.index(), 2 * warpgroup::THREADS);
    }

    /// Ends this warpgroup's turn.
    #[inline(always)]
    unsafe fn pass_turn(&self) {
        let next = if self.is_last_consumer() { 0 } else { self.index() + 1 };
        warpgroup::arrive(barrier::TURN + next, 2 * warpgroup::THREADS);
    }

    #[inline(always)]
    fn is_last_consumer(&self) -> bool {
        self.index() + 1 == Shared::<DIM_BLOCKS, FRAGMENTS, ROW_BLOCKS, H>::CONSUMERS
    }

    /// Gives consumer 0 the first turn.
    ///
    /// # Safety
    ///
    /// Reached by all threads of the consumers, before the first tile.
    #[inline(always)]
    pub unsafe fn begin_turns(&self) {
        if self.is_last_consumer() {
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

/// Exponentials of a step in the element type.
#[inline(always)]
fn weights_of<E: Element, const FRAGMENTS: usize>(exponentials: &[Fragment; FRAGMENTS]) -> Weights<FRAGMENTS> {
    exponentials.map(|fragment| [E::pack(fragment[0], fragment[1]), E::pack(fragment[2], fragment[3])])
}
