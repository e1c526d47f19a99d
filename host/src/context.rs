//! What everything on a device shares: its context and its kernels.

use cust::context::{Context, CurrentContext};
use cust::device::Device;

use crate::error::Doing;
use crate::kernels::Kernels;
use crate::{DeviceInfo, EngineError, KernelFamily};

/// A device in use. Every object that lives on it holds one, so that it outlives them all.
///
/// It is the device's primary context, which the CUDA runtime and other libraries use as well, so they can share memory and streams.
pub(crate) struct Shared {
    pub info: DeviceInfo,
    /// The kernels that plans may be run with: at least one family.
    pub families: Vec<KernelFamily>,
    // Dropped in this order: modules are unloaded before their context goes.
    pub kernels: Kernels,
    context: Context,
}

impl Shared {
    pub fn new(device: Device, info: DeviceInfo, families: Vec<KernelFamily>) -> Result<Self, EngineError> {
        let context = Context::new(device).doing("opening the device")?;
        Ok(Self { kernels: Kernels::new(info.shared_bytes_per_block), info, families, context })
    }

    /// Makes the context the calling thread's current one, which the driver's functions work on.
    pub fn enter(&self) -> Result<(), EngineError> {
        CurrentContext::set_current(&self.context).doing("making the device's context current")
    }

    /// Waits until the device has done all work of the context.
    pub fn synchronize(&self) -> Result<(), EngineError> {
        self.enter()?;
        CurrentContext::synchronize().doing("waiting for the device")
    }

    /// Waits before something is freed that work may still be using. It is called where things are dropped, so an error, which can
    /// only be that of earlier work, has nobody to go to: whoever waits for that work is told as well.
    pub fn quiesce(&self) {
        let _ = self.synchronize();
    }

    /// Whether both are the same context.
    pub fn is(&self, other: &Shared) -> bool {
        self.context.as_raw() == other.context.as_raw()
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.quiesce();
    }
}
