//! Plans on the CPU give what exact attention gives.

use std::num::NonZeroU32;

use float8::F8E4M3;
use half::{bf16, f16};
use packinfer_batch::{AttentionShape, Batch, BatchFile, DType, KvDType, KvLayout, Mask, PageOrder, PagedLayout, RequestLengths};
use packinfer_cpu::{
    CpuError, Element, Inputs, KvElement, Options, Outputs, execute, largest_difference, random_elements, reference,
    relative_error,
};
use packinfer_planner::{BesideTimes, DeviceModel, Fp8Times, KernelFamily, NarrowItems, Packing, Plan, Planner, TileTimes};
use proptest::prelude::*;

/// A plan for a device of so many multiprocessors: many of them split requests, few of them pack.
fn packed_for(batch: &Batch, num_sms: u32) -> Plan {
    Planner::new(DeviceModel { num_sms, ..DeviceModel::H100 }).plan(batch).expect("a plan")
}

fn packed(batch: &Batch) -> Plan {
    packed_for(batch, 132)
}

fn per_request(batch: &Batch) -> Plan {
    Planner::default().with_packing(Packing::PerRequest).plan(batch).expect("a plan")
}

/// Q, K, V for a batch.
struct Tensors<E, K = E> {
    q: Vec<E>,
    k: Vec<K>,
    v: Vec<K>,
}

impl<E: Element, K: KvElement<E>> Tensors<E, K> {
    fn random(batch: &Batch) -> Self {
        let shape = batch.shape();
        let q = u64::from(batch.num_query_tokens()) * shape.qo_elements_per_token();
        let kv = batch.kv_elements();
        Self { q: random_elements(q as usize, 1), k: random_elements(kv as usize, 2), v: random_elements(kv as usize, 3) }
    }

    fn inputs(&self) -> Inputs<'_, E, K> {
        Inputs { q: &self.q, k: &self.k, v: &self.v, options: Options::default() }
    }
}

/// O and LSE of a plan. They are filled with NaN before, so what is not written shows.
fn run<E: Element, K: KvElement<E>>(plan: &Plan, inputs: Inputs<'_, E, K>) -> (Vec<E>, Vec<f32>) {
    let mut o = vec![E::from_f32(f32::NAN); inputs.q.len()];
    let mut lse = vec![f32::NAN; inputs.q.len() / plan.shape().head_dim() as usize];
    execute(plan, inputs, Outputs { o: &mut o, lse: Some(&mut lse) }).expect("buffers that fit");
    (o, lse)
}

fn exact<E: Element, K: KvElement<E>>(batch: &Batch, inputs: Inputs<'_, E, K>) -> reference::Reference {
    let tokens: Vec<u32> = (0..batch.num_query_tokens()).collect();
    reference::attention(batch, inputs, &tokens).expect("buffers that fit")
}

fn assert_exact<E: Element, K: KvElement<E>>(batch: &Batch, plan: &Plan, options: Options<'_>) {
    let tensors = Tensors::<E, K>::random(batch);
    let inputs = Inputs { options, ..tensors.inputs() };
    let (o, lse) = run(plan, inputs);
    let exact = exact(batch, inputs);
    let error = relative_error(&o, &exact.o);
    assert!(error <= E::TOLERANCE, "O is off by {error}");
    let error = largest_difference(&lse, &exact.lse);
    assert!(error <= 1e-4, "LSE is off by {error}");
}

/// A plan for a device with kernels for Hopper where bytes cost nothing: K and V in FP8 are made what Q is wherever they can be.
fn widened(batch: &Batch) -> Plan {
    let DeviceModel { wide, narrow, .. } = DeviceModel::H100;
    let wide = TileTimes { setup_ns: 2.0 * wide.setup_ns, ..wide };
    let e4m3 = Some(Fp8Times { bytes_per_s: 1e18, wide, narrow });
    let model = DeviceModel { kernel_family: KernelFamily::Sm90a, bytes_per_s: 1e18, launch_ns: 0.0, e4m3, ..DeviceModel::H100 };
    Planner::new(model).plan(batch).expect("a plan")
}

