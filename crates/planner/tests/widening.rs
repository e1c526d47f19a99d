//! When K and V in FP8 are made what Q is before attention.

mod check;

use std::num::NonZeroU32;

use packinfer_abi::{KvRun, TileKind};
use packinfer_batch::{AttentionShape, Batch, DType, KvDType, KvLayout, Mask, PageOrder, PagedLayout};
use packinfer_planner::{DeviceModel, Headroom, KvTensors, NarrowItems, Packing, Plan, Planner, Schedule};

/// A batch in FP8, each request with pages of its own, after `shared` pages of 16 slots that all begin with.
fn batch(head_dim: u32, mask: Mask, shared: u32, lengths: &[(u32, u32)]) -> Batch {
    let shape = AttentionShape::new(32, 8, head_dim, DType::Bf16).expect("a good shape").with_kv_dtype(KvDType::E4m3);
    let mut batch = Batch::new(shape, mask);
    let mut next = 1000;
    for &(query_len, kv_len) in lengths {
        let own = kv_len.div_ceil(16) - shared;
        let pages: Vec<u32> = (0..shared).rev().chain((next..next + own).rev()).collect();
        next += own;
        batch.push_paged(query_len, kv_len, &pages, 16).expect("a good request");
    }
    batch
}

fn planner() -> Planner {
    Planner::choosing(DeviceModel::all_for_device("NVIDIA H100 80GB HBM3", (9, 0), 132))
}

fn plan_by(planner: &mut Planner, batch: &Batch) -> Plan {
    let plan = planner.plan(batch).expect("a batch that can be planned");
    check::assert_valid(batch, &plan);
    check::assert_in_order(batch, &plan, plan.model());
    plan
}

fn is_widened(batch: &Batch) -> bool {
    plan_by(&mut planner(), batch).widening().is_some()
}

#[test]
fn where_products_are_many() {
    let prompts = [(1500, 1500), (2000, 2000), (900, 3000)];
    for head_dim in AttentionShape::HEAD_DIMS {
        // There are no tall tiles for the largest.
        assert_eq!(is_widened(&batch(head_dim, Mask::Causal, 0, &prompts)), head_dim <= 128, "{head_dim}");
    }
    assert!(is_widened(&batch(128, Mask::None, 0, &prompts)));
    // A window longer than all requests leaves nothing out.
    assert!(is_widened(&batch(128, Mask::Window(4000.try_into().expect("not zero")), 0, &prompts)));
    assert!(!is_widened(&batch(128, Mask::Window(500.try_into().expect("not zero")), 0, &prompts)));

    // Decodes, and few new tokens behind a long prefix, read K and V but a few times.
    assert!(!is_widened(&batch(128, Mask::Causal, 0, &[(1, 3000); 40])));
    assert!(!is_widened(&batch(128, Mask::Causal, 0, &[(40, 30_000); 4])));
    assert!(!is_widened(&batch(128, Mask::Causal, 0, &[])));
    let mut beside_decodes = prompts.to_vec();
    beside_decodes.extend([(1, 3000); 100]);
    assert!(!is_widened(&batch(128, Mask::Causal, 0, &beside_decodes)));
}

#[test]
fn where_there_is_memory_for_it() {
    let batch = batch(128, Mask::Causal, 0, &[(1500, 1500), (2000, 2000)]);
    // K and V of 3500 tokens in bf16.
    let bytes = 3500 * 2 * 8 * 128 * 2;
    let is_widened = |most_bytes| plan_by(&mut planner().with_widening(most_bytes), &batch).widening().is_some();
    assert_eq!([0, bytes - 1, bytes].map(is_widened), [false, false, true]);
}

#[test]
fn only_where_requests_are_packed() {
    let batch = batch(128, Mask::Causal, 0, &[(1500, 1500), (2000, 2000)]);
    let is_widened = |packing| plan_by(&mut planner().with_packing(packing), &batch).widening().is_some();
    assert_eq!([Packing::Packed, Packing::Unshared, Packing::PerRequest].map(is_widened), [true, true, false]);
}

/// Slots that several requests have are made once; those of a request follow each other, whatever its pages do.
#[test]
fn slots_follow_each_other() {
    let batch = batch(128, Mask::Causal, 32, &[(900, 1700); 4]);
    let plan = plan_by(&mut planner(), &batch);
    let widening = plan.widening().expect("K and V are made what Q is");
    assert_eq!(widening.num_slots(), 512 + 4 * (1700 - 512));
    assert_eq!(plan.attended().num_slots, widening.num_slots());
    let runs: std::collections::HashSet<_> = plan.runs().iter().map(|run| (run.first_slot, run.num_slots)).collect();
    assert!(runs.len() <= 9, "{runs:?}");
    let explanation = plan.explain(plan.model());
    assert_eq!(explanation.widening_bytes, 3 * u64::from(widening.num_slots()) * batch.shape().kv_bytes_per_slot());
    assert!(explanation.predicted_us > 1e-3 * plan.model().launch_ns * 2.0);
}

