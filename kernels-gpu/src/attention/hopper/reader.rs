//! The readers: a warpgroup that does narrow tiles while the consumers beside it do wide ones.
//!
//! Narrow tiles wait for memory, and wide ones for the tensor cores. A multiprocessor that does both at a time uses both. So the
//! readers have little of anything else: few registers, a quarter of shared memory, and no part in what the producer and the
//! consumers tell each other. They take their own tasks, and have the copy engine bring K and V, each warp 16 of a step's 64
//! columns.
//!
//! Rows are few, so products are transposed: columns, and then elements of O, are the 64 rows of `wgmma`, and the tile's rows its
//! 16 columns.
//!
//! ```text
//! Sᵀ = K Qᵀ      64 columns × 16 rows: lane l of a warp has its columns l / 4 and l / 4 + 8, of rows 2 (l % 4), the next, and both eight on
//! Oᵀ += Vᵀ Pᵀ    64 elements × 16 rows, the same way
//! ```
//!
//! K and V may be in FP8, as they are stored, where wide tiles have such as were made of them. Then a warp takes its columns of
//! K, and its elements of V, into registers and makes operands of them there, which `wgmma` takes for its rows: in float16, as is
//! Q then ([`ScaleToF16`], a row at a time), and the exponentials.

use packinfer_abi::{AttentionParams, HeadGroups, NARROW_TILE_ROWS, NUM_KV_BOXES, ScaleToF16, TENSOR_MAP_BYTES};

use super::helpers::Readers;
use super::producer::{BoxCopies, NO_SLOT};
use super::queue::{NO_TASK, ReaderQueue, readers_leave};
use super::shared::Shared;
use super::softmax::{NOTHING_SEEN, RANGE_LOG2};
use super::{PAIR, READER_WARPS, barrier};
use crate::attention::store;
use crate::attention::task::{Stamper, Task};
use crate::columns::RunWindow;
use crate::e4m3::four_to_f16;
use crate::element::{ELEMENT_BYTES, Element};
use crate::ptx::math::opaque;
use crate::ptx::memory::{
    load_global_x4, load_shared, load_shared_f32, store_global, store_shared, store_shared_f32x2, store_shared_if,
    store_shared_x4,
};
use crate::ptx::mma::{Fragment, OperandA, OperandB, store_matrices_transposed};
use crate::ptx::packed::{max_u16x2, permute};
use crate::ptx::warp::{self, LANES};
use crate::ptx::wgmma::{self, Accumulator, Descriptor, hold_words};
use crate::ptx::{math, mbarrier, warpgroup};
use crate::rows::{NO_ROW, Row, RowTable, WarpView};
use crate::shared_tile::{BoxTile, LaneRow, PANEL_BLOCKS, PANEL_ROW_BYTES, PanelTile, SharedTile};
use crate::softmax::RowSum;

/// Columns of a step.
const STEP: u32 = 64;
/// Columns of a step that a warp brings.
const WARP_COLUMNS: u32 = STEP / READER_WARPS;
/// Base 2 logarithm of the slots of boxes that bring all of these, and half of them.
const ALL_COLUMNS: u32 = WARP_COLUMNS.ilog2();
const HALF_OF_COLUMNS: u32 = ALL_COLUMNS - 1;

/// The most panels of a head dimension.
const MOST_PANELS: usize = 2;

/// K or V of a step, whose rows have so many chunks of 16 bytes.
type StepTile<const CHUNKS: usize> = BoxTile<CHUNKS, { STEP as usize / 8 }>;
/// How boxes get to such a tile.
type StepCopies<const CHUNKS: usize> = BoxCopies<CHUNKS, { STEP as usize / 8 }>;
/// Q.
type QueryRows<const DIM_BLOCKS: usize> = PanelTile<DIM_BLOCKS, ROW_BLOCKS>;
/// Exponentials of a step, row by row.
type Weights = SharedTile<PANEL_BLOCKS>;
/// Blocks of 8 rows of a tile.
const ROW_BLOCKS: usize = NARROW_TILE_ROWS as usize / 8;
/// The lane's part of 64 columns, or elements, of all rows: transposed, so that a fragment's columns are rows of the tile.
pub type Transposed = [Fragment; ROW_BLOCKS];
/// A number for each row that the lane holds a part of: of each block of 8 rows `2 (l % 4)` and the next.
type OfRows = [[f32; 2]; ROW_BLOCKS];

/// Of the rows that the lane holds parts of, row `i` of those of a block.
#[inline(always)]
fn row_of_lane(block: usize, i: usize, lane: u32) -> u32 {
    8 * block as u32 + lane % 4 * 2 + i as u32
}

/// The readers' shared memory: K and V of steps in turn, Q, exponentials of two steps, and what warps tell each other.
#[derive(Clone, Copy)]
pub struct ReaderMemory<const DIM_BLOCKS: usize, const CHUNKS: usize> {
    tiles: u32,
    words: u32,
}

impl<const DIM_BLOCKS: usize, const CHUNKS: usize> ReaderMemory<DIM_BLOCKS, CHUNKS> {
    /// Steps whose K, or whose V, is held.
    const STAGES: u32 = if CHUNKS <= 8 { 6 } else { 3 };
    /// Whether what comes after these is brought to the L2 cache meanwhile: where they are few.
    const PREFETCHES: bool = Self::STAGES == 3;
    const QUERIES: u32 = Self::STAGES * StepTile::<CHUNKS>::BYTES;
    const WEIGHTS: u32 = Self::QUERIES + QueryRows::<DIM_BLOCKS>::BYTES;
    const WEIGHTS_BYTES: u32 = NARROW_TILE_ROWS * PANEL_ROW_BYTES;
    /// Bytes of tiles, which are aligned to eight rows of a panel.
    pub const TILE_BYTES: u32 = Self::WEIGHTS + 2 * Self::WEIGHTS_BYTES;

