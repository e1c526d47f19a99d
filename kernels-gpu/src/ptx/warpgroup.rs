//! What concerns four warps together: their share of registers, and barriers among some of a block's threads.

use core::arch::asm;

/// Threads of a warpgroup.
pub const THREADS: u32 = 128;

/// Gives up registers down to `REGISTERS` a thread. PTX ISA, Miscellaneous Instructions: `setmaxnreg`.
///
/// # Safety
///
/// Reached by all threads of the warpgroup, which have at least as many.
#[inline(always)]
pub unsafe fn give_registers<const REGISTERS: u32>() {
    asm!("setmaxnreg.dec.sync.aligned.u32 {0};", const REGISTERS, options(nostack));
}

/// Waits for registers up to `REGISTERS` a thread. PTX ISA, Miscellaneous Instructions: `setmaxnreg`.
///
/// # Safety
///
/// Reached by all threads of the warpgroup; other warpgroups give up enough.
#[inline(always)]
pub unsafe fn take_registers<const REGISTERS: u32>() {
    asm!("setmaxnreg.inc.sync.aligned.u32 {0};", const REGISTERS, options(nostack));
}

/// Waits until `threads` threads have reached barrier `barrier`. PTX ISA, Parallel Synchronization and Communication
/// Instructions: `bar.sync`.
///
/// # Safety
///
/// Reached by whole warps; `barrier` is 1 to 15 and nobody else uses it meanwhile.
#[inline(always)]
pub unsafe fn sync(barrier: u32, threads: u32) {
    asm!("bar.sync {0}, {1};", in(reg32) barrier, in(reg32) threads, options(nostack));
}

/// Reaches barrier `barrier` without waiting. PTX ISA, Parallel Synchronization and Communication Instructions: `bar.arrive`.
///
/// # Safety
///
/// As [`sync`].
#[inline(always)]
pub unsafe fn arrive(barrier: u32, threads: u32) {
    asm!("bar.arrive {0}, {1};", in(reg32) barrier, in(reg32) threads, options(nostack));
}
