//! `packinfer plan`: what plans look like.

use std::fs;
use std::io::{Write, stdout};

use anyhow::{Context, bail};
use packinfer_planner::{Explanation, KernelFamily};
use serde::Serialize;

use crate::args::{DeviceArgs, DeviceChoice, PlanArgs};
use crate::backend::{self, Backend};
use crate::case::Case;
use crate::explain::Call;
use crate::json_file::cannot_write;
use crate::planning::{self, Planned};
use crate::table;
use crate::timeline;
use crate::units::significant;

/// Order of the pages. It has next to no influence on plans.
const SEED: u64 = 0;

/// Plans the batches and prints what came of it.
pub fn run(args: &PlanArgs) -> anyhow::Result<()> {
    if args.timeline.is_some() && args.batch.len() != 1 {
        bail!("--timeline draws the schedule of one batch: {} were given", args.batch.len());
    }
    let backend = if args.explain { Some(Backend::open(&args.device)?) } else { None };
    let (device, planner) = match &backend {
        Some(Backend::Cuda(cuda)) => (cuda.name.clone(), cuda.planner()),
        _ => backend::device_to_plan_for(&DeviceArgs { device: without_gpu(args, &backend), ..args.device.clone() })?,
    };
    let mut explained = Vec::new();
    for case in Case::read_all(&args.batch, args.placement.by_seed(SEED), false)? {
        let Planned { plan, plan_us } = planning::packed(&case.batch, planner.clone())?;
        let call = backend.as_ref().map(|backend| Call::of(&case, &plan, backend)).transpose()?;
        if let (Some(path), Some(call)) = (&args.timeline, &call) {
            let svg = timeline::svg(&case.name, &plan, &call.schedules())?;
            fs::write(path, svg).with_context(|| cannot_write(path))?;
        }
        explained.push(Explained {
            batch: case.name,
            requests: case.batch.requests().len(),
            kernels: plan.model().kernel_family,
            plan_us,
            plan: plan.explain(plan.model()),
            call,
        });
    }
    let mut stdout = stdout().lock();
    if args.json {
        writeln!(stdout, "{}", serde_json::to_string_pretty(&explained)?)?;
        return Ok(());
    }
    writeln!(stdout, "planned for {device}\n{}", table_of(&explained))?;
    for Explained { batch, call, .. } in &explained {
        if let Some(call) = call {
            call.print(batch, &mut stdout)?;
        }
    }
    Ok(())
}

/// The device to plan for where nothing runs: where a GPU was tried and does not work, it is not to be planned for either.
fn without_gpu(args: &PlanArgs, tried: &Option<Backend>) -> DeviceChoice {
    if tried.is_some() { DeviceChoice::Cpu } else { args.device.device }
}

/// A batch and its plan.
#[derive(Debug, Serialize)]
struct Explained {
    batch: String,
    requests: usize,
    /// The kernels that it is for.
    kernels: KernelFamily,
    /// Time of a warm second plan.
    plan_us: f64,
    #[serde(flatten)]
    plan: Explanation,
    /// What was predicted and achieved, where that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    call: Option<Call>,
}

/// One column for each plan, because there is more to say of a plan than fits a line.
fn table_of(explained: &[Explained]) -> comfy_table::Table {
    let names = explained.iter().map(|explained| explained.batch.as_str());
    let mut table = table::new(&std::iter::once("").chain(names).collect::<Vec<_>>());
    let mut row = |name: &str, value: &dyn Fn(&Explained) -> String| {
        table.add_row(std::iter::once(name.to_owned()).chain(explained.iter().map(value)).collect::<Vec<_>>());
    };
    let megabytes = |bytes: u64| significant(bytes as f64 / 1e6);
    let gigaflops = |flops: f64| significant(flops / 1e9);
    row("requests", &|e| e.requests.to_string());
    row("kernels", &|e| e.kernels.to_string());
    row("query tokens", &|e| e.plan.query_tokens.to_string());
    row("head groups", &|e| format!("{} of {}", e.plan.head_groups, e.plan.heads_per_group));
    row("rows of a wide tile", &|e| e.plan.wide_tile_rows.to_string());
    row("tiles: wide", &|e| e.plan.wide_tiles.to_string());
    row("tiles: narrow", &|e| e.plan.narrow_tiles.to_string());
    row("tiles: of several requests", &|e| e.plan.packed_tiles.to_string());
    row("tiles: of shared KV", &|e| e.plan.shared_tiles.to_string());
    row("tiles: split", &|e| e.plan.split_tiles.to_string());
    row("work items: wide", &|e| e.plan.wide_items.to_string());
    row("work items: narrow", &|e| e.plan.narrow_items.to_string());
    row("narrow ones beside wide ones", &|e| if e.plan.narrow_beside_wide { "yes" } else { "no" }.to_owned());
    row("merged tokens", &|e| e.plan.merge_tokens.to_string());
    row("predicted µs", &|e| significant(e.plan.predicted_us));
    row("balance", &|e| significant(e.plan.balance));
    row("KV read, MB", &|e| megabytes(e.plan.kv_bytes));
    row("KV read from memory, MB", &|e| megabytes(e.plan.kv_memory_bytes));
    row("KV made of FP8 before, MB", &|e| megabytes(e.plan.widening_bytes));
    row("KV distinct, MB", &|e| megabytes(e.plan.distinct_kv_bytes));
    row("Q and O, MB", &|e| megabytes(e.plan.qo_bytes));
    row("partials, MB", &|e| megabytes(e.plan.partial_bytes));
    row("GFLOP needed", &|e| gigaflops(e.plan.flops_needed));
    row("GFLOP issued", &|e| gigaflops(e.plan.flops_issued));
    row("wasted area, %", &|e| significant(100.0 * e.plan.wasted_area));
    row("plan, kB", &|e| significant(e.plan.upload_bytes as f64 / 1e3));
    row("plan µs", &|e| significant(e.plan_us));
    table
}
