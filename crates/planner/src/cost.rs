//! What work items cost on a device.

use std::ops::Range;

use packinfer_abi::{DIRECT, HeadGroups, NARROW_TILE_ROWS, RowSegment, TALL_TILE_ROWS, TileKind, WIDE_TILE_ROWS, WorkItem};
use packinfer_batch::AttentionShape;
use serde::{Deserialize, Serialize};

use crate::device::TileTimes;
use crate::tile::{Division, kind_for};
use crate::{DeviceModel, KernelFamily};

/// Nanoseconds of one thread block.
pub(crate) type Ns = u64;

/// The most parts of a tile's rows that skip columns by themselves.
const MAX_PARTS: usize = (WIDE_TILE_ROWS / 32) as usize;
const _: () = assert!(TALL_TILE_ROWS / KernelFamily::Sm90a.wide_rows_together() <= MAX_PARTS as u32);
/// Rows of narrow tiles whose results are exchanged at a time, with which devices are calibrated.
const EXCHANGED_ROWS: u32 = 4;
/// Bytes of an element of a partial, or of its log-sum-exp.
const PARTIAL_ELEMENT_BYTES: u64 = 4;

/// Rows of a tile that skip a step of columns together, because none of them sees any of it.
fn rows_together(family: KernelFamily, heads: HeadGroups, kind: TileKind) -> u32 {
    match kind {
        TileKind::Wide => match family {
            // A tile has as many parts, however many rows it has.
            KernelFamily::Sm80 => family.wide_rows_together() * heads.wide_tile_rows / WIDE_TILE_ROWS,
            KernelFamily::Sm90a => family.wide_rows_together(),
        },
        // The warps of a block share the rows.
        TileKind::Narrow => NARROW_TILE_ROWS,
    }
}

/// The columns that the parts of a tile's rows see, each of which skips steps of columns by itself.
#[derive(Clone, Copy, Debug)]
struct PartViews {
    heads_per_group: u32,
    /// Rows of a part, a power of two.
    together: u32,
    num_rows: u32,
    /// Of each part the first column that any of its rows sees, and one past the last.
    views: [(u32, u32); MAX_PARTS],
}

impl PartViews {
    /// Of a tile without rows.
    fn new(family: KernelFamily, heads: HeadGroups, kind: TileKind) -> Self {
        let together = rows_together(family, heads, kind);
        Self { heads_per_group: heads.heads_per_group, together, num_rows: 0, views: [(u32::MAX, 0); MAX_PARTS] }
    }

    /// Adds rows to the tile.
    fn add(&mut self, segment: &RowSegment) {
        let (row, row_end) = (self.num_rows, self.num_rows + segment.num_tokens * self.heads_per_group);
        let part_of = |row: u32| row >> self.together.ilog2();
        for part in part_of(row)..=part_of(row_end - 1) {
            let (part_begin, part_end) = (part * self.together, (part + 1) * self.together);
            let first_token = if part_begin <= row { 0 } else { (part_begin - row) / self.heads_per_group };
            let last_token =
                if row_end <= part_end { segment.num_tokens - 1 } else { (part_end - 1 - row) / self.heads_per_group };
            let (begin, end) = &mut self.views[part as usize];
            *begin = segment.columns(first_token).start.min(*begin);
            *end = segment.columns(last_token).end.max(*end);
        }
        self.num_rows = row_end;
    }

    /// (row, column) pairs that a head group computes of some columns, in whole steps.
    fn issued_pairs(&self, columns: Range<u32>, step: u32) -> u64 {
        let steps: u32 = self
            .views
            .iter()
            .map(|&(begin, end)| (begin.max(columns.start), end.min(columns.end)))
            .filter(|(begin, end)| begin < end)
            .map(|(begin, end)| (end - columns.start).div_ceil(step) - (begin - columns.start) / step)
            .sum();
        u64::from(self.together) * u64::from(step) * u64::from(steps)
    }
}

