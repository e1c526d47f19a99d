//! Pools of other engines' layouts.

use std::num::NonZeroU32;

use packinfer_batch::{AttentionShape, Batch, BatchError, BatchFile, DType, KvLayout, KvRun, Mask, PageOrder, PagedLayout};

fn shape() -> AttentionShape {
    AttentionShape::new(8, 4, 128, DType::Bf16).expect("a good shape")
}

fn layout(page_size: u32, order: PageOrder, page_stride: u32) -> Result<KvLayout, BatchError> {
    let page_stride = NonZeroU32::new(page_stride).expect("not zero");
    Ok(PagedLayout::new(page_size, order)?.with_stride(page_stride).into())
}

fn batch(page_size: u32, order: PageOrder, page_stride: u32) -> Result<Batch, BatchError> {
    Batch::in_layout(shape(), Mask::Causal, layout(page_size, order, page_stride)?)
}

fn run(first_slot: u32, num_slots: u32) -> KvRun {
    KvRun { first_slot, num_slots }
}

#[test]
fn runs_of_adjacent_pages_are_joined_only_where_nothing_lies_between() {
    for (order, page_stride, expected) in [
        (PageOrder::Nhd, 1, vec![run(48, 20)]),
        (PageOrder::Nhd, 2, vec![run(96, 16), run(128, 4)]),
        (PageOrder::Hnd, 1, vec![run(192, 16), run(256, 4)]),
        (PageOrder::Hnd, 2, vec![run(384, 16), run(512, 4)]),
    ] {
        let mut by_pages = batch(16, order, page_stride).expect("a good layout");
        by_pages.push_paged(1, 20, &[3, 4], 16).expect("a good request");
        assert_eq!(by_pages.runs(), expected, "{}", by_pages.kv_layout());
        assert_eq!(by_pages.num_slots(), 80, "five whole pages");
        assert_eq!(by_pages.distinct_slots(), 20);

        let mut by_slots = batch(16, order, page_stride).expect("a good layout");
        by_slots.push_contiguous(1, 20, 48).expect("a good request");
        assert_eq!(by_slots, by_pages);
    }
    let single_head = AttentionShape::new(8, 1, 128, DType::Bf16).expect("a good shape");
    let mut batch =
        Batch::in_layout(single_head, Mask::Causal, layout(16, PageOrder::Hnd, 1).expect("a good size")).expect("a good layout");
    batch.push_paged(1, 20, &[3, 4], 16).expect("a good request");
    assert_eq!(batch.runs(), [run(48, 20)]);
}

#[test]
fn a_run_in_the_middle_of_a_page() {
    let mut batch = batch(8, PageOrder::Hnd, 1).expect("a good layout");
    batch.push_runs(1, 12, [run(13, 5), run(2, 100)]).expect("a good request");
    assert_eq!(batch.runs(), [run(32 + 5, 3), run(64, 2), run(2, 6), run(32, 1)]);
}

/// Block tables are often padded with whatever is at hand.
#[test]
fn pages_past_the_end_are_ignored() {
    let mut batch = batch(16, PageOrder::Hnd, 2).expect("a good layout");
    batch.push_paged(1, 16, &[3, u32::MAX, 0], 16).expect("a good request");
    assert_eq!(batch.runs(), [run(384, 16)]);
    assert_eq!(batch.num_slots(), 64);
}

#[test]
fn tensors_end_with_the_last_page() {
    for (order, page_stride, pages) in [(PageOrder::Nhd, 2, 9), (PageOrder::Hnd, 1, 5), (PageOrder::Hnd, 2, 9)] {
        let mut batch = batch(16, order, page_stride).expect("a good layout");
        assert_eq!(batch.kv_elements(), 0);
        batch.push_paged(1, 20, &[3, 4], 16).expect("a good request");
        assert_eq!(batch.kv_elements(), pages * 16 * 4 * 128, "{}", batch.kv_layout());
    }
}

