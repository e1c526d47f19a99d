//! What the planner makes and everything else runs.

use packinfer_abi::{DIRECT, HeadGroups, KvRun, MergeToken, RowSegment, TileKind, WorkItem};
use packinfer_batch::{AttentionShape, Batch, KvDType, KvLayout};

use crate::append::Growth;
use crate::cost::CostModel;
use crate::widen::{WideTileWidening, Widening};
use crate::{DeviceModel, PlanError};

/// K and V as kernels read them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvTensors {
    /// Heads, head dimension, and element types.
    pub shape: AttentionShape,
    /// How they lie in their pool.
    pub layout: KvLayout,
    /// The least number of slots of the pool.
    pub num_slots: u32,
}

impl KvTensors {
    /// Those of a batch.
    pub(crate) fn of(batch: &Batch) -> Self {
        Self { shape: batch.shape(), layout: batch.kv_layout(), num_slots: batch.num_slots() }
    }
}

/// The work of one attention call: flat arrays that go to the device as they are.
///
/// A plan is valid by construction: only the planner makes one, so every index in it is in range, every (row, visible column)
/// pair is in exactly one work item, and every query token is either written directly by one item or merged once. The same
/// plan serves every layer of a step.
#[derive(Clone, Debug)]
pub struct Plan {
    pub(crate) model: DeviceModel,
    pub(crate) attended: KvTensors,
    /// K and V of the batch, where they are made what is attended by `widening`.
    pub(crate) stored: Option<KvTensors>,
    pub(crate) widening: Widening,
    /// Whether wide tiles alone read what `widening` makes, and narrow ones what is attended.
    pub(crate) widens_for_wide_tiles: bool,
    /// The items, if so, with wide ones that read what is made.
    pub(crate) widened_items: Vec<WorkItem>,
    /// Runs of what is made, the last ones.
    pub(crate) num_widened_runs: u32,
    pub(crate) heads: HeadGroups,
    pub(crate) items: Vec<WorkItem>,
    pub(crate) segments: Vec<RowSegment>,
    pub(crate) runs: Vec<KvRun>,
    /// For each item the part of its columns that no other item of the same requests reads, on average: the others find it in the
    /// cache.
    pub(crate) fresh: Vec<f32>,
    /// For each item whether it reads its columns for all requests that begin with them.
    pub(crate) shared: Vec<bool>,
    pub(crate) num_front_items: u32,
    pub(crate) groups_at_once: u32,
    pub(crate) settled_bytes: [u32; 2],
    pub(crate) narrow_loaders: u32,
    pub(crate) back_lanes: u32,
    pub(crate) beside: bool,
    pub(crate) merge_tokens: Vec<MergeToken>,
    pub(crate) merge_sources: Vec<u32>,
    pub(crate) num_partial_rows: u32,
    pub(crate) num_query_tokens: u32,
    pub(crate) growth: Growth,
}

impl Plan {
    /// The plan of a batch without requests, to be planned into.
    pub fn empty(shape: AttentionShape) -> Self {
        Self {
            model: DeviceModel::default(),
            attended: KvTensors { shape, layout: KvLayout::default(), num_slots: 0 },
            stored: None,
            widening: Widening::default(),
            widens_for_wide_tiles: false,
            widened_items: Vec::new(),
            num_widened_runs: 0,
            heads: shape.packed_head_groups(),
            items: Vec::new(),
            segments: Vec::new(),
            runs: Vec::new(),
            fresh: Vec::new(),
            shared: Vec::new(),
            num_front_items: 0,
            groups_at_once: 1,
            settled_bytes: [u32::MAX; 2],
            narrow_loaders: 1,
            back_lanes: 0,
            beside: false,
            merge_tokens: Vec::new(),
            merge_sources: Vec::new(),
            num_partial_rows: 0,
            num_query_tokens: 0,
            growth: Growth::default(),
        }
    }

    /// Empties the plan, for a batch.
    pub(crate) fn reset(&mut self, batch: &Batch, heads: HeadGroups) {
        let Self { attended, heads: of_heads, items, segments, runs, fresh, shared, .. } = self;
        (*attended, *of_heads) = (KvTensors::of(batch), heads);
        items.clear();
        self.widened_items.clear();
        self.num_widened_runs = 0;
        segments.clear();
        runs.clear();
        fresh.clear();
        shared.clear();
        self.merge_tokens.clear();
        self.merge_sources.clear();
        (self.num_front_items, self.back_lanes, self.beside) = (0, 0, false);
        self.groups_at_once = heads.num_groups.max(1);
        (self.settled_bytes, self.narrow_loaders) = ([u32::MAX; 2], 1);
        self.num_partial_rows = 0;
        self.num_query_tokens = batch.num_query_tokens();
    }

