//! What the planner predicted of a call against what the device did.

use std::io::Write;
use std::time::Duration;

use packinfer_planner::{Comparison, ItemError, KindError, Plan, Schedule, ScheduleSummary, SmLoad};
use serde::Serialize;

use crate::backend::{Backend, BackendElement, BackendKv, Cuda, DeviceTensors, StampedCall};
use crate::case::Case;
use crate::table;
use crate::types::with_types;
use crate::units::significant;

/// Runs of which the one with the median time is shown.
const RUNS: usize = 15;
/// Seed of Q, K and V, whose values have no influence but on the power that the device takes.
const SEED: u64 = 0;

/// One call of a plan, as predicted and, on a GPU, as achieved.
#[derive(Debug, Serialize)]
pub struct Call {
    predicted: Times,
    #[serde(skip_serializing_if = "Option::is_none")]
    achieved: Option<Times>,
    #[serde(flatten)]
    comparison: Option<Comparison>,
}

/// Times of a call, in µs.
#[derive(Debug, Serialize)]
struct Times {
    /// The whole call.
    call_us: f64,
    /// Launches and merging: what it takes besides work items.
    besides_us: f64,
    /// What merging takes after the last work item, if rows are merged in the same launch: that is known of runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    merging_us: Option<f64>,
    #[serde(flatten)]
    summary: ScheduleSummary,
    multiprocessors: Vec<SmLoad>,
    #[serde(skip)]
    schedule: Schedule,
}

impl Times {
    fn new(call_us: f64, schedule: Schedule, merging_us: Option<f64>) -> Self {
        let summary = schedule.summary();
        let besides_us = call_us - summary.span_us;
        Self { call_us, besides_us, merging_us, summary, multiprocessors: schedule.loads(), schedule }
    }
}

impl Call {
    /// Predicts a call, and runs it if the backend is a GPU.
    pub fn of(case: &Case, plan: &Plan, backend: &Backend) -> anyhow::Result<Self> {
        let model = plan.model();
        let predicted = Times::new(plan.explain(model).predicted_us, Schedule::predicted(plan, model), None);
        let Backend::Cuda(cuda) = backend else { return Ok(Self { predicted, achieved: None, comparison: None }) };
        backend.check_fits(&case.batch)?;
        let StampedCall { call, schedule, merging } = with_types!(plan.shape(), stamp(case, plan, cuda))?;
        let comparison = Some(Comparison::new(plan, model, &schedule));
        let us = |time: Duration| time.as_secs_f64() * 1e6;
        Ok(Self { predicted, achieved: Some(Times::new(us(call), schedule, merging.map(us))), comparison })
    }

    /// The schedules that there are, with what to call them.
    pub fn schedules(&self) -> Vec<(&'static str, &Schedule)> {
        let achieved = self.achieved.iter().map(|times| ("achieved", &times.schedule));
        std::iter::once(("predicted", &self.predicted.schedule)).chain(achieved).collect()
    }

    /// Prints the tables of a batch.
    pub fn print(&self, batch: &str, out: &mut impl Write) -> anyhow::Result<()> {
        writeln!(out, "\n{batch}\n{}", self.times())?;
        match &self.comparison {
            None => writeln!(out, "nothing was run, as there is no GPU: this is what the planner predicts")?,
            Some(Comparison { kinds, worst }) => {
                writeln!(out, "\nwork items of {batch}, by tile and steps of columns\n{}", table_of_kinds(kinds))?;
                writeln!(out, "\nthe work items of {batch} that are furthest off\n{}", table_of_items(worst))?;
            }
        }
        Ok(())
    }

    fn times(&self) -> comfy_table::Table {
        let mut table = table::new(&["µs", "predicted", "achieved", "error, %"]);
        let add_row = |table: &mut comfy_table::Table, name: &str, value: &dyn Fn(&Times) -> f64| {
            let predicted = value(&self.predicted);
            let mut row = vec![name.to_owned(), significant(predicted)];
            if let Some(achieved) = self.achieved.as_ref().map(value) {
                row.extend([significant(achieved), percent(predicted / achieved - 1.0)]);
            }
            table.add_row(row);
        };
        add_row(&mut table, "the call", &|times| times.call_us);
        add_row(&mut table, "launches and merging", &|times| times.besides_us);
        if let Some(merging_us) = self.achieved.as_ref().and_then(|times| times.merging_us) {
            table.add_row(vec![
                "of that, merging after the last work item".into(),
                "".into(),
                significant(merging_us),
                "".into(),
            ]);
        }
        let mut row = |name: &str, value: &dyn Fn(&Times) -> f64| add_row(&mut table, name, value);
        row("work items, first begin to last end", &|times| times.summary.span_us);
        row("busy: the least of all SMs", &|times| times.summary.least_busy_us);
        row("busy: median", &|times| times.summary.median_busy_us);
        row("busy: the most", &|times| times.summary.most_busy_us);
        row("idle at the end, mean of all lanes", &|times| times.summary.idle_at_end_us);
        row("busy, % of the whole", &|times| 100.0 * times.summary.utilization);
        table
    }
}

fn stamp<E: BackendElement, K: BackendKv<E>>(case: &Case, plan: &Plan, cuda: &Cuda) -> anyhow::Result<StampedCall> {
    let mut tensors = DeviceTensors::<E, K>::random(cuda.engine(), case, SEED)?;
    cuda.stamp(plan, &mut tensors, RUNS)
}

fn table_of_kinds(kinds: &[KindError]) -> comfy_table::Table {
    let header = ["tile", "steps", "items", "predicted µs", "achieved µs", "mean error, %", "without sign, %", "worst, %"];
    let mut table = table::new(&header);
    for kind in kinds {
        let steps = if kind.steps == 1 { "1".into() } else { format!("{} to {}", kind.steps, 2 * kind.steps - 1) };
        let errors = [kind.mean_error, kind.mean_absolute_error, kind.worst_error].map(percent);
        let mut row = vec![kind.tile.into(), steps, kind.items.to_string()];
        row.extend([kind.predicted_us, kind.achieved_us].map(significant));
        row.extend(errors);
        table.add_row(row);
    }
    table
}

fn table_of_items(items: &[ItemError]) -> comfy_table::Table {
    let header = ["tile", "item", "rows", "columns", "steps", "part of a tile", "predicted µs", "achieved µs", "error, %"];
    let mut table = table::new(&header);
    for item in items {
        let mut row = vec![item.tile.to_owned()];
        row.extend([item.item, item.rows, item.columns, item.steps].map(|count| count.to_string()));
        row.push(if item.partial { "yes" } else { "no" }.into());
        row.extend([item.predicted_us, item.achieved_us].map(significant));
        row.push(percent(item.error()));
        table.add_row(row);
    }
    table
}

fn percent(part: f64) -> String {
    format!("{:+.1}", 100.0 * part)
}
