//! Plots as SVG text: who takes in how much, how latencies are distributed, what a record costs as load grows, and whether
//! the rate holds.

use std::ops::Range;

use anyhow::Context;
use plotters::prelude::*;

use super::compare::{Figure, Line};
use super::median;
use crate::row::Row;

/// Size of a plot in pixels.
const SIZE: (u32, u32) = (900, 420);
/// Height of a bar with what surrounds it, and of the rest of a bar plot.
const BAR: u32 = 22;
const BAR_MARGIN: u32 = 90;

/// A plot and what it shows.
#[derive(Clone, Debug)]
pub struct Plot {
    /// Good as a file name.
    pub name: String,
    pub title: String,
    pub svg: String,
}

type Failure<'a> = DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>;

/// Everything that these results can be drawn as.
///
/// # Errors
/// The plotting library failed.
pub fn plots(rows: &[Row], lines: &[Line]) -> anyhow::Result<Vec<Plot>> {
    let mut workloads: Vec<&str> = Vec::new();
    for row in rows.iter().filter(|row| row.workload != "limits") {
        if !workloads.contains(&row.workload.as_str()) {
            workloads.push(&row.workload);
        }
    }
    let mut plots = Vec::new();
    for workload in workloads {
        let of: Vec<_> = rows.iter().filter(|row| row.workload == workload).collect();
        let rates: Vec<_> = lines
            .iter()
            .filter(|line| line.workload == workload && line.figure == Figure::RecordsPerSecond)
            .collect();
        let mut add = |kind: &str, title: String, drawn: Result<String, Failure<'_>>| {
            let svg = drawn.ok().with_context(|| format!("cannot draw {kind} of {workload}"))?;
            plots.push(Plot { name: format!("{}-{kind}", workload.to_lowercase()), title, svg });
            anyhow::Ok(())
        };
        if of.iter().any(|row| row.rate.is_some()) {
            add("latency", format!("{workload}: latency in µs by percentile"), curves(&of))?;
            add("cost", format!("{workload}: processor time per record as load grows, µs"), cost(&of))?;
        } else if !rates.is_empty() {
            add("rate", format!("{workload}: records/s, median and spread"), bars(&rates))?;
        }
        if of.iter().any(|row| row.timeline.len() > 1) {
            add("timeline", format!("{workload}: records/s over time, first case"), timeline(&of))?;
        }
    }
    Ok(plots)
}

/// The same in all plots of a run.
fn color(index: usize) -> RGBColor {
    const COLORS: [(u8, u8, u8); 7] = [
        (0, 90, 160),
        (200, 60, 40),
        (40, 140, 70),
        (230, 140, 0),
        (130, 80, 160),
        (90, 90, 90),
        (160, 110, 60),
    ];
    let (red, green, blue) = COLORS[index % COLORS.len()];
    RGBColor(red, green, blue)
}

fn peers<'a>(rows: &[&'a Row]) -> Vec<&'a str> {
    let mut peers: Vec<&str> = Vec::new();
    for row in rows {
        if !peers.contains(&row.peer.as_str()) {
            peers.push(&row.peer);
        }
    }
    peers
}

/// One bar for each peer in each case, with a line from the smallest to the largest.
fn bars(lines: &[&Line]) -> Result<String, Failure<'static>> {
    let mut svg = String::new();
    {
        let height = BAR_MARGIN + BAR * lines.len() as u32;
        let area = SVGBackend::with_string(&mut svg, (SIZE.0, height)).into_drawing_area();
        let drawn = || -> Result<(), Failure<'_>> {
            area.fill(&WHITE)?;
            let most = lines.iter().map(|line| line.spread.max).fold(1.0, f64::max) * 1.05;
            let count = lines.len() as f64;
            let mut chart = ChartBuilder::on(&area)
                .margin(12)
                .x_label_area_size(36)
                .y_label_area_size(420)
                .build_cartesian_2d(0.0..most, 0.0..count)?;
            let label = |row: &f64| {
                let line = lines.get(lines.len().saturating_sub(1).wrapping_sub(*row as usize));
                line.map_or_else(String::new, |line| format!("{}: {}", line.case, line.peer))
            };
            chart
                .configure_mesh()
                .disable_y_mesh()
                .y_labels(0)
                .x_label_formatter(&|figure| super::thousands(*figure))
                .draw()?;
            let mut order: Vec<&str> = Vec::new();
            for (index, line) in lines.iter().enumerate() {
                let place = order.iter().position(|peer| *peer == line.peer).unwrap_or_else(|| {
                    order.push(&line.peer);
                    order.len() - 1
                });
                let bottom = (lines.len() - 1 - index) as f64;
                let bar = [(0.0, bottom + 0.15), (line.spread.median, bottom + 0.85)];
                chart.draw_series([Rectangle::new(bar, color(place).filled())])?;
                let spread = [(line.spread.min, bottom + 0.5), (line.spread.max, bottom + 0.5)];
                chart.draw_series([PathElement::new(spread, BLACK.stroke_width(2))])?;
                let (x, y) = chart.backend_coord(&(0.0, bottom + 0.5));
                let style = ("sans-serif", 12).into_font().color(&BLACK);
                let right = plotters::style::text_anchor::Pos::new(
                    plotters::style::text_anchor::HPos::Right,
                    plotters::style::text_anchor::VPos::Center,
                );
                area.draw(&Text::new(label(&bottom), (x - 6, y), style.pos(right)))?;
            }
            area.present()
        };
        drawn().map_err(owned)?;
    }
    Ok(svg)
}

