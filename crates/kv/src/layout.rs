//! When KV lies in pages, when in one piece, and when moving it pays.

use serde::{Deserialize, Serialize};

use crate::{Growth, Sequence, SlotPool, Usage};

/// How the KV of requests is laid out as they grow.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Policy {
    /// In pages wherever they are free; nothing is ever moved.
    Paged,
    /// In contiguous extents with headroom, moved when they have outgrown it and moving pays.
    Contiguous(Contiguous),
}

/// The parameters of [`Policy::Contiguous`]. Costs are in units of the time in which attention reads one slot, so that they
/// depend neither on the model's size nor on the device's bandwidth.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Contiguous {
    /// The most slots to keep ready for the tokens to come, however many are expected.
    pub max_headroom: u32,
    /// Up to this [pressure](Usage::pressure) the headroom is all that is expected.
    pub full_headroom_pressure: f64,
    /// From this pressure on there is no headroom; in between it falls linearly.
    pub no_headroom_pressure: f64,
    /// If a greater share of the slots that can be had is free but scattered (see [`Usage::fragmentation`]), a request that
    /// will outgrow its headroom is reckoned to grow into single pages, even if an extent can be found now.
    pub max_fragmentation: f64,
    /// A group is looked at if a greater share of its slots is not both in its one extent and a member's, see
    /// [`GroupState::fragmentation`](crate::GroupState::fragmentation): from 0, which is any, to 1, which is never.
    pub max_group_fragmentation: f64,
    /// Groups are balanced if the largest one has more than so many times the tokens of the mean (see
    /// [`imbalance`](crate::imbalance)), at least 1.
    pub max_imbalance: f64,
    /// What each further run costs attention at every step: an address and the end of a tile that is not full.
    pub run_cost: f64,
    /// What it costs to move a slot, once.
    pub move_cost: f64,
}

impl Default for Contiguous {
    fn default() -> Self {
        Self {
            // Three to five times the mean answer of public conversation traces.
            max_headroom: 1024,
            full_headroom_pressure: 0.7,
            no_headroom_pressure: 0.95,
            max_fragmentation: 0.5,
            max_group_fragmentation: 0.5,
            max_imbalance: 1.5,
            // Measured by `packinfer decode-run` on an H100: to attention alone a further run costs 0.17 slots. With longer plans
            // to upload, and multiprocessors that wait for those whose requests are scattered, whole steps took less time with
            // 0.8 than with 0.17.
            run_cost: 0.8,
            // Read and written, at 85% of the bandwidth.
            move_cost: 2.0 / 0.85,
        }
    }
}

/// Why KV should be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reason {
    /// It lies in several runs.
    Scattered,
    /// It is in one run, but has no room left behind it.
    NoHeadroom,
    /// It has some room left, but free slots are too scattered to go on behind that.
    Fragmented,
}

/// What the decision to move is made from; [`Self::of`] reads it off a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Situation {
    /// Tokens that a move would take along.
    pub tokens: u32,
    /// Runs that they lie in.
    pub runs: u32,
    /// Tokens that can be appended in place.
    pub room: u32,
    /// Tokens, and so steps, that are expected.
    pub expected: u32,
}

impl Situation {
    /// The situation of a sequence that expects `expected` more tokens.
    pub fn of(sequence: &Sequence, pool: &SlotPool, expected: u32) -> Self {
        let tokens = sequence.own_tokens(pool);
        // A sequence of another pool has nothing that this one could move.
        let runs = sequence.runs_from(pool, sequence.len() - tokens).map_or(0, |runs| runs.len() as u32);
        Self { tokens, runs, room: sequence.room(pool), expected }
    }
}

impl Policy {
    /// Where the next tokens of a request go that expects `expected` more after them.
    pub fn growth(&self, usage: &Usage, expected: u32) -> Growth {
        match self {
            Self::Paged => Growth::Pages,
            Self::Contiguous(layout) => Growth::Contiguous { headroom: layout.headroom(usage, expected) },
        }
    }

    /// Slots to keep behind the tokens of a request that expects `expected` more; none for [`Policy::Paged`].
    pub fn headroom(&self, usage: &Usage, expected: u32) -> u32 {
        match self {
            Self::Paged => 0,
            Self::Contiguous(layout) => layout.headroom(usage, expected),
        }
    }

