//! Which KV that several requests begin with is read once for all of them.
//!
//! Reading the columns of a node of the [prefix tree](crate::prefix) once saves bytes, and costs work items, partial results and
//! a merge. What is not read at a node is left to its children and the requests, which then read longer. So the time of all that
//! is below a node is a function of the number of columns that are left to it from above: the least of two lines, one for reading
//! them at the node, one for leaving them to what is below. One pass from the leaves up finds the lines, one from the root down
//! takes the lower of them.

use std::ops::Range;

use packinfer_abi::HeadGroups;
use packinfer_batch::Batch;

use crate::cost::{CostModel, Line};
use crate::prefix::{Node, Place, PrefixTree};
use crate::tile::{Division, Own};

/// The most groups that a request is in, on average: so the plan of any tree has a size in proportion to the batch's.
const MOST_GROUPS: usize = 16;
/// What being in a group is made to cost more at first where groups are too many.
const LEAST_PENALTY_NS: f64 = 100.0;

/// Requests that read some columns together.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    /// The requests, as a range of [`Sharing::members`].
    members: Range<usize>,
    pub begin: Place,
    pub end: Place,
}

/// What a node and all that is below it take, by the number of columns that are left to it from above.
#[derive(Clone, Copy, Debug, Default)]
struct Choice {
    /// If it reads them, and its own, for all of its requests.
    shared: Line,
    /// If it leaves them, and its own, to what is below.
    apart: Line,
    /// What is below takes so much if nothing is left to it.
    below_ns: f64,
    /// Where that ends which is read here or above.
    read_to: Place,
}

impl Choice {
    fn is_shared(&self, columns: u32) -> bool {
        self.shared.at(columns) < self.apart.at(columns)
    }

    /// What so many columns take, and what each further one would.
    fn least(&self, columns: u32) -> Line {
        let line = if self.is_shared(columns) { self.shared } else { self.apart };
        Line { fixed_ns: line.at(columns), ..line }
    }
}

/// What the requests of a batch read together, and what by themselves. It keeps its memory from batch to batch.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sharing {
    tree: PrefixTree,
    /// What the tree's members before each of them have together.
    before: Vec<Apart>,
    /// For each node of the tree.
    choices: Vec<Choice>,
    groups: Vec<Group>,
    /// Requests of all groups, group after group, in the order of the batch.
    members: Vec<u32>,
    /// About what the groups take.
    groups_ns: f64,
    /// For each request where its own columns begin; nothing if none are shared.
    own: Vec<Place>,
}

/// Some requests, each of which reads by itself.
#[derive(Clone, Copy, Debug, Default)]
struct Apart {
    query_tokens: u32,
    /// What a column takes them.
    column_ns: f64,
}

impl Sharing {
    /// Finds what the requests of a batch have in common, and says by how many KV tokens it is less to read that once. Nothing is
    /// shared yet.
    pub fn find(&mut self, batch: &Batch) -> u64 {
        self.share_nothing();
        self.tree.find(batch);
        let repeated = |node: &Node| (node.members.len() as u64 - 1) * u64::from(self.tree.columns(node));
        self.tree.nodes().iter().map(repeated).sum()
    }

    /// As [`Self::find`] where requests have nothing in common.
    pub fn find_nothing(&mut self) -> u64 {
        self.share_nothing();
        self.tree.clear();
        0
    }

    /// Has every request read all of its columns by itself.
    pub fn share_nothing(&mut self) {
        self.groups.clear();
        self.members.clear();
        self.groups_ns = 0.0;
        self.own.clear();
    }

    /// Shares what then takes less time, and says whether anything is shared.
    pub fn choose(&mut self, batch: &Batch, heads: HeadGroups, cost: &CostModel) -> bool {
        self.share_nothing();
        let mut penalty_ns = 0.0;
        self.weigh(batch, heads, cost, penalty_ns);
        while self.decide() > MOST_GROUPS * self.tree.members().len() {
            penalty_ns = LEAST_PENALTY_NS.max(2.0 * penalty_ns);
            self.weigh(batch, heads, cost, penalty_ns);
        }
        self.make_groups(batch, heads, cost);
        !self.groups.is_empty()
    }

