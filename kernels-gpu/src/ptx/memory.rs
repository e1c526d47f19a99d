//! Loads and stores in global and shared memory (PTX ISA, Data Movement and Conversion Instructions). Shared addresses are
//! 32-bit, in the shared window.

use core::arch::asm;

/// Loads what no thread writes during the kernel.
///
/// # Safety
///
/// `address` is aligned to 4 bytes and readable.
#[inline(always)]
pub unsafe fn load_global(address: u64) -> u32 {
    let value: u32;
    asm!("ld.global.nc.u32 {0}, [{1}];", out(reg32) value, in(reg64) address, options(pure, readonly, nostack));
    value
}

/// Loads two words that no thread writes during the kernel.
///
/// # Safety
///
/// `address` is aligned to 8 bytes and readable.
#[inline(always)]
pub unsafe fn load_global_x2(address: u64) -> [u32; 2] {
    let (a, b): (u32, u32);
    asm!("ld.global.nc.v2.u32 {{{0}, {1}}}, [{2}];", out(reg32) a, out(reg32) b, in(reg64) address, options(pure, readonly, nostack));
    [a, b]
}

/// Loads four words that no thread writes during the kernel.
///
/// # Safety
///
/// `address` is aligned to 16 bytes and readable.
#[inline(always)]
pub unsafe fn load_global_x4(address: u64) -> [u32; 4] {
    let (a, b, c, d): (u32, u32, u32, u32);
    asm!("ld.global.nc.v4.u32 {{{0}, {1}, {2}, {3}}}, [{4}];",
        out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg64) address, options(pure, readonly, nostack));
    [a, b, c, d]
}

/// Loads four words that no thread writes during the kernel, and that are not needed again soon: caches give them up first. The
/// load stays where it is, before what comes after it.
///
/// # Safety
///
/// `address` is aligned to 16 bytes and readable.
#[cfg(feature = "sm_80")]
#[inline(always)]
pub unsafe fn load_global_once_x4(address: u64) -> [u32; 4] {
    let (a, b, c, d): (u32, u32, u32, u32);
    asm!("ld.global.cs.nc.v4.u32 {{{0}, {1}, {2}, {3}}}, [{4}];",
        out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg64) address, options(readonly, nostack));
    [a, b, c, d]
}

/// As [`load_global_once_x4`], of two words.
///
/// # Safety
///
/// `address` is aligned to 8 bytes and readable.
#[cfg(feature = "sm_90a")]
#[inline(always)]
pub unsafe fn load_global_once_x2(address: u64) -> [u32; 2] {
    let (a, b): (u32, u32);
    asm!("ld.global.cs.nc.v2.u32 {{{0}, {1}}}, [{2}];", out(reg32) a, out(reg32) b, in(reg64) address, options(readonly, nostack));
    [a, b]
}

/// Loads half a word that no thread writes during the kernel.
///
/// # Safety
///
/// `address` is aligned to 2 bytes and readable.
#[cfg(feature = "sm_80")]
#[inline(always)]
pub unsafe fn load_global_u16(address: u64) -> u32 {
    let value: u32;
    asm!("{{ .reg .b16 half; ld.global.nc.u16 half, [{1}]; cvt.u32.u16 {0}, half; }}",
        out(reg32) value, in(reg64) address, options(pure, readonly, nostack));
    value
}

/// Loads a word that may have been written since the kernel began.
///
/// # Safety
///
/// `address` is aligned to 4 bytes and readable, and nobody writes it now.
#[inline(always)]
pub unsafe fn load_written(address: u64) -> u32 {
    let value: u32;
    asm!("ld.global.u32 {0}, [{1}];", out(reg32) value, in(reg64) address, options(pure, readonly, nostack));
    value
}

/// Loads two words that may have been written since the kernel began.
///
/// # Safety
///
/// `address` is aligned to 8 bytes and readable, and nobody writes it now.
#[inline(always)]
pub unsafe fn load_written_x2(address: u64) -> [u32; 2] {
    let (a, b): (u32, u32);
    asm!("ld.global.v2.u32 {{{0}, {1}}}, [{2}];", out(reg32) a, out(reg32) b, in(reg64) address, options(pure, readonly, nostack));
    [a, b]
}

