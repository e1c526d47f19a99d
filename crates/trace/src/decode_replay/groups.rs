//! Requests that are moved in groups: who is in which, and where each of them lies.

use std::num::NonZeroU32;

use packinfer_kv::{GroupState, KvRun, Policy, SlotPool, Trigger, balance_groups};
use serde::{Deserialize, Serialize};

use super::Decoding;

/// How often something happened, by what gave cause to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TriggerCounts {
    /// Because a member had no room left.
    pub headroom_exhausted: u64,
    /// Because members had left, or others had come.
    pub fragmentation: u64,
    /// Because groups had become too different in length.
    pub imbalance: u64,
}

impl TriggerCounts {
    /// Of all causes together.
    pub fn total(&self) -> u64 {
        self.headroom_exhausted + self.fragmentation + self.imbalance
    }

    pub(super) fn count(&mut self, trigger: Trigger) {
        *match trigger {
            Trigger::HeadroomExhausted => &mut self.headroom_exhausted,
            Trigger::Fragmentation => &mut self.fragmentation,
            Trigger::Imbalance => &mut self.imbalance,
        } += 1;
    }
}

/// Requests that are moved together.
#[derive(Clone, Debug, Default)]
pub struct Group {
    members: Vec<u64>,
    extent: Option<KvRun>,
    /// Where it is being moved to.
    target: Option<KvRun>,
    /// Whether somebody left since it was looked at.
    has_holes: bool,
    /// Whether members were exchanged since it was looked at.
    is_dealt_anew: bool,
}

impl Group {
    /// Numbers of its requests.
    pub fn members(&self) -> &[u64] {
        &self.members
    }

    /// The slots that it was moved into last, of its members' tokens and headroom; `None` if it never was.
    pub fn extent(&self) -> Option<KvRun> {
        self.extent
    }
}

/// All groups.
#[derive(Debug, Default)]
pub(super) struct Groups {
    /// The most members of a group.
    places: usize,
    groups: Vec<Group>,
    /// Moves that were begun and have not ended.
    pub under_way: usize,
}

impl Groups {
    /// Groups of `places` members for `requests` requests.
    pub fn new(requests: u32, places: NonZeroU32) -> Self {
        let groups = vec![Group::default(); requests.div_ceil(places.get()) as usize];
        Self { places: places.get() as usize, groups, under_way: 0 }
    }

    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Group> {
        self.groups.iter()
    }

    pub fn len(&self) -> usize {
        self.groups.len()
    }

    /// Takes a request into the group with the fewest tokens of those that have a place.
    pub fn join(&mut self, id: u64, running: &[Decoding]) {
        let has_place = |group: &&mut Group| group.members.len() < self.places;
        if let Some(group) = self.groups.iter_mut().filter(has_place).min_by_key(|group| tokens_of(&group.members, running)) {
            group.members.push(id);
        }
    }

    /// Lets a request go.
    pub fn leave(&mut self, id: u64) {
        if let Some(group) = self.group_of(id) {
            group.members.retain(|&member| member != id);
            group.has_holes = true;
        }
    }

    /// Exchanges members between groups if `policy` finds them too different in length.
    pub fn balance(&mut self, policy: &Policy, running: &[Decoding]) {
        let tokens: Vec<u64> = self.groups.iter().map(|group| tokens_of(&group.members, running)).collect();
        let (Policy::Contiguous(layout), Some(_)) = (policy, policy.balance_trigger(&tokens)) else { return };
        let mut members: Vec<_> = self.groups.iter_mut().map(|group| std::mem::take(&mut group.members)).collect();
        let changed = balance_groups(&mut members, self.places, layout.balanced(), |id| tokens_of(&[*id], running));
        for (group, members) in self.groups.iter_mut().zip(members) {
            group.members = members;
        }
        for index in changed {
            self.groups[index].is_dealt_anew = true;
        }
    }

