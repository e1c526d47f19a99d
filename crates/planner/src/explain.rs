//! What a plan will do, in numbers.

use std::ops::Range;

use packinfer_abi::{KvRun, RowSegment, TileKind};
use serde::Serialize;

use crate::cost::{ItemWork, WorkTimes, issued_pairs, merge_ns, merged_bytes, num_rows, partial_row_bytes};
use crate::lanes::Lanes;
use crate::tile::last_column_end;
use crate::widen::{moved_bytes, widening_ns};
use crate::{DeviceModel, Plan};

/// What a plan will do, in numbers: work, traffic, and the time that the cost model of a device expects.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Explanation {
    /// Query tokens of the batch.
    pub query_tokens: u32,
    /// Head groups, each of which does every work item.
    pub head_groups: u32,
    /// Query heads of a head group: rows of a query token in a tile.
    pub heads_per_group: u32,
    /// The most rows of a wide tile.
    pub wide_tile_rows: u32,
    /// Tiles of many rows.
    pub wide_tiles: u32,
    /// Tiles of few rows.
    pub narrow_tiles: u32,
    /// Tiles that hold rows of several requests, each with columns of its own.
    pub packed_tiles: u32,
    /// Tiles whose columns are KV that several requests begin with.
    pub shared_tiles: u32,
    /// Tiles whose columns are split among several work items.
    pub split_tiles: u32,
    /// Work items of wide tiles.
    pub wide_items: u32,
    /// Work items of narrow tiles.
    pub narrow_items: u32,
    /// Whether narrow items may be done beside wide ones, on the same multiprocessor at the same time: see [`Plan::is_beside`].
    pub narrow_beside_wide: bool,
    /// Query tokens that are merged from partials.
    pub merge_tokens: u32,
    /// Rows of partials, for each head group.
    pub partial_rows: u32,
    /// Expected time of the attention call in µs, merging included.
    pub predicted_us: f64,
    /// Mean load of the device's thread blocks over the largest one's: 1 is perfect balance.
    pub balance: f64,
    /// Bytes of K and V that the kernel reads, from memory or cache.
    pub kv_bytes: u64,
    /// Those of them that come from memory, because no other tile of the same requests has read them before, and they were not
    /// [made for wide tiles](Plan::wide_tile_widening) just before.
    pub kv_memory_bytes: u64,
    /// Bytes that are read and written before attention, to make K and V in FP8 what Q is: see [`Plan::widening`] and
    /// [`Plan::wide_tile_widening`].
    pub widening_bytes: u64,
    /// Bytes of K and V that attention reads, those that several requests share counted once, as if wide tiles had them as narrow
    /// ones do.
    pub distinct_kv_bytes: u64,
    /// Bytes of Q read and of O written.
    pub qo_bytes: u64,
    /// Bytes of partials written, then read by the merge.
    pub partial_bytes: u64,
    /// Floating-point operations on pairs that a row sees.
    pub flops_needed: f64,
    /// Floating-point operations that the kernel does: whole steps of whole warps.
    pub flops_issued: f64,
    /// Part of the operations done for nothing: 1 − needed / issued.
    pub wasted_area: f64,
    /// Bytes of the plan itself, which go to the device once for all layers.
    pub upload_bytes: u64,
}

impl Plan {
    /// What `model` expects each work item to take for one head group, in µs, in the order of the items.
    pub fn item_times(&self, model: &DeviceModel) -> impl Iterator<Item = f64> {
        self.times_of(0..self.items.len(), model).map(|times| times.full_ns() as f64 * 1e-3)
    }

    /// What items of a kind take in this plan, as a part of what they take where a multiprocessor does one at a time.
    pub(crate) fn factor_of(&self, tile: TileKind, model: &DeviceModel) -> f64 {
        match (model.beside.filter(|_| self.beside), tile) {
            (Some(times), TileKind::Wide) => times.wide,
            (Some(times), TileKind::Narrow) => times.narrow,
            (None, _) => 1.0,
        }
    }

