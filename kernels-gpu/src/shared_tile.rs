//! A tile in shared memory: rows of one head's elements, swizzled so that no access of a warp meets a bank twice.

#[cfg(feature = "sm_90a")]
use packinfer_abi::{KV_BOX_ELEMENTS, box_panels};

use crate::element::ELEMENT_BYTES;
use crate::ptx::cp_async::CHUNK_BYTES;
#[cfg(feature = "sm_90a")]
use crate::ptx::mma::store_matrices;
use crate::ptx::mma::{OperandA, OperandB, load_matrices, load_matrices_transposed};
use crate::ptx::warp;

/// Rows of `8 * DIM_BLOCKS` elements. A row is `DIM_BLOCKS` chunks of 16 bytes; chunk `c` of row `r` lies where chunk
/// `c ^ swizzle(r)` would.
#[derive(Clone, Copy)]
pub struct SharedTile<const DIM_BLOCKS: usize> {
    base: u32,
}

/// What the index of a chunk in row `row` of a tile with `chunks` chunks a row is changed by. Chunk `c` of any eight rows
/// `8 i ..` then lies in eight different places modulo 128 bytes, which is what all banks together hold: rows of a multiple of
/// that need eight different swizzles; of shorter or longer ones, several rows lie in different places already.
#[inline(always)]
const fn swizzle(chunks: u32, row: u32) -> u32 {
    let swizzles = power_of_two_in(chunks, 8);
    row / (8 / swizzles) % swizzles
}

/// The greatest power of two that divides `number`, and is at most `most`, one too.
const fn power_of_two_in(number: u32, most: u32) -> u32 {
    let power = 1 << number.trailing_zeros();
    if power < most { power } else { most }
}

/// Where a lane reads in a tile: the address of its row, and what the swizzle does to its chunks.
#[derive(Clone, Copy)]
pub struct LaneRow {
    row: u32,
    swizzle: u32,
}

impl LaneRow {
    /// The same, for a `zero` that the compiler does not know to be one: what is read with it waits for what `zero` is worked out
    /// from.
    #[cfg(feature = "sm_80")]
    #[inline(always)]
    pub fn after(self, zero: u32) -> Self {
        Self { row: self.row + zero, ..self }
    }

    /// Address of the lane's chunk, `blocks` 8-element blocks on; `blocks` is even.
    #[inline(always)]
    fn chunk(self, blocks: usize) -> u32 {
        self.row + ((blocks as u32 * CHUNK_BYTES) ^ self.swizzle)
    }
}

/// Where a lane writes or reads when a warp goes through a tile's rows in order, a chunk a lane.
#[derive(Clone, Copy)]
pub struct LaneChunk {
    row: u32,
    swizzle: u32,
    row_bytes: u32,
}

impl LaneChunk {
    /// Address of the lane's chunk when the warp is `rows` rows on; a multiple of [`SharedTile::ROWS_AT_ONCE`].
    #[inline(always)]
    pub fn rows_on(self, rows: u32) -> u32 {
        self.row + rows * self.row_bytes + (self.swizzle ^ (swizzle(self.row_bytes / CHUNK_BYTES, rows) * CHUNK_BYTES))
    }
}

impl<const DIM_BLOCKS: usize> SharedTile<DIM_BLOCKS> {
    /// Bytes of a row.
    pub const ROW_BYTES: u32 = 8 * DIM_BLOCKS as u32 * ELEMENT_BYTES;
    /// Chunks of a row.
    const CHUNKS: u32 = DIM_BLOCKS as u32;
    /// Lanes that go through one row, a chunk each.
    pub const LANES_PER_ROW: u32 = power_of_two_in(Self::CHUNKS, warp::LANES);
    /// Rows that a warp goes through at once.
    pub const ROWS_AT_ONCE: u32 = warp::LANES / Self::LANES_PER_ROW;
    /// Parts of a row, which the warp goes through one after the other.
    pub const PARTS: u32 = Self::CHUNKS / Self::LANES_PER_ROW;
    /// Bytes of a part.
    pub const PART_BYTES: u32 = Self::LANES_PER_ROW * CHUNK_BYTES;