    /// What gives cause to move a group, if there is something new about it or one of its members.
    pub fn trigger(&mut self, index: usize, policy: &Policy, running: &mut [Decoding], pool: &SlotPool) -> Option<Trigger> {
        let group = &mut self.groups[index];
        let mut is_due = std::mem::take(&mut group.has_holes);
        for &id in &group.members {
            if let Some(member) = position(running, id).map(|index| &mut running[index]) {
                is_due |= std::mem::take(&mut member.is_due);
            }
        }
        if std::mem::take(&mut group.is_dealt_anew) {
            return Some(Trigger::Imbalance);
        }
        let members = group.members.iter().filter_map(|&id| position(running, id).map(|index| &running[index].kv));
        if is_due { policy.group_trigger(&GroupState::of(group.extent, members, pool)) } else { None }
    }

    pub fn members(&self, index: usize) -> &[u64] {
        &self.groups[index].members
    }

    /// A group is being moved.
    pub fn begin(&mut self, index: usize, target: KvRun, moves: usize) {
        self.groups[index].target = Some(target);
        self.under_way += moves;
    }

    /// The move of a member has ended; if it was committed, the group lies there from now on.
    pub fn end(&mut self, id: u64, committed: bool) {
        self.under_way = self.under_way.saturating_sub(1);
        if committed && let Some(group) = self.group_of(id) {
            group.extent = group.target.take().or(group.extent);
        }
    }

    fn group_of(&mut self, id: u64) -> Option<&mut Group> {
        self.groups.iter_mut().find(|group| group.members.contains(&id))
    }
}

/// Where a request stands among those that decode, which are in the order of their numbers.
fn position(running: &[Decoding], id: u64) -> Option<usize> {
    running.binary_search_by_key(&id, |request| request.id).ok()
}

fn tokens_of(members: &[u64], running: &[Decoding]) -> u64 {
    members.iter().filter_map(|&id| position(running, id)).map(|index| u64::from(running[index].kv.len())).sum()
}

#[cfg(test)]
mod tests {
    use packinfer_kv::{Contiguous, SequenceMove};

    use super::super::tests::{config, eager, replay, trace};
    use super::super::{DecodeConfig, DecodeReplay};
    use super::*;
    use crate::TraceRequest;

    fn grouped(policy: Policy, size: u32) -> DecodeConfig {
        DecodeConfig { prompts_in_pages: true, group_size: NonZeroU32::new(size), ..config(policy) }
    }

    /// Requests of so many tokens of prompt and answer.
    fn requests(lengths: &[(u32, u32)]) -> Vec<TraceRequest> {
        let request =
            |&(prompt_tokens, output_tokens)| TraceRequest { arrival_ms: 0, prompt_tokens, output_tokens, blocks: Vec::new() };
        lengths.iter().map(request).collect()
    }

    /// The step up to its plan, with moves that are done at once. Returns who was moved.
    fn begin_step(replay: &mut DecodeReplay<'_>) -> Vec<u64> {
        replay.admit().expect("there is room");
        let moves = replay.begin_moves().expect("a good pool");
        let commit = |(id, begun)| {
            replay.end_move(id, begun).expect("a good move").expect("nobody left meanwhile");
            id
        };
        moves.into_iter().map(commit).collect()
    }

    fn end_step(replay: &mut DecodeReplay<'_>) {
        replay.append().expect("there is room");
        let ended = replay.pool.epoch();
        replay.pool.advance_epoch();
        replay.retire(ended).expect("it has ended");
    }

    fn looked_at(replay: &DecodeReplay<'_>) -> [u64; 3] {
        let TriggerCounts { headroom_exhausted, fragmentation, imbalance } = replay.report().groups_looked_at;
        [headroom_exhausted, fragmentation, imbalance]
    }