/// One curve for each peer and case, over percentiles that are spread towards the end.
fn curves(rows: &[&Row]) -> Result<String, Failure<'static>> {
    let mut series = Vec::new();
    for (index, peer) in peers(rows).into_iter().enumerate() {
        let mut cases: Vec<(&str, _)> = Vec::new();
        for row in rows.iter().filter(|row| row.peer == peer && !row.percentiles.is_empty()) {
            if !cases.contains(&(row.case.as_str(), row.level)) {
                cases.push((&row.case, row.level));
            }
        }
        for (case, level) in cases {
            let same: Vec<_> = rows
                .iter()
                .filter(|row| row.peer == peer && row.case == case && row.level == level)
                .collect();
            let Some(first) = same.first() else { continue };
            let point = |(place, (percentile, _)): (usize, &(f64, f64))| {
                let here = same.iter().filter_map(|row| row.percentiles.get(place));
                let here = median(here.map(|(_, micros)| *micros).collect())?;
                // Each factor of ten nearer to 100 % has the same width.
                Some((-(1.0 - percentile.min(99.999) / 100.0).log10(), here.max(1.0)))
            };
            let points: Vec<_> = first.percentiles.iter().enumerate().filter_map(point).collect();
            let level = level.map_or("", |level| level.name());
            series.push((format!("{peer}, {case}, {level}"), index, points));
        }
    }
    let places = [(0.0, "0"), (1.0, "90"), (2.0, "99"), (3.0, "99.9"), (4.0, "99.99"), (5.0, "max")];
    let label = move |place: f64| {
        let near = places.iter().find(|(at, _)| (at - place).abs() < 0.01);
        near.map_or_else(String::new, |(_, name)| (*name).to_owned())
    };
    xy(&series, 0.0..5.0, true, &label)
}

/// Processor time of server and client per record, by records per second.
fn cost(rows: &[&Row]) -> Result<String, Failure<'static>> {
    let mut series = Vec::new();
    for (index, peer) in peers(rows).into_iter().enumerate() {
        let point = |row: &&&Row| {
            let spent = row.server_cpu_s? + row.client_cpu_s?;
            Some((row.records_per_s?, spent / row.records? as f64 * 1e6))
        };
        let of = |row: &&&Row| row.peer == peer;
        let mut points: Vec<_> = rows.iter().filter(of).filter_map(|row| point(&row)).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        series.push((peer.to_owned(), index, points));
    }
    let most = series.iter().flat_map(|(_, _, points)| points).map(|point| point.0).fold(1.0, f64::max);
    xy(&series, 0.0..most * 1.05, false, &super::thousands)
}

/// The first repetition of the first case.
fn timeline(rows: &[&Row]) -> Result<String, Failure<'static>> {
    let case = rows.iter().find(|row| row.timeline.len() > 1).map(|row| (&row.case, row.level));
    let mut series = Vec::new();
    for (index, peer) in peers(rows).into_iter().enumerate() {
        let of = |row: &&&Row| row.peer == peer && Some((&row.case, row.level)) == case;
        let Some(row) = rows.iter().find(of) else { continue };
        let point = |(place, count): (usize, &u64)| ((place + 1) as f64 / 10.0, *count as f64 * 10.0);
        series.push((peer.to_owned(), index, row.timeline.iter().enumerate().map(point).collect()));
    }
    let longest = rows.iter().map(|row| row.timeline.len()).max().unwrap_or(1) as f64 / 10.0;
    xy(&series, 0.0..longest, false, &|seconds| format!("{seconds:.1} s"))
}

/// Name, color and points.
type Series = (String, usize, Vec<(f64, f64)>);

fn xy(
    series: &[Series],
    xs: Range<f64>,
    logarithmic: bool,
    label: &dyn Fn(f64) -> String,
) -> Result<String, Failure<'static>> {
    let most = series.iter().flat_map(|(_, _, points)| points).map(|point| point.1).fold(1.0, f64::max);
    // Plotters' logarithmic axes cannot start from what is there; this one labels powers of ten itself.
    let scale = |y: f64| if logarithmic { y.max(1.0).log10() } else { y };
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let drawn = || -> Result<(), Failure<'_>> {
            area.fill(&WHITE)?;
            let mut chart = ChartBuilder::on(&area)
                .margin(12)
                .x_label_area_size(36)
                .y_label_area_size(80)
                .build_cartesian_2d(xs.clone(), 0.0..scale(most) * 1.1)?;
            let unscaled = |y: &f64| super::thousands(if logarithmic { 10_f64.powf(*y) } else { *y });
            chart
                .configure_mesh()
                .x_label_formatter(&|x| label(*x))
                .y_label_formatter(&unscaled)
                .light_line_style(TRANSPARENT)
                .draw()?;
            for (name, index, points) in series {
                let style = color(*index).stroke_width(2);
                let scaled = points.iter().map(|(x, y)| (*x, scale(*y)));
                chart
                    .draw_series(LineSeries::new(scaled, style).point_size(3))?
                    .label(name)
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], style));
            }
            chart
                .configure_series_labels()
                .position(SeriesLabelPosition::UpperLeft)
                .background_style(WHITE.mix(0.8))
                .border_style(BLACK.mix(0.3))
                .draw()?;
            area.present()
        };
        drawn().map_err(owned)?;
    }
    Ok(svg)
}

/// Without the text that was being drawn.
fn owned(failure: Failure<'_>) -> Failure<'static> {
    match failure {
        DrawingAreaErrorKind::BackendError(error) => DrawingAreaErrorKind::BackendError(error),
        DrawingAreaErrorKind::SharingError => DrawingAreaErrorKind::SharingError,
        DrawingAreaErrorKind::LayoutError => DrawingAreaErrorKind::LayoutError,
    }
}
