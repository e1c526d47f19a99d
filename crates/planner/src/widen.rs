//! K and V in FP8 that many rows read, as those of prompts: before attention they are made what Q is, once, instead of in every
//! tile. They lie one after the other then, request after request.
//!
//! Where all tiles are to read what is made, that is a batch of its own, which is planned instead of the other. Where wide tiles
//! alone are, as those of chunks of prompts beside decodes, the batch is planned as it is, and wide items get other runs
//! afterwards.

use packinfer_abi::{
    KvRun, KvWidenPiece, NARROW_TILE_ROWS, TALL_TILE_ROWS, TileKind, WIDE_TILE_ROWS, WIDEN_PIECE_SLOTS, WorkItem,
};
use packinfer_batch::{AttentionShape, Batch, KvDType};

use crate::device::TileTimes;
use crate::items::RunCursor;
use crate::tile::wide_tile_rows;
use crate::{DeviceModel, Plan};

/// What has to be done before attention where K and V in FP8 are made what Q is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Widening {
    pieces: Vec<KvWidenPiece>,
    num_slots: u32,
}

impl Widening {
    /// Which slots become which, each of the latter once.
    pub fn pieces(&self) -> &[KvWidenPiece] {
        &self.pieces
    }

    /// Slots that are written, from 0 on.
    pub fn num_slots(&self) -> u32 {
        self.num_slots
    }

    pub(crate) fn clear(&mut self) {
        self.pieces.clear();
        self.num_slots = 0;
    }

    /// Adds slots that follow each other, and says where they go.
    fn push(&mut self, from_slot: u32, num_slots: u32) -> u32 {
        let first = self.num_slots;
        for skip in (0..num_slots).step_by(WIDEN_PIECE_SLOTS as usize) {
            let num_slots = WIDEN_PIECE_SLOTS.min(num_slots - skip);
            self.pieces.push(KvWidenPiece { from_slot: from_slot + skip, to_slot: first + skip, num_slots });
        }
        self.num_slots += num_slots;
        first
    }
}

/// What is made of K and V in FP8 before attention for wide tiles alone.
#[derive(Clone, Copy, Debug)]
pub struct WideTileWidening<'a> {
    /// Which slots become which.
    pub widening: &'a Widening,
    /// The plan's items, in the same order. They are the same but for wide ones, which read what is made: their runs are other
    /// ones of the plan's.
    pub items: &'a [WorkItem],
}

/// Bytes of K and V of so many slots that are read in FP8, and written in the type of Q.
pub(crate) fn moved_bytes(widened: AttentionShape, num_slots: u32) -> u64 {
    let written = u64::from(num_slots) * widened.kv_bytes_per_slot();
    written + written / widened.dtype().size_in_bytes()
}

/// What making so many slots takes.
pub(crate) fn widening_ns(model: &DeviceModel, widened: AttentionShape, num_slots: u32) -> f64 {
    model.launch_ns + 1e9 * moved_bytes(widened, num_slots) as f64 / model.bytes_per_s
}

/// Finds out whether it pays, and makes the batch that is planned then, or the items. It keeps its memory from batch to batch.
#[derive(Clone, Debug)]
pub(crate) struct Widener {
    /// The most bytes that what is made may take.
    most_bytes: u64,
    spans: Spans,
    batch: Option<Batch>,
    /// The wide items of a plan, by where their columns begin.
    wide: Vec<WideItem>,
    stretches: Vec<Stretch>,
    /// Where the stretches go, one after the other.
    moved: Vec<KvRun>,
}

/// A wide item.
#[derive(Clone, Copy, Debug)]
struct WideItem {
    /// Its number in the plan.
    number: u32,
    /// The stretch that its columns are in.
    stretch: u32,
    /// Slots of the stretch that lie before these.
    skip: u64,
}

/// Slots of runs that follow each other in a plan, each of which some wide item reads.
#[derive(Clone, Copy, Debug)]
struct Stretch {
    /// The first run.
    run: u32,
    /// Slots of that run that lie before the stretch.
    skip: u32,
    num_slots: u64,
    /// Its first run among those where the stretches go.
    moved: u32,
}

