//! What a replay found.

use std::fmt;

use packinfer_kv::{Appended, Usage};
use serde::{Deserialize, Serialize};

/// The pool at one time of the replay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Milliseconds since the trace began.
    pub time_ms: u64,
    /// How the slots are used.
    pub usage: Usage,
    /// [`Usage::fragmentation`].
    pub fragmentation: f64,
    /// Requests that are running.
    pub running: u32,
    /// Requests that wait for slots.
    pub waiting: u32,
}

/// What a replay found; counts are over all requests.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SimReport {
    /// Slots of the pool.
    pub num_slots: u32,
    /// Requests of the trace.
    pub requests: u64,
    /// Requests that finished.
    pub finished: u64,
    /// Requests that do not fit the pool even alone.
    pub rejected: u64,
    /// Times a running request gave way and was computed again.
    pub preemptions: u64,
    /// Blocks of the prompts, counted when a request is first admitted.
    pub prompt_blocks: u64,
    /// Blocks among them that were in the pool.
    pub hit_blocks: u64,
    /// Tokens of the prompts, counted likewise.
    pub prompt_tokens: u64,
    /// Tokens among them whose KV was in the pool.
    pub hit_tokens: u64,
    /// Blocks that were evicted.
    pub evicted_blocks: u64,
    /// The most slots used at a time.
    pub peak_used_slots: u32,
    /// The most slots that running requests saw at a time, shared ones counted for each.
    pub peak_running_tokens: u64,
    /// The most requests that ran at a time.
    pub peak_running: u32,
    /// The most requests that waited at a time.
    pub peak_waiting: u32,
    /// Pages copied on write.
    pub copied_on_write: u64,
    /// Moves of a request's KV that were committed.
    pub moves: u64,
    /// Moves that were cancelled, because the request finished or outgrew them.
    pub cancelled_moves: u64,
    /// Slots moved.
    pub moved_slots: u64,
    /// Bytes moved, read once and written once.
    pub moved_bytes: u64,
    /// Mean number of runs that the own KV of a request lay in, over all requests and steps.
    pub mean_runs: f64,
    /// Milliseconds from the first arrival to the last token.
    pub duration_ms: u64,
    /// The pool over time.
    pub samples: Vec<Sample>,
}

impl SimReport {
    /// Share of the prompts' blocks that were in the pool, from 0 to 1.
    pub fn hit_rate(&self) -> f64 {
        ratio(self.hit_blocks, self.prompt_blocks)
    }

    /// Mean fragmentation over time.
    pub fn mean_fragmentation(&self) -> f64 {
        let sum: f64 = self.samples.iter().map(|sample| sample.fragmentation).sum();
        if self.samples.is_empty() { 0.0 } else { sum / self.samples.len() as f64 }
    }

    pub(super) fn count(&mut self, appended: &Appended) {
        self.evicted_blocks += u64::from(appended.evicted.blocks);
        self.copied_on_write += u64::from(appended.copy.is_some());
    }

    /// The figures of the report as rows of a table: name, value.
    pub fn rows(&self) -> Vec<(&'static str, String)> {
        let percent = |share: f64| format!("{:.1} %", 100.0 * share);
        let peak_share = f64::from(self.peak_used_slots) / f64::from(self.num_slots.max(1));
        vec![
            ("pool", format!("{} slots", self.num_slots)),
            ("requests", format!("{} of {} finished, {} rejected", self.finished, self.requests, self.rejected)),
            ("block hit rate", format!("{} of {} blocks", percent(self.hit_rate()), self.prompt_blocks)),
            (
                "token hit rate",
                format!("{} of {} tokens", percent(ratio(self.hit_tokens, self.prompt_tokens)), self.prompt_tokens),
            ),
            ("peak use", format!("{} slots, {}", self.peak_used_slots, percent(peak_share))),
            ("peak running", format!("{} requests, {} tokens", self.peak_running, self.peak_running_tokens)),
            ("peak waiting", format!("{} requests", self.peak_waiting)),
            ("evicted", format!("{} blocks", self.evicted_blocks)),
            ("preemptions", self.preemptions.to_string()),
            ("copied on write", format!("{} pages", self.copied_on_write)),
            ("moves", format!("{}, {} cancelled", self.moves, self.cancelled_moves)),
            ("moved", format!("{} slots, {:.2} GB", self.moved_slots, self.moved_bytes as f64 / 1e9)),
            ("runs a request", format!("{:.2}", self.mean_runs)),
            ("fragmentation", format!("{} on average", percent(self.mean_fragmentation()))),
            ("duration", format!("{:.0} s", self.duration_ms as f64 / 1e3)),
        ]
    }
}

impl fmt::Display for SimReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.rows().iter().try_for_each(|(name, value)| writeln!(f, "{name:<16}{value}"))
    }
}

fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}
