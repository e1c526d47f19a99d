//! What the warpgroup of a block does that is neither the producer nor a consumer, where there is one; and what that changes in
//! how K and V are brought.

use packinfer_abi::{HOPPER_STORED_STEP, TileKind};

use super::producer::{Turn, load_columns};
use super::shared::{Ring, Shared};
use crate::attention::task::Task;
use crate::shared_tile::{BoxTile, PANEL_BLOCKS};

/// K, or V.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Tensor {
    K = 0,
    V = 1,
}

/// What the helpers do, and what of that others must know.
pub trait Helpers: Copy {
    /// Whether they do narrow tiles beside the wide ones of the consumers.
    const READ: bool = false;
    /// Whether they take K and V in FP8, as they are stored, and consumers such as were made of them before.
    const READ_STORED: bool = false;
    /// Whether they make K and V of wide tiles of what is stored in FP8.
    const CONVERT: bool = false;
    /// Parts of steps, as they are stored, that the copy engine brings for them ahead.
    const STORED_STAGES: u32 = 0;
    /// Bytes of K, or of V, of a step of a narrow tile, where they are taken as they are stored.
    const NARROW_STEP_BYTES: u32 = 0;

    /// Where a producing warp is that has K or V brought.
    type Loader;

    /// It has brought nothing yet.
    fn loader<const DIM_BLOCKS: usize, const FRAGMENTS: usize, const ROW_BLOCKS: usize>(
        shared: Shared<DIM_BLOCKS, FRAGMENTS, ROW_BLOCKS, Self>,
        tensor: Tensor,
    ) -> Self::Loader;

    /// Has a task's K or V brought, as [`load_columns`].
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp, for every task of the block, one after the other.
    unsafe fn load<const DIM_BLOCKS: usize, const FRAGMENTS: usize, const ROW_BLOCKS: usize>(
        shared: Shared<DIM_BLOCKS, FRAGMENTS, ROW_BLOCKS, Self>,
        tensor: Tensor,
        task: &Task,
        loader: &mut Self::Loader,
        lane: u32,
        at_step: impl Fn(u32),
    );
}

/// K and V are brought as consumers take them: the loader is at a part of the ring.
macro_rules! brought_as_consumed {
    () => {
        type Loader = Ring;

        #[inline(always)]
        fn loader<const DIM_BLOCKS: usize, const FRAGMENTS: usize, const ROW_BLOCKS: usize>(
            shared: Shared<DIM_BLOCKS, FRAGMENTS, ROW_BLOCKS, Self>,
            tensor: Tensor,
        ) -> Ring {
            match tensor {
                Tensor::K => shared.k_ring(),
                Tensor::V => shared.v_ring(),
            }
        }

        #[inline(always)]
        unsafe fn load<const DIM_BLOCKS: usize, const FRAGMENTS: usize, const ROW_BLOCKS: usize>(
            shared: Shared<DIM_BLOCKS, FRAGMENTS, ROW_BLOCKS, Self>,
            tensor: Tensor,
            task: &Task,
            ring: &mut Ring,
            lane: u32,
            at_step: impl Fn(u32),
        ) {
            let tiles = match tensor {
                Tensor::K => shared.k(0),
                Tensor::V => shared.v(0),
            };
            // It does not pay beside readers, and three consumers have tiles that read the same.
            let has_exchange = Shared::<DIM_BLOCKS, FRAGMENTS, ROW_BLOCKS, Self>::HAS_EXCHANGE;
            let settled_bytes = settled_bytes(task, DIM_BLOCKS).filter(|_| has_exchange);
            load_columns::<DIM_BLOCKS, FRAGMENTS, 1>(task, tensor, ring, tiles, lane, None, settled_bytes, at_step);
        }
    };
}

/// There are none.
#[derive(Clone, Copy)]
pub struct NoHelpers;

impl Helpers for NoHelpers {
    brought_as_consumed!();
}

/// They do narrow tiles: see [`reader`](super::reader). With `STORED`, those have K and V in FP8.
#[derive(Clone, Copy)]
pub struct Readers<const STORED: bool>;

impl<const STORED: bool> Helpers for Readers<STORED> {
    const READ: bool = true;
    const READ_STORED: bool = STORED;

    brought_as_consumed!();
}