/// (row, column) pairs that a head group computes of a tile's `columns`: whole steps of whole warps or warpgroups.
pub(crate) fn issued_pairs(
    family: KernelFamily,
    head_dim: u32,
    heads: HeadGroups,
    kind: TileKind,
    segments: &[RowSegment],
    columns: Range<u32>,
) -> u64 {
    let mut views = PartViews::new(family, heads, kind);
    segments.iter().for_each(|segment| views.add(segment));
    views.issued_pairs(columns, family.column_step(head_dim))
}

/// The rows of a tile: what the cost model goes by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TileRows {
    kind: TileKind,
    num_rows: u32,
    /// Of a wide tile: products of a narrow one take no time besides its steps.
    views: Option<PartViews>,
}

impl TileRows {
    pub fn num_rows(&self) -> u32 {
        self.num_rows
    }
}

/// Rows of a head group in a tile.
pub(crate) fn num_rows(heads: HeadGroups, segments: &[RowSegment]) -> u32 {
    segments.iter().map(|segment| segment.num_tokens).sum::<u32>() * heads.heads_per_group
}

/// What one head group of a work item has to do: what the cost model goes by.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ItemWork {
    /// The kind of its tile.
    #[serde(with = "TileKindName")]
    pub tile: TileKind,
    /// Bytes read from memory and written to it.
    pub memory_bytes: f64,
    /// Bytes that are found in the L2 cache.
    pub cached_bytes: f64,
    /// Steps of columns.
    pub steps: u32,
    /// Floating-point operations, those of a narrow tile included.
    pub flops: f64,
}

/// What the parts of a work item take a thread block that has its share of the device, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct WorkTimes {
    /// Whatever it does.
    pub item_ns: f64,
    /// Bytes from memory and to it, at the block's share of it.
    pub memory_ns: f64,
    /// Bytes from the cache, at the block's share of it.
    pub cache_ns: f64,
    /// Its steps and products.
    pub block_ns: f64,
}

impl WorkTimes {
    /// What the item takes if all blocks need their share of the memory.
    pub fn full(self) -> f64 {
        self.with_memory_for(1.0)
    }

    /// Whether that is what its traffic takes.
    pub fn is_traffic(self) -> bool {
        self.memory_ns + self.cache_ns >= self.block_ns
    }

    /// The same in whole nanoseconds.
    pub fn full_ns(self) -> Ns {
        self.full() as Ns
    }

    /// What the item takes if the memory does something else first.
    pub fn after(self, memory_ns: f64) -> Self {
        Self { memory_ns: self.memory_ns + memory_ns, ..self }
    }

    /// What the item takes if only a part of the blocks' shares of the memory is needed, so that each has more of it.
    pub fn with_memory_for(self, part: f64) -> f64 {
        self.item_ns + (self.memory_ns * part + self.cache_ns).max(self.block_ns)
    }
}

/// The part of all blocks' shares of the memory that is needed where a part of the blocks does narrow items, and the others do
/// wide ones that need a part of their shares.
pub(crate) fn memory_needed(narrow_blocks: f64, wide_need: f64) -> f64 {
    narrow_blocks + (1.0 - narrow_blocks) * wide_need
}

/// The part of their shares of the memory that items need which follow each other: zero if there are none.
pub(crate) fn memory_need(items: impl Iterator<Item = WorkTimes>) -> f64 {
    let (memory_ns, full_ns) = items.fold((0.0, 0.0), |sum, item| (sum.0 + item.memory_ns, sum.1 + item.full()));
    if full_ns > 0.0 { memory_ns / full_ns } else { 0.0 }
}

/// How a [`TileKind`] is written.
#[derive(Serialize, Deserialize)]
#[serde(remote = "TileKind", rename_all = "lowercase")]
enum TileKindName {
    Wide,
    Narrow,
}

/// The cost model for one shape: what the parts of a work item take a thread block that has its share of the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CostModel {
    family: KernelFamily,
    head_dim: u32,
    heads: HeadGroups,
    groups_per_kv_head: f64,
    /// By kind of tile.
    tiles: [TileCosts; 2],
    item_ns: f64,
    /// Bytes of a row of Q or O.
    row_bytes: f64,
    /// Bytes of a row of a partial.
    partial_row_bytes: f64,
    cached_byte_ns: f64,
    flops_per_pair: f64,
}

