//! The command line.

use std::num::NonZeroU32;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use packinfer::{KernelFamily, Packing};
use packinfer_batch::KvPlacement;
use serde::Serialize;

/// Packed attention for batched LLM inference.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Shows the devices, the driver, and which kernels would be used.
    Info,
    /// Plans batches and explains the plans.
    Plan(PlanArgs),
    /// Runs batches and compares the results with float64 attention.
    Verify(VerifyArgs),
    /// Measures batches against the floor of what the device can do.
    Bench(BenchArgs),
    /// Measures copies of KV slots and appended tokens on the GPU against its copy bandwidth.
    BenchKv(BenchKvArgs),
    /// Measures what work items take on the GPU, and fits the planner's model of it.
    Calibrate(CalibrateArgs),
    /// Replays a trace of requests against a KV pool, without a GPU.
    KvSim(KvSimArgs),
    /// Decodes requests of a trace for some hundred steps, with KV in pages, in extents, and moved from one to the other, alone
    /// or in groups; measures that on the GPU.
    DecodeRun(DecodeRunArgs),
}

/// Arguments of `plan`.
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// Batch files, in JSON.
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    pub batch: Vec<PathBuf>,
    /// What to plan for, and with --explain where to run.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Where the KV of each request lies.
    #[arg(long = "kv", value_name = "PLACEMENT", value_enum, default_value_t)]
    pub placement: Placement,
    /// Shows the predicted schedule too; where there is a GPU, runs the plans and shows what was predicted against what was
    /// achieved.
    #[arg(long)]
    pub explain: bool,
    /// Draws the schedule of one batch, predicted and achieved, in SVG.
    #[arg(long, value_name = "OUT", requires = "explain")]
    pub timeline: Option<PathBuf>,
    /// Prints JSON instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `calibrate`.
#[derive(Debug, Args)]
pub struct CalibrateArgs {
    /// Also writes the models, how well they fit and what was measured to a file, in JSON: for --calibration of other commands.
    #[arg(long, value_name = "OUT")]
    pub json: Option<PathBuf>,
    /// Kernels to calibrate, sm_80 or sm_90a; by default all that the GPU can run.
    #[arg(long, value_name = "FAMILY", conflicts_with = "refit")]
    pub kernels: Option<KernelFamily>,
    /// Measures nothing, but fits models to the measurements in a file that was written before.
    #[arg(long, value_name = "FILE")]
    pub refit: Option<PathBuf>,
}

/// Arguments of `verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Batch files, in JSON.
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    pub batch: Vec<PathBuf>,
    /// Where to run.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Where the KV of each request lies.
    #[arg(long = "kv", value_name = "PLACEMENT", value_enum, default_value_t)]
    pub placement: Placement,
    /// Runs each batch in all element types and head dimensions, and with each option: a sliding window, a soft-cap, sinks, KV in
    /// FP8, and all of these together.
    #[arg(long)]
    pub matrix: bool,
    /// Query tokens of every request to compare; all of them by default, or 16 where that would take long.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub rows: Option<u32>,
    /// Seed of Q, K, V, the order of the pages and the choice of rows.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// Arguments of `bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// Batch files, in JSON; without any, a built-in mixed batch.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub batch: Vec<PathBuf>,
    /// Where to run.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Where the KV of each request lies.
    #[arg(long = "kv", value_name = "PLACEMENT", value_enum, default_value_t)]
    pub placement: Placement,
    /// Also measures the same kernels, scheduled in another way.
    #[arg(long, value_enum)]
    pub baseline: Option<Baseline>,
    /// Also writes everything that was measured to a file, in JSON.
    #[arg(long, value_name = "OUT")]
    pub json: Option<PathBuf>,
    /// Runs to take the median of; at least 30 on a GPU. By default 30, or as many as a CPU does in five seconds.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub repeat: Option<u32>,
    /// Seed of Q, K, V and the order of the pages.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// Arguments of `bench-kv`.
