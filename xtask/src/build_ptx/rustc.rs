//! The backend `rustc`: rustc's own target `nvptx64-nvidia-cuda`.
//!
//! The target has no compiled standard library, so `core` is built from source. That takes a compiler whose sysroot has that
//! source, and unstable options, which `RUSTC_BOOTSTRAP` allows on any compiler.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use anyhow::{Context, Result, ensure};

use super::Arch;
use crate::workspace;

const TARGET: &str = "nvptx64-nvidia-cuda";

/// The device crate's library.
const CRATE: &str = "packinfer_kernels";

/// Unrolls every loop over registers, however long: a register cannot be indexed, and an array of which one index is left at run
/// time lies in memory. In LLVM instructions of the unrolled loop.
const UNROLL_THRESHOLD: u32 = 20_000;

impl Arch {
    /// The PTX version with what the kernels use; the lower it is, the older the drivers that load it.
    fn ptx_version(self) -> &'static str {
        match self {
            // cp.async that prefetches to L2 needs it. CUDA 11.4, driver 470.
            Self::Sm80 => "+ptx74",
            // The first with sm_90a. CUDA 12.0, driver 525.
            Self::Sm90a => "+ptx80",
        }
    }
}

/// A compiler that can build `core`.
#[derive(Debug)]
pub struct Toolchain {
    rustc: PathBuf,
    cargo: PathBuf,
    /// `rustc --version`, and LLVM's version.
    version: String,
}

impl Toolchain {
    /// The compiler at `chosen`; or else, of those on this system that have the library's source, the one that the committed PTX
    /// comes from, or the first.
    ///
    /// # Errors
    ///
    /// There is none; the message says how to get one.
    pub fn find(chosen: Option<&Path>) -> Result<Self> {
        if let Some(rustc) = chosen {
            return Self::at(rustc);
        }
        let mut found: Vec<Self> = installed_compilers().iter().filter_map(|rustc| Self::at(rustc).ok()).collect();
        let committed = fs::read_to_string(workspace::committed_ptx().join(super::VERSION_FILE)).unwrap_or_default();
        let preferred = found.iter().position(|toolchain| toolchain.version == committed.trim()).unwrap_or(0);
        ensure!(
            !found.is_empty(),
            "no Rust compiler here has the source of its standard library, which kernels are built with.\n\
             Install one:    {}\n\
             or name one:    --rustc PATH, or the environment variable PACKINFER_RUSTC",
            install_command(&fs::read_to_string("/etc/os-release").unwrap_or_default())
        );
        Ok(found.swap_remove(preferred))
    }

    fn at(rustc: &Path) -> Result<Self> {
        let sysroot = workspace::output_of(Command::new(rustc).args(["--print", "sysroot"]))?;
        let library = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library");
        ensure!(
            library.join("core/Cargo.toml").is_file(),
            "{} has no library source at {}; with rustup, `rustup component add rust-src` adds it",
            rustc.display(),
            library.display()
        );
        let cargo = rustc.with_file_name("cargo");
        ensure!(cargo.is_file(), "{} has no cargo beside it", rustc.display());
        let version = version(&workspace::output_of(Command::new(rustc).arg("-vV"))?);
        Ok(Self { rustc: rustc.to_owned(), cargo, version })
    }

    /// The compiler's version and that of its LLVM.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Compiles the device crate to PTX.
    ///
    /// # Errors
    ///
    /// The compiler fails; it has said why.
    pub fn compile(&self, arch: Arch) -> Result<String> {
        let mut cargo = workspace::foreign_cargo(&self.cargo);
        cargo.current_dir(workspace::kernels()).env("RUSTC", &self.rustc).env("RUSTC_BOOTSTRAP", "1");
        cargo.env("CARGO_ENCODED_RUSTFLAGS", rustflags(arch).join("\x1f"));
        cargo.args(["rustc", "--quiet", "--locked", "--release", "--lib", "--no-default-features", "--features", arch.name()]);
        cargo.args(["--target", TARGET, "-Zbuild-std=core", "--target-dir"]).arg(workspace::target().join("build-ptx"));
        let artifacts = workspace::artifacts(&mut cargo, &["--", "--emit=asm"])?;

        // The assembly lies beside the metadata, and has its name.
        let metadata = artifacts.iter().filter(|artifact| artifact.target.name == CRATE).flat_map(|artifact| &artifact.filenames);
        let library =
            metadata.rev().find_map(|file| Some(file.strip_suffix(".rmeta")?.to_owned())).context("cargo built no library")?;
        let library = Path::new(&library);
        let name = library.file_name().context("cargo built a library without a name")?.to_string_lossy();
        let assembly = library.with_file_name(format!("{}.s", name.trim_start_matches("lib")));
        fs::read_to_string(&assembly).with_context(|| format!("cannot read {}", assembly.display()))
    }
}