/// Loads a word that another block may have written, where `condition` holds, else `otherwise`: from where all blocks meet, not
/// from this multiprocessor's cache.
///
/// # Safety
///
/// `address` is aligned to 4 bytes and, where `condition` holds, readable; others write it [for the device](store_for_device).
#[cfg(feature = "sm_90a")]
#[inline(always)]
pub unsafe fn load_of_device_if(address: u64, condition: bool, otherwise: u32) -> u32 {
    let mut value = otherwise;
    asm!("{{ .reg .pred p; setp.ne.u32 p, {2}, 0; @p ld.relaxed.gpu.global.u32 {0}, [{1}]; }}",
        inout(reg32) value, in(reg64) address, in(reg32) condition as u32, options(readonly, nostack));
    value
}

/// As [`load_of_device_if`], of two words, always.
///
/// # Safety
///
/// As [`load_of_device_if`]; `address` is aligned to 8 bytes.
#[cfg(feature = "sm_90a")]
#[inline(always)]
pub unsafe fn load_of_device_u64(address: u64) -> u64 {
    let value: u64;
    asm!("ld.relaxed.gpu.global.u64 {0}, [{1}];", out(reg64) value, in(reg64) address, options(readonly, nostack));
    value
}

/// As [`load_of_device_if`], of four words; zeros where `condition` does not hold.
///
/// # Safety
///
/// As [`load_of_device_if`]; `address` is aligned to 16 bytes.
#[cfg(feature = "sm_90a")]
#[inline(always)]
pub unsafe fn load_of_device_x4_if(address: u64, condition: bool) -> [u32; 4] {
    let [mut a, mut b, mut c, mut d] = [0u32; 4];
    asm!("{{ .reg .pred p; setp.ne.u32 p, {5}, 0; @p ld.relaxed.gpu.global.v4.u32 {{{0}, {1}, {2}, {3}}}, [{4}]; }}",
        inout(reg32) a, inout(reg32) b, inout(reg32) c, inout(reg32) d, in(reg64) address, in(reg32) condition as u32,
        options(readonly, nostack));
    [a, b, c, d]
}

/// Stores one word.
///
/// # Safety
///
/// `address` is aligned to 4 bytes and writable.
#[inline(always)]
pub unsafe fn store_global(address: u64, value: u32) {
    asm!("st.global.u32 [{0}], {1};", in(reg64) address, in(reg32) value, options(nostack));
}

/// Stores one word where `condition` holds. There is no branch around it, so that the compiler sees the lanes of a warp stay
/// together.
///
/// # Safety
///
/// `address` is aligned to 4 bytes and, where `condition` holds, writable.
#[cfg(feature = "sm_90a")]
#[inline(always)]
pub unsafe fn store_global_if(address: u64, value: u32, condition: bool) {
    asm!("{{ .reg .pred p; setp.ne.u32 p, {2}, 0; @p st.global.u32 [{0}], {1}; }}",
        in(reg64) address, in(reg32) value, in(reg32) condition as u32, options(nostack));
}

/// Stores a word that another block waits for, and sees there, whatever else this thread has stored.
///
/// # Safety
///
/// `address` is aligned to 4 bytes and writable.
#[cfg(feature = "sm_90a")]
#[inline(always)]
pub unsafe fn store_for_device(address: u64, value: u32) {
    asm!("st.relaxed.gpu.global.u32 [{0}], {1};", in(reg64) address, in(reg32) value, options(nostack));
}

/// The same, of two words.
///
/// # Safety
///
/// `address` is aligned to 8 bytes and writable.
#[cfg(feature = "sm_90a")]
#[inline(always)]
pub unsafe fn store_for_device_x2(address: u64, [a, b]: [u32; 2]) {
    asm!("st.relaxed.gpu.global.v2.u32 [{0}], {{{1}, {2}}};", in(reg64) address, in(reg32) a, in(reg32) b, options(nostack));
}

/// Stores two words to global memory as one number.
///
/// # Safety
///
/// `address` is aligned to 8 bytes and writable.
#[inline(always)]
pub unsafe fn store_global_u64(address: u64, value: u64) {
    asm!("st.global.u64 [{0}], {1};", in(reg64) address, in(reg64) value, options(nostack));
}

/// Stores one number.
///
/// # Safety
///
/// `address` is aligned to 4 bytes and writable.
#[inline(always)]
pub unsafe fn store_global_f32(address: u64, value: f32) {
    store_global(address, value.to_bits());
}

/// Stores two numbers.
///
/// # Safety
///
/// `address` is aligned to 8 bytes and writable.
#[inline(always)]
pub unsafe fn store_global_f32x2(address: u64, a: f32, b: f32) {
    asm!("st.global.v2.f32 [{0}], {{{1}, {2}}};", in(reg64) address, in(reg32) a, in(reg32) b, options(nostack));
}

