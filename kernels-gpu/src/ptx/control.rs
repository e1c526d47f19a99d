//! Barriers and the end of the program.

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

/// Aborts the kernel with an error. PTX ISA, Miscellaneous Instructions: `trap`.
#[inline(always)]
pub fn trap() -> ! {
    // SAFETY: the launch ends here.
    unsafe { asm!("trap;", options(nostack)) };
    loop {}
}
