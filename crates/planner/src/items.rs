//! Work items, and the merges of what they leave in parts.

use packinfer_abi::{DIRECT, KvRun, MergeToken, RowSegment, WorkItem};

use crate::Plan;
use crate::cost::num_rows;
use crate::split::Part;
use crate::tile::{Tile, siblings};

/// A work item that is not in its place yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Item {
    pub item: WorkItem,
    /// Its tile, of which it does all columns or some.
    pub tile: u32,
}

/// Makes the work items of all parts. Returns the number of partial rows, by which their indices may have been cut short.
pub(crate) fn make_items(tiles: &[Tile], parts: &[Part], plan: &Plan, items: &mut Vec<Item>) -> u64 {
    let mut partial_rows = 0;
    items.clear();
    for parts in parts.chunk_by(|a, b| a.tile == b.tile) {
        for (index, tile) in (parts[0].tile..).zip(siblings(tiles, parts[0].tile)) {
            let rows = u64::from(num_rows(plan.heads, tile.segments(&plan.segments)));
            let is_partial = tile.partial || parts.len() > 1;
            let mut cursor = RunCursor { run: tile.run_begin, run_slot: 0 };
            for Part { columns, .. } in parts {
                let slot = u64::from(tile.run_skip) + u64::from(columns.start);
                cursor.advance(&plan.runs, slot);
                let item = WorkItem {
                    segment_begin: tile.segment_begin,
                    num_segments: tile.num_segments,
                    run_begin: cursor.run,
                    run_skip: (slot - cursor.run_slot) as u32,
                    column_begin: columns.start,
                    column_end: columns.end,
                    partial_row: if is_partial { partial_rows as u32 } else { DIRECT },
                    tile: tile.kind,
                };
                items.push(Item { item, tile: index });
                partial_rows += if is_partial { rows } else { 0 };
            }
        }
    }
    partial_rows
}

/// Collects the partials of query tokens. It keeps its memory from plan to plan.
#[derive(Clone, Debug, Default)]
pub(crate) struct Merger {
    /// For each token the number of its partials; then where the next of them goes among the merge sources.
    next: Vec<u32>,
}

impl Merger {
    /// Merges every query token that has partials from all of them, in the order of the items.
    pub fn push_merges(&mut self, items: &[Item], plan: &mut Plan) {
        let partial = || items.iter().map(|item| &item.item).filter(|item| item.partial_row != DIRECT);
        if partial().next().is_none() {
            return;
        }
        self.next.clear();
        self.next.resize(plan.num_query_tokens as usize, 0);
        for item in partial() {
            for segment in plan.segments_of(item) {
                self.of(segment).iter_mut().for_each(|count| *count += 1);
            }
        }
        let mut source_begin = 0;
        for (next, token) in self.next.iter_mut().zip(0..).filter(|(count, _)| **count > 0) {
            plan.merge_tokens.push(MergeToken { token, source_begin, num_sources: *next });
            source_begin += std::mem::replace(next, source_begin);
        }
        plan.merge_sources.resize(source_begin as usize, 0);
        for item in partial() {
            let mut row = item.partial_row;
            for segment in &plan.segments[item.segment_begin as usize..][..item.num_segments as usize] {
                for next in self.of(segment) {
                    plan.merge_sources[*next as usize] = row;
                    *next += 1;
                    row += plan.heads.heads_per_group;
                }
            }
        }
    }

    /// The entries of a segment's tokens.
    fn of(&mut self, segment: &RowSegment) -> &mut [u32] {
        &mut self.next[segment.first_token as usize..][..segment.num_tokens as usize]
    }
}

/// Finds the run of a slot, counted from the first of some runs, always forward.
pub(crate) struct RunCursor {
    pub run: u32,
    /// First slot of the run.
    pub run_slot: u64,
}

impl RunCursor {
    pub fn advance(&mut self, runs: &[KvRun], slot: u64) {
        while slot - self.run_slot >= u64::from(runs[self.run as usize].num_slots) {
            self.run_slot += u64::from(runs[self.run as usize].num_slots);
            self.run += 1;
        }
    }
}