    const SLOTS: u32 = Self::STAGES * mbarrier::BYTES;
    const OF_ROWS: u32 = Self::SLOTS + 4 * STEP;
    const FLAGS: u32 = Self::OF_ROWS + 4 * READER_WARPS * NARROW_TILE_ROWS;
    const NEXT_TASK: u32 = Self::FLAGS + 2 * 4;
    const QUERY_FACTORS: u32 = Self::NEXT_TASK + 8;
    /// Bytes of the rest, which is aligned to 8 bytes.
    pub const WORD_BYTES: u32 = Self::QUERY_FACTORS + 4 * NARROW_TILE_ROWS;

    /// The memory whose tiles, and whose other parts, lie at these addresses.
    #[inline(always)]
    pub fn at(tiles: u32, words: u32) -> Self {
        Self { tiles, words }
    }

    /// Makes the barriers.
    ///
    /// # Safety
    ///
    /// Reached by one thread, before a barrier of the whole block.
    pub unsafe fn init(&self) {
        for stage in 0..Self::STAGES {
            mbarrier::init(self.words + stage * mbarrier::BYTES, READER_WARPS);
        }
        store_shared(self.flag(0), 0);
        store_shared(self.flag(1), 0);
    }

    #[inline(always)]
    fn queries(&self) -> QueryRows<DIM_BLOCKS> {
        QueryRows::<DIM_BLOCKS>::at(self.tiles + Self::QUERIES)
    }

    /// Exponentials of a step.
    #[inline(always)]
    fn weights(&self, step: u32) -> Weights {
        Weights::at(self.tiles + Self::WEIGHTS + step % 2 * Self::WEIGHTS_BYTES)
    }

    /// Slots of a warp's columns.
    #[inline(always)]
    fn slots(&self, warp: u32) -> u32 {
        self.words + Self::SLOTS + 4 * WARP_COLUMNS * warp
    }

    /// A warp's number for a row.
    #[inline(always)]
    fn of_row(&self, warp: u32, row: u32) -> u32 {
        self.words + Self::OF_ROWS + 4 * (warp * NARROW_TILE_ROWS + row)
    }

    /// Whether a score of a step is out of range.
    #[inline(always)]
    fn flag(&self, step: u32) -> u32 {
        self.words + Self::FLAGS + step % 2 * 4
    }

    /// What products with a row of Q in float16 must be multiplied with, where that was made of bf16.
    #[inline(always)]
    fn query_factor(&self, row: u32) -> u32 {
        self.words + Self::QUERY_FACTORS + 4 * row
    }

    /// The next task.
    #[inline(always)]
    fn next_task(&self) -> u32 {
        self.words + Self::NEXT_TASK
    }
}

/// The stage of K and V whose turn it is.
#[derive(Clone, Copy)]
struct Stage<const DIM_BLOCKS: usize, const CHUNKS: usize> {
    memory: ReaderMemory<DIM_BLOCKS, CHUNKS>,
    index: u32,
    /// Parity of the phase of its barrier.
    parity: u32,
}

impl<const DIM_BLOCKS: usize, const CHUNKS: usize> Stage<DIM_BLOCKS, CHUNKS> {
    #[inline(always)]
    fn barrier(&self) -> u32 {
        self.memory.words + self.index * mbarrier::BYTES
    }

    #[inline(always)]
    fn tile(&self) -> StepTile<CHUNKS> {
        StepTile::<CHUNKS>::at(self.memory.tiles).skip_tiles(self.index)
    }

    /// Waits until it is full.
    #[inline(always)]
    unsafe fn wait_full(&self) {
        mbarrier::wait(self.barrier(), self.parity);
    }

    /// On to the next.
    #[inline(always)]
    fn advance(&mut self) {
        let wraps = self.index + 1 == ReaderMemory::<DIM_BLOCKS, CHUNKS>::STAGES;
        self.index = if wraps { 0 } else { self.index + 1 };
        self.parity ^= u32::from(wraps);
    }
}

/// What brings the warp's columns of K and V, step after step.
struct Loader<'a, const DIM_BLOCKS: usize, const CHUNKS: usize, const STORED: bool> {
    task: &'a Task,
    window: RunWindow,
    /// The stage that is filled next.
    stage: Stage<DIM_BLOCKS, CHUNKS>,
    warp: u32,
    lane: u32,
    /// First column of the step whose K is to be brought next.
    step: u32,
    /// The slots of the step whose K was brought last: of the warp's columns, one a lane.
    slot: u32,
    /// Those of the step after it.
    next_slot: u32,
}

