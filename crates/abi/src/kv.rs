//! What the kernels that write to KV pools read: copies of slots, and new tokens.

use crate::DeviceAddress;

/// Threads of a block of the kernel that copies slots: four warps, each of which copies a [`KvCopyPiece`].
pub const KV_MOVE_THREADS: u32 = 128;
/// Threads of a block of the kernel that appends tokens.
pub const KV_APPEND_THREADS: u32 = 128;
/// Bytes of a vector: what a thread loads and stores at a time.
pub const VECTOR_BYTES: u32 = 16;
/// The most vectors of a [`KvCopyPiece`], 4 KiB of them: eight for each lane of a warp, all in flight at a time.
pub const PIECE_VECTORS: u32 = 256;

/// A part of a copy of consecutive slots, which a warp copies: it is done in every pool.
#[repr(C, align(16))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvCopyPiece {
    /// The slot that its first vector to read is in.
    pub from_slot: u32,
    /// The slot that its first vector to write is in.
    pub to_slot: u32,
    /// Vectors of those slots before them.
    pub skip: u32,
    /// Vectors to copy, 1 to [`PIECE_VECTORS`].
    pub num_vectors: u32,
}

/// Parameters of the kernel that copies slots. Thread block `b` copies four pieces, from piece `4 (b % groups)` on, in pool
/// `b / groups`, where `groups` is a quarter of the pieces, rounded up.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct KvMoveParams {
    /// The first pool.
    pub pools: DeviceAddress,
    /// Bytes from one pool to the next.
    pub pool_bytes: u64,
    /// [`KvCopyPiece`]s, at an address that is a multiple of their size.
    pub pieces: DeviceAddress,
    /// Number of pieces.
    pub num_pieces: u32,
    /// Vectors of a slot.
    pub slot_vectors: u32,
}

/// Threads of a block of the kernel that makes K and V in FP8 what Q is.
pub const KV_WIDEN_THREADS: u32 = 128;
/// The most slots of a [`KvWidenPiece`].
pub const WIDEN_PIECE_SLOTS: u32 = 16;
/// Elements that a thread of that kernel makes at a time.
pub const WIDEN_ELEMENTS: u32 = 8;

/// Consecutive slots in FP8 that a block makes numbers of another type of, of K or of V.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvWidenPiece {
    /// The first one that is read, numbered as those of a [`KvRun`](crate::KvRun).
    pub from_slot: u32,
    /// The first one that is written.
    pub to_slot: u32,
    /// How many, 1 to [`WIDEN_PIECE_SLOTS`].
    pub num_slots: u32,
}

/// Parameters of the kernel that makes K and V in FP8 what Q is. Thread block `b` does piece `b / 2`, of K if `b` is even, else of
/// V.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct KvWidenParams {
    /// K and V in FP8, as in [`AttentionParams`](crate::AttentionParams).
    pub from: [DeviceAddress; 2],
    /// K and V in the type of Q, `[slots, num_kv_heads, head_dim]`.
    pub to: [DeviceAddress; 2],
    /// [`KvWidenPiece`]s.
    pub pieces: DeviceAddress,
    /// KV heads.
    pub num_kv_heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// Bytes from a slot in FP8 to the next.
    pub from_slot_bytes: u32,
    /// Bytes from a head of such a slot to the next.
    pub from_head_bytes: u32,
}

/// Which elements of a head RoPE turns together, where it turns `rotary_dim` of them.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RopeLayout {
    /// Elements `i` and `i + rotary_dim / 2`, as GPT-NeoX and Llama do.
    HalfSplit = 0,
    /// Elements `2 i` and `2 i + 1`, as GPT-J does.
    Interleaved = 1,
}

/// Parameters of the kernel that appends tokens. A thread makes a vector of a slot; see [`Self::blocks_per_token`].
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct KvAppendParams {
    /// New K, `[tokens, num_kv_heads, head_dim]`.
    pub k: DeviceAddress,
    /// New V, like K.
    pub v: DeviceAddress,
    /// K of the layer, `[slots, num_kv_heads, head_dim]`.
    pub k_pool: DeviceAddress,
    /// V of the layer, like K.
    pub v_pool: DeviceAddress,
    /// The slot of each new token, `u32`.
    pub slots: DeviceAddress,
    /// The position of each new token, `u32`.
    pub positions: DeviceAddress,
    /// How far RoPE turns each pair of elements a position, `[rotary_dim / 2]` `u64`, in 2^−64 of a turn; or zero, for no RoPE.
    pub frequencies: DeviceAddress,
    /// What K is divided by where it is stored in FP8, `[num_kv_heads]` float32; or zero, for 1.
    pub k_scales: DeviceAddress,
    /// As `k_scales`, of V.
    pub v_scales: DeviceAddress,
    /// KV heads.
    pub num_kv_heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// Leading elements of a head of K that RoPE turns, an even number.
    pub rotary_dim: u32,
    /// Which of them it turns together.
    pub rope_layout: RopeLayout,
}

impl KvAppendParams {
    /// Vectors of a slot of K, and as many of V, where one has `vector_elements` elements.
    #[inline(always)]
    pub const fn slot_vectors(&self, vector_elements: u32) -> u32 {
        // A shift, as vectors have a power of two of elements: no division that could panic in device code.
        (self.num_kv_heads * self.head_dim) >> vector_elements.trailing_zeros()
    }

    /// Thread blocks of each token. Their threads make its vectors of K, then those of V.
    #[inline(always)]
    pub const fn blocks_per_token(&self, vector_elements: u32) -> u32 {
        (2 * self.slot_vectors(vector_elements)).div_ceil(KV_APPEND_THREADS)
    }
}
