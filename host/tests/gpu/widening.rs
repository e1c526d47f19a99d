//! K and V in FP8 that are made what Q is before attention: for all tiles, or for wide ones that others are done beside.

use std::num::NonZeroU32;

use float8::F8E4M3;
use half::{bf16, f16};
use packinfer::{Batch, DeviceModel, Engine, KvDType, Mask, Packing, PageOrder, PagedLayout, Plan, WideTileWidening};
use packinfer_abi::{DIRECT, KvRun, TALL_TILE_ROWS, TileKind};

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

/// Head dimensions that there are kernels for that do narrow tiles beside wide ones.
const BESIDE_HEAD_DIMS: [u32; 2] = [64, 128];

/// Prompts and chunks of prompts beside decodes of all lengths; the numbers of slots are odd ones.
fn mixed_lengths() -> Vec<(u32, u32)> {
    let decodes = (0..40).map(|request| (1, 1 + request * request * 3 % 4000));
    [(300, 901), (128, 128), (701, 1500), (63, 63)].into_iter().chain(decodes).collect()
}

/// A plan that has K and V of wide tiles alone made what Q is, though the batch is small; if the engine has kernels for it.
fn plan_for_wide_tiles<E: Element>(engine: &Engine, case: &Case<E, F8E4M3>) -> Option<Plan> {
    let plan = case.plan_beside(engine, |model| model)?;
    assert!(plan.wide_tile_widening().is_some(), "{:?}", case.batch.shape());
    Some(plan)
}

fn check_shapes_for_wide_tiles<E: Element + PartialEq>() {
    let (head_dims, lengths) = (&BESIDE_HEAD_DIMS, mixed_lengths());
    case::check_shapes(head_dims, &[1, 4, 7, 16], &[16, 100], &lengths, case_of::<E>, plan_for_wide_tiles);
}

#[test]
fn for_wide_tiles_all_shapes_in_bf16() {
    check_shapes_for_wide_tiles::<bf16>();
}

#[test]
fn for_wide_tiles_all_shapes_in_f16() {
    check_shapes_for_wide_tiles::<f16>();
}

/// With a soft-cap, for which there is no such kernel, all tiles read what is stored.
#[test]
fn for_wide_tiles_masks_sinks_and_soft_caps() {
    let Some(engine) = engine() else { return };
    // Two tokens of a request, and several requests, in tiles of sixteen rows.
    let drafts = (0..30).map(|request| (2, 2 + request * 97 % 1800));
    let lengths: Vec<_> = mixed_lengths().into_iter().chain(drafts).collect();
    for mask in [Mask::Causal, Mask::None, Mask::Window(200.try_into().expect("not zero"))] {
        for head_dim in BESIDE_HEAD_DIMS {
            let shape = shape::<bf16>(4, head_dim).with_kv_dtype(KvDType::E4m3);
            let mut case = case_of::<bf16>(paged(shape, mask, &lengths, 16));
            case.sinks = Some((0..shape.num_qo_heads()).map(|head| 3.0 * head as f32 - 9.0).collect());
            let Some(plan) = plan_for_wide_tiles(engine, &case) else { return };
            for logit_soft_cap in [None, Some(2.0)] {
                case.logit_soft_cap = logit_soft_cap;
                case.check_plan(engine, &plan);
            }
            (case.k_scales, case.v_scales, case.logit_soft_cap) = (None, None, None);
            case.check_plan(engine, &plan);
        }
    }
}

#[test]
fn for_wide_tiles_pages_of_other_engines() {
    let Some(engine) = engine() else { return };
    for order in [PageOrder::Nhd, PageOrder::Hnd] {
        for (page_size, page_stride) in [(8, 1), (24, 6), (64, 2)] {
            let page_stride = NonZeroU32::new(page_stride).expect("not zero");
            let pages = PagedLayout::new(page_size, order).expect("a good size").with_stride(page_stride);
            for head_dim in BESIDE_HEAD_DIMS {
                let shape = shape::<f16>(4, head_dim).with_kv_dtype(KvDType::E4m3);
                let batch = Batch::in_layout(shape, Mask::Causal, pages.into()).expect("a good layout");
                let case = case_of::<f16>(in_pages(batch, &mixed_lengths(), page_size));
                let Some(plan) = plan_for_wide_tiles(engine, &case) else { return };
                case.check_plan(engine, &plan);
            }
        }
    }
}

