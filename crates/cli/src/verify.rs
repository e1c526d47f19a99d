//! `packinfer verify`: is the result of a plan that of exact attention?

use std::io::{Write, stdout};
use std::iter;

use anyhow::Context;
use packinfer_batch::{Batch, KvDType};
use packinfer_cpu::{Element, KvElement, largest_difference, reference, relative_error};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::args::VerifyArgs;
use crate::backend::{Attention, Backend, BackendElement, BackendKv};
use crate::case::Case;
use crate::memory;
use crate::planning;
use crate::progress::Progress;
use crate::table;
use crate::types::with_types;

/// FLOPs up to which all rows are compared: a dozen seconds of float64 on two cores.
const MOST_FLOPS_OF_ALL_ROWS: f64 = 1e11;

/// Rows of each request that are compared otherwise.
const SAMPLED_ROWS: u32 = 16;

/// Runs and compares the batches, and says whether all are within tolerance.
pub fn run(args: &VerifyArgs) -> anyhow::Result<bool> {
    let cases = Case::read_all(&args.batch, args.placement.by_seed(args.seed), args.matrix)?;
    let mut backend = Backend::open(&args.device)?;
    let mut table = table::new(&["batch", "dtype", "tokens", "compared", "error", "worst request", "LSE error", "tolerance", ""]);
    let mut all_within = true;
    let progress = Progress::new(cases.len());
    for case in &cases {
        let compared = with_types!(case.batch.shape(), compare(case, &mut backend, args, &progress));
        let compared = compared.with_context(|| case.name.clone())?;
        all_within &= compared.is_within_tolerance();
        table.add_row(compared.cells(case));
        progress.step();
    }
    drop(progress);
    writeln!(stdout(), "{}\n{table}", backend.name())?;
    Ok(all_within)
}

/// How far a result is from the exact one.
#[derive(Debug)]
struct Comparison {
    rows: usize,
    /// Of O, relative in norm, over all rows that are compared; of runs with and without log-sum-exps, the greater one.
    error: f64,
    /// The same for the request where it is largest: a wrong request does not hide among many right ones.
    worst_request: f64,
    /// Of LSE, absolute.
    lse_error: f64,
    tolerance: f64,
}

impl Comparison {
    fn is_within_tolerance(&self) -> bool {
        // NaN is within no tolerance.
        [self.error, self.worst_request, self.lse_error].iter().all(|&error| error <= self.tolerance)
    }

    fn cells(&self, case: &Case) -> Vec<String> {
        let (dtype, kv_dtype) = (case.batch.shape().dtype(), case.batch.shape().kv_dtype());
        let types = if kv_dtype == KvDType::Same { dtype.to_string() } else { format!("{dtype}, KV {kv_dtype}") };
        vec![
            case.name.clone(),
            types,
            case.batch.num_query_tokens().to_string(),
            self.rows.to_string(),
            format!("{:.1e}", self.error),
            format!("{:.1e}", self.worst_request),
            format!("{:.1e}", self.lse_error),
            format!("{:.0e}", self.tolerance),
            if self.is_within_tolerance() { "ok" } else { "WRONG" }.into(),
        ]
    }
}

fn compare<E: BackendElement, K: BackendKv<E>>(
    case: &Case,
    backend: &mut Backend,
    args: &VerifyArgs,
    progress: &Progress,
) -> anyhow::Result<Comparison> {
    let batch = &case.batch;
    backend.check_fits(batch)?;
    progress.doing(format!("{}: Q, K, V", case.name));
    let tensors = case.tensors::<E, K>(args.seed)?;
    progress.doing(format!("{}: attention", case.name));
    let attention = backend.attend(&planning::packed(batch, backend.planner())?.plan, &tensors)?;
    progress.doing(format!("{}: float64 attention", case.name));
    let rows = args.rows.or((batch.flops() > MOST_FLOPS_OF_ALL_ROWS).then_some(SAMPLED_ROWS)).unwrap_or(u32::MAX);
    let exact_bytes = compared_tokens(batch, rows) * batch.shape().qo_elements_per_token() * size_of::<f64>() as u64;
    memory::check("float64 attention takes", exact_bytes + reference::working_bytes(batch))?;
    compare_rows(batch, &tensors.inputs(), &attention, rows, args.seed)
}

fn compare_rows<E: Element, K: KvElement<E>>(
    batch: &Batch,
    inputs: &packinfer_cpu::Inputs<'_, E, K>,
    attention: &Attention<E>,
    rows_per_request: u32,
    seed: u64,
) -> anyhow::Result<Comparison> {
    let chosen = choose_tokens(batch, rows_per_request, seed);
    let tokens: Vec<u32> = chosen.iter().flatten().copied().collect();
    let exact = reference::attention(batch, *inputs, &tokens)?;
    let elements = batch.shape().qo_elements_per_token() as usize;
    let heads = batch.shape().num_qo_heads() as usize;

    let (mut greatest_error, mut worst_request) = (0.0, 0.0);
    for o in iter::once(&attention.o).chain(&attention.o_alone) {
        let o = rows_of(o, elements, &tokens);
        greatest_error = greater_or_nan(greatest_error, relative_error(&o, &exact.o));
        let mut row = 0;
        for tokens in &chosen {
            let range = row * elements..(row + tokens.len()) * elements;
            worst_request = greater_or_nan(worst_request, relative_error(&o[range.clone()], &exact.o[range]));
            row += tokens.len();
        }
    }
    Ok(Comparison {
        rows: tokens.len(),
        error: greatest_error,
        worst_request,
        lse_error: largest_difference(&rows_of(&attention.lse, heads, &tokens), &exact.lse),
        tolerance: E::TOLERANCE,
    })
}

