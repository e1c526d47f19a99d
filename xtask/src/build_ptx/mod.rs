//! `cargo xtask build-ptx`: kernels in Rust to PTX.
//!
//! A backend ([`rustc`] or [`cuda_builder`]) compiles the device crate for one architecture at a time; [`split`] makes of its
//! output one module for each kernel, which is a file `ARCHITECTURE/KERNEL.ptx`. The committed files come from the backend
//! `rustc`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use self::split::Module;
use crate::workspace;

mod cuda_builder;
mod declared;
mod rustc;
mod split;

/// Arguments of `build-ptx`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Architectures to build for.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Arch::ALL)]
    arch: Vec<Arch>,
    /// What compiles the kernels.
    #[arg(long, value_enum, default_value_t)]
    backend: Backend,
    /// Builds, writes nothing, and fails if the files are not the same as those built.
    #[arg(long)]
    check: bool,
    /// The compiler to use: a rustc whose sysroot has the source of the standard library, with cargo beside it.
    #[arg(long, value_name = "PATH", env = "PACKINFER_RUSTC")]
    rustc: Option<PathBuf>,
    /// Folder for the PTX: by default kernels-gpu/ptx, or, for the backend cuda-builder, target/ptx-cuda-builder.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// What a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Arch {
    /// Every GPU from Ampere on.
    #[value(name = "sm_80")]
    Sm80,
    /// Hopper alone, with its own instructions.
    #[value(name = "sm_90a")]
    Sm90a,
}

impl Arch {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Sm80, Self::Sm90a];

    /// Its name in PTX; also the device crate's feature, and the folder of its files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sm80 => "sm_80",
            Self::Sm90a => "sm_90a",
        }
    }
}

/// What compiles the kernels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Backend {
    /// rustc's own NVPTX backend.
    Rustc,
    /// rust-cuda's cuda_builder.
    CudaBuilder,
    /// rustc where a compiler for it is found, else cuda-builder.
    #[default]
    Auto,
}

/// A backend that is ready to compile.
enum Compiler {
    Rustc(rustc::Toolchain),
    CudaBuilder(cuda_builder::Toolchain),
}

impl Compiler {
    fn find(args: &Args) -> Result<Self> {
        let rustc = || rustc::Toolchain::find(args.rustc.as_deref()).map(Self::Rustc);
        let cuda_builder = || cuda_builder::Toolchain::find(args.rustc.as_deref()).map(Self::CudaBuilder);
        match args.backend {
            Backend::Rustc => rustc(),
            Backend::CudaBuilder => cuda_builder(),
            Backend::Auto => rustc().or_else(|error| cuda_builder().map_err(|_| error)),
        }
    }

    fn compile(&self, arch: Arch) -> Result<String> {
        match self {
            Self::Rustc(toolchain) => toolchain.compile(arch),
            Self::CudaBuilder(toolchain) => toolchain.compile(arch),
        }
    }

    fn default_folder(&self) -> PathBuf {
        match self {
            Self::Rustc(_) => workspace::committed_ptx(),
            Self::CudaBuilder(_) => workspace::target().join("ptx-cuda-builder"),
        }
    }

    /// Its name and version.
    fn version(&self) -> &str {
        match self {
            Self::Rustc(toolchain) => toolchain.version(),
            Self::CudaBuilder(_) => cuda_builder::VERSION,
        }
    }
}

/// Runs the chore.
///
/// # Errors
///
/// No compiler, kernels that do not compile, or, where the files are to be checked, files that differ.
pub fn run(args: &Args) -> Result<()> {
    let compiler = Compiler::find(args)?;
    let folder = args.out.clone().unwrap_or_else(|| compiler.default_folder());
    eprintln!("building with {}", compiler.version());

    let mut differences = Vec::new();
    for &arch in &args.arch {
        let ptx = compiler.compile(arch).with_context(|| format!("building for {}", arch.name()))?;
        let modules = split::split(&ptx).with_context(|| format!("the PTX for {}", arch.name()))?;
        let folder = folder.join(arch.name());
        if args.check {
            differences.extend(compare(&folder, &modules)?);
            eprintln!("{}: {} kernels compared with {}", arch.name(), modules.len(), workspace::shown(&folder));
        } else {
            write(&folder, &modules)?;
            eprintln!("{}: {} kernels written to {}", arch.name(), modules.len(), workspace::shown(&folder));
        }
    }
    let version_file = folder.join(VERSION_FILE);
    if !args.check {
        fs::write(&version_file, format!("{}\n", compiler.version()))
            .with_context(|| format!("cannot write {}", version_file.display()))?;
    } else if !differences.is_empty() {
        bail!(
            "the PTX is not what the kernels compile to:\n  {}\n{}",
            differences.join("\n  "),
            remedy(&version_file, &compiler)
        );
    }
    Ok(())
}

