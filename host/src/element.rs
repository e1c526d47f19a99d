//! Element types of Q, K, V and O.

use bytemuck::Pod;
use half::{bf16, f16};
use packinfer_batch::DType;

/// An element type that there are kernels for: [`bf16`] or [`struct@f16`].
pub trait Element: sealed::Sealed + Pod + Send + Sync {
    /// Its name in shapes.
    const DTYPE: DType;
}

impl Element for bf16 {
    const DTYPE: DType = DType::Bf16;
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for half::bf16 {}
    impl Sealed for half::f16 {}
}