    /// Whether a request's KV should be moved to one extent now, and why. Never for [`Policy::Paged`].
    pub fn move_now(&self, usage: &Usage, page_size: u32, situation: &Situation) -> Option<Reason> {
        match self {
            Self::Paged => None,
            Self::Contiguous(layout) => layout.move_now(usage, page_size, situation),
        }
    }
}

impl Contiguous {
    /// Slots to keep for a request that expects `expected` more tokens.
    pub fn headroom(&self, usage: &Usage, expected: u32) -> u32 {
        let span = self.no_headroom_pressure - self.full_headroom_pressure;
        let left = self.no_headroom_pressure - usage.pressure();
        let share = if span > 0.0 { (left / span).clamp(0.0, 1.0) } else { f64::from(u8::from(left > 0.0)) };
        (f64::from(expected.min(self.max_headroom)) * share).round() as u32
    }

    /// Slots for each member of a group whose KV is to lie side by side, to [allocate](SlotPool::allocate_group) and
    /// [move](Sequence::begin_move_into) them to: their tokens, and headroom as far as the largest free extent goes round.
    pub fn group(&self, usage: &Usage, page_size: u32, members: &[Situation]) -> Vec<u32> {
        let page_size = page_size.max(1);
        let whole_pages = |slots: u32| u64::from(slots).next_multiple_of(u64::from(page_size));
        let tokens: u64 = members.iter().map(|member| whole_pages(member.tokens)).sum();
        let headrooms = members.iter().map(|member| self.headroom(usage, member.expected));
        let wanted: u64 = headrooms.clone().map(whole_pages).sum();
        let left = u64::from(usage.largest_free).saturating_sub(tokens).min(wanted);
        let slots = members.iter().zip(headrooms).map(|(member, headroom)| {
            // In whole pages, rounded down, so that all shares together fit.
            let share = u64::from(headroom) * left / wanted.max(1);
            let share = if left < wanted { share - share % u64::from(page_size) } else { share };
            member.tokens.saturating_add(share as u32)
        });
        slots.collect()
    }

    /// What attention saves over the expected steps if the KV is moved now, in the time of reading one slot.
    pub fn gain(&self, usage: &Usage, page_size: u32, situation: &Situation) -> f64 {
        let now = situation.runs.saturating_sub(1);
        let outgrown = situation.expected.saturating_sub(situation.room);
        let to_come = match outgrown {
            0 => 0,
            _ if self.is_fragmented(usage) || usage.largest_free.saturating_add(usage.evictable) < outgrown => {
                outgrown.div_ceil(page_size.max(1))
            }
            _ => 1,
        };
        // Runs to come are added one after the other: half of them on average.
        (f64::from(now) + f64::from(to_come) / 2.0) * self.run_cost * f64::from(situation.expected)
    }

    /// The imbalance that groups are brought down to when it was more than [`Self::max_imbalance`]: half way to none, so that it
    /// is not more again at once.
    pub fn balanced(&self) -> f64 {
        f64::midpoint(1.0, self.max_imbalance)
    }

    /// Whether it pays to move the members of a group side by side: what attention saves for all of them together is more than
    /// what the copies cost.
    pub fn group_pays(&self, usage: &Usage, page_size: u32, members: &[Situation]) -> bool {
        let gain: f64 = members.iter().map(|member| self.gain(usage, page_size, member)).sum();
        gain > members.iter().map(|member| self.cost(member)).sum()
    }

    /// What moving the KV costs, in the same unit.
    pub fn cost(&self, situation: &Situation) -> f64 {
        f64::from(situation.tokens) * self.move_cost
    }

    fn move_now(&self, usage: &Usage, page_size: u32, situation: &Situation) -> Option<Reason> {
        let reason = if situation.runs > 1 {
            Reason::Scattered
        } else if situation.room == 0 {
            Reason::NoHeadroom
        } else if situation.room < situation.expected && self.is_fragmented(usage) {
            Reason::Fragmented
        } else {
            return None;
        };
        let target = situation.tokens.saturating_add(self.headroom(usage, situation.expected));
        let possible = situation.tokens > 0 && target > situation.tokens && usage.largest_free >= target;
        (possible && self.gain(usage, page_size, situation) > self.cost(situation)).then_some(reason)
    }

    fn is_fragmented(&self, usage: &Usage) -> bool {
        let scattered = f64::from(usage.free - usage.largest_free.min(usage.free));
        scattered > self.max_fragmentation * (f64::from(usage.free) + f64::from(usage.evictable))
    }
}

