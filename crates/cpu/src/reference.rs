//! Attention as it is written on paper, in float64: what everything else is compared with.
//!
//! It works from the batch, so it knows nothing of plans, tiles or merges.

use std::ops::Range;

use multiversion::multiversion;
use packinfer_batch::{AttentionShape, Batch, Request};
use rayon::prelude::*;

use crate::options::Logits;
use crate::{CpuError, Element, Inputs, KvElement, Number};

/// Rows, over tokens and heads, for which K and V are converted together.
const ROWS_TOGETHER: usize = 64;

/// Accumulators of a dot product.
const LANES: usize = 8;

/// Exact attention of some query tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Reference {
    /// O, `[tokens, num_qo_heads, head_dim]`, in the order in which the tokens were asked for.
    pub o: Vec<f64>,
    /// Log-sum-exp of the logits, those of sinks included, natural logarithm, `[tokens, num_qo_heads]`.
    pub lse: Vec<f64>,
}

/// Exact attention of the query tokens `tokens` (indices into Q) of a batch.
///
/// # Errors
///
/// Buffers of other lengths or another type than the batch's, options that are out of range, or a token that does not exist.
pub fn attention<E: Element, K: KvElement<E>>(
    batch: &Batch,
    inputs: Inputs<'_, E, K>,
    tokens: &[u32],
) -> Result<Reference, CpuError> {
    let shape = batch.shape();
    let num_query_tokens = batch.num_query_tokens();
    let logits = inputs.check(shape, num_query_tokens, batch.kv_layout(), batch.num_slots())?;
    if let Some(&token) = tokens.iter().find(|&&token| token >= num_query_tokens) {
        return Err(CpuError::NoSuchToken { token, num_query_tokens });
    }
    let mut o = vec![0.0; tokens.len() * shape.qo_elements_per_token() as usize];
    let mut lse = vec![0.0; tokens.len() * shape.num_qo_heads() as usize];

    let mut parts = Vec::new();
    let (mut o_left, mut lse_left) = (&mut o[..], &mut lse[..]);
    for tokens in tokens.chunk_by(|&a, &b| request_of(batch, a) == request_of(batch, b)) {
        for tokens in tokens.chunks(tokens_together(shape)) {
            let o = o_left.split_off_mut(..tokens.len() * shape.qo_elements_per_token() as usize).unwrap_or_default();
            let lse = lse_left.split_off_mut(..tokens.len() * shape.num_qo_heads() as usize).unwrap_or_default();
            parts.push(Part { request: request_of(batch, tokens[0]), tokens, o, lse });
        }
    }
    parts.into_par_iter().with_max_len(1).for_each(|part| match shape.head_dim() {
        64 => part.attend::<E, K, 64>(batch, &inputs, logits),
        96 => part.attend::<E, K, 96>(batch, &inputs, logits),
        128 => part.attend::<E, K, 128>(batch, &inputs, logits),
        _ => part.attend::<E, K, 256>(batch, &inputs, logits),
    });
    Ok(Reference { o, lse })
}

/// Bytes that [`attention`] takes at the most while it works on a batch, besides its result: the scores of some rows a thread.
pub fn working_bytes(batch: &Batch) -> u64 {
    let shape = batch.shape();
    let scores = batch.requests().iter().map(|request| {
        let tokens = u64::from(request.query_len).min(tokens_together(shape) as u64);
        tokens * u64::from(shape.gqa_ratio()) * u64::from(request.kv_len)
    });
    rayon::current_num_threads() as u64 * scores.max().unwrap_or(0) * size_of::<f64>() as u64
}

/// Query tokens for which K and V are converted together.
fn tokens_together(shape: AttentionShape) -> usize {
    (ROWS_TOGETHER / shape.gqa_ratio() as usize).max(1)
}

/// The request that brings a query token.
fn request_of(batch: &Batch, token: u32) -> &Request {
    let index = batch.requests().partition_point(|request| request.first_token + request.query_len <= token);
    &batch.requests()[index]
}

/// Some query tokens of one request, and where their results go.
struct Part<'a> {
    request: &'a Request,
    tokens: &'a [u32],
    o: &'a mut [f64],
    lse: &'a mut [f64],
}

impl Part<'_> {
    fn attend<E: Element, K: KvElement<E>, const D: usize>(mut self, batch: &Batch, inputs: &Inputs<'_, E, K>, logits: Logits) {
        for kv_head in 0..batch.shape().num_kv_heads() as usize {
            attend_head::<E, K, D>(&mut self, batch, inputs, logits, kv_head);
        }
    }
}

