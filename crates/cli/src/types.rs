//! From the element types that a batch names to those of Rust.

/// Calls a function that is generic over the element type of Q and O and over that of K and V with the types of a shape.
macro_rules! with_types {
    ($shape:expr, $function:ident($($argument:expr),* $(,)?)) => {{
        use packinfer_batch::{DType, KvDType};
        match ($shape.dtype(), $shape.kv_dtype()) {
            (DType::Bf16, KvDType::Same) => $function::<half::bf16, half::bf16>($($argument),*),
            (DType::Bf16, KvDType::E4m3) => $function::<half::bf16, float8::F8E4M3>($($argument),*),
            (DType::F16, KvDType::Same) => $function::<half::f16, half::f16>($($argument),*),
            (DType::F16, KvDType::E4m3) => $function::<half::f16, float8::F8E4M3>($($argument),*),
        }
    }};
}

pub(crate) use with_types;
