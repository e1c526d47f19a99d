//! Prefixes that requests have in common, as a tree of token blocks that own slots.

mod branch;
mod evict;
mod node;

use std::borrow::Borrow;
use std::collections::BTreeSet;
use std::hash::{BuildHasher, Hash};
use std::sync::atomic::{AtomicU32, Ordering};

use hashbrown::{DefaultHashBuilder, HashTable};

pub use branch::{Appended, Branch};
pub use evict::Evicted;
pub use node::NodeId;
use node::{NONE, Node};

use crate::sequence::Part;
use crate::{Extent, KvError};

/// What [`PrefixTree::match_prefix`] found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prefix {
    /// The last block that matched.
    pub node: Option<NodeId>,
    /// Blocks that matched.
    pub blocks: u32,
    /// Tokens in them.
    pub tokens: u32,
}

/// A tree of token blocks: a path from the root is a prefix whose KV is in the pool.
///
/// A block is known by its key after the blocks before it. Keys are the tokens themselves (`PrefixTree<[u32]>`, paths are
/// `tokens.chunks(block_tokens)`) or hashes that the caller vouches for (`PrefixTree<u64>`, paths are `hashes.iter()`). All
/// blocks hold `block_tokens` tokens, except that the last one of a prompt may hold fewer.
///
/// Every block owns references to its slots. A running request is a [`Branch`]: it pins the path that it stands on. What is
/// not pinned stays until [`Self::evict`] takes it, least recently used leaves first.
#[derive(Debug)]
pub struct PrefixTree<Q: ?Sized + ToOwned> {
    id: u32,
    block_tokens: u32,
    nodes: Vec<Node<Q::Owned>>,
    unused_nodes: Vec<u32>,
    /// Indices of all nodes, by parent and key.
    index: HashTable<u32>,
    hasher: DefaultHashBuilder,
    /// Leaves that no request stands on: time of last use, node.
    evictable: BTreeSet<(u64, u32)>,
    clock: u64,
    /// Slots of all blocks that are not pinned.
    evictable_slots: u64,
}

