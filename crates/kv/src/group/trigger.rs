//! What gives cause to look at whether a group should be moved.

use packinfer_abi::KvRun;
use serde::{Deserialize, Serialize};

use super::imbalance;
use crate::{Contiguous, Policy, Sequence, SlotPool};

/// Why a group should be looked at. It is moved only if that [pays](Contiguous::group_pays) as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trigger {
    /// A member that lies in the group's extent has no room left behind its tokens: its next token will lie elsewhere.
    HeadroomExhausted,
    /// Members have left holes in the extent, or others have come that lie elsewhere: more than
    /// [`Contiguous::max_group_fragmentation`].
    Fragmentation,
    /// Groups differ in length by more than [`Contiguous::max_imbalance`], and members went from one to another.
    Imbalance,
}

/// How the members of a group lie, against the one extent that they were moved into. All counts but [`Self::exhausted`] are
/// slots, with those that are kept for tokens to come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GroupState {
    /// Of the group's extent; 0 if it has none yet.
    pub extent: u32,
    /// Of these, what members own.
    pub in_place: u32,
    /// What members own elsewhere.
    pub elsewhere: u32,
    /// Members whose last token lies in the extent and that have no room left.
    pub exhausted: u32,
}

impl GroupState {
    /// The state of a group that was last moved into `extent`. What members share with others does not count: it is not moved
    /// with them.
    pub fn of<'a>(extent: Option<KvRun>, members: impl IntoIterator<Item = &'a Sequence>, pool: &SlotPool) -> Self {
        let extent = extent.unwrap_or(KvRun { first_slot: 0, num_slots: 0 });
        let mut state = Self { extent: extent.num_slots, ..Self::default() };
        for member in members {
            let mut ends_in_place = false;
            for run in member.own_slots(pool) {
                ends_in_place = lies_in(run, extent);
                *(if ends_in_place { &mut state.in_place } else { &mut state.elsewhere }) += run.num_slots;
            }
            state.exhausted += u32::from(ends_in_place && member.room(pool) == 0);
        }
        state
    }

    /// Share of all slots, of the extent or of a member, that are not both: 0 if the members fill the extent, 1 if none of them
    /// lies in it.
    pub fn fragmentation(&self) -> f64 {
        let either = u64::from(self.extent) + u64::from(self.elsewhere);
        if either == 0 { 0.0 } else { 1.0 - f64::from(self.in_place) / either as f64 }
    }
}

impl Policy {
    /// Whether a group is to be looked at, whatever the others are like. Never for [`Policy::Paged`].
    pub fn group_trigger(&self, group: &GroupState) -> Option<Trigger> {
        match self {
            Self::Paged => None,
            Self::Contiguous(layout) => layout.group_trigger(group),
        }
    }

    /// Whether groups of so many tokens are to be [balanced](super::balance_groups). Never for [`Policy::Paged`].
    pub fn balance_trigger(&self, tokens: &[u64]) -> Option<Trigger> {
        match self {
            Self::Contiguous(layout) if imbalance(tokens) > layout.max_imbalance => Some(Trigger::Imbalance),
            _ => None,
        }
    }
}

impl Contiguous {
    fn group_trigger(&self, group: &GroupState) -> Option<Trigger> {
        if group.exhausted > 0 {
            Some(Trigger::HeadroomExhausted)
        } else if group.fragmentation() > self.max_group_fragmentation {
            Some(Trigger::Fragmentation)
        } else {
            None
        }
    }
}

fn lies_in(run: KvRun, extent: KvRun) -> bool {
    run.first_slot >= extent.first_slot && run.first_slot + run.num_slots <= extent.first_slot + extent.num_slots
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Growth;

    fn policy() -> Policy {
        Policy::Contiguous(Contiguous { max_group_fragmentation: 0.5, max_imbalance: 1.5, ..Contiguous::default() })
    }

    #[test]
    fn exhausted_headroom_is_the_first_cause() {
        let full = GroupState { extent: 100, in_place: 100, elsewhere: 0, exhausted: 0 };
        assert_eq!(policy().group_trigger(&full), None);
        assert_eq!(policy().group_trigger(&GroupState { exhausted: 1, ..full }), Some(Trigger::HeadroomExhausted));
        let scattered = GroupState { in_place: 0, exhausted: 1, ..full };
        assert_eq!(policy().group_trigger(&scattered), Some(Trigger::HeadroomExhausted));
        assert_eq!(Policy::Paged.group_trigger(&scattered), None);
    }

    #[test]
    fn holes_and_strangers_are_fragmentation() {
        let half = GroupState { extent: 100, in_place: 75, elsewhere: 50, exhausted: 0 };
        assert_eq!((half.fragmentation(), policy().group_trigger(&half)), (0.5, None), "not more than the threshold");
        let holes = GroupState { in_place: 49, elsewhere: 0, ..half };
        assert_eq!(policy().group_trigger(&holes), Some(Trigger::Fragmentation));
        let strangers = GroupState { in_place: 100, elsewhere: 101, ..half };
        assert_eq!(policy().group_trigger(&strangers), Some(Trigger::Fragmentation));
        let new = GroupState { elsewhere: 10, ..GroupState::default() };
        assert_eq!((new.fragmentation(), policy().group_trigger(&new)), (1.0, Some(Trigger::Fragmentation)));
        assert_eq!(policy().group_trigger(&GroupState::default()), None, "nobody is there");
        assert_eq!(Policy::Paged.group_trigger(&new), None);
    }

    #[test]
    fn imbalance_is_over_the_mean() {
        assert_eq!(policy().balance_trigger(&[150, 100, 50]), None, "not more than the threshold");
        assert_eq!(policy().balance_trigger(&[151, 100, 49]), Some(Trigger::Imbalance));
        assert_eq!(policy().balance_trigger(&[]), None);
        assert_eq!(Policy::Paged.balance_trigger(&[1000, 0, 0]), None);
    }

    #[test]
    fn states_are_read_off_the_members() -> Result<(), crate::KvError> {
        let mut pool = SlotPool::new(1024, 16)?;
        let mut member = |tokens, headroom| {
            let mut kv = Sequence::new();
            kv.append(&mut pool, tokens, Growth::Contiguous { headroom }).map(|_| kv)
        };
        let [roomy, full, away] = [member(20, 40)?, member(32, 0)?, member(5, 0)?];
        let extent = KvRun { first_slot: 0, num_slots: 128 };
        let state = GroupState::of(Some(extent), [&roomy, &full], &pool);
        // 60 slots are four pages; 32 are two; the page of the third member lies in the extent too, but is nobody's here.
        assert_eq!(state, GroupState { extent: 128, in_place: 96, elsewhere: 0, exhausted: 1 });
        let without_an_extent = GroupState::of(None, [&full, &away], &pool);
        assert_eq!(without_an_extent, GroupState { extent: 0, in_place: 0, elsewhere: 48, exhausted: 0 });
        [roomy, full, away].into_iter().try_for_each(|kv| kv.free(&mut pool))
    }
}
