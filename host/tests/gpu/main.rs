//! The engine against float64 attention. Skipped, with the reason on standard error, where there is no device.

mod beside;
mod case;
mod graph;
mod kv;
mod layouts;
mod merge;
mod mover;
mod options;
mod tall;
mod widening;

use std::num::NonZero;

use half::{bf16, f16};
use packinfer::{
    AttentionShape, Batch, Calibration, DType, DeviceModel, DeviceSlice, DeviceSliceMut, EngineError, Mask, Packing, RunOptions,
    Tensors,
};
use packinfer_cpu::random_elements;
use packinfer_planner::Schedule;

use case::{Case, Element, contiguous, engine, paged, shape};

/// Chunked prefill, prompts, decode requests short and long, and one that brings no query.
const MIXED: [(u32, u32); 9] = [(130, 700), (1, 1), (17, 17), (1, 65), (0, 40), (1, 3000), (64, 64), (5, 300), (200, 200)];
const PREFILL: [(u32, u32); 3] = [(257, 257), (128, 128), (63, 63)];
const DECODE: [(u32, u32); 6] = [(1, 5000), (1, 33), (1, 64), (1, 1), (1, 700), (1, 128)];

/// Query heads of a KV head: one, powers of two, odd, and more than a head group.
const GQA_RATIOS: [u32; 5] = [1, 4, 7, 8, 32];

fn check_all_shapes<E: Element>(lengths: &[(u32, u32)], page_size: Option<u32>) {
    let Some(engine) = engine() else { return };
    for head_dim in AttentionShape::HEAD_DIMS {
        for gqa_ratio in GQA_RATIOS {
            let shape = shape::<E>(gqa_ratio, head_dim);
            let case = Case::<E>::new(match page_size {
                Some(page_size) => paged(shape, Mask::Causal, lengths, page_size),
                None => contiguous(shape, Mask::Causal, lengths),
            });
            case.check(&case.run(engine, Packing::Packed));
        }
    }
}

#[test]
fn buffers_that_repeat_elements() {
    let Some(engine) = engine() else { return };
    let download = |elements: &[u16], len| engine.repeating(elements, len).expect("there is room").download().expect("no work");
    for len in [0, 2, 3, 4, 8, 1000] {
        assert!(download(&[7, 8, 9], len).into_iter().eq([7, 8, 9].into_iter().cycle().take(len)), "{len} elements");
    }
    assert_eq!(download(&[], 4), [0; 4]);
}

/// Lengths of prompts, chunks of prompts, drafts and decodes, others for each seed.
fn random_lengths(seed: u64) -> Vec<(u32, u32)> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut below = |most: u32| {
        // Xorshift, as Marsaglia has it: there is no need for more.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 33) as u32 % most
    };
    let mut lengths = |kind: u32| match kind {
        0 => (1, 1 + below(2500)),
        1 => {
            let query_len = 1 + below(16);
            (query_len, query_len + below(900))
        }
        2 => {
            let query_len = 1 + below(250);
            (query_len, query_len + below(700))
        }
        _ => {
            let prompt = 1 + below(600);
            (prompt, prompt)
        }
    };
    (0..20).map(|request| lengths(if request % 3 == 0 { 3 } else { request % 4 })).collect()
}

/// Enough tasks that every multiprocessor does several, of tiles with many rows and with few in all orders.
#[test]
fn random_mixes_of_lengths() {
    let Some(engine) = engine() else { return };
    let head_dims = AttentionShape::HEAD_DIMS;
    for seed in 0..12 {
        let head_dim = head_dims[seed as usize % head_dims.len()];
        let shape = AttentionShape::new(32, 8, head_dim, DType::Bf16).expect("a good shape");
        let case = Case::<bf16>::new(paged(shape, Mask::Causal, &random_lengths(seed), 16));
        case.check(&case.run(engine, Packing::Packed));
        let prompts: Vec<_> = random_lengths(seed).into_iter().map(|(_, kv_len)| (kv_len.min(600), kv_len.min(600))).collect();
        let case = Case::<bf16>::new(contiguous(shape, Mask::Causal, &prompts));
        case.check(&case.run(engine, Packing::Packed));
    }
}

