//! What both ways of consuming a tile have in common: a warp's place, its side of the rings, and Q.

use packinfer_abi::{AttentionParams, MOST_MERGING_WARPS, TileKind};

use super::helpers::Helpers;
use super::shared::{QueryTile, Ring, Shared};
use super::softmax::{LogitsOfRows, OfRows};
use super::{CONSUMER_THREADS, PAIR, barrier, merge};
use crate::attention::task::Stamper;
use crate::element::Element;
use crate::ptx::math::opaque;
use crate::ptx::mma::{Fragment, OperandA};
use crate::ptx::special::{block_index, thread_index};
use crate::ptx::wgmma::{Accumulator, Descriptor, hold_words};
use crate::ptx::{control, warp, warpgroup};
use crate::shared_tile::{PANEL_BLOCKS, PANEL_ROW_BYTES, SharedTile};
use crate::softmax::{Logits, ROWS_PER_LANE, soft_cap_rows};

/// Rows of a warp.
pub const WARP_ROWS: u32 = 16;
/// Rows of a wide tile that one consumer has.
pub const CONSUMER_ROWS: u32 = WARPS * WARP_ROWS;

/// Blocks of 8 columns whose scores three consumers cap at once.
const CAPPED_AT_ONCE: usize = 4;

/// Warps of a consumer, and of the producer before them.
pub const WARPS: u32 = warpgroup::THREADS / warp::LANES;

/// Sixteen rows of Q, two words for every eight elements: one for each row that the lane holds a part of.
pub type Queries<const DIM_BLOCKS: usize> = [[u32; 2]; DIM_BLOCKS];

/// Sixteen elements of Q that is held in registers, from `8 * block` on.
#[inline(always)]
pub fn operand_of<const DIM_BLOCKS: usize>(queries: &Queries<DIM_BLOCKS>, block: usize) -> OperandA {
    let ([a, b], [c, d]) = (queries[block], queries[block + 1]);
    [a, b, c, d]
}

/// A consuming warp's place and its side of the rings.
pub struct Consumer<'a, const DIM_BLOCKS: usize, const FRAGMENTS: usize, const ROW_BLOCKS: usize, H: Helpers> {
    pub params: &'a AttentionParams,
    pub shared: Shared<DIM_BLOCKS, FRAGMENTS, ROW_BLOCKS, H>,
    pub tasks: Ring,
    pub queries: Ring,
    pub k: Ring,
    pub v: Ring,
    /// K and V of narrow tiles, where they are taken as they are stored.
    pub stored: [Ring; 2],
    /// The warp, counted over all consumers. It is the same for all lanes, and the assembler knows: what is worked out from it
    /// takes no register of a lane.
    pub warp: u32,
    /// What products with the rows of Q that the lane holds scores of must be multiplied with, where it is
    /// [scaled](super::scaled).
    pub query_factors: OfRows,
}

