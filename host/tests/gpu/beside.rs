//! Narrow work items beside wide ones, on the same multiprocessor at the same time.

use half::{bf16, f16};
use packinfer::{DeviceModel, Engine, Mask, Packing};
use packinfer_abi::{DIRECT, KvRun, TileKind};

use crate::case::{self, Case, Element, contiguous, engine, paged, shape};

/// Query heads of a KV head.
const GQA_RATIOS: [u32; 4] = [1, 4, 7, 16];
/// Head dimensions that there are such kernels for.
const HEAD_DIMS: [u32; 2] = [64, 128];

/// Prompts and chunks of prompts beside decodes of all lengths.
fn lengths() -> Vec<(u32, u32)> {
    let decodes = (0..40).map(|request| (1, 1 + request * request * 3 % 4000));
    [(300, 900), (128, 128), (700, 1500), (64, 64)].into_iter().chain(decodes).collect()
}

fn check_shapes<E: Element + PartialEq>() {
    let plan = |engine: &Engine, case: &Case<E>| case.plan_beside(engine, |model| model);
    case::check_shapes(&HEAD_DIMS, &GQA_RATIOS, &[1, 3, 16, 100], &lengths(), Case::new, plan);
}

#[test]
fn all_shapes_in_bf16() {
    check_shapes::<bf16>();
}

#[test]
fn all_shapes_in_f16() {
    check_shapes::<f16>();
}

/// Two tokens of a request, and several requests, in tiles of sixteen rows; windows and sinks.
#[test]
fn several_tokens_windows_and_sinks() {
    let Some(engine) = engine() else { return };
    let drafts = (0..30).map(|request| (2, 2 + request * 97 % 1800));
    let lengths: Vec<_> = lengths().into_iter().chain(drafts).collect();
    for mask in [Mask::Causal, Mask::None, Mask::Window(200.try_into().expect("not zero"))] {
        for head_dim in HEAD_DIMS {
            let shape = shape::<bf16>(4, head_dim);
            let mut case = Case::<bf16>::new(paged(shape, mask, &lengths, 16));
            case.sinks = Some((0..shape.num_qo_heads()).map(|head| 3.0 * head as f32 - 9.0).collect());
            let Some(plan) = case.plan_beside(engine, |model| model) else { return };
            case.check_plan(engine, &plan);
        }
    }
}

/// Partials of both kinds of tiles, merged when no task is left.
#[test]
fn partials_are_merged() {
    let Some(engine) = engine() else { return };
    for head_dim in HEAD_DIMS {
        for gqa_ratio in GQA_RATIOS {
            let mut batch = contiguous(shape::<f16>(gqa_ratio, head_dim), Mask::Causal, &lengths());
            let runs = (0..300).rev().map(|run| KvRun { first_slot: 50 * run, num_slots: 30 + run % 20 });
            let runs: Vec<_> = runs.collect();
            batch.push_runs(1, runs.iter().map(|run| run.num_slots).sum(), runs).expect("good runs");
            let case = Case::<f16>::new(batch);
            let slow_memory = |model| DeviceModel { bytes_per_s: 1e10, item_ns: 10.0, merge_ns: 0.0, ..model };
            let Some(plan) = case.plan_beside(engine, slow_memory) else { return };
            let splits = |kind| plan.items().iter().any(|item| item.partial_row != DIRECT && item.tile == kind);
            assert!(splits(TileKind::Narrow), "no narrow item is split");
            case.check_plan(engine, &plan);
        }
    }
}

/// The same plan without and with a soft-cap, for which there is no such kernel, and others before and after it, with one
/// workspace.
#[test]
fn other_kernels_take_turns_with_it() {
    let Some(engine) = engine() else { return };
    let shape = shape::<bf16>(4, 128);
    let decodes: Vec<_> = (1..50).map(|request| (1, 40 * request)).collect();
    let mut mixed = Case::<bf16>::new(paged(shape, Mask::Causal, &lengths(), 16));
    let Some(plan) = mixed.plan_beside(engine, |model| model) else { return };
    let decode = Case::<bf16>::new(paged(shape, Mask::Causal, &decodes, 16));
    let stream = engine.stream().expect("a stream");
    let mut workspace = engine.workspace().expect("there is room");
    let plans = [&plan, &decode.plan(engine, Packing::Packed)].map(|plan| engine.upload(plan, &stream).expect("the plan fits"));
    for soft_cap in [None, Some(2.0), None] {
        mixed.logit_soft_cap = soft_cap;
        for (case, plan) in [&mixed, &decode].into_iter().zip(&plans) {
            let mut device = case.on_device(engine);
            device.run(engine, plan, &mut workspace, &stream).expect("the run is right");
            case.check(&device.results());
        }
    }
}