/// A plan's memory leaves nothing behind for one that is not widened, or for wide tiles alone.
#[test]
fn plans_take_turns() {
    let mut planner = planner();
    let prompts = batch(128, Mask::Causal, 0, &[(1500, 1500), (2000, 2000)]);
    let decodes = batch(128, Mask::Causal, 0, &[(1, 3000); 40]);
    let mixed = batch(128, Mask::Causal, 0, &mixed_lengths());
    let batches = [&prompts, &decodes, &mixed, &decodes, &prompts, &mixed];
    let expected = batches.map(|batch| format!("{:?}", plan_by(&mut self::planner(), batch)));
    let mut plan = plan_by(&mut planner, &mixed);
    for (batch, expected) in batches.into_iter().zip(expected) {
        planner.plan_into(batch, &mut plan).expect("a batch that can be planned");
        check::assert_valid(batch, &plan);
        assert_eq!(format!("{plan:?}"), expected);
    }
}

/// Chunks of prompts beside decodes.
fn mixed_lengths() -> Vec<(u32, u32)> {
    [(2000, 6000), (500, 500)].into_iter().chain((0..50).map(|request| (1, 1000 + 10 * request))).collect()
}

/// Slots that are made for wide tiles alone, if any are.
fn made_for_wide_tiles(plan: &Plan) -> Option<u32> {
    plan.wide_tile_widening().map(|of_wide| of_wide.widening.num_slots())
}

#[test]
fn for_wide_tiles_where_others_are_beside_them() {
    let made = |batch: &Batch| made_for_wide_tiles(&plan_by(&mut planner(), batch));
    // There are kernels for some head dimensions.
    for (head_dim, num_slots) in [(64, Some(6500)), (96, None), (128, Some(6500)), (256, None)] {
        assert_eq!(made(&batch(head_dim, Mask::Causal, 0, &mixed_lengths())), num_slots, "{head_dim}");
    }
    assert_eq!(made(&batch(128, Mask::None, 0, &mixed_lengths())), Some(6500));
    // Not what no query token of a chunk sees.
    let window = Mask::Window(3000.try_into().expect("not zero"));
    assert_eq!(made(&batch(128, window, 0, &mixed_lengths())), Some(2999 + 2000 + 500));

    // A few new tokens read K and V but a few times.
    let few_tokens: Vec<_> = mixed_lengths().into_iter().map(|(query_len, kv_len)| (query_len.min(40), kv_len)).collect();
    assert_eq!(made(&batch(128, Mask::Causal, 0, &few_tokens)), None);
    assert_eq!(made(&batch(128, Mask::Causal, 0, &mixed_lengths()[2..])), None);
    // Chunks alone, or what is not in FP8.
    assert_eq!(made(&batch(128, Mask::Causal, 0, &mixed_lengths()[..2])), None);
    let mut in_bf16 = Batch::new(AttentionShape::new(32, 8, 128, DType::Bf16).expect("a good shape"), Mask::Causal);
    for (query_len, kv_len) in mixed_lengths() {
        in_bf16.push_contiguous(query_len, kv_len, in_bf16.num_slots()).expect("a good request");
    }
    assert_eq!(made(&in_bf16), None);
}

#[test]
fn for_wide_tiles_where_planners_are_to() {
    let batch = batch(128, Mask::Causal, 0, &mixed_lengths());
    let made = |planner: Planner| made_for_wide_tiles(&plan_by(&mut { planner }, &batch)).is_some();
    // K and V of 6500 tokens in bf16.
    let bytes = 6500 * 2 * 8 * 128 * 2;
    assert_eq!([0, bytes - 1, bytes].map(|most_bytes| made(planner().with_widening(most_bytes))), [false, false, true]);
    let packings = [Packing::Packed, Packing::Unshared, Packing::PerRequest];
    assert_eq!(packings.map(|packing| made(planner().with_packing(packing))), [true, true, false]);
    let models = DeviceModel::all_for_device("NVIDIA H100 80GB HBM3", (9, 0), 132).into_iter();
    assert!(!made(Planner::choosing(models.map(|model| DeviceModel { beside: None, ..model }).collect())));
    // A batch of chunks has no room for further steps.
    assert!(made(planner().with_headroom(Headroom { steps: 8, runs: 1 })));
}

/// What wide tiles read follows each other, whatever pages do; narrow ones, and kernels that do nothing beside, read what is
/// stored. The time and the bytes are counted.
#[test]
fn for_wide_tiles_slots_follow_each_other() {
    let batch = batch(128, Mask::Causal, 0, &mixed_lengths());
    let plan = plan_by(&mut planner(), &batch);
    assert_eq!((plan.attended(), plan.stored().shape), (plan.stored(), batch.shape()));
    let items = plan.wide_tile_widening().expect("wide tiles read what is made").items;
    let wide = || items.iter().filter(|item| item.tile == TileKind::Wide);
    let runs: std::collections::HashSet<_> = wide().map(|item| plan.runs()[item.run_begin as usize].num_slots).collect();
    assert_eq!(runs, [6500].into());

    let (model, explanation) = (plan.model(), plan.explain(plan.model()));
    assert!(explanation.narrow_beside_wide);
    assert_eq!(explanation.widening_bytes, 3 * 6500 * batch.shape().kv_bytes_per_slot());
    assert_eq!(explanation.distinct_kv_bytes, batch.distinct_slots() * batch.shape().kv_bytes_per_slot());
    let before_us = explanation.predicted_us - Schedule::predicted(&plan, model).summary().span_us;
    let widening_us = 1e-3 * model.launch_ns + 1e6 * explanation.widening_bytes as f64 / model.bytes_per_s;
    assert!(before_us + 0.01 >= 1e-3 * model.launch_ns + widening_us, "{before_us} µs"); // schedules are in whole ns
    let converting = plan_by(&mut planner().with_widening(0), &batch);
    assert!(explanation.predicted_us < converting.explain(model).predicted_us);
    assert!(explanation.upload_bytes > converting.explain(model).upload_bytes);
}

