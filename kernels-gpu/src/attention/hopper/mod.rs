//! For `sm_90a`: a persistent block per multiprocessor, whose warpgroups divide the labour.
//!
//! ```text
//! producer   (1 warpgroup)    takes tasks; brings Q, K and V           task ▸ Q ▸ K₀ V₀ K₁ V₁ … task ▸ …
//! consumers  (2 warpgroups)   wide tiles: 64 rows each, wgmma          S₀ · S₁ P₀V₀ · S₂ P₁V₁ · … · store
//!                             narrow: 16 columns of a step each warp   S₀ P₀V₀ · S₁ P₁V₁ · … · merge
//! ```
//!
//! Launches of wide tiles alone have three consumers ([`wide::trio`]); those with narrow tiles beside wide ones have readers
//! besides ([`reader`]), and those with K and V in FP8 converters ([`converter`]).
//!
//! The producer runs ahead, also across tasks: while the consumers finish one, the Q, K and V of the next arrive. All that passes
//! between them lies in [`Shared`], guarded by pairs of barriers: *full* (the producer has filled it) and *empty* (the consumers
//! have done with it).

mod consumer;
mod converter;
mod epilogue;
mod exchange;
mod helpers;
mod merge;
mod narrow;
mod producer;
mod queries;
mod queue;
mod reader;
mod scaled;
mod shared;
mod softmax;
mod wide;

use packinfer_abi::{AttentionParams, TALL_TILE_ROWS, TileKind, WIDE_TILE_ROWS};

use crate::e4m3::FromE4m3;
use crate::element::{Bf16, Element, F16};
use crate::ptx::control::sync_block;
use crate::ptx::mma::Fragment;
use crate::ptx::special::{dynamic_shared, thread_index};
use crate::ptx::warp;
use crate::ptx::warpgroup::{THREADS, give_registers, take_registers};
use crate::ptx::wgmma::Accumulator;
use crate::stored::{AsQueries, E4m3, Stored};
use consumer::Consumer;
use helpers::{Converters, Helpers, NoHelpers, Readers, STORED_STEP_BLOCKS};
use shared::{STORED_CHUNKS, Shared};

/// Blocks of 8 rows of a wide tile that two consumers have, 64 rows each.
const PAIR: usize = WIDE_TILE_ROWS as usize / 8;
/// Those of one that three have.
const TRIO: usize = TALL_TILE_ROWS as usize / 8;

/// Warps of two consumers.
const CONSUMER_WARPS: u32 = 8;
/// Their threads.
const CONSUMER_THREADS: u32 = 32 * CONSUMER_WARPS;

/// Registers of a thread: 168 at the launch, then what each role needs; 128 · 40 + 256 · 232 = 384 · 168.
const PRODUCER_REGISTERS: u32 = 40;
const CONSUMER_REGISTERS: u32 = 232;

/// Warps of the readers, where there are any.
const READER_WARPS: u32 = 4;
/// Registers of a consumer's and of a reader's thread where there are readers: 128 at the launch, and 128 · (40 + 88) + 256 · 192
/// = 512 · 128.
const CONSUMER_REGISTERS_BESIDE: u32 = 192;
const READER_REGISTERS: u32 = 88;

/// Fragments of 8 columns that a warp takes of a step of a narrow tile, where K and V are taken as they are stored.
const STORED_FRAGMENTS: usize = STORED_STEP_BLOCKS / CONSUMER_WARPS as usize;

/// Barriers among warpgroups; 0 is the whole block's.
mod barrier {
    /// The turn of consumer 0 to start products, and after it those of the others, of which there are two at most.
    pub const TURN: u32 = 1;
    /// Between the warps of both consumers.
    pub const CONSUMERS: u32 = TURN + 3;
    /// Between the warps of the readers.
    pub const READERS: u32 = CONSUMERS + 1;
}

/// Attention for a head dimension of `8 * DIM_BLOCKS`, in steps of `8 * FRAGMENTS` columns, of which a warp takes
/// `8 * NARROW_FRAGMENTS` where the tile is narrow. Launches with a soft-cap have kernels of their own, which are `CAPPED`: so it
/// takes no registers from the others.
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
    let shared = Shared::<DIM_BLOCKS, FRAGMENTS, PAIR, NoHelpers>::at(dynamic_shared());
    let thread = thread_index();
    let warpgroup = begin(shared, thread);
    if warpgroup == 0 {
        give_registers::<PRODUCER_REGISTERS>();
        producer::run(&params, shared, thread);
    } else {
        take_registers::<CONSUMER_REGISTERS>();
        consume::<E, AsQueries, DIM_BLOCKS, FRAGMENTS, DIM_BLOCKS, FRAGMENTS, NARROW_FRAGMENTS, CAPPED, NoHelpers>(
            &params, shared,
        );
    }
}