#[test]
fn mixed_contiguous_bf16() {
    check_all_shapes::<bf16>(&MIXED, None);
}

#[test]
fn mixed_paged_f16() {
    check_all_shapes::<f16>(&MIXED, Some(16));
}

#[test]
fn prefill_contiguous_f16() {
    check_all_shapes::<f16>(&PREFILL, None);
}

#[test]
fn prefill_paged_bf16() {
    check_all_shapes::<bf16>(&PREFILL, Some(16));
}

#[test]
fn decode_contiguous_f16() {
    check_all_shapes::<f16>(&DECODE, None);
}

#[test]
fn decode_paged_bf16() {
    check_all_shapes::<bf16>(&DECODE, Some(16));
}

#[test]
fn pages_of_any_size() {
    let Some(engine) = engine() else { return };
    for head_dim in AttentionShape::HEAD_DIMS {
        for page_size in [1, 3, 64, 100] {
            let case = Case::<bf16>::new(paged(shape::<bf16>(4, head_dim), Mask::Causal, &MIXED, page_size));
            case.check(&case.run(engine, Packing::Packed));
        }
    }
}

#[test]
fn requests_that_share_pages() {
    let Some(engine) = engine() else { return };
    let mut batch = Batch::new(shape::<bf16>(4, 128), Mask::Causal);
    for request in 0..40 {
        let pages: Vec<u32> = (0..60).chain([60 + request]).collect();
        batch.push_paged(1 + request % 3, 60 * 16 + 7, &pages, 16).expect("good lengths");
    }
    let case = Case::<bf16>::new(batch);
    case.check(&case.run(engine, Packing::Packed));
}

/// A prefix that all share, four of which each is shared by a quarter, and tails of their own; several query tokens in some
/// requests.
#[test]
fn prefixes_of_three_levels() {
    let Some(engine) = engine() else { return };
    const LEVEL_PAGES: u32 = 96;
    for gqa_ratio in GQA_RATIOS {
        for query_len in [1, 5] {
            let mut batch = Batch::new(shape::<bf16>(gqa_ratio, 128), Mask::Causal);
            for request in 0..64 {
                let branch = LEVEL_PAGES * (1 + request % 4);
                let own = 5 * LEVEL_PAGES + request;
                // Backwards, so that no two pages are one run.
                let levels = (0..LEVEL_PAGES).rev().chain((branch..branch + LEVEL_PAGES).rev());
                let pages: Vec<u32> = levels.chain([own]).collect();
                batch
                    .push_paged(1 + request % query_len, 2 * LEVEL_PAGES * 16 + 9 + request % 7, &pages, 16)
                    .expect("good lengths");
            }
            let case = Case::<bf16>::new(batch);
            let plan = case.plan(engine, Packing::Packed);
            assert!(plan.explain(plan.model()).shared_tiles >= 4, "little is shared with {gqa_ratio} query heads a KV head");
            let first = case.run(engine, Packing::Packed);
            case.check(&first);
            assert_eq!(case.run(engine, Packing::Packed), first);
        }
    }
}

#[test]
fn without_a_mask() {
    let Some(engine) = engine() else { return };
    for lengths in [&MIXED[..], &[(40, 7), (1, 900), (300, 3)]] {
        let case = Case::<f16>::new(contiguous(shape::<f16>(4, 64), Mask::None, lengths));
        case.check(&case.run(engine, Packing::Packed));
    }
}

