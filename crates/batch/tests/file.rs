//! Batch files: what they say, what is wrong with them, and where the KV lies.

use std::fs;

use packinfer_batch::{Batch, BatchFile, KvPlacement, KvRun, Mask, Request, RequestLengths};

/// A batch file of one request, with `old` replaced by `new`.
fn with(old: &str, new: &str) -> String {
    let good = r#"{"num_qo_heads": 8, "num_kv_heads": 2, "head_dim": 64, "dtype": "f16", "page_size": 16, "causal": true,
"block_tokens": 32, "requests": [{"query_len": 1, "kv_len": 100, "blocks": [5, 6]}]}"#;
    assert!(good.contains(old), "{old} is not in the file");
    good.replace(old, new)
}

fn error_of(text: &str) -> String {
    let result = BatchFile::from_json(text).map(|file| file.to_batch(0));
    match result {
        Ok(Ok(_)) => panic!("accepted: {text}"),
        Ok(Err(error)) | Err(error) => error.to_string(),
    }
}

/// Slots of a request's KV tokens, in order.
fn slots(batch: &Batch, request: &Request) -> Vec<u32> {
    batch.runs_of(request).iter().flat_map(|run| run.first_slot..run.first_slot + run.num_slots).collect()
}

fn file(page_size: u32, block_tokens: u32, requests: Vec<RequestLengths>) -> BatchFile {
    BatchFile { page_size, block_tokens: Some(block_tokens), requests, ..BatchFile::builtin() }
}

fn request(query_len: u32, kv_len: u32, blocks: &[u64]) -> RequestLengths {
    RequestLengths { query_len, kv_len, blocks: blocks.into() }
}

#[test]
fn syntax_errors_say_line_and_column() {
    for (text, message) in [
        ("", "line 1 column 0"),
        (&with("\"f16\"", "\"fp8\""), "unknown variant `fp8`, expected `bf16` or `f16` at line 1 column 69"),
        (&with("\"head_dim\": 64, ", ""), "missing field `head_dim` at line 2 column"),
        (&with("\"kv_len\": 100, ", ""), "missing field `kv_len` at line 2 column"),
        (&with("100", "-1"), "invalid value: integer `-1`, expected u32 at line 2 column"),
        (&with("100", "4294967296"), "invalid value: integer `4294967296`, expected u32 at line 2 column"),
        (&with("\"causal\"", "\"casual\""), "unknown field `casual`"),
        (&with("}]}", "}]"), "EOF while parsing an object at line 2 column"),
        (&with("100", "100,,"), "line 2 column"),
    ] {
        let error = error_of(text);
        assert!(error.contains(message), "{error:?} does not contain {message:?}");
    }
}

#[test]
fn numbers_that_do_not_fit_together_are_named() {
    for (old, new, message) in [
        ("\"num_qo_heads\": 8", "\"num_qo_heads\": 0", "0 query heads and 2 KV heads"),
        ("\"num_kv_heads\": 2", "\"num_kv_heads\": 0", "8 query heads and 0 KV heads"),
        ("\"num_kv_heads\": 2", "\"num_kv_heads\": 3", "8 query heads cannot be shared evenly by 3 KV heads"),
        ("\"head_dim\": 64", "\"head_dim\": 80", "head dimension 80"),
        ("\"page_size\": 16", "\"page_size\": 0", "page_size is 0"),
        ("\"causal\": true", "\"causal\": false, \"window\": 9", "window is 9, but causal is false"),
        ("\"causal\": true", "\"logit_soft_cap\": -3.5", "logit_soft_cap is -3.5: it must be finite and greater than 0"),
        ("\"causal\": true", "\"window\": 0", "expected a nonzero u32"),
        ("\"query_len\": 1", "\"query_len\": 101", "request 0 has 101 query tokens but only 100 KV tokens"),
        ("\"kv_len\": 100", "\"kv_len\": 63", "request 0 names 2 blocks of 32 tokens, which is more than its 63 KV tokens"),
        ("\"block_tokens\": 32, ", "", "request 0 names blocks, but the batch has no block_tokens"),
        ("\"block_tokens\": 32", "\"block_tokens\": 24", "block_tokens is 24 and page_size 16"),
        ("\"block_tokens\": 32", "\"block_tokens\": 0", "block_tokens is 0 and page_size 16"),
        ("\"kv_len\": 100", "\"kv_len\": 4000000000", "4000000000 KV tokens: at most 2147483648"),
        ("\"page_size\": 16", "\"page_size\": 4294967295", "block_tokens is 32 and page_size 4294967295"),
    ] {
        let error = error_of(&with(old, new));
        assert!(error.contains(message), "{error:?} does not contain {message:?}");
    }
}

