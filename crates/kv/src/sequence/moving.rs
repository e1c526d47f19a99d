//! Moving the KV of a request while it goes on growing.

use packinfer_abi::KvRun;

use super::Sequence;
use crate::moves::push_copy;
use crate::{Epoch, Extent, Filled, KvError, Move, Policy, Reason, Situation, SlotCopy, SlotPool, Usage};

/// A move of a sequence's own slots under way, see [`Sequence::begin_move`].
#[derive(Debug)]
#[must_use = "a move that is neither committed nor cancelled keeps its target occupied"]
pub struct SequenceMove {
    inner: Move,
    /// Parts that stay where they are.
    kept_parts: usize,
    /// Tokens in them.
    kept_tokens: u32,
    /// Tokens that the sequence had.
    tokens: u32,
}

impl SequenceMove {
    /// What to copy, in the order of the tokens.
    pub fn copies(&self) -> &[SlotCopy] {
        self.inner.copies()
    }

    /// Slots to copy.
    pub fn num_slots(&self) -> u32 {
        self.inner.num_slots()
    }

    /// Gives up the move: everything stays where it was. Its copies must not be running any more.
    ///
    /// # Errors
    ///
    /// The move belongs to another pool.
    pub fn cancel(self, pool: &mut SlotPool) -> Result<(), KvError> {
        pool.cancel_move(self.inner)
    }
}

impl Sequence {
    /// Begins to move the sequence's own KV to one extent with headroom, if `policy` says that this pays for a request that
    /// expects `expected` more tokens; also says why. `None` if it stays where it is: because that is better, because it is being
    /// moved already, or because no extent is long enough.
    ///
    /// # Errors
    ///
    /// The slots are of another pool.
    pub fn reorganize(
        &mut self,
        pool: &mut SlotPool,
        policy: &Policy,
        usage: &Usage,
        expected: u32,
    ) -> Result<Option<(Reason, SequenceMove)>, KvError> {
        let situation = Situation::of(self, pool, expected);
        let Some(reason) = policy.move_now(usage, pool.page_size(), &situation) else { return Ok(None) };
        match self.begin_move(pool, policy.headroom(usage, expected)) {
            Ok(begun) => Ok(begun.map(|begun| (reason, begun))),
            Err(KvError::Moving(_) | KvError::NoContiguous { .. } | KvError::OutOfSlots { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Begins to move what only this sequence owns, at its end, to one contiguous extent with room for `headroom` more tokens.
    ///
    /// Meanwhile it can be read, appended to, forked and freed. `None` if nothing is its own.
    ///
    /// # Errors
    ///
    /// No contiguous extent is free, or a move is under way.
    pub fn begin_move(&mut self, pool: &mut SlotPool, headroom: u32) -> Result<Option<SequenceMove>, KvError> {
        let tokens = self.own_tokens(pool);
        if tokens == 0 {
            return Ok(None);
        }
        let target = pool.allocate(tokens.saturating_add(headroom))?;
        let begun = self.begin_move_into(pool, target);
        if begun.is_err() {
            pool.release(target)?;
        }
        begun.map(Some)
    }

    /// As [`Self::begin_move`], to a given extent: its part of a group's [extents](SlotPool::allocate_group).
    ///
    /// # Errors
    ///
    /// Nothing is the sequence's own, a move is under way, or the target is not exclusive or too small. The target stays the
    /// caller's then.
    pub fn begin_move_into(&mut self, pool: &mut SlotPool, target: Extent) -> Result<SequenceMove, KvError> {
        let kept_parts = self.parts.len() - self.own_parts(pool);
        let own = &self.parts[kept_parts..];
        let sources: Vec<_> = own.iter().map(|part| Filled { extent: part.extent, num_slots: part.filled }).collect();
        let kept_tokens = self.len - own.iter().map(|part| part.filled).sum::<u32>();
        let inner = pool.begin_move(&sources, target)?;
        Ok(SequenceMove { inner, kept_parts, kept_tokens, tokens: self.len })
    }

    /// Ends a move whose copies are done. Returns the epoch that ended with it, and the copies that remain to be done, of tokens
    /// appended since the move began: before the next step reads the sequence, and before that epoch is retired.
    ///
    /// # Errors
    ///
    /// More tokens were appended than the target has room for, a part got another owner, or the move is another sequence's.
    /// The move is cancelled then.
    pub fn commit_move(&mut self, pool: &mut SlotPool, finished: SequenceMove) -> Result<(Epoch, Vec<SlotCopy>), KvError> {
        let copies = match self.check_move(pool, &finished) {
            Ok(copies) => copies,
            Err(error) => {
                finished.cancel(pool)?;
                return Err(error);
            }
        };
        let moved_parts = finished.inner.sources.len();
        let ended = pool.commit_move(finished.inner)?;
        for part in self.parts.drain(finished.kept_parts + moved_parts..) {
            pool.release_later(part.extent)?;
        }
        self.parts.truncate(finished.kept_parts + 1);
        self.parts[finished.kept_parts].filled = self.len - finished.kept_tokens;
        Ok((ended, copies))
    }

    /// Tokens at its end that lie in slots of its own, which a move can take along.
    pub fn own_tokens(&self, pool: &SlotPool) -> u32 {
        let own = self.own_parts(pool);
        self.parts[self.parts.len() - own..].iter().map(|part| part.filled).sum()
    }

    /// The slots of its own that a move leaves, with those that are kept for tokens to come, extent by extent.
    pub(crate) fn own_slots(&self, pool: &SlotPool) -> impl Iterator<Item = KvRun> {
        self.parts[self.parts.len() - self.own_parts(pool)..].iter().filter_map(|part| pool.run(part.extent).ok())
    }

    /// Parts at its end that only it owns.
    fn own_parts(&self, pool: &SlotPool) -> usize {
        self.parts.iter().rev().take_while(|part| pool.references(part.extent) == Ok(1)).count()
    }

    /// Whether the sources of a move are still parts of this sequence, where they were.
    fn holds(&self, begun: &SequenceMove) -> bool {
        let sources = &begun.inner.sources;
        let parts = self.parts.get(begun.kept_parts..).and_then(|parts| parts.get(..sources.len()));
        parts.is_some_and(|parts| parts.iter().map(|part| part.extent).eq(sources.iter().copied()))
    }

    /// Copies of the tokens appended since a move began, if it can be committed.
    fn check_move(&self, pool: &SlotPool, finished: &SequenceMove) -> Result<Vec<SlotCopy>, KvError> {
        if !self.holds(finished) || self.parts.len() - self.own_parts(pool) > finished.kept_parts {
            return Err(KvError::NotMovable);
        }
        let target = pool.run(finished.inner.target)?;
        let needed = self.len - finished.kept_tokens;
        if needed > target.num_slots {
            return Err(KvError::TargetTooSmall { needed, room: target.num_slots });
        }
        let mut copies = Vec::new();
        let mut to = target.first_slot + (finished.tokens - finished.kept_tokens);
        for run in self.runs_from(pool, finished.tokens)? {
            push_copy(&mut copies, SlotCopy { from: run.first_slot, to, num_slots: run.num_slots });
            to += run.num_slots;
        }
        Ok(copies)
    }
}
