//! Results as a page.

use std::fmt::Write;

use super::input::{Peers, PeersRow};
use super::join::{Cell, Column, ERROR_LIMIT, Results, Row, Table};

/// The page: what was measured and how, ceilings, a table for each file of `packinfer bench`.
pub fn page(results: &Results, commit: &str, note: Option<&str>, figure: &str) -> String {
    let mut page = format!("# {}, {}\n\n", results.device(), results.day());
    push_circumstances(&mut page, results, commit, note);
    push_ceilings(&mut page, results);
    let _ = writeln!(page, "![Times over the floor]({figure})\n");
    if results.tables.len() > 1 {
        page.push_str(
            "A batch's floor in the figure is the lowest of those in the tables, which have ceilings of their own.\n\n",
        );
    }
    for table in &results.tables {
        push_table(&mut page, results, table);
    }
    push_peers(&mut page, results);
    page
}

/// A number to about three significant digits.
pub fn significant(value: f64) -> String {
    let digits = match value.abs() {
        ..10.0 => 2,
        10.0..100.0 => 1,
        _ => 0,
    };
    format!("{value:.digits$}")
}

/// How it was measured. Writing to a string does not fail, here and below.
fn push_circumstances(page: &mut String, results: &Results, commit: &str, note: Option<&str>) {
    let bench = &results.tables[0].bench;
    let dates: Vec<_> = results.tables.iter().map(|table| table.bench.date.as_str()).collect();
    let _ = writeln!(page, "- Device: {}\n- Date: {}\n- Commit: {commit}", results.device(), dates.join(", "));
    if let Some(note) = note {
        let _ = writeln!(page, "- {note}");
    }
    let runs = || results.tables.iter().flat_map(|table| &table.rows).map(|row| row.ours.runs);
    let runs = match (runs().min().unwrap_or(0), runs().max().unwrap_or(0)) {
        (least, most) if least == most => least.to_string(),
        (least, most) => format!("{least} to {most}"),
    };
    let _ = writeln!(
        page,
        "\nTimes are of one attention call on the device, in µs, planning not included, each from a cold L2 cache. Ours (`{} bench`): the \
         median of {runs} runs. The floor: the time that the batch's distinct bytes take at the copy bandwidth, or its FLOPs at the rate of \
         the tensor cores, whichever is longer. Graph: launches of a CUDA graph of the same. Per-request: the same kernels without packing \
         and splitting; how much faster the plan is.",
        bench.program
    );
    if !results.peers.is_empty() {
        let difference = |peers: &Peers| {
            let difference = peers.copy_gbs * 1e9 / bench.ceilings.copy_bytes_per_s - 1.0;
            format!("{:+.1} %{}", 100.0 * difference, in_file(results, peers, " in "))
        };
        let differences: Vec<_> = results.peers.iter().map(difference).collect();
        let _ = writeln!(
            page,
            "\nThe peers: the median of Triton's `do_bench`, which empties the L2 cache as well, on the same batches and a device of the same \
             name, where copying differs by {} from ours.",
            differences.join(", ")
        );
    }
    page.push('\n');
}

fn push_ceilings(page: &mut String, results: &Results) {
    page.push_str("| ceilings measured by | copying, GB/s | tensor cores, TFLOP/s |\n| --- | ---: | ---: |\n");
    for Table { title, bench, .. } in &results.tables {
        let (copy, compute) = (bench.ceilings.copy_bytes_per_s * 1e-9, bench.ceilings.flops_per_s * 1e-12);
        let _ = writeln!(page, "| {title} | {copy:.0} | {compute:.0} |");
    }
    for peers in &results.peers {
        let (file, copy, compute) = (in_file(results, peers, ", "), peers.copy_gbs, peers.matmul_tflops);
        let _ = writeln!(page, "| the peers' script{file} | {copy:.0} | {compute:.0} (PyTorch's matmul) |");
    }
    page.push('\n');
}

/// The file of some peers, if there are several that it could be.
fn in_file(results: &Results, peers: &Peers, before: &str) -> String {
    if results.peers.len() > 1 { format!("{before}{}", peers.file) } else { String::new() }
}

