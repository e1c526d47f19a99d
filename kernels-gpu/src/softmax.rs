//! Online softmax (Milakov and Gimelshein 2018; Dao et al. 2022, FlashAttention) over score fragments.
//!
//! A lane holds parts of `ROW_BLOCKS` blocks of 16 rows; of each block it holds two rows, `lane / 4` and `lane / 4 + 8`, which it
//! shares with the other three lanes of its quad.

use packinfer_abi::AttentionParams;

use crate::element::Element;
use crate::ptx::math::{self, ones_from};
use crate::ptx::mma::{Fragment, OperandA};
use crate::ptx::warp;
use crate::rows::Row;

/// Rows of a block of 16 that a lane holds a part of.
pub const ROWS_PER_LANE: usize = 2;

/// Of a warp's rows, the one that the lane holds in half `half` of block `block`.
#[inline(always)]
pub fn row_of_lane(block: usize, half: usize, lane: u32) -> u32 {
    16 * block as u32 + 8 * half as u32 + lane / 4
}

/// Of a row's elements, the first of the two that the lane holds in fragment `block`.
#[inline(always)]
pub fn element_of_lane(block: usize, lane: u32) -> u32 {
    8 * block as u32 + lane % 4 * 2
}

/// ln 2: the kernels' logarithms are to base 2 until they are written.
pub const LN_2: f32 = core::f32::consts::LN_2;

/// Running maximum and sum of each row that the lane holds a part of.
#[derive(Clone, Copy)]
pub struct OnlineSoftmax<const ROW_BLOCKS: usize> {
    /// Greatest score so far, not yet scaled; the same in all lanes of the quad.
    max: [[f32; ROWS_PER_LANE]; ROW_BLOCKS],
    /// Sum of this lane's exponentials.
    sum: [[f32; ROWS_PER_LANE]; ROW_BLOCKS],
    /// Softmax scale times log2(e).
    scale_log2: f32,
}

/// A factor for each row that the lane holds a part of.
pub type RowFactors<const ROW_BLOCKS: usize> = [[f32; ROWS_PER_LANE]; ROW_BLOCKS];

/// A sum of exponentials for each row that the lane holds a part of.
pub type RowSums<const ROW_BLOCKS: usize> = [[f32; ROWS_PER_LANE]; ROW_BLOCKS];

/// Zero, as a sum of exponentials is never negative; but neither the compiler nor the assembler knows that, so what depends on it
/// comes after the additions.
#[cfg(feature = "sm_80")]
#[inline(always)]
pub fn zero_after<const ROW_BLOCKS: usize>(sums: &RowSums<ROW_BLOCKS>) -> u32 {
    sums.as_flattened().iter().fold(false, |negative, &sum| negative | (sum < 0.0)).into()
}

/// Multiplies each row of a lane's output by its factor.
#[inline(always)]
pub fn scale_rows<const DIM_BLOCKS: usize, const ROW_BLOCKS: usize>(
    output: &mut [[Fragment; DIM_BLOCKS]; ROW_BLOCKS],
    factors: &RowFactors<ROW_BLOCKS>,
) {
    for (fragments, factors) in output.iter_mut().zip(factors) {
        for fragment in fragments {
            for (e, value) in fragment.iter_mut().enumerate() {
                *value *= factors[e / 2];
            }
        }
    }
}

/// A row's final factors.
#[derive(Clone, Copy)]
pub struct RowSum {
    /// What O is multiplied with: one over the sum of the exponentials, or 0 for a row that saw nothing.
    pub inverse: f32,
    /// log2 of the sum of the exponentials of the scaled scores; −∞ for a row that saw nothing.
    pub lse_log2: f32,
}

impl RowSum {
    /// Of a row that saw nothing.
    pub const NOTHING: Self = Self { inverse: 0.0, lse_log2: f32::NEG_INFINITY };

