//! What a trace consists of.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use crate::TraceRequest;

/// Totals of a trace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceSummary {
    /// Requests.
    pub requests: u64,
    /// Tokens of all prompts.
    pub prompt_tokens: u64,
    /// Tokens of all answers.
    pub output_tokens: u64,
    /// From the first arrival to the last, in milliseconds.
    pub duration_ms: u64,
    /// Blocks named by all prompts; 0 if the trace names none.
    pub blocks: u64,
    /// Different ones among them.
    pub distinct_blocks: u64,
    /// Blocks that a prompt has in common with the beginning of an earlier one: what a cache without limit would hit.
    pub reused_blocks: u64,
}

impl TraceSummary {
    /// Adds up a trace.
    pub fn of(requests: &[TraceRequest]) -> Self {
        let mut summary = Self { requests: requests.len() as u64, ..Self::default() };
        // A block is what it holds after what came before it.
        let mut known: HashSet<(Option<u64>, u64)> = HashSet::new();
        let mut distinct: HashSet<u64> = HashSet::new();
        for request in requests {
            summary.prompt_tokens += u64::from(request.prompt_tokens);
            summary.output_tokens += u64::from(request.output_tokens);
            summary.blocks += request.blocks.len() as u64;
            distinct.extend(&request.blocks);
            let parents = std::iter::once(None).chain(request.blocks.iter().copied().map(Some));
            let edges: Vec<_> = parents.zip(request.blocks.iter().copied()).collect();
            summary.reused_blocks += edges.iter().take_while(|edge| known.contains(*edge)).count() as u64;
            known.extend(edges);
        }
        summary.distinct_blocks = distinct.len() as u64;
        let times = || requests.iter().map(|request| request.arrival_ms);
        summary.duration_ms = times().max().unwrap_or(0) - times().min().unwrap_or(0);
        summary
    }

    /// Share of the blocks that are reused, from 0 to 1.
    pub fn reuse(&self) -> f64 {
        if self.blocks == 0 { 0.0 } else { self.reused_blocks as f64 / self.blocks as f64 }
    }
}
