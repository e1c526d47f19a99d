//! Which tiles are split along their columns, and where.
//!
//! Tiles go to lanes one after another, the longest first, each to the lane that is free first. If the lanes then end too far
//! apart, a tile that would keep its lane busy past the common end is cut there, and the rest of it goes on elsewhere: so few
//! tiles are split, and the lanes end together. Where there are fewer decodes than lanes, they may also be cut evenly, so that each
//! lane has one part: whichever is predicted to end sooner.

use std::cmp::Reverse;
use std::ops::Range;

use packinfer_abi::{COLUMN_STEP, TileKind};
use packinfer_batch::Batch;

use crate::cost::{self, CostModel, Ns, WorkTimes, memory_need, num_rows};
use crate::device::LanesOfGroups;
use crate::lanes::{Lanes, total_and_latest_end};
use crate::tile::{Tile, siblings};
use crate::{KernelFamily, Plan};

/// Splits are at multiples of so many columns: whole steps of every kernel.
const SPLIT_STEP: u32 = 2 * COLUMN_STEP;
/// The columns of a part of a wide tile take at least so many times what it takes besides …
const LEAST_WIDE_PART: f64 = 1.0;
/// … and those of a narrow one so many times what one of few rows does, as there is more to merge for every part …
const LEAST_NARROW_PART: f64 = 2.0;
/// … which is done in the same launch on Hopper.
const LEAST_NARROW_PART_OF_HOPPER: f64 = 3.5;
/// A part takes at most this share of what a lane has to do, so that lanes that fall behind can be helped out …
const LONGEST_PART: f64 = 0.5;
/// … which for decodes is better done after one long part than after two, with what is short; but there must be enough of that
/// for all lanes, of which the `sm_80` kernels have twice as many …
const LONGEST_NARROW_PART_OF_HOPPER: f64 = 0.75;
/// … or so many times what it takes besides its columns, so that tiles of many rows do not leave too many partials.
const WORTHWHILE_PART: f64 = 6.0;
/// Where each lane has only one part, it has at least so many columns, but for the last part of a tile: with half as many, merging
/// twice the partials takes longer than what a lane gains.
const LEAST_ONLY_PART: u32 = 2 * SPLIT_STEP;
/// Tiles are split even if they are predicted to end so many times as late: lanes are taken to end with whole parts, where whoever
/// is free first has the next one.
const NO_LONGER: f64 = 1.01;
/// Lanes that end this close together, as a share of the whole, are not worth a split.
const BALANCED: f64 = 0.02;

/// A range of columns of a tile and of its siblings, if it has some: work items to be.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    /// The tile, the first of its siblings.
    pub tile: u32,
    pub columns: Range<u32>,
}

/// Divides tiles among lanes. It keeps its memory from plan to plan.
#[derive(Clone, Debug, Default)]
pub(crate) struct Splitter {
    parts: Vec<Part>,
    /// One for each lane, at most.
    even_parts: Vec<Part>,
    /// What whole tiles take.
    times: Vec<WorkTimes>,
    /// Tiles with their costs, the longest first.
    order: Vec<(Reverse<Ns>, u32)>,
    lanes: Lanes,
    /// Head groups that share the lanes.
    copies: u32,
}

impl Splitter {
    /// What an item takes for all head groups that share the lanes.
    fn times(&self, item: Ns) -> Ns {
        item.saturating_mul(Ns::from(self.copies))
    }

    /// Tiles with no split at all, in their order.
    pub fn whole(&mut self, tiles: &[Tile]) -> &[Part] {
        self.parts.clear();
        let first_siblings = tiles.iter().zip(0..).filter(|(tile, _)| tile.siblings > 0);
        self.parts.extend(first_siblings.map(|(tile, index)| Part { tile: index, columns: 0..tile.columns }));
        &self.parts
    }

    /// What the tiles that were split last take whole.
    pub fn times_of_tiles(&self) -> &[WorkTimes] {
        &self.times
    }

    /// The tiles that were split last, the longest first.
    pub fn longest_first(&self) -> impl Iterator<Item = u32> {
        self.order.iter().map(|&(_, tile)| tile)
    }

