//! Packed attention on the CPU: the same plans that GPUs run, and the exact result to compare with.
//!
//! * [`execute()`] runs a plan work item by work item on rayon's threads, with float32 sums, as the kernels do.
//! * [`reference::attention`] computes float64 attention straight from the batch, for all query tokens or some.
//! * [`kv`] copies slots of KV pools, and appends tokens to them.
//! * [`relative_error`] says how far apart two results are; [`Element::TOLERANCE`] how far they may be.
//! * [`random_elements`] makes inputs.
//! * [`ceilings`] measures what the machine can do at best.
//!
//! Everything is generic over the [`Element`] type, `half::bf16` or `half::f16`, and over the [`KvElement`] type of K and V, the
//! same or `float8::F8E4M3`.
//!
//! ```
//! use half::bf16;
//! use packinfer_batch::{AttentionShape, Batch, DType, Mask};
//! use packinfer_cpu::{Element, Inputs, Options, Outputs, execute, random_elements, reference, relative_error};
//! use packinfer_planner::Planner;
//!
//! let mut batch = Batch::new(AttentionShape::new(8, 2, 64, DType::Bf16)?, Mask::Causal);
//! batch.push_contiguous(1, 100, 0)?; // a decode request
//! batch.push_contiguous(5, 5, 100)?; // a prompt
//!
//! let [q, k, v] = [(6 * 8, 1), (105 * 2, 2), (105 * 2, 3)].map(|(rows, seed)| random_elements::<bf16>(rows * 64, seed));
//! let inputs = Inputs { q: &q, k: &k, v: &v, options: Options::default() };
//! let mut o = vec![bf16::ZERO; q.len()];
//! execute(&Planner::default().plan(&batch)?, inputs, Outputs { o: &mut o, lse: None })?;
//!
//! let exact = reference::attention(&batch, inputs, &[0, 1, 2, 3, 4, 5])?;
//! assert!(relative_error(&o, &exact.o) <= bf16::TOLERANCE);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod buffers;
pub mod ceilings;
mod compare;
mod element;
mod error;
mod execute;
pub mod kv;
mod options;
mod random;
pub mod reference;
mod tile;

pub use buffers::{Inputs, Outputs};
pub use compare::{largest_difference, relative_error};
pub use element::{Element, KvElement, Number};
pub use error::CpuError;
pub use execute::execute;
pub use options::Options;
pub use random::random_elements;
