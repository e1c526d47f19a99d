//! The prefix tree of a batch: which requests begin with the same KV slots, and how far.
//!
//! Requests are sorted by their slots, without comparing more of them than they have in common: of those that begin alike, one is
//! compared with all others, and what parts from it in the same way is sorted further among itself. Nodes of the tree then are
//! ranges of the sorted requests.

use std::cmp::Reverse;
use std::ops::Range;

use packinfer_abi::KvRun;
use packinfer_batch::{Batch, Mask, Request};

/// [`Node::parent`] of a node without one.
const NO_NODE: u32 = u32::MAX;
/// What follows where nothing does. No slot has this number.
const NO_SLOT: u32 = u32::MAX;
/// Runs that are compared at a time, by vector instructions.
const CHUNK: usize = 16;

/// A column of a request, found among its runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place {
    pub column: u32,
    /// The run, of the request's, that holds the column before it; the first run for column 0.
    pub run: u32,
    /// First column of that run.
    pub run_column: u32,
}

impl Place {
    /// Slots of the run that lie before the column.
    pub fn skip(&self) -> u32 {
        self.column - self.run_column
    }
}

/// A request that begins like others.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Member {
    pub request: u32,
    /// How far it is like the member before it.
    common: Place,
    /// The slot that follows there.
    next: u32,
}

/// Columns that the same requests share.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    /// Its requests, as a range of [`PrefixTree::members`].
    pub members: Range<usize>,
    /// Where its columns end. They begin where its parent's end.
    pub end: Place,
    pub parent: u32,
    /// The first of its descendants, or the node itself: they stand right before it.
    first_descendant: u32,
}

/// Finds prefix trees. It keeps its memory from batch to batch.
#[derive(Clone, Debug, Default)]
pub(crate) struct PrefixTree {
    members: Vec<Member>,
    nodes: Vec<Node>,
    /// First slot and index of every request, in the upper and the lower half: numbers are sorted faster than pairs.
    first_slots: Vec<u64>,
    /// Members still to be sorted, which are alike up to a place and one slot more.
    unsorted: Vec<(Range<usize>, Place)>,
    /// Nodes whose last member is not known yet, each with its first member.
    open: Vec<Node>,
}

impl PrefixTree {
    /// Requests that begin like others, in an order in which those of every node are neighbours.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// All nodes, children before parents.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The node that a node's columns follow.
    pub fn parent(&self, node: &Node) -> Option<&Node> {
        self.nodes.get(node.parent as usize)
    }

    /// Where a node's columns begin.
    pub fn begin(&self, node: &Node) -> Place {
        self.parent(node).map_or(Place::default(), |parent| parent.end)
    }

    /// Columns of a node.
    pub fn columns(&self, node: &Node) -> u32 {
        node.end.column - self.begin(node).column
    }

    /// Forgets the tree.
    pub fn clear(&mut self) {
        self.members.clear();
        self.nodes.clear();
    }

    /// Finds the tree of a batch.
    pub fn find(&mut self, batch: &Batch) {
        self.clear();
        self.first_slots.clear();
        for (request, index) in batch.requests().iter().zip(0u64..) {
            if shareable(request, batch.mask()) > 0 {
                self.first_slots.push(u64::from(batch.runs_of(request)[0].first_slot) << 32 | index);
            }
        }
        self.first_slots.sort_unstable();
        for alike in self.first_slots.chunk_by(|a, b| a >> 32 == b >> 32).filter(|alike| alike.len() > 1) {
            let begin = self.members.len();
            let member = |&first_slot: &u64| Member { request: first_slot as u32, common: Place::default(), next: NO_SLOT };
            self.members.extend(alike.iter().map(member));
            self.unsorted.push((begin..self.members.len(), Place::default()));
        }
        while let Some((range, place)) = self.unsorted.pop() {
            self.sort(batch, range, place);
        }
        self.make_nodes();
    }

