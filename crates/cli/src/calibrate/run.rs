//! Runs the designs, and tells what their work items took.

use float8::F8E4M3;
use half::bf16;
use packinfer::Engine;
use packinfer_abi::{TileKind, WorkItem};
use packinfer_batch::{AttentionShape, DType, KvDType};
use packinfer_planner::{DeviceModel, ItemTime, ItemWork, Measurement, NarrowItems, Packing, Plan, Planner, Schedule, TaskTime};

use super::designs::{self, Design};
use crate::backend::{BackendKv, Cuda, DeviceTensors, StampedCall, random};
use crate::progress::Progress;

/// Query heads and KV heads of all designs.
const HEADS: (u32, u32) = (32, 8);
/// The head dimensions that have models of their own.
const HEAD_DIMS: [u32; 4] = [64, 96, 128, 256];
/// Bytes of K and V: many times what an L2 cache holds, as part of what a call reads first may stay there until it reads the
/// same again.
const KV_BYTES: u64 = 2 << 30;
/// Runs of a design, of which the one with the median time is taken.
const RUNS: usize = 9;

/// The estimates to begin with: for each family of kernels that the engine uses and each head dimension.
pub fn models(engine: &Engine) -> Vec<DeviceModel> {
    let device = engine.device();
    let mut models = DeviceModel::estimates_for_device(&device.name, device.compute_capability, device.multiprocessors);
    models.retain(|model| engine.kernel_families().contains(&model.kernel_family));
    let of_head_dim = |model: DeviceModel, head_dim| {
        let shape = AttentionShape::new(HEADS.0, HEADS.1, head_dim, DType::Bf16).ok();
        let has_beside = shape.is_some_and(|shape| model.kernel_family.does_narrow_beside_wide(shape));
        DeviceModel { head_dim, beside: model.beside.filter(|_| has_beside), ..model }
    };
    models.into_iter().flat_map(|model| HEAD_DIMS.map(|head_dim| of_head_dim(model, head_dim))).collect()
}

/// Runs all designs for all models.
pub fn measure(cuda: &Cuda, models: &[DeviceModel]) -> anyhow::Result<Vec<Measurement>> {
    let designs = designs::all();
    let progress = Progress::new(2 * designs.len() * models.len());
    let mut measurements = Vec::new();
    for head_dim in HEAD_DIMS {
        let shape = AttentionShape::new(HEADS.0, HEADS.1, head_dim, DType::Bf16)?;
        let models: Vec<_> = models.iter().filter(|model| model.head_dim == head_dim).collect();
        measurements.extend(measure_shape::<bf16>(cuda, &designs, shape, &models, &progress)?);
        let fp8 = shape.with_kv_dtype(KvDType::E4m3);
        measurements.extend(measure_shape::<F8E4M3>(cuda, &designs, fp8, &models, &progress)?);
    }
    Ok(measurements)
}

/// Runs all designs with heads of one shape, whose K and V are of a type.
fn measure_shape<K: BackendKv<bf16>>(
    cuda: &Cuda,
    designs: &[Design],
    shape: AttentionShape,
    models: &[&DeviceModel],
    progress: &Progress,
) -> anyhow::Result<Vec<Measurement>> {
    let num_slots = (KV_BYTES / shape.kv_bytes_per_slot()) as u32;
    let mut tensors = pool::<K>(cuda.engine(), shape, num_slots)?;
    let mut measurements = Vec::new();
    for model in models {
        for design in designs {
            let stored = if shape.kv_dtype() == KvDType::E4m3 { ", FP8" } else { "" };
            progress.doing(format!("{}, head dimension {}{stored}: {}", model.kernel_family, shape.head_dim(), design.name));
            measurements.extend(measure_design(cuda, design, shape, model, num_slots, &mut tensors)?);
            progress.step();
        }
    }
    Ok(measurements)
}