/// With many KV heads, wide tiles are done for some of them at a time.
#[test]
fn head_groups_take_turns() {
    let Some(engine) = engine() else { return };
    let shape = AttentionShape::new(21, 21, 64, DType::Bf16).expect("a good shape");
    // One that has more K and V than the L2 cache.
    let prompts = [(300, 5500), (300, 300), (400, 1200)];
    for lengths in [&prompts[..], &[&prompts[..], &[(1, 3000); 20]].concat()] {
        let case = Case::<bf16>::new(paged(shape, Mask::Causal, lengths, 16));
        let Some(plan) = case.plan_for_hopper(engine, |model| model) else { return };
        let at_once = plan.groups_at_once();
        assert!(1 < at_once && at_once < 21 && !21u32.is_multiple_of(at_once), "{at_once} head groups at once");
        case.check_plan(engine, &plan);
    }
}

#[test]
fn one_grid_of_tiles_per_request() {
    let Some(engine) = engine() else { return };
    for gqa_ratio in GQA_RATIOS {
        let case = Case::<bf16>::new(paged(shape::<bf16>(gqa_ratio, 128), Mask::Causal, &MIXED, 16));
        case.check(&case.run(engine, Packing::PerRequest));
    }
}

#[test]
fn a_given_softmax_scale() {
    let Some(engine) = engine() else { return };
    let mut case = Case::<f16>::new(contiguous(shape::<f16>(4, 64), Mask::Causal, &MIXED));
    case.scale = Some(0.31);
    case.check(&case.run(engine, Packing::Packed));
}

/// Keys that are longer the later they come, so that scores rise far above those before, again and again: up to 2^100 times as
/// much weight.
fn check_rising_scores<E: Element>(head_dim: u32) {
    let Some(engine) = engine() else { return };
    for lengths in [&PREFILL[..], &MIXED, &DECODE] {
        for mask in [Mask::Causal, Mask::Window(NonZero::new(150).expect("not zero"))] {
            let mut case = Case::<E>::new(contiguous(shape::<E>(4, head_dim), mask, lengths));
            let len = case.batch.kv_elements() as usize;
            let (mut k, v) = (random_elements::<E>(len, 2), random_elements::<E>(len, 3));
            for (i, k) in k.iter_mut().enumerate() {
                *k = E::from_f32(Into::<f32>::into(*k) * (0.1 + 12.0 * i as f32 / len as f32));
            }
            case.set_kv(&k, &v);
            for packing in [Packing::Packed, Packing::PerRequest] {
                case.check(&case.run(engine, packing));
            }
        }
    }
}

#[test]
fn rising_scores_bf16() {
    check_rising_scores::<bf16>(128);
    check_rising_scores::<bf16>(64);
}

#[test]
fn rising_scores_f16() {
    check_rising_scores::<f16>(128);
    check_rising_scores::<f16>(64);
}

#[test]
fn batches_without_queries() {
    let Some(engine) = engine() else { return };
    for lengths in [&[][..], &[(0, 0), (0, 100)]] {
        let case = Case::<bf16>::new(contiguous(shape::<bf16>(4, 128), Mask::Causal, lengths));
        assert_eq!(case.run(engine, Packing::Packed), (vec![], vec![]));
    }
}

#[test]
fn every_task_is_stamped() {
    let Some(engine) = engine() else { return };
    let case = Case::<bf16>::new(paged(shape::<bf16>(4, 128), Mask::Causal, &MIXED, 16));
    let stream = engine.stream().expect("a stream");
    let plan = case.plan(engine, Packing::Packed);
    let device_plan = engine.upload(&plan, &stream).expect("the plan fits");
    let mut workspace = engine.workspace().expect("there is room");
    let mut stamps = engine.stamps(&device_plan).expect("there is room");
    let mut device = case.on_device(engine);
    device.run_stamped(engine, &device_plan, &mut workspace, &stream, &mut stamps).expect("the run is right");
    case.check(&device.results());
    let schedule = Schedule::achieved(&plan, plan.model(), &stamps.read().expect("the work is done").tasks).expect("good stamps");
    assert!(schedule.num_sms >= engine.device().multiprocessors);
    assert!(schedule.span_ns() > 0);

    let other = Case::<bf16>::new(paged(shape::<bf16>(4, 128), Mask::Causal, &PREFILL, 16));
    let device_plan = engine.upload(&other.plan(engine, Packing::Packed), &stream).expect("the plan fits");
    let mut device = other.on_device(engine);
    let error = device.run_stamped(engine, &device_plan, &mut workspace, &stream, &mut stamps).expect_err("another plan");
    assert!(matches!(error, EngineError::Stamps { .. }), "{error}");
}

