//! A model of a KV pool and its requests that is too simple to be wrong: it remembers what was written to every slot.
//!
//! Operations come as numbers, so that a property test and a fuzzer can both drive it. After every operation the KV that it
//! touched is read back slot by slot; a slot that has two owners by mistake shows up as somebody else's token.

use packinfer_kv::{
    Branch, Contiguous, Epoch, Filled, GroupMember, Growth, KvError, KvRun, Move, Policy, PrefixTree, Sequence, SequenceMove,
    SlotCopy, SlotPool, Usage,
};

/// Pages are small, so that boundaries are hit often.
const PAGE_SIZE: u32 = 4;
const BLOCK_TOKENS: u32 = 8;
const NUM_SLOTS: u32 = 512;
/// Tokens of a request at most: reading one back stays cheap.
const MAX_TOKENS: u32 = 96;
/// Running requests at most: enough that the pool runs out.
const MAX_REQUESTS: usize = 24;
/// Requests that are moved as a group, at most.
const GROUP_SIZE: usize = 3;
/// Plans in flight at most.
const MAX_PLANS: usize = 3;
/// Operations between two walks over the whole pool.
const AUDIT_INTERVAL: u32 = 512;

struct Request {
    branch: Branch,
    /// What each of its slots must hold.
    tokens: Vec<u32>,
    moving: Option<SequenceMove>,
}

/// What a plan in flight reads.
struct Plan {
    epoch: Epoch,
    runs: Vec<KvRun>,
    tokens: Vec<u32>,
}

pub struct Model {
    pool: SlotPool,
    tree: PrefixTree<[u32]>,
    slots: Vec<u32>,
    requests: Vec<Request>,
    plans: Vec<Plan>,
    shared_moves: Vec<Move>,
    steps: u32,
    /// Operations that did something, by kind: a test that never moves anything proves nothing about moves.
    pub done: [u32; NUM_KINDS],
}

/// What an operation does.
#[derive(Clone, Copy)]
enum Kind {
    Start,
    AppendPages,
    AppendContiguous,
    Fork,
    Finish,
    Insert,
    Evict,
    Move,
    MoveGroup,
    MoveShared,
    Plan,
    RunPlan,
    Misuse,
}

pub const NUM_KINDS: usize = 13;

/// How often each kind occurs: more begins than ends, so that slots run out.
const KINDS: [Kind; 36] = {
    use Kind::*;
    [
        Start,
        Start,
        Start,
        Start,
        AppendPages,
        AppendPages,
        AppendPages,
        AppendPages,
        AppendContiguous,
        AppendContiguous,
        AppendContiguous,
        AppendContiguous,
        Fork,
        Fork,
        Fork,
        Finish,
        Finish,
        Finish,
        Insert,
        Insert,
        Insert,
        Evict,
        Evict,
        Move,
        Move,
        Move,
        Move,
        Move,
        MoveGroup,
        MoveGroup,
        MoveShared,
        MoveShared,
        Plan,
        Plan,
        RunPlan,
        Misuse,
    ]
};

impl Model {
    pub fn new() -> Self {
        Self {
            pool: SlotPool::new(NUM_SLOTS, PAGE_SIZE).unwrap(),
            tree: PrefixTree::new(BLOCK_TOKENS).unwrap(),
            slots: vec![u32::MAX; NUM_SLOTS as usize],
            requests: Vec::new(),
            plans: Vec::new(),
            shared_moves: Vec::new(),
            steps: 0,
            done: [0; NUM_KINDS],
        }
    }

    /// Does the operation that `code` stands for, and checks what it touched.
    pub fn step(&mut self, code: u32) {
        let kind = KINDS[code as usize % KINDS.len()];
        let (request, amount) = ((code >> 8) as usize, (code >> 16) % 40 + 1);
        let before = self.pool.usage();
        let done = match kind {
            Kind::Start => self.start(request, amount),
            Kind::AppendPages => self.append(request, amount, Growth::Pages),
            Kind::AppendContiguous => self.append(request, amount, Growth::Contiguous { headroom: amount / 2 }),
            Kind::Fork => self.fork(request),
            Kind::Finish => self.finish(request),
            Kind::Insert => self.insert(request),
            Kind::Evict => self.evict(amount),
            Kind::Move => self.move_begin_or_end(request, amount),
            Kind::MoveGroup => self.move_group(request, amount),
            Kind::MoveShared => self.move_shared(request, amount),
            Kind::Plan => self.plan(request),
            Kind::RunPlan => self.run_plan(),
            Kind::Misuse => self.misuse(),
        };
        self.done[kind as usize] += u32::from(done);
        let usage = self.pool.usage();
        assert_eq!(usage.used + usage.free + usage.retiring, usage.total);
        assert!(usage.shared <= usage.used && usage.largest_free <= usage.free, "{usage:?}");
        if !done {
            assert_eq!(usage, before, "an operation that was refused changed something");
        }
        if let Some(touched) = pick(&self.requests, request) {
            self.check(&self.requests[touched]);
        }
        self.steps += 1;
        if self.steps.is_multiple_of(AUDIT_INTERVAL) {
            self.audit();
        }
    }