    /// The parts of tiles, those of one tile one after the other.
    pub fn split(&mut self, tiles: &[Tile], plan: &Plan, cost: &CostModel) -> &[Part] {
        let model = &plan.model;
        let LanesOfGroups { lanes: num_lanes, copies, .. } = model.lanes_of_groups(plan.heads.num_groups);
        self.copies = copies;
        let times = tiles.iter().map(|tile| {
            let segments = tile.segments(&plan.segments);
            cost.item(tile.kind, segments, 0..tile.columns, tile.fresh, tile.partial)
        });
        self.times.clear();
        self.times.extend(times);
        self.order.clear();
        // While some lanes do wide tiles, which need less of the memory, those with narrow ones have more of it.
        let memory_need = memory_need(self.times.iter().copied());
        let tiles_ns = tiles.iter().zip(&self.times).map(|(tile, times)| match tile.kind {
            TileKind::Wide => times.full_ns(),
            TileKind::Narrow => times.with_memory_for(memory_need) as Ns,
        });
        self.order.extend(tiles_ns.zip(0..).map(|(tile_ns, index)| (Reverse(tile_ns), index)));
        // As numbers, which are sorted faster than pairs.
        self.order.sort_unstable_by_key(|&(Reverse(item), index)| u128::from(!item) << 32 | u128::from(index));
        let longest_first = self.order.iter().map(|&(Reverse(item), _)| item);
        let (total, latest_end) = total_and_latest_end(longest_first, copies, num_lanes);
        let ideal = total as f64 / f64::from(num_lanes);
        let first_merge_ns = if tiles.iter().any(|tile| tile.partial) { 0.0 } else { model.merge_ns };
        let is_balanced = |end: Ns| end as f64 <= ideal * (1.0 + BALANCED) || end as f64 <= ideal + first_merge_ns;
        if !is_balanced(latest_end) && !is_balanced(self.end_unsplit(num_lanes)) {
            let unsplit = self.lanes.max() as f64;
            self.whole(tiles);
            let unsplit = NO_LONGER * (unsplit + merge_ns(&self.parts, tiles, plan));
            // The first pass shows how much more work the parts are, the second divides that too.
            let with_splits = self.fill_lanes(tiles, plan, cost, num_lanes, total);
            let first_end = self.lanes.max();
            self.fill_lanes(tiles, plan, cost, num_lanes, with_splits.max(total));
            // Where that leaves room for what was cut before, lanes may end further apart than they did.
            if self.lanes.max() > first_end {
                self.fill_lanes(tiles, plan, cost, num_lanes, total);
            }
            let filled = self.lanes.max() as f64 + merge_ns(&self.parts, tiles, plan);
            if let Some(end) = self.give_each_lane_one(tiles, plan, cost, num_lanes)
                && end as f64 + merge_ns(&self.even_parts, tiles, plan) < filled.min(unsplit)
            {
                return &self.even_parts;
            }
            if filled < unsplit {
                return &self.parts;
            }
        }
        self.whole(tiles)
    }

    /// Cuts narrow tiles so that no lane has more than one part, and the longest one is as short as can be. Returns when that ends;
    /// nothing if there are too many tiles, or wide ones.
    fn give_each_lane_one(&mut self, tiles: &[Tile], plan: &Plan, cost: &CostModel, num_lanes: u32) -> Option<Ns> {
        if tiles.len() as u32 > num_lanes / self.copies || tiles.iter().any(|tile| tile.kind == TileKind::Wide) {
            return None;
        }
        let parts_of = |tile: &Tile, most_steps: u32| tile.columns.div_ceil(most_steps * SPLIT_STEP).max(1);
        let is_enough = |most_steps: u32| {
            let items = tiles.iter().map(|tile| u64::from(tile.siblings) * u64::from(parts_of(tile, most_steps)));
            items.sum::<u64>() * u64::from(self.copies) <= u64::from(num_lanes)
        };
        let (mut too_few_steps, mut most_steps) = (LEAST_ONLY_PART / SPLIT_STEP - 1, Batch::MAX_SLOTS.div_ceil(SPLIT_STEP));
        while most_steps - too_few_steps > 1 {
            let between = too_few_steps.midpoint(most_steps);
            if is_enough(between) {
                most_steps = between;
            } else {
                too_few_steps = between;
            }
        }
        let mut end = 0;
        self.even_parts.clear();
        for &(Reverse(whole), index) in &self.order {
            let tile = &tiles[index as usize];
            if tile.siblings == 0 {
                continue; // It is cut where the first of its siblings is.
            }
            let columns = tile.columns.div_ceil(parts_of(tile, most_steps)).next_multiple_of(SPLIT_STEP).min(tile.columns);
            end = end.max(TileCost::of(tile, plan, cost, whole).part(columns, columns < tile.columns));
            let begins = (0..tile.columns).step_by(columns as usize);
            self.even_parts.extend(begins.map(|begin| Part { tile: index, columns: begin..tile.columns.min(begin + columns) }));
        }
        Some(end)
    }

    /// When all lanes are free if no tile is cut.
    fn end_unsplit(&mut self, num_lanes: u32) -> Ns {
        self.lanes.reset(num_lanes);
        for &(Reverse(item), _) in &self.order {
            for _ in 0..self.copies {
                self.lanes.add(item);
            }
        }
        self.lanes.max()
    }

