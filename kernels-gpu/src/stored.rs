//! How K and V are stored, and how they become operands of products.
//!
//! e4m3 is read by the same instructions as elements of 16 bits, two of its bytes for one of those. What a lane then holds are not the elements that an
//! operand has in that lane, but others: of K four neighbours, and a sum goes over them in any order, so that Q is put into the same order; of V two
//! neighbours in each word, which become operands of two products, and O is put into order in the end.
//!
//! ```text
//! elements of a lane, of 16 summed over     16 bits: 2q, 2q + 1, 2q + 8, 2q + 9     e4m3: 4q, 4q + 1, 4q + 2, 4q + 3      q = lane % 4
//! elements of O of a lane, of 16            16 bits: 2q, 2q + 1, 2q + 8, 2q + 9     e4m3: 4q, 4q + 1, 4q + 2, 4q + 3
//! ```

use packinfer_abi::{AttentionParams, DeviceAddress};

use crate::element::{Bf16, Element, F16};
use crate::ptx::memory::load_global;
use crate::ptx::mma::{Fragment, OperandB};
use crate::ptx::packed::{multiply_bf16x2, permute};
use crate::softmax::element_of_lane;

/// The most that [`Stored::PRODUCTS`] is.
pub const MOST_PRODUCTS: usize = 2;

/// How K and V are stored, where Q and O are of type `E`.
pub trait Stored<E> {
    /// What the product with V is computed in.
    type Weight: Element;
    /// Products, each with 16 elements summed over or 16 of O, that 32 bytes of a row are good for.
    const PRODUCTS: usize;
    /// Whether a lane holds four neighbours of 16 elements, rather than two pairs.
    const FOUR_NEIGHBOURS: bool = Self::PRODUCTS > 1;

    /// Operands of product `product` with K, of what [`SharedTile::operands_b`](crate::shared_tile::SharedTile::operands_b) loads.
    fn keys(loaded: [OperandB; 2], product: usize) -> [OperandB; 2];

    /// Operands of product `product` with V, of what
    /// [`SharedTile::operands_b_transposed`](crate::shared_tile::SharedTile::operands_b_transposed) loads.
    fn values(loaded: [OperandB; 2], product: usize) -> [OperandB; 2];

    /// Of the fragments that these products gave, makes such that hold what [`Self::element`] says.
    fn put_in_order<const DIM_BLOCKS: usize>(output: &mut [Fragment; DIM_BLOCKS]);

    /// What the products with K and with V must be multiplied with.
    ///
    /// # Safety
    ///
    /// `params` are valid, and there is such a head.
    unsafe fn scales(params: &AttentionParams, kv_head: u32) -> Scales;

    /// Of Q and O, the first of the two elements that a lane holds in block `block` of 8.
    #[inline(always)]
    fn element(block: usize, lane: u32) -> u32 {
        if Self::FOUR_NEIGHBOURS {
            16 * (block as u32 / 2) + lane % 4 * 4 + block as u32 % 2 * 2
        } else {
            element_of_lane(block, lane)
        }
    }
}

/// Factors of the products with K and with V.
#[derive(Clone, Copy)]
pub struct Scales {
    /// Of scores.
    pub key: f32,
    /// Of O.
    pub value: f32,
}

/// As Q and O.
pub struct AsQueries;

impl<E: Element> Stored<E> for AsQueries {
    type Weight = E;
    const PRODUCTS: usize = 1;

    #[inline(always)]
    fn keys(loaded: [OperandB; 2], _: usize) -> [OperandB; 2] {
        loaded
    }

    #[inline(always)]
    fn values(loaded: [OperandB; 2], _: usize) -> [OperandB; 2] {
        loaded
    }

    #[inline(always)]
    fn put_in_order<const DIM_BLOCKS: usize>(_: &mut [Fragment; DIM_BLOCKS]) {}

    #[inline(always)]
    unsafe fn scales(_: &AttentionParams, _: u32) -> Scales {
        Scales { key: 1.0, value: 1.0 }
    }
}

/// FP8: sign, four bits of exponent, three of fraction; a scale for each KV head.
pub struct E4m3;

/// Numbers in e4m3 that become numbers of another type by moving bits: sign to sign, the others to the lowest of the exponent and the
/// highest of the fraction. That is exact, but smaller by the difference of the exponents' biases.
pub trait FromE4m3 {
    /// Two numbers, in the upper bytes of the word's halves, whatever the lower ones hold.
    fn pair(word: u32) -> u32;
    /// What products with such numbers must be multiplied with.
    const FACTOR: f32;
}

impl FromE4m3 for F16 {
    #[inline(always)]
    fn pair(word: u32) -> u32 {
        (word & 0x8000_8000) | (word >> 1 & 0x3F80_3F80)
    }

    const FACTOR: f32 = (1 << (15 - 7)) as f32;
}

impl FromE4m3 for Bf16 {
    #[inline(always)]
    fn pair(word: u32) -> u32 {
        // 2^(127 - 7) twice: sums of products with numbers so small would lose their last bits.
        const FACTORS: u32 = 0x7B80_7B80;
        multiply_bf16x2((word & 0x8000_8000) | (word >> 4 & 0x07F0_07F0), FACTORS)
    }

    const FACTOR: f32 = 1.0;
}

impl<E: Element + FromE4m3> Stored<E> for E4m3 {
    /// Finer than bf16, and weights are at most 1.
    type Weight = F16;
    const PRODUCTS: usize = 2;

    #[inline(always)]
    fn keys(loaded: [OperandB; 2], product: usize) -> [OperandB; 2] {
        // Bytes 0 and 1 above zeros, then 2 and 3.
        loaded.map(|words| [E::pair(permute::<0x1404>(words[product])), E::pair(permute::<0x3424>(words[product]))])
    }

    #[inline(always)]
    fn values(loaded: [OperandB; 2], product: usize) -> [OperandB; 2] {
        // A word is two neighbours of a row, then those of the next row.
        let words = loaded[product];
        [words.map(|word| F16::pair(word << 8)), words.map(F16::pair)]
    }

    #[inline(always)]
    fn put_in_order<const DIM_BLOCKS: usize>(output: &mut [Fragment; DIM_BLOCKS]) {
        for pair in 0..DIM_BLOCKS / 2 {
            let (even, odd) = (output[2 * pair], output[2 * pair + 1]);
            output[2 * pair] = [even[0], odd[0], even[2], odd[2]];
            output[2 * pair + 1] = [even[1], odd[1], even[3], odd[3]];
        }
    }

    #[inline(always)]
    unsafe fn scales(params: &AttentionParams, kv_head: u32) -> Scales {
        Scales { key: E::FACTOR * scale(params.k_scales, kv_head), value: F16::FACTOR * scale(params.v_scales, kv_head) }
    }
}

/// A KV head's scale; 1 where there are none.
#[inline(always)]
unsafe fn scale(scales: DeviceAddress, kv_head: u32) -> f32 {
    if scales == 0 { 1.0 } else { f32::from_bits(load_global(scales + 4 * u64::from(kv_head))) }
}
