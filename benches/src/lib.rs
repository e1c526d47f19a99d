//! Batches to measure with.
//!
//! Lengths are drawn from distributions that look like those of public traces, from a fixed seed: a batch is the same in every
//! run. All batches have the heads of an 8-billion-parameter Llama 3 (32 query heads, 8 KV heads, head dimension 128, bf16), a causal mask,
//! and KV in pages of 16 slots that lie in no order, as they do in a server that has run for a while.

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
    const LEVELS: [usize; 2] = [2048 / PAGE_SIZE as usize, 4096 / PAGE_SIZE as usize];
    const BRANCHES: usize = 4;
    let mut rng = rng();
    let own: Vec<_> = (0..requests).map(|_| rng.random_range(256..=1024)).collect();
    let own_pages: usize = own.iter().map(|tokens| pages_of(*tokens)).sum();
    let pages = shuffled(LEVELS[0] + BRANCHES * LEVELS[1] + own_pages, &mut rng);
    let (common, unused) = pages.split_at(LEVELS[0]);
    let (branches, mut unused) = unused.split_at(BRANCHES * LEVELS[1]);
    let mut batch = Batch::new(shape()?, Mask::Causal);
    for (branch, tokens) in branches.chunks(LEVELS[1]).cycle().zip(own) {
        let (own, rest) = unused.split_at(pages_of(tokens));
        let kv_len = PAGE_SIZE * (common.len() + branch.len()) as u32 + tokens;
        batch.push_paged(1, kv_len, &[common, branch, own].concat(), PAGE_SIZE)?;
        unused = rest;
    }
    Ok(batch)
}

fn rng() -> SmallRng {
    SmallRng::seed_from_u64(0x7061_636b)
}

fn chat_len(rng: &mut SmallRng) -> u32 {
    let lengths = LogNormal::new(MEDIAN_CHAT.ln(), CHAT_SIGMA).expect("a finite deviation");
    rng.sample(lengths).clamp(CHAT_LENGTHS.0, CHAT_LENGTHS.1) as u32
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
        assert_eq!(mixed_chunked(128)?.num_query_tokens(), 128 + 512 + 2048);
        Ok(())
    }
}
