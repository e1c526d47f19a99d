//! When K and V in FP8 are made what Q is before attention.

mod check;

use packinfer_batch::{AttentionShape, Batch, DType, KvDType, Mask};
use packinfer_planner::{DeviceModel, Packing, Plan, Planner};

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

/// A plan's memory leaves nothing behind for one that is not widened.
#[test]
fn plans_take_turns() {
    let mut planner = planner();
    let widened = batch(128, Mask::Causal, 0, &[(1500, 1500), (2000, 2000)]);
    let decodes = batch(128, Mask::Causal, 0, &[(1, 3000); 40]);
    let mut plan = plan_by(&mut planner, &widened);
    let of_widened = format!("{plan:?}");
    for _ in 0..2 {
        planner.plan_into(&decodes, &mut plan).expect("a batch that can be planned");
        check::assert_valid(&decodes, &plan);
        assert!(plan.widening().is_none());
        planner.plan_into(&widened, &mut plan).expect("a batch that can be planned");
        assert_eq!(format!("{plan:?}"), of_widened);
    }
}
