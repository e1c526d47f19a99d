//! What the pool promises, one promise a test.

use packinfer_kv::{
    Contiguous, Filled, GroupMember, GroupState, Growth, KvError, KvRun, Policy, Sequence, SlotCopy, SlotPool, Usage,
};

const PAGE: u32 = 16;

fn pool(pages: u32) -> SlotPool {
    SlotPool::new(pages * PAGE, PAGE).unwrap()
}

fn contiguous(headroom: u32) -> Growth {
    Growth::Contiguous { headroom }
}

fn sequence(pool: &mut SlotPool, tokens: u32, growth: Growth) -> Sequence {
    let mut sequence = Sequence::new();
    assert_eq!(sequence.append(pool, tokens, growth).unwrap(), None);
    sequence
}

#[test]
fn bad_pools_are_refused() {
    for (num_slots, page_size) in [(16, 0), (17, 16), (u32::MAX, 1)] {
        let error = SlotPool::new(num_slots, page_size).unwrap_err();
        assert_eq!(error, KvError::BadPool { num_slots, page_size, most: SlotPool::MAX_SLOTS });
    }
    assert_eq!(pool(0).allocate(1), Err(KvError::OutOfSlots { needed: 16, free: 0, retiring: 0 }));
}

#[test]
fn usage_counts_slots_once() {
    let mut pool = pool(8);
    let a = pool.allocate(40).unwrap();
    let b = pool.allocate(16).unwrap();
    let c = pool.allocate(1).unwrap();
    pool.retain(a).unwrap();
    pool.retain(a).unwrap();
    pool.release(b).unwrap();
    let usage = pool.usage();
    assert_eq!(usage, Usage { total: 128, used: 64, free: 64, shared: 48, largest_free: 48, ..Usage::default() });
    assert_eq!(usage.fragmentation(), 0.25);
    assert_eq!(usage.pressure(), 0.5);
    pool.release(c).unwrap();
    assert_eq!(pool.usage().fragmentation(), 0.0);
}

#[test]
fn what_does_not_fit_changes_nothing() {
    let mut pool = pool(4);
    let kept: Vec<_> = (0..4).map(|_| pool.allocate(PAGE).unwrap()).collect();
    pool.release(kept[0]).unwrap();
    pool.release(kept[2]).unwrap();
    let before = pool.usage();
    assert_eq!(pool.allocate(20), Err(KvError::NoContiguous { needed: 32, largest: 16, free: 32 }));
    assert_eq!(pool.allocate_group(&[16, 1]).unwrap_err(), KvError::NoContiguous { needed: 32, largest: 16, free: 32 });
    assert_eq!(pool.allocate(33), Err(KvError::OutOfSlots { needed: 48, free: 32, retiring: 0 }));
    assert!(pool.allocate_pages(3, &mut Vec::new()).is_err());
    assert_eq!(pool.allocate(0), Err(KvError::EmptyExtent));
    assert_eq!(pool.usage(), before);
    // A sequence takes pieces where it finds no extent.
    assert_eq!(sequence(&mut pool, 20, contiguous(100)).runs(&pool).unwrap().len(), 2);
}

#[test]
fn group_members_lie_side_by_side() {
    let mut pool = pool(10);
    let group = pool.allocate_group(&[20, 1, 48]).unwrap();
    let runs: Vec<_> = group.iter().map(|&extent| pool.run(extent).unwrap()).collect();
    let expected = [(0, 32), (32, 16), (48, 48)].map(|(first_slot, num_slots)| KvRun { first_slot, num_slots });
    assert_eq!(runs, expected);
    pool.release(group[1]).unwrap();
    assert_eq!(pool.extend(group[0], 17), Ok(false));
    assert_eq!(pool.extend(group[0], 16), Ok(true));
    assert_eq!(pool.run(group[0]).unwrap().num_slots, 48);
}

#[test]
fn handles_are_checked() {
    let (mut pool, mut other) = (pool(4), pool(4));
    let extent = pool.allocate(PAGE).unwrap();
    assert_eq!(other.run(extent), Err(KvError::ForeignExtent(extent)));
    assert_eq!(other.release(extent), Err(KvError::ForeignExtent(extent)));
    pool.release(extent).unwrap();
    let reused = pool.allocate(PAGE).unwrap();
    for result in [pool.release(extent), pool.retain(extent), pool.extend(extent, 1).map(drop), pool.split(extent, 1).map(drop)] {
        assert_eq!(result, Err(KvError::StaleExtent(extent)));
    }
    assert_eq!(pool.references(reused), Ok(1));
}