impl<'a, const DIM_BLOCKS: usize, const FRAGMENTS: usize, const ROW_BLOCKS: usize, H: Helpers>
    Consumer<'a, DIM_BLOCKS, FRAGMENTS, ROW_BLOCKS, H>
{
    /// Whether Q is held in registers. Where O, helpers or a third consumer leave no room for it there, products take it from
    /// shared memory, and it is let go only when the tile's last scores are there.
    pub const HOLDS_QUERIES: bool =
        Shared::<DIM_BLOCKS, FRAGMENTS, ROW_BLOCKS, H>::HAS_EXCHANGE && !H::CONVERT && DIM_BLOCKS <= 16;

    /// Columns of a step.
    pub const STEP: u32 = Shared::<DIM_BLOCKS, FRAGMENTS, ROW_BLOCKS, H>::STEP;

    /// A warp that has consumed nothing yet.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp.
    #[inline(always)]
    pub unsafe fn new(params: &'a AttentionParams, shared: Shared<DIM_BLOCKS, FRAGMENTS, ROW_BLOCKS, H>) -> Self {
        let warp = warp::uniform(thread_index() / warp::LANES) - WARPS;
        Self {
            params,
            shared,
            tasks: shared.task_ring(),
            queries: shared.query_ring(),
            k: shared.k_ring(),
            v: shared.v_ring(),
            stored: shared.narrow_rings(),
            warp,
            query_factors: [1.0; ROWS_PER_LANE],
        }
    }

    /// The thread, counted over all consumers.
    #[inline(always)]
    pub fn thread(&self) -> u32 {
        thread_index() - warpgroup::THREADS
    }

    #[inline(always)]
    pub fn lane(&self) -> u32 {
        thread_index() % warp::LANES
    }

    /// The consumer that the warp is of.
    #[inline(always)]
    pub fn index(&self) -> u32 {
        opaque(self.warp) / WARPS
    }

    /// First row of the warp in a wide tile.
    #[inline(always)]
    pub fn first_row(&self) -> u32 {
        opaque(self.warp) * WARP_ROWS
    }

    /// The kind of the next tile, if one is left.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp.
    #[inline(always)]
    pub unsafe fn next_kind(&self) -> Option<TileKind> {
        self.tasks.wait_full();
        self.shared.tile_kind(self.tasks.stage())
    }

    /// Notes that a task is begun.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp.
    #[inline(always)]
    pub unsafe fn note_begin(&self, task: u32) {
        if let Some(stamper) = self.stamper() {
            stamper.begin(task);
        }
    }

    /// Notes that a task has ended.
    ///
    /// # Safety
    ///
    /// As [`Self::note_begin`].
    #[inline(always)]
    pub unsafe fn note_end(&self, task: u32) {
        if let Some(stamper) = self.stamper() {
            stamper.end(task);
        }
    }

    /// Notes times, if the launch asks for it and this thread is the one that does.
    #[inline(always)]
    fn stamper(&self) -> Option<Stamper> {
        Stamper::of(self.params).filter(|_| self.warp == 0 && self.lane() == 0)
    }

    /// Takes sixteen rows of the tile's Q, from `first_row` on, into registers; or if these do not hold Q, waits until it is
    /// there.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp, once for each tile.
    #[inline(always)]
    pub unsafe fn take_queries(&mut self, first_row: u32) -> Queries<DIM_BLOCKS> {
        let mut queries = [[0u32; 2]; DIM_BLOCKS];
        self.queries.wait_full();
        if !Self::HOLDS_QUERIES {
            return queries;
        }
        for block in (0..DIM_BLOCKS).step_by(2) {
            let panel = self.shared.queries().panel(block / PANEL_BLOCKS).skip_rows(first_row);
            let [a, b, c, d] = SharedTile::<PANEL_BLOCKS>::operand_a(panel.rows_by_lane(self.lane()), 0, block % PANEL_BLOCKS);
            (queries[block], queries[block + 1]) = ([a, b], [c, d]);
        }
        self.queries.release_by_lanes();
        queries
    }

    /// Lets the tile's Q go, whose last scores are there, if it was not let go when it was taken.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp, once for each call of [`Self::take_queries`].
    #[inline(always)]
    pub unsafe fn release_queries(&mut self) {
        if !Self::HOLDS_QUERIES {
            self.queries.release_by_lanes();
        }
    }

    /// Makes the compiler believe that the registers of Q change here, if Q is in registers.
    #[inline(always)]
    pub fn hold(queries: &mut Queries<DIM_BLOCKS>) {
        if Self::HOLDS_QUERIES {
            hold_words(queries);
        }
    }

    /// Sixteen elements of the rows of a narrow tile, from `8 * block` on, between taking and releasing its Q.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp.
    #[inline(always)]
    pub unsafe fn operand_a(&self, queries: &Queries<DIM_BLOCKS>, block: usize) -> OperandA {
        if Self::HOLDS_QUERIES {
            return operand_of(queries, block);
        }
        let panel = self.shared.queries().panel(block / PANEL_BLOCKS);
        SharedTile::<PANEL_BLOCKS>::operand_a(panel.rows_by_lane(self.lane()), 0, block % PANEL_BLOCKS)
    }

    /// Starts `scores += Q Kᵀ` for a consumer's rows of a wide tile and 16 elements, from `8 * block` on, of which `k` is the K;
    /// `scores = Q Kᵀ` for the first of them.
    ///
    /// # Safety
    ///
    /// As [`Accumulator::add_product_along`], between taking and releasing the tile's Q.
    #[inline(always)]
    pub unsafe fn add_scores<E>(
        &self,
        queries: &Queries<DIM_BLOCKS>,
        scores: &mut [Fragment; FRAGMENTS],
        block: usize,
        k: Descriptor,
    ) where
        [Fragment; FRAGMENTS]: Accumulator<E>,
    {
        if Self::HOLDS_QUERIES {
            scores.add_product_along(operand_of(queries, block), k, block > 0);
            return;
        }
        let row = self.shared.queries().row(self.index() * CONSUMER_ROWS);
        let (panel, byte) = ((block / PANEL_BLOCKS) as u32, (block % PANEL_BLOCKS * 16) as u32);
        let q =
            Descriptor::along_sum(row, 8 * PANEL_ROW_BYTES).skip(panel * QueryTile::<DIM_BLOCKS, ROW_BLOCKS>::PANEL_BYTES + byte);
        scores.add_product_shared(q, k, block > 0);
    }

    /// What becomes of the scores of the task in slot `slot`, where products with K must be multiplied with `factor` and the
    /// scale of K.
    ///
    /// # Safety
    ///
    /// As [`Shared::task`]; where `CAPPED`, the launch has a soft-cap, otherwise not.
    #[inline(always)]
    pub unsafe fn logits<const CAPPED: bool>(&self, slot: u32, factor: f32) -> Logits {
        let [k_scale, _] = self.shared.scales(slot);
        let (scale_log2, inside) = (self.params.scale_log2, k_scale * factor);
        if CAPPED {
            return Logits { scale_log2, soft_cap_log2: self.params.soft_cap_log2 * inside };
        }
        Logits { scale_log2: scale_log2 * inside, soft_cap_log2: 0.0 }
    }

    /// The same for each of the lane's rows of a wide tile.
    ///
    /// # Safety
    ///
    /// As [`Self::logits`].
    #[inline(always)]
    pub unsafe fn logits_of_rows<const CAPPED: bool>(&self, slot: u32) -> LogitsOfRows {
        let Logits { scale_log2, soft_cap_log2 } = self.logits::<CAPPED>(slot, 1.0);
        let mut of_rows = LogitsOfRows { scale_log2: [scale_log2; ROWS_PER_LANE], soft_cap_log2: [soft_cap_log2; ROWS_PER_LANE] };
        if H::CONVERT {
            // Inside of the hyperbolic tangent, if there is one.
            let inside = if CAPPED { &mut of_rows.soft_cap_log2 } else { &mut of_rows.scale_log2 };
            *inside = self.query_factors.map(|factor| inside[0] * factor);
        }
        of_rows
    }

    /// Bounds scores, in a kernel for launches with a soft-cap: for each of the lane's rows, what [`Self::logits_of_rows`] says,
    /// or [`Self::logits`] of all.
    #[inline(always)]
    pub fn cap<const CAPPED: bool, const N: usize>(&self, soft_cap_log2: OfRows, scores: &mut [Fragment; N]) {
        if CAPPED {
            if ROW_BLOCKS == PAIR {
                soft_cap_rows(soft_cap_log2, scores);
                return;
            }
            // Else the assembler works on all of them at once, and has no registers for that.
            for (index, scores) in (0..).zip(scores.chunks_exact_mut(CAPPED_AT_ONCE)) {
                // SAFETY: it has so many.
                let scores = unsafe { scores.first_chunk_mut::<CAPPED_AT_ONCE>().unwrap_unchecked() };
                soft_cap_rows(soft_cap_log2, scores);
                control::fence_arithmetic(self.k.stage() + index, self.k.stages() + index);
            }
        }
    }

    /// Merges the warp's share of the rows of O that are merged.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp, when no task is [left](Self::next_kind).
    #[inline(always)]
    pub unsafe fn merge_rows<E: Element>(&self) {
        let warps = const { WARPS * Shared::<DIM_BLOCKS, FRAGMENTS, ROW_BLOCKS, H>::CONSUMERS };
        const { assert!(WARPS * Shared::<DIM_BLOCKS, FRAGMENTS, ROW_BLOCKS, H>::CONSUMERS <= MOST_MERGING_WARPS) };
        let share = self.shared.share(self.tasks.stage());
        let stamp = || self.params.num_items * self.params.heads.num_groups + block_index() * warps + self.warp;
        let stamper = || Stamper::of(self.params).filter(|_| self.params.num_merged_rows > 0 && self.lane() == 0);
        if let Some(stamper) = stamper() {
            stamper.begin(stamp());
        }
        merge::merge_rows::<E, DIM_BLOCKS>(self.params, share, self.warp, warps);
        if let Some(stamper) = stamper() {
            stamper.end(stamp());
        }
    }

    /// Waits until all consuming warps are here.
    ///
    /// # Safety
    ///
    /// Reached by all of them.
    #[inline(always)]
    pub unsafe fn meet(&self) {
        warpgroup::sync(barrier::CONSUMERS, CONSUMER_THREADS);
    }
}
