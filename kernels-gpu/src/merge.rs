//! Merges the partial results of query tokens whose columns were split among work items of the `sm_80` kernel; the `sm_90a`
//! kernel does so itself.
//!
//! With partials (Oᵢ, LSEᵢ), the result is Σ wᵢ Oᵢ / Σ wᵢ with wᵢ = exp(LSEᵢ − max LSE), and its log-sum-exp is max LSE + log Σ
//! wᵢ. Four warps take every fourth partial each, several at a time, so that enough loads are in flight to hide their latency,
//! and are merged the same way. A sink is one more partial, whose O is zero.
//!
//! On `sm_90a` the kernel may be launched so that it begins before the attention kernel ends: it waits before it reads partials.

use core::f32::consts::LOG2_E;

#[cfg(doc)]
use packinfer_abi::AttentionParams;
use packinfer_abi::{DeviceAddress, MERGE_SHARED_BYTES, MERGE_THREADS, MergeParams, MergeToken};

use crate::element::{Bf16, ELEMENT_BYTES, Element, F16};
use crate::ptx::control::sync_block;
#[cfg(feature = "sm_90a")]
use crate::ptx::control::wait_for_launch_before;
use crate::ptx::memory::{load_global, load_written, load_written_x2};
use crate::ptx::memory::{load_shared_f32, store_global, store_global_f32, store_shared_f32};
use crate::ptx::special::{block_index, dynamic_shared, thread_index};
use crate::ptx::warp::LANES;
use crate::ptx::{math, warp};
use crate::softmax::LN_2;

const WARPS: u32 = MERGE_THREADS / LANES;
/// What a lane holds that no source is left for.
const NO_SOURCE: u32 = 0;

/// A weighted sum of partials: `sum / total` is their merged O, `max + log2(total)` their log-sum-exp to base 2. A lane has
/// `PAIRS` pairs of its elements.
#[derive(Clone, Copy)]
pub(crate) struct Merged<const PAIRS: usize> {
    max: f32,
    total: f32,
    sum: [[f32; 2]; PAIRS],
}

impl<const PAIRS: usize> Merged<PAIRS> {
    /// The sum of no partials.
    pub const NOTHING: Self = Self { max: f32::NEG_INFINITY, total: 0.0, sum: [[0.0; 2]; PAIRS] };

    /// Takes in a partial of the given log-sum-exp, natural logarithm.
    #[inline(always)]
    pub fn add_partial(&mut self, lse: f32, output: &[[f32; 2]; PAIRS]) {
        self.add(lse * LOG2_E, 1.0, output);
    }

    /// Takes in the sink of head `head`, if the launch has sinks.
    ///
    /// # Safety
    ///
    /// `sinks` are an [`AttentionParams::sinks`], and there is such a head.
    #[inline(always)]
    pub unsafe fn add_sink(&mut self, sinks: DeviceAddress, head: u32) {
        if sinks != 0 {
            let sink = f32::from_bits(load_global(sinks + 4 * u64::from(head)));
            self.add_partial(sink, &[[0.0; 2]; PAIRS]);
        }
    }

    /// The merged O; zeros where no partial has seen anything.
    #[inline(always)]
    pub fn output(&self) -> [[f32; 2]; PAIRS] {
        let inverse = if self.total == 0.0 { 0.0 } else { math::reciprocal(self.total) };
        let mut output = self.sum;
        for [a, b] in &mut output {
            *a *= inverse;
            *b *= inverse;
        }
        output
    }

    /// The merged log-sum-exp, natural logarithm.
    #[inline(always)]
    pub fn lse(&self) -> f32 {
        let max = if self.max == f32::NEG_INFINITY { 0.0 } else { self.max };
        (max + math::log2(self.total)) * LN_2
    }

    /// Takes in what others have merged: `output` with weight `total · 2^max`.
    #[inline(always)]
    fn add(&mut self, max: f32, total: f32, output: &[[f32; 2]; PAIRS]) {
        let new_max = math::max(self.max, max);
        // Where nothing has been seen yet the maximum is −∞, and −∞ − −∞ must not be computed.
        let origin = if new_max == f32::NEG_INFINITY { 0.0 } else { new_max };
        let (old, new) = (math::exp2(self.max - origin), math::exp2(max - origin));
        for (sum, output) in self.sum.iter_mut().zip(output) {
            sum[0] = sum[0] * old + output[0] * new;
            sum[1] = sum[1] * old + output[1] * new;
        }
        self.total = self.total * old + total * new;
        self.max = new_max;
    }
}

