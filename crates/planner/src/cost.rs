//! What work items cost on a device.

use std::ops::Range;

use packinfer_abi::{COLUMN_STEP, DIRECT, HeadGroups, NARROW_TILE_ROWS, RowSegment, TileKind, WorkItem};
use packinfer_batch::AttentionShape;

use crate::DeviceModel;
use crate::tile::{Division, kind_for};

/// Nanoseconds of one thread block.
pub(crate) type Ns = u64;

/// Warps that divide the rows of a wide tile.
const WIDE_WARPS: u32 = 4;
/// Bytes of an element of a partial, or of its log-sum-exp.
const PARTIAL_ELEMENT_BYTES: u64 = 4;

/// Rows of a tile that skip a step of columns together, because none of them sees any of it.
fn warp_rows(heads: HeadGroups, kind: TileKind) -> u32 {
    match kind {
        TileKind::Wide => heads.wide_tile_rows / WIDE_WARPS,
        // The warps of a block share the rows.
        TileKind::Narrow => NARROW_TILE_ROWS,
    }
}

/// (row, column) pairs that a head group computes of a tile's `columns`: whole steps of whole warps.
pub(crate) fn issued_pairs(heads: HeadGroups, kind: TileKind, segments: &[RowSegment], columns: Range<u32>) -> u64 {
    let warp_rows = warp_rows(heads, kind);
    let mut views = [(u32::MAX, 0); WIDE_WARPS as usize];
    let mut row = 0;
    for segment in segments {
        let row_end = row + segment.num_tokens * heads.heads_per_group;
        for warp in row / warp_rows..row_end.div_ceil(warp_rows) {
            let (first_row, last_row) = (row.max(warp * warp_rows), row_end.min((warp + 1) * warp_rows) - 1);
            let token = |row_of_token| (row_of_token - row) / heads.heads_per_group;
            let (begin, end) = &mut views[warp as usize];
            *begin = segment.columns(token(first_row)).start.min(*begin);
            *end = segment.columns(token(last_row)).end.max(*end);
        }
        row = row_end;
    }
    let steps: u32 = views
        .iter()
        .map(|&(begin, end)| (begin.max(columns.start), end.min(columns.end)))
        .filter(|(begin, end)| begin < end)
        .map(|(begin, end)| (end - columns.start).div_ceil(COLUMN_STEP) - (begin - columns.start) / COLUMN_STEP)
        .sum();
    u64::from(warp_rows) * u64::from(COLUMN_STEP) * u64::from(steps)
}

/// Rows of a head group in a tile.
pub(crate) fn num_rows(heads: HeadGroups, segments: &[RowSegment]) -> u32 {
    segments.iter().map(|segment| segment.num_tokens).sum::<u32>() * heads.heads_per_group
}

