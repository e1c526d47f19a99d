//! The structures that the planner writes and the attention kernels read, defined once for both.
//!
//! A plan is a handful of flat arrays. A [`WorkItem`] is one tile over one range of columns:
//!
//! ```text
//!             columns: the KV slots of the tile's requests, run after run
//!            ┌───────────────┬───────────────┬──────── … ─┐   KvRun, KvRun, …
//!  RowSegment│ request A     │▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒│            │
//!            ├───────────────┼───────────────┤            │   ▒ no row may see it
//!  RowSegment│▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒│ request B     │            │
//!            └───────────────┴───────────────┴──────── … ─┘
//!   rows: (query token, query head) pairs of one head group
//! ```
//!
//! * The **rows** of a tile are the query tokens of its [`RowSegment`]s in order, each token `heads_per_group` rows tall: row
//!   `t * heads_per_group + h` is head `h` of the group for the tile's token `t`.
//! * The **columns** of a tile are the slots of consecutive [`KvRun`]s. Row segments say which interval of columns each row sees,
//!   under a causal mask and within a sliding window.
//! * A work item whose rows see columns outside its range writes *partials*: normalised O in float32 with its log-sum-exp,
//!   which a [`MergeToken`] names to be merged.
//! * Every work item is done once for every *head group*: `heads_per_group` consecutive query heads of one KV head. A plan
//!   says nothing about head groups, because all of them do the same.
//!
//! KV slots are copied as [`KvCopyPiece`]s, and written as [`KvAppendParams`] say; [`turn`], [`sin_cos`] and [`e4m3`] are the
//! arithmetic of that.
//!
//! Counts and indices are `u32`: the planner rejects what does not fit.
#![no_std]

mod attendance;
mod kv;
mod numbers;

use core::ops::Range;

pub use attendance::{Attendance, Share};
pub use kv::{
    KV_APPEND_THREADS, KV_MOVE_THREADS, KV_WIDEN_THREADS, KvAppendParams, KvCopyPiece, KvMoveParams, KvWidenParams, KvWidenPiece,
    PIECE_VECTORS, RopeLayout, VECTOR_BYTES, WIDEN_ELEMENTS, WIDEN_PIECE_SLOTS,
};
pub use numbers::{ScaleToF16, e4m3, sin_cos, turn};

