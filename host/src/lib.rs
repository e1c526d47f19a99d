//! Packed attention for batched LLM inference on NVIDIA GPUs: plan once a step, run once a layer.
//!
//! * [`Batch`] says what is to be computed: requests with their query tokens, and where their KV lies.
//! * [`Planner`] turns it into a [`Plan`], and [`Engine::upload`] that into a [`DevicePlan`].
//! * [`Engine::run`] computes one layer: it takes the plan, the layer's [`Tensors`] and a [`Workspace`] for partial results, and
//!   gives its launches to a [`Stream`]. A plan may run on several streams at a time.
//! * [`KvArena`] holds K and V of all layers; [`Engine::kv_append`] writes new tokens to it, [`Engine::kv_move`] copies slots. A
//!   [`SlotPool`] hands the slots out, a [`PrefixTree`] finds those of shared prefixes, a [`Policy`] says how requests are laid
//!   out, and a [`KvMover`] moves them beside the steps.
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
//!
//! # The KV pool of another engine
//!
//! A batch whose pages another engine has laid out is made with its [`KvLayout`], and its block tables as they are. Nothing is
//! copied:
//!
//! ```no_run
//! use half::bf16;
//! use packinfer::{AttentionShape, Batch, DType, DeviceSlice, Mask, PageOrder, PagedLayout};
//!
//! # let (pool_address, num_pages) = (0, 0);
//! let shape = AttentionShape::new(32, 8, 128, DType::Bf16)?;
//! // One tensor, [pages, 2, num_kv_heads, page_size, head_dim]: a page of K, a page of V, and so on.
//! let pages = PagedLayout::new(16, PageOrder::Hnd)?.with_stride(2.try_into()?);
//! let mut batch = Batch::in_layout(shape, Mask::Causal, pages.into())?;
//! batch.push_paged(1, 40, &[7, 3, 12], 16)?; // query tokens, KV tokens, block table
//!
//! let page_elements = pages.page_elements(shape) as usize;
//! // SAFETY: the pool is there until the device has read it.
//! let k = unsafe { DeviceSlice::<bf16>::from_raw(pool_address, num_pages * 2 * page_elements) };
//! let v = k.skip(page_elements); // V begins a page after K
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Plans are made and run as ever: a plan knows its batch's layout. [`PagedLayout`] says how to describe other tensors.

mod context;
mod device;
mod device_plan;
mod element;
mod engine;
mod entry_point;
mod error;
mod graph;
mod kernels;
mod kv;
pub mod measure;
mod memory;
mod overlap;
mod run;
mod stamps;
mod stream;
mod tensor_maps;
mod upload;
mod workspace;

pub use device::{DeviceInfo, devices, driver_version};
pub use device_plan::DevicePlan;
pub use element::{Element, KvElement};
pub use engine::{Engine, EngineOptions};
pub use error::EngineError;
pub use graph::Graph;
pub use kv::{AppendSlots, DeviceRope, KvAppend, KvArena, KvMemoryError, KvMover, SlotCopies};
pub use memory::{DeviceBuffer, DeviceSlice, DeviceSliceMut};
pub use packinfer_batch::{
    AttentionShape, Batch, BatchError, DType, KvDType, KvLayout, KvRun, Mask, PageOrder, PagedLayout, Request, Rope, RopeError,
    RopeLayout,
};
pub use packinfer_kv::{
    Contiguous, Epoch, ExpectedTokens, GroupMember, GroupMove, GroupState, Growth, KvError, Policy, PrefixTree, Sequence,
    SequenceMove, SlotCopy, SlotPool, Trigger, balance_groups, imbalance,
};
pub use packinfer_planner::{
    AppendError, BesideTimes, Calibration, CalibrationError, DeviceModel, Explanation, Fp8Times, Headroom, KernelFamily,
    KvTensors, NarrowItems, Packing, Plan, PlanError, Planner, TileTimes, WideTileWidening, Widening,
};
pub use run::{RunOptions, Tensors};
pub use stamps::{RunStamps, Stamps};
pub use stream::Stream;
pub use workspace::Workspace;