/// The cost model for one shape: what the parts of a work item take a thread block that has its share of the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CostModel {
    heads: HeadGroups,
    /// A work item, whatever it does.
    item_ns: f64,
    /// A column of K and V, read from memory.
    column_ns: f64,
    /// A column of K and V, found in the L2 cache.
    cached_column_ns: f64,
    /// A step of columns, whatever is computed.
    step_ns: f64,
    /// A (row, column) pair.
    pair_ns: f64,
    /// A row of Q and one of O.
    row_ns: f64,
    /// A row of Q and one of a partial.
    partial_row_ns: f64,
    /// A row of a partial that is read to be merged.
    merged_row_ns: f64,
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
    pub fn new(model: &DeviceModel, shape: AttentionShape, heads: HeadGroups) -> Self {
        let lanes = f64::from(model.lanes());
        let (byte_ns, cached_byte_ns) = (1e9 * lanes / model.bytes_per_s, 1e9 * lanes / model.cached_bytes_per_s);
        let row_bytes = (u64::from(shape.head_dim()) * shape.dtype().size_in_bytes()) as f64;
        Self {
            heads,
            item_ns: model.item_ns,
            column_ns: 2.0 * row_bytes * byte_ns,
            cached_column_ns: 2.0 * row_bytes * cached_byte_ns,
            step_ns: model.step_ns,
            pair_ns: 4.0 * f64::from(shape.head_dim()) * 1e9 * lanes / model.flops_per_s,
            row_ns: 2.0 * row_bytes * byte_ns,
            partial_row_ns: (row_bytes + partial_row_bytes(shape) as f64) * byte_ns,
            merged_row_ns: partial_row_bytes(shape) as f64 * byte_ns,
        }
    }

    /// What an item takes besides its columns.
    pub fn fixed_ns(&self, num_rows: u32, partial: bool) -> f64 {
        self.item_ns + f64::from(num_rows) * if partial { self.partial_row_ns } else { self.row_ns }
    }

    /// What an item takes for its columns, of which a part of `fresh` is read by no other item of its head group before.
    pub fn columns_ns(&self, kind: TileKind, segments: &[RowSegment], columns: Range<u32>, fresh: f32) -> f64 {
        let num_columns = columns.end - columns.start;
        let read_ns = f64::from(num_columns) * self.read_ns(fresh);
        let compute_ns = f64::from(num_columns.div_ceil(COLUMN_STEP)) * self.step_ns
            + issued_pairs(self.heads, kind, segments, columns) as f64 * self.pair_ns;
        read_ns.max(compute_ns)
    }

    /// What it takes to read a column.
    fn read_ns(&self, fresh: f32) -> f64 {
        // The head groups of a KV head share its columns too.
        let fresh = f64::from(fresh) / f64::from(self.heads.groups_per_kv_head().max(1));
        fresh * self.column_ns + (1.0 - fresh) * self.cached_column_ns
    }

    /// What query tokens take that are put into tiles by themselves, all see every column, and are merged with what they see elsewhere.
    pub fn shared(&self, division: Division) -> Line {
        let tile = |kind: TileKind, tokens: u32| {
            let rows = tokens * self.heads.heads_per_group;
            let issued_rows = f64::from(rows.next_multiple_of(warp_rows(self.heads, kind)));
            let compute_ns = self.step_ns / f64::from(COLUMN_STEP) + issued_rows * self.pair_ns;
            let fixed_ns = self.fixed_ns(rows, true) + f64::from(rows) * self.merged_row_ns;
            Line { fixed_ns, column_ns: self.read_ns(division.fresh()).max(compute_ns) }
        };
        let full = tile(TileKind::Wide, division.tile_tokens);
        let last = match division.remainder {
            0 => Line::default(),
            tokens => tile(kind_for(tokens, self.heads), tokens),
        };
        let full_tiles = f64::from(division.full_tiles);
        Line { fixed_ns: full_tiles * full.fixed_ns + last.fixed_ns, column_ns: full_tiles * full.column_ns + last.column_ns }
    }

    /// What an item takes.
    pub fn item(&self, kind: TileKind, segments: &[RowSegment], columns: Range<u32>, fresh: f32, partial: bool) -> Ns {
        let num_rows = num_rows(self.heads, segments);
        (self.fixed_ns(num_rows, partial) + self.columns_ns(kind, segments, columns, fresh)) as Ns
    }

    /// What an item of a plan takes.
    pub fn work_item(&self, item: &WorkItem, segments: &[RowSegment], fresh: f32) -> Ns {
        self.item(item.tile, segments, item.column_begin..item.column_end, fresh, item.partial_row != DIRECT)
    }
}

/// Bytes of a row of a partial, with its log-sum-exp.
pub(crate) fn partial_row_bytes(shape: AttentionShape) -> u64 {
    PARTIAL_ELEMENT_BYTES * u64::from(shape.head_dim() + 1)
}

/// What it takes to merge `num_tokens` query tokens from `num_partial_rows` rows of partials for each head group, with the whole device.
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
    let read = num_partial_rows * u64::from(heads.num_groups) * partial_row_bytes(shape);
    let written = num_tokens * shape.qo_elements_per_token() * shape.dtype().size_in_bytes();
    model.merge_ns + (read + written) as f64 / model.bytes_per_s * 1e9
}

#[cfg(test)]
mod tests {
    use packinfer_abi::NO_WINDOW;
    use packinfer_batch::DType;

    use super::*;

    fn heads() -> HeadGroups {
        HeadGroups { num_qo_heads: 8, num_kv_heads: 2, heads_per_group: 4, num_groups: 2, wide_tile_rows: 128 }
    }

    /// Tokens that see the columns from `column_begin`, the first of them to before `column_end`, causal.
    fn segment(num_tokens: u32, column_begin: u32, column_end: u32) -> RowSegment {
        RowSegment { first_token: 0, num_tokens, column_begin, begin_hold: NO_WINDOW, column_end, column_end_step: 1 }
    }

    #[test]
    fn warps_skip_steps_that_none_of_their_rows_sees() {
        let pairs = |kind, segments: &[RowSegment], columns| issued_pairs(heads(), kind, segments, columns);
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
    }

    #[test]
    fn decode_takes_its_share_of_the_bandwidth() -> Result<(), packinfer_batch::BatchError> {
        let shape = AttentionShape::new(8, 2, 128, DType::Bf16)?;
        let model = DeviceModel::H100;
        let cost = CostModel::new(&model, shape, heads());
        let long = cost.item(TileKind::Narrow, &[segment(1, 0, 1 << 20)], 0..1 << 20, 1.0, false) as f64;
        let bytes = 512.0 * f64::from(1 << 20) * f64::from(model.lanes());
        let expected = bytes / model.bytes_per_s * 1e9;
        assert!((long / expected - 1.0).abs() < 0.01, "{long} ns, not {expected}");
        let cached = cost.item(TileKind::Narrow, &[segment(1, 0, 1 << 20)], 0..1 << 20, 0.5, false) as f64;
        assert!(cached < long);
        Ok(())
    }
}