/// What the parts of a tile take.
#[derive(Clone, Copy, Debug)]
struct TileCosts {
    setup_ns: f64,
    step_ns: f64,
    flop_ns: f64,
    /// Of a byte from memory, at the block's share of it.
    byte_ns: f64,
    /// Bytes of a row of K, or of V.
    kv_row_bytes: f64,
    /// Of the columns that no other item reads before, the part that comes from memory: all or none.
    from_memory: f64,
}

/// What rows take together, by the number of columns that they all see.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Line {
    pub fixed_ns: f64,
    pub column_ns: f64,
}

impl Line {
    /// What so many columns take.
    pub fn at(self, columns: u32) -> f64 {
        self.fixed_ns + f64::from(columns) * self.column_ns
    }
}

impl CostModel {
    /// Of tiles that read K and V as `shapes` say, by kind of tile. Where wide ones do not read them as narrow ones do, they find
    /// them in the cache, as it was just before that they were made.
    pub fn new(model: &DeviceModel, shapes: [AttentionShape; 2], heads: HeadGroups) -> Self {
        let of_block = |per_s: f64| 1e9 * f64::from(model.lanes()) / per_s;
        let kv_row_bytes = |shape: AttentionShape| (u64::from(shape.head_dim()) * shape.kv_element_bytes()) as f64;
        let [shape, of_narrow] = shapes;
        let tile = |kind, shape: AttentionShape| {
            let TileTimes { setup_ns, step_ns } = model.tile_times(kind, heads.wide_tile_rows, shape.kv_dtype());
            let byte_ns = of_block(model.kv_bytes_per_s(shape.kv_dtype()));
            TileCosts { setup_ns, step_ns, flop_ns: 0.0, byte_ns, kv_row_bytes: kv_row_bytes(shape), from_memory: 1.0 }
        };
        let mut wide = tile(TileKind::Wide, shape);
        // The model's own steps may be of more columns. What a step takes besides its products goes by its columns.
        let columns = |head_dim| f64::from(model.kernel_family.column_step(head_dim));
        wide.step_ns *= columns(shape.head_dim()) / columns(model.head_dim);
        wide.flop_ns = of_block(model.flops_per_s);
        wide.from_memory = if shape == of_narrow { 1.0 } else { 0.0 };
        // The steps of narrow tiles are all alike. Beside wide tiles, all times of narrow ones are multiplied by a factor, but for
        // this one.
        let mut narrow = tile(TileKind::Narrow, of_narrow);
        let stored_step_ns = model.beside.filter(|_| shape != of_narrow).map_or(0.0, |times| times.stored_step_ns / times.narrow);
        narrow.step_ns = narrow.step_ns.max(stored_step_ns);
        Self {
            family: model.kernel_family,
            head_dim: shape.head_dim(),
            heads,
            groups_per_kv_head: f64::from(heads.groups_per_kv_head().max(1)),
            tiles: [wide, narrow],
            item_ns: model.item_ns,
            row_bytes: (u64::from(shape.head_dim()) * shape.dtype().size_in_bytes()) as f64,
            partial_row_bytes: partial_row_bytes(shape) as f64,
            cached_byte_ns: of_block(model.cached_bytes_per_s),
            flops_per_pair: 4.0 * f64::from(shape.head_dim()),
        }
    }

    fn tile(&self, kind: TileKind) -> &TileCosts {
        &self.tiles[kind as usize]
    }

    /// Bytes of rows of Q, and of O or partials.
    fn row_bytes(&self, num_rows: u32, partial: bool) -> f64 {
        f64::from(num_rows) * (self.row_bytes + if partial { self.partial_row_bytes } else { self.row_bytes })
    }

    /// The part of the columns that is read from memory, if a part of `fresh` is read by no other item of its head group before.
    fn fresh(&self, kind: TileKind, fresh: f32) -> f64 {
        // The head groups of a KV head share its columns too.
        self.tile(kind).from_memory * f64::from(fresh) / self.groups_per_kv_head
    }

