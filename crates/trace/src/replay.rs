//! What both replays reckon with.

/// Answers are expected to be this long, in tokens, until some have been seen.
pub(crate) const FIRST_EXPECTATION: u32 = 256;

/// Steps between two looks at whether a request's KV should be moved, besides whenever its room is used up.
pub(crate) const REVIEW_STEPS: u32 = 64;
