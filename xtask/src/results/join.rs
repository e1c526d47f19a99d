//! The rows of one batch, put together.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::input::{Batch, Bench, Peers, PeersRow, Placement};

/// Another library, or one of the ways to call it.
#[derive(Debug)]
pub struct Peer {
    /// Name in the script's file.
    key: &'static str,
    /// Name in tables and figures.
    pub name: &'static str,
    /// What it is.
    pub description: &'static str,
}

/// Those that the script knows.
static PEERS: [Peer; 6] = [
    Peer {
        key: "fa3",
        name: "FlashAttention-3",
        description: "fa3-fwd 0.0.3, variable lengths, on contiguous KV: blocks that requests share are there once for each",
    },
    Peer { key: "fa4", name: "FlashAttention-4", description: "the kernel for Hopper; paged where requests share blocks" },
    Peer {
        key: "fi_fa2",
        name: "FlashInfer FA2",
        description: "FlashInfer 0.6.7, paged: decode with tensor cores where every request has one query, FA2 prefill elsewhere",
    },
    Peer { key: "fi_fa3", name: "FlashInfer FA3", description: "FlashInfer 0.6.7, paged: FA3 prefill" },
    Peer {
        key: "fi_ba",
        name: "FlashInfer BatchAttention",
        description: "FlashInfer 0.6.7, paged: the persistent kernel for prefill and decode in one",
    },
    Peer {
        key: "fi_cas",
        name: "FlashInfer cascade",
        description: "FlashInfer 0.6.7, paged: two levels, where all requests share one prefix",
    },
];

/// Error of a peer against float32 attention, relative in norm, from which on its time does not count.
pub const ERROR_LIMIT: f64 = 1.5e-2;

/// Bytes and FLOPs of a batch, as either side counts them, differ by rounding only.
const SAME_BATCH: f64 = 1e-3;

/// A peer that was measured.
#[derive(Debug)]
pub struct Column {
    /// Who it is.
    pub peer: &'static Peer,
    /// Index of the file that its times are from, in [`Results::peers`].
    pub file: usize,
    /// Indices of later files that have times of it too, which are left out.
    pub left_out: Vec<usize>,
}

/// What a peer did with a batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Cell {
    /// The batch is not for it, or it was not measured.
    NotApplicable,
    /// It ended in an error.
    Failed,
    /// It computed something else.
    Wrong {
        /// Its time.
        time_us: f64,
        /// NaN if it is not a number.
        error: f64,
    },
    /// Its time in µs.
    Time(f64),
}

/// One batch, ours and the peers'.
#[derive(Debug)]
pub struct Row {
    /// Ours.
    pub ours: Batch,
    /// One for each of [`Results::columns`].
    pub cells: Vec<Cell>,
}

impl Row {
    /// Column and time of the fastest peer of those whose result was right.
    pub fn best(&self) -> Option<(usize, f64)> {
        let times = self.cells.iter().enumerate();
        let times = times.filter_map(|(column, cell)| if let Cell::Time(time) = cell { Some((column, *time)) } else { None });
        times.min_by(|(_, left), (_, right)| left.total_cmp(right))
    }
}

/// One file of `packinfer bench`, with the peers beside it.
#[derive(Debug)]
pub struct Table {
    /// What tells it from the others.
    pub title: String,
    /// The file, without its batches.
    pub bench: Bench,
    /// Its batches.
    pub rows: Vec<Row>,
}

/// All that was measured.
#[derive(Debug)]
pub struct Results {
    /// At least one.
    pub tables: Vec<Table>,
    /// The peers that were measured.
    pub columns: Vec<Column>,
    /// Their files.
    pub peers: Vec<Peers>,
}

