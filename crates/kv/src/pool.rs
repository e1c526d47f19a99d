//! The arena of KV slots: who owns which, and which are free.

mod allocate;
mod audit;
mod epoch;
mod usage;

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};

pub use epoch::Epoch;
use packinfer_abi::KvRun;
pub use usage::Usage;

use crate::KvError;
use crate::free_spans::{FreeSpans, Span};

/// A counted reference to consecutive slots of a [`SlotPool`]: a page, or a contiguous extent of pages.
///
/// It stays the same while its slots are moved elsewhere. It is plain data: copies do not count as references, and what was
/// released, or comes from another pool, is recognised and refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    pub(crate) pool: u32,
    pub(crate) index: u32,
    pub(crate) generation: u32,
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "extent {}.{} of pool {}", self.index, self.generation, self.pool)
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub span: Span,
    /// Owners; 0 for an entry that can be reused.
    pub references: u32,
    pub generation: u32,
    pub motion: Motion,
}

/// Whether an extent is the source of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Motion {
    /// No.
    Resting,
    /// Yes; its one owner may go on writing, and copies what it wrote when the move ends.
    Moving,
    /// Yes, together with all its owners, none of which may write: nobody would copy that.
    Frozen,
}

/// An arena of KV slots, numbered for all layers alike, in pages.
///
/// Everything is handed out in whole pages, so extents of any length and single pages mix. Allocation, extension and release
/// take time logarithmic in the pages. Nothing is over-committed: what does not fit is refused and changes nothing.
#[derive(Debug)]
pub struct SlotPool {
    pub(crate) id: u32,
    page_size: u32,
    num_pages: u32,
    pub(crate) free: FreeSpans,
    pub(crate) entries: Vec<Entry>,
    unused_entries: Vec<u32>,
    shared_pages: u32,
    pub(crate) epoch: Epoch,
    /// Spans that come free with the retirement of an epoch, oldest first.
    retiring: VecDeque<(Epoch, Span)>,
    retiring_pages: u32,
}

impl SlotPool {
    /// The most slots of a pool.
    pub const MAX_SLOTS: u32 = 1 << 31;