/// The same where narrow tiles are done beside wide ones: K and V in FP8 are made what Q is for wide tiles alone.
fn widened_for_wide_tiles(batch: &Batch) -> Plan {
    let beside = Some(BesideTimes { wide: 1.0, narrow: 1.0, stored_step_ns: 0.0 });
    let model = DeviceModel { kernel_family: KernelFamily::Sm90a, beside, ..DeviceModel::H100 };
    Planner::new(model).with_narrow_items(NarrowItems::Beside).plan(batch).expect("a plan")
}

/// A plan for a device of one multiprocessor, so slow to read that requests share nearly whatever they can.
fn shared(batch: &Batch) -> Plan {
    let slow = DeviceModel { num_sms: 1, bytes_per_s: 1e10, item_ns: 10.0, merge_ns: 0.0, ..DeviceModel::H100 };
    Planner::new(slow).plan(batch).expect("a plan")
}

/// All kinds of plan of a batch are exact.
fn assert_plans_exact(batch: &Batch) {
    assert_plans_exact_with(batch, Options::default());
}

fn assert_plans_exact_with(batch: &Batch, options: Options<'_>) {
    let on_hopper = [widened(batch), widened_for_wide_tiles(batch)];
    for plan in [packed_for(batch, 1), packed(batch), shared(batch), per_request(batch)].into_iter().chain(on_hopper) {
        match (batch.shape().dtype(), batch.shape().kv_dtype()) {
            (DType::Bf16, KvDType::Same) => assert_exact::<bf16, bf16>(batch, &plan, options),
            (DType::Bf16, KvDType::E4m3) => assert_exact::<bf16, F8E4M3>(batch, &plan, options),
            (DType::F16, KvDType::Same) => assert_exact::<f16, f16>(batch, &plan, options),
            (DType::F16, KvDType::E4m3) => assert_exact::<f16, F8E4M3>(batch, &plan, options),
        }
    }
}

fn shape(num_qo_heads: u32, num_kv_heads: u32, head_dim: u32, dtype: DType) -> AttentionShape {
    AttentionShape::new(num_qo_heads, num_kv_heads, head_dim, dtype).expect("a good shape")
}

/// A batch of (query_len, kv_len) in contiguous KV.
fn batch(shape: AttentionShape, mask: Mask, lengths: &[(u32, u32)]) -> Batch {
    let mut batch = Batch::new(shape, mask);
    for &(query_len, kv_len) in lengths {
        batch.push_contiguous(query_len, kv_len, batch.num_slots()).expect("a good request");
    }
    batch
}

/// Query heads of [`any_batch`], at the most.
const MOST_QO_HEADS: usize = 60;
/// KV heads, as well.
const MOST_KV_HEADS: usize = 3;

