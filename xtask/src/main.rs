//! The project's chores, run as `cargo xtask CHORE`.
//!
//! | chore | what it does |
//! | --- | --- |
//! | [`build_ptx`] | compiles the kernels to PTX, or checks that the committed PTX is what they compile to |
//! | [`ptxas`] | assembles the committed PTX; fails on spills and warnings |
//! | [`gpu_bundle`] | collects what a machine with a GPU and no Rust needs to test and measure |
//! | [`results`] | makes a table and a figure of what was measured there |

use std::process::ExitCode;

use clap::Parser;

mod build_ptx;
mod gpu_bundle;
mod ptxas;
mod results;
mod workspace;

/// The project's chores.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
enum Chore {
    /// Compiles the kernels to PTX.
    BuildPtx(build_ptx::Args),
    /// Assembles the committed PTX and shows what it needs of the hardware.
    Ptxas(ptxas::Args),
    /// Collects what a machine with a GPU and no Rust needs to test and measure.
    GpuBundle(gpu_bundle::Args),
    /// Makes a table and a figure of what was measured, with other libraries beside it.
    Results(results::Args),
}

fn main() -> ExitCode {
    let result = match Chore::parse() {
        Chore::BuildPtx(args) => build_ptx::run(&args),
        Chore::Ptxas(args) => ptxas::run(&args),
        Chore::GpuBundle(args) => gpu_bundle::run(&args),
        Chore::Results(args) => results::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
