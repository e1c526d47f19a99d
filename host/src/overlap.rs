//! Launches that may begin before the launch before them has ended: programmatic dependent launch (CUDA driver API, Execution
//! Control).

use std::ffi::c_void;
use std::mem::transmute;
use std::ptr;

use cust::sys::{CUfunction, CUresult, CUstream};

use crate::EngineError;
use crate::entry_point::EntryPoint;
use crate::error::Doing;

/// CUDA version of the oldest driver that such launches are given to: 12.3, the first that captures them into graphs.
pub(crate) const OLDEST_DRIVER: u32 = 12_030;

/// `CUlaunchConfig`, which `cust`'s bindings do not have.
#[repr(C)]
struct LaunchConfig {
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    stream: CUstream,
    attributes: *mut LaunchAttribute,
    num_attributes: u32,
}

/// `CUlaunchAttribute`: a number, padded to 8 bytes, and a value of 64.
#[repr(C, align(8))]
struct LaunchAttribute {
    id: u32,
    padding: u32,
    value: [i32; 16],
}

/// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`; not zero as a value says that the kernel waits by itself.
const PROGRAMMATIC_STREAM_SERIALIZATION: u32 = 6;

type LaunchKernelEx = unsafe extern "C" fn(
    config: *const LaunchConfig,
    function: CUfunction,
    params: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> CUresult;

/// Gives `blocks` blocks of a kernel to a stream, which may begin while the launch before is still at work.
///
/// # Safety
///
/// As [`crate::kernels::Kernel::launch`]; and the kernel waits (`griddepcontrol.wait`) before it touches what the launch before
/// does.
pub(crate) unsafe fn launch(
    function: CUfunction,
    blocks: u32,
    threads: u32,
    shared_bytes: u32,
    params: &mut [*mut c_void],
    stream: CUstream,
) -> Result<(), EngineError> {
    static ENTRY_POINT: EntryPoint = EntryPoint::new(c"cuLaunchKernelEx");
    // SAFETY: the driver's entry point of that name has this signature.
    let launch_kernel_ex = unsafe { transmute::<usize, LaunchKernelEx>(ENTRY_POINT.address()?) };
    let mut attribute = LaunchAttribute { id: PROGRAMMATIC_STREAM_SERIALIZATION, padding: 0, value: [0; 16] };
    attribute.value[0] = 1;
    let config = LaunchConfig {
        grid: [blocks, 1, 1],
        block: [threads, 1, 1],
        shared_bytes,
        stream,
        attributes: &mut attribute,
        num_attributes: 1,
    };
    // SAFETY: the parameters are the kernel's, the caller says; the driver copies all arguments before it returns.
    unsafe { launch_kernel_ex(&config, function, params.as_mut_ptr(), ptr::null_mut()) }.doing("launching a kernel")
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    /// Offsets of the driver's header, for 64-bit addresses.
    #[test]
    fn structures_are_laid_out_as_the_drivers() {
        assert_eq!(
            [offset_of!(LaunchConfig, stream), offset_of!(LaunchConfig, attributes), offset_of!(LaunchConfig, num_attributes)],
            [32, 40, 48]
        );
        assert_eq!((size_of::<LaunchConfig>(), size_of::<LaunchAttribute>()), (56, 72));
        assert_eq!(offset_of!(LaunchAttribute, value), 8);
    }
}
