//! What can be wrong with a request to a KV pool on the device.

use packinfer_batch::{DType, KvDType, RopeError};
use packinfer_kv::SlotCopy;

/// Copies of slots or new tokens that do not fit the pool. Nothing was given to the device then.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum KvMemoryError {
    /// An arena of nothing, or one whose bytes cannot be counted.
    #[error("an arena of {num_layers} layers with {num_slots} slots: it needs at least one of each, and at most 2^63 bytes")]
    BadArena {
        /// Layers asked for.
        num_layers: u32,
        /// Slots asked for.
        num_slots: u32,
    },
    /// Element types of an arena that its shape does not have.
    #[error(
        "an arena with new tokens in {found} and K and V in \"{kv_found}\", for a shape of {needed} and \"{kv_needed}\": they must be the same"
    )]
    ElementTypes {
        /// Type of new tokens.
        found: DType,
        /// Type of K and V.
        kv_found: KvDType,
        /// Type of Q and O in the shape.
        needed: DType,
        /// Type of K and V in the shape.
        kv_needed: KvDType,
    },
    /// A layer that the arena does not have.
    #[error("layer {layer} of an arena with {num_layers}: they are numbered from 0")]
    NoSuchLayer {
        /// The layer asked for.
        layer: u32,
        /// Layers that there are.
        num_layers: u32,
    },
    /// A copy that reaches past the last slot.
    #[error("copy {index} is of {num_slots} slots from {from} to {to}, but the pool has {pool_slots}",
        num_slots = .copy.num_slots, from = .copy.from, to = .copy.to)]
    CopyOutOfRange {
        /// Its index in the list.
        index: usize,
        /// The copy.
        copy: SlotCopy,
        /// Slots of the pool.
        pool_slots: u32,
    },
    /// A slot that two copies of a list write.
    #[error("slot {slot} is the target of two copies of the list: which is last cannot be said")]
    TargetTwice {
        /// The first such slot.
        slot: u32,
    },
    /// A slot that one copy of a list reads, and one writes.
    #[error("slot {slot} is read by one copy of the list and written by one: copy in two lists, one after the other")]
    SourceIsTarget {
        /// The first such slot.
        slot: u32,
    },
    /// Copies that were listed for an arena of another form.
    #[error(
        "the copies were listed for {num_slots} slots of {slot_bytes} bytes, and the arena has {arena_slots} of {arena_slot_bytes}"
    )]
    OtherArena {
        /// Slots that the copies were checked for.
        num_slots: u32,
        /// Bytes of their slots, in one pool.
        slot_bytes: u64,
        /// Slots of the arena.
        arena_slots: u32,
        /// Bytes of one of them, in one pool.
        arena_slot_bytes: u64,
    },
    /// A position is missing, or one too many.
    #[error("{slots} slots with {positions} positions: each new token has one of both")]
    PositionsLength {
        /// Slots that were given.
        slots: usize,
        /// Positions that were given.
        positions: usize,
    },
    /// A token whose slot the pool does not have.
    #[error("token {token} goes to slot {slot}, but the pool has {num_slots}")]
    SlotOutOfRange {
        /// Index of the token.
        token: usize,
        /// Its slot.
        slot: u32,
        /// Slots of the pool.
        num_slots: u32,
    },
    /// A slot that two tokens go to.
    #[error("two tokens go to slot {slot}: each needs one of its own")]
    SlotTwice {
        /// The slot.
        slot: u32,
    },
    /// Slots that were checked for a larger pool.
    #[error("the tokens' slots were checked for a pool of {found} slots, and the arena has {num_slots}")]
    OtherPool {
        /// Slots that they were checked for.
        found: u32,
        /// Slots of the arena.
        num_slots: u32,
    },
    /// New K or V, or scales, with another number of elements than there should be.
    #[error("{tensor} has {found} elements, and {needed} are needed: {shape}")]
    Length {
        /// The tensor.
        tensor: &'static str,
        /// Its shape.
        shape: &'static str,
        /// Its elements.
        found: u64,
        /// Elements that it should have.
        needed: u64,
    },
    /// RoPE that cannot be done.
    #[error(transparent)]
    Rope(#[from] RopeError),
    /// Copies for a mover that has not finished others.
    #[error("the mover has {moves} moves that are not finished: start others when it is not busy")]
    MoverBusy {
        /// Moves under way.
        moves: usize,
    },
    /// More thread blocks than a launch can have.
    #[error("{what} needs {blocks} thread blocks, and a launch has at most {most}: divide the list")]
    TooManyBlocks {
        /// What was asked for.
        what: &'static str,
        /// Blocks that it needs.
        blocks: u64,
        /// The limit.
        most: u32,
    },
}
