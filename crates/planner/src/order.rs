//! In which order the items of a plan are begun.
//!
//! Pack after pack, so that tiles that read the same KV run at the same time and find it in the L2 cache; the packs with the
//! longest items first. Of each pack the longest come first, so that the device ends with short ones; but items of shared columns
//! go by these. Items whose columns nobody else reads are packs by themselves.
//!
//! So the last pack alone decides how the lanes end. Where it has too few short items, those of all packs come last instead: they
//! have few columns, so hardly anything is read again for it.

use packinfer_abi::TileKind;

use crate::cost::{Ns, WorkTimes};
use crate::device::LanesOfGroups;
use crate::items::Item;
use crate::lanes::{Lanes, total_and_latest_end};
use crate::tile::Tile;

/// Lanes that end this close together, as a part of the whole, are left as they are.
const BALANCED: f64 = 0.02;
/// Short items take this part of everything at most.
const MOST_SHORT: f64 = 0.25;
/// Items of a head group that are given to lanes to see when they end: plans of more have so many for each lane that it hardly
/// matters.
const MOST_GIVEN: usize = 1 << 12;

/// What an item's place in the plan is decided by.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// What the longest item of its pack takes, or itself if nobody else reads its columns.
    longest: Ns,
    pack: u32,
    /// The least comes first of its pack.
    rank: Ns,
    item: u32,
}

/// The order of a plan's items. It keeps its memory from plan to plan.
#[derive(Clone, Debug, Default)]
pub(crate) struct Order {
    places: Vec<Place>,
    /// The most columns of a tile that others read too.
    shared_columns: u32,
    /// What the longest item of each pack takes.
    longest: Vec<Ns>,
    /// Of each pack, what the shortest takes that is not begun last.
    shortest: Vec<Ns>,
    /// What the items take, the shortest first.
    ascending: Vec<Ns>,
    /// Places in another order, while that is being looked at.
    others: Vec<Place>,
    lanes: Lanes,
}

impl Order {
    /// That in which the items are.
    pub fn keep(&mut self, items: &[Item]) {
        self.shared_columns = 0;
        self.places.clear();
        self.places.extend((0..items.len() as u32).map(|item| Place { longest: 0, pack: 0, rank: 0, item }));
    }

    /// Sorts items, which take these times. If they are whole tiles, `tiles_longest_first` is nearly their order.
    pub fn sort(
        &mut self,
        items: &[Item],
        tiles: &[Tile],
        times: &[WorkTimes],
        tiles_longest_first: impl Iterator<Item = u32>,
        device: LanesOfGroups,
    ) {
        let Self { places, longest, .. } = self;
        longest.clear();
        longest.resize(tiles.last().map_or(0, |tile| tile.pack as usize + 1), 0);
        for (item, times) in items.iter().zip(times) {
            let longest = &mut longest[tiles[item.tile as usize].pack as usize];
            *longest = times.full_ns().max(*longest);
        }
        let mut shared_columns = 0;
        let mut place = |index: u32| {
            let (Item { item, tile }, full_ns) = (&items[index as usize], times[index as usize].full_ns());
            let Tile { pack, fresh, shared, columns, .. } = tiles[*tile as usize];
            // Nobody else reads the columns.
            let is_alone = fresh == 1.0;
            shared_columns = if is_alone { shared_columns } else { columns.max(shared_columns) };
            let longest = if is_alone { full_ns } else { longest[pack as usize] };
            let rank = if shared { Ns::from(item.column_begin) } else { !full_ns };
            Place { longest, pack, rank, item: index }
        };
        places.clear();
        if items.len() == tiles.len() {
            places.extend(tiles_longest_first.map(&mut place));
        } else {
            places.extend((0..items.len() as u32).map(&mut place));
        }
        sort_by_packs(places, |place| place.longest);
        self.shared_columns = shared_columns;
        if shared_columns > 0 && items.len() <= MOST_GIVEN {
            self.end_with_short_items(tiles, items, times, device);
        }
    }

