//! The block's shared memory, and the barriers that guard its parts.

use core::marker::PhantomData;
use core::ops::Range;

use packinfer_abi::{
    AttentionParams, BESIDE_SHARED_BYTES, CONVERTING_SHARED_BYTES, HOPPER_ROW_TABLE_BYTES, HOPPER_SHARED_BYTES, NARROW_TILE_ROWS,
    Share, TALL_SHARED_BYTES, TALL_TILE_ROWS, TileKind, WorkItem, hopper_column_step,
};

use super::consumer::CONSUMER_ROWS;
use super::converter::CONVERTER_WARPS;
use super::exchange::Exchange;
use super::helpers::{Helpers, PART_BYTES, STORED_STEP_BLOCKS, Tensor};
use super::producer::{LOADER_WARPS, POSTING_WARPS};
use super::reader::ReaderMemory;
use crate::attention::task::Task;
use crate::element::Element;
use crate::ptx::memory::{load_shared, load_shared_f32x2, load_shared_x4, store_shared, store_shared_f32x2, store_shared_x4};
use crate::ptx::warp::LANES as WARP_LANES;
use crate::ptx::warpgroup::THREADS;
use crate::ptx::{mbarrier, wgmma};
use crate::rows::{RowTable, WarpView};
use crate::shared_tile::{BoxTile, PANEL_BLOCKS, PANEL_ROW_BYTES, PanelTile, SharedTile};

/// Blocks of 8 elements that a consuming warp stages of its rows of O at a time, where there is no exchange.
pub const STAGED_BLOCKS: usize = 2;

/// Chunks of 16 bytes of a row of K or V in FP8, of which a head dimension of 64 fills half.
pub const STORED_CHUNKS: usize = PANEL_BLOCKS;

/// Q of a task.
pub type QueryTile<const DIM_BLOCKS: usize, const ROW_BLOCKS: usize> = PanelTile<DIM_BLOCKS, ROW_BLOCKS>;
/// K or V of a step of `8 * FRAGMENTS` columns.
pub type ColumnTile<const DIM_BLOCKS: usize, const FRAGMENTS: usize> = BoxTile<DIM_BLOCKS, FRAGMENTS>;

/// A ring of parts of shared memory that one side fills and the other empties in turn. Each warp of either side counts for
/// itself.
#[derive(Clone, Copy)]
pub struct Ring {
    barriers: u32,
    /// Number of parts: a constant wherever this is inlined.
    stages: u32,
    /// The part whose turn it is.
    stage: u32,
    /// Parity of the phase of its full barrier.
    parity: u32,
    /// Parts that this side has gone past, one by one.
    passed: u32,
}

impl Ring {
    /// Bytes of the barriers of so many parts.
    const fn bytes(stages: u32) -> u32 {
        2 * stages * mbarrier::BYTES
    }

    #[inline(always)]
    fn at(barriers: u32, stages: u32) -> Self {
        Self { barriers, stages, stage: 0, parity: 0, passed: 0 }
    }

    /// Makes the barriers: so many arrivals fill a part, so many empty it.
    unsafe fn init(&self, fills: u32, empties: u32) {
        for stage in 0..self.stages {
            mbarrier::init(self.barriers + stage * mbarrier::BYTES, fills);
            mbarrier::init(self.barriers + (self.stages + stage) * mbarrier::BYTES, empties);
        }
    }

    /// Number of parts.
    #[inline(always)]
    pub fn stages(&self) -> u32 {
        self.stages
    }

    /// The part whose turn it is.
    #[inline(always)]
    pub fn stage(&self) -> u32 {
        self.stage
    }

    /// Parts that this side has [gone past](Self::advance).
    #[inline(always)]
    pub fn passed(&self) -> u32 {
        self.passed
    }

    /// The barrier that ends when the part is full.
    #[inline(always)]
    pub fn full(&self) -> u32 {
        self.barriers + self.stage * mbarrier::BYTES
    }

    #[inline(always)]
    fn empty(&self, stage: u32) -> u32 {
        self.barriers + (self.stages + stage) * mbarrier::BYTES
    }

    /// On to the next part.
    #[inline(always)]
    pub fn advance(&mut self) {
        self.passed += 1;
        let wraps = self.stage + 1 == self.stages;
        self.stage = if wraps { 0 } else { self.stage + 1 };
        self.parity ^= u32::from(wraps);
    }

