//! What attention can be asked for besides the plain softmax of all scores.

use float8::F8E4M3;
use half::{bf16, f16};
use packinfer::{AttentionShape, EngineError, KvDType, Mask, Packing};

use crate::case::{Case, Element, contiguous, engine, paged, shape};
use crate::{DECODE, MIXED, PREFILL};

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

#[test]
fn soft_caps_and_sinks() {
    let Some(engine) = engine() else { return };
    for (soft_cap, sinks) in [(Some(30.0), false), (Some(0.5), false), (None, true), (Some(2.0), true)] {
        for packing in [Packing::Packed, Packing::PerRequest] {
            for (lengths, head_dim) in iproduct(&[&MIXED[..], &PREFILL, &DECODE], &AttentionShape::HEAD_DIMS) {
                let case = with_logits::<bf16>(head_dim, lengths, soft_cap, sinks);
                case.check(&case.run(engine, packing));
                let case = with_logits::<f16>(head_dim, lengths, soft_cap, sinks);
                case.check(&case.run(engine, packing));
            }
        }
    }
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

/// A case with K and V in FP8, each head with scales of its own.
fn in_fp8<E: Element>(gqa_ratio: u32, head_dim: u32, mask: Mask, lengths: &[(u32, u32)]) -> Case<E, F8E4M3> {
    let shape = shape::<E>(gqa_ratio, head_dim).with_kv_dtype(KvDType::E4m3);
    let mut case = Case::new(paged(shape, mask, lengths, 16));
    case.k_scales = Some(vec![0.3, 1.7]);
    case.v_scales = Some(vec![5.0, 0.02]);
    case
}

#[test]
fn kv_in_fp8() {
    let Some(engine) = engine() else { return };
    for packing in [Packing::Packed, Packing::PerRequest] {
        for (lengths, head_dim) in iproduct(&[&MIXED[..], &PREFILL, &DECODE], &AttentionShape::HEAD_DIMS) {
            for gqa_ratio in [1, 4, 7] {
                let case = in_fp8::<bf16>(gqa_ratio, head_dim, Mask::Causal, lengths);
                case.check(&case.run(engine, packing));
                let case = in_fp8::<f16>(gqa_ratio, head_dim, Mask::Causal, lengths);
                case.check(&case.run(engine, packing));
            }
        }
    }
}

#[test]
fn kv_in_fp8_with_all_options() {
    let Some(engine) = engine() else { return };
    for head_dim in AttentionShape::HEAD_DIMS {
        let mut case = in_fp8::<bf16>(4, head_dim, Mask::Window(100.try_into().expect("not zero")), &MIXED);
        case.logit_soft_cap = Some(3.0);
        case.sinks = Some((0..8).map(|head| 2.0 * head as f32 - 6.0).collect());
        case.check(&case.run(engine, Packing::Packed));
        case.k_scales = None;
        case.v_scales = None;
        case.check(&case.run(engine, Packing::Packed));
    }
}

/// Where rows of Q in bf16 become float16, no number may be too large or too small for that.
#[test]
fn queries_of_any_size_with_kv_in_fp8() {
    let Some(engine) = engine() else { return };
    for (lengths, head_dim) in iproduct(&[&MIXED[..], &PREFILL], &AttentionShape::HEAD_DIMS) {
        let mut case = in_fp8::<bf16>(4, head_dim, Mask::Causal, lengths);
        let factors = [2f32.powi(-120), 2f32.powi(-20), 1.0, 3.0, 0.0];
        let outlier = |place: usize| if place % 31 == 5 { 40.0 } else { 1.0 };
        case.change_q(|row, place, number| bf16::from_f32(number.to_f32() * factors[row % factors.len()] * outlier(place)));
        case.check(&case.run(engine, Packing::Packed));
    }
}

#[test]
fn queries_that_are_not_finite_spoil_their_rows_alone() {
    let Some(engine) = engine() else { return };
    for (lengths, head_dim) in iproduct(&[&MIXED[..], &PREFILL, &DECODE], &AttentionShape::HEAD_DIMS) {
        let mut case = in_fp8::<bf16>(4, head_dim, Mask::Causal, lengths);
        let (finite, _) = case.run(engine, Packing::Packed);
        let spoiled = |row: usize| row % 7 == 3;
        case.change_q(|row, place, number| match (spoiled(row), place) {
            (true, 17) if row % 2 == 0 => bf16::NAN,
            (true, 17) => bf16::INFINITY,
            _ => number,
        });
        let (o, _) = case.run(engine, Packing::Packed);
        let head_dim = head_dim as usize;
        for (row, (o, finite)) in o.chunks(head_dim).zip(finite.chunks(head_dim)).enumerate() {
            if !spoiled(row) {
                assert!(o == finite, "row {row}, head dimension {head_dim}");
            } else if row % 2 == 0 {
                assert!(o.iter().all(|number| number.is_nan()), "row {row}, head dimension {head_dim}: {o:?}");
            }
        }
    }
}

#[test]
fn kv_of_another_type_is_an_error() {
    let Some(engine) = engine() else { return };
    let stream = engine.stream().expect("a stream");
    let mut workspace = engine.workspace().expect("there is room");
    let fp8 = in_fp8::<bf16>(4, 128, Mask::Causal, &PREFILL);
    let mut same = Case::<bf16>::new(contiguous(shape::<bf16>(4, 128), Mask::Causal, &PREFILL));
    let plan = engine.upload(&fp8.plan(engine, Packing::Packed), &stream).expect("the plan fits");
    let error = same.on_device(engine).run(engine, &plan, &mut workspace, &stream).expect_err("another type");
    assert!(matches!(error, EngineError::KvDType { found: KvDType::Same, needed: KvDType::E4m3 }), "{error}");

    same.k_scales = Some(vec![1.0, 1.0]);
    let plan = engine.upload(&same.plan(engine, Packing::Packed), &stream).expect("the plan fits");
    let error = same.on_device(engine).run(engine, &plan, &mut workspace, &stream).expect_err("no scales in bf16");
    assert!(matches!(error, EngineError::NoScales { option: "k_scales" }), "{error}");
}
