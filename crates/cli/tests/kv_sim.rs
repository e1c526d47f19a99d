//! `packinfer kv-sim` from outside.

use std::fs;
use std::path::PathBuf;

use assert_cmd::Command;
use predicates::prelude::*;
use serde_json::Value;
use tempfile::TempDir;

fn kv_sim(trace: &PathBuf) -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("packinfer"));
    command.arg("kv-sim").arg("--trace").arg(trace);
    command
}

/// 40 requests with a common first block, in Mooncake's format.
fn trace(folder: &TempDir) -> PathBuf {
    let line = |i: u32| {
        format!("{{\"timestamp\": {}, \"input_length\": 1000, \"output_length\": 60, \"hash_ids\": [0, {}]}}\n", i * 200, i + 1)
    };
    let path = folder.path().join("trace.jsonl");
    fs::write(&path, (0..40).map(line).collect::<String>()).unwrap();
    path
}

#[test]
fn reports_in_three_forms() {
    let folder = tempfile::tempdir().unwrap();
    let trace = trace(&folder);
    let [json, svg] = ["out.json", "out.svg"].map(|name| folder.path().join(name));
    kv_sim(&trace).arg("--json").arg(&json).arg("--svg").arg(&svg).assert().success().stdout(
        predicate::str::contains("block hit rate")
            .and(predicate::str::contains("48.8 % of 80 blocks"))
            .and(predicate::str::contains("40 of 40 finished")),
    );
    let output: Value = serde_json::from_str(&fs::read_to_string(json).unwrap()).unwrap();
    assert_eq!(output["hit_rate"], output["reuse"]);
    assert_eq!(output["report"]["hit_blocks"], 39);
    assert_eq!(output["trace"]["distinct_blocks"], 41);
    assert!(fs::read_to_string(svg).unwrap().starts_with("<svg"));
}

#[test]
fn small_pools_and_pages() {
    let folder = tempfile::tempdir().unwrap();
    let trace = trace(&folder);
    kv_sim(&trace)
        .args(["--slots", "8192", "--layout", "paged"])
        .assert()
        .success()
        .stdout(predicate::str::contains("8192 slots").and(predicate::str::is_match("moves +0, 0 cancelled").unwrap()));
    kv_sim(&trace).args(["--slots", "64"]).assert().success().stdout(predicate::str::contains("40 rejected"));
}

#[test]
fn bad_input_is_told_in_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let fails = |trace: &PathBuf, arguments: &[&str], message: &str| {
        kv_sim(trace).args(arguments).assert().code(2).stderr(predicate::str::contains(message)).stdout("");
    };
    let none = folder.path().join("none.csv");
    fails(&none, &[], &format!("packinfer: cannot read the trace {}: No such file or directory (os error 2)\n", none.display()));
    let good = trace(&folder);
    fails(&good, &["--slots", "many"], "invalid value");
    fails(&good, &["--page-size", "0"], "invalid value");
    fails(&good, &["--slots", "4294967295"], "a pool has at most");
    fails(&good, &["--json", "/no/such/folder/out.json"], "cannot write /no/such/folder/out.json");
    let bad = folder.path().join("bad.jsonl");
    fs::write(&bad, "{\"timestamp\": 0}\n").unwrap();
    fails(&bad, &[], "bad.jsonl:1: column 16: missing field `input_length`");
    fs::write(&bad, "text\n").unwrap();
    fails(&bad, &[], "is not a trace");
}
