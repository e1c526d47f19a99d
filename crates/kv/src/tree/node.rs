//! One block of the tree.

use crate::sequence::Part;

/// A block of a [`PrefixTree`](crate::PrefixTree). Plain data; a block that was evicted is recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NodeId {
    pub(super) tree: u32,
    pub(super) index: u32,
    pub(super) generation: u32,
}

/// The parent of the first blocks.
pub(super) const NONE: u32 = u32::MAX;

#[derive(Debug)]
pub(super) struct Node<K> {
    pub key: K,
    pub parent: u32,
    /// Blocks from the root to this one, itself included; 0 for a node that can be reused.
    pub depth: u32,
    pub tokens: u32,
    /// Where the tokens are; the node owns a reference to each extent.
    pub parts: Box<[Part]>,
    /// Slots of those extents.
    pub slots: u32,
    pub children: u32,
    /// Pins of this block and of all that follow it.
    pub pins: u32,
    /// Pins of this block itself.
    pub own_pins: u32,
    pub last_used: u64,
    pub generation: u32,
}
