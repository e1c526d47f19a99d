//! Packed attention for batched LLM inference on NVIDIA GPUs: plan once a step, run once a layer.
//!
//! * [`Batch`] says what is to be computed: requests with their query tokens, and where their KV lies.
//! * [`Planner`] turns it into a [`Plan`], and [`Engine::upload`] that into a [`DevicePlan`].
//! * [`Engine::run`] computes one layer: it takes the plan, the layer's [`Tensors`] and a [`Workspace`] for partial results, and
//!   gives its launches to a [`Stream`]. A plan may run on several streams at a time.
//! * [`measure`] times that, and says what the device could do at best.
//!
//! The program needs no CUDA to be built and no driver to start: [`Engine::new`] looks for one and says what is missing.
//!
//! ```no_run
//! use half::bf16;
//! use packinfer::{AttentionShape, Batch, DType, Engine, EngineOptions, Mask, RunOptions, Tensors};
//!
//! let shape = AttentionShape::new(32, 8, 128, DType::Bf16)?;
//! let mut batch = Batch::new(shape, Mask::Causal);
//! batch.push_contiguous(1, 4096, 0)?; // a decode request: one query token, its KV in slots 0..4096
//! batch.push_contiguous(512, 512, 4096)?; // a prompt
//!
//! let engine = Engine::new(EngineOptions::default())?;
//! let stream = engine.stream()?;
//! let mut planner = engine.planner();
//! let plan = planner.plan(&batch)?;
//! let device_plan = engine.upload(&plan, &stream)?;
//!
//! let qo_len = batch.num_query_tokens() as usize * shape.qo_elements_per_token() as usize;
//! let kv_len = batch.num_slots() as usize * shape.kv_elements_per_slot() as usize;
//! let (k, v) = (engine.zeros::<bf16>(kv_len)?, engine.zeros::<bf16>(kv_len)?);
//! let q = engine.copy_of(&vec![bf16::ONE; qo_len])?;
//! let mut o = engine.zeros(qo_len)?;
//! let mut workspace = engine.workspace()?;
//! let tensors = Tensors { q: q.as_slice(), k: k.as_slice(), v: v.as_slice(), o: o.as_mut_slice(), lse: None };
//! engine.run(&device_plan, &mut workspace, &stream, tensors, RunOptions::default())?; // does not wait for the device
//! let o: Vec<bf16> = o.download()?; // does
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Tensors that other libraries allocated are passed through [`DeviceSlice::from_raw`], their streams through
//! [`Engine::foreign_stream`].

mod context;
mod device;
mod device_plan;
mod element;
mod engine;
mod entry_point;
mod error;
mod graph;
mod kernels;
mod kv_maps;
pub mod measure;
mod memory;
mod overlap;
mod run;
mod stamps;
mod stream;
mod workspace;

pub use device::{DeviceInfo, devices, driver_version};
pub use device_plan::DevicePlan;
pub use element::{Element, KvElement};
pub use engine::{Engine, EngineOptions};
pub use error::EngineError;
pub use graph::Graph;
pub use memory::{DeviceBuffer, DeviceSlice, DeviceSliceMut};
pub use packinfer_batch::{AttentionShape, Batch, BatchError, DType, KvDType, KvRun, Mask, Request};
pub use packinfer_planner::{
    AppendError, Calibration, CalibrationError, DeviceModel, Explanation, Headroom, KernelFamily, Packing, Plan, PlanError,
    Planner,
};
pub use run::{RunOptions, Tensors};
pub use stamps::Stamps;
pub use stream::Stream;
pub use workspace::Workspace;
