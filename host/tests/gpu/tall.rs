//! Launches of wide tiles alone, which have 192 rows where there are kernels for that.

use half::{bf16, f16};
use packinfer::{DeviceModel, Engine, Mask, Packing, Plan};
use packinfer_abi::{DIRECT, KvRun, TALL_TILE_ROWS};

use crate::case::{self, Case, Element, contiguous, engine, paged, shape};

/// Query heads of a KV head: some that divide the 64 rows of a consumer, and some that do not.
const GQA_RATIOS: [u32; 5] = [1, 4, 6, 7, 16];
/// Head dimensions that there are such kernels for.
const HEAD_DIMS: [u32; 3] = [64, 96, 128];

/// Prompts and chunks, whose last tiles have one row and more.
const LENGTHS: [(u32, u32); 7] = [(193, 193), (300, 900), (128, 128), (700, 1500), (140, 2000), (385, 385), (40, 300)];

/// A plan with the kernels for Hopper, if the engine has them; its tiles are tall.
fn plan_tall<E: Element>(engine: &Engine, case: &Case<E>, change: impl Fn(DeviceModel) -> DeviceModel) -> Option<Plan> {
    let plan = case.plan_for_hopper(engine, change)?;
    assert_eq!(plan.heads().wide_tile_rows, TALL_TILE_ROWS, "{:?}", case.batch.shape());
    Some(plan)
}

fn check_shapes<E: Element + PartialEq>() {
    let plan = |engine: &Engine, case: &Case<E>| plan_tall(engine, case, |model| model);
    case::check_shapes(&HEAD_DIMS, &GQA_RATIOS, &[1, 16, 100], &LENGTHS, Case::new, plan);
}

#[test]
fn all_shapes_in_bf16() {
    check_shapes::<bf16>();
}

#[test]
fn all_shapes_in_f16() {
    check_shapes::<f16>();
}

#[test]
fn masks_sinks_and_soft_caps() {
    let Some(engine) = engine() else { return };
    for mask in [Mask::Causal, Mask::None, Mask::Window(200.try_into().expect("not zero"))] {
        for head_dim in HEAD_DIMS {
            for logit_soft_cap in [None, Some(2.0)] {
                let shape = shape::<bf16>(4, head_dim);
                let mut case = Case::<bf16>::new(paged(shape, mask, &LENGTHS, 16));
                case.sinks = Some((0..shape.num_qo_heads()).map(|head| 3.0 * head as f32 - 9.0).collect());
                case.logit_soft_cap = logit_soft_cap;
                let Some(plan) = plan_tall(engine, &case, |model| model) else { return };
                case.check_plan(engine, &plan);
            }
        }
    }
}

/// What K of a step's columns is multiplied with, step after step: scores are then far above all before them, by what a sum of
/// exponentials in float16 cannot hold (8) and one in float32 neither (64).
const JUMPS: [f32; 9] = [1.0, 0.5, 8.0, 1.0, 64.0, 2.0, 100.0, 64.0, 0.1];
/// Columns of a step of the kernels for tall tiles.
const STEP_COLUMNS: usize = 128;

fn check_jumps<E: Element + PartialEq>() {
    let Some(engine) = engine() else { return };
    for head_dim in HEAD_DIMS {
        for logit_soft_cap in [None, Some(90.0)] {
            let mut case = Case::<E>::new(contiguous(shape::<E>(4, head_dim), Mask::Causal, &[(700, 2100)]));
            case.logit_soft_cap = logit_soft_cap;
            case.change_k(|slot, number| E::from_f32(Into::<f32>::into(number) * JUMPS[slot / STEP_COLUMNS % JUMPS.len()]));
            let Some(plan) = plan_tall(engine, &case, |model| model) else { return };
            case.check_plan(engine, &plan);
        }
    }
}

#[test]
fn scores_that_jump_in_bf16() {
    check_jumps::<bf16>();
}

#[test]
fn scores_that_jump_in_f16() {
    check_jumps::<f16>();
}

/// Prompts of all lengths up to a tile's, several to a tile, and some of so few rows that others would be narrow.
#[test]
fn short_prompts_share_tiles() {
    let Some(engine) = engine() else { return };
    for head_dim in HEAD_DIMS {
        for (gqa_ratio, most) in [(4, 90), (7, 60), (1, 300)] {
            let lengths: Vec<_> = (0..200).map(|request| 1 + request * 37 % most).map(|tokens| (tokens, tokens)).collect();
            let case = Case::<f16>::new(paged(shape::<f16>(gqa_ratio, head_dim), Mask::Causal, &lengths, 16));
            // Where there are few multiprocessors, each has so much to do that tiles may be long.
            let Some(plan) = plan_tall(engine, &case, |model| DeviceModel { num_sms: 2, ..model }) else { return };
            assert!(plan.items().iter().any(|item| item.num_segments > 2), "no tile has several requests");
            case.check_plan(engine, &plan);
        }
    }
}

/// Partials, merged when no task is left.
#[test]
fn partials_are_merged() {
    let Some(engine) = engine() else { return };
    for head_dim in HEAD_DIMS {
        for gqa_ratio in GQA_RATIOS {
            let mut batch = contiguous(shape::<bf16>(gqa_ratio, head_dim), Mask::Causal, &[]);
            let runs = (0..300).rev().map(|run| KvRun { first_slot: 50 * run, num_slots: 30 + run % 20 });
            let runs: Vec<_> = runs.collect();
            batch.push_runs(200, runs.iter().map(|run| run.num_slots).sum(), runs).expect("good runs");
            let case = Case::<bf16>::new(batch);
            let Some(plan) = plan_tall(engine, &case, |model| DeviceModel { merge_ns: 0.0, ..model }) else { return };
            assert!(plan.items().iter().any(|item| item.partial_row != DIRECT), "no item is split");
            case.check_plan(engine, &plan);
        }
    }
}

/// Plans of other kernels before and after it, with one workspace.
#[test]
fn other_kernels_take_turns_with_it() {
    let Some(engine) = engine() else { return };
    let shape = shape::<bf16>(4, 128);
    let decodes: Vec<_> = (1..50).map(|request| (1, 40 * request)).collect();
    let prefill = Case::<bf16>::new(paged(shape, Mask::Causal, &LENGTHS, 16));
    let Some(plan) = plan_tall(engine, &prefill, |model| model) else { return };
    let decode = Case::<bf16>::new(paged(shape, Mask::Causal, &decodes, 16));
    let stream = engine.stream().expect("a stream");
    let mut workspace = engine.workspace().expect("there is room");
    let plans = [&plan, &decode.plan(engine, Packing::Packed)].map(|plan| engine.upload(plan, &stream).expect("the plan fits"));
    for (case, plan) in [&prefill, &decode, &prefill].into_iter().zip([&plans[0], &plans[1], &plans[0]]) {
        let mut device = case.on_device(engine);
        device.run(engine, plan, &mut workspace, &stream).expect("the run is right");
        case.check(&device.results());
    }
}
