//! The block's shared memory, and the barriers that guard its parts.

use packinfer_abi::{AttentionParams, HOPPER_SHARED_BYTES, NARROW_TILE_ROWS, ROW_TABLE_BYTES, WIDE_TILE_ROWS, WorkItem};

use super::producer::{LOADER_WARPS, QUERY_WARPS};
use super::{CONSUMER_WARPS, STEP};
use crate::attention::task::Task;
use crate::ptx::mbarrier;
use crate::ptx::memory::{load_shared, load_shared_x4, store_shared, store_shared_x4};
use crate::ptx::warp::LANES as WARP_LANES;
use crate::rows::RowTable;
use crate::shared_tile::{PanelTile, SharedTile};

/// Tasks that are known at a time: so that loads of one may begin before the consumers have finished another.
pub const TASKS: u32 = 4;

/// Q of a task.
pub type QueryTile<const DIM_BLOCKS: usize> = PanelTile<DIM_BLOCKS, WIDE_TILE_ROWS>;
/// K or V of a step.
pub type ColumnTile<const DIM_BLOCKS: usize> = PanelTile<DIM_BLOCKS, STEP>;

/// A ring of `STAGES` parts of shared memory that one side fills and the other empties in turn. Each warp of either side counts for itself.
#[derive(Clone, Copy)]
pub struct Ring<const STAGES: u32> {
    barriers: u32,
    /// The part whose turn it is.
    pub stage: u32,
    /// Parity of the phase of its full barrier.
    parity: u32,
}

impl<const STAGES: u32> Ring<STAGES> {
    /// Bytes of the barriers.
    const BYTES: u32 = 2 * STAGES * mbarrier::BYTES;

    fn at(barriers: u32) -> Self {
        Self { barriers, stage: 0, parity: 0 }
    }

    /// Makes the barriers: so many arrivals fill a part, so many empty it.
    unsafe fn init(&self, fills: u32, empties: u32) {
        for stage in 0..STAGES {
            mbarrier::init(self.barriers + stage * mbarrier::BYTES, fills);
            mbarrier::init(self.barriers + (STAGES + stage) * mbarrier::BYTES, empties);
        }
    }

    /// The barrier that ends when the part is full.
    #[inline(always)]
    pub fn full(&self) -> u32 {
        self.barriers + self.stage * mbarrier::BYTES
    }

    #[inline(always)]
    fn empty(&self) -> u32 {
        self.barriers + (STAGES + self.stage) * mbarrier::BYTES
    }

    /// On to the next part.
    #[inline(always)]
    pub fn advance(&mut self) {
        self.stage += 1;
        if self.stage == STAGES {
            self.stage = 0;
            self.parity ^= 1;
        }
    }