#[test]
fn calibrations_of_other_devices_are_refused() {
    let Some(engine) = engine() else { return };
    let models = engine.device().models();
    let calibration =
        |models| Calibration { device: "another".into(), source: "a test".into(), models, fits: vec![], measurements: vec![] };
    assert!(engine.calibrated_planner(&calibration(models.clone())).is_ok());
    let halved = models.iter().map(|model| DeviceModel { num_sms: model.num_sms.div_ceil(2), ..*model });
    let error = engine.calibrated_planner(&calibration(halved.collect())).expect_err("another device");
    assert!(matches!(error, EngineError::Calibration(_)), "{error}");
    let error = engine.calibrated_planner(&calibration(vec![])).expect_err("no models");
    assert!(matches!(error, EngineError::NotCalibrated { .. }), "{error}");
}

#[test]
fn runs_repeat_bit_for_bit() {
    let Some(engine) = engine() else { return };
    for head_dim in AttentionShape::HEAD_DIMS {
        let case = Case::<bf16>::new(paged(shape::<bf16>(4, head_dim), Mask::Causal, &MIXED, 16));
        let first = case.run(engine, Packing::Packed);
        case.check(&first);
        for _ in 0..5 {
            assert_eq!(case.run(engine, Packing::Packed), first);
        }
    }
}

#[test]
fn one_plan_on_several_streams_and_threads() {
    const LAYERS: usize = 20;
    let Some(engine) = engine() else { return };
    let case = Case::<bf16>::new(contiguous(shape::<bf16>(4, 128), Mask::Causal, &MIXED));
    let expected = case.run(engine, Packing::Packed);
    let plan = engine.upload(&case.plan(engine, Packing::Packed), &engine.stream().expect("a stream")).expect("the plan fits");
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let (stream, mut workspace) = (engine.stream().expect("a stream"), engine.workspace().expect("there is room"));
                let mut layers: Vec<_> = (0..LAYERS).map(|_| case.on_device(engine)).collect();
                for layer in &mut layers {
                    layer.run(engine, &plan, &mut workspace, &stream).expect("the run is right");
                }
                assert!(layers.iter().all(|layer| layer.results() == expected));
            });
        }
    });
}

#[test]
fn a_workspace_may_go_from_stream_to_stream() {
    let Some(engine) = engine() else { return };
    // Partial results that differ, so that one run would spoil another's.
    let cases = [None, Some(0.5)].map(|scale| {
        let mut case = Case::<f16>::new(contiguous(shape::<f16>(8, 128), Mask::Causal, &DECODE));
        case.scale = scale;
        case
    });
    let expected = cases.each_ref().map(|case| case.run(engine, Packing::Packed));
    let streams = [(); 3].map(|()| engine.stream().expect("a stream"));
    let plan = engine.upload(&cases[0].plan(engine, Packing::Packed), &streams[0]).expect("the plan fits");
    let mut workspace = engine.workspace().expect("there is room");
    workspace.reserve(&plan).expect("there is room");
    let mut layers: Vec<_> = (0..30).map(|layer| cases[layer % 2].on_device(engine)).collect();
    for (layer, stream) in layers.iter_mut().zip(streams.iter().cycle()) {
        layer.run(engine, &plan, &mut workspace, stream).expect("the run is right");
    }
    for (index, layer) in layers.iter().enumerate() {
        assert!(layer.results() == expected[index % 2], "layer {index}");
    }
}

