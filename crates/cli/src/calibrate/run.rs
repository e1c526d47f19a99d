//! Runs the designs, and tells what their work items took.

use half::bf16;
use packinfer::Engine;
use packinfer_abi::WorkItem;
use packinfer_batch::{AttentionShape, DType};
use packinfer_planner::{DeviceModel, ItemTime, ItemWork, Measurement, Packing, Plan, Planner, Schedule};

use super::designs::{self, Design};
use crate::backend::{Cuda, DeviceTensors, StampedCall, random};
use crate::progress::Progress;

/// Query heads and KV heads of all designs.
const HEADS: (u32, u32) = (32, 8);
/// The head dimensions that have models of their own.
const HEAD_DIMS: [u32; 2] = [64, 128];
/// Bytes of K and V: several times what an L2 cache holds.
const KV_BYTES: u64 = 512 << 20;
/// Runs of a design, of which the one with the median time is taken.
const RUNS: usize = 9;

/// The estimates to begin with: for each family of kernels that the engine uses and each head dimension.
pub fn models(engine: &Engine) -> Vec<DeviceModel> {
    let device = engine.device();
    let mut models = DeviceModel::estimates_for_device(&device.name, device.compute_capability, device.multiprocessors);
    models.retain(|model| engine.kernel_families().contains(&model.kernel_family));
    models.into_iter().flat_map(|model| HEAD_DIMS.map(|head_dim| DeviceModel { head_dim, ..model })).collect()
}

/// Runs all designs for all models.
pub fn measure(cuda: &Cuda, models: &[DeviceModel]) -> anyhow::Result<Vec<Measurement>> {
    let designs = designs::all();
    let progress = Progress::new(designs.len() * models.len());
    let mut measurements = Vec::new();
    for head_dim in HEAD_DIMS {
        let shape = AttentionShape::new(HEADS.0, HEADS.1, head_dim, DType::Bf16)?;
        let num_slots = (KV_BYTES / shape.kv_bytes_per_slot()) as u32;
        let mut tensors = pool(cuda.engine(), shape, num_slots)?;
        for model in models.iter().filter(|model| model.head_dim == head_dim) {
            for design in &designs {
                progress.doing(format!("{}, head dimension {head_dim}: {}", model.kernel_family, design.name));
                measurements.push(measure_design(cuda, design, shape, model, num_slots, &mut tensors)?);
                progress.step();
            }
        }
    }
    Ok(measurements)
}

/// K and V of random elements, without Q and O.
fn pool(engine: &Engine, shape: AttentionShape, num_slots: u32) -> anyhow::Result<DeviceTensors<bf16>> {
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

fn measure_design(
    cuda: &Cuda,
    design: &Design,
    shape: AttentionShape,
    model: &DeviceModel,
    num_slots: u32,
    tensors: &mut DeviceTensors<bf16>,
) -> anyhow::Result<Measurement> {
    let batch = design.batch(shape, model, num_slots)?;
    let plan = Planner::new(*model).with_packing(Packing::Unshared).plan(&batch)?;
    let qo_len = batch.num_query_tokens() as usize * shape.qo_elements_per_token() as usize;
    tensors.q = random(cuda.engine(), qo_len, 3)?;
    tensors.o = cuda.engine().zeros(qo_len)?;
    let StampedCall { call, schedule, .. } = cuda.stamp(&plan, tensors, RUNS)?;
    Ok(Measurement {
        batch: design.name.clone(),
        kernel_family: model.kernel_family,
        head_dim: model.head_dim,
        call_ns: call.as_secs_f64() * 1e9,
        items_ns: schedule.span_ns() as f64,
        merged_bytes: plan.merged_bytes(),
        items: item_times(&plan, design.is_cached, &schedule),
    })
}

/// What the work items took that were done while the device was full, those that are alike together.
fn item_times(plan: &Plan, is_cached: bool, schedule: &Schedule) -> Vec<ItemTime> {
    let works: Vec<ItemWork> = plan
        .work(plan.model())
        .zip(plan.items())
        .map(|(work, item)| if is_cached { cached(work, item, plan) } else { work })
        .collect();
    let groups = plan.heads().num_groups as usize;
    let mut times: Vec<ItemTime> = Vec::new();
    for (task, time) in schedule.tasks_of_full_device() {
        let work = works[task / groups];
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
                ..estimate
            };
            let measure = |design: &Design| {
                let batch = design.batch(shape, &truth, 131_072).expect("a good batch");
                let plan = Planner::new(truth).with_packing(Packing::Unshared).plan(&batch).expect("it can be planned");
                let schedule = Schedule::predicted(&plan, &truth);
                // Of the cached designs the plan predicts something else.
                let items = if design.is_cached { vec![] } else { item_times(&plan, false, &schedule) };
                Measurement {
                    batch: design.name.clone(),
                    kernel_family: truth.kernel_family,
                    head_dim: truth.head_dim,
                    call_ns: plan.explain(&truth).predicted_us * 1e3,
                    items_ns: schedule.span_ns() as f64,
                    merged_bytes: plan.merged_bytes(),
                    items,
                }
            };
            let measurements: Vec<_> = designs::all().iter().map(measure).collect();
            let (model, fit) = fit(&estimate, &measurements);
            assert!(fit.median_error < 0.005, "{fit:?}");
            assert!((model.bytes_per_s / truth.bytes_per_s - 1.0).abs() < 0.03, "{model:?}");
            assert!((model.flops_per_s / truth.flops_per_s - 1.0).abs() < 0.05, "{model:?}");
            assert!((model.launch_ns - truth.launch_ns).abs() < 10.0 && (model.merge_ns - truth.merge_ns).abs() < 50.0);
        }
    }
}
