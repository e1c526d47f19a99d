//! Planning a batch from scratch, with a planner that has planned before, and making the plan of a decode step that of the next:
//! what a server does once a step.
//!
//! The planner is that of an engine on an H100: it chooses between both families of kernels.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use packinfer_batch::{Batch, BatchError};
use packinfer_benches::{
    decode_chats, decode_long, decode_shared, decode_straggler, decode_tree, mixed_chunked, prefill_chats, prefill_long,
    prefill_short, verify_drafts,
};
use packinfer_planner::{DeviceModel, Headroom, Plan, Planner};

/// Slots of the pages that decodes go on in.
const PAGE_SIZE: u32 = 16;

fn planner() -> Planner {
    Planner::choosing(DeviceModel::all_for_device("NVIDIA H100 80GB HBM3", (9, 0), 132))
}

/// All of whose requests decode a token.
fn decodes() -> [(&'static str, Result<Batch, BatchError>); 5] {
    [
        ("decode_chats_256", decode_chats(256)),
        ("decode_straggler_64", decode_straggler(63)),
        ("decode_long_48", decode_long(48)),
        ("decode_shared_64", decode_shared(64)),
        ("decode_tree_96", decode_tree(96)),
    ]
}

fn from_scratch(criterion: &mut Criterion) {
    let others = [
        ("verify_drafts_64", verify_drafts(64)),
        ("mixed_chunked_128", mixed_chunked(128)),
        ("prefill_chats_20", prefill_chats(20)),
        ("prefill_short_512", prefill_short(512)),
        ("prefill_long_4", prefill_long(4)),
        ("decode_chats_65536", decode_chats(Batch::MAX_REQUESTS)),
    ];
    let mut group = criterion.benchmark_group("plan");
    for (name, batch) in decodes().into_iter().chain(others) {
        let batch = batch.expect("a batch of supported size");
        let mut planner = planner();
        let mut plan = planner.plan(&batch).expect("a batch that can be planned");
        group.bench_function(name, |bencher| {
            bencher.iter(|| planner.plan_into(black_box(&batch), black_box(&mut plan)).expect("a batch that can be planned"));
        });
    }
    group.finish();
}

fn next_step(criterion: &mut Criterion) {
    let headroom = Headroom { steps: 1, runs: 1 };
    let mut group = criterion.benchmark_group("append");
    for (name, batch) in decodes() {
        let batch = batch.expect("a batch of supported size");
        let planned = planner().with_headroom(headroom).plan(&batch).expect("a batch that can be planned");
        // All in pages of their own, which is more work than going on in a page.
        let first_free = planned.num_slots().next_multiple_of(PAGE_SIZE);
        let slots: Vec<u32> = (0..batch.requests().len() as u32).map(|request| first_free + PAGE_SIZE * request).collect();
        group.bench_function(name, |bencher| {
            let append = |mut plan: Plan| {
                plan.append(black_box(&slots)).expect("there is room");
                plan
            };
            bencher.iter_batched(|| planned.clone(), append, BatchSize::LargeInput);
        });
    }
    group.finish();
}

criterion_group!(benches, from_scratch, next_step);
criterion_main!(benches);