#[test]
fn sizes_that_overflow_are_refused_before_memory_is_taken() {
    let half_pool = request(1, 1 << 30, &[]);
    let twice = file(1 << 20, 1 << 20, vec![half_pool.clone(), half_pool.clone()]);
    assert_eq!(twice.to_batch(0).expect("just fits").num_slots(), Batch::MAX_SLOTS);
    let thrice = file(1 << 20, 1 << 20, vec![half_pool.clone(), half_pool.clone(), half_pool.clone()]);
    assert!(thrice.to_batch(0).expect_err("too many slots").to_string().contains("3072 pages of 1048576 slots"));
    let small_pages = file(1, 1, vec![half_pool]);
    assert!(small_pages.to_batch(0).expect_err("too many pages").to_string().contains("1073741824 pages of 1 slots"));
}

#[test]
fn files_that_cannot_be_read_are_named() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let missing = folder.path().join("missing.json");
    let error = BatchFile::read(&missing).expect_err("there is no such file").to_string();
    assert!(error.contains("missing.json") && error.contains("cannot read"), "{error}");

    let wrong = folder.path().join("wrong.json");
    fs::write(&wrong, with("100", "x")).expect("the folder is writable");
    let error = BatchFile::read(&wrong).expect_err("not JSON").to_string();
    assert!(error.contains("wrong.json: ") && error.contains("line 2 column"), "{error}");
}

#[test]
fn json_round_trips() {
    let mut original = BatchFile::builtin();
    original.block_tokens = Some(64);
    original.requests[0].blocks = vec![3, u64::MAX];
    assert_eq!(BatchFile::from_json(&original.to_json()).expect("what was written can be read"), original);
    original.requests.clear();
    assert_eq!(BatchFile::from_json(&original.to_json()).expect("no requests is a batch"), original);
}

#[test]
fn equal_leading_blocks_share_pages_and_nothing_else_does() {
    let requests = vec![
        request(1, 70, &[1, 2]),    // blocks of 32: 64 shared tokens, 6 own
        request(1, 64, &[1, 2]),    // all shared
        request(1, 99, &[1, 3, 2]), // the first block is shared; a 2 after 1, 3 is another 2
        request(1, 32, &[2]),       // a 2 in front is another 2
        request(1, 32, &[]),
    ];
    let batch = file(8, 32, requests).to_batch(7).expect("a good batch");
    let slots: Vec<_> = batch.requests().iter().map(|request| slots(&batch, request)).collect();
    assert_eq!(slots[0][..64], slots[1][..]);
    assert_eq!(slots[0][..32], slots[2][..32]);
    // In pages of 8, without what is shared: 72 + 0 + 72 + 32 + 32 slots in the pool; 2 and 5 of them hold no token.
    assert_eq!(batch.distinct_slots(), 70 + 67 + 32 + 32);
    assert!(batch.num_slots() <= 72 + 72 + 32 + 32);
    for all in &slots {
        for page in all.chunks(8) {
            assert!(page[0].is_multiple_of(8) && page.windows(2).all(|pair| pair[1] == pair[0] + 1), "{page:?} is no page");
        }
    }
}

