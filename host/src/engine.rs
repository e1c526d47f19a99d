//! The engine: a device, and what can be done on it.

use std::fmt;
use std::sync::Arc;

use bytemuck::Pod;
use cust::sys::CUstream;
use packinfer_planner::{Calibration, KernelFamily, Plan, Planner};

use crate::context::Shared;
use crate::device_plan::DevicePlan;
use crate::memory::DeviceBuffer;
use crate::run::{self, RunOptions, Tensors};
use crate::stamps::Stamps;
use crate::stream::Stream;
use crate::workspace::Workspace;
use crate::{DeviceInfo, Element, EngineError, KvElement, device};

/// Which device an [`Engine`] uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineOptions {
    /// Its number among the visible devices, from 0.
    pub device_ordinal: u32,
    /// The kernels to use for all plans; if `None`, the planner chooses for each batch among those that the device can run.
    pub kernel_family: Option<KernelFamily>,
}

/// A device on which plans run. Clones are the same engine; all of them work from any thread.
///
/// It uses the device's primary context, as the CUDA runtime does, and makes it current on the threads that call it.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

impl Engine {
    /// Opens a device.
    ///
    /// # Errors
    ///
    /// No driver, one that is too old, no such device, or one that cannot run the kernels.
    pub fn new(options: EngineOptions) -> Result<Self, EngineError> {
        let (device, info) = device::device(options.device_ordinal)?;
        let mut families = info.kernel_families();
        if families.is_empty() {
            let (major, minor) = info.compute_capability;
            return Err(EngineError::DeviceTooOld { name: info.name, major, minor });
        }
        if let Some(family) = options.kernel_family {
            families.retain(|&can_run| can_run == family);
            if families.is_empty() {
                return Err(EngineError::KernelFamily { device: info.name, family });
            }
        }
        Ok(Self { shared: Arc::new(Shared::new(device, info, families)?) })
    }

    /// What there is to know of the device.
    pub fn device(&self) -> &DeviceInfo {
        &self.shared.info
    }

    /// The kernels that are used: of these families, a plan is run with the one that it was made for.
    pub fn kernel_families(&self) -> &[KernelFamily] {
        &self.shared.families
    }

    /// A planner for the device and the kernels that the engine uses. Keep it from step to step: it uses its memory again.
    pub fn planner(&self) -> Planner {
        let mut models = self.device().models();
        models.retain(|model| self.kernel_families().contains(&model.kernel_family));
        Planner::choosing(models)
    }

    /// As [`Self::planner`], with the models of a calibration of the device.
    ///
    /// # Errors
    ///
    /// A calibration of a device with another number of multiprocessors, or of none of the kernels that the engine uses.
    pub fn calibrated_planner(&self, calibration: &Calibration) -> Result<Planner, EngineError> {
        let DeviceInfo { name, multiprocessors, .. } = self.device();
        let models = calibration.models_for(name, *multiprocessors)?;
        let used = models.iter().filter(|model| self.kernel_families().contains(&model.kernel_family));
        let models: Vec<_> = used.copied().collect();
        if models.is_empty() {
            return Err(EngineError::NotCalibrated { device: calibration.device.clone() });
        }
        Ok(Planner::choosing(models))
    }

