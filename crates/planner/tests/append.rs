//! Plans that grow from decode step to decode step are as good as new ones.

use packinfer_abi::KvRun;
use packinfer_batch::{AttentionShape, Batch, DType, KvLayout, Mask, PageOrder, PagedLayout};
use packinfer_planner::{AppendError, DeviceModel, Headroom, Plan, Planner};
use proptest::prelude::*;

mod check;

use check::{assert_in_order, assert_valid};

/// The KV of one request of a growing batch.
#[derive(Clone, Debug)]
struct Sequence {
    slots: Vec<u32>,
}

impl Sequence {
    fn runs(&self) -> Vec<KvRun> {
        let runs = self.slots.chunk_by(|a, b| a + 1 == *b);
        runs.map(|slots| KvRun { first_slot: slots[0], num_slots: slots.len() as u32 }).collect()
    }
}

fn batch(mask: Mask, sequences: &[Sequence]) -> Batch {
    batch_in(KvLayout::Slots, mask, sequences)
}

fn batch_in(kv_layout: KvLayout, mask: Mask, sequences: &[Sequence]) -> Batch {
    let shape = AttentionShape::new(16, 4, 128, DType::Bf16).expect("a good shape");
    let mut batch = Batch::in_layout(shape, mask, kv_layout).expect("a good layout");
    for sequence in sequences {
        batch.push_runs(1, sequence.slots.len() as u32, sequence.runs()).expect("a good request");
    }
    batch
}

/// Sequences in pages of a pool, handed out in turn, that may begin with the same page; and the next page.
fn any_sequences() -> impl Strategy<Value = (Vec<Sequence>, u32, u32)> {
    let lengths = prop::collection::vec((1..3000u32, any::<bool>()), 1..40);
    (lengths, prop::sample::select(vec![1u32, 4, 16, 4096])).prop_map(|(lengths, page_size)| {
        let mut next_page = 1;
        let mut sequence = |(len, shares): (u32, bool)| {
            let first = if shares && len > page_size { 0 } else { next_page };
            let rest = next_page + 1..next_page + len.div_ceil(page_size);
            next_page = rest.end.max(next_page + 1);
            let slots = std::iter::once(first).chain(rest).flat_map(|page| page * page_size..(page + 1) * page_size);
            Sequence { slots: slots.take(len as usize).collect() }
        };
        let sequences = lengths.into_iter().map(&mut sequence).collect();
        (sequences, page_size, next_page)
    })
}

/// The slots of each request's next token: in its last page, or the first of a new one.
fn next_slots(sequences: &mut [Sequence], page_size: u32, next_page: &mut u32) -> Vec<u32> {
    let mut next_slot = |sequence: &mut Sequence| {
        let slot = match sequence.slots.len() as u32 % page_size {
            0 => {
                *next_page += 1;
                (*next_page - 1) * page_size
            }
            _ => sequence.slots[sequence.slots.len() - 1] + 1,
        };
        sequence.slots.push(slot);
        slot
    };
    sequences.iter_mut().map(&mut next_slot).collect()
}

fn growing(batch: &Batch, headroom: Headroom) -> Plan {
    Planner::new(DeviceModel::H100).with_headroom(headroom).plan(batch).expect("a batch that can be planned")
}

proptest! {
    /// After any number of steps, the plan shows each query token what it sees then, where that lies; its items and merges stay.
    #[test]
    fn appended_plans_are_valid(
        (mut sequences, page_size, mut next_page) in any_sequences(),
        steps in 1..20u32,
        in_pages in any::<bool>(),
    ) {
        let in_pages = in_pages && page_size.is_multiple_of(PagedLayout::SIZE_MULTIPLE);
        let kv_layout = if in_pages { PagedLayout::new(page_size, PageOrder::Hnd).expect("a good size").into() } else { KvLayout::Slots };
        let first = batch_in(kv_layout, Mask::Causal, &sequences);
        let mut plan = growing(&first, Headroom { steps, runs: steps });
        assert_valid(&first, &plan);
        assert_in_order(&first, &plan, plan.model());
        let (items, merges, sources) = (plan.items().len(), plan.merge_tokens().to_vec(), plan.merge_sources().to_vec());
        for _ in 0..steps {
            let slots = next_slots(&mut sequences, page_size, &mut next_page);
            plan.append(&slots).expect("there is room");
            assert_valid(&batch_in(kv_layout, Mask::Causal, &sequences), &plan);
        }
        assert_eq!(plan.append(&next_slots(&mut sequences, page_size, &mut next_page)), Err(AppendError::NoSteps));
        assert_eq!((plan.items().len(), plan.merge_tokens()), (items, &merges[..]));
        assert_eq!(plan.merge_sources(), sources);
    }
}

/// What requests share they share up to their query token: it has a tile of its own, which grows.
#[test]
fn requests_with_the_same_kv_grow_apart() {
    let mut sequences = vec![Sequence { slots: (0..8192).collect() }; 64];
    let mut plan = growing(&batch(Mask::Causal, &sequences), Headroom { steps: 2, runs: 1 });
    assert!(plan.explain(plan.model()).shared_tiles > 0);
    for step in 0..2 {
        let slots: Vec<u32> = (0..64).map(|request| 10_000 + 2 * request + step).collect();
        plan.append(&slots).expect("there is room");
        sequences.iter_mut().zip(slots).for_each(|(sequence, slot)| sequence.slots.push(slot));
        assert_valid(&batch(Mask::Causal, &sequences), &plan);
    }
}

#[test]
fn what_cannot_grow_says_so() {
    let mut sequences = vec![Sequence { slots: (0..64).collect() }, Sequence { slots: (64..128).collect() }];
    let headroom = Headroom { steps: 4, runs: 1 };
    let mut plan = growing(&batch(Mask::Causal, &sequences), headroom);
    assert_eq!(plan.append(&[64]), Err(AppendError::Requests { found: 1, requests: 2 }));
    plan.append(&[1000, 128]).expect("one run more for the first");
    let before = plan.clone();
    assert_eq!(plan.append(&[2000, 129]), Err(AppendError::NoRuns { request: 0, slot: 2000 }));
    let slot = Batch::MAX_SLOTS;
    assert_eq!(plan.append(&[1001, slot]), Err(AppendError::BadSlot { request: 1, slot, most: slot }));
    assert_eq!((plan.runs(), plan.segments(), plan.items()), (before.runs(), before.segments(), before.items()));
    plan.append(&[1001, 129]).expect("it goes on where it was");
    sequences[0].slots.extend([1000, 1001]);
    sequences[1].slots.extend([128, 129]);
    assert_valid(&batch(Mask::Causal, &sequences), &plan);

    let none = Planner::new(DeviceModel::H100).plan(&batch(Mask::Causal, &sequences)).expect("a batch that can be planned");
    for mut plan in [none, growing(&batch(Mask::None, &sequences), headroom)] {
        assert_eq!(plan.append(&[1002, 130]), Err(AppendError::NoSteps));
    }
}
