//! Every plan does all of the work, and none of it twice.

use packinfer_abi::{MOST_NARROW_LOADERS, TALL_TILE_ROWS, TileKind, WIDE_TILE_ROWS};
use packinfer_batch::{AttentionShape, Batch, DType, KvDType, Mask};
use packinfer_planner::{BesideTimes, DeviceModel, KernelFamily, Packing, Plan, Planner, TileTimes};
use proptest::prelude::*;

mod check;
use check::{assert_in_order, assert_valid};

fn shape(num_kv_heads: u32, gqa_ratio: u32) -> AttentionShape {
    shape_of(num_kv_heads, gqa_ratio, 128)
}

fn shape_of(num_kv_heads: u32, gqa_ratio: u32, head_dim: u32) -> AttentionShape {
    AttentionShape::new(num_kv_heads * gqa_ratio, num_kv_heads, head_dim, DType::Bf16).expect("a good shape")
}

/// A packed plan, checked; so is the one without packing.
fn checked(batch: &Batch, model: DeviceModel) -> Plan {
    let mut planner = Planner::new(model);
    let plan = planner.plan(batch).expect("a batch that can be planned");
    assert_valid(batch, &plan);
    assert_in_order(batch, &plan, &model);

    let mut planner = planner.with_packing(Packing::PerRequest);
    let per_request = planner.plan(batch).expect("a batch that can be planned");
    assert_valid(batch, &per_request);
    assert!(per_request.merge_tokens().is_empty());
    for item in per_request.items() {
        assert_eq!(item.num_segments, 1, "a tile of several requests");
    }
    plan
}

/// A batch of (query_len, kv_len) in contiguous KV, of which no two requests begin at the same slot if there is room for that.
fn contiguous(shape: AttentionShape, mask: Mask, lengths: impl IntoIterator<Item = (u32, u32)>) -> Batch {
    let mut batch = Batch::new(shape, mask);
    for (query_len, kv_len) in lengths {
        let first_slot = batch.requests().len() as u32;
        batch.push_contiguous(query_len, kv_len, first_slot.min(Batch::MAX_SLOTS - kv_len)).expect("a good request");
    }
    batch
}

/// Query tokens and KV tokens that were there before: decodes, drafts to verify, chunks and prompts, empty requests.
fn any_lengths() -> impl Strategy<Value = (u32, u32)> {
    prop_oneof![
        3 => (Just(1), 0..100u32),
        3 => (Just(1), 100..5000u32),
        2 => (2..20u32, 0..2000u32),
        2 => (1..200u32, Just(0)),
        1 => (1..700u32, 0..1000u32),
        1 => (Just(0), prop_oneof![Just(0), 1..300u32]),
    ]
}

fn window(tokens: u32) -> Mask {
    Mask::Window(tokens.try_into().expect("not zero"))
}

/// Windows of a token, shorter than a step of columns, longer than most requests, and as long as can be.
fn any_window() -> impl Strategy<Value = Mask> {
    prop_oneof![Just(1), 2..64u32, 64..2000u32, Just(u32::MAX)].prop_map(window)
}

/// Batches of every kind in scattered pages of a few sizes, 0 for contiguous KV; pages may be shared.
fn any_batch() -> impl Strategy<Value = Batch> {
    any_batch_of(&[64, 128, 256], &[KvDType::Same, KvDType::E4m3])
}

