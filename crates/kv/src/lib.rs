//! Where the KV of requests lies: a pool of slots, a tree of shared prefixes, and the policy that keeps KV contiguous.
//!
//! Nothing here touches a GPU: the crate hands out slot numbers and says what to copy where. One numbering serves all layers.
//!
//! # Flow of data
//!
//! A request arrives: [`PrefixTree::start`] finds how much of its prompt is in the pool and makes a [`Branch`], whose
//! [`Sequence`] begins with those slots. [`PrefixTree::append`] makes room for the rest, [`Sequence::runs`] says where it is,
//! as the [`KvRun`]s that a batch is made of. Computed blocks go into the tree with [`PrefixTree::insert`]. Every step appends
//! a token; a [`Policy`] says with how much headroom, and when moving the request's KV to one extent pays:
//! [`Sequence::begin_move`], copy on the device, [`Sequence::commit_move`]. A finished request leaves its blocks in the tree,
//! until their slots are needed.
//!
//! ```
//! use packinfer_kv::{Growth, KvRun, PrefixTree, SlotPool};
//!
//! let mut pool = SlotPool::new(4096, 16)?;
//! let mut tree = PrefixTree::<[u32]>::new(64)?;
//!
//! // A prompt of two blocks is computed and put into the tree.
//! let prompt: Vec<u32> = (0..128).collect();
//! let mut first = tree.start(&mut pool, prompt.chunks(64))?;
//! tree.append(&mut pool, &mut first, 128, Growth::Contiguous { headroom: 0 })?;
//! tree.insert(&mut pool, &mut first, prompt.chunks(64))?;
//!
//! // Another one begins with the same block: only the rest has to be computed, into slots of its own.
//! let other: Vec<u32> = (0..64).chain(1000..1010).collect();
//! let mut second = tree.start(&mut pool, other.chunks(64))?;
//! assert_eq!(second.prefix().tokens, 64);
//! tree.append(&mut pool, &mut second, 10, Growth::Contiguous { headroom: 20 })?;
//! let runs = second.kv.runs(&pool)?;
//! assert_eq!(runs, [KvRun { first_slot: 0, num_slots: 64 }, KvRun { first_slot: 128, num_slots: 10 }]);
//! assert_eq!(pool.usage().used, 128 + 32); // 30 slots of its own, in whole pages
//!
//! tree.finish(&mut pool, first)?;
//! tree.finish(&mut pool, second)?;
//! # Ok::<(), packinfer_kv::KvError>(())
//! ```
//!
//! # Principal types
//!
//! - [`SlotPool`]: the arena. It hands out [`Extent`]s, which are pages or any number of contiguous ones, counts their owners,
//!   and refuses what does not fit or is not the caller's.
//! - [`Sequence`]: the KV of one request, which grows, forks, shares slots with others and copies a page before it writes to
//!   what others own.
//! - [`PrefixTree`]: blocks of tokens that own slots, found by the tokens themselves or by hashes, evicted when slots run out.
//! - [`Policy`]: pages, or contiguous extents with headroom, for [one request](Sequence::reorganize) or for
//!   [a group](SlotPool::reorganize_group) side by side. A group is looked at when a [`Trigger`] gives cause; [`balance_groups`]
//!   evens out groups of different length.
//!
//! # Moves and epochs
//!
//! The host plans ahead of the device, so slots that a request has left may still be read. A plan remembers the
//! [`Epoch`] in which it was made. Committing a move ends the epoch: plans made from then on see the new place, those made
//! before find the old one untouched until [`SlotPool::retire`] says that they have run. What is freed without a move is free
//! at once: the stream that runs the plans runs those that reuse the slots later.

mod error;
mod free_spans;
mod group;
mod layout;
mod moves;
mod pool;
mod sequence;
mod tree;

pub use error::KvError;
pub use group::{GroupMember, GroupMove, GroupState, Trigger, balance_groups, imbalance};
pub use layout::{Contiguous, ExpectedTokens, Policy, Reason, Situation};
pub use moves::{Filled, Move, SlotCopy};
pub use packinfer_abi::KvRun;
pub use pool::{Epoch, Extent, SlotPool, Usage};
pub use sequence::{Growth, Sequence, SequenceMove};
pub use tree::{Appended, Branch, Evicted, NodeId, Prefix, PrefixTree};