    /// Has short items of all packs begun last, if the lanes then end earlier.
    fn end_with_short_items(&mut self, tiles: &[Tile], items: &[Item], times: &[WorkTimes], device: LanesOfGroups) {
        let time_of = |place: &Place| times[place.item as usize].full_ns();
        let Self { places, shortest, ascending, others, lanes, .. } = self;
        let mut end = |places: &[Place]| {
            lanes.reset(device.lanes);
            for time in places.iter().flat_map(|place| std::iter::repeat_n(time_of(place), device.copies as usize)) {
                lanes.add(time);
            }
            lanes.max()
        };
        let (total, latest_end) = total_and_latest_end(places.iter().map(time_of), device.copies, device.lanes);
        let is_balanced = |end: Ns| end as f64 <= total as f64 / f64::from(device.lanes) * (1.0 + BALANCED);
        // The latest end is found sooner, and mostly is enough.
        if is_balanced(latest_end) {
            return;
        }
        let end_by_packs = end(places);
        if is_balanced(end_by_packs) {
            return;
        }
        ascending.clear();
        ascending.extend(places.iter().map(time_of));
        ascending.sort_unstable();
        let Some(longest_short) = longest_short(ascending, total, device) else { return };
        let is_short = |place: &Place| time_of(place) <= longest_short && !tiles[items[place.item as usize].tile as usize].shared;
        shortest.clear();
        shortest.resize(self.longest.len(), Ns::MAX);
        for place in places.iter().filter(|place| !is_short(place)) {
            let shortest = &mut shortest[place.pack as usize];
            *shortest = time_of(place).min(*shortest);
        }
        // Packs that have nothing short come first, whatever else they have.
        others.clear();
        others.extend(places.iter().filter(|place| !is_short(place)));
        sort_by_packs(others, |place| shortest[place.pack as usize]);
        let first_short = others.len();
        others.extend(places.iter().filter(|place| is_short(place)));
        others[first_short..].sort_unstable_by_key(|place| u128::from(!time_of(place)) << 32 | u128::from(place.item));
        if (end(others) as f64) < end_by_packs as f64 * (1.0 - BALANCED) {
            std::mem::swap(places, others);
        }
    }

    /// The most columns of a tile that others read too; none if all read their own.
    pub fn shared_columns(&self) -> u32 {
        self.shared_columns
    }

    /// Puts narrow items behind the others, each kind in its order.
    pub fn put_narrow_last(&mut self, items: &[Item]) {
        let is_narrow = |place: &Place| items[place.item as usize].item.tile == TileKind::Narrow;
        self.others.clear();
        self.others.extend(self.places.iter().filter(|place| is_narrow(place)));
        self.places.retain(|place| !is_narrow(place));
        self.places.append(&mut self.others);
    }

    /// The items in order, by their numbers.
    pub fn iter(&self) -> impl Iterator<Item = usize> {
        self.places.iter().map(|place| place.item as usize)
    }
}

/// What the longest short item takes: there are so many short ones that they give each lane as much to do as the longest of them
/// takes. None if these are too much of the `total`. `ascending` is what the items of a head group take.
fn longest_short(ascending: &[Ns], total: Ns, device: LanesOfGroups) -> Option<Ns> {
    let times_copies = |time: Ns| time.saturating_mul(Ns::from(device.copies));
    let mut so_far: Ns = 0;
    let longest = ascending.iter().copied().find(|&time| {
        so_far = times_copies(time).saturating_add(so_far);
        so_far >= time.saturating_mul(Ns::from(device.lanes))
    })?;
    // Those that take as long are short too.
    let short = &ascending[..ascending.partition_point(|&time| time <= longest)];
    let all_short = times_copies(short.iter().fold(0, |sum, &time| time.saturating_add(sum)));
    (all_short as f64 <= MOST_SHORT * total as f64).then_some(longest)
}

/// Sorts pack by pack, those of the greatest `of_pack` first.
fn sort_by_packs(places: &mut [Place], of_pack: impl Fn(&Place) -> Ns) {
    // By numbers, which are sorted faster than by fields; so packs come first, then what is in each.
    places
        .sort_unstable_by_key(|place| u128::from(!of_pack(place)) << 64 | u128::from(place.pack) << 32 | u128::from(place.item));
    for of_pack in places.chunk_by_mut(|a, b| (of_pack(a), a.pack) == (of_pack(b), b.pack)).filter(|places| places.len() > 1) {
        of_pack.sort_unstable_by_key(|place| u128::from(place.rank) << 32 | u128::from(place.item));
    }
}
