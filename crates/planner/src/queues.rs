//! How a device goes about what memory limits and what products limit: how many of the persistent blocks begin with the one,
//! while the others begin with the other; or whether each does both at a time.
//!
//! Narrow items leave the tensor cores idle, wide ones the memory: if some lanes do the one while the others do the other, both
//! are used. Wide items are few and long, so it matters in how many rounds they are done: one lane less for them can cost a whole
//! round. Several numbers of lanes are therefore tried, near the one that balances both kinds. For each, wide items are given to
//! lanes one after the other, and narrow ones, many and short, are taken for a fluid that fills whatever time is left.

use std::iter::repeat_n;

use packinfer_abi::TileKind;

use crate::cost::{Ns, WorkTimes, memory_need, memory_needed};
use crate::device::{BesideTimes, LanesOfGroups};
use crate::lanes::Lanes;
use crate::schedule::time_beside;

/// Below this part of the time of all items, one kind hardly matters, nor does how the device goes about them.
const WORTHWHILE: f64 = 0.05;
/// How many numbers of lanes are tried at most …
const MOST_TRIES: u32 = 16;
/// … and how many wide items are given to lanes in all tries, so that long plans do not take long to try. These have so many
/// items for each lane that none of them matters much.
const MOST_GIVEN: u32 = 1 << 13;
/// Where numbers of lanes are tried: these parts of the one that balances both kinds.
const NEAR_BALANCE: (f64, f64) = (0.5, 1.25);
/// In so many rounds that number is found.
const BALANCING_ROUNDS: u32 = 6;

/// How a device goes about two queues of items, wide ones in front and narrow ones behind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Arrangement {
    /// Lanes that begin with narrow items, if they are not done beside wide ones; the others begin with wide ones.
    pub back_lanes: u32,
    /// Whether narrow items are done beside wide ones, where there is a kernel for that.
    pub beside: bool,
}

/// Whether narrow items may be done beside wide ones.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Beside {
    /// There is no kernel for that.
    Never,
    /// If the call ends sooner then, as items take so long.
    IfFaster(BesideTimes),
    /// There is no other kernel. Items take so long.
    Always(BesideTimes),
}

/// What the items of a plan take, by kind. It keeps its memory from plan to plan.
#[derive(Clone, Debug, Default)]
pub(crate) struct Queues {
    /// In the order of the plan.
    wide: Vec<WorkTimes>,
    narrow: Vec<WorkTimes>,
    /// What all wide items take, for one head group.
    wide_ns: f64,
    /// The part of their share of the memory that wide items need.
    wide_need: f64,
    /// When the last arrangement ends.
    end_ns: f64,
    lanes: Lanes,
}

impl Queues {
    /// Takes in the items of a plan, in order.
    pub fn fill(&mut self, items: impl Iterator<Item = (TileKind, WorkTimes)>) {
        self.wide.clear();
        self.narrow.clear();
        for (tile, times) in items {
            match tile {
                TileKind::Wide => self.wide.push(times),
                TileKind::Narrow => self.narrow.push(times),
            }
        }
        self.wide_ns = self.wide.iter().map(|times| times.full()).sum();
    }

