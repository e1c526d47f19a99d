//! Plans on the CPU.

use std::iter;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use packinfer_abi::{DIRECT, HeadGroups, MergeToken, WorkItem};
use packinfer_planner::{KvTensors, Plan, Widening};

use crate::options::Logits;
use crate::tile::Tile;
use crate::{CpuError, Element, Inputs, KvElement, Outputs};

/// Runs a plan on rayon's threads: every work item for every head group as the attention kernel does it, then the merges.
///
/// K and V may hold more slots than the plan refers to.
///
/// # Errors
///
/// Buffers of other lengths or another type than the plan's, or options that are out of range.
pub fn execute<E: Element, K: KvElement<E>>(
    plan: &Plan,
    inputs: Inputs<'_, E, K>,
    outputs: Outputs<'_, E>,
) -> Result<(), CpuError> {
    let logits = inputs.check(plan.shape(), plan.num_query_tokens(), plan.kv_layout(), plan.num_slots())?;
    outputs.check(plan.shape(), plan.num_query_tokens())?;
    match plan.widening() {
        None => run_for_head_dim(plan, inputs, outputs, logits),
        Some(widening) => {
            let widen = |stored| widen::<E, K>(stored, plan.stored(), widening);
            let (k, v) = (widen(inputs.k), widen(inputs.v));
            let Inputs { q, options, .. } = inputs;
            run_for_head_dim(plan, Inputs { q, k: &k, v: &v, options }, outputs, logits)
        }
    }
}

/// K or V in the type of Q: those slots that attention reads.
fn widen<E: Element, K: KvElement<E>>(stored: &[K], KvTensors { shape, layout, .. }: KvTensors, widening: &Widening) -> Vec<E> {
    let (strides, head_dim) = (layout.strides(shape), shape.head_dim() as usize);
    let mut numbers = vec![0.0; head_dim];
    let mut widened = Vec::with_capacity(widening.num_slots() as usize * shape.kv_elements_per_slot() as usize);
    for slot in widening.pieces().iter().flat_map(|piece| piece.from_slot..piece.from_slot + piece.num_slots) {
        for head in 0..u64::from(shape.num_kv_heads()) {
            let at = (u64::from(slot) * strides.slot + head * strides.head) as usize;
            K::widen(&stored[at..][..head_dim], &mut numbers);
            widened.extend(numbers.iter().map(|&number| E::from_f32(number)));
        }
    }
    widened
}

fn run_for_head_dim<E: Element, K: KvElement<E>>(
    plan: &Plan,
    inputs: Inputs<'_, E, K>,
    outputs: Outputs<'_, E>,
    logits: Logits,
) -> Result<(), CpuError> {
    match plan.shape().head_dim() {
        64 => run::<E, K, 64>(plan, inputs, outputs, logits),
        96 => run::<E, K, 96>(plan, inputs, outputs, logits),
        128 => run::<E, K, 128>(plan, inputs, outputs, logits),
        256 => run::<E, K, 256>(plan, inputs, outputs, logits),
        head_dim => return Err(CpuError::HeadDim { head_dim }),
    }
    Ok(())
}

fn run<E: Element, K: KvElement<E>, const D: usize>(
    plan: &Plan,
    inputs: Inputs<'_, E, K>,
    outputs: Outputs<'_, E>,
    logits: Logits,
) {
    let heads = plan.heads();
    let num_partials = heads.num_groups as usize * plan.num_partial_rows() as usize;
    let destination = Mutex::new(Destination {
        heads,
        num_partial_rows: plan.num_partial_rows() as usize,
        outputs,
        sinks: inputs.options.sinks,
        partial_o: vec![[0.0; D]; num_partials],
        partial_lse: vec![f32::NEG_INFINITY; num_partials],
    });

    // As a GPU does it: whoever is free takes the next thread block, and the longest come first.
    let num_groups = heads.num_groups as usize;
    let num_blocks = plan.items().len() * num_groups;
    let next_block = AtomicUsize::new(0);
    rayon::broadcast(|_| {
        let mut tile = Tile::<D>::new();
        let blocks = iter::from_fn(|| Some(next_block.fetch_add(1, Ordering::Relaxed)).filter(|&block| block < num_blocks));
        for block in blocks {
            let (item, group) = (&plan.items()[block / num_groups], (block % num_groups) as u32);
            tile.attend(plan, item, group, &inputs, logits);
            destination.lock().unwrap_or_else(PoisonError::into_inner).store(item, group, &tile);
        }
    });

    destination.into_inner().unwrap_or_else(PoisonError::into_inner).merge(plan);
}

