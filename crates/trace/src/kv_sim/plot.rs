//! A replay as a picture.

use packinfer_kv::Usage;
use plotters::prelude::*;

use super::{Sample, SimReport};
use crate::PlotError;

/// Size of the picture, in pixels.
const SIZE: (u32, u32) = (900, 640);

/// Slots that cannot be evicted.
fn in_use(usage: &Usage) -> u32 {
    usage.used - usage.evictable.min(usage.used)
}

/// One line of a chart.
struct Series {
    name: &'static str,
    color: RGBColor,
    value: fn(&Sample) -> f64,
}

/// Draws the pool over time as an SVG document: slots used and those of them that running requests hold,
/// fragmentation, requests.
///
/// # Errors
///
/// The drawing backend failed.
pub fn plot_svg(report: &SimReport) -> Result<String, PlotError> {
    let mut svg = String::new();
    draw(&mut svg, report).map_err(|error| PlotError(error.to_string()))?;
    Ok(svg)
}

fn draw(svg: &mut String, report: &SimReport) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let rows = root.split_evenly((3, 1));
    chart(
        &rows[0],
        report,
        "slots (millions)",
        &[
            Series { name: "used", color: BLUE, value: |sample| f64::from(sample.usage.used) / 1e6 },
            Series { name: "of running requests", color: RED, value: |sample| f64::from(in_use(&sample.usage)) / 1e6 },
        ],
    )?;
    chart(
        &rows[1],
        report,
        "fragmentation (%)",
        &[Series { name: "fragmentation", color: RED, value: |sample| 100.0 * sample.fragmentation }],
    )?;
    chart(
        &rows[2],
        report,
        "requests",
        &[
            Series { name: "running", color: BLUE, value: |sample| f64::from(sample.running) },
            Series { name: "waiting", color: RED, value: |sample| f64::from(sample.waiting) },
        ],
    )?;
    root.present()?;
    Ok(())
}

fn chart(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    report: &SimReport,
    title: &str,
    series: &[Series],
) -> Result<(), Box<dyn std::error::Error>> {
    let minutes = |sample: &Sample| sample.time_ms as f64 / 60_000.0;
    let end = report.samples.last().map_or(0.0, minutes).max(f64::MIN_POSITIVE);
    let values = series.iter().flat_map(|line| report.samples.iter().map(line.value));
    let top = values.fold(0.0, f64::max).max(1e-3) * 1.05;
    let mut chart = ChartBuilder::on(area)
        .margin(10)
        .caption(title, ("sans-serif", 15))
        .x_label_area_size(32)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..end, 0.0..top)?;
    chart.configure_mesh().x_desc("minutes").light_line_style(TRANSPARENT).draw()?;
    for line in series {
        let color = line.color;
        let points = report.samples.iter().map(|sample| (minutes(sample), (line.value)(sample)));
        chart
            .draw_series(LineSeries::new(points, color))?
            .label(line.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 15, y)], color));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    Ok(())
}