    #[test]
    fn members_of_a_moved_group_fill_one_extent() {
        let trace = trace();
        let mut replay = DecodeReplay::new(&trace, grouped(eager(), 4)).expect("a good trace");
        let mut groups_moved = 0;
        for step in 0..300 {
            let moved = begin_step(&mut replay);
            for group in replay.groups().filter(|group| group.members().iter().any(|id| moved.contains(id))) {
                let extent = group.extent().expect("it was moved");
                let mut end = extent.first_slot;
                for member in replay.requests().filter(|request| group.members().contains(&request.id)) {
                    let (runs, room) = (member.kv.runs(replay.pool()).expect("the pool's own"), member.kv.room(replay.pool()));
                    assert_eq!(runs, [KvRun { first_slot: end, num_slots: member.kv.len() }], "step {step}");
                    assert!(room >= 16, "{room} slots of headroom in step {step}");
                    end += member.kv.len() + room;
                }
                assert_eq!(end, extent.first_slot + extent.num_slots);
                groups_moved += 1;
            }
            end_step(&mut replay);
        }
        assert!(groups_moved > 20 && groups_moved == replay.report().groups_moved.total(), "{:?}", replay.report());
        assert_eq!(replay.groups().map(|group| group.members().len()).sum::<usize>(), 20);
    }

    #[test]
    fn groups_read_their_own_tokens_wherever_they_are_moved() {
        let (seen, paged) = replay(config(Policy::Paged), 1);
        for (delay, size) in [(1, 4), (2, 3), (7, 8)] {
            let (same, report) = replay(grouped(eager(), size), delay);
            assert!(same == seen, "who decodes does not depend on the layout");
            assert!(report.moves > 20 && report.read_runs < paged.read_runs / 3, "{report:?}");
            assert!(delay < 7 || report.cancelled_moves > 0, "{report:?}");
            assert_eq!((report.scattered, report.no_headroom, report.fragmented), (0, 0, 0), "nobody is moved alone");
        }
    }

    #[test]
    fn few_slots_are_moved_for_those_that_are_read() {
        let (_, report) = replay(grouped(Policy::Contiguous(Contiguous::default()), 4), 1);
        assert!(report.groups_moved.total() > 5 && report.moves > 20, "{report:?}");
        assert!(report.moved_slots * 100 < report.read_slots, "{report:?}");
        let (_, paged) = replay(config(Policy::Paged), 1);
        assert!(report.read_runs < paged.read_runs / 2, "{} runs of {}", report.read_runs, paged.read_runs);
        let costly = Policy::Contiguous(Contiguous { move_cost: 1e6, ..Contiguous::default() });
        let (_, report) = replay(grouped(costly, 4), 1);
        assert_eq!((report.moves, report.cancelled_moves, report.moved_slots), (0, 0, 0));
        assert!(report.groups_moved.total() == 0 && report.groups_looked_at.total() > 20, "{report:?}");
    }

    #[test]
    fn pages_are_never_moved() {
        let (_, report) = replay(grouped(Policy::Paged, 4), 1);
        assert_eq!((report.moves, report.cancelled_moves, report.moved_slots), (0, 0, 0));
        assert_eq!((report.groups_looked_at, report.groups_moved), (TriggerCounts::default(), TriggerCounts::default()));
    }

    #[test]
    fn groups_are_looked_at_when_headroom_is_used_up() {
        let trace = requests(&[(40, 500), (50, 500)]);
        let policy = Policy::Contiguous(Contiguous { move_cost: 0.0, max_headroom: 16, ..Contiguous::default() });
        let config = DecodeConfig { concurrent: 2, ..grouped(policy, 2) };
        let mut replay = DecodeReplay::new(&trace, config).expect("a good trace");
        // At first they have no extent.
        assert_eq!((begin_step(&mut replay), looked_at(&replay)), (vec![0, 1], [0, 1, 0]));
        end_step(&mut replay);
        let mut expected = 0;
        for step in 1..200 {
            expected += u64::from(replay.requests().any(|request| request.kv.room(&replay.pool) == 0));
            begin_step(&mut replay);
            assert_eq!(looked_at(&replay), [expected, 1, 0], "step {step}");
            end_step(&mut replay);
        }
        assert!((5..20).contains(&expected) && replay.report().groups_moved.headroom_exhausted == expected, "{expected}");
    }

