//! Tensor cores by the warpgroup (PTX ISA, Asynchronous Warpgroup Level Matrix Instructions).
//!
//! A product runs beside the program from [`commit_group`] to [`wait_group`]; meanwhile its registers must not be touched. The
//! compiler does not know that, so [`Accumulator::hold`] stands on both sides of a flight: it makes the compiler believe that all
//! of an accumulator's registers change there, and nothing moves across.
//!
//! Warp `w` of the warpgroup holds rows `16 w ..` of the 64 × N accumulator, as [`Fragment`]s of 8 columns each.

use core::arch::asm;

use super::mma::{Fragment, OperandA};
use crate::element::{Bf16, F16};

/// Where an operand lies in shared memory: rows of 128 bytes, swizzled by 128 bytes (PTX ISA, Matrix Descriptor Format).
#[derive(Clone, Copy)]
pub struct Descriptor {
    /// Address and leading offset. An address is all that differs between the operands of a product, and it never carries over
    /// into what stands above it.
    low: u32,
    /// Stride and swizzle.
    high: u32,
}

impl Descriptor {
    const SWIZZLE_128B: u32 = 1 << 30;
    /// Of the upper half, the stride, in units of 16 bytes.
    const STRIDE: u32 = 0x3FFF;

    #[inline(always)]
    const fn new(address: u32, leading_bytes: u32, stride_bytes: u32) -> Self {
        Self { low: leading_bytes >> 4 << 16 | (address & 0x3_FFFF) >> 4, high: Self::SWIZZLE_128B | stride_bytes >> 4 }
    }

    /// Rows are rows of A or columns of B, eight of them every `eight_rows_bytes`; a row's 64 elements are summed over. The
    /// leading offset is not used.
    #[inline(always)]
    pub fn along_sum(address: u32, eight_rows_bytes: u32) -> Self {
        Self::new(address, 16, eight_rows_bytes)
    }

    /// Rows are summed over, eight of them every `eight_rows_bytes`; a row's 64 elements are columns of B, the next 64 lie
    /// `half_bytes` on.
    #[inline(always)]
    pub fn across_sum(address: u32, half_bytes: u32, eight_rows_bytes: u32) -> Self {
        Self::new(address, half_bytes, eight_rows_bytes)
    }

    /// The operand `bytes` on, a multiple of 16, in shared memory.
    #[inline(always)]
    pub fn skip(self, bytes: u32) -> Self {
        Self { low: self.low + (bytes >> 4), ..self }
    }

    /// Of an operand across the sum, the first 64 columns `bytes` on, a multiple of 16; the columns past them stay where they are.
    #[inline(always)]
    pub fn skip_in_first_half(self, bytes: u32) -> Self {
        // The leading offset stands above the address, in the same unit of 16 bytes, and gets less by what the address gets more.
        const LEADING_UNIT: u32 = 1 << 16;
        Self { low: self.low.wrapping_add((bytes >> 4).wrapping_mul(1u32.wrapping_sub(LEADING_UNIT))), ..self }
    }

    /// The operand of the next [`HALF_COLUMNS`] columns of B, of one that is along the sum.
    #[inline(always)]
    fn next_half_along(self) -> Self {
        let eight_rows_bytes = (self.high & Self::STRIDE) << 4;
        self.skip(HALF_COLUMNS / 8 * eight_rows_bytes)
    }

    /// The same of one that is across the sum.
    #[inline(always)]
    fn next_half_across(self) -> Self {
        let half_bytes = (self.low >> 16) << 4;
        self.skip(HALF_COLUMNS / 64 * half_bytes)
    }

    #[inline(always)]
    fn bits(self) -> u64 {
        u64::from(self.high) << 32 | u64::from(self.low)
    }
}

/// Orders register and shared memory accesses before the products that follow. PTX ISA, `wgmma.fence`.
///
/// # Safety
///
/// Reached by all threads of the warpgroup.
#[inline(always)]
pub unsafe fn fence() {
    asm!("wgmma.fence.sync.aligned;", options(nostack));
}

