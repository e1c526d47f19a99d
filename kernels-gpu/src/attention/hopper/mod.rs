//! For `sm_90a`: a persistent block per multiprocessor, whose warpgroups divide the labour.
//!
//! ```text
//! producer   (1 warpgroup)    takes tasks; brings Q, K and V           task ▸ Q ▸ K₀ V₀ K₁ V₁ … task ▸ …
//! consumers  (2 warpgroups)   wide tiles: 64 rows each, wgmma          S₀ · S₁ P₀V₀ · S₂ P₁V₁ · … · store
//!                             narrow: 16 columns of a step each warp   S₀ P₀V₀ · S₁ P₁V₁ · … · merge
//! ```
//!
//! The producer runs ahead, also across tasks: while the consumers finish one, the Q, K and V of the next arrive. All that passes between
//! them lies in [`Shared`], guarded by pairs of barriers: *full* (the producer has filled it) and *empty* (the consumers have done with it).

mod consumer;
mod epilogue;
mod exchange;
mod merge;
mod narrow;
mod producer;
mod queries;
mod shared;
mod softmax;
mod wide;

use packinfer_abi::{AttentionParams, TileKind};

use crate::element::{Bf16, Element, F16};
use crate::ptx::control::sync_block;
use crate::ptx::mma::Fragment;
use crate::ptx::special::{dynamic_shared, thread_index};
use crate::ptx::warp;
use crate::ptx::warpgroup::{THREADS, give_registers, take_registers};
use crate::ptx::wgmma::Accumulator;
use consumer::Consumer;
use shared::Shared;

/// Warps that consume.
const CONSUMER_WARPS: u32 = 8;
/// Threads that consume.
const CONSUMER_THREADS: u32 = 32 * CONSUMER_WARPS;

/// Registers of a thread: 168 at the launch, then what each role needs; 128 · 40 + 256 · 232 = 384 · 168.
const PRODUCER_REGISTERS: u32 = 40;
const CONSUMER_REGISTERS: u32 = 232;

/// Barriers among warpgroups; 0 is the whole block's.
mod barrier {
    /// The turn of consumer 0 to start products, and after it that of consumer 1.
    pub const TURN: u32 = 1;
    /// Between the warps of both consumers.
    pub const CONSUMERS: u32 = TURN + 2;
}

/// Attention for a head dimension of `8 * DIM_BLOCKS`, in steps of `8 * FRAGMENTS` columns, of which a warp takes `8 * NARROW_FRAGMENTS` where the
/// tile is narrow. Launches with a soft-cap have kernels of their own, which are
/// `CAPPED`: so it takes no registers from the others.
#[inline(always)]
unsafe fn attention<
    E: Element,
    const DIM_BLOCKS: usize,
    const FRAGMENTS: usize,
    const NARROW_FRAGMENTS: usize,
    const CAPPED: bool,
>(
    params: AttentionParams,
) where
    [Fragment; FRAGMENTS]: Accumulator<E>,
    [Fragment; DIM_BLOCKS]: Accumulator<E>,
{
    let shared = Shared::<DIM_BLOCKS, FRAGMENTS>::at(dynamic_shared());
    let thread = thread_index();
    let warpgroup = warp::uniform(thread / THREADS);
    if thread == 0 {
        shared.init_barriers();
    }
    sync_block();
    if warpgroup == 0 {
        give_registers::<PRODUCER_REGISTERS>();
        producer::run(&params, shared, thread);
    } else {
        take_registers::<CONSUMER_REGISTERS>();
        consume::<E, DIM_BLOCKS, FRAGMENTS, NARROW_FRAGMENTS, CAPPED>(&params, shared);
    }
}

/// Does a consumer's part until no task is left.
#[inline(always)]
unsafe fn consume<
    E: Element,
    const DIM_BLOCKS: usize,
    const FRAGMENTS: usize,
    const NARROW_FRAGMENTS: usize,
    const CAPPED: bool,
>(
    params: &AttentionParams,
    shared: Shared<DIM_BLOCKS, FRAGMENTS>,
) where
    [Fragment; FRAGMENTS]: Accumulator<E>,
    [Fragment; DIM_BLOCKS]: Accumulator<E>,
{
    let mut consumer = Consumer::new(params, shared);
    consumer.begin_turns();
    let mut kind_before = TileKind::Wide;
    while let Some(kind) = consumer.next_kind() {
        match kind {
            TileKind::Wide => {
                if kind_before == TileKind::Narrow {
                    consumer.meet(); // all have read what was exchanged: it lies where O is staged
                }
                wide::tiles::<E, DIM_BLOCKS, FRAGMENTS, CAPPED>(&mut consumer);
            }
            TileKind::Narrow => narrow::tile::<E, DIM_BLOCKS, FRAGMENTS, NARROW_FRAGMENTS, CAPPED>(&mut consumer),
        }
        kind_before = kind;
    }
    consumer.end_turns();
}

