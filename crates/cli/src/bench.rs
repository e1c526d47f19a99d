//! `packinfer bench`: how close to the floor a batch runs.

use std::io::{Write, stdout};
use std::time::{Duration, SystemTime};

use anyhow::Context;
use packinfer_batch::{Batch, DType, KvDType};
use packinfer_planner::KernelFamily;
use serde::Serialize;

use crate::args::{Baseline, BenchArgs, Placement};
use crate::backend::{Backend, BackendElement, BackendKv, Ceilings, Repeat};
use crate::case::Case;
use crate::json_file::JsonFile;
use crate::planning::{self, Planned};
use crate::progress::Progress;
use crate::table;
use crate::types::with_types;
use crate::units::significant;

/// Measures the batches.
pub fn run(args: &BenchArgs) -> anyhow::Result<()> {
    let placement = args.placement.by_seed(args.seed);
    let cases =
        if args.batch.is_empty() { vec![Case::builtin(placement)?] } else { Case::read_all(&args.batch, placement, false)? };
    let mut out = JsonFile::open(args.json.as_ref())?;
    let mut backend = Backend::open(&args.device)?;
    let progress = Progress::new(cases.len() + 1);
    progress.doing("ceilings of the device");
    let mut report = Report {
        program: concat!("packinfer ", env!("CARGO_PKG_VERSION")),
        device: backend.name().into(),
        date: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        kv: args.placement,
        ceilings: backend.ceilings()?,
        batches: Vec::new(),
    };
    for case in &cases {
        progress.step();
        progress.doing(case.name.clone());
        let measured = with_types!(case.batch.shape(), measure(case, &mut backend, &report.ceilings, args));
        report.batches.push(measured.with_context(|| case.name.clone())?);
        // What was measured so far, lest it be lost if something goes wrong later.
        if let Some(out) = &mut out {
            out.write(&report)?;
        }
    }
    drop(progress);
    report.print(args.baseline)
}

/// Everything that was measured.
#[derive(Debug, Serialize)]
struct Report {
    program: &'static str,
    device: String,
    /// When, in UTC.
    date: String,
    /// Where KV lay.
    kv: Placement,
    ceilings: Ceilings,
    batches: Vec<Measured>,
}

/// One batch.
#[derive(Debug, Serialize)]
struct Measured {
    batch: String,
    dtype: DType,
    kv_dtype: KvDType,
    requests: usize,
    query_tokens: u32,
    /// The kernels that ran, on a GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    kernels: Option<KernelFamily>,
    /// KV slots that are read, shared ones counted once.
    distinct_slots: u64,
    /// Distinct KV, Q and O.
    bytes: u64,
    flops: f64,
    /// What the ceilings allow.
    floor_us: f64,
    #[serde(flatten)]
    timing: Timing,
    /// Launches of a CUDA graph of the same, on a GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    graph: Option<Timing>,
    /// Time over floor.
    ratio: f64,
    gb_per_s: f64,
    tflop_per_s: f64,
    plan_us: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    baseline: Option<MeasuredBaseline>,
}

/// The same batch, scheduled in another way.
#[derive(Debug, Serialize)]
struct MeasuredBaseline {
    #[serde(flatten)]
    timing: Timing,
    /// Its time over that of the plan.
    speed_up: f64,
}

/// Times of several runs.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Timing {
    /// The median.
    pub time_us: f64,
    pub least_us: f64,
    pub most_us: f64,
    pub runs: usize,
}

impl Timing {
    /// Summarises the times of at least one run.
    pub fn new(mut times: Vec<Duration>) -> anyhow::Result<Self> {
        times.sort_unstable();
        let us = |index: usize| times.get(index).map(|time| time.as_secs_f64() * 1e6).context("nothing was measured");
        let (runs, last) = (times.len(), times.len().saturating_sub(1));
        // The mean of the two in the middle where the number is even.
        let time_us = (us(last / 2)? + us(runs / 2)?) / 2.0;
        Ok(Self { time_us, least_us: us(0)?, most_us: us(last)?, runs })
    }
}