/// The same for launches of wide tiles and narrow ones, which a fourth warpgroup does beside the others. K and V of narrow tiles
/// have rows of `CHUNKS` chunks of 16 bytes; with `STORED`, they are in FP8, and products in `W`.
#[inline(always)]
unsafe fn attention_beside<
    E: Element,
    W: Element,
    const DIM_BLOCKS: usize,
    const FRAGMENTS: usize,
    const CHUNKS: usize,
    const STORED: bool,
>(
    params: AttentionParams,
) where
    [Fragment; FRAGMENTS]: Accumulator<E>,
    [Fragment; DIM_BLOCKS]: Accumulator<E>,
    reader::Transposed: Accumulator<W>,
{
    let shared = Shared::<DIM_BLOCKS, FRAGMENTS, PAIR, Readers<STORED>>::at(dynamic_shared());
    let thread = thread_index();
    match begin(shared, thread) {
        0 => {
            give_registers::<PRODUCER_REGISTERS>();
            producer::run(&params, shared, thread);
        }
        1 | 2 => {
            take_registers::<CONSUMER_REGISTERS_BESIDE>();
            let mut consumer = Consumer::new(&params, shared);
            consumer.begin_turns();
            while consumer.next_kind().is_some() {
                wide::pair::tiles::<E, E, DIM_BLOCKS, FRAGMENTS, false, Readers<STORED>>(&mut consumer);
            }
            consumer.end_turns();
            consumer.merge_rows::<E>();
        }
        _ => {
            give_registers::<READER_REGISTERS>();
            let thread = thread - THREADS - CONSUMER_THREADS;
            reader::run::<E, W, DIM_BLOCKS, FRAGMENTS, CHUNKS, STORED>(&params, shared, thread);
        }
    }
}

/// The same for launches of wide tiles of 192 rows, which three consumers do. Each has `CONSUMER` registers a thread, the
/// producer `PRODUCER`: 128 · (3 · `CONSUMER` + `PRODUCER`) = 512 · 128. If no log-sum-exps are asked for, outputs have
/// `OUTPUT_BLOCKS` blocks of 8 columns (see [`wide::trio::tile`]).
#[inline(always)]
unsafe fn attention_tall<
    E: Element,
    const DIM_BLOCKS: usize,
    const FRAGMENTS: usize,
    const OUTPUT_BLOCKS: usize,
    const PRODUCER: u32,
    const CONSUMER: u32,
    const CAPPED: bool,
>(
    params: AttentionParams,
) where
    [Fragment; FRAGMENTS]: Accumulator<E>,
    [Fragment; DIM_BLOCKS]: Accumulator<E>,
    [Fragment; OUTPUT_BLOCKS]: Accumulator<E>,
{
    const { assert!(3 * CONSUMER + PRODUCER == 512) };
    let shared = Shared::<DIM_BLOCKS, FRAGMENTS, TRIO, NoHelpers>::at(dynamic_shared());
    let thread = thread_index();
    shared.make_ones::<E>(thread);
    if begin(shared, thread) == 0 {
        give_registers::<PRODUCER>();
        producer::run(&params, shared, thread);
    } else {
        take_registers::<CONSUMER>();
        let mut consumer = Consumer::new(&params, shared);
        consumer.begin_turns();
        while consumer.next_kind().is_some() {
            if OUTPUT_BLOCKS > DIM_BLOCKS && params.lse == 0 {
                wide::trio::tile::<E, DIM_BLOCKS, FRAGMENTS, OUTPUT_BLOCKS, CAPPED>(&mut consumer);
            } else {
                wide::trio::tile::<E, DIM_BLOCKS, FRAGMENTS, DIM_BLOCKS, CAPPED>(&mut consumer);
            }
        }
        consumer.end_turns();
        consumer.merge_rows::<E>();
    }
}

