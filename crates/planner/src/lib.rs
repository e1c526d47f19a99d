//! Packs the requests of a step into load-balanced work items.
//!
//! A [`Planner`] turns a [`Batch`](packinfer_batch::Batch) into a [`Plan`]: flat arrays that go to the device as they are, and
//! serve all layers of the step. What work items cost is told by a [`DeviceModel`]; [`Plan::explain`] tells what it expects of
//! the whole plan.
//!
//! ```text
//! requests ──▸ groups ──▸ tiles ──▸ work items ──▸ order
//!              share      pack      split          by KV, the longest first
//! ```
//!
//! 1. KV slots that several requests begin with, at any number of levels, are read once for all of them, where that is faster.
//!    Groups of requests have tiles over the slots that they share; what is left of each request's KV is read by itself.
//! 2. Query tokens are put into tiles. What remains of a prompt behind its full tiles shares a tile with what remains of others,
//!    where that is faster.
//! 3. Tiles that would keep a multiprocessor busy after all others are done are split along their columns. The partial results of
//!    a query token, of all tiles that it is in, are merged.
//! 4. Items that read the same KV stand together, the longest first, so that the device balances itself. For persistent blocks,
//!    items that memory limits stand behind those that products limit, and some blocks begin with them.
//!
//! Where K and V are in FP8, and so many rows read them that it is faster to make them what Q is once, before attention, the plan
//! says so ([`Plan::widening`]), and all of this is done for what they are made. Where that is so of wide tiles alone, their
//! items have other runs afterwards ([`Plan::wide_tile_widening`]).
//!
//! A planner may know a device by several models, one for each family of kernels that it can run: it then plans each batch for
//! the family that suits it.
//!
//! ```
//! use packinfer_batch::{AttentionShape, Batch, DType, Mask};
//! use packinfer_planner::{DeviceModel, Planner};
//!
//! let mut batch = Batch::new(AttentionShape::new(32, 8, 128, DType::Bf16)?, Mask::Causal);
//! batch.push_contiguous(1, 131_072, 0)?; // a decode request with a long context
//! batch.push_contiguous(100, 100, 131_072)?; // and a short prompt
//!
//! let mut planner = Planner::new(DeviceModel::H100);
//! let plan = planner.plan(&batch)?;
//! let explanation = plan.explain(plan.model());
//! assert_eq!(explanation.merge_tokens, 1); // the decode request's columns are split
//! assert_eq!(explanation.wide_tiles, 3); // 32 tokens of 4 query heads fill one
//! assert_eq!(explanation.narrow_tiles, 2); // the prompt's last 4 tokens, and the decode request
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod append;
mod calibration;
mod compare;
mod cost;
mod device;
mod error;
mod explain;
mod family;
mod fit;
mod items;
mod lanes;
mod least_squares;
mod order;
mod pack;
mod plan;
mod planner;
mod prefix;
mod queues;
mod reuse;
mod schedule;
mod share;
mod split;
mod tile;
mod widen;

pub use append::{AppendError, Headroom};
pub use calibration::{Calibration, CalibrationError};
pub use compare::{Comparison, ItemError, KindError};
pub use cost::ItemWork;
pub use device::{BesideTimes, DeviceModel, Fp8Times, TileTimes};
pub use error::PlanError;
pub use explain::Explanation;
pub use family::KernelFamily;
pub use fit::{BatchError, Fit, ItemTime, Measurement, fit};
pub use plan::{KvTensors, Plan};
pub use planner::{NarrowItems, Packing, Planner};
pub use schedule::{Schedule, ScheduleSummary, SmLoad, StampError, TaskTime};
pub use widen::{WideTileWidening, Widening};
