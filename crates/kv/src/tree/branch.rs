//! Running requests: where each stands in the tree, and the KV that it sees.

use std::hash::Hash;

use super::node::NONE;
use super::{Evicted, Prefix, PrefixTree};
use crate::sequence::Part;
use crate::{Growth, KvError, Sequence, SlotCopy, SlotPool};

/// A running request: the blocks of the tree that it stands on, which it pins, and its KV, which begins with theirs.
#[derive(Debug)]
#[must_use = "a branch keeps its blocks pinned until it is finished"]
pub struct Branch {
    prefix: Prefix,
    /// Its KV. Append to it, move it; do not replace it by another.
    pub kv: Sequence,
}

/// What [`PrefixTree::append`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Appended {
    /// What must be copied before the new tokens are written.
    pub copy: Option<SlotCopy>,
    /// What was evicted to make room.
    pub evicted: Evicted,
}

impl Branch {
    /// The blocks of the tree that it stands on.
    pub fn prefix(&self) -> Prefix {
        self.prefix
    }
}

impl<Q: ?Sized + ToOwned + Hash + Eq> PrefixTree<Q> {
    /// Starts a request: its KV begins with the blocks of `path` that are in the tree already.
    ///
    /// # Errors
    ///
    /// The tree's slots are of another pool, or have too many owners.
    pub fn start<'a>(&mut self, pool: &mut SlotPool, path: impl IntoIterator<Item = &'a Q>) -> Result<Branch, KvError>
    where
        Q: 'a,
    {
        let prefix = self.match_prefix(path);
        let mut kv = Sequence::new();
        let mut nodes = Vec::with_capacity(prefix.blocks as usize);
        let mut next = prefix.node.map_or(NONE, |node| node.index);
        while let Some(node) = self.nodes.get(next as usize) {
            nodes.push(next);
            next = node.parent;
        }
        for &node in nodes.iter().rev() {
            for &part in &self.nodes[node as usize].parts {
                if let Err(error) = pool.retain(part.extent) {
                    kv.free(pool)?;
                    return Err(error);
                }
                kv.push_part(part);
            }
        }
        if let Some(node) = prefix.node {
            self.pin(node)?;
        }
        Ok(Branch { prefix, kv })
    }

    /// Makes room for `tokens` more tokens of a request, and for the headroom of `growth`, evicting blocks if need be. See
    /// [`Sequence::append`] for what must be copied first.
    ///
    /// # Errors
    ///
    /// As [`Sequence::append`]; what was evicted stays evicted.
    pub fn append(&mut self, pool: &mut SlotPool, branch: &mut Branch, tokens: u32, growth: Growth) -> Result<Appended, KvError> {
        let room = branch.kv.room(pool);
        let mut evicted = Evicted::default();
        if tokens > room {
            let headroom = if let Growth::Contiguous { headroom } = growth { headroom } else { 0 };
            // One page more for what is copied on write.
            let wanted = (tokens - room).saturating_add(headroom).saturating_add(pool.page_size().saturating_mul(2));
            evicted = self.evict(pool, wanted)?;
        }
        let copy = branch.kv.append(pool, tokens, growth)?;
        Ok(Appended { copy, evicted })
    }

    /// Puts the tokens of a branch into the tree, so that later requests find them. `path` names its blocks from the root on;
    /// the last may be filled in part. The slots become shared with the tree: headroom behind them is given back, so insert
    /// before reserving any, and what is appended afterwards goes to slots of the request's own.
    ///
    /// A block that another request has inserted meanwhile is taken from there, and the branch's own copy is released with this
    /// epoch. Blocks
    /// end where the branch's KV does, where a block that is filled in part is in the way, or where slots are shared with a
    /// fork across a block boundary. Returns how many were new.
    ///
    /// # Errors
    ///
    /// The branch is of another tree or pool.
    pub fn insert<'a>(
        &mut self,
        pool: &mut SlotPool,
        branch: &mut Branch,
        path: impl IntoIterator<Item = &'a Q>,
    ) -> Result<u32, KvError>
    where
        Q: 'a,
    {
        let mut parent = branch.prefix.node.map_or(Ok(NONE), |node| self.check(node))?;
        let mut place = branch.prefix;
        let mut added = 0;
        self.clock += 1;
        let Some(mut first_part) = branch.kv.parts_before(place.tokens) else { return Ok(0) };
        for key in path.into_iter().skip(place.blocks as usize) {
            let whole = place.tokens.is_multiple_of(self.block_tokens);
            let tokens = self.block_tokens.min(branch.kv.len().saturating_sub(place.tokens));
            if !whole || tokens == 0 {
                break;
            }
            let known = self.child(parent, key);
            if known.is_some_and(|node| self.nodes[node as usize].tokens != tokens) {
                break;
            }
            let Some(range) = branch.kv.cut_out(pool, first_part, tokens)? else { break };
            let node = match known {
                Some(node) => {
                    self.touch(node);
                    let parts = &self.nodes[node as usize].parts;
                    branch.kv.replace_parts(pool, range, parts)?;
                    first_part += parts.len();
                    node
                }
                None => {
                    let parts: Box<[Part]> = branch.kv.parts[range].into();
                    let mut slots = 0;
                    for part in &parts {
                        pool.retain(part.extent)?;
                        slots += pool.run(part.extent)?.num_slots;
                    }
                    first_part += parts.len();
                    added += 1;
                    self.add_leaf(parent, key, tokens, slots, parts)
                }
            };
            place = Prefix { node: Some(self.node_id(node)), blocks: place.blocks + 1, tokens: place.tokens + tokens };
            parent = node;
        }
        if place != branch.prefix {
            self.stand_on(branch, place)?;
        }
        Ok(added)
    }

    /// Another request that goes on from where this one is: a parallel sample, a beam, a speculative branch. Its KV is shared
    /// until either appends to it.
    ///
    /// # Errors
    ///
    /// The branch is of another tree or pool.
    pub fn fork(&mut self, pool: &mut SlotPool, branch: &mut Branch) -> Result<Branch, KvError> {
        if let Some(node) = branch.prefix.node {
            self.check(node)?;
        }
        // Cut at the blocks' boundaries while that is possible, so that both can be inserted later.
        let whole = branch.prefix.tokens.is_multiple_of(self.block_tokens);
        let mut next = branch.kv.parts_before(branch.prefix.tokens).filter(|_| whole);
        while let Some(first) = next {
            next = branch.kv.cut_out(pool, first, self.block_tokens)?.map(|block| block.end);
        }
        let kv = branch.kv.fork(pool)?;
        if let Some(node) = branch.prefix.node {
            self.pin(node)?;
        }
        Ok(Branch { prefix: branch.prefix, kv })
    }

    /// Ends a request: its blocks stay in the tree until they are evicted, the rest of its slots comes free.
    ///
    /// # Errors
    ///
    /// The branch is of another tree or pool.
    pub fn finish(&mut self, pool: &mut SlotPool, branch: Branch) -> Result<(), KvError> {
        if let Some(node) = branch.prefix.node {
            self.unpin(node)?;
        }
        branch.kv.free(pool)
    }

    fn stand_on(&mut self, branch: &mut Branch, place: Prefix) -> Result<(), KvError> {
        if let Some(node) = place.node {
            self.pin(node)?;
        }
        if let Some(node) = branch.prefix.node {
            self.unpin(node)?;
        }
        branch.prefix = place;
        Ok(())
    }
}
