//! The CPU executor as a backend.

use std::fs;
use std::time::{Duration, Instant};

use packinfer_cpu::{Element, KvElement, Outputs, ceilings, execute};
use packinfer_planner::{DeviceModel, Plan, Planner};
use rayon::prelude::*;

use super::{Attention, Ceilings, Repeat};
use crate::case::Tensors;
use crate::memory;

/// Runs of a measurement, unless they take longer than [`PATIENCE`] together.
const USUAL_RUNS: u32 = 30;

/// How long a measurement goes on by default.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is written between runs to empty the caches: more than they hold.
const COLD_BYTES: usize = 256 << 20;

/// Bytes that a task writes.
const COLD_CHUNK: usize = 1 << 20;

/// The threads of this machine.
pub struct Cpu {
    pub name: String,
    /// The CPU runs the plans of a GPU: these are its models.
    models: Vec<DeviceModel>,
}

impl Cpu {
    /// This machine's processor, with the models to plan by.
    pub fn new(models: Vec<DeviceModel>) -> Self {
        Self { name: processor_and_threads(), models }
    }

    pub fn planner(&self) -> Planner {
        Planner::choosing(self.models.clone())
    }

    pub fn ceilings(&self) -> Ceilings {
        Ceilings { copy_bytes_per_s: ceilings::copy_bandwidth(), flops_per_s: ceilings::multiply_add_rate() }
    }

    pub fn attend<E: Element, K: KvElement<E>>(&self, plan: &Plan, tensors: &Tensors<E, K>) -> anyhow::Result<Attention<E>> {
        let shape = plan.shape();
        let partial_bytes =
            u64::from(plan.num_partial_rows()) * u64::from(plan.heads().num_groups) * 4 * u64::from(shape.head_dim() + 1);
        memory::check("partial results take", partial_bytes)?;
        let lse_len = plan.num_query_tokens() as usize * shape.num_qo_heads() as usize;
        let mut attention = Attention { o: vec![E::default(); tensors.q.len()], o_alone: None, lse: vec![0.0; lse_len] };
        execute(plan, tensors.inputs(), Outputs { o: &mut attention.o, lse: Some(&mut attention.lse) })?;
        Ok(attention)
    }

    /// Times runs of a plan from cold caches.
    pub fn time<E: Element, K: KvElement<E>>(
        &self,
        plan: &Plan,
        tensors: &Tensors<E, K>,
        repeat: Repeat,
    ) -> anyhow::Result<Vec<Duration>> {
        let (runs, patience) = match repeat {
            Repeat::Times(runs) => (runs, Duration::MAX),
            Repeat::Default => (USUAL_RUNS, PATIENCE),
        };
        let mut o = vec![E::default(); tensors.q.len()];
        let mut cold = vec![0u8; COLD_BYTES];
        let mut times = Vec::new();
        let first = Instant::now();
        while times.is_empty() || (times.len() < runs as usize && first.elapsed() < patience) {
            cold.par_chunks_mut(COLD_CHUNK).for_each(|bytes| bytes.fill(times.len() as u8));
            let start = Instant::now();
            execute(plan, tensors.inputs(), Outputs { o: &mut o, lse: None })?;
            times.push(start.elapsed());
        }
        Ok(times)
    }
}

/// The processor's name and how many threads are used.
pub fn processor_and_threads() -> String {
    let threads = rayon::current_num_threads();
    format!("{}, {threads} threads", processor().unwrap_or_else(|| "CPU".into()))
}

/// The processor's name, where the system says it.
fn processor() -> Option<String> {
    let info = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().into())
}
