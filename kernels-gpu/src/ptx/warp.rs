//! Exchange among the 32 lanes of a warp (PTX ISA, Data Movement: `shfl.sync`; Parallel Synchronization and Communication). All lanes take part in every function.

use core::arch::asm;

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

/// Waits for all lanes, and orders their memory accesses. PTX ISA, Parallel Synchronization and Communication Instructions: `bar.warp.sync`.
///
/// # Safety
///
/// Reached by all lanes of the warp.
#[inline(always)]
pub unsafe fn sync() {
    asm!("bar.warp.sync 0xffffffff;", options(nostack));
}