fn rustflags(arch: Arch) -> Vec<String> {
    vec![
        format!("-Ctarget-cpu={}", arch.name()),
        format!("-Ctarget-feature={}", arch.ptx_version()),
        format!("-Cllvm-args=-unroll-threshold={UNROLL_THRESHOLD}"),
        // This pass copies barriers into the branches of conditions.
        "-Zmir-enable-passes=-JumpThreading".to_owned(),
        // A panic is a trap, without a message or the functions that would print it.
        "-Zunstable-options".to_owned(),
        "-Cpanic=immediate-abort".to_owned(),
        // The PTX does not depend on where it was built.
        format!("--remap-path-prefix={}=packinfer", workspace::root().display()),
    ]
}

/// The compilers that may be there: those on the search path, the system's own, and rustup's.
fn installed_compilers() -> BTreeSet<PathBuf> {
    let on_path = workspace::search_path().into_iter().chain(["/usr/bin".into()]).map(|folder| folder.join("rustc"));
    let rustup = env::var_os("RUSTUP_HOME").map(PathBuf::from).or_else(|| Some(env::home_dir()?.join(".rustup")));
    let toolchains = rustup.and_then(|rustup| fs::read_dir(rustup.join("toolchains")).ok()).into_iter().flatten().flatten();
    on_path.chain(toolchains.map(|toolchain| toolchain.path().join("bin/rustc"))).filter(|rustc| rustc.is_file()).collect()
}

/// `rustc 1.96.0 (ac68faa20 2026-05-25), LLVM 22.1.8`, from what `rustc -vV` prints.
fn version(verbose: &str) -> String {
    let rustc = verbose.lines().next().unwrap_or_default();
    // Debian adds how it was built.
    let rustc = rustc.split_inclusive(')').next().unwrap_or(rustc);
    let llvm = verbose.lines().find_map(|line| line.strip_prefix("LLVM version: ")).unwrap_or("unknown");
    format!("{rustc}, LLVM {llvm}")
}

/// The command that installs a compiler on the system that `/etc/os-release` describes.
fn install_command(os_release: &str) -> &'static str {
    let values = os_release.lines().filter_map(|line| line.strip_prefix("ID=").or_else(|| line.strip_prefix("ID_LIKE=")));
    let is_debian = values.flat_map(|value| value.trim_matches('"').split(' ')).any(|id| ["debian", "ubuntu"].contains(&id));
    if is_debian { "apt-get install rustc-web rust-web-src" } else { "rustup toolchain install nightly --component rust-src" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_without_the_packager_s_note() {
        let verbose = "rustc 1.96.0 (ac68faa20 2026-05-25) (built from a source tarball)\nbinary: rustc\nLLVM version: 22.1.8\n";
        assert_eq!(version(verbose), "rustc 1.96.0 (ac68faa20 2026-05-25), LLVM 22.1.8");
        assert_eq!(version("rustc 1.97.0-nightly\n"), "rustc 1.97.0-nightly, LLVM unknown");
    }

    #[test]
    fn the_install_command_fits_the_system() {
        assert!(install_command("PRETTY_NAME=\"Debian\"\nID=debian\n").starts_with("apt-get"));
        assert!(install_command("ID=linuxmint\nID_LIKE=\"ubuntu debian\"\n").starts_with("apt-get"));
        assert!(install_command("ID=fedora\nVERSION_ID=43\n").starts_with("rustup"));
        assert!(install_command("").starts_with("rustup"));
    }

    #[test]
    fn a_chosen_compiler_that_does_not_do_is_an_error() {
        assert!(Toolchain::find(Some(Path::new("/nonexistent/rustc"))).unwrap_err().to_string().contains("/nonexistent/rustc"));
    }
}