    /// Sorts members, which are alike up to `place` and one slot more, by how far they are like the first of them.
    fn sort(&mut self, batch: &Batch, range: Range<usize>, place: Place) {
        let members = &mut self.members[range.clone()];
        // Requests that come later often go on where earlier ones end: one in the middle divides them best. Only the order of
        // requests changes, not how far the first member is like the one before.
        let middle = members.len() / 2;
        let (first, rest) = members.split_at_mut(1);
        std::mem::swap(&mut first[0].request, &mut rest[middle - 1].request);
        let request = |member: &Member| &batch.requests()[member.request as usize];
        let first = request(&first[0]);
        for member in &mut *rest {
            let (runs, other) = (batch.runs_of(first), request(member));
            let own = shareable(other, batch.mask());
            member.common = common(runs, batch.runs_of(other), place, own.min(shareable(first, batch.mask())));
            member.next = if member.common.column < own { next_slot(batch.runs_of(other), member.common) } else { NO_SLOT };
        }
        rest.sort_unstable_by_key(|member| (Reverse(member.common.column), member.next, member.request));
        let mut begin = range.start + 1;
        for alike in rest.chunk_by(|a, b| (a.common.column, a.next) == (b.common.column, b.next)) {
            if alike.len() > 1 && alike[0].next != NO_SLOT {
                self.unsorted.push((begin..begin + alike.len(), alike[0].common));
            }
            begin += alike.len();
        }
    }

    /// Makes the nodes of sorted members: where neighbours have less in common than those before, nodes end.
    fn make_nodes(&mut self) {
        for index in 1..=self.members.len() {
            let common = self.members.get(index).map_or(Place::default(), |member| member.common);
            let (mut begin, mut first_descendant) = (index - 1, self.nodes.len() as u32);
            while let Some(mut node) = self.open.pop_if(|node| node.end.column > common.column) {
                node.members.end = index;
                (begin, first_descendant) = (node.members.start, node.first_descendant);
                self.close(node);
            }
            if common.column > self.open.last().map_or(0, |node| node.end.column) {
                self.open.push(Node { members: begin..begin, end: common, parent: NO_NODE, first_descendant });
            }
        }
    }

    /// Appends a node, which becomes the parent of its descendants that have none.
    fn close(&mut self, node: Node) {
        let index = self.nodes.len() as u32;
        let mut child = index;
        while child > node.first_descendant {
            child -= 1;
            let first_descendant = &mut self.nodes[child as usize];
            first_descendant.parent = index;
            child = first_descendant.first_descendant;
        }
        self.nodes.push(node);
    }
}

/// Leading columns of a request that it may share: those that all of its query tokens see, and none of them brings.
fn shareable(request: &Request, mask: Mask) -> u32 {
    match mask {
        _ if request.query_len == 0 => 0,
        // The query tokens of one request do not see the same of what comes before.
        Mask::Window(_) => 0,
        Mask::Causal => request.kv_len - request.query_len,
        Mask::None => request.kv_len,
    }
}

/// Where the slots of `a` and `b` part, which are the same up to `from`; at column `limit` at the latest.
///
/// No two adjoining runs of a request could be one, so what is alike is in runs that begin at the same columns.
fn common(a: &[KvRun], b: &[KvRun], from: Place, limit: u32) -> Place {
    let mut common = from;
    let (mut run, mut column) = (from.run as usize, from.run_column);
    let chunks = a[run..].as_chunks::<CHUNK>().0.iter().zip(b[run..].as_chunks::<CHUNK>().0);
    for (a, b) in chunks {
        let (mut difference, mut columns) = (0, 0);
        for (a, b) in a.iter().zip(b) {
            difference |= (a.first_slot ^ b.first_slot) | (a.num_slots ^ b.num_slots);
            columns += a.num_slots;
        }
        if difference != 0 || column + columns > limit {
            break;
        }
        (run, column) = (run + CHUNK, column + columns);
        common = Place { column, run: run as u32 - 1, run_column: column - a[CHUNK - 1].num_slots };
    }
    for (a, b) in a[run..].iter().zip(&b[run..]) {
        if a.first_slot != b.first_slot || column == limit {
            break;
        }
        let same = a.num_slots.min(b.num_slots).min(limit - column);
        common = Place { column: column + same, run: run as u32, run_column: column };
        if a.num_slots != b.num_slots || same < a.num_slots {
            break;
        }
        (run, column) = (run + 1, column + same);
    }
    common
}

