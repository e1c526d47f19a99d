//! The program from outside: what it prints, its exit codes, and that nothing panics.

use std::fs;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use assert_cmd::Command;
use packinfer_batch::{BatchFile, DType, KvDType, PageOrder, RequestLengths};
use predicates::prelude::*;
use serde_json::Value;
use tempfile::TempDir;

fn packinfer() -> Command {
    Command::new(assert_cmd::cargo::cargo_bin!("packinfer"))
}

/// A folder of batch files.
struct Batches {
    folder: TempDir,
}

impl Batches {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("a temporary folder") }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, text).expect("the folder is writable");
        path
    }

    fn file(&self, name: &str, file: &BatchFile) -> PathBuf {
        self.text(name, &file.to_json())
    }
}

fn request(query_len: u32, kv_len: u32, blocks: &[u64]) -> RequestLengths {
    RequestLengths { query_len, kv_len, blocks: blocks.into() }
}

/// A small batch with a bit of everything: prompts, decodes, a chunk, a shared prefix, a request without queries.
fn small() -> BatchFile {
    BatchFile {
        name: Some("small".into()),
        description: None,
        num_qo_heads: 8,
        num_kv_heads: 2,
        head_dim: 64,
        dtype: DType::F16,
        kv_dtype: KvDType::Same,
        page_size: 16,
        page_order: PageOrder::Nhd,
        page_stride: NonZeroU32::MIN,
        causal: true,
        window: None,
        logit_soft_cap: None,
        sinks: false,
        block_tokens: Some(32),
        requests: vec![
            request(40, 40, &[]),
            request(3, 3, &[]),
            request(1, 700, &[1, 2]),
            request(1, 90, &[1, 2]),
            request(33, 500, &[1]),
            request(0, 10, &[]),
        ],
    }
}

/// Runs `command --batch PATH` and expects exit code 2 and one sentence that names the file and contains `message`.
fn assert_refused(command: &str, path: &Path, message: &str) {
    let output = packinfer().args([command, "--batch"]).arg(path).assert().code(2).stdout(predicate::str::is_empty());
    let stderr = String::from_utf8_lossy(&output.get_output().stderr).into_owned();
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.starts_with("packinfer: ") && stderr.contains(message), "{stderr:?} does not contain {message:?}");
    assert!(stderr.contains(&path.display().to_string()), "{stderr:?} does not name the file");
}

#[test]
fn bad_batches_are_refused_in_one_sentence() {
    let batches = Batches::new();
    let good = small().to_json();
    let cases = [
        ("missing field", "\"page_size\":16,", "", "missing field `page_size` at line "),
        ("dtype", "\"f16\"", "\"fp8\"", "unknown variant `fp8`, expected `bf16` or `f16` at line 1 column "),
        ("no heads", "\"num_qo_heads\":8", "\"num_qo_heads\":0", "0 query heads and 2 KV heads"),
        ("no KV heads", "\"num_kv_heads\":2", "\"num_kv_heads\":0", "8 query heads and 0 KV heads"),
        ("not divisible", "\"num_kv_heads\":2", "\"num_kv_heads\":3", "8 query heads cannot be shared evenly by 3 KV heads"),
        ("head_dim", "\"head_dim\":64", "\"head_dim\":80", "head dimension 80"),
        ("page_size", "\"page_size\":16", "\"page_size\":0", "page_size is 0"),
        ("queries", "\"query_len\":3", "\"query_len\":4", "request 1 has 4 query tokens but only 3 KV tokens"),
        (
            "blocks",
            "\"kv_len\":90",
            "\"kv_len\":63",
            "request 3 names 2 blocks of 32 tokens, which is more than its 63 KV tokens",
        ),
        ("no block_tokens", "\"block_tokens\":32,", "", "request 2 names blocks, but the batch has no block_tokens"),
        ("block_tokens", "\"block_tokens\":32", "\"block_tokens\":40", "block_tokens is 40 and page_size 16"),
        ("negative", "\"kv_len\":700", "\"kv_len\":-1", "expected u32 at line "),
        ("over 32 bits", "\"kv_len\":700", "\"kv_len\":4294967296", "expected u32 at line "),
        ("over 31 bits", "\"kv_len\":700", "\"kv_len\":4294967295", "4294967295 KV tokens: at most 2147483648"),
        ("cut off", "]}\n", "]\n", "EOF while parsing an object at line "),
    ];
    for (name, old, new, message) in cases {
        assert!(good.contains(old), "{old} is not in the file");
        let path = batches.text(&format!("{name}.json"), &good.replacen(old, new, 1));
        for command in ["plan", "verify", "bench"] {
            assert_refused(command, &path, message);
        }
    }
}