/// Makes what this thread wrote to shared memory visible to products. PTX ISA, `fence.proxy.async`.
#[inline(always)]
pub fn fence_shared_writes() {
    // SAFETY: orders memory accesses.
    unsafe { asm!("fence.proxy.async.shared::cta;", options(nostack)) };
}

/// Ends a group of products. PTX ISA, `wgmma.commit_group`.
///
/// # Safety
///
/// Reached by all threads of the warpgroup.
#[inline(always)]
pub unsafe fn commit_group() {
    asm!("wgmma.commit_group.sync.aligned;", options(nostack));
}

/// Waits until all but the `NEWEST` last groups have ended. PTX ISA, `wgmma.wait_group`.
///
/// # Safety
///
/// Reached by all threads of the warpgroup.
#[inline(always)]
pub unsafe fn wait_group<const NEWEST: u32>() {
    asm!("wgmma.wait_group.sync.aligned {0};", const NEWEST, options(nostack));
}

/// Makes the compiler believe that the words of an operand A change here.
#[inline(always)]
pub fn hold_words<const N: usize>(words: &mut [[u32; 2]; N]) {
    for [a, b] in words {
        // SAFETY: a comment.
        unsafe { asm!("// {0} {1}", inout(reg32) * a, inout(reg32) * b, options(nomem, nostack)) };
    }
}

/// The accumulator of a product of 64 rows with operands of type `E`.
pub trait Accumulator<E> {
    /// Makes the compiler believe that the accumulator changes here.
    fn hold(&mut self);

    /// Starts `self += a · b`, or `self = a · b` where not `accumulate`: both operands in shared memory, 16 elements summed over.
    ///
    /// # Safety
    ///
    /// Reached by all threads of the warpgroup, between [`fence`] and [`commit_group`]; both operands are in shared memory until
    /// waited for.
    unsafe fn add_product_shared(&mut self, a: Descriptor, b: Descriptor, accumulate: bool);

    /// As [`Self::add_product_shared`], with A across the sum: 16 of its rows, 64 elements of each, are summed over.
    ///
    /// # Safety
    ///
    /// As [`Self::add_product_shared`].
    unsafe fn add_product_shared_across(&mut self, a: Descriptor, b: Descriptor, accumulate: bool);

    /// Starts `self += a · b`, or `self = a · b` where not `accumulate`: A in registers, B along the sum in shared memory, 16
    /// elements summed over.
    ///
    /// # Safety
    ///
    /// As [`Self::add_product_shared`]; the registers of A do not change until waited for.
    unsafe fn add_product_along(&mut self, a: OperandA, b: Descriptor, accumulate: bool);

    /// Starts `self += a · b`, or `self = a · b` where not `accumulate`: A in registers, B across the sum in shared memory, 16
    /// rows summed over.
    ///
    /// # Safety
    ///
    /// As [`Self::add_product_along`].
    unsafe fn add_product_across(&mut self, a: OperandA, b: Descriptor, accumulate: bool);
}

macro_rules! registers {
    (64) => {
        concat!(
            "{0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}, {8}, {9}, {10}, {11}, {12}, {13}, {14}, {15}, ",
            "{16}, {17}, {18}, {19}, {20}, {21}, {22}, {23}, {24}, {25}, {26}, {27}, {28}, {29}, {30}, {31}, ",
            "{32}, {33}, {34}, {35}, {36}, {37}, {38}, {39}, {40}, {41}, {42}, {43}, {44}, {45}, {46}, {47}, ",
            "{48}, {49}, {50}, {51}, {52}, {53}, {54}, {55}, {56}, {57}, {58}, {59}, {60}, {61}, {62}, {63}"
        )
    };
    (48) => {
        concat!(
            "{0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}, {8}, {9}, {10}, {11}, {12}, {13}, {14}, {15}, ",
            "{16}, {17}, {18}, {19}, {20}, {21}, {22}, {23}, {24}, {25}, {26}, {27}, {28}, {29}, {30}, {31}, ",
            "{32}, {33}, {34}, {35}, {36}, {37}, {38}, {39}, {40}, {41}, {42}, {43}, {44}, {45}, {46}, {47}"
        )
    };
    (36) => {
        concat!(
            "{0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}, {8}, {9}, {10}, {11}, {12}, {13}, {14}, {15}, ",
            "{16}, {17}, {18}, {19}, {20}, {21}, {22}, {23}, {24}, {25}, {26}, {27}, {28}, {29}, {30}, {31}, ",
            "{32}, {33}, {34}, {35}"
        )
    };
    (8) => {
        "{0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}"
    };
    (32) => {
        concat!(
            "{0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}, {8}, {9}, {10}, {11}, {12}, {13}, {14}, {15}, ",
            "{16}, {17}, {18}, {19}, {20}, {21}, {22}, {23}, {24}, {25}, {26}, {27}, {28}, {29}, {30}, {31}"
        )
    };
}

