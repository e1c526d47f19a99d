//! What was predicted of work items against what they took.

use packinfer_abi::{DIRECT, TileKind};
use serde::Serialize;

use crate::cost::num_rows;
use crate::{DeviceModel, Plan, Schedule};

/// Work items that are listed one by one.
const NUM_WORST: usize = 10;

/// What was predicted of a call's work items against what they took.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// Items that are alike, by kind of tile and number of steps.
    pub kinds: Vec<KindError>,
    /// The items whose prediction is furthest off, in µs.
    pub worst: Vec<ItemError>,
}

/// How well the items of a kind were predicted.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KindError {
    /// `wide` or `narrow`.
    pub tile: &'static str,
    /// The fewest steps of columns of these items; all have less than twice as many.
    pub steps: u32,
    /// How many there are.
    pub items: u32,
    /// What they were predicted to take in µs, on average.
    pub predicted_us: f64,
    /// What they took, on average over items and head groups.
    pub achieved_us: f64,
    /// The mean of the items' errors, relative to what they took.
    pub mean_error: f64,
    /// The same without signs.
    pub mean_absolute_error: f64,
    /// The largest without signs.
    pub worst_error: f64,
}

/// How well an item was predicted.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ItemError {
    /// Its place in the plan.
    pub item: u32,
    /// `wide` or `narrow`.
    pub tile: &'static str,
    /// Rows of its tile.
    pub rows: u32,
    /// Columns.
    pub columns: u32,
    /// Steps of columns.
    pub steps: u32,
    /// Whether it writes partials.
    pub partial: bool,
    /// What it was predicted to take, in µs.
    pub predicted_us: f64,
    /// What it took, on average over head groups.
    pub achieved_us: f64,
}

impl ItemError {
    /// Difference, relative to what the item took.
    pub fn error(&self) -> f64 {
        self.predicted_us / self.achieved_us - 1.0
    }
}

impl Comparison {
    /// Compares what `model` predicts of the plan's items with what they took.
    pub fn new(plan: &Plan, model: &DeviceModel, achieved: &Schedule) -> Self {
        let mut errors = item_errors(plan, model, achieved);
        let mut kinds: Vec<(_, Vec<&ItemError>)> = Vec::new();
        for error in &errors {
            let kind = (error.tile, 1 << error.steps.max(1).ilog2());
            match kinds.iter_mut().find(|(of, _)| *of == kind) {
                Some((_, errors)) => errors.push(error),
                None => kinds.push((kind, vec![error])),
            }
        }
        kinds.sort_unstable_by_key(|(kind, _)| *kind);
        let kinds = kinds.iter().map(|(kind, errors)| KindError::new(*kind, errors)).collect();
        let off = |error: &ItemError| (error.predicted_us - error.achieved_us).abs();
        errors.sort_by(|a, b| off(b).total_cmp(&off(a)));
        errors.truncate(NUM_WORST);
        Self { kinds, worst: errors }
    }
}

impl KindError {
    fn new((tile, steps): (&'static str, u32), errors: &[&ItemError]) -> Self {
        let mean = |value: &dyn Fn(&ItemError) -> f64| errors.iter().map(|error| value(error)).sum::<f64>() / errors.len() as f64;
        Self {
            tile,
            steps,
            items: errors.len() as u32,
            predicted_us: mean(&|error| error.predicted_us),
            achieved_us: mean(&|error| error.achieved_us),
            mean_error: mean(&ItemError::error),
            mean_absolute_error: mean(&|error| error.error().abs()),
            worst_error: errors.iter().map(|error| error.error().abs()).fold(0.0, f64::max),
        }
    }
}

/// The items that took any time, in the order of the plan.
fn item_errors(plan: &Plan, model: &DeviceModel, achieved: &Schedule) -> Vec<ItemError> {
    let groups = plan.heads().num_groups as usize;
    let mut errors = Vec::new();
    let tasks = achieved.tasks.chunks(groups.max(1));
    let predicted = plan.work(model).zip(plan.times_of(0..plan.items().len(), model));
    for (index, ((item, (work, times)), tasks)) in (0..).zip(plan.items().iter().zip(predicted).zip(tasks)) {
        let taken_ns: u64 = tasks.iter().map(|task| task.taken_ns).sum();
        if taken_ns > 0 {
            errors.push(ItemError {
                item: index,
                tile: name(item.tile),
                rows: num_rows(plan.heads(), plan.segments_of(item)),
                columns: item.column_end - item.column_begin,
                steps: work.steps,
                partial: item.partial_row != DIRECT,
                predicted_us: times.full() * plan.factor_of(item.tile, model) * 1e-3,
                achieved_us: taken_ns as f64 * 1e-3 / tasks.len() as f64,
            });
        }
    }
    errors
}

fn name(tile: TileKind) -> &'static str {
    match tile {
        TileKind::Wide => "wide",
        TileKind::Narrow => "narrow",
    }
}

#[cfg(test)]
mod tests {
    use packinfer_batch::{AttentionShape, Batch, DType, Mask};

    use super::*;
    use crate::Planner;

    #[test]
    fn errors_are_those_of_the_items() {
        let mut batch = Batch::new(AttentionShape::new(32, 8, 128, DType::Bf16).expect("a good shape"), Mask::Causal);
        for request in 0..40 {
            batch.push_contiguous(1, 600, request * 1000).expect("a good request");
        }
        batch.push_contiguous(96, 96, 100_000).expect("a good request");
        let model = DeviceModel::H100;
        let plan = Planner::new(model).plan(&batch).expect("a batch that can be planned");
        let mut achieved = Schedule::predicted(&plan, &model);
        let exact = Comparison::new(&plan, &model, &achieved);
        assert_eq!(exact.kinds.iter().map(|kind| kind.items as usize).sum::<usize>(), plan.items().len());
        assert!(exact.kinds.iter().all(|kind| kind.worst_error < 1e-3), "{exact:?}");

        // All take twice as long, and the third item ten times.
        achieved.tasks.iter_mut().for_each(|task| task.taken_ns *= 2);
        achieved.tasks[3 * 8..4 * 8].iter_mut().for_each(|task| task.taken_ns *= 5);
        let off = Comparison::new(&plan, &model, &achieved);
        assert_eq!((off.worst.len(), off.worst[0].item), (10, 3));
        assert!((off.worst[0].error() + 0.9).abs() < 1e-3, "{:?}", off.worst[0]);
        assert!(off.kinds.iter().all(|kind| kind.mean_error < -0.49), "{off:?}");
    }
}
