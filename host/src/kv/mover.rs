//! Moves of KV beside the steps.

use std::collections::VecDeque;
use std::fmt;

use packinfer_kv::{Epoch, KvError, SequenceMove, SlotCopy};

use super::{KvArena, KvMemoryError, SlotCopies};
use crate::stream::{Event, Stream};
use crate::{Element, Engine, EngineError, KvElement};

/// Moves the KV of requests, which the caller calls by an `Id`, on a stream of its own, while steps run on another. One mover for
/// each arena.
///
/// Between two steps, [`Self::finish`] ends moves whose copies are done, and [`Self::start`] starts the copies of new ones.
/// Neither waits for the device: as long as copies run, plans read the old place, and tokens are appended there.
///
/// ```no_run
/// # use half::bf16;
/// # use packinfer::{Engine, EngineError, KvArena, KvMover, Policy, Sequence, SlotPool, Stream};
/// # fn step(engine: &Engine, arena: &mut KvArena<bf16>, pool: &mut SlotPool, requests: &mut [Sequence], policy: &Policy,
/// #     mover: &mut KvMover<usize>, stream: &Stream) -> Result<(), EngineError> {
/// if let Some(epoch) = mover.passed()? {
///     pool.retire(epoch)?;
/// }
/// mover.finish(engine, arena, stream, |id: usize, begun| match requests.get_mut(id) {
///     Some(request) => request.commit_move(pool, begun).map(Some),
///     None => begun.cancel(pool).map(|()| None), // it has left
/// })?;
/// let mut moves = Vec::new();
/// if !mover.is_busy() {
///     for (id, request) in requests.iter_mut().enumerate() {
///         let usage = pool.usage();
///         moves.extend(request.reorganize(pool, policy, &usage, 200)?.map(|(_, begun)| (id, begun)));
///     }
/// }
/// mover.start(engine, arena, &mut moves, stream)?;
/// // Append a token to each request, plan, launch.
/// # Ok(())
/// # }
/// ```
pub struct KvMover<Id> {
    stream: Stream,
    /// What is copied beside the steps, and what between them.
    copies: SlotCopies,
    rest: SlotCopies,
    /// Begins and ends with the copies beside the steps.
    started: Event,
    copied: Event,
    moves: Vec<(Id, SequenceMove)>,
    /// Epochs that have ended, and what happens when their plans have run; oldest first.
    ended: VecDeque<(Epoch, Event)>,
    /// Events that are not needed at the time.
    spare: Vec<Event>,
    scratch: Vec<SlotCopy>,
}

impl Engine {
    /// A mover for arenas of the form of `arena`.
    ///
    /// # Errors
    ///
    /// Not enough device memory.
    pub fn kv_mover<Id, E: Element, K: KvElement<E>>(&self, arena: &KvArena<E, K>) -> Result<KvMover<Id>, EngineError> {
        let stream = self.stream()?;
        let list = || self.upload_copies(arena, &[], &stream);
        Ok(KvMover {
            copies: list()?,
            rest: list()?,
            started: Event::timed(self.shared())?,
            copied: Event::timed(self.shared())?,
            moves: Vec::new(),
            ended: VecDeque::new(),
            spare: Vec::new(),
            scratch: Vec::new(),
            stream,
        })
    }
}

impl<Id> KvMover<Id> {
    /// Whether copies are under way, or done and not [finished](Self::finish).
    pub fn is_busy(&self) -> bool {
        !self.moves.is_empty()
    }