    /// Ends everything and checks that every slot has come back.
    pub fn finish_all(mut self) {
        self.audit();
        while !self.requests.is_empty() {
            self.finish(0);
        }
        for begun in self.shared_moves.drain(..) {
            self.pool.cancel_move(begun).unwrap();
        }
        let ended = self.pool.epoch();
        self.pool.advance_epoch();
        self.pool.retire(ended).unwrap();
        // Only the tree owns slots now; blocks that begin in the same page, where forks parted, count it twice.
        assert!(self.tree.evictable_slots() >= u64::from(self.pool.usage().used));
        self.tree.evict(&mut self.pool, NUM_SLOTS).unwrap();
        assert_eq!(self.tree.evictable_slots(), 0);
        let all_free = Usage { total: NUM_SLOTS, free: NUM_SLOTS, largest_free: NUM_SLOTS, ..Usage::default() };
        assert_eq!((self.pool.usage(), self.tree.num_blocks()), (all_free, 0));
    }

    fn audit(&self) {
        self.pool.audit().unwrap();
        self.requests.iter().for_each(|request| self.check(request));
    }

    /// A request's KV reads as it was written.
    fn check(&self, request: &Request) {
        assert_eq!(request.branch.kv.len() as usize, request.tokens.len());
        let runs = request.branch.kv.runs(&self.pool).unwrap();
        assert_eq!(self.read(&runs), request.tokens);
        // A kernel that reads whole pages through a block table finds every token at its place in a page.
        let mut token = 0;
        for run in runs {
            assert_eq!(run.first_slot % PAGE_SIZE, token % PAGE_SIZE);
            token += run.num_slots;
        }
    }

    fn read(&self, runs: &[KvRun]) -> Vec<u32> {
        runs.iter().flat_map(|run| &self.slots[run.first_slot as usize..][..run.num_slots as usize]).copied().collect()
    }

    fn copy(slots: &mut [u32], copies: &[SlotCopy]) {
        for copy in copies {
            let from = copy.from as usize..(copy.from + copy.num_slots) as usize;
            slots.copy_within(from, copy.to as usize);
        }
    }

    /// Prompts are prefixes of few texts, so that they often begin alike.
    fn start(&mut self, text: usize, amount: u32) -> bool {
        if self.requests.len() >= MAX_REQUESTS {
            return false;
        }
        let (text, common) = ((text % 5) as u32, amount / 4 * BLOCK_TOKENS / 2);
        let prompt: Vec<u32> = (0..amount).map(|i| if i < common { i } else { text * 1000 + i }).collect();
        let mut branch = self.tree.start(&mut self.pool, prompt.chunks(BLOCK_TOKENS as usize)).unwrap();
        let cached = branch.kv.len();
        assert_eq!(cached, branch.prefix().tokens);
        match branch.kv.append(&mut self.pool, amount - cached, Growth::Contiguous { headroom: 0 }) {
            Ok(copy) => {
                assert_eq!(copy, None, "a prompt's blocks match whole");
                let request = Request { branch, tokens: prompt, moving: None };
                self.write(&request, cached);
                self.requests.push(request);
                true
            }
            Err(error) => {
                self.assert_out_of_slots(&error);
                self.tree.finish(&mut self.pool, branch).unwrap();
                false
            }
        }
    }

    fn write(&mut self, request: &Request, first: u32) {
        let runs = request.branch.kv.runs_from(&self.pool, first).unwrap();
        let slots = runs.iter().flat_map(|run| run.first_slot..run.first_slot + run.num_slots);
        let mut written = 0;
        for (slot, &token) in slots.zip(&request.tokens[first as usize..]) {
            self.slots[slot as usize] = token;
            written += 1;
        }
        assert_eq!(written, request.tokens.len() - first as usize);
    }

