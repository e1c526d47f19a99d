//! Where attention runs: the CPU or a GPU, with the same few things to ask of either.

mod cpu;
mod cuda;

use std::io::{Write, stderr};
use std::time::Duration;

use packinfer_batch::Batch;
use packinfer_cpu::Element;
use packinfer_planner::{DeviceModel, KernelFamily, Plan, Planner};
use serde::Serialize;

use crate::args::{DeviceArgs, DeviceChoice};
use crate::case::Tensors;
pub use cpu::Cpu;
use cuda::Cuda;

/// What a device can do at best, measured in this process.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Ceilings {
    /// Bytes a second, read and written together.
    pub copy_bytes_per_s: f64,
    /// Floating-point operations a second of the kind that attention is made of.
    pub flops_per_s: f64,
}

impl Ceilings {
    /// The least time that attention on a batch can take, in µs.
    pub fn floor_us(&self, batch: &Batch) -> f64 {
        1e6 * (batch.least_bytes() as f64 / self.copy_bytes_per_s).max(batch.flops() / self.flops_per_s)
    }
}

/// How many runs to measure.
#[derive(Clone, Copy, Debug)]
pub enum Repeat {
    /// So many.
    Times(u32),
    /// As many as are usual for the device.
    Default,
}

/// A result of attention.
pub struct Attention<E> {
    /// O, `[tokens, num_qo_heads, head_dim]`.
    pub o: Vec<E>,
    /// Log-sum-exp, natural logarithm, `[tokens, num_qo_heads]`.
    pub lse: Vec<f32>,
}

/// An element type of every backend.
pub trait BackendElement: Element + packinfer::Element {}

impl<E: Element + packinfer::Element> BackendElement for E {}

/// Where attention runs.
pub enum Backend {
    /// This machine's processor.
    Cpu(Cpu),
    /// A GPU.
    Cuda(Cuda),
}

impl Backend {
    /// Opens the device of choice. Where any will do and there is no GPU, one line on standard error says why it is the CPU.
    pub fn open(args: DeviceArgs) -> anyhow::Result<Self> {
        match args.device {
            DeviceChoice::Cpu => Ok(Self::Cpu(Cpu::new())),
            DeviceChoice::Cuda => Ok(Self::Cuda(Cuda::open(args.kernels)?)),
            DeviceChoice::Auto => Ok(Cuda::open(args.kernels).map(Self::Cuda).unwrap_or_else(|error| {
                let _ = writeln!(stderr(), "packinfer: using the CPU: {error:#}");
                Self::Cpu(Cpu::new())
            })),
        }
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        match self {
            Self::Cpu(cpu) => &cpu.name,
            Self::Cuda(cuda) => &cuda.name,
        }
    }

    /// The kernels that a plan runs with, on a GPU.
    pub fn kernels(&self, plan: &Plan) -> Option<KernelFamily> {
        match self {
            Self::Cpu(_) => None,
            Self::Cuda(_) => Some(plan.model().kernel_family),
        }
    }

    /// A planner for the device.
    pub fn planner(&self) -> Planner {
        match self {
            Self::Cpu(cpu) => Planner::new(cpu.model()),
            Self::Cuda(cuda) => cuda.planner(),
        }
    }

    /// Checks that the device has room for a batch, as far as that is not the memory of this machine.
    pub fn check_fits(&self, batch: &Batch) -> anyhow::Result<()> {
        match self {
            Self::Cpu(_) => Ok(()),
            Self::Cuda(cuda) => cuda.check_fits(batch),
        }
    }

    /// Measures what the device can do at best.
    pub fn ceilings(&mut self) -> anyhow::Result<Ceilings> {
        match self {
            Self::Cpu(cpu) => Ok(cpu.ceilings()),
            Self::Cuda(cuda) => cuda.ceilings(),
        }
    }

    /// Runs a plan once.
    pub fn attend<E: BackendElement>(&mut self, plan: &Plan, tensors: &Tensors<E>) -> anyhow::Result<Attention<E>> {
        match self {
            Self::Cpu(cpu) => cpu.attend(plan, tensors),
            Self::Cuda(cuda) => cuda.attend(plan, tensors),
        }
    }

    /// Times runs of each of some plans of one batch, from cold caches.
    pub fn time<E: BackendElement>(
        &mut self,
        plans: &[Plan],
        tensors: &Tensors<E>,
        repeat: Repeat,
    ) -> anyhow::Result<Vec<Vec<Duration>>> {
        match self {
            Self::Cpu(cpu) => plans.iter().map(|plan| cpu.time(plan, tensors, repeat)).collect(),
            Self::Cuda(cuda) => cuda.time(plans, tensors, repeat),
        }
    }

    /// Times launches of a CUDA graph of a plan's run, in the same way; not on the CPU.
    pub fn time_replays<E: BackendElement>(
        &mut self,
        plan: &Plan,
        tensors: &Tensors<E>,
        repeat: Repeat,
    ) -> anyhow::Result<Option<Vec<Duration>>> {
        match self {
            Self::Cpu(_) => Ok(None),
            Self::Cuda(cuda) => cuda.time_replays(plan, tensors, repeat).map(Some),
        }
    }
}

/// The device to plan for where nothing is run, and its name: the first GPU, or an H100 if there is none.
pub fn device_to_plan_for() -> (String, Planner) {
    match packinfer::devices().ok().and_then(|devices| devices.into_iter().next()) {
        Some(device) => {
            let planner = Planner::choosing(device.models());
            (device.name, planner)
        }
        None => {
            let models = DeviceModel::all_for_device("H100", (9, 0), DeviceModel::H100.num_sms);
            ("an H100, as there is no GPU here".into(), Planner::choosing(models))
        }
    }
}
