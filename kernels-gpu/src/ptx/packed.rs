//! Words that hold several numbers (PTX ISA, Data Movement and Conversion Instructions: `prmt`; Half Precision Floating Point
//! Instructions).

use core::arch::asm;

/// The bytes of `word` that the nibbles of `SELECTOR` name, 0 to 3; nibbles of 4 give zeros. PTX ISA, `prmt`.
#[inline(always)]
pub fn permute<const SELECTOR: u32>(word: u32) -> u32 {
    let result: u32;
    // SAFETY: register arithmetic.
    unsafe {
        asm!("prmt.b32 {0}, {1}, 0, {2};", out(reg32) result, in(reg32) word, const SELECTOR, options(pure, nomem, nostack))
    };
    result
}

/// Products of two pairs of bf16, each rounded once. PTX ISA, `fma`: a product alone needs `sm_90`.
#[inline(always)]
pub fn multiply_bf16x2(a: u32, b: u32) -> u32 {
    const MINUS_ZEROS: u32 = 0x8000_8000;
    let result: u32;
    // SAFETY: register arithmetic.
    unsafe {
        asm!("fma.rn.bf16x2 {0}, {1}, {2}, {3};",
            out(reg32) result, in(reg32) a, in(reg32) b, in(reg32) MINUS_ZEROS, options(pure, nomem, nostack))
    };
    result
}

/// The greater of both halves of two words, without signs. PTX ISA, Integer Arithmetic Instructions: `max`.
#[cfg(feature = "sm_90a")]
#[inline(always)]
pub fn max_u16x2(a: u32, b: u32) -> u32 {
    let result: u32;
    // SAFETY: register arithmetic.
    unsafe { asm!("max.u16x2 {0}, {1}, {2};", out(reg32) result, in(reg32) a, in(reg32) b, options(pure, nomem, nostack)) };
    result
}

/// Two numbers in e4m3, the first in the lower byte, as float16. PTX ISA, `cvt`.
#[cfg(feature = "sm_90a")]
#[inline(always)]
pub fn e4m3_pair_to_f16(pair: u16) -> u32 {
    let result: u32;
    // SAFETY: register arithmetic.
    unsafe { asm!("cvt.rn.f16x2.e4m3x2 {0}, {1};", out(reg32) result, in(reg16) pair, options(pure, nomem, nostack)) };
    result
}