#[derive(Debug, Args)]
pub struct BenchKvArgs {
    /// Also writes everything that was measured to a file, in JSON.
    #[arg(long, value_name = "OUT")]
    pub json: Option<PathBuf>,
    /// Runs to take the median of.
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub repeat: u32,
    /// Seed of the slots, the positions and the elements.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// Arguments of `kv-sim`.
#[derive(Debug, Args)]
pub struct KvSimArgs {
    /// Trace: Azure LLM inference 2023 (CSV) or Mooncake (JSON lines).
    #[arg(long, value_name = "FILE")]
    pub trace: PathBuf,
    /// Slots of the pool; by default as many as the whole trace can fill.
    #[arg(long, value_name = "N")]
    pub slots: Option<u32>,
    /// Slots of a page.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub page_size: u32,
    /// Where the KV of growing requests goes.
    #[arg(long, value_enum, default_value_t)]
    pub layout: Layout,
    /// Also writes the report, with the pool over time, to a file, in JSON.
    #[arg(long, value_name = "OUT")]
    pub json: Option<PathBuf>,
    /// Also draws the pool over time, in SVG.
    #[arg(long, value_name = "OUT")]
    pub svg: Option<PathBuf>,
}

/// Arguments of `decode-run`.
#[derive(Debug, Args)]
pub struct DecodeRunArgs {
    /// Trace: Azure LLM inference 2023 (CSV) or Mooncake (JSON lines).
    #[arg(long, value_name = "FILE")]
    pub trace: PathBuf,
    /// Requests that decode at a time.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub requests: u32,
    /// Steps that are measured.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub steps: u32,
    /// Steps before these, of the pool alone, so that it looks as after a long time of serving.
    #[arg(long, value_name = "N", default_value_t = 2000)]
    pub warm_up: u32,
    /// Layers that each step goes through, and that are moved.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub layers: u32,
    /// Query heads.
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub num_qo_heads: u32,
    /// KV heads.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub num_kv_heads: u32,
    /// Elements of a head.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub head_dim: u32,
    /// Slots of a page.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub page_size: u32,
    /// Slots of the pool; by default so many that it is about two thirds full.
    #[arg(long, value_name = "N")]
    pub slots: Option<u32>,
    /// What a further run of slots costs attention, in slots read: moves are begun where they save more than they cost.
    #[arg(long, value_name = "SLOTS", value_parser = slots)]
    pub run_cost: Option<f64>,
    /// Layouts to go through, in this order; by default all.
    #[arg(long, value_name = "LAYOUT", value_enum, value_delimiter = ',', num_args = 1..,
          default_values_t = DecodeLayout::value_variants().iter().copied())]
    pub layouts: Vec<DecodeLayout>,
    /// Requests of a group, for the layout `groups`.
    #[arg(long, value_name = "N", default_value = "4")]
    pub group_size: NonZeroU32,
    /// Share of a group's slots that may be holes, or outside of its extent, before it is looked at, 0.5 by default: for the
    /// layout `groups`.
    #[arg(long, value_name = "SHARE", value_parser = share)]
    pub group_fragmentation: Option<f64>,
    /// Tokens that the largest group may have over the mean of all, before they are balanced, 1.5 by default: for the layout
    /// `groups`.
    #[arg(long, value_name = "RATIO", value_parser = ratio)]
    pub imbalance: Option<f64>,
    /// Rounds of all layouts in turn; of each, the round with the median time is reported.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: u32,
    /// Where to run: without a GPU, only what happens to the pool is told.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Also writes everything to a file, in JSON.
    #[arg(long, value_name = "OUT")]
    pub json: Option<PathBuf>,
    /// Also draws the beginning of the pool after the last step, in SVG: whose the pages are.
    #[arg(long, value_name = "OUT")]
    pub svg: Option<PathBuf>,
    /// Seed of Q, K and V.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// Layout of KV.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Layout {
    /// Contiguous extents with headroom, moved when that pays.
    #[default]
    Contiguous,
    /// Pages wherever they are free.
    Paged,
}

/// Layout of KV in decode steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DecodeLayout {
    /// Everything in pages.
    Paged,
    /// In extents with headroom from the beginning.
    Contiguous,
    /// Prompts in pages, each moved to an extent with headroom where that pays.
    Moved,
    /// Prompts in pages, groups of requests moved side by side to an extent with headroom for each where that pays.
    Groups,
}

impl DecodeLayout {
    /// Its name, as it is given.
    pub fn name(self) -> &'static str {
        match self {
            Self::Paged => "paged",
            Self::Contiguous => "contiguous",
            Self::Moved => "moved",
            Self::Groups => "groups",
        }
    }
}

/// Where the KV of each request lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Placement {
    /// In pages of the file's page size in random order, as in a paged pool that has been used for a while.
    #[default]
    Scattered,
    /// In one piece, as KV groups and variable-length layouts have it; blocks that requests share are there once. Pages of the
    /// order "hnd" follow each other then, but are read one by one all the same.
    Contiguous,
}

impl Placement {
    /// That of a batch, with the order of scattered pages by `seed`.
    pub fn by_seed(self, seed: u64) -> KvPlacement {
        match self {
            Self::Scattered => KvPlacement::Scattered { seed },
            Self::Contiguous => KvPlacement::Contiguous,
        }
    }
}

/// Where to run.
#[derive(Clone, Debug, Args)]
pub struct DeviceArgs {
    /// Where to run.
    #[arg(long, value_enum, default_value_t)]
    pub device: DeviceChoice,
    /// Kernels to use on a GPU, sm_80 or sm_90a; by default those that run best on it.
    #[arg(long, value_name = "FAMILY")]
    pub kernels: Option<KernelFamily>,
    /// The planner's models of the device, as `packinfer calibrate` wrote them; by default those that are built in.
    #[arg(long, value_name = "FILE")]
    pub calibration: Option<PathBuf>,
}

fn share(text: &str) -> Result<f64, String> {
    number(text, 0.0..=1.0)
}

fn slots(text: &str) -> Result<f64, String> {
    number(text, 0.0..=f64::MAX)
}

fn ratio(text: &str) -> Result<f64, String> {
    number(text, 1.0..=f64::MAX)
}

/// A number within bounds.
fn number(text: &str, within: RangeInclusive<f64>) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|error| format!("{error}"))?;
    let (least, most) = (within.start(), within.end());
    let bounds = || if *most == f64::MAX { format!("{least} or more") } else { format!("between {least} and {most}") };
    if within.contains(&number) { Ok(number) } else { Err(format!("{number} is not {}", bounds())) }
}

/// Kind of device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DeviceChoice {
    /// A GPU if there is one that works, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU.
    Cuda,
}

/// Another way to schedule the same kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Baseline {
    /// A grid of tiles for each request: nothing packed, nothing split.
    PerRequest,
    /// Every request reads all of its KV by itself, also what others begin with too.
    Unshared,
}

impl Baseline {
    /// How it puts requests into tiles.
    pub fn packing(self) -> Packing {
        match self {
            Self::PerRequest => Packing::PerRequest,
            Self::Unshared => Packing::Unshared,
        }
    }

    /// Heading of the column with its times.
    pub fn heading(self) -> &'static str {
        match self {
            Self::PerRequest => "per-request µs",
            Self::Unshared => "unshared µs",
        }
    }
}