/// The same for K and V in FP8, of which a fourth warpgroup makes such as wide tiles take: for head dimensions whose rows, as
/// they are stored, fit into one panel. Of parts of steps that are brought ahead, `STORED_STAGES` fit into shared memory.
#[inline(always)]
unsafe fn attention_e4m3<E: Element + FromE4m3, const DIM_BLOCKS: usize, const STORED_STAGES: u32, const CAPPED: bool>(
    params: AttentionParams,
) where
    [Fragment; DIM_BLOCKS]: Accumulator<F16>,
{
    attention_converting::<E, DIM_BLOCKS, 16, STORED_STAGES, 8, 8, 56, 200, CAPPED>(params)
}

/// The same for a head dimension of 256: rows as they are stored have two panels, steps 64 columns, and O takes registers that
/// the others give.
#[inline(always)]
unsafe fn attention_e4m3_d256<E: Element + FromE4m3, const CAPPED: bool>(params: AttentionParams) {
    attention_converting::<E, 32, 8, 5, 16, 4, 48, 208, CAPPED>(params)
}

/// Attention with K and V in FP8, of which `STORED_STAGES` parts of `8 * PART_BLOCKS` rows are held as they are stored, in
/// `CHUNKS` chunks of 16 bytes. A consumer's thread has `CONSUMER` registers, one of the producer or of the converters `OTHER`:
/// 128 · 2 · (`CONSUMER` + `OTHER`) = 512 · 128.
#[inline(always)]
unsafe fn attention_converting<
    E: Element + FromE4m3,
    const DIM_BLOCKS: usize,
    const FRAGMENTS: usize,
    const STORED_STAGES: u32,
    const CHUNKS: usize,
    const PART_BLOCKS: usize,
    const OTHER: u32,
    const CONSUMER: u32,
    const CAPPED: bool,
>(
    params: AttentionParams,
) where
    [Fragment; FRAGMENTS]: Accumulator<F16>,
    [Fragment; DIM_BLOCKS]: Accumulator<F16>,
{
    const { assert!(CONSUMER + OTHER == 256) };
    let shared = Shared::<DIM_BLOCKS, FRAGMENTS, PAIR, Converters<STORED_STAGES, CHUNKS, PART_BLOCKS>>::at(dynamic_shared());
    let thread = thread_index();
    match begin(shared, thread) {
        0 => {
            give_registers::<OTHER>();
            producer::run(&params, shared, thread);
        }
        1 | 2 => {
            take_registers::<CONSUMER>();
            consume::<E, E4m3, DIM_BLOCKS, FRAGMENTS, CHUNKS, STORED_STEP_BLOCKS, STORED_FRAGMENTS, CAPPED, _>(&params, shared);
        }
        _ => {
            give_registers::<OTHER>();
            let thread = thread - THREADS - CONSUMER_THREADS;
            converter::run::<DIM_BLOCKS, FRAGMENTS, STORED_STAGES, CHUNKS, PART_BLOCKS>(&params, shared, thread);
        }
    }
}

/// Makes the block's barriers, and returns the thread's warpgroup.
#[inline(always)]
unsafe fn begin<const DIM_BLOCKS: usize, const FRAGMENTS: usize, const ROW_BLOCKS: usize, H: Helpers>(
    shared: Shared<DIM_BLOCKS, FRAGMENTS, ROW_BLOCKS, H>,
    thread: u32,
) -> u32 {
    let warpgroup = warp::uniform(thread / THREADS);
    if thread == 0 {
        shared.init_barriers();
    }
    sync_block();
    warpgroup
}

/// Does a consumer's part until no task is left.
#[inline(always)]
unsafe fn consume<
    E: Element,
    KV: Stored<E>,
    const DIM_BLOCKS: usize,
    const FRAGMENTS: usize,
    const NARROW_CHUNKS: usize,
    const NARROW_STEP_BLOCKS: usize,
    const NARROW_FRAGMENTS: usize,
    const CAPPED: bool,
    H: Helpers,