#[inline(always)]
unsafe fn merge<E: Element, const DIM: u32, const PAIRS: usize, const LOADS_AHEAD: usize>(params: MergeParams) {
    const { assert!(PAIRS as u32 == DIM.div_ceil(64)) };
    let heads = &params.heads;
    let merge_index = math::divide(block_index(), heads.num_qo_heads);
    let head = block_index() - merge_index * heads.num_qo_heads;
    let head_group = math::divide(head, heads.heads_per_group);
    let (warp, lane) = (warp::uniform(thread_index() / 32), thread_index() % 32);

    let merge_token = params.tokens + u64::from(merge_index) * size_of::<MergeToken>() as u64;
    let token = load_global(merge_token + core::mem::offset_of!(MergeToken, token) as u64);
    let source_begin = load_global(merge_token + core::mem::offset_of!(MergeToken, source_begin) as u64);
    let num_sources = load_global(merge_token + core::mem::offset_of!(MergeToken, num_sources) as u64);
    let sources = params.sources + 4 * u64::from(source_begin);
    // Partial row 0 of this head.
    let first_row =
        u64::from(head_group) * u64::from(params.num_partial_rows) + u64::from(head - head_group * heads.heads_per_group);

    // A source of the warp for each lane: every fourth is the warp's.
    let source_of_lane = |first: u32| {
        let source = first + lane * WARPS;
        if source < num_sources { load_global(sources + 4 * u64::from(source)) } else { NO_SOURCE }
    };
    let mut of_lane = source_of_lane(warp);

    // What was read until here is the plan's, which was there before the attention kernel began.
    #[cfg(feature = "sm_90a")]
    wait_for_launch_before();
    let mut merged = Merged::<PAIRS>::NOTHING;
    let mut first = warp;
    while first < num_sources {
        let num_here = core::cmp::min((num_sources - first).div_ceil(WARPS), LANES);
        for next in (0..num_here).step_by(LOADS_AHEAD) {
            let mut lse = [f32::NEG_INFINITY; LOADS_AHEAD];
            let mut output = [[[0f32; 2]; PAIRS]; LOADS_AHEAD];
            for ahead in 0..LOADS_AHEAD {
                let source = warp::shuffle_from(of_lane, next + ahead as u32);
                if next + (ahead as u32) < num_here {
                    let row = first_row + u64::from(source);
                    lse[ahead] = f32::from_bits(load_written(params.partial_lse + 4 * row));
                    for (pair, output) in output[ahead].iter_mut().enumerate() {
                        let element = element_of_lane(lane, pair);
                        if element < DIM {
                            let [a, b] = load_written_x2(params.partial_o + 4 * (row * u64::from(DIM) + u64::from(element)));
                            *output = [f32::from_bits(a), f32::from_bits(b)];
                        }
                    }
                }
            }
            for ahead in 0..LOADS_AHEAD {
                merged.add_partial(lse[ahead], &output[ahead]);
            }
        }
        first += LANES * WARPS;
        of_lane = source_of_lane(first);
    }

    share::<PAIRS>(warp, lane, &merged);
    sync_block();
    if warp == 0 {
        let mut merged = shared::<PAIRS>(0, lane);
        for warp in 1..WARPS {
            let other = shared::<PAIRS>(warp, lane);
            merged.add(other.max, other.total, &other.sum);
        }
        merged.add_sink(params.sinks, head);
        let row = u64::from(token) * u64::from(heads.num_qo_heads) + u64::from(head);
        for (pair, &[a, b]) in merged.output().iter().enumerate() {
            let element = element_of_lane(lane, pair);
            if element < DIM {
                let address = params.o + (row * u64::from(DIM) + u64::from(element)) * u64::from(ELEMENT_BYTES);
                store_global(address, E::pack(a, b));
            }
        }
        if lane == 0 && params.lse != 0 {
            store_global_f32(params.lse + 4 * row, merged.lse());
        }
    }
}

/// First of the two elements that a lane holds in its pair `pair`; there may be no such elements.
#[inline(always)]
fn element_of_lane(lane: u32, pair: usize) -> u32 {
    2 * (lane + 32 * pair as u32)
}

