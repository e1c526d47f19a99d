//! Arithmetic that Rust has no operator for.

use core::arch::asm;

/// 2^x; flushes subnormals, 2^−∞ = 0. PTX ISA, Floating Point Instructions: `ex2`.
#[inline(always)]
pub fn exp2(x: f32) -> f32 {
    let y: f32;
    // SAFETY: register arithmetic.
    unsafe { asm!("ex2.approx.ftz.f32 {0}, {1};", out(reg32) y, in(reg32) x, options(pure, nomem, nostack)) };
    y
}

/// log2(x); −∞ for 0. PTX ISA, Floating Point Instructions: `lg2`.
#[inline(always)]
pub fn log2(x: f32) -> f32 {
    let y: f32;
    // SAFETY: register arithmetic.
    unsafe { asm!("lg2.approx.f32 {0}, {1};", out(reg32) y, in(reg32) x, options(pure, nomem, nostack)) };
    y
}

/// 1/x, to one ulp. PTX ISA, Floating Point Instructions: `rcp`.
#[inline(always)]
pub fn reciprocal(x: f32) -> f32 {
    let y: f32;
    // SAFETY: register arithmetic.
    unsafe { asm!("rcp.approx.ftz.f32 {0}, {1};", out(reg32) y, in(reg32) x, options(pure, nomem, nostack)) };
    y
}

/// tanh(x · ln 2 / 2), to about 10^-7: the hardware's own tanh is a thousand times coarser, which shows where a soft-cap
/// multiplies it.
#[inline(always)]
pub fn tanh_of_half_log2(x: f32) -> f32 {
    fma(-2.0, reciprocal(exp2(x) + 1.0), 1.0)
}

/// The larger of two numbers; the other one where one is NaN. PTX ISA, Floating Point Instructions: `max`.
#[inline(always)]
pub fn max(a: f32, b: f32) -> f32 {
    let y: f32;
    // SAFETY: register arithmetic.
    unsafe { asm!("max.f32 {0}, {1}, {2};", out(reg32) y, in(reg32) a, in(reg32) b, options(pure, nomem, nostack)) };
    y
}

/// The smaller of two numbers; the other one where one is NaN. PTX ISA, Floating Point Instructions: `min`.
#[cfg(feature = "sm_90a")]
#[inline(always)]
pub fn min(a: f32, b: f32) -> f32 {
    let y: f32;
    // SAFETY: register arithmetic.
    unsafe { asm!("min.f32 {0}, {1}, {2};", out(reg32) y, in(reg32) a, in(reg32) b, options(pure, nomem, nostack)) };
    y
}

/// a · b + c, rounded once. PTX ISA, Floating Point Instructions: `fma`.
#[inline(always)]
pub fn fma(a: f32, b: f32, c: f32) -> f32 {
    let y: f32;
    // SAFETY: register arithmetic.
    unsafe {
        asm!("fma.rn.f32 {0}, {1}, {2}, {3};", out(reg32) y, in(reg32) a, in(reg32) b, in(reg32) c, options(pure, nomem, nostack))
    };
    y
}

/// A word of ones from bit `first` on, which may be 32 or more. PTX ISA, Logic and Shift Instructions: `shl`.
#[inline(always)]
pub fn ones_from(first: u32) -> u32 {
    let word: u32;
    // SAFETY: register arithmetic.
    unsafe { asm!("shl.b32 {0}, -1, {1};", out(reg32) word, in(reg32) first, options(pure, nomem, nostack)) };
    word
}

/// The same number, but unknown to the compiler: what depends on it is worked out where it is used, rather than kept in registers
/// across a loop that needs those for its accumulators.
#[inline(always)]
pub fn opaque(mut x: u32) -> u32 {
    // SAFETY: a move.
    unsafe { asm!("mov.b32 {0}, {0};", inout(reg32) x, options(nomem, nostack)) };
    x
}

/// As [`opaque`], of an address: such as that of a tensor that a launch may have or not, which is asked for again rather than
/// remembered.
#[inline(always)]
pub fn opaque_address(mut address: u64) -> u64 {
    // SAFETY: a move.
    unsafe { asm!("mov.b64 {0}, {0};", inout(reg64) address, options(nomem, nostack)) };
    address
}

/// a / b for b > 0, without the check whose failure would need a panic.
///
/// # Safety
///
/// `b` is not zero.
#[inline(always)]
pub unsafe fn divide(a: u32, b: u32) -> u32 {
    core::hint::assert_unchecked(b != 0);
    a / b
}
