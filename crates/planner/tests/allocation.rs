//! A planner that has seen a batch plans it, and smaller ones, without allocating.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use packinfer_abi::KvRun;
use packinfer_batch::{AttentionShape, Batch, DType, Mask};
use packinfer_planner::{DeviceModel, Packing, Planner};

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

/// Decodes, one of them long enough to be split, and prompts that are packed together; `requests` of each. As many decodes share prefixes of
/// two levels.
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
    let (large, small) = (batch(128), batch(64));
    for packing in [Packing::Packed, Packing::Unshared, Packing::PerRequest] {
        let mut planner = Planner::new(DeviceModel::H100).with_packing(packing);
        let cold = ALLOCATIONS.get();
        let mut plan = planner.plan(&large).expect("a batch that can be planned");
        assert!(ALLOCATIONS.get() > cold, "the allocator does not count");
        planner.plan_into(&small, &mut plan).expect("a batch that can be planned");
        let warm = ALLOCATIONS.get();
        for batch in [&large, &small] {
            planner.plan_into(batch, &mut plan).expect("a batch that can be planned");
        }
        assert_eq!(ALLOCATIONS.get() - warm, 0, "{packing:?}");
        assert_eq!(plan.merge_tokens().is_empty(), packing == Packing::PerRequest);
        assert_eq!(plan.explain(plan.model()).shared_tiles > 0, packing == Packing::Packed);
    }
}
