//! Merging partials in the launch that makes them: when no task is left, the consumers of all blocks share out the rows of O that
//! are merged.
//!
//! Whoever stores a partial does nothing besides. Between launches, every word of the partial buffers is [`NOT_STORED`], which no
//! partial contains, so whoever merges a row sees which words are there already, waits for the others, and leaves [`NOT_STORED`]
//! behind. Only blocks that have begun are waited for: a block that has no task left before all have begun has
//! [no share](packinfer_abi::Attendance). Which warp merges a row does not matter, and the order in which its partials are added
//! is that of the plan.

use core::f32::consts::LOG2_E;

use packinfer_abi::{AttentionParams, DeviceAddress, MergeToken, NOT_STORED, Share};

use crate::element::{ELEMENT_BYTES, Element};
use crate::ptx::control;
use crate::ptx::math::{self, divide};
use crate::ptx::memory::{
    fetch_add_global_if, load_global, load_of_device_if, load_of_device_x4_if, prefetch_global, store_global, store_global_f32,
    store_global_if, store_global_x2, store_global_x4_if,
};
use crate::ptx::special::{num_blocks, thread_index};
use crate::ptx::warp::{self, LANES};
use crate::softmax::LN_2;

/// Elements of a partial that a lane loads at once: 16 bytes.
const LANE_ELEMENTS: u32 = 4;
/// The fewest lanes that load parts of one partial.
const FEWEST_LANES: u32 = 8;
/// Loads of partials that a lane has on their way, for each row: those of a warp are 32 partials at most.
const LOADS_AHEAD: u32 = FEWEST_LANES;
/// Rows, or parts of rows, that a warp merges at once.
const ROWS_AT_ONCE: usize = 2;
/// How long a warp waits before it looks again whether rows are complete.
const NS_BETWEEN_LOOKS: u32 = 100;

/// How the rows that are merged are divided: the same, whoever merges them, so that O is.
#[derive(Clone, Copy)]
struct Division {
    /// Base 2 logarithm of the lanes that load a partial together; the others load further ones of the same row.
    log2_lanes: u32,
    /// Parts of a row, which are merged apart.
    parts: u32,
}

impl Division {
    /// As many parts of a row as leave each of a launch's `num_warps` warps no more than it merges at once.
    #[inline(always)]
    fn of<const DIM_BLOCKS: usize>(num_rows: u32, num_warps: u32) -> Self {
        let lanes_of_row = 8 * DIM_BLOCKS as u32 / LANE_ELEMENTS;
        let parts = |log2_lanes: u32| (lanes_of_row + (1 << log2_lanes) - 1) >> log2_lanes;
        let mut log2_lanes = if lanes_of_row > LANES / 2 { LANES.ilog2() } else { lanes_of_row.ilog2() };
        while log2_lanes > FEWEST_LANES.ilog2()
            && u64::from(num_rows) * u64::from(parts(log2_lanes - 1)) <= ROWS_AT_ONCE as u64 * u64::from(num_warps)
        {
            log2_lanes -= 1;
        }
        Self { log2_lanes, parts: parts(log2_lanes) }
    }
}

/// A part of a row of O that is merged from partials.
#[derive(Clone, Copy)]
struct MergedPart {
    /// `merge token * num_qo_heads + head`.
    row: u32,
    part: u32,
    /// The query token of the row.
    token: u32,
    /// First of its merge sources.
    source_begin: u32,
    /// Number of its merge sources; none where there is no such row.
    num_sources: u32,
}

impl MergedPart {
    /// The part of the given index; there may be none.
    #[inline(always)]
    unsafe fn find(params: &AttentionParams, division: Division, index: u32) -> Self {
        let exists = index < params.num_merged_rows * division.parts;
        let row = divide(if exists { index } else { 0 }, division.parts);
        let merge = divide(row, params.heads.num_qo_heads);
        let token = params.merge_tokens + u64::from(merge) * size_of::<MergeToken>() as u64;
        let num_sources = load_global(token + core::mem::offset_of!(MergeToken, num_sources) as u64);
        Self {
            row,
            part: index - row * division.parts,
            token: load_global(token + core::mem::offset_of!(MergeToken, token) as u64),
            source_begin: load_global(token + core::mem::offset_of!(MergeToken, source_begin) as u64),
            num_sources: if exists { num_sources } else { 0 },
        }
    }

    /// Its merge source `source`; the first where there are not so many.
    #[inline(always)]
    unsafe fn source(&self, params: &AttentionParams, source: u32) -> u32 {
        let source = self.source_begin + if source < self.num_sources { source } else { 0 };
        load_global(params.merge_sources + 4 * u64::from(source))
    }