    /// Of the rows that the warp goes through at once, the lane's.
    #[inline(always)]
    pub fn row_of_lane(lane: u32) -> u32 {
        lane / Self::LANES_PER_ROW
    }

    /// Byte of a part of a row at which the lane's chunk begins.
    #[inline(always)]
    pub fn byte_of_lane(lane: u32) -> u32 {
        lane % Self::LANES_PER_ROW * CHUNK_BYTES
    }

    /// The chunk that the lane writes or reads when the warp goes through the rows in order.
    #[inline(always)]
    pub fn chunk_of_lane(self, lane: u32) -> LaneChunk {
        let row = Self::row_of_lane(lane);
        LaneChunk {
            row: self.base + row * Self::ROW_BYTES,
            swizzle: Self::byte_of_lane(lane) ^ (swizzle(Self::CHUNKS, row) * CHUNK_BYTES),
            row_bytes: Self::ROW_BYTES,
        }
    }

    /// The tile at `base`, which is aligned to 8 rows.
    #[inline(always)]
    pub fn at(base: u32) -> Self {
        Self { base }
    }

    /// The tile that starts `rows` rows on; `rows` is a multiple of 8.
    #[inline(always)]
    pub fn skip_rows(self, rows: u32) -> Self {
        Self { base: self.base + rows * Self::ROW_BYTES }
    }

    /// Address of a chunk.
    #[inline(always)]
    pub fn chunk(self, row: u32, chunk: u32) -> u32 {
        self.base + row * Self::ROW_BYTES + ((chunk ^ swizzle(Self::CHUNKS, row)) * CHUNK_BYTES)
    }

    #[inline(always)]
    fn lane_row(self, row: u32, block: u32) -> LaneRow {
        LaneRow { row: self.base + row * Self::ROW_BYTES, swizzle: (block ^ swizzle(Self::CHUNKS, row)) * CHUNK_BYTES }
    }

    /// How this lane reads [`Self::operand_a`].
    #[inline(always)]
    pub fn rows_by_lane(self, lane: u32) -> LaneRow {
        self.lane_row(lane % 16, lane / 16)
    }

    /// How this lane reads [`Self::operands_b`].
    #[inline(always)]
    pub fn columns_by_lane(self, lane: u32) -> LaneRow {
        self.lane_row(lane % 8 + lane / 16 * 8, lane / 8 % 2)
    }

    /// How this lane reads [`Self::operands_b_transposed`].
    #[inline(always)]
    pub fn columns_by_lane_transposed(self, lane: u32) -> LaneRow {
        self.rows_by_lane(lane)
    }

    /// How this lane reads [`Self::eight_columns`] and [`Self::eight_columns_transposed`].
    #[inline(always)]
    pub fn eight_columns_by_lane(self, lane: u32) -> LaneRow {
        self.lane_row(lane % 8, lane / 8)
    }

    /// Operand A of 16 tile rows, from `row` on, and 16 of their elements, from `8 * block` on.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp, with `lane_row` from [`Self::rows_by_lane`]; the tile holds these rows.
    #[inline(always)]
    pub unsafe fn operand_a(lane_row: LaneRow, row: usize, block: usize) -> OperandA {
        load_matrices(lane_row.chunk(block) + row as u32 * Self::ROW_BYTES)
    }

    /// Stores 16 rows, the tile's first, of two neighbouring blocks of 8 elements: what [`Self::operand_a`] loads.
    ///
    /// # Safety
    ///
    /// As [`Self::operand_a`].
    #[cfg(feature = "sm_90a")]
    #[inline(always)]
    pub unsafe fn store_operand_a(lane_row: LaneRow, block: usize, words: OperandA) {
        store_matrices(lane_row.chunk(block), words);
    }