/// Address of word `word` of what `warp` shares: each word is an array over the lanes.
#[inline(always)]
fn shared_word<const PAIRS: usize>(warp: u32, lane: u32, word: usize) -> u32 {
    const { assert!(WARPS as usize * 32 * 4 * (2 + 2 * PAIRS) <= MERGE_SHARED_BYTES as usize) };
    dynamic_shared() + ((warp * (2 + 2 * PAIRS as u32) + word as u32) * 32 + lane) * 4
}

#[inline(always)]
unsafe fn share<const PAIRS: usize>(warp: u32, lane: u32, merged: &Merged<PAIRS>) {
    store_shared_f32(shared_word::<PAIRS>(warp, lane, 0), merged.max);
    store_shared_f32(shared_word::<PAIRS>(warp, lane, 1), merged.total);
    for (pair, sum) in merged.sum.iter().enumerate() {
        store_shared_f32(shared_word::<PAIRS>(warp, lane, 2 + 2 * pair), sum[0]);
        store_shared_f32(shared_word::<PAIRS>(warp, lane, 3 + 2 * pair), sum[1]);
    }
}

#[inline(always)]
unsafe fn shared<const PAIRS: usize>(warp: u32, lane: u32) -> Merged<PAIRS> {
    let mut merged = Merged::<PAIRS>::NOTHING;
    merged.max = load_shared_f32(shared_word::<PAIRS>(warp, lane, 0));
    merged.total = load_shared_f32(shared_word::<PAIRS>(warp, lane, 1));
    for (pair, sum) in merged.sum.iter_mut().enumerate() {
        sum[0] = load_shared_f32(shared_word::<PAIRS>(warp, lane, 2 + 2 * pair));
        sum[1] = load_shared_f32(shared_word::<PAIRS>(warp, lane, 3 + 2 * pair));
    }
    merged
}

kernel! {
    /// Merges partials, O in bf16, head dimension 64.
    #[launch_bounds(threads = 128, blocks_per_sm = 8)]
    #[expect("bar.sync" = 1)]
    fn merge_bf16_d64(params: MergeParams) {
        merge::<Bf16, 64, 1, 8>(params)
    }

    /// Merges partials, O in bf16, head dimension 96.
    #[launch_bounds(threads = 128, blocks_per_sm = 8)]
    #[expect("bar.sync" = 1)]
    fn merge_bf16_d96(params: MergeParams) {
        merge::<Bf16, 96, 2, 8>(params)
    }

    /// Merges partials, O in bf16, head dimension 128.
    #[launch_bounds(threads = 128, blocks_per_sm = 8)]
    #[expect("bar.sync" = 1)]
    fn merge_bf16_d128(params: MergeParams) {
        merge::<Bf16, 128, 2, 8>(params)
    }

    /// Merges partials, O in bf16, head dimension 256.
    #[launch_bounds(threads = 128, blocks_per_sm = 8)]
    #[expect("bar.sync" = 1)]
    fn merge_bf16_d256(params: MergeParams) {
        merge::<Bf16, 256, 4, 4>(params)
    }

    /// Merges partials, O in f16, head dimension 64.
    #[launch_bounds(threads = 128, blocks_per_sm = 8)]
    #[expect("bar.sync" = 1)]
    fn merge_f16_d64(params: MergeParams) {
        merge::<F16, 64, 1, 8>(params)
    }

    /// Merges partials, O in f16, head dimension 96.
    #[launch_bounds(threads = 128, blocks_per_sm = 8)]
    #[expect("bar.sync" = 1)]
    fn merge_f16_d96(params: MergeParams) {
        merge::<F16, 96, 2, 8>(params)
    }

    /// Merges partials, O in f16, head dimension 128.
    #[launch_bounds(threads = 128, blocks_per_sm = 8)]
    #[expect("bar.sync" = 1)]
    fn merge_f16_d128(params: MergeParams) {
        merge::<F16, 128, 2, 8>(params)
    }

    /// Merges partials, O in f16, head dimension 256.
    #[launch_bounds(threads = 128, blocks_per_sm = 8)]
    #[expect("bar.sync" = 1)]
    fn merge_f16_d256(params: MergeParams) {
        merge::<F16, 256, 4, 4>(params)
    }
}
