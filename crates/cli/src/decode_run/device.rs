//! The steps on a GPU.

use std::time::{Duration, Instant};

use anyhow::Context;
use packinfer::measure::{Mark, Marks};
use packinfer::{AppendSlots, DeviceBuffer, Engine, KvAppend, KvArena, KvMover, RunOptions, Stream, Tensors};
use packinfer_batch::{AttentionShape, Batch, Mask};
use packinfer_cpu::random_elements;
use packinfer_kv::KvRun;
use packinfer_trace::decode_replay::DecodeReplay;
use serde::Serialize;

use super::fill;
use crate::args::DecodeRunArgs;
use crate::backend::{BackendElement, BackendKv, Cuda};

/// Tokens of random K and V, parts of which are what is appended.
const RANDOM_TOKENS: usize = 1 << 15;
/// The most tokens that one launch appends: less than there are random ones, so that launches differ.
const MOST_APPENDED: usize = RANDOM_TOKENS / 2;
/// Steps of which O is compared.
const COMPARED_STEPS: u32 = 8;

/// Means over the steps of a round, of all layers together.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Measured {
    /// On the device, from the end of the step before, or from the KV of new requests being there, to the end of this one.
    pub step_us: f64,
    pub attention_us: f64,
    pub append_us: f64,
    /// What is left of the step: the upload of the plan, and copies of tokens that were appended while their request was moved.
    pub between_us: f64,
    /// Copies on the mover's stream, beside the steps; what they cost is in the time of attention.
    pub copy_us: f64,
    /// On the host, from runs to a plan.
    pub plan_us: f64,
}

/// O of the last layer in some of the steps, each `[requests, num_qo_heads, head_dim]`.
pub struct Outputs<E> {
    steps: Vec<Vec<E>>,
}

impl<E: BackendElement> Outputs<E> {
    /// Relative errors, in norm, of others against these, step by step.
    pub fn differences(&self, other: &Self) -> impl Iterator<Item = f64> {
        self.steps.iter().zip(&other.steps).map(|(ours, theirs)| {
            let norm = |elements: &mut dyn Iterator<Item = f64>| elements.map(|x| x * x).sum::<f64>().sqrt();
            let error = norm(&mut ours.iter().zip(theirs).map(|(&a, &b)| Into::<f64>::into(a) - Into::<f64>::into(b)));
            let of = norm(&mut ours.iter().map(|&a| a.into()));
            // What is not a number is no match either.
            if error < of { error / of } else { f64::INFINITY }
        })
    }
}

/// Marks of a step.
struct StepMarks {
    begin: Mark,
    /// Before each layer's append, between that and attention, and behind attention.
    layers: Vec<[Mark; 3]>,
}