/// Stores four words.
///
/// # Safety
///
/// `address` is aligned to 16 bytes and writable.
#[inline(always)]
pub unsafe fn store_global_x4(address: u64, [a, b, c, d]: [u32; 4]) {
    asm!("st.global.v4.u32 [{0}], {{{1}, {2}, {3}, {4}}};",
        in(reg64) address, in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d, options(nostack));
}

/// Stores two words where `condition` holds. There is no branch around it, so that the compiler sees the lanes of a warp stay
/// together.
///
/// # Safety
///
/// Where the condition holds, `address` is aligned to 8 bytes and writable.
#[cfg(feature = "sm_90a")]
#[inline(always)]
pub unsafe fn store_global_x2_if(address: u64, [a, b]: [u32; 2], condition: bool) {
    asm!("{{ .reg .pred p; setp.ne.u32 p, {3}, 0; @p st.global.v2.u32 [{0}], {{{1}, {2}}}; }}",
        in(reg64) address, in(reg32) a, in(reg32) b, in(reg32) condition as u32, options(nostack));
}

/// As [`store_global_x2_if`], of four words.
///
/// # Safety
///
/// As [`store_global_x4`], where the condition holds.
#[cfg(feature = "sm_90a")]
#[inline(always)]
pub unsafe fn store_global_x4_if(address: u64, [a, b, c, d]: [u32; 4], condition: bool) {
    asm!("{{ .reg .pred p; setp.ne.u32 p, {5}, 0; @p st.global.v4.u32 [{0}], {{{1}, {2}, {3}, {4}}}; }}",
        in(reg64) address, in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d, in(reg32) condition as u32, options(nostack));
}

/// Stores four words that are not needed again soon: caches give them up first.
///
/// # Safety
///
/// `address` is aligned to 16 bytes and writable.
#[cfg(feature = "sm_80")]
#[inline(always)]
pub unsafe fn store_global_once_x4(address: u64, [a, b, c, d]: [u32; 4]) {
    asm!("st.global.cs.v4.u32 [{0}], {{{1}, {2}, {3}, {4}}};",
        in(reg64) address, in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d, options(nostack));
}

/// Loads one word from shared memory.
///
/// # Safety
///
/// `address` is aligned to 4 bytes and in the block's shared memory.
#[inline(always)]
pub unsafe fn load_shared(address: u32) -> u32 {
    let value: u32;
    asm!("ld.shared.u32 {0}, [{1}];", out(reg32) value, in(reg32) address, options(nostack));
    value
}

/// Loads one number from shared memory.
///
/// # Safety
///
/// `address` is aligned to 4 bytes and in the block's shared memory.
#[inline(always)]
pub unsafe fn load_shared_f32(address: u32) -> f32 {
    f32::from_bits(load_shared(address))
}

/// Loads two numbers from shared memory.
///
/// # Safety
///
/// `address` is aligned to 8 bytes and in the block's shared memory.
#[cfg(feature = "sm_90a")]
#[inline(always)]
pub unsafe fn load_shared_f32x2(address: u32) -> [f32; 2] {
    let (a, b): (f32, f32);
    asm!("ld.shared.v2.f32 {{{0}, {1}}}, [{2}];", out(reg32) a, out(reg32) b, in(reg32) address, options(nostack));
    [a, b]
}

/// Loads four words from shared memory.
///
/// # Safety
///
/// `address` is aligned to 16 bytes and in the block's shared memory.
#[inline(always)]
pub unsafe fn load_shared_x4(address: u32) -> [u32; 4] {
    let (a, b, c, d): (u32, u32, u32, u32);
    asm!("ld.shared.v4.u32 {{{0}, {1}, {2}, {3}}}, [{4}];",
        out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) address, options(nostack));
    [a, b, c, d]
}

/// Stores one word to shared memory.
///
/// # Safety
///
/// `address` is aligned to 4 bytes and in the block's shared memory.
#[inline(always)]
pub unsafe fn store_shared(address: u32, value: u32) {
    asm!("st.shared.u32 [{0}], {1};", in(reg32) address, in(reg32) value, options(nostack));
}

/// Stores 4 bytes to shared memory where `condition` holds. There is no branch around it, so that the compiler sees the lanes of
/// a warp stay together.
///
/// # Safety
///
/// As [`store_shared`], where the condition holds.
#[cfg(feature = "sm_90a")]
#[inline(always)]
pub unsafe fn store_shared_if(address: u32, value: u32, condition: bool) {
    asm!("{{ .reg .pred p; setp.ne.u32 p, {2}, 0; @p st.shared.u32 [{0}], {1}; }}",
        in(reg32) address, in(reg32) value, in(reg32) condition as u32, options(nostack));
}

