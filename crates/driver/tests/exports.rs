//! What `cust_raw` declares is what this crate defines, with and without a driver.

use std::ffi::CStr;
use std::ptr;

use cust_raw::cudaError_enum;
use packinfer_driver::for_each_entry_point;

macro_rules! addresses {
    ($($name:ident)*) => { [$((stringify!($name), cust_raw::$name as *const ())),*] };
}

/// Entry points of CUDA 11.4.
const EXPECTED: usize = 353;

#[test]
fn every_entry_point_is_declared_and_defined() {
    // A name that cust_raw lacks does not compile; one that this crate lacks does not link.
    let addresses = for_each_entry_point!(addresses);
    assert_eq!(addresses.len(), EXPECTED);
    for (index, (name, address)) in addresses.iter().enumerate() {
        let twin = addresses[..index].iter().find(|(_, other)| other == address);
        assert!(twin.is_none(), "{name} and {twin:?} are one function");
    }
}

// One test, as the driver is loaded once in a process.
#[test]
fn entry_points_work_once_the_driver_is_loaded() {
    let mut version = 0;
    // SAFETY: the argument is a place for the version, as the signature has it.
    let before = unsafe { cust_raw::cuDriverGetVersion(&mut version) };
    assert_eq!(before, cudaError_enum::CUDA_ERROR_STUB_LIBRARY);
    let loaded = packinfer_driver::load();
    // SAFETY: as above.
    let after = unsafe { cust_raw::cuDriverGetVersion(&mut version) };
    if let Err(error) = loaded {
        println!("{error}");
        assert!(error.to_string().starts_with("no NVIDIA driver"), "{error}");
        assert_eq!(after, cudaError_enum::CUDA_ERROR_STUB_LIBRARY);
        assert!(packinfer_driver::symbol(c"cuInit").is_err());
        return;
    }
    assert_eq!(after, cudaError_enum::CUDA_SUCCESS);
    assert!(version > 0);
    assert!(matches!(packinfer_driver::symbol(c"cuInit"), Ok(Some(_))));
    assert!(matches!(packinfer_driver::symbol(c"cuNoSuchFunction"), Ok(None)));
    let mut name = ptr::null();
    // SAFETY: the argument is a place for the text's address.
    let status = unsafe { cust_raw::cuGetErrorName(cudaError_enum::CUDA_ERROR_NOT_FOUND, &mut name) };
    assert_eq!(status, cudaError_enum::CUDA_SUCCESS);
    // SAFETY: the driver returned a text that it keeps.
    assert_eq!(unsafe { CStr::from_ptr(name) }, c"CUDA_ERROR_NOT_FOUND");
}
