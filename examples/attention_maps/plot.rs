//! The picture: two maps with one colour bar, as SVG. Written directly: as plotters' rectangles it
//! would be ten times as large.

use std::fmt::{Display, Write};
use std::path::Path;

use dijiang::attention::Window;
use ndarray::Array2;

use crate::Result;

/// What is drawn.
pub(crate) struct Maps<'a> {
    pub(crate) title: String,
    /// What the tokens say, for the line below the title.
    pub(crate) text: String,
    /// Name and weights `[n, n]`.
    pub(crate) exact: (String, &'a Array2<f64>),
    pub(crate) linear: (String, &'a Array2<f64>),
    pub(crate) window: Option<Window>,
}

/// Weights from 10 to this power on have a colour of their own.
const LOWEST: i32 = -5;
/// Shades per factor of ten.
const SHADES: i32 = 8;
/// Side of a map, in pixels, as near as whole pixels per token allow.
const SIDE: usize = 512;
/// Left of a map, above it, below it, and right of both for the colour bar, in pixels.
const LEFT: usize = 76;
const ABOVE: usize = 108;
const BELOW: usize = 62;
const RIGHT: usize = 128;
/// Characters of the text that are shown.
const EXCERPT: usize = 130;
const INK: &str = "#282828";

pub(crate) fn draw(maps: &Maps<'_>, path: &Path) -> Result<()> {
    let n = maps.exact.1.nrows();
    let side = n * (SIDE / n).max(1);
    let (width, height) = (2 * (LEFT + side) + RIGHT, ABOVE + side + BELOW);
    let mut svg = Svg(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" \
         font-family=\"sans-serif\" fill=\"{INK}\" stroke-width=\"1\">\n<rect width=\"100%\" \
         height=\"100%\" fill=\"#fff\"/>\n"
    ));
    svg.text((LEFT, 30), 20, "start", &maps.title);
    let excerpt: String = maps
        .text
        .chars()
        .take(EXCERPT)
        .map(|letter| if letter.is_control() { ' ' } else { letter })
        .collect();
    // From the first whole word on.
    let words = excerpt.split_once(' ').map_or(excerpt.as_str(), |(_, words)| words);
    svg.text((LEFT, 54), 13, "start", format!("“… {} …”", words.trim()));
    for (left, (name, weights)) in [(LEFT, &maps.exact), (2 * LEFT + side, &maps.linear)] {
        svg.text((left + side / 2, ABOVE - 14), 16, "middle", name);
        svg.map(weights, left, side);
        svg.axes(left, n, side);
    }
    if let Some(window) = maps.window {
        svg.boundary(window, 2 * LEFT + side, n, side);
    }
    svg.colour_bar(2 * (LEFT + side) + 24, side);
    svg.0 += "</svg>\n";
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    Ok(std::fs::write(path, svg.0)?)
}

struct Svg(String);

impl Svg {
    fn add(&mut self, element: std::fmt::Arguments<'_>) {
        self.0.write_fmt(element).expect("a string takes everything");
        self.0.push('\n');
    }

    /// With its middle, start or end and the middle of its letters at the point.
    fn text(&mut self, (x, y): (usize, usize), size: usize, anchor: &str, text: impl Display) {
        let text = text.to_string().replace('&', "&amp;").replace('<', "&lt;");
        let y = y + size / 3;
        self.add(format_args!(
            "<text x=\"{x}\" y=\"{y}\" font-size=\"{size}\" text-anchor=\"{anchor}\">{text}</text>"
        ));
    }

    /// One path per shade, one stroke per run of a shade in a row.
    fn map(&mut self, weights: &Array2<f64>, left: usize, side: usize) {
        let mut paths = vec![String::new(); shade(1.0) + 1];
        for (i, row) in weights.outer_iter().enumerate() {
            let shades: Vec<usize> = row.iter().take(i + 1).map(|&weight| shade(weight)).collect();
            let mut start = 0;
            for run in shades.chunk_by(|a, b| a == b) {
                paths[run[0]] += &format!("M{start} {i}h{}", run.len());
                start += run.len();
            }
        }
        self.add(format_args!(
            "<rect x=\"{left}\" y=\"{ABOVE}\" width=\"{side}\" height=\"{side}\" fill=\"#f3f3f3\"/>"
        ));
        let scale = side as f64 / weights.nrows() as f64;
        self.add(format_args!(
            "<g transform=\"translate({left} {ABOVE}) scale({scale}) translate(0 .5)\" \
             fill=\"none\" shape-rendering=\"crispEdges\">"
        ));
        for (shade, path) in paths.iter().enumerate().filter(|(_, path)| !path.is_empty()) {
            self.add(format_args!("<path stroke=\"{}\" d=\"{path}\"/>", colour(shade)));
        }
        self.0 += "</g>\n";
    }

