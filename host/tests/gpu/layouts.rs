//! KV in the page layouts of other engines.

use std::num::NonZeroU32;

use float8::F8E4M3;
use half::{bf16, f16};
use packinfer::{
    AttentionShape, Batch, Engine, EngineError, KvDType, KvLayout, Mask, Packing, PageOrder, PagedLayout, Planner, RunOptions,
    Tensors,
};
use packinfer_cpu::random_elements;

use crate::MIXED;
use crate::case::{Case, Element, KvElement, engine, in_pages, shape};

const ORDERS: [PageOrder; 2] = [PageOrder::Nhd, PageOrder::Hnd];
/// K and V apart; K and V of a page beside each other; as well, in a tensor of three layers.
const STRIDES: [u32; 3] = [1, 2, 6];

/// A batch in pages of a layout, handed out from the last one backwards.
fn batch_in(order: PageOrder, page_size: u32, page_stride: u32, shape: AttentionShape) -> Batch {
    let page_stride = NonZeroU32::new(page_stride).expect("not zero");
    let pages = PagedLayout::new(page_size, order).expect("a good size").with_stride(page_stride);
    in_pages(Batch::in_layout(shape, Mask::Causal, pages.into()).expect("a good layout"), &MIXED, page_size)
}

/// Compares with exact attention what each family of kernels makes of a case.
fn check<E: Element, K: KvElement<E>>(engine: &Engine, case: &Case<E, K>) {
    let mut models = engine.device().models();
    models.retain(|model| engine.kernel_families().contains(&model.kernel_family));
    for model in models {
        let plan = Planner::new(model).plan(&case.batch).expect("the batch can be planned");
        assert_eq!(plan.model().kernel_family, model.kernel_family);
        case.check(&case.run_plan(engine, &plan));
    }
}

fn check_pages<E: Element, K: KvElement<E>>(page_size: u32, kv_dtype: KvDType) {
    let Some(engine) = engine() else { return };
    for order in ORDERS {
        for page_stride in STRIDES {
            for head_dim in AttentionShape::HEAD_DIMS {
                let shape = shape::<E>(4, head_dim).with_kv_dtype(kv_dtype);
                check(engine, &Case::<E, K>::new(batch_in(order, page_size, page_stride, shape)));
            }
        }
    }
}

#[test]
fn pages_of_8_slots() {
    check_pages::<bf16, bf16>(8, KvDType::Same);
}

#[test]
fn pages_of_16_slots() {
    check_pages::<bf16, bf16>(16, KvDType::Same);
    check_pages::<f16, f16>(16, KvDType::Same);
}

#[test]
fn pages_of_24_slots() {
    check_pages::<bf16, bf16>(24, KvDType::Same);
}

#[test]
fn pages_of_64_slots() {
    check_pages::<bf16, bf16>(64, KvDType::Same);
}

#[test]
fn pages_in_fp8() {
    for page_size in [8, 16, 24, 64] {
        check_pages::<bf16, F8E4M3>(page_size, KvDType::E4m3);
    }
}

/// One tensor, on the device and for the reference: K is all of it, V all but its first page.
#[test]
fn k_and_v_in_one_tensor() {
    let Some(engine) = engine() else { return };
    for order in ORDERS {
        for page_size in [8, 16, 24, 64] {
            let shape = shape::<bf16>(4, 128);
            let batch = batch_in(order, page_size, 2, shape);
            let page_elements = PagedLayout::new(page_size, order).expect("a good size").page_elements(shape) as usize;
            let kv = random_elements::<bf16>(batch.kv_elements() as usize + page_elements, 5);
            let mut case = Case::<bf16>::new(batch);
            case.set_kv(&kv, &kv[page_elements..]);

            let stream = engine.stream().expect("a stream");
            let plan = engine.upload(&case.plan(engine, Packing::Packed), &stream).expect("the plan fits");
            let kv = engine.copy_of(&kv).expect("there is room");
            let mut device = case.on_device(engine);
            let (k, v) = (kv.as_slice(), kv.as_slice().skip(page_elements));
            let tensors =
                Tensors { q: device.q.as_slice(), k, v, o: device.o.as_mut_slice(), lse: Some(device.lse.as_mut_slice()) };
            let mut workspace = engine.workspace().expect("there is room");
            engine.run(&plan, &mut workspace, &stream, tensors, RunOptions::default()).expect("the run is right");
            case.check(&device.results());
        }
    }
}

/// Requests that begin with the same pages, and some that end within them.
#[test]
fn shared_pages() {
    let Some(engine) = engine() else { return };
    let stride = NonZeroU32::new(2).expect("not zero");
    let pages = PagedLayout::new(16, PageOrder::Hnd).expect("a good size").with_stride(stride);
    let mut batch = Batch::in_layout(shape::<bf16>(8, 128), Mask::Causal, pages.into()).expect("a good layout");
    for request in 0..64 {
        let block_table: Vec<u32> = (0..128).rev().chain([128 + request]).collect();
        batch.push_paged(1 + request % 3, 127 * 16 + request % 32, &block_table, 16).expect("a good request");
    }
    let case = Case::<bf16>::new(batch);
    let plan = case.plan(engine, Packing::Packed);
    assert!(plan.explain(plan.model()).shared_tiles > 0);
    check(engine, &case);
}

#[test]
fn a_pool_without_the_last_page_is_an_error() {
    let Some(engine) = engine() else { return };
    let batch = batch_in(PageOrder::Hnd, 16, 2, shape::<bf16>(4, 128));
    assert!(matches!(batch.kv_layout(), KvLayout::Paged(_)));
    let needed = batch.kv_elements();
    let case = Case::<bf16>::new(batch);
    let stream = engine.stream().expect("a stream");
    let plan = engine.upload(&case.plan(engine, Packing::Packed), &stream).expect("the plan fits");
    let mut device = case.on_device(engine);
    let v = device.v.as_slice().skip(8);
    let tensors = Tensors { q: device.q.as_slice(), k: device.k.as_slice(), v, o: device.o.as_mut_slice(), lse: None };
    let mut workspace = engine.workspace().expect("there is room");
    let error = engine.run(&plan, &mut workspace, &stream, tensors, RunOptions::default()).expect_err("V is too short");
    assert!(
        matches!(error, EngineError::PoolTooSmall { tensor: "V", found, needed: of, .. } if (found, of) == (needed - 8, needed)),
        "{error}"
    );
}