impl<const DIM_BLOCKS: usize, const CHUNKS: usize, const STORED: bool> Loader<'_, DIM_BLOCKS, CHUNKS, STORED> {
    /// Has K of the next step brought, if there is one.
    #[inline(always)]
    unsafe fn load_k(&mut self) {
        if self.step < self.task.item.column_end {
            self.slot = self.next_slot;
            self.fill(self.k_maps());
            if self.step + STEP < self.task.item.column_end {
                self.find_slots(self.step + STEP);
            }
        }
        self.step += STEP;
    }

    /// Has V brought of the step whose K was brought last, if there was one.
    #[inline(always)]
    unsafe fn load_v(&mut self) {
        if self.step < self.task.item.column_end + STEP {
            self.fill(self.v_maps());
        }
    }

    #[inline(always)]
    fn k_maps(&self) -> u64 {
        if STORED { self.task.params.narrow_kv_maps } else { self.task.params.kv_maps }
    }

    #[inline(always)]
    fn v_maps(&self) -> u64 {
        self.k_maps() + u64::from(NUM_KV_BOXES * TENSOR_MAP_BYTES)
    }

    /// Finds the slots of the warp's columns of a step, and has their K and V brought to the L2 cache if one run holds all of
    /// them: there is more room there than in shared memory. Behind the last column, slots are such where there are zeros.
    #[inline(always)]
    unsafe fn find_slots(&mut self, step: u32) {
        let (k_maps, v_maps) = (self.k_maps(), self.v_maps());
        let Self { task, lane, window, .. } = self;
        let (lane, begin) = (opaque(*lane), step + self.warp * WARP_COLUMNS);
        let holds_all = window.begin <= begin && window.end >= begin + WARP_COLUMNS;
        if warp::any(holds_all) {
            let holder = warp::lanes_where(holds_all).trailing_zeros();
            let first = warp::uniform(warp::shuffle_from(window.slot_of(begin), holder));
            self.next_slot = first + lane;
            if lane == 0 && ReaderMemory::<DIM_BLOCKS, CHUNKS>::PREFETCHES {
                StepCopies::<CHUNKS>::prefetch_rows(k_maps, first, task.kv_head, ALL_COLUMNS);
                StepCopies::<CHUNKS>::prefetch_rows(v_maps, first, task.kv_head, ALL_COLUMNS);
            }
            return;
        }
        let (slots, end) = (self.stage.memory.slots(self.warp), core::cmp::min(begin + WARP_COLUMNS, task.item.column_end));
        loop {
            for column in 0..WARP_COLUMNS {
                let is_of_run = begin + column >= window.begin && begin + column < window.end;
                store_shared_if(slots + 4 * column, window.slot_of(begin + column), is_of_run);
            }
            if window.reaches(end) {
                break;
            }
            window.advance(&task.params, &task.item, lane);
        }
        warp::sync();
        let of_lane = load_shared(slots + 4 * (lane % WARP_COLUMNS));
        self.next_slot = if begin + lane < end { of_lane } else { NO_SLOT + lane };
        warp::sync();
    }

    /// Has the copy engine fill the warp's part of the stage: by one box if the slots follow each other, by a box for each half
    /// where only these do, else by one for each slot.
    #[inline(always)]
    unsafe fn fill(&mut self, maps: u64) {
        let Self { task, stage, slot, .. } = *self;
        let lane = opaque(self.lane);
        let copies = BoxCopies { tile: stage.tile(), maps, kv_head: task.kv_head, barrier: stage.barrier(), read_once: false };
        let first_row = self.warp * WARP_COLUMNS;
        mbarrier::arrive_expecting_if(copies.barrier, StepTile::<CHUNKS>::BYTES / READER_WARPS, lane == 0);
        let follows = slot == warp::shuffle_up(slot, 1).wrapping_add(1);
        if !warp::any(!follows && lane > 0 && lane < WARP_COLUMNS) {
            // With what is the same for all lanes, as the compiler can see.
            let first = warp::uniform(slot);
            if lane == 0 {
                copies.copy_rows(first, first_row, ALL_COLUMNS);
            }
        } else {
            // No box before the barrier knows of its bytes.
            warp::sync();
            let half_follows = warp::lanes_where(follows) >> (lane & 8) & 0xfe == 0xfe;
            let log2 = if half_follows { HALF_OF_COLUMNS } else { 0 };
            if lane < WARP_COLUMNS && (!half_follows || lane % 8 == 0) {
                copies.copy_rows(slot, first_row + lane, log2);
            }
            warp::sync();
        }
        self.stage.advance();
    }
}

/// The softmax of a tile, whose columns the warps share: an origin of each row, the same in all of them, that seldom moves (see
/// [`LazySoftmax`](super::softmax::LazySoftmax)), and the sums of the lane's exponentials.
struct Softmax {
    /// What is added to scaled scores: minus the origin, or [`NOTHING_SEEN`].
    offset: OfRows,
    sum: OfRows,
}

impl Softmax {
    const NOTHING: Self = Self { offset: [[NOTHING_SEEN; 2]; ROW_BLOCKS], sum: [[0.0; 2]; ROW_BLOCKS] };

    #[inline(always)]
    fn is_out_of_range(offset: f32, scaled: f32) -> bool {
        scaled > RANGE_LOG2 - offset
    }

    /// Whether a scaled score of the lane is out of range.
    #[inline(always)]
    fn any_out_of_range(&self, scale_log2: &OfRows, scores: &Transposed) -> bool {
        let mut any = false;
        for (block, fragment) in scores.iter().enumerate() {
            for i in 0..2 {
                let greatest = math::max(fragment[i], fragment[2 + i]);
                any |= Self::is_out_of_range(self.offset[block][i], greatest * scale_log2[block][i]);
            }
        }
        any
    }

    /// The exponentials of scores.
    #[inline(always)]
    fn exponentials(&self, scale_log2: &OfRows, scores: &Transposed) -> Transposed {
        let mut exponentials = *scores;
        for (block, fragment) in exponentials.iter_mut().enumerate() {
            let [a, b] = self.offset[block];
            let [scale_a, scale_b] = scale_log2[block];
            let exp = |score: f32, scale: f32, offset: f32| math::exp2(math::fma(score, scale, offset));
            *fragment = [
                exp(fragment[0], scale_a, a),
                exp(fragment[1], scale_b, b),
                exp(fragment[2], scale_a, a),
                exp(fragment[3], scale_b, b),
            ];
        }
        exponentials
    }

