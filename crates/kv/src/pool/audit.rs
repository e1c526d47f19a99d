//! The pool's books, checked against each other.

use super::SlotPool;
use crate::free_spans::Span;

impl SlotPool {
    /// Walks the whole pool and says what is inconsistent, for tests and for hunting bugs; slow.
    ///
    /// # Errors
    ///
    /// A page that is in two places or none, or a count that is off.
    pub fn audit(&self) -> Result<(), String> {
        let owned = self.entries.iter().filter(|entry| entry.references > 0);
        let shared: u32 = owned.clone().filter(|entry| entry.references > 1).map(|entry| entry.span.len).sum();
        let retiring: u32 = self.retiring.iter().map(|(_, span)| span.len).sum();
        if (shared, retiring) != (self.shared_pages, self.retiring_pages) {
            return Err(format!(
                "{shared} shared and {retiring} retiring pages, counted {} and {}",
                self.shared_pages, self.retiring_pages
            ));
        }
        let mut free: Vec<Span> = self.free.iter().collect();
        let in_lists: u32 = free.iter().map(|span| span.len).sum();
        if in_lists != self.free.free() {
            return Err(format!("{in_lists} free pages in lists, counted {}", self.free.free()));
        }
        free.sort_unstable_by_key(|span| span.first);
        if let Some(pair) = free.windows(2).find(|pair| pair[0].end() == pair[1].first) {
            return Err(format!("free spans {:?} and {:?} are not joined", pair[0], pair[1]));
        }
        let mut spans: Vec<Span> = free;
        spans.extend(owned.map(|entry| entry.span).chain(self.retiring.iter().map(|&(_, span)| span)));
        spans.sort_unstable_by_key(|span| span.first);
        let mut page = 0;
        for span in spans {
            if span.first != page || span.len == 0 {
                return Err(format!("{span:?} where page {page} was expected"));
            }
            page = span.end();
        }
        if page == self.num_pages { Ok(()) } else { Err(format!("pages from {page} on are lost")) }
    }
}
