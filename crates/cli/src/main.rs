//! The command-line program `packinfer`: arguments in, one of the commands, an exit code out.
//!
//! Exit codes: 0 done; 1 a result is not within tolerance; 2 the input or the machine is not fit for what was asked, with one
//! sentence on standard error.

mod args;
mod backend;
mod bench;
mod bench_kv;
mod calibrate;
mod case;
mod decode_run;
mod explain;
mod info;
mod json_file;
mod kv_sim;
mod memory;
mod plan;
mod planning;
mod progress;
mod table;
mod timeline;
mod types;
mod units;
mod verify;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command};

/// A result was not within tolerance.
const OUT_OF_TOLERANCE: u8 = 1;
/// Something else went wrong.
const FAILED: u8 = 2;

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Info => info::run().map(|()| ExitCode::SUCCESS),
        Command::Plan(args) => plan::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Bench(args) => bench::run(&args).map(|()| ExitCode::SUCCESS),
        Command::BenchKv(args) => bench_kv::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Calibrate(args) => calibrate::run(&args).map(|()| ExitCode::SUCCESS),
        Command::KvSim(args) => kv_sim::run(&args).map(|()| ExitCode::SUCCESS),
        Command::DecodeRun(args) => decode_run::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Verify(args) => {
            verify::run(&args).map(|within| if within { ExitCode::SUCCESS } else { ExitCode::from(OUT_OF_TOLERANCE) })
        }
    };
    done.unwrap_or_else(|error| {
        if is_broken_pipe(&error) {
            // Whoever read the output has seen enough.
            return ExitCode::SUCCESS;
        }
        // Where standard error is closed, the exit code must say it all.
        let _ = writeln!(io::stderr(), "packinfer: {error:#}");
        ExitCode::from(FAILED)
    })
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe))
}
