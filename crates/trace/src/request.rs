//! One request of a trace.

use serde::{Deserialize, Serialize};

/// A request as a serving system received it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceRequest {
    /// When it arrived, in milliseconds since the trace began.
    pub arrival_ms: u64,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens of the answer.
    pub output_tokens: u32,
    /// Content ids of the prompt's blocks of [`BLOCK_TOKENS`] tokens, the last of which may be partly filled: equal ids after
    /// equal ids are equal content. Empty if the trace does not say.
    pub blocks: Vec<u64>,
}

/// Tokens of the blocks that [`TraceRequest::blocks`] names.
pub const BLOCK_TOKENS: u32 = 512;
