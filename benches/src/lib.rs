//! Batches to measure with.
//!
//! Lengths are drawn from distributions that look like those of public traces, from a fixed seed: a batch is the same in every
//! run. All batches have the heads of an 8-billion-parameter Llama 3 (32 query heads, 8 KV heads, head dimension 128, bf16), a
//! causal mask, and KV in pages of 16 slots that lie in no order, as they do in a server that has run for a while.

use packinfer_batch::{AttentionShape, Batch, BatchError, DType, Mask};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_distr::LogNormal;

/// Slots of a page.
const PAGE_SIZE: u32 = 16;

/// The KV lengths of chats in progress: log-normal, on average about 1,170 tokens, most between 200 and 3,000.
const MEDIAN_CHAT: f64 = 930.0;
const CHAT_SIGMA: f64 = 0.75;
/// The shortest and the longest chat.
const CHAT_LENGTHS: (f64, f64) = (14.0, 6000.0);
/// The KV lengths of requests with long contexts: log-normal, on average about 14,000 tokens.
const MEDIAN_LONG: f64 = 8900.0;
const LONG_SIGMA: f64 = 0.97;
/// The shortest and the longest of them.
const LONG_LENGTHS: (f64, f64) = (900.0, 86_000.0);

/// Decode: `requests` chats, one query token each.
///
/// 256 of them have 18,700 pages.
///
/// # Errors
///
/// More requests than a batch can have.
pub fn decode_chats(requests: usize) -> Result<Batch, BatchError> {
    let mut rng = rng();
    let lengths: Vec<_> = (0..requests).map(|_| (1, chat_len(&mut rng))).collect();
    paged(&lengths, &mut rng)
}

/// Decode: one request of 131,072 tokens beside `others` of 512.
///
/// # Errors
///
/// More requests than a batch can have.
pub fn decode_straggler(others: usize) -> Result<Batch, BatchError> {
    paged(&[&[(1, 131_072)], vec![(1, 512); others].as_slice()].concat(), &mut rng())
}

/// Decode: `requests` requests with long contexts, of which the first 512 tokens are a system prompt that all share.
///
/// # Errors
///
/// More requests than a batch can have.
pub fn decode_long(requests: usize) -> Result<Batch, BatchError> {
    let mut rng = rng();
    let own: Vec<_> = (0..requests).map(|_| log_normal(MEDIAN_LONG, LONG_SIGMA, LONG_LENGTHS, &mut rng)).collect();
    behind_prefixes(&[(1, 512)], &own, &mut rng)
}

/// Decode: `requests` requests that share 8,192 tokens and have 256 to 1,024 of their own.
///
/// # Errors
///
/// More requests than a batch can have.
pub fn decode_shared(requests: usize) -> Result<Batch, BatchError> {
    let mut rng = rng();
    let own: Vec<_> = (0..requests).map(|_| rng.random_range(256..=1024)).collect();
    behind_prefixes(&[(1, 8192)], &own, &mut rng)
}

/// Speculative decoding: `requests` chats, eight query tokens each.
///
/// # Errors
///
/// More requests than a batch can have.
pub fn verify_drafts(requests: usize) -> Result<Batch, BatchError> {
    let mut rng = rng();
    let lengths: Vec<_> = (0..requests).map(|_| (8, chat_len(&mut rng))).collect();
    paged(&lengths, &mut rng)
}

/// Prefill: `requests` prompts of as many tokens as chats have.
///
/// # Errors
///
/// More requests than a batch can have.
pub fn prefill_chats(requests: usize) -> Result<Batch, BatchError> {
    let mut rng = rng();
    let lengths: Vec<_> = (0..requests).map(|_| chat_len(&mut rng)).map(|len| (len, len)).collect();
    paged(&lengths, &mut rng)
}

/// Prefill: `requests` prompts of 8,192 tokens.
///
/// # Errors
///
/// More requests than a batch can have.
pub fn prefill_long(requests: usize) -> Result<Batch, BatchError> {
    paged(&vec![(8192, 8192); requests], &mut rng())
}

/// Prefill: `requests` prompts of 8 to 160 tokens.
///
/// # Errors
///
/// More requests than a batch can have.
pub fn prefill_short(requests: usize) -> Result<Batch, BatchError> {
    let mut rng = rng();
    let lengths: Vec<_> = (0..requests).map(|_| rng.random_range(8..=160)).map(|len| (len, len)).collect();
    paged(&lengths, &mut rng)
}

/// A step with chunked prefill: `decodes` chats, and two chunks of 512 and 2,048 tokens of prompts of 8,000.
///
/// # Errors
///
/// More requests than a batch can have.
pub fn mixed_chunked(decodes: usize) -> Result<Batch, BatchError> {
    let mut rng = rng();
    let chats: Vec<_> = (0..decodes).map(|_| (1, chat_len(&mut rng))).collect();
    paged(&[&[(512, 4096), (2048, 8000)], chats.as_slice()].concat(), &mut rng)
}

