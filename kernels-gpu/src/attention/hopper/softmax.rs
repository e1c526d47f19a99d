//! The softmax of wide tiles: online, as [`OnlineSoftmax`](crate::softmax::OnlineSoftmax), but with little to wait for.
//!
//! Exponentials are relative to an *origin* of their row. It need not be the row's greatest score: as long as no score is far
//! above it, exponentials are numbers of an ordinary size, and what was summed up before stays as it is. So the origin is the
//! greatest score of a tile's first step, and later steps only look whether some score of the warp's rows is out of range, which
//! lanes need not tell each other for. (FlashAttention-4, for Blackwell, moves origins as seldom.)

use crate::ptx::mma::Fragment;
use crate::ptx::{math, warp};
use crate::softmax::{ROWS_PER_LANE, RowSum};

/// Base 2 logarithm of the greatest exponential that is in range: far from what float16 can hold.
pub const RANGE_LOG2: f32 = 8.0;

/// The offset of a row that has seen nothing: any score at all is then out of range, but for −∞, whose exponential is zero.
pub const NOTHING_SEEN: f32 = f32::MAX;

/// A number for each row that the lane holds a part of.
pub type OfRows = [f32; ROWS_PER_LANE];

/// What becomes of the products of queries and keys, as [`Logits`](crate::softmax::Logits), of each of these rows.
pub struct LogitsOfRows {
    pub scale_log2: OfRows,
    pub soft_cap_log2: OfRows,
}

/// Origin and sum of each row that the lane holds a part of.
#[derive(Clone, Copy)]
pub struct LazySoftmax {
    /// What is added to scaled scores: minus the origin, or [`NOTHING_SEEN`].
    offset: OfRows,
    /// Sum of this lane's exponentials.
    sum: OfRows,
}

impl LazySoftmax {
    /// Nothing seen yet.
    pub const NOTHING: Self = Self { offset: [NOTHING_SEEN; ROWS_PER_LANE], sum: [0.0; ROWS_PER_LANE] };

    /// Moves the origins of rows that have scores out of range, if there are any in the warp. What was summed up before is then
    /// multiplied by the factors that are returned; so must the output be. Each row goes by its own scores alone: those past the
    /// tile's last hold anything.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp.
    #[inline(always)]
    pub unsafe fn make_room<const FRAGMENTS: usize>(
        &mut self,
        scale_log2: OfRows,
        scores: &[Fragment; FRAGMENTS],
    ) -> Option<OfRows> {
        // Scaled scores above it are out of range.
        let range_end = self.offset.map(|offset| RANGE_LOG2 - offset);
        let are_negative_ones_out = warp::any(range_end[0] < 0.0 || range_end[1] < 0.0);
        let greatest = if are_negative_ones_out { greatest_of_lane(scores) } else { greatest_of_lane_if_positive(scores) };
        let is_out_of_range = |half: usize, score: f32| score * scale_log2[half] > range_end[half];
        if !warp::any(is_out_of_range(0, greatest[0]) || is_out_of_range(1, greatest[1])) {
            return None;
        }
        let greatest = [warp::quad_max(greatest[0]), warp::quad_max(greatest[1])];
        let is_out = [is_out_of_range(0, greatest[0]), is_out_of_range(1, greatest[1])];
        Some(self.move_up(scale_log2, [0, 1].map(|half| if is_out[half] { greatest[half] } else { f32::NEG_INFINITY })))
    }

    /// Moves the origins of all rows to the greatest of these scores, the first of their tile.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp.
    #[inline(always)]
    pub unsafe fn find_origins<const FRAGMENTS: usize>(&mut self, scale_log2: OfRows, scores: &[Fragment; FRAGMENTS]) {
        let greatest = greatest_of_lane(scores);
        self.move_up(scale_log2, [warp::quad_max(greatest[0]), warp::quad_max(greatest[1])]);
    }