    /// Groups with their requests.
    pub fn groups(&self) -> impl Iterator<Item = (&Group, &[u32])> {
        self.groups.iter().map(|group| (group, &self.members[group.members.clone()]))
    }

    /// About what the groups take.
    pub fn groups_ns(&self) -> f64 {
        self.groups_ns
    }

    /// What a request reads by itself.
    pub fn own<'a>(&self, batch: &'a Batch, request: u32) -> Own<'a> {
        let begin = self.own.get(request as usize).copied().unwrap_or_default();
        Own { request: &batch.requests()[request as usize], begin }
    }

    /// Finds the lines of all nodes, children before parents. To be in a group takes a request `penalty_ns` more than it does.
    fn weigh(&mut self, batch: &Batch, heads: HeadGroups, cost: &CostModel, penalty_ns: f64) {
        self.before.clear();
        let mut before = Apart::default();
        self.before.push(before);
        for member in self.tree.members() {
            let query_len = batch.requests()[member.request as usize].query_len;
            before.query_tokens += query_len;
            before.column_ns += cost.shared(Division::of(query_len, heads)).column_ns;
            self.before.push(before);
        }
        self.choices.clear();
        self.choices.resize(self.tree.nodes().len(), Choice::default());
        for (index, node) in self.tree.nodes().iter().enumerate() {
            let columns = self.tree.columns(node);
            let requests = self.requests_of(node);
            let tiles = cost.shared(Division::of(requests.query_tokens, heads));
            // All requests of the node that are not of a child read by themselves what is left to them.
            let choice = &mut self.choices[index];
            let fixed_ns = tiles.at(columns) + penalty_ns * node.members.len() as f64;
            choice.shared = Line { fixed_ns: fixed_ns + choice.below_ns, ..tiles };
            choice.apart.fixed_ns += f64::from(columns) * requests.column_ns;
            choice.apart.column_ns += requests.column_ns;
            let choice = *choice;
            if let Some(parent) = self.tree.parent(node) {
                let columns = self.tree.columns(parent);
                let least = choice.least(columns);
                let parent = &mut self.choices[node.parent as usize];
                parent.below_ns += choice.least(0).fixed_ns;
                parent.apart.fixed_ns += least.fixed_ns - f64::from(columns) * requests.column_ns;
                parent.apart.column_ns += least.column_ns - requests.column_ns;
            }
        }
    }

    /// Takes the lower line at every node, parents before children. Returns how many members the groups have together.
    fn decide(&mut self) -> usize {
        let mut members = 0;
        for (index, node) in self.tree.nodes().iter().enumerate().rev() {
            let begin = self.read_before(node);
            let choice = &mut self.choices[index];
            let is_shared = choice.is_shared(self.tree.begin(node).column - begin.column);
            choice.read_to = if is_shared { node.end } else { begin };
            members += if is_shared { node.members.len() } else { 0 };
        }
        members
    }

    /// Where that ends which is read above a node.
    fn read_before(&self, node: &Node) -> Place {
        self.choices.get(node.parent as usize).map_or(Place::default(), |parent| parent.read_to)
    }

    /// Makes groups of what was decided, parents before children.
    fn make_groups(&mut self, batch: &Batch, heads: HeadGroups, cost: &CostModel) {
        for (node, choice) in self.tree.nodes().iter().zip(&self.choices).rev() {
            if choice.read_to != node.end {
                continue;
            }
            let begin = self.read_before(node);
            let first = self.members.len();
            self.members.extend(self.tree.members()[node.members.clone()].iter().map(|member| member.request));
            self.members[first..].sort_unstable();
            self.groups.push(Group { members: first..self.members.len(), begin, end: node.end });
            let tiles = cost.shared(Division::of(self.requests_of(node).query_tokens, heads));
            self.groups_ns += tiles.at(node.end.column - begin.column);
            self.own.resize(batch.requests().len(), Place::default());
            for &request in &self.members[first..] {
                self.own[request as usize] = node.end;
            }
        }
    }

    /// What the requests of a node have together.
    fn requests_of(&self, node: &Node) -> Apart {
        let (begin, end) = (self.before[node.members.start], self.before[node.members.end]);
        Apart { query_tokens: end.query_tokens - begin.query_tokens, column_ns: end.column_ns - begin.column_ns }
    }
}
