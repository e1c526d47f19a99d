//! Opening a trace of either format.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use crate::{TraceError, TraceRequest, azure, mooncake};

/// A trace format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Azure LLM inference trace of 2023, CSV.
    Azure,
    /// Mooncake, JSON lines.
    Mooncake,
}

impl Format {
    /// The format that a file's first bytes are in: a JSON object, or the CSV header.
    fn detect(beginning: &[u8]) -> Option<Self> {
        let beginning = beginning.trim_ascii_start();
        let header = azure::HEADER[0].as_bytes();
        if beginning.starts_with(b"{") {
            Some(Self::Mooncake)
        } else if beginning.get(..header.len()).is_some_and(|start| start.eq_ignore_ascii_case(header)) {
            Some(Self::Azure)
        } else {
            None
        }
    }

    /// The format that a file's name claims.
    fn of_extension(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()? {
            "csv" => Some(Self::Azure),
            "jsonl" | "json" | "ndjson" => Some(Self::Mooncake),
            _ => None,
        }
    }
}

/// The requests of a trace file, in order. After an error it ends.
pub struct TraceReader {
    path: PathBuf,
    format: Format,
    records: Option<Box<Records>>,
}

/// Requests, or the number of a line and what is wrong with it.
type Records = dyn Iterator<Item = Result<TraceRequest, (u64, String)>> + Send;

impl TraceReader {
    /// Opens a trace. Its format is told by its first bytes; an empty file's by its extension.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or is in neither format.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, TraceError> {
        let path = path.into();
        let io_error = |error| TraceError::Io { path: path.clone(), error };
        let mut reader = BufReader::new(File::open(&path).map_err(io_error)?);
        let beginning = reader.fill_buf().map_err(io_error)?;
        let detected = if beginning.is_empty() { Format::of_extension(&path) } else { Format::detect(beginning) };
        let Some(format) = detected else { return Err(TraceError::UnknownFormat { path }) };
        Ok(Self::with_format(reader, format, path))
    }

    /// Reads a trace of a known format from anywhere; `path` is what error messages call it.
    pub fn with_format(reader: impl BufRead + Send + 'static, format: Format, path: impl Into<PathBuf>) -> Self {
        let records: Box<Records> = match format {
            Format::Azure => Box::new(azure::Records::new(reader)),
            Format::Mooncake => Box::new(mooncake::Records::new(reader)),
        };
        Self { path: path.into(), format, records: Some(records) }
    }

    /// The format of the file.
    pub fn format(&self) -> Format {
        self.format
    }
}

impl Iterator for TraceReader {
    type Item = Result<TraceRequest, TraceError>;

    fn next(&mut self) -> Option<Self::Item> {
        let result = self.records.as_mut()?.next();
        if !matches!(result, Some(Ok(_))) {
            self.records = None;
        }
        Some(result?.map_err(|(line, reason)| TraceError::BadLine { path: self.path.clone(), line, reason }))
    }
}