    /// What an item takes besides its columns, if it is its traffic that takes long.
    pub fn fixed_traffic_ns(&self, kind: TileKind, num_rows: u32, partial: bool) -> f64 {
        self.item_ns(kind, num_rows) + self.row_bytes(num_rows, partial) * self.tile(kind).byte_ns
    }

    /// What an item takes besides its columns, if it is not.
    pub fn fixed_block_ns(&self, kind: TileKind, num_rows: u32) -> f64 {
        self.item_ns(kind, num_rows) + self.tile(kind).setup_ns
    }

    /// What it takes to read a column, of which a part of `fresh` is read by no other item of its head group before.
    pub fn read_ns(&self, kind: TileKind, fresh: f32) -> f64 {
        let fresh = self.fresh(kind, fresh);
        2.0 * self.tile(kind).kv_row_bytes * (fresh * self.tile(kind).byte_ns + (1.0 - fresh) * self.cached_byte_ns)
    }

    /// What an item has to do, if a part of `fresh` of its columns is read by no other item of its head group before.
    pub fn work(&self, kind: TileKind, segments: &[RowSegment], columns: Range<u32>, fresh: f32, partial: bool) -> ItemWork {
        let mut views = PartViews::new(self.family, self.heads, kind);
        segments.iter().for_each(|segment| views.add(segment));
        let flops = self.flops(&views, columns.clone());
        ItemWork { flops, ..self.work_besides_products(kind, views.num_rows, columns, fresh, partial) }
    }

    /// The same without products.
    fn work_besides_products(&self, kind: TileKind, rows: u32, columns: Range<u32>, fresh: f32, partial: bool) -> ItemWork {
        let kv_bytes = 2.0 * self.tile(kind).kv_row_bytes * f64::from(columns.end - columns.start);
        let fresh_bytes = kv_bytes * self.fresh(kind, fresh);
        ItemWork {
            tile: kind,
            memory_bytes: fresh_bytes + self.row_bytes(rows, partial),
            cached_bytes: kv_bytes - fresh_bytes,
            steps: (columns.end - columns.start).div_ceil(self.family.column_step(self.head_dim)),
            flops: 0.0,
        }
    }

    /// Floating-point operations of an item.
    fn flops(&self, views: &PartViews, columns: Range<u32>) -> f64 {
        views.issued_pairs(columns, self.family.column_step(self.head_dim)) as f64 * self.flops_per_pair
    }

    /// Whether two items of a kind, with so many rows, take less of that in one.
    pub fn shares_item_time(&self, kind: TileKind, [a, b]: [u32; 2]) -> bool {
        self.item_ns(kind, a + b) < self.item_ns(kind, a) + self.item_ns(kind, b)
    }

    /// What an item with so many rows takes whatever it does.
    fn item_ns(&self, kind: TileKind, num_rows: u32) -> f64 {
        match (self.family, kind) {
            // The warps of a block exchange results of so many rows at a time.
            (KernelFamily::Sm90a, TileKind::Narrow) => self.item_ns * f64::from(num_rows.div_ceil(EXCHANGED_ROWS)),
            _ => self.item_ns,
        }
    }

    /// What the parts of that take, with so many rows.
    fn times(&self, work: &ItemWork, num_rows: u32) -> WorkTimes {
        let tile = self.tile(work.tile);
        WorkTimes {
            item_ns: self.item_ns(work.tile, num_rows),
            memory_ns: work.memory_bytes * tile.byte_ns,
            cache_ns: work.cached_bytes * self.cached_byte_ns,
            block_ns: tile.setup_ns + f64::from(work.steps) * tile.step_ns + work.flops * tile.flop_ns,
        }
    }

