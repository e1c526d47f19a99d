//! Which blocks stay and which go.

use std::hash::Hash;

use super::PrefixTree;
use super::node::NodeId;
use crate::{KvError, SlotPool, Usage};

/// What [`PrefixTree::evict`] gave up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Evicted {
    /// Blocks that left the tree.
    pub blocks: u32,
    /// Slots that came free.
    pub slots: u32,
}

impl<Q: ?Sized + ToOwned + Hash + Eq> PrefixTree<Q> {
    /// Leaves that can be evicted now; their parents follow once they are gone.
    pub fn num_evictable_leaves(&self) -> usize {
        self.evictable.len()
    }

    /// Slots that eviction can free, one leaf after the other: those of all blocks that are not pinned. A page that two blocks
    /// begin in, because forks parted there, counts for both.
    pub fn evictable_slots(&self) -> u64 {
        self.evictable_slots
    }

    /// How the pool is used, and how much of that the tree would give up: what a [`Policy`](crate::Policy) goes by.
    pub fn usage(&self, pool: &SlotPool) -> Usage {
        let usage = pool.usage();
        Usage { evictable: u32::try_from(self.evictable_slots).unwrap_or(u32::MAX).min(usage.used), ..usage }
    }

    /// Keeps a block, and with it all blocks before it, from eviction until it is unpinned as often as it was pinned.
    ///
    /// # Errors
    ///
    /// A node that the tree does not have.
    pub fn pin(&mut self, node: NodeId) -> Result<(), KvError> {
        let index = self.check(node)?;
        self.evictable.remove(&(self.nodes[index as usize].last_used, index));
        self.nodes[index as usize].own_pins += 1;
        let mut next = index;
        while let Some(node) = self.nodes.get_mut(next as usize) {
            if node.pins == 0 {
                self.evictable_slots -= u64::from(node.slots);
            }
            node.pins += 1;
            next = node.parent;
        }
        Ok(())
    }

    /// Takes a pin away.
    ///
    /// # Errors
    ///
    /// A node that the tree does not have, or that is not pinned.
    pub fn unpin(&mut self, node: NodeId) -> Result<(), KvError> {
        let index = self.check(node)?;
        let own = self.nodes[index as usize].own_pins.checked_sub(1).ok_or(KvError::NotPinned)?;
        self.nodes[index as usize].own_pins = own;
        let mut next = index;
        while let Some(node) = self.nodes.get_mut(next as usize) {
            node.pins -= 1;
            if node.pins == 0 {
                self.evictable_slots += u64::from(node.slots);
            }
            next = node.parent;
        }
        self.offer(index);
        Ok(())
    }

    /// Gives up least recently used leaves until the pool has `free_slots` free slots, or nothing more can go.
    ///
    /// # Errors
    ///
    /// The tree's slots are of another pool.
    pub fn evict(&mut self, pool: &mut SlotPool, free_slots: u32) -> Result<Evicted, KvError> {
        let mut evicted = Evicted::default();
        let before = pool.free_slots();
        while pool.free_slots() < free_slots
            && let Some(&(_, index)) = self.evictable.first()
        {
            for part in &self.nodes[index as usize].parts {
                pool.release(part.extent)?;
            }
            self.remove_leaf(index);
            evicted.blocks += 1;
        }
        evicted.slots = pool.free_slots() - before;
        Ok(evicted)
    }
}