/// Slots that several chunks have, or that decodes have too, are made once.
#[test]
fn for_wide_tiles_shared_slots_are_made_once() {
    let lengths: Vec<_> = [(1500, 4000); 2].into_iter().chain((0..24).map(|request| (1, 3000 + 10 * request))).collect();
    let batch = batch(128, Mask::Causal, 100, &lengths);
    for packing in [Packing::Packed, Packing::Unshared] {
        let plan = plan_by(&mut planner().with_packing(packing), &batch);
        let made = made_for_wide_tiles(&plan).expect("wide tiles read what is made");
        // With decodes that share a tile, their own columns may be in wide tiles too.
        assert!(made >= 1600 + 2 * 2400 && u64::from(made) < batch.distinct_slots(), "{made}");
        assert!(packing == Packing::Packed || made == 1600 + 2 * 2400, "{made}");
    }
}

/// Requests whose runs are parts of each other's, in another order.
#[test]
fn for_wide_tiles_runs_may_overlap() {
    let run = |first_slot, num_slots| KvRun { first_slot, num_slots };
    let mut batch = self::batch(128, Mask::Causal, 0, &mixed_lengths()[2..37]);
    let first = 200_000;
    let chunks = [
        vec![run(first + 2000, 500), run(first, 2000)],
        vec![run(first + 1000, 1400), run(first + 9000, 7), run(first + 2400, 200)],
        vec![run(first + 9000, 1500)],
    ];
    for runs in chunks {
        batch.push_runs(1490, runs.iter().map(|run| run.num_slots).sum(), runs).expect("a good request");
    }
    assert_eq!(made_for_wide_tiles(&plan_by(&mut planner(), &batch)), Some(2600 + 1500));
}

#[test]
fn for_wide_tiles_in_any_layout() {
    let shape = AttentionShape::new(32, 8, 64, DType::F16).expect("a good shape").with_kv_dtype(KvDType::E4m3);
    for order in [PageOrder::Nhd, PageOrder::Hnd] {
        let pages = PagedLayout::new(16, order).expect("a good size").with_stride(NonZeroU32::new(2).expect("not zero"));
        let mut batch = Batch::in_layout(shape, Mask::Causal, pages.into()).expect("a good layout");
        let mut next = 0;
        for (query_len, kv_len) in mixed_lengths() {
            let pages: Vec<u32> = (next..next + kv_len.div_ceil(16)).rev().collect();
            next += pages.len() as u32;
            batch.push_paged(query_len, kv_len, &pages, 16).expect("a good request");
        }
        let plan = plan_by(&mut planner(), &batch);
        assert_eq!(made_for_wide_tiles(&plan), Some(6500));
        assert_eq!(plan.stored(), KvTensors { shape, layout: KvLayout::Paged(pages), num_slots: batch.num_slots() });
    }
}

/// Whatever is predicted, and whatever K and V are stored in.
#[test]
fn narrow_items_are_done_as_was_said() {
    let few_narrow = [vec![(900, 4000); 4], vec![(1, 200); 3]].concat();
    for lengths in [mixed_lengths(), few_narrow] {
        for head_dim in AttentionShape::HEAD_DIMS {
            let fp8 = batch(head_dim, Mask::Causal, 0, &lengths);
            let mut same = Batch::new(fp8.shape().with_kv_dtype(KvDType::Same), Mask::Causal);
            for request in fp8.requests() {
                let runs = fp8.runs_of(request).iter().copied();
                same.push_runs(request.query_len, request.kv_len, runs).expect("a good request");
            }
            for batch in [fp8, same] {
                let plan = |narrow_items| plan_by(&mut planner().with_narrow_items(narrow_items), &batch);
                let has_kernel = matches!(head_dim, 64 | 128);
                let beside = plan(NarrowItems::Beside);
                assert_eq!(beside.is_beside(), has_kernel, "{:?}", batch.shape());
                let is_fp8 = batch.shape().kv_dtype() == KvDType::E4m3;
                assert_eq!(beside.wide_tile_widening().is_some(), has_kernel && is_fp8, "{:?}", batch.shape());
                assert!(!plan(NarrowItems::InTurn).is_beside());
                for plan in [beside, plan(NarrowItems::InTurn)] {
                    assert!(plan.items().iter().any(|item| item.tile == TileKind::Narrow));
                }
            }
        }
    }
}