/// The [`settled_bytes`](packinfer_abi::AttentionParams::settled_bytes) of a task whose rows of K and V are so many chunks of 16
/// bytes; none where these are not whole cache lines: heads that lie side by side share lines then.
#[inline(always)]
fn settled_bytes(task: &Task, chunks: usize) -> Option<u32> {
    let [of_wide, of_narrow] = task.params.settled_bytes;
    let settled_bytes = if task.item.tile == TileKind::Narrow { of_narrow } else { of_wide };
    chunks.is_multiple_of(PANEL_BLOCKS).then_some(settled_bytes)
}

/// Parts of a step of a wide tile that are brought one after the other: first those of K, then those of V.
pub const STORED_PARTS: u32 = 2;
/// Bytes of a part.
pub const PART_BYTES: u32 = 8 << 10;
/// Blocks of 8 columns of a step of a narrow tile, whose K and V are taken as they are stored.
pub const STORED_STEP_BLOCKS: usize = HOPPER_STORED_STEP as usize / 8;

/// They make K and V of wide tiles of what is stored in FP8, of which `STAGES` parts of `8 * PART_BLOCKS` rows are held: see
/// [`converter`](super::converter). Consumers of narrow tiles take it as it is. A row has `CHUNKS` chunks of 16 bytes, or fewer.
#[derive(Clone, Copy)]
pub struct Converters<const STAGES: u32, const CHUNKS: usize, const PART_BLOCKS: usize>;

/// Part of a step of K or V as it is stored.
pub type StoredPart<const CHUNKS: usize, const PART_BLOCKS: usize> = BoxTile<CHUNKS, PART_BLOCKS>;
/// Step of K or V of a narrow tile, as it is stored.
pub type StoredStep<const CHUNKS: usize> = BoxTile<CHUNKS, STORED_STEP_BLOCKS>;

/// Where a loader is, where K and V are stored in FP8: the rings of both kinds of tiles, which lie in the same memory. Each is at
/// the beginning of a step.
pub struct StoredRings {
    /// K and V of narrow tiles.
    narrow: [Ring; 2],
    /// Of wide tiles, as it is stored, and what is made of that.
    to_convert: Ring,
    k: Ring,
    v: Ring,
    /// The kind of the last tile.
    kind: TileKind,
}

impl StoredRings {
    /// Nothing has been filled yet.
    #[inline(always)]
    fn new<const DIM_BLOCKS: usize, const FRAGMENTS: usize, const ROW_BLOCKS: usize, H: Helpers>(
        shared: Shared<DIM_BLOCKS, FRAGMENTS, ROW_BLOCKS, H>,
    ) -> Self {
        Self {
            narrow: shared.narrow_rings(),
            to_convert: shared.stored_ring(),
            k: shared.k_ring(),
            v: shared.v_ring(),
            kind: TileKind::Wide,
        }
    }

    /// Before a tile of kind `kind`: waits until nobody uses what lies where it has K and V, if the tile before was of the other
    /// kind.
    ///
    /// A barrier's parity only tells whether a part has been emptied to those who know that it was emptied the time before. The
    /// loader of K knows that of K of narrow tiles, as it fills them, and so, as consumers go on from V to the next K, of V; and
    /// that of V the same. When all parts that are to be converted have been, all K and V were emptied but for those of the last
    /// steps.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp, for every task of the block.
    #[inline(always)]
    unsafe fn make_room_for(&mut self, kind: TileKind) {
        if kind == self.kind {
            return;
        }
        self.kind = kind;
        match kind {
            TileKind::Wide => {
                self.narrow[0].wait_all_empty();
                self.narrow[1].wait_all_empty();
            }
            TileKind::Narrow => {
                self.to_convert.wait_all_empty();
                self.k.wait_all_empty();
                self.v.wait_all_empty();
            }
        }
    }

    /// Past a tile of kind `kind` and so many steps.
    #[inline(always)]
    fn go_past(&mut self, kind: TileKind, steps: u32) {
        match kind {
            TileKind::Wide => {
                self.to_convert.advance_by(2 * STORED_PARTS * steps);
                self.k.advance_by(steps);
                self.v.advance_by(steps);
            }
            TileKind::Narrow => {
                self.narrow[0].advance_by(steps);
                self.narrow[1].advance_by(steps);
            }
        }
    }
}