/// Decode with prefixes of three levels: 2,048 tokens that all requests share, 4,096 for every fourth, 256 to 1,024 of their own.
///
/// # Errors
///
/// More requests than a batch can have.
pub fn decode_tree(requests: usize) -> Result<Batch, BatchError> {
    let mut rng = rng();
    let own: Vec<_> = (0..requests).map(|_| rng.random_range(256..=1024)).collect();
    behind_prefixes(&[(1, 2048), (4, 4096)], &own, &mut rng)
}

fn rng() -> SmallRng {
    SmallRng::seed_from_u64(0x7061_636b)
}

fn chat_len(rng: &mut SmallRng) -> u32 {
    log_normal(MEDIAN_CHAT, CHAT_SIGMA, CHAT_LENGTHS, rng)
}

fn log_normal(median: f64, sigma: f64, (least, most): (f64, f64), rng: &mut SmallRng) -> u32 {
    let lengths = LogNormal::new(median.ln(), sigma).expect("a finite deviation");
    rng.sample(lengths).clamp(least, most) as u32
}

fn shape() -> Result<AttentionShape, BatchError> {
    AttentionShape::new(32, 8, 128, DType::Bf16)
}

fn pages_of(tokens: u32) -> usize {
    tokens.div_ceil(PAGE_SIZE) as usize
}

/// Pages in no order.
fn shuffled(pages: usize, rng: &mut SmallRng) -> Vec<u32> {
    let mut pages: Vec<u32> = (0..pages as u32).collect();
    pages.shuffle(rng);
    pages
}

/// A batch of (query_len, kv_len) in shuffled pages.
fn paged(lengths: &[(u32, u32)], rng: &mut SmallRng) -> Result<Batch, BatchError> {
    let pages = shuffled(lengths.iter().map(|&(_, kv_len)| pages_of(kv_len)).sum(), rng);
    let mut unused = pages.as_slice();
    let mut batch = Batch::new(shape()?, Mask::Causal);
    for &(query_len, kv_len) in lengths {
        let (own, rest) = unused.split_at(pages_of(kv_len));
        batch.push_paged(query_len, kv_len, own, PAGE_SIZE)?;
        unused = rest;
    }
    Ok(batch)
}

/// A batch of decodes in shuffled pages, with `own` tokens each behind prefixes of several levels. A level has so many prefixes,
/// which the requests take in turn, of so many tokens: whole pages.
fn behind_prefixes(levels: &[(usize, u32)], own: &[u32], rng: &mut SmallRng) -> Result<Batch, BatchError> {
    let prefix_pages: usize = levels.iter().map(|&(prefixes, tokens)| prefixes * pages_of(tokens)).sum();
    let own_pages: usize = own.iter().map(|&tokens| pages_of(tokens)).sum();
    let pages = shuffled(prefix_pages + own_pages, rng);
    let mut unused = pages.as_slice();
    let mut take = |pages: usize| {
        let (taken, rest) = unused.split_at(pages);
        unused = rest;
        taken
    };
    let levels: Vec<_> = levels.iter().map(|&(prefixes, tokens)| (take(prefixes * pages_of(tokens)), tokens)).collect();
    let mut batch = Batch::new(shape()?, Mask::Causal);
    for (request, &own) in own.iter().enumerate() {
        let (mut tokens, mut request_pages) = (own, Vec::new());
        for &(prefixes, prefix_tokens) in &levels {
            let mut in_turn = prefixes.chunks(pages_of(prefix_tokens)).cycle();
            request_pages.extend_from_slice(in_turn.nth(request).expect("a prefix at every level"));
            tokens += prefix_tokens;
        }
        request_pages.extend_from_slice(take(pages_of(own)));
        batch.push_paged(1, tokens, &request_pages, PAGE_SIZE)?;
    }
    Ok(batch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_as_described() -> Result<(), BatchError> {
        let chats = decode_chats(256)?;
        let slots = chats.distinct_slots();
        assert!((280_000..320_000).contains(&slots), "{slots} slots");
        assert!((18_000..20_000).contains(&chats.runs().len()), "{} runs", chats.runs().len());
        assert_eq!(prefill_short(512)?.requests().len(), 512);
        let tree = decode_tree(96)?;
        let slots = tree.distinct_slots();
        assert!((75_000..90_000).contains(&slots) && tree.visible_pairs() > 96 * 6400, "{slots} slots");
        let long = decode_long(48)?;
        assert!((400_000..1_000_000).contains(&long.distinct_slots()), "{} slots", long.distinct_slots());
        assert_eq!(decode_straggler(63)?.distinct_slots(), 131_072 + 63 * 512);
        let shared = decode_shared(64)?;
        assert_eq!(shared.visible_pairs() - shared.distinct_slots(), 63 * 8192);
        assert_eq!(verify_drafts(64)?.num_query_tokens(), 8 * 64);
        assert_eq!(prefill_long(4)?.num_query_tokens(), 4 * 8192);
        let tokens = prefill_chats(20)?.num_query_tokens();
        assert!((13_000..30_000).contains(&tokens), "{tokens} tokens");
        assert_eq!(mixed_chunked(128)?.num_query_tokens(), 128 + 512 + 2048);
        Ok(())
    }
}
