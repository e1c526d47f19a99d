//! How many of the persistent blocks begin with what memory limits, while the others begin with what products limit.
//!
//! Narrow items leave the tensor cores idle, wide ones the memory. If some lanes do the one while the others do the other, both are used. Narrow items then have more of the
//! memory than their lanes' share, so that fewer lanes are enough for them; and as they are many and short, they fill up whatever time wide items leave.

use packinfer_abi::{HeadGroups, TileKind};

use crate::DeviceModel;
use crate::cost::{CostModel, ItemWork, Ns};
use crate::lanes::Lanes;

/// Below this part of the time of all items, one kind hardly matters.
const WORTHWHILE: f64 = 0.05;
/// How many numbers of lanes are tried, at most.
const MOST_TRIES: u32 = 16;

/// The items of a plan, by kind. It keeps its memory from plan to plan.
#[derive(Clone, Debug, Default)]
pub(crate) struct Queues {
    /// What each wide item takes, in the order of the plan.
    wide: Vec<Ns>,
    /// What narrow items have to do.
    narrow: Vec<ItemWork>,
    lanes: Lanes,
}

impl Queues {
    pub fn clear(&mut self) {
        self.wide.clear();
        self.narrow.clear();
    }

    /// Takes in the next item of the plan.
    pub fn push(&mut self, work: ItemWork, cost: &CostModel) {
        match work.tile {
            TileKind::Wide => self.wide.push(cost.work_ns(&work) as Ns),
            TileKind::Narrow => self.narrow.push(work),
        }
    }

    /// How many of the device's lanes should begin with narrow items, if the others begin with wide ones: so many that the call ends first. Zero if there is too little of
    /// one kind.
    pub fn back_lanes(&mut self, model: &DeviceModel, heads: HeadGroups, cost: &CostModel) -> u32 {
        let wide: f64 = self.wide.iter().map(|&takes| takes as f64).sum();
        let narrow: f64 = self.narrow.iter().map(|work| cost.work_ns(work)).sum();
        if narrow.min(wide) < WORTHWHILE * (narrow + wide) {
            return 0;
        }
        let (num_lanes, copies) = model.lanes_of_a_head_group(heads.num_groups);
        let of_device = |lanes: u32| (lanes * model.lanes() + num_lanes / 2) / num_lanes;
        let most = num_lanes / 2;
        let tries = (1..=most).step_by(most.div_ceil(MOST_TRIES).max(1) as usize);
        let ends = |lanes| self.end(lanes, num_lanes, copies, wide, cost);
        let best = tries.map(ends_with(ends)).min_by(|a, b| a.1.total_cmp(&b.1));
        best.map_or(0, |(lanes, _)| of_device(lanes).clamp(1, model.lanes() - 1))
    }
}
