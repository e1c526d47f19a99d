//! One work item for one head group: online softmax over the columns, as the kernels do it.

use multiversion::multiversion;
use packinfer_abi::{COLUMN_STEP, HeadGroups, KvRun, TALL_TILE_ROWS, WorkItem};
use packinfer_planner::Plan;

use crate::options::Logits;
use crate::{Element, Inputs, KvElement};

/// Columns of a step.
const STEP: usize = COLUMN_STEP as usize;

/// Accumulators of a dot product, so that its additions can go in parallel.
const LANES: usize = 16;

/// Elements of O that are summed in registers at a time.
const CHUNK: usize = 32;

/// A row of a tile: one query head of one query token, and what has been summed for it so far.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) token: u32,
    pub(crate) head: u32,
    /// First column of the item that the row sees.
    column_begin: u32,
    /// One past the last column of the item that the row sees.
    column_end: u32,
    /// Largest score so far.
    max: f32,
    /// Sum of the exponentials of the scores less `max`.
    sum: f32,
}

impl Row {
    /// Log-sum-exp of the scores; −∞ where the row sees nothing.
    pub(crate) fn lse(&self) -> f32 {
        self.max + self.sum.ln()
    }
}

/// The tile that a thread works on; reused from item to item.
pub(crate) struct Tile<const D: usize> {
    pub(crate) rows: Vec<Row>,
    /// O of every row, un-normalised until [`Self::attend`] is done.
    pub(crate) o: Vec<[f32; D]>,
    /// Q of every row, scaled.
    q: Vec<[f32; D]>,
    /// K and V of the columns of one step.
    k: Vec<[f32; D]>,
    v: Vec<[f32; D]>,
}

impl<const D: usize> Tile<D> {
    pub(crate) fn new() -> Self {
        let rows = TALL_TILE_ROWS as usize;
        Self {
            rows: Vec::with_capacity(rows),
            o: Vec::with_capacity(rows),
            q: Vec::with_capacity(rows),
            k: vec![[0.0; D]; STEP],
            v: vec![[0.0; D]; STEP],
        }
    }

    /// Does `item` for a head group: afterwards `rows` and `o` hold its result, normalised.
    pub(crate) fn attend<E: Element, K: KvElement<E>>(
        &mut self,
        plan: &Plan,
        item: &WorkItem,
        group: u32,
        inputs: &Inputs<'_, E, K>,
        logits: Logits,
    ) {
        let heads = plan.heads();
        let kv_head = group / heads.groups_per_kv_head();
        let attended = plan.attended();
        let strides = attended.layout.strides(attended.shape);
        let k_scale = inputs.options.k_scale(kv_head as usize);
        self.load_rows(plan, item, group, inputs.q, logits.scale * k_scale);
        let mut slots = plan.runs()[item.run_begin as usize..].iter().flat_map(slots_of).skip(item.run_skip as usize);
        for column in (item.column_begin..item.column_end).step_by(STEP) {
            let columns = STEP.min((item.column_end - column) as usize);
            for (index, slot) in slots.by_ref().take(columns).enumerate() {
                let at = (u64::from(slot) * strides.slot + u64::from(kv_head) * strides.head) as usize;
                K::widen(&inputs.k[at..][..D], &mut self.k[index]);
                K::widen(&inputs.v[at..][..D], &mut self.v[index]);
            }
            step(&mut self.rows, &mut self.o, &self.q, &self.k, &self.v, column, logits.soft_cap);
        }
        let v_scale = inputs.options.v_scale(kv_head as usize);
        for (row, o) in self.rows.iter().zip(&mut self.o) {
            let normaliser = if row.sum > 0.0 { v_scale / row.sum } else { 1.0 };
            o.iter_mut().for_each(|o| *o *= normaliser);
        }
    }

    fn load_rows<E: Element>(&mut self, plan: &Plan, item: &WorkItem, group: u32, q: &[E], scale: f32) {
        let HeadGroups { num_qo_heads, heads_per_group, .. } = plan.heads();
        self.rows.clear();
        self.q.clear();
        for segment in plan.segments_of(item) {
            for index in 0..segment.num_tokens {
                let columns = segment.columns(index);
                for head in group * heads_per_group..(group + 1) * heads_per_group {
                    let token = segment.first_token + index;
                    self.rows.push(Row {
                        token,
                        head,
                        column_begin: columns.start.max(item.column_begin),
                        column_end: columns.end.min(item.column_end),
                        max: f32::NEG_INFINITY,
                        sum: 0.0,
                    });
                    let at = (token as usize * num_qo_heads as usize + head as usize) * D;
                    let mut row = [0.0; D];
                    E::widen(&q[at..][..D], &mut row);
                    self.q.push(row.map(|q| q * scale));
                }
            }
        }
        self.o.clear();
        self.o.resize(self.rows.len(), [0.0; D]);
    }
}

fn slots_of(run: &KvRun) -> std::ops::Range<u32> {
    run.first_slot..run.first_slot + run.num_slots
}

/// Adds the columns from `column` on, whose K and V are given, to every row that sees them.
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma"))]
fn step<const D: usize>(
    rows: &mut [Row],
    o: &mut [[f32; D]],
    q: &[[f32; D]],
    k: &[[f32; D]],
    v: &[[f32; D]],
    column: u32,
    soft_cap: Option<f32>,
) {
    let mut scores = [0.0; STEP];
    for ((row, o), q) in rows.iter_mut().zip(o).zip(q) {
        let begin = (row.column_begin.max(column) - column) as usize;
        let end = (row.column_end.clamp(column, column + COLUMN_STEP) - column) as usize;
        if begin >= end {
            continue;
        }
        let scores = &mut scores[begin..end];
        for (score, k) in scores.iter_mut().zip(&k[begin..end]) {
            *score = dot(q, k);
        }
        if let Some(cap) = soft_cap {
            scores.iter_mut().for_each(|score| *score = cap * (*score / cap).tanh());
        }
        let max = scores.iter().copied().fold(row.max, f32::max);
        let rescale = (row.max - max).exp();
        let mut sum = 0.0;
        for score in scores.iter_mut() {
            *score = (*score - max).exp();
            sum += *score;
        }
        row.max = max;
        row.sum = row.sum * rescale + sum;
        accumulate(o, rescale, scores, &v[begin..end]);
    }
}

#[inline(always)]
fn dot<const D: usize>(a: &[f32; D], b: &[f32; D]) -> f32 {
    let mut sums = [0.0; LANES];
    for (a, b) in a.as_chunks::<LANES>().0.iter().zip(b.as_chunks::<LANES>().0) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.iter().sum()
}

/// `o * rescale + Σ p v`.
#[inline(always)]
fn accumulate<const D: usize>(o: &mut [f32; D], rescale: f32, p: &[f32], v: &[[f32; D]]) {
    for (chunk, o) in o.as_chunks_mut::<CHUNK>().0.iter_mut().enumerate() {
        let mut sums = o.map(|o| o * rescale);
        for (p, v) in p.iter().zip(v) {
            let v = &v.as_chunks::<CHUNK>().0[chunk];
            for lane in 0..CHUNK {
                sums[lane] += p * v[lane];
            }
        }
        *o = sums;
    }
}