    /// A frame, ticks at round positions, and what they count.
    fn axes(&mut self, left: usize, n: usize, side: usize) {
        let bottom = ABOVE + side;
        self.add(format_args!(
            "<rect x=\"{left}\" y=\"{ABOVE}\" width=\"{side}\" height=\"{side}\" fill=\"none\" \
             stroke=\"{INK}\"/>"
        ));
        let step =
            [1, 2, 5, 10, 20, 50, 100, 200].into_iter().find(|step| n / step <= 6).unwrap_or(500);
        for tick in (0..n).step_by(step) {
            let at = tick * side / n + side / n / 2;
            let (x, y) = (left + at, ABOVE + at);
            self.add(format_args!("<path stroke=\"{INK}\" d=\"M{x} {bottom}v5M{left} {y}h-5\"/>"));
            self.text((x, bottom + 15), 13, "middle", tick);
            self.text((left - 9, y), 13, "end", tick);
        }
        self.text(
            (left + side / 2, bottom + 40),
            14,
            "middle",
            "key, position in the text in tokens",
        );
        let (x, y) = (left - 50, ABOVE + side / 2);
        self.add(format_args!(
            "<text transform=\"translate({x} {y}) rotate(-90)\" font-size=\"14\" \
             text-anchor=\"middle\">query</text>"
        ));
    }

    /// The line between the exact local window and what goes through the kernel.
    fn boundary(&mut self, window: Window, left: usize, n: usize, side: usize) {
        let mut path = String::new();
        // Of each chunk of queries, the first key that is near.
        for query in (0..n).step_by(window.chunk) {
            let key = (query / window.chunk).saturating_sub(window.back) * window.chunk;
            if key > 0 {
                let (x, y, end) = (
                    left + key * side / n,
                    ABOVE + query * side / n,
                    ABOVE + (query + window.chunk).min(n) * side / n,
                );
                path += &match path.is_empty() {
                    true => format!("M{left} {y}H{x}V{end}"),
                    false => format!("H{x}V{end}"),
                };
            }
        }
        for (width, colour) in [(3.0, "#000"), (1.4, "#fff")] {
            self.add(format_args!(
                "<path fill=\"none\" stroke=\"{colour}\" stroke-width=\"{width}\" d=\"{path}\"/>"
            ));
        }
        if !path.is_empty() {
            let (x, y) = (left + side - 14, ABOVE + side / 5);
            self.text((x, y), 13, "end", "right of the line: exact");
            self.text((x, y + 19), 13, "end", "left of it: through the kernel");
        }
    }

    fn colour_bar(&mut self, left: usize, height: usize) {
        let shades = shade(1.0) + 1;
        for shade in 0..shades {
            let (top, bottom) = (
                ABOVE + height - (shade + 1) * height / shades,
                ABOVE + height - shade * height / shades,
            );
            let (tall, colour) = (bottom - top, colour(shade));
            self.add(format_args!(
                "<rect x=\"{left}\" y=\"{top}\" width=\"18\" height=\"{tall}\" fill=\"{colour}\"/>"
            ));
        }
        self.add(format_args!(
            "<rect x=\"{left}\" y=\"{ABOVE}\" width=\"18\" height=\"{height}\" fill=\"none\" \
             stroke=\"{INK}\"/>"
        ));
        for power in LOWEST..=0 {
            let (x, y) = (
                left + 18,
                ABOVE + height * power.unsigned_abs() as usize / LOWEST.unsigned_abs() as usize,
            );
            self.add(format_args!("<path stroke=\"{INK}\" d=\"M{x} {y}h5\"/>"));
            let number = format!("{:.*}", power.unsigned_abs() as usize, 10_f64.powi(power));
            self.text(
                (x + 9, y),
                13,
                "start",
                if power == LOWEST { format!("≤ {number}") } else { number },
            );
        }
        self.text((left, ABOVE - 20), 14, "start", "weight");
    }
}

/// The shade of a weight, from 0.
fn shade(weight: f64) -> usize {
    ((weight.log10().clamp(f64::from(LOWEST), 0.0) - f64::from(LOWEST)) * f64::from(SHADES)).round()
        as usize
}

/// Dark to bright: equal steps look equal, in grey too.
fn colour(shade: usize) -> String {
    const STOPS: [[f64; 3]; 8] = [
        [10.0, 8.0, 34.0],
        [52.0, 16.0, 98.0],
        [106.0, 23.0, 110.0],
        [158.0, 42.0, 99.0],
        [207.0, 68.0, 70.0],
        [240.0, 112.0, 32.0],
        [251.0, 175.0, 18.0],
        [250.0, 252.0, 164.0],
    ];
    let at = shade as f64 / f64::from(-LOWEST * SHADES) * (STOPS.len() - 1) as f64;
    let stop = (at as usize).min(STOPS.len() - 2);
    let mixed = |part: usize| {
        (STOPS[stop][part] + (at - stop as f64) * (STOPS[stop + 1][part] - STOPS[stop][part]))
            .round() as u8
    };
    format!("#{:02x}{:02x}{:02x}", mixed(0), mixed(1), mixed(2))
}