kernel! {
    /// Attention in bf16, head dimension 64.
    #[launch_bounds(threads = 384, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 2, "wgmma.mma_async" = 36, "mma.sync" = 16)]
    fn attention_bf16_d64(params: AttentionParams) {
        attention::<Bf16, 8, 16, 2, false>(params)
    }

    /// Attention in bf16, head dimension 64, with a soft-cap.
    #[launch_bounds(threads = 384, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 2, "wgmma.mma_async" = 36, "mma.sync" = 16)]
    fn attention_bf16_d64_capped(params: AttentionParams) {
        attention::<Bf16, 8, 16, 2, true>(params)
    }

    /// Attention in bf16, head dimension 96.
    #[launch_bounds(threads = 384, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 2, "wgmma.mma_async" = 42, "mma.sync" = 24)]
    fn attention_bf16_d96(params: AttentionParams) {
        attention::<Bf16, 12, 16, 2, false>(params)
    }

    /// Attention in bf16, head dimension 96, with a soft-cap.
    #[launch_bounds(threads = 384, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 2, "wgmma.mma_async" = 42, "mma.sync" = 24)]
    fn attention_bf16_d96_capped(params: AttentionParams) {
        attention::<Bf16, 12, 16, 2, true>(params)
    }

    /// Attention in bf16, head dimension 128.
    #[launch_bounds(threads = 384, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 2, "wgmma.mma_async" = 48, "mma.sync" = 32)]
    fn attention_bf16_d128(params: AttentionParams) {
        attention::<Bf16, 16, 16, 2, false>(params)
    }

    /// Attention in bf16, head dimension 128, with a soft-cap.
    #[launch_bounds(threads = 384, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 2, "wgmma.mma_async" = 48, "mma.sync" = 32)]
    fn attention_bf16_d128_capped(params: AttentionParams) {
        attention::<Bf16, 16, 16, 2, true>(params)
    }

    /// Attention in bf16, head dimension 256.
    #[launch_bounds(threads = 384, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 2, "wgmma.mma_async" = 40, "mma.sync" = 48)]
    fn attention_bf16_d256(params: AttentionParams) {
        attention::<Bf16, 32, 8, 1, false>(params)
    }

    /// Attention in bf16, head dimension 256, with a soft-cap.
    #[launch_bounds(threads = 384, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 2, "wgmma.mma_async" = 40, "mma.sync" = 48)]
    fn attention_bf16_d256_capped(params: AttentionParams) {
        attention::<Bf16, 32, 8, 1, true>(params)
    }

    /// Attention in f16, head dimension 64.
    #[launch_bounds(threads = 384, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 2, "wgmma.mma_async" = 36, "mma.sync" = 16)]
    fn attention_f16_d64(params: AttentionParams) {
        attention::<F16, 8, 16, 2, false>(params)
    }

    /// Attention in f16, head dimension 64, with a soft-cap.
    #[launch_bounds(threads = 384, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 2, "wgmma.mma_async" = 36, "mma.sync" = 16)]
    fn attention_f16_d64_capped(params: AttentionParams) {
        attention::<F16, 8, 16, 2, true>(params)
    }

    /// Attention in f16, head dimension 96.
    #[launch_bounds(threads = 384, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 2, "wgmma.mma_async" = 42, "mma.sync" = 24)]
    fn attention_f16_d96(params: AttentionParams) {
        attention::<F16, 12, 16, 2, false>(params)
    }

    /// Attention in f16, head dimension 96, with a soft-cap.
    #[launch_bounds(threads = 384, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 2, "wgmma.mma_async" = 42, "mma.sync" = 24)]
    fn attention_f16_d96_capped(params: AttentionParams) {
        attention::<F16, 12, 16, 2, true>(params)
    }

    /// Attention in f16, head dimension 128.
    #[launch_bounds(threads = 384, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 2, "wgmma.mma_async" = 48, "mma.sync" = 32)]
    fn attention_f16_d128(params: AttentionParams) {
        attention::<F16, 16, 16, 2, false>(params)
    }

    /// Attention in f16, head dimension 128, with a soft-cap.
    #[launch_bounds(threads = 384, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 2, "wgmma.mma_async" = 48, "mma.sync" = 32)]
    fn attention_f16_d128_capped(params: AttentionParams) {
        attention::<F16, 16, 16, 2, true>(params)
    }

    /// Attention in f16, head dimension 256.
    #[launch_bounds(threads = 384, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 2, "wgmma.mma_async" = 40, "mma.sync" = 48)]
    fn attention_f16_d256(params: AttentionParams) {
        attention::<F16, 32, 8, 1, false>(params)
    }

    /// Attention in f16, head dimension 256, with a soft-cap.
    #[launch_bounds(threads = 384, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 2, "wgmma.mma_async" = 40, "mma.sync" = 48)]
    fn attention_f16_d256_capped(params: AttentionParams) {
        attention::<F16, 32, 8, 1, true>(params)
    }
}