#[test]
fn files_that_cannot_be_read_are_refused() {
    let batches = Batches::new();
    for command in ["plan", "verify", "bench"] {
        assert_refused(command, &batches.path("missing.json"), "missing.json");
        assert_refused(command, batches.folder.path(), "cannot read");
        assert_refused(command, &batches.text("empty.json", ""), "line 1 column 0");
    }
}

#[test]
fn sizes_beyond_numbers_and_memory_are_refused() {
    let batches = Batches::new();
    let huge = |count| BatchFile {
        page_size: 1 << 20,
        block_tokens: None,
        num_qo_heads: 128,
        num_kv_heads: 128,
        requests: vec![request(1, 1 << 30, &[]); count],
        ..small()
    };
    let overflow = batches.file("overflow.json", &huge(3));
    let memory = batches.file("memory.json", &huge(2));
    for command in ["verify", "bench"] {
        assert_refused(command, &overflow, "slots are numbered up to 2147483648");
        packinfer()
            .args([command, "--device", "cpu", "--batch"])
            .arg(&memory)
            .assert()
            .code(2)
            .stderr(predicate::str::contains("small: Q, K, V and O take 70368.7 GB of memory, but only "));
    }
    assert_refused("plan", &overflow, "slots are numbered up to 2147483648");
}

#[test]
fn arguments_that_make_no_sense_exit_2() {
    for args in
        [&["verify"][..], &["plan"], &["nonsense"], &["verify", "--batch", "x", "--rows", "0"], &["bench", "--repeat", "0"], &[]]
    {
        packinfer().args(args).assert().code(2).stderr(predicate::str::is_empty().not());
    }
}

#[test]
fn a_gpu_that_is_not_there_is_an_error_only_if_asked_for() {
    if Path::new("/dev/nvidiactl").exists() {
        eprintln!("skipped: this machine has an NVIDIA driver");
        return;
    }
    let batches = Batches::new();
    let path = batches.file("small.json", &small());
    for command in ["verify", "bench"] {
        packinfer()
            .args([command, "--device", "cuda", "--batch"])
            .arg(&path)
            .assert()
            .code(2)
            .stderr(predicate::str::contains("driver"));
    }
    let one_line = predicate::function(|text: &str| text.lines().count() == 1);
    packinfer()
        .args(["verify", "--batch"])
        .arg(&path)
        .assert()
        .success()
        .stderr(predicate::str::contains("driver").and(one_line));
}

#[test]
fn info_names_the_cpu() {
    packinfer().arg("info").assert().success().stdout(predicate::str::contains("threads"));
}

#[test]
fn verify_passes_on_the_cpu() {
    let batches = Batches::new();
    let bf16 = BatchFile { dtype: DType::Bf16, head_dim: 128, causal: false, name: None, ..small() };
    let empty = BatchFile { requests: vec![], name: Some("empty".into()), ..small() };
    packinfer()
        .args(["verify", "--device", "cpu", "--batch"])
        .args([batches.file("small.json", &small()), batches.file("stem.json", &bf16), batches.file("empty.json", &empty)])
        .assert()
        .success()
        .stderr(predicate::str::is_empty())
        .stdout(predicate::str::contains("small").and(predicate::str::contains("stem")).and(predicate::str::contains("empty")))
        .stdout(predicate::str::contains("WRONG").not());
}

#[test]
fn verify_samples_rows_of_every_request() {
    let batches = Batches::new();
    packinfer()
        .args(["verify", "--device", "cpu", "--rows", "2", "--batch"])
        .arg(batches.file("small.json", &small()))
        .assert()
        .success()
        // Of 40, 3, 1, 1, 33 and 0 query tokens.
        .stdout(predicate::str::is_match(r"small +f16 +78 +8 ").expect("a good pattern"));
}

#[test]
fn plan_explains_itself() {
    let batches = Batches::new();
    let path = batches.file("small.json", &small());
    packinfer().args(["plan", "--batch"]).arg(&path).assert().success().stdout(predicate::str::contains("small"));

    let output = packinfer().args(["plan", "--json", "--batch"]).args([&path, &path]).assert().success();
    let plans: Vec<Value> = serde_json::from_slice(&output.get_output().stdout).expect("JSON");
    assert_eq!(plans.len(), 2);
    assert_eq!(plans[0]["batch"], "small");
    assert!(plans[0]["plan_us"].as_f64().is_some_and(|us| us > 0.0), "{}", plans[0]);
}