impl<Q: ?Sized + ToOwned + Hash + Eq> PrefixTree<Q> {
    /// An empty tree of blocks of `block_tokens` tokens.
    ///
    /// # Errors
    ///
    /// Blocks of zero tokens.
    pub fn new(block_tokens: u32) -> Result<Self, KvError> {
        static NEXT_ID: AtomicU32 = AtomicU32::new(0);
        if block_tokens == 0 {
            return Err(KvError::EmptyBlock);
        }
        Ok(Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            block_tokens,
            nodes: Vec::new(),
            unused_nodes: Vec::new(),
            index: HashTable::new(),
            hasher: DefaultHashBuilder::default(),
            evictable: BTreeSet::new(),
            clock: 0,
            evictable_slots: 0,
        })
    }

    /// Tokens of a whole block.
    pub fn block_tokens(&self) -> u32 {
        self.block_tokens
    }

    /// Blocks in the tree.
    pub fn num_blocks(&self) -> usize {
        self.index.len()
    }

    /// The longest prefix of `path` that is in the tree, which counts as used.
    pub fn match_prefix<'a>(&mut self, path: impl IntoIterator<Item = &'a Q>) -> Prefix
    where
        Q: 'a,
    {
        self.clock += 1;
        let (mut found, mut parent) = (Prefix::default(), NONE);
        for key in path {
            let Some(child) = self.child(parent, key) else { break };
            self.touch(child);
            let node = &self.nodes[child as usize];
            found = Prefix { node: Some(self.node_id(child)), blocks: node.depth, tokens: found.tokens + node.tokens };
            parent = child;
            if node.tokens < self.block_tokens {
                break;
            }
        }
        found
    }

    /// The block before a block.
    ///
    /// # Errors
    ///
    /// A node that the tree does not have.
    pub fn parent(&self, node: NodeId) -> Result<Option<NodeId>, KvError> {
        let parent = self.nodes[self.check(node)? as usize].parent;
        Ok((parent != NONE).then(|| self.node_id(parent)))
    }

    /// Blocks from the root to this one, itself included.
    ///
    /// # Errors
    ///
    /// A node that the tree does not have.
    pub fn depth(&self, node: NodeId) -> Result<u32, KvError> {
        Ok(self.nodes[self.check(node)? as usize].depth)
    }

    /// Tokens of a block.
    ///
    /// # Errors
    ///
    /// A node that the tree does not have.
    pub fn tokens(&self, node: NodeId) -> Result<u32, KvError> {
        Ok(self.nodes[self.check(node)? as usize].tokens)
    }

    /// The extents that hold a block.
    ///
    /// # Errors
    ///
    /// A node that the tree does not have.
    pub fn extents(&self, node: NodeId) -> Result<impl Iterator<Item = Extent> + '_, KvError> {
        Ok(self.nodes[self.check(node)? as usize].parts.iter().map(|part| part.extent))
    }

    fn node_id(&self, index: u32) -> NodeId {
        NodeId { tree: self.id, index, generation: self.nodes[index as usize].generation }
    }

    fn check(&self, node: NodeId) -> Result<u32, KvError> {
        let alive = |found: &&Node<Q::Owned>| found.generation == node.generation && found.depth > 0;
        match self.nodes.get(node.index as usize).filter(alive) {
            Some(_) if node.tree == self.id => Ok(node.index),
            _ => Err(KvError::StaleNode),
        }
    }

    fn child(&self, parent: u32, key: &Q) -> Option<u32> {
        let same = |&index: &u32| {
            let node = &self.nodes[index as usize];
            node.parent == parent && node.key.borrow() == key
        };
        self.index.find(self.hasher.hash_one((parent, key)), same).copied()
    }

    /// Marks a block as used now.
    fn touch(&mut self, index: u32) {
        let node = &mut self.nodes[index as usize];
        let was_evictable = self.evictable.remove(&(node.last_used, index));
        node.last_used = self.clock;
        if was_evictable {
            self.evictable.insert((self.clock, index));
        }
    }

    /// Lists a block as evictable if it is.
    fn offer(&mut self, index: u32) {
        let node = &self.nodes[index as usize];
        if node.pins == 0 && node.children == 0 {
            self.evictable.insert((node.last_used, index));
        }
    }

    fn add_leaf(&mut self, parent: u32, key: &Q, tokens: u32, slots: u32, parts: Box<[Part]>) -> u32 {
        let depth = if parent == NONE { 1 } else { self.nodes[parent as usize].depth + 1 };
        let index = self.unused_nodes.pop().unwrap_or(self.nodes.len() as u32);
        let generation = self.nodes.get(index as usize).map_or(0, |node| node.generation);
        let (last_used, key) = (self.clock, key.to_owned());
        let node = Node { key, parent, depth, tokens, parts, slots, children: 0, pins: 0, own_pins: 0, last_used, generation };
        self.evictable_slots += u64::from(slots);
        match self.nodes.get_mut(index as usize) {
            Some(unused) => *unused = node,
            None => self.nodes.push(node),
        }
        if let Some(node) = self.nodes.get_mut(parent as usize) {
            node.children += 1;
            self.evictable.remove(&(node.last_used, parent));
        }
        self.evictable.insert((last_used, index));
        let hash = |index: &u32| {
            let node = &self.nodes[*index as usize];
            self.hasher.hash_one((node.parent, node.key.borrow()))
        };
        self.index.insert_unique(hash(&index), index, hash);
        index
    }

    fn remove_leaf(&mut self, index: u32) {
        let node = &mut self.nodes[index as usize];
        let hash = self.hasher.hash_one((node.parent, node.key.borrow()));
        if let Ok(entry) = self.index.find_entry(hash, |&other| other == index) {
            entry.remove();
        }
        self.evictable.remove(&(node.last_used, index));
        self.evictable_slots -= u64::from(node.slots);
        node.parts = Box::default();
        node.depth = 0;
        node.generation = node.generation.wrapping_add(1);
        self.unused_nodes.push(index);
        let parent = node.parent;
        if let Some(node) = self.nodes.get_mut(parent as usize) {
            node.children -= 1;
            self.offer(parent);
        }
    }
}