/// The most rows of a [`TileKind::Wide`] tile that is not [tall](TALL_TILE_ROWS); see [`wide_tile_rows`].
pub const WIDE_TILE_ROWS: u32 = 128;
/// Rows of a wide tile of the `sm_90a` kernel for launches of wide tiles alone: those of three warpgroups.
pub const TALL_TILE_ROWS: u32 = 192;
/// Rows of a [`TileKind::Narrow`] tile: the least that the tensor cores' `m16n8k16` takes.
pub const NARROW_TILE_ROWS: u32 = 16;
/// Columns that a thread block takes at a time; the `sm_90a` kernel takes [more](hopper_column_step).
pub const COLUMN_STEP: u32 = 64;
/// Threads of a block of the `sm_80` attention kernel: four warps.
pub const ATTENTION_THREADS: u32 = 128;
/// Blocks of the `sm_80` attention kernel that a multiprocessor holds at a time.
pub const ATTENTION_BLOCKS_PER_SM: u32 = 2;
/// Dynamic shared memory of the `sm_80` attention kernel: 96 KiB for tiles of Q, K and V, and three words for each row of a wide
/// tile. It fits twice into a multiprocessor with 228 KiB (sm_90), and once into the smallest that has tensor cores for bf16 (100
/// KiB, sm_86 and sm_89).
pub const ATTENTION_SHARED_BYTES: u32 = TILE_SHARED_BYTES + ROW_TABLE_BYTES;
/// Threads of a block of the `sm_90a` attention kernel: a producer warpgroup and two consumer warpgroups.
pub const HOPPER_THREADS: u32 = 384;
/// Dynamic shared memory of the `sm_90a` attention kernel: tiles of Q, K and V (192 KiB), an exchange for narrow tiles (17.5 KiB
/// for a head dimension of 128), three row tables (6.75 KiB), barriers. One block an `sm_90` multiprocessor, which has 227 KiB.
pub const HOPPER_SHARED_BYTES: u32 = 220 * 1024;
/// Threads of a block of the `sm_90a` kernel that does narrow tiles beside wide ones: a warpgroup more.
pub const BESIDE_THREADS: u32 = HOPPER_THREADS + 128;
/// Dynamic shared memory of that kernel: tiles of Q, K and V of wide tiles (160 KiB for a head dimension of 128), and of narrow
/// ones (56 KiB), row tables, room to store O through, barriers.
pub const BESIDE_SHARED_BYTES: u32 = 227 * 1024;
/// Threads of a block of the `sm_90a` kernel for tall tiles: a producer warpgroup and three consumer warpgroups.
pub const TALL_THREADS: u32 = HOPPER_THREADS + 128;
/// Dynamic shared memory of that kernel: tiles of Q, K and V (176 KiB for a head dimension of 128), row tables, room to store O
/// through, barriers.
pub const TALL_SHARED_BYTES: u32 = 227 * 1024;
/// Threads of a block of the `sm_90a` kernel for K and V in FP8: a producer warpgroup, two consumer warpgroups, and one that
/// makes K and V of it.
pub const CONVERTING_THREADS: u32 = HOPPER_THREADS + 128;
/// Dynamic shared memory of that kernel: tiles of Q, K and V (160 KiB for a head dimension of 128), K and V as they are stored
/// (40 KiB), an exchange for narrow tiles, row tables, barriers.
pub const CONVERTING_SHARED_BYTES: u32 = 227 * 1024;
/// The part of [`ATTENTION_SHARED_BYTES`] that holds tiles.
pub const TILE_SHARED_BYTES: u32 = 96 * 1024;
/// The part of [`ATTENTION_SHARED_BYTES`] that holds the row table.
pub const ROW_TABLE_BYTES: u32 = 3 * 4 * WIDE_TILE_ROWS;
/// Bytes of a row table of the `sm_90a` kernels.
pub const HOPPER_ROW_TABLE_BYTES: u32 = 3 * 4 * TALL_TILE_ROWS;
/// Boxes of 1, 2, 4 … 128 slots, of which the `sm_90a` kernel puts runs of any length together.
pub const NUM_KV_BOXES: u32 = 8;
/// Boxes of 1, 2, 4 … 128 query tokens of a head group, of which the `sm_90a` kernel puts the rows of a tile together.
pub const NUM_QUERY_BOXES: u32 = 8;
/// Slots of a box that lie one after the other in each panel, before the next panel follows: what a swizzle of 128 bytes repeats
/// in.
pub const KV_BOX_GROUP: u32 = 8;
/// Elements of a box's rows: what a swizzle of 128 bytes spans.
pub const KV_BOX_ELEMENTS: u32 = 64;
/// Bytes of a tensor map.
pub const TENSOR_MAP_BYTES: u32 = 128;
/// Threads of a block of the merge kernel: four warps, which divide the sources of one token and head.
pub const MERGE_THREADS: u32 = 128;
/// Dynamic shared memory of the merge kernel: ten words for each thread, for a head dimension of 256.
pub const MERGE_SHARED_BYTES: u32 = 10 * 4 * MERGE_THREADS;
/// Threads of a block of the kernel that measures the tensor cores.
pub const MMA_RATE_THREADS: u32 = 128;
/// Floating-point operations of a block of that kernel in one iteration: 8 `m16n8k16` for each of 4 warps.
pub const MMA_RATE_FLOPS_PER_ITERATION: u64 = 4 * 8 * 2 * 16 * 8 * 16;
/// The most query heads in a head group, so that one token's rows fit any tile.
pub const MAX_HEADS_PER_GROUP: u32 = NARROW_TILE_ROWS;
/// [`WorkItem::partial_row`] of an item whose rows see no columns elsewhere: it writes O itself.
pub const DIRECT: u32 = u32::MAX;
/// Threads of a block of the kernel that measures the tensor cores through `wgmma`: two warpgroups.
pub const WGMMA_RATE_THREADS: u32 = 256;
/// Dynamic shared memory of that kernel: its operands.
pub const WGMMA_RATE_SHARED_BYTES: u32 = (128 + 2 * 64) * 64 * 2;
/// Floating-point operations of a block of that kernel in one iteration: 4 `m64n128k16` for each of 2 warpgroups.
pub const WGMMA_RATE_FLOPS_PER_ITERATION: u64 = 2 * 4 * 2 * 64 * 128 * 16;

/// Consecutive KV slots: a page, a part of one, or a contiguous extent.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvRun {
    /// Index of the first slot in the KV pool, counted in steps of [`AttentionParams::kv_slot_bytes`].
    pub first_slot: u32,
    /// Number of slots, at least 1.
    pub num_slots: u32,
}

