//! What can be wrong with a request to the pool or the tree.

use crate::{Epoch, Extent};

/// A request that the pool or the tree refused. Nothing has changed then, unless the method says otherwise.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum KvError {
    /// A pool that cannot be numbered or divided into pages.
    #[error(
        "{num_slots} slots in pages of {page_size}: a pool has at most {most} slots, and a multiple of its page size, at least 1"
    )]
    BadPool {
        /// Slots asked for.
        num_slots: u32,
        /// Slots of a page.
        page_size: u32,
        /// The limit of the slots.
        most: u32,
    },
    /// A tree whose blocks hold no tokens.
    #[error("blocks of 0 tokens: a block of the prefix tree holds at least one")]
    EmptyBlock,
    /// An allocation of nothing.
    #[error("an allocation of 0 slots: ask for at least one")]
    EmptyExtent,
    /// Not as many slots are free.
    #[error("{needed} slots are needed but {free} are free, {retiring} more after the plans in flight: evict or finish requests")]
    OutOfSlots {
        /// Slots needed, in whole pages.
        needed: u64,
        /// Slots that are free.
        free: u32,
        /// Slots that come free once older plans have run.
        retiring: u32,
    },
    /// Enough slots are free, but not side by side.
    #[error(
        "{needed} contiguous slots are needed but the largest extent of {free} free slots has {largest}: use pages or move others"
    )]
    NoContiguous {
        /// Slots needed, in whole pages.
        needed: u32,
        /// Slots of the largest free extent.
        largest: u32,
        /// Slots that are free.
        free: u32,
    },
    /// The extent or node belongs to another pool or tree.
    #[error("{0} belongs to another pool")]
    ForeignExtent(Extent),
    /// The extent was released before.
    #[error("{0} has been released before: it may belong to another request by now")]
    StaleExtent(Extent),
    /// A node that the tree does not have, or not any more.
    #[error("the node is not in this tree: it was evicted, or belongs to another tree")]
    StaleNode,
    /// A pin was taken away that was never set.
    #[error("the node is not pinned: every unpin needs a pin of its own")]
    NotPinned,
    /// Only the one owner of an extent may do this.
    #[error("{extent} has {references} owners: only an extent with one owner can be written to, extended, split or merged")]
    Shared {
        /// The extent.
        extent: Extent,
        /// Its reference count.
        references: u32,
    },
    /// The extent is being moved.
    #[error("{0} is being moved: commit or cancel that move first")]
    Moving(Extent),
    /// A reference count at its limit.
    #[error("{0} has as many owners as can be counted")]
    TooManyReferences(Extent),
    /// An extent cannot be divided there.
    #[error("{extent} of {num_slots} slots cannot be split after {at}: split between two pages of {page_size}")]
    SplitPoint {
        /// The extent.
        extent: Extent,
        /// Its slots.
        num_slots: u32,
        /// Where it was to be split.
        at: u32,
        /// Slots of a page.
        page_size: u32,
    },
    /// The target of a move is too small.
    #[error("the move needs {needed} slots but its target holds {room}: begin it again with more headroom")]
    TargetTooSmall {
        /// Tokens to be moved.
        needed: u32,
        /// Slots of the target.
        room: u32,
    },
    /// There is nothing that can be moved, or the sequence changed since the move began.
    #[error("the move does not fit the sequence: it has no part of its own, or other parts than when the move began")]
    NotMovable,
    /// More tokens than a request can have.
    #[error("a sequence of {tokens} tokens: at most {most} are supported")]
    TooManyTokens {
        /// Tokens with those to be appended.
        tokens: u64,
        /// The limit.
        most: u32,
    },
    /// An epoch that has not ended.
    #[error("epoch {epoch} cannot be retired: the pool is in epoch {current}", epoch = .epoch.0, current = .current.0)]
    EpochAhead {
        /// The epoch to be retired.
        epoch: Epoch,
        /// The epoch that plans are made in now.
        current: Epoch,
    },
}