/// Chunks and decodes behind a prefix that all of them share, and decodes that share another one.
#[test]
fn for_wide_tiles_shared_prefixes() {
    let Some(engine) = engine() else { return };
    for head_dim in BESIDE_HEAD_DIMS {
        let shape = shape::<bf16>(4, head_dim).with_kv_dtype(KvDType::E4m3);
        let mut batch = Batch::new(shape, Mask::Causal);
        for request in 0..60 {
            let query_len = if request < 3 { 300 } else { 1 };
            let prefix = if request < 40 { 0..32 } else { 32..96 };
            let own = 311 + 50 * (request % 30);
            let kv_len = 16 * prefix.len() as u32 + own;
            let first = 100 + 120 * request;
            let block_table: Vec<u32> = prefix.rev().chain(first..first + own.div_ceil(16)).collect();
            batch.push_paged(query_len, kv_len, &block_table, 16).expect("a good request");
        }
        let case = case_of::<bf16>(batch);
        let Some(plan) = plan_for_wide_tiles(engine, &case) else { return };
        let made = plan.wide_tile_widening().map(|WideTileWidening { widening, .. }| u64::from(widening.num_slots()));
        assert!(made.is_some_and(|made| made < case.batch.distinct_slots()), "{made:?}");
        case.check_plan(engine, &plan);
    }
}

/// Partials of both kinds of tiles, merged when no task is left.
#[test]
fn for_wide_tiles_partials_are_merged() {
    let Some(engine) = engine() else { return };
    for head_dim in BESIDE_HEAD_DIMS {
        for gqa_ratio in [1, 4, 7, 16] {
            let shape = shape::<f16>(gqa_ratio, head_dim).with_kv_dtype(KvDType::E4m3);
            let mut batch = paged(shape, Mask::Causal, &mixed_lengths(), 16);
            let first_slot = batch.num_slots();
            batch.push_contiguous(200, 20_000, first_slot).expect("good lengths");
            let runs = (0..300).rev().map(|run| KvRun { first_slot: 50 * run, num_slots: 30 + run % 20 });
            let runs: Vec<_> = runs.collect();
            batch.push_runs(1, runs.iter().map(|run| run.num_slots).sum(), runs).expect("good runs");
            let case = case_of::<f16>(batch);
            let Some(plan) = plan_for_wide_tiles(engine, &case) else { return };
            for kind in [TileKind::Wide, TileKind::Narrow] {
                let mut items = plan.items().iter();
                assert!(items.any(|item| item.partial_row != DIRECT && item.tile == kind), "no {kind:?} item is split");
            }
            case.check_plan(engine, &plan);
        }
    }
}

/// Plans of all kinds in turn, with and without a soft-cap, with a workspace that grows; and a graph.
#[test]
fn for_wide_tiles_plans_share_a_workspace() {
    let Some(engine) = engine() else { return };
    let shape = shape::<bf16>(4, 128).with_kv_dtype(KvDType::E4m3);
    let small = case_of::<bf16>(paged(shape, Mask::Causal, &mixed_lengths()[1..], 16));
    let mut large = case_of::<bf16>(paged(shape, Mask::Causal, &mixed_lengths(), 16));
    let prompts = case_of::<bf16>(paged(shape, Mask::Causal, &LENGTHS, 16));
    let decode = case_of::<bf16>(paged(shape, Mask::Causal, &[(1, 500), (1, 77)], 16));
    let (Some(of_small), Some(of_large)) = (plan_for_wide_tiles(engine, &small), plan_for_wide_tiles(engine, &large)) else {
        return;
    };
    let Some(of_prompts) = plan_widened(engine, &prompts) else { return };
    let of_decode = decode.plan(engine, Packing::Packed);
    let stream = engine.stream().expect("a stream");
    let mut workspace = engine.workspace().expect("there is room");
    let plans = [&of_small, &of_prompts, &of_large, &of_decode];
    let plans = plans.map(|plan| engine.upload(plan, &stream).expect("the plan fits"));
    for logit_soft_cap in [None, Some(2.0), None] {
        large.logit_soft_cap = logit_soft_cap;
        for (case, plan) in [&small, &prompts, &large, &decode].into_iter().zip(&plans) {
            let mut device = case.on_device(engine);
            device.run(engine, plan, &mut workspace, &stream).expect("the run is right");
            case.check(&device.results());
        }
    }

    // One plan after the other in the same memory.
    let [mut plan, ..] = plans;
    for (case, of_case) in [(&large, &of_large), (&decode, &of_decode), (&small, &of_small), (&large, &of_large)] {
        engine.upload_into(&mut plan, of_case, &stream).expect("the plan fits");
        let mut device = case.on_device(engine);
        device.run(engine, &plan, &mut workspace, &stream).expect("the run is right");
        case.check(&device.results());
    }

    let mut device = large.on_device(engine);
    device.run(engine, &plan, &mut workspace, &stream).expect("the run is right");
    let expected = device.results();
    let graph = engine.capture(&stream, |stream| device.run(engine, &plan, &mut workspace, stream));
    let graph = graph.expect("the second time needs nothing new");
    for _ in 0..3 {
        device.o.upload(&vec![bf16::ZERO; expected.0.len()]).expect("it fits");
        // SAFETY: plan, workspace and tensors are alive.
        unsafe { graph.launch(&stream) }.expect("the graph runs");
        stream.synchronize().expect("the work is done");
        assert!(device.results() == expected, "the graph gave something else");
    }
}
