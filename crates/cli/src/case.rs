//! Batches to work on, and their Q, K and V.

use std::path::PathBuf;

use anyhow::Context;
use packinfer_batch::{Batch, BatchFile};
use packinfer_cpu::{Element, Inputs, random_elements};

use crate::memory;

/// A batch with a name.
pub struct Case {
    pub name: String,
    pub batch: Batch,
}

impl Case {
    /// Reads batch files. Their pages are in an order that `seed` says.
    pub fn read_all(paths: &[PathBuf], seed: u64) -> anyhow::Result<Vec<Self>> {
        let read = |path: &PathBuf| {
            let file = BatchFile::read(path)?;
            let batch = file.to_batch(seed).with_context(|| path.display().to_string())?;
            let stem = || path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            Ok(Self { name: file.name.unwrap_or_else(stem), batch })
        };
        paths.iter().map(read).collect()
    }

    /// The batch that is built in.
    pub fn builtin(seed: u64) -> anyhow::Result<Self> {
        let file = BatchFile::builtin();
        let batch = file.to_batch(seed)?;
        Ok(Self { name: file.name.unwrap_or_default(), batch })
    }

    /// Random Q, K and V for the batch, if they and O fit into memory.
    pub fn tensors<E: Element>(&self, seed: u64) -> anyhow::Result<Tensors<E>> {
        let shape = self.batch.shape();
        memory::check("Q, K, V and O take", self.batch.tensor_bytes())?;
        let qo_elements = u64::from(self.batch.num_query_tokens()) * shape.qo_elements_per_token();
        let kv_elements = u64::from(self.batch.num_slots()) * shape.kv_elements_per_slot();
        let [q, k, v] = [qo_elements, kv_elements, kv_elements];
        // Each tensor has a seed of its own, so that none repeats another.
        let seed = seed.wrapping_mul(3);
        Ok(Tensors {
            q: random_elements(q.try_into()?, seed),
            k: random_elements(k.try_into()?, seed.wrapping_add(1)),
            v: random_elements(v.try_into()?, seed.wrapping_add(2)),
        })
    }
}

/// Q, K and V of a batch.
pub struct Tensors<E> {
    pub q: Vec<E>,
    pub k: Vec<E>,
    pub v: Vec<E>,
}

impl<E> Tensors<E> {
    /// The tensors, with the default softmax scale.
    pub fn inputs(&self) -> Inputs<'_, E> {
        Inputs { q: &self.q, k: &self.k, v: &self.v, scale: None }
    }
}
