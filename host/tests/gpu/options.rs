//! What attention can be asked for besides the plain softmax of all scores.

use half::{bf16, f16};
use packinfer::{EngineError, Mask, Packing};

use crate::case::{Case, Element, contiguous, engine, paged, shape};
use crate::{DECODE, MIXED, PREFILL, head_dims};

#[test]
fn sliding_windows() {
    let Some(engine) = engine() else { return };
    for tokens in [1, 16, 64, 100, 1000, u32::MAX] {
        let window = Mask::Window(tokens.try_into().expect("not zero"));
        for packing in [Packing::Packed, Packing::PerRequest] {
            for lengths in [&MIXED[..], &PREFILL, &DECODE] {
                let case = Case::<bf16>::new(paged(shape::<bf16>(4, 128), window, lengths, 16));
                case.check(&case.run(engine, packing));
                let case = Case::<f16>::new(contiguous(shape::<f16>(7, 64), window, lengths));
                case.check(&case.run(engine, packing));
            }
        }
    }
}

/// A case with or without a soft-cap and sinks, of which some outweigh all scores and some none.
fn with_logits<E: Element>(head_dim: u32, lengths: &[(u32, u32)], soft_cap: Option<f32>, sinks: bool) -> Case<E> {
    let shape = shape::<E>(4, head_dim);
    let mut case = Case::<E>::new(paged(shape, Mask::Causal, lengths, 16));
    case.logit_soft_cap = soft_cap;
    case.sinks = sinks.then(|| (0..shape.num_qo_heads()).map(|head| 3.0 * head as f32 - 9.0).collect());
    case
}

/// All pairs.
fn iproduct<A: Copy, B: Copy>(a: &[A], b: &[B]) -> Vec<(A, B)> {
    a.iter().flat_map(|&a| b.iter().map(move |&b| (a, b))).collect()
}

/// Whether the engine has kernels for a soft-cap.
fn has_soft_cap(engine: &packinfer::Engine) -> bool {
    engine.kernel_families().iter().any(|family| family.has_soft_cap())
}

#[test]
fn soft_caps_and_sinks() {
    let Some(engine) = engine() else { return };
    for (soft_cap, sinks) in [(Some(30.0), false), (Some(0.5), false), (None, true), (Some(2.0), true)] {
        if soft_cap.is_some() && !has_soft_cap(engine) {
            continue;
        }
        for packing in [Packing::Packed, Packing::PerRequest] {
            for (lengths, head_dim) in iproduct(&[&MIXED[..], &PREFILL, &DECODE], &head_dims(engine)) {
                let case = with_logits::<bf16>(head_dim, lengths, soft_cap, sinks);
                case.check(&case.run(engine, packing));
                let case = with_logits::<f16>(head_dim, lengths, soft_cap, sinks);
                case.check(&case.run(engine, packing));
            }
        }
    }
}

#[test]
fn kernels_without_a_soft_cap_say_so() {
    let Some(engine) = engine() else { return };
    if has_soft_cap(engine) {
        return;
    }
    let case = with_logits::<bf16>(128, &MIXED, Some(30.0), false);
    let stream = engine.stream().expect("a stream");
    let plan = engine.upload(&case.plan(engine, Packing::Packed), &stream).expect("the plan fits");
    let mut workspace = engine.workspace().expect("there is room");
    let error = case.on_device(engine).run(engine, &plan, &mut workspace, &stream).expect_err("no such kernel");
    assert!(matches!(error, EngineError::NoSoftCap { .. }), "{error}");
}

#[test]
fn sinks_of_another_length_are_an_error() {
    let Some(engine) = engine() else { return };
    let mut case = with_logits::<bf16>(128, &PREFILL, None, true);
    case.sinks = Some(vec![0.0; 7]);
    let stream = engine.stream().expect("a stream");
    let plan = engine.upload(&case.plan(engine, Packing::Packed), &stream).expect("the plan fits");
    let mut workspace = engine.workspace().expect("there is room");
    let error = case.on_device(engine).run(engine, &plan, &mut workspace, &stream).expect_err("too few sinks");
    assert!(matches!(error, EngineError::TensorLength { tensor: "sinks", found: 7, needed: 8, .. }), "{error}");
}
