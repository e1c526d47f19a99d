//! `cargo xtask ptxas`: assembles the committed PTX, and shows what each kernel needs of the hardware.
//!
//! A kernel that keeps registers in memory (spills), or of which `ptxas` warns, fails the chore unless `xtask/ptxas-allow.toml`
//! says why that is right.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use anyhow::{Context, Result, anyhow, bail, ensure};
use comfy_table::{CellAlignment, Table, presets};
use rayon::prelude::*;

use self::allowed::AllowList;
use self::report::Report;
use crate::workspace;

mod allowed;
mod report;

/// Arguments of `ptxas`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Architectures whose PTX is assembled, as the folders are called; all of them by default.
    #[arg(long, value_name = "ARCH", value_delimiter = ',')]
    arch: Vec<String>,
    /// Folder of the PTX.
    #[arg(long, value_name = "DIR")]
    ptx: Option<PathBuf>,
}

/// What the PTX of an architecture is assembled for: its own hardware, and other hardware that it is to run well on.
const HARDWARE: [(&str, &[&str]); 2] = [("sm_80", &["sm_80", "sm_90"]), ("sm_90a", &["sm_90a"])];

/// Lines of an assembler's complaint that are shown: the same error comes back for each copy of an unrolled loop.
const ERROR_LINES: usize = 10;

/// One kernel, to be assembled for one piece of hardware.
struct Job {
    file: PathBuf,
    kernel: String,
    ptx_arch: &'static str,
    hardware: &'static str,
}

/// Runs the chore.
///
/// # Errors
///
/// No `ptxas`, no PTX, PTX that does not assemble, and spills or warnings that are not allowed.
pub fn run(args: &Args) -> Result<()> {
    let ptxas = find_ptxas()?;
    eprintln!("assembling with {}", ptxas.display());
    let jobs = jobs(&args.ptx.clone().unwrap_or_else(workspace::committed_ptx), &args.arch)?;
    let reports: Vec<Report> = jobs.par_iter().map(|job| assemble(&ptxas, job)).collect::<Result<_>>()?;
    println!("{}", table(&jobs, &reports));

    let mut allowed = AllowList::read(&workspace::root().join("xtask/ptxas-allow.toml"))?;
    let mut complaints = Vec::new();
    for (job, report) in jobs.iter().zip(&reports) {
        for finding in report.findings() {
            match allowed.reason(&job.kernel, job.hardware, &finding) {
                Some(reason) => println!("{} on {}: {finding} (allowed: {reason})", job.kernel, job.hardware),
                None => complaints.push(format!("{} on {}: {finding}", job.kernel, job.hardware)),
            }
        }
    }
    if args.arch.is_empty() {
        for entry in allowed.unused() {
            println!("xtask/ptxas-allow.toml allows what is no more: {entry}");
        }
    }
    ensure!(complaints.is_empty(), "not allowed by xtask/ptxas-allow.toml:\n  {}", complaints.join("\n  "));
    Ok(())
}

fn jobs(folder: &Path, archs: &[String]) -> Result<Vec<Job>> {
    if let Some(unknown) = archs.iter().find(|arch| !HARDWARE.iter().any(|(known, _)| arch == known)) {
        bail!("there is no PTX for {unknown}: {}", HARDWARE.map(|(arch, _)| arch).join(" or "));
    }
    let mut jobs = Vec::new();
    for (ptx_arch, all_hardware) in HARDWARE {
        let folder = folder.join(ptx_arch);
        if !folder.is_dir() || (!archs.is_empty() && !archs.iter().any(|arch| arch == ptx_arch)) {
            continue;
        }
        let entries = fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
        let mut files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        files.retain(|file| file.extension() == Some(OsStr::new("ptx")));
        files.sort();
        for file in files {
            let kernel = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            for hardware in all_hardware {
                jobs.push(Job { file: file.clone(), kernel: kernel.clone(), ptx_arch, hardware });
            }
        }
    }
    ensure!(!jobs.is_empty(), "no PTX in {}: `cargo xtask build-ptx` writes it", folder.display());
    Ok(jobs)
}

