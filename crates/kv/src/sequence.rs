//! The KV of one request: which slots hold its tokens, and where the next ones go.

mod moving;
mod parts;

use packinfer_abi::KvRun;

pub use moving::SequenceMove;

use crate::moves::push_run;
use crate::pool::Motion;
use crate::{Extent, KvError, SlotCopy, SlotPool};

/// Where new tokens go when a sequence's slots are full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Growth {
    /// Into pages, wherever they lie.
    Pages,
    /// Into the slots behind the last token if they are free, else into a contiguous extent, else into as few as there are.
    Contiguous {
        /// Slots to keep for the tokens that follow, as far as there is room.
        headroom: u32,
    },
}

/// Slots of an extent that hold tokens of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub extent: Extent,
    /// Leading slots that hold tokens; all of them but in the last part, or where a fork went its own way.
    pub filled: u32,
}

/// The KV of one request, token by token, in slots that it may share with others.
///
/// It owns references to its extents and needs the pool to give them back: [`Self::free`] it, dropping it leaks them.
#[derive(Debug, Default)]
#[must_use = "a sequence keeps its slots until it is freed"]
pub struct Sequence {
    pub(crate) parts: Vec<Part>,
    len: u32,
}

impl Sequence {
    /// The most tokens of a sequence.
    pub const MAX_TOKENS: u32 = SlotPool::MAX_SLOTS;

    /// A sequence without tokens.
    pub fn new() -> Self {
        Self::default()
    }

    /// Tokens.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether it has no tokens.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Tokens that can be appended without allocating.
    pub fn room(&self, pool: &SlotPool) -> u32 {
        self.parts.last().map_or(0, |&part| Self::writable_room(pool, part))
    }

    /// Makes room for `tokens` more tokens; their slots are the last ones of [`Self::runs`].
    ///
    /// If others own the page that the first one falls into, that page is copied on write: the copy that is returned must be
    /// done before the new tokens are written.
    ///
    /// # Errors
    ///
    /// Not enough free slots, or too many tokens: nothing has changed then.
    pub fn append(&mut self, pool: &mut SlotPool, tokens: u32, growth: Growth) -> Result<Option<SlotCopy>, KvError> {
        let len = u64::from(self.len) + u64::from(tokens);
        if len > u64::from(Self::MAX_TOKENS) {
            return Err(KvError::TooManyTokens { tokens: len, most: Self::MAX_TOKENS });
        }
        let mut room = self.room(pool);
        if tokens > room && self.extend_last(pool, tokens - room, growth) {
            room = self.room(pool);
        }
        if tokens <= room {
            if let Some(last) = self.parts.last_mut() {
                last.filled += tokens;
            }
            self.len += tokens;
            return Ok(None);
        }
        // Without room the last page is full or, if filled in part, not this sequence's alone.
        let page_size = pool.page_size();
        let rewritten = match self.parts.last() {
            Some(last) if room == 0 => last.filled % page_size,
            _ => 0,
        };
        let new_tokens = tokens - room + rewritten;
        let first_new = self.parts.len();
        self.allocate_parts(pool, new_tokens, growth)?;
        if room > 0
            && let Some(last) = self.parts[..first_new].last_mut()
        {
            last.filled += room;
        }
        self.len += tokens;
        if rewritten == 0 {
            return Ok(None);
        }
        let old = self.parts[first_new - 1];
        let from = pool.run(old.extent)?.first_slot + old.filled - rewritten;
        let to = pool.run(self.parts[first_new].extent)?.first_slot;
        self.parts[first_new - 1].filled -= rewritten;
        if self.parts[first_new - 1].filled == 0 {
            self.parts.remove(first_new - 1);
            pool.release_later(old.extent)?;
        }
        Ok(Some(SlotCopy { from, to, num_slots: rewritten }))
    }

