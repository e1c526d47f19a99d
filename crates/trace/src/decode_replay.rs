//! Decode steps of a server that batches continuously: what happens to its KV pool between one launch and the next.
//!
//! A fixed number of requests of a trace decode at a time. In every step each of them appends a token; those whose answer is
//! complete leave, and the next requests of the trace take their places, with prompts that others have computed. The replay says
//! where everything lies and what is to be copied, and leaves the work to whoever has a device. A step is
//!
//! 1. [`DecodeReplay::admit`]: who leaves and who comes, whose KV is then to be written;
//! 2. [`DecodeReplay::end_move`], for each move whose copies are done, and [`DecodeReplay::begin_moves`];
//! 3. [`DecodeReplay::append`]: a slot for each new token;
//! 4. a plan for [`DecodeReplay::requests`], and its launches; [`DecodeReplay::retire`] when they have run.
//!
//! With [`DecodeConfig::group_size`], requests are moved in [`Group`]s, side by side: whoever comes takes a place that somebody
//! has left.
//!
//! ```
//! use packinfer_trace::TraceRequest;
//! use packinfer_trace::decode_replay::{DecodeConfig, DecodeReplay};
//!
//! let request = |prompt_tokens| TraceRequest { arrival_ms: 0, prompt_tokens, output_tokens: 3, blocks: Vec::new() };
//! let trace = [request(100), request(50), request(20)];
//! let mut replay = DecodeReplay::new(&trace, DecodeConfig { concurrent: 2, ..DecodeConfig::default() })?;
//! assert_eq!(replay.admit()?.len(), 2);
//! replay.append()?;
//! let lengths: Vec<_> = replay.requests().map(|request| request.kv.len()).collect();
//! assert_eq!((lengths, replay.positions()), (vec![101, 51], &[100, 50][..]));
//! # Ok::<(), packinfer_trace::decode_replay::DecodeError>(())
//! ```

mod groups;
mod picture;

use std::num::NonZeroU32;

use packinfer_kv::{
    Epoch, ExpectedTokens, GroupMember, GroupMove, Growth, KvError, KvRun, Policy, Reason, Sequence, SequenceMove, SlotCopy,
    SlotPool,
};
use serde::{Deserialize, Serialize};

use crate::TraceRequest;
use crate::replay::{FIRST_EXPECTATION, REVIEW_STEPS};
use groups::Groups;
pub use groups::{Group, TriggerCounts};
pub use picture::{PoolMap, pools_svg};

/// Slots of the pool for each token that as many mean requests have, if nobody says how many there are: so that the pool is two
/// thirds full.
const SLOTS_PER_TOKEN: f64 = 1.75;

/// What is replayed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DecodeConfig {
    /// Requests that decode at a time.
    pub concurrent: u32,
    /// Slots of the pool; `None` for so many that it is about two thirds full.
    pub num_slots: Option<u32>,
    /// Slots of a page.
    pub page_size: u32,
    /// How requests are laid out as they grow.
    pub policy: Policy,
    /// Whether prompts come in pages all the same, as they do where their KV was computed or received page by page: it is for the
    /// policy then to say which requests are moved.
    pub prompts_in_pages: bool,
    /// Requests of a group, which are moved side by side: who comes takes a place in the group that has the fewest tokens, and a
    /// group is looked at when a [`Trigger`](packinfer_kv::Trigger) of the policy gives cause. `None` if each request is moved by
    /// itself.
    pub group_size: Option<NonZeroU32>,
    /// The most slots that moves begun in one step copy, so that none slows a step down by much; but one request, or one group,
    /// is always moved whole.
    pub most_moving_slots: u32,
}

impl Default for DecodeConfig {
    fn default() -> Self {
        Self {
            concurrent: 256,
            num_slots: None,
            page_size: 16,
            policy: Policy::Paged,
            prompts_in_pages: false,
            group_size: None,
            most_moving_slots: 16_384,
        }
    }
}

