//! The copy engine: boxes of tensors to shared memory (PTX ISA, Data Movement and Conversion Instructions: `cp.async.bulk.tensor`).

use core::arch::asm;

/// Starts a copy of a box of a five-dimensional tensor; `barrier` counts its bytes. What lies outside the tensor arrives as zeros.
///
/// # Safety
///
/// `map` is the address of a tensor map; the box at `destination`, aligned to 128 bytes, is in the block's shared memory and nobody reads or
/// writes it until `barrier` says that it has arrived.
#[inline(always)]
pub unsafe fn copy_box(destination: u32, map: u64, at: [u32; 5], barrier: u32) {
    asm!("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [{0}], [{1}, {{{3}, {4}, {5}, {6}, {7}}}], [{2}];",
        in(reg32) destination, in(reg64) map, in(reg32) barrier,
        in(reg32) at[0], in(reg32) at[1], in(reg32) at[2], in(reg32) at[3], in(reg32) at[4], options(nostack));
}

/// Orders what this thread wrote to shared memory before what the copy engine does to it later. PTX ISA, Parallel Synchronization and Communication
/// Instructions: `fence.proxy.async`.
#[inline(always)]
pub fn fence_async() {
    // SAFETY: orders memory accesses.
    unsafe { asm!("fence.proxy.async.shared::cta;", options(nostack)) };
}
