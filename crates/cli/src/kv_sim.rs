//! `packinfer kv-sim`: replays a trace against a KV pool, without a GPU.

use std::fs;
use std::io::{Write, stdout};

use anyhow::Context;
use packinfer_kv::{Contiguous, Policy};
use packinfer_trace::kv_sim::{SimConfig, SimReport, plot_svg, simulate};
use packinfer_trace::{TraceReader, TraceRequest, TraceSummary};
use serde::Serialize;

use crate::args::{KvSimArgs, Layout};
use crate::json_file::cannot_write;
use crate::progress::Progress;
use crate::table;

/// Everything that `--json` writes.
#[derive(Serialize)]
struct Output<'a> {
    trace: TraceSummary,
    /// Share of the trace's blocks that a pool without limit hits.
    reuse: f64,
    config: &'a SimConfig,
    hit_rate: f64,
    report: &'a SimReport,
}

/// Replays the trace and prints what came of it.
pub fn run(args: &KvSimArgs) -> anyhow::Result<()> {
    let requests: Vec<TraceRequest> = TraceReader::open(&args.trace)?.collect::<Result<_, _>>()?;
    let trace = TraceSummary::of(&requests);
    let policy = match args.layout {
        Layout::Paged => Policy::Paged,
        Layout::Contiguous => Policy::Contiguous(Contiguous::default()),
    };
    let config = SimConfig { num_slots: args.slots, page_size: args.page_size, policy, ..SimConfig::default() };
    let progress = Progress::new(requests.len());
    progress.doing("requests replayed");
    let report = simulate(&requests, &config, |done| progress.reach(done))?;
    drop(progress);
    if let Some(path) = &args.json {
        let output = Output { trace, reuse: trace.reuse(), config: &config, hit_rate: report.hit_rate(), report: &report };
        fs::write(path, serde_json::to_string_pretty(&output)?).with_context(|| cannot_write(path))?;
    }
    if let Some(path) = &args.svg {
        fs::write(path, plot_svg(&report)?).with_context(|| cannot_write(path))?;
    }
    let mut table = table::new(&["", "kv-sim"]);
    table.add_row(["reuse in the trace", &format!("{:.1} % of {} blocks", 100.0 * trace.reuse(), trace.blocks)]);
    table.add_row(["distinct blocks", &trace.distinct_blocks.to_string()]);
    for (name, value) in report.rows() {
        table.add_row([name, &value]);
    }
    writeln!(stdout().lock(), "{table}")?;
    Ok(())
}
