//! How K and V are stored, and how they become operands of the products of a warp.
//!
//! e4m3 is read by the same instructions as elements of 16 bits, two of its bytes for one of those. What a lane then holds are
//! not the elements that an operand has in that lane, but others: of K four neighbours, and a sum goes over them in any order, so
//! that Q is put into the same order; of V two neighbours in each word, which become operands of two products, and O is put into
//! order in the end.
//!
//! ```text
//! elements of a lane, of 16 summed over     16 bits: 2q, 2q + 1, 2q + 8, 2q + 9     e4m3: 4q, 4q + 1, 4q + 2, 4q + 3      q = lane % 4
//! elements of O of a lane, of 16            16 bits: 2q, 2q + 1, 2q + 8, 2q + 9     e4m3: 4q, 4q + 1, 4q + 2, 4q + 3
//! ```

#[cfg(feature = "sm_80")]
use packinfer_abi::AttentionParams;

use crate::e4m3::FromE4m3;
#[cfg(feature = "sm_80")]
use crate::e4m3::scale;
use crate::element::{Element, F16};
use crate::ptx::mma::{Fragment, OperandB};
use crate::ptx::packed::permute;
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

    /// Operands of product `product` with K, of what [`SharedTile::operands_b`](crate::shared_tile::SharedTile::operands_b)
    /// loads.
    fn keys(loaded: [OperandB; 2], product: usize) -> [OperandB; 2];

    /// Operands of product `product` with V, of what
    /// [`SharedTile::operands_b_transposed`](crate::shared_tile::SharedTile::operands_b_transposed) loads.
    fn values(loaded: [OperandB; 2], product: usize) -> [OperandB; 2];

    /// Of the fragments that these products gave, makes such that hold what [`Self::element`] says.
    fn put_in_order<const DIM_BLOCKS: usize>(output: &mut [Fragment; DIM_BLOCKS]);

    /// What the products with K must be multiplied with, and those with V, as operands are other than what is stored.
    const FACTORS: [f32; 2] = [1.0; 2];

    /// The same with the scales of a KV head.
    ///
    /// # Safety
    ///
    /// `params` are valid, and there is such a head.
    #[cfg(feature = "sm_80")]
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
#[cfg(feature = "sm_80")]
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

    #[cfg(feature = "sm_80")]
    #[inline(always)]
    unsafe fn scales(_: &AttentionParams, _: u32) -> Scales {
        Scales { key: 1.0, value: 1.0 }
    }
}

/// FP8: sign, four bits of exponent, three of fraction; a scale for each KV head.
pub struct E4m3;

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

    const FACTORS: [f32; 2] = [E::FACTOR, F16::FACTOR];

    #[cfg(feature = "sm_80")]
    #[inline(always)]
    unsafe fn scales(params: &AttentionParams, kv_head: u32) -> Scales {
        let [k, v] = <Self as Stored<E>>::FACTORS;
        Scales { key: k * scale(params.k_scales, kv_head), value: v * scale(params.v_scales, kv_head) }
    }
}