    /// What query tokens take that are put into tiles by themselves, all see every column, and are merged with what they see
    /// elsewhere.
    pub fn shared(&self, division: Division) -> Line {
        let tile = |kind: TileKind, tokens: u32| {
            let rows = tokens * self.heads.heads_per_group;
            let TileCosts { step_ns, flop_ns, byte_ns, .. } = self.tile(kind);
            let issued_rows = f64::from(rows.next_multiple_of(rows_together(self.family, self.heads, kind)));
            let block_ns =
                step_ns / f64::from(self.family.column_step(self.head_dim)) + issued_rows * self.flops_per_pair * flop_ns;
            let read_ns = self.read_ns(kind, division.fresh());
            let merge_ns = f64::from(rows) * self.partial_row_bytes * byte_ns;
            let fixed_ns = self.fixed_traffic_ns(kind, rows, true).max(self.fixed_block_ns(kind, rows));
            Line { fixed_ns: fixed_ns + merge_ns, column_ns: read_ns.max(block_ns) }
        };
        let full = tile(TileKind::Wide, division.tile_tokens);
        let last = match division.remainder {
            0 => Line::default(),
            tokens => tile(kind_for(tokens, self.heads), tokens),
        };
        let full_tiles = f64::from(division.full_tiles);
        Line { fixed_ns: full_tiles * full.fixed_ns + last.fixed_ns, column_ns: full_tiles * full.column_ns + last.column_ns }
    }

    /// A tile without rows.
    pub fn no_rows(&self, kind: TileKind) -> TileRows {
        let views = (kind == TileKind::Wide).then(|| PartViews::new(self.family, self.heads, kind));
        TileRows { kind, num_rows: 0, views }
    }

    /// Adds the rows of a segment to a tile.
    pub fn add(&self, rows: &mut TileRows, segment: &RowSegment) {
        rows.num_rows += segment.num_tokens * self.heads.heads_per_group;
        if let Some(views) = &mut rows.views {
            views.add(segment);
        }
    }

    /// What the parts of an item take: see [`Self::work`].
    pub fn item(&self, kind: TileKind, segments: &[RowSegment], columns: Range<u32>, fresh: f32, partial: bool) -> WorkTimes {
        let mut rows = self.no_rows(kind);
        segments.iter().for_each(|segment| self.add(&mut rows, segment));
        self.item_of_rows(&rows, columns, fresh, partial)
    }

    /// The same for the rows of a tile.
    pub fn item_of_rows(&self, rows: &TileRows, columns: Range<u32>, fresh: f32, partial: bool) -> WorkTimes {
        let flops = rows.views.as_ref().map_or(0.0, |views| self.flops(views, columns.clone()));
        let work = self.work_besides_products(rows.kind, rows.num_rows, columns, fresh, partial);
        self.times(&ItemWork { flops, ..work }, rows.num_rows)
    }

    /// What an item of a plan has to do.
    pub fn work_of(&self, item: &WorkItem, segments: &[RowSegment], fresh: f32) -> ItemWork {
        self.work(item.tile, segments, item.column_begin..item.column_end, fresh, item.partial_row != DIRECT)
    }

    /// What the parts of an item of a plan take.
    pub fn times_of(&self, item: &WorkItem, segments: &[RowSegment], fresh: f32) -> WorkTimes {
        self.item(item.tile, segments, item.column_begin..item.column_end, fresh, item.partial_row != DIRECT)
    }
}

/// Bytes of a row of a partial, with its log-sum-exp.
pub(crate) fn partial_row_bytes(shape: AttentionShape) -> u64 {
    PARTIAL_ELEMENT_BYTES * u64::from(shape.head_dim() + 1)
}

/// What it takes to merge `num_tokens` query tokens from `num_partial_rows` rows of partials for each head group, with the whole
/// device.
pub(crate) fn merge_ns(
    model: &DeviceModel,
    shape: AttentionShape,
    heads: HeadGroups,
    num_tokens: u64,
    num_partial_rows: u64,
) -> f64 {
    if num_tokens == 0 {
        return 0.0;
    }
    model.merge_ns + merged_bytes(shape, heads, num_tokens, num_partial_rows) / model.bytes_per_s * 1e9
}

