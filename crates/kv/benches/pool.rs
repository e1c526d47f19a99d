//! Throughput of the pool: 10^6 slots, 10^4 requests, one core.

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use packinfer_kv::{Extent, Growth, Sequence, SlotPool};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

const NUM_SLOTS: u32 = 1_000_000;
const NUM_REQUESTS: usize = 10_000;
/// Page operations of an iteration.
const OPERATIONS: u64 = 100_000;

/// A pool of which a tenth is free, in single pages all over it.
fn scattered(page_size: u32) -> (SlotPool, Vec<Extent>) {
    let mut pool = SlotPool::new(NUM_SLOTS, page_size).unwrap();
    let mut pages = Vec::new();
    pool.allocate_pages(NUM_SLOTS / page_size, &mut pages).unwrap();
    pages.shuffle(&mut SmallRng::seed_from_u64(1));
    for page in pages.drain(pages.len() * 9 / 10..) {
        pool.release(page).unwrap();
    }
    (pool, pages)
}

fn page_operations(c: &mut Criterion) {
    let mut group = c.benchmark_group("release and allocate a page");
    group.throughput(Throughput::Elements(OPERATIONS));
    for page_size in [1, 16] {
        let (mut pool, mut pages) = scattered(page_size);
        let mut rng = SmallRng::seed_from_u64(2);
        group.bench_function(format!("page size {page_size}"), |b| {
            b.iter(|| {
                for _ in 0..OPERATIONS / 2 {
                    let page = &mut pages[rng.random_range(0..NUM_SLOTS as usize / page_size as usize * 9 / 10)];
                    pool.release(*page).unwrap();
                    *page = pool.allocate(page_size).unwrap();
                }
            });
        });
    }
    group.finish();
}

/// Requests of 20 to 100 tokens; every operation appends a token to one, which ends and is replaced when it reaches 100.
fn decode(c: &mut Criterion) {
    let mut group = c.benchmark_group("append a token");
    group.throughput(Throughput::Elements(NUM_REQUESTS as u64));
    for (name, growth) in [("pages of 16", Growth::Pages), ("contiguous", Growth::Contiguous { headroom: 32 })] {
        group.bench_function(name, |b| {
            b.iter_batched_ref(
                || {
                    let mut pool = SlotPool::new(NUM_SLOTS, 16).unwrap();
                    let mut rng = SmallRng::seed_from_u64(3);
                    let mut start = |_| {
                        let mut sequence = Sequence::new();
                        sequence.append(&mut pool, rng.random_range(20..100), growth).unwrap();
                        sequence
                    };
                    let sequences: Vec<_> = (0..NUM_REQUESTS).map(&mut start).collect();
                    (pool, sequences)
                },
                |(pool, sequences)| {
                    for sequence in sequences {
                        if sequence.len() >= 100 {
                            std::mem::take(sequence).free(pool).unwrap();
                            sequence.append(pool, 20, growth).unwrap();
                        }
                        sequence.append(pool, 1, growth).unwrap();
                    }
                },
                BatchSize::LargeInput,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, page_operations, decode);
criterion_main!(benches);