    /// Whether everything can be numbered, `partial_rows` rows of partials too. Indices may have been cut short before.
    pub(crate) fn check(&self, partial_rows: u64) -> Result<(), PlanError> {
        /// Thread blocks of a launch.
        const MOST_BLOCKS: u64 = i32::MAX as u64;
        const MOST: u64 = u32::MAX as u64;
        let attention_blocks = self.items.len() as u64 * u64::from(self.heads.num_groups);
        let merge_blocks = self.merge_tokens.len() as u64 * u64::from(self.heads.num_qo_heads);
        let counts = [
            ("KV runs", self.runs.len() as u64, MOST),
            ("row segments", self.segments.len() as u64, MOST),
            ("merge sources", self.merge_sources.len() as u64, MOST),
            ("rows of partials", partial_rows, u64::from(DIRECT)),
            ("thread blocks of the attention kernel", attention_blocks, MOST_BLOCKS),
            ("thread blocks of the merge kernel", merge_blocks, MOST_BLOCKS),
        ];
        match counts.iter().find(|(_, count, most)| count > most) {
            Some(&(what, count, most)) => Err(PlanError::TooMany { what, count, most }),
            None => Ok(()),
        }
    }

    /// The device, and the kernels, that it was made for. Those of other families run it too.
    pub fn model(&self) -> &DeviceModel {
        &self.model
    }

    /// Heads, head dimension, and element types of the batch.
    pub fn shape(&self) -> AttentionShape {
        self.stored().shape
    }

    /// K and V of the batch.
    pub fn stored(&self) -> KvTensors {
        self.stored.unwrap_or(self.attended)
    }

    /// K and V as attention reads them, to which [`Self::runs`] refer: those of the batch, or what they are made before by
    /// [`Self::widening`].
    pub fn attended(&self) -> KvTensors {
        self.attended
    }

    /// What is to be done before attention where K and V are in FP8, and so many rows read them that it is faster to make them
    /// what Q is first. Their scales are left to attention.
    pub fn widening(&self) -> Option<&Widening> {
        self.stored.map(|_| &self.widening)
    }