    /// A new stream, which runs beside all others.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub fn stream(&self) -> Result<Stream, EngineError> {
        Stream::new(&self.shared)
    }

    /// A stream that somebody else made; null is the default stream.
    ///
    /// # Safety
    ///
    /// The stream is of the primary context of the engine's device, and is not destroyed before the returned one, its clones, and
    /// every plan and workspace that was used with it are dropped.
    ///
    /// # Errors
    ///
    /// What the driver reports.
    pub unsafe fn foreign_stream(&self, raw: CUstream) -> Result<Stream, EngineError> {
        // SAFETY: the caller promises it.
        unsafe { Stream::foreign(&self.shared, raw) }
    }

    /// A buffer of `len` zeros on the device.
    ///
    /// # Errors
    ///
    /// Not enough device memory.
    pub fn zeros<T: Pod>(&self, len: usize) -> Result<DeviceBuffer<T>, EngineError> {
        DeviceBuffer::zeroed(&self.shared, len, "a tensor")
    }

    /// A buffer on the device with a copy of `elements`.
    ///
    /// # Errors
    ///
    /// Not enough device memory.
    pub fn copy_of<T: Pod>(&self, elements: &[T]) -> Result<DeviceBuffer<T>, EngineError> {
        let mut buffer = self.zeros(elements.len())?;
        buffer.upload(elements)?;
        Ok(buffer)
    }

    /// A buffer of `len` elements on the device that are those of `elements`, over and over: data to measure with, for whose
    /// length the host need not have memory. Zeros if there are no elements.
    ///
    /// # Errors
    ///
    /// Not enough device memory.
    pub fn repeating<T: Pod>(&self, elements: &[T], len: usize) -> Result<DeviceBuffer<T>, EngineError> {
        DeviceBuffer::repeating(&self.shared, elements, len, "a tensor")
    }

    /// Memory for partial results. Streams that are to run concurrently need one each.
    ///
    /// # Errors
    ///
    /// Not enough device memory.
    pub fn workspace(&self) -> Result<Workspace, EngineError> {
        Workspace::new(&self.shared)
    }

    /// Copies a plan to the device, in order with the work of `stream`, and does not wait for it. Other streams that run the plan
    /// wait for the copy by themselves.
    ///
    /// # Errors
    ///
    /// Not enough device memory, a plan too large for a launch, or kernels that the driver cannot load (they are loaded when
    /// first needed).
    pub fn upload(&self, plan: &Plan, stream: &Stream) -> Result<DevicePlan, EngineError> {
        self.check("the stream", stream.shared())?;
        DevicePlan::upload(&self.shared, plan, stream)
    }

    /// As [`Self::upload`], into the memory of a plan that is no longer needed. Allocates only if the plan does not fit. The copy
    /// waits for runs of the old plan on whatever streams; the host waits only if the copy of the plan before the old one is not
    /// done.
    ///
    /// # Errors
    ///
    /// As [`Self::upload`]. If it is the driver that fails, what is left runs nothing.
    pub fn upload_into(&self, device_plan: &mut DevicePlan, plan: &Plan, stream: &Stream) -> Result<(), EngineError> {
        self.check("the stream", stream.shared())?;
        self.check("the plan", &device_plan.shared)?;
        device_plan.replace(plan, stream)
    }

    /// Attention of one layer: gives its launches to `stream` and does not wait for them. Nothing is allocated unless the
    /// workspace has to grow.
    ///
    /// # Errors
    ///
    /// Tensors of another type or of other lengths than the plan's, or at addresses that are not multiples of 16; a softmax scale
    /// or a soft-cap that is no positive number; objects of another device; or what the driver reports.
    pub fn run<E: Element, K: KvElement<E>>(
        &self,
        plan: &DevicePlan,
        workspace: &mut Workspace,
        stream: &Stream,
        tensors: Tensors<'_, E, K>,
        options: RunOptions<'_>,
    ) -> Result<(), EngineError> {
        self.check("the stream", stream.shared())?;
        self.check("the plan", &plan.shared)?;
        self.check("the workspace", workspace.shared())?;
        self.shared.enter()?;
        run::run(plan, workspace, stream, &tensors, options, None)
    }

    /// Room for the stamps of a plan's tasks: see [`Self::run_stamped`].
    ///
    /// # Errors
    ///
    /// Not enough device memory.
    pub fn stamps(&self, plan: &DevicePlan) -> Result<Stamps, EngineError> {
        Stamps::new(&self.shared, plan.layout.attention_tasks)
    }

    /// As [`Self::run`], but the attention kernel also notes when and where it did each task, which takes it next to no time.
    /// [`Stamps::read`] tells.
    ///
    /// # Errors
    ///
    /// As [`Self::run`], and stamps of a plan with another number of tasks.
    pub fn run_stamped<E: Element, K: KvElement<E>>(
        &self,
        plan: &DevicePlan,
        workspace: &mut Workspace,
        stream: &Stream,
        tensors: Tensors<'_, E, K>,
        options: RunOptions<'_>,
        stamps: &mut Stamps,
    ) -> Result<(), EngineError> {
        self.check("the stream", stream.shared())?;
        self.check("the plan", &plan.shared)?;
        self.check("the workspace", workspace.shared())?;
        self.check("the room for stamps", stamps.shared())?;
        self.shared.enter()?;
        run::run(plan, workspace, stream, &tensors, options, Some(stamps))
    }

    /// Waits until the device has done all work.
    ///
    /// # Errors
    ///
    /// That of the work.
    pub fn synchronize(&self) -> Result<(), EngineError> {
        self.shared.synchronize()
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub(crate) fn check(&self, what: &'static str, other: &Shared) -> Result<(), EngineError> {
        if self.shared.is(other) { Ok(()) } else { Err(EngineError::OtherDevice { what }) }
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("device", self.device()).field("kernels", &self.kernel_families()).finish()
    }
}
