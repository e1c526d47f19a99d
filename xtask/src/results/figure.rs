//! Results as a figure: for each batch a bar for the floor, one for each file of `packinfer bench`, and one for the best peer.
//!
//! Bars are as long as their time over the floor; the times themselves are written beside them.

use anyhow::Result;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::join::Results;
use super::markdown::significant;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

// Sizes in pixels.
const WIDTH: u32 = 1000;
const MARGIN: u32 = 12;
const LEGEND_HEIGHT: u32 = 34;
const NAMES_WIDTH: u32 = 190;
const AXIS_HEIGHT: u32 = 44;
/// From a bar to the next; the same once more between batches.
const BAR_PITCH: u32 = 16;
const TEXT: u32 = 13;
/// Width of a character, at most on average.
const CHARACTER: f64 = 0.58 * TEXT as f64;

const FLOOR_COLOR: RGBColor = RGBColor(176, 180, 186);
/// Of the files of `packinfer bench`, again from the first if there are more.
const OUR_COLORS: [RGBColor; 3] = [RGBColor(31, 98, 180), RGBColor(120, 178, 226), RGBColor(86, 60, 150)];
const PEER_COLOR: RGBColor = RGBColor(226, 124, 20);

/// One kind of bar.
struct Series {
    name: String,
    color: RGBColor,
}

/// One bar.
struct Bar {
    color: RGBColor,
    over_floor: f64,
    label: String,
}

/// The bars of one batch.
struct Group {
    batch: String,
    bars: Vec<Bar>,
}

/// Draws the results as an SVG document.
///
/// # Errors
///
/// The drawing backend failed.
pub fn svg(results: &Results) -> Result<String> {
    let mut svg = String::new();
    draw(&mut svg, &series(results), &groups(results))?;
    Ok(svg)
}

fn our_color(table: usize) -> RGBColor {
    OUR_COLORS[table % OUR_COLORS.len()]
}

fn series(results: &Results) -> Vec<Series> {
    let mut series = vec![Series { name: "floor".into(), color: FLOOR_COLOR }];
    let tables = results.tables.iter().enumerate();
    series.extend(tables.map(|(index, table)| Series { name: table.title.clone(), color: our_color(index) }));
    if !results.columns.is_empty() {
        series.push(Series { name: "best peer".into(), color: PEER_COLOR });
    }
    series
}

fn groups(results: &Results) -> Vec<Group> {
    let mut batches: Vec<&str> = Vec::new();
    for row in results.tables.iter().flat_map(|table| &table.rows) {
        if !batches.contains(&row.ours.batch.as_str()) {
            batches.push(&row.ours.batch);
        }
    }
    batches.into_iter().map(|batch| group(results, batch)).collect()
}

fn group(results: &Results, batch: &str) -> Group {
    let rows: Vec<_> =
        results.tables.iter().enumerate().filter_map(|(index, table)| Some((our_color(index), table.row(batch)?))).collect();
    // Every file has measured the ceilings; the highest hold for all.
    let floor = rows.iter().map(|(_, row)| row.ours.floor_us).fold(f64::INFINITY, f64::min);
    let bar = |color, time: f64, name: &str| Bar {
        color,
        over_floor: time / floor,
        label: format!("{} µs {name}", significant(time)).trim_end().into(),
    };
    let mut bars = vec![bar(FLOOR_COLOR, floor, "")];
    bars.extend(rows.iter().map(|(color, row)| bar(*color, row.ours.time_us, "")));
    if let Some((column, time)) = rows.iter().find_map(|(_, row)| row.best()) {
        bars.push(bar(PEER_COLOR, time, results.columns[column].peer.name));
    }
    Group { batch: batch.into(), bars }
}