/// K and V of random elements, without Q and O.
fn pool<K: BackendKv<bf16>>(engine: &Engine, shape: AttentionShape, num_slots: u32) -> anyhow::Result<DeviceTensors<bf16, K>> {
    let len = num_slots as usize * shape.kv_elements_per_slot() as usize;
    Ok(DeviceTensors {
        q: engine.zeros(0)?,
        k: random(engine, len, 1)?,
        v: random(engine, len, 2)?,
        o: engine.zeros(0)?,
        sinks: None,
        k_scales: None,
        v_scales: None,
        logit_soft_cap: None,
    })
}

fn measure_design<K: BackendKv<bf16>>(
    cuda: &Cuda,
    design: &Design,
    shape: AttentionShape,
    model: &DeviceModel,
    num_slots: u32,
    tensors: &mut DeviceTensors<bf16, K>,
) -> anyhow::Result<Option<Measurement>> {
    let batch = design.batch(shape, model, num_slots)?;
    let plan = planner(model, design.narrow_items).plan(&batch)?;
    if narrow_items(&plan) != design.narrow_items {
        return Ok(None);
    }
    let qo_len = batch.num_query_tokens() as usize * shape.qo_elements_per_token() as usize;
    tensors.q = random(cuda.engine(), qo_len, 3)?;
    tensors.o = cuda.engine().zeros(qo_len)?;
    let StampedCall { call, schedule, .. } = cuda.stamp(&plan, tensors, RUNS)?;
    Ok(Some(measurement(design, &plan, call.as_secs_f64() * 1e9, &schedule)))
}

/// A planner that has narrow items done so, if there are kernels for that, and K and V in FP8 made bf16 only where they must be.
fn planner(model: &DeviceModel, narrow_items: NarrowItems) -> Planner {
    let planner = Planner::new(*model).with_packing(Packing::Unshared);
    match narrow_items {
        NarrowItems::Alone => planner.with_widening(0),
        NarrowItems::InTurn | NarrowItems::Beside => planner.with_narrow_items(narrow_items),
    }
}

/// How a plan has narrow items done.
fn narrow_items(plan: &Plan) -> NarrowItems {
    match (plan.is_beside(), plan.back_lanes()) {
        (true, _) => NarrowItems::Beside,
        (false, 0) => NarrowItems::Alone,
        (false, _) => NarrowItems::InTurn,
    }
}

/// What a call of a design's plan tells.
fn measurement(design: &Design, plan: &Plan, call_ns: f64, schedule: &Schedule) -> Measurement {
    // Those that are split have few items, which do not all end while the device is full: what their launches take is what counts.
    let items = if design.is_split() { vec![] } else { item_times(plan, design.is_cached, schedule) };
    let has_displaced = !design.is_cached && design.narrow_items == NarrowItems::Alone;
    Measurement {
        batch: design.name.clone(),
        kernel_family: plan.model().kernel_family,
        head_dim: plan.model().head_dim,
        is_fp8: plan.shape().kv_dtype() == KvDType::E4m3,
        wide_tile_rows: plan.heads().wide_tile_rows,
        narrow_items: design.narrow_items,
        first_longer_ns: if has_displaced { first_longer_ns(plan, &items, schedule) } else { None },
        call_ns,
        items_ns: schedule.span_ns() as f64,
        merged_bytes: plan.merged_bytes(),
        items,
    }
}

/// What the first tasks of all lanes took longer than later ones that are alike, on average.
fn first_longer_ns(plan: &Plan, items: &[ItemTime], schedule: &Schedule) -> Option<f64> {
    let works: Vec<ItemWork> = plan.work(plan.model()).collect();
    let groups = plan.heads().num_groups as usize;
    let (mut sum_ns, mut count) = (0.0, 0);
    for (task, time) in schedule.first_tasks() {
        if let Some(later) = items.iter().find(|later| later.work == works[task / groups]) {
            sum_ns += time.taken_ns as f64 - later.ns;
            count += 1;
        }
    }
    (count > 0).then(|| sum_ns / f64::from(count))
}

