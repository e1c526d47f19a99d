//! From a tile's rows to query tokens, heads and visible columns.

use packinfer_abi::{AttentionParams, RowSegment, TALL_TILE_ROWS, WIDE_TILE_ROWS, WorkItem};

use crate::ptx::math::divide;
use crate::ptx::memory::{load_global, load_shared, store_shared};
use crate::ptx::warp;
use crate::softmax::{ROWS_PER_LANE, row_of_lane};

/// [`Row::index`] of a row past the tile's last.
pub const NO_ROW: u32 = u32::MAX;

/// The most rows of a tile.
const MOST_ROWS: u32 = if cfg!(feature = "sm_90a") { TALL_TILE_ROWS } else { WIDE_TILE_ROWS };

/// A row of a tile.
#[derive(Clone, Copy)]
pub struct Row {
    /// `token * num_qo_heads + head`, or [`NO_ROW`].
    pub index: u32,
    /// First column that the row sees in the work item's range.
    pub begin: u32,
    /// One past the last.
    pub end: u32,
}

impl Row {
    /// Whether there is such a row.
    #[inline(always)]
    pub fn exists(&self) -> bool {
        self.index != NO_ROW
    }
}

/// The rows of a work item's tile, in shared memory.
///
/// Rows past the tile's last see every column, so that they never ask for a mask; what they yield is not stored.
#[derive(Clone, Copy)]
pub struct RowTable {
    base: u32,
}

impl RowTable {
    /// The table at `base`: three arrays of [`MOST_ROWS`] words.
    #[inline(always)]
    pub fn at(base: u32) -> Self {
        Self { base }
    }

    /// The table whose rows are those of this one from `rows` on.
    #[cfg(feature = "sm_90a")]
    #[inline(always)]
    pub fn skip_rows(self, rows: u32) -> Self {
        Self { base: self.base + 4 * rows }
    }

    #[inline(always)]
    fn address(self, field: u32, row: u32) -> u32 {
        self.base + (field * MOST_ROWS + row) * 4
    }

    /// Works out row `row` of the item's tile and writes it down.
    ///
    /// # Safety
    ///
    /// `params` and `item` are valid, `row < MOST_ROWS`; the table is read after a barrier.
    #[inline(always)]
    pub unsafe fn write(self, params: &AttentionParams, item: &WorkItem, head_group: u32, row: u32) {
        let heads_per_group = params.heads.heads_per_group;
        let mut token = divide(row, heads_per_group);
        let head = head_group * heads_per_group + row - token * heads_per_group;
        let mut found = Row { index: NO_ROW, begin: 0, end: u32::MAX };
        let mut segment = params.segments + u64::from(item.segment_begin) * size_of::<RowSegment>() as u64;
        let end = segment + u64::from(item.num_segments) * size_of::<RowSegment>() as u64;
        while segment < end {
            let num_tokens = load_global(segment + core::mem::offset_of!(RowSegment, num_tokens) as u64);
            if token < num_tokens {
                let segment = RowSegment {
                    first_token: load_global(segment + core::mem::offset_of!(RowSegment, first_token) as u64),
                    num_tokens,
                    column_begin: load_global(segment + core::mem::offset_of!(RowSegment, column_begin) as u64),
                    begin_hold: load_global(segment + core::mem::offset_of!(RowSegment, begin_hold) as u64),
                    column_end: load_global(segment + core::mem::offset_of!(RowSegment, column_end) as u64),
                    column_end_step: load_global(segment + core::mem::offset_of!(RowSegment, column_end_step) as u64),
                };
                let columns = segment.columns(token);
                found = Row {
                    index: (segment.first_token + token) * params.heads.num_qo_heads + head,
                    begin: core::cmp::max(columns.start, item.column_begin),
                    end: core::cmp::min(columns.end, item.column_end),
                };
                break;
            }
            token -= num_tokens;
            segment += size_of::<RowSegment>() as u64;
        }
        store_shared(self.address(0, row), found.index);
        store_shared(self.address(1, row), found.begin);
        store_shared(self.address(2, row), found.end);
    }