    /// Past `parts` parts, which others of the same side see to.
    #[inline(always)]
    pub fn advance_by(&mut self, parts: u32) {
        let stage = self.stage + parts;
        self.parity ^= stage / self.stages & 1;
        self.stage = stage % self.stages;
    }

    /// Waits until the emptying side has done with all parts that have been filled, of which this is the next.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of a warp of the filling side, or of one that knows that all but the last of these times the parts
    /// were emptied: a parity does not tell one time from the one before the last.
    #[inline(always)]
    pub unsafe fn wait_all_empty(mut self) {
        for _ in 0..self.stages {
            self.wait_empty();
            self.advance();
        }
    }

    /// Filling side: waits until the other has done with the part.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of a warp of the filling side, once for each time that it fills the part.
    #[inline(always)]
    pub unsafe fn wait_empty(&self) {
        mbarrier::wait(self.empty(self.stage), self.parity ^ 1);
    }

    /// Filling side, one thread: the part is full once the copy engine has brought `bytes` bytes.
    ///
    /// # Safety
    ///
    /// Reached by one thread, after [`Self::wait_empty`]; so many bytes are then brought.
    #[inline(always)]
    pub unsafe fn expect(&self, bytes: u32) {
        mbarrier::arrive_expecting(self.full(), bytes);
    }

    /// Filling side, one thread: the part is not full before the copy engine has brought `bytes` more bytes.
    ///
    /// # Safety
    ///
    /// As [`Self::expect`], before the part is filled.
    #[inline(always)]
    pub unsafe fn expect_more(&self, bytes: u32) {
        mbarrier::expect(self.full(), bytes);
    }

    /// Filling side, every lane: the part is full; on to the next.
    ///
    /// # Safety
    ///
    /// As [`Self::wait_empty`], after it.
    #[inline(always)]
    pub unsafe fn fill(&mut self) {
        mbarrier::arrive(self.full());
        self.advance();
    }

    /// Filling side, of which one thread counts: if this is it, the part is full; on to the next.
    ///
    /// # Safety
    ///
    /// As [`Self::wait_empty`], after it.
    #[inline(always)]
    pub unsafe fn fill_by(&mut self, counts: bool) {
        mbarrier::arrive_if(self.full(), counts);
        self.advance();
    }

    /// Emptying side: waits until the part is full.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of a warp of the emptying side, once for each time that the part is filled.
    #[inline(always)]
    pub unsafe fn wait_full(&self) {
        mbarrier::wait(self.full(), self.parity);
    }

    /// Emptying side: whether the part is full already. If so, [`Self::wait_full`] may be left out.
    ///
    /// # Safety
    ///
    /// As [`Self::wait_full`].
    #[inline(always)]
    pub unsafe fn is_full(&self) -> bool {
        mbarrier::has_ended(self.full(), self.parity)
    }

    /// Emptying side: as [`Self::wait_full`]; on to the next part. Returns the part, to be given to [`Self::release_stage`].
    ///
    /// # Safety
    ///
    /// As [`Self::wait_full`].
    #[inline(always)]
    pub unsafe fn take_full(&mut self) -> u32 {
        self.take_full_after(0)
    }

    /// As [`Self::take_full`], for a `zero` that the assembler does not know to be one: what it is worked out from is worked out
    /// before. The assembler would put it off until after the next wait for products in flight, which it is there to overlap.
    ///
    /// # Safety
    ///
    /// As [`Self::wait_full`].
    #[inline(always)]
    pub unsafe fn take_full_after(&mut self, zero: u32) -> u32 {
        mbarrier::wait(self.full(), self.parity + zero);
        let stage = self.stage;
        self.advance();
        stage
    }

    /// Emptying side: on to the next part, which is [waited for later](Self::wait_taken). Returns the part.
    #[inline(always)]
    pub fn take_early(&mut self) -> u32 {
        let stage = self.stage;
        self.advance();
        stage
    }

    /// Emptying side: waits until part `stage` is full, the last that was taken; at once if it was waited for before. For `zero`,
    /// see [`Self::take_full_after`].
    ///
    /// # Safety
    ///
    /// As [`Self::wait_full`], before the next part is taken.
    #[inline(always)]
    pub unsafe fn wait_taken(&self, stage: u32, zero: u32) {
        let parity = self.parity ^ u32::from(self.stage == 0);
        mbarrier::wait(self.barriers + stage * mbarrier::BYTES, parity + zero);
    }