/// Goes through the steps of a warm replay.
pub fn measure<E: BackendElement + BackendKv<E>>(
    cuda: &Cuda,
    replay: &mut DecodeReplay<'_>,
    shape: AttentionShape,
    args: &DecodeRunArgs,
) -> anyhow::Result<(Measured, Outputs<E>)> {
    let compared_every = (args.steps / COMPARED_STEPS).max(1);
    let outputs = args.steps / compared_every;
    let mut device = Device::<E>::new(cuda.engine(), replay, shape, (args, outputs))?;
    // The KV of requests that decode already is written like that of new ones.
    let runs: Vec<_> = replay.requests().map(|request| request.kv.runs(replay.pool())).collect::<Result<_, _>>()?;
    device.write(runs.iter().flatten(), 0)?;

    let (engine, stream) = (cuda.engine(), device.stream.clone());
    let mut planner = cuda.planner();
    let mut batch = Batch::new(shape, Mask::Causal);
    fill(&mut batch, replay)?;
    let mut plan = planner.plan(&batch)?;
    let mut device_plan = engine.upload(&plan, &stream)?;
    let mut workspace = engine.workspace()?;
    let mut new_slots = engine.upload_append_slots(&[], &[], device.arena.num_slots(), &stream)?;
    let mut mover: KvMover<u64> = engine.kv_mover(&device.arena)?;
    let mut marks = Marks::default();
    let (mut steps, mut plan_time, mut copy_ms) = (Vec::new(), Duration::ZERO, 0.0);
    for step in 0..args.steps {
        let admitted = replay.admit()?;
        device.write(admitted.iter().flat_map(|admitted| &admitted.runs), step + 1)?;

        let begin = marks.set(engine, &stream)?;
        if let Some(epoch) = mover.passed()? {
            replay.retire(epoch)?;
        }
        let finished = mover.finish(engine, &mut device.arena, &stream, |id, begun| replay.end_move(id, begun))?;
        if finished.is_some() {
            copy_ms += mover.last_copies_ms()?.unwrap_or(0.0);
        }
        if !mover.is_busy() {
            let mut moves = replay.begin_moves()?;
            mover.start(engine, &mut device.arena, &mut moves, &stream)?;
        }
        replay.append()?;
        let start = Instant::now();
        fill(&mut batch, replay)?;
        planner.plan_into(&batch, &mut plan)?;
        plan_time += start.elapsed();
        engine.upload_into(&mut device_plan, &plan, &stream)?;
        new_slots.update(replay.slots(), replay.positions(), &stream)?;

        let compared = step % compared_every == compared_every - 1;
        let mut layers = Vec::new();
        for layer in 0..args.layers {
            let before = marks.set(engine, &stream)?;
            device.append(layer, &new_slots, step + 1)?;
            let between = marks.set(engine, &stream)?;
            let output = if compared && layer == args.layers - 1 { step / compared_every } else { outputs };
            let tensors = device.tensors(layer, step, output)?;
            engine.run(&device_plan, &mut workspace, &stream, tensors, RunOptions::default())?;
            layers.push([before, between, marks.set(engine, &stream)?]);
        }
        steps.push(StepMarks { begin, layers });
    }
    engine.synchronize()?;
    // Copies that are still to be ended, lest their slots be lost.
    mover.finish(engine, &mut device.arena, &stream, |id, begun| replay.end_move(id, begun))?;
    let measured = summary(&marks, &steps, plan_time, copy_ms)?;
    Ok((measured, device.outputs()?))
}

/// Means over the steps.
fn summary(marks: &Marks, steps: &[StepMarks], plan_time: Duration, copy_ms: f32) -> anyhow::Result<Measured> {
    let (mut step_time, mut attention, mut append) = (Duration::ZERO, Duration::ZERO, Duration::ZERO);
    for StepMarks { begin, layers } in steps {
        let last = layers.last().context("there are no layers")?;
        step_time += marks.between(*begin, last[2])?;
        for [before, between, behind] in layers {
            append += marks.between(*before, *between)?;
            attention += marks.between(*between, *behind)?;
        }
    }
    let mean = |time: Duration| time.as_secs_f64() * 1e6 / steps.len().max(1) as f64;
    Ok(Measured {
        step_us: mean(step_time),
        attention_us: mean(attention),
        append_us: mean(append),
        between_us: mean(step_time.saturating_sub(attention + append)),
        copy_us: mean(Duration::from_secs_f32(copy_ms * 1e-3)),
        plan_us: mean(plan_time),
    })
}

/// The arena, and tensors that stand for what a model would compute.
struct Device<'a, E> {
    engine: &'a Engine,
    stream: Stream,
    arena: KvArena<E>,
    /// `[RANDOM_TOKENS, num_kv_heads, head_dim]`.
    k: DeviceBuffer<E>,
    v: DeviceBuffer<E>,
    /// Twice as many tokens as there are requests.
    q: DeviceBuffer<E>,
    /// O of each of the steps that are compared, and one for all others.
    o: Vec<DeviceBuffer<E>>,
    requests: usize,
    prompt_slots: AppendSlots,
}