    /// Two operands B, of 8 columns each: the tile's rows from `row` on are the columns, 16 of their elements, from `8 * block`
    /// on, are summed over.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp, with `lane_row` from [`Self::columns_by_lane`]; the tile holds these rows.
    #[inline(always)]
    pub unsafe fn operands_b(lane_row: LaneRow, row: usize, block: usize) -> [OperandB; 2] {
        let [a, b, c, d] = load_matrices(lane_row.chunk(block) + row as u32 * Self::ROW_BYTES);
        [[a, b], [c, d]]
    }

    /// Two operands B, of 8 columns each: the tile's elements from `8 * block` on are the columns, 16 rows, from `row` on, are
    /// summed over.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp, with `lane_row` from [`Self::columns_by_lane_transposed`]; the tile holds these rows.
    #[inline(always)]
    pub unsafe fn operands_b_transposed(lane_row: LaneRow, row: usize, block: usize) -> [OperandB; 2] {
        let [a, b, c, d] = load_matrices_transposed(lane_row.chunk(block) + row as u32 * Self::ROW_BYTES);
        [[a, b], [c, d]]
    }

    /// Two operands B of the same 8 columns, which are the tile's first rows: 32 of their elements, from `8 * block` on, are
    /// summed over, 16 by each.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp, with `lane_row` from [`Self::eight_columns_by_lane`]; `block` is a multiple of 4.
    #[inline(always)]
    pub unsafe fn eight_columns(lane_row: LaneRow, block: usize) -> [OperandB; 2] {
        let [a, b, c, d] = load_matrices(lane_row.chunk(block));
        [[a, b], [c, d]]
    }

    /// Four operands B, of 8 columns each: the tile's elements from `8 * block` on are the columns, its first 8 rows and 8 of
    /// zeros are summed over.
    ///
    /// # Safety
    ///
    /// As [`Self::eight_columns`].
    #[inline(always)]
    pub unsafe fn eight_columns_transposed(lane_row: LaneRow, block: usize) -> [OperandB; 4] {
        load_matrices_transposed(lane_row.chunk(block)).map(|word| [word, 0])
    }
}

/// A tile of `8 * ROW_BLOCKS` rows as warpgroup products take it: each 64 elements of a row in a [`SharedTile`] of their own, one
/// after the other. The last one's rows may be longer than what is left of a row.
#[derive(Clone, Copy)]
pub struct PanelTile<const DIM_BLOCKS: usize, const ROW_BLOCKS: usize> {
    base: u32,
}

/// Blocks of 8 elements in a panel.
pub const PANEL_BLOCKS: usize = 8;
/// Bytes of a panel's row.
pub const PANEL_ROW_BYTES: u32 = SharedTile::<PANEL_BLOCKS>::ROW_BYTES;

impl<const DIM_BLOCKS: usize, const ROW_BLOCKS: usize> PanelTile<DIM_BLOCKS, ROW_BLOCKS> {
    /// Rows of the tile.
    pub const ROWS: u32 = 8 * ROW_BLOCKS as u32;
    /// Elements of a panel's rows.
    pub const PANEL_ELEMENTS: u32 = 8 * PANEL_BLOCKS as u32;
    /// Panels of the tile.
    pub const PANELS: u32 = DIM_BLOCKS.div_ceil(PANEL_BLOCKS) as u32;
    /// Bytes of a row, in all panels.
    #[cfg(feature = "sm_90a")]
    pub const ROW_BYTES: u32 = Self::PANELS * PANEL_ROW_BYTES;
    /// Bytes of a panel.
    pub const PANEL_BYTES: u32 = Self::ROWS * PANEL_ROW_BYTES;
    /// Bytes of the tile.
    pub const BYTES: u32 = Self::PANELS * Self::PANEL_BYTES;

    /// The tile at `base`, which is aligned to 8 rows of a panel.
    #[inline(always)]
    pub fn at(base: u32) -> Self {
        Self { base }
    }

    /// The tile `tiles` tiles on.
    #[inline(always)]
    pub fn skip_tiles(self, tiles: u32) -> Self {
        Self { base: self.base + tiles * Self::BYTES }
    }

