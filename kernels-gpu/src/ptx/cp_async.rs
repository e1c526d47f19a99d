//! Copies from global to shared memory that run beside the program (PTX ISA, Data Movement and Conversion Instructions:
//! `cp.async`).

use core::arch::asm;

/// Bytes that one copy moves.
pub const CHUNK_BYTES: u32 = 16;

/// Starts a copy of one chunk; writes zeros in place of it where `present` is false.
///
/// # Safety
///
/// Both addresses are aligned to 16 bytes; `destination` is in shared memory, and `source` is readable where `present`.
#[inline(always)]
pub unsafe fn copy_chunk(destination: u32, source: u64, present: bool) {
    let source_bytes = if present { CHUNK_BYTES } else { 0 };
    asm!("cp.async.cg.shared.global.L2::128B [{0}], [{1}], 16, {2};",
        in(reg32) destination, in(reg64) source, in(reg32) source_bytes, options(nostack));
}

/// Ends a group of the copies that this thread started since the last group.
#[inline(always)]
pub fn commit_group() {
    // SAFETY: counts this thread's copies.
    unsafe { asm!("cp.async.commit_group;", options(nostack)) };
}

/// Waits until all but the `NEWEST` last groups of this thread have arrived.
#[inline(always)]
pub fn wait_group<const NEWEST: u32>() {
    // SAFETY: waits for this thread's copies.
    unsafe { asm!("cp.async.wait_group {0};", const NEWEST, options(nostack)) };
}