    /// Another sequence with the same tokens in the same slots: a parallel sample, a beam, a speculative branch.
    ///
    /// # Errors
    ///
    /// The slots are of another pool, or have too many owners.
    pub fn fork(&self, pool: &mut SlotPool) -> Result<Self, KvError> {
        for (i, part) in self.parts.iter().enumerate() {
            if let Err(error) = pool.retain(part.extent) {
                for undone in &self.parts[..i] {
                    pool.release(undone.extent)?;
                }
                return Err(error);
            }
        }
        Ok(Self { parts: self.parts.clone(), len: self.len })
    }

    /// Gives its slots back at once.
    ///
    /// # Errors
    ///
    /// The slots are of another pool.
    pub fn free(self, pool: &mut SlotPool) -> Result<(), KvError> {
        self.parts.iter().try_for_each(|part| pool.release(part.extent))
    }

    /// Gives its slots back when the plans of this epoch have run.
    ///
    /// # Errors
    ///
    /// The slots are of another pool.
    pub fn free_later(self, pool: &mut SlotPool) -> Result<(), KvError> {
        self.parts.iter().try_for_each(|part| pool.release_later(part.extent))
    }

    /// Where its tokens lie, in order, adjoining runs joined.
    ///
    /// # Errors
    ///
    /// The slots are of another pool.
    pub fn runs(&self, pool: &SlotPool) -> Result<Vec<KvRun>, KvError> {
        self.runs_from(pool, 0)
    }

    /// Where its tokens from number `first` on lie, in order, adjoining runs joined.
    ///
    /// # Errors
    ///
    /// The slots are of another pool.
    pub fn runs_from(&self, pool: &SlotPool, first: u32) -> Result<Vec<KvRun>, KvError> {
        // The part that token `first` lies in, and the tokens before it.
        let (mut index, mut begin) = (self.parts.len(), self.len);
        while begin > first {
            index -= 1;
            begin -= self.parts[index].filled;
        }
        let mut skipped = first.saturating_sub(begin);
        let mut runs = Vec::with_capacity(self.parts.len() - index);
        for &Part { extent, filled } in &self.parts[index..] {
            let first_slot = pool.run(extent)?.first_slot + skipped;
            push_run(&mut runs, KvRun { first_slot, num_slots: filled.saturating_sub(skipped) });
            skipped = 0;
        }
        Ok(runs)
    }

    /// Free slots of a part that the sequence may write to.
    fn writable_room(pool: &SlotPool, part: Part) -> u32 {
        match pool.entry(part.extent) {
            Ok(entry) if entry.references == 1 && entry.motion != Motion::Frozen => {
                pool.run_of(entry.span).num_slots - part.filled
            }
            _ => 0,
        }
    }

    /// Lengthens the last part in place, with headroom if possible.
    fn extend_last(&self, pool: &mut SlotPool, tokens: u32, growth: Growth) -> bool {
        let (Growth::Contiguous { headroom }, Some(last)) = (growth, self.parts.last()) else { return false };
        let extended = |pool: &mut SlotPool, slots| matches!(pool.extend(last.extent, slots), Ok(true));
        extended(pool, tokens.saturating_add(headroom)) || (headroom > 0 && extended(pool, tokens))
    }

    /// Appends parts that hold `tokens` tokens.
    fn allocate_parts(&mut self, pool: &mut SlotPool, tokens: u32, growth: Growth) -> Result<(), KvError> {
        let mut extents = Vec::new();
        match growth {
            Growth::Pages => pool.allocate_pages(tokens.div_ceil(pool.page_size()), &mut extents)?,
            Growth::Contiguous { headroom } => {
                match pool.allocate(tokens.saturating_add(headroom)).or_else(|_| pool.allocate(tokens)) {
                    Ok(extent) => extents.push(extent),
                    Err(_) => pool.allocate_scattered(tokens, &mut extents)?,
                }
            }
        }
        let mut left = tokens;
        for extent in extents {
            let filled = left.min(pool.run(extent)?.num_slots);
            left -= filled;
            self.parts.push(Part { extent, filled });
        }
        Ok(())
    }
}
