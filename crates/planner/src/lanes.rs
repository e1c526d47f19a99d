//! List scheduling: each item goes to the lane that is free first, as a device issues thread blocks.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::cost::Ns;

/// The loads of lanes that work side by side, one block at a time each.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lanes {
    loads: BinaryHeap<Reverse<Ns>>,
    max: Ns,
}

impl Lanes {
    /// So many idle lanes; at least one.
    pub fn reset(&mut self, count: u32) {
        self.loads.clear();
        self.loads.extend(std::iter::repeat_n(Reverse(0), count.max(1) as usize));
        self.max = 0;
    }

    /// When the first lane is free.
    pub fn least(&self) -> Ns {
        self.loads.peek().map_or(0, |least| least.0)
    }

    /// When a second lane is free, if there is one.
    pub fn second(&self) -> Ns {
        // The heap's least is the first of its slice, and the next is one of the two below it.
        let below_least = self.loads.as_slice().iter().skip(1).take(2);
        below_least.map(|load| load.0).min().unwrap_or(self.least())
    }

    /// When all lanes are free.
    pub fn max(&self) -> Ns {
        self.max
    }

    /// Gives an item to the lane that is free first.
    pub fn add(&mut self, cost: Ns) {
        if let Some(mut least) = self.loads.peek_mut() {
            least.0 = cost.saturating_add(least.0);
            self.max = self.max.max(least.0);
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
        assert_eq!((lanes.least(), lanes.second()), (2, 3));
    }
}