impl Stretch {
    /// Its slots, as parts of the plan's runs.
    fn parts(self, runs: &[KvRun]) -> impl Iterator<Item = KvRun> {
        let (mut skip, mut left) = (self.skip, self.num_slots);
        runs[self.run as usize..].iter().map_while(move |run| {
            let num_slots = left.min(u64::from(run.num_slots - skip)) as u32;
            let part = KvRun { first_slot: run.first_slot + skip, num_slots };
            (skip, left) = (0, left - u64::from(num_slots));
            (num_slots > 0).then_some(part)
        })
    }
}

impl Default for Widener {
    fn default() -> Self {
        /// K and V of 131,072 tokens, with eight heads of 128.
        const MOST_BYTES: u64 = 512 << 20;
        Self::of_at_most(MOST_BYTES)
    }
}

impl Widener {
    /// That makes so many bytes at most.
    pub fn of_at_most(most_bytes: u64) -> Self {
        Self { most_bytes, spans: Spans::default(), batch: None, wide: Vec::new(), stretches: Vec::new(), moved: Vec::new() }
    }

    /// The batch with K and V as they are in `widening` afterwards, if it is faster to make them first.
    pub fn widen(&mut self, batch: &Batch, model: &DeviceModel, widening: &mut Widening) -> Option<&Batch> {
        let shape = batch.shape();
        let widened = shape.with_kv_dtype(KvDType::Same);
        if shape == widened || !sees_all(batch) || !has_tall_tiles(batch, widened, model) {
            return None;
        }
        let read = batch.requests().iter().filter(|request| request.query_len > 0);
        let num_slots = self.spans.fill(read.flat_map(|request| batch.runs_of(request).iter().copied()));
        let saved_ns = converters_ns(model, shape, batch.num_query_tokens().into(), batch.visible_pairs() as f64);
        if !self.fits(widened, num_slots) || saved_ns <= widening_ns(model, widened, num_slots) {
            return None;
        }
        self.spans.place(widening);
        self.move_requests(batch, widened)
    }

    /// Whether there is room for so many slots.
    fn fits(&self, widened: AttentionShape, num_slots: u32) -> bool {
        u64::from(num_slots) * widened.kv_bytes_per_slot() <= self.most_bytes
    }

    /// The batch with its KV where the spans go.
    fn move_requests(&mut self, batch: &Batch, widened: AttentionShape) -> Option<&Batch> {
        let Self { spans, batch: moved, .. } = self;
        match moved {
            Some(moved) if moved.shape() == widened && moved.mask() == batch.mask() => moved.clear(),
            _ => *moved = Some(Batch::new(widened, batch.mask())),
        }
        let moved = moved.as_mut()?;
        let mut number = 0;
        for request in batch.requests() {
            let is_read = request.query_len > 0;
            let runs = if is_read { batch.runs_of(request) } else { &[] };
            let kv_len = if is_read { request.kv_len } else { 0 };
            moved
                .push_runs(request.query_len, kv_len, (number..).zip(runs).map(|(number, &run)| spans.moved(number, run)))
                .ok()?;
            number += runs.len();
        }
        Some(moved)
    }

    /// Whether K and V of a plan's wide tiles alone can be made.
    pub fn can_widen_wide_tiles(plan: &Plan) -> bool {
        let (shape, model) = (plan.attended.shape, &plan.model);
        let widened = shape.with_kv_dtype(KvDType::Same);
        let has_kernel = model.beside.is_some() && model.kernel_family.does_narrow_beside_wide(widened);
        shape != widened && has_kernel && !plan.growth.is_planned()
    }

