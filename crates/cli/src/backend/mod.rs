//! Where attention runs: the CPU or a GPU, with the same few things to ask of either.

mod cpu;
mod cuda;

use std::io::{Write, stderr};
use std::time::Duration;

use anyhow::bail;
use packinfer::EngineError;
use packinfer_batch::Batch;
use packinfer_cpu::{Element, KvElement};
use packinfer_planner::{Calibration, DeviceModel, KernelFamily, Plan, Planner};
use serde::Serialize;

use crate::args::{DeviceArgs, DeviceChoice};
use crate::case::{Case, Tensors};
use cpu::Cpu;
pub use cpu::processor_and_threads;
pub use cuda::{Cuda, DeviceTensors, StampedCall, random};

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

/// How long runs took.
pub struct Times {
    /// Those of each plan.
    pub plans: Vec<Vec<Duration>>,
    /// Launches of a CUDA graph of the first plan's run, in the same way; not on the CPU.
    pub replays: Option<Vec<Duration>>,
}

/// A result of attention.
pub struct Attention<E> {
    /// O, `[tokens, num_qo_heads, head_dim]`.
    pub o: Vec<E>,
    /// The same of a run that was asked for no log-sum-exps, where that may take another way.
    pub o_alone: Option<Vec<E>>,
    /// Log-sum-exp, natural logarithm, `[tokens, num_qo_heads]`.
    pub lse: Vec<f32>,
}

/// An element type of every backend.
pub trait BackendElement: Element + packinfer::Element {}

impl<E: Element + packinfer::Element> BackendElement for E {}

/// A type of K and V of every backend.
pub trait BackendKv<E: BackendElement>: KvElement<E> + packinfer::KvElement<E> {}

impl<E: BackendElement, K: KvElement<E> + packinfer::KvElement<E>> BackendKv<E> for K {}

/// Where attention runs.
pub enum Backend {
    /// This machine's processor.
    Cpu(Cpu),
    /// A GPU.
    Cuda(Box<Cuda>),
}

impl Backend {
    /// Opens the device of choice. Where any will do and there is no GPU, one line on standard error says why it is the CPU.
    pub fn open(args: &DeviceArgs) -> anyhow::Result<Self> {
        let calibration = args.calibration.as_ref().map(Calibration::read).transpose()?;
        let cpu = || -> anyhow::Result<Self> {
            let models = calibration.as_ref().map_or_else(h100, |calibration| calibration.models.clone());
            Ok(Self::Cpu(Cpu::new(of_family(models, args.kernels)?)))
        };
        let cuda = || Cuda::open(args.kernels, calibration.as_ref()).map(|cuda| Self::Cuda(Box::new(cuda)));
        match args.device {
            DeviceChoice::Cpu => cpu(),
            DeviceChoice::Cuda => cuda(),
            DeviceChoice::Auto => cuda().or_else(|error| {
                // A calibration of another device is not to be passed over.
                if matches!(error.downcast_ref(), Some(EngineError::Calibration(_) | EngineError::NotCalibrated { .. })) {
                    return Err(error);
                }
                let _ = writeln!(stderr(), "packinfer: using the CPU: {error:#}");
                cpu()
            }),
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
            Self::Cpu(cpu) => cpu.planner(),
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
    pub fn attend<E: BackendElement, K: BackendKv<E>>(
        &mut self,
        plan: &Plan,
        tensors: &Tensors<E, K>,
    ) -> anyhow::Result<Attention<E>> {
        match self {
            Self::Cpu(cpu) => cpu.attend(plan, tensors),
            Self::Cuda(cuda) => cuda.attend(plan, tensors),
        }
    }

    /// Times runs of each of some plans of a case's batch, from cold caches, on random numbers.
    pub fn time<E: BackendElement, K: BackendKv<E>>(
        &mut self,
        plans: &[Plan],
        case: &Case,
        seed: u64,
        repeat: Repeat,
    ) -> anyhow::Result<Times> {
        match self {
            Self::Cpu(cpu) => {
                let tensors = case.tensors::<E, K>(seed)?;
                let times = plans.iter().map(|plan| cpu.time(plan, &tensors, repeat));
                Ok(Times { plans: times.collect::<Result<_, _>>()?, replays: None })
            }
            Self::Cuda(cuda) => cuda.time::<E, K>(plans, case, seed, repeat),
        }
    }
}

/// The device to plan for where nothing is run, and its planner: that of a calibration, or the first GPU, or an H100 if there is
/// none.
pub fn device_to_plan_for(args: &DeviceArgs) -> anyhow::Result<(String, Planner)> {
    let (name, models) = if let Some(path) = &args.calibration {
        let Calibration { device, models, .. } = Calibration::read(path)?;
        (device, models)
    } else {
        let devices = match args.device {
            DeviceChoice::Cpu => Vec::new(),
            DeviceChoice::Cuda => packinfer::devices()?,
            DeviceChoice::Auto => packinfer::devices().unwrap_or_default(),
        };
        match devices.into_iter().next() {
            Some(device) => (device.name.clone(), device.models()),
            None => ("an H100, as there is no GPU here".into(), h100()),
        }
    };
    Ok((name, Planner::choosing(of_family(models, args.kernels)?)))
}

/// What there is to plan by without a GPU.
fn h100() -> Vec<DeviceModel> {
    DeviceModel::all_for_device("H100", (9, 0), DeviceModel::H100.num_sms)
}

/// Those of the models that are of a family, if one is asked for.
fn of_family(mut models: Vec<DeviceModel>, family: Option<KernelFamily>) -> anyhow::Result<Vec<DeviceModel>> {
    if let Some(family) = family {
        models.retain(|model| model.kernel_family == family);
        if models.is_empty() {
            bail!("there is no model of the {family} kernels to plan by");
        }
    }
    Ok(models)
}