/// The slot of a place, which is not the end of the runs.
fn next_slot(runs: &[KvRun], place: Place) -> u32 {
    let run = &runs[place.run as usize];
    if place.skip() < run.num_slots { run.first_slot + place.skip() } else { runs[place.run as usize + 1].first_slot }
}

#[cfg(test)]
mod tests {
    use packinfer_batch::{AttentionShape, DType};
    use proptest::prelude::*;

    use super::*;

    /// Requests in runs of few slots, many of which begin alike and part within a run.
    fn any_batch() -> impl Strategy<Value = Batch> {
        let few = prop::collection::vec((0..2u32, 1..5u32), 1..8);
        let runs = (prop::sample::select(vec![0, 15, 16, 40]), few).prop_map(|(alike, runs)| {
            let alike = (0..alike).map(|run| (2 + run, 1));
            alike.chain(runs).collect::<Vec<_>>()
        });
        let requests = prop::collection::vec((0..3u32, runs), 0..40);
        (any::<bool>(), requests).prop_map(|(causal, requests)| {
            let shape = AttentionShape::new(1, 1, 128, DType::Bf16).expect("a good shape");
            let mut batch = Batch::new(shape, if causal { Mask::Causal } else { Mask::None });
            for (query_len, runs) in requests {
                let runs = runs.into_iter().map(|(run, num_slots)| KvRun { first_slot: 4 * run, num_slots });
                let kv_len = runs.clone().map(|run| run.num_slots).sum::<u32>();
                batch.push_runs(query_len.min(kv_len), kv_len, runs).expect("a good request");
            }
            batch
        })
    }

    /// The slots that a request may share.
    fn slots(batch: &Batch, request: u32) -> Vec<u32> {
        let request = &batch.requests()[request as usize];
        let all = batch.runs_of(request).iter().flat_map(|run| run.first_slot..run.first_slot + run.num_slots);
        all.take(shareable(request, batch.mask()) as usize).collect()
    }

    proptest! {
        /// Any two requests have in common what the smallest node with both says, at the places that it says.
        #[test]
        fn nodes_are_what_requests_have_in_common(batch in any_batch()) {
            let mut tree = PrefixTree::default();
            tree.find(&batch);
            let member_of = |request| tree.members().iter().position(|member| member.request == request);
            for a in 0..batch.requests().len() as u32 {
                for b in 0..a {
                    let [a_slots, b_slots] = [a, b].map(|request| slots(&batch, request));
                    let common = a_slots.iter().zip(&b_slots).take_while(|(a, b)| a == b).count();
                    let both = |node: &&Node| {
                        [a, b].into_iter().all(|request| member_of(request).is_some_and(|member| node.members.contains(&member)))
                    };
                    let node = tree.nodes().iter().find(both); // children come first
                    prop_assert_eq!(node.map_or(0, |node| node.end.column), common as u32, "{} and {}", a, b);
                }
            }
            for node in tree.nodes() {
                prop_assert!(node.members.len() > 1 && tree.columns(node) > 0);
                prop_assert!(tree.parent(node).is_none_or(|parent| parent.members.start <= node.members.start));
                prop_assert!(tree.parent(node).is_none_or(|parent| node.members.end <= parent.members.end));
                for member in &tree.members()[node.members.clone()] {
                    let runs = batch.runs_of(&batch.requests()[member.request as usize]);
                    let before = runs[..node.end.run as usize].iter().map(|run| run.num_slots).sum::<u32>();
                    prop_assert_eq!(before, node.end.run_column);
                    prop_assert!(node.end.skip() > 0 && node.end.skip() <= runs[node.end.run as usize].num_slots);
                }
            }
        }
    }
}
