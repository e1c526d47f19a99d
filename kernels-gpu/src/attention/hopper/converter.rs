//! The converters: make K and V of wide tiles in the element types of products, of what is stored in FP8. Consumers of narrow tiles do so by themselves.
//!
//! ```text
//! copy engine   K₀ₐ K₀ᵦ V₀ₐ V₀ᵦ K₁ₐ …       a ring of parts of a step, as they are stored
//! converters        K₀ₐ K₀ᵦ V₀ₐ V₀ᵦ …       ▸ rings of K and of V, as they are in other kernels
//! consumers                 S₀ · S₁ P₀V₀ …
//! ```
//!
//! K becomes numbers of the type of Q; V float16, which weights are in too. Numbers are as they are stored: the scales of K and V go into the [scale](Shared::scales) of the softmax, and into O.

use packinfer_abi::TileKind;

use super::PAIR;
use super::helpers::{Converters, STORED_PARTS, StoredPart};
use super::shared::{ColumnTile, Ring, Shared};
use crate::e4m3::FromE4m3;
use crate::element::{Element, F16};
use crate::ptx::cp_async::CHUNK_BYTES;
use crate::ptx::memory::{load_shared_x4, store_shared_x4};
use crate::ptx::warp::{self, LANES};
use crate::ptx::{warpgroup, wgmma};

/// Warps of the converters.
pub const CONVERTER_WARPS: u32 = warpgroup::THREADS / LANES;
/// Chunks of 16 numbers that a panel is made of: two of its chunks each.
const CHUNKS_PER_PANEL: u32 = 4;
/// Panels that are made of one as it is stored.
const PANELS_STORED_IN_ONE: u32 = 2;
/// The most times that a warp goes on to other rows of a part.
const MOST_ROUNDS: usize = 4;
/// Of eight rows, the one that lies opposite of row 0 in both tiles: a swizzle by it moves chunks `0 ..= 3` of one to where `4 ..= 7` were, and even ones of the other to odd ones. Lanes of rows
/// that differ by it meet no bank twice.
const OPPOSITE: u32 = 5;

/// Does the converters' part until no task is left.
///
/// # Safety
///
/// Reached by all threads of their warpgroup, of which this is `thread`.
#[inline(always)]
pub unsafe fn run<
    E: Element + FromE4m3,
    const DIM_BLOCKS: usize,
    const FRAGMENTS: usize,
    const STAGES: u32,
    const CHUNKS: usize,
    const PART_BLOCKS: usize,
>(
    shared: Shared<DIM_BLOCKS, FRAGMENTS, PAIR, Converters<STAGES, CHUNKS, PART_BLOCKS>>,
    thread: u32,
) {
    let step = Shared::<DIM_BLOCKS, FRAGMENTS, PAIR, Converters<STAGES, CHUNKS, PART_BLOCKS>>::STEP;
    let (mut items, mut k, mut v) = (shared.item_ring(), shared.k_ring(), shared.v_ring());
    let (warp, lane) = (warp::uniform(thread / LANES), thread % LANES);
    let mut stored = Stored::<CHUNKS, PART_BLOCKS> { parts: shared.stored(0), ring: shared.stored_ring(), warp, lane };
    while let Some(slot) = shared.next_posted(&items) {
        let columns = shared.columns(slot);
        if shared.tile_kind(slot) == Some(TileKind::Wide) {
            for _ in 0..(columns.end - columns.start).div_ceil(step) {
                k.wait_empty();
                stored.convert::<E, DIM_BLOCKS, FRAGMENTS>(shared.k(k.stage()));
                k.fill();
                v.wait_empty();
                stored.convert::<F16, DIM_BLOCKS, FRAGMENTS>(shared.v(v.stage()));
                v.fill();
            }
        }
        items.release_by_lanes();
    }
}