/// A replay that cannot begin or go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// There is nobody to decode.
    #[error("{requests} requests in the trace, {concurrent} of them at a time: there must be at least one of each")]
    Nobody {
        /// Requests of the trace.
        requests: usize,
        /// Requests that were to decode at a time.
        concurrent: u32,
    },
    /// More KV than slots.
    #[error(
        "a pool of {num_slots} slots does not hold {concurrent} requests at step {step}: give it more slots, or have fewer requests"
    )]
    PoolTooSmall {
        /// Slots of the pool.
        num_slots: u32,
        /// Requests that decode at a time.
        concurrent: u32,
        /// The step, from 0.
        step: u64,
        /// What was needed, and what was there.
        source: KvError,
    },
    /// No such pool, or slots of another one.
    #[error(transparent)]
    Kv(#[from] KvError),
}

/// What happened in a number of steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DecodeReport {
    /// Steps.
    pub steps: u64,
    /// Requests that took the places of others, or the first places.
    pub admitted: u64,
    /// Tokens of all requests, added up over the steps: what attention read.
    pub read_slots: u64,
    /// Runs that they lay in, added up likewise.
    pub read_runs: u64,
    /// Moves that were committed.
    pub moves: u64,
    /// Moves that were given up, as the request had left or had outgrown its new place.
    pub cancelled_moves: u64,
    /// Slots that were copied, for cancelled moves too.
    pub moved_slots: u64,
    /// Moves that were begun because a request lay in several runs.
    pub scattered: u64,
    /// Moves that were begun because there was no room behind a request.
    pub no_headroom: u64,
    /// Moves that were begun because there would be none.
    pub fragmented: u64,
    /// Groups that were looked at, by what gave cause to it.
    pub groups_looked_at: TriggerCounts,
    /// Groups that were then begun to be moved, as it paid and there was room.
    pub groups_moved: TriggerCounts,
    /// The most slots that had an owner.
    pub peak_used_slots: u32,
}

/// A request that decodes.
#[derive(Debug)]
pub struct Decoding {
    /// Its number, from 0 in order of admission.
    pub id: u64,
    /// Its KV.
    pub kv: Sequence,
    /// Tokens of its answer so far.
    generated: u32,
    /// Tokens of its whole answer.
    answer: u32,
    /// Whether it is to be looked at whether its KV should be moved.
    is_due: bool,
}

/// A request that comes in: KV that is to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admitted {
    /// Its number, from 0 in order of admission.
    pub id: u64,
    /// Where its tokens go, in order.
    pub runs: Vec<KvRun>,
}

/// The requests that decode, and the pool that their KV is in.
#[derive(Debug)]
pub struct DecodeReplay<'a> {
    trace: &'a [TraceRequest],
    config: DecodeConfig,
    pool: SlotPool,
    /// In the order of their numbers.
    running: Vec<Decoding>,
    groups: Groups,
    admitted: u64,
    step: u64,
    expected: ExpectedTokens,
    slots: Vec<u32>,
    positions: Vec<u32>,
    report: DecodeReport,
}

impl<'a> DecodeReplay<'a> {
    /// A replay whose first requests are still to be [admitted](Self::admit). When the trace ends it begins anew.
    ///
    /// # Errors
    ///
    /// No requests, or a page size or number of slots that makes no pool.
    pub fn new(trace: &'a [TraceRequest], config: DecodeConfig) -> Result<Self, DecodeError> {
        if trace.is_empty() || config.concurrent == 0 {
            return Err(DecodeError::Nobody { requests: trace.len(), concurrent: config.concurrent });
        }
        Ok(Self {
            pool: SlotPool::new(config.pool_slots(trace), config.page_size)?,
            trace,
            config,
            running: Vec::new(),
            groups: config.group_size.map_or_else(Groups::default, |places| Groups::new(config.concurrent, places)),
            admitted: 0,
            step: 0,
            expected: ExpectedTokens::new(FIRST_EXPECTATION),
            slots: Vec::new(),
            positions: Vec::new(),
            report: DecodeReport::default(),
        })
    }

    /// As [`Self::advance_alone`], so that the pool looks as after a long time of serving; then the report begins anew. Who is
    /// running afterwards was never told by [`Self::admit`].
    ///
    /// # Errors
    ///
    /// As the parts of a step.
    pub fn warm_up(&mut self, steps: u32) -> Result<(), DecodeError> {
        self.advance_alone(steps)?;
        self.report = DecodeReport::default();
        Ok(())
    }