    /// Moves the origins of rows that have scores out of range; returns what sums and output are multiplied with.
    ///
    /// # Safety
    ///
    /// Reached by all threads of the readers.
    #[inline(always)]
    unsafe fn make_room<const DIM_BLOCKS: usize, const CHUNKS: usize>(
        &mut self,
        memory: ReaderMemory<DIM_BLOCKS, CHUNKS>,
        scale_log2: &OfRows,
        scores: &Transposed,
        warp: u32,
        lane: u32,
    ) -> OfRows {
        for (block, fragment) in scores.iter().enumerate() {
            for i in 0..2 {
                let greatest = warp::column_max(math::max(fragment[i], fragment[2 + i]));
                store_shared_if(memory.of_row(warp, row_of_lane(block, i, lane)), greatest.to_bits(), lane < 4);
            }
        }
        meet();
        let mut factors = [[1.0; 2]; ROW_BLOCKS];
        for block in 0..ROW_BLOCKS {
            for i in 0..2 {
                let of_warp = |warp| load_shared_f32(memory.of_row(warp, row_of_lane(block, i, lane)));
                let greatest = math::max(math::max(of_warp(0), of_warp(1)), math::max(of_warp(2), of_warp(3)));
                let greatest = greatest * scale_log2[block][i];
                let before = self.offset[block][i];
                // Each row goes by its own scores alone.
                if Self::is_out_of_range(before, greatest) {
                    self.offset[block][i] = math::min(before, -greatest);
                }
                if before != NOTHING_SEEN {
                    factors[block][i] = math::exp2(self.offset[block][i] - before);
                }
                self.sum[block][i] *= factors[block][i];
            }
        }
        factors
    }

    /// Takes exponentials in.
    #[inline(always)]
    fn add(&mut self, exponentials: &Transposed) {
        for (block, fragment) in exponentials.iter().enumerate() {
            self.sum[block][0] += fragment[0] + fragment[2];
            self.sum[block][1] += fragment[1] + fragment[3];
        }
    }

    /// The sums of the rows, when all columns were taken in.
    ///
    /// # Safety
    ///
    /// Reached by all threads of the readers.
    #[inline(always)]
    unsafe fn finish<const DIM_BLOCKS: usize, const CHUNKS: usize>(
        &self,
        memory: ReaderMemory<DIM_BLOCKS, CHUNKS>,
        warp: u32,
        lane: u32,
    ) -> [[RowSum; 2]; ROW_BLOCKS] {
        for block in 0..ROW_BLOCKS {
            for i in 0..2 {
                let sum = warp::column_sum(self.sum[block][i]);
                store_shared_if(memory.of_row(warp, row_of_lane(block, i, lane)), sum.to_bits(), lane < 4);
            }
        }
        meet();
        let mut sums = [[RowSum::NOTHING; 2]; ROW_BLOCKS];
        for block in 0..ROW_BLOCKS {
            for i in 0..2 {
                let of_warp = |warp| load_shared_f32(memory.of_row(warp, row_of_lane(block, i, lane)));
                let total = of_warp(0) + of_warp(1) + (of_warp(2) + of_warp(3));
                sums[block][i] = RowSum::new(total, -self.offset[block][i]);
            }
        }
        sums
    }
}

/// Does narrow tasks until none is left.
///
/// # Safety
///
/// Reached by all threads of the readers, of which this is `thread`.
#[inline(always)]
pub unsafe fn run<
    E: Element,
    W: Element,
    const DIM_BLOCKS: usize,
    const FRAGMENTS: usize,
    const CHUNKS: usize,
    const STORED: bool,
>(
    params: &AttentionParams,
    shared: Shared<DIM_BLOCKS, FRAGMENTS, PAIR, Readers<STORED>>,
    thread: u32,
) where
    Transposed: Accumulator<W>,
{
    let warp = warp::uniform(thread / LANES);
    let memory = shared.reader_memory::<CHUNKS>();
    let mut stage = Stage { memory, index: 0, parity: 0 };
    let mut index = ReaderQueue::first_task(params);
    while index != NO_TASK {
        // In FP8, their quotients are worked out for each task: else they take registers of all warps of the block.
        let heads =
            if STORED { HeadGroups { num_kv_heads: opaque(params.heads.num_kv_heads), ..params.heads } } else { params.heads };
        let task = Task::load(AttentionParams { heads, ..*params }, index, shared.reader_rows());
        // Opaque, here and below: what depends on the lane is worked out again where it is used, and not kept in registers and
        // predicates.
        tile::<E, W, DIM_BLOCKS, CHUNKS, STORED>(&task, &mut stage, warp, opaque(thread % LANES));
        meet();
        index = load_shared(memory.next_task());
    }
    if thread == 0 {
        readers_leave(params);
    }
}

/// Waits for all warps of the readers.
#[inline(always)]
unsafe fn meet() {
    warpgroup::sync(barrier::READERS, warpgroup::THREADS);
}

