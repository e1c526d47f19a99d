//! Laying the KV of a group of requests side by side.

use crate::{Extent, KvError, Policy, Sequence, SequenceMove, Situation, SlotPool, Usage};

/// A request of a group: requests that are worked on together, because they share a prefix, or because they are in one packed tile.
#[derive(Debug)]
pub struct GroupMember<'a> {
    /// Its KV.
    pub kv: &'a mut Sequence,
    /// Tokens that it is expected to get.
    pub expected: u32,
}

impl SlotPool {
    /// Begins to move what each member of a group owns by itself to one contiguous extent of the whole group: member after member, each with
    /// [headroom](crate::Contiguous::group). Does so if `policy` says that it pays for the group, with all that attention saves against all that is copied.
    /// Returns the moves, each with the number of its member: none if the group stays where it is, because that is better, because no extent is long
    /// enough, or because a member is being moved already. Each is committed or cancelled by itself, as that of
    /// [`Sequence::begin_move_into`].
    ///
    /// # Errors
    ///
    /// Slots of another pool. Nobody is being moved then.
    pub fn reorganize_group(
        &mut self,
        policy: &Policy,
        usage: &Usage,
        members: &mut [GroupMember<'_>],
    ) -> Result<Vec<(usize, SequenceMove)>, KvError> {
        let Policy::Contiguous(layout) = policy else { return Ok(Vec::new()) };
        let situations = members.iter().map(|member| Situation::of(member.kv, self, member.expected));
        // Who has nothing that could be moved is no member here.
        let (numbers, situations): (Vec<usize>, Vec<Situation>) =
            situations.enumerate().filter(|(_, situation)| situation.tokens > 0).unzip();
        if !layout.group_pays(usage, self.page_size(), &situations) {
            return Ok(Vec::new());
        }
        let targets = match self.allocate_group(&layout.group(usage, self.page_size(), &situations)) {
            Ok(targets) => targets,
            Err(KvError::NoContiguous { .. } | KvError::OutOfSlots { .. }) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut begun = Vec::with_capacity(targets.len());
        for (&number, &target) in numbers.iter().zip(&targets) {
            match members[number].kv.begin_move_into(self, target) {
                Ok(member) => begun.push((number, member)),
                Err(error) => {
                    self.give_up_group(begun, &targets)?;
                    return if matches!(error, KvError::Moving(_)) { Ok(Vec::new()) } else { Err(error) };
                }
            }
        }
        Ok(begun)
    }

    /// Cancels the moves that were begun, which frees their targets, and frees the other targets.
    fn give_up_group(&mut self, begun: Vec<(usize, SequenceMove)>, targets: &[Extent]) -> Result<(), KvError> {
        let rest = &targets[begun.len()..];
        begun.into_iter().try_for_each(|(_, member)| member.cancel(self))?;
        rest.iter().try_for_each(|&target| self.release(target))
    }
}
