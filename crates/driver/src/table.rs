//! The exported entry points, and the table through which they jump.

use std::arch::naked_asm;
use std::ffi::{CStr, c_void};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicPtr, Ordering};

use libloading::Library;

use crate::for_each_entry_point;

/// `CUDA_ERROR_STUB_LIBRARY`: the driver is not loaded.
const STUB_LIBRARY: u32 = 34;
/// `CUDA_ERROR_NOT_FOUND`: the driver is too old to have this entry point.
const NOT_FOUND: u32 = 500;

// Every entry point returns a status, and whoever is called without looking at the arguments leaves them alone: the C calling
// convention has the caller clean up.
extern "C" fn driver_not_loaded() -> u32 {
    STUB_LIBRARY
}

extern "C" fn not_in_this_driver() -> u32 {
    NOT_FOUND
}

/// One row of the table.
struct EntryPoint {
    name: &'static CStr,
    /// Where the exported function jumps.
    target: &'static AtomicPtr<c_void>,
}

/// Jumps to the address that `$target` holds, with registers and stack as the caller left them.
macro_rules! jump_through {
    ($target:path) => {{
        #[cfg(target_arch = "x86_64")]
        naked_asm!("jmp qword ptr [rip + {target}]", target = sym $target);
        #[cfg(target_arch = "aarch64")]
        naked_asm!("adrp x16, {target}", "ldr x16, [x16, :lo12:{target}]", "br x16", target = sym $target);
    }};
}

/// Defines the exported functions, their targets and the table.
macro_rules! define {
    ($($name:ident)*) => {
        #[allow(non_upper_case_globals)]
        mod targets {
            use super::*;

            $(pub static $name: AtomicPtr<c_void> = AtomicPtr::new(driver_not_loaded as *mut c_void);)*
        }

        #[allow(non_snake_case)]
        mod exports {
            use super::*;

            $(
                // SAFETY: the name is the driver's own. Who declares the function with the driver's signature reaches the
                // driver's function, or one that only returns a status.
                #[unsafe(no_mangle)]
                #[unsafe(naked)]
                pub unsafe extern "C" fn $name() {
                    jump_through!(targets::$name)
                }
            )*
        }

        const ENTRY_POINTS: &[EntryPoint] = &[$(EntryPoint {
            // Names have no zero bytes: they are identifiers.
            name: match CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                Ok(name) => name,
                Err(_) => unreachable!(),
            },
            target: &targets::$name,
        }),*];

        /// Makes the linker take the exports along wherever this crate comes in its order of libraries.
        #[used]
        static KEEP: [unsafe extern "C" fn(); ENTRY_POINTS.len()] = [$(exports::$name),*];
    };
}

for_each_entry_point!(define);

/// Address of a function of the driver.
pub fn find(library: &Library, name: &CStr) -> Option<NonNull<c_void>> {
    // SAFETY: an address is read, nothing is called.
    let symbol = unsafe { library.get::<*mut c_void>(name) }.ok()?;
    NonNull::new(*symbol)
}

/// Points the table into the driver's library, which stays loaded.
pub fn fill(library: &Library) {
    for entry_point in ENTRY_POINTS {
        let target = find(library, entry_point.name).map_or(not_in_this_driver as *mut c_void, NonNull::as_ptr);
        entry_point.target.store(target, Ordering::Release);
    }
}