    fn append(&mut self, request: usize, amount: u32, growth: Growth) -> bool {
        let Some(index) = pick(&self.requests, request) else { return false };
        let mut request = self.requests.swap_remove(index);
        let len = request.branch.kv.len();
        let fits = len + amount <= MAX_TOKENS;
        let result = if fits { request.branch.kv.append(&mut self.pool, amount, growth) } else { Ok(None) };
        let done = fits && result.is_ok();
        match result {
            Ok(copy) if fits => {
                Self::copy(&mut self.slots, copy.as_slice());
                let unique = self.steps << 8 | 0x8000_0000;
                request.tokens.extend((0..amount).map(|i| unique | i));
                self.write(&request, len);
            }
            Ok(_) => {}
            Err(error) => self.assert_out_of_slots(&error),
        }
        self.check(&request);
        self.requests.push(request);
        done
    }

    fn fork(&mut self, request: usize) -> bool {
        let Some(index) = pick(&self.requests, request).filter(|_| self.requests.len() < MAX_REQUESTS) else { return false };
        let parent = &mut self.requests[index];
        let branch = self.tree.fork(&mut self.pool, &mut parent.branch).unwrap();
        let tokens = parent.tokens.clone();
        self.requests.push(Request { branch, tokens, moving: None });
        true
    }

    fn finish(&mut self, request: usize) -> bool {
        let Some(index) = pick(&self.requests, request) else { return false };
        let request = self.requests.swap_remove(index);
        // Its slots may be written by others from now on.
        self.run_plans();
        self.tree.finish(&mut self.pool, request.branch).unwrap();
        if let Some(begun) = request.moving {
            begun.cancel(&mut self.pool).unwrap();
        }
        true
    }

    fn insert(&mut self, request: usize) -> bool {
        let Some(index) = pick(&self.requests, request) else { return false };
        let request = &mut self.requests[index];
        let before = (request.branch.prefix(), self.pool.usage());
        let path = request.tokens.chunks(BLOCK_TOKENS as usize);
        self.tree.insert(&mut self.pool, &mut request.branch, path).unwrap();
        before != (request.branch.prefix(), self.pool.usage())
    }

    fn evict(&mut self, amount: u32) -> bool {
        self.run_plans();
        let target = (self.pool.free_slots() + amount).min(NUM_SLOTS);
        let leaves = self.tree.num_evictable_leaves();
        let evicted = self.tree.evict(&mut self.pool, target).unwrap();
        assert!(self.pool.free_slots() >= target || self.tree.num_evictable_leaves() == 0);
        assert!(evicted.blocks > 0 || leaves == 0);
        // Even if nothing was evicted: plans were run and what they had read came free.
        true
    }

    fn move_begin_or_end(&mut self, request: usize, amount: u32) -> bool {
        let Some(index) = pick(&self.requests, request) else { return false };
        let request = &mut self.requests[index];
        let Some(begun) = request.moving.take() else {
            match request.branch.kv.begin_move(&mut self.pool, amount / 2) {
                Ok(begun) => request.moving = begun,
                Err(KvError::NoContiguous { .. } | KvError::OutOfSlots { .. }) => {}
                // The fork that it came from is moving, or a block is that only it still stands on.
                Err(KvError::Moving(_)) => {
                    assert!(!self.shared_moves.is_empty() || self.requests.iter().any(|request| request.moving.is_some()));
                }
                Err(error) => panic!("{error}"),
            }
            return self.requests[index].moving.is_some();
        };
        if amount == 1 {
            begun.cancel(&mut self.pool).unwrap();
            return true;
        }
        Self::copy(&mut self.slots, begun.copies());
        match request.branch.kv.commit_move(&mut self.pool, begun) {
            Ok((_, catch_up)) => Self::copy(&mut self.slots, &catch_up),
            Err(KvError::TargetTooSmall { .. } | KvError::Shared { .. } | KvError::NotMovable) => {}
            Err(error) => panic!("{error}"),
        }
        true
    }

