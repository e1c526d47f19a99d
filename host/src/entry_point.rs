//! Entry points of the driver that are younger than `cust`'s bindings.

use std::ffi::CStr;
use std::ptr::NonNull;
use std::sync::OnceLock;

use crate::EngineError;

/// An entry point, looked for when it is first used.
pub(crate) struct EntryPoint {
    name: &'static CStr,
    /// 0 if the driver has none.
    address: OnceLock<usize>,
}

impl EntryPoint {
    pub const fn new(name: &'static CStr) -> Self {
        Self { name, address: OnceLock::new() }
    }

    /// Its address, to be called with the driver's signature.
    pub fn address(&self) -> Result<usize, EngineError> {
        let address = match self.address.get() {
            Some(&address) => address,
            None => {
                let found = packinfer_driver::symbol(self.name)?.map_or(0, |symbol: NonNull<_>| symbol.as_ptr() as usize);
                *self.address.get_or_init(|| found)
            }
        };
        if address == 0 { Err(EngineError::NoEntryPoint { name: self.name.to_str().unwrap_or_default() }) } else { Ok(address) }
    }
}