impl Results {
    /// Joins files of `packinfer bench`, at least one, with those of the peers' script, batch by batch.
    ///
    /// # Errors
    ///
    /// Other devices, other batches of the same name, or fields of the script's files that make no sense.
    pub fn new(benches: Vec<Bench>, peers: Vec<Peers>) -> Result<Self> {
        let device = benches.first().context("no file of packinfer bench")?.device_and_kernels().0.to_owned();
        let others =
            benches.iter().map(|bench| bench.device_and_kernels().0).chain(peers.iter().map(|peers| peers.device.as_str()));
        for other in others {
            ensure!(other == device, "`device` differs: {device:?} in the first file, {other:?} in another");
        }
        check_names(&peers)?;
        let columns = columns(&peers)?;
        let tables = benches.into_iter().map(|bench| Table::new(bench, &peers, &columns)).collect::<Result<Vec<_>>>()?;
        ensure!(tables.iter().any(|table| !table.rows.is_empty()), "`batches` is empty: nothing was measured");
        Ok(Self { tables, columns, peers })
    }

    /// Name of the device.
    pub fn device(&self) -> &str {
        self.tables[0].bench.device_and_kernels().0
    }

    /// Day of the measurement.
    pub fn day(&self) -> &str {
        let date = &self.tables[0].bench.date;
        date.split_once('T').map_or(date, |(day, _)| day)
    }

    /// Day and device: `2026-11-23-h100`.
    pub fn default_name(&self) -> String {
        // The word with a number in it: of "NVIDIA H100 80GB HBM3" the first.
        let device = self.device();
        let model = device.split_whitespace().find(|word| word.contains(|c: char| c.is_ascii_digit())).unwrap_or(device);
        let name = format!("{}-{}", self.day(), model.to_lowercase());
        name.replace(|c: char| !c.is_ascii_alphanumeric() && c != '-', "-")
    }
}

impl Table {
    fn new(mut bench: Bench, peers: &[Peers], columns: &[Column]) -> Result<Self> {
        let mut title = String::from("PackInfer");
        let kernels = bench.device_and_kernels().1;
        if !kernels.is_empty() {
            title = format!("{title}, {kernels}");
        }
        if bench.kv == Placement::Contiguous {
            title.push_str(", contiguous KV");
        }
        let join = |ours: Batch| {
            let rows: Vec<Option<&PeersRow>> = peers.iter().map(|peers| peers.row(&ours.batch)).collect();
            for (peers, row) in peers.iter().zip(&rows) {
                row.map_or(Ok(()), |row| check_same_batch(&ours, peers, row)).with_context(|| peers.file.clone())?;
            }
            let cell = |column: &Column| rows[column.file].map_or(Ok(Cell::NotApplicable), |row| cell(row, column.peer));
            let cells = columns.iter().map(cell).collect::<Result<_>>()?;
            Ok(Row { ours, cells })
        };
        let rows = std::mem::take(&mut bench.batches).into_iter().map(join).collect::<Result<_>>()?;
        Ok(Self { title, bench, rows })
    }

    /// The row of a batch.
    pub fn row(&self, batch: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.ours.batch == batch)
    }
}

/// Checks that the page can tell the files by their names.
fn check_names(peers: &[Peers]) -> Result<()> {
    for (index, one) in peers.iter().enumerate() {
        let is_alone = peers[..index].iter().all(|other| other.file != one.file);
        ensure!(
            is_alone,
            "two files of peers are called {:?}: rename one of them, as the page tells them by their names",
            one.file
        );
    }
    Ok(())
}

/// The peers of which there is a time or a failure, each with the first file that has a time of it, else a failure.
fn columns(peers: &[Peers]) -> Result<Vec<Column>> {
    peers.iter().try_for_each(|peers| check_fields(peers).with_context(|| peers.file.clone()))?;
    let column = |peer| {
        let mut timed =
            (0..peers.len()).filter(|&file| has(&peers[file], peer, |cell| matches!(cell, Cell::Time(_) | Cell::Wrong { .. })));
        let failed = || (0..peers.len()).find(|&file| has(&peers[file], peer, |cell| cell == Cell::Failed));
        let file = timed.next().or_else(failed)?;
        Some(Column { peer, file, left_out: timed.collect() })
    };
    Ok(PEERS.iter().filter_map(column).collect())
}