/// Bytes that merging reads and writes.
pub(crate) fn merged_bytes(shape: AttentionShape, heads: HeadGroups, num_tokens: u64, num_partial_rows: u64) -> f64 {
    let read = num_partial_rows * u64::from(heads.num_groups) * partial_row_bytes(shape);
    let written = num_tokens * shape.qo_elements_per_token() * shape.dtype().size_in_bytes();
    (read + written) as f64
}

#[cfg(test)]
mod tests {
    use packinfer_abi::NO_WINDOW;
    use packinfer_batch::{DType, KvDType};

    use super::*;
    use crate::Fp8Times;

    fn heads() -> HeadGroups {
        HeadGroups { num_qo_heads: 8, num_kv_heads: 2, heads_per_group: 4, num_groups: 2, wide_tile_rows: 128 }
    }

    /// Tokens that see the columns from `column_begin`, the first of them to before `column_end`, causal.
    fn segment(num_tokens: u32, column_begin: u32, column_end: u32) -> RowSegment {
        RowSegment { first_token: 0, num_tokens, column_begin, begin_hold: NO_WINDOW, column_end, column_end_step: 1 }
    }

    #[test]
    fn warps_skip_steps_that_none_of_their_rows_sees() {
        let pairs =
            |kind, segments: &[RowSegment], columns| issued_pairs(KernelFamily::Sm80, 128, heads(), kind, segments, columns);
        let (warp_step, narrow_step) = (32 * 64, 16 * 64);
        // 8 tokens a warp: a prompt of 32 tokens is one step of four warps, then another of the last one.
        assert_eq!(pairs(TileKind::Wide, &[segment(32, 0, 1)], 0..32), 4 * warp_step);
        assert_eq!(pairs(TileKind::Wide, &[segment(32, 0, 41)], 0..72), 5 * warp_step);
        assert_eq!(pairs(TileKind::Wide, &[segment(32, 0, 41)], 64..72), warp_step);
        // Two requests in a warp each; columns 64 to 128 hold those of both.
        let two = [segment(8, 0, 93), segment(8, 100, 193)];
        assert_eq!(pairs(TileKind::Wide, &two, 0..200), (2 + 3) * warp_step);
        // Two requests that share a warp: it computes what either sees.
        let shared = [segment(4, 0, 97), segment(4, 100, 197)];
        assert_eq!(pairs(TileKind::Wide, &shared, 0..200), 4 * warp_step);
        assert_eq!(pairs(TileKind::Narrow, &[segment(1, 0, 65)], 0..65), 2 * narrow_step);
        assert_eq!(pairs(TileKind::Narrow, &[segment(1, 0, 65)], 128..192), 0);
        // A window of 64 columns: the first of four warps sees columns 50 to 121, the last 74 to 145.
        let window = RowSegment { begin_hold: 0, ..segment(32, 50, 114) };
        assert_eq!(pairs(TileKind::Wide, &[window], 0..145), (2 + 3 + 2 + 2) * warp_step);
        // A warpgroup of 64 rows sees what either of its requests does, in steps of 128 columns.
        let hopper = |head_dim, columns| issued_pairs(KernelFamily::Sm90a, head_dim, heads(), TileKind::Wide, &two, columns);
        assert_eq!(hopper(128, 0..200), 2 * 64 * 128);
        // In steps of 64 columns.
        assert_eq!(hopper(256, 0..200), 4 * 64 * 64);
        assert_eq!(hopper(256, 0..192), 3 * 64 * 64);
    }