    /// Cuts tiles so that the lanes end together when they have done `work`, which may be more than the tiles take without a
    /// cut. Returns what the parts take.
    fn fill_lanes(&mut self, tiles: &[Tile], plan: &Plan, cost: &CostModel, num_lanes: u32, work: Ns) -> Ns {
        let share = |work: Ns| work.div_ceil(Ns::from(num_lanes));
        self.parts.clear();
        self.lanes.reset(num_lanes);
        let (mut placed, mut unplaced): (Ns, Ns) = (0, work);
        let mut end = share(work);
        for &(Reverse(whole), index) in &self.order {
            let tile = &tiles[index as usize];
            unplaced = unplaced.saturating_sub(self.times(whole));
            if tile.siblings == 0 {
                continue; // It was cut where the first of its siblings was.
            }
            let tile_cost = TileCost::of(tile, plan, cost, whole);
            let longest_part = match (plan.model.kernel_family, tile.kind) {
                (KernelFamily::Sm90a, TileKind::Narrow) => LONGEST_NARROW_PART_OF_HOPPER,
                _ => LONGEST_PART,
            };
            let mut begin = 0;
            while begin < tile.columns {
                let left = tile.columns - begin;
                let rest = tile_cost.part(left, begin > 0);
                let least = tile_cost.part(tile_cost.least_columns, true);
                let free_from = if self.copies > 1 { self.lanes.second() } else { self.lanes.least() };
                if free_from.saturating_add(least) > end {
                    // All lanes are full: what is left is shared out evenly once more.
                    end = free_from.saturating_add(least.max(share(unplaced.saturating_add(self.times(rest)))));
                }
                let room = end.saturating_sub(free_from);
                let mut columns = left;
                if rest > room {
                    let longest = (end as f64 * longest_part).max(tile_cost.fixed_partial_ns * WORTHWHILE_PART) as Ns;
                    let part = tile_cost.columns_within(room.min(longest)).max(tile_cost.least_columns);
                    if left.saturating_sub(part) >= tile_cost.least_columns {
                        columns = part;
                    }
                }
                let part = tile_cost.part(columns, columns < tile.columns);
                for _ in 0..tile.siblings * self.copies {
                    self.lanes.add(part);
                    placed = part.saturating_add(placed);
                }
                self.parts.push(Part { tile: index, columns: begin..begin + columns });
                begin += columns;
            }
        }
        placed
    }
}

/// About what merging the partials of some parts takes.
fn merge_ns(parts: &[Part], tiles: &[Tile], plan: &Plan) -> f64 {
    let (mut tokens, mut rows) = (0, 0);
    for part in parts {
        for tile in siblings(tiles, part.tile) {
            if tile.partial || part.columns.len() < tile.columns as usize {
                let tile_rows = num_rows(plan.heads, tile.segments(&plan.segments));
                rows += u64::from(tile_rows);
                // Tokens of shared columns have columns of their own, too.
                if part.columns.start == 0 && !tile.shared {
                    tokens += u64::from(tile_rows / plan.heads.heads_per_group);
                }
            }
        }
    }
    cost::merge_ns(&plan.model, plan.attended.shape, plan.heads, tokens, rows)
}

/// What a tile's columns take, taken to be all alike.
struct TileCost {
    fixed_ns: f64,
    /// As `fixed_ns`, where partials are written.
    fixed_partial_ns: f64,
    column_ns: f64,
    /// The fewest columns of a part.
    least_columns: u32,
}

impl TileCost {
    fn of(tile: &Tile, plan: &Plan, cost: &CostModel, whole: Ns) -> Self {
        let rows = num_rows(plan.heads, tile.segments(&plan.segments));
        let (block_ns, whole) = (cost.fixed_block_ns(tile.kind, rows), whole as f64);
        let of_traffic = |partial| cost.fixed_traffic_ns(tile.kind, rows, partial);
        let read_ns = f64::from(tile.columns) * cost.read_ns(tile.kind, tile.fresh);
        // Costs are rounded to whole nanoseconds.
        let is_traffic = of_traffic(tile.partial) + read_ns + 1.0 > whole;
        let fixed_ns = if is_traffic { of_traffic(tile.partial) } else { block_ns };
        let fixed_partial_ns = if is_traffic { of_traffic(true) } else { block_ns };
        let column_ns = ((whole - fixed_ns) / f64::from(tile.columns)).max(f64::MIN_POSITIVE);
        let least_ns = match (plan.model.kernel_family, tile.kind) {
            (_, TileKind::Wide) => LEAST_WIDE_PART * fixed_partial_ns.max(block_ns),
            (KernelFamily::Sm80, TileKind::Narrow) => LEAST_NARROW_PART * cost.fixed_block_ns(tile.kind, 1),
            (KernelFamily::Sm90a, TileKind::Narrow) => LEAST_NARROW_PART_OF_HOPPER * cost.fixed_block_ns(tile.kind, 1),
        };
        let least_columns = (least_ns / column_ns) as u32; // saturates
        let least_columns = least_columns.clamp(1, Batch::MAX_SLOTS).next_multiple_of(SPLIT_STEP);
        Self { fixed_ns, fixed_partial_ns, column_ns, least_columns }
    }

    /// What an item with so many columns takes.
    fn part(&self, columns: u32, partial: bool) -> Ns {
        let fixed_ns = if partial { self.fixed_partial_ns } else { self.fixed_ns };
        (fixed_ns + f64::from(columns) * self.column_ns) as Ns
    }

    /// The most columns of a part that takes no longer than `time`.
    fn columns_within(&self, time: Ns) -> u32 {
        let columns = ((time as f64 - self.fixed_partial_ns) / self.column_ns) as u32;
        columns / SPLIT_STEP * SPLIT_STEP
    }
}
