//! The engine on an NVIDIA GPU as a backend.

use std::cell::RefCell;
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use bytemuck::Pod;
use packinfer::{Calibration, DeviceBuffer, Engine, EngineError, EngineOptions, KernelFamily, RunOptions, Stream, measure};
use packinfer_abi::TaskStamp;
use packinfer_batch::Batch;
use packinfer_cpu::{Number, random_elements};
use packinfer_planner::{Plan, Planner, Schedule};

use super::{Attention, BackendElement, BackendKv, Ceilings, Repeat, Times};
use crate::case::{Case, Tensors, seeds};
use crate::units::gigabytes;

/// The least number of runs of a measurement, and the usual one.
const LEAST_RUNS: u32 = 30;

/// How long the device rests before runs are timed: at its power limit it slows down, and one batch is not to heat it for the
/// next. Other libraries' benchmarks have pauses of that length while they make their tensors.
const REST: Duration = Duration::from_millis(300);

/// A GPU.
pub struct Cuda {
    pub name: String,
    engine: Engine,
    stream: Stream,
    planner: Planner,
}

/// One call of a plan whose tasks were stamped.
pub struct StampedCall {
    /// Time of the whole call.
    pub call: Duration,
    pub schedule: Schedule,
    /// From the end of the last task to that of merging, if rows were merged in the same launch.
    pub merging: Option<Duration>,
}

impl Cuda {
    /// Opens the first GPU, with kernels of a family or those that suit it best.
    pub fn open(kernel_family: Option<KernelFamily>, calibration: Option<&Calibration>) -> anyhow::Result<Self> {
        let engine = Engine::new(EngineOptions { kernel_family, ..EngineOptions::default() })?;
        let families: Vec<_> = engine.kernel_families().iter().map(KernelFamily::to_string).collect();
        let name = format!("{}, {} kernels", engine.device().name, families.join(" and "));
        let planner = match calibration {
            Some(calibration) => engine.calibrated_planner(calibration)?,
            None => engine.planner(),
        };
        Ok(Self { name, stream: engine.stream()?, engine, planner })
    }

    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    pub fn planner(&self) -> Planner {
        self.planner.clone()
    }

    pub fn ceilings(&self) -> anyhow::Result<Ceilings> {
        let copy_bytes_per_s = measure::copy_bandwidth(&self.engine)?;
        Ok(Ceilings { copy_bytes_per_s, flops_per_s: measure::mma_rate(&self.engine)? })
    }

    /// Checks that the tensors of a batch fit on the device.
    pub fn check_fits(&self, batch: &Batch) -> anyhow::Result<()> {
        let (needed, device) = (batch.tensor_bytes(), self.engine.device());
        if needed > device.memory_bytes {
            let (needed, has) = (gigabytes(needed), gigabytes(device.memory_bytes));
            bail!("Q, K, V and O take {needed} GB of device memory, but {} has {has} GB", device.name);
        }
        Ok(())
    }

    pub fn attend<E: BackendElement, K: BackendKv<E>>(
        &self,
        plan: &Plan,
        tensors: &Tensors<E, K>,
    ) -> anyhow::Result<Attention<E>> {
        let mut tensors = DeviceTensors::upload(&self.engine, tensors)?;
        let lse_len = plan.num_query_tokens() as usize * plan.shape().num_qo_heads() as usize;
        let mut lse = self.engine.zeros(lse_len)?;
        let device_plan = self.engine.upload(plan, &self.stream)?;
        let mut workspace = self.engine.workspace()?;
        let (arguments, options) = tensors.arguments();
        self.engine.run(&device_plan, &mut workspace, &self.stream, arguments, options)?;
        let o_alone = Some(tensors.o.download()?);
        let (arguments, options) = tensors.arguments();
        let arguments = packinfer::Tensors { lse: Some(lse.as_mut_slice()), ..arguments };
        self.engine.run(&device_plan, &mut workspace, &self.stream, arguments, options)?;
        Ok(Attention { o: tensors.o.download()?, o_alone, lse: lse.download()? })
    }

    /// Times runs of each of some plans of a case's batch, and launches of a graph of the first plan's run, on random numbers.
    pub fn time<E: BackendElement, K: BackendKv<E>>(
        &self,
        plans: &[Plan],
        case: &Case,
        seed: u64,
        repeat: Repeat,
    ) -> anyhow::Result<Times> {
        let mut tensors = DeviceTensors::<E, K>::random(&self.engine, case, seed)?;
        let mut workspace = self.engine.workspace()?;
        let (mut times, mut replays) = (Vec::new(), None);
        for plan in plans {
            let device_plan = self.engine.upload(plan, &self.stream)?;
            workspace.reserve(&device_plan)?;
            let mut run = |stream: &Stream| {
                let (arguments, options) = tensors.arguments();
                self.engine.run(&device_plan, &mut workspace, stream, arguments, options)
            };
            thread::sleep(REST);
            times.push(measure::time_cold(&self.engine, &self.stream, runs(repeat), &mut run)?);
            if replays.is_none() {
                thread::sleep(REST);
                replays = Some(measure::time_cold_replays(&self.engine, &self.stream, runs(repeat), &mut run)?);
            }
        }
        Ok(Times { plans: times, replays })
    }

