//! K and V in FP8 that are made what Q is before attention.

use std::num::NonZeroU32;

use float8::F8E4M3;
use half::{bf16, f16};
use packinfer::{Batch, DeviceModel, Engine, KvDType, Mask, Packing, PageOrder, PagedLayout, Plan};
use packinfer_abi::TALL_TILE_ROWS;

use crate::case::{self, Case, Element, engine, in_pages, paged, shape};

/// Head dimensions that there are kernels for tall tiles for.
const HEAD_DIMS: [u32; 3] = [64, 96, 128];
/// Prompts and chunks; the numbers of slots are odd ones.
const LENGTHS: [(u32, u32); 5] = [(193, 193), (300, 901), (128, 1128), (385, 385), (40, 300)];

/// A plan that has K and V made what Q is, though the batch is small; if the engine has kernels for it.
fn plan_widened<E: Element>(engine: &Engine, case: &Case<E, F8E4M3>) -> Option<Plan> {
    let plan = case.plan_for_hopper(engine, |model| DeviceModel { launch_ns: 0.0, bytes_per_s: 1e16, ..model })?;
    assert!(plan.widening().is_some(), "{:?}", case.batch.shape());
    assert_eq!(plan.heads().wide_tile_rows, TALL_TILE_ROWS);
    Some(plan)
}

/// With scales of their own for each head.
fn case_of<E: Element>(batch: Batch) -> Case<E, F8E4M3> {
    let mut case = Case::new(batch);
    case.k_scales = Some(vec![0.3, 1.7]);
    case.v_scales = Some(vec![5.0, 0.02]);
    case
}

fn check_shapes<E: Element + PartialEq>() {
    case::check_shapes(&HEAD_DIMS, &[1, 4, 6, 7, 16], &[1, 16, 100], &LENGTHS, case_of::<E>, plan_widened);
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
    for mask in [Mask::Causal, Mask::None] {
        for head_dim in HEAD_DIMS {
            for logit_soft_cap in [None, Some(2.0)] {
                let shape = shape::<bf16>(4, head_dim).with_kv_dtype(KvDType::E4m3);
                let mut case = case_of::<bf16>(paged(shape, mask, &LENGTHS, 16));
                case.sinks = Some((0..shape.num_qo_heads()).map(|head| 3.0 * head as f32 - 9.0).collect());
                case.logit_soft_cap = logit_soft_cap;
                let Some(plan) = plan_widened(engine, &case) else { return };
                case.check_plan(engine, &plan);
                (case.k_scales, case.v_scales) = (None, None);
                case.check_plan(engine, &plan);
            }
        }
    }
}

#[test]
fn pages_of_other_engines() {
    let Some(engine) = engine() else { return };
    for order in [PageOrder::Nhd, PageOrder::Hnd] {
        for (page_size, page_stride) in [(8, 1), (24, 6), (64, 2)] {
            let page_stride = NonZeroU32::new(page_stride).expect("not zero");
            let pages = PagedLayout::new(page_size, order).expect("a good size").with_stride(page_stride);
            for head_dim in HEAD_DIMS {
                let shape = shape::<f16>(4, head_dim).with_kv_dtype(KvDType::E4m3);
                let batch = Batch::in_layout(shape, Mask::Causal, pages.into()).expect("a good layout");
                let case = case_of::<f16>(in_pages(batch, &LENGTHS, page_size));
                let Some(plan) = plan_widened(engine, &case) else { return };
                case.check_plan(engine, &plan);
            }
        }
    }
}

/// Prompts behind a prefix that they share, whose slots are made once.
#[test]
fn shared_prefixes() {
    let Some(engine) = engine() else { return };
    let shape = shape::<bf16>(4, 128).with_kv_dtype(KvDType::E4m3);
    let mut batch = Batch::new(shape, Mask::Causal);
    for request in 0..6 {
        let block_table: Vec<u32> = (0..32).rev().chain(100 * (request + 1)..100 * (request + 1) + 20).collect();
        batch.push_paged(300, 32 * 16 + 311, &block_table, 16).expect("a good request");
    }
    let case = case_of::<bf16>(batch);
    let Some(plan) = plan_widened(engine, &case) else { return };
    assert_eq!(plan.widening().map(|widening| widening.num_slots()), Some(512 + 6 * 311));
    case.check_plan(engine, &plan);
}

/// A workspace that grows for the second plan and is kept for the first; layers of other K and V; and a graph.
#[test]
fn plans_share_a_workspace() {
    let Some(engine) = engine() else { return };
    let shape = shape::<bf16>(4, 64).with_kv_dtype(KvDType::E4m3);
    let small = case_of::<bf16>(paged(shape, Mask::Causal, &LENGTHS[..2], 16));
    let large = case_of::<bf16>(paged(shape, Mask::Causal, &LENGTHS, 16));
    let decode = case_of::<bf16>(paged(shape, Mask::Causal, &[(1, 500), (1, 77)], 16));
    let stream = engine.stream().expect("a stream");
    let mut workspace = engine.workspace().expect("there is room");
    let (Some(of_small), Some(of_large)) = (plan_widened(engine, &small), plan_widened(engine, &large)) else { return };
    let of_decode = decode.plan(engine, Packing::Packed);
    let cases = [&small, &large, &decode, &small, &large];
    let plans = [&of_small, &of_large, &of_decode, &of_small, &of_large];
    for (case, plan) in cases.into_iter().zip(plans) {
        let plan = engine.upload(plan, &stream).expect("the plan fits");
        let mut device = case.on_device(engine);
        device.run(engine, &plan, &mut workspace, &stream).expect("the run is right");
        case.check(&device.results());
    }

    let plan = engine.upload(&of_large, &stream).expect("the plan fits");
    let mut device = large.on_device(engine);
    device.run(engine, &plan, &mut workspace, &stream).expect("the run is right");
    let expected = device.results();
    let graph = engine.capture(&stream, |stream| device.run(engine, &plan, &mut workspace, stream));
    let graph = graph.expect("the second time needs nothing new");
    device.o.upload(&vec![bf16::ZERO; expected.0.len()]).expect("it fits");
    // SAFETY: plan, workspace and tensors are alive.
    unsafe { graph.launch(&stream) }.expect("the graph runs");
    stream.synchronize().expect("the work is done");
    assert!(device.results() == expected, "the graph gave something else");
}
