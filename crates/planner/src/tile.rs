//! Tiles, before their columns are divided among work items.

use std::ops::Range;

use packinfer_abi::{HeadGroups, KvRun, NARROW_TILE_ROWS, NO_WINDOW, RowSegment, TALL_TILE_ROWS, TileKind, WIDE_TILE_ROWS};
use packinfer_batch::{AttentionShape, Batch, Mask, Request};

use crate::device::LeastWork;
use crate::prefix::Place;
use crate::share::Group;
use crate::{DeviceModel, Plan};

/// Rows of one or more requests over columns that they see. Column 0 is the first that any of them sees of what the tile reads.
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
    /// The part of its columns that it reads from memory, on average of the tiles that read the same; the rest is in the cache.
    pub fresh: f32,
    /// Whether its rows see columns of other tiles, so that it writes partials even if it is not split.
    pub partial: bool,
    /// Whether its columns are those of a [`Group`], which all of its rows see.
    pub shared: bool,
    /// Tiles from this one on that have the same columns and are split alike; 0 for those that follow the first.
    pub siblings: u32,
}

impl Tile {
    /// The tile's segments among those of its plan.
    pub fn segments(self, all: &[RowSegment]) -> &[RowSegment] {
        &all[self.segment_begin as usize..][..self.num_segments as usize]
    }
}

/// A tile with those of the same columns that follow it.
pub(crate) fn siblings(tiles: &[Tile], first: u32) -> &[Tile] {
    let first = first as usize;
    &tiles[first..first + tiles[first].siblings as usize]
}

/// Query tokens that a tile holds.
pub(crate) fn tokens_per_tile(kind: TileKind, heads: HeadGroups) -> u32 {
    heads.tile_rows(kind) / heads.heads_per_group
}

/// The tile that so many query tokens need, less than fill a wide one. Kernels for tall tiles have no narrow ones.
pub(crate) fn kind_for(tokens: u32, heads: HeadGroups) -> TileKind {
    let has_narrow = heads.wide_tile_rows != TALL_TILE_ROWS;
    if has_narrow && tokens <= tokens_per_tile(TileKind::Narrow, heads) { TileKind::Narrow } else { TileKind::Wide }
}

/// How query tokens fall into tiles: full wide tiles, and a remainder that may be zero.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Division {
    pub full_tiles: u32,
    /// Query tokens of a full tile.
    pub tile_tokens: u32,
    /// Query tokens behind the full tiles.
    pub remainder: u32,
}

impl Division {
    pub fn of(tokens: u32, heads: HeadGroups) -> Self {
        let tile_tokens = tokens_per_tile(TileKind::Wide, heads);
        // Whether a tile has room for one more is told without dividing, as most requests have few.
        let is_less_than_one = (tokens + 1) * heads.heads_per_group <= heads.wide_tile_rows;
        let full_tiles = if is_less_than_one { 0 } else { tokens / tile_tokens };
        Self { full_tiles, tile_tokens, remainder: tokens - full_tiles * tile_tokens }
    }

    /// The tokens of full tile `tile`.
    pub fn full_tile(&self, tile: u32) -> Range<u32> {
        tile * self.tile_tokens..(tile + 1) * self.tile_tokens
    }

    /// The tokens behind the full tiles.
    pub fn remainder_tokens(&self) -> Range<u32> {
        let begin = self.full_tiles * self.tile_tokens;
        begin..begin + self.remainder
    }

    /// The part of a tile's columns that no other tile of these tokens reads before, on average.
    pub fn fresh(&self) -> f32 {
        1.0 / (self.full_tiles + u32::from(self.remainder > 0)).max(1) as f32
    }
}

/// What a request reads by itself: its columns from a place on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Own<'a> {
    pub request: &'a Request,
    pub begin: Place,
}

