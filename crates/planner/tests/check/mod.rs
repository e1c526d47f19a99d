//! What makes a plan valid, checked against the batch that it is for.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use packinfer_abi::{DIRECT, KvRun, KvWidenPiece, TileKind, WIDEN_PIECE_SLOTS, WorkItem};
use packinfer_batch::{Batch, KvDType, Mask, Request};
use packinfer_planner::{DeviceModel, KernelFamily, Plan, WideTileWidening, Widening};

/// What a plan does for one query token.
#[derive(Clone, Default)]
struct Token {
    /// Columns that its work items show it.
    seen: u32,
    /// Where these lie, if anyone has to know.
    slots: Option<Vec<Range<u32>>>,
    /// Work items that write its result.
    writers: u32,
    /// Partial rows of its first head.
    partials: Vec<u32>,
}

/// Panics unless every (query token, visible KV token) pair is in exactly one work item, at the slot where the batch has it, and
/// every query token is written once.
pub fn assert_valid(batch: &Batch, plan: &Plan) {
    let heads = plan.heads();
    assert_eq!(heads.num_groups * heads.heads_per_group, batch.shape().num_qo_heads());
    assert_eq!(plan.num_query_tokens(), batch.num_query_tokens());
    assert_eq!(plan.num_slots(), batch.num_slots());
    assert_widened(batch, plan);
    assert_widened_for_wide_tiles(plan);

    let mut tokens = vec![Token::default(); batch.num_query_tokens() as usize];
    // What the tokens between the first and the last of a segment see lies between what these see.
    for segment in plan.segments() {
        assert!(segment.num_tokens > 0);
        for token in [segment.first_token, segment.first_token + segment.num_tokens - 1] {
            tokens[token as usize].slots = Some(Vec::new());
        }
    }
    let mut partial_rows = Vec::new();
    for item in plan.items() {
        assert!(item.column_begin < item.column_end, "{item:?} is empty");
        let extents = extents(plan, item);
        let mut row = 0;
        let mut of_rows = Vec::new();
        for segment in plan.segments_of(item) {
            for index in 0..segment.num_tokens {
                let columns = segment.columns(index);
                of_rows.push(columns.clone());
                let token = &mut tokens[(segment.first_token + index) as usize];
                let columns = columns.start.max(item.column_begin)..columns.end.min(item.column_end);
                token.seen += columns.len() as u32;
                if let Some(slots) = &mut token.slots {
                    slots.extend(extents.iter().filter_map(|extent| extent.slots(&columns)));
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

    // Each partial is merged once: whoever reads it leaves the buffers ready for the next launch.
    let mut all_sources = plan.merge_sources().to_vec();
    all_sources.sort_unstable();
    let all_partials = (0..plan.num_partial_rows()).step_by(heads.heads_per_group as usize);
    assert!(all_sources.into_iter().eq(all_partials), "partials that are not merged once");
    for merge in plan.merge_tokens() {
        let token = &mut tokens[merge.token as usize];
        let mut sources = plan.merge_sources()[merge.source_begin as usize..][..merge.num_sources as usize].to_vec();
        sources.sort_unstable();
        token.partials.sort_unstable();
        assert!(!sources.is_empty());
        for source in &sources {
            assert_eq!(source % heads.heads_per_group, 0, "source {source} is no query token's first row");
        }
        assert_eq!(token.partials, sources, "merge of token {}", merge.token);
        token.partials.clear();
        token.writers += 1;
    }
    for (token, number) in tokens.into_iter().zip(0..) {
        assert_eq!((token.writers, token.partials.len()), (1, 0), "writers and unread partials of token {number}");
        let request = request_of(batch, number);
        let visible = visible(batch, request, number);
        assert_eq!(token.seen, visible.len() as u32, "what token {number} sees");
        if let Some(slots) = token.slots {
            let stored = slots.into_iter().flat_map(|slots| stored_slots(plan, slots)).collect();
            assert_eq!(counted(stored), counted(slots_of(batch, request, visible)), "where the KV of token {number} lies");
        }
    }
}

/// The slots of the batch that some slots are which attention reads.
fn stored_slots(plan: &Plan, attended: Range<u32>) -> Vec<Range<u32>> {
    let Some(widening) = plan.widening() else { return vec![attended] };
    stored_by(widening, attended)
}

/// The slots that some slots are made of.
fn stored_by(widening: &Widening, widened: Range<u32>) -> Vec<Range<u32>> {
    let pieces = widening.pieces();
    let first = pieces.partition_point(|piece| piece.to_slot + piece.num_slots <= widened.start);
    let stored_of = |piece: &KvWidenPiece| {
        let slot = |widened: u32| piece.from_slot + (widened - piece.to_slot);
        slot(widened.start.max(piece.to_slot))..slot(widened.end.min(piece.to_slot + piece.num_slots))
    };
    pieces[first..].iter().take_while(|piece| piece.to_slot < widened.end).map(stored_of).collect()
}

/// Panics unless each slot that attention reads is made once, of one that the batch has.
fn assert_widened(batch: &Batch, plan: &Plan) {
    let Some(widening) = plan.widening() else {
        assert_eq!((plan.stored(), plan.shape()), (plan.attended(), batch.shape()));
        return;
    };
    assert_eq!((plan.stored().shape, plan.shape()), (batch.shape(), batch.shape()));
    assert_eq!((plan.stored().layout, plan.stored().num_slots), (batch.kv_layout(), batch.num_slots()));
    assert_eq!(plan.attended().shape, batch.shape().with_kv_dtype(KvDType::Same));
    assert_eq!(plan.attended().num_slots, widening.num_slots());
    assert_eq!(u64::from(widening.num_slots()), batch.distinct_slots());
    assert_made_once(widening);
}

/// Panics unless each slot that is to be made is made once.
fn assert_made_once(widening: &Widening) {
    let end = widening.pieces().iter().fold(0, |end, piece| {
        assert!((1..=WIDEN_PIECE_SLOTS).contains(&piece.num_slots), "{piece:?}");
        assert_eq!(piece.to_slot, end);
        end + piece.num_slots
    });
    assert_eq!(end, widening.num_slots());
}

/// Panics unless items for a kernel whose wide tiles read what is made before are the plan's items, with wide ones that read what
/// is made of the slots that these read; all of which is made once, of slots that some wide tile reads.
fn assert_widened_for_wide_tiles(plan: &Plan) {
    let Some(WideTileWidening { widening, items }) = plan.wide_tile_widening() else { return };
    assert!(plan.widening().is_none() && plan.is_beside());
    assert_eq!(plan.shape().kv_dtype(), KvDType::E4m3);
    assert_eq!(items.len(), plan.items().len());
    assert_made_once(widening);
    let stored = |piece: &KvWidenPiece| piece.from_slot..piece.from_slot + piece.num_slots;
    let mut made_of: Vec<_> = widening.pieces().iter().map(stored).collect();
    made_of.sort_unstable_by_key(|slots| slots.start);
    assert!(made_of.is_sorted_by(|a, b| a.end <= b.start), "slots that are made twice: {made_of:?}");
    let mut is_read = vec![false; widening.num_slots() as usize];
    for (item, widened) in plan.items().iter().zip(items) {
        if item.tile == TileKind::Narrow {
            assert_eq!(item, widened);
            continue;
        }
        assert_eq!(*item, WorkItem { run_begin: item.run_begin, run_skip: item.run_skip, ..*widened });
        let slots_of = |extent: Extent| extent.first_slot..extent.first_slot + extent.columns.len() as u32;
        let read: Vec<_> = extents(plan, widened).into_iter().map(slots_of).collect();
        read.iter().for_each(|slots| is_read[slots.start as usize..slots.end as usize].fill(true));
        let made_of = read.into_iter().flat_map(|slots| stored_by(widening, slots));
        let expected = joined(extents(plan, item).into_iter().map(slots_of));
        assert_eq!(joined(made_of), expected, "{item:?} and {widened:?}");
    }
    assert!(is_read.into_iter().all(|is_read| is_read), "slots that no wide tile reads");
}

/// Ranges in their order, those joined that follow each other.
fn joined(ranges: impl Iterator<Item = Range<u32>>) -> Vec<Range<u32>> {
    let mut joined: Vec<Range<u32>> = Vec::new();
    for range in ranges {
        match joined.last_mut().filter(|last| last.end == range.start) {
            Some(last) => last.end = range.end,
            None => joined.push(range),
        }
    }
    joined
}

/// The slots of some of a request's KV tokens.
fn slots_of(batch: &Batch, request: &Request, tokens: Range<u32>) -> Vec<Range<u32>> {
    let mut token = 0;
    let slots_of = |&KvRun { first_slot, num_slots }: &KvRun| {
        let run = token..token + num_slots;
        token = run.end;
        let (begin, end) = (tokens.start.clamp(run.start, run.end), tokens.end.clamp(run.start, run.end));
        first_slot + (begin - run.start)..first_slot + (end - run.start)
    };
    batch.runs_of(request).iter().map(slots_of).collect()
}

/// How often slots are in ranges: where that changes, and by how much.
fn counted(ranges: Vec<Range<u32>>) -> Vec<(u32, i32)> {
    let ends = |range: Range<u32>| [(range.start, 1), (range.end, -1)];
    let mut changes: Vec<_> = ranges.into_iter().flat_map(ends).collect();
    changes.sort_unstable();
    let same_slot = changes.chunk_by(|a, b| a.0 == b.0);
    let summed = same_slot.map(|changes| (changes[0].0, changes.iter().map(|change| change.1).sum()));
    summed.filter(|&(_, change)| change != 0).collect()
}

/// Panics unless the items of a pack stand together, the longest first or by columns, and of the packs the one with the longest
/// item first; or unless that holds but for the shortest items of all packs, a quarter of the work at most, which come last, the
/// longest of them first. For persistent blocks that holds of each kind of tile by itself, but for the order of packs. Under a
/// sliding window nothing of a plan says which tiles are a pack: those of one request need not have any KV in common.
pub fn assert_in_order(batch: &Batch, plan: &Plan, model: &DeviceModel) {
    if matches!(batch.mask(), Mask::Window(_)) {
        return;
    }
    /// The most that short items take, as a part of what all items do; and a little for rounding.
    const MOST_SHORT: f64 = 0.25 + 1e-3;
    let packs = packs(plan);
    let times: Vec<f64> = plan.item_times(model).collect();
    let most_short = MOST_SHORT * times.iter().sum::<f64>();
    let is_mixed = plan.model().kernel_family == KernelFamily::Sm90a;
    let is_narrow = |item: usize| is_mixed && plan.items()[item].tile == TileKind::Narrow;
    for kind in [false, true] {
        let items: Vec<usize> = (0..packs.len()).filter(|&item| is_narrow(item) == kind).collect();
        let by_packs = check_packs(plan, &packs, &times, &items, !is_mixed);
        let but_for_short = |num_long: usize| {
            let (long, short) = items.split_at(num_long);
            let longest = short.iter().map(|&item| times[item]).fold(0.0, f64::max);
            // What several requests share is never begun last.
            let may_be_short = |item: usize| plan.items()[item].partial_row != DIRECT;
            short.iter().map(|&item| times[item]).sum::<f64>() <= most_short
                && short.is_sorted_by(|&a, &b| times[a] >= times[b])
                && long.iter().all(|&item| times[item] >= longest || may_be_short(item))
                && check_packs(plan, &packs, &times, long, false).is_ok()
        };
        let Err(error) = by_packs else { continue };
        assert!((0..items.len()).any(but_for_short), "{error}");
    }
}

/// Says what is not in order among items that come pack by pack; of the packs those with the longest items first, if they are
/// `sorted`.
fn check_packs(plan: &Plan, packs: &[u32], times: &[f64], items: &[usize], sorted: bool) -> Result<(), String> {
    let mut seen = HashSet::new();
    let mut longest_before = f64::INFINITY;
    for items in items.chunk_by(|&a, &b| packs[a] == packs[b]) {
        if !seen.insert(packs[items[0]]) {
            return Err(format!("items of a pack stand apart: {packs:?}"));
        }
        let longest = items.iter().map(|&item| times[item]).fold(0.0, f64::max);
        if sorted && longest > longest_before {
            return Err(format!("packs are not in order: {times:?}"));
        }
        longest_before = longest;
        let by_time = items.is_sorted_by(|&a, &b| times[a] >= times[b]);
        let by_columns = items.is_sorted_by_key(|&item| plan.items()[item].column_begin);
        if !by_time && !by_columns {
            return Err(format!("items of a pack are not in order: {items:?}"));
        }
    }
    Ok(())
}

/// For each item, what stands for its pack, of tiles that have runs in common, directly or by way of others: the pack's first KV
/// run. The parts of a tile that has none in common with others are packs by themselves.
fn packs(plan: &Plan) -> Vec<u32> {
    let mut tiles: HashMap<u32, Range<u32>> = HashMap::new();
    for item in plan.items() {
        let runs = item.run_begin..item.run_begin + extents(plan, item).len() as u32;
        let tile = tiles.entry(item.segment_begin).or_insert(runs.clone());
        *tile = tile.start.min(runs.start)..tile.end.max(runs.end);
    }
    let mut runs: Vec<Range<u32>> = tiles.values().cloned().collect();
    runs.sort_unstable_by_key(|runs| runs.start);
    let mut packs: Vec<Range<u32>> = Vec::new();
    for runs in runs {
        match packs.last_mut().filter(|pack| runs.start < pack.end) {
            Some(pack) => pack.end = pack.end.max(runs.end),
            None => packs.push(runs),
        }
    }
    let pack_of = |item: &WorkItem| packs[packs.partition_point(|pack| pack.start <= item.run_begin) - 1].start;
    let mut tiles_of: HashMap<u32, HashSet<u32>> = HashMap::new();
    for item in plan.items() {
        tiles_of.entry(pack_of(item)).or_default().insert(item.segment_begin);
    }
    let all_runs = plan.runs().len() as u32;
    let alone = |item: &WorkItem| tiles_of[&pack_of(item)].len() == 1;
    plan.items().iter().zip(all_runs..).map(|(item, index)| if alone(item) { index } else { pack_of(item) }).collect()
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

/// The request of a query token: the last that begins with it or before; those without queries begin where the next one does.
fn request_of(batch: &Batch, token: u32) -> &Request {
    let after = batch.requests().partition_point(|request| request.first_token <= token);
    &batch.requests()[after - 1]
}

/// KV tokens that a query token sees.
fn visible(batch: &Batch, request: &Request, token: u32) -> Range<u32> {
    request.sees(token - request.first_token, batch.mask())
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

impl Extent {
    /// The slots of those of its columns that are among `columns`.
    fn slots(&self, columns: &Range<u32>) -> Option<Range<u32>> {
        let both = self.columns.start.max(columns.start)..self.columns.end.min(columns.end);
        let slot = |column| self.first_slot + (column - self.columns.start);
        (!both.is_empty()).then(|| slot(both.start)..slot(both.end))
    }
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
