//! Barriers in shared memory that count arrivals (PTX ISA, Parallel Synchronization and Communication Instructions: `mbarrier`).
//!
//! A barrier is used again and again; its phases are told apart by their parity, 0 for the first.

use core::arch::asm;

/// Bytes of a barrier.
pub const BYTES: u32 = 8;

/// Makes a barrier whose phase ends after `arrivals` arrivals.
///
/// # Safety
///
/// `barrier` is aligned to 8 bytes and in the block's shared memory; other threads use it after [`fence_init`] and a block
/// barrier.
#[inline(always)]
pub unsafe fn init(barrier: u32, arrivals: u32) {
    asm!("mbarrier.init.shared::cta.b64 [{0}], {1};", in(reg32) barrier, in(reg32) arrivals, options(nostack));
}

/// Makes initialised barriers known to the copy engine.
#[inline(always)]
pub fn fence_init() {
    // SAFETY: orders memory accesses.
    unsafe { asm!("fence.mbarrier_init.release.cluster;", options(nostack)) };
}

/// Arrives.
///
/// # Safety
///
/// `barrier` was initialised.
#[inline(always)]
pub unsafe fn arrive(barrier: u32) {
    asm!("mbarrier.arrive.shared::cta.b64 _, [{0}];", in(reg32) barrier, options(nostack));
}

/// Arrives where `condition` holds. There is no branch around it, so that the compiler sees the lanes of a warp stay together.
///
/// # Safety
///
/// `barrier` was initialised.
#[inline(always)]
pub unsafe fn arrive_if(barrier: u32, condition: bool) {
    asm!("{{ .reg .pred p; setp.ne.u32 p, {1}, 0; @p mbarrier.arrive.shared::cta.b64 _, [{0}]; }}",
        in(reg32) barrier, in(reg32) condition as u32, options(nostack));
}

/// Arrives, and lets the phase end only after the copy engine has brought `bytes` bytes.
///
/// # Safety
///
/// `barrier` was initialised.
#[inline(always)]
pub unsafe fn arrive_expecting(barrier: u32, bytes: u32) {
    asm!("mbarrier.arrive.expect_tx.shared::cta.b64 _, [{0}], {1};", in(reg32) barrier, in(reg32) bytes, options(nostack));
}

/// As [`arrive_expecting`] where `condition` holds. There is no branch around it, so that the compiler sees the lanes of a warp
/// stay together.
///
/// # Safety
///
/// `barrier` was initialised.
#[inline(always)]
pub unsafe fn arrive_expecting_if(barrier: u32, bytes: u32, condition: bool) {
    asm!("{{ .reg .pred p; setp.ne.u32 p, {2}, 0; @p mbarrier.arrive.expect_tx.shared::cta.b64 _, [{0}], {1}; }}",
        in(reg32) barrier, in(reg32) bytes, in(reg32) condition as u32, options(nostack));
}

/// Lets the phase end only after the copy engine has brought `bytes` more bytes; does not arrive.
///
/// # Safety
///
/// `barrier` was initialised, and an arrival of this phase is still to come.
#[inline(always)]
pub unsafe fn expect(barrier: u32, bytes: u32) {
    asm!("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [{0}], {1};", in(reg32) barrier, in(reg32) bytes, options(nostack));
}

/// Waits until the phase of the given parity has ended.
///
/// # Safety
///
/// `barrier` was initialised.
#[inline(always)]
pub unsafe fn wait(barrier: u32, parity: u32) {
    loop {
        let done: u32;
        asm!("{{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [{1}], {2}; selp.u32 {0}, 1, 0, p; }}",
            out(reg32) done, in(reg32) barrier, in(reg32) parity, options(nostack));
        if done != 0 {
            break;
        }
    }
}

/// Whether the phase of the given parity has ended.
///
/// # Safety
///
/// `barrier` was initialised.
#[inline(always)]
pub unsafe fn has_ended(barrier: u32, parity: u32) -> bool {
    let done: u32;
    asm!("{{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [{1}], {2}; selp.u32 {0}, 1, 0, p; }}",
        out(reg32) done, in(reg32) barrier, in(reg32) parity, options(nostack));
    done != 0
}