fn push_table(page: &mut String, results: &Results, table: &Table) {
    let _ = writeln!(page, "## {}\n", table.title);
    let has_kernels = table.rows.iter().any(|row| row.ours.kernels.is_some());
    let has_graphs = table.rows.iter().any(|row| row.ours.graph.is_some());
    let mut header = vec!["batch"];
    header.extend(has_kernels.then_some("kernels"));
    let left = header.len();
    header.extend(["floor", "ours"]);
    header.extend(has_graphs.then_some("graph"));
    header.extend(["ours ÷ floor", "per-request ÷ ours"]);
    header.extend(results.columns.iter().map(|column| column.peer.name));
    header.extend((!results.columns.is_empty()).then_some("ours ÷ best peer"));
    let aligned: Vec<_> = (0..header.len()).map(|column| if column < left { "---" } else { "---:" }).collect();
    let _ = writeln!(page, "| {} |\n| {} |", header.join(" | "), aligned.join(" | "));
    for row in &table.rows {
        let _ = writeln!(page, "| {} |", cells(row, has_kernels, has_graphs).join(" | "));
    }
    page.push('\n');
}

fn cells(row: &Row, has_kernels: bool, has_graphs: bool) -> Vec<String> {
    const NONE: &str = "-";
    let ours = &row.ours;
    let best = row.best();
    let mut cells = vec![ours.batch.clone()];
    cells.extend(has_kernels.then(|| ours.kernels.clone().unwrap_or(NONE.into())));
    cells.extend([ours.floor_us, ours.time_us].map(significant));
    cells.extend(has_graphs.then(|| ours.graph.as_ref().map_or(NONE.into(), |graph| significant(graph.time_us))));
    cells.push(significant(ours.time_us / ours.floor_us));
    cells.push(ours.baseline.as_ref().map_or(NONE.into(), |baseline| significant(baseline.speed_up)));
    cells.extend(row.cells.iter().enumerate().map(|(column, cell)| match *cell {
        Cell::NotApplicable => NONE.into(),
        Cell::Failed => "x".into(),
        Cell::Wrong { time_us, error } => format!("{} (error {error:.0e})", significant(time_us)),
        Cell::Time(time) if best.is_some_and(|(best, _)| best == column) => format!("**{}**", significant(time)),
        Cell::Time(time) => significant(time),
    }));
    if !row.cells.is_empty() {
        cells.push(best.map_or(NONE.into(), |(_, time)| significant(ours.time_us / time)));
    }
    cells
}

