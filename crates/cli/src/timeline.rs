//! Schedules as a picture: a row for each multiprocessor, a bar for each task.

use anyhow::Result;
use packinfer_abi::{DIRECT, TileKind, WorkItem};
use packinfer_planner::{Plan, Schedule};
use plotters::coord::Shift;
use plotters::prelude::*;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

// Sizes in pixels.
const PANEL_WIDTH: u32 = 760;
const LANE_HEIGHT: u32 = 4;
const HEADER_HEIGHT: u32 = 56;
const TITLE_HEIGHT: u32 = 28;
const AXIS_HEIGHT: u32 = 44;
const TEXT: u32 = 15;

/// The part of a lane's height that its bars fill: all pixels but one.
const BAR: f64 = 1.0 - 1.0 / LANE_HEIGHT as f64;

/// The colours of tasks, by what they are.
const LEGEND: [(&str, RGBColor); 4] = [
    ("wide tile", RGBColor(31, 98, 180)),
    ("part of a wide tile", RGBColor(120, 178, 226)),
    ("narrow tile", RGBColor(200, 96, 16)),
    ("part of a narrow tile", RGBColor(244, 178, 102)),
];

fn color(item: &WorkItem) -> RGBColor {
    let of_kind = match item.tile {
        TileKind::Wide => 0,
        TileKind::Narrow => 2,
    };
    LEGEND[of_kind + usize::from(item.partial_row != DIRECT)].1
}

/// Draws schedules of a plan side by side, each with its title, as an SVG document.
///
/// # Errors
///
/// The drawing backend failed.
pub fn svg(batch: &str, plan: &Plan, schedules: &[(&str, &Schedule)]) -> Result<String> {
    let lanes = schedules.iter().map(|(_, schedule)| schedule.num_sms * schedule.lanes_per_sm).max().unwrap_or(0);
    let size = (PANEL_WIDTH * schedules.len().max(1) as u32, HEADER_HEIGHT + TITLE_HEIGHT + lanes * LANE_HEIGHT + AXIS_HEIGHT);
    let mut svg = String::new();
    draw(&SVGBackend::with_string(&mut svg, size).into_drawing_area(), batch, plan, schedules)?;
    Ok(svg)
}

fn draw(root: &Area<'_>, batch: &str, plan: &Plan, schedules: &[(&str, &Schedule)]) -> Result<()> {
    root.fill(&WHITE)?;
    let (header, panels) = root.split_vertically(HEADER_HEIGHT);
    draw_header(&header, batch)?;
    // The same scale of time for all.
    let end_us = schedules.iter().map(|(_, schedule)| schedule.span_ns()).max().unwrap_or(0) as f64 * 1e-3;
    let areas = panels.split_evenly((1, schedules.len().max(1)));
    for (area, (title, schedule)) in areas.iter().zip(schedules) {
        draw_schedule(area, title, plan, schedule, end_us.max(1.0))?;
    }
    root.present()?;
    Ok(())
}

fn draw_header(area: &Area<'_>, batch: &str) -> Result<()> {
    /// Width of a square and of its text.
    const ENTRY_WIDTH: i32 = 180;
    const SQUARE: i32 = 12;
    let text = ("sans-serif", TEXT).into_font();
    area.draw(&Text::new(format!("{batch}: tasks on the multiprocessors"), (12, 8), text.clone()))?;
    for (index, (name, color)) in (0..).zip(LEGEND) {
        let (x, y) = (12 + index * ENTRY_WIDTH, 32);
        area.draw(&Rectangle::new([(x, y), (x + SQUARE, y + SQUARE)], color.filled()))?;
        area.draw(&Text::new(name, (x + SQUARE + 6, y - 1), text.clone()))?;
    }
    Ok(())
}

fn draw_schedule(area: &Area<'_>, title: &str, plan: &Plan, schedule: &Schedule, end_us: f64) -> Result<()> {
    let (header, body) = area.split_vertically(TITLE_HEIGHT);
    header.draw(&Text::new(title.to_owned(), (64, 6), ("sans-serif", TEXT).into_font()))?;
    let mut chart = ChartBuilder::on(&body)
        .margin_right(24)
        .x_label_area_size(AXIS_HEIGHT)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..end_us, f64::from(schedule.num_sms)..0.0)?;
    let whole = |value: &f64| format!("{value:.0}");
    let mut mesh = chart.configure_mesh();
    mesh.disable_y_mesh().x_label_formatter(&whole).y_label_formatter(&whole).light_line_style(TRANSPARENT);
    mesh.x_desc("µs").y_desc("multiprocessor").draw()?;
    let lane_height = 1.0 / f64::from(schedule.lanes_per_sm);
    let gap_us = end_us / f64::from(PANEL_WIDTH); // about a pixel, so that tasks can be told apart
    let groups = plan.heads().num_groups as usize;
    let bars = schedule.tasks.chunks(groups.max(1)).zip(plan.items()).flat_map(|(tasks, item)| {
        tasks.iter().map(move |task| {
            let top = f64::from(task.sm) + f64::from(task.lane) * lane_height;
            let begin = task.begin_ns as f64 * 1e-3;
            let end = (task.end_ns as f64 * 1e-3 - gap_us).max(begin);
            Rectangle::new([(begin, top), (end, top + BAR * lane_height)], color(item).filled())
        })
    });
    chart.draw_series(bars)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use packinfer_batch::KvPlacement;
    use packinfer_planner::{DeviceModel, Planner};

    use super::*;
    use crate::case::Case;

    #[test]
    fn a_bar_for_each_task() -> Result<()> {
        let case = Case::builtin(KvPlacement::Contiguous)?;
        let plan = Planner::new(DeviceModel::H100).plan(&case.batch)?;
        let schedule = Schedule::predicted(&plan, plan.model());
        let svg = svg("<a> & \"b\"", &plan, &[("predicted", &schedule), ("achieved", &schedule)])?;
        let document = roxmltree::Document::parse(&svg)?;
        let colors: Vec<String> = LEGEND.iter().map(|(_, RGBColor(r, g, b))| format!("#{r:02X}{g:02X}{b:02X}")).collect();
        let is_bar = |node: &roxmltree::Node<'_, '_>| {
            node.has_tag_name("rect") && colors.iter().any(|color| node.attribute("fill") == Some(color))
        };
        assert_eq!(document.descendants().filter(is_bar).count(), 2 * schedule.tasks.len() + LEGEND.len());
        let texts: Vec<_> = document.descendants().filter_map(|node| node.text().map(str::trim)).collect();
        for text in ["<a> & \"b\": tasks on the multiprocessors", "predicted", "achieved", "narrow tile"] {
            assert!(texts.contains(&text), "{text} is not in the picture");
        }
        Ok(())
    }

    #[test]
    fn an_empty_plan_can_be_drawn() -> Result<()> {
        let plan = Plan::empty(packinfer_batch::AttentionShape::new(8, 2, 64, packinfer_batch::DType::F16)?);
        let schedule = Schedule::predicted(&plan, plan.model());
        roxmltree::Document::parse(&svg("empty", &plan, &[("predicted", &schedule)])?)?;
        Ok(())
    }
}
