//! Batches to work on, and their Q, K and V.

use std::num::NonZeroU32;
use std::path::PathBuf;

use anyhow::Context;
use half::f16;
use packinfer_batch::{AttentionShape, Batch, BatchFile, DType, KvDType, KvPlacement, PageOrder, PagedLayout};
use packinfer_cpu::{Element, Inputs, KvElement, Options, random_elements};

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
    /// Reads batch files. With `matrix`, each file is read once for each pair of element type and head dimension and each option.
    pub fn read_all(paths: &[PathBuf], placement: KvPlacement, matrix: bool) -> anyhow::Result<Vec<Self>> {
        let mut cases = Vec::new();
        for path in paths {
            let stem = || path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let mut file = BatchFile::read(path)?;
            file.name.get_or_insert_with(stem);
            let files = if matrix { variants(&file) } else { vec![file] };
            for file in &files {
                let name = || format!("{}: {}", path.display(), file.name.as_deref().unwrap_or_default());
                cases.push(Self::of(file, placement).with_context(name)?);
            }
        }
        Ok(cases)
    }

    /// The batch that is built in.
    pub fn builtin(placement: KvPlacement) -> anyhow::Result<Self> {
        Self::of(&BatchFile::builtin(), placement)
    }

    fn of(file: &BatchFile, placement: KvPlacement) -> anyhow::Result<Self> {
        let BatchFile { logit_soft_cap, sinks, .. } = *file;
        let batch = file.to_batch_in(placement)?;
        Ok(Self { name: file.name.clone().unwrap_or_default(), batch, logit_soft_cap, sinks })
    }

    /// Random Q, K and V for the batch, if they and O fit into memory.
    pub fn tensors<E: Element, K: KvElement<E>>(&self, seed: u64) -> anyhow::Result<Tensors<E, K>> {
        let shape = self.batch.shape();
        memory::check("Q, K, V and O take", self.batch.tensor_bytes())?;
        let qo_elements = u64::from(self.batch.num_query_tokens()) * shape.qo_elements_per_token();
        let kv_elements = self.batch.kv_elements();
        let [q, k, v] = [qo_elements, kv_elements, kv_elements];
        let PerHead { sinks, k_scales, v_scales } = self.per_head(seed);
        let [q_seed, k_seed, v_seed, _] = seeds(seed);
        Ok(Tensors {
            q: random_elements(q.try_into()?, q_seed),
            k: random_elements(k.try_into()?, k_seed),
            v: random_elements(v.try_into()?, v_seed),
            sinks,
            k_scales,
            v_scales,
            logit_soft_cap: self.logit_soft_cap,
        })
    }

    /// Sinks and scales, if the case has any.
    pub fn per_head(&self, seed: u64) -> PerHead {
        let shape = self.batch.shape();
        let [.., sink_seed] = seeds(seed);
        let sinks = self.sinks.then(|| random_elements::<f16>(shape.num_qo_heads() as usize, sink_seed));
        let scales = || (shape.kv_dtype() == KvDType::E4m3).then(|| scales(shape.num_kv_heads()));
        PerHead {
            sinks: sinks.map(|sinks| sinks.iter().map(|&sink| SINK_SPREAD * f32::from(sink)).collect()),
            k_scales: scales(),
            v_scales: scales(),
        }
    }
}

/// Seeds of Q, K, V and sinks: each has one of its own, so that none repeats another.
pub fn seeds(seed: u64) -> [u64; 4] {
    [0, 1, 2, 3].map(|tensor| seed.wrapping_mul(4).wrapping_add(tensor))
}

/// What there is one of for each head.
pub struct PerHead {
    pub sinks: Option<Vec<f32>>,
    pub k_scales: Option<Vec<f32>>,
    pub v_scales: Option<Vec<f32>>,
}

/// Scales of FP8, another for each head.
fn scales(num_kv_heads: u32) -> Vec<f32> {
    (0..num_kv_heads).map(|head| 0.5 + head as f32 / num_kv_heads as f32).collect()
}

/// A batch file in all element types and head dimensions, and with each of the options. Windows are left out where causal masks,
/// which they need, are not possible.
fn variants(file: &BatchFile) -> Vec<BatchFile> {
    /// Shorter than most requests, and no multiple of a step of columns.
    const WINDOW: u32 = 100;
    /// As where each page of K is followed by one of V.
    const PAGE_STRIDE: NonZeroU32 = NonZeroU32::new(2).unwrap();
    let can_be_causal = file.requests.iter().all(|request| request.query_len <= request.kv_len);
    let mut files = Vec::new();
    for dtype in [DType::Bf16, DType::F16] {
        for head_dim in AttentionShape::HEAD_DIMS {
            let name = file.name.as_deref().unwrap_or_default();
            let plain =
                |option| BatchFile { name: Some(format!("{name} d{head_dim} {option}")), dtype, head_dim, ..file.clone() };
            files.push(plain("as it is"));
            let with_window = |file| BatchFile { causal: true, window: NonZeroU32::new(WINDOW), ..file };
            files.extend(can_be_causal.then(|| with_window(plain("window"))));
            files.push(BatchFile { logit_soft_cap: Some(2.0), ..plain("soft-cap") });
            files.push(BatchFile { sinks: true, ..plain("sinks") });
            files.push(BatchFile { kv_dtype: KvDType::E4m3, ..plain("FP8 KV") });
            if file.page_size.is_multiple_of(PagedLayout::SIZE_MULTIPLE) {
                files.push(BatchFile { page_order: PageOrder::Hnd, page_stride: PAGE_STRIDE, ..plain("HND pages") });
            }
            let all = BatchFile { logit_soft_cap: Some(2.0), sinks: true, kv_dtype: KvDType::E4m3, ..plain("all options") };
            files.push(if can_be_causal { with_window(all) } else { all });
        }
    }
    files
}

/// Standard deviation of sinks: some weigh as much as a request of thousands of tokens, some next to nothing.
const SINK_SPREAD: f32 = 5.0;

/// Q, K and V of a batch, and how attention is computed from them.
pub struct Tensors<E, K = E> {
    pub q: Vec<E>,
    pub k: Vec<K>,
    pub v: Vec<K>,
    pub sinks: Option<Vec<f32>>,
    pub k_scales: Option<Vec<f32>>,
    pub v_scales: Option<Vec<f32>>,
    pub logit_soft_cap: Option<f32>,
}

impl<E, K> Tensors<E, K> {
    /// The tensors, with the default softmax scale.
    pub fn inputs(&self) -> Inputs<'_, E, K> {
        let options = Options {
            scale: None,
            logit_soft_cap: self.logit_soft_cap,
            sinks: self.sinks.as_deref(),
            k_scales: self.k_scales.as_deref(),
            v_scales: self.v_scales.as_deref(),
        };
        Inputs { q: &self.q, k: &self.k, v: &self.v, options }
    }
}
