//! Measures what the tensor cores give to warps that do nothing but matrix products: a ceiling for the attention kernels.

#[cfg(feature = "sm_80")]
mod by_warp {
    use packinfer_abi::{MMA_RATE_FLOPS_PER_ITERATION, MMA_RATE_THREADS};

    use crate::mma_rate::random_pair;
    use crate::ptx::memory::store_global_f32;
    use crate::ptx::mma::mma_bf16;
    use crate::ptx::special::{block_index, thread_index};

    /// Products in flight at a time, which do not depend on each other.
    const ACCUMULATORS: usize = 8;

    const _: () = assert!(MMA_RATE_FLOPS_PER_ITERATION == (MMA_RATE_THREADS as u64 / 32) * ACCUMULATORS as u64 * 2 * 16 * 8 * 16);

    kernel! {
        /// Each warp does `iterations` rounds of eight independent products in bf16, and stores a sum of them at
        /// `out + 4 * thread of the grid`.
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
}

#[cfg(feature = "sm_90a")]
mod by_warpgroup {
    use packinfer_abi::{WGMMA_RATE_FLOPS_PER_ITERATION, WGMMA_RATE_SHARED_BYTES, WGMMA_RATE_THREADS};

    use crate::element::Bf16;
    use crate::mma_rate::random_pair;
    use crate::ptx::control::sync_block;
    use crate::ptx::memory::{store_global_f32, store_shared};
    use crate::ptx::mma::Fragment;
    use crate::ptx::special::{block_index, dynamic_shared, thread_index};
    use crate::ptx::warpgroup::THREADS;
    use crate::ptx::wgmma::{self, Accumulator, Descriptor};
    use crate::shared_tile::{PANEL_ROW_BYTES, PanelTile};

    /// Products of one iteration: those of 64 elements summed over.
    const PRODUCTS: u32 = 4;
    /// A of each warpgroup, 64 rows × 64 elements.
    type TileA = PanelTile<8, 8>;
    /// B of all, 128 columns × 64 elements.
    type TileB = PanelTile<8, 16>;

    const WARPGROUPS: u32 = WGMMA_RATE_THREADS / THREADS;
    const _: () = assert!(WGMMA_RATE_SHARED_BYTES == TileB::BYTES + WARPGROUPS * TileA::BYTES);
    const _: () = assert!(WGMMA_RATE_FLOPS_PER_ITERATION == (WARPGROUPS * PRODUCTS) as u64 * 2 * 64 * 128 * 16);

    kernel! {
        /// Each warpgroup does `iterations` rounds of products of 64 × 64 with 64 × 128 elements in bf16, and stores a sum of
        /// them at `out + 4 * thread of the grid`.
        #[launch_bounds(threads = 256, blocks_per_sm = 1)]
        fn wgmma_rate_bf16(out: u64, iterations: u32) {
            let (shared, thread) = (dynamic_shared(), thread_index());
            let mut word = thread;
            while word < WGMMA_RATE_SHARED_BYTES / 4 {
                store_shared(shared + 4 * word, random_pair(word));
                word += WGMMA_RATE_THREADS;
            }
            wgmma::fence_shared_writes();
            sync_block();
            let b = Descriptor::along_sum(TileB::at(shared).row(0), 8 * PANEL_ROW_BYTES);
            let a = Descriptor::along_sum(TileA::at(shared + TileB::BYTES).skip_tiles(thread / THREADS).row(0), 8 * PANEL_ROW_BYTES);
            let mut sums: [Fragment; 16] = [[0f32; 4]; 16];
            for _ in 0..iterations {
                Accumulator::<Bf16>::hold(&mut sums);
                wgmma::fence();
                for product in 0..PRODUCTS {
                    let byte = product * (PANEL_ROW_BYTES / PRODUCTS);
                    Accumulator::<Bf16>::add_product_shared(&mut sums, a.skip(byte), b.skip(byte), true);
                }
                wgmma::commit_group();
                wgmma::wait_group::<0>();
                Accumulator::<Bf16>::hold(&mut sums);
            }
            let total = sums.iter().flatten().fold(0f32, |total, x| total + x);
            store_global_f32(out + 4 * u64::from(block_index() * WGMMA_RATE_THREADS + thread), total);
        }
    }
}

/// A bf16 between 1 and 2, or between −2 and −1, in each half of the word: random operands, as real data draw more power than
/// constants do.
#[inline(always)]
fn random_pair(seed: u32) -> u32 {
    let mixed = seed.wrapping_mul(0x9E37_79B9) ^ (seed >> 7).wrapping_mul(0x85EB_CA6B);
    (mixed & 0x807F_807F) | 0x3F80_3F80
}