    /// How the device should go about both kinds of items so that the call ends first; nothing if there is hardly any work of one
    /// kind, so that queues do not matter.
    pub fn arrange(&mut self, device: LanesOfGroups, beside: Beside) -> Option<Arrangement> {
        if let Beside::Always(times) = beside {
            self.end_ns = self.beside_end_ns(times, device);
            let has_both = !self.wide.is_empty() && !self.narrow.is_empty();
            return has_both.then_some(Arrangement { back_lanes: 0, beside: true });
        }
        let narrow_ns = self.narrow_full_ns();
        if self.wide_ns.min(narrow_ns) <= WORTHWHILE * (self.wide_ns + narrow_ns) {
            return None;
        }
        self.wide_need = memory_need(self.wide.iter().copied());
        // All begin with wide items, and narrow ones come last, unless something else is worth it.
        let back_load = self.back_load(0, device);
        let wide_first_end_ns = self.in_turn_end_ns(0, back_load, device);
        let (mut best, mut best_end_ns) = (0, wide_first_end_ns * (1.0 - WORTHWHILE));
        // The fewest of those that end at the same time: one too many may cost a round of wide items.
        for back_lanes in self.numbers_to_try(device) {
            let back_load = self.back_load(back_lanes, device);
            if self.least_wide_end_ns(back_lanes, back_load, device) >= best_end_ns {
                continue;
            }
            let end_ns = self.in_turn_end_ns(back_lanes, back_load, device);
            if end_ns.total_cmp(&best_end_ns).is_lt() {
                (best, best_end_ns) = (back_lanes, end_ns);
            }
        }
        let beside_end_ns = match beside {
            Beside::IfFaster(times) => self.beside_end_ns(times, device),
            Beside::Never | Beside::Always(_) => f64::INFINITY,
        };
        let beside = beside_end_ns < best_end_ns;
        self.end_ns = if beside || best > 0 { best_end_ns.min(beside_end_ns) } else { wide_first_end_ns };
        Some(Arrangement { back_lanes: device.of_device(best), beside })
    }

    /// When the call ends as it was last arranged, in nanoseconds, without what comes before and after all items.
    pub fn end_ns(&self) -> f64 {
        self.end_ns
    }

    /// When the call ends, in nanoseconds, if narrow items are done beside wide ones.
    fn beside_end_ns(&mut self, times: BesideTimes, device: LanesOfGroups) -> f64 {
        self.give_out_wide(0, 0, device);
        let wide_ns = self.lanes.max() as f64;
        let mean_narrow_ns = f64::from(device.copies) * self.narrow_full_ns() / f64::from(device.lanes);
        let longest_ns = self.narrow.iter().map(|times| times.full()).fold(0.0, f64::max);
        let narrow_ns = mean_narrow_ns.max(longest_ns);
        // Whichever kind ends first has others beside it to its end.
        let first_end_ns = (wide_ns * times.wide).min(narrow_ns * times.narrow);
        time_beside(wide_ns, times.wide, first_end_ns).max(time_beside(narrow_ns, times.narrow, first_end_ns))
    }

    /// What narrow items take if there are no others.
    fn narrow_full_ns(&self) -> f64 {
        self.narrow.iter().map(|times| times.full()).sum()
    }

    /// What narrow items take if this part of the lanes does them and the others do wide ones.
    fn narrow_beside_wide_ns(&self, back_lanes: f64) -> f64 {
        let memory_needed = memory_needed(back_lanes, self.wide_need);
        self.narrow.iter().map(|times| times.with_memory_for(memory_needed)).sum()
    }

    /// The part of the lanes with which both kinds would be done at the same time if all items were short.
    fn balanced(&self) -> f64 {
        // The fewer lanes share the memory, the less narrow items take: a few rounds come close enough.
        (0..BALANCING_ROUNDS).fold(1.0, |back_lanes, _| {
            let narrow_ns = self.narrow_beside_wide_ns(back_lanes);
            narrow_ns / (narrow_ns + self.wide_ns)
        })
    }

    /// Numbers of lanes near the balanced one.
    fn numbers_to_try(&self, device: LanesOfGroups) -> impl Iterator<Item = u32> + use<> {
        let given = u32::try_from(self.wide.len()).unwrap_or(u32::MAX).saturating_mul(device.copies).max(1);
        let most_tries = (MOST_GIVEN / given).clamp(2, MOST_TRIES);
        let balanced = f64::from(device.lanes) * self.balanced();
        let first = ((balanced * NEAR_BALANCE.0) as u32).max(1);
        let last = ((balanced * NEAR_BALANCE.1).ceil() as u32).min(device.lanes.saturating_sub(1));
        let step = (last.saturating_sub(first) + 1).div_ceil(most_tries);
        (first..=last).step_by(step as usize)
    }

