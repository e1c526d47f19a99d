//! List scheduling: each item goes to the lane that is free first, as a device issues thread blocks.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::cost::Ns;

/// The loads of lanes that work side by side, one block at a time each.
///
/// They are a tree of losers: lanes meet in pairs, the one with the lesser load goes on to the next pair, and each pair keeps the
/// other one. When the lane that won them all gets an item, only its own pairs meet again.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lanes {
    /// The lane that is free first, then those that pairs keep. Pair `i` is of who won pairs `2 i` and `2 i + 1`, or of lanes,
    /// which follow the pairs.
    lanes: Vec<Lane>,
    /// Who won each pair, then the lanes, while the tree is made.
    winners: Vec<Lane>,
    max: Ns,
    /// When items end that are watched, the first to do so on top.
    watched: BinaryHeap<Reverse<Ns>>,
}

/// A lane's load, and its number in the lower half: the first to be free is the least.
type Lane = u128;

/// When a lane is free, and its number.
fn load_and_number(lane: Lane) -> (Ns, u32) {
    ((lane >> 32) as Ns, lane as u32)
}

impl Lanes {
    /// So many idle lanes; at least one.
    pub fn reset(&mut self, count: u32) {
        self.reset_to(std::iter::repeat_n(0, count.max(1) as usize));
    }

    /// A lane for each load that it has already.
    pub fn reset_to(&mut self, loads: impl Iterator<Item = Ns>) {
        let Self { lanes, winners, max, watched } = self;
        watched.clear();
        lanes.clear();
        lanes.extend((0..).zip(loads).map(|(number, load): (u32, Ns)| Lane::from(load) << 32 | Lane::from(number)));
        let count = lanes.len();
        winners.clear();
        winners.extend_from_slice(lanes);
        winners.extend_from_slice(lanes);
        for pair in (1..count).rev() {
            let (a, b) = (winners[2 * pair], winners[2 * pair + 1]);
            (winners[pair], lanes[pair]) = (a.min(b), a.max(b));
        }
        if count > 1 {
            lanes[0] = winners[1];
        }
        *max = 0;
    }

    /// When the first lane is free.
    pub fn least(&self) -> Ns {
        self.first().map_or(0, |(load, _)| load)
    }

    /// When the first lane is free, and its number.
    pub fn first(&self) -> Option<(Ns, u32)> {
        self.lanes.first().map(|&lane| load_and_number(lane))
    }

    /// When a second lane is free, if there is one.
    pub fn second(&self) -> Ns {
        // It lost to the first one.
        let kept = self.first().into_iter().flat_map(|(_, number)| self.pairs_of(number)).map(|pair| self.lanes[pair]);
        kept.min().map_or(self.least(), |lane| load_and_number(lane).0)
    }

    /// When all lanes are free that were given an item.
    pub fn max(&self) -> Ns {
        self.max
    }

    /// When lanes are free, on average.
    pub fn mean(&self) -> f64 {
        let sum: f64 = self.lanes.iter().map(|&lane| load_and_number(lane).0 as f64).sum();
        sum / self.lanes.len().max(1) as f64
    }

    /// Gives an item to the lane that is free first.
    pub fn add(&mut self, cost: Ns) {
        if let Some((load, number)) = self.first() {
            let load = cost.saturating_add(load);
            self.max = self.max.max(load);
            let mut winner = Lane::from(load) << 32 | Lane::from(number);
            for pair in self.pairs_of(number) {
                let kept = &mut self.lanes[pair];
                (winner, *kept) = (winner.min(*kept), winner.max(*kept));
            }
            self.lanes[0] = winner;
        }
    }

    /// Watches an item, which a lane was given, until it ends.
    pub fn watch(&mut self, end_ns: Ns) {
        self.watched.push(Reverse(end_ns));
    }

    /// Watched items that have not ended when the first lane is free.
    pub fn watched(&mut self) -> usize {
        let now = self.least();
        while self.watched.peek().is_some_and(|&Reverse(end_ns)| end_ns <= now) {
            self.watched.pop();
        }
        self.watched.len()
    }

    /// The pairs that a lane meets others in if it wins, from the first to the last.
    fn pairs_of(&self, number: u32) -> impl Iterator<Item = usize> + use<> {
        let pair_before = |&pair: &usize| Some(pair / 2).filter(|&pair| pair > 0);
        std::iter::successors(pair_before(&(self.lanes.len() + number as usize)), pair_before)
    }
}