    /// Of the sum of exponentials, and of what was subtracted from the scaled scores before: any number where the sum is zero.
    #[inline(always)]
    pub fn new(sum: f32, origin: f32) -> Self {
        if sum == 0.0 {
            return Self::NOTHING;
        }
        Self { inverse: math::reciprocal(sum), lse_log2: origin + math::log2(sum) }
    }

    /// The same with a sink of the given logarithm to base 2, −∞ for none: one more exponential in the sum.
    #[inline(always)]
    pub fn with_sink(self, sink_log2: f32) -> Self {
        if sink_log2 == f32::NEG_INFINITY {
            return self;
        }
        let max = math::max(self.lse_log2, sink_log2);
        let rest = math::exp2(self.lse_log2 - max);
        let sum = rest + math::exp2(sink_log2 - max);
        Self { inverse: self.inverse * rest * math::reciprocal(sum), lse_log2: max + math::log2(sum) }
    }
}

/// What becomes of the products of queries and keys.
#[derive(Clone, Copy)]
pub struct Logits {
    /// As [`AttentionParams::scale_log2`].
    pub scale_log2: f32,
    /// As [`AttentionParams::soft_cap_log2`].
    pub soft_cap_log2: f32,
}

impl Logits {
    /// Of products that must be multiplied with `factor` first.
    #[inline(always)]
    pub fn of(params: &AttentionParams, factor: f32) -> Self {
        // With a soft-cap, the scale stands inside the hyperbolic tangent, and what is left outside is the cap.
        let inside = if params.soft_cap_log2 != 0.0 { 1.0 } else { factor };
        Self { scale_log2: params.scale_log2 * inside, soft_cap_log2: params.soft_cap_log2 * factor }
    }
}

/// Bounds scores, if the launch asks for a soft-cap: each becomes the hyperbolic tangent of its part of the cap.
#[cfg(feature = "sm_80")]
#[inline(always)]
pub fn soft_cap<const FRAGMENTS: usize>(logits: Logits, scores: &mut [Fragment; FRAGMENTS]) {
    if logits.soft_cap_log2 != 0.0 {
        for fragment in scores {
            for score in fragment {
                *score = math::tanh_of_half_log2(*score * logits.soft_cap_log2);
            }
        }
    }
}

/// The same in launches with a soft-cap, where it is another for products of each of the lane's rows.
#[cfg(feature = "sm_90a")]
#[inline(always)]
pub fn soft_cap_rows<const FRAGMENTS: usize>(soft_cap_log2: [f32; ROWS_PER_LANE], scores: &mut [Fragment; FRAGMENTS]) {
    for fragment in scores {
        for (index, score) in fragment.iter_mut().enumerate() {
            *score = math::tanh_of_half_log2(*score * soft_cap_log2[index / 2]);
        }
    }
}

/// Sets the scores of columns that a row does not see to −∞.
///
/// Element `e` of fragment `j` is column `first_column + 8 j + 2 (lane % 4) + e % 2`. A bit for each of a row's columns is worked
/// out at once: the assembler turns seven bits at a time into predicates.
#[inline(always)]
pub fn mask<const FRAGMENTS: usize>(
    scores: &mut [Fragment; FRAGMENTS],
    rows: &[Row; ROWS_PER_LANE],
    first_column: u32,
    lane: u32,
) {
    const { assert!(2 * FRAGMENTS <= u32::BITS as usize) };
    let column = first_column + lane % 4 * 2;
    for (half, row) in rows.iter().enumerate() {
        let seen = ones_from(columns_of_lane_before(row.begin, column)) & !ones_from(columns_of_lane_before(row.end, column));
        for (j, fragment) in scores.iter_mut().enumerate() {
            for e in 0..2 {
                if seen & 1 << (2 * j + e) == 0 {
                    fragment[2 * half + e] = f32::NEG_INFINITY;
                }
            }
        }
    }
}

