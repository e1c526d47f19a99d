//! The Mooncake traces: JSON lines with `timestamp` in milliseconds, `input_length`, `output_length`, and `hash_ids` of blocks
//! of 512 tokens.

use std::io::BufRead;

use serde::Deserialize;

use crate::request::{BLOCK_TOKENS, TraceRequest};

#[derive(Deserialize)]
struct Line {
    timestamp: u64,
    input_length: u32,
    output_length: u32,
    #[serde(default)]
    hash_ids: Vec<u64>,
}

/// Reads records; an error is the line's number and what is wrong with it.
pub(crate) struct Records<R> {
    reader: R,
    line: u64,
    text: String,
}

impl<R: BufRead> Records<R> {
    pub fn new(reader: R) -> Self {
        Self { reader, line: 0, text: String::new() }
    }

    fn parse(&self) -> Result<TraceRequest, String> {
        let line: Line = serde_json::from_str(&self.text).map_err(|error| {
            // The error's own line is always 1 here; the column is what helps.
            let column = error.column();
            let text = error.to_string();
            let reason = text.split(" at line ").next().unwrap_or(&text);
            format!("column {column}: {reason}")
        })?;
        let blocks = line.input_length.div_ceil(BLOCK_TOKENS) as usize;
        if !line.hash_ids.is_empty() && line.hash_ids.len() != blocks {
            let found = line.hash_ids.len();
            return Err(format!(
                "{found} hash_ids for {} input tokens: expected {blocks}, one for {BLOCK_TOKENS}",
                line.input_length
            ));
        }
        Ok(TraceRequest {
            arrival_ms: line.timestamp,
            prompt_tokens: line.input_length,
            output_tokens: line.output_length,
            blocks: line.hash_ids,
        })
    }
}

impl<R: BufRead> Iterator for Records<R> {
    type Item = Result<TraceRequest, (u64, String)>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            self.text.clear();
            self.line += 1;
            match self.reader.read_line(&mut self.text) {
                Ok(0) => return None,
                Ok(_) if self.text.trim().is_empty() => {}
                Ok(_) => return Some(self.parse().map_err(|reason| (self.line, reason))),
                Err(error) => return Some(Err((self.line, error.to_string()))),
            }
        }
    }
}