    /// The log-sum-exp of its `index`-th partial, which is partial row `partial`; −∞ where there are not so many.
    #[inline(always)]
    unsafe fn load_lse(&self, params: &AttentionParams, partial: u64, index: u32) -> u32 {
        load_of_device_if(params.partial_lse + 4 * partial, index < self.num_sources, f32::NEG_INFINITY.to_bits())
    }

    /// Says that the log-sum-exps of its row have been read for this part; where they have been for all parts, leaves
    /// [`NOT_STORED`] behind.
    #[inline(always)]
    unsafe fn leave_lse(&self, params: &AttentionParams, division: Division, lane: u32) {
        let counter = params.lse_readers + 4 * u64::from(self.row);
        let before = fetch_add_global_if(counter, 1, lane == 0 && self.num_sources > 0);
        if warp::shuffle_from(before, 0) + 1 != division.parts {
            return;
        }
        if lane == 0 {
            store_global(counter, 0);
        }
        let first_partial = self.first_partial(params);
        let mut source = lane;
        while source < self.num_sources {
            let partial = first_partial + u64::from(self.source(params, source));
            store_global(params.partial_lse + 4 * partial, NOT_STORED);
            source += LANES;
        }
    }

    /// The part of lane `lane`.
    #[inline(always)]
    unsafe fn of_lane(self, lane: u32) -> Self {
        Self {
            row: warp::shuffle_from(self.row, lane),
            part: warp::shuffle_from(self.part, lane),
            token: warp::shuffle_from(self.token, lane),
            source_begin: warp::shuffle_from(self.source_begin, lane),
            num_sources: warp::shuffle_from(self.num_sources, lane),
        }
    }

    /// Its query head.
    #[inline(always)]
    unsafe fn qo_head(&self, params: &AttentionParams) -> u32 {
        self.row - divide(self.row, params.heads.num_qo_heads) * params.heads.num_qo_heads
    }

    /// Partial row 0 of its head.
    #[inline(always)]
    unsafe fn first_partial(&self, params: &AttentionParams) -> u64 {
        let head = self.qo_head(params);
        let head_group = divide(head, params.heads.heads_per_group);
        u64::from(head_group) * u64::from(params.num_partial_rows) + u64::from(head - head_group * params.heads.heads_per_group)
    }
}

/// A weighted sum of partials. Each lane has the sum of those that it loads.
#[derive(Clone, Copy)]
struct Sum {
    /// Greatest log-sum-exp, to base 2; of all lanes.
    max: f32,
    /// Sum of the weights, relative to it; of all lanes.
    total: f32,
    elements: [f32; LANE_ELEMENTS as usize],
}

impl Sum {
    const NOTHING: Self = Self { max: f32::NEG_INFINITY, total: 0.0, elements: [0.0; LANE_ELEMENTS as usize] };

    /// Makes room for log-sum-exps up to `max`; returns what they are relative to.
    #[inline(always)]
    fn make_room(&mut self, max: f32) -> f32 {
        let max = math::max(self.max, max);
        // Where nothing has been seen yet the maximum is −∞, and −∞ − −∞ must not be computed.
        let origin = if max == f32::NEG_INFINITY { 0.0 } else { max };
        let factor = math::exp2(self.max - origin);
        self.max = max;
        self.total *= factor;
        for element in &mut self.elements {
            *element *= factor;
        }
        origin
    }

    /// Takes in the weights of a partial in each lane, of these log-sum-exps to base 2; returns the lane's.
    #[inline(always)]
    unsafe fn add_weights(&mut self, lse_log2: f32) -> f32 {
        let origin = self.make_room(warp::column_max(warp::quad_max(lse_log2)));
        let weight = math::exp2(lse_log2 - origin);
        self.total += warp::column_sum(warp::quad_sum(weight));
        weight
    }
}

