//! The converters: make K and V of wide tiles in float16, of what is stored in FP8. Consumers of narrow tiles do so by
//! themselves.
//!
//! ```text
//! copy engine   K₀ₐ K₀ᵦ V₀ₐ V₀ᵦ K₁ₐ …       a ring of parts of a step, as they are stored
//! converters        K₀ₐ K₀ᵦ V₀ₐ V₀ᵦ …       ▸ rings of K and of V, as they are in other kernels
//! consumers                 S₀ · S₁ P₀V₀ …
//! ```
//!
//! K and V become float16, which weights are in too, and Q (see [`scaled`](super::scaled)). Numbers are as they are stored: the
//! scales of K and V go into the [scale](Shared::scales) of the softmax, and into O.

use packinfer_abi::{AttentionParams, TileKind};

use super::PAIR;
use super::helpers::{Converters, STORED_PARTS, StoredPart, Tensor};
use super::shared::{ColumnTile, Ring, Shared};
use crate::e4m3::four_to_f16;
use crate::ptx::cp_async::CHUNK_BYTES;
use crate::ptx::math::opaque;
use crate::ptx::memory::{load_shared_x4, store_shared_x4};
use crate::ptx::warp::{self, LANES};
use crate::ptx::{warpgroup, wgmma};
use crate::shared_tile::BoxTile;

/// Warps of the converters.
pub const CONVERTER_WARPS: u32 = warpgroup::THREADS / LANES;
/// Chunks of 16 numbers that a panel is made of: two of its chunks each.
const CHUNKS_PER_PANEL: u32 = 4;
/// Panels that are made of one as it is stored.
const PANELS_STORED_IN_ONE: u32 = 2;
/// The most [rounds](Share::rounds) of a part.
const MOST_ROUNDS: usize = 4;
/// Of eight rows, the one that lies opposite of row 0 in both tiles: a swizzle by it moves chunks `0 ..= 3` of one to where
/// `4 ..= 7` were, and even ones of the other to odd ones. Lanes of rows that differ by it meet no bank twice.
const OPPOSITE: u32 = 5;

/// Does the converters' part until no task is left.
///
/// # Safety
///
/// Reached by all threads of their warpgroup, of which this is `thread`.
#[inline(always)]
pub unsafe fn run<
    const DIM_BLOCKS: usize,
    const FRAGMENTS: usize,
    const STAGES: u32,
    const CHUNKS: usize,
    const PART_BLOCKS: usize,
>(
    params: &AttentionParams,
    shared: Shared<DIM_BLOCKS, FRAGMENTS, PAIR, Converters<STAGES, CHUNKS, PART_BLOCKS>>,
    thread: u32,
) {
    let step = Shared::<DIM_BLOCKS, FRAGMENTS, PAIR, Converters<STAGES, CHUNKS, PART_BLOCKS>>::STEP;
    let (mut items, mut k, mut v) = (shared.item_ring(), shared.k_ring(), shared.v_ring());
    let (warp, lane) = (warp::uniform(thread / LANES), thread % LANES);
    let mut stored = Stored::<CHUNKS, PART_BLOCKS> { parts: shared.stored(0), ring: shared.stored_ring(), warp, lane };
    // Of those that bring a narrow tile, the first for each tensor is one of the producer.
    let (tensor, loader) = (if warp % 2 == 0 { Tensor::K } else { Tensor::V }, 1 + warp / 2);
    let mut narrow = shared.narrow_ring(tensor);
    let can_bring = const { Converters::<STAGES, CHUNKS, PART_BLOCKS>::can_bring::<DIM_BLOCKS>() };
    let brings_narrow = can_bring && warp::any(loader < params.narrow_loaders);
    while let Some(slot) = shared.next_posted(&items) {
        let columns = shared.columns(slot);
        if shared.tile_kind(slot) == Some(TileKind::Wide) {
            for _ in 0..(columns.end - columns.start).div_ceil(step) {
                stored.convert(&mut k, shared.k(0));
                stored.convert(&mut v, shared.v(0));
            }
        } else if brings_narrow {
            // What narrow tiles are brought to lies where wide ones have all of this, and what it is made of, which nobody needs
            // any more when it is made.
            k.wait_all_empty();
            v.wait_all_empty();
            let task = shared.task(params, slot);
            Converters::load_narrow(shared, tensor, &task, &mut narrow, loader, lane, |_| ());
        }
        items.release_by_lanes();
    }
}

/// What is stored, and a converting warp's place. None of it is there before loaders have
/// [made room](super::helpers::StoredRings) for what becomes of it.
struct Stored<const CHUNKS: usize, const PART_BLOCKS: usize> {
    /// The first of the ring.
    parts: StoredPart<CHUNKS, PART_BLOCKS>,
    ring: Ring,
    warp: u32,
    lane: u32,
}

impl<const CHUNKS: usize, const PART_BLOCKS: usize> Stored<CHUNKS, PART_BLOCKS> {
    /// Rows of a part.
    const ROWS: u32 = StoredPart::<CHUNKS, PART_BLOCKS>::ROWS;

