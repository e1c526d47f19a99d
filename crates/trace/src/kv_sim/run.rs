//! The replay itself.

use std::collections::VecDeque;

use packinfer_kv::{Branch, ExpectedTokens, KvError, PrefixTree, SequenceMove, Situation, SlotPool};

use super::{Sample, SimConfig, SimReport};
use crate::replay::{FIRST_EXPECTATION, REVIEW_STEPS};
use crate::{BLOCK_TOKENS, TraceRequest};

/// A request that is not running: its number, and how many tokens of its answer it had before it was preempted.
#[derive(Clone, Copy)]
struct Waiting {
    request: usize,
    generated: u32,
    admitted_before: bool,
}

struct Running {
    request: usize,
    branch: Branch,
    generated: u32,
    moving: Option<SequenceMove>,
    /// Runs that its own KV lies in.
    runs: u32,
}

pub(super) struct Simulation<'a> {
    config: &'a SimConfig,
    requests: &'a [TraceRequest],
    pool: SlotPool,
    tree: PrefixTree<u64>,
    arrived: usize,
    waiting: VecDeque<Waiting>,
    /// In order of admission.
    running: Vec<Running>,
    expected: ExpectedTokens,
    time_ms: u64,
    report: SimReport,
    /// Sums over requests and steps.
    run_steps: u64,
    request_steps: u64,
}

impl<'a> Simulation<'a> {
    pub fn new(requests: &'a [TraceRequest], config: &'a SimConfig) -> Result<Self, KvError> {
        let num_slots = config.pool_slots(requests);
        Ok(Self {
            config,
            requests,
            pool: SlotPool::new(num_slots, config.page_size)?,
            tree: PrefixTree::new(BLOCK_TOKENS)?,
            arrived: 0,
            waiting: VecDeque::new(),
            running: Vec::new(),
            expected: ExpectedTokens::new(FIRST_EXPECTATION),
            time_ms: requests.first().map_or(0, |request| request.arrival_ms),
            report: SimReport { num_slots, requests: requests.len() as u64, ..SimReport::default() },
            run_steps: 0,
            request_steps: 0,
        })
    }

    pub fn run(mut self, mut progress: impl FnMut(u64)) -> Result<SimReport, KvError> {
        let begin_ms = self.time_ms;
        let last_ms = self.requests.last().map_or(0, |request| request.arrival_ms);
        let sample_ms = (last_ms.saturating_sub(begin_ms) / u64::from(self.config.samples.max(1))).max(1);
        let mut next_sample_ms = begin_ms;
        while self.next_step() {
            self.admit()?;
            self.commit_moves()?;
            self.decode()?;
            self.finish()?;
            self.end_step()?;
            if self.time_ms >= next_sample_ms {
                self.sample(begin_ms);
                next_sample_ms = self.time_ms + sample_ms;
                progress(self.report.finished + self.report.rejected);
            }
        }
        progress(self.report.finished + self.report.rejected);
        self.report.duration_ms = self.time_ms - begin_ms;
        self.report.moved_bytes = self.report.moved_slots * self.config.bytes_per_token;
        self.report.mean_runs = self.run_steps as f64 / self.request_steps.max(1) as f64;
        Ok(self.report)
    }

    /// Goes on to the next step, or over an idle time to the next arrival; `false` when all is done.
    fn next_step(&mut self) -> bool {
        if self.running.is_empty() && self.waiting.is_empty() {
            let Some(next) = self.requests.get(self.arrived) else { return false };
            self.time_ms = self.time_ms.max(next.arrival_ms);
        } else {
            self.time_ms += self.config.step_ms.max(1);
        }
        while self.requests.get(self.arrived).is_some_and(|next| next.arrival_ms <= self.time_ms) {
            self.waiting.push_back(Waiting { request: self.arrived, generated: 0, admitted_before: false });
            self.arrived += 1;
        }
        true
    }

    /// Starts waiting requests in order, as far as they fit.
    fn admit(&mut self) -> Result<(), KvError> {
        while let Some(&next) = self.waiting.front() {
            match self.start(next)? {
                Some(running) => self.running.push(running),
                None if self.running.is_empty() => self.report.rejected += 1,
                None => break,
            }
            self.waiting.pop_front();
        }
        Ok(())
    }

    /// Starts a request: its KV is what the tree has of its prompt, and new slots for the rest. `None` if those are not there.
    fn start(&mut self, waiting: Waiting) -> Result<Option<Running>, KvError> {
        let request = &self.requests[waiting.request];
        let mut branch = self.tree.start(&mut self.pool, &request.blocks)?;
        let prefix = branch.prefix();
        let hit_tokens = prefix.tokens.min(request.prompt_tokens);
        let prompt = request.prompt_tokens - hit_tokens;
        let mut appended = self.append(&mut branch, prompt)?;
        if appended {
            self.tree.insert(&mut self.pool, &mut branch, &request.blocks)?;
            appended = self.append(&mut branch, waiting.generated)?;
        }
        if !appended {
            self.tree.finish(&mut self.pool, branch)?;
            return Ok(None);
        }
        if !waiting.admitted_before {
            self.report.prompt_blocks += request.blocks.len() as u64;
            self.report.hit_blocks += u64::from(prefix.blocks);
            self.report.prompt_tokens += u64::from(request.prompt_tokens);
            self.report.hit_tokens += u64::from(hit_tokens);
        }
        let generated = waiting.generated;
        Ok(Some(Running { request: waiting.request, branch, generated, moving: None, runs: 1 }))
    }

