//! The files that are read: those of `packinfer bench --json`, and of the peers' script.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use anyhow::{Context, Result};
use regex::Regex;
use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// What `packinfer bench --json` wrote.
#[derive(Debug, Deserialize)]
pub struct Bench {
    /// Name and version.
    pub program: String,
    /// The device, and after a comma what ran on it.
    pub device: String,
    /// When, in UTC: `2026-11-23T17:07:47Z`.
    pub date: String,
    /// Where KV lay.
    #[serde(default)]
    pub kv: Placement,
    /// What the device can do at best.
    pub ceilings: Ceilings,
    /// One a batch file.
    pub batches: Vec<Batch>,
}

impl Bench {
    /// Name of the device, and what ran on it.
    pub fn device_and_kernels(&self) -> (&str, &str) {
        self.device.split_once(", ").unwrap_or((&self.device, ""))
    }
}

/// Where the KV of each request lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Placement {
    /// In pages in random order.
    #[default]
    Scattered,
    /// In one piece.
    Contiguous,
}

/// The rates that floors are computed from.
#[derive(Debug, Deserialize)]
pub struct Ceilings {
    /// Bytes a second, read and written together.
    #[serde(deserialize_with = "positive")]
    pub copy_bytes_per_s: f64,
    /// Of the tensor cores.
    #[serde(deserialize_with = "positive")]
    pub flops_per_s: f64,
}

/// One batch.
#[derive(Debug, Deserialize)]
pub struct Batch {
    /// Its name.
    pub batch: String,
    /// The kernels that the planner chose, where it could choose.
    pub kernels: Option<String>,
    /// Distinct KV, Q and O.
    #[serde(deserialize_with = "positive")]
    pub bytes: f64,
    /// Of the visible (query, key) pairs.
    #[serde(deserialize_with = "positive")]
    pub flops: f64,
    /// What the ceilings allow.
    #[serde(deserialize_with = "positive")]
    pub floor_us: f64,
    /// The median.
    #[serde(deserialize_with = "positive")]
    pub time_us: f64,
    /// How many the median is of.
    pub runs: u32,
    /// Launches of a CUDA graph of the same.
    pub graph: Option<Graph>,
    /// The same batch, scheduled per request.
    pub baseline: Option<Baseline>,
}

/// Launches of a CUDA graph.
#[derive(Debug, Deserialize)]
pub struct Graph {
    /// The median.
    #[serde(deserialize_with = "positive")]
    pub time_us: f64,
}

/// The same batch, scheduled in another way.
#[derive(Debug, Deserialize)]
pub struct Baseline {
    /// Its time over that of the plan.
    #[serde(deserialize_with = "positive")]
    pub speed_up: f64,
}

/// What the peers' script wrote.
#[derive(Debug, Deserialize)]
pub struct Peers {
    /// Name of the file, without its folder.
    #[serde(skip)]
    pub file: String,
    /// Name of the device.
    pub device: String,
    /// Rate of a large matrix product.
    #[serde(deserialize_with = "positive")]
    pub matmul_tflops: f64,
    /// Read and written together.
    #[serde(deserialize_with = "positive")]
    pub copy_gbs: f64,
    /// Read only.
    #[serde(deserialize_with = "positive")]
    pub read_gbs: f64,
    /// One a batch file.
    pub rows: Vec<PeersRow>,
}

impl Peers {
    /// Reads a file of the peers' script.
    ///
    /// # Errors
    ///
    /// As [`read`].
    pub fn read(path: &Path) -> Result<Self> {
        let peers = read(path)?;
        let file = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(Self { file, ..peers })
    }

    /// The row of a batch.
    pub fn row(&self, batch: &str) -> Option<&PeersRow> {
        self.rows.iter().find(|row| row.name == batch)
    }
}

/// One batch of the peers' script.
#[derive(Debug, Deserialize)]
pub struct PeersRow {
    /// Of the batch.
    pub name: String,
    /// Time that the batch's bytes take at the script's bandwidth.
    #[serde(deserialize_with = "positive")]
    pub bytes_us: f64,
    /// Time that the batch's FLOPs take at the script's rate.
    #[serde(deserialize_with = "positive")]
    pub flop_us: f64,
    /// For a peer P: its time `P` and its error `P_err`, or why it failed, `P_exc`; nothing if the batch is not for it.
    #[serde(flatten)]
    pub cells: BTreeMap<String, Value>,
}

fn positive<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    match f64::deserialize(deserializer)? {
        value if value.is_finite() && value > 0.0 => Ok(value),
        value => Err(D::Error::custom(format!("{value} is not a positive number"))),
    }
}

/// Reads a JSON file.
///
/// # Errors
///
/// A file that cannot be read, is no JSON, or lacks a field: the message names both.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse(&text).with_context(|| path.display().to_string())
}

/// Numbers of fields that Python writes and JSON does not have, such as the error of a peer that computed NaN.
static NOT_A_NUMBER: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r#"(":\s*)(?:NaN|-?Infinity)(\s*[,}])"#).expect("the expression is constant"));

fn parse<T: DeserializeOwned>(text: &str) -> Result<T> {
    let text = NOT_A_NUMBER.replace_all(text, "${1}null${2}");
    let mut deserializer = serde_json::Deserializer::from_str(&text);
    let value = serde_path_to_error::deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_file_and_field() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("odd.json");
        let complaint = |text: &str| {
            fs::write(&file, text).unwrap();
            format!("{:#}", read::<Peers>(&file).unwrap_err())
        };
        let row = r#"{"name": "a", "bytes_us": 1.0, "flop_us": -2.0}"#;
        for (text, expected) in [
            ("{", "EOF"),
            (r#"{"device": "H100"}"#, "missing field `matmul_tflops`"),
            (r#"{"device": "H100", "matmul_tflops": "fast"}"#, "matmul_tflops: invalid type: string \"fast\""),
            (
                &format!(r#"{{"device": "", "matmul_tflops": 1, "copy_gbs": 1, "read_gbs": 1, "rows": [{row}]}}"#),
                "flop_us: -2 is not a positive number",
            ),
        ] {
            let message = complaint(text);
            assert!(message.contains("odd.json") && message.contains(expected), "{message}");
        }
        assert!(format!("{:#}", read::<Peers>(&folder.path().join("none.json")).unwrap_err()).contains("cannot read"));
    }

    #[test]
    fn peers_know_their_file_and_rows() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("peers.json");
        let row = r#"{"name": "a", "bytes_us": 1.0, "flop_us": 2.0}"#;
        let text = format!(r#"{{"device": "", "matmul_tflops": 1, "copy_gbs": 1, "read_gbs": 1, "rows": [{row}]}}"#);
        fs::write(&file, text).unwrap();
        let peers = Peers::read(&file).unwrap();
        assert_eq!(peers.file, "peers.json");
        assert_eq!((peers.row("a").map(|row| row.flop_us), peers.row("b").is_none()), (Some(2.0), true));
    }

    #[test]
    fn nan_as_python_writes_it_is_read() {
        let row: PeersRow =
            parse(r#"{"name": ": NaN", "bytes_us": 1, "flop_us": 2, "fa3": 5.0, "fa3_err": NaN, "fi_ba_err": -Infinity}"#)
                .unwrap();
        assert_eq!(row.name, ": NaN");
        assert_eq!((&row.cells["fa3"], &row.cells["fa3_err"]), (&Value::from(5.0), &Value::Null));
        assert_eq!(row.cells["fi_ba_err"], Value::Null);
    }
}
