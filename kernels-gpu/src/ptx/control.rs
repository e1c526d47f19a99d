//! Barriers, the order of launches, and the end of the program.

use core::arch::asm;

/// Waits for all threads of the block. PTX ISA, Parallel Synchronization and Communication Instructions: `barrier.sync`.
///
/// The intrinsic, not assembly: compilers know that it must not be duplicated.
///
/// # Safety
///
/// Reached by all threads of the block.
#[inline(always)]
pub unsafe fn sync_block() {
    core::arch::nvptx::_syncthreads();
}

/// Waits until the launch before this one in the stream is done and all that it wrote can be read. Only needed in a kernel that
/// is launched so that it may begin before that. PTX ISA, Parallel Synchronization and Communication Instructions:
/// `griddepcontrol.wait`.
///
/// # Safety
///
/// Nothing that the launch before writes is read or written earlier than here.
#[cfg(feature = "sm_90a")]
#[inline(always)]
pub unsafe fn wait_for_launch_before() {
    asm!("griddepcontrol.wait;", options(nostack));
}

/// Keeps the assembler from moving arithmetic across this place, where it stands between instructions that nothing else orders:
/// it does not look beyond a branch. That branch is taken where `number` is not below `bound`, which never is, without the
/// assembler knowing.
#[cfg(feature = "sm_90a")]
#[inline(always)]
pub fn fence_arithmetic(number: u32, bound: u32) {
    if super::math::opaque(number) >= bound {
        trap();
    }
}

/// Waits for up to twice so many nanoseconds. PTX ISA, Miscellaneous Instructions: `nanosleep`.
#[cfg(feature = "sm_90a")]
#[inline(always)]
pub fn sleep(ns: u32) {
    // SAFETY: does nothing else.
    unsafe { asm!("nanosleep.u32 {0};", in(reg32) ns, options(nomem, nostack)) };
}

/// Aborts the kernel with an error. PTX ISA, Miscellaneous Instructions: `trap`.
#[inline(always)]
pub fn trap() -> ! {
    // SAFETY: the launch ends here.
    unsafe { asm!("trap;", options(nostack)) };
    loop {}
}
