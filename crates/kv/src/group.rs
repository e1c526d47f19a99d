//! Laying the KV of a group of requests side by side, and what gives cause to do so anew.

mod balance;
mod trigger;

use packinfer_abi::KvRun;

pub use balance::{balance_groups, imbalance};
pub use trigger::{GroupState, Trigger};

use crate::{Extent, KvError, Policy, Sequence, SequenceMove, Situation, SlotPool, Usage};

/// A request of a group: requests that are worked on together, because they share a prefix, or because they are in one packed
/// tile.
#[derive(Debug)]
pub struct GroupMember<'a> {
    /// Its KV.
    pub kv: &'a mut Sequence,
    /// Tokens that it is expected to get.
    pub expected: u32,
}

/// A move of a group under way: one of [`Sequence::begin_move_into`] for each member, which is committed or cancelled by itself.
#[derive(Debug)]
#[must_use = "moves that are neither committed nor cancelled keep their targets occupied"]
pub struct GroupMove {
    /// Where the group will lie: member after member, each with its headroom.
    pub extent: KvRun,
    /// The moves, in the order of the extent, each with the number of its member.
    pub members: Vec<(usize, SequenceMove)>,
}

impl GroupMove {
    /// Slots to copy.
    pub fn num_slots(&self) -> u32 {
        self.members.iter().map(|(_, begun)| begun.num_slots()).sum()
    }

    /// Gives up the move: all members stay where they were. No copies may be running any more.
    ///
    /// # Errors
    ///
    /// The move belongs to another pool.
    pub fn cancel(self, pool: &mut SlotPool) -> Result<(), KvError> {
        self.members.into_iter().try_for_each(|(_, begun)| begun.cancel(pool))
    }
}

impl SlotPool {
    /// Begins to move what each member of a group owns by itself to one contiguous extent of the whole group: member after
    /// member, each with [headroom](crate::Contiguous::group). Does so if `policy` says that it pays for the group, with all that
    /// attention saves against all that is copied. `None` if the group stays where it is, because that is better, because no
    /// extent is long enough, or because a member is being moved already.
    ///
    /// # Errors
    ///
    /// Slots of another pool. Nobody is being moved then.
    pub fn reorganize_group(
        &mut self,
        policy: &Policy,
        usage: &Usage,
        members: &mut [GroupMember<'_>],
    ) -> Result<Option<GroupMove>, KvError> {
        let Policy::Contiguous(layout) = policy else { return Ok(None) };
        let situations = members.iter().map(|member| Situation::of(member.kv, self, member.expected));
        // Who has nothing that could be moved is no member here.
        let (numbers, situations): (Vec<usize>, Vec<Situation>) =
            situations.enumerate().filter(|(_, situation)| situation.tokens > 0).unzip();
        if !layout.group_pays(usage, self.page_size(), &situations) {
            return Ok(None);
        }
        let targets = match self.allocate_group(&layout.group(usage, self.page_size(), &situations)) {
            Ok(targets) => targets,
            Err(KvError::NoContiguous { .. } | KvError::OutOfSlots { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let extent = self.run_of_group(&targets)?;
        let mut begun = GroupMove { extent, members: Vec::with_capacity(targets.len()) };
        for (&number, &target) in numbers.iter().zip(&targets) {
            match members[number].kv.begin_move_into(self, target) {
                Ok(member) => begun.members.push((number, member)),
                Err(error) => {
                    self.give_up_group(begun, &targets)?;
                    return if matches!(error, KvError::Moving(_)) { Ok(None) } else { Err(error) };
                }
            }
        }
        Ok(Some(begun))
    }

    /// The one run that neighbouring extents make.
    fn run_of_group(&self, targets: &[Extent]) -> Result<KvRun, KvError> {
        let mut whole = KvRun { first_slot: 0, num_slots: 0 };
        for (index, &target) in targets.iter().enumerate() {
            let run = self.run(target)?;
            if index == 0 {
                whole.first_slot = run.first_slot;
            }
            whole.num_slots += run.num_slots;
        }
        Ok(whole)
    }

    /// Cancels the moves that were begun, which frees their targets, and frees the other targets.
    fn give_up_group(&mut self, begun: GroupMove, targets: &[Extent]) -> Result<(), KvError> {
        let rest = &targets[begun.members.len()..];
        begun.cancel(self)?;
        rest.iter().try_for_each(|&target| self.release(target))
    }
}