fn draw(svg: &mut String, series: &[Series], groups: &[Group]) -> Result<()> {
    // In pitches: a bar each, and one for the gap.
    let pitches = groups.iter().map(|group| group.bars.len() + 1).sum::<usize>() as u32;
    let height = pitches * BAR_PITCH + LEGEND_HEIGHT + AXIS_HEIGHT + 2 * MARGIN;
    let plot_width = f64::from(WIDTH - NAMES_WIDTH - 2 * MARGIN);
    // So far that the label after each bar has room.
    let room = |bar: &Bar| bar.over_floor / (1.0 - (bar.label.chars().count() + 2) as f64 * CHARACTER / plot_width).max(0.1);
    let right = groups.iter().flat_map(|group| &group.bars).map(room).fold(1.0, f64::max);

    let root = SVGBackend::with_string(svg, (WIDTH, height)).into_drawing_area();
    root.fill(&WHITE)?;
    draw_legend(&root, series)?;
    let mut chart = ChartBuilder::on(&root)
        .margin(MARGIN)
        .margin_top(MARGIN + LEGEND_HEIGHT)
        .x_label_area_size(AXIS_HEIGHT)
        .y_label_area_size(NAMES_WIDTH)
        .build_cartesian_2d(0.0..right, 0.0..f64::from(pitches))?;
    let font = ("sans-serif", TEXT);
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(0)
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.1))
        .x_desc("time ÷ floor")
        .x_label_formatter(&|value| format!("{value}"))
        .x_label_style(font)
        .axis_desc_style(font)
        .draw()?;
    let after = font.into_text_style(&root).pos(Pos::new(HPos::Left, VPos::Center));
    let before = font.into_text_style(&root).pos(Pos::new(HPos::Right, VPos::Center));
    let mut top = f64::from(pitches) - 0.5;
    for Group { batch, bars } in groups {
        let middle = top - bars.len() as f64 / 2.0;
        chart.draw_series([EmptyElement::at((0.0, middle)) + Text::new(batch.clone(), (-8, 0), &before)])?;
        for bar in bars {
            let corners = [(0.0, top - 0.06), (bar.over_floor, top - 0.94)];
            chart.draw_series([Rectangle::new(corners, bar.color.filled())])?;
            chart.draw_series([EmptyElement::at((bar.over_floor, top - 0.5)) + Text::new(bar.label.clone(), (5, 0), &after)])?;
            top -= 1.0;
        }
        top -= 1.0;
    }
    root.present()?;
    Ok(())
}

/// One line above the chart.
fn draw_legend(root: &Area<'_>, series: &[Series]) -> Result<()> {
    const SQUARE: i32 = 12;
    let style = ("sans-serif", TEXT).into_text_style(root).pos(Pos::new(HPos::Left, VPos::Center));
    let (mut x, y) = ((MARGIN + NAMES_WIDTH) as i32, (MARGIN + LEGEND_HEIGHT / 2) as i32);
    for Series { name, color } in series {
        root.draw(&Rectangle::new([(x, y - SQUARE / 2), (x + SQUARE, y + SQUARE / 2)], color.filled()))?;
        root.draw(&Text::new(name.as_str(), (x + SQUARE + 6, y), &style))?;
        x += SQUARE + 30 + (CHARACTER * name.chars().count() as f64) as i32;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use regex::Regex;

    use super::super::join::tests::{bench, more_peers, named, peers};
    use super::*;

    /// Widths of the bars of a colour, without the legend's square, which comes first.
    fn widths(svg: &str, color: RGBColor) -> Vec<f64> {
        let RGBColor(red, green, blue) = color;
        let bar = Regex::new(&format!(r##"<rect [^>]*width="(\d+)"[^>]*fill="#{red:02X}{green:02X}{blue:02X}""##)).unwrap();
        bar.captures_iter(svg).skip(1).map(|found| found[1].parse().unwrap()).collect()
    }

    #[test]
    fn bars_are_as_long_as_their_times() {
        let benches = vec![bench("sm_90a kernels"), bench("sm_80 kernels")];
        let results = Results::new(benches, vec![named("peers.json", peers()).unwrap()]).unwrap();
        let svg = svg(&results).unwrap();
        let floor = widths(&svg, FLOOR_COLOR);
        assert_eq!(floor.len(), 3);
        for (color, expected) in
            [(OUR_COLORS[0], &[1.1, 1.5, 4.0][..]), (OUR_COLORS[1], &[1.1, 1.5, 4.0]), (PEER_COLOR, &[1.205, 1.25])]
        {
            let over_floor: Vec<_> = widths(&svg, color).iter().map(|width| width / floor[0]).collect();
            assert_eq!(over_floor.len(), expected.len());
            assert!(over_floor.iter().zip(expected).all(|(drawn, time)| (drawn / time - 1.0).abs() < 0.02), "{over_floor:?}");
        }
        for text in ["alike", "ours alone", "120 µs FlashAttention-3", "125 µs FlashInfer FA2", "PackInfer, sm_80 kernels"] {
            assert!(svg.contains(text), "no {text:?}");
        }
    }

    #[test]
    fn the_best_peer_is_of_all_files() {
        let files = vec![named("a.json", peers()).unwrap(), named("b.json", more_peers()).unwrap()];
        let svg = svg(&Results::new(vec![bench("")], files).unwrap()).unwrap();
        assert!(svg.contains("115 µs FlashInfer FA3") && svg.contains("125 µs FlashInfer FA2") && !svg.contains("120 µs"));
    }

    #[test]
    fn without_peers_there_is_no_bar_for_them() {
        let svg = svg(&Results::new(vec![bench("")], Vec::new()).unwrap()).unwrap();
        assert!(!svg.contains("peer"));
        assert_eq!(widths(&svg, OUR_COLORS[0]).len(), 3);
    }
}
