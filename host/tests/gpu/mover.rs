//! Requests whose KV is moved beside the steps that append to it.

use half::bf16;
use packinfer::{
    AttentionShape, Contiguous, DType, Engine, Growth, KvAppend, KvArena, KvError, KvMover, Policy, Sequence, SequenceMove,
    SlotPool, Stream,
};
use packinfer_cpu::random_elements;

use crate::case::engine;

const LAYERS: u32 = 3;
const PAGE_SIZE: u32 = 16;
const SLOTS: u32 = 4096;
const REQUESTS: usize = 6;

/// Requests that grow by a token a step, and all tokens that they ever got.
struct Serving<'a> {
    engine: &'a Engine,
    stream: Stream,
    arena: KvArena<bf16>,
    pool: SlotPool,
    requests: Vec<Sequence>,
    mover: KvMover<usize>,
    /// K and V of new tokens, `[steps, REQUESTS, num_kv_heads, head_dim]`.
    new: [Vec<bf16>; 2],
    steps: usize,
}

impl<'a> Serving<'a> {
    fn new(engine: &'a Engine, most_steps: usize) -> Self {
        let shape = AttentionShape::new(2, 2, 64, DType::Bf16).expect("a good shape");
        let arena = KvArena::new(engine, shape, LAYERS, SLOTS).expect("there is room");
        let len = most_steps * REQUESTS * shape.kv_elements_per_slot() as usize;
        Self {
            mover: engine.kv_mover(&arena).expect("there is room"),
            stream: engine.stream().expect("a stream"),
            pool: SlotPool::new(SLOTS, PAGE_SIZE).expect("a good pool"),
            requests: (0..REQUESTS).map(|_| Sequence::new()).collect(),
            new: [random_elements(len, 1), random_elements(len, 2)],
            steps: 0,
            engine,
            arena,
        }
    }

    /// Elements of the new tokens of a step.
    fn step_len(&self) -> usize {
        REQUESTS * self.arena.shape().kv_elements_per_slot() as usize
    }

    /// A token for every request, into pages, in all layers; nobody waits for the device.
    fn append(&mut self) {
        let position = self.steps as u32;
        let slots: Vec<u32> = self
            .requests
            .iter_mut()
            .map(|request| {
                request.append(&mut self.pool, 1, Growth::Pages).expect("there is room");
                request.runs_from(&self.pool, position).expect("the pool's own")[0].first_slot
            })
            .collect();
        let slots = self.engine.upload_append_slots(&slots, &[position; REQUESTS], SLOTS, &self.stream).expect("good slots");
        let step = self.steps * self.step_len()..(self.steps + 1) * self.step_len();
        let [k, v] = self.new.each_ref().map(|new| self.engine.copy_of(&new[step.clone()]).expect("there is room"));
        for layer in 0..LAYERS {
            let append = KvAppend::new(k.as_slice(), v.as_slice(), &slots);
            self.engine.kv_append(&mut self.arena, layer, append, &self.stream).expect("it fits");
        }
        self.steps += 1;
    }

    /// Begins to move whatever is scattered.
    fn start(&mut self) {
        let eager = Policy::Contiguous(Contiguous { move_cost: 1e-3, max_headroom: 24, ..Contiguous::default() });
        let mut moves: Vec<(usize, SequenceMove)> = Vec::new();
        for (id, request) in self.requests.iter_mut().enumerate() {
            let usage = self.pool.usage();
            let begun = request.reorganize(&mut self.pool, &eager, &usage, 100).expect("a good pool");
            moves.extend(begun.map(|(_, begun)| (id, begun)));
        }
        self.mover.start(self.engine, &mut self.arena, &mut moves, &self.stream).expect("the mover is idle");
        assert!(moves.is_empty());
    }