    /// Appends tokens to a request that is not running yet; `false` if they do not fit.
    fn append(&mut self, branch: &mut Branch, tokens: u32) -> Result<bool, KvError> {
        // The headroom comes with the first token of the answer: what is behind a prompt's last block goes to the tree.
        let growth = self.config.policy.growth(&self.tree.usage(&self.pool), 0);
        match self.tree.append(&mut self.pool, branch, tokens, growth) {
            Ok(appended) => {
                self.report.count(&appended);
                Ok(true)
            }
            Err(KvError::OutOfSlots { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Every running request appends a token. The youngest ones are preempted when there is no room for all.
    fn decode(&mut self) -> Result<(), KvError> {
        let mut index = 0;
        while index < self.running.len() {
            match self.decode_one(index) {
                Ok(()) => index += 1,
                Err(KvError::OutOfSlots { .. }) => self.preempt_youngest()?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn decode_one(&mut self, index: usize) -> Result<(), KvError> {
        let usage = self.tree.usage(&self.pool);
        let expected = self.expected.remaining();
        let growth = self.config.policy.growth(&usage, expected);
        let running = &mut self.running[index];
        let outgrown = running.branch.kv.room(&self.pool) == 0;
        if outgrown || running.generated.is_multiple_of(REVIEW_STEPS) {
            let begun = running.branch.kv.reorganize(&mut self.pool, &self.config.policy, &usage, expected)?;
            if let Some((_, begun)) = begun {
                running.moving = Some(begun);
            }
        }
        self.report.count(&self.tree.append(&mut self.pool, &mut running.branch, 1, growth)?);
        running.generated += 1;
        if outgrown {
            running.runs = Situation::of(&running.branch.kv, &self.pool, expected).runs;
        }
        self.run_steps += u64::from(running.runs);
        self.request_steps += 1;
        Ok(())
    }

    fn preempt_youngest(&mut self) -> Result<(), KvError> {
        let Some(youngest) = self.running.pop() else { return Ok(()) };
        if self.running.is_empty() {
            // Alone it has the whole pool, and does not fit.
            self.report.rejected += 1;
        } else {
            self.report.preemptions += 1;
            let Running { request, generated, .. } = youngest;
            self.waiting.push_front(Waiting { request, generated, admitted_before: true });
        }
        self.leave(youngest)
    }

    /// Ends the moves that were begun a step ago: their copies ran beside that step.
    fn commit_moves(&mut self) -> Result<(), KvError> {
        for running in &mut self.running {
            let Some(begun) = running.moving.take() else { continue };
            let moved = u64::from(begun.num_slots());
            match running.branch.kv.commit_move(&mut self.pool, begun) {
                Ok((_, rest)) => {
                    let appended: u32 = rest.iter().map(|copy| copy.num_slots).sum();
                    self.report.moves += 1;
                    self.report.moved_slots += moved + u64::from(appended);
                    running.runs = 1;
                }
                Err(KvError::TargetTooSmall { .. } | KvError::Shared { .. } | KvError::NotMovable) => {
                    self.report.cancelled_moves += 1;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Lets requests go whose answer is complete.
    fn finish(&mut self) -> Result<(), KvError> {
        let requests = self.requests;
        let is_complete = |running: &mut Running| running.generated >= requests[running.request].output_tokens;
        let complete: Vec<Running> = self.running.extract_if(.., is_complete).collect();
        for running in complete {
            self.report.finished += 1;
            self.expected.observe(running.generated);
            self.leave(running)?;
        }
        Ok(())
    }

    fn leave(&mut self, running: Running) -> Result<(), KvError> {
        if let Some(begun) = running.moving {
            self.report.cancelled_moves += 1;
            begun.cancel(&mut self.pool)?;
        }
        self.tree.finish(&mut self.pool, running.branch)
    }

    /// The plans of the step have run: what only they were to read comes free.
    fn end_step(&mut self) -> Result<(), KvError> {
        let ended = self.pool.epoch();
        self.pool.advance_epoch();
        self.pool.retire(ended)?;
        let report = &mut self.report;
        report.peak_used_slots = report.peak_used_slots.max(self.pool.usage().used);
        report.peak_running = report.peak_running.max(self.running.len() as u32);
        report.peak_waiting = report.peak_waiting.max(self.waiting.len() as u32);
        let tokens = self.running.iter().map(|running| u64::from(running.branch.kv.len())).sum();
        report.peak_running_tokens = report.peak_running_tokens.max(tokens);
        Ok(())
    }

    fn sample(&mut self, begin_ms: u64) {
        let usage = self.tree.usage(&self.pool);
        self.report.samples.push(Sample {
            time_ms: self.time_ms - begin_ms,
            usage,
            fragmentation: usage.fragmentation(),
            running: self.running.len() as u32,
            waiting: self.waiting.len() as u32,
        });
    }
}
