//! What makes a plan valid, checked against the batch that it is for.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use packinfer_abi::{DIRECT, KvRun, RowSegment, WorkItem};
use packinfer_batch::{Batch, Request};
use packinfer_planner::{DeviceModel, Plan};

/// What a plan does for one query token.
#[derive(Clone, Default)]
struct Token {
    /// KV tokens of the request that its work items show it.
    seen: Vec<Range<u32>>,
    /// Work items that write its result.
    writers: u32,
    /// Partial rows of its first head.
    partials: Vec<u32>,
}

/// Panics unless every (query token, visible KV token) pair is in exactly one work item, at the slot where the batch has it, and every
/// query token is written once.
pub fn assert_valid(batch: &Batch, plan: &Plan) {
    let heads = plan.heads();
    assert_eq!(heads.num_groups * heads.heads_per_group, batch.shape().num_qo_heads());
    assert_eq!(plan.num_query_tokens(), batch.num_query_tokens());
    assert_eq!(plan.num_slots(), batch.num_slots());

    let mut tokens = vec![Token::default(); batch.num_query_tokens() as usize];
    let mut partial_rows = Vec::new();
    for item in plan.items() {
        assert!(item.column_begin < item.column_end, "{item:?} is empty");
        let extents = extents(plan, item);
        let mut row = 0;
        let mut of_rows = Vec::new();
        for segment in plan.segments_of(item) {
            let request = owner(batch, segment);
            assert_slots(batch, request, segment, &extents);
            for index in 0..segment.num_tokens {
                let columns = segment.columns(index);
                let number = segment.first_token + index;
                let visible = visible(batch, request, number);
                let of_kv = |column| i64::from(column) - origin(batch, request, segment);
                assert_eq!(
                    of_kv(columns.start)..of_kv(columns.end),
                    visible.start.into()..visible.end.into(),
                    "what token {number} sees"
                );
                of_rows.push(columns.clone());
                let token = &mut tokens[number as usize];
                let seen = columns.start.max(item.column_begin)..columns.end.min(item.column_end);
                if !seen.is_empty() {
                    token.seen.push(seen.start - columns.start..seen.end - columns.start);
                }
                match item.partial_row {
                    DIRECT => token.writers += 1,
                    partial_row => token.partials.push(partial_row + row),
                }
                row += heads.heads_per_group;
            }
        }
        assert!(row <= heads.tile_rows(item.tile), "{row} rows in {item:?}");
        assert_seen(item, of_rows);
        if item.partial_row != DIRECT {
            partial_rows.push(item.partial_row..item.partial_row + row);
        }
    }
    assert_tiling(&mut partial_rows, plan.num_partial_rows());

    for merge in plan.merge_tokens() {
        let token = &mut tokens[merge.token as usize];
        let mut sources = plan.merge_sources()[merge.source_begin as usize..][..merge.num_sources as usize].to_vec();
        sources.sort_unstable();
        token.partials.sort_unstable();
        assert!(sources.len() >= 2);
        assert_eq!(token.partials, sources, "merge of token {}", merge.token);
        token.partials.clear();
        token.writers += 1;
    }
    for (mut token, number) in tokens.into_iter().zip(0..) {
        assert_eq!((token.writers, token.partials.len()), (1, 0), "writers and unread partials of token {number}");
        assert_tiling(&mut token.seen, visible(batch, request_of(batch, number), number).len() as u32);
    }
}

/// Panics unless items of requests that share tiles stand together, the longest first, and of these packs the one with the longest first.
pub fn assert_in_order(batch: &Batch, plan: &Plan, model: &DeviceModel) {
    let packs = packs(batch, plan);
    let times: Vec<f64> = plan.item_times(model).collect();
    let mut seen = HashSet::new();
    let mut longest = f64::INFINITY;
    for items in packs.iter().zip(&times).collect::<Vec<_>>().chunk_by(|a, b| a.0 == b.0) {
        assert!(seen.insert(items[0].0), "items of a pack stand apart: {packs:?}");
        assert!(*items[0].1 <= longest, "packs are not in order: {times:?}");
        longest = *items[0].1;
        assert!(items.is_sorted_by(|a, b| a.1 >= b.1), "items of a pack are not in order: {items:?}");
    }
}