/// Does a task, whose first K and V go to `stage`.
#[inline(always)]
unsafe fn tile<E: Element, W: Element, const DIM_BLOCKS: usize, const CHUNKS: usize, const STORED: bool>(
    task: &Task,
    stage: &mut Stage<DIM_BLOCKS, CHUNKS>,
    warp: u32,
    lane: u32,
) where
    Transposed: Accumulator<W>,
{
    let stages = const { ReaderMemory::<DIM_BLOCKS, CHUNKS>::STAGES };
    let (item, memory, rows) = (&task.item, stage.memory, task.rows);
    if let Some(stamper) = Stamper::of(&task.params).filter(|_| warp == 0 && lane == 0) {
        stamper.begin(task.index);
    }
    let window = RunWindow::new(&task.params, item, lane);
    let (step, slot) = (item.column_begin, NO_SLOT);
    let mut loader =
        Loader::<DIM_BLOCKS, CHUNKS, STORED> { task, window, stage: *stage, warp, lane, step, slot, next_slot: slot };
    loader.find_slots(step);
    for _ in 0..stages / 2 {
        loader.load_k();
        loader.load_v();
    }
    if stages % 2 == 1 {
        loader.load_k();
    }
    let view = begin::<E, DIM_BLOCKS, CHUNKS, STORED>(task, memory, warp, opaque(lane));

    let [k_scale, v_scale] = if STORED { task.kv_scales() } else { [1.0; 2] };
    let mut scale_log2 = [[task.params.scale_log2 * k_scale; 2]; ROW_BLOCKS];
    if STORED && !E::IS_OF_F16 {
        for (block, of_rows) in scale_log2.iter_mut().enumerate() {
            for (i, of_row) in of_rows.iter_mut().enumerate() {
                *of_row *= load_shared_f32(memory.query_factor(row_of_lane(block, i, lane)));
            }
        }
    }
    let mut softmax = Softmax::NOTHING;
    let mut output = [[[0f32; 4]; ROW_BLOCKS]; MOST_PANELS];
    let columns = item.column_begin..item.column_end;
    // Of most tiles every row sees every column, and only what lies behind the last is masked.
    let masked_from = if view.sees_all(columns.start, columns.end - columns.start) {
        columns.end - (columns.end - columns.start) % STEP
    } else {
        columns.start
    };
    let mut column = columns.start;
    let mut step = 0;
    while column < columns.end {
        stage.wait_full();
        let mut scores = if STORED {
            score_stored::<W, DIM_BLOCKS, CHUNKS>(memory, stage.tile(), warp, opaque(lane))
        } else {
            score::<W, DIM_BLOCKS, CHUNKS>(memory, stage.tile())
        };
        stage.advance();
        if column >= masked_from {
            mask(&mut scores, rows, column + warp * WARP_COLUMNS, opaque(lane));
        }
        let lane = opaque(lane);
        let is_out_of_range = warp::any(softmax.any_out_of_range(&scale_log2, &scores));
        store_shared_if(memory.flag(step), 1, is_out_of_range && lane == 0);
        let mut exponentials = softmax.exponentials(&scale_log2, &scores);
        write_weights::<W>(memory.weights(step), &exponentials, warp, lane);
        wgmma::fence_shared_writes();
        meet();
        if load_shared(memory.flag(step)) != 0 {
            let factors = softmax.make_room(memory, &scale_log2, &scores, warp, lane);
            for output in &mut output {
                for (fragment, [a, b]) in output.iter_mut().zip(&factors) {
                    *fragment = [fragment[0] * a, fragment[1] * b, fragment[2] * a, fragment[3] * b];
                }
            }
            exponentials = softmax.exponentials(&scale_log2, &scores);
            write_weights::<W>(memory.weights(step), &exponentials, warp, lane);
            wgmma::fence_shared_writes();
            meet();
            if warp == 0 && lane == 0 {
                store_shared(memory.flag(step), 0);
            }
        }
        softmax.add(&exponentials);
        // All warps have done with this step's K, and with V of the step before: what comes as many stages behind takes their
        // places.
        if stages % 2 == 1 {
            if step > 0 {
                loader.load_k();
            }
            loader.load_v();
        } else {
            if step > 0 {
                loader.load_v();
            }
            loader.load_k();
        }
        stage.wait_full();
        if STORED {
            accumulate_stored::<W, DIM_BLOCKS, CHUNKS>(&mut output, memory.weights(step), stage.tile(), step > 0, warp, lane);
        } else {
            accumulate::<W, DIM_BLOCKS, CHUNKS>(&mut output, memory.weights(step), stage.tile(), step > 0);
        }
        stage.advance();
        column += STEP;
        step += 1;
    }

    let lane = opaque(lane);
    let sums = softmax.finish(memory, warp, lane);
    finish::<E, DIM_BLOCKS, STORED>(task, &output, &sums, v_scale, warp, lane);
    if let Some(stamper) = Stamper::of(&task.params).filter(|_| opaque(warp) == 0 && lane == 0) {
        stamper.end(task.index);
    }
}

/// Works out the task's rows, brings Q, and tells of the next task. Returns what the rows see.
#[inline(always)]
unsafe fn begin<E: Element, const DIM_BLOCKS: usize, const CHUNKS: usize, const STORED: bool>(
    task: &Task,
    memory: ReaderMemory<DIM_BLOCKS, CHUNKS>,
    warp: u32,
    lane: u32,
) -> WarpView {
    let params = &task.params;
    if warp == 0 && lane < NARROW_TILE_ROWS {
        task.rows.write(params, &task.item, task.head_group, lane);
    }
    warp::sync();
    meet();
    // The next ticket is on its way together with Q.
    let leads = warp == 0 && lane == 0;
    let mut ticket = 0;
    if leads {
        ticket = ReaderQueue::draw(params);
    }
    let row_chunks = const { DIM_BLOCKS as u32 };
    let mut chunk = warp * LANES + lane;
    while chunk < NARROW_TILE_ROWS * row_chunks {
        let (row, chunk_of_row) = (chunk / row_chunks, chunk % row_chunks);
        let index = task.rows.index(row);
        let mut words = [0; 4];
        if index != NO_ROW {
            let bytes = 8 * ELEMENT_BYTES;
            words = load_global_x4(params.q + u64::from(index) * u64::from(row_chunks * bytes) + u64::from(chunk_of_row * bytes));
        }
        let panel = memory.queries().panel_of(chunk_of_row / PANEL_BLOCKS as u32);
        let chunk_of_panel = chunk_of_row % PANEL_BLOCKS as u32;
        if STORED {
            if !E::IS_OF_F16 {
                let scale = ScaleToF16::of_greatest(greatest_of_row::<DIM_BLOCKS>(words));
                words = words.map(|word| scale.pair(word, max_u16x2));
                store_shared_if(memory.query_factor(row), scale.inverse().to_bits(), chunk_of_row == 0);
            }
            // In the order in which a lane holds four neighbours of K.
            let (pair, half_bytes) = (chunk_of_panel & !1, chunk_of_panel % 2 * 8);
            let [a, b, c, d] = words.map(f32::from_bits);
            store_shared_f32x2(panel.chunk(row, pair) + half_bytes, a, c);
            store_shared_f32x2(panel.chunk(row, pair + 1) + half_bytes, b, d);
        } else {
            store_shared_x4(panel.chunk(row, chunk_of_panel), words);
        }
        chunk += warpgroup::THREADS;
    }
    if leads {
        store_shared(memory.next_task(), ReaderQueue::task(params, ticket));
    }
    let view = WarpView::of(task.rows.read(lane % NARROW_TILE_ROWS));
    wgmma::fence_shared_writes();
    meet();
    view
}