/// Consecutive query tokens within a tile, and the columns of the tile that they see.
///
/// They are one request's; or those of several, where all of them see the same columns. See [`Self::columns`] for what each of
/// the tokens sees.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowSegment {
    /// Index of the segment's first token in Q and O.
    pub first_token: u32,
    /// Number of tokens, at least 1.
    pub num_tokens: u32,
    /// First column that the segment's first token sees.
    pub column_begin: u32,
    /// How many further tokens see that column too; each one after them sees one column less. [`NO_WINDOW`] if all of them do.
    pub begin_hold: u32,
    /// One past the last column that the segment's first token sees.
    pub column_end: u32,
    /// How many more columns each further token sees: 1 under a causal mask, else 0.
    pub column_end_step: u32,
}

/// [`RowSegment::begin_hold`] of tokens that see back to the first column, however many they are.
pub const NO_WINDOW: u32 = u32::MAX;

impl RowSegment {
    /// The columns that token `token` of the segment sees.
    #[inline(always)]
    pub const fn columns(&self, token: u32) -> Range<u32> {
        self.column_begin + token.saturating_sub(self.begin_hold)..self.column_end + token * self.column_end_step
    }
}

/// Which of the kernel's two ways of working suits a tile.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TileKind {
    /// Many rows: the warps of a block share the columns and divide the rows.
    Wide = 0,
    /// Few rows: the warps of a block share the rows and divide the columns.
    Narrow = 1,
}

impl TileKind {
    /// The most rows of a tile of this kind that is not [tall](TALL_TILE_ROWS); see [`HeadGroups::tile_rows`].
    pub const fn rows(self) -> u32 {
        match self {
            TileKind::Wide => WIDE_TILE_ROWS,
            TileKind::Narrow => NARROW_TILE_ROWS,
        }
    }
}

/// Rows of a [`TileKind::Wide`] tile of the `sm_80` kernel for a head dimension: half as many where O of more would not fit into
/// the registers of four warps. Those of the `sm_90a` kernels always have [`WIDE_TILE_ROWS`], or [`TALL_TILE_ROWS`].
pub const fn wide_tile_rows(head_dim: u32) -> u32 {
    if head_dim > 128 { WIDE_TILE_ROWS / 2 } else { WIDE_TILE_ROWS }
}

/// Columns that a block of the `sm_90a` kernel takes at a time for a head dimension: half as many where K and V of more would not
/// fit into shared memory twice.
pub const fn hopper_column_step(head_dim: u32) -> u32 {
    if head_dim > 128 { COLUMN_STEP } else { 2 * COLUMN_STEP }
}

/// The same of narrow tiles whose K and V, in FP8, are taken as they are stored, whatever the head dimension.
pub const HOPPER_STORED_STEP: u32 = 2 * COLUMN_STEP;

/// Panels of [`KV_BOX_ELEMENTS`] elements that a box can have: all of a row. A row of which the last panel is not whole comes
/// panel by panel: the box of the last one reaches past the row, and has zeros there, which are not read from memory.
pub const fn box_panels(head_dim: u32) -> u32 {
    if head_dim.is_multiple_of(KV_BOX_ELEMENTS) { head_dim / KV_BOX_ELEMENTS } else { 1 }
}

/// One tile over one range of its columns: what a thread block does for one head group.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkItem {
    /// The tile's first row segment.
    pub segment_begin: u32,
    /// Number of row segments of the tile, at least 1.
    pub num_segments: u32,
    /// The KV run that holds column `column_begin`.
    pub run_begin: u32,
    /// Slots of that run that lie before column `column_begin`.
    pub run_skip: u32,
    /// First column of the range.
    pub column_begin: u32,
    /// One past the last column of the range; the runs from `run_begin` on reach this far.
    pub column_end: u32,
    /// Row of the partial buffers that takes the tile's first row, or [`DIRECT`].
    pub partial_row: u32,
    /// The tile's kind.
    pub tile: TileKind,
}

/// A query token whose result is merged from partials.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MergeToken {
    /// Index of the token in Q and O.
    pub token: u32,
    /// First entry of the merge sources.
    pub source_begin: u32,
    /// Number of merge sources, at least 1. Each names the partial row of the token's first head; the rows of the group's
    /// other heads follow it.
    pub num_sources: u32,
}

/// An address in device memory. Zero means absent where a field may be.
pub type DeviceAddress = u64;

/// How query heads are divided into head groups, and how many rows of one a tile has.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadGroups {
    /// Rows of a wide tile.
    pub wide_tile_rows: u32,
    /// Query heads of Q and O.
    pub num_qo_heads: u32,
    /// KV heads of K and V.
    pub num_kv_heads: u32,
    /// Query heads of one group: rows of one token in a tile.
    pub heads_per_group: u32,
    /// Number of groups.
    pub num_groups: u32,
}

