//! The packed-region attention kernel: one launch does all work items of a plan, of both tile kinds.
//!
//! A task is one work item for one head group: rows are (query token, query head) pairs of any requests, columns are
//! KV slots of any of those, and each row has an interval of columns that it sees. It computes `softmax(scale · Q Kᵀ) V` over the
//! visible columns of the item's range (FlashAttention-2's loop over columns, Dao 2023), and writes O, or a partial to be merged.

#[cfg(feature = "sm_80")]
pub mod ampere;
#[cfg(feature = "sm_90a")]
pub mod hopper;
mod store;
mod task;
#[cfg(feature = "sm_80")]
mod warps;