/// Any batch that a test has time for: prompts, chunks, decodes and empty requests, pages of several sizes, prefixes shared at up
/// to four levels, other engines' layouts.
fn any_batch() -> impl Strategy<Value = Batch> {
    let heads = (1..=3u32, prop::sample::select(vec![1u32, 2, 3, 4, 7, 8, 16, 20]));
    let dtype = prop::sample::select(vec![DType::Bf16, DType::F16]);
    let kv_dtype = prop::sample::select(vec![KvDType::Same, KvDType::E4m3]);
    let format = (prop::sample::select(AttentionShape::HEAD_DIMS.to_vec()), dtype, kv_dtype);
    let mask = (any::<bool>(), prop::option::of(prop_oneof![1..20u32, 20..700u32].prop_filter_map("not zero", NonZeroU32::new)));
    let query_len = prop_oneof![1 => Just(0), 4 => Just(1u32), 2 => 2..20u32, 1 => 20..150u32];
    let request = (query_len, prop_oneof![Just(0u32), 1..100u32, 100..1500u32], prop::collection::vec(0..2u64, 0..5));
    let requests = prop::collection::vec(request, 0..10);
    let slots = prop::sample::select(vec![1u32, 7, 16]).prop_map(|page_size| (page_size, PageOrder::Nhd, 1));
    let order = prop::sample::select(vec![PageOrder::Nhd, PageOrder::Hnd]);
    let apart = (prop::sample::select(vec![8u32, 16, 24]), order, 1..4u32);
    let pages = (prop_oneof![slots, apart], prop::sample::select(vec![2u32, 10]));
    (heads, format, mask, pages, requests, any::<u64>()).prop_map(
        |(
            (num_kv_heads, ratio),
            (head_dim, dtype, kv_dtype),
            (causal, window),
            ((page_size, page_order, page_stride), block_pages),
            requests,
            seed,
        )| {
            let block_tokens = block_pages * page_size;
            let requests = requests.into_iter().map(|(query_len, cached, mut blocks)| {
                let kv_len = query_len + cached;
                blocks.truncate((kv_len / block_tokens) as usize);
                RequestLengths { query_len, kv_len, blocks }
            });
            let file = BatchFile {
                name: None,
                description: None,
                num_qo_heads: num_kv_heads * ratio,
                num_kv_heads,
                head_dim,
                dtype,
                kv_dtype,
                page_size,
                page_order,
                page_stride: NonZeroU32::new(page_stride).expect("not zero"),
                causal: causal || window.is_some(),
                window,
                logit_soft_cap: None,
                sinks: false,
                block_tokens: Some(block_tokens),
                requests: requests.collect(),
            };
            file.to_batch(seed).expect("a good batch")
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn any_plan_is_exact(
        batch in any_batch(),
        scale in prop::option::of(0.01..1f32),
        logit_soft_cap in prop::option::of(0.1..50f32),
        kv_scales in [0.1..2f32, 0.01..100f32].map(|scale| prop::option::of(prop::collection::vec(scale, MOST_KV_HEADS))),
        sinks in prop::option::of(prop::collection::vec(-10.0..10f32, MOST_QO_HEADS)),
    ) {
        let shape = batch.shape();
        let sinks = sinks.as_ref().map(|sinks| &sinks[..shape.num_qo_heads() as usize]);
        let [k_scales, v_scales] = kv_scales.each_ref().map(|scales| Some(&scales.as_ref()?[..shape.num_kv_heads() as usize]));
        assert_plans_exact_with(&batch, Options { scale, logit_soft_cap, sinks, k_scales, v_scales });
    }
}

#[test]
fn short_requests_share_tiles() {
    let lengths = [(9, 9), (3, 8), (20, 20), (1, 1), (7, 30)].repeat(10);
    let batch = batch(shape(4, 2, 64, DType::F16), Mask::Causal, &lengths);
    assert!(packed_for(&batch, 1).items().iter().any(|item| item.num_segments > 1), "nothing is packed");
    assert_plans_exact(&batch);
}

#[test]
fn long_requests_are_split_and_merged() {
    let batch = batch(shape(8, 2, 128, DType::Bf16), Mask::Causal, &[(1, 20_000), (1, 10)]);
    assert!(!packed(&batch).merge_tokens().is_empty(), "nothing is split");
    assert!(per_request(&batch).merge_tokens().is_empty(), "the baseline splits");
    assert_plans_exact(&batch);
}

/// Many levels, and some requests that end where others go on.
#[test]
fn shared_prefixes_are_read_once_and_merged() {
    let blocks = |i: u32| (0..i % 5).map(|level| u64::from(level > 0 && i.is_multiple_of(2))).collect::<Vec<_>>();
    let requests = (0..24).map(|i| {
        let query_len = [1, 1, 2, 5][i as usize % 4];
        RequestLengths { query_len, kv_len: blocks(i).len() as u32 * 160 + query_len + i % 3, blocks: blocks(i) }
    });
    for causal in [true, false] {
        let file = BatchFile { causal, block_tokens: Some(160), requests: requests.clone().collect(), ..BatchFile::builtin() };
        let batch = file.to_batch(3).expect("a good batch");
        let explanation = shared(&batch).explain(&DeviceModel::H100);
        assert!(explanation.shared_tiles > 4, "{} shared tiles", explanation.shared_tiles);
        assert_plans_exact(&batch);
    }
}

#[test]
fn kv_in_fp8_is_made_what_q_is_for_prompts() {
    let shape = shape(8, 2, 64, DType::F16).with_kv_dtype(KvDType::E4m3);
    let pages = |order| PagedLayout::new(8, order).expect("a good size").with_stride(NonZeroU32::new(3).expect("not zero"));
    for layout in [KvLayout::Slots, pages(PageOrder::Nhd).into(), pages(PageOrder::Hnd).into()] {
        let mut batch = Batch::in_layout(shape, Mask::Causal, layout).expect("a good layout");
        for (request, (query_len, kv_len)) in [(300, 300u32), (200, 903), (40, 64)].into_iter().enumerate() {
            let pages: Vec<u32> = (0..kv_len.div_ceil(8)).rev().map(|page| 3 * page + request as u32).collect();
            batch.push_paged(query_len, kv_len, &pages, 8).expect("a good request");
        }
        assert!(widened(&batch).widening().is_some(), "{layout}");
        let options = Options { k_scales: Some(&[0.3, 1.7]), v_scales: Some(&[5.0, 0.02]), ..Options::default() };
        assert_plans_exact_with(&batch, options);
    }
}

#[test]
fn kv_in_fp8_is_made_what_q_is_for_wide_tiles() {
    let shape = shape(8, 2, 128, DType::Bf16).with_kv_dtype(KvDType::E4m3);
    let lengths = [(150, 300), (1, 700), (100, 431), (1, 450), (1, 33), (2, 500)];
    let batch = batch(shape, Mask::Causal, &lengths);
    assert!(widened_for_wide_tiles(&batch).wide_tile_widening().is_some());
    let options = Options { k_scales: Some(&[0.3, 1.7]), v_scales: Some(&[5.0, 0.02]), ..Options::default() };
    assert_plans_exact_with(&batch, options);
}

#[test]
fn a_single_token_sees_itself() {
    let batch = batch(shape(2, 1, 64, DType::F16), Mask::Causal, &[(1, 1)]);
    let tensors = Tensors::<f16>::random(&batch);
    let (o, _) = run(&packed(&batch), tensors.inputs());
    assert_eq!(o[..64], tensors.v);
    assert_eq!(o[64..], tensors.v);
}

#[test]
fn head_layouts() {
    for (num_qo_heads, num_kv_heads) in [(8, 8), (8, 1), (14, 2), (40, 2), (24, 1)] {
        let shape = shape(num_qo_heads, num_kv_heads, 64, DType::F16);
        assert_plans_exact(&batch(shape, Mask::Causal, &[(1, 300), (30, 100), (2, 77)]));
    }
}

#[test]
fn without_a_mask() {
    assert_plans_exact(&batch(shape(4, 2, 128, DType::Bf16), Mask::None, &[(50, 7), (1, 500), (16, 16)]));
}

#[test]
fn sliding_windows() {
    let lengths = [(1, 3000), (200, 200), (70, 500), (3, 3), (1, 10)];
    for window in [1, 5, 64, 100, 5000].map(|tokens| Mask::Window(NonZeroU32::new(tokens).expect("not zero"))) {
        assert_plans_exact(&batch(shape(4, 2, 64, DType::F16), window, &lengths));
    }
    // A window of one token: every token sees itself alone.
    let batch = batch(shape(2, 1, 64, DType::F16), Mask::Window(NonZeroU32::MIN), &[(5, 9)]);
    let tensors = Tensors::<f16>::random(&batch);
    let (o, _) = run(&packed(&batch), tensors.inputs());
    for (token, o) in o.chunks(2 * 64).enumerate() {
        let own = &tensors.v[(4 + token) * 64..][..64];
        assert_eq!(o, [own, own].concat());
    }
}

#[test]
fn no_requests() {
    assert_plans_exact(&batch(shape(4, 2, 128, DType::Bf16), Mask::Causal, &[]));
    assert_plans_exact(&batch(shape(4, 2, 128, DType::Bf16), Mask::Causal, &[(0, 0), (0, 5)]));
}

/// Scores of hundreds, whose exponentials overflow float32 unless the maximum is subtracted.
#[test]
fn large_scores() {
    let batch = batch(shape(4, 2, 64, DType::F16), Mask::Causal, &[(1, 5000), (70, 70), (1, 64)]);
    let tensors = Tensors::<f16>::random(&batch);
    for scale in [10.0, 1e-6] {
        let inputs = Inputs { options: Options { scale: Some(scale), ..Options::default() }, ..tensors.inputs() };
        let (o, lse) = run(&packed(&batch), inputs);
        let exact = exact(&batch, inputs);
        assert!(relative_error(&o, &exact.o) <= f16::TOLERANCE, "scale {scale}");
        // Scores reach 500, where neighbouring float32 are 6e-5 apart.
        assert!(largest_difference(&lse, &exact.lse) <= 1e-3, "scale {scale}");
    }
}

/// A sink of −∞ is none; one above all scores takes all the weight.
#[test]
fn sinks_take_their_weight() {
    let batch = batch(shape(4, 2, 64, DType::F16), Mask::Causal, &[(1, 5000), (70, 70), (1, 1)]);
    let tensors = Tensors::<f16>::random(&batch);
    let with = |sinks: &[f32; 4]| {
        run(&packed(&batch), Inputs { options: Options { sinks: Some(sinks), ..Options::default() }, ..tensors.inputs() })
    };
    assert_eq!(with(&[f32::NEG_INFINITY; 4]), run(&packed(&batch), tensors.inputs()));
    let (o, lse) = with(&[1e4; 4]);
    assert!(o.iter().all(|&o| o == f16::ZERO) && lse.iter().all(|&lse| lse == 1e4));
}

/// With one value of V everywhere, O is that value whatever the scores are.
#[test]
fn the_reference_averages() {
    let batch = batch(shape(4, 2, 64, DType::F16), Mask::Causal, &[(3, 50), (1, 9)]);
    let mut tensors = Tensors::<f16>::random(&batch);
    tensors.v.fill(f16::from_f32(1.5));
    let exact = exact(&batch, tensors.inputs());
    assert!(exact.o.iter().all(|o| (o - 1.5).abs() < 1e-12));

    // With Q of 0, all scores are 0 and LSE is the logarithm of how many tokens are seen.
    tensors.q.fill(f16::ZERO);
    let exact = reference::attention(&batch, tensors.inputs(), &[3, 0, 2]).expect("buffers that fit");
    for (row, seen) in [9f64, 48.0, 50.0].into_iter().enumerate() {
        assert!(exact.lse[4 * row..][..4].iter().all(|lse| (lse - seen.ln()).abs() < 1e-12), "row {row}");
    }
}

#[test]
fn buffers_that_do_not_fit_are_refused() {
    let batch = batch(shape(4, 2, 64, DType::F16), Mask::Causal, &[(3, 50)]);
    let plan = packed(&batch);
    let tensors = Tensors::<f16>::random(&batch);
    let good = tensors.inputs();
    let refuse = |inputs: Inputs<'_, f16>, o_len: usize, lse_len: usize, message: &str| {
        let (mut o, mut lse) = (vec![f16::ZERO; o_len], vec![0.0; lse_len]);
        let error = execute(&plan, inputs, Outputs { o: &mut o, lse: Some(&mut lse) }).expect_err(message).to_string();
        assert!(error.contains(message), "{error:?} does not contain {message:?}");
    };
    let (o, lse) = (3 * 4 * 64, 3 * 4);
    refuse(Inputs { q: &good.q[1..], ..good }, o, lse, "Q has 767 elements, but [tokens, num_qo_heads, head_dim] needs 768");
    refuse(Inputs { k: &good.k[1..], ..good }, o, lse, "K has 6399 elements, but slots up to 50 are read, which is 6400");
    refuse(Inputs { v: &[], ..good }, o, lse, "V has 0 elements");
    refuse(good, o + 1, lse, "O has 769 elements");
    refuse(good, o, lse - 1, "LSE has 11 elements, but [tokens, num_qo_heads] needs 12");
    let with = |options| Inputs { options, ..good };
    refuse(with(Options { scale: Some(f32::NAN), ..Options::default() }), o, lse, "softmax scale NaN");
    refuse(with(Options { logit_soft_cap: Some(-1.0), ..Options::default() }), o, lse, "logit soft-cap -1: it must be");
    refuse(
        with(Options { sinks: Some(&[0.0; 5]), ..Options::default() }),
        o,
        lse,
        "sinks has 5 elements, but [num_qo_heads] needs 4",
    );

    let other_type = Tensors::<bf16>::random(&batch);
    let outputs = Outputs { o: &mut vec![bf16::ZERO; o], lse: None };
    let error = CpuError::DType { found: DType::Bf16, needed: DType::F16 };
    assert_eq!(execute(&plan, other_type.inputs(), outputs), Err(error));

    let fp8 = Tensors::<f16, F8E4M3>::random(&batch);
    let outputs = Outputs { o: &mut vec![f16::ZERO; o], lse: None };
    let error = CpuError::KvDType { found: KvDType::E4m3, needed: KvDType::Same };
    assert_eq!(execute(&plan, fp8.inputs(), outputs), Err(error));

    let error = CpuError::NoSuchToken { token: 3, num_query_tokens: 3 };
    assert_eq!(reference::attention(&batch, good, &[0, 3]), Err(error));
}
