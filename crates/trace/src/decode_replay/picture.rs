//! A pool as a picture: who has which slots.

use packinfer_kv::KvError;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::DecodeReplay;
use crate::PlotError;

/// Pages in a line of the picture, and lines: the beginning of the pool.
const PAGES_PER_LINE: u32 = 96;
const LINES: u32 = 12;
/// Size of a page, and what is left around it, in pixels.
const PAGE: i32 = 9;
const GAP: i32 = 1;
/// Height of the line above each pool.
const TITLE: i32 = 24;
const MARGIN: i32 = 8;

/// Consecutive pages of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stretch {
    first_page: u32,
    num_pages: u32,
    /// The request.
    id: u64,
    /// Whether they are kept for tokens to come.
    is_headroom: bool,
}

/// The slots of a pool at one time of a replay.
#[derive(Clone, Debug)]
pub struct PoolMap {
    title: String,
    num_pages: u32,
    stretches: Vec<Stretch>,
}

impl PoolMap {
    /// The pool as it is now.
    ///
    /// # Errors
    ///
    /// None that a user can cause.
    pub fn of(title: impl Into<String>, replay: &DecodeReplay<'_>) -> Result<Self, KvError> {
        let pool = replay.pool();
        let page_size = pool.page_size();
        let mut stretches = Vec::new();
        for request in replay.requests() {
            let runs = request.kv.runs(pool)?;
            let mut push = |first_slot: u32, end_slot: u32, is_headroom| {
                let (first_page, end_page) = (first_slot / page_size, end_slot.div_ceil(page_size));
                if end_page > first_page {
                    stretches.push(Stretch { first_page, num_pages: end_page - first_page, id: request.id, is_headroom });
                }
            };
            for run in &runs {
                push(run.first_slot, run.first_slot + run.num_slots, false);
            }
            if let Some(last) = runs.last() {
                let end = last.first_slot + last.num_slots;
                push(end.next_multiple_of(page_size), end + request.kv.room(pool), true);
            }
        }
        Ok(Self { title: title.into(), num_pages: pool.num_slots() / page_size, stretches })
    }
}

/// Draws the beginnings of pools, one below the other, as an SVG document: a square for each page, in a colour for each request,
/// and paler where it is kept for tokens to come; free pages are grey.
///
/// # Errors
///
/// The drawing backend failed.
pub fn pools_svg(pools: &[PoolMap]) -> Result<String, PlotError> {
    let mut svg = String::new();
    draw(&mut svg, pools).map_err(|error| PlotError(error.to_string()))?;
    Ok(svg)
}

fn draw(svg: &mut String, pools: &[PoolMap]) -> Result<(), Box<dyn std::error::Error>> {
    let height = TITLE + LINES as i32 * PAGE + MARGIN;
    let size = (PAGES_PER_LINE as i32 * PAGE + 2 * MARGIN, height * pools.len() as i32 + MARGIN);
    let root = SVGBackend::with_string(svg, (size.0 as u32, size.1 as u32)).into_drawing_area();
    root.fill(&WHITE)?;
    for (pool, index) in pools.iter().zip(0..) {
        let top = MARGIN + index * height;
        let style = ("sans-serif", 14).into_text_style(&root).pos(Pos::new(HPos::Left, VPos::Top));
        root.draw_text(&pool.title, &style, (MARGIN, top))?;
        let pages = |first: u32, num_pages: u32, color: RGBColor| {
            // Line by line.
            let end = (first + num_pages).min(pool.num_pages).min(PAGES_PER_LINE * LINES);
            let mut page = first;
            while page < end {
                let (line, column) = (page / PAGES_PER_LINE, page % PAGES_PER_LINE);
                let in_line = (end - page).min(PAGES_PER_LINE - column);
                let (x, y) = (MARGIN + column as i32 * PAGE, top + TITLE + line as i32 * PAGE);
                let corner = (x + in_line as i32 * PAGE - GAP, y + PAGE - GAP);
                root.draw(&Rectangle::new([(x, y), corner], color.filled()))?;
                page += in_line;
            }
            Ok::<_, Box<dyn std::error::Error>>(())
        };
        pages(0, pool.num_pages, FREE)?;
        for &Stretch { first_page, num_pages, id, is_headroom } in &pool.stretches {
            pages(first_page, num_pages, color_of(id, is_headroom))?;
        }
    }
    root.present()?;
    Ok(())
}

const FREE: RGBColor = RGBColor(232, 232, 232);

/// A colour that the neighbours of a request are not likely to have.
fn color_of(id: u64, is_headroom: bool) -> RGBColor {
    const GOLDEN_RATIO: f64 = 0.618_033_988_749_895;
    let hue = (id as f64 * GOLDEN_RATIO).fract();
    let (saturation, lightness) = if is_headroom { (0.5, 0.85) } else { (0.55, 0.30 + 0.25 * (id % 3) as f64 / 2.0) };
    let (red, green, blue) = HSLColor(hue, saturation, lightness).rgb();
    RGBColor(red, green, blue)
}

#[cfg(test)]
mod tests {
    use packinfer_kv::{Contiguous, Policy};

    use super::*;
    use crate::TraceRequest;
    use crate::decode_replay::DecodeConfig;

    #[test]
    fn stretches_are_tokens_and_headroom() {
        let trace = [TraceRequest { arrival_ms: 0, prompt_tokens: 40, output_tokens: 9, blocks: Vec::new() }];
        let layout = Contiguous { max_headroom: 32, ..Contiguous::default() };
        let config =
            DecodeConfig { concurrent: 2, num_slots: Some(1024), policy: Policy::Contiguous(layout), ..DecodeConfig::default() };
        let mut replay = DecodeReplay::new(&trace, config).expect("a good trace");
        replay.admit().expect("there is room");
        let map = PoolMap::of("a pool", &replay).expect("the pool's own");
        let stretch = |first_page, num_pages, id, is_headroom| Stretch { first_page, num_pages, id, is_headroom };
        // 40 tokens are in three pages, and 72 slots in five.
        assert_eq!(
            map.stretches,
            [stretch(0, 3, 0, false), stretch(3, 2, 0, true), stretch(5, 3, 1, false), stretch(8, 2, 1, true)]
        );
        let svg = pools_svg(&[map.clone(), map]).expect("it can be drawn");
        assert_eq!(svg.matches("a pool").count(), 2);
        // The background, and for each pool one line of its 64 pages and the four stretches.
        assert_eq!(svg.matches("<rect").count(), 1 + 2 * 5);
    }
}