impl Own<'_> {
    /// KV tokens that are its own.
    pub fn kv_len(&self) -> u32 {
        self.request.kv_len - self.begin.column
    }

    /// Whether it shares the KV tokens before.
    pub fn is_partial(&self) -> bool {
        self.begin.column > 0
    }

    /// How its query tokens fall into tiles, of which there are none where everything is shared.
    pub fn division(&self, heads: HeadGroups) -> Division {
        Division::of(if self.kv_len() > 0 { self.request.query_len } else { 0 }, heads)
    }

    /// The segment of some of its query tokens, in a tile whose column `column_begin` is the first own KV token that the first of
    /// them sees.
    pub fn segment(&self, mask: Mask, tokens: Range<u32>, column_begin: u32) -> RowSegment {
        let seen = self.request.sees(tokens.start, mask);
        RowSegment {
            first_token: self.request.first_token + tokens.start,
            num_tokens: tokens.end - tokens.start,
            column_begin,
            begin_hold: match mask {
                Mask::Window(window) => window.get().saturating_sub(seen.end),
                _ => NO_WINDOW,
            },
            column_end: column_begin + (seen.end - seen.start.max(self.begin.column)),
            column_end_step: u32::from(mask != Mask::None),
        }
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
    /// Whether some of its requests have other columns elsewhere.
    pub partial: bool,
    fresh_columns: f32,
}

impl Content {
    /// Adds a request's remainder, if there is one, and says what its rows see.
    pub fn add(&mut self, own: Own<'_>, mask: Mask, heads: HeadGroups) -> Option<RowSegment> {
        let division = own.division(heads);
        if division.remainder == 0 {
            return None;
        }
        let segment = own.segment(mask, division.remainder_tokens(), self.columns);
        let columns = last_column_end(&segment) - self.columns;
        self.columns += columns;
        self.partial |= own.is_partial();
        self.fresh_columns += division.fresh() * columns as f32;
        Some(segment)
    }

    /// The part of the columns that no other tile reads before, on average.
    pub fn fresh(&self) -> f32 {
        self.fresh_columns / self.columns as f32
    }
}

/// Appends the runs of a request's columns from `begin` to `end`, or to its last.
fn push_runs(plan: &mut Plan, runs: &[KvRun], begin: Place, end: Option<Place>) {
    let (mut first, mut skip) = (begin.run as usize, begin.skip());
    if skip == runs[first].num_slots {
        (first, skip) = (first + 1, 0);
    }
    let new = plan.runs.len();
    plan.runs.extend_from_slice(&runs[first..end.map_or(runs.len(), |end| end.run as usize + 1)]);
    if let (Some(end), Some(last)) = (end, plan.runs[new..].last_mut()) {
        last.num_slots = end.skip();
    }
    if let Some(first) = plan.runs[new..].first_mut() {
        first.first_slot += skip;
        first.num_slots -= skip;
    }
}

/// Appends all tiles of pack `pack`: of its `members`, requests whose remainders share a tile of the given kind; with their
/// segments and runs.
pub(crate) fn push_tiles<'a>(
    tiles: &mut Vec<Tile>,
    plan: &mut Plan,
    batch: &Batch,
    pack: u32,
    members: impl Iterator<Item = Own<'a>> + Clone,
    kind: TileKind,
) {
    let mask = batch.mask();
    let first_run = plan.runs.len();
    for own in members.clone() {
        let division = own.division(plan.heads);
        let run_begin = plan.runs.len();
        match mask {
            // Nothing is shared then, and nothing read that is over when it comes to the first query token.
            Mask::Window(_) => batch.push_seen_runs(own.request, &mut plan.runs),
            _ => push_runs(plan, batch.runs_of(own.request), own.begin, None),
        }
        plan.growth.leave_room(own.request, &mut plan.runs);
        for tile in 0..division.full_tiles {
            let tokens = division.full_tile(tile);
            let segment = own.segment(mask, tokens.clone(), 0);
            tiles.push(Tile {
                kind: TileKind::Wide,
                segment_begin: plan.segments.len() as u32,
                num_segments: 1,
                run_begin: run_begin as u32,
                run_skip: left_behind(own.request, mask, tokens.start),
                columns: last_column_end(&segment),
                pack,
                fresh: division.fresh(),
                partial: own.is_partial(),
                shared: false,
                siblings: 1,
            });
            plan.segments.push(segment);
        }
    }

    let segment_begin = plan.segments.len();
    let mut content = Content::default();
    // Requests with a window join others whole, or else stay alone: only then no column lies between theirs that none of the rows
    // sees.
    let skip_of = |own: Own<'_>| left_behind(own.request, mask, own.division(plan.heads).remainder_tokens().start);
    let run_skip = members.clone().next().map_or(0, skip_of);
    for own in members {
        plan.segments.extend(content.add(own, mask, plan.heads));
    }
    if content.columns > 0 {
        tiles.push(Tile {
            kind,
            segment_begin: segment_begin as u32,
            num_segments: (plan.segments.len() - segment_begin) as u32,
            run_begin: first_run as u32,
            run_skip,
            columns: content.columns,
            pack,
            fresh: content.fresh(),
            partial: content.partial,
            shared: false,
            siblings: 1,
        });
    }
}

