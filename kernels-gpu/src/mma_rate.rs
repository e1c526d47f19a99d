//! Measures what the tensor cores give to warps that do nothing but `mma.m16n8k16`: a ceiling for the attention kernel.

use packinfer_abi::{MMA_RATE_FLOPS_PER_ITERATION, MMA_RATE_THREADS};

use crate::ptx::memory::store_global_f32;
use crate::ptx::mma::mma_bf16;
use crate::ptx::special::{block_index, thread_index};

/// Products in flight at a time, which do not depend on each other.
const ACCUMULATORS: usize = 8;

const _: () = assert!(MMA_RATE_FLOPS_PER_ITERATION == (MMA_RATE_THREADS as u64 / 32) * ACCUMULATORS as u64 * 2 * 16 * 8 * 16);

/// A bf16 between 1 and 2, or between −2 and −1, in each half of the word: random operands, as real data draw more power than constants do.
#[inline(always)]
fn random_pair(seed: u32) -> u32 {
    let mixed = seed.wrapping_mul(0x9E37_79B9) ^ (seed >> 7).wrapping_mul(0x85EB_CA6B);
    (mixed & 0x807F_807F) | 0x3F80_3F80
}

kernel! {
    /// Each warp does `iterations` rounds of eight independent products in bf16, and stores a sum of them at `out + 4 * thread of the grid`.
    #[launch_bounds(threads = 128, blocks_per_sm = 4)]
    fn mma_rate_bf16(out: u64, iterations: u32) {
        let thread = block_index() * MMA_RATE_THREADS + thread_index();
        let mut sums = [[0f32; 4]; ACCUMULATORS];
        let mut a = [[0u32; 4]; ACCUMULATORS];
        for (i, a) in a.iter_mut().enumerate() {
            for (j, word) in a.iter_mut().enumerate() {
                *word = random_pair(thread * 64 + (i * 4 + j) as u32);
            }
        }
        let b = [random_pair(thread), random_pair(!thread)];
        for _ in 0..iterations {
            for (sum, a) in sums.iter_mut().zip(&a) {
                mma_bf16(sum, *a, b);
            }
        }
        let total = sums.iter().flatten().fold(0f32, |total, x| total + x);
        store_global_f32(out + 4 * u64::from(thread), total);
    }
}