/// What the work items took that were done while the device was full, those that are alike together: while both kinds were
/// done, if there are both. Where each multiprocessor does one kind at a time, it is narrow ones that have others beside them.
fn item_times(plan: &Plan, is_cached: bool, schedule: &Schedule) -> Vec<ItemTime> {
    let works: Vec<ItemWork> = plan
        .work(plan.model())
        .zip(plan.items())
        .map(|(work, item)| if is_cached { cached(work, item, plan) } else { work })
        .collect();
    let groups = plan.heads().num_groups as usize;
    let narrow_items = narrow_items(plan);
    let begins =
        |tile| move |(task, time): (usize, &TaskTime)| (plan.items()[task / groups].tile == tile).then_some(time.begin_ns);
    let last_begins =
        [TileKind::Wide, TileKind::Narrow].map(|tile| schedule.tasks.iter().enumerate().filter_map(begins(tile)).max());
    let until_ns = match narrow_items {
        NarrowItems::Alone => last_begins.into_iter().flatten().max(),
        NarrowItems::InTurn | NarrowItems::Beside => last_begins.into_iter().flatten().min(),
    };
    let mut times: Vec<ItemTime> = Vec::new();
    for (task, time) in schedule.later_tasks(until_ns.unwrap_or(0)) {
        let work = works[task / groups];
        if narrow_items == NarrowItems::InTurn && work.tile == TileKind::Wide {
            continue;
        }
        let taken_ns = time.taken_ns as f64;
        match times.iter_mut().find(|time| time.work == work) {
            Some(ItemTime { tasks, ns, .. }) => {
                *tasks += 1;
                *ns += (taken_ns - *ns) / f64::from(*tasks);
            }
            None => times.push(ItemTime { work, tasks: 1, ns: taken_ns }),
        }
    }
    times
}

/// The same work where all of its KV is in the L2 cache, which the plan does not know.
fn cached(work: ItemWork, item: &WorkItem, plan: &Plan) -> ItemWork {
    let shape = plan.shape();
    let column_bytes = shape.kv_bytes_per_slot() / u64::from(shape.num_kv_heads());
    let kv_bytes = f64::from(item.column_end - item.column_begin) * column_bytes as f64;
    ItemWork { memory_bytes: work.memory_bytes + work.cached_bytes - kv_bytes, cached_bytes: kv_bytes, ..work }
}

#[cfg(test)]
mod tests {
    use packinfer_planner::fit;

    use super::*;

    /// What a device that is exactly like its model would be measured to take.
    #[test]
    fn the_designs_tell_the_model() {
        let shape = AttentionShape::new(32, 8, 128, DType::Bf16).expect("a good shape");
        for estimate in DeviceModel::estimates_for_device("H100", (9, 0), 132) {
            let truth = DeviceModel {
                bytes_per_s: 2.7e12,
                cached_bytes_per_s: 4.9e12,
                flops_per_s: 1.2 * estimate.flops_per_s,
                item_ns: 800.0,
                displaced_bytes: 3e7,
                ..estimate
            };
            let measure = |design: &Design| {
                let batch = design.batch(shape, &truth, 524_288).expect("a good batch");
                let plan = planner(&truth, design.narrow_items).plan(&batch).expect("it can be planned");
                if narrow_items(&plan) != design.narrow_items {
                    return None; // there is no kernel for that
                }
                let schedule = Schedule::predicted(&plan, &truth);
                let measured = measurement(design, &plan, plan.explain(&truth).predicted_us * 1e3, &schedule);
                // Of the cached designs the plan predicts something else.
                Some(if design.is_cached { Measurement { items: vec![], ..measured } } else { measured })
            };
            let measurements: Vec<_> = designs::all().iter().filter_map(measure).collect();
            let (model, fit) = fit(&estimate, &measurements);
            assert!(fit.median_error < 0.005, "{fit:?}");
            assert!((model.bytes_per_s / truth.bytes_per_s - 1.0).abs() < 0.03, "{model:?}");
            assert!((model.flops_per_s / truth.flops_per_s - 1.0).abs() < 0.1, "{model:?}");
            assert!((model.displaced_bytes / truth.displaced_bytes - 1.0).abs() < 0.05, "{model:?}");
            assert!((model.launch_ns - truth.launch_ns).abs() < 10.0 && (model.merge_ns - truth.merge_ns).abs() < 50.0);
        }
    }
}
