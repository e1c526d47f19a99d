//! Where the KV of a batch file lies: pages of a pool, in the disorder of one that has been used for a while, or in order.

use std::collections::HashMap;
use std::ops::Range;

use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;

use crate::{Batch, BatchFile, BatchFileError};

/// Where the pages of a batch file lie in their pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvPlacement {
    /// In random order, as in a pool that has been used for a while.
    Scattered {
        /// Of that order.
        seed: u64,
    },
    /// In the order in which requests take them, so that what a request does not share is in one piece, as are blocks that are
    /// there for the first time; slots of [`PagedLayout`](crate::PagedLayout)s are runs page by page even so.
    Contiguous,
}

impl BatchFile {
    /// [`Self::to_batch_in`] scattered pages, in an order by `seed`.
    ///
    /// # Errors
    ///
    /// As that.
    pub fn to_batch(&self, seed: u64) -> Result<Batch, BatchFileError> {
        self.to_batch_in(KvPlacement::Scattered { seed })
    }

    /// The batch with its KV laid out in pages of a pool that just holds it, shared by the requests whose leading blocks are the
    /// same.
    ///
    /// # Errors
    ///
    /// What [`Self::check`] finds, or more slots than can be numbered.
    pub fn to_batch_in(&self, placement: KvPlacement) -> Result<Batch, BatchFileError> {
        self.check()?;
        let mut prefixes = PrefixPages::new(self.block_tokens.unwrap_or(0) / self.page_size);
        let mut in_order: Vec<u32> = Vec::new();
        let mut page_ranges = Vec::with_capacity(self.requests.len());
        for request in &self.requests {
            let first = in_order.len();
            let count = request.kv_len.div_ceil(self.page_size);
            for pages in prefixes.walk(&request.blocks) {
                in_order.extend(pages);
            }
            let shared = (in_order.len() - first) as u32;
            in_order.extend(prefixes.take(count - shared));
            page_ranges.push(first..in_order.len());
        }

        let pages = prefixes.num_pages;
        let (shape, kv_layout) = (self.shape()?, self.kv_layout()?);
        let most = kv_layout.most_slots(shape);
        if u64::from(pages) > u64::from(most / self.page_size) {
            let page_size = self.page_size;
            return Err(BatchFileError::TooManySlots { pages: pages.into(), page_size, most });
        }
        let mut placed: Vec<u32> = (0..pages).collect();
        if let KvPlacement::Scattered { seed } = placement {
            placed.shuffle(&mut SmallRng::seed_from_u64(seed));
        }
        for page in &mut in_order {
            *page = placed[*page as usize];
        }

        let mut batch = Batch::in_layout(shape, self.mask(), kv_layout)?;
        for (request, range) in self.requests.iter().zip(page_ranges) {
            batch.push_paged(request.query_len, request.kv_len, &in_order[range], self.page_size)?;
        }
        Ok(batch)
    }
}

/// Pages handed out so far, and those of every block in its place behind the blocks before it.
struct PrefixPages {
    pages_per_block: u32,
    num_pages: u32,
    /// First page of a block, by the first page of the block before it and its content id.
    first_page: HashMap<(Option<u32>, u64), u32>,
}

impl PrefixPages {
    fn new(pages_per_block: u32) -> Self {
        Self { pages_per_block, num_pages: 0, first_page: HashMap::new() }
    }

    /// The next `count` pages. The count fits: [`BatchFile::check`] limits their sum.
    fn take(&mut self, count: u32) -> Range<u32> {
        let first = self.num_pages;
        self.num_pages += count;
        first..self.num_pages
    }

    /// The pages of each of a request's leading blocks.
    fn walk<'a>(&'a mut self, blocks: &'a [u64]) -> impl Iterator<Item = Range<u32>> + 'a {
        let mut before = None;
        blocks.iter().map(move |&id| {
            let known = self.first_page.get(&(before, id)).copied();
            let first = known.unwrap_or_else(|| {
                let first = self.take(self.pages_per_block).start;
                self.first_page.insert((before, id), first);
                first
            });
            before = Some(first);
            first..first + self.pages_per_block
        })
    }
}
