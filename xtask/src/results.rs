//! `cargo xtask results`: what `packinfer bench --json` measured, with the peers' times beside it, as a page and a figure.
//!
//! [`input`] reads the files, [`join`] puts the rows of one batch together, [`markdown`] and [`figure`] show them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use self::input::{Bench, Peers};
use self::join::Results;
use crate::workspace;

mod figure;
mod input;
mod join;
mod markdown;

/// Arguments of `results`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What `packinfer bench --json` wrote; may be given several times, for a table each.
    #[arg(long, value_name = "FILE", required = true)]
    bench: Vec<PathBuf>,
    /// What the peers' script wrote, measured on a device of the same name; may be given several times, for peers that were
    /// measured apart. Of a peer that is in several files, the first one's times are taken.
    #[arg(long, value_name = "FILE")]
    peers: Vec<PathBuf>,
    /// Name of the two files that are written; by default date and device, such as 2026-11-23-h100.
    #[arg(long)]
    name: Option<String>,
    /// Commit that was measured; by default the one that is checked out.
    #[arg(long, value_name = "HASH")]
    commit: Option<String>,
    /// A sentence on the circumstances of the measurement, for the page.
    #[arg(long, value_name = "TEXT")]
    note: Option<String>,
    /// Folder to write to; by default benches/results.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Where results are kept, from the root.
const FOLDER: &str = "benches/results";

/// Runs the chore.
///
/// # Errors
///
/// A file that cannot be read or written, that lacks a field, or whose fields do not fit those of another.
pub fn run(args: &Args) -> Result<()> {
    let benches = args.bench.iter().map(|path| input::read(path)).collect::<Result<Vec<Bench>>>()?;
    let peers = args.peers.iter().map(|path| Peers::read(path)).collect::<Result<Vec<Peers>>>()?;
    let results = Results::new(benches, peers).with_context(|| {
        let files: Vec<_> = args.bench.iter().chain(&args.peers).map(|path| path.display().to_string()).collect();
        files.join(", ")
    })?;
    let commit = args.commit.clone().map_or_else(checked_out, Ok)?;
    let name = args.name.clone().unwrap_or_else(|| results.default_name());
    ensure!(!name.is_empty() && !name.contains(['/', '\\']), "--name {name:?} is no file name");

    let folder = args.out.clone().unwrap_or_else(|| workspace::root().join(FOLDER));
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let figure = format!("{name}.svg");
    write(&folder.join(&figure), &figure::svg(&results)?)?;
    write(&folder.join(format!("{name}.md")), &markdown::page(&results, &commit, args.note.as_deref(), &figure))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{}", workspace::shown(path));
    Ok(())
}

/// The commit that is checked out, and whether files differ from it.
fn checked_out() -> Result<String> {
    let git = |arguments: &[&str]| workspace::output_of(Command::new("git").current_dir(workspace::root()).args(arguments));
    let hash = git(&["rev-parse", "HEAD"]).context("which commit was measured? Say it with --commit")?;
    // Results themselves are not what was measured.
    let changes = git(&["status", "--porcelain", "--", ".", &format!(":!{FOLDER}")])?;
    let changes = if changes.is_empty() { "" } else { " with uncommitted changes" };
    Ok(format!("{}, checked out{changes} when this page was written", hash.trim()))
}
