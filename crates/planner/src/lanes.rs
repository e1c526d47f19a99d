//! List scheduling: each item goes to the lane that is free first, as a device issues thread blocks.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::cost::Ns;

/// The loads of lanes that work side by side, one block at a time each.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lanes {
    /// Each with the number of its lane.
    loads: BinaryHeap<Reverse<(Ns, u32)>>,
    max: Ns,
}

impl Lanes {
    /// So many idle lanes; at least one.
    pub fn reset(&mut self, count: u32) {
        self.reset_to(std::iter::repeat_n(0, count.max(1) as usize));
    }

    /// A lane for each load that it has already.
    pub fn reset_to(&mut self, loads: impl Iterator<Item = Ns>) {
        self.loads.clear();
        self.loads.extend(loads.zip(0..).map(Reverse));
        self.max = 0;
    }

    /// When the first lane is free.
    pub fn least(&self) -> Ns {
        self.first().map_or(0, |(load, _)| load)
    }

    /// When the first lane is free, and its number.
    pub fn first(&self) -> Option<(Ns, u32)> {
        self.loads.peek().map(|first| first.0)
    }

    /// When a second lane is free, if there is one.
    pub fn second(&self) -> Ns {
        // The heap's least is the first of its slice, and the next is one of the two below it.
        let below_least = self.loads.as_slice().iter().skip(1).take(2);
        below_least.map(|load| load.0.0).min().unwrap_or(self.least())
    }

    /// When all lanes are free that were given an item.
    pub fn max(&self) -> Ns {
        self.max
    }

    /// When lanes are free, on average.
    pub fn mean(&self) -> f64 {
        let sum: f64 = self.loads.iter().map(|load| load.0.0 as f64).sum();
        sum / self.loads.len().max(1) as f64
    }

    /// Gives an item to the lane that is free first.
    pub fn add(&mut self, cost: Ns) {
        if let Some(mut first) = self.loads.peek_mut() {
            let load = &mut first.0.0;
            *load = cost.saturating_add(*load);
            self.max = self.max.max(*load);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
