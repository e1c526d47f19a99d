//! `packinfer decode-run`: decode steps of a server, with KV in pages, in contiguous extents, and in pages that are moved to
//! extents, one request or one group at a time.

mod device;

use std::fs;
use std::io::{Write, stdout};
use std::num::NonZeroU32;
use std::time::SystemTime;

use anyhow::Context;
use half::bf16;
use packinfer_batch::{AttentionShape, Batch, DType};
use packinfer_kv::{Contiguous, Policy};
use packinfer_trace::decode_replay::{DecodeConfig, DecodeReplay, DecodeReport, PoolMap, TriggerCounts, pools_svg};
use packinfer_trace::{TraceReader, TraceRequest};
use serde::Serialize;

use crate::args::{DecodeLayout, DecodeRunArgs};
use crate::backend::Backend;
use crate::json_file::{JsonFile, cannot_write};
use crate::progress::Progress;
use crate::table;
use crate::units::significant;
use device::{Measured, Outputs};

/// Everything that is written as JSON.
#[derive(Debug, Serialize)]
struct Report {
    program: &'static str,
    device: String,
    /// When, in UTC.
    date: String,
    requests: u32,
    steps: u32,
    layers: u32,
    num_qo_heads: u32,
    num_kv_heads: u32,
    head_dim: u32,
    page_size: u32,
    /// Slots of the pool.
    num_slots: u32,
    layouts: Vec<Run>,
    /// The largest relative error, in norm, of O with one layout against O with the other, over the steps that were compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    difference: Option<f64>,
}

/// One layout.
#[derive(Debug, Serialize)]
struct Run {
    layout: DecodeLayout,
    policy: Policy,
    /// Requests of a group, where groups are moved.
    #[serde(skip_serializing_if = "Option::is_none")]
    group_size: Option<NonZeroU32>,
    pool: DecodeReport,
    /// Bytes that were read for moves, and as many written, in all layers.
    moved_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    measured: Option<Measured>,
}

/// Replays the trace with all layouts and prints what came of it.
pub fn run(args: &DecodeRunArgs) -> anyhow::Result<()> {
    let trace: Vec<TraceRequest> = TraceReader::open(&args.trace)?.collect::<Result<_, _>>()?;
    let shape = AttentionShape::new(args.num_qo_heads, args.num_kv_heads, args.head_dim, DType::Bf16)?;
    let mut out = JsonFile::open(args.json.as_ref())?;
    let backend = Backend::open(&args.device)?;
    let progress = Progress::new(args.layouts.len() * args.rounds as usize);
    let mut runs = Vec::new();
    let (mut outputs, mut maps) = (Vec::new(), Vec::new());
    let rounds = if matches!(backend, Backend::Cuda(_)) { args.rounds } else { 1 };
    for _ in 0..rounds {
        for &layout in &args.layouts {
            progress.doing(format!("{} steps, {}", args.steps, layout.name()));
            let config = config(args, layout);
            let mut replay = DecodeReplay::new(&trace, config)?;
            replay.warm_up(args.warm_up)?;
            let measured = match &backend {
                Backend::Cuda(cuda) => {
                    let (measured, round_outputs) = device::measure::<bf16>(cuda, &mut replay, shape, args)?;
                    outputs.push(round_outputs);
                    Some(measured)
                }
                Backend::Cpu(_) => {
                    replay.advance_alone(args.steps)?;
                    None
                }
            };
            if args.svg.is_some() && maps.len() < args.layouts.len() {
                maps.push(PoolMap::of(layout.name(), &replay)?);
            }
            let pool = *replay.report();
            let moved_bytes = pool.moved_slots * shape.kv_bytes_per_slot() * u64::from(args.layers);
            let DecodeConfig { policy, group_size, .. } = config;
            runs.push((replay.pool().num_slots(), Run { layout, policy, group_size, pool, moved_bytes, measured }));
            progress.step();
        }
    }
    drop(progress);
    if let Some(path) = &args.svg {
        fs::write(path, pools_svg(&maps)?).with_context(|| cannot_write(path))?;
    }
    let report = Report {
        program: concat!("packinfer ", env!("CARGO_PKG_VERSION")),
        device: backend.name().into(),
        date: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        requests: args.requests,
        steps: args.steps,
        layers: args.layers,
        num_qo_heads: args.num_qo_heads,
        num_kv_heads: args.num_kv_heads,
        head_dim: args.head_dim,
        page_size: args.page_size,
        num_slots: runs.first().map_or(0, |(num_slots, _)| *num_slots),
        layouts: args.layouts.iter().filter_map(|&layout| median(&mut runs, layout)).collect(),
        difference: difference(&outputs),
    };
    if let Some(out) = &mut out {
        out.write(&report)?;
    }
    report.print()
}

/// What is replayed for a layout.
fn config(args: &DecodeRunArgs, layout: DecodeLayout) -> DecodeConfig {
    let policy = if layout == DecodeLayout::Paged { Policy::Paged } else { Policy::Contiguous(contiguous(args)) };
    DecodeConfig {
        concurrent: args.requests,
        num_slots: args.slots,
        page_size: args.page_size,
        policy,
        prompts_in_pages: matches!(layout, DecodeLayout::Moved | DecodeLayout::Groups),
        group_size: (layout == DecodeLayout::Groups).then_some(args.group_size),
        ..DecodeConfig::default()
    }
}

