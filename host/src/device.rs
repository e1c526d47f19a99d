//! The devices of this machine.

use cust::CudaFlags;
use cust::device::{Device, DeviceAttribute};
use cust::sys;
use packinfer_planner::{DeviceModel, KernelFamily};

use crate::EngineError;
use crate::error::Doing;

/// CUDA version of the oldest driver that loads any kernels' PTX.
const OLDEST_DRIVER: u32 = oldest_driver(KernelFamily::Sm80);

/// What there is to know of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its number among the visible devices, from 0.
    pub ordinal: u32,
    /// Its name.
    pub name: String,
    /// Its compute capability: major and minor number.
    pub compute_capability: (u32, u32),
    /// Its streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of its memory.
    pub memory_bytes: u64,
    /// Bytes of its L2 cache.
    pub l2_bytes: u64,
    /// Bytes of shared memory that a thread block can have.
    pub shared_bytes_per_block: u32,
    /// Bytes of shared memory of a multiprocessor.
    pub shared_bytes_per_multiprocessor: u32,
}

impl DeviceInfo {
    /// The kernels that the device and the driver can run.
    pub fn kernel_families(&self) -> Vec<KernelFamily> {
        let driver = driver_version().unwrap_or(OLDEST_DRIVER);
        let runs = |family: &KernelFamily| family.runs_on(self.compute_capability) && oldest_driver(*family) <= driver;
        KernelFamily::ALL.into_iter().filter(runs).collect()
    }

    /// The models by which a planner knows the device, one for each family of kernels that it can run.
    pub fn models(&self) -> Vec<DeviceModel> {
        let families = self.kernel_families();
        let mut models = DeviceModel::all_for_device(&self.name, self.compute_capability, self.multiprocessors);
        models.retain(|model| families.contains(&model.kernel_family));
        models
    }

    fn read(ordinal: u32, device: Device) -> Result<Self, EngineError> {
        const DOING: &str = "reading the properties of a device";
        let attribute = |attribute| device.get_attribute(attribute).doing(DOING).map(|value| value.max(0) as u32);
        Ok(Self {
            ordinal,
            name: device.name().doing(DOING)?,
            compute_capability: (
                attribute(DeviceAttribute::ComputeCapabilityMajor)?,
                attribute(DeviceAttribute::ComputeCapabilityMinor)?,
            ),
            multiprocessors: attribute(DeviceAttribute::MultiprocessorCount)?,
            memory_bytes: device.total_memory().doing(DOING)? as u64,
            l2_bytes: attribute(DeviceAttribute::L2CacheSize)?.into(),
            shared_bytes_per_block: shared_bytes_per_block(device)?,
            shared_bytes_per_multiprocessor: attribute(DeviceAttribute::MaxSharedMemoryPerMultiprocessor)?,
        })
    }
}

/// Shared memory that a block can have if its kernel asks for more than the usual 48 KiB: an attribute that `cust` does not know.
fn shared_bytes_per_block(device: Device) -> Result<u32, EngineError> {
    let mut bytes = 0;
    let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
    // SAFETY: the first argument is a place for the value.
    unsafe { sys::cuDeviceGetAttribute(&mut bytes, attribute, device.as_raw()) }.doing("reading the properties of a device")?;
    Ok(bytes.max(0) as u32)
}

/// CUDA version of the oldest driver that loads a family's PTX: 11.4, which came with driver 470, for ISA 7.4; 12.0 (525) for ISA
/// 8.0.
pub(crate) const fn oldest_driver(family: KernelFamily) -> u32 {
    match family {
        KernelFamily::Sm80 => 11_040,
        _ => 12_000,
    }
}

/// CUDA version of the driver: 1000 times the major and 10 times the minor number.
///
/// # Errors
///
/// No driver.
pub fn driver_version() -> Result<u32, EngineError> {
    packinfer_driver::load()?;
    let mut version = 0;
    // SAFETY: the argument is a place for the version.
    unsafe { sys::cuDriverGetVersion(&mut version) }.doing("reading the driver's version")?;
    Ok(version.max(0) as u32)
}

/// All visible devices, those that are too old for the kernels included.
///
/// # Errors
///
/// No driver, one that is too old, or no device.
pub fn devices() -> Result<Vec<DeviceInfo>, EngineError> {
    let count = init()?;
    (0..count).map(|ordinal| find(ordinal, count).map(|(_, info)| info)).collect()
}

/// The device of an ordinal.
pub(crate) fn device(ordinal: u32) -> Result<(Device, DeviceInfo), EngineError> {
    let count = init()?;
    if ordinal >= count {
        return Err(EngineError::NoSuchDevice { ordinal, count });
    }
    find(ordinal, count)
}

/// Starts the driver and says how many devices there are.
fn init() -> Result<u32, EngineError> {
    let found = driver_version()?;
    if found < OLDEST_DRIVER {
        return Err(EngineError::DriverTooOld { found, needed: OLDEST_DRIVER });
    }
    let count = cust::init(CudaFlags::empty()).and_then(|()| Device::num_devices());
    match count {
        Ok(0) | Err(cust::error::CudaError::NoDevice) => Err(EngineError::NoDevice),
        count => count.doing("starting the NVIDIA driver"),
    }
}

fn find(ordinal: u32, count: u32) -> Result<(Device, DeviceInfo), EngineError> {
    let device = Device::get_device(ordinal).map_err(|_| EngineError::NoSuchDevice { ordinal, count })?;
    Ok((device, DeviceInfo::read(ordinal, device)?))
}
