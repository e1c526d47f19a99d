//! The backend `cuda-builder`: rust-cuda's `cuda_builder`, whose compiler backend hands LLVM 7 bitcode to NVIDIA's libNVVM.
//!
//! A small program with a manifest of its own (`kernels-gpu/cuda-builder`) calls it, so that the workspace does not depend on it.
//! These environment variables name a toolchain that was built by hand:
//!
//! | variable | what it names | else |
//! | --- | --- | --- |
//! | `RUSTC_CODEGEN_NVVM` | rust-cuda's compiler backend, `librustc_codegen_nvvm.so` | cargo builds it from the pinned commit |
//! | `LLVM_CONFIG` | `llvm-config` of LLVM 7, to build the backend with | `llvm-config` on the search path |
//! | `PACKINFER_RUSTC` (or `--rustc`) | the compiler that the backend fits, with cargo beside it | the nightly of `rust-toolchain.toml` |
//! | `CUDA_HOME`, `CUDA_PATH` | the CUDA toolkit, which has libNVVM | `/usr/local/cuda`, `LD_LIBRARY_PATH` |

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use anyhow::{Context, Result, bail};

use super::Arch;
use crate::workspace;

/// The commit that `kernels-gpu/cuda-builder/Cargo.toml` names.
pub const VERSION: &str = "rust-cuda 946c91f";

/// The nightly that the commit needs, with `rustc-dev` and `rust-src`.
const NIGHTLY: &str = "nightly-2026-04-02";

/// What `cuda_builder` needs.
#[derive(Debug)]
pub struct Toolchain {
    /// A compiler other than the pinned nightly.
    rustc: Option<PathBuf>,
    /// A compiler backend that is built already.
    codegen: Option<PathBuf>,
    /// The folder of libNVVM.
    libnvvm: PathBuf,
}

impl Toolchain {
    /// The toolchain of this system.
    ///
    /// # Errors
    ///
    /// Parts are missing; the message names each of them and how it is found.
    pub fn find(rustc: Option<&Path>) -> Result<Self> {
        let codegen = env::var_os("RUSTC_CODEGEN_NVVM").map(PathBuf::from);
        let mut missing = Vec::new();
        match (rustc, &codegen) {
            (Some(rustc), _) if !rustc.is_file() || !rustc.with_file_name("cargo").is_file() => {
                missing.push(format!("a compiler: {} is none, or has no cargo beside it", rustc.display()));
            }
            (None, _) if !has_pinned_nightly() => missing.push(format!(
                "a compiler: `rustup toolchain install {NIGHTLY} --component rust-src,rustc-dev,llvm-tools`, or PACKINFER_RUSTC names one"
            )),
            _ => {}
        }
        match &codegen {
            Some(file) if !file.is_file() => missing.push(format!("the compiler backend: RUSTC_CODEGEN_NVVM names {}, which is no file", file.display())),
            None if !has_llvm_7() => missing.push("LLVM 7, to build the compiler backend with: LLVM_CONFIG names its llvm-config; or RUSTC_CODEGEN_NVVM names a backend".to_owned()),
            _ => {}
        }
        let libnvvm = find_libnvvm();
        if libnvvm.is_none() {
            missing.push("libNVVM: CUDA_HOME names a CUDA toolkit, or LD_LIBRARY_PATH has the folder of libnvvm.so".to_owned());
        }
        match libnvvm {
            Some(libnvvm) if missing.is_empty() => Ok(Self { rustc: rustc.map(Path::to_owned), codegen, libnvvm }),
            _ => bail!("the backend cuda-builder lacks\n  {}", missing.join("\n  ")),
        }
    }

