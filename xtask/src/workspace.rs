//! Where things lie, and how other programs are run.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

/// The workspace's root folder.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace's root")
}

/// The folder of the device crate.
pub fn kernels() -> PathBuf {
    root().join("kernels-gpu")
}

/// The folder of the committed PTX, which has one folder for each architecture.
pub fn committed_ptx() -> PathBuf {
    kernels().join("ptx")
}

/// Cargo's target folder.
pub fn target() -> PathBuf {
    // A relative path is relative to where cargo was called, which is not known here; cargo's own default is the root.
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |folder| root().join(folder))
}

/// `path` as a message shows it: relative to the root where it lies there.
pub fn shown(path: &Path) -> std::path::Display<'_> {
    path.strip_prefix(root()).unwrap_or(path).display()
}

/// The folders of the environment variable `PATH`.
pub fn search_path() -> Vec<PathBuf> {
    env::var_os("PATH").map(|path| env::split_paths(&path).collect()).unwrap_or_default()
}

/// The first `program` that is found on the search path.
pub fn find_program(program: &str) -> Option<PathBuf> {
    search_path().into_iter().map(|folder| folder.join(program)).find(|path| path.is_file())
}

/// A command that calls a cargo other than the one that runs this program: without what the latter left in the environment.
pub fn foreign_cargo(cargo: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(cargo);
    for (name, _) in env::vars_os() {
        let name_text = name.to_string_lossy();
        let of_the_outer_cargo = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_"];
        let flags = ["CARGO", "RUSTC", "RUSTDOC", "RUSTUP_TOOLCHAIN", "RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "RUSTC_WRAPPER"];
        if flags.contains(&name_text.as_ref()) || of_the_outer_cargo.iter().any(|prefix| name_text.starts_with(prefix)) {
            command.env_remove(&name);
        }
    }
    command
}

/// What cargo says of a thing that it built.
#[derive(Debug, Deserialize)]
pub struct Artifact {
    /// What it was built from.
    pub target: ArtifactTarget,
    /// The files.
    pub filenames: Vec<String>,
    /// The file that can be run.
    pub executable: Option<PathBuf>,
}

/// What a thing was built from.
#[derive(Debug, Deserialize)]
pub struct ArtifactTarget {
    /// Name of the library, program or test.
    pub name: String,
}

/// Runs a cargo command that builds, with `last_arguments` at its end, and returns what it built.
///
/// # Errors
///
/// It cannot be started, or fails; it has said why on the terminal.
pub fn artifacts(cargo: &mut Command, last_arguments: &[&str]) -> Result<Vec<Artifact>> {
    cargo.arg("--message-format=json-render-diagnostics").args(last_arguments).stderr(Stdio::inherit());
    let messages = output_of(cargo)?;
    // Messages of other kinds do not have these fields.
    Ok(messages.lines().filter_map(|message| serde_json::from_str(message).ok()).collect())
}

/// Runs a command to its end.
///
/// # Errors
///
/// It cannot be started, or fails.
pub fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_owned();
    let status = command.status().with_context(|| format!("cannot start {}", program.display()))?;
    if !status.success() {
        bail!("{} failed ({status})", program.display());
    }
    Ok(())
}

/// Runs a command to its end, and returns what it printed.
///
/// # Errors
///
/// It cannot be started, or fails.
pub fn output_of(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_owned();
    let output = command.output().with_context(|| format!("cannot start {}", program.display()))?;
    if !output.status.success() {
        // Empty where the command wrote to the terminal.
        let message = String::from_utf8_lossy(&output.stderr);
        let separator = if message.is_empty() { "" } else { ": " };
        bail!("{} failed ({}){separator}{}", program.display(), output.status, message.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