    /// Each kind of tile has its own times, by the rows of wide ones and by what K and V are stored in.
    #[test]
    fn tiles_take_what_their_kernels_do() -> Result<(), packinfer_batch::BatchError> {
        let times = |step_ns| TileTimes { setup_ns: 0.0, step_ns };
        let e4m3 = Fp8Times { bytes_per_s: 3e12, wide: times(30e3), narrow: times(40e3) };
        let model = DeviceModel {
            kernel_family: KernelFamily::Sm90a,
            flops_per_s: 1e18,
            wide: times(10e3),
            tall: Some(times(15e3)),
            narrow: times(20e3),
            e4m3: Some(e4m3),
            ..DeviceModel::H100
        };
        let shape = AttentionShape::new(8, 2, 128, DType::Bf16)?;
        let step_us = |model: &DeviceModel, shape, kind, wide_tile_rows| {
            let heads = HeadGroups { wide_tile_rows, ..heads() };
            let item = CostModel::new(model, [shape; 2], heads).item(kind, &[segment(4, 0, 1024)], 0..1024, 1.0, false);
            (item.block_ns / 8e3).round() // µs: products take next to nothing
        };
        let fp8 = shape.with_kv_dtype(KvDType::E4m3);
        assert_eq!(step_us(&model, shape, TileKind::Wide, WIDE_TILE_ROWS), 10.0);
        assert_eq!(step_us(&model, shape, TileKind::Wide, TALL_TILE_ROWS), 15.0);
        assert_eq!(step_us(&model, shape, TileKind::Narrow, WIDE_TILE_ROWS), 20.0);
        assert_eq!(step_us(&model, fp8, TileKind::Wide, WIDE_TILE_ROWS), 30.0);
        assert_eq!(step_us(&model, fp8, TileKind::Narrow, WIDE_TILE_ROWS), 40.0);
        // Nothing is said of them.
        let plain = DeviceModel { tall: None, e4m3: None, ..model };
        assert_eq!(step_us(&plain, shape, TileKind::Wide, TALL_TILE_ROWS), 10.0);
        assert_eq!(step_us(&plain, fp8, TileKind::Wide, WIDE_TILE_ROWS), 10.0);
        assert_eq!(step_us(&plain, fp8, TileKind::Narrow, WIDE_TILE_ROWS), 20.0);
        Ok(())
    }

    #[test]
    fn what_was_made_for_wide_tiles_is_in_the_cache() -> Result<(), packinfer_batch::BatchError> {
        let shape = AttentionShape::new(8, 2, 128, DType::Bf16)?;
        let fp8 = shape.with_kv_dtype(KvDType::E4m3);
        let model = DeviceModel { kernel_family: KernelFamily::Sm90a, ..DeviceModel::H100 };
        let work = |shapes, kind| CostModel::new(&model, shapes, heads()).work(kind, &[segment(4, 0, 1024)], 0..1024, 0.5, false);
        let [wide, narrow] = [TileKind::Wide, TileKind::Narrow].map(|kind| work([shape, fp8], kind));
        assert_eq!(narrow, work([fp8; 2], TileKind::Narrow));
        let in_bf16 = work([shape; 2], TileKind::Wide);
        let (q_and_o_bytes, kv_bytes) = (2.0 * 16.0 * 256.0, 1024.0 * 512.0);
        assert_eq!((wide.memory_bytes, wide.cached_bytes), (q_and_o_bytes, kv_bytes));
        assert_eq!((in_bf16.memory_bytes, in_bf16.cached_bytes), (q_and_o_bytes + kv_bytes / 2.0, kv_bytes / 2.0));
        let block_ns = |shapes: [AttentionShape; 2]| CostModel::new(&model, shapes, heads()).times(&wide, 16).block_ns;
        assert_eq!(block_ns([shape, fp8]), block_ns([shape; 2]));
        Ok(())
    }

    #[test]
    fn decode_takes_its_share_of_the_bandwidth() -> Result<(), packinfer_batch::BatchError> {
        let shape = AttentionShape::new(8, 2, 128, DType::Bf16)?;
        let model = DeviceModel::H100;
        let cost = CostModel::new(&model, [shape; 2], heads());
        let long = cost.item(TileKind::Narrow, &[segment(1, 0, 1 << 20)], 0..1 << 20, 1.0, false).full();
        let bytes = 512.0 * f64::from(1 << 20) * f64::from(model.lanes());
        let expected = bytes / model.bytes_per_s * 1e9;
        assert!((long / expected - 1.0).abs() < 0.01, "{long} ns, not {expected}");
        let cached = cost.item(TileKind::Narrow, &[segment(1, 0, 1 << 20)], 0..1 << 20, 0.5, false).full();
        assert!(cached < long);
        Ok(())
    }
}