#[test]
fn a_plan_makes_room_for_the_next() {
    let Some(engine) = engine() else { return };
    let many: Vec<(u32, u32)> = (0..3000).map(|i| (1, 1 + i % 50)).collect();
    let cases = [&many, &MIXED[..], &DECODE, &[], &PREFILL]
        .map(|lengths| Case::<bf16>::new(contiguous(shape::<bf16>(4, 64), Mask::Causal, lengths)));
    let plans = cases.each_ref().map(|case| case.plan(engine, Packing::Packed));
    let [upload_stream, streams @ ..] = [(); 3].map(|()| engine.stream().expect("a stream"));
    let mut workspace = engine.workspace().expect("there is room");
    let mut device_plan = engine.upload(&plans[4], &upload_stream).expect("the plan fits");
    let mut steps: Vec<_> = cases.iter().cycle().take(2 * cases.len()).map(|case| case.on_device(engine)).collect();
    // Nothing waits for the device in between but the engine itself.
    for (index, step) in steps.iter_mut().enumerate() {
        engine.upload_into(&mut device_plan, &plans[index % cases.len()], &upload_stream).expect("the plan fits");
        step.run(engine, &device_plan, &mut workspace, &streams[index % streams.len()]).expect("the run is right");
    }
    for (index, step) in steps.iter().enumerate() {
        cases[index % cases.len()].check(&step.results());
    }
}

#[test]
fn memory_and_streams_of_others() {
    let Some(engine) = engine() else { return };
    let case = Case::<bf16>::new(contiguous(shape::<bf16>(4, 128), Mask::Causal, &MIXED));
    let mut device = case.on_device(engine);
    // SAFETY: null is the default stream, which always exists.
    let stream = unsafe { engine.foreign_stream(std::ptr::null_mut()) }.expect("a stream");
    let plan = engine.upload(&case.plan(engine, Packing::Packed), &stream).expect("the plan fits");
    let foreign = |buffer: &packinfer::DeviceBuffer<bf16>| {
        // SAFETY: the buffer outlives the run, which `results` waits for.
        unsafe { DeviceSlice::<bf16>::from_raw(buffer.address(), buffer.len()) }
    };
    let tensors = Tensors {
        q: foreign(&device.q),
        k: foreign(&device.k),
        v: foreign(&device.v),
        // SAFETY: as above, and nobody else uses the buffer.
        o: unsafe { DeviceSliceMut::from_raw(device.o.address(), device.o.len()) },
        lse: Some(device.lse.as_mut_slice()),
    };
    let mut workspace = engine.workspace().expect("there is room");
    engine.run(&plan, &mut workspace, &stream, tensors, RunOptions::default()).expect("the run is right");
    case.check(&device.results());
}

#[test]
fn wrong_tensors_are_errors() {
    let Some(engine) = engine() else { return };
    let case = Case::<bf16>::new(contiguous(shape::<bf16>(4, 128), Mask::Causal, &PREFILL));
    let stream = engine.stream().expect("a stream");
    let plan = engine.upload(&case.plan(engine, Packing::Packed), &stream).expect("the plan fits");
    let mut workspace = engine.workspace().expect("there is room");
    let mut error_of = |change: &dyn Fn(&mut case::DeviceCase<bf16>)| {
        let mut device = case.on_device(engine);
        change(&mut device);
        device.run(engine, &plan, &mut workspace, &stream).expect_err("the tensors are wrong")
    };
    let short = || engine.zeros::<bf16>(64).expect("there is room");
    let is_length = |error: EngineError, name: &str| matches!(error, EngineError::TensorLength { tensor, .. } if tensor == name);
    assert!(is_length(error_of(&|device| device.q = short()), "Q"));
    assert!(is_length(error_of(&|device| device.o = short()), "O"));
    assert!(is_length(error_of(&|device| device.lse = engine.zeros(1).expect("there is room")), "LSE"));
    let is_pool = |error: EngineError, name: &str| matches!(error, EngineError::PoolTooSmall { tensor, .. } if tensor == name);
    assert!(is_pool(error_of(&|device| device.k = short()), "K"));
    assert!(is_pool(error_of(&|device| device.v = short()), "V"));
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let error = error_of(&|device| device.options.softmax_scale = Some(scale));
        assert!(matches!(error, EngineError::NotPositive { what: "softmax scale", .. }), "{error}");
        let error = error_of(&|device| device.options.logit_soft_cap = Some(scale));
        assert!(matches!(error, EngineError::NotPositive { what: "logit soft-cap", .. }), "{error}");
    }
}

