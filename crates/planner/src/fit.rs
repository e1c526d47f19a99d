//! Fits a model of a device to what was measured on it.
//!
//! A work item takes a fixed time, and besides the longer of two sums: one of its traffic, one of what its block does (see
//! [`DeviceModel`]). If it is known which of them is the longer for every item, the unknowns are found by least squares. So that
//! is taken from the model found last, until nothing changes.
//!
//! What is different where K and V are in FP8 is fitted by itself afterwards, with the other unknowns as they were found.

use packinfer_abi::{TileKind, WIDE_TILE_ROWS};
use serde::{Deserialize, Serialize};

use crate::cost::ItemWork;
use crate::device::{BesideTimes, DeviceModel, Fp8Times, TileTimes};
use crate::least_squares::NonNegative;
use crate::{KernelFamily, NarrowItems};

/// How much the estimate of an unknown counts, as the error of one batch would: next to nothing where batches say what it is.
const ESTIMATE_WEIGHT: f64 = 0.01;
/// The same of an unknown that is known: much.
const KNOWN_WEIGHT: f64 = 1e3;
/// Rounds in which the longer of the sums is chosen anew.
const MAX_ROUNDS: u32 = 100;
/// Fitted rates within this factor of the estimates are believed.
const BELIEVED: f64 = 8.0;
/// Work items that take so long show what the memory did before: shorter ones share that.
const LONG_NS: f64 = 20_000.0;

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
    /// Whether K and V were stored in FP8.
    #[serde(default)]
    pub is_fp8: bool,
    /// The most rows of a wide tile.
    pub wide_tile_rows: u32,
    /// How narrow items were done.
    #[serde(default, skip_serializing_if = "NarrowItems::are_alone")]
    pub narrow_items: NarrowItems,
    /// Nanoseconds that the first work items of all thread blocks took longer than later ones, on average, if none of them found
    /// its K and V in the cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_longer_ns: Option<f64>,
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
const UNKNOWNS: usize = 10;
type Unknowns = [f64; UNKNOWNS];
/// Those that are different where K and V are in FP8.
const ARE_OF_FP8: [bool; UNKNOWNS] = [false, true, false, false, true, true, false, false, true, true];

/// What an item of some kernels has to do.
#[derive(Clone, Copy, Debug)]
struct Work {
    item: ItemWork,
    /// Whether its tile, if it is a wide one, has more rows than those of other kernels.
    is_tall: bool,
    /// Whether few others read, so that it has as much of the memory as it can use.
    is_free_to_read: bool,
}

impl Work {
    fn of(item: ItemWork, measurement: &Measurement) -> Self {
        let is_tall = measurement.wide_tile_rows > WIDE_TILE_ROWS;
        Self { item, is_tall, is_free_to_read: measurement.narrow_items == NarrowItems::InTurn }
    }
}