    /// When lanes that begin with narrow items come to wide ones, in nanoseconds, if they are so many.
    fn back_load(&self, back_lanes: u32, device: LanesOfGroups) -> Ns {
        let (lanes, copies, back) = (f64::from(device.lanes), f64::from(device.copies), f64::from(back_lanes));
        // Lanes take their next item while they do the one before, so one that comes from the narrow ones is an item late.
        let mean_wide_ns = self.wide_ns / self.wide.len().max(1) as f64;
        (copies * self.narrow_beside_wide_ns(back / lanes) / back + mean_wide_ns) as Ns
    }

    /// When wide items end at the earliest, in nanoseconds, if so many lanes come to them late and the others begin with them:
    /// all at the same time.
    fn least_wide_end_ns(&self, back_lanes: u32, back_load: Ns, device: LanesOfGroups) -> f64 {
        let (lanes, back, back_load) = (f64::from(device.lanes), f64::from(back_lanes), back_load as f64);
        // Lanes count whole nanoseconds.
        let wide_ns = f64::from(device.copies) * (self.wide_ns - self.wide.len() as f64);
        let by_front_ns = wide_ns / (lanes - back);
        if by_front_ns < back_load { by_front_ns } else { (wide_ns + back * back_load) / lanes }
    }

    /// When the call ends, in nanoseconds, if so many lanes begin with narrow items and come to wide ones after `back_load`.
    fn in_turn_end_ns(&mut self, back_lanes: u32, back_load: Ns, device: LanesOfGroups) -> f64 {
        let (lanes, copies, back) = (f64::from(device.lanes), f64::from(device.copies), f64::from(back_lanes));
        let beside_wide_ns = copies * self.narrow_beside_wide_ns(back / lanes);
        self.give_out_wide(back_lanes, back_load, device);
        let (free_ns, wide_end_ns) = (self.lanes.least() as f64, self.lanes.max() as f64);
        // Until the first lane is free and finds no wide item left, only the back lanes do narrow ones; and all of them, if there
        // is time enough.
        let done = (free_ns * back / beside_wide_ns).min(1.0);
        // Then one lane after the other joins them, until the last wide item is done.
        let ending_ns = wide_end_ns - free_ns;
        let room_ns = (lanes * wide_end_ns - back * free_ns - copies * self.wide_ns).max(0.0);
        let narrow_lanes = room_ns / ending_ns.max(1.0);
        let done = (done + room_ns / (copies * self.narrow_beside_wide_ns(narrow_lanes / lanes))).min(1.0);
        // What is left is for all lanes.
        wide_end_ns + (1.0 - done) * copies * self.narrow_full_ns() / lanes
    }