    /// Address of row `row` of the first panel.
    #[inline(always)]
    pub fn row(self, row: u32) -> u32 {
        self.base + row * PANEL_ROW_BYTES
    }

    /// The panel that holds elements `64 * panel ..`.
    #[inline(always)]
    pub fn panel(self, panel: usize) -> SharedTile<PANEL_BLOCKS> {
        SharedTile::at(self.base + panel as u32 * Self::PANEL_BYTES)
    }

    /// As [`Self::panel`], of a panel that is known at run time only.
    #[cfg(feature = "sm_90a")]
    #[inline(always)]
    pub fn panel_of(self, panel: u32) -> SharedTile<PANEL_BLOCKS> {
        SharedTile::at(self.base + panel * Self::PANEL_BYTES)
    }

    /// Address of row `row` of panel `panel`.
    #[cfg(feature = "sm_90a")]
    #[inline(always)]
    pub fn panel_row(self, panel: u32, row: u32) -> u32 {
        self.row(row) + panel * Self::PANEL_BYTES
    }
}

/// Where panel `panel` of rows of `8 * DIM_BLOCKS` elements begins in a tensor that [boxes](box_panels) are copied from: its
/// element, and its panel.
#[cfg(feature = "sm_90a")]
#[inline(always)]
pub fn origin_of_panel<const DIM_BLOCKS: usize>(panel: u32) -> [u32; 2] {
    if box_panels(8 * DIM_BLOCKS as u32) == 1 { [panel * KV_BOX_ELEMENTS, 0] } else { [0, panel] }
}

/// A tile of `8 * ROW_BLOCKS` rows as warpgroup products take it and the copy engine brings it: eight rows after eight rows, and
/// of these each 64 elements of a row in a [`SharedTile`] of their own, one after the other. So one box holds whole rows, and any
/// multiple of eight. Where [a box has but one panel](box_panels), it is instead all rows of one panel after those of the other.
#[cfg(feature = "sm_90a")]
#[derive(Clone, Copy)]
pub struct BoxTile<const DIM_BLOCKS: usize, const ROW_BLOCKS: usize> {
    base: u32,
}

#[cfg(feature = "sm_90a")]
impl<const DIM_BLOCKS: usize, const ROW_BLOCKS: usize> BoxTile<DIM_BLOCKS, ROW_BLOCKS> {
    /// Rows of the tile.
    pub const ROWS: u32 = 8 * ROW_BLOCKS as u32;
    /// Panels of a row.
    pub const PANELS: u32 = DIM_BLOCKS.div_ceil(PANEL_BLOCKS) as u32;
    /// Boxes that bring whole rows.
    pub const WHOLE_BOXES: u32 = Self::PANELS / Self::BOX_PANELS;
    const BOX_PANELS: u32 = box_panels(8 * DIM_BLOCKS as u32);
    /// Bytes from eight rows to the next eight of the same panel.
    pub const EIGHT_ROWS_BYTES: u32 = Self::BOX_PANELS * 8 * PANEL_ROW_BYTES;
    /// Bytes from a row of a panel to the same row of the next.
    pub const PANEL_BYTES: u32 = if Self::WHOLE_BOXES == 1 { 8 } else { Self::ROWS } * PANEL_ROW_BYTES;
    /// Bytes of the tile.
    pub const BYTES: u32 = Self::ROWS * Self::PANELS * PANEL_ROW_BYTES;

    /// The tile at `base`, which is aligned to eight rows of a panel.
    #[inline(always)]
    pub fn at(base: u32) -> Self {
        Self { base }
    }

    /// The tile `tiles` tiles on.
    #[inline(always)]
    pub fn skip_tiles(self, tiles: u32) -> Self {
        Self { base: self.base + tiles * Self::BYTES }
    }

    #[inline(always)]
    fn lane_row(self, row: u32, block: u32) -> LaneRow {
        LaneRow { row: self.row(row, 0), swizzle: (block ^ row % 8) * CHUNK_BYTES }
    }