impl HeadGroups {
    /// Rows of a tile.
    pub const fn tile_rows(&self, kind: TileKind) -> u32 {
        match kind {
            TileKind::Wide => self.wide_tile_rows,
            TileKind::Narrow => kind.rows(),
        }
    }

    /// Groups that share a KV head.
    #[inline(always)]
    pub const fn groups_per_kv_head(&self) -> u32 {
        // `checked_div` keeps the division's panic out of device code.
        match self.num_groups.checked_div(self.num_kv_heads) {
            Some(groups) => groups,
            None => 0,
        }
    }
}

/// What the persistent blocks of a launch share: they take tasks in order, and the last one to leave sets all words to zero
/// again.
///
/// Task `t` is work item `t / num_groups` for head group `t % num_groups`. The tasks are two queues: the first
/// [`front_tasks`](AttentionParams::front_tasks), and those behind them. In the front, all items come for the first
/// [`groups_at_once`](AttentionParams::groups_at_once) head groups, then for the next. Every block begins with its own queue, and
/// goes on with the other when that is empty. The kernel that does narrow tasks beside wide ones takes from both at a time.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scheduler {
    /// How far the blocks are.
    pub attendance: Attendance,
    /// Tasks taken of each queue, beyond the first of each block.
    pub taken: [u32; 2],
}

/// The most that [`AttentionParams::narrow_loaders`] is.
pub const MOST_NARROW_LOADERS: u32 = 3;

/// The most warps of a block that merge rows.
pub const MOST_MERGING_WARPS: u32 = 12;

/// When and where a task was done: what the attention kernel notes if it is asked to.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TaskStamp {
    /// When its block began with it, in nanoseconds of the device's `%globaltimer`.
    pub begin_ns: u64,
    /// When its results were stored.
    pub end_ns: u64,
    /// The multiprocessor (`%smid`).
    pub sm: u32,
    /// Nothing; for the alignment.
    pub unused: u32,
}

/// A word of the partial buffers that has not been stored yet, in `sm_90a`'s kernels: a NaN that they never store. All words are
/// that between launches, and whoever merges a row waits until none of its partials' are.
pub const NOT_STORED: u32 = u32::MAX;