/// Stores four words to shared memory.
///
/// # Safety
///
/// `address` is aligned to 16 bytes and in the block's shared memory.
#[inline(always)]
pub unsafe fn store_shared_x4(address: u32, [a, b, c, d]: [u32; 4]) {
    asm!("st.shared.v4.u32 [{0}], {{{1}, {2}, {3}, {4}}};",
        in(reg32) address, in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d, options(nostack));
}

/// Stores one number to shared memory.
///
/// # Safety
///
/// `address` is aligned to 4 bytes and in the block's shared memory.
#[inline(always)]
pub unsafe fn store_shared_f32(address: u32, value: f32) {
    store_shared(address, value.to_bits());
}

/// Stores two numbers to shared memory.
///
/// # Safety
///
/// `address` is aligned to 8 bytes and in the block's shared memory.
#[inline(always)]
pub unsafe fn store_shared_f32x2(address: u32, a: f32, b: f32) {
    asm!("st.shared.v2.f32 [{0}], {{{1}, {2}}};", in(reg32) address, in(reg32) a, in(reg32) b, options(nostack));
}

/// Adds to a word that other blocks change too, and returns what it was. It orders no other memory accesses.
///
/// # Safety
///
/// `address` is aligned to 4 bytes and writable.
#[cfg(feature = "sm_90a")]
#[inline(always)]
pub unsafe fn fetch_add_global(address: u64, value: u32) -> u32 {
    let before: u32;
    asm!("atom.relaxed.gpu.global.add.u32 {0}, [{1}], {2};", out(reg32) before, in(reg64) address, in(reg32) value, options(nostack));
    before
}

/// As [`fetch_add_global`], of two words.
///
/// # Safety
///
/// `address` is aligned to 8 bytes and writable.
#[cfg(feature = "sm_90a")]
#[inline(always)]
pub unsafe fn fetch_add_global_u64(address: u64, value: u64) -> u64 {
    let before: u64;
    asm!("atom.relaxed.gpu.global.add.u64 {0}, [{1}], {2};", out(reg64) before, in(reg64) address, in(reg64) value, options(nostack));
    before
}

/// As [`fetch_add_global_u64`]; and what comes before it comes before what is behind those that find its sum.
///
/// # Safety
///
/// As [`fetch_add_global_u64`].
#[cfg(feature = "sm_90a")]
#[inline(always)]
pub unsafe fn fetch_add_global_u64_ordered(address: u64, value: u64) -> u64 {
    let before: u64;
    asm!("atom.acq_rel.gpu.global.add.u64 {0}, [{1}], {2};", out(reg64) before, in(reg64) address, in(reg64) value, options(nostack));
    before
}

/// Makes two words that other blocks change too `value`, if they are `expected`; returns what they were. It orders no other
/// memory accesses.
///
/// # Safety
///
/// `address` is aligned to 8 bytes and writable.
#[cfg(feature = "sm_90a")]
#[inline(always)]
pub unsafe fn compare_and_swap_global_u64(address: u64, expected: u64, value: u64) -> u64 {
    let before: u64;
    asm!("atom.relaxed.gpu.global.cas.b64 {0}, [{1}], {2}, {3};",
        out(reg64) before, in(reg64) address, in(reg64) expected, in(reg64) value, options(nostack));
    before
}

/// Adds to a word that other blocks change too, where `condition` holds, and returns what it was, else zero. It orders no other
/// memory accesses. There is no branch around it, so that the compiler sees the lanes of a warp stay together.
///
/// # Safety
///
/// `address` is aligned to 4 bytes and writable.
#[cfg(feature = "sm_90a")]
#[inline(always)]
pub unsafe fn fetch_add_global_if(address: u64, value: u32, condition: bool) -> u32 {
    let mut before = 0u32;
    asm!("{{ .reg .pred p; setp.ne.u32 p, {3}, 0; @p atom.relaxed.gpu.global.add.u32 {0}, [{1}], {2}; }}",
        inout(reg32) before, in(reg64) address, in(reg32) value, in(reg32) condition as u32, options(nostack));
    before
}

/// Brings a line of global memory to the second-level cache.
///
/// # Safety
///
/// `address` is readable.
#[inline(always)]
pub unsafe fn prefetch_global(address: u64) {
    asm!("prefetch.global.L2 [{0}];", in(reg64) address, options(nostack));
}
