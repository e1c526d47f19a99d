//! `packinfer calibrate`: what work items take on this device, and the models that fit.

mod designs;
mod run;

use std::io::{Write, stdout};
use std::time::SystemTime;

use packinfer_planner::{Calibration, DeviceModel, Fit, Measurement, fit};

use crate::args::CalibrateArgs;
use crate::json_file::JsonFile;
use crate::table;
use crate::units::significant;

/// Batches that are listed, those that are fitted worst.
const NUM_WORST: usize = 8;

/// Measures or reads measurements, fits models to them, prints how well that went and writes what was asked for.
pub fn run(args: &CalibrateArgs) -> anyhow::Result<()> {
    let mut out = JsonFile::open(args.json.as_ref())?;
    let calibration = match &args.refit {
        Some(path) => refit(Calibration::read(path)?),
        None => measure(args)?,
    };
    let mut stdout = stdout().lock();
    writeln!(stdout, "{}\n{}", calibration.device, table_of_models(&calibration.models))?;
    for fit in &calibration.fits {
        print_fit(fit, &mut stdout)?;
    }
    if let Some(out) = &mut out {
        out.write_text(&calibration.to_json())?;
    }
    Ok(())
}

fn measure(args: &CalibrateArgs) -> anyhow::Result<Calibration> {
    let cuda = crate::backend::Cuda::open(args.kernels, None)?;
    let device = cuda.engine().device();
    let estimates: Vec<_> = run::models(cuda.engine());
    let measurements = run::measure(&cuda, &estimates)?;
    let date = humantime::format_rfc3339_seconds(SystemTime::now());
    let source = format!("packinfer {} calibrate, {date}", env!("CARGO_PKG_VERSION"));
    Ok(fitted(device.name.clone(), source, &estimates, measurements))
}

/// Fits to the measurements of a calibration again, from the models that it has.
fn refit(calibration: Calibration) -> Calibration {
    let Calibration { device, source, models, measurements, .. } = calibration;
    fitted(device, source, &models, measurements)
}

fn fitted(device: String, source: String, estimates: &[DeviceModel], measurements: Vec<Measurement>) -> Calibration {
    let (models, fits) = estimates.iter().map(|estimate| fit(estimate, &measurements)).unzip();
    Calibration { device, source, models, fits, measurements }
}

fn table_of_models(models: &[DeviceModel]) -> comfy_table::Table {
    let names = models.iter().map(|model| format!("{}, {}", model.kernel_family, model.head_dim));
    let header: Vec<_> = std::iter::once("kernels, head dimension".to_owned()).chain(names).collect();
    let mut table = table::new(&header.iter().map(String::as_str).collect::<Vec<_>>());
    let mut row = |name: &str, value: fn(&DeviceModel) -> Option<f64>| {
        let cell = |model| value(model).map_or_else(String::new, significant);
        table.add_row(std::iter::once(name.to_owned()).chain(models.iter().map(cell)));
    };
    row("memory, GB/s", |model| Some(model.bytes_per_s * 1e-9));
    row("the same, FP8", |model| model.e4m3.map(|times| times.bytes_per_s * 1e-9));
    row("L2 cache, GB/s", |model| Some(model.cached_bytes_per_s * 1e-9));
    row("left in it by others, MB", |model| Some(model.displaced_bytes * 1e-6));
    row("wide tiles, TFLOP/s", |model| Some(model.flops_per_s * 1e-12));
    row("a work item, ns", |model| Some(model.item_ns));
    row("a wide one by itself, ns", |model| Some(model.wide.setup_ns));
    row("a step of it, ns", |model| Some(model.wide.step_ns));
    row("a tall one by itself, ns", |model| model.tall.map(|times| times.setup_ns));
    row("a step of it, ns", |model| model.tall.map(|times| times.step_ns));
    row("a narrow one by itself, ns", |model| Some(model.narrow.setup_ns));
    row("a step of it, ns", |model| Some(model.narrow.step_ns));
    row("a wide one by itself, FP8, ns", |model| model.e4m3.map(|times| times.wide.setup_ns));
    row("a step of it, ns", |model| model.e4m3.map(|times| times.wide.step_ns));
    row("a narrow one by itself, FP8, ns", |model| model.e4m3.map(|times| times.narrow.setup_ns));
    row("a step of it, ns", |model| model.e4m3.map(|times| times.narrow.step_ns));
    row("wide ones beside narrow ones, times", |model| model.beside.map(|times| times.wide));
    row("narrow ones beside wide ones, times", |model| model.beside.map(|times| times.narrow));
    row("a step of these, FP8, ns", |model| model.beside.map(|times| times.stored_step_ns));
    row("launch, ns", |model| Some(model.launch_ns));
    row("merge, ns", |model| Some(model.merge_ns));
    table
}

fn print_fit(fit: &Fit, out: &mut impl Write) -> anyhow::Result<()> {
    let error = significant(100.0 * fit.median_error);
    let name = format!("{} kernels, head dimension {}", fit.kernel_family, fit.head_dim);
    writeln!(out, "\n{name}: median error {error} % over {} batches", fit.batches.len())?;
    for note in &fit.notes {
        writeln!(out, "{note}")?;
    }
    let mut batches: Vec<_> = fit.batches.iter().collect();
    batches.sort_by(|a, b| b.error().abs().total_cmp(&a.error().abs()));
    let mut table = table::new(&["fitted worst", "measured µs", "predicted µs", "error, %"]);
    for batch in batches.into_iter().take(NUM_WORST) {
        let times = [batch.measured_ns, batch.predicted_ns].map(|ns| significant(ns * 1e-3));
        let error = format!("{:+.1}", 100.0 * batch.error());
        table.add_row(std::iter::once(batch.batch.clone()).chain(times).chain([error]));
    }
    Ok(writeln!(out, "{table}")?)
}
