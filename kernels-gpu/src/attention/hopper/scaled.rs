//! Q in bf16 of wide tiles in float16 instead, for products with a K that was made of FP8: all of its numbers are numbers of
//! float16, and one instruction makes two of them, where it takes five for two in bf16.
//!
//! A number in bf16 has fewer bits than one in float16, but a wider range. So each row is multiplied by a power of two
//! ([`ScaleToF16`]), and its scores by the inverse.

use packinfer_abi::ScaleToF16;

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
/// The most [chunks](Consumer::CHUNKS_OF_LANE) that a lane has of a row.
const MOST_CHUNKS: usize = 8;

impl<const DIM_BLOCKS: usize, const FRAGMENTS: usize, const ROW_BLOCKS: usize, H: Helpers>
    Consumer<'_, DIM_BLOCKS, FRAGMENTS, ROW_BLOCKS, H>
{
    /// Chunks of a row of Q that a lane has.
    const CHUNKS_OF_LANE: usize = DIM_BLOCKS / LANES_OF_ROW as usize;

    /// Makes float16 of the warp's rows of the tile's Q, which are there, from `first_row` on. Products with them come behind a
    /// barrier of the consumer.
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
            // Lanes of neighbouring rows have chunks of different halves of a panel, which are in different banks, but for the
            // half that has no other.
            let is_alone = index + 1 == Self::CHUNKS_OF_LANE && index % 2 == 0;
            let half_of_panel = if is_alone { 0 } else { (index as u32 ^ row) % 2 };
            let chunk = half_of_panel * LANES_OF_ROW + lane % LANES_OF_ROW;
            queries.panel_row(index as u32 / 2, row) + (chunk ^ row % PANEL_BLOCKS as u32) * CHUNK_BYTES
        };
        let mut chunks = [[[0; 4]; MOST_CHUNKS]; ROWS_PER_LANE];
        for half in 0..ROWS_PER_LANE {
            for index in 0..Self::CHUNKS_OF_LANE {
                chunks[half][index] = load_shared_x4(address_of(half, index));
            }
        }
        for half in 0..ROWS_PER_LANE {
            let chunks = &mut chunks[half][..Self::CHUNKS_OF_LANE];
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
    let mut greatest = [0; 4];
    for words in chunks.iter() {
        for (greatest, &word) in greatest.iter_mut().zip(words) {
            *greatest = max_u16x2(*greatest, ScaleToF16::magnitudes(word));
        }
    }
    let [a, b, c, d] = greatest;
    let scale = ScaleToF16::of_greatest(warp::quad_max_u16x2(max_u16x2(max_u16x2(a, b), max_u16x2(c, d))));
    for word in chunks.as_flattened_mut() {
        *word = scale.pair(*word, max_u16x2);
    }
    scale.inverse()
}