fn assemble(ptxas: &Path, job: &Job) -> Result<Report> {
    let mut command = Command::new(ptxas);
    command.args(["--verbose", "--gpu-name", job.hardware, "--output-file", "/dev/null"]).arg(&job.file);
    let output = command.output().with_context(|| format!("cannot start {}", ptxas.display()))?;
    let printed = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    let file = workspace::shown(&job.file);
    let first_lines = || printed.lines().take(ERROR_LINES).collect::<Vec<_>>().join("\n");
    ensure!(output.status.success(), "{file} does not assemble for {}:\n{}", job.hardware, first_lines());
    Report::parse(&printed, &job.kernel).with_context(|| format!("what ptxas says of {file} is not understood"))
}

fn table(jobs: &[Job], reports: &[Report]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table.set_header(["kernel", "PTX", "hardware", "registers", "shared", "stack", "spill stores", "spill loads", "warnings"]);
    for (job, report) in jobs.iter().zip(reports) {
        let texts = [&job.kernel, job.ptx_arch, job.hardware].map(str::to_owned);
        let Report { registers, shared_bytes, stack_bytes, spill_store_bytes, spill_load_bytes, warnings } = report;
        let numbers =
            [*registers, *shared_bytes, *stack_bytes, *spill_store_bytes, *spill_load_bytes].map(|number| number.to_string());
        table.add_row(texts.into_iter().chain(numbers).chain([warnings.len().to_string()]));
    }
    for column in table.column_iter_mut().skip(3) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// `$PTXAS`, or the one on the search path, or the one of NVIDIA's Python package.
fn find_ptxas() -> Result<PathBuf> {
    if let Some(named) = env::var_os("PTXAS") {
        let named = PathBuf::from(named);
        ensure!(named.is_file(), "PTXAS names {}, which is no file", named.display());
        return Ok(named);
    }
    workspace::find_program("ptxas").or_else(in_python_package).ok_or_else(|| {
        anyhow!(
            "no ptxas: neither on the search path, nor named by the environment variable PTXAS, nor in a Python package.\n\
             Install one:    python3 -m pip install nvidia-cuda-nvcc==13.0.88"
        )
    })
}

/// The `ptxas` of the package `nvidia-cuda-nvcc` (`nvidia/cu13/bin`, or `nvidia/cuda_nvcc/bin` of older ones).
fn in_python_package() -> Option<PathBuf> {
    let list_folders = "import nvidia; print('\\n'.join(nvidia.__path__))";
    let folders = workspace::output_of(Command::new("python3").args(["-c", list_folders])).ok()?;
    let packages = folders.lines().filter_map(|folder| fs::read_dir(folder).ok()).flatten().flatten();
    packages.map(|package| package.path().join("bin/ptxas")).find(|ptxas| ptxas.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sm_80_is_assembled_for_hopper_too() {
        let folder = tempfile::tempdir().unwrap();
        for file in ["sm_80/b.ptx", "sm_80/a.ptx", "sm_80/notes.txt", "sm_90a/c.ptx"] {
            let file = folder.path().join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, "").unwrap();
        }
        let names = |archs: &[String]| -> Vec<String> {
            jobs(folder.path(), archs).unwrap().iter().map(|job| format!("{}:{}", job.kernel, job.hardware)).collect()
        };
        assert_eq!(names(&[]), ["a:sm_80", "a:sm_90", "b:sm_80", "b:sm_90", "c:sm_90a"]);
        assert_eq!(names(&["sm_90a".to_owned()]), ["c:sm_90a"]);
        assert!(jobs(folder.path(), &["sm_75".to_owned()]).is_err());
        assert!(jobs(&folder.path().join("nothing"), &[]).is_err());
    }
}