/// How many of a lane's columns, two of every eight from `first` on, come before column `end`.
#[inline(always)]
fn columns_of_lane_before(end: u32, first: u32) -> u32 {
    let columns = end.saturating_sub(first);
    columns / 8 * 2 + core::cmp::min(columns % 8, 2)
}

impl<const ROW_BLOCKS: usize> OnlineSoftmax<ROW_BLOCKS> {
    /// Nothing seen yet.
    #[inline(always)]
    pub fn new(scale_log2: f32) -> Self {
        Self { max: [[f32::NEG_INFINITY; ROWS_PER_LANE]; ROW_BLOCKS], sum: [[0.0; ROWS_PER_LANE]; ROW_BLOCKS], scale_log2 }
    }

    /// Takes in scores of further columns: turns them into exponentials, and says by what the output so far must be multiplied.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp.
    #[inline(always)]
    pub unsafe fn update<const FRAGMENTS: usize>(
        &mut self,
        scores: &mut [[Fragment; FRAGMENTS]; ROW_BLOCKS],
    ) -> RowFactors<ROW_BLOCKS> {
        self.update_by_fragment(scores).0
    }

    /// As [`Self::update`]; also returns what the sums are after each fragment.
    ///
    /// # Safety
    ///
    /// As [`Self::update`].
    #[inline(always)]
    pub unsafe fn update_by_fragment<const FRAGMENTS: usize>(
        &mut self,
        scores: &mut [[Fragment; FRAGMENTS]; ROW_BLOCKS],
    ) -> (RowFactors<ROW_BLOCKS>, [RowSums<ROW_BLOCKS>; FRAGMENTS]) {
        let mut factors = [[1.0; ROWS_PER_LANE]; ROW_BLOCKS];
        let mut sums = [[[0.0; ROWS_PER_LANE]; ROW_BLOCKS]; FRAGMENTS];
        for block in 0..ROW_BLOCKS {
            for half in 0..ROWS_PER_LANE {
                let (low, high) = (2 * half, 2 * half + 1);
                let mut max = self.max[block][half];
                for fragment in &scores[block] {
                    max = math::max(max, math::max(fragment[low], fragment[high]));
                }
                let max = warp::quad_max(max);
                // A row that has seen nothing has a maximum of −∞, and −∞ − −∞ must not be computed.
                let origin = if max == f32::NEG_INFINITY { 0.0 } else { max };
                let rescale = math::exp2((self.max[block][half] - origin) * self.scale_log2);
                self.max[block][half] = max;
                let offset = -origin * self.scale_log2;
                let mut sum = self.sum[block][half] * rescale;
                for (fragment, sums) in scores[block].iter_mut().zip(&mut sums) {
                    fragment[low] = math::exp2(math::fma(fragment[low], self.scale_log2, offset));
                    fragment[high] = math::exp2(math::fma(fragment[high], self.scale_log2, offset));
                    sum += fragment[low] + fragment[high];
                    sums[block][half] = sum;
                }
                self.sum[block][half] = sum;
                factors[block][half] = rescale;
            }
        }
        (factors, sums)
    }

    /// The factors of the rows, when all columns were taken in.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp.
    #[inline(always)]
    pub unsafe fn finish(&self) -> [[RowSum; ROWS_PER_LANE]; ROW_BLOCKS] {
        let mut sums = [[RowSum::NOTHING; ROWS_PER_LANE]; ROW_BLOCKS];
        for block in 0..ROW_BLOCKS {
            for half in 0..ROWS_PER_LANE {
                sums[block][half] = RowSum::new(warp::quad_sum(self.sum[block][half]), self.max[block][half] * self.scale_log2);
            }
        }
        sums
    }
}

/// Operand A of the second product: exponentials of 16 columns, from two neighbouring score fragments.
#[inline(always)]
pub fn probabilities<E: Element>(left: &Fragment, right: &Fragment) -> OperandA {
    [E::pack(left[0], left[1]), E::pack(left[2], left[3]), E::pack(right[0], right[1]), E::pack(right[2], right[3])]
}
