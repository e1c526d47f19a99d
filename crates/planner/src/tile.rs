//! Tiles, before their columns are divided among work items.

use std::ops::Range;

use packinfer_abi::{HeadGroups, NO_WINDOW, RowSegment, TileKind};
use packinfer_batch::{Batch, Mask, Request};

use crate::Plan;

/// Rows of one or more requests over all columns that they see. Column 0 is the first that any of them sees.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tile {
    pub kind: TileKind,
    pub segment_begin: u32,
    pub num_segments: u32,
    pub run_begin: u32,
    /// Slots from the start of that run to column 0.
    pub run_skip: u32,
    pub columns: u32,
    /// Tiles of the same pack read the same KV.
    pub pack: u32,
    /// See [`CostModel::columns_ns`](crate::cost::CostModel::columns_ns).
    pub fresh: f32,
}

impl Tile {
    /// The tile's segments among those of its plan.
    pub fn segments(self, all: &[RowSegment]) -> &[RowSegment] {
        &all[self.segment_begin as usize..][..self.num_segments as usize]
    }
}

/// Query tokens that a tile holds.
pub(crate) fn tokens_per_tile(kind: TileKind, heads: HeadGroups) -> u32 {
    heads.tile_rows(kind) / heads.heads_per_group
}

/// How the query tokens of a request fall into tiles: full wide tiles, and a remainder that may be zero.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Division {
    pub full_tiles: u32,
    /// Query tokens of a full tile.
    pub tile_tokens: u32,
    /// Query tokens behind the full tiles.
    pub remainder: u32,
}

impl Division {
    pub fn of(request: &Request, heads: HeadGroups) -> Self {
        let tile_tokens = tokens_per_tile(TileKind::Wide, heads);
        Self { full_tiles: request.query_len / tile_tokens, tile_tokens, remainder: request.query_len % tile_tokens }
    }

    /// The request's tokens in full tile `tile`.
    pub fn full_tile(&self, tile: u32) -> Range<u32> {
        tile * self.tile_tokens..(tile + 1) * self.tile_tokens
    }

    /// The request's tokens behind its full tiles.
    pub fn remainder_tokens(&self) -> Range<u32> {
        let begin = self.full_tiles * self.tile_tokens;
        begin..begin + self.remainder
    }

    /// The part of a tile's columns that no other tile of the request reads before, on average.
    pub fn fresh(&self) -> f32 {
        1.0 / (self.full_tiles + u32::from(self.remainder > 0)).max(1) as f32
    }
}

/// The segment of some of a request's query tokens, in a tile whose column `column_begin` is the first KV token that the first of them sees.
pub(crate) fn segment(request: &Request, mask: Mask, tokens: Range<u32>, column_begin: u32) -> RowSegment {
    let seen = request.sees(tokens.start, mask);
    RowSegment {
        first_token: request.first_token + tokens.start,
        num_tokens: tokens.end - tokens.start,
        column_begin,
        begin_hold: match mask {
            Mask::Window(window) => window.get().saturating_sub(seen.end),
            _ => NO_WINDOW,
        },
        column_end: column_begin + (seen.end - seen.start),
        column_end_step: u32::from(mask != Mask::None),
    }
}

/// One past the last column that a segment's tokens see.
pub(crate) fn last_column_end(segment: &RowSegment) -> u32 {
    segment.columns(segment.num_tokens - 1).end
}

/// Of the KV tokens that a request's query tokens see, those that are over when it comes to query token `token`.
fn left_behind(request: &Request, mask: Mask, token: u32) -> u32 {
    request.sees(token, mask).start - request.seen(mask).start
}

/// What a tile of remainders holds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Content {
    pub columns: u32,
    fresh_columns: f32,
}

impl Content {
    /// Adds a request's remainder, if there is one.
    pub fn add(&mut self, request: &Request, mask: Mask, heads: HeadGroups, segments: &mut Vec<RowSegment>) {
        let division = Division::of(request, heads);
        if division.remainder > 0 {
            let segment = segment(request, mask, division.remainder_tokens(), self.columns);
            let columns = last_column_end(&segment) - self.columns;
            segments.push(segment);
            self.columns += columns;
            self.fresh_columns += division.fresh() * columns as f32;
        }
    }

    /// The part of the columns that no other tile reads before, on average.
    pub fn fresh(&self) -> f32 {
        self.fresh_columns / self.columns as f32
    }
}

/// Appends a tile of segments that are in the plan from `segment_begin` on. Column 0 is `start.1` slots from the start of run `start.0`.
fn push_tile(
    tiles: &mut Vec<Tile>,
    plan: &Plan,
    pack: u32,
    kind: TileKind,
    segment_begin: usize,
    start: (usize, u32),
    fresh: f32,
) {
    let segments = &plan.segments[segment_begin..];
    tiles.push(Tile {
        kind,
        segment_begin: segment_begin as u32,
        num_segments: segments.len() as u32,
        run_begin: start.0 as u32,
        run_skip: start.1,
        columns: segments.iter().map(last_column_end).max().unwrap_or(0),
        pack,
        fresh,
    });
}

/// Appends all tiles of pack `pack`: of its `members`, requests whose remainders share a tile of the given kind; with their segments and runs.
pub(crate) fn push_tiles(tiles: &mut Vec<Tile>, plan: &mut Plan, batch: &Batch, pack: u32, members: &[u32], kind: TileKind) {
    let requests = || members.iter().map(|&request| &batch.requests()[request as usize]);
    let mask = batch.mask();
    let first_run = plan.runs.len();
    for request in requests() {
        let division = Division::of(request, plan.heads);
        let run_begin = plan.runs.len();
        batch.push_seen_runs(request, &mut plan.runs);
        for tile in 0..division.full_tiles {
            let segment_begin = plan.segments.len();
            let tokens = division.full_tile(tile);
            let start = (run_begin, left_behind(request, mask, tokens.start));
            plan.segments.push(segment(request, mask, tokens, 0));
            push_tile(tiles, plan, pack, TileKind::Wide, segment_begin, start, division.fresh());
        }
    }

    let segment_begin = plan.segments.len();
    let mut content = Content::default();
    for request in requests() {
        content.add(request, mask, plan.heads, &mut plan.segments);
    }
    if content.columns > 0 {
        // Requests with a window join others whole, or else stay alone: only then no column lies between theirs that none of the rows sees.
        let first_token = requests().next().map_or(0, |request| Division::of(request, plan.heads).remainder_tokens().start);
        let skip = requests().next().map_or(0, |request| left_behind(request, mask, first_token));
        push_tile(tiles, plan, pack, kind, segment_begin, (first_run, skip), content.fresh());
    }
}
