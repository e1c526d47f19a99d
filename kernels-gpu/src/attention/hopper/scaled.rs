//! Q in bf16 of wide tiles in float16 instead, for products with a K that was made of FP8: all of its numbers are numbers of float16, and one instruction makes two of them, where it takes five for
//! two in bf16.
//!
//! A number in bf16 has fewer bits than one in float16, but a wider range. So each row is multiplied by a power of two that has its greatest number between 2^14 and 2^15, and its scores by the
//! inverse. That is exact, but for numbers that are less than a 2^28th part of the greatest, which are off by half of such a part at most.

use super::consumer::Consumer;
use super::helpers::Helpers;
use crate::ptx::cp_async::CHUNK_BYTES;
use crate::ptx::math::opaque;
use crate::ptx::memory::{load_shared_x4, store_shared_x4};
use crate::ptx::packed::max_u16x2;
use crate::ptx::{warp, wgmma};
use crate::shared_tile::PANEL_BLOCKS;
use crate::softmax::{ROWS_PER_LANE, row_of_lane};

/// Lanes that share a row.
const LANES_OF_ROW: u32 = 4;
/// The most chunks of a row that a lane has.
const MOST_CHUNKS: usize = 8;
/// A word of two equal halves, each 1.
const ONES: u32 = 0x1_0001;
/// Signs of the two numbers of a word.
const SIGNS: u32 = ONES << 15;
/// Bits of the fraction in bf16, in float16 and in float32.
const FRACTION: u32 = 7;
const FRACTION_OF_F16: u32 = 10;
const FRACTION_OF_F32: u32 = 23;
/// What is added to an exponent in float16; in bf16, as in float32.
const BIAS_OF_F16: u32 = 15;
/// The exponent that the greatest number of a row gets, as it is stored in float16.
const GREATEST: u32 = BIAS_OF_F16 + 14;
/// The exponent of infinities and NaN in bf16.
const NOT_FINITE: u32 = 0xFF;

impl<const DIM_BLOCKS: usize, const FRAGMENTS: usize, const ROW_BLOCKS: usize, H: Helpers>
    Consumer<'_, DIM_BLOCKS, FRAGMENTS, ROW_BLOCKS, H>
{
    /// Makes float16 of the warp's rows of the tile's Q, which are there, from `first_row` on. Products with them come behind a barrier of the consumer.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp, once for each tile, between taking and releasing its Q.
    #[inline(always)]
    pub unsafe fn scale_queries(&mut self, first_row: u32) {
        // Worked out again for each tile: the compiler would keep what depends on it for all of them.
        let lane = opaque(self.lane());
        let queries = self.shared.queries();
        let address_of = |half: usize, index: usize| {
            let row = first_row + row_of_lane(0, half, lane);
            // Lanes of neighbouring rows have chunks of different halves of a panel, which are in different banks, but for the half that has no other.
            let is_alone = index + 1 == DIM_BLOCKS / LANES_OF_ROW as usize && index % 2 == 0;
            let half_of_panel = if is_alone { 0 } else { (index as u32 ^ row) % 2 };
            let chunk = half_of_panel * LANES_OF_ROW + lane % LANES_OF_ROW;
            queries.panel_row(index as u32 / 2, row) + (chunk ^ row % PANEL_BLOCKS as u32) * CHUNK_BYTES
        };
        let mut chunks = [[[0; 4]; MOST_CHUNKS]; ROWS_PER_LANE];
        for half in 0..ROWS_PER_LANE {
            for index in 0..DIM_BLOCKS / LANES_OF_ROW as usize {
                chunks[half][index] = load_shared_x4(address_of(half, index));
            }
        }
        for half in 0..ROWS_PER_LANE {
            let chunks = &mut chunks[half][..DIM_BLOCKS / LANES_OF_ROW as usize];
            self.query_factors[half] = scale_row(chunks);
            for (index, words) in chunks.iter().enumerate() {
                store_shared_x4(address_of(half, index), *words);
            }
        }
        wgmma::fence_shared_writes();
    }
}

/// Makes float16 of the row that four lanes share. Returns what products with it must be multiplied with.
#[inline(always)]
unsafe fn scale_row(chunks: &mut [[u32; 4]]) -> f32 {
    // Numbers that are not negative have the order of their bits.
    let magnitude = |word: u32| word & !SIGNS;
    let mut greatest = [0; 4];
    for words in chunks.iter() {
        for (greatest, &word) in greatest.iter_mut().zip(words) {
            *greatest = max_u16x2(*greatest, magnitude(word));
        }
    }
    let [a, b, c, d] = greatest;
    let greatest = warp::quad_max_u16x2(max_u16x2(max_u16x2(a, b), max_u16x2(c, d)));
    let exponent = core::cmp::max(greatest >> 16, greatest & 0xFFFF) >> FRACTION;
    // All exponents become less by that.
    let less = core::cmp::max(exponent, GREATEST) - GREATEST;
    let subtrahends = (less << FRACTION) * ONES;
    for word in chunks.as_flattened_mut() {
        let bits = max_u16x2(magnitude(*word), subtrahends) - subtrahends;
        *word = (*word & SIGNS) | bits << (FRACTION_OF_F16 - FRACTION);
    }
    // With numbers that are not finite, nothing is right. The bias is that of float16 now.
    if exponent == NOT_FINITE { f32::NAN } else { f32::from_bits((less + BIAS_OF_F16) << FRACTION_OF_F32) }
}
