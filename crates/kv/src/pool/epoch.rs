//! Slots that plans in flight still read.

use super::SlotPool;
use crate::KvError;
use crate::free_spans::Span;

/// Between two moves nothing changes its place: plans made in one epoch agree on where KV lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub(crate) u64);

impl Epoch {
    /// The epoch before this one, if this is not the first.
    pub fn previous(self) -> Option<Self> {
        self.0.checked_sub(1).map(Self)
    }
}

impl SlotPool {
    /// The epoch that plans are made in now: remember it with the plan.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Begins a new epoch, so that the one before can be retired when its plans have run. Committing a move does so as well.
    pub fn advance_epoch(&mut self) -> Epoch {
        self.epoch.0 += 1;
        self.epoch
    }

    /// Frees what plans of `epoch` and older ones were the last to read. Call it when all of them have run.
    ///
    /// # Errors
    ///
    /// The epoch is not over: [advance](Self::advance_epoch) first.
    pub fn retire(&mut self, epoch: Epoch) -> Result<(), KvError> {
        if epoch >= self.epoch {
            return Err(KvError::EpochAhead { epoch, current: self.epoch });
        }
        while let Some((_, span)) = self.retiring.pop_front_if(|(last, _)| *last <= epoch) {
            self.retiring_pages -= span.len;
            self.free.give(span);
        }
        Ok(())
    }

    pub(crate) fn retire_later(&mut self, span: Span) {
        self.retiring_pages += span.len;
        self.retiring.push_back((self.epoch, span));
    }
}