/// Appends the tiles of a group, as pack `pack`: the query tokens of `members`, over the columns that these share.
pub(crate) fn push_group(tiles: &mut Vec<Tile>, plan: &mut Plan, batch: &Batch, pack: u32, members: &[u32], group: &Group) {
    let requests = || members.iter().map(|&request| &batch.requests()[request as usize]);
    let division = Division::of(requests().map(|request| request.query_len).sum(), plan.heads);
    let new_tile = Tile {
        kind: TileKind::Wide,
        segment_begin: 0,
        num_segments: 0,
        run_begin: plan.runs.len() as u32,
        run_skip: 0,
        columns: group.end.column - group.begin.column,
        pack,
        fresh: division.fresh(),
        partial: true,
        shared: true,
        siblings: 0,
    };
    if let Some(request) = requests().next() {
        push_runs(plan, batch.runs_of(request), group.begin, Some(group.end));
    }

    let first = tiles.len();
    let mut free = 0;
    for request in requests() {
        let (mut token, end) = (request.first_token, request.first_token + request.query_len);
        while token < end {
            if free == 0 {
                let is_full = tiles.len() - first < division.full_tiles as usize;
                free = if is_full { division.tile_tokens } else { division.remainder };
                let kind = if is_full { TileKind::Wide } else { kind_for(free, plan.heads) };
                tiles.push(Tile { kind, segment_begin: plan.segments.len() as u32, ..new_tile });
            }
            let num_tokens = free.min(end - token);
            if let Some(tile) = tiles.last_mut() {
                push_tokens(tile, &mut plan.segments, token, num_tokens);
            }
            free -= num_tokens;
            token += num_tokens;
        }
    }
    let siblings = (tiles.len() - first) as u32;
    if let Some(first) = tiles.get_mut(first) {
        first.siblings = siblings;
    }
}

/// Adds query tokens, which see all columns, to the last tile: to its last segment if they follow that one's.
fn push_tokens(tile: &mut Tile, segments: &mut Vec<RowSegment>, first_token: u32, num_tokens: u32) {
    match segments[tile.segment_begin as usize..].last_mut() {
        Some(last) if last.first_token + last.num_tokens == first_token => last.num_tokens += num_tokens,
        _ => {
            segments.push(RowSegment {
                first_token,
                num_tokens,
                column_begin: 0,
                begin_hold: NO_WINDOW,
                column_end: tile.columns,
                column_end_step: 0,
            });
            tile.num_segments += 1;
        }
    }
}

/// Rows of the wide tiles of a batch in a shape, with so many query heads in a group. They are tall where there are kernels for
/// that and most rows are of requests that fill more than one tile, unless requests of few rows have much to read: the kernels
/// for tall tiles have no narrow ones.
pub(crate) fn wide_tile_rows(batch: &Batch, shape: AttentionShape, model: &DeviceModel, heads_per_group: u32) -> u32 {
    /// The part of a batch's time that requests of few rows may take at most.
    const MOST_NARROW: f64 = 0.05;
    let family = model.kernel_family;
    let rows = family.wide_tile_rows(shape.head_dim());
    let all_rows = u64::from(batch.num_query_tokens()) * u64::from(heads_per_group);
    let Some(tall_rows) = family.tall_tile_rows(shape) else { return rows };
    if all_rows <= batch.requests().len() as u64 * u64::from(NARROW_TILE_ROWS) {
        return rows; // that is soon seen, and most decodes are left out
    }
    let (mut rows_of_long, mut narrow_kv_tokens) = (0, 0);
    for request in batch.requests() {
        let rows = u64::from(request.query_len) * u64::from(heads_per_group);
        if rows > u64::from(WIDE_TILE_ROWS) {
            rows_of_long += rows;
        } else if rows <= u64::from(NARROW_TILE_ROWS) {
            narrow_kv_tokens += request.seen(batch.mask()).len() as u64;
        }
    }
    let narrow_ns = 1e9 * (narrow_kv_tokens * shape.kv_bytes_per_slot()) as f64 / model.bytes_per_s;
    let is_tall = 2 * rows_of_long >= all_rows && narrow_ns <= MOST_NARROW * model.least_ns(LeastWork::of(batch, 0));
    if is_tall { tall_rows } else { rows }
}