    /// Whether it may pay to make K and V of wide tiles alone, as far as that is seen without planning for it, if so many KV
    /// tokens need not be read again: most decodes are left out.
    pub fn may_widen_wide_tiles(&self, batch: &Batch, plan: &Plan, repeated_tokens: u64) -> bool {
        let (shape, model) = (batch.shape(), &plan.model);
        let widened = shape.with_kv_dtype(KvDType::Same);
        if !Self::can_widen_wide_tiles(plan) {
            return false;
        }
        let heads_per_group = u64::from(shape.packed_head_groups().heads_per_group);
        // Tokens of few rows may share wide tiles over what they have in common.
        let (mut tokens, mut pairs, mut kv_tokens) = (0, repeated_tokens as f64, 0);
        let mut has_narrow = false;
        for request in batch.requests().iter().filter(|request| request.query_len > 0) {
            let query_tokens = u64::from(request.query_len);
            if query_tokens * heads_per_group <= u64::from(NARROW_TILE_ROWS) {
                has_narrow = true;
                continue;
            }
            tokens += query_tokens;
            pairs += query_tokens as f64 * request.sees(request.query_len / 2, batch.mask()).len() as f64;
            kv_tokens += request.seen(batch.mask()).len() as u64;
        }
        // At least one request has all of that.
        let least_repeated = repeated_tokens / (batch.requests().len() as u64).max(1);
        let least_slots = kv_tokens.saturating_sub(repeated_tokens).max(least_repeated).clamp(1, u32::MAX.into()) as u32;
        has_narrow
            && self.fits(widened, least_slots)
            && converters_ns(model, shape, tokens as f64, pairs) > widening_ns(model, widened, least_slots)
    }

    /// Makes K and V of the plan's wide tiles before attention, if that takes less than `most_ns` and there is room for them. If
    /// not, the plan is as before.
    pub fn widen_wide_tiles(&mut self, plan: &mut Plan, most_ns: f64) -> bool {
        let widened = plan.attended.shape.with_kv_dtype(KvDType::Same);
        self.find_stretches(plan);
        let Self { spans, stretches, .. } = self;
        let num_slots = spans.fill(stretches.iter().flat_map(|stretch| stretch.parts(&plan.runs)));
        let pays = widening_ns(&plan.model, widened, num_slots) < most_ns;
        if !pays || !self.fits(widened, num_slots) {
            return false;
        }
        self.spans.place(&mut plan.widening);
        self.move_stretches(&plan.runs);
        self.move_items(plan);
        true
    }

    /// Finds the stretches that the plan's wide items read.
    fn find_stretches(&mut self, plan: &Plan) {
        let Self { wide, stretches, .. } = self;
        let items = (0..).zip(&plan.items).filter(|(_, item)| item.tile == TileKind::Wide);
        wide.clear();
        wide.extend(items.map(|(number, _)| WideItem { number, stretch: 0, skip: 0 }));
        wide.sort_unstable_by_key(|wide| {
            let WorkItem { run_begin, run_skip, .. } = plan.items[wide.number as usize];
            (u64::from(run_begin) << 32 | u64::from(run_skip), wide.number)
        });
        stretches.clear();
        // A run, and where it begins, counted from the begin of the last stretch's first run.
        let (mut run, mut run_slot) = (0, 0);
        for wide in wide {
            let item = &plan.items[wide.number as usize];
            let columns = u64::from(item.column_end - item.column_begin);
            let end = stretches.last().map_or(0, |last: &Stretch| u64::from(last.skip) + last.num_slots);
            while run < item.run_begin && run_slot < end {
                run_slot += u64::from(plan.runs[run as usize].num_slots);
                run += 1;
            }
            let begin = run_slot + u64::from(item.run_skip);
            match stretches.last_mut().filter(|_| run == item.run_begin && begin <= end) {
                Some(last) => {
                    wide.skip = begin - u64::from(last.skip);
                    last.num_slots = last.num_slots.max(wide.skip + columns);
                }
                None => {
                    stretches.push(Stretch { run: item.run_begin, skip: item.run_skip, num_slots: columns, moved: 0 });
                    (run, run_slot) = (item.run_begin, 0);
                }
            }
            wide.stretch = stretches.len() as u32 - 1;
        }
    }

    /// Finds the runs of the stretches where the spans go: few, as spans that follow each other in a stretch do so there.
    fn move_stretches(&mut self, runs: &[KvRun]) {
        let Self { spans, stretches, moved, .. } = self;
        moved.clear();
        let mut number = 0;
        for stretch in stretches {
            stretch.moved = moved.len() as u32;
            for part in stretch.parts(runs) {
                let to = spans.moved(number, part);
                number += 1;
                match moved[stretch.moved as usize..].last_mut() {
                    Some(last) if last.first_slot + last.num_slots == to.first_slot => last.num_slots += to.num_slots,
                    _ => moved.push(to),
                }
            }
        }
    }

