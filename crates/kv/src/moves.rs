//! Moving KV in two phases: the old place stays intact until the move is committed, and readable until plans that know it
//! have run.

use packinfer_abi::KvRun;

use crate::KvError;
use crate::pool::{Entry, Epoch, Extent, Motion, SlotPool};

/// Slots whose KV must be copied, in all layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotCopy {
    /// First slot to read.
    pub from: u32,
    /// First slot to write.
    pub to: u32,
    /// Slots to copy.
    pub num_slots: u32,
}

/// An extent to be moved, and how many of its slots hold tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filled {
    /// The extent.
    pub extent: Extent,
    /// Its leading slots that hold tokens.
    pub num_slots: u32,
}

/// A move under way. Copy what [`Self::copies`] says, then commit or cancel it; dropped instead, it keeps its target.
#[derive(Debug)]
#[must_use = "a move that is neither committed nor cancelled keeps its target occupied"]
pub struct Move {
    pub(crate) sources: Vec<Extent>,
    pub(crate) target: Extent,
    copies: Vec<SlotCopy>,
    exclusive: bool,
}

impl Move {
    /// What to copy, in the order of the tokens.
    pub fn copies(&self) -> &[SlotCopy] {
        &self.copies
    }

    /// Slots to copy.
    pub fn num_slots(&self) -> u32 {
        self.copies.iter().map(|copy| copy.num_slots).sum()
    }
}

impl SlotPool {
    /// Begins to move the tokens of `sources`, joined, to the beginning of `target`, an extent allocated for that.
    ///
    /// On commit the first source becomes an extent over the target's slots, the others are released. Several sources can
    /// only be joined if each has one owner; a single one may be shared, and moves for all its owners. Until then sources can
    /// be read, but not extended or split; what their one owner writes to them meanwhile, it has to copy itself
    /// ([`Sequence::commit_move`](crate::Sequence::commit_move) says what). On a stream of their own, the copies wait for what
    /// was launched before: the target's slots may just have come free.
    ///
    /// # Errors
    ///
    /// No source, one that is foreign, stale or already being moved, several sources of which one is shared, or a target that is
    /// not exclusive or too small. The target stays the caller's then.
    pub fn begin_move(&mut self, sources: &[Filled], target: Extent) -> Result<Move, KvError> {
        let mut begun = Move { sources: Vec::with_capacity(sources.len()), target, copies: Vec::new(), exclusive: true };
        match self.add_sources(sources, &mut begun) {
            Ok(()) => Ok(begun),
            Err(error) => {
                self.unmark(&begun.sources);
                Err(error)
            }
        }
    }

    /// Marks the sources as moving and lists what to copy.
    fn add_sources(&mut self, sources: &[Filled], begun: &mut Move) -> Result<(), KvError> {
        let to = self.run_of(self.exclusive(begun.target)?.span);
        let mut needed = 0;
        for &Filled { extent, num_slots } in sources {
            let &Entry { span, references, motion, .. } = self.entry(extent)?;
            if motion != Motion::Resting || extent == begun.target {
                return Err(KvError::Moving(extent));
            }
            if references > 1 && sources.len() > 1 {
                return Err(KvError::Shared { extent, references });
            }
            begun.exclusive = references == 1;
            let from = self.run_of(span);
            // The owners of a shared extent may each have filled another part of it.
            let num_slots = if begun.exclusive { num_slots.min(from.num_slots) } else { from.num_slots };
            if num_slots > to.num_slots - needed {
                return Err(KvError::TargetTooSmall { needed: needed.saturating_add(num_slots), room: to.num_slots });
            }
            push_copy(&mut begun.copies, SlotCopy { from: from.first_slot, to: to.first_slot + needed, num_slots });
            needed += num_slots;
            self.entries[extent.index as usize].motion = if begun.exclusive { Motion::Moving } else { Motion::Frozen };
            begun.sources.push(extent);
        }
        if begun.sources.is_empty() { Err(KvError::NotMovable) } else { Ok(()) }
    }

    fn unmark(&mut self, sources: &[Extent]) {
        for &source in sources {
            if self.entry(source).is_ok() {
                self.entries[source.index as usize].motion = Motion::Resting;
            }
        }
    }

    /// Ends a move whose copies are done: its first source now lies in the target, and a new epoch begins. The old slots stay
    /// readable until the epoch that ended, which is returned, is [retired](Self::retire).
    ///
    /// # Errors
    ///
    /// A source was released, or got another owner, since the move began: the move is cancelled then.
    pub fn commit_move(&mut self, finished: Move) -> Result<Epoch, KvError> {
        if let Err(error) = self.check_commit(&finished) {
            self.cancel_move(finished)?;
            return Err(error);
        }
        let Move { sources, target, .. } = finished;
        // The first source takes over the target's slots, and the target's entry goes with the slots that it leaves.
        let new = self.entries[target.index as usize].span;
        let old = self.replace_span(sources[0], new);
        self.entries[sources[0].index as usize].motion = Motion::Resting;
        self.replace_span(target, old);
        self.release_later(target)?;
        for &source in &sources[1..] {
            self.release_later(source)?;
        }
        let ended = self.epoch;
        self.advance_epoch();
        Ok(ended)
    }

    /// Gives up a move: everything stays where it was, and the target comes free. Its copies must not be running any more.
    ///
    /// # Errors
    ///
    /// The move belongs to another pool.
    pub fn cancel_move(&mut self, given_up: Move) -> Result<(), KvError> {
        self.unmark(&given_up.sources);
        self.release(given_up.target)
    }

    fn check_commit(&self, finished: &Move) -> Result<(), KvError> {
        self.exclusive(finished.target)?;
        for &extent in &finished.sources {
            let references = self.entry(extent)?.references;
            if finished.exclusive && references > 1 {
                return Err(KvError::Shared { extent, references });
            }
        }
        Ok(())
    }
}

/// Appends a copy, joined to the last one if it continues it.
pub(crate) fn push_copy(copies: &mut Vec<SlotCopy>, copy: SlotCopy) {
    match copies.last_mut() {
        _ if copy.num_slots == 0 => {}
        Some(last) if last.from + last.num_slots == copy.from && last.to + last.num_slots == copy.to => {
            last.num_slots += copy.num_slots;
        }
        _ => copies.push(copy),
    }
}

/// Appends a run, joined to the last one if it adjoins that.
pub(crate) fn push_run(runs: &mut Vec<KvRun>, run: KvRun) {
    match runs.last_mut() {
        _ if run.num_slots == 0 => {}
        Some(last) if last.first_slot + last.num_slots == run.first_slot => last.num_slots += run.num_slots,
        _ => runs.push(run),
    }
}