#[test]
fn pages_are_in_disorder_that_the_seed_repeats() {
    let file = file(16, 16, vec![request(1, 4096, &[])]);
    let (batch, again, other) = (file.to_batch(1), file.to_batch(1), file.to_batch(2));
    let batch = batch.expect("a good batch");
    assert_eq!(batch, again.expect("a good batch"));
    assert_ne!(batch, other.expect("a good batch"));
    assert!(batch.runs().len() > 200, "only {} runs: the pages are nearly in order", batch.runs().len());
    assert_eq!(batch.num_slots(), 4096);
}

#[test]
fn contiguous_requests_are_in_one_piece() {
    // Pages of 16, blocks of 32: the second request begins with a block of the first.
    let requests = vec![request(1, 100, &[1, 2]), request(1, 80, &[1, 3]), request(1, 40, &[])];
    let batch = file(16, 32, requests).to_batch_in(KvPlacement::Contiguous).expect("a good batch");
    let runs: Vec<_> = batch.requests().iter().map(|request| batch.runs_of(request)).collect();
    let run = |first_slot, num_slots| KvRun { first_slot, num_slots };
    assert_eq!(runs, [&[run(0, 100)][..], &[run(0, 32), run(112, 48)], &[run(160, 40)]]);
}

#[test]
fn mask_and_zero_lengths() {
    let mut file = file(16, 16, vec![request(5, 3, &[]), request(0, 0, &[]), request(0, 40, &[])]);
    assert!(file.to_batch(0).is_err(), "5 causal queries over 3 tokens");
    file.causal = false;
    let batch = file.to_batch(0).expect("without a mask, queries may outnumber KV tokens");
    assert_eq!((batch.mask(), batch.num_query_tokens()), (Mask::None, 5));
    assert_eq!(batch.distinct_slots(), 3, "a request without queries reads nothing");
}

/// A window leaves what lies before it unread: of the first request's 100 tokens the last 12, of the other all 5.
#[test]
fn windows_count_what_they_show() {
    let with_window = with("\"causal\": true", "\"window\": 10");
    let mut file = BatchFile::from_json(&with_window).expect("a good file");
    file.requests = vec![request(3, 100, &[]), request(5, 5, &[]), request(0, 50, &[])];
    let batch = file.to_batch(0).expect("a good batch");
    assert_eq!(batch.mask(), Mask::Window(10.try_into().expect("not zero")));
    assert_eq!(batch.visible_pairs(), 3 * 10 + (1 + 2 + 3 + 4 + 5));
    assert_eq!(batch.distinct_slots(), 12 + 5);
    let sees: Vec<_> = (0..3).map(|token| batch.requests()[0].sees(token, batch.mask())).collect();
    assert_eq!(sees, [88..98, 89..99, 90..100]);
    assert_eq!(file.to_json(), BatchFile::from_json(&file.to_json()).expect("what was written").to_json());
}

#[test]
fn distinct_slots_counts_overlaps_once() {
    let mut batch = Batch::new(BatchFile::builtin().shape().expect("a good shape"), Mask::None);
    let run = |first_slot, num_slots| KvRun { first_slot, num_slots };
    batch.push_runs(1, 30, [run(0, 10), run(40, 20)]).expect("a good request");
    batch.push_runs(1, 20, [run(5, 20)]).expect("a good request");
    batch.push_runs(1, 2, [run(45, 2)]).expect("a good request");
    assert_eq!(batch.distinct_slots(), 25 + 20);
    assert_eq!(batch.least_bytes(), 45 * 2 * 8 * 128 * 2 + 3 * 2 * 32 * 128 * 2);
}

#[test]
fn the_builtin_batch_is_mixed() {
    let batch = BatchFile::builtin().to_batch(0).expect("a good batch");
    let decodes = batch.requests().iter().filter(|request| request.query_len == 1 && request.kv_len > 1).count();
    assert_eq!(decodes, 48);
    assert_eq!(batch.requests().len(), 66);
    assert!(batch.flops() < 2e10, "{} FLOPs", batch.flops());
}
