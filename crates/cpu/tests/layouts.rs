//! The same KV in the page layouts of other engines gives the same result.

use std::num::NonZeroU32;

use float8::F8E4M3;
use half::bf16;
use packinfer_batch::{AttentionShape, Batch, DType, KvDType, KvLayout, Mask, PageOrder, PagedLayout};
use packinfer_cpu::{
    CpuError, Element, Inputs, KvElement, Options, Outputs, execute, random_elements, reference, relative_error,
};
use packinfer_planner::{DeviceModel, Planner};

const KV_HEADS: u32 = 3;
/// The second has pages that follow each other in the pool.
const LENGTHS: [(u32, u32); 5] = [(1, 700), (40, 65), (3, 24), (1, 1), (0, 9)];

fn shape(head_dim: u32, kv_dtype: KvDType) -> AttentionShape {
    let shape = AttentionShape::new(4 * KV_HEADS, KV_HEADS, head_dim, DType::Bf16).expect("a good shape");
    shape.with_kv_dtype(kv_dtype)
}

/// The requests in pages of a pool; every other page is somebody else's.
fn batch(shape: AttentionShape, kv_layout: KvLayout, page_size: u32) -> Batch {
    let mut batch = Batch::in_layout(shape, Mask::Causal, kv_layout).expect("a good layout");
    let mut last = 250;
    for (query_len, kv_len) in LENGTHS {
        let count = kv_len.div_ceil(page_size);
        let block_table: Vec<u32> =
            if query_len == 40 { (300..300 + count).collect() } else { (0..count).map(|page| last - 2 * page).collect() };
        last -= 2 * count;
        batch.push_paged(query_len, kv_len, &block_table, page_size).expect("a good request");
    }
    batch
}

/// Where head `head` of slot `slot` begins in a tensor `[pages, page_stride, …]` whose page `first_page` is the first.
fn place(
    (page_size, order, page_stride): (u32, PageOrder, NonZeroU32),
    shape: AttentionShape,
    first_page: usize,
    slot: usize,
    head: usize,
) -> usize {
    let [size, heads, dim] = [page_size, shape.num_kv_heads(), shape.head_dim()].map(|n| n as usize);
    let page = slot / size * page_stride.get() as usize + first_page;
    match order {
        PageOrder::Nhd => ((page * size + slot % size) * heads + head) * dim,
        PageOrder::Hnd => ((page * heads + head) * size + slot % size) * dim,
    }
}

/// O of the batch by a plan, and exact.
fn attend<K: KvElement<bf16>>(batch: &Batch, inputs: Inputs<'_, bf16, K>) -> (Vec<bf16>, Vec<f64>) {
    let plan = Planner::new(DeviceModel { num_sms: 4, ..DeviceModel::H100 }).plan(batch).expect("a plan");
    let mut o = vec![bf16::NAN; inputs.q.len()];
    execute(&plan, inputs, Outputs { o: &mut o, lse: None }).expect("buffers that fit");
    let tokens: Vec<u32> = (0..batch.num_query_tokens()).collect();
    (o, reference::attention(batch, inputs, &tokens).expect("buffers that fit").o)
}

/// Compares all layouts of pages of a size with slots one after the other.
fn check<K: KvElement<bf16>>(page_size: u32, shape: AttentionShape) {
    let slots = batch(shape, KvLayout::Slots, page_size);
    let num_slots = slots.num_slots().next_multiple_of(page_size);
    let q = random_elements::<bf16>(slots.num_query_tokens() as usize * shape.qo_elements_per_token() as usize, 1);
    let len = num_slots as usize * shape.kv_elements_per_slot() as usize;
    let kv = [random_elements::<K>(len, 2), random_elements::<K>(len, 3)];
    let options = Options::default();
    let (expected, exact) = attend(&slots, Inputs { q: &q, k: &kv[0], v: &kv[1], options });
    assert!(relative_error(&expected, &exact) <= bf16::TOLERANCE);

    for (order, page_stride) in [PageOrder::Nhd, PageOrder::Hnd].into_iter().flat_map(|order| [1, 2, 5].map(|n| (order, n))) {
        let page_stride = NonZeroU32::new(page_stride).expect("not zero");
        let pages = PagedLayout::new(page_size, order).expect("a good size").with_stride(page_stride);
        let batch = batch(shape, pages.into(), page_size);
        assert_eq!(batch.num_slots(), num_slots);
        // In one tensor of which K has the first pages and V the second, and others the rest; or in two tensors.
        let (v_pool, v_page) = if page_stride.get() == 1 { (1, 0) } else { (0, 1) };
        let mut pools = [(); 2].map(|()| random_elements::<K>(len * page_stride.get() as usize, 4));
        for (from, pool, first_page) in [(&kv[0], 0, 0), (&kv[1], v_pool, v_page)] {
            for (index, from) in from.chunks(shape.head_dim() as usize).enumerate() {
                let at = place(
                    (page_size, order, page_stride),
                    shape,
                    first_page,
                    index / KV_HEADS as usize,
                    index % KV_HEADS as usize,
                );
                pools[pool][at..][..from.len()].copy_from_slice(from);
            }
        }
        // Not an element more than is needed.
        let needed = batch.kv_elements() as usize;
        let k = &pools[0][..needed];
        let v = &pools[v_pool][v_page * pages.page_elements(shape) as usize..][..needed];
        let inputs = Inputs { q: &q, k, v, options };
        let (o, exact_in_pages) = attend(&batch, inputs);
        assert!(exact_in_pages == exact, "{}", batch.kv_layout());
        assert!(relative_error(&o, &exact) <= bf16::TOLERANCE, "{}", batch.kv_layout());

        let plan = Planner::default().plan(&batch).expect("a plan");
        let outputs = Outputs { o: &mut vec![bf16::ZERO; q.len()], lse: None };
        let error = execute(&plan, Inputs { v: &v[1..], ..inputs }, outputs).expect_err("V is too short");
        let (found, needed) = (needed - 1, needed as u64);
        assert_eq!(error, CpuError::PoolTooSmall { buffer: "V", found, num_slots, needed });
    }
}

#[test]
fn all_layouts_give_the_same() {
    for page_size in [8, 16, 24, 64] {
        for head_dim in [64, 128] {
            check::<bf16>(page_size, shape(head_dim, KvDType::Same));
        }
    }
}

#[test]
fn all_layouts_give_the_same_in_fp8() {
    for page_size in [8, 16, 24, 64] {
        check::<F8E4M3>(page_size, shape(64, KvDType::E4m3));
    }
}