/// Merges rows, once a block has no more tasks: those of warp `warp` of its `warps`. Blocks that end early have the first ones.
///
/// # Safety
///
/// Reached by all lanes of the warp, when its block has taken its last task, and stored or handed over to others what it has
/// computed. No other block has this share.
#[inline(always)]
pub unsafe fn merge_rows<E: Element, const DIM_BLOCKS: usize>(params: &AttentionParams, share: Share, warp: u32, warps: u32) {
    if params.num_merged_rows == 0 || share.of == 0 {
        return;
    }
    let lane = thread_index() % LANES;
    let division = Division::of::<DIM_BLOCKS>(params.num_merged_rows, warps * num_blocks());
    let num_parts = params.num_merged_rows * division.parts;
    let num_warps = warps * share.of;
    let mut first = share.index * warps + warp;
    while first < num_parts {
        // One in each lane.
        let part = MergedPart::find(params, division, first + lane * num_warps);
        let num_here = core::cmp::min((num_parts - first).div_ceil(num_warps), LANES);
        let mut next = 0;
        while next < num_here {
            let mut parts = [part; ROWS_AT_ONCE];
            for (ahead, part) in parts.iter_mut().enumerate() {
                let of_lane = next + ahead as u32;
                *part = part.of_lane(of_lane);
                part.num_sources = if of_lane < num_here { part.num_sources } else { 0 };
            }
            merge::<E, DIM_BLOCKS>(params, division, &parts, lane);
            next += ROWS_AT_ONCE as u32;
        }
        first += LANES * num_warps;
    }
}

/// Brings what the plan says of the first rows that a block's `warps` warps merge nearer: it lies side by side.
///
/// # Safety
///
/// As [`merge_rows`], but for the task that the block may still have; by one lane.
#[inline(always)]
pub unsafe fn prefetch<const DIM_BLOCKS: usize>(params: &AttentionParams, share: Share, warps: u32) {
    if params.num_merged_rows > 0 && share.of > 0 {
        let division = Division::of::<DIM_BLOCKS>(params.num_merged_rows, warps * num_blocks());
        let part = MergedPart::find(params, division, share.index * warps);
        prefetch_global(params.merge_sources + 4 * u64::from(part.source_begin));
    }
}

/// Merges some parts, waiting for their partials, and stores them.
#[inline(always)]
unsafe fn merge<E: Element, const DIM_BLOCKS: usize>(
    params: &AttentionParams,
    division: Division,
    parts: &[MergedPart; ROWS_AT_ONCE],
    lane: u32,
) {
    let dim = const { 8 * DIM_BLOCKS as u32 };
    let lanes = 1 << division.log2_lanes;
    let (partial_of_lane, partials_at_once) = (lane >> division.log2_lanes, LANES >> division.log2_lanes);
    let elements = parts.map(|part| (part.part * lanes + lane % lanes) * LANE_ELEMENTS);
    let mut sums = [Sum::NOTHING; ROWS_AT_ONCE];
    let (mut first_partials, mut sources) = ([0u64; ROWS_AT_ONCE], [0u32; ROWS_AT_ONCE]);
    for row in 0..ROWS_AT_ONCE {
        first_partials[row] = parts[row].first_partial(params);
        sources[row] = parts[row].source(params, lane);
    }
    let most = parts.iter().fold(0, |most, part| core::cmp::max(most, part.num_sources));
    let mut first = 0;
    while first < most {
        // Of each row a partial for each lane.
        let mut partials = first_partials;
        for row in 0..ROWS_AT_ONCE {
            partials[row] += u64::from(sources[row]);
            sources[row] = parts[row].source(params, first + LANES + lane);
        }
        let num_here = core::cmp::min(most - first, LANES);
        let (mut lse, mut weights) = ([0u32; ROWS_AT_ONCE], [0f32; ROWS_AT_ONCE]);
        let mut next = 0;
        while next < num_here {
            let index_of = |ahead: usize| next + ahead as u32 * partials_at_once + partial_of_lane;
            let exists =
                |row: usize, index: u32| index < num_here && first + index < parts[row].num_sources && elements[row] < dim;
            let mut loaded = [[[0u32; LANE_ELEMENTS as usize]; ROWS_AT_ONCE]; LOADS_AHEAD as usize];
            let mut is_missing = true;
            while is_missing {
                if next == 0 {
                    for row in 0..ROWS_AT_ONCE {
                        lse[row] = parts[row].load_lse(params, partials[row], first + lane);
                    }
                }
                for (ahead, loaded) in loaded.iter_mut().enumerate() {
                    for row in 0..ROWS_AT_ONCE {
                        let index = index_of(ahead);
                        let address = output_address(params, shuffle_u64(partials[row], index), dim, elements[row]);
                        loaded[row] = load_of_device_x4_if(address, exists(row, index));
                    }
                }
                let is_lse_missing = warp::any(is_any_missing(&lse));
                is_missing = is_lse_missing || warp::any(is_any_missing(loaded.as_flattened().as_flattened()));
                if is_lse_missing {
                    wait_for_lse(params, parts, &partials, first + lane);
                }
            }
            if next == 0 {
                for row in 0..ROWS_AT_ONCE {
                    weights[row] = sums[row].add_weights(f32::from_bits(lse[row]) * LOG2_E);
                    let is_read = division.parts == 1 && first + lane < parts[row].num_sources;
                    store_global_if(params.partial_lse + 4 * partials[row], NOT_STORED, is_read);
                }
            }
            for (ahead, loaded) in loaded.iter().enumerate() {
                for row in 0..ROWS_AT_ONCE {
                    let index = index_of(ahead);
                    let weight = f32::from_bits(warp::shuffle_from(weights[row].to_bits(), index));
                    for (sum, &word) in sums[row].elements.iter_mut().zip(&loaded[row]) {
                        *sum += weight * f32::from_bits(word);
                    }
                    let address = output_address(params, shuffle_u64(partials[row], index), dim, elements[row]);
                    store_global_x4_if(address, [NOT_STORED; 4], exists(row, index));
                }
            }
            next += LOADS_AHEAD * partials_at_once;
        }
        first += LANES;
    }
    for row in 0..ROWS_AT_ONCE {
        // What other lanes have loaded of the same elements.
        for element in &mut sums[row].elements {
            for log2_distance in FEWEST_LANES.ilog2()..LANES.ilog2() {
                let other = warp::shuffle_xor(*element, 1 << log2_distance);
                *element += if log2_distance < division.log2_lanes { 0.0 } else { other };
            }
        }
        if parts[row].num_sources > 0 && partial_of_lane == 0 && elements[row] < dim {
            store::<E, DIM_BLOCKS>(params, &parts[row], elements[row], sums[row]);
        }
        if division.parts > 1 {
            parts[row].leave_lse(params, division, lane);
        }
    }
    warp::sync();
}