    /// What each work item has to do for one head group with the kernels of `model`, in the order of the items.
    pub fn work(&self, model: &DeviceModel) -> impl Iterator<Item = ItemWork> {
        let cost = self.cost_model(model);
        self.items.iter().zip(&self.fresh).map(move |(item, &fresh)| cost.work_of(item, self.segments_of(item), fresh))
    }

    /// What the parts of some work items take for one head group with the kernels of `model`, in the order of the items.
    pub(crate) fn times_of(&self, items: Range<usize>, model: &DeviceModel) -> impl Iterator<Item = WorkTimes> {
        let cost = self.cost_model(model);
        let how = self.items[items.clone()].iter().zip(&self.fresh[items]);
        how.map(move |(item, &fresh)| cost.times_of(item, self.segments_of(item), fresh))
    }

    /// Bytes that merging reads and writes, if there is anything to merge.
    pub fn merged_bytes(&self) -> Option<f64> {
        let (num_tokens, num_rows) = (self.merge_tokens.len() as u64, u64::from(self.num_partial_rows));
        (num_tokens > 0).then(|| merged_bytes(self.attended.shape, self.heads, num_tokens, num_rows))
    }

    /// Nanoseconds that `model` expects of the attention call, merging included. Leaves the loads of the device's blocks in
    /// `lanes`.
    pub(crate) fn predicted_ns(&self, model: &DeviceModel, lanes: &mut Lanes) -> f64 {
        self.give_out(model, lanes, |_, _| {});
        lanes.max() as f64 + self.besides_items_ns(model)
    }

    /// What [`Self::predicted_ns`] is at most if the items take `times`.
    pub(crate) fn predicted_at_most_ns(&self, model: &DeviceModel, times: &[WorkTimes]) -> f64 {
        // The last item to end begins when lanes are free on average, or before.
        let full_ns = || times.iter().map(|times| times.full());
        let average_ns = full_ns().sum::<f64>() * f64::from(self.heads.num_groups) / f64::from(model.lanes());
        let greatest = |of: &dyn Fn(TileKind) -> f64| [TileKind::Wide, TileKind::Narrow].map(of).into_iter().fold(0.0, f64::max);
        let (factor, displacing_ns) =
            (greatest(&|tile| self.factor_of(tile, model)), greatest(&|tile| self.displacing_ns(tile, model)));
        factor * (average_ns + full_ns().fold(0.0, f64::max)) + displacing_ns + self.besides_items_ns(model)
    }

    /// What `model` expects of the launch, of what comes before it, and of merging.
    fn besides_items_ns(&self, model: &DeviceModel) -> f64 {
        let launch_ns = if self.items.is_empty() { 0.0 } else { model.launch_ns };
        let (num_tokens, num_rows) = (self.merge_tokens.len() as u64, u64::from(self.num_partial_rows));
        let widened = self.shape_of(TileKind::Wide);
        let before_ns = self.work_before().map_or(0.0, |widening| widening_ns(model, widened, widening.num_slots()));
        before_ns + launch_ns + merge_ns(model, self.attended.shape, self.heads, num_tokens, num_rows)
    }