    /// Goes through `steps` steps without a device: copies are done when the next step begins, and plans have run when their step
    /// ends.
    ///
    /// # Errors
    ///
    /// As the parts of a step.
    pub fn advance_alone(&mut self, steps: u32) -> Result<(), DecodeError> {
        let mut moves = Vec::new();
        for _ in 0..steps {
            self.admit()?;
            for (id, begun) in moves.drain(..) {
                self.end_move(id, begun)?;
            }
            moves = self.begin_moves()?;
            self.append()?;
            let ended = self.pool.epoch();
            self.pool.advance_epoch();
            self.retire(ended)?;
        }
        for (id, begun) in moves {
            self.end_move(id, begun)?;
        }
        Ok(())
    }

    /// Begins a step: lets requests go whose answers are complete, and others take their places.
    ///
    /// # Errors
    ///
    /// Not enough slots for them.
    pub fn admit(&mut self) -> Result<Vec<Admitted>, DecodeError> {
        let complete: Vec<_> = self.running.extract_if(.., |request| request.generated >= request.answer).collect();
        for request in complete {
            self.expected.observe(request.generated);
            self.groups.leave(request.id);
            request.kv.free(&mut self.pool)?;
        }
        let mut admitted = Vec::new();
        while self.running.len() < self.config.concurrent as usize {
            let request = &self.trace[(self.admitted % self.trace.len() as u64) as usize];
            let growth = match self.config.prompts_in_pages {
                true => Growth::Pages,
                false => self.config.policy.growth(&self.pool.usage(), self.expected.remaining()),
            };
            let mut kv = Sequence::new();
            // Without a token there would be nothing to attend to.
            kv.append(&mut self.pool, request.prompt_tokens.max(1), growth).map_err(|error| self.full(error))?;
            admitted.push(Admitted { id: self.admitted, runs: kv.runs(&self.pool)? });
            self.groups.join(self.admitted, &self.running);
            let answer = request.output_tokens.max(1);
            self.running.push(Decoding { id: self.admitted, kv, generated: 0, answer, is_due: true });
            self.admitted += 1;
        }
        self.report.admitted += admitted.len() as u64;
        Ok(admitted)
    }

    /// Begins to move the KV of requests, or of groups, for which the policy says so, each move with its request's number. What
    /// was appended so far is to be copied. Steps may be left out while other copies are under way: who was to be looked at is
    /// looked at later. Groups are only looked at when all moves have ended.
    ///
    /// # Errors
    ///
    /// None that a user can cause.
    pub fn begin_moves(&mut self) -> Result<Vec<(u64, SequenceMove)>, KvError> {
        let moves = match self.config.group_size {
            Some(_) => self.begin_moves_of_groups()?,
            None => self.begin_moves_of_requests()?,
        };
        self.report.moved_slots += moves.iter().map(|(_, begun)| u64::from(begun.num_slots())).sum::<u64>();
        Ok(moves)
    }

    fn begin_moves_of_requests(&mut self) -> Result<Vec<(u64, SequenceMove)>, KvError> {
        let expected = self.expected.remaining();
        let (mut moves, mut moving_slots) = (Vec::new(), 0);
        for request in &mut self.running {
            if !request.is_due || moving_slots >= self.config.most_moving_slots {
                continue;
            }
            request.is_due = false;
            let usage = self.pool.usage();
            let Some((reason, begun)) = request.kv.reorganize(&mut self.pool, &self.config.policy, &usage, expected)? else {
                continue;
            };
            match reason {
                Reason::Scattered => self.report.scattered += 1,
                Reason::NoHeadroom => self.report.no_headroom += 1,
                Reason::Fragmented => self.report.fragmented += 1,
            }
            moving_slots += begun.num_slots();
            moves.push((request.id, begun));
        }
        Ok(moves)
    }

    fn begin_moves_of_groups(&mut self) -> Result<Vec<(u64, SequenceMove)>, KvError> {
        if self.groups.under_way > 0 {
            return Ok(Vec::new());
        }
        let (mut moves, mut moving_slots) = (Vec::new(), 0);
        self.groups.balance(&self.config.policy, &self.running);
        for group in 0..self.groups.len() {
            if moving_slots >= self.config.most_moving_slots {
                break;
            }
            let Some(trigger) = self.groups.trigger(group, &self.config.policy, &mut self.running, &self.pool) else {
                continue;
            };
            self.report.groups_looked_at.count(trigger);
            let (ids, Some(begun)) = self.begin_move_of_group(group)? else { continue };
            self.report.groups_moved.count(trigger);
            moving_slots += begun.num_slots();
            self.groups.begin(group, begun.extent, begun.members.len());
            moves.extend(begun.members.into_iter().map(|(member, begun)| (ids[member], begun)));
        }
        Ok(moves)
    }

