//! The copy engine: boxes of tensors to shared memory (PTX ISA, Data Movement and Conversion Instructions: `cp.async.bulk.tensor`).

use core::arch::asm;

/// How long the L2 cache keeps what is read from memory (PTX ISA, Data Movement and Conversion Instructions: `createpolicy`).
#[derive(Clone, Copy)]
pub struct CachePolicy(u64);

impl CachePolicy {
    /// As ever.
    #[inline(always)]
    pub fn normal() -> Self {
        let policy;
        // SAFETY: register arithmetic.
        unsafe { asm!("createpolicy.fractional.L2::evict_normal.b64 {0};", out(reg64) policy, options(pure, nomem, nostack)) };
        Self(policy)
    }

    /// For what is read once: it makes room first.
    #[inline(always)]
    pub fn once() -> Self {
        let policy;
        // SAFETY: register arithmetic.
        unsafe { asm!("createpolicy.fractional.L2::evict_first.b64 {0};", out(reg64) policy, options(pure, nomem, nostack)) };
        Self(policy)
    }
}

/// Starts a copy of a box of a five-dimensional tensor; `barrier` counts its bytes. What lies outside the tensor arrives as zeros.
///
/// # Safety
///
/// `map` is the address of a tensor map; the box at `destination`, aligned to 128 bytes, is in the block's shared memory and nobody reads or
/// writes it until `barrier` says that it has arrived.
#[inline(always)]
pub unsafe fn copy_box(destination: u32, map: u64, at: [u32; 5], barrier: u32, policy: CachePolicy) {
    asm!("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [{0}], [{1}, {{{3}, {4}, {5}, {6}, {7}}}], [{2}], {8};",
        in(reg32) destination, in(reg64) map, in(reg32) barrier,
        in(reg32) at[0], in(reg32) at[1], in(reg32) at[2], in(reg32) at[3], in(reg32) at[4], in(reg64) policy.0,
        options(nostack));
}