    /// Work, traffic, and the time that `model` expects.
    pub fn explain(&self, model: &DeviceModel) -> Explanation {
        let (shape, heads) = (self.attended.shape, self.heads);
        let groups = u64::from(heads.num_groups);
        let row_bytes = u64::from(shape.head_dim()) * shape.dtype().size_in_bytes();
        let flops_per_pair = 4.0 * f64::from(shape.head_dim()) * f64::from(heads.num_groups);
        let partial_bytes = u64::from(self.num_partial_rows) * groups * partial_row_bytes(shape);
        let upload_bytes = size_of_val(self.items())
            + size_of_val(self.segments())
            + size_of_val(self.runs())
            + size_of_val(self.merge_tokens())
            + size_of_val(self.merge_sources())
            + self.wide_tile_widening().map_or(0, |of_wide| size_of_val(of_wide.items))
            + self.work_before().map_or(0, |widening| size_of_val(widening.pieces()));

        let mut lanes = Lanes::default();
        let predicted_ns = self.predicted_ns(model, &mut lanes);
        let (mut tiles, mut items) = ([0; 2], [0; 2]);
        let (mut packed_tiles, mut shared_tiles, mut split_tiles) = (0, 0, 0);
        let (mut kv_bytes, mut q_rows, mut needed, mut issued) = (0, 0, 0, 0);
        for (item, &shared) in self.items.iter().zip(&self.shared) {
            let segments = self.segments_of(item);
            let range = item.column_begin..item.column_end;
            items[item.tile as usize] += 1;
            let elements = u64::from(item.column_end - item.column_begin) * 2 * u64::from(shape.head_dim());
            kv_bytes += elements * self.shape_of(item.tile).kv_element_bytes();
            q_rows += u64::from(num_rows(heads, segments));
            issued += issued_pairs(model.kernel_family, shape.head_dim(), heads, item.tile, segments, range);
            // Each tile has one item with its first column.
            if item.column_begin == 0 {
                tiles[item.tile as usize] += 1;
                packed_tiles += u32::from(!shared && segments.len() > 1);
                shared_tiles += u32::from(shared);
                split_tiles += u32::from(segments.iter().any(|segment| last_column_end(segment) > item.column_end));
                needed += segments.iter().map(visible_pairs).sum::<u64>() * u64::from(heads.heads_per_group);
            }
        }
        Explanation {
            query_tokens: self.num_query_tokens,
            head_groups: heads.num_groups,
            heads_per_group: heads.heads_per_group,
            wide_tile_rows: heads.wide_tile_rows,
            wide_tiles: tiles[TileKind::Wide as usize],
            narrow_tiles: tiles[TileKind::Narrow as usize],
            packed_tiles,
            shared_tiles,
            split_tiles,
            wide_items: items[TileKind::Wide as usize],
            narrow_items: items[TileKind::Narrow as usize],
            narrow_beside_wide: self.beside,
            merge_tokens: self.merge_tokens.len() as u32,
            partial_rows: self.num_partial_rows,
            predicted_us: predicted_ns * 1e-3,
            balance: if lanes.max() == 0 { 1.0 } else { lanes.mean() / lanes.max() as f64 },
            kv_bytes: kv_bytes * groups,
            kv_memory_bytes: self.kv_memory_bytes(),
            widening_bytes: self
                .work_before()
                .map_or(0, |widening| moved_bytes(self.shape_of(TileKind::Wide), widening.num_slots())),
            distinct_kv_bytes: distinct_slots(self.attended_runs()) * shape.kv_bytes_per_slot(),
            qo_bytes: q_rows * groups * row_bytes + u64::from(self.num_query_tokens) * shape.qo_bytes_per_token() / 2,
            partial_bytes,
            flops_needed: needed as f64 * flops_per_pair,
            flops_issued: issued as f64 * flops_per_pair,
            wasted_area: if issued == 0 { 0.0 } else { 1.0 - needed as f64 / issued as f64 },
            upload_bytes: upload_bytes as u64,
        }
    }
}

/// (query token, column) pairs that a segment's tokens see.
fn visible_pairs(segment: &RowSegment) -> u64 {
    let tokens = u64::from(segment.num_tokens);
    let growing = u64::from(segment.column_end_step) * (tokens * tokens.saturating_sub(1) / 2);
    let behind = tokens.saturating_sub(u64::from(segment.begin_hold));
    tokens * u64::from(segment.column_end - segment.column_begin) + growing - behind * behind.saturating_sub(1) / 2
}

/// Slots of all runs, those that several have counted once.
fn distinct_slots(runs: &[KvRun]) -> u64 {
    let mut runs = runs.to_vec();
    runs.sort_unstable_by_key(|run| run.first_slot);
    let (mut counted_to, mut slots) = (0, 0);
    for run in runs {
        let end = run.first_slot + run.num_slots;
        slots += u64::from(end.saturating_sub(run.first_slot.max(counted_to)));
        counted_to = counted_to.max(end);
    }
    slots
}