/// The greater of two errors; a NaN, which `f64::max` would drop, is greater than all.
fn greater_or_nan(one: f64, other: f64) -> f64 {
    if one.is_nan() || one > other { one } else { other }
}

/// Query tokens in all, if up to `most` of every request are taken.
fn compared_tokens(batch: &Batch, most: u32) -> u64 {
    batch.requests().iter().map(|request| u64::from(request.query_len.min(most))).sum()
}

/// The rows `tokens` of a matrix whose rows have `width` elements.
fn rows_of<T: Copy>(matrix: &[T], width: usize, tokens: &[u32]) -> Vec<T> {
    tokens.iter().flat_map(|&token| &matrix[token as usize * width..][..width]).copied().collect()
}

/// Up to `most` query tokens of every request: the first, the last, and some in between.
fn choose_tokens(batch: &Batch, most: u32, seed: u64) -> Vec<Vec<u32>> {
    let mut generator = SmallRng::seed_from_u64(seed);
    let mut choose = |first: u32, len: u32| -> Vec<u32> {
        if len <= most {
            return (first..first + len).collect();
        }
        // One of each of `most` parts of equal length.
        let bound = |part: u32| (u64::from(part) * u64::from(len) / u64::from(most)) as u32;
        let one_of = |part: u32| match part {
            0 => 0,
            _ if part + 1 == most => len - 1,
            _ => generator.random_range(bound(part)..bound(part + 1)),
        };
        (0..most).map(one_of).map(|index| first + index).collect()
    };
    batch.requests().iter().map(|request| choose(request.first_token, request.query_len)).collect()
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use packinfer_batch::{BatchFile, RequestLengths};

    use super::*;

    fn batch() -> Batch {
        let request = |query_len| RequestLengths { query_len, kv_len: query_len.max(3), blocks: Vec::new() };
        let file = BatchFile { requests: [40, 0, 1, 2, 9].map(request).into(), ..BatchFile::builtin() };
        file.to_batch(0).expect("a good batch")
    }

    #[test]
    fn chosen_tokens_are_the_requests_own() {
        let batch = batch();
        for most in [1, 2, 3, 8, 100] {
            for (request, tokens) in batch.requests().iter().zip(choose_tokens(&batch, most, 5)) {
                assert_eq!(tokens.len(), request.query_len.min(most) as usize);
                assert!(tokens.is_sorted_by(|a, b| a < b), "{tokens:?} repeats");
                assert!(tokens.iter().all(|&token| token >= request.first_token));
                assert!(tokens.iter().all(|&token| token < request.first_token + request.query_len));
                if most > 1 && request.query_len > 0 {
                    assert_eq!(tokens.last(), Some(&(request.first_token + request.query_len - 1)));
                }
            }
        }
    }

    #[test]
    fn a_wrong_element_is_found() {
        let case = Case { name: "x".into(), batch: batch(), logit_soft_cap: None, sinks: false };
        let tensors = case.tensors::<bf16, bf16>(1).expect("a few bytes");
        let all: Vec<u32> = (0..case.batch.num_query_tokens()).collect();
        let exact = reference::attention(&case.batch, tensors.inputs(), &all).expect("good inputs");
        let right = || Attention {
            o: exact.o.iter().map(|&o| bf16::from_f64(o)).collect::<Vec<_>>(),
            o_alone: Some(exact.o.iter().map(|&o| bf16::from_f64(o)).collect()),
            lse: exact.lse.iter().map(|&lse| lse as f32).collect(),
        };
        let within = |attention: &Attention<bf16>| {
            compare_rows(&case.batch, &tensors.inputs(), attention, u32::MAX, 0).expect("good inputs").is_within_tolerance()
        };
        assert!(within(&right()));
        for wrong in [bf16::NAN, bf16::from_f32(9.0)] {
            let mut attention = right();
            *attention.o.last_mut().expect("not empty") = wrong;
            assert!(!within(&attention), "{wrong} in O was not noticed");
            let mut attention = right();
            attention.o_alone.iter_mut().for_each(|o| o[3] = wrong);
            assert!(!within(&attention), "{wrong} in O without LSE was not noticed");
        }
        let mut attention = right();
        attention.lse[7] += 0.1;
        assert!(!within(&attention), "a wrong LSE was not noticed");
    }
}