    /// Emptying side, every warp, its lanes having done with the part: on to the next.
    ///
    /// # Safety
    ///
    /// As [`Self::wait_full`], after it.
    #[inline(always)]
    pub unsafe fn release(&mut self, lane: u32) {
        self.release_stage(self.stage, lane);
        self.advance();
    }

    /// Emptying side, every lane, which counts for itself: it has done with the part; on to the next.
    ///
    /// # Safety
    ///
    /// As [`Self::wait_full`], after it.
    #[inline(always)]
    pub unsafe fn release_by_lanes(&mut self) {
        self.release_stage_by_lanes(self.stage);
        self.advance();
    }

    /// As [`Self::release_by_lanes`], of a part that this side has already gone on from.
    ///
    /// # Safety
    ///
    /// As [`Self::release_by_lanes`].
    #[inline(always)]
    pub unsafe fn release_stage_by_lanes(&self, stage: u32) {
        mbarrier::arrive(self.empty(stage));
    }

    /// As [`Self::release`], of a part that this side has already gone on from.
    ///
    /// # Safety
    ///
    /// As [`Self::release`].
    #[inline(always)]
    pub unsafe fn release_stage(&self, stage: u32, lane: u32) {
        mbarrier::arrive_if(self.empty(stage), lane == 0);
    }
}

/// What one thread tells another, which waits for it, again and again.
#[derive(Clone, Copy)]
pub struct Signal {
    barrier: u32,
    /// Parity of the phase that is waited for next.
    parity: u32,
}

impl Signal {
    /// Tells.
    ///
    /// # Safety
    ///
    /// Reached by one thread, when what was told before has been received.
    #[inline(always)]
    pub unsafe fn send(&self) {
        mbarrier::arrive(self.barrier);
    }

    /// Waits until it is told.
    ///
    /// # Safety
    ///
    /// Reached once for each time that it is told, by one thread.
    #[inline(always)]
    pub unsafe fn receive(&mut self) {
        mbarrier::wait(self.barrier, self.parity);
        self.parity ^= 1;
    }
}

/// The steps of a task that some rows see any column of.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct SeenSteps {
    /// First column of the first of them.
    pub first: u32,
    /// First column of the last.
    pub last: u32,
    /// How many steps of the task come before them.
    pub before: u32,
    /// How many come behind them.
    pub behind: u32,
}

/// Where the parts lie, in this order: Q, K, V, what the helpers have tiles of, row tables, exchange, task slots, barriers, the
/// rest of what readers have. Where narrow tiles are done by readers, or not at all, by three consumers, there is no exchange,
/// but only room for each consuming warp to store rows of O through.
#[derive(Clone, Copy)]
pub struct Shared<const DIM_BLOCKS: usize, const FRAGMENTS: usize, const ROW_BLOCKS: usize, H: Helpers> {
    base: u32,
    helpers: PhantomData<H>,
}