/// The same with these head dimensions and element types of K and V.
fn any_batch_of(head_dims: &[u32], kv_dtypes: &[KvDType]) -> impl Strategy<Value = Batch> + use<> {
    let (head_dim, kv_dtype) = (prop::sample::select(head_dims.to_vec()), prop::sample::select(kv_dtypes.to_vec()));
    let shape = (1..=3u32, prop::sample::select(vec![1, 2, 4, 7, 8, 16, 32]), head_dim, kv_dtype);
    let shape = shape.prop_map(|(kv, ratio, head_dim, kv_dtype)| shape_of(kv, ratio, head_dim).with_kv_dtype(kv_dtype));
    let mask = prop_oneof![2 => Just(Mask::Causal), 1 => Just(Mask::None), 2 => any_window()];
    let page_size = prop::sample::select(vec![0, 1, 16, 50]);
    (shape, mask, page_size, prop::collection::vec(any_lengths(), 0..60), any::<u32>()).prop_map(
        |(shape, mask, page_size, lengths, seed)| {
            let mut batch = Batch::new(shape, mask);
            for (query_len, cached) in lengths {
                let kv_len = query_len + cached;
                let pushed = match kv_len.checked_div(page_size) {
                    None => batch.push_contiguous(query_len, kv_len, seed % 1000),
                    Some(pages) => {
                        let first = batch.runs().len() as u32;
                        let scattered = |page: u32| (seed ^ (first + page)).wrapping_mul(0x9e37_79b1) >> 16;
                        let pages: Vec<u32> = (0..=pages).map(scattered).collect();
                        batch.push_paged(query_len, kv_len, &pages, page_size)
                    }
                };
                pushed.expect("a good request");
            }
            batch
        },
    )
}

/// Bytes cost next to nothing, products less, and it is faster to do narrow tiles beside wide ones than in turn: K and V in FP8
/// are made what Q is for wide tiles wherever they can be.
fn eager_hopper() -> DeviceModel {
    let beside = Some(BesideTimes { wide: 0.5, narrow: 0.5, stored_step_ns: 0.0 });
    let (bytes_per_s, flops_per_s) = (1e17, 1e20);
    DeviceModel { kernel_family: KernelFamily::Sm90a, bytes_per_s, flops_per_s, launch_ns: 0.0, beside, ..DeviceModel::H100 }
}

