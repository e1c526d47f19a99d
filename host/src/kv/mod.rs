//! KV pools on the device: their memory, copies of slots, and new tokens.
//!
//! A [`KvArena`] has K and V of all layers, whose slots are numbered alike. [`Engine::kv_append`](crate::Engine::kv_append)
//! writes a step's new tokens into their slots of one layer, turned by RoPE ([`DeviceRope`]) and rounded to FP8 if that is asked
//! for; [`AppendSlots`] says where they go, once for all layers. [`Engine::kv_move`](crate::Engine::kv_move) copies slots in all
//! layers, as [`SlotCopies`] lists them. Both are one launch. A [`KvMover`] moves requests beside the steps.

mod append;
mod arena;
mod copies;
mod error;
mod mover;
mod slots;

pub use append::{DeviceRope, KvAppend};
pub use arena::KvArena;
pub use copies::SlotCopies;
pub use error::KvMemoryError;
pub use mover::KvMover;
pub use slots::AppendSlots;