/// Checks that all peers of a file are known.
fn check_fields(peers: &Peers) -> Result<()> {
    for row in &peers.rows {
        for field in row.cells.keys() {
            if let Some(key) = field.strip_suffix("_err").or_else(|| field.strip_suffix("_exc"))
                && PEERS.iter().all(|peer| peer.key != key)
            {
                bail!("the peers' row {:?} has a field `{field}`, but {key:?} is none of the peers that are known", row.name);
            }
        }
    }
    Ok(())
}

/// Whether a file has such a cell of a peer, or one that is not understood.
fn has(peers: &Peers, peer: &Peer, wanted: fn(Cell) -> bool) -> bool {
    peers.rows.iter().any(|row| cell(row, peer).map_or(true, wanted))
}

fn cell(row: &PeersRow, peer: &Peer) -> Result<Cell> {
    let field = |suffix: &str| row.cells.get(&format!("{}{suffix}", peer.key));
    let odd = |suffix| format!("the peers' row {:?} needs a number in its field `{}{suffix}`", row.name, peer.key);
    if field("_exc").is_some() {
        return Ok(Cell::Failed);
    }
    let Some(time) = field("") else { return Ok(Cell::NotApplicable) };
    let time_us = time.as_f64().filter(|&time| time > 0.0).with_context(|| odd(""))?;
    let error = match field("_err") {
        Some(Value::Null) => f64::NAN,
        error => error.and_then(Value::as_f64).with_context(|| odd("_err"))?,
    };
    Ok(if error <= ERROR_LIMIT { Cell::Time(time_us) } else { Cell::Wrong { time_us, error } })
}

/// Checks that the script counted the same bytes and FLOPs.
fn check_same_batch(ours: &Batch, peers: &Peers, row: &PeersRow) -> Result<()> {
    let bytes = row.bytes_us * peers.copy_gbs.max(peers.read_gbs) * 1e3;
    let flops = row.flop_us * peers.matmul_tflops * 1e6;
    for (what, ours_has, theirs_has) in [("bytes", ours.bytes, bytes), ("flops", ours.flops, flops)] {
        ensure!(
            (theirs_has / ours_has - 1.0).abs() <= SAME_BATCH,
            "{:?} is another batch for the peers: its `{what}` are {ours_has:.4e} here, {theirs_has:.4e} there",
            ours.batch
        );
    }
    Ok(())
}

#[cfg(test)]
pub mod tests {
    use serde_json::{from_value, json};

    use super::*;

    /// A file of ours with the batches "alike", "shared" (twice the FLOPs) and "ours alone".
    pub fn bench(kernels: &str) -> Bench {
        let batch = |name: &str, flops: f64, time_us: f64| {
            json!({"batch": name, "bytes": 2e8, "flops": flops, "floor_us": 100.0, "time_us": time_us, "runs": 30,
                   "baseline": {"speed_up": 2.5}})
        };
        from_value(json!({
            "program": "packinfer 0.1.0", "device": format!("NVIDIA H100 80GB HBM3, {kernels}"), "date": "2026-11-23T17:07:47Z",
            "ceilings": {"copy_bytes_per_s": 2e12, "flops_per_s": 9e14},
            "batches": [batch("alike", 1e9, 110.0), batch("shared", 2e9, 150.0), batch("ours alone", 1e9, 400.0)],
        }))
        .unwrap()
    }