/// How many tokens answers have had so far, and so how many are still to be expected.
///
/// Answer lengths are taken to be memoryless: how long a request has run says nothing about when it ends. Old answers lose
/// weight, so that the mean follows the load.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExpectedTokens {
    mean: f64,
    observed: u32,
}

impl ExpectedTokens {
    /// Answers over which the mean is taken.
    const WINDOW: u32 = 1024;

    /// An expectation of `tokens` until answers have been observed.
    pub fn new(tokens: u32) -> Self {
        Self { mean: f64::from(tokens), observed: 0 }
    }

    /// Takes the length of an answer into account.
    pub fn observe(&mut self, tokens: u32) {
        self.observed = (self.observed + 1).min(Self::WINDOW);
        self.mean += (f64::from(tokens) - self.mean) / f64::from(self.observed);
    }

    /// Tokens to be expected of any running request.
    pub fn remaining(&self) -> u32 {
        self.mean.ceil() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(free: u32, largest_free: u32) -> Usage {
        Usage { total: 10_000, used: 10_000 - free, free, largest_free, ..Usage::default() }
    }

    #[test]
    fn headroom_follows_expectation_and_pressure() {
        let layout = Contiguous::default();
        assert_eq!(layout.headroom(&usage(9_000, 9_000), 300), 300);
        assert_eq!(layout.headroom(&usage(9_000, 9_000), 30_000), layout.max_headroom);
        assert_eq!(layout.headroom(&usage(1_750, 9_000), 300), 150, "half way from 0.7 to 0.95");
        assert_eq!(layout.headroom(&usage(400, 400), 300), 0);
        let step = Contiguous { full_headroom_pressure: 0.5, no_headroom_pressure: 0.5, ..layout };
        assert_eq!((step.headroom(&usage(5_001, 1), 10), step.headroom(&usage(5_000, 1), 10)), (10, 0));
    }

    #[test]
    fn moves_only_what_pays() {
        let policy = Policy::Contiguous(Contiguous::default());
        let roomy = usage(9_000, 9_000);
        let scattered = Situation { tokens: 1_000, runs: 60, room: 0, expected: 300 };
        assert_eq!(policy.move_now(&roomy, 16, &scattered), Some(Reason::Scattered));
        assert_eq!(policy.move_now(&roomy, 16, &Situation { expected: 10, ..scattered }), None, "over too soon");
        assert_eq!(policy.move_now(&usage(9_000, 1_100), 16, &scattered), None, "nowhere to go");
        assert_eq!(Policy::Paged.move_now(&roomy, 16, &scattered), None);
    }

    #[test]
    fn one_run_moves_only_before_it_scatters() {
        let policy = Policy::Contiguous(Contiguous::default());
        let full = Situation { tokens: 500, runs: 1, room: 0, expected: 400 };
        assert_eq!(policy.move_now(&usage(9_000, 9_000), 16, &full), None, "one more extent is cheaper than a move");
        assert_eq!(policy.move_now(&usage(9_000, 2_000), 16, &full), Some(Reason::NoHeadroom));
        let tight = Situation { room: 40, ..full };
        assert_eq!(policy.move_now(&usage(9_000, 2_000), 16, &tight), Some(Reason::Fragmented));
        assert_eq!(policy.move_now(&usage(9_000, 2_000), 16, &Situation { room: 400, ..full }), None);
    }

    #[test]
    fn groups_share_the_headroom_that_there_is() {
        let layout = Contiguous::default();
        let member = |tokens, expected| Situation { tokens, runs: 9, room: 0, expected };
        let members = [member(100, 300), member(50, 100)];
        assert_eq!(layout.group(&usage(9_000, 9_000), 16, &members), [400, 150]);
        // 176 slots hold the tokens; half of the headroom's 304 + 112 remains.
        let tight = layout.group(&usage(9_000, 176 + 208), 16, &members);
        assert_eq!(tight, [100 + 144, 50 + 48]);
        assert!(tight.iter().map(|slots| slots.next_multiple_of(16)).sum::<u32>() <= 176 + 208);
        assert_eq!(layout.group(&usage(9_000, 16), 16, &members), [100, 50], "for the allocation to refuse");
    }

    #[test]
    fn expectation_follows_the_answers() {
        let mut expected = ExpectedTokens::new(256);
        assert_eq!(expected.remaining(), 256);
        expected.observe(100);
        expected.observe(300);
        assert_eq!(expected.remaining(), 200);
        (0..20_000).for_each(|_| expected.observe(1_000));
        assert_eq!(expected.remaining(), 1_000);
    }
}