    /// Compiles the device crate to PTX.
    ///
    /// # Errors
    ///
    /// `cuda_builder` fails; it has said why.
    pub fn compile(&self, arch: Arch) -> Result<String> {
        let target_folder = workspace::target().join("cuda-builder");
        let ptx = target_folder.join(arch.name()).with_extension("ptx");
        let cargo = self.rustc.as_ref().map_or_else(|| PathBuf::from("cargo"), |rustc| rustc.with_file_name("cargo"));
        let mut cargo = workspace::foreign_cargo(cargo);
        // rustup takes the pinned nightly from this folder's rust-toolchain.toml.
        cargo.current_dir(workspace::kernels().join("cuda-builder"));
        cargo.env("RUSTC_BOOTSTRAP", "1").env("CARGO_TARGET_DIR", &target_folder);
        cargo.env("LD_LIBRARY_PATH", prepend("LD_LIBRARY_PATH", &self.libnvvm)?);
        if let Some(rustc) = &self.rustc {
            // cuda_builder calls `cargo` and `rustc` by these names.
            let folder = rustc.parent().context("the compiler lies in no folder")?;
            cargo.env("RUSTC", rustc).env("PATH", prepend("PATH", folder)?);
        }
        cargo.args(["run", "--quiet"]);
        if let Some(codegen) = &self.codegen {
            // The variable that cargo would set for a backend that it built, and the first place where cuda_builder looks.
            let folder = codegen.parent().context("the compiler backend lies in no folder")?;
            cargo.arg("--no-default-features").env("DEP_RUSTC_CODEGEN_NVVM_OUT_DIR", folder);
        }
        cargo.args(["--", arch.name()]).arg(&ptx);
        workspace::run(&mut cargo)?;
        fs::read_to_string(&ptx).with_context(|| format!("cuda_builder wrote no {}", ptx.display()))
    }
}

fn prepend(variable: &str, folder: &Path) -> Result<std::ffi::OsString> {
    let others = env::var_os(variable).unwrap_or_default();
    env::join_paths([folder.to_owned()].into_iter().chain(env::split_paths(&others)))
        .with_context(|| format!("{} cannot be put into {variable}", folder.display()))
}

/// Whether rustup has the pinned nightly with the compiler's own crates.
fn has_pinned_nightly() -> bool {
    let rustc = Command::new("rustup").args(["which", "--toolchain", NIGHTLY, "rustc"]).output();
    rustc.is_ok_and(|output| output.status.success())
}

fn has_llvm_7() -> bool {
    let llvm_config = env::var_os("LLVM_CONFIG").unwrap_or_else(|| "llvm-config".into());
    workspace::output_of(Command::new(llvm_config).arg("--version")).is_ok_and(|version| version.starts_with("7."))
}

fn find_libnvvm() -> Option<PathBuf> {
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os).map(PathBuf::from);
    let toolkits =
        toolkits.chain(["/usr/local/cuda".into()]).flat_map(|toolkit| [toolkit.join("nvvm/lib64"), toolkit.join("lib")]);
    let on_library_path = env::var_os("LD_LIBRARY_PATH").map(|path| env::split_paths(&path).collect::<Vec<_>>());
    let has_library = |folder: &PathBuf| {
        let files = fs::read_dir(folder).into_iter().flatten().flatten();
        files.into_iter().any(|file| file.file_name().to_string_lossy().starts_with("libnvvm.so"))
    };
    toolkits.chain(on_library_path.unwrap_or_default()).find(has_library)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_those_of_the_manifest() {
        let folder = workspace::kernels().join("cuda-builder");
        let manifest = fs::read_to_string(folder.join("Cargo.toml")).unwrap();
        let commit = VERSION.rsplit(' ').next().unwrap();
        assert_eq!(manifest.matches(&format!("rev = \"{commit}\"")).count(), 2);
        let toolchain = fs::read_to_string(folder.join("rust-toolchain.toml")).unwrap();
        assert!(toolchain.contains(&format!("channel = \"{NIGHTLY}\"")));
    }

    #[test]
    fn missing_parts_are_named() {
        let error = Toolchain::find(Some(Path::new("/nonexistent/rustc"))).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/rustc is none"), "{error}");
    }
}
