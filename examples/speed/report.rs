//! Table and plot.

use std::error::Error;
use std::path::Path;

use comfy_table::{CellAlignment, Table, presets};
use plotters::prelude::*;

use crate::measure::{MapRow, Report, Row};

/// The table, on stdout.
pub(crate) fn print(report: &Report, svg: &Path) {
    let Report { cpu, threads, dtype, heads, dim, windows, sgemm_gflops, rows, feature_maps } =
        report;
    println!(
        "{cpu}, {threads} thread(s), {dtype}, {heads} query and {} key-value heads, \
         d = m = e = {dim}, windows of {windows:?} tokens",
        windows.len()
    );
    println!("general matrix product 1024³: {sgemm_gflops:.0} GFLOP/s on one thread\n");
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    // Only where it was measured.
    let candle = |cells: &mut Vec<String>, cell: String| {
        if rows.iter().any(|row| row.candle_us.is_some()) {
            cells.insert(4, cell);
        }
    };
    let mut header =
        ["mode", "tokens", "µs / token·head", "softmax µs", "ratio", "GFLOP/s", "softmax GFLOP/s"]
            .map(String::from)
            .to_vec();
    candle(&mut header, "candle µs".to_owned());
    table.set_header(header);
    for Row { mode, n, us, softmax_us, candle_us, gflops, softmax_gflops } in rows {
        let optional = |value: Option<f64>, digits: usize| {
            value.map_or(String::from("–"), |value| format!("{value:.digits$}"))
        };
        let fastest =
            softmax_us.map(|softmax| candle_us.map_or(softmax, |candle| candle.min(softmax)));
        let mut cells = vec![
            mode.to_string(),
            n.to_string(),
            format!("{us:.3}"),
            optional(*softmax_us, 3),
            optional(fastest.map(|fastest| fastest / us), 2),
            format!("{gflops:.0}"),
            optional(*softmax_gflops, 0),
        ];
        candle(&mut cells, optional(*candle_us, 3));
        table.add_row(cells);
    }
    println!("{}", aligned(table));

    println!("\nfeature map alone, ns per vector:");
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["d = m", "batched DCT", "matrix product", "ratio"]);
    for MapRow { dim, dct_ns, matrix_ns } in feature_maps {
        table.add_row([
            dim.to_string(),
            format!("{dct_ns:.1}"),
            format!("{matrix_ns:.1}"),
            format!("{:.1}", matrix_ns / dct_ns),
        ]);
    }
    println!("{}", aligned(table));
    println!("plot: {}", svg.display());
}

/// The same table with numbers at the right of their columns.
fn aligned(mut table: Table) -> Table {
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Microseconds per token and head over n, both axes logarithmic.
pub(crate) fn plot(report: &Report, path: &Path) -> Result<(), Box<dyn Error + Send + Sync>> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let series = |mode: &'static str| report.rows.iter().filter(move |row| row.mode == mode);
    let lines: [(&str, Vec<(f64, f64)>, RGBColor); 6] = [
        (
            "softmax, causal",
            series("pure").filter_map(|r| Some((r.n as f64, r.softmax_us?))).collect(),
            RGBColor(200, 40, 40),
        ),
        (
            "linear + local window, causal",
            series("window").map(|r| (r.n as f64, r.us)).collect(),
            RGBColor(30, 90, 200),
        ),
        (
            "linear, causal",
            series("pure").map(|r| (r.n as f64, r.us)).collect(),
            RGBColor(20, 150, 70),
        ),
        (
            "linear, full",
            series("full").map(|r| (r.n as f64, r.us)).collect(),
            RGBColor(130, 130, 130),
        ),
        (
            "softmax, decode",
            series("decode").filter_map(|r| Some((r.n as f64, r.softmax_us?))).collect(),
            RGBColor(240, 150, 60),
        ),
        (
            "linear, decode",
            series("decode").map(|r| (r.n as f64, r.us)).collect(),
            RGBColor(120, 60, 180),
        ),
    ];
    let points = || lines.iter().flat_map(|(_, points, _)| points);
    let (left, right) =
        points().fold((f64::MAX, 0.0_f64), |(low, high), (n, _)| (low.min(*n), high.max(*n)));
    let (bottom, top) =
        points().fold((f64::MAX, 0.0_f64), |(low, high), (_, us)| (low.min(*us), high.max(*us)));

    let root = SVGBackend::new(path, (860, 520)).into_drawing_area();
    root.fill(&WHITE)?;
    let caption = format!(
        "{}, {} thread(s), {}, d = {}",
        report.cpu, report.threads, report.dtype, report.dim
    );
    let mut chart = ChartBuilder::on(&root)
        .caption(caption, ("sans-serif", 17))
        .margin(14)
        .x_label_area_size(46)
        .y_label_area_size(64)
        .build_cartesian_2d(
            (left..right * 1.05).log_scale().base(2.0),
            (bottom * 0.7..top * 1.4).log_scale(),
        )?;
    chart
        .configure_mesh()
        .x_desc("tokens")
        .y_desc("µs per token and head")
        .x_label_formatter(&|n| format!("{n:.0}"))
        .y_label_formatter(&|us| format!("{us}"))
        .label_style(("sans-serif", 14))
        .light_line_style(WHITE)
        .draw()?;
    for (name, points, color) in &lines {
        let color = *color;
        chart
            .draw_series(
                LineSeries::new(points.iter().copied(), color.stroke_width(2)).point_size(3),
            )?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(3)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.85))
        .border_style(RGBColor(200, 200, 200))
        .label_font(("sans-serif", 14))
        .draw()?;
    root.present()?;
    Ok(())
}