    #[test]
    fn groups_are_looked_at_when_they_fall_apart() {
        for (leaving, expected) in [(0u32, 1), (1, 1), (2, 2), (3, 2)] {
            let answer = |place| if place < leaving { 10 } else { 500 };
            let mut trace = requests(&[0, 1, 2, 3].map(|place| (64, answer(place))));
            trace.extend(requests(&[(64, 500); 4]));
            let policy = Policy::Contiguous(Contiguous { move_cost: 0.0, ..Contiguous::default() });
            let config = DecodeConfig { concurrent: 4, ..grouped(policy, 4) };
            let mut replay = DecodeReplay::new(&trace, config).expect("a good trace");
            for _ in 0..70 {
                begin_step(&mut replay);
                end_step(&mut replay);
            }
            assert_eq!(replay.report().admitted, 4 + u64::from(leaving));
            assert_eq!(replay.report().groups_looked_at.fragmentation, expected, "{leaving} of 4 left");
            assert_eq!(replay.report().groups_looked_at.imbalance, 0, "there is one group");
        }
    }

    #[test]
    fn groups_of_different_length_are_balanced() {
        let dealt = |prompts: [u32; 4]| {
            let trace = requests(&prompts.map(|prompt| (prompt, 500)));
            let config = DecodeConfig { concurrent: 4, ..grouped(eager(), 2) };
            let mut replay = DecodeReplay::new(&trace, config).expect("a good trace");
            for _ in 0..30 {
                begin_step(&mut replay);
                end_step(&mut replay);
            }
            let mut members: Vec<_> = replay.groups().map(|group| group.members().to_vec()).collect();
            members.iter_mut().for_each(|members| members.sort_unstable());
            (members, replay.report().groups_looked_at.imbalance, replay.report().groups_moved.imbalance)
        };
        // Who comes goes to the group with fewer tokens, until that is full.
        assert_eq!(dealt([300, 200, 100, 300]), (vec![vec![0, 3], vec![1, 2]], 0, 0), "1.33 times the mean");
        assert_eq!(dealt([400, 10, 20, 400]), (vec![vec![1, 3], vec![0, 2]], 2, 2), "1.93 times the mean");
    }

    #[test]
    fn a_group_that_outgrows_its_new_place_stays_where_it_was() {
        let trace = requests(&[(40, 500), (50, 500), (60, 500)]);
        let policy = Policy::Contiguous(Contiguous { move_cost: 0.0, max_headroom: 16, ..Contiguous::default() });
        let config = DecodeConfig { concurrent: 3, ..grouped(policy, 3) };
        let mut replay = DecodeReplay::new(&trace, config).expect("a good trace");
        begin_step(&mut replay);
        let extent = replay.groups().next().and_then(Group::extent).expect("it was moved");
        let outgrown = |replay: &DecodeReplay<'_>| replay.requests().any(|request| request.kv.room(&replay.pool) == 0);
        while !outgrown(&replay) {
            end_step(&mut replay);
        }
        let moves: Vec<(u64, SequenceMove)> = replay.begin_moves().expect("a good pool");
        assert_eq!(moves.len(), 3);
        let looked_at_before = looked_at(&replay);
        for _ in 0..40 {
            assert!(replay.begin_moves().expect("a good pool").is_empty(), "others are under way");
            end_step(&mut replay);
        }
        assert_eq!(looked_at(&replay), looked_at_before);
        let places = |replay: &DecodeReplay<'_>| -> Vec<_> {
            replay.requests().map(|request| request.kv.runs(&replay.pool).expect("the pool's own")).collect()
        };
        let (before, used, epoch) = (places(&replay), replay.pool.usage().used, replay.pool.epoch());
        for (id, begun) in moves {
            assert_eq!(replay.end_move(id, begun), Ok(None));
        }
        assert_eq!((places(&replay), replay.pool.epoch()), (before, epoch));
        assert!(replay.pool.usage().used < used, "the new place came free");
        assert_eq!(replay.groups().next().and_then(Group::extent), Some(extent));
        assert_eq!(replay.report().cancelled_moves, 3);
        let is_moved = |_| {
            let moved = begin_step(&mut replay).len();
            end_step(&mut replay);
            moved == 3
        };
        assert!((0..100).any(is_moved), "it is tried again");
    }
}