    /// The peers' file for it. Of "alike" the fastest peer is wrong; of "shared" one fails.
    pub fn peers() -> Value {
        json!({"device": "NVIDIA H100 80GB HBM3", "matmul_tflops": 500.0, "copy_gbs": 2000.0, "read_gbs": 600.0, "rows": [
            {"name": "alike", "floor": 100.0, "bytes_us": 100.0, "flop_us": 2.0,
             "fa3": 120.5, "fa3_err": 0.002, "fi_fa2": 130.0, "fi_fa2_err": 0.002, "fi_ba": 90.0, "fi_ba_err": 0.3},
            {"name": "shared", "floor": 100.0, "bytes_us": 100.0, "flop_us": 4.0,
             "fa3": 800.0, "fa3_err": 0.002, "fi_fa2": 125.0, "fi_fa2_err": 0.002, "fi_ba_exc": "RuntimeError()", "fi_cas": 200.0,
             "fi_cas_err": null},
        ]})
    }

    /// Another file, with another bandwidth: of FlashAttention-3 again, and of a peer that the first has not.
    pub fn more_peers() -> Value {
        json!({"device": "NVIDIA H100 80GB HBM3", "matmul_tflops": 400.0, "copy_gbs": 2500.0, "read_gbs": 600.0, "rows": [
            {"name": "alike", "bytes_us": 80.0, "flop_us": 2.5, "fa3": 10.0, "fa3_err": 0.002, "fi_fa3": 115.0, "fi_fa3_err": 0.002},
            {"name": "theirs", "bytes_us": 1.0, "flop_us": 1.0, "fi_fa3": 1.0, "fi_fa3_err": 0.0},
        ]})
    }

    /// As if read from a file.
    pub fn named(file: &str, peers: Value) -> Result<Peers> {
        Ok(Peers { file: file.into(), ..from_value(peers)? })
    }

    fn joined(peers: Value) -> Result<Results> {
        Results::new(vec![bench("sm_90a kernels")], vec![named("peers.json", peers)?])
    }

    #[test]
    fn rows_meet_by_name() {
        let results = joined(peers()).unwrap();
        let names: Vec<_> = results.columns.iter().map(|column| column.peer.key).collect();
        assert_eq!(names, ["fa3", "fi_fa2", "fi_ba", "fi_cas"]);
        let [alike, shared, alone] = &results.tables[0].rows[..] else { panic!("three rows") };
        let wrong = Cell::Wrong { time_us: 90.0, error: 0.3 };
        assert_eq!(alike.cells, [Cell::Time(120.5), Cell::Time(130.0), wrong, Cell::NotApplicable]);
        assert_eq!(alike.best(), Some((0, 120.5)), "wrong results do not count");
        assert_eq!(shared.cells[2], Cell::Failed);
        assert!(matches!(shared.cells[3], Cell::Wrong { error, .. } if error.is_nan()));
        assert_eq!(shared.best(), Some((1, 125.0)));
        assert_eq!((alone.cells.as_slice(), alone.best()), ([Cell::NotApplicable; 4].as_slice(), None));
    }

    #[test]
    fn columns_of_several_files_are_joined() {
        let both = |first: Value, second: Value| {
            Results::new(vec![bench("sm_90a kernels")], vec![named("a.json", first).unwrap(), named("b.json", second).unwrap()])
        };
        let results = both(peers(), more_peers()).unwrap();
        let columns: Vec<_> = results.columns.iter().map(|column| (column.peer.key, column.file, &column.left_out[..])).collect();
        let expected: [(_, _, &[usize]); 5] =
            [("fa3", 0, &[1]), ("fi_fa2", 0, &[]), ("fi_fa3", 1, &[]), ("fi_ba", 0, &[]), ("fi_cas", 0, &[])];
        assert_eq!(columns, expected);
        let [alike, shared, _] = &results.tables[0].rows[..] else { panic!("three rows") };
        assert_eq!(
            (alike.cells[0], alike.cells[2]),
            (Cell::Time(120.5), Cell::Time(115.0)),
            "the first file's, and the second's as it is"
        );
        assert_eq!((alike.best(), shared.cells[2]), (Some((2, 115.0)), Cell::NotApplicable));
        let results = both(more_peers(), peers()).unwrap();
        assert_eq!(results.tables[0].rows[0].cells[0], Cell::Time(10.0));
        assert_eq!(results.tables[0].rows[1].cells[0], Cell::NotApplicable, "a column is of one file");
        // A file in which a peer only failed is not the first one that has it.
        let mut failed = peers();
        failed["rows"][0]["fi_fa3_exc"] = json!("ImportError()");
        let results = both(failed.clone(), more_peers()).unwrap();
        assert_eq!((results.columns[2].file, &results.columns[2].left_out[..]), (1, &[][..]));
        assert_eq!(joined(failed).unwrap().tables[0].rows[0].cells[2], Cell::Failed);
    }

