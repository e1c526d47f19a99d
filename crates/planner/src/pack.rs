//! Which requests share a tile: bin packing of what remains of requests behind their full tiles.
//!
//! A tile of several requests saves fixed costs and half-empty steps, but its requests wait for each other. So a remainder joins
//! a tile if the cost model says that the tile then takes less than both would apart, and if the tile stays short: short items at
//! the end of a launch are what evens out the lanes.

use packinfer_abi::{HeadGroups, TileKind, WIDE_TILE_ROWS};
use packinfer_batch::{Batch, Mask};

use crate::cost::{CostModel, Ns, WorkTimes};
use crate::share::Sharing;
use crate::tile::{Content, kind_for, last_column_end, tokens_per_tile};

/// A tile of several requests takes at most this part of what a lane has to do.
const LONGEST_PACK: f64 = 1.0 / 16.0;
/// End of a list of requests.
const NONE: u32 = u32::MAX;

/// Divides requests into packs. It keeps its memory from batch to batch.
#[derive(Clone, Debug, Default)]
pub(crate) struct Packer {
    /// Members of all packs, pack after pack.
    members: Vec<u32>,
    packs: Vec<Pack>,
    remainders: Remainders,
    /// What a request's remainder takes in a tile of its own.
    alone: Vec<TileTime>,
}

/// What a tile takes.
#[derive(Clone, Copy, Debug, Default)]
struct TileTime {
    ns: Ns,
    /// Whether that is what its traffic takes.
    is_traffic: bool,
}

impl TileTime {
    fn of(times: WorkTimes) -> Self {
        Self { ns: times.full_ns(), is_traffic: times.is_traffic() }
    }
}

/// Requests whose remainders share a tile.
#[derive(Clone, Copy, Debug)]
struct Pack {
    /// One past its last member.
    end: u32,
    kind: TileKind,
}

/// Remainders that are in no pack yet: for each number of query tokens a list of requests.
#[derive(Clone, Debug, Default)]
struct Remainders {
    /// First request of a list.
    first: Vec<u32>,
    /// The request after a request.
    next: Vec<u32>,
    /// Bit `n` is set where list `n` is not empty.
    present: u128,
}

impl Remainders {
    /// Of longer ones, which tall tiles may have, few have room for others.
    const MOST_TOKENS: u32 = WIDE_TILE_ROWS - 1;

    fn reset(&mut self, num_requests: usize) {
        self.first.clear();
        self.first.resize(Self::MOST_TOKENS as usize + 1, NONE);
        self.next.clear();
        self.next.resize(num_requests, NONE);
        self.present = 0;
    }

    fn push(&mut self, tokens: u32, request: u32) {
        let first = &mut self.first[tokens as usize];
        self.next[request as usize] = *first;
        *first = request;
        self.present |= 1 << tokens;
    }

    /// The longest remainder of at most `tokens` tokens: its tokens and its request.
    fn longest(&self, tokens: u32) -> Option<(u32, u32)> {
        let fit = self.present & (u128::MAX >> (Self::MOST_TOKENS - tokens.min(Self::MOST_TOKENS)));
        let tokens = fit.checked_ilog2()?;
        Some((tokens, self.first[tokens as usize]))
    }

    /// Removes the first request of a list.
    fn pop(&mut self, tokens: u32) {
        let first = &mut self.first[tokens as usize];
        *first = self.next[*first as usize];
        if *first == NONE {
            self.present &= !(1 << tokens);
        }
    }
}

