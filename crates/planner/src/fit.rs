//! Fits a model of a device to what was measured on it.
//!
//! A work item takes a fixed time, and besides the longer of two sums: one of its traffic, one of what its block does (see
//! [`DeviceModel`]). If it is known which of them is the longer for every item, the unknowns are found by least squares. So that
//! is taken from the model found last, until nothing changes.

use packinfer_abi::TileKind;
use serde::{Deserialize, Serialize};

use crate::KernelFamily;
use crate::cost::ItemWork;
use crate::device::{DeviceModel, TileTimes};
use crate::least_squares::NonNegative;

/// How much the estimate of an unknown counts, as the error of one batch would: next to nothing where batches say what it is.
const ESTIMATE_WEIGHT: f64 = 0.01;
/// Rounds in which the longer of the sums is chosen anew.
const MAX_ROUNDS: u32 = 100;
/// Fitted rates within this factor of the estimates are believed.
const BELIEVED: f64 = 8.0;

/// One batch that was run, with what its work items took.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measurement {
    /// Name of the batch.
    pub batch: String,
    /// The kernels.
    pub kernel_family: KernelFamily,
    /// The head dimension.
    pub head_dim: u32,
    /// Nanoseconds of the whole call.
    pub call_ns: f64,
    /// Nanoseconds from the begin of the first work item to the end of the last.
    pub items_ns: f64,
    /// Bytes of partials and results that were merged, if any were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub merged_bytes: Option<f64>,
    /// Work items that were done while the device was full, those that are alike together.
    pub items: Vec<ItemTime>,
}

/// What work items took that are alike.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ItemTime {
    /// What each has to do.
    pub work: ItemWork,
    /// How many there were, each head group counted.
    pub tasks: u32,
    /// Nanoseconds that each took its thread block, on average.
    pub ns: f64,
}

/// A fitted model, and how well it fits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fit {
    /// The kernels.
    pub kernel_family: KernelFamily,
    /// The head dimension.
    pub head_dim: u32,
    /// Error of the predicted time of work items, relative to the measured one, without sign: the median over batches.
    pub median_error: f64,
    /// How well it fits each batch.
    pub batches: Vec<BatchError>,
    /// What could not be fitted, and stays as it was estimated.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// How well a model fits one batch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BatchError {
    /// Name of the batch.
    pub batch: String,
    /// Nanoseconds that a work item took, on average.
    pub measured_ns: f64,
    /// Nanoseconds that the model says.
    pub predicted_ns: f64,
}

impl BatchError {
    /// Difference, relative to what was measured.
    pub fn error(&self) -> f64 {
        self.predicted_ns / self.measured_ns - 1.0
    }
}

/// The unknowns that work items tell, in ns of one thread block each. Their order is that of [`coefficients`].
const UNKNOWNS: usize = 8;
type Unknowns = [f64; UNKNOWNS];

/// How often each unknown counts for an item, by which sum is the longer.
fn coefficients(work: &ItemWork, is_traffic: bool) -> Unknowns {
    let steps = f64::from(work.steps);
    match (is_traffic, work.tile) {
        (true, _) => [1.0, work.memory_bytes, work.cached_bytes, 0.0, 0.0, 0.0, 0.0, 0.0],
        (false, TileKind::Wide) => [1.0, 0.0, 0.0, 1.0, steps, work.flops, 0.0, 0.0],
        (false, TileKind::Narrow) => [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, steps],
    }
}

fn product(a: &Unknowns, b: &Unknowns) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn is_traffic(work: &ItemWork, unknowns: &Unknowns) -> bool {
    product(&coefficients(work, true), unknowns) > product(&coefficients(work, false), unknowns)
}

fn predict(work: &ItemWork, unknowns: &Unknowns) -> f64 {
    product(&coefficients(work, is_traffic(work, unknowns)), unknowns)
}

/// Nanoseconds that a byte or an operation takes a thread block, for a rate of the device; or the reverse.
fn of_block(model: &DeviceModel, rate: f64) -> f64 {
    1e9 * f64::from(model.lanes()) / rate
}

