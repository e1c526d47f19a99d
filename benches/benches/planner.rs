//! Planning a batch from scratch, with a planner that has planned before: what a server does once a step.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use packinfer_batch::Batch;
use packinfer_benches::{decode_chats, decode_tree, mixed_chunked, prefill_short};
use packinfer_planner::{DeviceModel, Planner};

fn from_scratch(criterion: &mut Criterion) {
    let batches = [
        ("decode_chats_256", decode_chats(256)),
        ("decode_tree_96", decode_tree(96)),
        ("prefill_short_512", prefill_short(512)),
        ("mixed_chunked_128", mixed_chunked(128)),
        ("decode_chats_65536", decode_chats(Batch::MAX_REQUESTS)),
    ];
    let mut group = criterion.benchmark_group("plan");
    for (name, batch) in batches {
        let batch = batch.expect("a batch of supported size");
        let mut planner = Planner::new(DeviceModel::H100);
        let mut plan = planner.plan(&batch).expect("a batch that can be planned");
        group.bench_function(name, |bencher| {
            bencher.iter(|| planner.plan_into(black_box(&batch), black_box(&mut plan)).expect("a batch that can be planned"));
        });
    }
    group.finish();
}

criterion_group!(benches, from_scratch);
criterion_main!(benches);
