//! The CUDA driver's entry points, found when the program runs.
//!
//! `cust` wants to be linked with `libcuda.so`, which comes with NVIDIA's driver. This crate defines the entry points itself, so
//! that a program with `cust` in it can be built without CUDA and starts on machines without a GPU:
//!
//! * each entry point jumps to where a table says, at first to a function that returns `CUDA_ERROR_STUB_LIBRARY`;
//! * [`load`] opens the driver's library and fills the table;
//! * [`symbol`] finds entry points that are younger than `cust`.
//!
//! ```no_run
//! match packinfer_driver::load() {
//!     Ok(()) => println!("the driver is there"),
//!     Err(error) => println!("{error}"),
//! }
//! ```

mod entry_points;
mod table;

use std::error::Error;
use std::ffi::{CStr, c_void};
use std::ptr::NonNull;
use std::sync::OnceLock;

use libloading::Library;

/// The driver's library.
const LIBRARY_NAME: &str = "libcuda.so.1";
/// What it is called where there is only a link without version.
const UNVERSIONED_NAME: &str = "libcuda.so";

/// The driver's library, or why there is none. Once open it stays so: the table points into it.
static LIBRARY: OnceLock<Result<Library, LoadError>> = OnceLock::new();

/// The driver's library cannot be opened.
#[derive(Clone, Debug, thiserror::Error)]
#[error("no NVIDIA driver: {reason}; install the driver to use a GPU")]
pub struct LoadError {
    reason: String,
}

/// Opens the driver's library, after which its entry points work. Further calls return what the first one did.
///
/// # Errors
///
/// The library is not there or cannot be opened.
pub fn load() -> Result<(), LoadError> {
    library().map(|_| ())
}

/// Address of an entry point by its full name, such as `c"cuTensorMapEncodeTiled"`; `None` if the driver is too old to have it.
///
/// # Errors
///
/// As [`load`].
pub fn symbol(name: &CStr) -> Result<Option<NonNull<c_void>>, LoadError> {
    library().map(|library| table::find(library, name))
}

fn library() -> Result<&'static Library, LoadError> {
    let library = LIBRARY.get_or_init(|| {
        let library = open()?;
        table::fill(&library);
        Ok(library)
    });
    library.as_ref().map_err(LoadError::clone)
}

fn open() -> Result<Library, LoadError> {
    // SAFETY: the driver's library may be loaded at any time: that is how programs that can do without it use it.
    let open = |name| unsafe { Library::new(name) };
    open(LIBRARY_NAME).or_else(|error| open(UNVERSIONED_NAME).map_err(|_| error)).map_err(|error| {
        // The source has the loader's own words.
        let reason = error.source().map_or_else(|| error.to_string(), ToString::to_string);
        LoadError { reason }
    })
}
