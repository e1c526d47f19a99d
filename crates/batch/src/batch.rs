//! Requests and where their KV lies.

use std::num::NonZeroU32;
use std::ops::Range;

use packinfer_abi::KvRun;

use crate::{AttentionShape, BatchError, KvLayout};

/// Which KV tokens a query token sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mask {
    /// Those up to and including its own: the queries are the last `query_len` of the `kv_len` tokens.
    Causal,
    /// As [`Self::Causal`], but of those only so many, the last ones: a sliding window. Its own token is one of them.
    Window(NonZeroU32),
    /// All of its request.
    None,
}

/// One request of a [`Batch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Query tokens it brings to this step.
    pub query_len: u32,
    /// KV tokens it has, those of this step included.
    pub kv_len: u32,
    /// Index of its first query token in Q and O.
    pub first_token: u32,
    /// Its runs, as a range of [`Batch::runs`].
    first_run: u32,
    num_runs: u32,
}

impl Request {
    /// KV tokens that its query token `index` sees, of its `kv_len`.
    pub fn sees(&self, index: u32, mask: Mask) -> Range<u32> {
        let window = match mask {
            Mask::Causal => u32::MAX,
            Mask::Window(window) => window.get(),
            Mask::None => return 0..self.kv_len,
        };
        let up_to_own = self.kv_len - self.query_len + index + 1;
        up_to_own.saturating_sub(window)..up_to_own
    }

    /// KV tokens that any of its query tokens sees.
    pub fn seen(&self, mask: Mask) -> Range<u32> {
        let begin = if self.query_len > 0 { self.sees(0, mask).start } else { self.kv_len };
        begin..self.kv_len
    }

    /// Where its runs stand in [`Batch::runs`].
    pub fn run_range(&self) -> Range<usize> {
        self.first_run as usize..(self.first_run + self.num_runs) as usize
    }
}

/// The requests of one attention call: Q and O are the query tokens of all requests, one request after the other.
///
/// A batch can be cleared and filled again without allocating.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    shape: AttentionShape,
    mask: Mask,
    kv_layout: KvLayout,
    requests: Vec<Request>,
    runs: Vec<KvRun>,
    num_query_tokens: u32,
    num_slots: u32,
}

impl Batch {
    /// The most requests of a batch.
    pub const MAX_REQUESTS: usize = 65_536;
    /// The most KV tokens of a request, and the most slots of a pool.
    pub const MAX_SLOTS: u32 = 1 << 31;
    /// The most query tokens of a batch.
    pub const MAX_QUERY_TOKENS: u32 = 1 << 24;

    /// A batch without requests.
    pub fn new(shape: AttentionShape, mask: Mask) -> Self {
        Self {
            shape,
            mask,
            kv_layout: KvLayout::default(),
            requests: Vec::new(),
            runs: Vec::new(),
            num_query_tokens: 0,
            num_slots: 0,
        }
    }

    /// A batch without requests, whose KV lies in a pool of another layout.
    ///
    /// # Errors
    ///
    /// Pages of more bytes than kernels can count, or too far apart for even one of them to be numbered.
    pub fn in_layout(shape: AttentionShape, mask: Mask, kv_layout: KvLayout) -> Result<Self, BatchError> {
        kv_layout.check(shape)?;
        Ok(Self { kv_layout, ..Self::new(shape, mask) })
    }

    /// Removes all requests and keeps the memory.
    pub fn clear(&mut self) {
        self.requests.clear();
        self.runs.clear();
        self.num_query_tokens = 0;
        self.num_slots = 0;
    }

    /// Adds a request whose KV lies in the slots from `first_slot` on.
    ///
    /// # Errors
    ///
    /// See [`Self::push_runs`].
    pub fn push_contiguous(&mut self, query_len: u32, kv_len: u32, first_slot: u32) -> Result<(), BatchError> {
        let run = (kv_len > 0).then_some(KvRun { first_slot, num_slots: kv_len });
        self.push_runs(query_len, kv_len, run)
    }