    #[test]
    fn every_file_has_to_fit() {
        let second = |file: &str, pointer: &str, value: Value| {
            let mut odd = more_peers();
            *odd.pointer_mut(pointer).unwrap() = value;
            let files = vec![named("a.json", peers()).unwrap(), named(file, odd).unwrap()];
            format!("{:#}", Results::new(vec![bench("")], files).unwrap_err())
        };
        for (pointer, value, expected) in [
            ("/device", json!("NVIDIA H200"), "`device` differs"),
            ("/rows/0/flop_us", json!(3.0), "b.json: \"alike\" is another batch for the peers: its `flops`"),
            // It would not be taken, but is looked at.
            ("/rows/0/bytes_us", json!(3.0), "\"alike\" is another batch for the peers: its `bytes`"),
        ] {
            let message = second("b.json", pointer, value);
            assert!(message.contains(expected), "{message}");
        }
        assert!(second("a.json", "/device", json!("NVIDIA H100 80GB HBM3")).contains("two files of peers are called \"a.json\""));
    }

    #[test]
    fn a_title_says_where_kv_lay() {
        let contiguous = Bench { kv: Placement::Contiguous, ..bench("sm_90a kernels") };
        let results = Results::new(vec![bench("sm_90a kernels"), contiguous], Vec::new()).unwrap();
        let titles: Vec<_> = results.tables.iter().map(|table| table.title.as_str()).collect();
        assert_eq!(titles, ["PackInfer, sm_90a kernels", "PackInfer, sm_90a kernels, contiguous KV"]);
    }

    #[test]
    fn the_name_says_when_and_where() {
        assert_eq!(joined(peers()).unwrap().default_name(), "2026-11-23-h100");
        let mut cpu = bench("");
        cpu.device = "Some Processor, 2 threads".into();
        assert_eq!(Results::new(vec![cpu], Vec::new()).unwrap().default_name(), "2026-11-23-some-processor");
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        for (pointer, value, expected) in [
            ("/device", json!("NVIDIA H200"), "`device` differs"),
            ("/rows/0/flop_us", json!(3.0), "\"alike\" is another batch for the peers: its `flops`"),
            ("/rows/1/bytes_us", json!(90.0), "\"shared\" is another batch for the peers: its `bytes`"),
            ("/rows/0/fa3", json!("slow"), "\"alike\" needs a number in its field `fa3`"),
            ("/rows/0/fa3_err", json!("none"), "\"alike\" needs a number in its field `fa3_err`"),
            ("/rows/0/fa3", Value::Null, "field `fa3`"),
        ] {
            let mut odd = peers();
            *odd.pointer_mut(pointer).unwrap() = value;
            let message = format!("{:#}", joined(odd).unwrap_err());
            assert!(message.contains(expected), "{message}");
        }
        let mut odd = peers();
        odd["rows"][0]["fa9_exc"] = json!("ImportError()");
        let message = format!("{:#}", joined(odd).unwrap_err());
        assert!(message.starts_with("peers.json: ") && message.contains("field `fa9_exc`"), "{message}");
        let mut empty = bench("");
        empty.batches.clear();
        assert!(Results::new(vec![empty], Vec::new()).unwrap_err().to_string().contains("`batches` is empty"));
    }
}