/// Attention for the query heads of one KV head.
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma"))]
fn attend_head<E: Element, K: KvElement<E>, const D: usize>(
    part: &mut Part<'_>,
    batch: &Batch,
    inputs: &Inputs<'_, E, K>,
    logits: Logits,
    kv_head: usize,
) {
    let shape = batch.shape();
    let slots = || batch.runs_of(part.request).iter().flat_map(|run| run.first_slot..run.first_slot + run.num_slots);
    let strides = batch.kv_layout().strides(shape);
    let at = |slot: u32| slot as usize * strides.slot as usize + kv_head * strides.head as usize;

    let scales = [inputs.options.k_scale(kv_head), inputs.options.v_scale(kv_head)].map(f64::from);
    let mut rows = rows::<E, D>(part, batch, kv_head, inputs.q, inputs.options.sinks);
    for (column, slot) in slots().enumerate() {
        let k = row::<K, D>(&inputs.k[at(slot)..]);
        for row in rows.iter_mut().filter(|row| row.sees.contains(&column)) {
            row.scores.push(logits.of(scales[0] * dot(&row.q, &k)));
        }
    }
    for row in &mut rows {
        let max = row.scores.iter().copied().fold(row.sink, f64::max);
        row.scores.iter_mut().for_each(|score| *score = (*score - max).exp());
        let sum = row.scores.iter().sum::<f64>() + (row.sink - max).exp();
        row.scores.iter_mut().for_each(|score| *score /= sum);
        part.lse[row.output] = max + sum.ln();
    }
    let (o_rows, _) = part.o.as_chunks_mut::<D>();
    for (column, slot) in slots().enumerate() {
        let v = row::<K, D>(&inputs.v[at(slot)..]).map(|v| scales[1] * v);
        for row in rows.iter().filter(|row| row.sees.contains(&column)) {
            let p = row.scores[column - row.sees.start];
            for (o, v) in o_rows[row.output].iter_mut().zip(&v) {
                *o += p * v;
            }
        }
    }
}

impl Logits {
    /// The logit of the product of a query and a key.
    fn of(self, product: f64) -> f64 {
        let scaled = f64::from(self.scale) * product;
        match self.soft_cap.map(f64::from) {
            Some(cap) => cap * (scaled / cap).tanh(),
            None => scaled,
        }
    }
}

/// One query head of one query token.
struct Row<const D: usize> {
    q: [f64; D],
    /// Logit of its sink; −∞ if it has none.
    sink: f64,
    /// KV tokens of its request that it sees.
    sees: Range<usize>,
    /// Scores of those tokens; later their probabilities.
    scores: Vec<f64>,
    /// Where its result goes, in rows of `[tokens, num_qo_heads]`.
    output: usize,
}

/// The rows of a part for the query heads of a KV head.
fn rows<E: Element, const D: usize>(
    part: &Part<'_>,
    batch: &Batch,
    kv_head: usize,
    q: &[E],
    sinks: Option<&[f32]>,
) -> Vec<Row<D>> {
    let shape = batch.shape();
    let (num_qo_heads, ratio) = (shape.num_qo_heads() as usize, shape.gqa_ratio() as usize);
    let heads = kv_head * ratio..(kv_head + 1) * ratio;
    let rows = part.tokens.iter().enumerate().flat_map(|(index, &token)| {
        let sees = part.request.sees(token - part.request.first_token, batch.mask());
        let sees = sees.start as usize..sees.end as usize;
        heads.clone().map(move |head| Row {
            q: row(&q[(token as usize * num_qo_heads + head) * D..]),
            sink: sinks.map_or(f64::NEG_INFINITY, |sinks| sinks[head].into()),
            scores: Vec::with_capacity(sees.len()),
            sees: sees.clone(),
            output: index * num_qo_heads + head,
        })
    });
    rows.collect()
}

/// The first `D` elements.
#[inline(always)]
fn row<N: Number, const D: usize>(elements: &[N]) -> [f64; D] {
    let mut row = [0.0; D];
    for (to, &element) in row.iter_mut().zip(elements) {
        *to = element.to_f64();
    }
    row
}

#[inline(always)]
fn dot<const D: usize>(a: &[f64; D], b: &[f64; D]) -> f64 {
    let mut sums = [0.0; LANES];
    for (a, b) in a.as_chunks::<LANES>().0.iter().zip(b.as_chunks::<LANES>().0) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.iter().sum()
}
