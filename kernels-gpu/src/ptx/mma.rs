//! Tensor cores by the warp: `ldmatrix` and `mma.m16n8k16` (PTX ISA, Warp Level Matrix Instructions).
//!
//! Of a 16 × 8 accumulator [`Fragment`], lane `l` holds columns `2 (l % 4)` and the next: of row `l / 4` in elements 0 and 1, of
//! row `l / 4 + 8` in elements 2 and 3.

use core::arch::asm;

/// A lane's part of a 16 × 8 accumulator.
pub type Fragment = [f32; 4];
/// A lane's part of a 16 × 16 operand A: two elements in each word.
pub type OperandA = [u32; 4];
/// A lane's part of a 16 × 8 operand B: two elements in each word.
pub type OperandB = [u32; 2];

/// Loads four 8 × 8 matrices of 16-bit elements; lane `l` gives the address of row `l % 8` of matrix `l / 8`.
///
/// # Safety
///
/// Reached by all lanes of the warp; each address is aligned to 16 bytes and in the block's shared memory.
#[inline(always)]
pub unsafe fn load_matrices(row: u32) -> [u32; 4] {
    let (a, b, c, d): (u32, u32, u32, u32);
    asm!("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{{0}, {1}, {2}, {3}}}, [{4}];",
        out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) row, options(nostack));
    [a, b, c, d]
}

/// As [`load_matrices`], each matrix transposed.
///
/// # Safety
///
/// As [`load_matrices`].
#[inline(always)]
pub unsafe fn load_matrices_transposed(row: u32) -> [u32; 4] {
    let (a, b, c, d): (u32, u32, u32, u32);
    asm!("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{{0}, {1}, {2}, {3}}}, [{4}];",
        out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) row, options(nostack));
    [a, b, c, d]
}

/// Stores four 8 × 8 matrices of 16-bit elements; lane `l` gives the address of row `l % 8` of matrix `l / 8`. PTX ISA,
/// `stmatrix`.
///
/// # Safety
///
/// As [`load_matrices`].
#[cfg(feature = "sm_90a")]
#[inline(always)]
pub unsafe fn store_matrices(row: u32, [a, b, c, d]: [u32; 4]) {
    asm!("stmatrix.sync.aligned.m8n8.x4.shared.b16 [{4}], {{{0}, {1}, {2}, {3}}};",
        in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d, in(reg32) row, options(nostack));
}

/// As [`store_matrices`], each matrix transposed.
///
/// # Safety
///
/// As [`load_matrices`].
#[cfg(feature = "sm_90a")]
#[inline(always)]
pub unsafe fn store_matrices_transposed(row: u32, [a, b, c, d]: [u32; 4]) {
    asm!("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [{4}], {{{0}, {1}, {2}, {3}}};",
        in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d, in(reg32) row, options(nostack));
}

macro_rules! mma {
    ($(#[doc = $doc:literal])* $name:ident, $ty:literal) => {
        $(#[doc = $doc])*
        ///
        /// # Safety
        ///
        /// Reached by all lanes of the warp.
        #[inline(always)]
        pub unsafe fn $name(d: &mut Fragment, a: OperandA, b: OperandB) {
            asm!(concat!("mma.sync.aligned.m16n8k16.row.col.f32.", $ty, ".", $ty, ".f32 ",
                    "{{{0}, {1}, {2}, {3}}}, {{{4}, {5}, {6}, {7}}}, {{{8}, {9}}}, {{{0}, {1}, {2}, {3}}};"),
                inout(reg32) d[0], inout(reg32) d[1], inout(reg32) d[2], inout(reg32) d[3],
                in(reg32) a[0], in(reg32) a[1], in(reg32) a[2], in(reg32) a[3], in(reg32) b[0], in(reg32) b[1],
                options(pure, nomem, nostack));
        }
    };
}

mma! {
    /// `d += a · b` in bf16 with float32 accumulation.
    mma_bf16, "bf16"
}
mma! {
    /// `d += a · b` in f16 with float32 accumulation.
    mma_f16, "f16"
}