/// The layouts in extents.
fn contiguous(args: &DecodeRunArgs) -> Contiguous {
    let layout = Contiguous::default();
    Contiguous {
        run_cost: args.run_cost.unwrap_or(layout.run_cost),
        max_group_fragmentation: args.group_fragmentation.unwrap_or(layout.max_group_fragmentation),
        max_imbalance: args.imbalance.unwrap_or(layout.max_imbalance),
        ..layout
    }
}

/// The requests of a step as a batch.
fn fill(batch: &mut Batch, replay: &DecodeReplay<'_>) -> anyhow::Result<()> {
    batch.clear();
    for request in replay.requests() {
        batch.push_runs(1, request.kv.len(), request.kv.runs(replay.pool())?)?;
    }
    Ok(())
}

/// Of the rounds of a layout, that with the median time; of an even number, the faster of the two in the middle.
fn median(runs: &mut Vec<(u32, Run)>, layout: DecodeLayout) -> Option<Run> {
    let mut rounds: Vec<Run> = runs.extract_if(.., |(_, run)| run.layout == layout).map(|(_, run)| run).collect();
    let total = |run: &Run| run.measured.as_ref().map_or(0.0, |measured| measured.step_us);
    rounds.sort_by(|a, b| total(a).total_cmp(&total(b)));
    let middle = rounds.len().checked_sub(1)? / 2;
    Some(rounds.swap_remove(middle))
}

/// The largest relative error of outputs of any round against those of the first.
fn difference(rounds: &[Outputs<bf16>]) -> Option<f64> {
    let (first, others) = rounds.split_first()?;
    others.iter().flat_map(|other| first.differences(other)).reduce(f64::max)
}

fn by_trigger(counts: TriggerCounts) -> String {
    let TriggerCounts { headroom_exhausted, fragmentation, imbalance } = counts;
    format!("{headroom_exhausted}, {fragmentation}, {imbalance}")
}

impl Report {
    fn print(&self) -> anyhow::Result<()> {
        let names: Vec<&str> = self.layouts.iter().map(|run| run.layout.name()).collect();
        let mut header = vec!["a step"];
        header.extend(&names);
        let mut table = table::new(&header);
        let mut row = |name: &str, value: &dyn Fn(&Run) -> Option<String>| {
            let values: Option<Vec<String>> = self.layouts.iter().map(value).collect();
            if let Some(values) = values {
                table.add_row(std::iter::once(name.to_owned()).chain(values));
            }
        };
        let measured =
            |value: fn(&Measured) -> f64| move |run: &Run| run.measured.as_ref().map(|measured| significant(value(measured)));
        row("whole step, µs", &measured(|measured| measured.step_us));
        row("attention of all layers, µs", &measured(|measured| measured.attention_us));
        row("appending to all layers, µs", &measured(|measured| measured.append_us));
        row("upload of the plan, copies between steps, µs", &measured(|measured| measured.between_us));
        row("copies beside the steps, µs", &measured(|measured| measured.copy_us));
        row("planning on the host, µs", &measured(|measured| measured.plan_us));
        let steps = f64::from(self.steps.max(1));
        row("KV runs of a request", &|run| {
            Some(significant(run.pool.read_runs as f64 / (steps * f64::from(self.requests.max(1)))))
        });
        row("slots moved", &|run| Some(significant(run.pool.moved_slots as f64 / steps)));
        row("moved, % of the slots read", &|run| {
            Some(significant(100.0 * run.pool.moved_slots as f64 / run.pool.read_slots.max(1) as f64))
        });
        row("bytes moved, MB", &|run| Some(significant(run.moved_bytes as f64 * 1e-6 / steps)));
        row("moves in all (given up)", &|run| Some(format!("{} ({})", run.pool.moves, run.pool.cancelled_moves)));
        row("requests moved in all: scattered, no headroom, fragmented pool", &|run| {
            let DecodeReport { scattered, no_headroom, fragmented, .. } = run.pool;
            Some(format!("{scattered}, {no_headroom}, {fragmented}"))
        });
        row("groups moved in all: no headroom, fragmented group, imbalance", &|run| Some(by_trigger(run.pool.groups_moved)));
        row("groups looked at in all: likewise", &|run| Some(by_trigger(run.pool.groups_looked_at)));
        row("most slots used, % of the pool", &|run| {
            Some(significant(100.0 * f64::from(run.pool.peak_used_slots) / f64::from(self.num_slots.max(1))))
        });
        writeln!(
            stdout(),
            "{}\n{} requests, {} steps, {} layers; pages of {} slots, a pool of {}\n{table}",
            self.device,
            self.requests,
            self.steps,
            self.layers,
            self.page_size,
            self.num_slots
        )?;
        if let Some(difference) = self.difference {
            writeln!(stdout(), "O with one layout against O with the other: relative error at most {difference:.1e}")?;
        }
        if self.layouts.iter().all(|run| run.measured.is_none()) {
            writeln!(stdout(), "no GPU: nothing was measured")?;
        }
        Ok(())
    }
}