    /// The same where it is faster for what wide tiles read, but not for what narrow ones do. Kernels that do narrow tiles
    /// [beside](Self::is_beside) wide ones can read both; for others, [`Self::items`] are what they are in any plan.
    pub fn wide_tile_widening(&self) -> Option<WideTileWidening<'_>> {
        self.widens_for_wide_tiles.then_some(WideTileWidening { widening: &self.widening, items: &self.widened_items })
    }

    /// What is to be done before attention, whichever tiles it is for.
    pub fn work_before(&self) -> Option<&Widening> {
        self.widening().or(self.wide_tile_widening().map(|of_wide| of_wide.widening))
    }

    /// The shape in which tiles of a kind read K and V.
    pub(crate) fn shape_of(&self, tile: TileKind) -> AttentionShape {
        match tile {
            TileKind::Wide if self.widens_for_wide_tiles => self.attended.shape.with_kv_dtype(KvDType::Same),
            _ => self.attended.shape,
        }
    }

    /// What `model` says of the costs of the plan's items.
    pub(crate) fn cost_model(&self, model: &DeviceModel) -> CostModel {
        CostModel::new(model, [TileKind::Wide, TileKind::Narrow].map(|tile| self.shape_of(tile)), self.heads)
    }

    /// How query heads are divided into head groups.
    pub fn heads(&self) -> HeadGroups {
        self.heads
    }

    /// Work items: those that read the same KV together, of them and among them the longest first, but for short ones of all,
    /// which may come last; or request after request where they are not packed. Where there are two queues, those of the front
    /// come first.
    pub fn items(&self) -> &[WorkItem] {
        &self.items
    }

    /// Of the items, those of the front queue: all of them, unless the plan has lanes that [begin behind it](Self::back_lanes).
    pub fn num_front_items(&self) -> u32 {
        self.num_front_items
    }

    /// Head groups of which the items of the front come together: all of them for the first so many groups, then for the next. So
    /// wide tiles that read the same KV run at the same time, on enough multiprocessors, whatever the number of KV heads. Only
    /// persistent blocks take their tasks like that.
    pub fn groups_at_once(&self) -> u32 {
        self.groups_at_once
    }

    /// By [kind of tile](packinfer_abi::TileKind), the bytes of K, and as many of V, that a block brings before it has the L2
    /// cache give up first what it brings for such tiles: none where the call reads so little that most of what the cache holds
    /// can stay there; `u32::MAX`, so that it never does, where others read the same, or where it does not pay.
    pub fn settled_bytes(&self) -> [u32; 2] {
        self.settled_bytes
    }

    /// Warps of a block that bring K of narrow tiles in FP8, and as many that bring V.
    pub fn narrow_loaders(&self) -> u32 {
        self.narrow_loaders
    }

    /// Bytes of K and V that are read from memory, not found in the cache.
    pub(crate) fn kv_memory_bytes(&self) -> u64 {
        let items = self.items.iter().zip(&self.fresh);
        let from_memory = items.filter(|(item, _)| item.tile == TileKind::Narrow || !self.widens_for_wide_tiles);
        let fresh_columns: f64 =
            from_memory.map(|(item, &fresh)| f64::from(fresh) * f64::from(item.column_end - item.column_begin)).sum();
        (fresh_columns * self.attended.shape.kv_bytes_per_slot() as f64) as u64
    }

    /// Lanes that begin with the items behind the [front](Self::num_front_items), and go on with those when there are no more;
    /// the others do the front first. So some read memory while others compute. Only persistent blocks take their tasks like
    /// that.
    pub fn back_lanes(&self) -> u32 {
        self.back_lanes
    }

    /// Whether each multiprocessor can do the items behind the [front](Self::num_front_items), which are narrow, beside those of
    /// the front, which are wide. Where a kernel can do that, it is faster than
    /// [lanes that begin behind the front](Self::back_lanes).
    pub fn is_beside(&self) -> bool {
        self.beside
    }

    /// Row segments of all tiles.
    pub fn segments(&self) -> &[RowSegment] {
        &self.segments
    }

    /// The row segments of an item's tile.
    pub fn segments_of(&self, item: &WorkItem) -> &[RowSegment] {
        &self.segments[item.segment_begin as usize..][..item.num_segments as usize]
    }

    /// KV runs of all tiles, of what is [attended](Self::attended); and behind them those of what is made
    /// [for wide tiles](Self::wide_tile_widening).
    pub fn runs(&self) -> &[KvRun] {
        &self.runs
    }

    /// The former.
    pub(crate) fn attended_runs(&self) -> &[KvRun] {
        &self.runs[..self.runs.len() - self.num_widened_runs as usize]
    }

    /// Query tokens whose result is merged from partials.
    pub fn merge_tokens(&self) -> &[MergeToken] {
        &self.merge_tokens
    }

    /// Partial rows that [`Self::merge_tokens`] refer to.
    pub fn merge_sources(&self) -> &[u32] {
        &self.merge_sources
    }

    /// Rows of the partial buffers, for each head group.
    pub fn num_partial_rows(&self) -> u32 {
        self.num_partial_rows
    }

    /// Query tokens: rows of Q and O.
    pub fn num_query_tokens(&self) -> u32 {
        self.num_query_tokens
    }

    /// The least number of slots of a KV pool that the plan can run on.
    pub fn num_slots(&self) -> u32 {
        self.stored().num_slots
    }

    /// How K and V lie in that pool.
    pub fn kv_layout(&self) -> KvLayout {
        self.stored().layout
    }
}

#[cfg(test)]
mod tests {
    use packinfer_batch::DType;

    use super::*;

    #[test]
    fn more_than_can_be_numbered_is_an_error() -> Result<(), packinfer_batch::BatchError> {
        let plan = Plan::empty(AttentionShape::new(32, 8, 128, DType::Bf16)?);
        assert_eq!(plan.check(u64::from(DIRECT)), Ok(()));
        let error = plan.check(u64::from(DIRECT) + 1).expect_err("one row too many");
        assert_eq!(
            error.to_string(),
            "the plan needs 4294967296 rows of partials, but at most 4294967295 can be numbered: divide the batch among several calls"
        );
        Ok(())
    }
}