/// Either half is the greatest magnitude of a row of Q, of which this lane has a chunk, and lanes beside it the others.
#[inline(always)]
unsafe fn greatest_of_row<const DIM_BLOCKS: usize>(words: [u32; 4]) -> u32 {
    const { assert!(DIM_BLOCKS == 8 || DIM_BLOCKS == 16) };
    let [a, b, c, d] = words.map(ScaleToF16::magnitudes);
    let of_quad = warp::quad_max_u16x2(max_u16x2(max_u16x2(a, b), max_u16x2(c, d)));
    let other = |value: u32, lane: u32| warp::shuffle_xor(f32::from_bits(value), lane).to_bits();
    let of_eight = max_u16x2(of_quad, other(of_quad, 4));
    if DIM_BLOCKS > 8 { max_u16x2(of_eight, other(of_eight, 8)) } else { of_eight }
}

/// Scores of a step.
#[inline(always)]
unsafe fn score<E, const DIM_BLOCKS: usize, const CHUNKS: usize>(
    memory: ReaderMemory<DIM_BLOCKS, CHUNKS>,
    k: StepTile<CHUNKS>,
) -> Transposed
where
    Transposed: Accumulator<E>,
{
    let mut scores = [[0f32; 4]; ROW_BLOCKS];
    let k = Descriptor::along_sum(k.row(0, 0), StepTile::<CHUNKS>::EIGHT_ROWS_BYTES);
    let queries = Descriptor::along_sum(memory.queries().row(0), 8 * PANEL_ROW_BYTES);
    scores.hold();
    wgmma::fence();
    for block in (0..DIM_BLOCKS).step_by(2) {
        let (panel, byte) = ((block / PANEL_BLOCKS) as u32, (block % PANEL_BLOCKS * 16) as u32);
        let k = k.skip(panel * StepTile::<CHUNKS>::PANEL_BYTES + byte);
        let queries = queries.skip(panel * QueryRows::<DIM_BLOCKS>::PANEL_BYTES + byte);
        scores.add_product_shared(k, queries, block > 0);
    }
    wgmma::commit_group();
    wgmma::wait_group::<0>();
    scores.hold();
    scores
}

/// Scores of a step whose K is in FP8: operands A come out of registers, of the warp's own columns.
#[inline(always)]
unsafe fn score_stored<W, const DIM_BLOCKS: usize, const CHUNKS: usize>(
    memory: ReaderMemory<DIM_BLOCKS, CHUNKS>,
    k: StepTile<CHUNKS>,
    warp: u32,
    lane: u32,
) -> Transposed
where
    Transposed: Accumulator<W>,
{
    let mut scores = [[0f32; 4]; ROW_BLOCKS];
    let k = k.columns_by_lane(warp * WARP_COLUMNS, lane);
    let queries = Descriptor::along_sum(memory.queries().row(0), 8 * PANEL_ROW_BYTES);
    scores.hold();
    // One panel of Q after the other: operands must be in registers before the first product, and there are few.
    score_panel::<W, DIM_BLOCKS, CHUNKS>(&mut scores, k, queries, 0);
    if DIM_BLOCKS > PANEL_BLOCKS {
        wgmma::wait_group::<0>();
        score_panel::<W, DIM_BLOCKS, CHUNKS>(&mut scores, k, queries, 1);
    }
    wgmma::wait_group::<0>();
    scores.hold();
    scores
}

/// Starts the products with a panel of Q.
#[inline(always)]
unsafe fn score_panel<W, const DIM_BLOCKS: usize, const CHUNKS: usize>(
    scores: &mut Transposed,
    k: LaneRow,
    queries: Descriptor,
    panel: usize,
) where
    Transposed: Accumulator<W>,
{
    let mut operands = [[0; 4]; OPERANDS_AT_ONCE];
    for load in 0..OPERANDS_AT_ONCE / PRODUCTS_OF_LOAD {
        let loaded = StepTile::<CHUNKS>::operands_b(k, 2 * (panel * OPERANDS_AT_ONCE / PRODUCTS_OF_LOAD + load));
        for product in 0..PRODUCTS_OF_LOAD {
            operands[PRODUCTS_OF_LOAD * load + product] = keys(loaded, product);
        }
    }
    hold_operands(&mut operands);
    wgmma::fence();
    let queries = queries.skip(panel as u32 * QueryRows::<DIM_BLOCKS>::PANEL_BYTES);
    for (index, &operand) in operands.iter().enumerate() {
        scores.add_product_along(operand, queries.skip(32 * index as u32), panel + index > 0);
    }
    wgmma::commit_group();
}

/// Operands A that are in registers at a time.
const OPERANDS_AT_ONCE: usize = 4;

/// Makes the compiler believe that operands change here.
#[inline(always)]
fn hold_operands(operands: &mut [OperandA; OPERANDS_AT_ONCE]) {
    let mut words = [[0; 2]; 2 * OPERANDS_AT_ONCE];
    for (index, &[a, b, c, d]) in operands.iter().enumerate() {
        (words[2 * index], words[2 * index + 1]) = ([a, b], [c, d]);
    }
    hold_words(&mut words);
    for (index, operand) in operands.iter_mut().enumerate() {
        let ([a, b], [c, d]) = (words[2 * index], words[2 * index + 1]);
        *operand = [a, b, c, d];
    }
}

/// Operands that a load of K or V in FP8 is good for.
const PRODUCTS_OF_LOAD: usize = 2;

