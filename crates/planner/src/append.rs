//! From one decode step to the next: a plan gets a token more for each request, instead of being made anew.

use packinfer_abi::{KvRun, WorkItem};
use packinfer_batch::{Batch, Mask, Request};

use crate::Plan;
use crate::plan::KvTensors;

/// Room in a plan for the decode steps that follow the one that it is made for: see [`Plan::append`].
///
/// It costs each request a tile of its own, which short ones share otherwise, and `runs` entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Headroom {
    /// Steps. Requests grow alike, so the plan stays balanced as long as they are few beside the tokens that a multiprocessor
    /// reads.
    pub steps: u32,
    /// KV runs that each request may begin in these steps: with pages of `n` slots, one every `n` steps; none in a contiguous
    /// extent that has room, unless it is one of pages that lie [apart](packinfer_batch::KvLayout).
    pub runs: u32,
}

/// Why tokens were not appended to a plan. The plan is as it was; plan the next step's batch anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    /// The plan has no room for steps.
    #[error(
        "the plan has no room for further steps: it had none (Planner::with_headroom), they are used up, or not all of its requests \
         decode one token under a causal mask"
    )]
    NoSteps,
    /// Slots of another number of requests.
    #[error("{found} slots were given for a plan of {requests} requests: each gets one token")]
    Requests {
        /// Slots given.
        found: usize,
        /// Requests of the plan.
        requests: usize,
    },
    /// A slot that cannot be numbered.
    #[error("request {request} is to go on in slot {slot}: slots are numbered up to {most}")]
    BadSlot {
        /// Index of the request.
        request: usize,
        /// The slot.
        slot: u32,
        /// One past the last slot number.
        most: u32,
    },
    /// A request that would need one KV run more than there is room for.
    #[error(
        "slot {slot} does not follow the KV of request {request}, which has no room for another run: plan with more runs of headroom"
    )]
    NoRuns {
        /// Index of the request.
        request: usize,
        /// The slot.
        slot: u32,
    },
}

/// What grows in a plan.
#[derive(Clone, Debug, Default)]
pub(crate) struct Growth {
    steps: u32,
    /// KV runs that each tail has room for.
    runs: u32,
    /// Of each request, by query token; none if the plan cannot grow.
    tails: Vec<Tail>,
}

/// Where the KV of a request ends.
#[derive(Clone, Copy, Debug, Default)]
struct Tail {
    segment: u32,
    item: u32,
    /// The last KV run; those behind it up to the limit are empty.
    run: u32,
    run_limit: u32,
}

impl Growth {
    /// Prepares for a plan of a batch.
    pub fn reset(&mut self, batch: &Batch, headroom: Headroom) {
        let decodes = |request: &Request| request.query_len == 1;
        let can_grow = headroom.steps > 0 && batch.mask() == Mask::Causal && batch.requests().iter().all(decodes);
        (self.steps, self.runs) = if can_grow { (headroom.steps, headroom.runs) } else { (0, 0) };
        self.tails.clear();
        self.tails.resize(if can_grow { batch.requests().len() } else { 0 }, Tail::default());
    }

    /// Whether the plan is to grow: each request then has a tile of its own.
    pub fn is_planned(&self) -> bool {
        self.steps > 0
    }

    /// Leaves room behind the runs of a request, which are the last of all.
    pub fn leave_room(&mut self, request: &Request, runs: &mut Vec<KvRun>) {
        if self.is_planned() {
            let run = runs.len() as u32 - 1;
            runs.resize(runs.len() + self.runs as usize, KvRun::default());
            self.tails[request.first_token as usize] = Tail { run, run_limit: runs.len() as u32, ..Tail::default() };
        }
    }
}

impl Plan {
    /// Notes the items that the last KV tokens of the requests are in. No other request reads them: they are
    /// the query tokens' own.
    pub(crate) fn find_tails(&mut self) {
        let Self { growth, items, segments, shared, .. } = self;
        if !growth.is_planned() {
            return;
        }
        for (index, (item, _)) in items.iter().zip(shared).enumerate().filter(|(_, (_, shared))| !**shared) {
            let segment = segments[item.segment_begin as usize];
            if item.column_end == segment.column_end {
                let tail = &mut growth.tails[segment.first_token as usize];
                (tail.segment, tail.item) = (item.segment_begin, index as u32);
            }
        }
    }

    /// Makes the plan of a decode step that of the next: the KV of each request has got a token more, in slot `slots[request]`,
    /// and its query token is that one. Whatever the plan does not say stays as it was; in particular all other KV lies where it
    /// lay.
    ///
    /// The plan has as many items and merges as before. Nothing is allocated.
    ///
    /// ```
    /// use packinfer_batch::{AttentionShape, Batch, DType, Mask};
    /// use packinfer_planner::{DeviceModel, Headroom, Planner};
    ///
    /// let mut batch = Batch::new(AttentionShape::new(32, 8, 128, DType::Bf16)?, Mask::Causal);
    /// batch.push_contiguous(1, 1000, 0)?; // in slots 0 to 999
    /// batch.push_contiguous(1, 500, 4096)?;
    ///
    /// let mut planner = Planner::new(DeviceModel::H100).with_headroom(Headroom { steps: 16, runs: 0 });
    /// let mut plan = planner.plan(&batch)?;
    /// plan.append(&[1000, 4596])?;
    /// assert_eq!(plan.num_slots(), 4597);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// No room for a step or for a KV run, slots of another number of requests, or one past the last that can be numbered. The
    /// plan is as it was.
    pub fn append(&mut self, slots: &[u32]) -> Result<(), AppendError> {
        let KvTensors { shape, layout: kv_layout, .. } = self.attended;
        let most = kv_layout.most_slots(shape);
        let number = |slot: u32| kv_layout.number(shape, slot, slot + 1);
        let Growth { steps, tails, .. } = &mut self.growth;
        if *steps == 0 {
            return Err(AppendError::NoSteps);
        }
        if slots.len() != tails.len() {
            return Err(AppendError::Requests { found: slots.len(), requests: tails.len() });
        }
        let follows = |run: KvRun, next: KvRun| run.first_slot + run.num_slots == next.first_slot;
        for (request, (tail, &slot)) in tails.iter().zip(slots).enumerate() {
            if slot >= most {
                return Err(AppendError::BadSlot { request, slot, most });
            }
            if !follows(self.runs[tail.run as usize], number(slot)) && tail.run + 1 == tail.run_limit {
                return Err(AppendError::NoRuns { request, slot });
            }
        }
        for (tail, &slot) in tails.iter_mut().zip(slots) {
            let next = number(slot);
            if follows(self.runs[tail.run as usize], next) {
                self.runs[tail.run as usize].num_slots += 1;
            } else {
                tail.run += 1;
                self.runs[tail.run as usize] = next;
            }
            self.segments[tail.segment as usize].column_end += 1;
            let WorkItem { column_end, .. } = &mut self.items[tail.item as usize];
            *column_end += 1;
            self.attended.num_slots = self.attended.num_slots.max(kv_layout.pool_slots(slot + 1));
        }
        *steps -= 1;
        Ok(())
    }
}
