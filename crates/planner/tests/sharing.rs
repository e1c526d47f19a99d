//! KV that several requests begin with is read once for all of them, where that is faster.

use packinfer_abi::KvRun;
use packinfer_batch::{AttentionShape, Batch, BatchFile, DType, Mask, RequestLengths};
use packinfer_planner::{DeviceModel, Explanation, KernelFamily, Packing, Plan, Planner};
use proptest::prelude::*;

mod check;
use check::{assert_in_order, assert_valid};

/// Tokens of a block.
const BLOCK: u32 = 512;

/// 32 query and 8 KV heads.
fn shape() -> AttentionShape {
    AttentionShape::new(32, 8, 128, DType::Bf16).expect("a good shape")
}

/// A batch of that shape from (query_len, kv_len, blocks).
fn batch(requests: impl IntoIterator<Item = (u32, u32, Vec<u64>)>) -> Batch {
    let request = |(query_len, kv_len, blocks)| RequestLengths { query_len, kv_len, blocks };
    let file =
        BatchFile { block_tokens: Some(BLOCK), requests: requests.into_iter().map(request).collect(), ..BatchFile::builtin() };
    file.to_batch(1).expect("a good batch")
}

fn plan_for(batch: &Batch, model: DeviceModel, packing: Packing) -> Plan {
    let plan = Planner::new(model).with_packing(packing).plan(batch).expect("a batch that can be planned");
    assert_valid(batch, &plan);
    assert_in_order(batch, &plan, &model);
    plan
}

/// What is expected of a plan for an H100, with shared reads and without.
fn explain(batch: &Batch) -> [Explanation; 2] {
    [Packing::Packed, Packing::Unshared].map(|packing| plan_for(batch, DeviceModel::H100, packing).explain(&DeviceModel::H100))
}

/// Panics unless the bytes that come from memory are within a tenth of the batch's.
fn assert_reads_once(explanation: &Explanation) {
    let (read, distinct) = (explanation.kv_memory_bytes as f64, explanation.distinct_kv_bytes as f64);
    assert!((read / distinct - 1.0).abs() <= 0.1, "{read} bytes read, {distinct} bytes in the batch");
}

/// 64 decodes that share 8192 tokens.
fn shared_8k() -> Batch {
    batch((0..64).map(|i| (1, 8192 + 256 + (i * 367) % 769, (0..16).collect())))
}

#[test]
fn a_shared_prefix_is_read_once() {
    let [shared, unshared] = explain(&shared_8k());
    assert_reads_once(&shared);
    assert_eq!(shared.shared_tiles, 2); // 32 tokens of 4 query heads fill one
    assert_eq!((unshared.shared_tiles, unshared.kv_bytes > 9 * unshared.distinct_kv_bytes), (0, true));
    assert!(shared.predicted_us < 0.2 * unshared.predicted_us, "{} µs, {} µs", shared.predicted_us, unshared.predicted_us);
    assert!(shared.balance > 0.9, "balance {}", shared.balance);
}

#[test]
fn three_levels_are_read_once_each() {
    let text = include_str!("../../../benches/batches/decode_tree_96.json");
    let batch = BatchFile::from_json(text).expect("a batch file").to_batch(0).expect("a good batch");
    let [shared, unshared] = explain(&batch);
    assert_reads_once(&shared);
    assert_eq!(shared.shared_tiles, 3 + 4); // of 96 tokens, and of 4 × 24
    assert!(shared.predicted_us < 0.3 * unshared.predicted_us, "{} µs, {} µs", shared.predicted_us, unshared.predicted_us);
}

/// As in a trace of conversations: one block that all begin with, then long histories, of which few have more in common.
#[test]
fn conversations_with_one_common_block() {
    let history = |i: u64| (0..1 + i * 7 % 40).map(move |block| if i % 6 == 5 { 1000 + block } else { 100 * (i + 11) + block });
    let blocks = |i| std::iter::once(0).chain(history(i)).collect::<Vec<u64>>();
    let batch = batch((0..48).map(|i| (1, blocks(i).len() as u32 * BLOCK + 17 * i as u32 + 1, blocks(i))));
    let [shared, unshared] = explain(&batch);
    assert_reads_once(&shared);
    assert!(unshared.kv_bytes as f64 > 1.15 * unshared.distinct_kv_bytes as f64);
    assert!(shared.predicted_us < unshared.predicted_us);
}

#[test]
fn several_query_tokens_share_what_all_of_them_see() {
    let batch = batch((0..32).map(|i| (1 + i % 9, 4096 + 40 + i, (0..8).collect())));
    let [shared, unshared] = explain(&batch);
    assert_reads_once(&shared);
    assert!(shared.predicted_us < unshared.predicted_us);
    // Requests that are alike to the end: what their query tokens do not all see is each one's own.
    let [shared, unshared] = explain(&self::batch((0..32).map(|_| (5, 4096, (0..8).collect()))));
    assert!(shared.shared_tiles > 0 && shared.predicted_us < unshared.predicted_us);
}

#[test]
fn a_few_shared_tokens_are_not_worth_a_merge() {
    let mut batch = Batch::new(shape(), Mask::Causal);
    for i in 0..128 {
        let runs = [(0, 20), (100 + 5000 * i, 4000)].map(|(first_slot, num_slots)| KvRun { first_slot, num_slots });
        batch.push_runs(1, 4020, runs).expect("a good request");
    }
    let [shared, unshared] = explain(&batch);
    assert_eq!(shared, unshared);
}