    /// Runs a plan `runs` times from a cold L2 cache, its tasks stamped, and returns the run that took the median time.
    pub fn stamp<E: BackendElement, K: BackendKv<E>>(
        &self,
        plan: &Plan,
        tensors: &mut DeviceTensors<E, K>,
        runs: usize,
    ) -> anyhow::Result<StampedCall> {
        let device_plan = self.engine.upload(plan, &self.stream)?;
        let mut workspace = self.engine.workspace()?;
        workspace.reserve(&device_plan)?;
        let stamps = RefCell::new(self.engine.stamps(&device_plan)?);
        let mut calls = Vec::with_capacity(runs);
        measure::time_cold_each(
            &self.engine,
            &self.stream,
            runs,
            |stream| {
                let (arguments, options) = tensors.arguments();
                self.engine.run_stamped(&device_plan, &mut workspace, stream, arguments, options, &mut stamps.borrow_mut())
            },
            |call| {
                calls.push((call, stamps.borrow().read()?));
                Ok(())
            },
        )?;
        calls.sort_unstable_by_key(|(call, _)| *call);
        let (call, stamps) = calls.into_iter().nth(runs / 2).context("nothing was measured")?;
        let last_end = |stamps: &[TaskStamp]| stamps.iter().map(|stamp| stamp.end_ns).max();
        let merging = last_end(&stamps.merges).zip(last_end(&stamps.tasks));
        Ok(StampedCall {
            call,
            schedule: Schedule::achieved(plan, plan.model(), &stamps.tasks)?,
            merging: merging.map(|(merged, done)| Duration::from_nanos(merged.saturating_sub(done))),
        })
    }
}

/// How many runs that is.
fn runs(repeat: Repeat) -> usize {
    let runs = match repeat {
        Repeat::Times(runs) => runs.max(LEAST_RUNS),
        Repeat::Default => LEAST_RUNS,
    };
    runs as usize
}

/// A tensor of random elements, which repeat themselves.
pub fn random<T: Number + Pod>(engine: &Engine, len: usize, seed: u64) -> Result<DeviceBuffer<T>, EngineError> {
    engine.repeating(&random_elements::<T>(len.min(RANDOM_ELEMENTS), seed), len)
}

/// Q, K, V, O, sinks and scales on the device.
pub struct DeviceTensors<E, K = E> {
    pub q: DeviceBuffer<E>,
    pub k: DeviceBuffer<K>,
    pub v: DeviceBuffer<K>,
    pub o: DeviceBuffer<E>,
    pub sinks: Option<DeviceBuffer<f32>>,
    pub k_scales: Option<DeviceBuffer<f32>>,
    pub v_scales: Option<DeviceBuffer<f32>>,
    pub logit_soft_cap: Option<f32>,
}

/// Random elements of a tensor that is only measured with, and repeats them.
const RANDOM_ELEMENTS: usize = 1 << 22;

impl<E: BackendElement, K: BackendKv<E>> DeviceTensors<E, K> {
    /// Random Q, K and V for a case, which repeat themselves: enough to measure with, as the values have no influence but on the
    /// power that products take.
    pub fn random(engine: &Engine, case: &Case, seed: u64) -> anyhow::Result<Self> {
        let (batch, shape) = (&case.batch, case.batch.shape());
        let qo_len = usize::try_from(u64::from(batch.num_query_tokens()) * shape.qo_elements_per_token())?;
        let kv_len = usize::try_from(batch.kv_elements())?;
        let per_head = case.per_head(seed);
        let [q_seed, k_seed, v_seed, _] = seeds(seed);
        let copy = |numbers: Option<Vec<f32>>| numbers.map(|numbers| engine.copy_of(&numbers)).transpose();
        Ok(Self {
            q: random(engine, qo_len, q_seed)?,
            k: random(engine, kv_len, k_seed)?,
            v: random(engine, kv_len, v_seed)?,
            o: engine.zeros(qo_len)?,
            sinks: copy(per_head.sinks)?,
            k_scales: copy(per_head.k_scales)?,
            v_scales: copy(per_head.v_scales)?,
            logit_soft_cap: case.logit_soft_cap,
        })
    }

    pub fn upload(engine: &Engine, tensors: &Tensors<E, K>) -> anyhow::Result<Self> {
        let Tensors { q, k, v, sinks, k_scales, v_scales, logit_soft_cap } = tensors;
        let per_head = |numbers: &Option<Vec<f32>>| numbers.as_ref().map(|numbers| engine.copy_of(numbers)).transpose();
        Ok(Self {
            q: engine.copy_of(q)?,
            k: engine.copy_of(k)?,
            v: engine.copy_of(v)?,
            o: engine.zeros(q.len())?,
            sinks: per_head(sinks)?,
            k_scales: per_head(k_scales)?,
            v_scales: per_head(v_scales)?,
            logit_soft_cap: *logit_soft_cap,
        })
    }

    fn arguments(&mut self) -> (packinfer::Tensors<'_, E, K>, RunOptions<'_>) {
        let Self { q, k, v, o, sinks, k_scales, v_scales, logit_soft_cap } = self;
        let [sinks, k_scales, v_scales] =
            [sinks, k_scales, v_scales].map(|per_head| per_head.as_ref().map(DeviceBuffer::as_slice));
        let options = RunOptions { softmax_scale: None, logit_soft_cap: *logit_soft_cap, sinks, k_scales, v_scales };
        (packinfer::Tensors { q: q.as_slice(), k: k.as_slice(), v: v.as_slice(), o: o.as_mut_slice(), lse: None }, options)
    }
}