/// Where results go. Storing a tile takes a small part of the time that computing it does, so threads take turns.
struct Destination<'a, E, const D: usize> {
    heads: HeadGroups,
    num_partial_rows: usize,
    outputs: Outputs<'a, E>,
    sinks: Option<&'a [f32]>,
    /// `[num_groups, num_partial_rows, head_dim]`.
    partial_o: Vec<[f32; D]>,
    /// `[num_groups, num_partial_rows]`.
    partial_lse: Vec<f32>,
}

impl<E: Element, const D: usize> Destination<'_, E, D> {
    fn store(&mut self, item: &WorkItem, group: u32, tile: &Tile<D>) {
        if item.partial_row == DIRECT {
            for (row, o) in tile.rows.iter().zip(&tile.o) {
                self.write(row.token, row.head, o, row.lse());
            }
        } else {
            let first = group as usize * self.num_partial_rows + item.partial_row as usize;
            self.partial_o[first..][..tile.o.len()].copy_from_slice(&tile.o);
            for (partial, row) in self.partial_lse[first..].iter_mut().zip(&tile.rows) {
                *partial = row.lse();
            }
        }
    }

    fn merge(&mut self, plan: &Plan) {
        for token in plan.merge_tokens() {
            for head in 0..self.heads.num_qo_heads {
                let (o, lse) = self.merged(plan, token, head);
                self.write(token.token, head, &o, lse);
            }
        }
    }

    /// O and LSE of a token and head: the partials weighted by the exponentials of their LSE.
    fn merged(&self, plan: &Plan, token: &MergeToken, head: u32) -> ([f32; D], f32) {
        let group = (head / self.heads.heads_per_group) as usize;
        let head_in_group = (head % self.heads.heads_per_group) as usize;
        let sources = &plan.merge_sources()[token.source_begin as usize..][..token.num_sources as usize];
        let partials = sources.iter().map(|&row| group * self.num_partial_rows + row as usize + head_in_group);

        let max = partials.clone().map(|partial| self.partial_lse[partial]).fold(f32::NEG_INFINITY, f32::max);
        let mut o = [0.0; D];
        let mut sum = 0.0;
        for partial in partials.filter(|&partial| self.partial_lse[partial] != f32::NEG_INFINITY) {
            let weight = (self.partial_lse[partial] - max).exp();
            sum += weight;
            for (o, partial) in o.iter_mut().zip(&self.partial_o[partial]) {
                *o += weight * partial;
            }
        }
        (o.map(|o| o / sum), max + sum.ln())
    }

    /// Writes a row that all of its columns have been summed for; its sink comes on top of them.
    fn write(&mut self, token: u32, head: u32, o: &[f32; D], lse: f32) {
        let row = token as usize * self.heads.num_qo_heads as usize + head as usize;
        let sink = self.sinks.map_or(f32::NEG_INFINITY, |sinks| sinks[head as usize]);
        let with_sink = lse.max(sink) + (lse.min(sink) - lse.max(sink)).exp().ln_1p();
        let factor = (lse - with_sink).exp();
        for (to, &o) in self.outputs.o[row * D..][..D].iter_mut().zip(o) {
            *to = E::from_f32(o * factor);
        }
        if let Some(to) = &mut self.outputs.lse {
            to[row] = with_sink;
        }
    }
}