    /// Adds a request whose KV lies in `pages` of `page_size` slots: page `p` holds slots `p * page_size ..`. Pages past
    /// `kv_len` are ignored; the last one may be filled in part.
    ///
    /// # Errors
    ///
    /// See [`Self::push_runs`]; and a page size of zero or another than the layout's, or a page whose slots are numbered past
    /// [`Self::MAX_SLOTS`].
    pub fn push_paged(&mut self, query_len: u32, kv_len: u32, pages: &[u32], page_size: u32) -> Result<(), BatchError> {
        let request = self.requests.len();
        if page_size == 0 {
            return Err(BatchError::EmptyPage { request });
        }
        if let Some(needed) = self.kv_layout.page_size().filter(|&needed| needed != page_size) {
            return Err(BatchError::OtherPageSize { request, page_size, needed });
        }
        let used = &pages[..pages.len().min(kv_len.div_ceil(page_size) as usize)];
        let most = self.kv_layout.most_slots(self.shape);
        let last_page = most / page_size;
        if let Some(&page) = used.iter().find(|&&page| page >= last_page) {
            return Err(BatchError::BadPage { request, page, page_size, most });
        }
        self.push_runs(query_len, kv_len, used.iter().map(|&page| KvRun { first_slot: page * page_size, num_slots: page_size }))
    }

    /// Adds a request whose KV lies in `runs`, in order. Runs that adjoin are joined; slots past `kv_len` are ignored.
    ///
    /// # Errors
    ///
    /// A run that is empty or past [`Self::MAX_SLOTS`], runs too short for `kv_len`, more query tokens than KV tokens under a
    /// causal mask, queries without KV, or more of anything than is supported. The batch is unchanged then.
    pub fn push_runs(&mut self, query_len: u32, kv_len: u32, runs: impl IntoIterator<Item = KvRun>) -> Result<(), BatchError> {
        let first_run = self.runs.len();
        let checked = self.check_lengths(query_len, kv_len).and_then(|tokens| Ok((tokens, self.append_runs(kv_len, runs)?)));
        match checked {
            Ok((num_query_tokens, num_slots)) => {
                self.requests.push(Request {
                    query_len,
                    kv_len,
                    first_token: self.num_query_tokens,
                    first_run: first_run as u32,
                    num_runs: (self.runs.len() - first_run) as u32,
                });
                self.num_query_tokens = num_query_tokens;
                self.num_slots = num_slots;
                Ok(())
            }
            Err(error) => {
                self.runs.truncate(first_run);
                Err(error)
            }
        }
    }

    /// Query tokens of the batch with this request.
    fn check_lengths(&self, query_len: u32, kv_len: u32) -> Result<u32, BatchError> {
        let request = self.requests.len();
        if request >= Self::MAX_REQUESTS {
            return Err(BatchError::TooManyRequests { most: Self::MAX_REQUESTS });
        }
        if kv_len > Self::MAX_SLOTS {
            return Err(BatchError::KvTooLong { request, kv_len, most: Self::MAX_SLOTS });
        }
        if query_len > 0 && kv_len == 0 {
            return Err(BatchError::NoKv { request, query_len });
        }
        if self.mask != Mask::None && query_len > kv_len {
            return Err(BatchError::QueryLongerThanKv { request, query_len, kv_len });
        }
        let tokens = u64::from(self.num_query_tokens) + u64::from(query_len);
        if tokens > u64::from(Self::MAX_QUERY_TOKENS) {
            return Err(BatchError::TooManyTokens { request, tokens, most: Self::MAX_QUERY_TOKENS });
        }
        Ok(tokens as u32)
    }

    /// Appends the runs of the next request, cut to `kv_len` slots, and says how many slots the pool then has at least.
    fn append_runs(&mut self, kv_len: u32, runs: impl IntoIterator<Item = KvRun>) -> Result<u32, BatchError> {
        let request = self.requests.len();
        let first_run = self.runs.len();
        let mut missing = kv_len;
        let mut num_slots = self.num_slots;
        let most = self.kv_layout.most_slots(self.shape);
        for run in runs {
            if missing == 0 {
                break;
            }
            let end = run.first_slot.checked_add(run.num_slots).filter(|&end| end <= most && run.num_slots > 0);
            if end.is_none() {
                return Err(BatchError::BadRun { request, run, most });
            }
            let mut slot = run.first_slot;
            let end = slot + run.num_slots.min(missing);
            missing -= end - slot;
            num_slots = num_slots.max(self.kv_layout.pool_slots(end));
            while slot < end {
                let numbered = self.kv_layout.number(self.shape, slot, end);
                slot += numbered.num_slots;
                match self.runs[first_run..].last_mut() {
                    Some(last) if last.first_slot + last.num_slots == numbered.first_slot => last.num_slots += numbered.num_slots,
                    _ => self.runs.push(numbered),
                }
            }
        }
        if missing > 0 {
            return Err(BatchError::TooFewSlots { request, kv_len, slots: u64::from(kv_len - missing) });
        }
        Ok(num_slots)
    }