>(
    params: &AttentionParams,
    shared: Shared<DIM_BLOCKS, FRAGMENTS, PAIR, H>,
) where
    [Fragment; FRAGMENTS]: Accumulator<KV::Weight>,
    [Fragment; DIM_BLOCKS]: Accumulator<KV::Weight>,
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
                wide::pair::tiles::<E, KV::Weight, DIM_BLOCKS, FRAGMENTS, CAPPED, H>(&mut consumer);
            }
            TileKind::Narrow => {
                narrow::tile::<E, KV, DIM_BLOCKS, FRAGMENTS, NARROW_CHUNKS, NARROW_STEP_BLOCKS, NARROW_FRAGMENTS, CAPPED, H>(
                    &mut consumer,
                )
            }
        }
        kind_before = kind;
    }
    consumer.end_turns();
    consumer.merge_rows::<E>();
}

kernel! {
    /// Attention in bf16, head dimension 64, narrow tiles, with K and V in FP8, beside wide ones, with what was made of these.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 3, "bar.sync" = 14, "wgmma.mma_async" = 44)]
    fn attention_bf16_e4m3_d64_beside(params: AttentionParams) {
        attention_beside::<Bf16, F16, 8, 16, STORED_CHUNKS, true>(params)
    }

    /// Attention in bf16, head dimension 64, K and V in FP8.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 3, "wgmma.mma_async" = 36, "mma.sync" = 16)]
    fn attention_bf16_e4m3_d64(params: AttentionParams) {
        attention_e4m3::<Bf16, 8, 17, false>(params)
    }

    /// Attention in bf16, head dimension 64, K and V in FP8, with a soft-cap.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 3, "wgmma.mma_async" = 36, "mma.sync" = 16)]
    fn attention_bf16_e4m3_d64_capped(params: AttentionParams) {
        attention_e4m3::<Bf16, 8, 17, true>(params)
    }

    /// Attention in bf16, head dimension 96, K and V in FP8.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 3, "wgmma.mma_async" = 42, "mma.sync" = 24)]
    fn attention_bf16_e4m3_d96(params: AttentionParams) {
        attention_e4m3::<Bf16, 12, 9, false>(params)
    }

    /// Attention in bf16, head dimension 96, K and V in FP8, with a soft-cap.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 3, "wgmma.mma_async" = 42, "mma.sync" = 24)]
    fn attention_bf16_e4m3_d96_capped(params: AttentionParams) {
        attention_e4m3::<Bf16, 12, 9, true>(params)
    }

    /// Attention in bf16, head dimension 128, narrow tiles, with K and V in FP8, beside wide ones, with what was made of these.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 3, "bar.sync" = 14, "wgmma.mma_async" = 64)]
    fn attention_bf16_e4m3_d128_beside(params: AttentionParams) {
        attention_beside::<Bf16, F16, 16, 16, STORED_CHUNKS, true>(params)
    }

    /// Attention in bf16, head dimension 128, K and V in FP8.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 3, "wgmma.mma_async" = 48, "mma.sync" = 32)]
    fn attention_bf16_e4m3_d128(params: AttentionParams) {
        attention_e4m3::<Bf16, 16, 9, false>(params)
    }

    /// Attention in bf16, head dimension 128, K and V in FP8, with a soft-cap.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 3, "wgmma.mma_async" = 48, "mma.sync" = 32)]
    fn attention_bf16_e4m3_d128_capped(params: AttentionParams) {
        attention_e4m3::<Bf16, 16, 9, true>(params)
    }

    /// Attention in bf16, head dimension 256, K and V in FP8.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 3, "wgmma.mma_async" = 48, "mma.sync" = 64)]
    fn attention_bf16_e4m3_d256(params: AttentionParams) {
        attention_e4m3_d256::<Bf16, false>(params)
    }

    /// Attention in bf16, head dimension 256, K and V in FP8, with a soft-cap.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 3, "wgmma.mma_async" = 48, "mma.sync" = 64)]
    fn attention_bf16_e4m3_d256_capped(params: AttentionParams) {
        attention_e4m3_d256::<Bf16, true>(params)
    }

    /// Attention in f16, head dimension 64, narrow tiles, with K and V in FP8, beside wide ones, with what was made of these.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 3, "bar.sync" = 14, "wgmma.mma_async" = 44)]
    fn attention_f16_e4m3_d64_beside(params: AttentionParams) {
        attention_beside::<F16, F16, 8, 16, STORED_CHUNKS, true>(params)
    }

    /// Attention in f16, head dimension 64, K and V in FP8.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 3, "wgmma.mma_async" = 36, "mma.sync" = 16)]
    fn attention_f16_e4m3_d64(params: AttentionParams) {
        attention_e4m3::<F16, 8, 17, false>(params)
    }

    /// Attention in f16, head dimension 64, K and V in FP8, with a soft-cap.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 3, "wgmma.mma_async" = 36, "mma.sync" = 16)]
    fn attention_f16_e4m3_d64_capped(params: AttentionParams) {
        attention_e4m3::<F16, 8, 17, true>(params)
    }

    /// Attention in f16, head dimension 96, K and V in FP8.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 3, "wgmma.mma_async" = 42, "mma.sync" = 24)]
    fn attention_f16_e4m3_d96(params: AttentionParams) {
        attention_e4m3::<F16, 12, 9, false>(params)
    }

    /// Attention in f16, head dimension 96, K and V in FP8, with a soft-cap.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 3, "wgmma.mma_async" = 42, "mma.sync" = 24)]
    fn attention_f16_e4m3_d96_capped(params: AttentionParams) {
        attention_e4m3::<F16, 12, 9, true>(params)
    }

    /// Attention in f16, head dimension 128, narrow tiles, with K and V in FP8, beside wide ones, with what was made of these.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 3, "bar.sync" = 14, "wgmma.mma_async" = 64)]
    fn attention_f16_e4m3_d128_beside(params: AttentionParams) {
        attention_beside::<F16, F16, 16, 16, STORED_CHUNKS, true>(params)
    }

    /// Attention in f16, head dimension 128, K and V in FP8.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 3, "wgmma.mma_async" = 48, "mma.sync" = 32)]
    fn attention_f16_e4m3_d128(params: AttentionParams) {
        attention_e4m3::<F16, 16, 9, false>(params)
    }

    /// Attention in f16, head dimension 128, K and V in FP8, with a soft-cap.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 3, "wgmma.mma_async" = 48, "mma.sync" = 32)]
    fn attention_f16_e4m3_d128_capped(params: AttentionParams) {
        attention_e4m3::<F16, 16, 9, true>(params)
    }

    /// Attention in f16, head dimension 256, K and V in FP8.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 3, "wgmma.mma_async" = 48, "mma.sync" = 64)]
    fn attention_f16_e4m3_d256(params: AttentionParams) {
        attention_e4m3_d256::<F16, false>(params)
    }

    /// Attention in f16, head dimension 256, K and V in FP8, with a soft-cap.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 3, "wgmma.mma_async" = 48, "mma.sync" = 64)]
    fn attention_f16_e4m3_d256_capped(params: AttentionParams) {
        attention_e4m3_d256::<F16, true>(params)
    }

    /// Attention in bf16, head dimension 64, narrow tiles beside wide ones.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 3, "bar.sync" = 14, "wgmma.mma_async" = 44)]
    fn attention_bf16_d64_beside(params: AttentionParams) {
        attention_beside::<Bf16, Bf16, 8, 16, 8, false>(params)
    }

    /// Attention in bf16, head dimension 128, narrow tiles beside wide ones.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 3, "bar.sync" = 14, "wgmma.mma_async" = 64)]
    fn attention_bf16_d128_beside(params: AttentionParams) {
        attention_beside::<Bf16, Bf16, 16, 16, 16, false>(params)
    }

    /// Attention in bf16, head dimension 64, tall tiles.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 2, "bar.sync" = 10, "wgmma.mma_async" = 48)]
    fn attention_bf16_d64_tall(params: AttentionParams) {
        attention_tall::<Bf16, 8, 16, 9, 56, 152, false>(params)
    }

    /// Attention in bf16, head dimension 64, tall tiles, with a soft-cap.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 2, "bar.sync" = 10, "wgmma.mma_async" = 48)]
    fn attention_bf16_d64_tall_capped(params: AttentionParams) {
        attention_tall::<Bf16, 8, 16, 9, 56, 152, true>(params)
    }

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

    /// Attention in bf16, head dimension 96, tall tiles.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 2, "bar.sync" = 6, "wgmma.mma_async" = 28)]
    fn attention_bf16_d96_tall(params: AttentionParams) {
        attention_tall::<Bf16, 12, 16, 12, 56, 152, false>(params)
    }

    /// Attention in bf16, head dimension 96, tall tiles, with a soft-cap.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 2, "bar.sync" = 6, "wgmma.mma_async" = 28)]
    fn attention_bf16_d96_tall_capped(params: AttentionParams) {
        attention_tall::<Bf16, 12, 16, 12, 56, 152, true>(params)
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

    /// Attention in bf16, head dimension 128, tall tiles.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 2, "bar.sync" = 6, "wgmma.mma_async" = 32)]
    fn attention_bf16_d128_tall(params: AttentionParams) {
        attention_tall::<Bf16, 16, 16, 16, 32, 160, false>(params)
    }

    /// Attention in bf16, head dimension 128, tall tiles, with a soft-cap.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 2, "bar.sync" = 6, "wgmma.mma_async" = 32)]
    fn attention_bf16_d128_tall_capped(params: AttentionParams) {
        attention_tall::<Bf16, 16, 16, 16, 32, 160, true>(params)
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
    #[expect("setmaxnreg" = 2, "wgmma.mma_async" = 48, "mma.sync" = 48)]
    fn attention_bf16_d256(params: AttentionParams) {
        attention::<Bf16, 32, 8, 1, false>(params)
    }

    /// Attention in bf16, head dimension 256, with a soft-cap.
    #[launch_bounds(threads = 384, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 2, "wgmma.mma_async" = 48, "mma.sync" = 48)]
    fn attention_bf16_d256_capped(params: AttentionParams) {
        attention::<Bf16, 32, 8, 1, true>(params)
    }

    /// Attention in f16, head dimension 64, narrow tiles beside wide ones.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 3, "bar.sync" = 14, "wgmma.mma_async" = 44)]
    fn attention_f16_d64_beside(params: AttentionParams) {
        attention_beside::<F16, F16, 8, 16, 8, false>(params)
    }

    /// Attention in f16, head dimension 128, narrow tiles beside wide ones.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 3, "bar.sync" = 14, "wgmma.mma_async" = 64)]
    fn attention_f16_d128_beside(params: AttentionParams) {
        attention_beside::<F16, F16, 16, 16, 16, false>(params)
    }

    /// Attention in f16, head dimension 64, tall tiles.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 2, "bar.sync" = 10, "wgmma.mma_async" = 48)]
    fn attention_f16_d64_tall(params: AttentionParams) {
        attention_tall::<F16, 8, 16, 9, 56, 152, false>(params)
    }

    /// Attention in f16, head dimension 64, tall tiles, with a soft-cap.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 2, "bar.sync" = 10, "wgmma.mma_async" = 48)]
    fn attention_f16_d64_tall_capped(params: AttentionParams) {
        attention_tall::<F16, 8, 16, 9, 56, 152, true>(params)
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

    /// Attention in f16, head dimension 96, tall tiles.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 2, "bar.sync" = 6, "wgmma.mma_async" = 28)]
    fn attention_f16_d96_tall(params: AttentionParams) {
        attention_tall::<F16, 12, 16, 12, 56, 152, false>(params)
    }

    /// Attention in f16, head dimension 96, tall tiles, with a soft-cap.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 2, "bar.sync" = 6, "wgmma.mma_async" = 28)]
    fn attention_f16_d96_tall_capped(params: AttentionParams) {
        attention_tall::<F16, 12, 16, 12, 56, 152, true>(params)
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

    /// Attention in f16, head dimension 128, tall tiles.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 2, "bar.sync" = 6, "wgmma.mma_async" = 32)]
    fn attention_f16_d128_tall(params: AttentionParams) {
        attention_tall::<F16, 16, 16, 16, 32, 160, false>(params)
    }

    /// Attention in f16, head dimension 128, tall tiles, with a soft-cap.
    #[launch_bounds(threads = 512, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 2, "bar.sync" = 6, "wgmma.mma_async" = 32)]
    fn attention_f16_d128_tall_capped(params: AttentionParams) {
        attention_tall::<F16, 16, 16, 16, 32, 160, true>(params)
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
    #[expect("setmaxnreg" = 2, "wgmma.mma_async" = 48, "mma.sync" = 48)]
    fn attention_f16_d256(params: AttentionParams) {
        attention::<F16, 32, 8, 1, false>(params)
    }

    /// Attention in f16, head dimension 256, with a soft-cap.
    #[launch_bounds(threads = 384, blocks_per_sm = 1)]
    #[expect("setmaxnreg" = 2, "wgmma.mma_async" = 48, "mma.sync" = 48)]
    fn attention_f16_d256_capped(params: AttentionParams) {
        attention::<F16, 32, 8, 1, true>(params)
    }
}