/// Prompts are limited by their products, of which sharing saves none.
#[test]
fn long_prompts_read_by_themselves() {
    let [shared, unshared] = explain(&batch((0..4).map(|i| (4096, 4608, vec![0, 10 + i]))));
    assert_eq!(shared, unshared);
}

#[test]
fn without_a_mask_everything_is_shared() {
    let mut batch = Batch::new(shape(), Mask::None);
    for i in 0..40 {
        batch.push_contiguous(1 + i % 3, 20_000, 0).expect("a good request");
    }
    let [shared, _] = explain(&batch);
    assert_reads_once(&shared);
    assert_eq!((shared.narrow_tiles, shared.wide_tiles), (0, shared.shared_tiles));
}

/// What a step reads decides on the kernels, not what its requests have together.
#[test]
fn shared_kv_counts_once_for_the_kernels() {
    let fast_memory = DeviceModel { bytes_per_s: 1.5 * DeviceModel::H100.bytes_per_s, ..DeviceModel::H100 };
    let models = DeviceModel::estimates_for_device("H100", (9, 0), 132);
    let fast_products = *models.iter().find(|model| model.kernel_family == KernelFamily::Sm90a).expect("an H100 runs them");
    let mut planner = Planner::choosing(vec![fast_memory, fast_products]);
    let mut family = |packing| {
        planner = planner.clone().with_packing(packing);
        let batch = batch((0..64).map(|i| (8, 16_384 + 8 + i, (0..32).collect())));
        planner.plan(&batch).expect("a batch that can be planned").model().kernel_family
    };
    assert_eq!(family(Packing::Unshared), KernelFamily::Sm80);
    assert_eq!(family(Packing::Packed), KernelFamily::Sm90a);
}

/// Nested prefixes, each request one block longer than the one before.
#[test]
fn deep_trees_are_planned() {
    for (requests, step) in [(300, 512), (4000, 16)] {
        let mut batch = Batch::new(shape(), Mask::Causal);
        for i in 0..requests {
            batch.push_contiguous(1, 1 + step * i, 0).expect("a good request");
        }
        let [shared, unshared] = explain(&batch);
        assert!(shared.predicted_us < 0.5 * unshared.predicted_us);
        // Not every request is in a group at each of up to 4000 levels.
        assert!(
            shared.merge_tokens <= requests && shared.partial_rows < 50 * 4 * requests,
            "{} partial rows",
            shared.partial_rows
        );
    }
}

/// Any tree: blocks of few ids, so that requests have paths of many lengths in common.
fn any_tree() -> impl Strategy<Value = Batch> {
    let heads = (1..=3u32, prop::sample::select(vec![1, 4, 7, 32]));
    let pages = prop::sample::select(vec![(1, 7), (1, 100), (16, 4), (16, 20), (50, 10)]);
    let most_query_tokens = prop::sample::select(vec![1, 9, 200u32]);
    let blocks = prop::collection::vec(0..2u64, 0..7);
    let requests = prop::collection::vec((any::<prop::sample::Index>(), blocks, 0..200u32), 0..80);
    (heads, pages, any::<bool>(), most_query_tokens, requests, any::<u64>()).prop_map(
        |(heads, (page_size, pages), causal, most, requests, seed)| {
            let block_tokens = page_size * pages;
            let requests = requests.into_iter().map(|(query_len, blocks, own)| {
                let query_len = query_len.index(most as usize + 1) as u32;
                let kv_len = (blocks.len() as u32 * block_tokens + own).max(query_len);
                RequestLengths { query_len, kv_len, blocks }
            });
            let file = BatchFile {
                num_qo_heads: heads.0 * heads.1,
                num_kv_heads: heads.0,
                page_size,
                causal,
                block_tokens: Some(block_tokens),
                requests: requests.collect(),
                ..BatchFile::builtin()
            };
            file.to_batch(seed).expect("a good batch")
        },
    )
}

/// What was measured; and devices with few multiprocessors, or next to no memory bandwidth: sharing pays early.
fn any_model() -> impl Strategy<Value = DeviceModel> {
    let slow = DeviceModel { bytes_per_s: 1e10, item_ns: 10.0, merge_ns: 0.0, ..DeviceModel::H100 };
    let measured: Vec<_> = ["H100", "H200"]
        .iter()
        .flat_map(|device| DeviceModel::all_for_device(device, (9, 0), 132))
        .filter(|model| model.head_dim == 128)
        .collect();
    prop_oneof![
        prop::sample::select(measured),
        Just(DeviceModel::H100),
        (1..40u32).prop_map(|num_sms| DeviceModel { num_sms, ..DeviceModel::H100 }),
        (1..200u32).prop_map(move |num_sms| DeviceModel { num_sms, ..slow }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn any_tree_is_planned(batch in any_tree(), model in any_model()) {
        let [shared, unshared] = [Packing::Packed, Packing::Unshared].map(|packing| plan_for(&batch, model, packing).explain(&model));
        prop_assert!(shared.predicted_us <= unshared.predicted_us, "{} µs, {} µs", shared.predicted_us, unshared.predicted_us);
        prop_assert!(shared.kv_bytes >= shared.distinct_kv_bytes);
        prop_assert_eq!(shared.flops_needed, unshared.flops_needed);
        prop_assert_eq!(shared.distinct_kv_bytes, unshared.distinct_kv_bytes);
        prop_assert_eq!(unshared.shared_tiles, 0);
    }
}
