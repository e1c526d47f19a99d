//! `cargo xtask gpu-bundle`: one folder with what a machine with a GPU needs to test and measure, without Rust or the sources.
//!
//! | in the folder | what it is |
//! | --- | --- |
//! | `packinfer` | the program, with the kernels in it |
//! | `gpu-tests` | the GPU tests of the library |
//! | `batches/`, `small/` | batches to verify and measure, and small ones for compute-sanitizer |
//! | `traces/` | traces to decode requests of, if given |
//! | `peers.py`, `wheels/` | a script that measures other libraries, and their wheels, if given |
//! | `run.sh` | runs it all; its first lines say how |

use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use anyhow::{Context, Result, ensure};

use crate::workspace;

/// Arguments of `gpu-bundle`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The folder to make; what an earlier bundle left there goes.
    #[arg(long, value_name = "DIR", default_value = "gpu-bundle")]
    out: PathBuf,
    /// Folder of the batch files to verify and measure; by default benches/batches, the small ones.
    #[arg(long, value_name = "DIR")]
    batches: Option<PathBuf>,
    /// Traces to decode requests of, for `packinfer decode-run`.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    traces: Vec<PathBuf>,
    /// A Python script that measures other libraries: called as `FILE --out RESULT.json BATCH.json …`.
    #[arg(long, value_name = "FILE")]
    peers: Option<PathBuf>,
    /// Folder of Python wheels that the script needs.
    #[arg(long, value_name = "DIR", requires = "peers")]
    wheels: Option<PathBuf>,
}

/// Package and program name of the command line.
const PROGRAM: (&str, &str) = ("packinfer-cli", "packinfer");
/// Package and test name of the GPU tests.
const TESTS: (&str, &str) = ("packinfer", "gpu");

const MEBIBYTE: f64 = 1_048_576.0;

/// Runs the chore.
///
/// # Errors
///
/// Something does not build, or a file that is to go in is not there.
pub fn run(args: &Args) -> Result<()> {
    let program = build(&["build", "--release", "--package", PROGRAM.0, "--bin", PROGRAM.1], PROGRAM.1)?;
    let tests = build(&["test", "--no-run", "--release", "--package", TESTS.0, "--test", TESTS.1], TESTS.1)?;

    let out = &args.out;
    clear(out)?;
    install(&program, &out.join("packinfer"))?;
    install(&tests, &out.join("gpu-tests"))?;
    let small = workspace::root().join("benches/batches");
    copy_files(&small, "json", &out.join("small"))?;
    copy_files(args.batches.as_ref().unwrap_or(&small), "json", &out.join("batches"))?;
    let traces = out.join("traces");
    fs::create_dir_all(&traces).with_context(|| format!("cannot make {}", traces.display()))?;
    for trace in &args.traces {
        let name = trace.file_name().with_context(|| format!("{} is no file", trace.display()))?;
        copy(trace, &traces.join(name))?;
    }
    if let Some(peers) = &args.peers {
        copy(peers, &out.join("peers.py"))?;
    }
    if let Some(wheels) = &args.wheels {
        copy_files(wheels, "whl", &out.join("wheels"))?;
    }
    let script = out.join("run.sh");
    fs::write(&script, include_str!("gpu_bundle/run.sh")).with_context(|| format!("cannot write {}", script.display()))?;
    make_executable(&script)?;

    println!(
        "{}: {:.1} MiB; on the machine with the GPU: {}/run.sh RESULTS",
        out.display(),
        size(out)? as f64 / MEBIBYTE,
        out.display()
    );
    Ok(())
}

/// Builds with this workspace's cargo, and returns the file of the program or test `name`.
fn build(arguments: &[&str], name: &str) -> Result<PathBuf> {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace::root()).args(arguments);
    let artifacts = workspace::artifacts(&mut cargo, &[])?;
    let executable =
        artifacts.into_iter().filter(|artifact| artifact.target.name == name).find_map(|artifact| artifact.executable);
    executable.with_context(|| format!("cargo built no {name}"))
}

/// Makes an empty folder of `folder`, but does not empty one that holds something other than a bundle.
fn clear(folder: &Path) -> Result<()> {
    if folder.exists() {
        let is_bundle = folder.join("run.sh").is_file() && folder.join("packinfer").is_file();
        let is_empty = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?.next().is_none();
        ensure!(is_bundle || is_empty, "{} is there and is no bundle: name another folder", folder.display());
        fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))
}

/// Copies a program without its debug information.
fn install(program: &Path, to: &Path) -> Result<()> {
    copy(program, to)?;
    if let Err(error) = workspace::run(Command::new("strip").arg(to)) {
        eprintln!("{} keeps its debug information: {error:#}", to.display());
    }
    make_executable(to)
}

fn make_executable(file: &Path) -> Result<()> {
    fs::set_permissions(file, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("cannot make {} executable", file.display()))
}

fn copy(file: &Path, to: &Path) -> Result<()> {
    let text = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    // Not `fs::copy`, which keeps permissions: a file that cannot be written would stay so.
    fs::write(to, text).with_context(|| format!("cannot write {}", to.display()))
}

/// Copies the files of a folder that end in `.extension`.
fn copy_files(folder: &Path, extension: &str, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("cannot make {}", to.display()))?;
    let mut copied = 0;
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let file = entry?.path();
        if let (true, Some(name)) = (file.extension() == Some(OsStr::new(extension)), file.file_name()) {
            copy(&file, &to.join(name))?;
            copied += 1;
        }
    }
    ensure!(copied > 0, "{} has no .{extension} file", folder.display());
    Ok(())
}

/// Bytes of all files below a folder.
fn size(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        bytes += if metadata.is_dir() { size(&entry.path())? } else { metadata.len() };
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_bundle_is_emptied() {
        let folder = tempfile::tempdir().unwrap();
        let bundle = folder.path().join("bundle");
        clear(&bundle).unwrap();
        clear(&bundle).expect("an empty folder may be used");
        fs::write(bundle.join("thesis.tex"), "precious").unwrap();
        assert!(clear(&bundle).unwrap_err().to_string().contains("no bundle"));
        for file in ["run.sh", "packinfer"] {
            fs::write(bundle.join(file), "").unwrap();
        }
        clear(&bundle).unwrap();
        assert_eq!(fs::read_dir(&bundle).unwrap().count(), 0);
    }

    #[test]
    fn files_of_one_kind_are_copied() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        fs::create_dir(&from).unwrap();
        fs::write(from.join("a.txt"), "A").unwrap();
        assert!(copy_files(&from, "json", &to).unwrap_err().to_string().contains("no .json"));
        fs::write(from.join("b.json"), "BB").unwrap();
        copy_files(&from, "json", &to).unwrap();
        assert_eq!(size(&to).unwrap(), 2);
    }

    #[test]
    fn the_script_is_bash() {
        let folder = tempfile::tempdir().unwrap();
        let script = folder.path().join("run.sh");
        fs::write(&script, include_str!("gpu_bundle/run.sh")).unwrap();
        workspace::run(Command::new("bash").arg("-n").arg(&script)).unwrap();
        let help = workspace::output_of(Command::new("bash").arg(&script).arg("--help")).unwrap();
        assert!(help.contains("usage: run.sh RESULTS [STEP...]"), "{help}");
        assert!(workspace::output_of(Command::new("bash").arg(&script).args(["results", "nonsense"])).is_err());
    }
}