/// An argument that has the program do without a GPU.
const NO_GPU: [&str; 2] = ["--device", "cpu"];

#[test]
fn plan_predicts_a_schedule_without_a_gpu() {
    let batches = Batches::new();
    let (path, svg) = (batches.file("small.json", &small()), batches.path("timeline.svg"));
    let plan = |args: &[&str]| packinfer().arg("plan").args(NO_GPU).args(["--batch"]).arg(&path).args(args).assert();
    plan(&["--explain"]).success().stdout(predicate::str::contains("nothing was run, as there is no GPU"));

    let timeline = svg.to_str().expect("a path of letters");
    let output = plan(&["--explain", "--json", "--timeline", timeline]).success();
    let plans: Vec<Value> = serde_json::from_slice(&output.get_output().stdout).expect("JSON");
    let call = &plans[0]["call"];
    assert_eq!(call["predicted"]["call_us"], plans[0]["predicted_us"]);
    assert!(call["predicted"]["span_us"].as_f64().is_some_and(|us| us > 0.0), "{call}");
    assert_eq!(call["predicted"]["multiprocessors"].as_array().map(Vec::len), Some(132));
    assert!(call.get("achieved").is_none(), "{call}");
    let document = fs::read_to_string(&svg).expect("it was written");
    roxmltree::Document::parse(&document).expect("an SVG document");

    plan(&["--timeline", timeline]).code(2).stderr(predicate::str::contains("--explain"));
    packinfer()
        .args(["plan", "--explain", "--timeline", timeline])
        .args(NO_GPU)
        .arg("--batch")
        .args([&path, &path])
        .assert()
        .code(2)
        .stderr(predicate::str::contains("--timeline draws the schedule of one batch: 2 were given"));
}

/// A calibration of a device with 10 multiprocessors, which is said to launch slowly, and one batch that ran on it.
const CALIBRATION: &str = r#"{"device": "a small device", "source": "a test", "models": [
    {"kernel_family": "sm_80", "head_dim": 64, "num_sms": 10, "blocks_per_sm": 2, "bytes_per_s": 2e11, "cached_bytes_per_s": 4e11,
     "flops_per_s": 3e13, "item_ns": 500, "wide": {"setup_ns": 4000, "step_ns": 200}, "narrow": {"setup_ns": 2000, "step_ns": 500},
     "launch_ns": 400000, "merge_ns": 3000}],
    "measurements": [{"batch": "decode", "kernel_family": "sm_80", "head_dim": 64, "wide_tile_rows": 128, "call_ns": 60000, "items_ns": 55000, "items": [
      {"work": {"tile": "narrow", "memory_bytes": 100000, "cached_bytes": 0, "steps": 7, "flops": 0}, "tasks": 50, "ns": 10500}]}]}"#;

#[test]
fn calibrations_are_planned_by() {
    let batches = Batches::new();
    let batch = batches.file("small.json", &small());
    let calibration = batches.text("calibration.json", CALIBRATION);
    let predicted = |calibration: Option<&Path>| -> f64 {
        let mut command = packinfer();
        command.args(["plan", "--json"]).args(NO_GPU).arg("--batch").arg(&batch);
        if let Some(path) = calibration {
            command.arg("--calibration").arg(path);
        }
        let output = command.assert().success();
        let plans: Vec<Value> = serde_json::from_slice(&output.get_output().stdout).expect("JSON");
        plans[0]["predicted_us"].as_f64().expect("a number")
    };
    // It takes 400 µs to launch.
    assert!(predicted(Some(&calibration)) > 400.0 && predicted(None) < 400.0);
    for command in ["plan", "verify"] {
        packinfer()
            .arg(command)
            .args(NO_GPU)
            .arg("--batch")
            .arg(&batch)
            .arg("--calibration")
            .arg(&calibration)
            .assert()
            .success();
    }
}