/// What the columns of the peers are, and which rows have no place in a table.
fn push_peers(page: &mut String, results: &Results) {
    if results.peers.is_empty() {
        return;
    }
    let _ = writeln!(
        page,
        "Bold: the best peer. `x`: it failed. `-`: the batch is not for it. A peer whose error against float32 attention, relative in norm, \
         is over {ERROR_LIMIT:.1e} is marked, and is not the best.\n"
    );
    for column in &results.columns {
        let Column { peer, file, left_out } = column;
        let from = in_file(results, &results.peers[*file], "; from ");
        let also: Vec<_> = left_out.iter().map(|&other| results.peers[other].file.as_str()).collect();
        let also = if also.is_empty() { String::new() } else { format!(", though it is in {} too", also.join(", ")) };
        let _ = writeln!(page, "- {}: {}{from}{also}", peer.name, peer.description);
    }
    let is_alone = |row: &&PeersRow| results.tables.iter().all(|table| table.row(&row.name).is_none());
    let mut alone: Vec<&str> = Vec::new();
    for row in results.peers.iter().flat_map(|peers| &peers.rows).filter(is_alone) {
        if !alone.contains(&row.name.as_str()) {
            alone.push(&row.name);
        }
    }
    if !alone.is_empty() {
        let _ = writeln!(page, "\nOnly the peers were measured on: {}.", alone.join(", "));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::input::Graph;
    use super::super::join::tests::{bench, more_peers, named, peers};
    use super::*;

    fn page_of(peers: &[(&str, Value)]) -> String {
        let peers = peers.iter().map(|(file, peers)| named(file, peers.clone()).unwrap()).collect();
        let results = Results::new(vec![bench("sm_90a kernels"), bench("sm_80 kernels")], peers).unwrap();
        page(&results, "0123abc, with uncommitted changes", Some("On a quiet evening."), "here.svg")
    }

    #[test]
    fn tables_have_all_cells() {
        let page = page_of(&[("peers.json", peers())]);
        for line in [
            "# NVIDIA H100 80GB HBM3, 2026-11-23",
            "- Commit: 0123abc, with uncommitted changes",
            "- On a quiet evening.",
            "| PackInfer, sm_80 kernels | 2000 | 900 |",
            "| the peers' script | 2000 | 500 (PyTorch's matmul) |",
            "![Times over the floor](here.svg)",
            "## PackInfer, sm_90a kernels",
            "| batch | floor | ours | ours ÷ floor | per-request ÷ ours | FlashAttention-3 | FlashInfer FA2 | FlashInfer BatchAttention | \
             FlashInfer cascade | ours ÷ best peer |",
            "| alike | 100 | 110 | 1.10 | 2.50 | **120** | 130 | 90.0 (error 3e-1) | - | 0.91 |",
            "| shared | 100 | 150 | 1.50 | 2.50 | 800 | **125** | x | 200 (error NaN) | 1.20 |",
            "| ours alone | 100 | 400 | 4.00 | 2.50 | - | - | - | - | - |",
        ] {
            assert!(page.lines().any(|candidate| candidate == line), "no {line:?} in\n{page}");
        }
        assert!(page.contains("the median of 30 runs") && page.contains("differs by +0.0 %"));
        assert!(!page.contains("Only the peers") && !page.contains("peers.json"), "one file needs no name");
    }

    #[test]
    fn several_files_of_peers_are_told_apart() {
        let page = page_of(&[("first.json", peers()), ("second.json", more_peers())]);
        for text in [
            "where copying differs by +0.0 % in first.json, +25.0 % in second.json from ours.",
            "\n| the peers' script, first.json | 2000 | 500 (PyTorch's matmul) |\n| the peers' script, second.json | 2500 | 400 (",
            "\n| alike | 100 | 110 | 1.10 | 2.50 | 120 | 130 | **115** | 90.0 (error 3e-1) | - | 0.96 |\n",
            "once for each; from first.json, though it is in second.json too\n",
            "FA3 prefill; from second.json\n",
            "Only the peers were measured on: theirs.",
        ] {
            assert!(page.contains(text), "no {text:?} in\n{page}");
        }
    }

    #[test]
    fn peers_and_baseline_may_be_missing() {
        let page = page_of(&[]);
        assert!(page.contains("\n| alike | 100 | 110 | 1.10 | 2.50 |\n"), "{page}");
        assert!(!page.contains("peer"), "{page}");
    }

    #[test]
    fn graphs_have_a_column_if_there_are_any() {
        let mut measured = bench("");
        measured.batches[0].graph = Some(Graph { time_us: 108.0 });
        let page = page(&Results::new(vec![measured], Vec::new()).unwrap(), "", None, "");
        for line in [
            "| batch | floor | ours | graph | ours ÷ floor |",
            "| alike | 100 | 110 | 108 | 1.10 |",
            "| shared | 100 | 150 | - |",
        ] {
            assert!(page.contains(line), "no {line:?} in\n{page}");
        }
    }

    #[test]
    fn rows_of_the_peers_alone_are_named() {
        let mut more = peers();
        let row = json!({"name": "theirs", "bytes_us": 1.0, "flop_us": 1.0, "fa3": 1.0, "fa3_err": 0.0});
        more["rows"].as_array_mut().unwrap().push(row);
        assert!(page_of(&[("peers.json", more)]).contains("Only the peers were measured on: theirs."));
    }

    #[test]
    fn digits_suit_the_size() {
        assert_eq!([0.125, 1.0, 12.34, 123.4, 1234.5].map(significant), ["0.12", "1.00", "12.3", "123", "1234"]);
    }
}