    /// Ends moves whose copies are done, or gives them up; returns how many there were, and how many slots were left to copy.
    fn finish(&mut self, gives_up: bool) -> Option<(usize, u32)> {
        if let Some(epoch) = self.mover.passed().expect("the work is good") {
            self.pool.retire(epoch).expect("it has ended");
        }
        let Self { engine, stream, arena, pool, requests, mover, .. } = self;
        let mut moves = 0;
        let rest = mover.finish(engine, arena, stream, |id, begun| {
            moves += 1;
            if gives_up {
                return begun.cancel(pool).map(|()| None);
            }
            match requests[id].commit_move(pool, begun) {
                Err(KvError::TargetTooSmall { .. }) => Ok(None),
                ended => ended.map(Some),
            }
        });
        rest.expect("good moves").map(|rest| (moves, rest))
    }

    /// Checks the K and V of every token in every layer.
    fn check(&self, what: &str) {
        self.stream.synchronize().expect("the work is good");
        let elements = self.arena.elements().download().expect("the work is done");
        let slot_len = self.arena.shape().kv_elements_per_slot() as usize;
        let pools: Vec<_> = elements.chunks_exact(SLOTS as usize * slot_len).collect();
        for (id, request) in self.requests.iter().enumerate() {
            let runs = request.runs(&self.pool).expect("the pool's own");
            let slots = runs.iter().flat_map(|run| run.first_slot..run.first_slot + run.num_slots);
            for (position, slot) in slots.enumerate() {
                for (index, pool) in pools.iter().enumerate() {
                    let found = &pool[slot as usize * slot_len..][..slot_len];
                    let token = &self.new[index % 2][(position * REQUESTS + id) * slot_len..][..slot_len];
                    assert!(found == token, "token {position} of request {id} in pool {index}, {what}");
                }
            }
        }
        self.pool.audit().expect("nothing is lost");
    }
}

#[test]
fn requests_keep_their_kv_while_it_moves() {
    let Some(engine) = engine() else { return };
    let mut serving = Serving::new(engine, 150);
    let (mut moves, mut rest) = (0, 0);
    for step in 0..150 {
        if !serving.mover.is_busy() {
            serving.start();
        } else if step % 3 == 0
            && let Some((more, slots)) = serving.finish(false)
        {
            moves += more;
            rest += slots;
        }
        serving.append();
        if step % 10 == 9 {
            serving.check(&format!("step {step}"));
        }
    }
    assert!(moves >= REQUESTS && rest > 0, "{moves} moves, {rest} slots of tokens appended meanwhile");
    let runs = |serving: &Serving| -> usize {
        serving.requests.iter().map(|request| request.runs(&serving.pool).expect("the pool's own").len()).sum()
    };
    // 150 tokens are 10 pages, which requests that grow in turn would have apart.
    assert!(runs(&serving) < 5 * REQUESTS, "{} runs", runs(&serving));
}

#[test]
fn moves_that_are_given_up_leave_everything_in_place() {
    let Some(engine) = engine() else { return };
    let mut serving = Serving::new(engine, 60);
    (0..50).for_each(|_| serving.append());
    let runs = |serving: &Serving| -> Vec<_> {
        serving.requests.iter().map(|request| request.runs(&serving.pool).expect("the pool's own")).collect()
    };
    let (before, free) = (runs(&serving), serving.pool.free_slots());
    serving.start();
    assert!(serving.mover.is_busy() && serving.pool.free_slots() < free);
    {
        let Serving { engine, stream, arena, pool, mover, .. } = &mut serving;
        let mut other = Sequence::new();
        other.append(pool, 40, Growth::Pages).expect("there is room");
        let begun = other.begin_move(pool, 0).expect("there is room").expect("it has tokens");
        let mut moves = vec![(REQUESTS, begun)];
        let error = mover.start(engine, arena, &mut moves, stream).expect_err("the mover is busy");
        assert!(error.to_string().starts_with("the mover has 6 moves"), "{error}");
        let (_, begun) = moves.pop().expect("the move is left in the list");
        begun.cancel(pool).expect("it is the pool's own");
        other.free(pool).expect("it is the pool's own");
    }
    engine.synchronize().expect("the work is good");
    assert_eq!(serving.finish(true), Some((REQUESTS, 0)));
    assert_eq!((runs(&serving), serving.pool.free_slots()), (before, free));
    serving.append();
    serving.check("after moves that were given up");
}