/// Parameters of the attention kernels.
///
/// The `sm_80` kernel is launched with a block for each task; the `sm_90a` kernel with as many blocks as the device holds at a
/// time, and merges the partials too.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AttentionParams {
    /// Q, `[tokens, num_qo_heads, head_dim]`.
    pub q: DeviceAddress,
    /// K, `[slots, num_kv_heads, head_dim]` or in other pages: head `h` of slot `s` lies `s * kv_slot_bytes + h * kv_head_bytes`
    /// from here.
    pub k: DeviceAddress,
    /// V, like K.
    pub v: DeviceAddress,
    /// O, like Q.
    pub o: DeviceAddress,
    /// Log-sum-exp, natural logarithm, `[tokens, num_qo_heads]` float32; or zero.
    pub lse: DeviceAddress,
    /// Partial O, `[num_groups, num_partial_rows, head_dim]` float32.
    pub partial_o: DeviceAddress,
    /// Log-sum-exp of the partials, natural logarithm, `[num_groups, num_partial_rows]` float32; −∞ where a row saw nothing.
    pub partial_lse: DeviceAddress,
    /// [`WorkItem`]s.
    pub items: DeviceAddress,
    /// [`RowSegment`]s.
    pub segments: DeviceAddress,
    /// [`KvRun`]s.
    pub runs: DeviceAddress,
    /// [`MergeToken`]s; `sm_90a` only, as what follows.
    pub merge_tokens: DeviceAddress,
    /// Merge sources, `u32`.
    pub merge_sources: DeviceAddress,
    /// How many have read the log-sum-exps of the partials of each row that is merged in parts, `[merge tokens, num_qo_heads]`
    /// `u32`. Zero between launches; each launch that may run beside another has its own.
    pub lse_readers: DeviceAddress,
    /// Tensor maps of K, then of V, [`NUM_KV_BOXES`] each; `sm_90a` only. Map `i` copies boxes of `2^i` slots of one head,
    /// swizzled by 128 bytes. Its dimensions are elements (64), slots, panels of 64 elements, further groups of [`KV_BOX_GROUP`]
    /// slots, heads; a box of [`KV_BOX_GROUP`] slots and more has all panels, group after group; a smaller one has a single
    /// panel. Where [boxes have but one](box_panels), so have the maps, and its elements are all of a row. In FP8, two neighbours
    /// count as one element. A map whose box would be more than a [step of columns](hopper_column_step), or in FP8 of
    /// [stored ones](HOPPER_STORED_STEP), is not used.
    pub kv_maps: DeviceAddress,
    /// The same of K and V of narrow tiles, for kernels that take them in FP8 and those of wide tiles in the type of Q; others do
    /// not read it. `sm_90a` only.
    pub narrow_kv_maps: DeviceAddress,
    /// Tensor maps of Q, [`NUM_QUERY_BOXES`]; `sm_90a` only. Map `i` copies boxes of `2^i` tokens with the heads of one group, 64
    /// elements of each, swizzled by 128 bytes. Its dimensions are elements (64), heads, panels of 64 elements, tokens, and one
    /// more of length 1; elements and panels as in `kv_maps`. A map whose box would be more than a wide tile is not used.
    pub q_maps: DeviceAddress,
    /// Heads.
    pub heads: HeadGroups,
    /// Rows of the partial buffers.
    pub num_partial_rows: u32,
    /// Rows of O that are merged: merge tokens times `num_qo_heads`; `sm_90a` only.
    pub num_merged_rows: u32,
    /// Number of work items.
    pub num_items: u32,
    /// Number of KV runs.
    pub num_runs: u32,
    /// A [`Scheduler`], zero between launches; each launch that may run beside another has its own.
    pub scheduler: DeviceAddress,
    /// Tasks of the front queue; `sm_90a` only.
    pub front_tasks: u32,
    /// Head groups of which the tasks of the front queue come together; at least one; `sm_90a` only.
    pub groups_at_once: u32,
    /// Blocks whose queue is the one behind it: the last of the launch. They are no more than that has tasks, and the others no
    /// more than the front has; `sm_90a` only. None where every block takes from both.
    pub back_blocks: u32,
    /// By [kind of tile](TileKind), the bytes of K, and as many of V, that a block brings before the L2 cache is to give up first
    /// what it brings for such tiles; `u32::MAX` where it is to keep all. `sm_90a` only.
    pub settled_bytes: [u32; 2],
    /// Warps that bring K of narrow tiles in FP8, and as many that bring V, step by step in turn: one of the producer, the others
    /// converters. From 1 to [`MOST_NARROW_LOADERS`]; `sm_90a` only, and only where rows have less than 128 bytes.
    pub narrow_loaders: u32,
    /// What the exponent to base 2 of a score is: softmax scale times log2(e); with a soft-cap, the cap times log2(e).
    pub scale_log2: f32,
    /// With a soft-cap, the scores become hyperbolic tangents: of half this times ln 2, so it is 2 log2(e) times the softmax
    /// scale over the cap. Without, zero.
    pub soft_cap_log2: f32,
    /// Sinks, natural logarithm, `[num_qo_heads]` float32: a further logit of each row. Or zero.
    pub sinks: DeviceAddress,
    /// What K is multiplied with, `[num_kv_heads]` float32, where it is stored in FP8; or zero, for 1.
    pub k_scales: DeviceAddress,
    /// As `k_scales`, of V.
    pub v_scales: DeviceAddress,
    /// A [`TaskStamp`] for each task, `[num_items, num_groups]`, and behind them, for `sm_90a`, one for each consuming warp of
    /// each block, of when it merged rows; or zero.
    pub stamps: DeviceAddress,
    /// Bytes from a slot of K, or of V, to the next.
    pub kv_slot_bytes: u32,
    /// Bytes from a head of a slot to the next; those of all heads together can be counted in 32 bits.
    pub kv_head_bytes: u32,
}

/// Parameters of the merge kernel, which merges what the `sm_80` kernel leaves in parts. Thread block `b` merges [`MergeToken`]
/// `b / num_qo_heads` for query head `b % num_qo_heads`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct MergeParams {
    /// As [`AttentionParams::partial_o`].
    pub partial_o: DeviceAddress,
    /// As [`AttentionParams::partial_lse`].
    pub partial_lse: DeviceAddress,
    /// As [`AttentionParams::o`].
    pub o: DeviceAddress,
    /// As [`AttentionParams::lse`].
    pub lse: DeviceAddress,
    /// [`MergeToken`]s.
    pub tokens: DeviceAddress,
    /// Merge sources, `u32`.
    pub sources: DeviceAddress,
    /// As [`AttentionParams::sinks`].
    pub sinks: DeviceAddress,
    /// Heads.
    pub heads: HeadGroups,
    /// Rows of the partial buffers.
    pub num_partial_rows: u32,
}