    /// Begins to move a group if that pays; also who its members are.
    fn begin_move_of_group(&mut self, group: usize) -> Result<(Vec<u64>, Option<GroupMove>), KvError> {
        let (ids, expected) = (self.groups.members(group), self.expected.remaining());
        let running = self.running.iter_mut().filter(|request| ids.contains(&request.id));
        let (ids, mut members): (Vec<u64>, Vec<_>) =
            running.map(|request| (request.id, GroupMember { kv: &mut request.kv, expected })).unzip();
        let usage = self.pool.usage();
        let begun = self.pool.reorganize_group(&self.config.policy, &usage, &mut members)?;
        Ok((ids, begun))
    }

    /// Ends a move whose copies are done: what is still to be copied, before the next step reads it, and the epoch that ended.
    /// `None` if the move was given up, as the request has left, or has outgrown its new place.
    ///
    /// # Errors
    ///
    /// None that a user can cause.
    pub fn end_move(&mut self, id: u64, begun: SequenceMove) -> Result<Option<(Epoch, Vec<SlotCopy>)>, KvError> {
        let request = self.running.iter_mut().find(|request| request.id == id);
        let ended = match request {
            Some(request) => match request.kv.commit_move(&mut self.pool, begun) {
                Ok(ended) => Some(ended),
                Err(KvError::TargetTooSmall { .. } | KvError::Shared { .. } | KvError::NotMovable) => None,
                Err(error) => return Err(error),
            },
            None => {
                begun.cancel(&mut self.pool)?;
                None
            }
        };
        self.groups.end(id, ended.is_some());
        match &ended {
            Some((_, rest)) => {
                self.report.moves += 1;
                self.report.moved_slots += rest.iter().map(|copy| u64::from(copy.num_slots)).sum::<u64>();
            }
            None => self.report.cancelled_moves += 1,
        }
        Ok(ended)
    }

    /// A new token for every request; [`Self::slots`] and [`Self::positions`] are theirs then.
    ///
    /// # Errors
    ///
    /// Not enough slots.
    pub fn append(&mut self) -> Result<(), DecodeError> {
        let expected = self.expected.remaining();
        self.slots.clear();
        self.positions.clear();
        for index in 0..self.running.len() {
            let growth = self.config.policy.growth(&self.pool.usage(), expected);
            let request = &mut self.running[index];
            let position = request.kv.len();
            // Nothing is shared here, so nothing is copied on write.
            let appended = request.kv.append(&mut self.pool, 1, growth);
            appended.map_err(|error| self.full(error))?;
            let request = &mut self.running[index];
            request.generated += 1;
            request.is_due |= request.kv.room(&self.pool) == 0 || request.generated.is_multiple_of(REVIEW_STEPS);
            let runs = request.kv.runs(&self.pool)?;
            // The new token is the last of the last run.
            self.slots.extend(runs.last().map(|run| run.first_slot + run.num_slots - 1));
            self.positions.push(position);
            self.report.read_slots += u64::from(position) + 1;
            self.report.read_runs += runs.len() as u64;
        }
        self.step += 1;
        self.report.steps += 1;
        self.report.peak_used_slots = self.report.peak_used_slots.max(self.pool.usage().used);
        Ok(())
    }

    /// The requests that decode, in an order that does not depend on the layout.
    pub fn requests(&self) -> impl ExactSizeIterator<Item = &Decoding> {
        self.running.iter()
    }

    /// The groups that requests are moved in; none if each is moved by itself.
    pub fn groups(&self) -> impl ExactSizeIterator<Item = &Group> {
        self.groups.iter()
    }

    /// Slots of the new tokens, in the order of the requests.
    pub fn slots(&self) -> &[u32] {
        &self.slots
    }

    /// Positions of the new tokens, likewise.
    pub fn positions(&self) -> &[u32] {
        &self.positions
    }

