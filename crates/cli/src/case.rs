//! Batches to work on, and their Q, K and V.

use std::path::PathBuf;

use anyhow::Context;
use half::f16;
use packinfer_batch::{Batch, BatchFile};
use packinfer_cpu::{Element, Inputs, Options, random_elements};

use crate::memory;

/// A batch with a name, and what its file asks for besides.
pub struct Case {
    pub name: String,
    pub batch: Batch,
    pub logit_soft_cap: Option<f32>,
    /// Whether query heads have sinks.
    pub sinks: bool,
}

impl Case {
    /// Reads batch files. Their pages are in an order that `seed` says.
    pub fn read_all(paths: &[PathBuf], seed: u64) -> anyhow::Result<Vec<Self>> {
        let read = |path: &PathBuf| {
            let case = Self::of(&BatchFile::read(path)?, seed).with_context(|| path.display().to_string())?;
            let stem = || path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            Ok(Self { name: if case.name.is_empty() { stem() } else { case.name }, ..case })
        };
        paths.iter().map(read).collect()
    }

    /// The batch that is built in.
    pub fn builtin(seed: u64) -> anyhow::Result<Self> {
        Self::of(&BatchFile::builtin(), seed)
    }

    fn of(file: &BatchFile, seed: u64) -> anyhow::Result<Self> {
        let BatchFile { logit_soft_cap, sinks, .. } = *file;
        Ok(Self { name: file.name.clone().unwrap_or_default(), batch: file.to_batch(seed)?, logit_soft_cap, sinks })
    }

    /// Random Q, K and V for the batch, if they and O fit into memory.
    pub fn tensors<E: Element>(&self, seed: u64) -> anyhow::Result<Tensors<E>> {
        let shape = self.batch.shape();
        memory::check("Q, K, V and O take", self.batch.tensor_bytes())?;
        let qo_elements = u64::from(self.batch.num_query_tokens()) * shape.qo_elements_per_token();
        let kv_elements = u64::from(self.batch.num_slots()) * shape.kv_elements_per_slot();
        let [q, k, v] = [qo_elements, kv_elements, kv_elements];
        // Each tensor has a seed of its own, so that none repeats another.
        let seed = seed.wrapping_mul(4);
        let sinks = self.sinks.then(|| random_elements::<f16>(shape.num_qo_heads() as usize, seed.wrapping_add(3)));
        Ok(Tensors {
            q: random_elements(q.try_into()?, seed),
            k: random_elements(k.try_into()?, seed.wrapping_add(1)),
            v: random_elements(v.try_into()?, seed.wrapping_add(2)),
            sinks: sinks.map(|sinks| sinks.iter().map(|&sink| SINK_SPREAD * f32::from(sink)).collect()),
            logit_soft_cap: self.logit_soft_cap,
        })
    }
}

/// Standard deviation of sinks: some weigh as much as a request of thousands of tokens, some next to nothing.
const SINK_SPREAD: f32 = 5.0;

/// Q, K and V of a batch, and how attention is computed from them.
pub struct Tensors<E> {
    pub q: Vec<E>,
    pub k: Vec<E>,
    pub v: Vec<E>,
    pub sinks: Option<Vec<f32>>,
    pub logit_soft_cap: Option<f32>,
}

impl<E> Tensors<E> {
    /// The tensors, with the default softmax scale.
    pub fn inputs(&self) -> Inputs<'_, E> {
        let options = Options { scale: None, logit_soft_cap: self.logit_soft_cap, sinks: self.sinks.as_deref() };
        Inputs { q: &self.q, k: &self.k, v: &self.v, options }
    }
}
