//! Merging partials in the launch that makes them: the last to store a partial of a row merges all of them.
//!
//! Every row that is merged has a counter. A warp that has stored a partial of the row adds one; if all others had arrived, it merges them, in the order
//! of the plan's sources, so that the result does not depend on who is last.

use packinfer_abi::{AttentionParams, DeviceAddress, MergeToken};

use crate::attention::task::Task;
use crate::element::{ELEMENT_BYTES, Element};
use crate::merge::Merged;
use crate::ptx::math::divide;
use crate::ptx::memory::{
    fence_device, fetch_add_global_if, load_global, load_of_device_if, load_of_device_x4_if, store_global, store_global_f32,
    store_global_x2,
};
use crate::ptx::warp::{self, LANES};
use crate::rows::NO_ROW;

/// Elements of O that a lane merges: 16 bytes of a partial.
const LANE_ELEMENTS: u32 = 4;
/// Elements that a warp merges at a time: a part of a row that has more.
const PART_ELEMENTS: u32 = LANES * LANE_ELEMENTS;
/// Pairs of these.
const PAIRS: usize = LANE_ELEMENTS as usize / 2;

/// A row of O that is merged from partials.
#[derive(Clone, Copy)]
struct MergedRow {
    /// `token * num_qo_heads + head`.
    index: u32,
    /// Its head within the head group.
    head: u32,
    /// First of its merge sources.
    source_begin: u32,
    /// Number of its merge sources.
    num_sources: u32,
}

impl MergedRow {
    /// What row `row` of a tile is a partial of, and the address of its counter.
    #[inline(always)]
    unsafe fn find(task: &Task, row: u32) -> (Self, DeviceAddress) {
        let AttentionParams { heads, merge_of_partial, merge_tokens, arrivals, .. } = &task.params;
        let partial = task.item.partial_row + row;
        let partial_token = divide(partial, heads.heads_per_group);
        let head = partial - partial_token * heads.heads_per_group;
        let merge = load_global(merge_of_partial + 4 * u64::from(partial_token));
        let token = merge_tokens + u64::from(merge) * size_of::<MergeToken>() as u64;
        let found = Self {
            index: task.rows.index(row),
            head,
            source_begin: load_global(token + core::mem::offset_of!(MergeToken, source_begin) as u64),
            num_sources: load_global(token + core::mem::offset_of!(MergeToken, num_sources) as u64),
        };
        let counter = u64::from(merge) * u64::from(heads.num_qo_heads) + u64::from(found.qo_head(task));
        (found, arrivals + 4 * counter)
    }

    /// Its query head.
    #[inline(always)]
    fn qo_head(&self, task: &Task) -> u32 {
        task.head_group * task.params.heads.heads_per_group + self.head
    }

    /// The row of lane `lane`.
    #[inline(always)]
    unsafe fn of_lane(self, lane: u32) -> Self {
        Self {
            index: warp::shuffle_from(self.index, lane),
            head: warp::shuffle_from(self.head, lane),
            source_begin: warp::shuffle_from(self.source_begin, lane),
            num_sources: warp::shuffle_from(self.num_sources, lane),
        }
    }

    /// Its merge source `source`; the last if there are not so many.
    #[inline(always)]
    unsafe fn source(&self, task: &Task, source: u32) -> u32 {
        let source = self.source_begin + core::cmp::min(source, self.num_sources - 1);
        load_global(task.params.merge_sources + 4 * u64::from(source))
    }

    /// Loads the lane's elements of a part of its partial of merge source `source`, which is its `index`-th; there may be none.
    #[inline(always)]
    unsafe fn partial<const DIM_BLOCKS: usize>(&self, task: &Task, lane: u32, part: u32, index: u32, source: u32) -> Partial {
        let exists = index < self.num_sources;
        let row = u64::from(task.head_group) * u64::from(task.params.num_partial_rows) + u64::from(source + self.head);
        let element = element::<DIM_BLOCKS>(row, part, lane);
        let lse = load_of_device_if(task.params.partial_lse + 4 * row, exists, f32::NEG_INFINITY.to_bits());
        let [a, b, c, d] = load_of_device_x4_if(task.params.partial_o + 4 * element, exists).map(f32::from_bits);
        Partial { lse: f32::from_bits(lse), output: [[a, b], [c, d]] }
    }

    /// Stores the lane's elements of a part of the row.
    #[inline(always)]
    unsafe fn store<E: Element, const DIM_BLOCKS: usize>(&self, task: &Task, lane: u32, part: u32, merged: &Merged<PAIRS>) {
        let element = element::<DIM_BLOCKS>(self.index.into(), part, lane);
        store_global_x2(task.params.o + element * u64::from(ELEMENT_BYTES), merged.output().map(|[a, b]| E::pack(a, b)));
        if task.params.lse != 0 {
            store_global_f32(task.params.lse + 4 * u64::from(self.index), merged.lse());
        }
    }
}