impl<const DIM_BLOCKS: usize, const FRAGMENTS: usize, const ROW_BLOCKS: usize, H: Helpers>
    Shared<DIM_BLOCKS, FRAGMENTS, ROW_BLOCKS, H>
{
    /// Rows of a wide tile.
    pub const ROWS_OF_TILE: u32 = 8 * ROW_BLOCKS as u32;
    /// Consumers, each of which has 64 rows of a wide tile.
    pub const CONSUMERS: u32 = Self::ROWS_OF_TILE / CONSUMER_ROWS;
    /// Threads that consume.
    pub const CONSUMER_THREADS: u32 = Self::CONSUMERS * THREADS;
    /// Warps that consume.
    pub const CONSUMER_WARPS: u32 = Self::CONSUMER_THREADS / WARP_LANES;
    /// Whether consumers do narrow tiles too, and exchange what they found.
    pub const HAS_EXCHANGE: bool = !H::READ && Self::CONSUMERS == 2;
    /// Whether K and V have scales: where they are in FP8, or may have been (`kv_widen`).
    pub const IS_SCALED: bool = H::CONVERT || H::READ_STORED || Self::CONSUMERS > 2;
    /// Whether there are [ones](Self::ones): in launches of tall tiles whose instructions take longer than their products.
    pub const HAS_ONES: bool = Self::CONSUMERS > 2 && DIM_BLOCKS <= PANEL_BLOCKS;
    /// Columns of a step of a wide tile.
    pub const STEP: u32 = ColumnTile::<DIM_BLOCKS, FRAGMENTS>::ROWS;
    /// Those of a narrow tile.
    pub const NARROW_STEP: u32 = if H::CONVERT { 8 * STORED_STEP_BLOCKS as u32 } else { Self::STEP };

    /// Steps whose K is held, and steps whose V is: those that fit beside Q.
    const STAGES: [u32; 2] = match (DIM_BLOCKS, Self::HAS_EXCHANGE) {
        // The more parts as they are stored: K of the next step is made while consumers are at their softmax.
        _ if H::CONVERT => [1, 2],
        (8, true) => [4, 6],
        (8, false) => [4, 4],
        (12 | 16, true) => [2, 3],
        _ => [2, 2],
    };
    const K_STAGES: u32 = Self::STAGES[0];
    pub const V_STAGES: u32 = Self::STAGES[1];

    const K: u32 = QueryTile::<DIM_BLOCKS, ROW_BLOCKS>::BYTES;
    const V: u32 = Self::K + Self::K_STAGES * ColumnTile::<DIM_BLOCKS, FRAGMENTS>::BYTES;
    const HELPERS: u32 = Self::V + Self::V_STAGES * ColumnTile::<DIM_BLOCKS, FRAGMENTS>::BYTES;
    const ROWS: u32 = Self::HELPERS + if H::READ { Self::READER_TILE_BYTES } else { H::STORED_STAGES * PART_BYTES };
    /// Tasks that are known at a time: loads of one may begin before the consumers have finished another.
    const TASKS: u32 = if H::READ { 2 } else { 3 };
    const EXCHANGE: u32 = Self::ROWS + Self::TASKS * HOPPER_ROW_TABLE_BYTES;
    const EXCHANGE_BYTES: u32 =
        if Self::HAS_EXCHANGE { Exchange::<DIM_BLOCKS>::BYTES } else { Self::CONSUMER_WARPS * Self::STAGING_BYTES };
    const SLOTS: u32 = Self::EXCHANGE + Self::EXCHANGE_BYTES;
    /// Bytes that a consuming warp stages rows of O in, where there is no exchange.
    const STAGING_BYTES: u32 =
        16 * if H::READ { SharedTile::<STAGED_BLOCKS>::ROW_BYTES } else { SharedTile::<PANEL_BLOCKS>::ROW_BYTES };
    /// Where the parts of a task slot lie: the work item, four words on the task, what each consumer's rows see, and in which
    /// steps. The words on the task are one more than the tile's kind, or zero if no task is left; the head group; the KV head;
    /// the task's index.
    const SLOT_ITEM: u32 = 0;
    const SLOT_TASK: u32 = size_of::<WorkItem>() as u32;
    const SLOT_VIEWS: u32 = Self::SLOT_TASK + 16;
    const SLOT_STEPS: u32 = Self::SLOT_VIEWS + Self::CONSUMERS * 16;
    const SLOT_SCALES: u32 = Self::SLOT_STEPS + Self::CONSUMERS * 16;
    /// Bytes of a task slot.
    const SLOT_BYTES: u32 = Self::SLOT_SCALES + if Self::IS_SCALED { 16 } else { 0 };
    const BARRIERS: u32 = Self::SLOTS + Self::TASKS * Self::SLOT_BYTES;
    const K_BARRIERS: u32 = Self::BARRIERS + Ring::bytes(1);
    const V_BARRIERS: u32 = Self::K_BARRIERS + Ring::bytes(Self::K_STAGES);
    const TASK_BARRIERS: u32 = Self::V_BARRIERS + Ring::bytes(Self::V_STAGES);
    const ITEM_BARRIERS: u32 = Self::TASK_BARRIERS + Ring::bytes(Self::TASKS);
    const STORED_BARRIERS: u32 = Self::ITEM_BARRIERS + Ring::bytes(Self::TASKS);
    /// Steps of narrow tiles whose K and V are held where they are taken as they are stored.
    const NARROW_STAGES: u32 = if H::CONVERT { (Self::ROWS - Self::K) / (2 * H::NARROW_STEP_BYTES) } else { 0 };
    const NARROW_BARRIERS: u32 = Self::STORED_BARRIERS + Ring::bytes(H::STORED_STAGES);
    const NEAR_END_BARRIER: u32 = Self::NARROW_BARRIERS + 2 * Ring::bytes(Self::NARROW_STAGES);
    const READER_WORDS: u32 = Self::NEAR_END_BARRIER + mbarrier::BYTES;
    const END: u32 = Self::READER_WORDS + if H::READ { Self::READER_WORD_BYTES } else { 0 };
    /// Bytes of what readers have of tiles.
    const READER_TILE_BYTES: u32 = if H::READ_STORED {
        ReaderMemory::<DIM_BLOCKS, STORED_CHUNKS>::TILE_BYTES
    } else {
        ReaderMemory::<DIM_BLOCKS, DIM_BLOCKS>::TILE_BYTES
    };
    /// Bytes of the rest.
    const READER_WORD_BYTES: u32 = if H::READ_STORED {
        ReaderMemory::<DIM_BLOCKS, STORED_CHUNKS>::WORD_BYTES
    } else {
        ReaderMemory::<DIM_BLOCKS, DIM_BLOCKS>::WORD_BYTES
    };
    /// Eight rows of a panel twice, as a product sums over 16.
    const ONES_BYTES: u32 = 2 * 8 * PANEL_ROW_BYTES;
    const ONES: u32 = Self::END.next_multiple_of(8 * PANEL_ROW_BYTES);
    const FITS: () = assert!(
        if Self::HAS_ONES { Self::ONES + Self::ONES_BYTES } else { Self::END }
            <= if H::READ {
                BESIDE_SHARED_BYTES
            } else if H::CONVERT {
                CONVERTING_SHARED_BYTES
            } else if Self::CONSUMERS == 2 {
                HOPPER_SHARED_BYTES
            } else {
                TALL_SHARED_BYTES
            }
    );
    const STEP_IS_THE_PLANS: () = assert!(Self::STEP == hopper_column_step(8 * DIM_BLOCKS as u32));

    #[inline(always)]
    pub fn at(base: u32) -> Self {
        const { (Self::FITS, Self::STEP_IS_THE_PLANS) };
        Self { base, helpers: PhantomData }
    }

    /// Makes the barriers.
    ///
    /// # Safety
    ///
    /// Reached by one thread, before a barrier of the whole block.
    pub unsafe fn init_barriers(&self) {
        self.query_ring().init(1, Self::CONSUMER_THREADS);
        if H::CONVERT {
            self.stored_ring().init(1, CONVERTER_WARPS);
            self.narrow_rings().iter().for_each(|ring| ring.init(1, Self::CONSUMER_WARPS));
        }
        let column_fills = if H::CONVERT { CONVERTER_WARPS * WARP_LANES } else { 1 };
        self.k_ring().init(column_fills, Self::CONSUMER_WARPS);
        self.v_ring().init(column_fills, Self::CONSUMER_WARPS);
        let item_readers = LOADER_WARPS + if H::CONVERT { CONVERTER_WARPS } else { 0 };
        self.item_ring().init(1, item_readers * WARP_LANES);
        self.task_ring().init(POSTING_WARPS * WARP_LANES, Self::CONSUMER_THREADS);
        mbarrier::init(self.base + Self::NEAR_END_BARRIER, 1);
        if H::READ_STORED {
            self.reader_memory::<STORED_CHUNKS>().init();
        } else if H::READ {
            self.reader_memory::<DIM_BLOCKS>().init();
        }
        mbarrier::fence_init();
    }

    #[inline(always)]
    pub fn query_ring(&self) -> Ring {
        Ring::at(self.base + Self::BARRIERS, 1)
    }

    #[inline(always)]
    pub fn k_ring(&self) -> Ring {
        Ring::at(self.base + Self::K_BARRIERS, Self::K_STAGES)
    }

    #[inline(always)]
    pub fn v_ring(&self) -> Ring {
        Ring::at(self.base + Self::V_BARRIERS, Self::V_STAGES)
    }

    /// K and V as they are stored, for the converters: parts of K and parts of V of a step, then those of the next.
    #[inline(always)]
    pub fn stored_ring(&self) -> Ring {
        Ring::at(self.base + Self::STORED_BARRIERS, H::STORED_STAGES)
    }

    /// K and V of narrow tiles as they are stored, for the consumers: where all K and V of wide tiles are otherwise.
    #[inline(always)]
    pub fn narrow_rings(&self) -> [Ring; 2] {
        [Tensor::K, Tensor::V].map(|tensor| self.narrow_ring(tensor))
    }

    /// That of one tensor.
    #[inline(always)]
    pub fn narrow_ring(&self, tensor: Tensor) -> Ring {
        let before = tensor as u32 * Ring::bytes(Self::NARROW_STAGES);
        Ring::at(self.base + Self::NARROW_BARRIERS + before, Self::NARROW_STAGES)
    }

    /// Tasks with their rows, for the consumers.
    #[inline(always)]
    pub fn task_ring(&self) -> Ring {
        Ring::at(self.base + Self::TASK_BARRIERS, Self::TASKS)
    }

    /// The same tasks before their rows are worked out, for those who have Q, K and V brought.
    #[inline(always)]
    pub fn item_ring(&self) -> Ring {
        Ring::at(self.base + Self::ITEM_BARRIERS, Self::TASKS)
    }

    /// That loads of a long task are near its end: the next is to be taken.
    #[inline(always)]
    pub fn near_end(&self) -> Signal {
        Signal { barrier: self.base + Self::NEAR_END_BARRIER, parity: 0 }
    }

    #[inline(always)]
    pub fn queries(&self) -> QueryTile<DIM_BLOCKS, ROW_BLOCKS> {
        QueryTile::at(self.base)
    }

    #[inline(always)]
    pub fn k(&self, stage: u32) -> ColumnTile<DIM_BLOCKS, FRAGMENTS> {
        ColumnTile::at(self.base + Self::K).skip_tiles(stage)
    }

    #[inline(always)]
    pub fn v(&self, stage: u32) -> ColumnTile<DIM_BLOCKS, FRAGMENTS> {
        ColumnTile::at(self.base + Self::V).skip_tiles(stage)
    }

    /// Sixteen rows of ones, which may stand for more columns of any V.
    #[inline(always)]
    pub fn ones(&self) -> u32 {
        self.base + Self::ONES
    }

    /// Makes the [ones](Self::ones), if there are any.
    ///
    /// # Safety
    ///
    /// Reached by all threads of the block, of which there are as many as words, before a barrier of all.
    #[inline(always)]
    pub unsafe fn make_ones<E: Element>(&self, thread: u32) {
        if Self::HAS_ONES {
            const { assert!(Self::ONES_BYTES == 4 * 4 * THREADS) };
            store_shared(self.ones() + 4 * thread, E::pack(1.0, 1.0));
            wgmma::fence_shared_writes();
        }
    }

    /// A part of K or V as it is stored, for the converters.
    #[inline(always)]
    pub fn stored<const CHUNKS: usize, const PART_BLOCKS: usize>(&self, stage: u32) -> BoxTile<CHUNKS, PART_BLOCKS> {
        BoxTile::at(self.base + Self::HELPERS).skip_tiles(stage)
    }

    /// K of a step of a narrow tile, be it as it is stored or not.
    #[inline(always)]
    pub fn narrow_k<const CHUNKS: usize, const STEP_BLOCKS: usize>(&self, stage: u32) -> BoxTile<CHUNKS, STEP_BLOCKS> {
        BoxTile::at(self.base + Self::K).skip_tiles(stage)
    }

    /// V of a step of a narrow tile, be it as it is stored or not.
    #[inline(always)]
    pub fn narrow_v<const CHUNKS: usize, const STEP_BLOCKS: usize>(&self, stage: u32) -> BoxTile<CHUNKS, STEP_BLOCKS> {
        let before = if H::CONVERT { Self::NARROW_STAGES } else { Self::K_STAGES };
        self.narrow_k(before + stage)
    }

    #[inline(always)]
    pub fn rows(&self, stage: u32) -> RowTable {
        RowTable::at(self.base + Self::ROWS + stage * HOPPER_ROW_TABLE_BYTES)
    }

    #[inline(always)]
    pub fn exchange(&self) -> Exchange<DIM_BLOCKS> {
        Exchange::at(self.base + Self::EXCHANGE)
    }

    /// Where a consuming warp may put 16 rows of `BLOCKS` blocks: [`STAGED_BLOCKS`] where there are readers, otherwise those of a
    /// panel.
    #[inline(always)]
    pub fn staging<const BLOCKS: usize>(&self, warp: u32) -> SharedTile<BLOCKS> {
        if Self::HAS_EXCHANGE {
            return SharedTile::at(self.exchange().staging(warp));
        }
        SharedTile::at(self.base + Self::EXCHANGE + warp * Self::STAGING_BYTES)
    }

    /// What the readers have, whose K and V have rows of so many chunks of 16 bytes.
    #[inline(always)]
    pub fn reader_memory<const CHUNKS: usize>(&self) -> ReaderMemory<DIM_BLOCKS, CHUNKS> {
        ReaderMemory::at(self.base + Self::HELPERS, self.base + Self::READER_WORDS)
    }

    /// Rows of the readers' task: behind those of the first of the others, of which there are not so many as there is room for.
    #[inline(always)]
    pub fn reader_rows(&self) -> RowTable {
        const { assert!(!H::READ || 8 * ROW_BLOCKS as u32 + NARROW_TILE_ROWS <= TALL_TILE_ROWS) };
        self.rows(0).skip_rows(Self::ROWS_OF_TILE)
    }

    #[inline(always)]
    fn slot(&self, stage: u32) -> u32 {
        self.base + Self::SLOTS + stage * Self::SLOT_BYTES
    }

    /// Tells everyone the task, or that there is none left.
    ///
    /// # Safety
    ///
    /// Reached by one thread of the filling side, between waiting for the slot and filling it.
    #[inline(always)]
    pub unsafe fn post_task(&self, stage: u32, task: &Task) {
        let slot = self.slot(stage);
        let words: [[u32; 4]; 2] = core::mem::transmute(task.item);
        store_shared_x4(slot + Self::SLOT_ITEM, words[0]);
        store_shared_x4(slot + Self::SLOT_ITEM + 16, words[1]);
        store_shared_x4(slot + Self::SLOT_TASK, [1 + task.item.tile as u32, task.head_group, task.kv_head, task.index]);
    }

    /// Says, instead of posting a task, that none is left, and what [share](merge::merge_rows) the block has in merging rows.
    ///
    /// # Safety
    ///
    /// As [`Self::post_task`].
    #[inline(always)]
    pub unsafe fn post_end(&self, stage: u32, share: Share) {
        store_shared_x4(self.slot(stage) + Self::SLOT_TASK, [0, 0, share.of, share.index]);
    }

    /// What [`Self::post_end`] told.
    ///
    /// # Safety
    ///
    /// As [`Self::tile_kind`]; no task is left.
    #[inline(always)]
    pub unsafe fn share(&self, stage: u32) -> Share {
        let [_, _, of, index] = load_shared_x4(self.slot(stage) + Self::SLOT_TASK);
        Share { index, of }
    }

    /// The slot of the next task that is posted, if there is one left.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of a warp that empties the [ring of items](Self::item_ring), once for each of them.
    #[inline(always)]
    pub unsafe fn next_posted(&self, items: &Ring) -> Option<u32> {
        items.wait_full();
        let slot = items.stage();
        self.tile_kind(slot).map(|_| slot)
    }

    /// The kind of the task's tile, if there is a task left. All lanes read the same address, so the assembler knows that they
    /// get the same.
    ///
    /// # Safety
    ///
    /// Reached by the emptying side, between waiting for the slot and releasing it.
    #[inline(always)]
    pub unsafe fn tile_kind(&self, stage: u32) -> Option<TileKind> {
        match load_shared(self.slot(stage) + Self::SLOT_TASK) {
            0 => None,
            1 => Some(TileKind::Wide),
            _ => Some(TileKind::Narrow),
        }
    }

    /// The task.
    ///
    /// # Safety
    ///
    /// As [`Self::tile_kind`]; there is one.
    #[inline(always)]
    pub unsafe fn task(&self, params: &AttentionParams, stage: u32) -> Task {
        let slot = self.slot(stage);
        let [_, head_group, kv_head, index] = load_shared_x4(slot + Self::SLOT_TASK);
        let item: WorkItem =
            core::mem::transmute([load_shared_x4(slot + Self::SLOT_ITEM), load_shared_x4(slot + Self::SLOT_ITEM + 16)]);
        Task { params: *params, index, item, head_group, kv_head, rows: self.rows(stage) }
    }

    /// The item's range of columns.
    ///
    /// # Safety
    ///
    /// As [`Self::task`].
    #[inline(always)]
    pub unsafe fn columns(&self, stage: u32) -> Range<u32> {
        let column = |offset: usize| load_shared(self.slot(stage) + Self::SLOT_ITEM + offset as u32);
        column(core::mem::offset_of!(WorkItem, column_begin))..column(core::mem::offset_of!(WorkItem, column_end))
    }

    /// How many steps of a task are left to be loaded when the block takes the next: it is early enough to begin with that in
    /// time, and late enough that no block has one in store that another would be free for. Of tasks with fewer steps, the block
    /// takes some ahead.
    #[inline(always)]
    pub fn steps_left_at_next(&self, kind: TileKind) -> u32 {
        let is_narrow = Self::HAS_EXCHANGE && kind == TileKind::Narrow;
        if is_narrow || DIM_BLOCKS > 16 { 1 } else { 2 }
    }

    /// Whether the task has so many steps that the next is taken only [near its end](Self::near_end).
    ///
    /// # Safety
    ///
    /// As [`Self::task`].
    #[inline(always)]
    pub unsafe fn is_long(&self, stage: u32) -> bool {
        let columns = self.columns(stage);
        let kind = self.tile_kind(stage).unwrap_or(TileKind::Wide);
        let step = if Self::NARROW_STEP != Self::STEP && kind == TileKind::Narrow { Self::NARROW_STEP } else { Self::STEP };
        (columns.end - columns.start).div_ceil(step) >= self.steps_left_at_next(kind)
    }

    /// The index of the task.
    ///
    /// # Safety
    ///
    /// As [`Self::task`].
    #[inline(always)]
    pub unsafe fn task_index(&self, stage: u32) -> u32 {
        load_shared(self.slot(stage) + Self::SLOT_TASK + 12)
    }

    /// Tells a consumer what its rows see, and in which steps of the task.
    ///
    /// # Safety
    ///
    /// As [`Self::post_task`].
    #[inline(always)]
    pub unsafe fn post_view(&self, stage: u32, consumer: u32, task: &Task, view: WarpView) {
        store_shared_x4(self.slot(stage) + Self::SLOT_VIEWS + 16 * consumer, view.to_words());
        let (begin, end) = (task.item.column_begin, task.item.column_end);
        let (first, end_seen) = view.steps(begin, Self::STEP);
        let steps = SeenSteps {
            first: begin + first * Self::STEP,
            last: begin + (end_seen - 1) * Self::STEP,
            before: first,
            behind: (end - begin).div_ceil(Self::STEP) - end_seen,
        };
        store_shared_x4(self.slot(stage) + Self::SLOT_STEPS + 16 * consumer, core::mem::transmute::<SeenSteps, [u32; 4]>(steps));
    }

    /// Tells the consumers what K and V are multiplied with.
    ///
    /// # Safety
    ///
    /// As [`Self::post_task`].
    #[inline(always)]
    pub unsafe fn post_scales(&self, stage: u32, [k, v]: [f32; 2]) {
        store_shared_f32x2(self.slot(stage) + Self::SLOT_SCALES, k, v);
    }

    /// What K is multiplied with, and V.
    ///
    /// # Safety
    ///
    /// As [`Self::task`].
    #[inline(always)]
    pub unsafe fn scales(&self, stage: u32) -> [f32; 2] {
        if Self::IS_SCALED { load_shared_f32x2(self.slot(stage) + Self::SLOT_SCALES) } else { [1.0; 2] }
    }

    /// What [`Self::post_view`] told.
    ///
    /// # Safety
    ///
    /// As [`Self::task`].
    #[inline(always)]
    pub unsafe fn view(&self, stage: u32, consumer: u32) -> WarpView {
        WarpView::from_words(load_shared_x4(self.slot(stage) + Self::SLOT_VIEWS + 16 * consumer))
    }

    /// The steps that a consumer's rows see, as [`Self::post_view`] told.
    ///
    /// # Safety
    ///
    /// As [`Self::task`].
    #[inline(always)]
    pub unsafe fn seen_steps(&self, stage: u32, consumer: u32) -> SeenSteps {
        core::mem::transmute(load_shared_x4(self.slot(stage) + Self::SLOT_STEPS + 16 * consumer))
    }
}
