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
use super::helpers::{Converters, STORED_PARTS, StoredTile};
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
pub unsafe fn run<E: Element + FromE4m3, const DIM_BLOCKS: usize, const FRAGMENTS: usize, const STAGES: u32>(
    shared: Shared<DIM_BLOCKS, FRAGMENTS, PAIR, Converters<STAGES>>,
    thread: u32,
) {
    let step = Shared::<DIM_BLOCKS, FRAGMENTS, PAIR, Converters<STAGES>>::STEP;
    let (mut items, mut k, mut v) = (shared.item_ring(), shared.k_ring(), shared.v_ring());
    let mut stored =
        Stored { tiles: shared.stored(0), ring: shared.stored_ring(), warp: warp::uniform(thread / LANES), lane: thread % LANES };
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
struct Stored {
    /// The first of the ring.
    tiles: StoredTile,
    ring: Ring,
    warp: u32,
    lane: u32,
}

impl Stored {
    /// Makes a step of K or V, for which there is room at `tile`, of the next parts of what is stored.
    #[inline(always)]
    unsafe fn convert<E: Element + FromE4m3, const DIM_BLOCKS: usize, const FRAGMENTS: usize>(
        &mut self,
        tile: ColumnTile<DIM_BLOCKS, FRAGMENTS>,
    ) {
        const { assert!(STORED_PARTS * StoredTile::ROWS == ColumnTile::<DIM_BLOCKS, FRAGMENTS>::ROWS) };
        for part in 0..STORED_PARTS {
            self.ring.wait_full();
            self.convert_part::<E, DIM_BLOCKS, FRAGMENTS>(tile, part * StoredTile::ROWS);
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
        let panels = ColumnTile::<DIM_BLOCKS, FRAGMENTS>::PANELS;
        let rows_of_warp = StoredTile::ROWS / CONVERTER_WARPS;
        let stored = self.tiles.skip_tiles(self.ring.stage());
        // Lanes: four chunks for a panel of one row, four of the opposite row; then those for the other panel; then other rows.
        let (chunk, is_opposite, group) =
            (self.lane % CHUNKS_PER_PANEL, self.lane / CHUNKS_PER_PANEL % 2, self.lane / (2 * CHUNKS_PER_PANEL));
        let (panel, pair_of_group) = (group % panels, group / panels);
        let pairs_at_once = LANES / (2 * CHUNKS_PER_PANEL) / panels;
        let row_of = |round: usize| {
            let pair = round as u32 * pairs_at_once + pair_of_group;
            self.warp * rows_of_warp + pair / 4 * 8 + (pair % 4 ^ is_opposite * OPPOSITE)
        };
        let mut words = [[0; 4]; MOST_ROUNDS];
        let rounds = (rows_of_warp / 2 / pairs_at_once) as usize;
        for (round, words) in words[..rounds].iter_mut().enumerate() {
            let row = row_of(round);
            *words = load_shared_x4(swizzled(stored.row(row, 0), row, panel * CHUNKS_PER_PANEL + chunk));
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