/// What a lane has of a partial.
#[derive(Clone, Copy)]
struct Partial {
    lse: f32,
    output: [[f32; 2]; PAIRS],
}

impl Partial {
    const NOTHING: Self = Self { lse: f32::NEG_INFINITY, output: [[0.0; 2]; PAIRS] };
}

/// First of the elements that a lane merges of a part, of row `row` of O or of the partials. Where a row has fewer, the upper lanes do what the lower ones
/// do.
#[inline(always)]
fn element<const DIM_BLOCKS: usize>(row: u64, part: u32, lane: u32) -> u64 {
    let dim = 8 * DIM_BLOCKS as u32;
    row * u64::from(dim) + u64::from((part * PART_ELEMENTS + lane * LANE_ELEMENTS) % dim)
}

/// Notes that rows of a partial are stored, and merges those whose other partials are stored already: `ROWS_AT_ONCE` rows at a time, of each of which
/// `PARTIALS_AHEAD` partials are loaded at once. A lane that `counts` stands for row `row` of the tile, if there is such a row.
///
/// # Safety
///
/// Reached by all lanes of the warp, after a barrier that all threads have reached that stored parts of these rows. The task's item is not direct.
#[inline(always)]
pub unsafe fn finish_rows<E: Element, const DIM_BLOCKS: usize, const ROWS_AT_ONCE: usize, const PARTIALS_AHEAD: usize>(
    task: &Task,
    lane: u32,
    row: u32,
    counts: bool,
) {
    let counts = counts && task.rows.index(row) != NO_ROW;
    // Lanes that stand for no row look at the first, which there always is.
    let (row, arrivals) = MergedRow::find(task, if counts { row } else { 0 });
    fence_device();
    let before = fetch_add_global_if(arrivals, 1, counts);
    let is_last = counts & (before + 1 == row.num_sources);
    let mut complete = warp::lanes_where(is_last);
    if complete == 0 {
        return;
    }
    fence_device();
    if is_last {
        store_global(arrivals, 0);
    }
    warp::sync();
    while complete != 0 {
        let mut rows = [row; ROWS_AT_ONCE];
        let mut of_lane = 0;
        for row in &mut rows {
            // The next; where no more are left, the last once more.
            of_lane = if complete != 0 { complete.trailing_zeros() } else { of_lane };
            complete &= complete.wrapping_sub(1);
            *row = row.of_lane(of_lane);
        }
        for part in 0..(8 * DIM_BLOCKS as u32).div_ceil(PART_ELEMENTS) {
            merge_rows::<E, DIM_BLOCKS, ROWS_AT_ONCE, PARTIALS_AHEAD>(task, lane, part, &rows);
        }
    }
}

/// Merges a part of some rows, all of whose partials can be read, and stores it.
#[inline(always)]
unsafe fn merge_rows<E: Element, const DIM_BLOCKS: usize, const ROWS: usize, const PARTIALS_AHEAD: usize>(
    task: &Task,
    lane: u32,
    part: u32,
    rows: &[MergedRow; ROWS],
) {
    const { assert!(LANES % PARTIALS_AHEAD as u32 == 0) };
    let mut merged = [Merged::<PAIRS>::NOTHING; ROWS];
    let most = warp::max(rows.iter().fold(0, |most, row| core::cmp::max(most, row.num_sources)));
    let mut first = 0;
    while first < most {
        // Of each row a source for each lane.
        let mut sources = [0u32; ROWS];
        for (source, row) in sources.iter_mut().zip(rows) {
            *source = row.source(task, first + lane);
        }
        let num_here = core::cmp::min(most - first, LANES);
        let mut next = 0;
        while next < num_here {
            let mut partials = [[Partial::NOTHING; ROWS]; PARTIALS_AHEAD];
            for ahead in 0..PARTIALS_AHEAD {
                let index = next + ahead as u32;
                for row in 0..ROWS {
                    let source = warp::shuffle_from(sources[row], index);
                    partials[ahead][row] = rows[row].partial::<DIM_BLOCKS>(task, lane, part, first + index, source);
                }
            }
            for partials in &partials {
                for row in 0..ROWS {
                    merged[row].add_partial(partials[row].lse, &partials[row].output);
                }
            }
            next += PARTIALS_AHEAD as u32;
        }
        first += LANES;
    }
    for (row, merged) in rows.iter().zip(&mut merged) {
        merged.add_sink(task.params.sinks, row.qo_head(task));
        row.store::<E, DIM_BLOCKS>(task, lane, part, merged);
    }
}