    /// Gives the wide items to lanes, some of which have a load already.
    fn give_out_wide(&mut self, back_lanes: u32, back_load: Ns, device: LanesOfGroups) {
        let front_lanes = device.lanes.saturating_sub(back_lanes);
        self.lanes.reset_to(repeat_n(0, front_lanes as usize).chain(repeat_n(back_load, back_lanes as usize)));
        for item_ns in self.wide.iter().map(|times| times.full_ns()) {
            for _ in 0..device.copies {
                self.lanes.add(item_ns);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Queues {
        /// Of the arrangement without anything beside.
        fn back_lanes(&mut self, device: LanesOfGroups) -> Option<u32> {
            self.arrange(device, Beside::Never).map(|arrangement| arrangement.back_lanes)
        }
    }
    use crate::DeviceModel;

    /// A device with so many lanes.
    fn device(lanes: u32, num_groups: u32) -> LanesOfGroups {
        DeviceModel { num_sms: lanes, blocks_per_sm: 1, ..DeviceModel::H100 }.lanes_of_groups(num_groups)
    }

    /// An item that products limit.
    fn wide(block_ns: f64) -> (TileKind, WorkTimes) {
        (TileKind::Wide, WorkTimes { block_ns, ..WorkTimes::default() })
    }

    /// An item that memory limits, if more than a quarter of the lanes share it.
    fn narrow(memory_ns: f64) -> (TileKind, WorkTimes) {
        (TileKind::Narrow, WorkTimes { memory_ns, block_ns: memory_ns / 4.0, ..WorkTimes::default() })
    }

    fn filled(wide_items: &[f64], narrow_items: &[f64]) -> Queues {
        let mut queues = Queues::default();
        queues.fill(wide_items.iter().map(|&time| wide(time)).chain(narrow_items.iter().map(|&time| narrow(time))));
        queues
    }

    /// 104 lanes are done with 520 long items in five rounds, 103 would take six.
    #[test]
    fn wide_items_are_not_a_round_longer_for_one_lane() {
        let queues = |narrow_items| filled(&[90e3; 520], &vec![20e3; narrow_items]);
        // Together with the narrow items, which take a quarter of their time beside wide ones, this is five rounds of 132 lanes.
        for narrow_items in [2400, 2520, 2700] {
            let back_lanes = queues(narrow_items).back_lanes(device(132, 1)).expect("much of both");
            assert!((26..=28).contains(&back_lanes), "{back_lanes} lanes for {narrow_items} narrow items");
        }
        // The same for each of eight head groups, of which two share 33 lanes.
        let queues = |narrow_items| filled(&[90e3; 65], &vec![20e3; narrow_items]);
        for narrow_items in [300, 315, 337] {
            assert_eq!(queues(narrow_items).back_lanes(device(132, 8)), Some(28), "{narrow_items} narrow items");
        }
    }

    #[test]
    fn hardly_any_of_one_kind_needs_no_queue_and_little_no_lanes() {
        assert_eq!(filled(&[], &[]).back_lanes(device(132, 8)), None);
        assert_eq!(filled(&[50e3; 100], &[]).back_lanes(device(132, 8)), None);
        assert_eq!(filled(&[], &[50e3; 100]).back_lanes(device(132, 8)), None);
        assert_eq!(filled(&[50e3; 100], &[50e3; 4]).back_lanes(device(132, 8)), None);
        assert_eq!(filled(&[50e3; 4], &[50e3; 100]).back_lanes(device(132, 8)), None);
        assert_eq!(filled(&[5e3; 1000], &[5e3; 60]).back_lanes(device(132, 8)), Some(0));
        assert!(filled(&[5e3; 1000], &[5e3; 300]).back_lanes(device(132, 8)).is_some_and(|back_lanes| back_lanes > 0));
    }

    #[test]
    fn more_narrow_work_needs_more_lanes() {
        let back_lanes =
            |narrow_items| filled(&[5e3; 1000], &vec![5e3; narrow_items]).back_lanes(device(132, 1)).expect("much of both");
        let numbers = [100, 400, 1000, 2000].map(back_lanes);
        assert!(numbers.is_sorted_by(|a, b| a < b), "{numbers:?}");
        // A quarter of the lanes reads as fast as all: more are there only because the others have little to do.
        assert!((20..=40).contains(&numbers[2]), "{numbers:?}");
    }

    #[test]
    fn any_device_is_planned_for() {
        for (lanes, num_groups) in [(1, 1), (1, 8), (2, 1), (2, 3), (7, 64), (132, 7), (132, 200), (1 << 16, 1), (132, u32::MAX)]
        {
            let back_lanes = filled(&[50e3; 20], &[50e3; 20]).back_lanes(device(lanes, num_groups)).expect("much of both");
            assert!(back_lanes < lanes, "{back_lanes} of {lanes} lanes");
        }
        assert_eq!(filled(&[50e3; 20], &[50e3; 20]).back_lanes(device(132, 200)), Some(0));
    }

    #[test]
    fn huge_times_saturate() {
        for time in [1e30, f64::MAX, f64::INFINITY] {
            let back_lanes = filled(&[time; 20], &[time; 20]).back_lanes(device(132, 8));
            assert!(back_lanes.is_none_or(|back_lanes| back_lanes < 132), "{back_lanes:?}");
        }
    }
}
