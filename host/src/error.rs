//! What can go wrong on the way to the GPU and on it.

use cust::error::CudaError;
use cust::sys::CUresult;
use packinfer_batch::{DType, KvDType};
use packinfer_driver::LoadError;
use packinfer_planner::CalibrationError;

use crate::{KernelFamily, KvMemoryError};

/// Why an engine cannot be had, or cannot do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The machine has no NVIDIA driver.
    #[error(transparent)]
    NoDriver(#[from] LoadError),
    /// The driver cannot load the kernels' PTX.
    #[error(
        "the NVIDIA driver is too old: it is of CUDA {}.{}, and the kernels need {}.{}",
        found / 1000, found % 1000 / 10, needed / 1000, needed % 1000 / 10
    )]
    DriverTooOld {
        /// CUDA version of the driver: 1000 times the major and 10 times the minor number.
        found: u32,
        /// The oldest that will do.
        needed: u32,
    },
    /// The driver is there, but no device.
    #[error("the NVIDIA driver finds no device: there is none, or CUDA_VISIBLE_DEVICES hides it")]
    NoDevice,
    /// No device of this ordinal.
    #[error("device {ordinal} was asked for, but there are {count}: ordinals start at 0")]
    NoSuchDevice {
        /// The ordinal asked for.
        ordinal: u32,
        /// Devices that there are.
        count: u32,
    },
    /// The device cannot run the kernels.
    #[error("{name} has compute capability {major}.{minor}: the kernels need 8.0 (Ampere) or later")]
    DeviceTooOld {
        /// The device's name.
        name: String,
        /// Its compute capability's major number.
        major: u32,
        /// Its compute capability's minor number.
        minor: u32,
    },
    /// The device's blocks have too little shared memory.
    #[error("the kernel needs {needed} bytes of shared memory a block, and the device has {available}")]
    SharedMemory {
        /// What a kernel needs.
        needed: u32,
        /// What a block can have.
        available: u32,
    },
    /// Device memory is used up.
    #[error("{bytes} bytes of device memory are needed for {what}, and {free} are free")]
    OutOfMemory {
        /// What for.
        what: &'static str,
        /// How many.
        bytes: u64,
        /// What was free then.
        free: u64,
    },
    /// A tensor that has another number of elements than the plan.
    #[error("{tensor} has {found} elements, and the plan needs {needed}: {shape}")]
    TensorLength {
        /// The tensor.
        tensor: &'static str,
        /// Its shape.
        shape: &'static str,
        /// Its elements.
        found: u64,
        /// Elements that it should have.
        needed: u64,
    },
    /// K or V with fewer slots than the plan refers to.
    #[error("{tensor} has {found} elements, and the plan refers to {num_slots} slots: {needed} elements")]
    PoolTooSmall {
        /// The tensor.
        tensor: &'static str,
        /// Its elements.
        found: u64,
        /// Slots that it should have.
        num_slots: u32,
        /// Elements that it should have.
        needed: u64,
    },
    /// A tensor that does not start where the kernels' vector loads can.
    #[error("{tensor} starts at address {address:#x}: it must be a multiple of {alignment}")]
    Misaligned {
        /// The tensor.
        tensor: &'static str,
        /// Its address.
        address: u64,
        /// What the address must be a multiple of.
        alignment: u64,
    },
    /// Tensors of another type than the plan.
    #[error("the tensors are {found}, and the plan was made for {needed}")]
    DType {
        /// Type of the tensors.
        found: DType,
        /// Type of the plan.
        needed: DType,
    },
    /// K and V of another type than the plan.
    #[error("K and V are of type \"{found}\", and the plan was made for \"{needed}\"")]
    KvDType {
        /// Type of the tensors.
        found: KvDType,
        /// Type of the plan.
        needed: KvDType,
    },
    /// Scales of K or V that have none.
    #[error("{option} are given, but K and V are not in FP8: only there they have scales")]
    NoScales {
        /// The option.
        option: &'static str,
    },
    /// A softmax scale or a soft-cap that is no positive number.
    #[error("{what} {value}: it must be finite and greater than 0")]
    NotPositive {
        /// Which of them.
        what: &'static str,
        /// What it is.
        value: f32,
    },
    /// A copy between a slice and a buffer of different lengths.
    #[error("a buffer of {buffer} elements cannot be copied from {slice} elements: the lengths must be equal")]
    CopyLength {
        /// Elements of the buffer on the device.
        buffer: usize,
        /// Elements of the slice.
        slice: usize,
    },
    /// More thread blocks than a launch can have.
    #[error("the plan needs {blocks} thread blocks of {kernel}, and a launch has at most {most}: divide the batch")]
    TooManyBlocks {
        /// The kernel.
        kernel: &'static str,
        /// Blocks that it needs.
        blocks: u64,
        /// The limit.
        most: u32,
    },
    /// Objects of different devices.
    #[error("{what} belongs to another device than the engine")]
    OtherDevice {
        /// The object.
        what: &'static str,
    },
    /// A function of the driver that it should have by its version.
    #[error("the NVIDIA driver has no {name}: its library is damaged, or of another version than it says")]
    NoEntryPoint {
        /// The function.
        name: &'static str,
    },
    /// Something that cannot be captured into a graph.
    #[error("{doing} cannot be captured into a graph: it has to be done before, as by running the same once on this stream")]
    Captured {
        /// What was to be done.
        doing: &'static str,
    },
    /// Kernels of a family that the device cannot run.
    #[error("{device} cannot run the {family} kernels")]
    KernelFamily {
        /// The device's name.
        device: String,
        /// The family asked for.
        family: KernelFamily,
    },
    /// Copies of slots or new tokens that do not fit the KV pool.
    #[error(transparent)]
    KvMemory(#[from] KvMemoryError),
    /// A pool that does not allow what was asked of it.
    #[error(transparent)]
    KvPool(#[from] packinfer_kv::KvError),
    /// A calibration of another device.
    #[error(transparent)]
    Calibration(#[from] CalibrationError),
    /// A calibration of other kernels than are used.
    #[error("the calibration of {device} has no model of the kernels that are used")]
    NotCalibrated {
        /// The device.
        device: String,
    },
    /// Stamps of another plan.
    #[error("there is room for the stamps of {room} tasks, and the plan has {tasks}: make room for each plan")]
    Stamps {
        /// Stamps that there is room for.
        room: u32,
        /// Tasks of the plan.
        tasks: u32,
    },
    /// The driver refuses a kernel.
    #[error("{kernel}: {error}")]
    Kernel {
        /// The kernel.
        kernel: &'static str,
        /// Why.
        error: Box<EngineError>,
    },
    /// The driver reports an error, which may be that of earlier work.
    #[error("{doing}: CUDA error {status}, {name}")]
    Cuda {
        /// What was being done.
        doing: &'static str,
        /// The driver's status.
        status: u32,
        /// The status's name.
        name: String,
    },
}

/// Adds what was being done to a status of the driver.
pub(crate) trait Doing<T> {
    fn doing(self, doing: &'static str) -> Result<T, EngineError>;
}

impl<T> Doing<T> for Result<T, CudaError> {
    fn doing(self, doing: &'static str) -> Result<T, EngineError> {
        // Not its `Display`, which asks the driver, and panics where there is none.
        self.map_err(|error| EngineError::Cuda { doing, status: error as u32, name: format!("{error:?}") })
    }
}

impl Doing<()> for CUresult {
    fn doing(self, doing: &'static str) -> Result<(), EngineError> {
        match self {
            CUresult::CUDA_SUCCESS => Ok(()),
            status => Err(EngineError::Cuda { doing, status: status as u32, name: format!("{status:?}") }),
        }
    }
}
