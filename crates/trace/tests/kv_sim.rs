//! Replays of small traces whose outcome can be worked out by hand, and of a larger one under pressure.

use packinfer_kv::{Contiguous, Policy};
use packinfer_trace::kv_sim::{SimConfig, SimReport, plot_svg, simulate};
use packinfer_trace::{BLOCK_TOKENS, TraceRequest, TraceSummary};

fn request(arrival_ms: u64, prompt_tokens: u32, output_tokens: u32, blocks: &[u64]) -> TraceRequest {
    TraceRequest { arrival_ms, prompt_tokens, output_tokens, blocks: blocks.into() }
}

/// Conversations of several turns: each prompt is the one before with a new last block; answers of 20 to 400 tokens.
fn conversations(count: u64, turns: u64) -> Vec<TraceRequest> {
    let mut requests: Vec<_> = (0..count * turns)
        .map(|i| {
            let (conversation, turn) = (i % count, i / count);
            let mut blocks: Vec<u64> = vec![0];
            blocks.extend((0..=turn).map(|turn| 1 + conversation + turn * count));
            let tokens = blocks.len() as u32 * BLOCK_TOKENS - (conversation % 7) as u32;
            // The last block of a prompt that does not fill it is not the full one of the next turn.
            if conversation % 7 > 0 {
                *blocks.last_mut().unwrap() += 1_000_000;
            }
            request(turn * 20_000 + conversation * 100, tokens, 20 + (i * 37 % 381) as u32, &blocks)
        })
        .collect();
    requests.sort_by_key(|request| request.arrival_ms);
    requests
}

fn run(requests: &[TraceRequest], config: &SimConfig) -> SimReport {
    let report = simulate(requests, config, |_| {}).unwrap();
    assert_eq!(report.finished + report.rejected, requests.len() as u64);
    assert!(report.peak_used_slots <= report.num_slots);
    report
}

#[test]
fn one_request_by_hand() {
    let config = SimConfig { policy: Policy::Paged, ..SimConfig::default() };
    let report = run(&[request(500, 1000, 50, &[1, 2])], &config);
    assert_eq!((report.prompt_blocks, report.hit_blocks, report.prompt_tokens), (2, 0, 1000));
    // 63 pages hold the prompt, 4 the answer: the prompt's last page is the tree's, so its 8 tokens are copied.
    assert_eq!((report.copied_on_write, report.peak_used_slots), (1, (63 + 4) * 16));
    assert_eq!((report.peak_running_tokens, report.duration_ms), (1049, 49 * 30));
}

#[test]
fn unbounded_pool_hits_what_the_trace_reuses() {
    let requests = conversations(40, 5);
    let summary = TraceSummary::of(&requests);
    for policy in [Policy::Paged, Policy::Contiguous(Contiguous::default())] {
        let report = run(&requests, &SimConfig { policy, ..SimConfig::default() });
        assert_eq!((report.hit_blocks, report.prompt_blocks), (summary.reused_blocks, summary.blocks));
        assert!(report.hit_blocks > 0);
        assert_eq!((report.evicted_blocks, report.rejected, report.preemptions), (0, 0, 0));
    }
}

#[test]
fn smaller_pools_evict_and_hit_less() {
    let requests = conversations(40, 5);
    let distinct = TraceSummary::of(&requests).distinct_blocks as u32;
    let pool = |share: u32| SimConfig { num_slots: Some(distinct * BLOCK_TOKENS / share), ..SimConfig::default() };
    let [large, small] = [2, 5].map(|share| run(&requests, &pool(share)));
    assert_eq!((large.rejected, small.rejected), (0, 0));
    assert!(large.evicted_blocks > 0 && small.evicted_blocks > large.evicted_blocks);
    assert!(small.hit_rate() < large.hit_rate() && large.hit_rate() < TraceSummary::of(&requests).reuse());
}

#[test]
fn headroom_keeps_requests_in_fewer_runs() {
    let requests: Vec<_> = (0..300).map(|i| request(i * 100, 200 + (i * 131 % 900) as u32, 300, &[])).collect();
    let config = |policy| SimConfig { num_slots: Some(110_000), policy, ..SimConfig::default() };
    let paged = run(&requests, &config(Policy::Paged));
    let contiguous = run(&requests, &config(Policy::Contiguous(Contiguous::default())));
    assert_eq!(paged.moved_slots, 0);
    assert!(contiguous.mean_runs * 4.0 < paged.mean_runs, "{} and {}", contiguous.mean_runs, paged.mean_runs);
    // Without any headroom, requests are moved instead.
    let moving = Contiguous { max_headroom: 0, move_cost: 0.0, ..Contiguous::default() };
    assert_eq!(run(&requests, &config(Policy::Contiguous(moving))).moves, 0, "no headroom, nothing gained by a move");
    let eager = Contiguous { max_headroom: 32, move_cost: 0.01, ..Contiguous::default() };
    let eager = run(&requests, &config(Policy::Contiguous(eager)));
    assert!(eager.moves > 0 && eager.moved_bytes == eager.moved_slots * SimConfig::default().bytes_per_token);
}

#[test]
fn too_small_a_pool_preempts_and_rejects() {
    let mut requests: Vec<_> = (0..20).map(|i| request(i, 600, 400, &[])).collect();
    requests.push(request(30, 5_000, 1, &[]));
    requests.push(request(31, 1_000, 2_000, &[]));
    let report = run(&requests, &SimConfig { num_slots: Some(2_048), ..SimConfig::default() });
    assert_eq!(report.rejected, 2, "a prompt and an answer that do not fit alone");
    assert!(report.preemptions > 0 && report.peak_waiting > 0);
    assert_eq!(report.prompt_tokens, 20 * 600 + 1_000, "preempted requests count once");
}

#[test]
fn no_requests_no_pool() {
    let report = run(&[], &SimConfig::default());
    assert_eq!((report.num_slots, report.duration_ms), (0, 0));
    let bad = SimConfig { page_size: 0, ..SimConfig::default() };
    assert!(simulate(&[], &bad, |_| {}).is_err());
    let none = run(&[request(0, 10, 10, &[])], &SimConfig { num_slots: Some(0), ..SimConfig::default() });
    assert_eq!(none.rejected, 1);
    plot_svg(&report).unwrap();
}

#[test]
fn reports_and_plots() {
    let requests = conversations(10, 3);
    let mut told = Vec::new();
    let report = simulate(&requests, &SimConfig::default(), |done| told.push(done)).unwrap();
    assert!(told.is_sorted());
    assert_eq!(told.last(), Some(&30));
    assert!(report.samples.len() > 50);
    let json = serde_json::to_string(&report).unwrap();
    let read: SimReport = serde_json::from_str(&json).unwrap();
    assert_eq!((read.hit_blocks, read.samples.len()), (report.hit_blocks, report.samples.len()));
    let svg = plot_svg(&report).unwrap();
    assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"), "{}", &svg[svg.len() - 20..]);
    assert!(svg.contains("fragmentation") && svg.contains("<polyline"));
    assert!(report.to_string().contains("block hit rate"));
}