fn unknowns_of(model: &DeviceModel) -> Unknowns {
    let rate = |rate| of_block(model, rate);
    let DeviceModel { wide, narrow, .. } = *model;
    let bytes = [rate(model.bytes_per_s), rate(model.cached_bytes_per_s)];
    [model.item_ns, bytes[0], bytes[1], wide.setup_ns, wide.step_ns, rate(model.flops_per_s), narrow.setup_ns, narrow.step_ns]
}

fn with_unknowns(model: &DeviceModel, unknowns: &Unknowns) -> DeviceModel {
    let &[item_ns, byte, cached_byte, wide_setup, wide_step, flop, narrow_setup, narrow_step] = unknowns;
    let rate = |ns| of_block(model, ns);
    DeviceModel {
        bytes_per_s: rate(byte),
        cached_bytes_per_s: rate(cached_byte),
        flops_per_s: rate(flop),
        item_ns,
        wide: TileTimes { setup_ns: wide_setup, step_ns: wide_step },
        narrow: TileTimes { setup_ns: narrow_setup, step_ns: narrow_step },
        ..*model
    }
}

/// A work item to be fitted to.
struct Observation {
    work: ItemWork,
    ns: f64,
    /// Those of a batch have 1 together.
    weight: f64,
}

/// Fits the model to those of the measurements that are of its kernels and head dimension. What they do not tell stays as
/// `estimate` has it.
pub fn fit(estimate: &DeviceModel, measurements: &[Measurement]) -> (DeviceModel, Fit) {
    let ours = |m: &&Measurement| (m.kernel_family, m.head_dim) == (estimate.kernel_family, estimate.head_dim);
    let measurements: Vec<&Measurement> = measurements.iter().filter(ours).collect();
    let observations = observations(&measurements);
    let start = unknowns_of(estimate);
    // The second start: memory limits narrow tiles, and products wide ones.
    let by_kind = |o: &Observation| o.work.tile == TileKind::Narrow;
    let fits = [refine(&start, &observations, |o| is_traffic(&o.work, &start)), refine(&start, &observations, by_kind)];
    let unknowns = if fits[0].1 <= fits[1].1 { fits[0].0 } else { fits[1].0 };
    let mut notes = Vec::new();
    let mut model = believe(estimate, with_unknowns(estimate, &unknowns), &mut notes);
    fit_launches(&mut model, &measurements, &mut notes);

    let fitted = unknowns_of(&model);
    let batches: Vec<_> = measurements.iter().filter_map(|measurement| batch_error(measurement, &fitted)).collect();
    let mut errors: Vec<f64> = batches.iter().map(|batch| batch.error().abs()).collect();
    errors.sort_unstable_by(f64::total_cmp);
    let median_error = errors.get(errors.len() / 2).copied().unwrap_or(0.0);
    (model, Fit { kernel_family: model.kernel_family, head_dim: model.head_dim, median_error, batches, notes })
}

fn observations(measurements: &[&Measurement]) -> Vec<Observation> {
    let mut observations = Vec::new();
    for measurement in measurements {
        let tasks: u32 = measurement.items.iter().map(|item| item.tasks).sum();
        let measured = measurement.items.iter().filter(|item| item.ns.is_finite() && item.ns > 0.0);
        observations.extend(measured.map(|item| {
            let weight = f64::from(item.tasks) / f64::from(tasks.max(1));
            Observation { work: item.work, ns: item.ns, weight }
        }));
    }
    observations
}

/// The unknowns that fit best, from a guess at which sum is the longer; and the sum of their weighted squared errors.
fn refine(start: &Unknowns, observations: &[Observation], guess: impl Fn(&Observation) -> bool) -> (Unknowns, f64) {
    let mut traffic: Vec<bool> = observations.iter().map(guess).collect();
    let mut best = (*start, f64::INFINITY);
    for _ in 0..MAX_ROUNDS {
        let unknowns = solve(start, observations, &traffic);
        let loss = observations.iter().map(|o| o.weight * (predict(&o.work, &unknowns) / o.ns - 1.0).powi(2)).sum();
        if loss < best.1 {
            best = (unknowns, loss);
        }
        let next: Vec<bool> = observations.iter().map(|o| is_traffic(&o.work, &unknowns)).collect();
        if next == traffic {
            break;
        }
        traffic = next;
    }
    best
}

