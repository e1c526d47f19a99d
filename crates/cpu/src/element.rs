//! Element types of Q, K, V and O.

use float8::F8E4M3;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use packinfer_batch::{DType, KvDType};

/// A number that tensors are made of: [`struct@bf16`], [`struct@f16`] or [`F8E4M3`].
pub trait Number: sealed::Sealed + Copy + Default + Send + Sync + 'static {
    /// The nearest number of this type.
    fn from_f32(value: f32) -> Self;

    /// The same number.
    fn to_f64(self) -> f64;

    /// Converts numbers. The lengths are equal.
    fn widen(numbers: &[Self], to: &mut [f32]);
}

/// An element type that attention is computed for: [`struct@bf16`] or [`struct@f16`].
pub trait Element: Number + Into<f32> + Into<f64> {
    /// Its name in shapes.
    const DTYPE: DType;
    /// Largest relative error, in norm, that O may have against exact attention on the same inputs: what rounding the
    /// probabilities and O to this type can cause, with a margin.
    const TOLERANCE: f64;
}

/// A type of K and V, where Q and O are of type `E`: the same, or [`F8E4M3`].
pub trait KvElement<E: Element>: Number {
    /// Its name in shapes.
    const KV_DTYPE: KvDType;
}

impl<E: Element> KvElement<E> for E {
    const KV_DTYPE: KvDType = KvDType::Same;
}

impl<E: Element> KvElement<E> for F8E4M3 {
    const KV_DTYPE: KvDType = KvDType::E4m3;
}

impl Element for bf16 {
    const DTYPE: DType = DType::Bf16;
    const TOLERANCE: f64 = 1e-2;
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;
    const TOLERANCE: f64 = 2e-3;
}

impl Number for bf16 {
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }

    #[inline(always)]
    fn to_f64(self) -> f64 {
        self.into()
    }

    #[inline(always)]
    fn widen(numbers: &[Self], to: &mut [f32]) {
        // bfloat16 is the upper half of float32. `half` quiets NaNs one by one, which is several times slower.
        for (number, to) in numbers.iter().zip(to) {
            *to = f32::from_bits(u32::from(number.to_bits()) << 16);
        }
    }
}

impl Number for f16 {
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }

    #[inline(always)]
    fn to_f64(self) -> f64 {
        self.into()
    }

    #[inline(always)]
    fn widen(numbers: &[Self], to: &mut [f32]) {
        numbers.convert_to_f32_slice(to);
    }
}

impl Number for F8E4M3 {
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        F8E4M3::from_f32(value)
    }

    #[inline(always)]
    fn to_f64(self) -> f64 {
        F8E4M3::to_f64(&self)
    }

    #[inline(always)]
    fn widen(numbers: &[Self], to: &mut [f32]) {
        for (number, to) in numbers.iter().zip(to) {
            *to = number.to_f32();
        }
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for half::bf16 {}
    impl Sealed for half::f16 {}
    impl Sealed for float8::F8E4M3 {}
}
