//! What this machine can do at best, measured.

use std::hint::black_box;
use std::time::Instant;

use multiversion::multiversion;
use rayon::prelude::*;

/// Bytes that are copied: more than any cache holds.
const COPY_BYTES: usize = 256 << 20;

/// Bytes that a task copies.
const COPY_CHUNK: usize = 1 << 20;

/// Measurements, of which the best counts.
const REPEATS: usize = 5;

/// Multiply-adds of a task for each of its accumulators.
const MULTIPLY_ADDS: usize = 1 << 18;

/// Accumulators of a task: enough vectors to hide the latency of the additions, few enough for the registers.
const ACCUMULATORS: usize = 64;

/// Tasks for each thread.
const TASKS_PER_THREAD: usize = 4;

/// Bytes a second, read and written together, at which all threads copy memory.
pub fn copy_bandwidth() -> f64 {
    let from = vec![1u8; COPY_BYTES];
    let mut to = vec![0u8; COPY_BYTES];
    let seconds = best_seconds(|| {
        to.par_chunks_mut(COPY_CHUNK).zip(from.par_chunks(COPY_CHUNK)).for_each(|(to, from)| to.copy_from_slice(from));
    });
    (2 * COPY_BYTES) as f64 / seconds
}

/// Floating-point operations a second of multiplications and additions in float32 on all threads.
pub fn multiply_add_rate() -> f64 {
    let tasks = TASKS_PER_THREAD * rayon::current_num_threads();
    let seconds = best_seconds(|| {
        (0..tasks).into_par_iter().with_max_len(1).for_each(|_| {
            let mut sums = [1.0; ACCUMULATORS];
            multiply_add(&mut sums, black_box(1e-9));
            black_box(sums);
        });
    });
    (2 * tasks * ACCUMULATORS * MULTIPLY_ADDS) as f64 / seconds
}

#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma"))]
fn multiply_add(sums: &mut [f32; ACCUMULATORS], x: f32) {
    let mut local = *sums;
    for _ in 0..MULTIPLY_ADDS {
        for sum in &mut local {
            *sum += *sum * x;
        }
    }
    *sums = local;
}

fn best_seconds(mut work: impl FnMut()) -> f64 {
    let times = (0..REPEATS).map(|_| {
        let start = Instant::now();
        work();
        start.elapsed().as_secs_f64()
    });
    times.fold(f64::INFINITY, f64::min)
}