impl Packer {
    /// Divides all requests that have query tokens and KV of their own into packs, for `lanes` lanes that share the work of a
    /// head group; each by itself if not `together`.
    pub fn pack(&mut self, batch: &Batch, sharing: &Sharing, heads: HeadGroups, cost: &CostModel, lanes: f64, together: bool) {
        self.members.clear();
        self.packs.clear();
        self.remainders.reset(batch.requests().len());
        let total = self.estimate(batch, sharing, heads, cost);
        let longest_pack = if together { (total as f64 / lanes * LONGEST_PACK) as Ns } else { 0 };

        // Lists give back last what they were given first, so in reverse: neighbours stay neighbours.
        for index in (0..batch.requests().len()).rev() {
            let division = sharing.own(batch, index as u32).division(heads);
            let tokens = division.remainder;
            // Of a request with a sliding window, the remainder does not see all of the columns that come before it.
            let sees_all = division.full_tiles == 0 || !matches!(batch.mask(), Mask::Window(_));
            let may_join = tokens <= Remainders::MOST_TOKENS && sees_all && self.alone[index].ns < longest_pack;
            if tokens > 0 && may_join {
                self.remainders.push(tokens, index as u32);
            } else if tokens > 0 || division.full_tiles > 0 {
                self.members.push(index as u32);
                self.packs.push(Pack { end: self.members.len() as u32, kind: kind_for(tokens, heads) });
            }
        }
        while let Some(first) = self.remainders.longest(Remainders::MOST_TOKENS) {
            self.remainders.pop(first.0);
            self.fill(batch, sharing, heads, cost, first, longest_pack);
        }
    }

    /// The packs, each with the kind of the tile that its members' remainders share.
    pub fn packs(&self) -> impl Iterator<Item = (&[u32], TileKind)> {
        let mut begin = 0;
        self.packs.iter().map(move |pack| {
            let members = &self.members[begin..pack.end as usize];
            begin = pack.end as usize;
            (members, pack.kind)
        })
    }

    /// About what all tiles take, if no requests share one; notes what each remainder takes.
    fn estimate(&mut self, batch: &Batch, sharing: &Sharing, heads: HeadGroups, cost: &CostModel) -> Ns {
        self.alone.clear();
        let mut total = sharing.groups_ns() as Ns;
        for request in 0..batch.requests().len() as u32 {
            let own = sharing.own(batch, request);
            let division = own.division(heads);
            let item = |kind, tokens| {
                let segment = own.segment(batch.mask(), tokens, 0);
                cost.item(kind, &[segment], 0..last_column_end(&segment), division.fresh(), own.is_partial())
            };
            let alone = match division.remainder {
                0 => TileTime::default(),
                tokens => TileTime::of(item(kind_for(tokens, heads), division.remainder_tokens())),
            };
            if division.full_tiles > 0 {
                let middle = item(TileKind::Wide, division.full_tile(division.full_tiles / 2)).full_ns();
                total = middle.saturating_mul(Ns::from(division.full_tiles)).saturating_add(total);
            }
            total = alone.ns.saturating_add(total);
            self.alone.push(alone);
        }
        total
    }

    /// Makes a pack of the remainder of `first` and of others, the longest first that fit.
    fn fill(
        &mut self,
        batch: &Batch,
        sharing: &Sharing,
        heads: HeadGroups,
        cost: &CostModel,
        first: (u32, u32),
        longest_pack: Ns,
    ) {
        let (tokens, first) = first;
        let kind = kind_for(tokens, heads);
        let mut free = tokens_per_tile(kind, heads) - tokens;
        let (mut content, mut rows) = (Content::default(), cost.no_rows(kind));
        content.add(sharing.own(batch, first), batch.mask(), heads).iter().for_each(|segment| cost.add(&mut rows, segment));
        let mut pack = self.alone[first as usize];
        self.members.push(first);
        while let Some((tokens, next)) = self.remainders.longest(free) {
            let alone = self.alone[next as usize];
            // Traffic only adds up: that is soon seen of most decodes.
            let num_rows = [rows.num_rows(), tokens * heads.heads_per_group];
            if pack.is_traffic && alone.is_traffic && !cost.shares_item_time(kind, num_rows) {
                break;
            }
            let own = sharing.own(batch, next);
            if content.columns.saturating_add(own.kv_len()) > Batch::MAX_SLOTS {
                break;
            }
            content.add(own, batch.mask(), heads).iter().for_each(|segment| cost.add(&mut rows, segment));
            let joined = TileTime::of(cost.item_of_rows(&rows, 0..content.columns, content.fresh(), content.partial));
            if joined.ns > longest_pack || joined.ns >= alone.ns.saturating_add(pack.ns) {
                break;
            }
            pack = joined;
            free -= tokens;
            self.remainders.pop(tokens);
            self.members.push(next);
        }
        self.packs.push(Pack { end: self.members.len() as u32, kind });
    }
}
