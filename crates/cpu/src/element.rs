//! Element types of Q, K, V and O.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use packinfer_batch::DType;

/// An element type that attention is computed for: [`struct@bf16`] or [`struct@f16`].
pub trait Element: sealed::Sealed + Copy + Default + Send + Sync + Into<f32> + Into<f64> + 'static {
    /// Its name in shapes.
    const DTYPE: DType;
    /// Largest relative error, in norm, that O may have against exact attention on the same inputs: what rounding the
    /// probabilities and O to this type can cause, with a margin.
    const TOLERANCE: f64;

    /// The nearest element.
    fn from_f32(value: f32) -> Self;

    /// Converts elements. The lengths are equal.
    fn widen(elements: &[Self], to: &mut [f32]);
}

impl Element for bf16 {
    const DTYPE: DType = DType::Bf16;
    const TOLERANCE: f64 = 1e-2;

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }

    #[inline(always)]
    fn widen(elements: &[Self], to: &mut [f32]) {
        // bfloat16 is the upper half of float32. `half` quiets NaNs one by one, which is several times slower.
        for (element, to) in elements.iter().zip(to) {
            *to = f32::from_bits(u32::from(element.to_bits()) << 16);
        }
    }
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;
    const TOLERANCE: f64 = 2e-3;

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }

    #[inline(always)]
    fn widen(elements: &[Self], to: &mut [f32]) {
        elements.convert_to_f32_slice(to);
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for half::bf16 {}
    impl Sealed for half::f16 {}
}
