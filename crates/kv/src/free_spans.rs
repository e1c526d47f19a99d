//! The free pages of a pool: found by size and by address, joined when they adjoin.

use std::collections::BTreeMap;

/// Consecutive pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    /// Index of the first page.
    pub first: u32,
    /// Number of pages, at least 1.
    pub len: u32,
}

impl Span {
    /// One past the last page.
    pub fn end(self) -> u32 {
        self.first + self.len
    }
}

/// End of a list of spans.
const NONE: u32 = u32::MAX;

/// Maximal spans of free pages.
///
/// By address: the first and the last page of a span carry its length, so that a page finds its free neighbours in constant
/// time. By size: spans of one length form a list, and the lengths are kept in order; since the lengths in use are distinct
/// and add up to at most the pages of the pool, there are never more than `sqrt(2 * pages)` lists.
#[derive(Clone, Debug)]
pub(crate) struct FreeSpans {
    /// Length of the free span that begins or ends with this page; 0 for all other pages.
    edge: Vec<u32>,
    /// Neighbours in the list of its length, for the first page of each free span: previous, next.
    links: Vec<[u32; 2]>,
    /// First span of every length that occurs.
    lists: BTreeMap<u32, u32>,
    free: u32,
}

impl FreeSpans {
    /// `pages` pages, all free.
    pub fn new(pages: u32) -> Self {
        // Zeroed memory is handed out by the operating system as it is touched, so a large pool costs nothing up front.
        let mut spans =
            Self { edge: vec![0; pages as usize], links: vec![[0; 2]; pages as usize], lists: BTreeMap::new(), free: 0 };
        if pages > 0 {
            spans.put(Span { first: 0, len: pages });
        }
        spans
    }

    /// Free pages.
    pub fn free(&self) -> u32 {
        self.free
    }

    /// Length of the longest span.
    pub fn longest(&self) -> u32 {
        self.lists.last_key_value().map_or(0, |(&len, _)| len)
    }

    /// Takes `len` pages out of the shortest span that holds as many.
    pub fn take(&mut self, len: u32) -> Option<Span> {
        let (_, &first) = self.lists.range(len..).next()?;
        Some(self.take_front(first, len))
    }

    /// Takes the `len` pages from page `first` on if they are free. The page before `first`, if any, must not be free.
    pub fn take_at(&mut self, first: u32, len: u32) -> Option<Span> {
        let available = *self.edge.get(first as usize)?;
        (available >= len).then(|| self.take_front(first, len))
    }

    /// Gives back pages that are not free.
    pub fn give(&mut self, span: Span) {
        let mut joined = span;
        if let Some(before) = span.first.checked_sub(1).map(|page| self.edge[page as usize]).filter(|&len| len > 0) {
            let before = Span { first: span.first - before, len: before };
            self.remove(before);
            joined = Span { first: before.first, len: before.len + joined.len };
        }
        if let Some(&after) = self.edge.get(span.end() as usize).filter(|&&len| len > 0) {
            self.remove(Span { first: span.end(), len: after });
            joined.len += after;
        }
        self.put(joined);
    }

    fn take_front(&mut self, first: u32, len: u32) -> Span {
        let whole = Span { first, len: self.edge[first as usize] };
        self.remove(whole);
        if whole.len > len {
            self.put(Span { first: first + len, len: whole.len - len });
        }
        Span { first, len }
    }

    fn put(&mut self, span: Span) {
        let old_head = self.lists.insert(span.len, span.first).unwrap_or(NONE);
        if old_head != NONE {
            self.links[old_head as usize][0] = span.first;
        }
        self.links[span.first as usize] = [NONE, old_head];
        self.set_edges(span, span.len);
        self.free += span.len;
    }

    fn remove(&mut self, span: Span) {
        let [previous, next] = self.links[span.first as usize];
        if next != NONE {
            self.links[next as usize][0] = previous;
        }
        match (previous, next) {
            (NONE, NONE) => drop(self.lists.remove(&span.len)),
            (NONE, _) => drop(self.lists.insert(span.len, next)),
            _ => self.links[previous as usize][1] = next,
        }
        self.set_edges(span, 0);
        self.free -= span.len;
    }

    fn set_edges(&mut self, span: Span, len: u32) {
        self.edge[span.first as usize] = len;
        self.edge[span.end() as usize - 1] = len;
    }

    /// All free spans, by length.
    pub fn iter(&self) -> impl Iterator<Item = Span> {
        self.lists.iter().flat_map(move |(&len, &head)| {
            let next = move |&first: &u32| Some(self.links[first as usize][1]).filter(|&next| next != NONE);
            std::iter::successors(Some(head), next).map(move |first| Span { first, len })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted(spans: &FreeSpans) -> Vec<(u32, u32)> {
        let mut all: Vec<_> = spans.iter().map(|span| (span.first, span.len)).collect();
        all.sort_unstable();
        all
    }

    #[test]
    fn takes_the_best_fit() {
        let mut spans = FreeSpans::new(20);
        let all = spans.take(20).unwrap();
        assert_eq!((all, spans.free(), spans.longest()), (Span { first: 0, len: 20 }, 0, 0));
        spans.give(Span { first: 0, len: 8 });
        spans.give(Span { first: 10, len: 3 });
        spans.give(Span { first: 15, len: 5 });
        assert_eq!(spans.take(4), Some(Span { first: 15, len: 4 }));
        assert_eq!(spans.take(9), None);
        assert_eq!(sorted(&spans), [(0, 8), (10, 3), (19, 1)]);
    }

    #[test]
    fn joins_both_neighbours() {
        let mut spans = FreeSpans::new(9);
        spans.take(9);
        spans.give(Span { first: 0, len: 3 });
        spans.give(Span { first: 6, len: 3 });
        spans.give(Span { first: 3, len: 3 });
        assert_eq!(sorted(&spans), [(0, 9)]);
    }

    #[test]
    fn extends_only_into_what_is_free() {
        let mut spans = FreeSpans::new(10);
        let a = spans.take(4).unwrap();
        assert_eq!(spans.take_at(a.end(), 7), None);
        assert_eq!(spans.take_at(a.end(), 2), Some(Span { first: 4, len: 2 }));
        assert_eq!(spans.take_at(10, 1), None, "past the pool");
        assert_eq!(sorted(&spans), [(6, 4)]);
    }

    #[test]
    fn empty_pool_has_nothing() {
        let mut spans = FreeSpans::new(0);
        assert_eq!((spans.take(1), spans.longest(), spans.free()), (None, 0, 0));
    }
}
