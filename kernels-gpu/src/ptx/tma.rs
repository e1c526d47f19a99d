//! The copy engine: boxes of tensors to shared memory (PTX ISA, Data Movement and Conversion Instructions:
//! `cp.async.bulk.tensor`).

use core::arch::asm;

/// Brings a tensor map to where the copy engine looks for it (PTX ISA, Data Movement and Conversion Instructions:
/// `prefetch.tensormap`).
///
/// # Safety
///
/// `map` is the address of a tensor map in global memory.
#[inline(always)]
pub unsafe fn prefetch_map(map: u64) {
    asm!("prefetch.tensormap [{0}];", in(reg64) map, options(nostack));
}

/// Starts a copy of a box of a five-dimensional tensor; `barrier` counts its bytes. What lies outside the tensor arrives as
/// zeros.
///
/// # Safety
///
/// `map` is the address of a tensor map; the box at `destination`, aligned to 128 bytes, is in the block's shared memory and
/// nobody reads or writes it until `barrier` says that it has arrived.
#[inline(always)]
pub unsafe fn copy_box(destination: u32, map: u64, at: [u32; 5], barrier: u32) {
    asm!("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [{0}], [{1}, {{{3}, {4}, {5}, {6}, {7}}}], [{2}];",
        in(reg32) destination, in(reg64) map, in(reg32) barrier,
        in(reg32) at[0], in(reg32) at[1], in(reg32) at[2], in(reg32) at[3], in(reg32) at[4],
        options(nostack));
}

/// As [`copy_box`], of what nobody will read again: the L2 cache gives it up first (PTX ISA, `createpolicy`).
///
/// # Safety
///
/// As [`copy_box`].
#[inline(always)]
pub unsafe fn copy_box_once(destination: u32, map: u64, at: [u32; 5], barrier: u32) {
    asm!("{{ .reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0;",
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [{0}], [{1}, {{{3}, {4}, {5}, {6}, {7}}}], [{2}], policy; }}",
        in(reg32) destination, in(reg64) map, in(reg32) barrier,
        in(reg32) at[0], in(reg32) at[1], in(reg32) at[2], in(reg32) at[3], in(reg32) at[4],
        options(nostack));
}

/// Starts to bring a box of a five-dimensional tensor to the L2 cache. PTX ISA, Data Movement and Conversion Instructions:
/// `cp.async.bulk.prefetch.tensor`.
///
/// # Safety
///
/// `map` is the address of a tensor map.
#[inline(always)]
pub unsafe fn prefetch_box(map: u64, at: [u32; 5]) {
    asm!("cp.async.bulk.prefetch.tensor.5d.L2.global [{0}, {{{1}, {2}, {3}, {4}, {5}}}];",
        in(reg64) map, in(reg32) at[0], in(reg32) at[1], in(reg32) at[2], in(reg32) at[3], in(reg32) at[4], options(nostack));
}