    /// Begins to move neighbours in the list side by side; [`Self::move_begin_or_end`] ends that for each of them.
    fn move_group(&mut self, first: usize, amount: u32) -> bool {
        let Some(first) = pick(&self.requests, first) else { return false };
        // It always pays, so that it is done often.
        let policy = Policy::Contiguous(Contiguous { move_cost: 0.0, ..Contiguous::default() });
        let usage = self.pool.usage();
        let group = first..self.requests.len().min(first + GROUP_SIZE);
        if self.requests[group.clone()].iter().any(|request| request.moving.is_some()) {
            return false;
        }
        let group = self.requests[group].iter_mut();
        let mut members: Vec<_> = group.map(|request| GroupMember { kv: &mut request.branch.kv, expected: amount }).collect();
        let Some(begun) = self.pool.reorganize_group(&policy, &usage, &mut members).unwrap() else { return false };
        assert_eq!(self.pool.usage().used, usage.used + begun.extent.num_slots);
        // Member after member, each in slots of its own.
        let mut free_from = begun.extent.first_slot;
        for (member, begun) in begun.members {
            for copy in begun.copies() {
                assert!(copy.to >= free_from);
                free_from = copy.to + copy.num_slots;
            }
            assert!(self.requests[first + member].moving.replace(begun).is_none());
        }
        assert!(free_from <= begun.extent.first_slot + begun.extent.num_slots);
        true
    }

    /// Moves slots for all their owners.
    fn move_shared(&mut self, request: usize, amount: u32) -> bool {
        if amount < 20 && !self.shared_moves.is_empty() {
            let begun = self.shared_moves.remove(0);
            Self::copy(&mut self.slots, begun.copies());
            match self.pool.commit_move(begun) {
                // It was evicted meanwhile, or had one owner when the move began and has more now.
                Ok(_) | Err(KvError::StaleExtent(_) | KvError::Shared { .. }) => return true,
                Err(error) => panic!("{error}"),
            }
        }
        let Some(node) = pick(&self.requests, request).and_then(|index| self.requests[index].branch.prefix().node) else {
            return false;
        };
        let extent = self.tree.extents(node).unwrap().next().unwrap();
        let run = self.pool.run(extent).unwrap();
        let Ok(target) = self.pool.allocate(run.num_slots) else { return false };
        match self.pool.begin_move(&[Filled { extent, num_slots: run.num_slots }], target) {
            Ok(begun) => self.shared_moves.push(begun),
            Err(KvError::Moving(_)) => self.pool.release(target).unwrap(),
            Err(error) => panic!("{error}"),
        }
        true
    }

    fn plan(&mut self, request: usize) -> bool {
        let Some(index) = pick(&self.requests, request).filter(|_| self.plans.len() < MAX_PLANS) else { return false };
        let request = &self.requests[index];
        let runs = request.branch.kv.runs(&self.pool).unwrap();
        self.plans.push(Plan { epoch: self.pool.epoch(), runs, tokens: request.tokens.clone() });
        true
    }

    /// The oldest plan runs, and what it was the last to read comes free.
    fn run_plan(&mut self) -> bool {
        if !self.plans.is_empty() {
            let plan = self.plans.remove(0);
            assert_eq!(self.read(&plan.runs), plan.tokens, "a plan in flight lost its KV");
        }
        let now = self.pool.advance_epoch();
        // Everything before the oldest epoch that a plan still reads.
        let oldest_read = self.plans.iter().map(|plan| plan.epoch).min().unwrap_or(now);
        if let Some(finished) = oldest_read.previous() {
            self.pool.retire(finished).unwrap();
        }
        true
    }

    fn run_plans(&mut self) {
        while !self.plans.is_empty() {
            self.run_plan();
        }
    }

    /// What must be refused is refused.
    fn misuse(&mut self) -> bool {
        let too_much = self.pool.free_slots() + 1;
        assert!(matches!(self.pool.allocate(too_much), Err(KvError::OutOfSlots { .. })));
        assert!(Sequence::new().append(&mut self.pool, too_much, Growth::Pages).is_err());
        assert!(self.pool.retire(self.pool.epoch()).is_err());
        let Ok(extent) = self.pool.allocate(1) else { return false };
        let mut other = SlotPool::new(PAGE_SIZE, PAGE_SIZE).unwrap();
        assert_eq!(other.release(extent), Err(KvError::ForeignExtent(extent)));
        self.pool.release(extent).unwrap();
        assert_eq!(self.pool.release(extent), Err(KvError::StaleExtent(extent)));
        assert_eq!(self.pool.retain(extent), Err(KvError::StaleExtent(extent)));
        true
    }

    fn assert_out_of_slots(&self, error: &KvError) {
        let KvError::OutOfSlots { needed, free, .. } = *error else { panic!("{error}") };
        assert_eq!(free, self.pool.free_slots());
        assert!(needed > u64::from(free), "{error}");
    }
}

fn pick<T>(of: &[T], number: usize) -> Option<usize> {
    (!of.is_empty()).then(|| number % of.len())
}
