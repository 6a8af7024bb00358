//! The picture: two maps with one colour bar.

use std::path::Path;

use dijiang::attention::Near;
use ndarray::Array2;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::Result;

/// What is drawn.
pub(crate) struct Maps<'a> {
    pub(crate) title: String,
    /// What the tokens say, for the line below the title.
    pub(crate) text: String,
    /// Name and weights `[n, n]`.
    pub(crate) exact: (String, &'a Array2<f64>),
    pub(crate) linear: (String, &'a Array2<f64>),
    pub(crate) near: Option<Near>,
}

/// Weights from 10 to this power on have a colour of their own.
const LOWEST: f64 = -5.0;
/// Shades per factor of ten.
const SHADES: f64 = 10.0;
/// Side of a map, in pixels, as near as whole pixels per token allow.
const SIDE: i32 = 448;
/// Left of a map, above it, below it, and right of both for the colour bar, in pixels.
const LEFT: i32 = 76;
const ABOVE: i32 = 104;
const BELOW: i32 = 58;
const RIGHT: i32 = 112;
/// Characters of the text that are shown.
const EXCERPT: usize = 110;
const INK: RGBColor = RGBColor(40, 40, 40);
const LATER: RGBColor = RGBColor(243, 243, 243);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

pub(crate) fn draw(maps: &Maps<'_>, path: &Path) -> Result<()> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let n = maps.exact.1.nrows() as i32;
    let cell = (SIDE / n).max(1);
    let side = n * cell;
    let (width, height) = (2 * (LEFT + side) + RIGHT, ABOVE + side + BELOW);
    let root = SVGBackend::new(path, (width as u32, height as u32)).into_drawing_area();
    root.fill(&WHITE)?;
    text(&root, &maps.title, (LEFT, 22), 20, HPos::Left)?;
    let excerpt: String = maps.text.chars().take(EXCERPT).map(|letter| if letter.is_control() { ' ' } else { letter }).collect();
    text(&root, &format!("“{}…”", excerpt.trim()), (LEFT, 46), 13, HPos::Left)?;
    for (left, (name, weights)) in [(LEFT, &maps.exact), (2 * LEFT + side, &maps.linear)] {
        text(&root, name, (left + side / 2, ABOVE - 16), 16, HPos::Center)?;
        map(&root, weights, (left, ABOVE), cell)?;
        axes(&root, (left, ABOVE), n, cell)?;
    }
    if let Some(near) = maps.near {
        boundary(&root, near, (2 * LEFT + side, ABOVE), n, cell)?;
    }
    colour_bar(&root, (2 * (LEFT + side) + 24, ABOVE), side)?;
    root.present()?;
    Ok(())
}

/// Runs of one shade in a row are one rectangle, which keeps the file small.
fn map(root: &Area<'_>, weights: &Array2<f64>, (left, top): (i32, i32), cell: i32) -> Result<()> {
    let side = weights.nrows() as i32 * cell;
    root.draw(&Rectangle::new([(left, top), (left + side, top + side)], LATER.filled()))?;
    for (i, row) in weights.outer_iter().enumerate() {
        let shades: Vec<i32> = row.iter().take(i + 1).map(|&weight| shade(weight)).collect();
        let mut start = 0;
        for run in shades.chunk_by(|a, b| a == b) {
            let (from, to) = (left + start * cell, left + (start + run.len() as i32) * cell);
            let y = top + i as i32 * cell;
            root.draw(&Rectangle::new([(from, y), (to, y + cell)], colour(run[0]).filled()))?;
            start += run.len() as i32;
        }
    }
    Ok(())
}

/// Ticks at round positions, and what they count.
fn axes(root: &Area<'_>, (left, top): (i32, i32), n: i32, cell: i32) -> Result<()> {
    let side = n * cell;
    root.draw(&Rectangle::new([(left, top), (left + side, top + side)], INK.stroke_width(1)))?;
    let step = [1, 2, 4, 8, 16, 32, 64, 128, 256].into_iter().find(|step| n / step <= 6).unwrap_or(512);
    for tick in (0..n).step_by(step as usize) {
        let at = tick * cell + cell / 2;
        root.draw(&PathElement::new([(left + at, top + side), (left + at, top + side + 5)], INK))?;
        root.draw(&PathElement::new([(left - 5, top + at), (left, top + at)], INK))?;
        text(root, &tick.to_string(), (left + at, top + side + 14), 13, HPos::Center)?;
        text(root, &tick.to_string(), (left - 9, top + at), 13, HPos::Right)?;
    }
    text(root, "key: position in the text, in bytes", (left + side / 2, top + side + 38), 14, HPos::Center)?;
    let upright = TextStyle::from(("sans-serif", 14)).color(&INK).pos(Pos::new(HPos::Center, VPos::Center));
    root.draw(&Text::new("query", (left - 52, top + side / 2), upright.transform(FontTransform::Rotate270)))?;
    Ok(())
}

/// The line between the exact near part and what goes through the kernel.
fn boundary(root: &Area<'_>, near: Near, (left, top): (i32, i32), n: i32, cell: i32) -> Result<()> {
    let (chunk, back) = (near.chunk as i32, near.back as i32);
    // First key of the near part of each chunk of queries.
    let corners = (0..n).step_by(near.chunk).flat_map(|query| {
        let key = left + (query / chunk - back).max(0) * chunk * cell;
        [(key, top + query * cell), (key, top + (query + chunk).min(n) * cell)]
    });
    let line: Vec<(i32, i32)> = corners.filter(|&(key, _)| key > left).collect();
    let Some(&(_, query)) = line.first() else { return Ok(()) };
    let line: Vec<_> = std::iter::once((left, query)).chain(line).collect();
    root.draw(&PathElement::new(line, WHITE.stroke_width(2)))?;
    Ok(())
}

fn colour_bar(root: &Area<'_>, (left, top): (i32, i32), height: i32) -> Result<()> {
    let last = shade(1.0);
    let at = |shade: i32| top + height - (shade * height) / (last + 1);
    for shade in 0..=last {
        root.draw(&Rectangle::new([(left, at(shade + 1)), (left + 18, at(shade))], colour(shade).filled()))?;
    }
    root.draw(&Rectangle::new([(left, top), (left + 18, top + height)], INK.stroke_width(1)))?;
    for power in LOWEST as i32..=0 {
        let y = top + (f64::from(height) * f64::from(power) / LOWEST) as i32;
        root.draw(&PathElement::new([(left + 18, y), (left + 23, y)], INK))?;
        let label = match power {
            0 => "1".to_owned(),
            _ if power == LOWEST as i32 => format!("≤ {:.*}", -power as usize, 10_f64.powi(power)),
            _ => format!("{:.*}", -power as usize, 10_f64.powi(power)),
        };
        text(root, &label, (left + 27, y), 13, HPos::Left)?;
    }
    text(root, "weight", (left + 9, top - 16), 14, HPos::Left)
}

fn text(root: &Area<'_>, text: &str, at: (i32, i32), size: i32, side: HPos) -> Result<()> {
    let style = TextStyle::from(("sans-serif", size)).color(&INK).pos(Pos::new(side, VPos::Center));
    root.draw(&Text::new(text.to_owned(), at, style))?;
    Ok(())
}

/// The shade of a weight, from 0.
fn shade(weight: f64) -> i32 {
    ((weight.log10().clamp(LOWEST, 0.0) - LOWEST) * SHADES).round() as i32
}

/// Dark to bright: equal steps look equal, in grey too.
fn colour(shade: i32) -> RGBColor {
    const STOPS: [(f64, f64, f64); 8] = [
        (10.0, 8.0, 34.0),
        (52.0, 16.0, 98.0),
        (106.0, 23.0, 110.0),
        (158.0, 42.0, 99.0),
        (207.0, 68.0, 70.0),
        (240.0, 112.0, 32.0),
        (251.0, 175.0, 18.0),
        (250.0, 252.0, 164.0),
    ];
    let at = f64::from(shade) / (-LOWEST * SHADES) * (STOPS.len() - 1) as f64;
    let stop = (at as usize).min(STOPS.len() - 2);
    let (share, (a, b)) = (at - stop as f64, (STOPS[stop], STOPS[stop + 1]));
    let mix = |a: f64, b: f64| (a + share * (b - a)).round() as u8;
    RGBColor(mix(a.0, b.0), mix(a.1, b.1), mix(a.2, b.2))
}