impl<'a, E: BackendElement + BackendKv<E>> Device<'a, E> {
    fn new(
        engine: &'a Engine,
        replay: &DecodeReplay<'_>,
        shape: AttentionShape,
        (args, outputs): (&DecodeRunArgs, u32),
    ) -> anyhow::Result<Self> {
        let num_slots = replay.pool().num_slots();
        let stream = engine.stream()?;
        let requests = replay.requests().len();
        let random = |len: usize, seed: u64| engine.copy_of(&random_elements::<E>(len, args.seed.wrapping_add(seed)));
        let kv_len = RANDOM_TOKENS * shape.kv_elements_per_slot() as usize;
        let qo_len = requests * shape.qo_elements_per_token() as usize;
        Ok(Self {
            arena: KvArena::new(engine, shape, args.layers, num_slots)?,
            k: random(kv_len, 1)?,
            v: random(kv_len, 2)?,
            q: random(2 * qo_len, 3)?,
            o: (0..=outputs).map(|_| engine.zeros(qo_len)).collect::<Result<_, _>>()?,
            requests,
            prompt_slots: engine.upload_append_slots(&[], &[], num_slots, &stream)?,
            engine,
            stream,
        })
    }

    /// Writes K and V of all layers into the slots of some runs. The same numbers of tokens in the same steps get the same K and
    /// V, wherever they lie.
    fn write<'r>(&mut self, runs: impl Iterator<Item = &'r KvRun>, step: u32) -> anyhow::Result<()> {
        let slots: Vec<u32> = runs.flat_map(|run| run.first_slot..run.first_slot + run.num_slots).collect();
        for (index, slots) in slots.chunks(MOST_APPENDED).enumerate() {
            let positions = vec![0; slots.len()];
            self.prompt_slots.update(slots, &positions, &self.stream)?;
            for layer in 0..self.arena.num_layers() {
                let append =
                    new_tokens(&self.k, &self.v, &self.prompt_slots, self.arena.shape(), [step, layer, 1 + index as u32]);
                self.engine.kv_append(&mut self.arena, layer, append, &self.stream)?;
            }
        }
        Ok(())
    }

    /// Appends a token to every request.
    fn append(&mut self, layer: u32, slots: &AppendSlots, step: u32) -> anyhow::Result<()> {
        let append = new_tokens(&self.k, &self.v, slots, self.arena.shape(), [step, layer, 0]);
        Ok(self.engine.kv_append(&mut self.arena, layer, append, &self.stream)?)
    }

    /// Q of a step, K and V of a layer, and a place for O.
    fn tensors(&mut self, layer: u32, step: u32, output: u32) -> anyhow::Result<Tensors<'_, E>> {
        let len = self.q.len() / 2;
        let token_len = len / self.requests;
        let first = (step as usize * 7 + layer as usize * 13) % self.requests;
        let (k, v) = self.arena.layer(layer)?;
        Ok(Tensors {
            q: self.q.as_slice().skip(first * token_len).first(len),
            k,
            v,
            o: self.o.get_mut(output as usize).context("O is missing")?.as_mut_slice(),
            lse: None,
        })
    }

    /// O of the steps that are compared.
    fn outputs(&self) -> anyhow::Result<Outputs<E>> {
        let compared = self.o.split_last().map_or(&[][..], |(_, compared)| compared);
        Ok(Outputs { steps: compared.iter().map(DeviceBuffer::download).collect::<Result<_, _>>()? })
    }
}

/// A part of the random tokens, another one for each of some numbers.
fn new_tokens<'a, E>(
    k: &'a DeviceBuffer<E>,
    v: &'a DeviceBuffer<E>,
    slots: &'a AppendSlots,
    shape: AttentionShape,
    numbers: [u32; 3],
) -> KvAppend<'a, E> {
    let slot_len = shape.kv_elements_per_slot() as usize;
    let tokens = slots.num_tokens() as usize;
    let mixed = numbers
        .into_iter()
        .fold(0u64, |mixed, number| (mixed ^ u64::from(number)).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29));
    let first = (mixed % (RANDOM_TOKENS - tokens + 1) as u64) as usize;
    let part = |tensor: &'a DeviceBuffer<E>| tensor.as_slice().skip(first * slot_len).first(tokens * slot_len);
    KvAppend::new(part(k), part(v), slots)
}