/// Waits until partials of each row, one in each lane, have their log-sum-exp; `index` is which of the row's the lane's are.
#[inline(always)]
unsafe fn wait_for_lse(params: &AttentionParams, parts: &[MergedPart; ROWS_AT_ONCE], partials: &[u64; ROWS_AT_ONCE], index: u32) {
    let mut lse = [NOT_STORED; ROWS_AT_ONCE];
    while warp::any(is_any_missing(&lse)) {
        control::sleep(NS_BETWEEN_LOOKS);
        for row in 0..ROWS_AT_ONCE {
            lse[row] = parts[row].load_lse(params, partials[row], index);
        }
    }
}

/// Whether some of these words have not been stored yet.
#[inline(always)]
fn is_any_missing(words: &[u32]) -> bool {
    words.iter().fold(false, |is_missing, &word| is_missing | (word == NOT_STORED))
}

/// Where the elements of partial row `partial` lie, from `element` on.
#[inline(always)]
fn output_address(params: &AttentionParams, partial: u64, dim: u32, element: u32) -> DeviceAddress {
    params.partial_o + 4 * (partial * u64::from(dim) + u64::from(element))
}

/// The value of lane `lane`.
#[inline(always)]
unsafe fn shuffle_u64(value: u64, lane: u32) -> u64 {
    let [low, high] = [value as u32, (value >> 32) as u32].map(|half| warp::shuffle_from(half, lane));
    u64::from(high) << 32 | u64::from(low)
}

/// Stores the lane's elements, from `element` on, of a merged part.
#[inline(always)]
unsafe fn store<E: Element, const DIM_BLOCKS: usize>(params: &AttentionParams, part: &MergedPart, element: u32, mut sum: Sum) {
    if params.sinks != 0 {
        // One more partial, whose O is zero.
        let sink_log2 = f32::from_bits(load_global(params.sinks + 4 * u64::from(part.qo_head(params)))) * LOG2_E;
        sum.total += math::exp2(sink_log2 - sum.make_room(sink_log2));
    }
    let inverse = if sum.total == 0.0 { 0.0 } else { math::reciprocal(sum.total) };
    let [a, b, c, d] = sum.elements.map(|element| element * inverse);
    let row = u64::from(part.token) * u64::from(params.heads.num_qo_heads) + u64::from(part.qo_head(params));
    let address = params.o + (row * (8 * DIM_BLOCKS as u64) + u64::from(element)) * u64::from(ELEMENT_BYTES);
    store_global_x2(address, [E::pack(a, b), E::pack(c, d)]);
    if params.lse != 0 && element == 0 {
        let origin = if sum.max == f32::NEG_INFINITY { 0.0 } else { sum.max };
        store_global_f32(params.lse + 4 * row, (origin + math::log2(sum.total)) * LN_2);
    }
}
