//! `packinfer-cuda-builder ARCHITECTURE FILE`: compiles the kernels with rust-cuda's `cuda_builder`, and writes their PTX to a
//! file.

use std::env;
use std::process::ExitCode;

use cuda_builder::{CudaBuilder, NvvmArch};

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [arch, file] = arguments.as_slice() else {
        eprintln!("usage: packinfer-cuda-builder sm_80|sm_90a FILE");
        return ExitCode::FAILURE;
    };
    let nvvm_arch = match arch.as_str() {
        "sm_80" => NvvmArch::Compute80,
        "sm_90a" => NvvmArch::Compute90a,
        other => {
            eprintln!("error: no kernels for {other}: sm_80 or sm_90a");
            return ExitCode::FAILURE;
        }
    };
    let built = CudaBuilder::new(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels"))
        .arch(nvvm_arch)
        .build_args(&["--no-default-features", "--features", arch])
        // cuda_builder's own compiler flags take the place of every other setting but the profile's. This one turns off a pass
        // that copies barriers into the branches of conditions.
        .build_args(&["-Zprofile-rustflags", "--config", "profile.release.rustflags = [\"-Zmir-enable-passes=-JumpThreading\"]"])
        .copy_to(file)
        .build();
    match built {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
