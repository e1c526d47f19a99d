//! What can keep a batch from being planned.

use packinfer_batch::KvDType;

use crate::KernelFamily;

/// A batch that cannot be planned.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum PlanError {
    /// An array of the plan would be longer than its indices can say.
    #[error("the plan needs {count} {what}, but at most {most} can be numbered: divide the batch among several calls")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// How much the plan needs.
        count: u64,
        /// The limit.
        most: u64,
    },
    /// No kernels for batches of this shape among those that are to be used.
    #[error(
        "the {family} kernels have no head dimension {head_dim} with K and V in type \"{kv_dtype}\": those of sm_80 have, on every device"
    )]
    NotSupported {
        /// The kernels that are to be used.
        family: KernelFamily,
        /// The head dimension.
        head_dim: u32,
        /// Element type of K and V.
        kv_dtype: KvDType,
    },
}