#[test]
fn bad_calibrations_are_refused() {
    let batches = Batches::new();
    let batch = batches.file("small.json", &small());
    let cases = [
        ("{", "EOF while parsing"),
        ("[]", "not a calibration: "),
        (&CALIBRATION.replacen("3e13", "-3e13", 1), "flops_per_s -3e13, which no device has"),
        (&CALIBRATION.replacen("\"num_sms\"", "\"sms\"", 1), "unknown field `sms`"),
    ];
    for (text, message) in cases {
        let path = batches.text("bad.json", text);
        for command in ["plan", "verify", "bench"] {
            packinfer()
                .arg(command)
                .args(NO_GPU)
                .arg("--batch")
                .arg(&batch)
                .arg("--calibration")
                .arg(&path)
                .assert()
                .code(2)
                .stderr(predicate::str::contains(message).and(predicate::str::contains("bad.json")));
        }
        packinfer().args(["calibrate", "--refit"]).arg(&path).assert().code(2).stderr(predicate::str::contains(message));
    }
    let calibration = batches.text("calibration.json", CALIBRATION);
    packinfer()
        .args(["plan", "--kernels", "sm_90a", "--batch"])
        .arg(&batch)
        .arg("--calibration")
        .arg(&calibration)
        .assert()
        .code(2)
        .stderr(predicate::str::contains("there is no model of the sm_90a kernels"));
}

#[test]
fn measurements_are_fitted_again() {
    let batches = Batches::new();
    let (calibration, out) = (batches.text("calibration.json", CALIBRATION), batches.path("out.json"));
    packinfer()
        .args(["calibrate", "--refit"])
        .arg(&calibration)
        .arg("--json")
        .arg(&out)
        .assert()
        .success()
        .stdout(predicate::str::contains("a small device").and(predicate::str::contains("no batch with merging")));
    let fitted: Value = serde_json::from_str(&fs::read_to_string(&out).expect("it was written")).expect("JSON");
    assert_eq!(fitted["models"][0]["launch_ns"], 5000.0);
    assert_eq!(fitted["measurements"][0]["batch"], "decode");
    assert!(fitted["fits"][0]["median_error"].as_f64().is_some_and(|error| error < 0.01), "{fitted}");
    // What was written can be read again.
    packinfer().args(["calibrate", "--refit"]).arg(&out).assert().success();
}

#[test]
fn decode_runs_tell_of_the_pool_without_a_gpu() {
    let batches = Batches::new();
    let mut text = String::from("TIMESTAMP,ContextTokens,GeneratedTokens\n");
    for index in 0..100 {
        text += &format!("2023-11-16 18:15:46.{index:03},{},{}\n", 100 + index * 37 % 500, 20 + index * 13 % 200);
    }
    let (trace, out) = (batches.text("trace.csv", &text), batches.path("out.json"));
    let decode_run = |arguments: &[&str]| {
        let mut command = packinfer();
        command
            .args(["decode-run", "--device", "cpu", "--requests", "16", "--steps", "300", "--trace"])
            .arg(&trace)
            .args(arguments);
        command
    };
    let found = predicate::str::contains("KV runs of a request").and(predicate::str::contains("nothing was measured"));
    decode_run(&["--json"]).arg(&out).assert().success().stdout(found);
    let report: serde_json::Value = serde_json::from_slice(&fs::read(&out).unwrap()).unwrap();
    let layouts: Vec<_> = report["layouts"].as_array().unwrap().iter().map(|run| run["layout"].as_str().unwrap()).collect();
    assert_eq!(layouts, ["paged", "contiguous", "moved", "groups"]);
    let runs_of = |index: usize| report["layouts"][index]["pool"]["read_runs"].as_u64().unwrap();
    assert!(runs_of(0) > 3 * runs_of(1) && runs_of(0) > runs_of(2) && runs_of(0) > runs_of(3), "{report}");
    let moved_bytes_of = |index: usize| report["layouts"][index]["moved_bytes"].as_u64().unwrap();
    assert!(moved_bytes_of(0) == 0 && moved_bytes_of(2) > 0 && moved_bytes_of(3) > 0, "{report}");
    let groups = &report["layouts"][3];
    let (looked_at, moved) = (&groups["pool"]["groups_looked_at"], &groups["pool"]["groups_moved"]);
    assert!(groups["group_size"] == 4 && moved["fragmentation"].as_u64() > Some(0), "{report}");
    assert!(looked_at["fragmentation"].as_u64() > moved["fragmentation"].as_u64(), "{report}");
    // Some of the layouts, with thresholds that nothing passes.
    let never = ["--layouts", "groups,paged", "--group-size", "2", "--group-fragmentation", "1", "--imbalance", "1e9"];
    decode_run(&never).arg("--json").arg(&out).assert().success().stdout(predicate::str::contains("contiguous").not());
    let report: serde_json::Value = serde_json::from_slice(&fs::read(&out).unwrap()).unwrap();
    let never = &report["layouts"][0];
    assert!(never["layout"] == "groups" && never["group_size"] == 2 && never["moved_bytes"] == 0, "{report}");
    assert!(report["layouts"][1]["layout"] == "paged" && report["layouts"].as_array().unwrap().len() == 2, "{report}");
    for (argument, value) in
        [("--group-fragmentation", "1.5"), ("--imbalance", "0.5"), ("--imbalance", "inf"), ("--group-size", "0")]
    {
        decode_run(&[argument, value]).assert().code(2).stderr(predicate::str::contains(argument));
    }
    decode_run(&["--slots", "1024"]).assert().code(2).stderr(predicate::str::contains("a pool of 1024 slots does not hold 16"));
}

