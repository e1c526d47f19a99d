//! Reading traces of both formats, and what is said about those that cannot be read.

use std::io::Write;
use std::path::Path;

use packinfer_trace::{Format, TraceError, TraceReader, TraceRequest, TraceSummary};
use tempfile::NamedTempFile;

fn file(suffix: &str, content: &str) -> NamedTempFile {
    let mut file = tempfile::Builder::new().suffix(suffix).tempfile().unwrap();
    file.write_all(content.as_bytes()).unwrap();
    file
}

fn read(path: &Path) -> Result<Vec<TraceRequest>, TraceError> {
    TraceReader::open(path)?.collect()
}

/// The message about a trace, without the name of the file.
fn complaint(suffix: &str, content: &str) -> String {
    let file = file(suffix, content);
    let message = read(file.path()).unwrap_err().to_string();
    let name = file.path().display().to_string();
    assert!(message.contains(&name), "{message}");
    message.replace(&name, "FILE")
}

#[test]
fn azure() {
    // The header and line ends as they are published.
    let text = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n\
                2023-11-16 23:59:59.9990000,374,44\r\n\
                2023-11-17 00:00:01.0010000,396,109\r\n\
                2023-11-17 00:01:00,1,0";
    let file = file(".csv", text);
    assert_eq!(TraceReader::open(file.path()).unwrap().format(), Format::Azure);
    let requests = read(file.path()).unwrap();
    let seen: Vec<_> =
        requests.iter().map(|request| (request.arrival_ms, request.prompt_tokens, request.output_tokens)).collect();
    assert_eq!(seen, [(0, 374, 44), (1_002, 396, 109), (60_001, 1, 0)]);
}

#[test]
fn mooncake() {
    let line = |time: u64, tokens: u32, ids: &[u64]| {
        format!("{{\"timestamp\": {time}, \"input_length\": {tokens}, \"output_length\": 5, \"hash_ids\": {ids:?}}}\n")
    };
    let text = [line(0, 1100, &[0, 1, 2]), "\n".into(), line(3000, 1024, &[0, 1]), line(3000, 513, &[9, 1])].concat();
    let file = file(".jsonl", &text);
    assert_eq!(TraceReader::open(file.path()).unwrap().format(), Format::Mooncake);
    let requests = read(file.path()).unwrap();
    assert_eq!((requests[1].arrival_ms, requests[1].prompt_tokens), (3000, 1024));
    let summary = TraceSummary::of(&requests);
    assert_eq!((summary.requests, summary.blocks, summary.distinct_blocks, summary.reused_blocks), (3, 7, 4, 2));
    assert_eq!((summary.prompt_tokens, summary.output_tokens, summary.duration_ms), (2637, 15, 3000));
}

#[test]
fn the_content_tells_the_format() {
    let csv = file(".jsonl", "timestamp,contexttokens,generatedtokens\n2023-11-16 18:15:46,1,2\n");
    assert_eq!(TraceReader::open(csv.path()).unwrap().format(), Format::Azure);
    assert_eq!(read(csv.path()).unwrap().len(), 1);
    let empty = file(".csv", "");
    assert_eq!(read(empty.path()).unwrap(), []);
    assert!(complaint(".txt", "hello").starts_with("FILE is not a trace: expected CSV with the header"));
    assert!(complaint("", "").starts_with("FILE is not a trace"));
}

#[test]
fn missing_files_are_named() {
    let message = read(Path::new("no/such/trace.csv")).unwrap_err().to_string();
    assert!(message.starts_with("cannot read the trace no/such/trace.csv: "), "{message}");
    assert!(read(Path::new(".")).is_err());
}

#[test]
fn bad_lines_are_named() {
    let header = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,1,2\n";
    let csv = |line: &str| complaint(".csv", &format!("{header}{line}\n"));
    assert_eq!(csv("2023-11-16 18:15:46,many,2"), "FILE:3: ContextTokens is \"many\": invalid digit found in string");
    assert_eq!(csv("2023-11-16 18:15:46,1"), "FILE:3: no field GeneratedTokens");
    assert!(csv("yesterday,1,2").starts_with("FILE:3: TIMESTAMP is \"yesterday\": expected a time such as"));
    assert!(csv("2023-11-16 18:15:46,1,-2").contains("GeneratedTokens is \"-2\""));
    let wrong_header = complaint(".csv", "TIMESTAMP,GeneratedTokens,ContextTokens\n");
    assert!(
        wrong_header.starts_with("FILE:1: the header is TIMESTAMP,GeneratedTokens,ContextTokens: expected"),
        "{wrong_header}"
    );

    let good = "{\"timestamp\": 0, \"input_length\": 5, \"output_length\": 5, \"hash_ids\": [1]}\n";
    let json = |line: &str| complaint(".jsonl", &format!("{good}{line}\n"));
    assert_eq!(json("{\"timestamp\": 0, \"input_length\": 5}"), "FILE:2: column 35: missing field `output_length`");
    let cut = json("{\"timestamp\": 0,");
    assert!(cut.starts_with("FILE:2: column ") && cut.contains(": EOF while parsing"), "{cut}");
    assert_eq!(
        json(&good.replace('5', "600").replace("[1]", "[1, 2, 3]")),
        "FILE:2: 3 hash_ids for 600 input tokens: expected 2, one for 512"
    );
    assert!(json(&good.replace('5', "-5")).contains("column"));
    // After an error there is nothing more.
    let file = file(".jsonl", &format!("{good}oops\n{good}"));
    assert_eq!(TraceReader::open(file.path()).unwrap().map(|result| result.is_ok()).collect::<Vec<_>>(), [true, false]);
}
