//! Element types of Q, K, V and O.

use bytemuck::Pod;
use float8::F8E4M3;
use half::{bf16, f16};
use packinfer_batch::{DType, KvDType};

/// An element type that there are kernels for: [`bf16`] or [`struct@f16`].
pub trait Element: sealed::Sealed + Pod + Send + Sync {
    /// Its name in shapes.
    const DTYPE: DType;
}

/// A type of K and V, where Q and O are of type `E`: the same, or [`F8E4M3`].
pub trait KvElement<E: Element>: sealed::Sealed + Pod + Send + Sync {
    /// Its name in shapes.
    const KV_DTYPE: KvDType;
}

impl Element for bf16 {
    const DTYPE: DType = DType::Bf16;
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;
}

impl<E: Element> KvElement<E> for E {
    const KV_DTYPE: KvDType = KvDType::Same;
}

impl<E: Element> KvElement<E> for F8E4M3 {
    const KV_DTYPE: KvDType = KvDType::E4m3;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for half::bf16 {}
    impl Sealed for half::f16 {}
    impl Sealed for float8::F8E4M3 {}
}