    /// Filling side: waits until the other has done with the part.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of a warp of the filling side, once for each time that it fills the part.
    #[inline(always)]
    pub unsafe fn wait_empty(&self) {
        mbarrier::wait(self.empty(), self.parity ^ 1);
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

    /// Filling side, every lane: the part is full once the thread's copies have arrived; on to the next.
    ///
    /// # Safety
    ///
    /// As [`Self::wait_empty`], after it.
    #[inline(always)]
    pub unsafe fn fill_by_copies(&mut self) {
        mbarrier::arrive_after_copies(self.full());
        self.advance();
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

    /// Emptying side: waits until the part is full.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of a warp of the emptying side, once for each time that the part is filled.
    #[inline(always)]
    pub unsafe fn wait_full(&self) {
        mbarrier::wait(self.full(), self.parity);
    }

    /// Emptying side, every warp, its lanes having done with the part: on to the next.
    ///
    /// # Safety
    ///
    /// As [`Self::wait_full`], after it.
    #[inline(always)]
    pub unsafe fn release(&mut self, lane: u32) {
        if lane == 0 {
            mbarrier::arrive(self.empty());
        }
        self.advance();
    }
}

/// Where the parts lie, in this order: Q, K, V, the consumers' exchange, row tables, task slots, barriers.
#[derive(Clone, Copy)]
pub struct Shared<const DIM_BLOCKS: usize> {
    base: u32,
}

impl<const DIM_BLOCKS: usize> Shared<DIM_BLOCKS> {
    /// Steps whose K and V are held.
    pub const STAGES: u32 = 2;
    /// Bytes of the exchange, where each consumer warp stages its 16 rows of O, and where narrow tiles are merged.
    const EXCHANGE_BYTES: u32 = super::narrow::EXCHANGE_BYTES;

    const K: u32 = QueryTile::<DIM_BLOCKS>::BYTES;
    const V: u32 = Self::K + Self::STAGES * ColumnTile::<DIM_BLOCKS>::BYTES;
    const EXCHANGE: u32 = Self::V + Self::STAGES * ColumnTile::<DIM_BLOCKS>::BYTES;
    const ROWS: u32 = Self::EXCHANGE + Self::EXCHANGE_BYTES;
    const SLOTS: u32 = Self::ROWS + TASKS * ROW_TABLE_BYTES;
    /// Where the parts of a task slot lie: the work item, four words on the task, the index of the task after it.
    const SLOT_ITEM: u32 = 0;
    const SLOT_TASK: u32 = size_of::<WorkItem>() as u32;
    const SLOT_NEXT: u32 = Self::SLOT_TASK + 16;
    /// Bytes of a task slot.
    const SLOT_BYTES: u32 = Self::SLOT_NEXT + 16;
    const BARRIERS: u32 = Self::SLOTS + TASKS * Self::SLOT_BYTES;
    const END: u32 = Self::BARRIERS + Ring::<1>::BYTES + 2 * Ring::<2>::BYTES + Ring::<TASKS>::BYTES;
    const FITS: () = assert!(
        Self::END <= HOPPER_SHARED_BYTES
            && CONSUMER_WARPS * NARROW_TILE_ROWS * SharedTile::<DIM_BLOCKS>::ROW_BYTES <= Self::EXCHANGE_BYTES
            && Self::STAGES == 2
    );

    #[inline(always)]
    pub fn at(base: u32) -> Self {
        const { Self::FITS };
        Self { base }
    }

    pub unsafe fn init_barriers(&self) {
        self.query_ring().init(QUERY_WARPS * WARP_LANES, CONSUMER_WARPS);
        self.k_ring().init(1, CONSUMER_WARPS);
        self.v_ring().init(1, CONSUMER_WARPS);
        self.task_ring().init(QUERY_WARPS * WARP_LANES, CONSUMER_WARPS + LOADER_WARPS);
        mbarrier::fence_init();
    }

    #[inline(always)]
    pub fn query_ring(&self) -> Ring<1> {
        Ring::at(self.base + Self::BARRIERS)
    }

    #[inline(always)]
    pub fn k_ring(&self) -> Ring<2> {
        Ring::at(self.base + Self::BARRIERS + Ring::<1>::BYTES)
    }

    #[inline(always)]
    pub fn v_ring(&self) -> Ring<2> {
        Ring::at(self.base + Self::BARRIERS + Ring::<1>::BYTES + Ring::<2>::BYTES)
    }

    #[inline(always)]
    pub fn task_ring(&self) -> Ring<TASKS> {
        Ring::at(self.base + Self::BARRIERS + Ring::<1>::BYTES + 2 * Ring::<2>::BYTES)
    }

    #[inline(always)]
    pub fn queries(&self) -> QueryTile<DIM_BLOCKS> {
        QueryTile::at(self.base)
    }

    #[inline(always)]
    pub fn k(&self, stage: u32) -> ColumnTile<DIM_BLOCKS> {
        ColumnTile::at(self.base + Self::K).skip_tiles(stage)
    }

    #[inline(always)]
    pub fn v(&self, stage: u32) -> ColumnTile<DIM_BLOCKS> {
        ColumnTile::at(self.base + Self::V).skip_tiles(stage)
    }

    /// Start of the exchange.
    #[inline(always)]
    pub fn exchange(&self) -> u32 {
        self.base + Self::EXCHANGE
    }

    #[inline(always)]
    pub fn rows(&self, stage: u32) -> RowTable {
        RowTable::at(self.base + Self::ROWS + stage * ROW_TABLE_BYTES)
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
    pub unsafe fn post_task(&self, stage: u32, task: Option<&Task>) {
        let slot = self.slot(stage);
        if let Some(task) = task {
            let words: [[u32; 4]; 2] = core::mem::transmute(task.item);
            store_shared_x4(slot + Self::SLOT_ITEM, words[0]);
            store_shared_x4(slot + Self::SLOT_ITEM + 16, words[1]);
            store_shared_x4(slot + Self::SLOT_TASK, [1, task.head_group, task.kv_head, task.index]);
        } else {
            store_shared_x4(slot + Self::SLOT_TASK, [0; 4]);
        }
    }

    /// The task, if there is one left.
    ///
    /// # Safety
    ///
    /// Reached by the emptying side, between waiting for the slot and releasing it.
    #[inline(always)]
    pub unsafe fn read_task(&self, params: &AttentionParams, stage: u32) -> Option<Task> {
        let slot = self.slot(stage);
        let [is_task, head_group, kv_head, index] = load_shared_x4(slot + Self::SLOT_TASK);
        if is_task == 0 {
            return None;
        }
        let item: WorkItem =
            core::mem::transmute([load_shared_x4(slot + Self::SLOT_ITEM), load_shared_x4(slot + Self::SLOT_ITEM + 16)]);
        Some(Task { params: *params, index, item, head_group, kv_head, rows: self.rows(stage) })
    }

    /// Keeps the index of the task after that of a slot.
    ///
    /// # Safety
    ///
    /// Reached by one thread, before a barrier between the warps that gather Q.
    #[inline(always)]
    pub unsafe fn tell_next_task(&self, stage: u32, index: u32) {
        store_shared(self.slot(stage) + Self::SLOT_NEXT, index);
    }

    /// What [`Self::tell_next_task`] kept.
    ///
    /// # Safety
    ///
    /// Reached after that barrier.
    #[inline(always)]
    pub unsafe fn next_task(&self, stage: u32) -> u32 {
        load_shared(self.slot(stage) + Self::SLOT_NEXT)
    }
}
