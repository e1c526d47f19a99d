//! bf16 and f16.

use core::arch::asm;

use crate::ptx::mma::{self, Fragment, OperandA, OperandB};

/// An element type of Q, K, V and O.
pub trait Element {
    /// Whether float16 has all of its numbers.
    #[cfg(feature = "sm_90a")]
    const IS_OF_F16: bool;

    /// `d += a · b`.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp.
    unsafe fn mma(d: &mut Fragment, a: OperandA, b: OperandB);

    /// Two numbers in one word, `low` in its lower half, rounded to nearest. PTX ISA, Data Movement and Conversion Instructions:
    /// `cvt`.
    fn pack(low: f32, high: f32) -> u32;

    /// The two numbers of a word, the one in its lower half first. PTX ISA, Data Movement and Conversion Instructions: `cvt`.
    fn unpack(word: u32) -> [f32; 2];
}

/// Bytes of an element of either type.
pub const ELEMENT_BYTES: u32 = 2;

macro_rules! element {
    ($(#[doc = $doc:literal])* $name:ident, $mma:ident, $cvt:literal, $unpack:ident, $is_of_f16:literal) => {
        $(#[doc = $doc])*
        pub struct $name;

        impl Element for $name {
            #[cfg(feature = "sm_90a")]
            const IS_OF_F16: bool = $is_of_f16;

            #[inline(always)]
            unsafe fn mma(d: &mut Fragment, a: OperandA, b: OperandB) {
                mma::$mma(d, a, b);
            }

            #[inline(always)]
            fn pack(low: f32, high: f32) -> u32 {
                let word: u32;
                // SAFETY: register arithmetic.
                unsafe {
                    asm!(concat!($cvt, " {0}, {1}, {2};"), out(reg32) word, in(reg32) high, in(reg32) low, options(pure, nomem, nostack));
                }
                word
            }

            #[inline(always)]
            fn unpack(word: u32) -> [f32; 2] {
                $unpack(word)
            }
        }
    };
}

/// bfloat16 is the upper half of float32.
#[inline(always)]
fn unpack_bf16(word: u32) -> [f32; 2] {
    [f32::from_bits(word << 16), f32::from_bits(word & 0xFFFF_0000)]
}

#[inline(always)]
fn unpack_f16(word: u32) -> [f32; 2] {
    let (low, high): (f32, f32);
    // SAFETY: register arithmetic.
    unsafe {
        asm!("{{ .reg .b16 low, high; mov.b32 {{low, high}}, {2}; cvt.f32.f16 {0}, low; cvt.f32.f16 {1}, high; }}",
            out(reg32) low, out(reg32) high, in(reg32) word, options(pure, nomem, nostack));
    }
    [low, high]
}

element! {
    /// bfloat16.
    Bf16, mma_bf16, "cvt.rn.bf16x2.f32", unpack_bf16, false
}
element! {
    /// IEEE half precision.
    F16, mma_f16, "cvt.rn.f16x2.f32", unpack_f16, true
}
