//! Tables and plot.

use std::path::Path;

use comfy_table::{CellAlignment, Table, presets};
use plotters::prelude::*;

use crate::Result;
use crate::measure::{Figures, InputReport, Report};

/// The tables, on stdout.
pub(crate) fn print(report: &Report, svg: &Path) {
    let Report { dim, tokens, windows, calibration_windows, seeds, steps, inputs, seconds } =
        report;
    println!(
        "linear attention without a local window against softmax attention, causal, d = {dim}"
    );
    println!("{windows} windows of {tokens} tokens, mean over heads and {seeds} seed(s)");
    println!(
        "centres, φ and calibration ({steps} steps, 1 seed) from {calibration_windows} other \
         windows"
    );
    for input in inputs {
        println!("\n{}, {} heads", input.name, input.heads);
        println!("{}", table(input));
    }
    println!(
        "\nerror: Σ|ô − o|² / Σ|o − ō|²; KL: of linear from softmax weights, nats per query; less \
         is better"
    );
    println!("{seconds:.0} s; plot: {}", svg.display());
}

fn table(input: &InputReport) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    let features =
        || input.rows.iter().take(1).flat_map(|row| &row.points).map(|point| point.features);
    let header = std::iter::once("map".to_owned());
    let header = header
        .chain(features().map(|m| format!("error\nm = {m}")))
        .chain(features().map(|m| format!("KL\nm = {m}")));
    table.set_header(header);
    let mut add = |map: &str, figures: &[Figures]| {
        let errors = figures.iter().map(|figures| number(figures.error));
        let cells = errors.chain(figures.iter().map(|figures| number(figures.kl)));
        table.add_row(std::iter::once(map.to_owned()).chain(cells));
    };
    for row in &input.rows {
        add(row.map, &row.points.iter().map(|point| point.figures).collect::<Vec<_>>());
    }
    add("equal weights for all keys", &vec![input.equal_weights; features().count()]);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Three significant digits, as far as that makes sense.
fn number(value: f64) -> String {
    match value.abs() {
        size if !size.is_finite() || size >= 1e5 => format!("{value:.1e}"),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.1 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

const COLORS: [RGBColor; 8] = [
    RGBColor(200, 40, 40),
    RGBColor(240, 150, 60),
    RGBColor(30, 90, 200),
    RGBColor(90, 180, 230),
    RGBColor(150, 150, 150),
    RGBColor(70, 70, 70),
    RGBColor(20, 150, 70),
    RGBColor(120, 60, 180),
];

/// Height of title, panels and legend, in pixels.
const HEIGHTS: (u32, u32, u32) = (40, 400, 122);
const PANEL_WIDTH: u32 = 470;

/// Relative output error over m, both axes logarithmic, one panel per input; the legend below them.
pub(crate) fn plot(report: &Report, path: &Path) -> Result<()> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let width = PANEL_WIDTH * report.inputs.len() as u32;
    let root =
        SVGBackend::new(path, (width, HEIGHTS.0 + HEIGHTS.1 + HEIGHTS.2)).into_drawing_area();
    root.fill(&WHITE)?;
    let (title, rest) = root.split_vertically(HEIGHTS.0);
    let (panels, legend) = rest.split_vertically(HEIGHTS.1);
    let caption = format!(
        "Linear next to softmax attention, no local window, causal, {} tokens, d = {}",
        report.tokens, report.dim
    );
    title.titled(&caption, ("sans-serif", 17))?;
    for (area, input) in panels.split_evenly((1, report.inputs.len())).iter().zip(&report.inputs) {
        panel(area, input)?;
    }
    if let Some(input) = report.inputs.first() {
        draw_legend(&legend, input, width as i32)?;
    }
    root.present()?;
    Ok(())
}

fn panel(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    input: &InputReport,
) -> Result<()> {
    let points = || {
        input
            .rows
            .iter()
            .flat_map(|row| &row.points)
            .map(|point| (point.features as f64, point.figures.error))
    };
    let equal = input.equal_weights.error;
    let (left, right) =
        points().fold((f64::MAX, 0.0_f64), |(low, high), (m, _)| (low.min(m), high.max(m)));
    let (bottom, top) =
        points().fold((equal, equal), |(low, high), (_, error)| (low.min(error), high.max(error)));
    let (left, right, bottom, top) =
        (left / 1.1, right * 1.1, bottom.max(1e-9) / 1.2, top.max(1e-9) * 1.2);
    let ranges = (
        (left..right).log_scale().base(2.0),
        (bottom..top).log_scale().with_key_points(ticks(bottom, top)),
    );
    let mut chart = ChartBuilder::on(area)
        .caption(format!("{}, {} heads", input.name, input.heads), ("sans-serif", 15))
        .margin(10)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(ranges.0, ranges.1)?;
    chart
        .configure_mesh()
        .x_desc("features m")
        .y_desc("relative output error")
        .x_label_formatter(&|m| format!("{m:.0}"))
        .y_label_formatter(&|error| error.to_string())
        .label_style(("sans-serif", 14))
        .light_line_style(WHITE)
        .draw()?;
    chart.draw_series(DashedLineSeries::new(
        [(left, equal), (right, equal)],
        5,
        4,
        BLACK.stroke_width(1),
    ))?;
    for (row, color) in input.rows.iter().zip(COLORS.iter().cycle()) {
        let points = row.points.iter().map(|point| (point.features as f64, point.figures.error));
        chart.draw_series(LineSeries::new(points, color.stroke_width(2)).point_size(3))?;
    }
    Ok(())
}

/// Round numbers between `bottom` and `top`, the fewer per decade the more decades there are.
fn ticks(bottom: f64, top: f64) -> Vec<f64> {
    let digits: &[u32] = match top / bottom {
        ratio if ratio < 20.0 => &[10, 15, 20, 30, 40, 50, 60, 80],
        ratio if ratio < 1e3 => &[10, 20, 50],
        _ => &[10],
    };
    // Read from text, so that they are written as short as they are.
    let all = (-11..12).flat_map(|power| {
        digits.iter().filter_map(move |digits| format!("{digits}e{power}").parse().ok())
    });
    all.filter(|tick| (bottom..top).contains(tick)).collect()
}

/// One entry per map and one for equal weights, in two columns.
fn draw_legend(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    input: &InputReport,
    width: i32,
) -> Result<()> {
    let names = input.rows.iter().map(|row| row.map).chain(["equal weights for all keys (dashed)"]);
    let colors = COLORS.into_iter().cycle().take(input.rows.len()).chain([BLACK]);
    let per_column = input.rows.len().div_ceil(2).max(1) + 1;
    for (i, (name, color)) in names.zip(colors).enumerate() {
        let (x, y) =
            (70 + (i / per_column) as i32 * (width / 2), 12 + (i % per_column) as i32 * 21);
        area.draw(&PathElement::new([(x, y), (x + 22, y)], color.stroke_width(3)))?;
        area.draw(&Text::new(name, (x + 30, y - 5), ("sans-serif", 14)))?;
    }
    Ok(())
}