    /// The pool.
    pub fn pool(&self) -> &SlotPool {
        &self.pool
    }

    /// What happened since the replay began, or since it was warm.
    pub fn report(&self) -> &DecodeReport {
        &self.report
    }

    /// The plans of an epoch have run: what only they read comes free.
    ///
    /// # Errors
    ///
    /// An epoch that has not ended.
    pub fn retire(&mut self, epoch: Epoch) -> Result<(), KvError> {
        self.pool.retire(epoch)
    }

    fn full(&self, source: KvError) -> DecodeError {
        match source {
            KvError::OutOfSlots { .. } => DecodeError::PoolTooSmall {
                num_slots: self.pool.num_slots(),
                concurrent: self.config.concurrent,
                step: self.step,
                source,
            },
            other => DecodeError::Kv(other),
        }
    }
}

impl DecodeConfig {
    /// Slots of the pool that requests of `trace` decode in, in whole pages.
    fn pool_slots(&self, trace: &[TraceRequest]) -> u32 {
        let page_size = self.page_size.max(1);
        let slots = self.num_slots.unwrap_or_else(|| {
            let tokens = |request: &TraceRequest| u64::from(request.prompt_tokens) + u64::from(request.output_tokens);
            let mean = trace.iter().map(tokens).sum::<u64>() as f64 / trace.len() as f64;
            let longest = trace.iter().map(tokens).max().unwrap_or(0) as f64;
            let wanted = f64::from(self.concurrent) * (mean + f64::from(page_size)) * SLOTS_PER_TOKEN + longest;
            wanted.ceil().min(f64::from(SlotPool::MAX_SLOTS - page_size)) as u32
        });
        slots - slots % page_size
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::HashMap;

    use packinfer_kv::Contiguous;

    use super::*;

    /// Requests with prompts of 1 to 400 and answers of 1 to 300 tokens.
    pub fn trace() -> Vec<TraceRequest> {
        let request = |index: u32| TraceRequest {
            arrival_ms: 0,
            prompt_tokens: 1 + index * 131 % 400,
            output_tokens: 1 + index * 71 % 300,
            blocks: Vec::new(),
        };
        (0..200).map(request).collect()
    }

    pub fn config(policy: Policy) -> DecodeConfig {
        DecodeConfig { concurrent: 20, num_slots: Some(16_384), policy, ..DecodeConfig::default() }
    }

    /// Moves that cost next to nothing.
    pub fn eager() -> Policy {
        Policy::Contiguous(Contiguous { move_cost: 1e-3, max_headroom: 40, ..Contiguous::default() })
    }

    /// A device of which each slot holds the request and the position of its token.
    struct Slots(Vec<Option<(u64, u32)>>);

    impl Slots {
        fn copy(&mut self, copies: &[SlotCopy]) {
            for copy in copies {
                for index in 0..copy.num_slots {
                    self.0[(copy.to + index) as usize] = self.0[(copy.from + index) as usize];
                }
            }
        }
    }

    /// Replays with copies that take `delay` steps, checks that every request reads its own tokens, and returns who was there in
    /// each step.
    pub fn replay(config: DecodeConfig, delay: u64) -> (Vec<Vec<u64>>, DecodeReport) {
        let trace = trace();
        let mut replay = DecodeReplay::new(&trace, config).expect("a good trace");
        let mut device = Slots(vec![None; replay.pool().num_slots() as usize]);
        let (mut moves, mut begun_at, mut retiring, mut seen) = (Vec::new(), 0, HashMap::new(), Vec::new());
        for step in 0..600 {
            for Admitted { id, runs } in replay.admit().expect("there is room") {
                let slots = runs.iter().flat_map(|run| run.first_slot..run.first_slot + run.num_slots);
                slots.zip(0..).for_each(|(slot, position)| device.0[slot as usize] = Some((id, position)));
            }
            if let Some(ended) = retiring.remove(&step) {
                replay.retire(ended).expect("it has ended");
            }
            if step >= begun_at + delay {
                let mut rest = Vec::new();
                for (id, begun) in moves.drain(..) {
                    let begun: SequenceMove = begun;
                    device.copy(begun.copies());
                    if let Some((ended, copies)) = replay.end_move(id, begun).expect("a good move") {
                        rest.extend(copies);
                        retiring.insert(step + 3, ended);
                    }
                }
                device.copy(&rest);
                (moves, begun_at) = (replay.begin_moves().expect("a good pool"), step);
            }
            replay.append().expect("there is room");
            let new = replay.requests().zip(replay.slots()).zip(replay.positions());
            new.for_each(|((request, &slot), &position)| device.0[slot as usize] = Some((request.id, position)));
            for request in replay.requests() {
                let runs = request.kv.runs(replay.pool()).expect("the pool's own");
                let slots = runs.iter().flat_map(|run| run.first_slot..run.first_slot + run.num_slots);
                let tokens = slots.map(|slot| device.0[slot as usize]);
                assert!(tokens.eq((0..request.kv.len()).map(|position| Some((request.id, position)))), "step {step}");
            }
            replay.pool().audit().expect("nothing is lost");
            seen.push(replay.requests().map(|request| request.id).collect());
        }
        (seen, *replay.report())
    }

    #[test]
    fn requests_read_their_own_tokens_wherever_they_are_moved() {
        let (seen, paged) = replay(config(Policy::Paged), 1);
        assert_eq!((paged.moves, paged.moved_slots, paged.steps), (0, 0, 600));
        assert!(seen.iter().all(|requests| requests.len() == 20) && paged.admitted > 60);
        for delay in [1, 2, 7] {
            let (same, eager) = replay(config(eager()), delay);
            assert!(same == seen, "who decodes does not depend on the layout");
            assert_eq!((eager.admitted, eager.read_slots), (paged.admitted, paged.read_slots));
            assert!(eager.moves > 20 && eager.read_runs < paged.read_runs / 4, "{eager:?}");
            assert!(delay < 7 || eager.cancelled_moves > 0, "{eager:?}");
        }
    }

    #[test]
    fn prompts_in_pages_are_moved_where_that_pays() {
        let policy = Policy::Contiguous(Contiguous::default());
        let in_pages = DecodeConfig { prompts_in_pages: true, ..config(policy) };
        let (_, moved) = replay(in_pages, 1);
        assert!(moved.scattered > moved.admitted / 3 && moved.moves > moved.admitted / 3, "{moved:?}");
        let (_, paged) = replay(config(Policy::Paged), 1);
        assert!(moved.read_runs < paged.read_runs / 2, "{} runs of {}", moved.read_runs, paged.read_runs);
    }

    #[test]
    fn moves_that_do_not_pay_are_not_begun() {
        let (_, costly) = replay(config(Policy::Contiguous(Contiguous { move_cost: 1e6, ..Contiguous::default() })), 1);
        assert_eq!((costly.moves, costly.cancelled_moves, costly.moved_slots), (0, 0, 0));
    }

    #[test]
    fn warm_pools_begin_a_new_report() {
        let trace = trace();
        let mut replay = DecodeReplay::new(&trace, config(eager())).expect("a good trace");
        replay.warm_up(300).expect("there is room");
        assert_eq!((*replay.report(), replay.requests().len()), (DecodeReport::default(), 20));
        assert!(replay.requests().any(|request| request.generated > 100));
    }

    #[test]
    fn what_cannot_be_is_an_error_with_numbers() {
        let trace = trace();
        let nobody = DecodeReplay::new(&[], config(Policy::Paged)).map(drop).expect_err("nobody");
        assert!(nobody.to_string().starts_with("0 requests in the trace, 20 of them at a time"), "{nobody}");
        let small = DecodeConfig { num_slots: Some(1024), ..config(Policy::Paged) };
        let error = DecodeReplay::new(&trace, small).and_then(|mut replay| replay.warm_up(9)).expect_err("too few slots");
        assert!(error.to_string().contains("1024 slots does not hold 20 requests at step 0"), "{error}");
    }

    #[test]
    fn pools_have_room_by_themselves() {
        let trace = trace();
        for policy in [Policy::Paged, eager(), Policy::Contiguous(Contiguous::default())] {
            let by_itself = DecodeConfig { num_slots: None, ..config(policy) };
            let mut replay = DecodeReplay::new(&trace, by_itself).expect("a good trace");
            replay.warm_up(1000).expect("there is room");
            let pressure = replay.pool().usage().pressure();
            assert!((0.4..0.95).contains(&pressure), "{pressure}");
        }
    }
}
