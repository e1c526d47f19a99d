//! Exchange among the 32 lanes of a warp (PTX ISA, Data Movement: `shfl.sync`; Parallel Synchronization and Communication). All
//! lanes take part in every function.

use core::arch::asm;

#[cfg(feature = "sm_90a")]
use super::packed::max_u16x2;

/// Lanes of a warp.
pub const LANES: u32 = 32;

macro_rules! shuffle {
    ($(#[doc = $doc:literal])* $name:ident, $ty:ty, $mode:literal) => {
        $(#[doc = $doc])*
        ///
        /// # Safety
        ///
        /// Reached by all lanes of the warp.
        #[inline(always)]
        pub unsafe fn $name(value: $ty, lane: u32) -> $ty {
            let result: $ty;
            asm!(concat!("shfl.sync.", $mode, ".b32 {0}, {1}, {2}, 31, 0xffffffff;"),
                out(reg32) result, in(reg32) value, in(reg32) lane, options(nomem, nostack));
            result
        }
    };
}

shuffle! {
    /// The value of the lane whose index differs in the bits `lane`.
    shuffle_xor, f32, "bfly"
}
shuffle! {
    /// The value of lane `lane`.
    shuffle_from, u32, "idx"
}

/// The value of the lane `distance` below; the lane's own where there is none.
///
/// # Safety
///
/// Reached by all lanes of the warp.
#[inline(always)]
pub unsafe fn shuffle_up(value: u32, distance: u32) -> u32 {
    let result: u32;
    asm!("shfl.sync.up.b32 {0}, {1}, {2}, 0, 0xffffffff;",
        out(reg32) result, in(reg32) value, in(reg32) distance, options(nomem, nostack));
    result
}

/// The sum of the values of the lanes up to this one, it included.
///
/// # Safety
///
/// Reached by all lanes of the warp.
#[cfg(feature = "sm_90a")]
#[inline(always)]
pub unsafe fn sum_up_to(value: u32, lane: u32) -> u32 {
    let mut sum = value;
    for log2 in 0..5 {
        let below = shuffle_up(sum, 1 << log2);
        if lane >= 1 << log2 {
            sum += below;
        }
    }
    sum
}

/// A value that is the same in all lanes, made opaque: the compiler must not relate it to the thread index, or it would split
/// the code for thread 0 from that for the others, collectives included.
///
/// # Safety
///
/// Reached by all lanes of the warp.
#[inline(always)]
pub unsafe fn uniform(value: u32) -> u32 {
    shuffle_from(value, 0)
}

/// The least value of all lanes. PTX ISA, Parallel Synchronization and Communication Instructions: `redux.sync`.
///
/// # Safety
///
/// Reached by all lanes of the warp.
#[inline(always)]
pub unsafe fn min(value: u32) -> u32 {
    let result: u32;
    asm!("redux.sync.min.u32 {0}, {1}, 0xffffffff;", out(reg32) result, in(reg32) value, options(nomem, nostack));
    result
}

/// The greatest value of all lanes. PTX ISA, Parallel Synchronization and Communication Instructions: `redux.sync`.
///
/// # Safety
///
/// Reached by all lanes of the warp.
#[inline(always)]
pub unsafe fn max(value: u32) -> u32 {
    let result: u32;
    asm!("redux.sync.max.u32 {0}, {1}, 0xffffffff;", out(reg32) result, in(reg32) value, options(nomem, nostack));
    result
}

/// Whether the condition holds for any lane. PTX ISA, Parallel Synchronization and Communication Instructions: `vote.sync`.
///
/// # Safety
///
/// Reached by all lanes of the warp.
#[inline(always)]
pub unsafe fn any(condition: bool) -> bool {
    let result: u32;
    asm!("{{ .reg .pred p; setp.ne.u32 p, {1}, 0; vote.sync.any.pred p, p, 0xffffffff; selp.u32 {0}, 1, 0, p; }}",
        out(reg32) result, in(reg32) condition as u32, options(nomem, nostack));
    result != 0
}

/// The lanes that a condition holds for, a bit each. PTX ISA, Parallel Synchronization and Communication Instructions:
/// `vote.sync`.
///
/// # Safety
///
/// Reached by all lanes of the warp.
#[cfg(feature = "sm_90a")]
#[inline(always)]
pub unsafe fn lanes_where(condition: bool) -> u32 {
    let lanes: u32;
    asm!("{{ .reg .pred p; setp.ne.u32 p, {1}, 0; vote.sync.ballot.b32 {0}, p, 0xffffffff; }}",
        out(reg32) lanes, in(reg32) condition as u32, options(nomem, nostack));
    lanes
}

/// The greatest value of the four lanes that hold one row of an accumulator fragment.
///
/// # Safety
///
/// Reached by all lanes of the warp.
#[inline(always)]
pub unsafe fn quad_max(value: f32) -> f32 {
    let value = super::math::max(value, shuffle_xor(value, 1));
    super::math::max(value, shuffle_xor(value, 2))
}

/// As [`quad_max`], of both halves of a word, without signs.
///
/// # Safety
///
/// Reached by all lanes of the warp.
#[cfg(feature = "sm_90a")]
#[inline(always)]
pub unsafe fn quad_max_u16x2(value: u32) -> u32 {
    let other = |value: u32, lane: u32| shuffle_xor(f32::from_bits(value), lane).to_bits();
    let value = max_u16x2(value, other(value, 1));
    max_u16x2(value, other(value, 2))
}

/// The sum over the four lanes that hold one row of an accumulator fragment.
///
/// # Safety
///
/// Reached by all lanes of the warp.
#[inline(always)]
pub unsafe fn quad_sum(value: f32) -> f32 {
    let value = value + shuffle_xor(value, 1);
    value + shuffle_xor(value, 2)
}

/// The greatest value of the eight lanes that hold one column of an accumulator fragment.
///
/// # Safety
///
/// Reached by all lanes of the warp.
#[cfg(feature = "sm_90a")]
#[inline(always)]
pub unsafe fn column_max(value: f32) -> f32 {
    let value = super::math::max(value, shuffle_xor(value, 4));
    let value = super::math::max(value, shuffle_xor(value, 8));
    super::math::max(value, shuffle_xor(value, 16))
}

/// The sum over the eight lanes that hold one column of an accumulator fragment.
///
/// # Safety
///
/// Reached by all lanes of the warp.
#[cfg(feature = "sm_90a")]
#[inline(always)]
pub unsafe fn column_sum(value: f32) -> f32 {
    let value = value + shuffle_xor(value, 4);
    let value = value + shuffle_xor(value, 8);
    value + shuffle_xor(value, 16)
}

/// Waits for all lanes, and orders their memory accesses. PTX ISA, Parallel Synchronization and Communication Instructions:
/// `bar.warp.sync`.
///
/// # Safety
///
/// Reached by all lanes of the warp.
#[inline(always)]
pub unsafe fn sync() {
    asm!("bar.warp.sync 0xffffffff;", options(nostack));
}