    /// Moves origins up to scores that are above them.
    #[inline(always)]
    fn move_up(&mut self, scale_log2: OfRows, scores: OfRows) -> OfRows {
        let mut factors = [1.0; ROWS_PER_LANE];
        for half in 0..ROWS_PER_LANE {
            let before = self.offset[half];
            self.offset[half] = math::min(before, -scores[half] * scale_log2[half]);
            // Of a row that has seen nothing before, sum and output are zero.
            factors[half] = if before == NOTHING_SEEN { 1.0 } else { math::exp2(self.offset[half] - before) };
            self.sum[half] *= factors[half];
        }
        factors
    }

    /// Turns scores into exponentials and takes them in.
    #[inline(always)]
    pub fn take_in(&mut self, scale_log2: OfRows, scores: &mut [Fragment]) {
        for fragment in scores {
            self.exponentials(scale_log2, fragment);
            for half in 0..ROWS_PER_LANE {
                self.sum[half] += fragment[2 * half] + fragment[2 * half + 1];
            }
        }
    }

    /// Turns scores into exponentials, which others sum up.
    #[inline(always)]
    pub fn exponentials(&self, scale_log2: OfRows, scores: &mut Fragment) {
        for half in 0..ROWS_PER_LANE {
            for score in &mut scores[2 * half..2 * half + 2] {
                *score = math::exp2(math::fma(*score, scale_log2[half], self.offset[half]));
            }
        }
    }

    /// Zero, as a sum of exponentials is never negative; but neither the compiler nor the assembler knows that, so what depends
    /// on it comes after the exponentials so far.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp.
    #[inline(always)]
    pub unsafe fn zero_after(&self) -> u32 {
        warp::any(self.sum[0] < 0.0 || self.sum[1] < 0.0).into()
    }

    /// The factors of the rows, when all columns were taken in.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp.
    #[inline(always)]
    pub unsafe fn finish(&self) -> [RowSum; ROWS_PER_LANE] {
        self.finish_with([warp::quad_sum(self.sum[0]), warp::quad_sum(self.sum[1])])
    }

    /// The factors of rows whose exponentials have these sums.
    #[inline(always)]
    pub fn finish_with(&self, sums: OfRows) -> [RowSum; ROWS_PER_LANE] {
        [RowSum::new(sums[0], -self.offset[0]), RowSum::new(sums[1], -self.offset[1])]
    }
}

/// As [`greatest_of_lane`], where that is positive; else a negative number or zero.
///
/// As integers, positive numbers have the same order, and negative ones are less. Three of them are compared at once, which
/// floating-point numbers are not.
#[inline(always)]
fn greatest_of_lane_if_positive<const FRAGMENTS: usize>(scores: &[Fragment; FRAGMENTS]) -> OfRows {
    greatest_in_order_of(scores, |score| score.to_bits() as i32, i32::max).map(|bits| f32::from_bits(bits as u32))
}

/// The greatest score that the lane has of each row.
#[inline(always)]
fn greatest_of_lane<const FRAGMENTS: usize>(scores: &[Fragment; FRAGMENTS]) -> OfRows {
    greatest_in_order_of(scores, |score| score, math::max)
}

/// The greatest of what the lane's scores of each row are as another type, which `max` compares.
#[inline(always)]
fn greatest_in_order_of<T: Copy, const FRAGMENTS: usize>(
    scores: &[Fragment; FRAGMENTS],
    of: impl Fn(f32) -> T,
    max: impl Fn(T, T) -> T,
) -> [T; ROWS_PER_LANE] {
    // Of every second column of a row, so that four maxima are worked out side by side.
    let mut greatest = scores[0].map(&of);
    for fragment in &scores[1..] {
        for (greatest, &score) in greatest.iter_mut().zip(fragment) {
            *greatest = max(*greatest, of(score));
        }
    }
    let [a, b, c, d] = greatest;
    [max(a, b), max(c, d)]
}