    /// Gives the plan the runs, and items that read them.
    fn move_items(&self, plan: &mut Plan) {
        let Self { wide, stretches, moved, .. } = self;
        let Plan { items, widened_items, runs, num_widened_runs, .. } = plan;
        let first_run = runs.len() as u32;
        runs.extend_from_slice(moved);
        *num_widened_runs = moved.len() as u32;
        widened_items.extend_from_slice(items);
        for of_stretch in wide.chunk_by(|a, b| a.stretch == b.stretch) {
            let stretch = &stretches[of_stretch[0].stretch as usize];
            let mut cursor = RunCursor { run: first_run + stretch.moved, run_slot: 0 };
            for wide in of_stretch {
                cursor.advance(runs, wide.skip);
                let item = &mut widened_items[wide.number as usize];
                (item.run_begin, item.run_skip) = (cursor.run, (wide.skip - cursor.run_slot) as u32);
            }
        }
    }
}

/// Slots of runs, each of which is made once, however many runs have it. They keep their memory.
#[derive(Clone, Debug, Default)]
struct Spans {
    /// The runs, by their first slots.
    runs: Vec<OrderedRun>,
    /// The slots of runs that have some in common, by the first ones.
    spans: Vec<Span>,
    /// Spans in the order in which the runs come to them.
    in_order: Vec<u32>,
    /// The span of each run, by the run's number.
    span_of_run: Vec<u32>,
}

/// A run of slots that are to be made.
#[derive(Clone, Copy, Debug)]
struct OrderedRun {
    run: KvRun,
    /// Its place among the others.
    number: u32,
}

/// Slots that follow each other.
#[derive(Clone, Copy, Debug)]
struct Span {
    first: u32,
    end: u32,
    /// The least number of its runs.
    number: u32,
    /// Where its slots go.
    to: u32,
}

impl Spans {
    /// Finds the spans of some runs, and how many slots they have.
    fn fill(&mut self, all: impl Iterator<Item = KvRun>) -> u32 {
        let Self { runs, spans, span_of_run, .. } = self;
        runs.clear();
        runs.extend((0..).zip(all).map(|(number, run)| OrderedRun { run, number }));
        runs.sort_unstable_by_key(|run| (run.run.first_slot, run.number));
        spans.clear();
        span_of_run.clear();
        span_of_run.resize(runs.len(), 0);
        for &OrderedRun { run: KvRun { first_slot, num_slots }, number } in runs.iter() {
            let end = first_slot + num_slots;
            match spans.last_mut().filter(|span| first_slot < span.end) {
                Some(span) => (span.end, span.number) = (span.end.max(end), span.number.min(number)),
                None => spans.push(Span { first: first_slot, end, number, to: 0 }),
            }
            span_of_run[number as usize] = spans.len() as u32 - 1;
        }
        spans.iter().map(|span| span.end - span.first).sum()
    }

    /// Gives the spans places, in the order in which the runs come to them.
    fn place(&mut self, widening: &mut Widening) {
        let Self { spans, in_order, .. } = self;
        in_order.clear();
        in_order.extend(0..spans.len() as u32);
        in_order.sort_unstable_by_key(|&span| spans[span as usize].number);
        for &index in in_order.iter() {
            let Span { first, end, to, .. } = &mut spans[index as usize];
            *to = widening.push(*first, *end - *first);
        }
    }

    /// Where the slots of a run go, that of some number.
    fn moved(&self, number: usize, run: KvRun) -> KvRun {
        let span = &self.spans[self.span_of_run[number] as usize];
        KvRun { first_slot: span.to + (run.first_slot - span.first), ..run }
    }
}

/// Whether all KV is seen: under a sliding window some may not be, and need not be made.
fn sees_all(batch: &Batch) -> bool {
    batch.requests().iter().all(|request| request.query_len == 0 || request.seen(batch.mask()).start == 0)
}

/// Whether a batch has tall tiles in a shape: their kernels alone know scales of K and V that are not in FP8.
fn has_tall_tiles(batch: &Batch, shape: AttentionShape, model: &DeviceModel) -> bool {
    let heads_per_group = shape.packed_head_groups().heads_per_group;
    wide_tile_rows(batch, shape, model, heads_per_group) == TALL_TILE_ROWS
}