/// What is stored, and a converting warp's place. None of it is there before loaders have [made room](super::helpers::StoredRings) for what becomes of it.
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

    /// Makes a step of K or V, for which there is room at `tile`, of the next parts of what is stored.
    #[inline(always)]
    unsafe fn convert<E: Element + FromE4m3, const DIM_BLOCKS: usize, const FRAGMENTS: usize>(
        &mut self,
        tile: ColumnTile<DIM_BLOCKS, FRAGMENTS>,
    ) {
        const { assert!(STORED_PARTS * Self::ROWS == ColumnTile::<DIM_BLOCKS, FRAGMENTS>::ROWS) };
        for part in 0..STORED_PARTS {
            self.ring.wait_full();
            self.convert_part::<E, DIM_BLOCKS, FRAGMENTS>(tile, part * Self::ROWS);
            warp::sync();
            self.ring.release(self.lane);
        }
        // Products read it as the copy engine would.
        wgmma::fence_shared_writes();
    }

    /// Makes the rows of `tile` from `first_row` on of the next part of what is stored.
    #[inline(always)]
    unsafe fn convert_part<E: Element + FromE4m3, const DIM_BLOCKS: usize, const FRAGMENTS: usize>(
        &self,
        tile: ColumnTile<DIM_BLOCKS, FRAGMENTS>,
        first_row: u32,
    ) {
        // Warps divide the rows, or where there are four panels, have one each: then all rounds of a lane are of rows that are swizzled alike.
        let (panels, panels_of_warp) = const {
            let panels = ColumnTile::<DIM_BLOCKS, FRAGMENTS>::PANELS;
            (panels, if panels == CONVERTER_WARPS { 1 } else { panels })
        };
        let warps_of_rows = panels / panels_of_warp;
        let rows_of_warp = Self::ROWS * warps_of_rows / CONVERTER_WARPS;
        let (first_panel, first_of_warp) = (self.warp % warps_of_rows * panels_of_warp, self.warp / warps_of_rows * rows_of_warp);
        let stored = self.parts.skip_tiles(self.ring.stage());
        // Lanes: four chunks for a panel of one row, four of the opposite row; then those for the other panel; then other rows.
        let (chunk, is_opposite, group) =
            (self.lane % CHUNKS_PER_PANEL, self.lane / CHUNKS_PER_PANEL % 2, self.lane / (2 * CHUNKS_PER_PANEL));
        let (panel, pair_of_group) = (first_panel + group % panels_of_warp, group / panels_of_warp);
        let pairs_at_once = LANES / (2 * CHUNKS_PER_PANEL) / panels_of_warp;
        let row_of = |round: usize| {
            let pair = round as u32 * pairs_at_once + pair_of_group;
            first_of_warp + pair / 4 * 8 + (pair % 4 ^ is_opposite * OPPOSITE)
        };
        let mut words = [[0; 4]; MOST_ROUNDS];
        let rounds = (rows_of_warp / 2 / pairs_at_once) as usize;
        for (round, words) in words[..rounds].iter_mut().enumerate() {
            let row = row_of(round);
            let of_panel = panel % PANELS_STORED_IN_ONE * CHUNKS_PER_PANEL + chunk;
            *words = load_shared_x4(swizzled(stored.row(row, panel / PANELS_STORED_IN_ONE), row, of_panel));
        }
        for (round, words) in words[..rounds].iter().enumerate() {
            let row = row_of(round);
            let [a, b, c, d] = words.map(E::four);
            let made = tile.row(first_row + row, panel);
            store_shared_x4(swizzled(made, row, 2 * chunk), [a[0], a[1], b[0], b[1]]);
            store_shared_x4(swizzled(made, row, 2 * chunk + 1), [c[0], c[1], d[0], d[1]]);
        }
    }
}

/// The address of a chunk of a panel's row, which is row `row` of its tile, give or take a multiple of eight.
#[inline(always)]
fn swizzled(panel_row: u32, row: u32, chunk: u32) -> u32 {
    panel_row + (chunk ^ row % 8) * CHUNK_BYTES
}