    /// A pool of `num_slots` free slots in pages of `page_size`.
    ///
    /// # Errors
    ///
    /// A page size of zero, or one that does not divide the slots; or more than [`Self::MAX_SLOTS`].
    pub fn new(num_slots: u32, page_size: u32) -> Result<Self, KvError> {
        static NEXT_ID: AtomicU32 = AtomicU32::new(0);
        if page_size == 0 || num_slots > Self::MAX_SLOTS || !num_slots.is_multiple_of(page_size) {
            return Err(KvError::BadPool { num_slots, page_size, most: Self::MAX_SLOTS });
        }
        let num_pages = num_slots / page_size;
        Ok(Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            page_size,
            num_pages,
            free: FreeSpans::new(num_pages),
            entries: Vec::new(),
            unused_entries: Vec::new(),
            shared_pages: 0,
            epoch: Epoch(0),
            retiring: VecDeque::new(),
            retiring_pages: 0,
        })
    }

    /// Slots of a page.
    pub fn page_size(&self) -> u32 {
        self.page_size
    }

    /// All slots.
    pub fn num_slots(&self) -> u32 {
        self.num_pages * self.page_size
    }

    /// Slots that can be allocated.
    pub fn free_slots(&self) -> u32 {
        self.free.free() * self.page_size
    }

    /// How the slots are used.
    pub fn usage(&self) -> Usage {
        let slots = |pages: u32| pages * self.page_size;
        Usage {
            total: self.num_slots(),
            used: slots(self.num_pages - self.free.free() - self.retiring_pages),
            free: self.free_slots(),
            shared: slots(self.shared_pages),
            retiring: slots(self.retiring_pages),
            largest_free: slots(self.free.longest()),
            evictable: 0,
        }
    }

    /// Adds an owner.
    ///
    /// # Errors
    ///
    /// An extent that is foreign or stale, or has too many owners.
    pub fn retain(&mut self, extent: Extent) -> Result<(), KvError> {
        self.entry(extent)?;
        let entry = &mut self.entries[extent.index as usize];
        entry.references = entry.references.checked_add(1).ok_or(KvError::TooManyReferences(extent))?;
        if entry.references == 2 {
            self.shared_pages += entry.span.len;
        }
        Ok(())
    }

    /// Takes away an owner; with the last one the slots come free at once.
    ///
    /// # Errors
    ///
    /// An extent that is foreign or stale, such as one released twice.
    pub fn release(&mut self, extent: Extent) -> Result<(), KvError> {
        if let Some(span) = self.drop_reference(extent)? {
            self.free.give(span);
        }
        Ok(())
    }

    /// Takes away an owner; with the last one the slots come free when this epoch is [retired](Self::retire), because plans in
    /// flight read them until then.
    ///
    /// # Errors
    ///
    /// As [`Self::release`].
    pub fn release_later(&mut self, extent: Extent) -> Result<(), KvError> {
        if let Some(span) = self.drop_reference(extent)? {
            self.retire_later(span);
        }
        Ok(())
    }

    /// Owners of an extent.
    ///
    /// # Errors
    ///
    /// An extent that is foreign or stale.
    pub fn references(&self, extent: Extent) -> Result<u32, KvError> {
        self.entry(extent).map(|entry| entry.references)
    }

    /// Where an extent lies now.
    ///
    /// # Errors
    ///
    /// An extent that is foreign or stale.
    pub fn run(&self, extent: Extent) -> Result<KvRun, KvError> {
        self.entry(extent).map(|entry| self.run_of(entry.span))
    }

    pub(crate) fn run_of(&self, span: Span) -> KvRun {
        KvRun { first_slot: span.first * self.page_size, num_slots: span.len * self.page_size }
    }

    pub(crate) fn entry(&self, extent: Extent) -> Result<&Entry, KvError> {
        if extent.pool != self.id {
            return Err(KvError::ForeignExtent(extent));
        }
        self.entries
            .get(extent.index as usize)
            .filter(|entry| entry.generation == extent.generation && entry.references > 0)
            .ok_or(KvError::StaleExtent(extent))
    }

    /// The entry of an extent that has one owner and stays where it is.
    pub(crate) fn exclusive(&self, extent: Extent) -> Result<&Entry, KvError> {
        let entry = self.entry(extent)?;
        match entry {
            Entry { references: 2.., .. } => Err(KvError::Shared { extent, references: entry.references }),
            Entry { motion: Motion::Resting, .. } => Ok(entry),
            _ => Err(KvError::Moving(extent)),
        }
    }

    /// Takes away an owner; the span is the caller's to free if that was the last.
    pub(crate) fn drop_reference(&mut self, extent: Extent) -> Result<Option<Span>, KvError> {
        self.entry(extent)?;
        let entry = &mut self.entries[extent.index as usize];
        entry.references -= 1;
        match entry.references {
            0 => {
                entry.motion = Motion::Resting;
                // An index whose generations are used up is given up rather than confused with its first use.
                if let Some(next) = entry.generation.checked_add(1) {
                    entry.generation = next;
                    self.unused_entries.push(extent.index);
                }
                return Ok(Some(entry.span));
            }
            1 => self.shared_pages -= entry.span.len,
            _ => {}
        }
        Ok(None)
    }

    /// Gives an extent other slots and returns those it had.
    pub(crate) fn replace_span(&mut self, extent: Extent, span: Span) -> Span {
        let entry = &mut self.entries[extent.index as usize];
        if entry.references > 1 {
            self.shared_pages = self.shared_pages - entry.span.len + span.len;
        }
        std::mem::replace(&mut entry.span, span)
    }
}