/// For each item, a request that stands for all that share tiles with the item's requests, directly or by way of others.
fn packs(batch: &Batch, plan: &Plan) -> Vec<u32> {
    let owners = |item| plan.segments_of(item).iter().map(|segment| owner(batch, segment).first_token);
    let mut stands_for: HashMap<u32, u32> = batch.requests().iter().map(|r| (r.first_token, r.first_token)).collect();
    for item in plan.items().iter().filter(|item| item.num_segments > 1) {
        let least = owners(item).map(|request| stands_for[&request]).min().expect("a tile has segments");
        let joined: Vec<u32> = owners(item).map(|request| stands_for[&request]).collect();
        stands_for.values_mut().filter(|pack| joined.contains(pack)).for_each(|pack| *pack = least);
    }
    plan.items().iter().map(|item| stands_for[&owner(batch, &plan.segments_of(item)[0]).first_token]).collect()
}

/// Panics unless the ranges are `0..end`, each number in exactly one.
fn assert_tiling(ranges: &mut [Range<u32>], end: u32) {
    ranges.sort_unstable_by_key(|range| range.start);
    let reached = ranges.iter().fold(0, |reached, range| {
        assert_eq!(range.start, reached, "gap or overlap in {ranges:?}");
        range.end
    });
    assert_eq!(reached, end);
}

/// The request of a segment's tokens.
fn owner<'a>(batch: &'a Batch, segment: &RowSegment) -> &'a Request {
    let request = request_of(batch, segment.first_token);
    assert!(segment.num_tokens > 0);
    assert!(segment.first_token + segment.num_tokens <= request.first_token + request.query_len, "{segment:?} in {request:?}");
    request
}

/// The request of a query token: the last that begins with it or before; those without queries begin where the next one does.
fn request_of(batch: &Batch, token: u32) -> &Request {
    let after = batch.requests().partition_point(|request| request.first_token <= token);
    &batch.requests()[after - 1]
}

/// KV tokens that a query token sees.
fn visible(batch: &Batch, request: &Request, token: u32) -> Range<u32> {
    request.sees(token - request.first_token, batch.mask())
}

/// The column that the request's first KV token would be: with a window, it may lie before the tile.
fn origin(batch: &Batch, request: &Request, segment: &RowSegment) -> i64 {
    i64::from(segment.column_begin) - i64::from(visible(batch, request, segment.first_token).start)
}

/// Panics if no row of the item sees some of its columns.
fn assert_seen(item: &WorkItem, mut columns_of_rows: Vec<Range<u32>>) {
    columns_of_rows.sort_unstable_by_key(|columns| columns.start);
    let seen_to = columns_of_rows.iter().fold(item.column_begin, |seen_to, columns| {
        assert!(columns.start <= seen_to || seen_to >= item.column_end, "nobody sees column {seen_to} of {item:?}");
        seen_to.max(columns.end)
    });
    assert!(seen_to >= item.column_end, "nobody sees column {seen_to} of {item:?}");
}

/// Columns that lie in consecutive slots, and the first of these.
struct Extent {
    columns: Range<u32>,
    first_slot: u32,
}

/// Where the columns of an item lie.
fn extents(plan: &Plan, item: &WorkItem) -> Vec<Extent> {
    let mut extents = Vec::new();
    let mut column = item.column_begin;
    let mut skip = item.run_skip;
    for run in &plan.runs()[item.run_begin as usize..] {
        if column == item.column_end {
            break;
        }
        assert!(skip < run.num_slots, "{item:?} skips a whole run");
        let end = item.column_end.min(column + (run.num_slots - skip));
        extents.push(Extent { columns: column..end, first_slot: run.first_slot + skip });
        (column, skip) = (end, 0);
    }
    assert_eq!(column, item.column_end, "the runs of {item:?} are too short");
    extents
}

/// Panics unless those columns that belong to the segment's request lie where the request's KV lies.
fn assert_slots(batch: &Batch, request: &Request, segment: &RowSegment, extents: &[Extent]) {
    let mut run_begin = origin(batch, request, segment);
    for &KvRun { first_slot, num_slots } in batch.runs_of(request) {
        let run = run_begin..run_begin + i64::from(num_slots);
        for Extent { columns, first_slot: extent_slot } in extents {
            let columns = i64::from(columns.start)..i64::from(columns.end);
            let both = columns.start.max(run.start)..columns.end.min(run.end);
            if !both.is_empty() {
                let slots =
                    [(extent_slot, &columns), (&first_slot, &run)].map(|(&slot, at)| i64::from(slot) + both.start - at.start);
                assert_eq!(slots[0], slots[1], "slot of column {}", both.start);
            }
        }
        run_begin = run.end;
    }
}