#[test]
fn measuring_kv_pools_needs_a_gpu() {
    if Path::new("/dev/nvidiactl").exists() {
        eprintln!("skipped: this machine has an NVIDIA driver");
        return;
    }
    packinfer().arg("bench-kv").assert().code(2).stderr(predicate::str::contains("driver"));
}

#[test]
fn calibrating_needs_a_gpu() {
    if Path::new("/dev/nvidiactl").exists() {
        eprintln!("skipped: this machine has an NVIDIA driver");
        return;
    }
    packinfer().arg("calibrate").assert().code(2).stderr(predicate::str::contains("driver"));
}

/// Windows need causal masks, which are not possible where queries outnumber KV tokens: these variants are left out.
#[test]
fn the_matrix_has_what_a_batch_can_have() {
    let batches = Batches::new();
    let variants = |name: &str, file: &BatchFile, window: bool| {
        let stdout =
            predicate::str::contains("d256 all options").and(predicate::str::contains(" window").count(usize::from(window) * 8));
        packinfer()
            .args(["verify", "--device", "cpu", "--matrix", "--batch"])
            .arg(batches.file(name, file))
            .assert()
            .success()
            .stdout(stdout);
    };
    let few = BatchFile { requests: vec![request(3, 40, &[]), request(1, 20, &[])], ..small() };
    variants("causal.json", &few, true);
    variants("full.json", &BatchFile { causal: false, requests: vec![request(40, 30, &[])], ..few }, false);
}

#[test]
fn bench_measures_the_baseline_too() {
    let batches = Batches::new();
    let out = batches.path("out.json");
    packinfer()
        .args(["bench", "--device", "cpu", "--repeat", "3", "--baseline", "per-request", "--kv", "contiguous", "--json"])
        .arg(&out)
        .arg("--batch")
        .arg(batches.file("small.json", &small()))
        .assert()
        .success()
        .stderr(predicate::str::is_empty())
        .stdout(
            predicate::str::contains("floor µs").and(predicate::str::contains("speed-up")).and(predicate::str::contains("small")),
        );
    let report: Value = serde_json::from_str(&fs::read_to_string(out).expect("it was written")).expect("JSON");
    let batch = &report["batches"][0];
    assert_eq!(batch["runs"], 3);
    for number in ["floor_us", "time_us", "ratio", "gb_per_s", "tflop_per_s", "plan_us"] {
        assert!(batch[number].as_f64().is_some_and(|number| number > 0.0), "{number} in {batch}");
    }
    assert!(batch["baseline"]["speed_up"].as_f64().is_some_and(|number| number > 0.0), "{batch}");
    assert!(report["ceilings"]["copy_bytes_per_s"].as_f64().is_some_and(|number| number > 0.0), "{report}");
    assert_eq!(report["kv"], "contiguous");
    assert!(report["date"].is_string() && report["device"].is_string(), "{report}");
}

#[test]
fn bench_has_a_batch_of_its_own() {
    packinfer()
        .args(["bench", "--device", "cpu", "--repeat", "1"])
        .assert()
        .success()
        .stdout(predicate::str::contains("builtin_mixed"));
}

#[test]
fn bench_says_where_it_cannot_write() {
    let batches = Batches::new();
    packinfer()
        .args(["bench", "--device", "cpu", "--repeat", "1", "--json"])
        .arg(batches.path("no/such/folder.json"))
        .arg("--batch")
        .arg(batches.file("small.json", &small()))
        .assert()
        .code(2)
        .stderr(predicate::str::contains("folder.json"));
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let mut child = std::process::Command::new(assert_cmd::cargo::cargo_bin!("packinfer"))
        .arg("info")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("the program ends");
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}