#[test]
fn only_whole_pages_of_one_owner_are_split() {
    let mut pool = pool(4);
    let extent = pool.allocate(48).unwrap();
    for at in [0, 8, 48, 64] {
        assert_eq!(pool.split(extent, at), Err(KvError::SplitPoint { extent, num_slots: 48, at, page_size: 16 }));
    }
    pool.retain(extent).unwrap();
    assert_eq!(pool.split(extent, 16), Err(KvError::Shared { extent, references: 2 }));
    assert_eq!(pool.extend(extent, 16), Err(KvError::Shared { extent, references: 2 }));
    pool.release(extent).unwrap();
    let rest = pool.split(extent, 16).unwrap();
    assert_eq!(pool.run(rest), Ok(KvRun { first_slot: 16, num_slots: 32 }));
}

#[test]
fn a_fork_copies_the_page_that_it_writes_to() {
    let mut pool = pool(8);
    let mut parent = sequence(&mut pool, 20, contiguous(0));
    let mut child = parent.fork(&mut pool).unwrap();
    assert_eq!(pool.usage().shared, 32);
    // Tokens 16 to 19 lie in a page that both own.
    assert_eq!(child.append(&mut pool, 1, Growth::Pages), Ok(Some(SlotCopy { from: 16, to: 32, num_slots: 4 })));
    let runs = |pairs: [(u32, u32); 2]| pairs.map(|(first_slot, num_slots)| KvRun { first_slot, num_slots });
    assert_eq!(child.runs(&pool).unwrap(), runs([(0, 16), (32, 5)]));
    assert_eq!(parent.runs(&pool).unwrap(), [KvRun { first_slot: 0, num_slots: 20 }]);
    child.free(&mut pool).unwrap();
    // The last owner writes in place.
    assert_eq!(parent.append(&mut pool, 1, Growth::Pages), Ok(None));
    assert_eq!(parent.runs(&pool).unwrap(), [KvRun { first_slot: 0, num_slots: 21 }]);
}

#[test]
fn a_fork_at_the_end_of_a_page_copies_nothing() {
    let mut pool = pool(8);
    let parent = sequence(&mut pool, 32, contiguous(0));
    let mut child = parent.fork(&mut pool).unwrap();
    assert_eq!(child.append(&mut pool, 1, Growth::Pages), Ok(None));
    assert_eq!(pool.usage().used, 48);
}

#[test]
fn headroom_is_used_before_anything_is_allocated() {
    let mut pool = pool(8);
    let mut grown = sequence(&mut pool, 20, contiguous(20));
    assert_eq!(grown.room(&pool), 28, "20 + 20 slots in whole pages");
    grown.append(&mut pool, 28, contiguous(0)).unwrap();
    assert_eq!((pool.usage().used, grown.room(&pool)), (48, 0));
    grown.append(&mut pool, 1, contiguous(0)).unwrap();
    assert_eq!(grown.runs(&pool).unwrap(), [KvRun { first_slot: 0, num_slots: 49 }], "extended in place");
}

#[test]
fn the_old_place_is_kept_until_older_plans_have_run() {
    let mut pool = pool(16);
    let mut moved = sequence(&mut pool, 20, Growth::Pages);
    let begun = moved.begin_move(&mut pool, 30).unwrap().unwrap();
    assert_eq!(begun.copies(), [SlotCopy { from: 0, to: 32, num_slots: 20 }]);
    assert_eq!(moved.runs(&pool).unwrap(), [KvRun { first_slot: 0, num_slots: 20 }]);
    moved.append(&mut pool, 3, Growth::Pages).unwrap();
    let planned_in = pool.epoch();
    let (ended, rest) = moved.commit_move(&mut pool, begun).unwrap();
    assert_eq!(ended, planned_in);
    assert_eq!(rest, [SlotCopy { from: 20, to: 52, num_slots: 3 }], "appended while the copy ran");
    assert_eq!(moved.runs(&pool).unwrap(), [KvRun { first_slot: 32, num_slots: 23 }]);
    assert_eq!((pool.usage().retiring, pool.usage().used), (32, 64));
    assert_eq!(pool.retire(pool.epoch()), Err(KvError::EpochAhead { epoch: pool.epoch(), current: pool.epoch() }));
    pool.retire(ended).unwrap();
    assert_eq!((pool.usage().retiring, pool.usage().used), (0, 64));
    pool.audit().unwrap();
}

