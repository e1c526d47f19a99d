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
    fetch_add_global_if, load_global, load_of_device_if, load_of_device_x4_if, prefetch_global, store_global, store_global_if,
    store_global_x2_if, store_global_x4_if,
};
use crate::ptx::special::{num_blocks, thread_index};
use crate::ptx::warp::{self, LANES};
use crate::softmax::LN_2;

/// Elements of a partial that a lane loads at once: 16 bytes.
const LANE_ELEMENTS: u32 = 4;
/// The fewest lanes that load parts of one partial.
const FEWEST_LANES: u32 = 8;
/// Windows that a warp takes in at once.
const WINDOWS_AT_ONCE: usize = 2;
/// Loads of partials that a lane has on their way, for each window.
const LOADS_AHEAD: usize = 4;
/// Parts of rows that a warp gets, where there are few.
const FEW_PARTS: u32 = 2;
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
    /// As many parts of a row as leave each of a launch's `num_warps` warps few.
    #[inline(always)]
    fn of<const DIM_BLOCKS: usize>(num_rows: u32, num_warps: u32) -> Self {
        let lanes_of_row = 8 * DIM_BLOCKS as u32 / LANE_ELEMENTS;
        let parts = |log2_lanes: u32| (lanes_of_row + (1 << log2_lanes) - 1) >> log2_lanes;
        let mut log2_lanes = if lanes_of_row > LANES / 2 { LANES.ilog2() } else { lanes_of_row.ilog2() };
        while log2_lanes > FEWEST_LANES.ilog2()
            && u64::from(num_rows) * u64::from(parts(log2_lanes - 1)) <= u64::from(FEW_PARTS) * u64::from(num_warps)
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

    /// The row of the `index`-th of its partials; of the first where there are not so many.
    #[inline(always)]
    unsafe fn partial(&self, params: &AttentionParams, index: u32) -> u32 {
        let source = self.source_begin + if index < self.num_sources { index } else { 0 };
        self.first_partial(params) + load_global(params.merge_sources + 4 * u64::from(source))
    }

    /// Where those that have read the log-sum-exps of its row are counted.
    #[inline(always)]
    fn lse_readers(&self, params: &AttentionParams) -> DeviceAddress {
        params.lse_readers + 4 * u64::from(self.row)
    }

    /// Leaves [`NOT_STORED`] behind, when the log-sum-exps of its row have been read for all parts.
    #[inline(always)]
    unsafe fn forget_lse(&self, params: &AttentionParams, lane: u32) {
        if lane == 0 {
            store_global(self.lse_readers(params), 0);
        }
        let mut index = lane;
        while index < self.num_sources {
            store_global(lse_address(params, self.partial(params, index)), NOT_STORED);
            index += LANES;
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

    /// Partial row 0 of its head. The rows of all heads can be counted in 32 bits: no device has memory for more.
    #[inline(always)]
    unsafe fn first_partial(&self, params: &AttentionParams) -> u32 {
        let head = self.qo_head(params);
        let head_group = divide(head, params.heads.heads_per_group);
        head_group * params.num_partial_rows + head - head_group * params.heads.heads_per_group
    }
}

/// Up to as many partials of a part as a warp has lanes: what it takes in at once.
#[derive(Clone, Copy)]
struct Window {
    part: MergedPart,
    /// The first of its partials, counted in its row.
    first: u32,
}

impl Window {
    /// Whether they are the last of their row; not if there are none.
    #[inline(always)]
    fn is_last(&self) -> bool {
        self.first < self.part.num_sources && self.part.num_sources <= self.first + LANES
    }

    /// Whether the row has a partial for place `index` of the window.
    #[inline(always)]
    fn has(&self, index: u32) -> bool {
        index < LANES && self.first + index < self.part.num_sources
    }

    /// Of the lane's partial, a log-sum-exp that has not been seen yet: −∞ where there is no partial.
    #[inline(always)]
    fn lse_to_see(&self, lane: u32) -> u32 {
        if self.has(lane) { NOT_STORED } else { f32::NEG_INFINITY.to_bits() }
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

    /// Adds the sum of other partials.
    #[inline(always)]
    fn add(&mut self, other: &Self) {
        let factor = math::exp2(other.max - self.make_room(other.max));
        self.total += factor * other.total;
        for (element, other) in self.elements.iter_mut().zip(&other.elements) {
            *element += factor * other;
        }
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
    let mut first_part = share.index * warps + warp;
    while first_part < num_parts {
        // One in each lane.
        let part = MergedPart::find(params, division, first_part + lane * num_warps);
        let num_here = core::cmp::min((num_parts - first_part).div_ceil(num_warps), LANES);
        let mut sum = Sum::NOTHING;
        let (mut next, mut first) = (0, 0);
        while next < num_here {
            let mut windows = [Window { part, first: 0 }; WINDOWS_AT_ONCE];
            for window in &mut windows {
                window.part = part.of_lane(next);
                window.part.num_sources = if next < num_here { window.part.num_sources } else { 0 };
                window.first = first;
                first += LANES;
                if first >= window.part.num_sources {
                    (next, first) = (next + 1, 0);
                }
            }
            let sums = sum_up::<DIM_BLOCKS>(params, division, &windows, lane);
            for (window, of_window) in windows.iter().zip(&sums) {
                if window.first == 0 {
                    sum = Sum::NOTHING;
                }
                sum.add(of_window);
                if window.is_last() {
                    store::<E, DIM_BLOCKS>(params, division, &window.part, &sum, lane);
                }
            }
            if division.parts > 1 {
                leave_lse(params, division, &windows, lane);
            }
            warp::sync();
        }
        first_part += LANES * num_warps;
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

/// The sums of some windows, whose partials are waited for.
#[inline(always)]
unsafe fn sum_up<const DIM_BLOCKS: usize>(
    params: &AttentionParams,
    division: Division,
    windows: &[Window; WINDOWS_AT_ONCE],
    lane: u32,
) -> [Sum; WINDOWS_AT_ONCE] {
    let dim = const { 8 * DIM_BLOCKS as u32 };
    let (partial_of_lane, partials_at_once) = (lane >> division.log2_lanes, LANES >> division.log2_lanes);
    let mut sums = [Sum::NOTHING; WINDOWS_AT_ONCE];
    let (mut partials, mut elements, mut most) = ([0u32; WINDOWS_AT_ONCE], [0u32; WINDOWS_AT_ONCE], 0);
    for (row, window) in windows.iter().enumerate() {
        partials[row] = window.part.partial(params, window.first + lane);
        elements[row] = first_element(division, &window.part, lane);
        most = core::cmp::max(most, core::cmp::min(window.part.num_sources.saturating_sub(window.first), LANES));
    }
    let (mut lse, mut weights) = (windows.each_ref().map(|window| window.lse_to_see(lane)), [0f32; WINDOWS_AT_ONCE]);
    let mut next = 0;
    while next < most {
        let index_of = |ahead: usize| next + ahead as u32 * partials_at_once + partial_of_lane;
        let mut loaded = [[[0u32; LANE_ELEMENTS as usize]; WINDOWS_AT_ONCE]; LOADS_AHEAD];
        let mut is_missing = true;
        while is_missing {
            if next == 0 {
                look_for_lse(params, &partials, &mut lse);
            }
            for (ahead, loaded) in loaded.iter_mut().enumerate() {
                for (row, window) in windows.iter().enumerate() {
                    let index = index_of(ahead);
                    let address = output_address(params, warp::shuffle_from(partials[row], index), dim, elements[row]);
                    loaded[row] = load_of_device_x4_if(address, window.has(index) && elements[row] < dim);
                }
            }
            let is_lse_missing = warp::any(is_any_missing(&lse));
            is_missing = is_lse_missing || warp::any(is_any_missing(loaded.as_flattened().as_flattened()));
            if is_lse_missing {
                wait_for_lse(params, &partials, &mut lse);
            }
        }
        if next == 0 {
            for (row, window) in windows.iter().enumerate() {
                weights[row] = sums[row].add_weights(f32::from_bits(lse[row]) * LOG2_E);
                let is_read = division.parts == 1 && window.has(lane);
                store_global_if(lse_address(params, partials[row]), NOT_STORED, is_read);
            }
        }
        for (ahead, loaded) in loaded.iter().enumerate() {
            for (row, window) in windows.iter().enumerate() {
                let index = index_of(ahead);
                let weight = f32::from_bits(warp::shuffle_from(weights[row].to_bits(), index));
                for (sum, &word) in sums[row].elements.iter_mut().zip(&loaded[row]) {
                    *sum += weight * f32::from_bits(word);
                }
                let address = output_address(params, warp::shuffle_from(partials[row], index), dim, elements[row]);
                store_global_x4_if(address, [NOT_STORED; 4], window.has(index) && elements[row] < dim);
            }
        }
        next += LOADS_AHEAD as u32 * partials_at_once;
    }
    sums
}

/// Looks for log-sum-exps of partials, one of each window in each lane, that have not been seen yet.
#[inline(always)]
unsafe fn look_for_lse(params: &AttentionParams, partials: &[u32; WINDOWS_AT_ONCE], lse: &mut [u32; WINDOWS_AT_ONCE]) {
    for (lse, &partial) in lse.iter_mut().zip(partials) {
        *lse = load_of_device_if(lse_address(params, partial), *lse == NOT_STORED, *lse);
    }
}

/// Waits until all have been seen.
#[inline(always)]
unsafe fn wait_for_lse(params: &AttentionParams, partials: &[u32; WINDOWS_AT_ONCE], lse: &mut [u32; WINDOWS_AT_ONCE]) {
    while warp::any(is_any_missing(lse)) {
        control::sleep(NS_BETWEEN_LOOKS);
        look_for_lse(params, partials, lse);
    }
}

/// Says of parts whose last window this was that the log-sum-exps of their row have been read; where they have been for all parts
/// of a row, leaves [`NOT_STORED`] behind.
#[inline(always)]
unsafe fn leave_lse(params: &AttentionParams, division: Division, windows: &[Window; WINDOWS_AT_ONCE], lane: u32) {
    // One in each of the first lanes.
    let (mut counter, mut is_read) = (params.lse_readers, false);
    for (index, window) in (0..).zip(windows) {
        if lane == index {
            (counter, is_read) = (window.part.lse_readers(params), window.is_last());
        }
    }
    let before = fetch_add_global_if(counter, 1, is_read);
    for (index, window) in (0..).zip(windows) {
        if window.is_last() && warp::shuffle_from(before, index) + 1 == division.parts {
            window.part.forget_lse(params, lane);
        }
    }
}

/// Whether some of these words have not been stored yet.
#[inline(always)]
fn is_any_missing(words: &[u32]) -> bool {
    words.iter().fold(false, |is_missing, &word| is_missing | (word == NOT_STORED))
}

/// Where the log-sum-exp of partial row `partial` lies.
#[inline(always)]
fn lse_address(params: &AttentionParams, partial: u32) -> DeviceAddress {
    params.partial_lse + 4 * u64::from(partial)
}

/// Where the elements of partial row `partial` lie, from `element` on.
#[inline(always)]
fn output_address(params: &AttentionParams, partial: u32, dim: u32, element: u32) -> DeviceAddress {
    params.partial_o + 4 * (u64::from(partial) * u64::from(dim) + u64::from(element))
}

/// The first of the elements of a part that the lane loads; there may be none.
#[inline(always)]
fn first_element(division: Division, part: &MergedPart, lane: u32) -> u32 {
    let lanes = 1 << division.log2_lanes;
    (part.part * lanes + lane % lanes) * LANE_ELEMENTS
}

/// Stores a merged part, of which each lane has the sum of what it has loaded.
#[inline(always)]
unsafe fn store<E: Element, const DIM_BLOCKS: usize>(
    params: &AttentionParams,
    division: Division,
    part: &MergedPart,
    sum: &Sum,
    lane: u32,
) {
    let mut sum = *sum;
    // What other lanes have loaded of the same elements.
    for element in &mut sum.elements {
        for log2_distance in FEWEST_LANES.ilog2()..LANES.ilog2() {
            let other = warp::shuffle_xor(*element, 1 << log2_distance);
            *element += if log2_distance < division.log2_lanes { 0.0 } else { other };
        }
    }
    if params.sinks != 0 {
        // One more partial, whose O is zero.
        let sink_log2 = f32::from_bits(load_global(params.sinks + 4 * u64::from(part.qo_head(params)))) * LOG2_E;
        sum.total += math::exp2(sink_log2 - sum.make_room(sink_log2));
    }
    let inverse = if sum.total == 0.0 { 0.0 } else { math::reciprocal(sum.total) };
    let [a, b, c, d] = sum.elements.map(|element| element * inverse);
    let row = u64::from(part.token) * u64::from(params.heads.num_qo_heads) + u64::from(part.qo_head(params));
    let element = first_element(division, part, lane);
    let address = params.o + (row * (8 * DIM_BLOCKS as u64) + u64::from(element)) * u64::from(ELEMENT_BYTES);
    let stores = lane >> division.log2_lanes == 0 && element < const { 8 * DIM_BLOCKS as u32 };
    store_global_x2_if(address, [E::pack(a, b), E::pack(c, d)], stores);
    let origin = if sum.max == f32::NEG_INFINITY { 0.0 } else { sum.max };
    let lse = (origin + math::log2(sum.total)) * LN_2;
    store_global_if(params.lse + 4 * row, lse.to_bits(), params.lse != 0 && stores && element == 0);
}
