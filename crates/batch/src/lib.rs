//! Attention batches: what one attention call of one layer works on.
//!
//! An [`AttentionShape`] says how many heads of which size and type there are. A [`Batch`] lists requests: how many query tokens
//! each brings, how many KV slots it sees, and where those slots lie, as [`KvRun`]s. Requests may name the same slots: that is
//! how a shared prefix looks here. A [`KvLayout`] says how the slots lie in memory, which may be that of another engine.
//! [`BatchFile`] reads a batch from JSON. [`Rope`] is how new keys are turned.
//!
//! ```
//! use packinfer_batch::{AttentionShape, Batch, DType, Mask};
//!
//! let shape = AttentionShape::new(32, 8, 128, DType::Bf16)?;
//! let mut batch = Batch::new(shape, Mask::Causal);
//! batch.push_contiguous(1, 4096, 0)?; // a decode request: one query token, its KV in slots 0..4096
//! batch.push_paged(100, 100, &[300, 298, 299, 256, 257, 258, 400], 16)?; // a prompt of 100 tokens in pages of 16 slots
//! assert_eq!(batch.num_query_tokens(), 101);
//! assert_eq!(batch.num_slots(), 400 * 16 + 4); // the last page holds 4 tokens
//! # Ok::<(), packinfer_batch::BatchError>(())
//! ```

mod batch;
mod builtin;
mod error;
mod file;
mod layout;
mod pages;
mod rope;
mod shape;

pub use batch::{Batch, Mask, Request};
pub use error::BatchError;
pub use file::{BatchFile, BatchFileError, RequestLengths};
pub use layout::{KvLayout, KvStrides, PageOrder, PagedLayout};
pub use packinfer_abi::KvRun;
pub use pages::KvPlacement;
pub use rope::{Rope, RopeError, RopeLayout};
pub use shape::{AttentionShape, DType, KvDType};