macro_rules! accumulator {
    ($element:ident, $ty:literal, $blocks:literal, $columns:literal, $registers:tt,
     operands $a0:literal $a1:literal $a2:literal $a3:literal $a4:literal $a5:literal, [$($block:literal)*]) => {
        impl Accumulator<$element> for [Fragment; $blocks] {
            #[inline(always)]
            fn hold(&mut self) {
                // SAFETY: a comment.
                unsafe {
                    asm!(concat!("// ", registers!($registers)),
                        $(inout(reg32) self[$block][0], inout(reg32) self[$block][1], inout(reg32) self[$block][2], inout(reg32) self[$block][3],)*
                        options(nomem, nostack));
                }
            }

            #[inline(always)]
            unsafe fn add_product_shared(&mut self, a: Descriptor, b: Descriptor, accumulate: bool) {
                asm!(concat!("{{ .reg .pred p; setp.ne.b32 p, {", $a2, "}, 0; wgmma.mma_async.sync.aligned.m64n", $columns, "k16.f32.", $ty, ".", $ty,
                        " {{", registers!($registers), "}}, {", $a0, "}, {", $a1, "}, p, 1, 1, 0, 0; }}"),
                    $(inout(reg32) self[$block][0], inout(reg32) self[$block][1], inout(reg32) self[$block][2], inout(reg32) self[$block][3],)*
                    in(reg64) a.bits(), in(reg64) b.bits(), in(reg32) accumulate as u32, options(nomem, nostack));
            }

            #[inline(always)]
            unsafe fn add_product_shared_across(&mut self, a: Descriptor, b: Descriptor, accumulate: bool) {
                asm!(concat!("{{ .reg .pred p; setp.ne.b32 p, {", $a2, "}, 0; wgmma.mma_async.sync.aligned.m64n", $columns, "k16.f32.", $ty, ".", $ty,
                        " {{", registers!($registers), "}}, {", $a0, "}, {", $a1, "}, p, 1, 1, 1, 0; }}"),
                    $(inout(reg32) self[$block][0], inout(reg32) self[$block][1], inout(reg32) self[$block][2], inout(reg32) self[$block][3],)*
                    in(reg64) a.bits(), in(reg64) b.bits(), in(reg32) accumulate as u32, options(nomem, nostack));
            }

            #[inline(always)]
            unsafe fn add_product_along(&mut self, a: OperandA, b: Descriptor, accumulate: bool) {
                asm!(concat!("{{ .reg .pred p; setp.ne.b32 p, {", $a5, "}, 0; wgmma.mma_async.sync.aligned.m64n", $columns, "k16.f32.", $ty, ".",
                        $ty, " {{", registers!($registers), "}}, {{{", $a0, "}, {", $a1, "}, {", $a2, "}, {", $a3, "}}}, {", $a4,
                        "}, p, 1, 1, 0; }}"),
                    $(inout(reg32) self[$block][0], inout(reg32) self[$block][1], inout(reg32) self[$block][2], inout(reg32) self[$block][3],)*
                    in(reg32) a[0], in(reg32) a[1], in(reg32) a[2], in(reg32) a[3], in(reg64) b.bits(), in(reg32) accumulate as u32,
                    options(nomem, nostack));
            }

            #[inline(always)]
            unsafe fn add_product_across(&mut self, a: OperandA, b: Descriptor, accumulate: bool) {
                asm!(concat!("{{ .reg .pred p; setp.ne.b32 p, {", $a5, "}, 0; wgmma.mma_async.sync.aligned.m64n", $columns, "k16.f32.", $ty, ".",
                        $ty, " {{", registers!($registers), "}}, {{{", $a0, "}, {", $a1, "}, {", $a2, "}, {", $a3, "}}}, {", $a4,
                        "}, p, 1, 1, 1; }}"),
                    $(inout(reg32) self[$block][0], inout(reg32) self[$block][1], inout(reg32) self[$block][2], inout(reg32) self[$block][3],)*
                    in(reg32) a[0], in(reg32) a[1], in(reg32) a[2], in(reg32) a[3], in(reg64) b.bits(), in(reg32) accumulate as u32,
                    options(nomem, nostack));
            }
        }
    };
}

