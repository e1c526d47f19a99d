//! bf16 and f16.

use core::arch::asm;

use crate::ptx::mma::{self, Fragment, OperandA, OperandB};

/// An element type of Q, K, V and O.
pub trait Element {
    /// `d += a · b`.
    ///
    /// # Safety
    ///
    /// Reached by all lanes of the warp.
    unsafe fn mma(d: &mut Fragment, a: OperandA, b: OperandB);

    /// Two numbers in one word, `low` in its lower half, rounded to nearest. PTX ISA, Data Movement and Conversion Instructions: `cvt`.
    fn pack(low: f32, high: f32) -> u32;
}

/// Bytes of an element of either type.
pub const ELEMENT_BYTES: u32 = 2;

macro_rules! element {
    ($(#[doc = $doc:literal])* $name:ident, $mma:ident, $cvt:literal) => {
        $(#[doc = $doc])*
        pub struct $name;

        impl Element for $name {
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
        }
    };
}

element! {
    /// bfloat16.
    Bf16, mma_bf16, "cvt.rn.bf16x2.f32"
}
element! {
    /// IEEE half precision.
    F16, mma_f16, "cvt.rn.f16x2.f32"
}