#[test]
fn cancelled_and_failed_moves_leave_everything_in_place() {
    let mut pool = pool(16);
    let mut kept = sequence(&mut pool, 20, Growth::Pages);
    let before = (pool.usage(), kept.runs(&pool).unwrap());
    kept.begin_move(&mut pool, 30).unwrap().unwrap().cancel(&mut pool).unwrap();
    assert_eq!((pool.usage(), kept.runs(&pool).unwrap()), before);

    let begun = kept.begin_move(&mut pool, 0).unwrap().unwrap();
    kept.append(&mut pool, 13, Growth::Pages).unwrap();
    assert_eq!(kept.commit_move(&mut pool, begun), Err(KvError::TargetTooSmall { needed: 33, room: 32 }));
    let begun = kept.begin_move(&mut pool, 0).unwrap().unwrap();
    let fork = kept.fork(&mut pool).unwrap();
    assert_eq!(kept.commit_move(&mut pool, begun), Err(KvError::NotMovable));
    assert_eq!(kept.begin_move(&mut pool, 0).map(|begun| begun.is_none()), Ok(true), "nothing is its own");
    fork.free(&mut pool).unwrap();
    let stayed = kept.runs(&pool).unwrap();
    assert_eq!(stayed[0], KvRun { first_slot: 0, num_slots: 32 });
    assert_eq!((stayed[1].num_slots, pool.usage().used), (1, 48));
    pool.audit().unwrap();
}

/// Three requests of 60 tokens whose pages mix.
fn mixed_group(pool: &mut SlotPool) -> Vec<Sequence> {
    let mut group: Vec<_> = (0..3).map(|_| Sequence::new()).collect();
    for _ in 0..3 {
        for member in &mut group {
            member.append(pool, 20, Growth::Pages).unwrap();
        }
    }
    group
}

fn members(group: &mut [Sequence], expected: u32) -> Vec<GroupMember<'_>> {
    group.iter_mut().map(|kv| GroupMember { kv, expected }).collect()
}

fn runs_of(group: &[Sequence], pool: &SlotPool) -> Vec<KvRun> {
    group.iter().flat_map(|member| member.runs(pool).unwrap()).collect()
}

#[test]
fn a_group_moves_side_by_side() {
    let mut pool = pool(128);
    let mut group = mixed_group(&mut pool);
    // Somebody who has no tokens yet is in the group as well.
    group.insert(1, Sequence::new());
    let policy = Policy::Contiguous(Contiguous::default());
    let usage = pool.usage();
    let moved = pool.reorganize_group(&policy, &usage, &mut members(&mut group, 300)).unwrap().unwrap();
    let slots: Vec<_> = moved.members.iter().map(|(member, begun)| (*member, begun.num_slots())).collect();
    assert_eq!((slots, moved.num_slots()), (vec![(0, 60), (2, 60), (3, 60)], 180));
    let extent = moved.extent;
    for (member, begun) in moved.members {
        group[member].commit_move(&mut pool, begun).unwrap();
    }
    let runs = runs_of(&group, &pool);
    let first = runs[0].first_slot;
    assert_eq!(extent, KvRun { first_slot: first, num_slots: 3 * 368 });
    let in_place = GroupState { extent: 3 * 368, in_place: 3 * 368, ..GroupState::default() };
    assert_eq!(GroupState::of(Some(extent), &group, &pool), in_place);
    let expected = [0, 368, 736].map(|offset| KvRun { first_slot: first + offset, num_slots: 60 });
    assert_eq!(runs, expected, "60 tokens and 300 to come, in whole pages");
    pool.audit().unwrap();
}

#[test]
fn a_group_stays_where_moving_it_does_not_pay_or_fails() {
    let mut pool = pool(64);
    let mut group = mixed_group(&mut pool);
    let policy = Policy::Contiguous(Contiguous::default());
    let (before, usage) = (runs_of(&group, &pool), pool.usage());
    let stays = |pool: &mut SlotPool, group: &mut [Sequence], policy: &Policy, usage: &Usage, expected| {
        let moved = pool.reorganize_group(policy, usage, &mut members(group, expected)).unwrap();
        assert!(moved.is_none());
        assert_eq!((runs_of(group, pool), pool.usage()), (before.clone(), *usage));
        pool.audit().unwrap();
    };
    stays(&mut pool, &mut group, &policy, &usage, 5);
    stays(&mut pool, &mut group, &Policy::Paged, &usage, 300);
    // The last member is being moved already: what was begun for the others is given up.
    let begun = group[2].begin_move(&mut pool, 0).unwrap().unwrap();
    let usage = pool.usage();
    stays(&mut pool, &mut group, &policy, &usage, 300);
    begun.cancel(&mut pool).unwrap();
    // There is no room for three times 60 slots.
    let rest = sequence(&mut pool, 64 * PAGE - 3 * 64 - 100, contiguous(0));
    let usage = pool.usage();
    stays(&mut pool, &mut group, &policy, &usage, 300);
    rest.free(&mut pool).unwrap();
}