#[test]
fn page_sizes_that_cannot_be_read_are_errors() {
    for page_size in [0, 1, 12, u32::MAX] {
        let error = batch(page_size, PageOrder::Hnd, 2).expect_err("a bad page size");
        assert_eq!(error, BatchError::PageSize { page_size, multiple: 8 });
    }
    let error = batch(12, PageOrder::Hnd, 2).expect_err("a bad page size");
    assert_eq!(error.to_string(), "pages of 12 slots: the page size must be a multiple of 8");
    // 2^31 bytes, 1024 a slot.
    let most = 1 << 21;
    for page_size in [most + 8, u32::MAX - 7] {
        let error = batch(page_size, PageOrder::Hnd, 2).expect_err("a page too large");
        assert_eq!(error, BatchError::PageTooLarge { page_size, most });
    }
    assert!(batch(most, PageOrder::Hnd, 2).is_ok());
    let mut batch = batch(16, PageOrder::Nhd, 2).expect("a good layout");
    let error = batch.push_paged(1, 1, &[0], 32).expect_err("other pages");
    assert_eq!(error.to_string(), "request 0 has pages of 32 slots, but those of the batch's KV layout have 16");
}

#[test]
fn pages_past_what_can_be_numbered_are_errors() {
    // A page has 16 slots of 4 heads, and so has the page between it and the next.
    let pages = Batch::MAX_SLOTS / (16 * 4 * 2);
    let mut batch = batch(16, PageOrder::Hnd, 2).expect("a good layout");
    for page in [pages, u32::MAX] {
        let error = batch.push_paged(1, 1, &[page], 16).expect_err("no such page");
        assert_eq!(error, BatchError::BadPage { request: 0, page, page_size: 16, most: 16 * pages });
    }
    let last = run(16 * pages - 1, 1);
    assert!(batch.push_runs(1, 1, [KvRun { num_slots: 2, ..last }]).is_err());
    batch.push_runs(1, 1, [last]).expect("the last slot");
    assert_eq!(batch.num_slots(), 16 * pages);
    assert_eq!(batch.runs(), [run(Batch::MAX_SLOTS - 8 * 16 + 15, 1)]);
}

#[test]
fn pages_too_far_apart_are_an_error() {
    let most = Batch::MAX_SLOTS / (16 * 4);
    assert!(batch(16, PageOrder::Hnd, most).is_ok());
    for page_stride in [most + 1, u32::MAX] {
        let error = batch(16, PageOrder::Hnd, page_stride).expect_err("not one page can be numbered");
        let layout = layout(16, PageOrder::Hnd, page_stride).expect("a good size");
        assert_eq!(error, BatchError::PageStride { layout, most: Batch::MAX_SLOTS });
    }
}

#[test]
fn batch_files_name_a_layout() {
    let paged = |order, page_stride| layout(16, order, page_stride).expect("a good size");
    let with = |fields: &str| {
        format!(
            r#"{{"num_qo_heads": 8, "num_kv_heads": 4, "head_dim": 128, "dtype": "bf16", "page_size": 16, {fields}
"requests": [{{"query_len": 1, "kv_len": 40}}]}}"#
        )
    };
    for (fields, expected) in [
        ("", KvLayout::Slots),
        (r#""page_order": "nhd","#, KvLayout::Slots),
        (r#""page_order": "hnd","#, paged(PageOrder::Hnd, 1)),
        (r#""page_stride": 2,"#, paged(PageOrder::Nhd, 2)),
        (r#""page_order": "hnd", "page_stride": 2,"#, paged(PageOrder::Hnd, 2)),
    ] {
        let file = BatchFile::from_json(&with(fields)).expect("a good file");
        assert_eq!(file.kv_layout(), Ok(expected), "{fields}");
        assert_eq!(file.to_batch(0).expect("a good batch").kv_layout(), expected, "{fields}");
        assert_eq!(BatchFile::from_json(&file.to_json()).expect("a good file"), file);
    }
    for (fields, message) in [
        (r#""page_order": "dhn","#, "unknown variant `dhn`, expected `nhd` or `hnd`"),
        (r#""page_stride": 0,"#, "expected a nonzero u32"),
    ] {
        let error = BatchFile::from_json(&with(fields)).expect_err("a bad field").to_string();
        assert!(error.contains(message), "{error:?} does not contain {message:?}");
    }
    let error = BatchFile::from_json(&with(r#""page_order": "hnd","#).replace(": 16,", ": 12,")).expect_err("a bad page size");
    assert!(error.to_string().starts_with("pages of 12 slots"), "{error}");
}
