//! What can be wrong with a batch.

use packinfer_abi::KvRun;

use crate::KvLayout;

/// A batch, or a part of one, that cannot be worked on.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum BatchError {
    /// A head count is zero.
    #[error("{num_qo_heads} query heads and {num_kv_heads} KV heads: both must be at least 1")]
    NoHeads {
        /// Query heads asked for.
        num_qo_heads: u32,
        /// KV heads asked for.
        num_kv_heads: u32,
    },
    /// More query heads than supported.
    #[error("{num_qo_heads} query heads: at most {most} are supported")]
    TooManyHeads {
        /// Query heads asked for.
        num_qo_heads: u32,
        /// The limit.
        most: u32,
    },
    /// The KV heads do not divide the query heads.
    #[error(
        "{num_qo_heads} query heads cannot be shared evenly by {num_kv_heads} KV heads: the first must be a multiple of the second"
    )]
    HeadsNotDivisible {
        /// Query heads asked for.
        num_qo_heads: u32,
        /// KV heads asked for.
        num_kv_heads: u32,
    },
    /// No kernel is built for this head dimension.
    #[error("head dimension {head_dim}: the kernels are built for 64, 96, 128 and 256")]
    HeadDim {
        /// Head dimension asked for.
        head_dim: u32,
    },
    /// Causal attention needs the queries to be the last of the KV tokens.
    #[error(
        "request {request} has {query_len} query tokens but only {kv_len} KV tokens: the queries are the last of the KV tokens, so kv_len must be at least query_len"
    )]
    QueryLongerThanKv {
        /// Index of the request.
        request: usize,
        /// Its query tokens.
        query_len: u32,
        /// Its KV tokens.
        kv_len: u32,
    },
    /// Query tokens that would see no KV at all have no defined result.
    #[error(
        "request {request} has {query_len} query tokens and no KV tokens: attention over nothing is undefined, give it KV or no queries"
    )]
    NoKv {
        /// Index of the request.
        request: usize,
        /// Its query tokens.
        query_len: u32,
    },
    /// More KV tokens than supported.
    #[error("request {request} has {kv_len} KV tokens: at most {most} are supported")]
    KvTooLong {
        /// Index of the request.
        request: usize,
        /// Its KV tokens.
        kv_len: u32,
        /// The limit.
        most: u32,
    },
    /// A request's runs or pages hold fewer slots than it has KV tokens.
    #[error("request {request} has {kv_len} KV tokens but its pages hold only {slots} slots")]
    TooFewSlots {
        /// Index of the request.
        request: usize,
        /// Its KV tokens.
        kv_len: u32,
        /// Slots that were given.
        slots: u64,
    },
    /// A page size of zero.
    #[error("request {request} has a page size of 0: a page holds at least one slot")]
    EmptyPage {
        /// Index of the request.
        request: usize,
    },
    /// A layout with pages of a size that is not supported.
    #[error("pages of {page_size} slots: the page size must be a multiple of {multiple}")]
    PageSize {
        /// Slots of a page.
        page_size: u32,
        /// What it must be a multiple of.
        multiple: u32,
    },
    /// Pages whose bytes are more than kernels can count.
    #[error("pages of {page_size} slots: with the heads of this batch, at most {most} are supported")]
    PageTooLarge {
        /// Slots of a page.
        page_size: u32,
        /// The limit.
        most: u32,
    },
    /// Pages so far apart that not even those of one can be numbered.
    #[error("{layout}: from a page to the next there are more than {most} slots of a head")]
    PageStride {
        /// The layout.
        layout: KvLayout,
        /// The limit.
        most: u32,
    },
    /// Pages of another size than those of the layout.
    #[error("request {request} has pages of {page_size} slots, but those of the batch's KV layout have {needed}")]
    OtherPageSize {
        /// Index of the request.
        request: usize,
        /// Slots of its pages.
        page_size: u32,
        /// Slots of the pool's pages.
        needed: u32,
    },
    /// A run that is empty, or reaches past the last slot that can be numbered.
    #[error("request {request} has a KV run of {} slots from slot {}: a run holds at least one slot and slots are numbered up to {most}", run.num_slots, run.first_slot)]
    BadRun {
        /// Index of the request.
        request: usize,
        /// The run.
        run: KvRun,
        /// One past the last slot number.
        most: u32,
    },
    /// A page whose slots cannot be numbered.
    #[error("request {request} names page {page} of {page_size} slots: slots are numbered up to {most}")]
    BadPage {
        /// Index of the request.
        request: usize,
        /// The page.
        page: u32,
        /// Slots of a page.
        page_size: u32,
        /// One past the last slot number.
        most: u32,
    },
    /// More requests than supported.
    #[error("more than {most} requests in one batch")]
    TooManyRequests {
        /// The limit.
        most: usize,
    },
    /// More query tokens in all requests than an index can count.
    #[error("request {request} brings the batch to {tokens} query tokens: at most {most} are supported")]
    TooManyTokens {
        /// Index of the request.
        request: usize,
        /// Query tokens with it.
        tokens: u64,
        /// The limit.
        most: u32,
    },
}