/// The operand A of product `product` with K in FP8 that was loaded as operands B: their columns are its rows. A word has four
/// neighbours of a column, which are summed over as Q has them.
#[inline(always)]
fn keys(loaded: [OperandB; 2], product: usize) -> OperandA {
    let [[a, c], [b, d]] = loaded.map(|words| four_to_f16(words[product]));
    [a, b, c, d]
}

/// The operand A of V in FP8 that was loaded transposed as operand B. A word has two neighbours of a column, which are elements
/// of rows `l / 4` and `l / 4 + 8`, then those of the next column.
#[inline(always)]
fn values(loaded: OperandB) -> OperandA {
    let [[a, b], [c, d]] = loaded.map(|word| four_to_f16(permute::<0x3120>(word)));
    [a, b, c, d]
}

/// Masks the scores of the warp's columns, from `column` on.
#[inline(always)]
unsafe fn mask(scores: &mut Transposed, rows: RowTable, column: u32, lane: u32) {
    let columns = [column + lane / 4, column + lane / 4 + 8];
    let masked = |score: f32, Row { begin, end, .. }: Row, column: u32| {
        if column >= begin && column < end { score } else { f32::NEG_INFINITY }
    };
    for (block, fragment) in scores.iter_mut().enumerate() {
        let [a, b] = [rows.read(row_of_lane(block, 0, lane)), rows.read(row_of_lane(block, 1, lane))];
        *fragment = [
            masked(fragment[0], a, columns[0]),
            masked(fragment[1], b, columns[0]),
            masked(fragment[2], a, columns[1]),
            masked(fragment[3], b, columns[1]),
        ];
    }
}

/// Writes down the exponentials of the warp's columns, row by row.
#[inline(always)]
unsafe fn write_weights<E: Element>(weights: Weights, exponentials: &Transposed, warp: u32, lane: u32) {
    let [first, second] = exponentials.map(|fragment| [E::pack(fragment[0], fragment[1]), E::pack(fragment[2], fragment[3])]);
    // Matrix `lane / 8`: the block of 8 rows, and the half of the warp's columns.
    let (block, half) = (lane / 16, lane / 8 % 2);
    let row = weights.chunk(8 * block + lane % 8, warp * (WARP_COLUMNS / 8) + half);
    store_matrices_transposed(row, [first[0], first[1], second[0], second[1]]);
}

/// Adds Vᵀ Pᵀ of a step to the output, or replaces it.
#[inline(always)]
unsafe fn accumulate<E, const DIM_BLOCKS: usize, const CHUNKS: usize>(
    output: &mut [Transposed; MOST_PANELS],
    weights: Weights,
    v: StepTile<CHUNKS>,
    accumulate: bool,
) where
    Transposed: Accumulator<E>,
{
    let panels = const { DIM_BLOCKS / PANEL_BLOCKS };
    let (eight_rows_bytes, panel_bytes) = const { (StepTile::<CHUNKS>::EIGHT_ROWS_BYTES, StepTile::<CHUNKS>::PANEL_BYTES) };
    let v = Descriptor::across_sum(v.row(0, 0), panel_bytes, eight_rows_bytes);
    let weights = Descriptor::along_sum(weights.chunk(0, 0), 8 * PANEL_ROW_BYTES);
    for output in &mut output[..panels] {
        output.hold();
    }
    wgmma::fence();
    for panel in 0..panels {
        for block in (0..STEP / 8).step_by(2) {
            let v = v.skip(panel as u32 * panel_bytes + block * eight_rows_bytes);
            output[panel].add_product_shared_across(v, weights.skip(block * 16), accumulate || block > 0);
        }
    }
    wgmma::commit_group();
    wgmma::wait_group::<0>();
    for output in &mut output[..panels] {
        output.hold();
    }
}

/// The same for V in FP8: operands A come out of registers. Each warp has 16 elements of each panel of O, of one chunk of V.
#[inline(always)]
unsafe fn accumulate_stored<W, const DIM_BLOCKS: usize, const CHUNKS: usize>(
    output: &mut [Transposed; MOST_PANELS],
    weights: Weights,
    v: StepTile<CHUNKS>,
    accumulate: bool,
    warp: u32,
    lane: u32,
) where
    Transposed: Accumulator<W>,
{
    let panels = const { DIM_BLOCKS / PANEL_BLOCKS };
    let weights = Descriptor::along_sum(weights.chunk(0, 0), 8 * PANEL_ROW_BYTES);
    for output in &mut output[..panels] {
        output.hold();
    }
    accumulate_operands::<W, DIM_BLOCKS, CHUNKS>(output, weights, v, accumulate, 0, warp, lane);
    if DIM_BLOCKS > PANEL_BLOCKS {
        wgmma::wait_group::<0>();
        accumulate_operands::<W, DIM_BLOCKS, CHUNKS>(output, weights, v, true, STEP / 2, warp, lane);
    }
    wgmma::wait_group::<0>();
    for output in &mut output[..panels] {
        output.hold();
    }
}