    /// Starts the copies of moves that were begun, of [requests](packinfer_kv::Sequence::reorganize) or of
    /// [groups](packinfer_kv::SlotPool::reorganize_group), in all layers, by one launch beside the work of `stream`: behind what
    /// was given to that until now, which wrote what is copied and may still read the slots that are copied to. Tokens that are
    /// appended later are copied when the moves are finished. Takes the moves out of the list.
    ///
    /// # Errors
    ///
    /// As [`Engine::kv_move`], or if the mover is [busy](Self::is_busy). The moves are left in the list then, to be cancelled or
    /// tried again: all KV is where it was.
    pub fn start<E: Element, K: KvElement<E>>(
        &mut self,
        engine: &Engine,
        arena: &mut KvArena<E, K>,
        moves: &mut Vec<(Id, SequenceMove)>,
        stream: &Stream,
    ) -> Result<(), EngineError> {
        if moves.is_empty() {
            return Ok(());
        }
        if self.is_busy() {
            return Err(KvMemoryError::MoverBusy { moves: self.moves.len() }.into());
        }
        self.scratch.clear();
        self.scratch.extend(moves.iter().flat_map(|(_, begun)| begun.copies()));
        self.copies.update(&self.scratch, &self.stream)?;
        self.stream.wait_for(stream)?;
        self.started.record(&self.stream)?;
        engine.kv_move(arena, &self.copies, &self.stream)?;
        self.copied.record(&self.stream)?;
        self.moves.append(moves);
        Ok(())
    }

    /// Ends the moves whose copies are done, if they are. `commit` gets each of them with its request's number, and
    /// [commits](packinfer_kv::Sequence::commit_move) it, or [cancels](SequenceMove::cancel) it and returns `None`. What remains
    /// to be copied, of tokens that were appended meanwhile, is given to `stream`, before the next step. Returns how many slots
    /// these are, or `None` if nothing was to be finished.
    ///
    /// # Errors
    ///
    /// The first error of `commit`, after all moves went through it; as [`Engine::kv_move`]; or that of the copies.
    pub fn finish<E: Element, K: KvElement<E>>(
        &mut self,
        engine: &Engine,
        arena: &mut KvArena<E, K>,
        stream: &Stream,
        mut commit: impl FnMut(Id, SequenceMove) -> Result<Option<(Epoch, Vec<SlotCopy>)>, KvError>,
    ) -> Result<Option<u32>, EngineError> {
        stream.check_not_captured("finishing moves")?;
        if !self.is_busy() || !self.copied.has_happened()? {
            return Ok(None);
        }
        self.scratch.clear();
        let (mut last_ended, mut failed) = (None, None);
        for (id, begun) in self.moves.drain(..) {
            match commit(id, begun) {
                Ok(Some((ended, rest))) => {
                    last_ended = Some(ended);
                    self.scratch.extend(rest);
                }
                Ok(None) => {}
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        if !self.scratch.is_empty() {
            self.rest.update(&self.scratch, stream)?;
            engine.kv_move(arena, &self.rest, stream)?;
        }
        if let Some(ended) = last_ended {
            // Behind the plans that read the old places, and the copies from there.
            let event = self.spare.pop().map_or_else(|| Event::untimed(engine.shared()), Ok)?;
            event.record(stream)?;
            self.ended.push_back((ended, event));
        }
        match failed {
            Some(error) => Err(error.into()),
            None => Ok(Some(self.scratch.iter().map(|copy| copy.num_slots).sum())),
        }
    }

    /// The last epoch whose plans the device has run, to be [retired](packinfer_kv::SlotPool::retire), if there is one since the
    /// last call: of those that ended when moves were finished, if all plans run on the stream that was given there.
    ///
    /// # Errors
    ///
    /// That of the work before.
    pub fn passed(&mut self) -> Result<Option<Epoch>, EngineError> {
        let mut passed = None;
        while let Some((epoch, event)) = self.ended.front()
            && event.has_happened()?
        {
            passed = Some(*epoch);
            self.spare.extend(self.ended.pop_front().map(|(_, event)| event));
        }
        Ok(passed)
    }

    /// How long the copies took that were started last, in milliseconds, beside whatever else ran: `None` if there were none, or
    /// they are not done.
    ///
    /// # Errors
    ///
    /// That of the copies.
    pub fn last_copies_ms(&self) -> Result<Option<f32>, EngineError> {
        if self.copies.is_empty() || !self.copied.has_happened()? {
            return Ok(None);
        }
        self.copied.milliseconds_since(&self.started).map(Some)
    }
}

impl<Id> fmt::Debug for KvMover<Id> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (moves, ended) = (self.moves.len(), self.ended.len());
        f.debug_struct("KvMover").field("moves", &moves).field("epochs_ended", &ended).finish_non_exhaustive()
    }
}