fn any_model() -> impl Strategy<Value = DeviceModel> {
    prop_oneof![
        Just(DeviceModel::H100),
        Just(DeviceModel::A100),
        Just(DeviceModel { kernel_family: KernelFamily::Sm90a, ..DeviceModel::H100 }),
        // Bytes cost nothing: K and V in FP8 are made what Q is wherever they can be.
        Just(DeviceModel { kernel_family: KernelFamily::Sm90a, bytes_per_s: 1e18, launch_ns: 0.0, ..DeviceModel::H100 }),
        Just(eager_hopper()),
        (1..200u32).prop_map(|num_sms| DeviceModel::generic(num_sms, (8, 9))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn any_batch_is_planned(batch in any_batch(), model in any_model()) {
        let plan = checked(&batch, model);

        let explanation = plan.explain(&model);
        let pairs = batch.visible_pairs() as f64;
        prop_assert_eq!(explanation.flops_needed, pairs * 4.0 * batch.shape().qo_elements_per_token() as f64);
        prop_assert!(explanation.flops_issued >= explanation.flops_needed);
        prop_assert_eq!(explanation.distinct_kv_bytes, batch.distinct_slots() * plan.attended().shape.kv_bytes_per_slot());
        prop_assert!(explanation.kv_bytes >= explanation.distinct_kv_bytes);
        prop_assert!(explanation.balance > 0.0 && explanation.balance <= 1.0 + 1e-9);
    }

    #[test]
    fn wide_tiles_read_what_is_made_of_their_slots(batch in any_batch_of(&[64, 128], &[KvDType::E4m3])) {
        checked(&batch, eager_hopper());
    }

    #[test]
    fn memory_of_other_plans_leaves_no_trace(
        first in any_batch(),
        second in any_batch(),
        model in prop_oneof![Just(DeviceModel::H100), Just(eager_hopper())],
    ) {
        let mut planner = Planner::new(model);
        let mut plan = planner.plan(&first).expect("a batch that can be planned");
        planner.plan_into(&second, &mut plan).expect("a batch that can be planned");
        let fresh = Planner::new(model).plan(&second).expect("a batch that can be planned");
        prop_assert_eq!(format!("{plan:?}"), format!("{fresh:?}"));
    }

    #[test]
    fn extreme_lengths_are_planned(
        lengths in prop::collection::vec((0..=40u32, prop_oneof![Just(1u32 << 31), (1u32 << 20)..1 << 31, 40..100u32]), 1..8),
        ratio in prop::sample::select(vec![1, 4, 7]),
    ) {
        for mask in [Mask::Causal, window(1 << 20)] {
            let plan = checked(&contiguous(shape(8, ratio), mask, lengths.iter().copied()), DeviceModel::H100);
            prop_assert!(plan.items().len() < 4096, "{} items", plan.items().len());
        }
    }
}

#[test]
fn absurd_models_do_no_harm() {
    let lengths = (0..40).map(|i| (1 + i % 37, 100 + 900 * i));
    let batch = contiguous(shape(8, 4), Mask::Causal, lengths);
    for number in [0.0, f64::MIN_POSITIVE, 1e300, f64::INFINITY, f64::NAN, -1.0] {
        let absurd = [
            DeviceModel { bytes_per_s: number, ..DeviceModel::H100 },
            DeviceModel { flops_per_s: number, ..DeviceModel::H100 },
            DeviceModel { item_ns: number, ..DeviceModel::H100 },
            DeviceModel {
                wide: TileTimes { setup_ns: number, step_ns: number },
                narrow: TileTimes { setup_ns: number, step_ns: number },
                ..DeviceModel::H100
            },
            DeviceModel {
                bytes_per_s: number,
                cached_bytes_per_s: number,
                flops_per_s: number,
                item_ns: 0.0,
                ..DeviceModel::H100
            },
        ];
        for model in absurd {
            checked(&batch, model).explain(&model);
        }
    }
    checked(&batch, DeviceModel { num_sms: u32::MAX, blocks_per_sm: 0, ..DeviceModel::H100 });
    checked(&batch, DeviceModel { num_sms: u32::MAX, ..DeviceModel::H100 });
}

#[test]
fn no_requests() {
    let plan = checked(&contiguous(shape(8, 4), Mask::Causal, []), DeviceModel::H100);
    assert!(plan.items().is_empty() && plan.runs().is_empty());
    assert_eq!(plan.explain(&DeviceModel::H100).predicted_us, 0.0);
}

#[test]
fn most_requests() {
    let lengths = (0..Batch::MAX_REQUESTS as u32).map(|i| (i % 3, 2 + i % 200));
    let plan = checked(&contiguous(shape(8, 4), Mask::Causal, lengths), DeviceModel::H100);
    assert!(plan.items().len() < Batch::MAX_REQUESTS / 2, "{} items", plan.items().len());
}

#[test]
fn longest_prompt() {
    let tokens = Batch::MAX_QUERY_TOKENS;
    let batch = contiguous(shape(1, 1), Mask::Causal, [(tokens, tokens)]);
    let plan = Planner::new(DeviceModel::H100).plan(&batch).expect("a batch that can be planned");
    assert_eq!(plan.items().len() as u32, tokens / plan.heads().tile_rows(TileKind::Wide));
}

#[test]
fn wide_tiles_have_as_many_rows_as_the_kernels_take() {
    let batch = contiguous(shape_of(2, 4, 256), Mask::Causal, [(128, 500), (1, 1000)]);
    for (kernel_family, rows) in [(KernelFamily::Sm80, 64), (KernelFamily::Sm90a, 128)] {
        let plan = checked(&batch, DeviceModel { kernel_family, ..DeviceModel::H100 });
        assert_eq!(plan.heads().tile_rows(TileKind::Wide), rows);
    }
}

#[test]
fn tiles_of_prompts_are_tall_where_there_are_kernels_for_that() {
    let mut models = DeviceModel::estimates_for_device("NVIDIA H100 80GB HBM3", (9, 0), 132).into_iter();
    let hopper = models.find(|model| model.kernel_family == KernelFamily::Sm90a).expect("it has such kernels");
    let prompts = || (0..40).map(|i| (100 + 50 * i, 100 + 50 * i));
    let decodes = |count: u32| (0..count).map(|i| (1, 1000 + i));
    let rows = |model, shape, lengths: &mut dyn Iterator<Item = (u32, u32)>| {
        checked(&contiguous(shape, Mask::Causal, lengths), model).heads().wide_tile_rows
    };
    for head_dim in [64, 96, 128] {
        for gqa_ratio in [1, 3, 4, 7, 16] {
            let shape = shape_of(2, gqa_ratio, head_dim);
            assert_eq!(rows(hopper, shape, &mut prompts()), TALL_TILE_ROWS);
            assert_eq!(rows(DeviceModel::H100, shape, &mut prompts()), WIDE_TILE_ROWS);
            // Not beside much else.
            assert_eq!(rows(hopper, shape, &mut prompts().chain(decodes(1))), TALL_TILE_ROWS);
            assert_eq!(rows(hopper, shape, &mut prompts().chain(decodes(500))), WIDE_TILE_ROWS);
            assert_eq!(rows(hopper, shape, &mut decodes(500)), WIDE_TILE_ROWS);
        }
    }
    assert_eq!(rows(hopper, shape_of(2, 4, 256), &mut prompts()), WIDE_TILE_ROWS);
    // In FP8 if K and V are made what Q is before.
    let fp8 = shape(2, 4).with_kv_dtype(KvDType::E4m3);
    assert_eq!(rows(hopper, fp8, &mut prompts()), TALL_TILE_ROWS);
    assert_eq!(rows(hopper, fp8, &mut prompts().chain(decodes(500))), WIDE_TILE_ROWS);
    // Requests that fill less than a tile each.
    assert_eq!(rows(hopper, shape(2, 4), &mut (0..40).map(|i| (8, 500 + i))), WIDE_TILE_ROWS);
}

/// More warps bring narrow tiles in FP8 where rows are short, or where few multiprocessors have such tiles.
#[test]
fn narrow_tiles_in_fp8_may_have_more_loaders() {
    let mut planner = Planner::choosing(DeviceModel::all_for_device("NVIDIA H100 80GB HBM3", (9, 0), 132));
    let mut loaders = |head_dim, kv_dtype, chunk: u32| {
        let decodes = (0..200).map(|request| (1, 1500 + request));
        let chunks = (0..4).map(|_| (chunk, chunk + 2000)).filter(|_| chunk > 0);
        let batch = contiguous(shape_of(8, 4, head_dim).with_kv_dtype(kv_dtype), Mask::Causal, decodes.chain(chunks));
        planner.plan(&batch).expect("a batch that can be planned").narrow_loaders()
    };
    assert_eq!([64, 96, 128, 256].map(|head_dim| loaders(head_dim, KvDType::E4m3, 0)), [MOST_NARROW_LOADERS, 1, 1, 1]);
    assert_eq!(
        [64, 96, 128].map(|head_dim| loaders(head_dim, KvDType::E4m3, 600)),
        [MOST_NARROW_LOADERS, MOST_NARROW_LOADERS, 1]
    );
    assert_eq!([64, 128].map(|head_dim| loaders(head_dim, KvDType::Same, 0)), [1; 2]);
}

#[test]
fn one_long_decode_fills_the_device() {
    let plan = checked(&contiguous(shape(8, 4), Mask::Causal, [(1, 131_072)]), DeviceModel::H100);
    let explanation = plan.explain(&DeviceModel::H100);
    assert_eq!(explanation.merge_tokens, 1);
    assert!(explanation.balance > 0.9, "balance {}", explanation.balance);
}

#[test]
fn straggler_does_not_hold_up_the_others() {
    let lengths = (0..64).map(|i| (1, if i == 40 { 131_072 } else { 512 }));
    let batch = contiguous(shape(8, 4), Mask::Causal, lengths);
    let explanation = checked(&batch, DeviceModel::H100).explain(&DeviceModel::H100);
    assert!(explanation.balance > 0.95, "balance {}", explanation.balance);
    // Not every tile has to be split for that.
    assert!(explanation.split_tiles < 24, "{} split tiles", explanation.split_tiles);
}

#[test]
fn short_requests_share_tiles() {
    let prompts = contiguous(shape(8, 4), Mask::Causal, (0..2048).map(|_| (8, 8)));
    assert_eq!(checked(&prompts, DeviceModel::H100).items().len(), 2048 / 4);
    let decodes = contiguous(shape(8, 4), Mask::Causal, (0..4096).map(|_| (1, 10)));
    assert_eq!(checked(&decodes, DeviceModel::H100).items().len(), 4096 / 4);
}

#[test]
fn few_requests_do_not_wait_for_each_other() {
    let plan = checked(&contiguous(shape(8, 4), Mask::Causal, (0..8).map(|_| (8, 8))), DeviceModel::H100);
    assert_eq!(plan.items().len(), 8);
}

/// What is before the windows takes nothing: it is as if it were not there.
#[test]
fn windows_bound_the_work() {
    let within = |kv_len| checked(&contiguous(shape(8, 4), window(1024), (0..64).map(|_| (1, kv_len))), DeviceModel::H100);
    let [short, long] = [1024, 1_000_000].map(|kv_len| within(kv_len).explain(&DeviceModel::H100));
    assert_eq!(short, long);
    let prompt = checked(&contiguous(shape(8, 4), window(100), [(5000, 5000)]), DeviceModel::H100);
    // 32 tokens of a tile see 131 columns together.
    assert!(prompt.items().iter().all(|item| item.column_end <= 131), "{:?}", prompt.items());
}

#[test]
fn equal_work_needs_no_split() {
    let plan = checked(&contiguous(shape(8, 4), Mask::Causal, (0..132).map(|_| (1, 4096))), DeviceModel::H100);
    assert_eq!(plan.items().len(), 132);
    assert_eq!(plan.num_partial_rows(), 0);
}

/// Of two families, a planner takes the one that needs less time; and the later one if both need about the same.
#[test]
fn the_faster_kernels_are_chosen() {
    let [sm_80, sm_90a] = h100_models();
    let slow_products = DeviceModel { flops_per_s: sm_80.flops_per_s / 4.0, ..sm_90a };
    let slow_memory = DeviceModel { bytes_per_s: sm_80.bytes_per_s / 2.0, ..sm_90a };
    let kernels = |hopper, query_len, kv_len| {
        let batch = contiguous(shape(8, 4), Mask::Causal, (0..4).map(|_| (query_len, kv_len)));
        let plan = Planner::choosing(vec![sm_80, hopper]).plan(&batch).expect("a batch that can be planned");
        plan.model().kernel_family
    };
    for (query_len, kv_len) in [(1, 8192), (8192, 8192), (64, 64), (4, 2048)] {
        assert_eq!(kernels(sm_90a, query_len, kv_len), KernelFamily::Sm90a, "{query_len} of {kv_len}");
    }
    assert_eq!(kernels(slow_products, 1, 8192), KernelFamily::Sm90a);
    assert_eq!(kernels(slow_products, 8192, 8192), KernelFamily::Sm80);
    assert_eq!(kernels(slow_memory, 1, 8192), KernelFamily::Sm80);
    assert_eq!(kernels(slow_memory, 8192, 8192), KernelFamily::Sm90a);
    // Models are not better than that: fitted ones of the same memory differ by more than 5 %.
    let about_as_fast = DeviceModel { bytes_per_s: sm_80.bytes_per_s * 0.93, ..sm_90a };
    assert_eq!(kernels(about_as_fast, 1, 8192), KernelFamily::Sm90a);
}

/// Those of an H100 with a head dimension of 128, for sm_80 and for sm_90a.
fn h100_models() -> [DeviceModel; 2] {
    let models = DeviceModel::all_for_device("NVIDIA H100 80GB HBM3", (9, 0), 132);
    let of_family = |family| models.iter().find(|model| model.kernel_family == family && model.head_dim == 128).copied();
    KernelFamily::ALL.map(|family| of_family(family).expect("an H100 runs both"))
}

/// Prompts are for the kernels of Hopper, whatever the head dimension, and whatever K and V are stored in.
#[test]
fn hopper_has_kernels_for_all_shapes() {
    let mut planner = Planner::choosing(DeviceModel::all_for_device("NVIDIA H100 80GB HBM3", (9, 0), 132));
    for head_dim in AttentionShape::HEAD_DIMS {
        for kv_dtype in [KvDType::Same, KvDType::E4m3] {
            let batch = contiguous(shape_of(8, 4, head_dim).with_kv_dtype(kv_dtype), Mask::Causal, [(8192, 8192)]);
            let plan = planner.plan(&batch).expect("a batch that can be planned");
            assert_eq!(plan.model().kernel_family, KernelFamily::Sm90a, "{head_dim} {kv_dtype}");
        }
    }
}