/// Says which compiler the files beside it come from: another one may well emit other PTX.
const VERSION_FILE: &str = "compiler.txt";

fn remedy(version_file: &Path, compiler: &Compiler) -> String {
    let recorded = fs::read_to_string(version_file).unwrap_or_default();
    if recorded.trim().is_empty() || recorded.trim() == compiler.version() {
        "run `cargo xtask build-ptx` and commit what it writes".to_owned()
    } else {
        format!(
            "the files come from {}, this is {}: another compiler may well emit other PTX",
            recorded.trim(),
            compiler.version()
        )
    }
}

fn file_name(module: &Module) -> String {
    format!("{}.ptx", module.kernel)
}

/// The names of the PTX files in a folder; none if there is no such folder.
fn ptx_files(folder: &Path) -> Result<BTreeSet<String>> {
    if !folder.exists() {
        return Ok(BTreeSet::new());
    }
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let names: Result<BTreeSet<String>> = names.collect();
    Ok(names?.into_iter().filter(|name| name.ends_with(".ptx")).collect())
}

/// Writes the modules to a folder, and removes the PTX of kernels that are no more.
fn write(folder: &Path, modules: &[Module]) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let mut old = ptx_files(folder)?;
    for module in modules {
        let name = file_name(module);
        let path = folder.join(&name);
        fs::write(&path, &module.ptx).with_context(|| format!("cannot write {}", path.display()))?;
        old.remove(&name);
    }
    for name in old {
        let path = folder.join(name);
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}

/// How a folder differs from the modules: a line for each file.
fn compare(folder: &Path, modules: &[Module]) -> Result<Vec<String>> {
    let mut committed = ptx_files(folder)?;
    let mut differences = Vec::new();
    for module in modules {
        let name = file_name(module);
        let path = folder.join(&name);
        if !committed.remove(&name) {
            differences.push(format!("missing: {}", workspace::shown(&path)));
        } else if fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))? != module.ptx {
            differences.push(format!("differs: {}", workspace::shown(&path)));
        }
    }
    differences.extend(committed.iter().map(|name| format!("no such kernel: {}", workspace::shown(&folder.join(name)))));
    Ok(differences)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(kernel: &str, ptx: &str) -> Module {
        Module { kernel: kernel.to_owned(), ptx: ptx.to_owned() }
    }

    #[test]
    fn what_was_written_does_not_differ() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("sm_80");
        let modules = [module("a", "A"), module("b", "B")];
        assert_eq!(compare(&folder, &modules).unwrap().len(), 2);
        write(&folder, &modules).unwrap();
        assert!(compare(&folder, &modules).unwrap().is_empty());
    }

    #[test]
    fn each_difference_is_named() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &[module("a", "A"), module("b", "B")]).unwrap();
        let differences = compare(folder.path(), &[module("b", "changed"), module("c", "C")]).unwrap();
        let expected = ["differs: b.ptx", "missing: c.ptx", "no such kernel: a.ptx"];
        for (difference, expected) in differences.iter().zip(expected) {
            let (what, file) = expected.split_once(": ").unwrap();
            assert!(difference.starts_with(what) && difference.ends_with(file), "{difference}");
        }
        assert_eq!(differences.len(), expected.len());
    }

    #[test]
    fn kernels_that_are_no_more_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &[module("old", "")]).unwrap();
        write(folder.path(), &[module("new", "")]).unwrap();
        assert_eq!(ptx_files(folder.path()).unwrap(), BTreeSet::from(["new.ptx".to_owned()]));
    }
}
