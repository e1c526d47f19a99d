//! Allocation, extension and division of extents.

use super::{Entry, Extent, Motion, SlotPool};
use crate::KvError;
use crate::free_spans::Span;

impl SlotPool {
    /// Allocates a contiguous extent of at least `num_slots` slots, in whole pages.
    ///
    /// # Errors
    ///
    /// Zero slots, more than are free, or more than are free side by side.
    pub fn allocate(&mut self, num_slots: u32) -> Result<Extent, KvError> {
        let pages = self.pages_for(num_slots)?;
        match self.free.take(pages) {
            Some(span) => Ok(self.insert(span)),
            None => {
                self.check_free(u64::from(pages))?;
                let largest = self.free.longest() * self.page_size;
                Err(KvError::NoContiguous { needed: pages * self.page_size, largest, free: self.free_slots() })
            }
        }
    }

    /// Allocates `count` pages, wherever they lie, and appends them to `pages`.
    ///
    /// # Errors
    ///
    /// Fewer pages are free; none is taken then.
    pub fn allocate_pages(&mut self, count: u32, pages: &mut Vec<Extent>) -> Result<(), KvError> {
        self.check_free(u64::from(count))?;
        pages.extend(
            (0..count)
                .map_while(|_| self.free.take(1))
                .map(|span| Self::insert_into(&mut self.entries, &mut self.unused_entries, self.id, span)),
        );
        Ok(())
    }

    /// Allocates at least `num_slots` slots in as few extents as there are large ones free, and appends them to `extents`.
    ///
    /// # Errors
    ///
    /// Fewer slots are free; none is taken then.
    pub fn allocate_scattered(&mut self, num_slots: u32, extents: &mut Vec<Extent>) -> Result<(), KvError> {
        let mut left = num_slots.div_ceil(self.page_size);
        self.check_free(u64::from(left))?;
        while left > 0
            && let Some(span) = self.free.take(left.min(self.free.longest()))
        {
            left -= span.len;
            extents.push(self.insert(span));
        }
        Ok(())
    }

    /// Allocates neighbouring extents, one of at least `num_slots[i]` slots for each member of a group, in order, so that the
    /// whole group is one contiguous extent.
    ///
    /// # Errors
    ///
    /// As [`Self::allocate`] for all of them together.
    pub fn allocate_group(&mut self, num_slots: &[u32]) -> Result<Vec<Extent>, KvError> {
        let mut pages = Vec::with_capacity(num_slots.len());
        for &slots in num_slots {
            pages.push(self.pages_for(slots)?);
        }
        let total: u64 = pages.iter().map(|&pages| u64::from(pages)).sum();
        if total == 0 {
            return Ok(Vec::new());
        }
        self.check_free(total)?;
        let needed = total as u32; // not more than the pool's pages
        let Some(whole) = self.free.take(needed) else {
            let largest = self.free.longest() * self.page_size;
            return Err(KvError::NoContiguous { needed: needed * self.page_size, largest, free: self.free_slots() });
        };
        let mut first = whole.first;
        Ok(pages
            .into_iter()
            .map(|len| {
                let span = Span { first, len };
                first = span.end();
                self.insert(span)
            })
            .collect())
    }

    /// Lengthens an extent in place by at least `num_slots` slots; `false` if those behind it are not free.
    ///
    /// # Errors
    ///
    /// An extent that is foreign, stale, shared or being moved.
    pub fn extend(&mut self, extent: Extent, num_slots: u32) -> Result<bool, KvError> {
        let end = self.exclusive(extent)?.span.end();
        if num_slots == 0 {
            return Ok(true);
        }
        let pages = self.pages_for(num_slots)?;
        let taken = self.free.take_at(end, pages).is_some();
        if taken {
            self.entries[extent.index as usize].span.len += pages;
        }
        Ok(taken)
    }

    /// Cuts an extent after its first `at` slots and returns the rest as an extent of its own.
    ///
    /// # Errors
    ///
    /// An extent that is foreign, stale, shared or being moved; or `at` is not between two of its pages.
    pub fn split(&mut self, extent: Extent, at: u32) -> Result<Extent, KvError> {
        let span = self.exclusive(extent)?.span;
        let (pages, remainder) = (at / self.page_size, at % self.page_size);
        if remainder != 0 || pages == 0 || pages >= span.len {
            let (num_slots, page_size) = (span.len * self.page_size, self.page_size);
            return Err(KvError::SplitPoint { extent, num_slots, at, page_size });
        }
        self.entries[extent.index as usize].span.len = pages;
        Ok(self.insert(Span { first: span.first + pages, len: span.len - pages }))
    }

    fn insert(&mut self, span: Span) -> Extent {
        Self::insert_into(&mut self.entries, &mut self.unused_entries, self.id, span)
    }

    fn insert_into(entries: &mut Vec<Entry>, unused: &mut Vec<u32>, pool: u32, span: Span) -> Extent {
        let index = unused.pop().unwrap_or(entries.len() as u32);
        match entries.get_mut(index as usize) {
            Some(entry) => (entry.span, entry.references) = (span, 1),
            None => entries.push(Entry { span, references: 1, generation: 0, motion: Motion::Resting }),
        }
        Extent { pool, index, generation: entries[index as usize].generation }
    }

    fn pages_for(&self, num_slots: u32) -> Result<u32, KvError> {
        if num_slots == 0 { Err(KvError::EmptyExtent) } else { Ok(num_slots.div_ceil(self.page_size)) }
    }

    /// Whether `pages` pages are free, contiguous or not.
    fn check_free(&self, pages: u64) -> Result<(), KvError> {
        if pages <= u64::from(self.free.free()) {
            return Ok(());
        }
        let usage = self.usage();
        Err(KvError::OutOfSlots { needed: pages * u64::from(self.page_size), free: usage.free, retiring: usage.retiring })
    }
}