fn measure<E: BackendElement, K: BackendKv<E>>(
    case: &Case,
    backend: &mut Backend,
    ceilings: &Ceilings,
    args: &BenchArgs,
) -> anyhow::Result<Measured> {
    let batch = &case.batch;
    backend.check_fits(batch)?;
    let Planned { plan, plan_us } = planning::packed(batch, backend.planner())?;
    let kernels = backend.kernels(&plan);
    let mut plans = vec![plan];
    if let Some(baseline) = args.baseline {
        plans.push(planning::for_comparison(batch, &plans[0], baseline.packing())?);
    }
    let repeat = args.repeat.map_or(Repeat::Default, Repeat::Times);
    let times = backend.time::<E, K>(&plans, case, args.seed, repeat)?;
    let mut timings = times.plans.into_iter().map(Timing::new);
    let timing = timings.next().context("nothing was measured")??;
    let baseline = timings.next().transpose()?;
    let graph = times.replays.map(Timing::new).transpose()?;
    let baseline = baseline.map(|baseline| MeasuredBaseline { timing: baseline, speed_up: baseline.time_us / timing.time_us });
    Ok(Measured::new(case.name.clone(), batch, ceilings, kernels, (timing, graph), plan_us, baseline))
}

impl Measured {
    fn new(
        name: String,
        batch: &Batch,
        ceilings: &Ceilings,
        kernels: Option<KernelFamily>,
        (timing, graph): (Timing, Option<Timing>),
        plan_us: f64,
        baseline: Option<MeasuredBaseline>,
    ) -> Self {
        let (bytes, flops, floor_us) = (batch.least_bytes(), batch.flops(), ceilings.floor_us(batch));
        Self {
            batch: name,
            dtype: batch.shape().dtype(),
            kv_dtype: batch.shape().kv_dtype(),
            requests: batch.requests().len(),
            query_tokens: batch.num_query_tokens(),
            kernels,
            distinct_slots: batch.distinct_slots(),
            bytes,
            flops,
            floor_us,
            timing,
            graph,
            ratio: timing.time_us / floor_us,
            gb_per_s: bytes as f64 / timing.time_us * 1e-3,
            tflop_per_s: flops / timing.time_us * 1e-6,
            plan_us,
            baseline,
        }
    }
}

impl Report {
    fn print(&self, baseline: Option<Baseline>) -> anyhow::Result<()> {
        let mut header =
            vec!["batch", "floor µs", "time µs", "graph µs", "ratio", "GB/s", "TFLOP/s", "plan µs", "runs", "kernels"];
        if let Some(baseline) = baseline {
            header.extend([baseline.heading(), "speed-up"]);
        }
        let mut table = table::new(&header);
        for measured in &self.batches {
            let Measured { floor_us, timing, graph, ratio, gb_per_s, tflop_per_s, plan_us, .. } = measured;
            let mut row = vec![measured.batch.clone(), significant(*floor_us), significant(timing.time_us)];
            row.push(graph.map_or("-".into(), |graph| significant(graph.time_us)));
            row.extend([*ratio, *gb_per_s, *tflop_per_s, *plan_us].map(significant));
            row.push(timing.runs.to_string());
            row.push(measured.kernels.map_or("CPU".into(), |family| family.to_string()));
            if let Some(MeasuredBaseline { timing, speed_up }) = &measured.baseline {
                row.extend([timing.time_us, *speed_up].map(significant));
            }
            table.add_row(row);
        }
        let Ceilings { copy_bytes_per_s, flops_per_s } = self.ceilings;
        let (copy, compute) = (significant(copy_bytes_per_s * 1e-9), significant(flops_per_s * 1e-12));
        writeln!(stdout(), "{}\nfloor: copying at {copy} GB/s, computing at {compute} TFLOP/s\n{table}", self.device)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timing_is_the_median() {
        let timing = |times: &[u64]| Timing::new(times.iter().map(|&us| Duration::from_micros(us)).collect());
        let odd = timing(&[5, 1, 3]).expect("three runs");
        assert_eq!((odd.time_us, odd.least_us, odd.most_us, odd.runs), (3.0, 1.0, 5.0, 3));
        assert_eq!(timing(&[4, 1, 3, 2]).expect("four runs").time_us, 2.5);
        assert!(timing(&[]).is_err());
    }
}
