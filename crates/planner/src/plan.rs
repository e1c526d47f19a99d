//! What the planner makes and everything else runs.

use packinfer_abi::{HeadGroups, KvRun, MergeToken, RowSegment, WorkItem};
use packinfer_batch::AttentionShape;

/// The work of one attention call: flat arrays that go to the device as they are.
///
/// A plan is valid by construction: only the planner makes one, so every index in it is in range, every (row, visible column)
/// pair is in exactly one work item, and every query token is either written directly by one item or merged once. The same
/// plan serves every layer of a step.
#[derive(Clone, Debug)]
pub struct Plan {
    pub(crate) shape: AttentionShape,
    pub(crate) heads: HeadGroups,
    pub(crate) items: Vec<WorkItem>,
    pub(crate) segments: Vec<RowSegment>,
    pub(crate) runs: Vec<KvRun>,
    pub(crate) merge_tokens: Vec<MergeToken>,
    pub(crate) merge_sources: Vec<u32>,
    pub(crate) num_partial_rows: u32,
    pub(crate) num_query_tokens: u32,
    pub(crate) num_slots: u32,
}

impl Plan {
    /// Heads, head dimension, element type.
    pub fn shape(&self) -> AttentionShape {
        self.shape
    }

    /// How query heads are divided into head groups.
    pub fn heads(&self) -> HeadGroups {
        self.heads
    }

    /// Work items, the longest first.
    pub fn items(&self) -> &[WorkItem] {
        &self.items
    }

    /// Row segments of all tiles.
    pub fn segments(&self) -> &[RowSegment] {
        &self.segments
    }

    /// The row segments of an item's tile.
    pub fn segments_of(&self, item: &WorkItem) -> &[RowSegment] {
        &self.segments[item.segment_begin as usize..][..item.num_segments as usize]
    }

    /// KV runs of all tiles.
    pub fn runs(&self) -> &[KvRun] {
        &self.runs
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
        self.num_slots
    }
}