accumulator!(Bf16, "bf16", 16, 128, 64, operands 64 65 66 67 68 69, [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15]);
accumulator!(Bf16, "bf16", 12, 96, 48, operands 48 49 50 51 52 53, [0 1 2 3 4 5 6 7 8 9 10 11]);
accumulator!(Bf16, "bf16", 9, 72, 36, operands 36 37 38 39 40 41, [0 1 2 3 4 5 6 7 8]);
accumulator!(Bf16, "bf16", 8, 64, 32, operands 32 33 34 35 36 37, [0 1 2 3 4 5 6 7]);
accumulator!(Bf16, "bf16", 2, 16, 8, operands 8 9 10 11 12 13, [0 1]);
accumulator!(F16, "f16", 2, 16, 8, operands 8 9 10 11 12 13, [0 1]);
accumulator!(F16, "f16", 16, 128, 64, operands 64 65 66 67 68 69, [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15]);
accumulator!(F16, "f16", 12, 96, 48, operands 48 49 50 51 52 53, [0 1 2 3 4 5 6 7 8 9 10 11]);
accumulator!(F16, "f16", 9, 72, 36, operands 36 37 38 39 40 41, [0 1 2 3 4 5 6 7 8]);
accumulator!(F16, "f16", 8, 64, 32, operands 32 33 34 35 36 37, [0 1 2 3 4 5 6 7]);

/// Columns of each product that one of 256 columns is made of.
const HALF_COLUMNS: u32 = 128;

/// Of 256 columns, the products of 128 and of the others: one for all of them takes as many registers as the assembler has for a
/// thread of a block of 512.
impl<E> Accumulator<E> for [Fragment; 32]
where
    [Fragment; 16]: Accumulator<E>,
{
    #[inline(always)]
    fn hold(&mut self) {
        halves(self).into_iter().for_each(Accumulator::hold);
    }

    #[inline(always)]
    unsafe fn add_product_shared(&mut self, a: Descriptor, b: Descriptor, accumulate: bool) {
        let [left, right] = halves(self);
        left.add_product_shared(a, b, accumulate);
        right.add_product_shared(a, b.next_half_along(), accumulate);
    }

    #[inline(always)]
    unsafe fn add_product_shared_across(&mut self, a: Descriptor, b: Descriptor, accumulate: bool) {
        let [left, right] = halves(self);
        left.add_product_shared_across(a, b, accumulate);
        right.add_product_shared_across(a, b.next_half_along(), accumulate);
    }

    #[inline(always)]
    unsafe fn add_product_along(&mut self, a: OperandA, b: Descriptor, accumulate: bool) {
        let [left, right] = halves(self);
        left.add_product_along(a, b, accumulate);
        right.add_product_along(a, b.next_half_along(), accumulate);
    }

    #[inline(always)]
    unsafe fn add_product_across(&mut self, a: OperandA, b: Descriptor, accumulate: bool) {
        let [left, right] = halves(self);
        left.add_product_across(a, b, accumulate);
        right.add_product_across(a, b.next_half_across(), accumulate);
    }
}

/// The accumulators of both products.
#[inline(always)]
fn halves(accumulator: &mut [Fragment; 32]) -> [&mut [Fragment; 16]; 2] {
    let (left, right) = accumulator.split_at_mut(16);
    // SAFETY: both have 16 fragments.
    unsafe { [&mut *left.as_mut_ptr().cast(), &mut *right.as_mut_ptr().cast()] }
}
