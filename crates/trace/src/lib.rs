//! Traces of LLM serving: readers of public formats, and their replay against a KV pool.
//!
//! [`TraceReader`] opens a file of either format and iterates over its [`TraceRequest`]s: when each arrived, how many tokens
//! its prompt and its answer had, and, where the trace says so, which blocks of the prompt have which content.
//! [`TraceSummary`] adds them up; [`kv_sim`] replays them against a pool alone, [`decode_replay`] for a device to do the work.
//!
//! | format | told by | has |
//! | --- | --- | --- |
//! | Azure LLM inference trace 2023 | CSV header `TIMESTAMP,ContextTokens,GeneratedTokens` | lengths |
//! | Mooncake | JSON object a line: `timestamp`, `input_length`, `output_length`, `hash_ids` | lengths, content ids of blocks |
//!
//! ```
//! use std::io::Cursor;
//! use packinfer_trace::{Format, TraceReader, TraceSummary};
//!
//! let lines = r#"{"timestamp": 0, "input_length": 700, "output_length": 20, "hash_ids": [4, 5]}
//! {"timestamp": 12, "input_length": 900, "output_length": 30, "hash_ids": [4, 6]}"#;
//! let requests: Vec<_> = TraceReader::with_format(Cursor::new(lines), Format::Mooncake, "two lines").collect::<Result<_, _>>()?;
//! assert_eq!(requests[1].blocks, [4, 6]);
//! assert_eq!(TraceSummary::of(&requests).reuse(), 0.25); // one of four blocks was there before
//! # Ok::<(), packinfer_trace::TraceError>(())
//! ```

mod azure;
pub mod decode_replay;
mod error;
pub mod kv_sim;
mod mooncake;
mod reader;
mod replay;
mod request;
mod summary;

pub use error::{PlotError, TraceError};
pub use reader::{Format, TraceReader};
pub use request::{BLOCK_TOKENS, TraceRequest};
pub use summary::TraceSummary;