/// How often each unknown counts for an item, by which sum is the longer.
fn coefficients(work: &Work, is_traffic: bool) -> Unknowns {
    let Work { item, is_tall, .. } = work;
    let steps = f64::from(item.steps);
    match (is_traffic, item.tile) {
        (true, _) => [1.0, item.memory_bytes, item.cached_bytes, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        (false, TileKind::Wide) if *is_tall => [1.0, 0.0, 0.0, item.flops, 0.0, 0.0, 1.0, steps, 0.0, 0.0],
        (false, TileKind::Wide) => [1.0, 0.0, 0.0, item.flops, 1.0, steps, 0.0, 0.0, 0.0, 0.0],
        (false, TileKind::Narrow) => [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, steps],
    }
}

fn product(a: &Unknowns, b: &Unknowns) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn is_traffic(work: &Work, unknowns: &Unknowns) -> bool {
    !work.is_free_to_read && product(&coefficients(work, true), unknowns) > product(&coefficients(work, false), unknowns)
}

fn predict(work: &Work, unknowns: &Unknowns) -> f64 {
    product(&coefficients(work, is_traffic(work, unknowns)), unknowns)
}

/// Nanoseconds that a byte or an operation takes a thread block, for a rate of the device; or the reverse.
fn of_block(model: &DeviceModel, rate: f64) -> f64 {
    1e9 * f64::from(model.lanes()) / rate
}

fn unknowns_of(model: &DeviceModel) -> Unknowns {
    let DeviceModel { item_ns, wide, narrow, .. } = *model;
    let tall = model.tall.unwrap_or(wide);
    let [byte, cached_byte, flop] =
        [model.bytes_per_s, model.cached_bytes_per_s, model.flops_per_s].map(|rate| of_block(model, rate));
    let [wide, tall, narrow] = [wide, tall, narrow].map(|TileTimes { setup_ns, step_ns }| [setup_ns, step_ns]);
    [item_ns, byte, cached_byte, flop, wide[0], wide[1], tall[0], tall[1], narrow[0], narrow[1]]
}

/// The model with these unknowns, of tall tiles too if it has any.
fn with_unknowns(model: &DeviceModel, unknowns: &Unknowns, has_tall: bool) -> DeviceModel {
    let &[item_ns, byte, cached_byte, flop, ref times @ ..] = unknowns;
    let rate = |ns| of_block(model, ns);
    let [wide, tall, narrow] = [0, 2, 4].map(|first| TileTimes { setup_ns: times[first], step_ns: times[first + 1] });
    DeviceModel {
        bytes_per_s: rate(byte),
        cached_bytes_per_s: rate(cached_byte),
        flops_per_s: rate(flop),
        item_ns,
        wide,
        tall: has_tall.then_some(tall),
        narrow,
        ..*model
    }
}

/// The model as it is where K and V are in FP8.
fn as_of_fp8(model: &DeviceModel) -> DeviceModel {
    let same = Fp8Times { bytes_per_s: model.bytes_per_s, wide: model.wide, narrow: model.narrow };
    let Fp8Times { bytes_per_s, wide, narrow } = model.e4m3.unwrap_or(same);
    DeviceModel { bytes_per_s, wide, narrow, ..*model }
}

/// A work item to be fitted to.
struct Observation {
    work: Work,
    ns: f64,
    /// Those of a batch have 1 together.
    weight: f64,
}

/// Fits the model to those of the measurements that are of its kernels and head dimension. What they do not tell stays as
/// `estimate` has it.
pub fn fit(estimate: &DeviceModel, measurements: &[Measurement]) -> (DeviceModel, Fit) {
    let ours = |m: &&Measurement| (m.kernel_family, m.head_dim) == (estimate.kernel_family, estimate.head_dim);
    let is_beside = |m: &&Measurement| m.narrow_items == NarrowItems::Beside;
    let (beside, others): (Vec<&Measurement>, Vec<_>) = measurements.iter().filter(ours).partition(is_beside);
    let (of_fp8, of_same): (Vec<&Measurement>, _) = others.into_iter().partition(|measurement| measurement.is_fp8);
    let mut notes = Vec::new();
    let mut model = fit_items(estimate, &of_same, [ESTIMATE_WEIGHT; UNKNOWNS], &mut notes);
    fit_displaced(&mut model, &of_same, &mut notes);
    fit_launches(&mut model, &of_same, &mut notes);
    let mut batches: Vec<_> = of_same.iter().filter_map(|measurement| batch_error(measurement, &model)).collect();
    if !of_fp8.is_empty() {
        let weights = ARE_OF_FP8.map(|is_of_fp8| if is_of_fp8 { ESTIMATE_WEIGHT } else { KNOWN_WEIGHT });
        let fitted = fit_items(&as_of_fp8(&DeviceModel { e4m3: estimate.e4m3, ..model }), &of_fp8, weights, &mut notes);
        model.e4m3 = Some(Fp8Times { bytes_per_s: fitted.bytes_per_s, wide: fitted.wide, narrow: fitted.narrow });
        batches.extend(of_fp8.iter().filter_map(|measurement| batch_error(measurement, &fitted)));
    }
    fit_beside(&mut model, &beside);
    if let Some((name, value)) = model.implausible() {
        notes.push(format!("{name} would be {value:.2e}: what calls take besides their items stays as estimated"));
        let DeviceModel { displaced_bytes, launch_ns, merge_ns, e4m3, beside, .. } = *estimate;
        model = DeviceModel { displaced_bytes, launch_ns, merge_ns, e4m3, beside, ..model };
    }
    let model = rounded(model);
    let mut errors: Vec<f64> = batches.iter().map(|batch| batch.error().abs()).collect();
    let median_error = median(&mut errors).unwrap_or(0.0);
    (model, Fit { kernel_family: model.kernel_family, head_dim: model.head_dim, median_error, batches, notes })
}

/// The model in numbers that can be read: none is known better.
fn rounded(model: DeviceModel) -> DeviceModel {
    let round = |number: f64| if number.is_normal() { format!("{number:.3e}").parse().unwrap_or(number) } else { number };
    let times = |TileTimes { setup_ns, step_ns }| TileTimes { setup_ns: round(setup_ns), step_ns: round(step_ns) };
    let fp8 = |Fp8Times { bytes_per_s, wide, narrow }| Fp8Times {
        bytes_per_s: round(bytes_per_s),
        wide: times(wide),
        narrow: times(narrow),
    };
    let beside = |BesideTimes { wide, narrow, stored_step_ns }| BesideTimes {
        wide: round(wide),
        narrow: round(narrow),
        stored_step_ns: round(stored_step_ns),
    };
    DeviceModel {
        bytes_per_s: round(model.bytes_per_s),
        cached_bytes_per_s: round(model.cached_bytes_per_s),
        flops_per_s: round(model.flops_per_s),
        displaced_bytes: round(model.displaced_bytes),
        item_ns: round(model.item_ns),
        wide: times(model.wide),
        tall: model.tall.map(times),
        narrow: times(model.narrow),
        e4m3: model.e4m3.map(fp8),
        launch_ns: round(model.launch_ns),
        merge_ns: round(model.merge_ns),
        beside: model.beside.map(beside),
        ..model
    }
}

/// The model that fits best what work items took; `weights` say how much the estimate of each unknown counts.
fn fit_items(estimate: &DeviceModel, measurements: &[&Measurement], weights: Unknowns, notes: &mut Vec<String>) -> DeviceModel {
    let observations = observations(measurements);
    let start = unknowns_of(estimate);
    // The second start: memory limits narrow tiles, and products wide ones.
    let by_kind = |o: &Observation| o.work.item.tile == TileKind::Narrow;
    let by_estimate = |o: &Observation| is_traffic(&o.work, &start);
    let fits = [refine(&start, &weights, &observations, by_estimate), refine(&start, &weights, &observations, by_kind)];
    let unknowns = if fits[0].1 <= fits[1].1 { fits[0].0 } else { fits[1].0 };
    let has_tall = estimate.tall.is_some() || observations.iter().any(|observation| observation.work.is_tall);
    believe(estimate, with_unknowns(estimate, &unknowns, has_tall), notes)
}

fn observations(measurements: &[&Measurement]) -> Vec<Observation> {
    let mut observations = Vec::new();
    for measurement in measurements {
        let tasks: u32 = measurement.items.iter().map(|item| item.tasks).sum();
        let measured = measurement.items.iter().filter(|item| item.ns.is_finite() && item.ns > 0.0);
        observations.extend(measured.map(|item| {
            let weight = f64::from(item.tasks) / f64::from(tasks.max(1));
            Observation { work: Work::of(item.work, measurement), ns: item.ns, weight }
        }));
    }
    observations
}

/// The unknowns that fit best, from a guess at which sum is the longer; and the sum of their weighted squared errors.
fn refine(
    start: &Unknowns,
    weights: &Unknowns,
    observations: &[Observation],
    guess: impl Fn(&Observation) -> bool,
) -> (Unknowns, f64) {
    let mut traffic: Vec<bool> = observations.iter().map(guess).collect();
    let mut best = (*start, f64::INFINITY);
    for _ in 0..MAX_ROUNDS {
        let unknowns = solve(start, weights, observations, &traffic);
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

/// Least squares of relative errors, and of what unknowns differ from the start, by `weights`.
fn solve(start: &Unknowns, weights: &Unknowns, observations: &[Observation], traffic: &[bool]) -> Unknowns {
    let scale = start.map(|unknown| if unknown > 0.0 { unknown } else { 1.0 });
    let mut squares = NonNegative::<UNKNOWNS>::default();
    for unknown in 0..UNKNOWNS {
        let mut row = [0.0; UNKNOWNS];
        row[unknown] = 1.0;
        squares.add(&row, start[unknown] / scale[unknown], weights[unknown] * weights[unknown]);
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

/// What others leave in the cache: what the first work items wait for that read from memory all the time.
fn fit_displaced(model: &mut DeviceModel, measurements: &[&Measurement], notes: &mut Vec<String>) {
    let unknowns = unknowns_of(model);
    let waits_for_memory = |m: &&&Measurement| {
        let tasks: u32 = m.items.iter().map(|item| item.tasks).sum();
        let sum_ns: f64 = m.items.iter().map(|item| f64::from(item.tasks) * item.ns).sum();
        let waits = |item: &&ItemTime| is_traffic(&Work::of(item.work, m), &unknowns);
        let waiting: u32 = m.items.iter().filter(waits).map(|item| item.tasks).sum();
        sum_ns > LONG_NS * f64::from(tasks) && 2 * waiting > tasks
    };
    let mut longer: Vec<f64> = measurements.iter().filter(waits_for_memory).filter_map(|m| m.first_longer_ns).collect();
    match median(&mut longer) {
        Some(ns) => model.displaced_bytes = ns.max(0.0) * 1e-9 * model.bytes_per_s,
        None => notes.push("no batch that reads for long: displaced_bytes stays".into()),
    }
}

/// What items take beside others, as a part of what they take otherwise; and a step of narrow ones in FP8.
fn fit_beside(model: &mut DeviceModel, measurements: &[&Measurement]) {
    let unknowns = unknowns_of(model);
    // What all items of a kind took, for each unit of what is counted.
    let mean = |is_fp8: bool, tile: TileKind, count: &dyn Fn(&Work) -> f64| {
        let (mut taken_ns, mut counted) = (0.0, 0.0);
        for measurement in measurements.iter().filter(|measurement| measurement.is_fp8 == is_fp8) {
            for ItemTime { work, tasks, ns } in measurement.items.iter().filter(|item| item.work.tile == tile) {
                taken_ns += f64::from(*tasks) * ns;
                counted += f64::from(*tasks) * count(&Work::of(*work, measurement));
            }
        }
        (counted > 0.0).then(|| taken_ns / counted)
    };
    let predicted_ns = |work: &Work| predict(work, &unknowns);
    let steps = |work: &Work| f64::from(work.item.steps);
    if let Some(times) = &mut model.beside {
        times.wide = mean(false, TileKind::Wide, &predicted_ns).unwrap_or(times.wide);
        times.narrow = mean(false, TileKind::Narrow, &predicted_ns).unwrap_or(times.narrow);
        times.stored_step_ns = mean(true, TileKind::Narrow, &steps).unwrap_or(times.stored_step_ns);
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

fn batch_error(measurement: &Measurement, model: &DeviceModel) -> Option<BatchError> {
    let unknowns = unknowns_of(model);
    let (mut tasks, mut measured_ns, mut predicted_ns) = (0.0, 0.0, 0.0);
    for item in &measurement.items {
        tasks += f64::from(item.tasks);
        measured_ns += f64::from(item.tasks) * item.ns;
        predicted_ns += f64::from(item.tasks) * predict(&Work::of(item.work, measurement), &unknowns);
    }
    let batch = format!("{}{}", measurement.batch, if measurement.is_fp8 { ", FP8" } else { "" });
    (measured_ns > 0.0).then(|| BatchError { batch, measured_ns: measured_ns / tasks, predicted_ns: predicted_ns / tasks })
}

#[cfg(test)]
mod tests;
