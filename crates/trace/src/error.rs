//! What can be wrong with a trace.

use std::io;
use std::path::PathBuf;

/// A trace that cannot be read. Every message names the file, and the line where there is one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TraceError {
    /// The file cannot be opened or read.
    #[error("cannot read the trace {}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The file is neither of the known formats.
    #[error(
        "{} is not a trace: expected CSV with the header TIMESTAMP,ContextTokens,GeneratedTokens, or JSON lines with {}",
        path.display(),
        "timestamp, input_length, output_length and hash_ids"
    )]
    UnknownFormat {
        /// The file.
        path: PathBuf,
    },
    /// A line cannot be understood.
    #[error("{}:{line}: {reason}", path.display())]
    BadLine {
        /// The file.
        path: PathBuf,
        /// Number of the line, from 1.
        line: u64,
        /// What is wrong with it.
        reason: String,
    },
}

/// A plot that could not be drawn or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot draw the plot: {0}")]
pub struct PlotError(pub(crate) String);
