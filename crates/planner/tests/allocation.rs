//! A planner that has seen a batch plans it, and smaller ones, without allocating.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use packinfer_abi::KvRun;
use packinfer_batch::{AttentionShape, Batch, DType, KvDType, Mask};
use packinfer_planner::{DeviceModel, Headroom, KernelFamily, Packing, Planner};

/// The system's allocator, which counts what is asked of it.
struct Counting;

thread_local! {
    /// Those of this thread: the test harness has others, which allocate when they please.
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call is passed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller keeps the contract of `GlobalAlloc::alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `GlobalAlloc::dealloc`, and the memory came from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller keeps the contract of `GlobalAlloc::realloc`, and the memory came from `System`.
        unsafe { System.realloc(pointer, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Decodes, one of them long enough to be split, and prompts that are packed together; `requests` of each. As many decodes share
/// prefixes of two levels.
fn batch(requests: u32) -> Batch {
    let shape = AttentionShape::new(32, 8, 128, DType::Bf16).expect("a good shape");
    let mut batch = Batch::new(shape, Mask::Causal);
    batch.push_contiguous(1, 100_000, 0).expect("a good request");
    for i in 0..requests {
        let pages: Vec<u32> = (0..100).map(|page| (page * 37 + i * 11) % 4096).collect();
        batch.push_paged(1, 64 + 11 * i, &pages, 16).expect("a good request");
        batch.push_paged(20 + i, 20 + i, &pages, 16).expect("a good request");
        let levels = [(0, 4096), (10_000 * (1 + i % 4), 2048), (100_000 + 200 * i, 1 + i)];
        let runs = levels.map(|(first_slot, num_slots)| KvRun { first_slot, num_slots });
        batch.push_runs(1, 4096 + 2048 + 1 + i, runs).expect("a good request");
    }
    batch
}

#[test]
fn warm_planner_allocates_nothing() {
    let packings = [Packing::Packed, Packing::Unshared, Packing::PerRequest];
    for model in DeviceModel::all_for_device("NVIDIA H100 80GB HBM3", (9, 0), 132) {
        packings.iter().for_each(|&packing| check(model, packing));
    }
}

/// Plans batches with a cold and with a warm planner.
fn check(model: DeviceModel, packing: Packing) {
    let (large, small) = (batch(128), batch(64));
    let mut planner = Planner::new(model).with_packing(packing);
    let cold = ALLOCATIONS.get();
    let mut plan = planner.plan(&large).expect("a batch that can be planned");
    assert!(ALLOCATIONS.get() > cold, "the allocator does not count");
    planner.plan_into(&small, &mut plan).expect("a batch that can be planned");
    let warm = ALLOCATIONS.get();
    for batch in [&large, &small] {
        planner.plan_into(batch, &mut plan).expect("a batch that can be planned");
    }
    assert_eq!(ALLOCATIONS.get() - warm, 0, "{packing:?}, {}", model.kernel_family);
    let has_queues = (plan.num_front_items() as usize) < plan.items().len();
    let chooses_queues = model.kernel_family == KernelFamily::Sm90a && packing == Packing::Packed;
    assert!(has_queues || !chooses_queues, "the batch needs no queues");
    assert_eq!(plan.merge_tokens().is_empty(), packing == Packing::PerRequest);
    assert_eq!(plan.explain(plan.model()).shared_tiles > 0, packing == Packing::Packed);
}

/// Prompts behind a shared prefix whose K and V, in FP8, are made what Q is.
#[test]
fn nor_where_kv_is_widened() {
    let batch = |requests: u32| {
        let shape = AttentionShape::new(32, 8, 128, DType::Bf16).expect("a good shape").with_kv_dtype(KvDType::E4m3);
        let mut batch = Batch::new(shape, Mask::Causal);
        for request in 0..requests {
            let pages: Vec<u32> = (0..20).chain(20 + 100 * request..120 + 100 * request).rev().collect();
            batch.push_paged(600 + request, 1600 + request, &pages, 16).expect("a good request");
        }
        batch
    };
    let (large, small) = (batch(12), batch(6));
    let mut planner = Planner::choosing(DeviceModel::all_for_device("NVIDIA H100 80GB HBM3", (9, 0), 132));
    let mut plan = planner.plan(&large).expect("a batch that can be planned");
    planner.plan_into(&small, &mut plan).expect("a batch that can be planned");
    let warm = ALLOCATIONS.get();
    for batch in [&large, &small] {
        planner.plan_into(batch, &mut plan).expect("a batch that can be planned");
        assert!(plan.widening().is_some());
    }
    assert_eq!(ALLOCATIONS.get() - warm, 0);
}

/// Chunks of prompts beside decodes, in FP8: what wide tiles read is made what Q is, or nothing is.
#[test]
fn nor_where_kv_of_wide_tiles_is_widened() {
    let batch = |chunks: u32, decodes: u32| {
        let shape = AttentionShape::new(32, 8, 128, DType::Bf16).expect("a good shape").with_kv_dtype(KvDType::E4m3);
        let mut batch = Batch::new(shape, Mask::Causal);
        for request in 0..chunks + decodes {
            let pages: Vec<u32> = (0..20).chain(20 + 400 * request..420 + 400 * request).rev().collect();
            let (query_len, kv_len) = if request < chunks { (2000, 6000) } else { (1, 1200) };
            batch.push_paged(query_len, kv_len + request, &pages, 16).expect("a good request");
        }
        batch
    };
    let batches = [batch(4, 100), batch(3, 80), batch(0, 150)];
    let mut planner = Planner::choosing(DeviceModel::all_for_device("NVIDIA H100 80GB HBM3", (9, 0), 132));
    let mut plan = planner.plan(&batches[0]).expect("a batch that can be planned");
    batches.iter().for_each(|batch| planner.plan_into(batch, &mut plan).expect("a batch that can be planned"));
    let warm = ALLOCATIONS.get();
    for (batch, is_widened) in batches.iter().zip([true, true, false]) {
        planner.plan_into(batch, &mut plan).expect("a batch that can be planned");
        assert_eq!(plan.wide_tile_widening().is_some(), is_widened);
    }
    assert_eq!(ALLOCATIONS.get() - warm, 0);
}

#[test]
fn steps_of_a_plan_allocate_nothing() {
    let mut batch = Batch::new(AttentionShape::new(32, 8, 128, DType::Bf16).expect("a good shape"), Mask::Causal);
    for i in 0..256 {
        batch.push_contiguous(1, 100 + 16 * i, 10_000 * i).expect("a good request");
    }
    let mut planner = Planner::new(DeviceModel::H100).with_headroom(Headroom { steps: 64, runs: 1 });
    let mut plan = planner.plan(&batch).expect("a batch that can be planned");
    let mut slots: Vec<u32> = (0..256).map(|i| 10_000 * i + 100 + 16 * i).collect();
    let warm = ALLOCATIONS.get();
    for _ in 0..64 {
        plan.append(&slots).expect("there is room");
        slots.iter_mut().for_each(|slot| *slot += 1);
    }
    assert_eq!(ALLOCATIONS.get() - warm, 0);
}