/// What items take that so many lanes get one after another, each item `copies` times; and when the lanes are free at the latest,
/// whichever is free first: nothing is begun later than they are free on average.
pub(crate) fn total_and_latest_end(items: impl Iterator<Item = Ns>, copies: u32, num_lanes: u32) -> (Ns, Ns) {
    let [copies, num_lanes] = [copies, num_lanes.max(1)].map(Ns::from);
    let (mut total, mut latest_end): (Ns, Ns) = (0, 0);
    for item in items {
        total = item.saturating_mul(copies).saturating_add(total);
        let end_by_lanes = item.saturating_mul(num_lanes).saturating_add(total - item.min(total));
        latest_end = end_by_lanes.max(latest_end);
    }
    (total, latest_end.div_ceil(num_lanes))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever items come to however many lanes: it is always the first of those with the least load that gets the next.
        #[test]
        fn the_first_of_the_least_loads_is_found(
            loads in prop::collection::vec(0..20u64, 1..70),
            items in prop::collection::vec(prop_oneof![0..20u64, Just(Ns::MAX)], 0..200),
        ) {
            let mut lanes = Lanes::default();
            lanes.reset_to(loads.iter().copied());
            let mut loads = loads;
            for item in items {
                let least = (0..loads.len()).min_by_key(|&lane| loads[lane]).expect("at least one lane");
                prop_assert_eq!(lanes.first(), Some((loads[least], least as u32)));
                let others = loads.iter().enumerate().filter(|(lane, _)| *lane != least).map(|(_, load)| *load);
                prop_assert_eq!(lanes.second(), others.min().unwrap_or(loads[least]));
                lanes.add(item);
                loads[least] = loads[least].saturating_add(item);
            }
        }
    }

    proptest! {
        #[test]
        fn lanes_are_free_when_it_is_said_that_they_are(
            items in prop::collection::vec(prop_oneof![0..50u64, Just(Ns::MAX)], 0..100),
            copies in 1..9u32,
            num_lanes in 1..20u32,
        ) {
            let mut lanes = Lanes::default();
            lanes.reset(num_lanes);
            items.iter().flat_map(|&item| std::iter::repeat_n(item, copies as usize)).for_each(|item| lanes.add(item));
            let (total, latest_end) = total_and_latest_end(items.iter().copied(), copies, num_lanes);
            prop_assert_eq!(total, items.iter().fold(0, |sum: Ns, &item| item.saturating_mul(copies.into()).saturating_add(sum)));
            // Sums that do not fit are cut off.
            prop_assert!(lanes.max() <= latest_end || items.contains(&Ns::MAX), "{} > {latest_end}", lanes.max());
        }
    }

    #[test]
    fn items_go_to_the_lane_that_is_free_first() {
        let mut lanes = Lanes::default();
        lanes.reset(2);
        for cost in [5, 3, 2, 4] {
            lanes.add(cost); // ends at 5, 3, 5, 9
        }
        assert_eq!((lanes.least(), lanes.second(), lanes.max()), (5, 9, 9));
        lanes.reset(0);
        lanes.add(7);
        assert_eq!((lanes.least(), lanes.second(), lanes.max()), (7, 7, 7));
        lanes.reset(5);
        for cost in [5, 3, 2, 4, 9] {
            lanes.add(cost);
        }
        assert_eq!((lanes.least(), lanes.second(), lanes.mean()), (2, 3, 23.0 / 5.0));
    }

    #[test]
    fn watched_items_end() {
        let mut lanes = Lanes::default();
        lanes.reset(2);
        for cost in [5, 3] {
            lanes.add(cost);
            lanes.watch(cost);
        }
        assert_eq!((lanes.least(), lanes.watched()), (3, 1));
        lanes.add(9);
        assert_eq!((lanes.least(), lanes.watched()), (5, 0));
        lanes.watch(20);
        lanes.reset(2);
        assert_eq!(lanes.watched(), 0);
    }

    #[test]
    fn lanes_may_have_loads_already() {
        let mut lanes = Lanes::default();
        lanes.reset_to([0, 9, 4].into_iter());
        assert_eq!((lanes.first(), lanes.second(), lanes.max()), (Some((0, 0)), 4, 0));
        for cost in [5, 2] {
            lanes.add(cost);
        }
        assert_eq!((lanes.first(), lanes.max()), (Some((5, 0)), 6));
        lanes.reset_to(std::iter::empty());
        lanes.add(1);
        assert_eq!((lanes.first(), lanes.max(), lanes.mean()), (None, 0, 0.0));
    }
}
