//! What can be wrong with a call.

use packinfer_batch::{DType, KvDType, RopeError};

/// Buffers or options that do not fit the plan or the batch.
#[derive(Debug, thiserror::Error, PartialEq)]
#[non_exhaustive]
pub enum CpuError {
    /// A buffer of another length than the plan needs.
    #[error("{buffer} has {found} elements, but {shape} needs {needed}")]
    Length {
        /// Which one.
        buffer: &'static str,
        /// What is counted, dimension by dimension.
        shape: &'static str,
        /// Its elements.
        found: usize,
        /// The elements that it should have.
        needed: u64,
    },
    /// K or V holds fewer slots than the plan refers to.
    #[error("{buffer} has {found} elements, but slots up to {num_slots} are read, which is {needed} elements")]
    PoolTooSmall {
        /// Which one.
        buffer: &'static str,
        /// Its elements.
        found: usize,
        /// Slots that it should have at least.
        num_slots: u32,
        /// The elements that it should have at least.
        needed: u64,
    },
    /// Buffers of another element type.
    #[error("the buffers hold {found}, but the shape says {needed}")]
    DType {
        /// Type of the buffers.
        found: DType,
        /// Type of the shape.
        needed: DType,
    },
    /// K and V of another element type.
    #[error("K and V are of type \"{found}\", but the shape says \"{needed}\"")]
    KvDType {
        /// Type of the buffers.
        found: KvDType,
        /// Type of the shape.
        needed: KvDType,
    },
    /// A softmax scale or a soft-cap that is no positive number.
    #[error("{what} {value}: it must be finite and greater than 0")]
    NotPositive {
        /// Which of them.
        what: &'static str,
        /// What it is.
        value: f32,
    },
    /// A head dimension that this crate is not built for.
    #[error("head dimension {head_dim}: 64, 96, 128 and 256 are supported")]
    HeadDim {
        /// The head dimension.
        head_dim: u32,
    },
    /// A slot that the pool does not have.
    #[error("slot {slot} is asked for, but the pool has {num_slots}")]
    NoSuchSlot {
        /// The slot.
        slot: u64,
        /// Slots of the pool.
        num_slots: u64,
    },
    /// RoPE that cannot be done.
    #[error(transparent)]
    Rope(#[from] RopeError),
    /// A query token that the batch does not have.
    #[error("query token {token} is asked for, but the batch has {num_query_tokens}")]
    NoSuchToken {
        /// Index of the token.
        token: u32,
        /// Query tokens of the batch.
        num_query_tokens: u32,
    },
}
