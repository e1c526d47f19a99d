//! Special registers (PTX ISA, Special Registers) and the block's dynamic shared memory.

use core::arch::{asm, global_asm};

global_asm!(".extern .shared .align 1024 .b8 dynamic_shared[];");

// Not `pure`: read again where it is called again, rather than kept in a register.
macro_rules! special_register {
    ($(#[doc = $doc:literal])* $name:ident = $register:literal) => {
        $(#[doc = $doc])*
        #[inline(always)]
        pub fn $name() -> u32 {
            let value: u32;
            // SAFETY: reads a special register.
            unsafe { asm!(concat!("mov.u32 {0}, ", $register, ";"), out(reg32) value, options(nomem, nostack)) };
            value
        }
    };
}

special_register! {
    /// Index of the thread in its block.
    thread_index = "%tid.x"
}
special_register! {
    /// Index of the block in the grid.
    block_index = "%ctaid.x"
}
special_register! {
    /// Number of blocks in the grid.
    num_blocks = "%nctaid.x"
}
special_register! {
    /// The multiprocessor that the block is on.
    multiprocessor = "%smid"
}

/// Nanoseconds of a clock that all multiprocessors share. Its resolution is the device's: 32 ns to 1 µs.
#[inline(always)]
pub fn global_timer() -> u64 {
    let value: u64;
    // SAFETY: reads a special register. Memory accesses stay on their side of it.
    unsafe { asm!("mov.u64 {0}, %globaltimer;", out(reg64) value, options(nostack)) };
    value
}

/// Address, in the shared window, of the block's dynamic shared memory; aligned to 1024 bytes.
#[inline(always)]
pub fn dynamic_shared() -> u32 {
    let base: u32;
    // SAFETY: takes the address of a declared symbol.
    unsafe { asm!("mov.u32 {0}, dynamic_shared;", out(reg32) base, options(pure, nomem, nostack)) };
    base
}
