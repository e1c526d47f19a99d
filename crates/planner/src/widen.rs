//! K and V in FP8 that many rows read, as those of prompts: before attention they are made what Q is, once, instead of in every
//! tile. They lie one after the other then, request after request.

use packinfer_abi::{KvRun, KvWidenPiece, TALL_TILE_ROWS, WIDE_TILE_ROWS, WIDEN_PIECE_SLOTS};
use packinfer_batch::{AttentionShape, Batch, KvDType};

use crate::DeviceModel;
use crate::cost::converting_ns;
use crate::tile::wide_tile_rows;

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

/// Bytes of K and V of so many slots that are read in FP8, and written in the type of Q.
pub(crate) fn moved_bytes(widened: AttentionShape, num_slots: u32) -> u64 {
    let written = u64::from(num_slots) * widened.kv_bytes_per_slot();
    written + written / widened.dtype().size_in_bytes()
}

/// What making so many slots takes.
pub(crate) fn widening_ns(model: &DeviceModel, widened: AttentionShape, num_slots: u32) -> f64 {
    model.launch_ns + 1e9 * moved_bytes(widened, num_slots) as f64 / model.bytes_per_s
}

/// Finds out whether it pays, and makes the batch that is planned then. It keeps its memory from batch to batch.
#[derive(Clone, Debug)]
pub(crate) struct Widener {
    /// The most bytes that what is made may take.
    most_bytes: u64,
    /// The runs of all requests, by their first slots.
    runs: Vec<OrderedRun>,
    /// The slots of runs that have some in common, by the first ones.
    spans: Vec<Span>,
    /// Spans in the order in which requests come to them.
    in_order: Vec<u32>,
    /// The span of each run, by the run's number.
    span_of_run: Vec<u32>,
    batch: Option<Batch>,
}

/// A run of a request.
#[derive(Clone, Copy, Debug)]
struct OrderedRun {
    run: KvRun,
    /// Its number in the batch.
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

impl Default for Widener {
    fn default() -> Self {
        /// K and V of 131,072 tokens, with eight heads of 128.
        const MOST_BYTES: u64 = 512 << 20;
        Self {
            most_bytes: MOST_BYTES,
            runs: Vec::new(),
            spans: Vec::new(),
            in_order: Vec::new(),
            span_of_run: Vec::new(),
            batch: None,
        }
    }
}

impl Widener {
    /// That makes so many bytes at most.
    pub fn of_at_most(most_bytes: u64) -> Self {
        Self { most_bytes, ..Self::default() }
    }

    /// The batch with K and V as they are in `widening` afterwards, if it is faster to make them first.
    pub fn widen(&mut self, batch: &Batch, model: &DeviceModel, widening: &mut Widening) -> Option<&Batch> {
        let shape = batch.shape();
        let widened = shape.with_kv_dtype(KvDType::Same);
        if shape == widened || !sees_all(batch) || !has_tall_tiles(batch, widened, model) {
            return None;
        }
        let num_slots = self.find_spans(batch);
        let fits = u64::from(num_slots) * widened.kv_bytes_per_slot() <= self.most_bytes;
        if !fits || saved_ns(model, batch) <= widening_ns(model, widened, num_slots) {
            return None;
        }
        self.place_spans(widening);
        self.move_requests(batch, widened)
    }

    /// Finds the spans of the batch, and how many slots they have.
    fn find_spans(&mut self, batch: &Batch) -> u32 {
        let Self { runs, spans, span_of_run, .. } = self;
        runs.clear();
        for request in batch.requests().iter().filter(|request| request.query_len > 0) {
            let numbers = request.run_range();
            runs.extend(
                batch.runs_of(request).iter().zip(numbers).map(|(&run, number)| OrderedRun { run, number: number as u32 }),
            );
        }
        runs.sort_unstable_by_key(|run| (run.run.first_slot, run.number));
        spans.clear();
        span_of_run.clear();
        span_of_run.resize(batch.runs().len(), 0);
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

    /// Gives the spans places, in the order in which requests come to them.
    fn place_spans(&mut self, widening: &mut Widening) {
        let Self { spans, in_order, .. } = self;
        in_order.clear();
        in_order.extend(0..spans.len() as u32);
        in_order.sort_unstable_by_key(|&span| spans[span as usize].number);
        for &index in in_order.iter() {
            let Span { first, end, to, .. } = &mut spans[index as usize];
            *to = widening.push(*first, *end - *first);
        }
    }

    /// The batch with its KV where the spans go.
    fn move_requests(&mut self, batch: &Batch, widened: AttentionShape) -> Option<&Batch> {
        let Self { spans, span_of_run, batch: moved, .. } = self;
        match moved {
            Some(moved) if moved.shape() == widened && moved.mask() == batch.mask() => moved.clear(),
            _ => *moved = Some(Batch::new(widened, batch.mask())),
        }
        let moved = moved.as_mut()?;
        for request in batch.requests() {
            let runs = batch.runs_of(request).iter().zip(request.run_range()).map(|(run, number)| {
                let span = spans[span_of_run[number] as usize];
                KvRun { first_slot: span.to + (run.first_slot - span.first), num_slots: run.num_slots }
            });
            let kv_len = if request.query_len > 0 { request.kv_len } else { 0 };
            moved.push_runs(request.query_len, kv_len, runs).ok()?;
        }
        Some(moved)
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

/// What a batch takes longer if K and V are converted in every tile, about.
fn saved_ns(model: &DeviceModel, batch: &Batch) -> f64 {
    /// For each tile, besides its steps: by hand, from 20 chat prompts and 512 short ones on an H100.
    const TILE_NS: f64 = 900.0;
    let (shape, family) = (batch.shape(), model.kernel_family);
    let rows_of_token = f64::from(shape.num_qo_heads());
    let tokens_of_tile = f64::from(WIDE_TILE_ROWS / shape.packed_head_groups().heads_per_group);
    let step = f64::from(family.column_step(shape.head_dim()));
    // Of a tile's last step, half is not seen on average; under a causal mask, nor is half of what its last token sees more than
    // its first.
    let tokens = f64::from(batch.num_query_tokens());
    let pairs = batch.visible_pairs() as f64 + tokens * (step + tokens_of_tile) / 2.0;
    let tiles = tokens * rows_of_token / f64::from(WIDE_TILE_ROWS);
    let steps = pairs * rows_of_token / (f64::from(WIDE_TILE_ROWS) * step);
    (tiles * TILE_NS + steps * converting_ns(family, shape)) / f64::from(model.lanes())
}