    /// Makes the next step of K or V for `ring`, at `first_tile` and behind it, of the next parts of what is stored.
    #[inline(always)]
    unsafe fn convert<const DIM_BLOCKS: usize, const FRAGMENTS: usize>(
        &mut self,
        ring: &mut Ring,
        first_tile: ColumnTile<DIM_BLOCKS, FRAGMENTS>,
    ) {
        const { assert!(STORED_PARTS * Self::ROWS == ColumnTile::<DIM_BLOCKS, FRAGMENTS>::ROWS) };
        let rounds = const { Share::<DIM_BLOCKS>::rounds(Self::ROWS) };
        // Worked out again for each step: the compiler would keep all addresses that depend on it.
        let Place { row, panel, chunk } = Share::<DIM_BLOCKS>::first(rounds, self.warp, opaque(self.lane));
        let of_panel = panel % PANELS_STORED_IN_ONE * CHUNKS_PER_PANEL + chunk;
        let mut chunks = [[0; 4]; MOST_ROUNDS];
        for part in 0..STORED_PARTS {
            self.ring.wait_full();
            let of_part = self.parts.skip_tiles(self.ring.stage()).row(row, panel / PANELS_STORED_IN_ONE);
            let first = swizzled(of_part, row, of_panel);
            for (round, words) in (0..rounds).zip(&mut chunks) {
                *words = load_shared_x4(first + round * StoredPart::<CHUNKS, PART_BLOCKS>::EIGHT_ROWS_BYTES);
            }
            if part == 0 {
                // Only now: what is loaded needs no room there.
                ring.wait_empty();
            }
            let of_step = first_tile.skip_tiles(ring.stage()).row(part * Self::ROWS + row, panel);
            let first = [0, 1].map(|half| swizzled(of_step, row, 2 * chunk + half));
            for (round, words) in (0..rounds).zip(&chunks) {
                let [a, b, c, d] = words.map(four_to_f16);
                let rows_on = round * ColumnTile::<DIM_BLOCKS, FRAGMENTS>::EIGHT_ROWS_BYTES;
                store_shared_x4(first[0] + rows_on, [a[0], a[1], b[0], b[1]]);
                store_shared_x4(first[1] + rows_on, [c[0], c[1], d[0], d[1]]);
            }
            warp::sync();
            self.ring.release(self.lane);
        }
        // Products read it as the copy engine would.
        wgmma::fence_shared_writes();
        ring.fill();
    }
}

/// What a lane converts at once: 16 numbers of a row of a part. In every round, those eight rows on: so all that it converts is
/// swizzled alike.
struct Place {
    row: u32,
    /// The panel that they become a part of, and which chunk they are of what becomes that.
    panel: u32,
    chunk: u32,
}

/// How warps share parts, whose rows are of `8 * DIM_BLOCKS` numbers.
struct Share<const DIM_BLOCKS: usize>;

impl<const DIM_BLOCKS: usize> Share<DIM_BLOCKS> {
    /// Panels of a row.
    const PANELS: u32 = BoxTile::<DIM_BLOCKS, 1>::PANELS;
    /// Of these, those that a warp has.
    const PANELS_OF_WARP: u32 = if Self::PANELS == CONVERTER_WARPS { 1 } else { Self::PANELS };
    /// Of the four pairs of opposite rows among eight, those that a warp has.
    const PAIRS_OF_WARP: u32 = LANES / (2 * CHUNKS_PER_PANEL) / Self::PANELS_OF_WARP;
    /// Warps that share eight rows: by their pairs, and by panels.
    const WARPS_BY_PAIR: u32 = 4 / Self::PAIRS_OF_WARP;
    const WARPS: u32 = Self::WARPS_BY_PAIR * (Self::PANELS / Self::PANELS_OF_WARP);

    /// Rounds that a part of `rows` rows takes.
    const fn rounds(rows: u32) -> u32 {
        rows / 8 * Self::WARPS / CONVERTER_WARPS
    }

    /// What the lane has in the first of these rounds. Lanes: four chunks for a panel of one row, four of the opposite row; then
    /// those for the other panel; then other rows.
    #[inline(always)]
    fn first(rounds: u32, warp: u32, lane: u32) -> Place {
        let (is_opposite, group) = (lane / CHUNKS_PER_PANEL % 2, lane / (2 * CHUNKS_PER_PANEL));
        let of_rows = warp % Self::WARPS;
        let pair = of_rows % Self::WARPS_BY_PAIR * Self::PAIRS_OF_WARP + group / Self::PANELS_OF_WARP;
        Place {
            row: warp / Self::WARPS * rounds * 8 + (pair ^ is_opposite * OPPOSITE),
            panel: of_rows / Self::WARPS_BY_PAIR * Self::PANELS_OF_WARP + group % Self::PANELS_OF_WARP,
            chunk: lane % CHUNKS_PER_PANEL,
        }
    }
}

/// The address of a chunk of a panel's row, which is row `row` of its tile, give or take a multiple of eight.
#[inline(always)]
fn swizzled(panel_row: u32, row: u32, chunk: u32) -> u32 {
    panel_row + (chunk ^ row % 8) * CHUNK_BYTES
}
