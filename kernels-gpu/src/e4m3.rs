//! FP8: sign, four bits of exponent, three of fraction.

use packinfer_abi::DeviceAddress;

use crate::element::{Bf16, F16};
use crate::ptx::memory::load_global;
#[cfg(feature = "sm_90a")]
use crate::ptx::packed::e4m3_pair_to_f16;
use crate::ptx::packed::multiply_bf16x2;

/// Element types that hold all numbers of e4m3.
pub trait FromE4m3 {
    /// Two numbers, in the upper bytes of the word's halves, whatever the lower ones hold. Bits are moved: sign to sign, the
    /// others to the lowest of the exponent and the highest of the fraction. That is exact, but smaller by the difference of the
    /// exponents' biases.
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

/// The four numbers of a word in float16, two a word.
#[cfg(feature = "sm_90a")]
#[inline(always)]
pub fn four_to_f16(word: u32) -> [u32; 2] {
    [e4m3_pair_to_f16(word as u16), e4m3_pair_to_f16((word >> 16) as u16)]
}

/// A KV head's scale; 1 where there are none.
///
/// # Safety
///
/// `scales` are zero, or have one for the head.
#[inline(always)]
pub unsafe fn scale(scales: DeviceAddress, kv_head: u32) -> f32 {
    if scales == 0 { 1.0 } else { f32::from_bits(load_global(scales + 4 * u64::from(kv_head))) }
}