#[test]
fn a_cancelled_group_stays_where_it_was() {
    let mut pool = pool(256);
    let mut group = mixed_group(&mut pool);
    let (before, usage) = (runs_of(&group, &pool), pool.usage());
    let policy = Policy::Contiguous(Contiguous::default());
    let moved = pool.reorganize_group(&policy, &usage, &mut members(&mut group, 300)).unwrap().unwrap();
    assert!(pool.usage().used > usage.used);
    moved.cancel(&mut pool).unwrap();
    assert_eq!((runs_of(&group, &pool), pool.usage()), (before, usage));
    // One of them leaves, and another outgrows its new place, before the copies are done: the third one moves all the same.
    let mut moved = pool.reorganize_group(&policy, &usage, &mut members(&mut group, 100)).unwrap().unwrap();
    group[1].append(&mut pool, 500, Growth::Pages).unwrap();
    let outgrown = group[1].runs(&pool).unwrap();
    group.remove(0).free(&mut pool).unwrap();
    moved.members.remove(0).1.cancel(&mut pool).unwrap();
    for (member, begun) in moved.members {
        assert_eq!(group[member - 1].commit_move(&mut pool, begun).is_ok(), member == 2);
    }
    assert_eq!(group[0].runs(&pool).unwrap(), outgrown);
    assert_eq!(group[1].runs(&pool).unwrap().len(), 1);
    pool.audit().unwrap();
}

#[test]
fn shared_slots_move_for_all_owners() {
    let mut pool = pool(16);
    let extent = pool.allocate(20).unwrap();
    pool.retain(extent).unwrap();
    let target = pool.allocate(64).unwrap();
    let begun = pool.begin_move(&[Filled { extent, num_slots: 20 }], target).unwrap();
    assert_eq!(begun.copies(), [SlotCopy { from: 0, to: 32, num_slots: 32 }], "whole: the owners may have filled it differently");
    assert_eq!(pool.begin_move(&[Filled { extent, num_slots: 20 }], target).unwrap_err(), KvError::Moving(extent));
    pool.commit_move(begun).unwrap();
    assert_eq!(pool.run(extent), Ok(KvRun { first_slot: 32, num_slots: 64 }));
    assert_eq!(pool.usage().shared, 64);
    assert_eq!((pool.references(extent), pool.references(target)), (Ok(2), Err(KvError::StaleExtent(target))));
    pool.audit().unwrap();
}

#[test]
fn only_extents_of_one_owner_are_joined() {
    let mut pool = pool(16);
    let [a, b, target] = [(); 3].map(|()| pool.allocate(32).unwrap());
    let sources = [a, b].map(|extent| Filled { extent, num_slots: 10 });
    pool.retain(b).unwrap();
    assert_eq!(pool.begin_move(&sources, target).unwrap_err(), KvError::Shared { extent: b, references: 2 });
    assert_eq!(pool.begin_move(&[], target).unwrap_err(), KvError::NotMovable);
    pool.release(b).unwrap();
    let begun = pool.begin_move(&sources, target).unwrap();
    assert_eq!(begun.num_slots(), 20);
    assert_eq!(pool.extend(a, 1), Err(KvError::Moving(a)));
    // A new owner would see its slots joined to others.
    pool.retain(a).unwrap();
    assert_eq!(pool.commit_move(begun), Err(KvError::Shared { extent: a, references: 2 }));
    assert_eq!(pool.references(target), Err(KvError::StaleExtent(target)), "cancelled");
    pool.release(a).unwrap();
    assert_eq!(pool.extend(a, 1), Ok(false), "it rests again, but has a neighbour");
}

#[test]
fn too_many_tokens_are_refused() {
    let mut pool = pool(1);
    let mut sequence = sequence(&mut pool, 10, Growth::Pages);
    let error = sequence.append(&mut pool, u32::MAX, contiguous(u32::MAX)).unwrap_err();
    assert_eq!(error, KvError::TooManyTokens { tokens: u64::from(u32::MAX) + 10, most: Sequence::MAX_TOKENS });
    assert!(matches!(sequence.append(&mut pool, 1 << 30, contiguous(u32::MAX)), Err(KvError::OutOfSlots { .. })));
    assert_eq!(sequence.len(), 10);
}