    /// Heads, head dimension, element type.
    pub fn shape(&self) -> AttentionShape {
        self.shape
    }

    /// Which KV tokens a query token sees.
    pub fn mask(&self) -> Mask {
        self.mask
    }

    /// How K and V lie in the pool.
    pub fn kv_layout(&self) -> KvLayout {
        self.kv_layout
    }

    /// The requests, in the order of their query tokens.
    pub fn requests(&self) -> &[Request] {
        &self.requests
    }

    /// The KV runs of all requests, request after request. Their slots are [numbered](KvLayout::number) as the layout asks for.
    pub fn runs(&self) -> &[KvRun] {
        &self.runs
    }

    /// The KV runs of one request of this batch.
    pub fn runs_of(&self, request: &Request) -> &[KvRun] {
        &self.runs[request.run_range()]
    }

    /// Appends the runs of those KV tokens of a request of this batch that [any query token sees](Request::seen).
    pub fn push_seen_runs(&self, request: &Request, to: &mut Vec<KvRun>) {
        let mut unseen = request.seen(self.mask).start;
        let mut runs = self.runs_of(request);
        while let Some((first, rest)) = runs.split_first().filter(|(first, _)| first.num_slots <= unseen) {
            (runs, unseen) = (rest, unseen - first.num_slots);
        }
        let first = to.len();
        to.extend_from_slice(runs);
        if let Some(run) = to.get_mut(first) {
            *run = KvRun { first_slot: run.first_slot + unseen, num_slots: run.num_slots - unseen };
        }
    }

    /// Elements of K, and of V, of a pool that just holds every run.
    pub fn kv_elements(&self) -> u64 {
        self.kv_layout.num_elements(self.shape, self.num_slots)
    }

    /// Query tokens of all requests: rows of Q and O.
    pub fn num_query_tokens(&self) -> u32 {
        self.num_query_tokens
    }

    /// The least number of slots of a pool that holds every run; whole pages, where the layout has pages.
    pub fn num_slots(&self) -> u32 {
        self.num_slots
    }

    /// KV slots that attention reads, those of several requests counted once.
    pub fn distinct_slots(&self) -> u64 {
        let mut runs: Vec<KvRun> = Vec::new();
        for request in &self.requests {
            self.push_seen_runs(request, &mut runs);
        }
        runs.sort_unstable_by_key(|run| run.first_slot);
        let mut counted_to = 0;
        let mut slots = 0;
        for run in runs {
            let end = run.first_slot + run.num_slots;
            slots += u64::from(end.saturating_sub(run.first_slot.max(counted_to)));
            counted_to = counted_to.max(end);
        }
        slots
    }

    /// Bytes that attention on this batch moves at the least: distinct KV, Q and O, each once.
    pub fn least_bytes(&self) -> u64 {
        self.distinct_slots() * self.shape.kv_bytes_per_slot()
            + u64::from(self.num_query_tokens) * self.shape.qo_bytes_per_token()
    }

    /// Bytes of Q, O, and K and V of a pool that just holds every run.
    pub fn tensor_bytes(&self) -> u64 {
        2 * self.kv_elements() * self.shape.kv_element_bytes()
            + u64::from(self.num_query_tokens) * self.shape.qo_bytes_per_token()
    }

    /// (query token, KV token) pairs that attention computes, for one query head.
    pub fn visible_pairs(&self) -> u64 {
        let pairs = |request: &Request| {
            let (first, last) = (request.sees(0, self.mask), request.sees(request.query_len - 1, self.mask));
            let (least, most) = (first.len() as u64, last.len() as u64);
            // One more each, up to what the last one sees.
            let growing = most - least;
            u64::from(request.query_len) * most - growing * (growing + 1) / 2
        };
        self.requests.iter().filter(|request| request.query_len > 0).map(pairs).sum()
    }

    /// Floating-point operations of attention on this batch: two products of `head_dim` a pair and head.
    pub fn flops(&self) -> f64 {
        4.0 * self.visible_pairs() as f64 * self.shape.qo_elements_per_token() as f64
    }
}