/// Least squares of relative errors, and of what unknowns differ from the start.
fn solve(start: &Unknowns, observations: &[Observation], traffic: &[bool]) -> Unknowns {
    let scale = start.map(|unknown| if unknown > 0.0 { unknown } else { 1.0 });
    let mut squares = NonNegative::<UNKNOWNS>::default();
    for unknown in 0..UNKNOWNS {
        let mut row = [0.0; UNKNOWNS];
        row[unknown] = 1.0;
        squares.add(&row, start[unknown] / scale[unknown], ESTIMATE_WEIGHT * ESTIMATE_WEIGHT);
    }
    for (observation, &is_traffic) in observations.iter().zip(traffic) {
        let mut row = coefficients(&observation.work, is_traffic);
        row.iter_mut().zip(&scale).for_each(|(entry, scale)| *entry *= scale / observation.ns);
        squares.add(&row, 1.0, observation.weight);
    }
    let mut unknowns = squares.solve();
    unknowns.iter_mut().zip(&scale).for_each(|(unknown, scale)| *unknown *= scale);
    unknowns
}

/// The fitted model, but for rates that are far from what was estimated. Times that no device has refute the whole.
fn believe(estimate: &DeviceModel, fitted: DeviceModel, notes: &mut Vec<String>) -> DeviceModel {
    let mut rate = |name: &str, fitted: f64, estimate: f64| {
        if (estimate / BELIEVED..=estimate * BELIEVED).contains(&fitted) {
            return fitted;
        }
        notes.push(format!("{name} would be {fitted:.2e}: it stays at {estimate:.2e}"));
        estimate
    };
    let model = DeviceModel {
        bytes_per_s: rate("bytes_per_s", fitted.bytes_per_s, estimate.bytes_per_s),
        cached_bytes_per_s: rate("cached_bytes_per_s", fitted.cached_bytes_per_s, estimate.cached_bytes_per_s),
        flops_per_s: rate("flops_per_s", fitted.flops_per_s, estimate.flops_per_s),
        ..fitted
    };
    match model.implausible() {
        None => model,
        Some((name, value)) => {
            notes.push(format!("{name} would be {value:.2e}: the times of work items stay as estimated"));
            *estimate
        }
    }
}

/// What calls take besides their work items, with merging and without.
fn fit_launches(model: &mut DeviceModel, measurements: &[&Measurement], notes: &mut Vec<String>) {
    let besides = |m: &Measurement| m.call_ns - m.items_ns;
    let mut launches: Vec<f64> = measurements.iter().filter(|m| m.merged_bytes.is_none()).map(|m| besides(m)).collect();
    match median(&mut launches) {
        Some(launch_ns) => model.launch_ns = launch_ns.max(0.0),
        None => notes.push("no batch without merging: launch_ns stays".into()),
    }
    let launch_ns = model.launch_ns;
    let merge = |m: &&Measurement| Some(besides(m) - launch_ns - m.merged_bytes? / model.bytes_per_s * 1e9);
    let mut merges: Vec<f64> = measurements.iter().filter_map(merge).collect();
    match median(&mut merges) {
        Some(merge_ns) => model.merge_ns = merge_ns.max(0.0),
        None => notes.push("no batch with merging: merge_ns stays".into()),
    }
}

fn median(values: &mut [f64]) -> Option<f64> {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

fn batch_error(measurement: &Measurement, unknowns: &Unknowns) -> Option<BatchError> {
    let (mut tasks, mut measured_ns, mut predicted_ns) = (0.0, 0.0, 0.0);
    for item in &measurement.items {
        tasks += f64::from(item.tasks);
        measured_ns += f64::from(item.tasks) * item.ns;
        predicted_ns += f64::from(item.tasks) * predict(&item.work, unknowns);
    }
    let batch = measurement.batch.clone();
    (measured_ns > 0.0).then(|| BatchError { batch, measured_ns: measured_ns / tasks, predicted_ns: predicted_ns / tasks })
}

#[cfg(test)]
mod tests;