/// What it takes longer, about, if K and V are converted in every tile of so many query tokens, which see so many KV tokens
/// together.
fn converters_ns(model: &DeviceModel, shape: AttentionShape, tokens: f64, pairs: f64) -> f64 {
    let [stored, widened] = [KvDType::E4m3, KvDType::Same].map(|dtype| model.tile_times(TileKind::Wide, WIDE_TILE_ROWS, dtype));
    let longer = |time: fn(TileTimes) -> f64| (time(stored) - time(widened)).max(0.0);
    let (tile_ns, step_ns) = (longer(|times| times.setup_ns), longer(|times| times.step_ns));
    let rows_of_token = f64::from(shape.num_qo_heads());
    let tokens_of_tile = f64::from(WIDE_TILE_ROWS / shape.packed_head_groups().heads_per_group);
    let step = f64::from(model.kernel_family.column_step(shape.head_dim()));
    // Of a tile's last step, half is not seen on average; under a causal mask, nor is half of what its last token sees more than
    // its first.
    let pairs = pairs + tokens * (step + tokens_of_tile) / 2.0;
    let tiles = tokens * rows_of_token / f64::from(WIDE_TILE_ROWS);
    let steps = pairs * rows_of_token / (f64::from(WIDE_TILE_ROWS) * step);
    (tiles * tile_ns + steps * step_ns) / f64::from(model.lanes())
}

#[cfg(test)]
mod tests {
    use packinfer_batch::DType;

    use super::*;

    /// The slots that an item reads.
    fn slots(item: &WorkItem, runs: &[KvRun]) -> Vec<u32> {
        let of_runs = runs[item.run_begin as usize..].iter().flat_map(|run| run.first_slot..run.first_slot + run.num_slots);
        of_runs.skip(item.run_skip as usize).take((item.column_end - item.column_begin) as usize).collect()
    }

    /// Wide items that begin and end anywhere in runs, some of which have slots in common.
    #[test]
    fn wide_items_read_what_is_made_of_their_slots() -> Result<(), packinfer_batch::BatchError> {
        let item = |tile, run_begin, run_skip, columns: std::ops::Range<u32>| WorkItem {
            segment_begin: 0,
            num_segments: 0,
            run_begin,
            run_skip,
            column_begin: columns.start,
            column_end: columns.end,
            partial_row: 0,
            tile,
        };
        let run = |first_slot, num_slots| KvRun { first_slot, num_slots };
        let mut plan = Plan::empty(AttentionShape::new(32, 8, 128, DType::Bf16)?.with_kv_dtype(KvDType::E4m3));
        plan.runs = vec![run(100, 10), run(500, 30), run(105, 20), run(900, 40)];
        plan.items = vec![
            item(TileKind::Wide, 2, 0, 0..20),
            item(TileKind::Wide, 0, 4, 7..27), // to slot 513
            item(TileKind::Narrow, 3, 1, 0..9),
            item(TileKind::Wide, 1, 20, 5..10),  // behind a gap, in the same run
            item(TileKind::Wide, 1, 14, 27..30), // where the second one ends
            item(TileKind::Wide, 0, 4, 7..12),   // part of it
        ];
        assert!(Widener::of_at_most(u64::MAX).widen_wide_tiles(&mut plan, f64::INFINITY));
        let made: Vec<u32> =
            plan.widening.pieces.iter().flat_map(|piece| piece.from_slot..piece.from_slot + piece.num_slots).collect();
        assert_eq!(made.len(), plan.widening.num_slots() as usize);
        // Of two runs, slots 104 to 124; of the others, 500 to 516 and 520 to 524.
        assert_eq!(
            made.iter().copied().collect::<std::collections::BTreeSet<_>>(),
            (104..125).chain(500..517).chain(520..525).collect()
        );
        assert_eq!(made.len(), 21 + 17 + 5);
        for (item, widened) in plan.items.iter().zip(&plan.widened_items) {
            let read = slots(widened, &plan.runs);
            let stored = match item.tile {
                TileKind::Wide => read.into_iter().map(|slot| made[slot as usize]).collect(),
                TileKind::Narrow => read,
            };
            assert_eq!(stored, slots(item, &plan.runs), "{item:?}");
        }
        Ok(())
    }
}