    /// How this lane reads [`Self::operands_b`] of rows from `first_row` on, a multiple of 8.
    #[inline(always)]
    pub fn columns_by_lane(self, first_row: u32, lane: u32) -> LaneRow {
        self.lane_row(first_row + lane % 8 + lane / 16 * 8, lane / 8 % 2)
    }

    /// How this lane reads [`Self::operands_b_transposed`] of rows from `first_row` on, a multiple of 8.
    #[inline(always)]
    pub fn columns_by_lane_transposed(self, first_row: u32, lane: u32) -> LaneRow {
        self.lane_row(first_row + lane % 16, lane / 16)
    }

    /// How this lane reads, by [`Self::operands_b_transposed`] of block 0, chunks of 16 bytes from `chunk` on of `ROWS_AT_ONCE`
    /// rows from `first_row` on, a multiple of 8: 16 rows of two chunks, or 32 of one.
    #[inline(always)]
    pub fn chunks_by_lane_transposed<const ROWS_AT_ONCE: u32>(self, first_row: u32, chunk: u32, lane: u32) -> LaneRow {
        self.lane_row(first_row + lane % ROWS_AT_ONCE, chunk + lane / ROWS_AT_ONCE)
    }

    /// How this lane reads [`Self::eight_columns`] and [`Self::eight_columns_transposed`] of rows from `first_row` on, a multiple
    /// of 8.
    #[inline(always)]
    pub fn eight_columns_by_lane(self, first_row: u32, lane: u32) -> LaneRow {
        self.lane_row(first_row + lane % 8, lane / 8)
    }

    /// As [`SharedTile::operands_b`], of rows from that of `lane_row` on.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp, with `lane_row` from [`Self::columns_by_lane`]; the tile holds these rows.
    #[inline(always)]
    pub unsafe fn operands_b(lane_row: LaneRow, block: usize) -> [OperandB; 2] {
        SharedTile::<PANEL_BLOCKS>::operands_b(Self::in_panel(lane_row, block), 0, block % PANEL_BLOCKS)
    }

    /// As [`SharedTile::operands_b_transposed`], of rows from that of `lane_row` on.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp, with `lane_row` from [`Self::columns_by_lane_transposed`]; the tile holds these rows.
    #[inline(always)]
    pub unsafe fn operands_b_transposed(lane_row: LaneRow, block: usize) -> [OperandB; 2] {
        SharedTile::<PANEL_BLOCKS>::operands_b_transposed(Self::in_panel(lane_row, block), 0, block % PANEL_BLOCKS)
    }

    /// As [`SharedTile::eight_columns`], of rows from that of `lane_row` on.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp, with `lane_row` from [`Self::eight_columns_by_lane`]; `block` is a multiple of 4.
    #[inline(always)]
    pub unsafe fn eight_columns(lane_row: LaneRow, block: usize) -> [OperandB; 2] {
        SharedTile::<PANEL_BLOCKS>::eight_columns(Self::in_panel(lane_row, block), block % PANEL_BLOCKS)
    }

    /// As [`SharedTile::eight_columns_transposed`], of rows from that of `lane_row` on.
    ///
    /// # Safety
    ///
    /// As [`Self::eight_columns`].
    #[inline(always)]
    pub unsafe fn eight_columns_transposed(lane_row: LaneRow, block: usize) -> [OperandB; 4] {
        SharedTile::<PANEL_BLOCKS>::eight_columns_transposed(Self::in_panel(lane_row, block), block % PANEL_BLOCKS)
    }

    /// The same row of the panel that holds block `block`.
    #[inline(always)]
    fn in_panel(lane_row: LaneRow, block: usize) -> LaneRow {
        LaneRow { row: lane_row.row + (block / PANEL_BLOCKS) as u32 * Self::PANEL_BYTES, ..lane_row }
    }

    /// Address of row `row` of panel `panel`.
    #[inline(always)]
    pub fn row(self, row: u32, panel: u32) -> u32 {
        self.base + row / 8 * Self::EIGHT_ROWS_BYTES + panel * Self::PANEL_BYTES + row % 8 * PANEL_ROW_BYTES
    }
}