#[test]
fn tensors_of_another_type_are_an_error() {
    let Some(engine) = engine() else { return };
    let lengths = contiguous(shape::<bf16>(4, 128), Mask::Causal, &PREFILL);
    let stream = engine.stream().expect("a stream");
    let plan = engine.upload(&Case::<bf16>::new(lengths).plan(engine, Packing::Packed), &stream).expect("the plan fits");
    let mut device = Case::<f16>::new(contiguous(shape::<f16>(4, 128), Mask::Causal, &PREFILL)).on_device(engine);
    let error = device.run(engine, &plan, &mut engine.workspace().expect("there is room"), &stream).expect_err("wrong type");
    assert!(matches!(error, EngineError::DType { found: DType::F16, needed: DType::Bf16 }), "{error}");
}

#[test]
fn misaligned_tensors_are_an_error() {
    let Some(engine) = engine() else { return };
    let case = Case::<bf16>::new(contiguous(shape::<bf16>(4, 128), Mask::Causal, &PREFILL));
    let mut device = case.on_device(engine);
    let stream = engine.stream().expect("a stream");
    let plan = engine.upload(&case.plan(engine, Packing::Packed), &stream).expect("the plan fits");
    let tensors = Tensors {
        // SAFETY: nothing reads it, as the address is rejected.
        q: unsafe { DeviceSlice::from_raw(device.q.address() + 2, device.q.len()) },
        k: device.k.as_slice(),
        v: device.v.as_slice(),
        o: device.o.as_mut_slice(),
        lse: None,
    };
    let mut workspace = engine.workspace().expect("there is room");
    let error = engine.run(&plan, &mut workspace, &stream, tensors, RunOptions::default()).expect_err("a bad address");
    assert!(matches!(error, EngineError::Misaligned { tensor: "Q", .. }), "{error}");
}

#[test]
fn copies_of_other_lengths_are_errors() {
    let Some(engine) = engine() else { return };
    let mut buffer = engine.copy_of(&[1.0f32, 2.0, 3.0]).expect("there is room");
    assert_eq!(buffer.download().expect("a copy"), [1.0, 2.0, 3.0]);
    assert!(matches!(buffer.upload(&[0.0; 2]), Err(EngineError::CopyLength { buffer: 3, slice: 2 })));
    assert!(matches!(buffer.download_into(&mut [0.0; 4]), Err(EngineError::CopyLength { buffer: 3, slice: 4 })));
}

#[test]
fn too_much_memory_is_an_error() {
    let Some(engine) = engine() else { return };
    let error = engine.zeros::<u8>(1 << 45).expect_err("no device has 32 TiB");
    assert!(matches!(error, EngineError::OutOfMemory { bytes, .. } if bytes == 1 << 45), "{error}");
}

#[test]
fn the_device_is_measured() {
    let Some(engine) = engine() else { return };
    let bandwidth = packinfer::measure::copy_bandwidth(engine).expect("there is room");
    assert!((1e10..1e14).contains(&bandwidth), "{bandwidth} bytes/s");
    let rate = packinfer::measure::mma_rate(engine).expect("the kernel runs");
    assert!((1e12..1e17).contains(&rate), "{rate} FLOP/s");
}