/// Starts the products with as many [operands](OPERANDS_AT_ONCE) of V, from column `begin` of the step on.
#[inline(always)]
unsafe fn accumulate_operands<W, const DIM_BLOCKS: usize, const CHUNKS: usize>(
    output: &mut [Transposed; MOST_PANELS],
    weights: Descriptor,
    v: StepTile<CHUNKS>,
    accumulate: bool,
    begin: u32,
    warp: u32,
    lane: u32,
) where
    Transposed: Accumulator<W>,
{
    let panels = const { DIM_BLOCKS / PANEL_BLOCKS };
    let chunk = first_chunk(panels, warp);
    let mut operands = [[0; 4]; OPERANDS_AT_ONCE];
    // A load has 16 columns of a chunk for each of two panels, or 32 of the only one.
    let columns_of_load = if panels > 1 { 16 } else { 32 };
    for load in 0..OPERANDS_AT_ONCE / PRODUCTS_OF_LOAD {
        let columns = begin + columns_of_load * load as u32;
        let row = if panels > 1 {
            v.chunks_by_lane_transposed::<16>(columns, chunk, lane)
        } else {
            v.chunks_by_lane_transposed::<32>(columns, chunk, lane)
        };
        let loaded = StepTile::<CHUNKS>::operands_b_transposed(row, 0);
        for product in 0..PRODUCTS_OF_LOAD {
            operands[PRODUCTS_OF_LOAD * load + product] = values(loaded[product]);
        }
    }
    hold_operands(&mut operands);
    wgmma::fence();
    for load in 0..OPERANDS_AT_ONCE / PRODUCTS_OF_LOAD {
        let columns = begin + columns_of_load * load as u32;
        for product in 0..PRODUCTS_OF_LOAD {
            let (panel, column) = if panels > 1 { (product, columns) } else { (0, columns + 16 * product as u32) };
            let operand = operands[PRODUCTS_OF_LOAD * load + product];
            output[panel].add_product_along(operand, weights.skip(2 * column), accumulate || column > begin);
        }
    }
    wgmma::commit_group();
}

/// The chunk of V in FP8 whose elements a warp has in the first panel of O; those of the next panel are of the next chunk.
#[inline(always)]
fn first_chunk(panels: usize, warp: u32) -> u32 {
    panels as u32 * warp
}

/// Stores the rows of the tile, which must be multiplied with `factor`, and their log-sum-exp.
#[inline(always)]
unsafe fn finish<E: Element, const DIM_BLOCKS: usize, const STORED: bool>(
    task: &Task,
    output: &[Transposed; MOST_PANELS],
    sums: &[[RowSum; 2]; ROW_BLOCKS],
    factor: f32,
    warp: u32,
    lane: u32,
) {
    let (dim, panels) = const { (8 * DIM_BLOCKS as u64, DIM_BLOCKS / PANEL_BLOCKS) };
    let mut inverse = [[0f32; 2]; ROW_BLOCKS];
    for block in 0..ROW_BLOCKS {
        for i in 0..2 {
            let row = row_of_lane(block, i, lane);
            let (index, mut sum) = (task.rows.index(row), sums[block][i]);
            if task.has_sinks() && index != NO_ROW {
                sum = sum.with_sink(store::sink_log2(task, index));
            }
            if task.stores_lse() && index != NO_ROW && warp == 0 && lane < 4 {
                store::lse(task, row, index, sum.lse_log2);
            }
            inverse[block][i] = if STORED { sum.inverse * factor } else { sum.inverse };
        }
    }
    if STORED {
        store_neighbours::<E, DIM_BLOCKS>(task, output, &inverse, warp, lane);
        return;
    }
    // Two lanes that hold neighbouring elements of the same two rows exchange one each, so that either has both elements of one
    // row.
    let is_odd = lane / 4 % 2 == 1;
    let mut pairs = [[[[0f32; 2]; 2]; ROW_BLOCKS]; MOST_PANELS];
    for panel in 0..panels {
        for block in 0..ROW_BLOCKS {
            for half in 0..2 {
                let fragment = &output[panel][block];
                let (a, b) = (fragment[2 * half] * inverse[block][0], fragment[2 * half + 1] * inverse[block][1]);
                let received = warp::shuffle_xor(if is_odd { a } else { b }, 4);
                pairs[panel][block][half] = if is_odd { [received, b] } else { [a, received] };
            }
        }
    }
    let first_element = 16 * warp + lane / 4 - u32::from(is_odd);
    for block in 0..ROW_BLOCKS {
        let row = row_of_lane(block, 0, lane) + u32::from(is_odd);
        let index = task.rows.index(row);
        for panel in 0..panels {
            for half in 0..2 {
                let [a, b] = pairs[panel][block][half];
                let element = u64::from(64 * panel as u32 + 8 * half as u32 + first_element);
                if index != NO_ROW && element < dim {
                    store_pair::<E>(task, row, index, dim, element, [a, b]);
                }
            }
        }
    }
}

/// Stores rows of which a lane has neighbouring elements in both halves of a fragment, as [`accumulate_stored`] leaves them.
#[inline(always)]
unsafe fn store_neighbours<E: Element, const DIM_BLOCKS: usize>(
    task: &Task,
    output: &[Transposed; MOST_PANELS],
    factors: &OfRows,
    warp: u32,
    lane: u32,
) {
    let (dim, panels) = const { (8 * DIM_BLOCKS as u64, DIM_BLOCKS / PANEL_BLOCKS) };
    for block in 0..ROW_BLOCKS {
        for i in 0..2 {
            let row = row_of_lane(block, i, lane);
            let index = task.rows.index(row);
            if index == NO_ROW {
                continue;
            }
            for panel in 0..panels {
                let element = 16 * (first_chunk(panels, warp) + panel as u32) + lane / 4 * 2;
                let fragment = &output[panel][block];
                let pair = [fragment[i], fragment[2 + i]].map(|element| element * factors[block][i]);
                store_pair::<E>(task, row, index, dim, element.into(), pair);
            }
        }
    }
}

/// Stores two neighbouring elements of a row of the tile, which is row `index` of O.
#[inline(always)]
unsafe fn store_pair<E: Element>(task: &Task, row: u32, index: u32, dim: u64, element: u64, pair: [f32; 2]) {
    if task.is_direct() {
        let address = task.params.o + (u64::from(index) * dim + element) * u64::from(ELEMENT_BYTES);
        store_global(address, E::pack(pair[0], pair[1]));
    } else {
        store::partial_pair(task.params.partial_o + (task.partial_index(row) * dim + element) * 4, pair);
    }
}