impl<const STAGES: u32, const CHUNKS: usize, const PART_BLOCKS: usize> Converters<STAGES, CHUNKS, PART_BLOCKS> {
    /// Whether converters can bring narrow tiles of a head dimension of `8 * DIM_BLOCKS`, too: where rows are less than a cache
    /// line. Converting takes a few per cent longer then, as the assembler no longer sees that a warp's lanes stay together.
    pub const fn can_bring<const DIM_BLOCKS: usize>() -> bool {
        DIM_BLOCKS < 2 * PANEL_BLOCKS
    }

    /// As [`settled_bytes`], of rows of `8 * DIM_BLOCKS` bytes.
    #[inline(always)]
    fn settled_bytes<const DIM_BLOCKS: usize>(task: &Task) -> Option<u32> {
        // Of rows of several cache lines, there are not registers enough.
        settled_bytes(task, DIM_BLOCKS / 2).filter(|_| CHUNKS == PANEL_BLOCKS)
    }

    /// Brings K or V of a narrow tile, as it is stored: every step, or those that are the turn of warp `index` of as many as the
    /// launch says.
    ///
    /// # Safety
    ///
    /// As [`load_columns`].
    #[inline(always)]
    pub unsafe fn load_narrow<const DIM_BLOCKS: usize, const FRAGMENTS: usize, const ROW_BLOCKS: usize>(
        shared: Shared<DIM_BLOCKS, FRAGMENTS, ROW_BLOCKS, Self>,
        tensor: Tensor,
        task: &Task,
        ring: &mut Ring,
        index: u32,
        lane: u32,
        at_step: impl Fn(u32),
    ) {
        let steps = match tensor {
            Tensor::K => shared.narrow_k(0),
            Tensor::V => shared.narrow_v(0),
        };
        let turn =
            if const { Self::can_bring::<DIM_BLOCKS>() } { Some(Turn::new(index, task.params.narrow_loaders)) } else { None };
        let settled_bytes = Self::settled_bytes::<DIM_BLOCKS>(task);
        load_columns::<CHUNKS, STORED_STEP_BLOCKS, 1>(task, tensor, ring, steps, lane, turn, settled_bytes, at_step);
    }
}

impl<const STAGES: u32, const CHUNKS: usize, const PART_BLOCKS: usize> Helpers for Converters<STAGES, CHUNKS, PART_BLOCKS> {
    const CONVERT: bool = true;
    const STORED_STAGES: u32 = STAGES;
    const NARROW_STEP_BYTES: u32 = StoredStep::<CHUNKS>::BYTES;

    type Loader = StoredRings;

    #[inline(always)]
    fn loader<const DIM_BLOCKS: usize, const FRAGMENTS: usize, const ROW_BLOCKS: usize>(
        shared: Shared<DIM_BLOCKS, FRAGMENTS, ROW_BLOCKS, Self>,
        _: Tensor,
    ) -> StoredRings {
        const { assert!(StoredPart::<CHUNKS, PART_BLOCKS>::BYTES == PART_BYTES) };
        StoredRings::new(shared)
    }

    #[inline(always)]
    unsafe fn load<const DIM_BLOCKS: usize, const FRAGMENTS: usize, const ROW_BLOCKS: usize>(
        shared: Shared<DIM_BLOCKS, FRAGMENTS, ROW_BLOCKS, Self>,
        tensor: Tensor,
        task: &Task,
        rings: &mut StoredRings,
        lane: u32,
        at_step: impl Fn(u32),
    ) {
        let kind = task.item.tile;
        rings.make_room_for(kind);
        let step = match kind {
            TileKind::Wide => {
                let settled_bytes = Self::settled_bytes::<DIM_BLOCKS>(task);
                let mut ring = rings.to_convert;
                if tensor == Tensor::V {
                    ring.advance_by(STORED_PARTS);
                }
                let parts = shared.stored(0);
                load_columns::<CHUNKS, PART_BLOCKS, STORED_PARTS>(
                    task,
                    tensor,
                    &mut ring,
                    parts,
                    lane,
                    None,
                    settled_bytes,
                    at_step,
                );
                Shared::<DIM_BLOCKS, FRAGMENTS, ROW_BLOCKS, Self>::STEP
            }
            TileKind::Narrow => {
                let mut ring = rings.narrow[tensor as usize];
                Self::load_narrow(shared, tensor, task, &mut ring, 0, lane, at_step);
                Shared::<DIM_BLOCKS, FRAGMENTS, ROW_BLOCKS, Self>::NARROW_STEP
            }
        };
        rings.go_past(kind, (task.item.column_end - task.item.column_begin).div_ceil(step));
    }
}