    /// Reads a row's [`Row::index`].
    ///
    /// # Safety
    ///
    /// As [`Self::read`].
    #[inline(always)]
    pub unsafe fn index(self, row: u32) -> u32 {
        load_shared(self.address(0, row))
    }

    /// Reads a row.
    ///
    /// # Safety
    ///
    /// `row < MOST_ROWS`, and it was written before a barrier.
    #[inline(always)]
    pub unsafe fn read(self, row: u32) -> Row {
        Row {
            index: load_shared(self.address(0, row)),
            begin: load_shared(self.address(1, row)),
            end: load_shared(self.address(2, row)),
        }
    }

    /// Reads the rows that a lane holds parts of, of a warp's rows from `first_row` on.
    ///
    /// # Safety
    ///
    /// As [`Self::read`], for all rows of the warp.
    #[inline(always)]
    pub unsafe fn of_lane<const ROW_BLOCKS: usize>(self, first_row: u32, lane: u32) -> [[Row; ROWS_PER_LANE]; ROW_BLOCKS] {
        let mut rows = [[Row { index: NO_ROW, begin: 0, end: 0 }; ROWS_PER_LANE]; ROW_BLOCKS];
        for (block, rows) in rows.iter_mut().enumerate() {
            for (half, row) in rows.iter_mut().enumerate() {
                *row = self.read(first_row + row_of_lane(block, half, lane));
            }
        }
        rows
    }
}

/// What the rows of one warp see, taken together.
#[derive(Clone, Copy)]
pub struct WarpView {
    /// Some row sees a column from here …
    any_begin: u32,
    /// … to before here.
    any_end: u32,
    /// Every row sees the columns from here …
    all_begin: u32,
    /// … to before here.
    all_end: u32,
}

impl WarpView {
    /// The view of no rows.
    #[cfg(feature = "sm_90a")]
    pub const NOTHING: Self = Self { any_begin: u32::MAX, any_end: 0, all_begin: 0, all_end: u32::MAX };

    /// The view of up to 32 rows, one a lane.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp.
    #[inline(always)]
    pub unsafe fn of(row: Row) -> Self {
        let sees = row.exists() && row.begin < row.end;
        Self {
            any_begin: warp::min(if sees { row.begin } else { u32::MAX }),
            any_end: warp::max(if sees { row.end } else { 0 }),
            all_begin: warp::max(row.begin),
            all_end: warp::min(row.end),
        }
    }

    /// The view of both views' rows.
    #[inline(always)]
    pub fn and(self, other: Self) -> Self {
        use core::cmp::{max, min};
        Self {
            any_begin: min(self.any_begin, other.any_begin),
            any_end: max(self.any_end, other.any_end),
            all_begin: max(self.all_begin, other.all_begin),
            all_end: min(self.all_end, other.all_end),
        }
    }

    /// The view as four words, and back.
    #[inline(always)]
    pub fn to_words(self) -> [u32; 4] {
        [self.any_begin, self.any_end, self.all_begin, self.all_end]
    }

    /// The view of which [`Self::to_words`] made these words.
    #[inline(always)]
    pub fn from_words([any_begin, any_end, all_begin, all_end]: [u32; 4]) -> Self {
        Self { any_begin, any_end, all_begin, all_end }
    }

    /// Of the steps of `columns` columns from column `begin` on, those that any row sees a column of: the first, and one past the
    /// last. The first step where no row sees any.
    #[inline(always)]
    pub fn steps(&self, begin: u32, columns: u32) -> (u32, u32) {
        if self.any_begin >= self.any_end {
            return (0, 1);
        }
        ((self.any_begin - begin) / columns, (self.any_end - begin).div_ceil(columns))
    }

    /// Whether any row sees any of `columns` columns from `column` on.
    #[inline(always)]
    pub fn sees_any(&self, column: u32, columns: u32) -> bool {
        column < self.any_end && column + columns > self.any_begin
    }

    /// Whether every row sees all of `columns` columns from `column` on.
    #[inline(always)]
    pub fn sees_all(&self, column: u32, columns: u32) -> bool {
        column >= self.all_begin && column + columns <= self.all_end
    }
}
