//! What everything on a device shares: its context and its kernels.

use std::cell::Cell;
use std::sync::{PoisonError, RwLock};

use cust::context::{Context, CurrentContext};
use cust::device::Device;

use crate::error::Doing;
use crate::kernels::Kernels;
use crate::{DeviceInfo, EngineError, KernelFamily, device, overlap};

thread_local! {
    /// Whether the thread captures work into a graph.
    static CAPTURES: Cell<bool> = const { Cell::new(false) };
}

/// A device in use. Every object that lives on it holds one, so that it outlives them all.
///
/// It is the device's primary context, which the CUDA runtime and other libraries use as well, so they can share memory and
/// streams.
pub(crate) struct Shared {
    pub info: DeviceInfo,
    /// The kernels that plans may be run with: at least one family.
    pub families: Vec<KernelFamily>,
    /// Whether launches can begin before the launch before them has ended.
    pub can_overlap: bool,
    /// Held by threads that capture a stream alone, by those that wait for the device together: the driver fails both if they
    /// meet.
    capturing: RwLock<()>,
    // Dropped in this order: modules are unloaded before their context goes.
    pub kernels: Kernels,
    context: Context,
}

impl Shared {
    pub fn new(device: Device, info: DeviceInfo, families: Vec<KernelFamily>) -> Result<Self, EngineError> {
        let context = Context::new(device).doing("opening the device")?;
        // The kernels that wait by themselves are of that family.
        let can_overlap = families.contains(&KernelFamily::Sm90a) && device::driver_version()? >= overlap::OLDEST_DRIVER;
        Ok(Self {
            kernels: Kernels::new(info.shared_bytes_per_block),
            info,
            families,
            can_overlap,
            capturing: RwLock::default(),
            context,
        })
    }

    /// Makes the context the calling thread's current one, which the driver's functions work on.
    pub fn enter(&self) -> Result<(), EngineError> {
        CurrentContext::set_current(&self.context).doing("making the device's context current")
    }

    /// Waits until the device has done all work of the context.
    pub fn synchronize(&self) -> Result<(), EngineError> {
        check_not_capturing("waiting for the device")?;
        let _nobody_captures = self.capturing.read().unwrap_or_else(PoisonError::into_inner);
        self.enter()?;
        CurrentContext::synchronize().doing("waiting for the device")
    }

    /// Does what captures a stream, on this thread; other threads that would wait for the device wait for it first.
    pub fn while_capturing<T>(&self, capture: impl FnOnce() -> Result<T, EngineError>) -> Result<T, EngineError> {
        /// Says that the thread captures, until it is dropped.
        struct Captures;
        impl Drop for Captures {
            fn drop(&mut self) {
                CAPTURES.set(false);
            }
        }
        check_not_capturing("another capture")?;
        let _nobody_waits = self.capturing.write().unwrap_or_else(PoisonError::into_inner);
        self.enter()?;
        CAPTURES.set(true);
        let _captures = Captures;
        capture()
    }

    /// Waits before something is freed that work may still be using. It is called where things are dropped, so an error, which
    /// can only be that of earlier work, has nobody to go to: whoever waits for that work is told as well.
    pub fn quiesce(&self) {
        let _ = self.synchronize();
    }

    /// Whether both are the same context.
    pub fn is(&self, other: &Shared) -> bool {
        self.context.as_raw() == other.context.as_raw()
    }
}

/// An error if this thread captures a stream, for something that a graph cannot hold.
pub(crate) fn check_not_capturing(doing: &'static str) -> Result<(), EngineError> {
    if CAPTURES.get() { Err(EngineError::Captured { doing }) } else { Ok(()) }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.quiesce();
    }
}
