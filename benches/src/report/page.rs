//! One self-contained HTML page, and the same tables as Markdown.

use std::fmt::Write as _;

use comfy_table::{CellAlignment, Table, presets};

use super::compare::{Line, Spread};
use super::plot::Plot;
use super::{Machine, median, thousands};
use crate::row::Row;

const STYLE: &str = "body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1100px;padding:0 1em;color:#222}\
table{border-collapse:collapse;margin:1em 0;font-size:13px}th,td{padding:3px 9px;border-bottom:1px solid #ddd;text-align:left}\
td.n{text-align:right;font-variant-numeric:tabular-nums}tr.us{background:#eef5fb}svg{max-width:100%;height:auto}";

const HEADING: &[&str] = &[
    "workload",
    "case",
    "figure",
    "peer",
    "ack",
    "median",
    "min",
    "max",
    "reps",
    "Felucca is better by",
    "of the limit",
];
/// Columns from this one on are numbers.
const FIRST_NUMBER: usize = 5;

fn figure(value: f64) -> String {
    if value < 1000.0 { format!("{value:.1}") } else { thousands(value) }
}

fn ratio(spread: Spread) -> String {
    format!("{:.2}× ({:.2}–{:.2})", spread.median, spread.min, spread.max)
}

fn cells(line: &Line) -> [String; 11] {
    [
        line.workload.clone(),
        line.case.clone(),
        line.figure.name().to_owned(),
        line.peer.clone(),
        line.ack.map_or("", |ack| ack.name()).to_owned(),
        figure(line.spread.median),
        figure(line.spread.min),
        figure(line.spread.max),
        line.repetitions.to_string(),
        line.ratio.map_or_else(String::new, ratio),
        line.share_of_limit.map_or_else(String::new, |share| format!("{:.0} %", share * 100.0)),
    ]
}

/// The comparison as a Markdown table.
pub fn markdown(lines: &[Line]) -> String {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header(HEADING);
    for line in lines {
        table.add_row(cells(line));
    }
    for column in table.column_iter_mut().skip(FIRST_NUMBER) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// The machine's limits: name and median.
fn limits(rows: &[Row]) -> Vec<(String, String)> {
    let mut limits: Vec<(String, String)> = Vec::new();
    for row in rows.iter().filter(|row| row.workload == "limits") {
        if limits.iter().any(|(name, _)| *name == row.case) {
            continue;
        }
        let same = || rows.iter().filter(|other| other.workload == "limits" && other.case == row.case);
        let bytes = median(same().filter_map(|row| row.bytes_per_s).collect());
        let micros = median(same().filter_map(|row| row.p50_us).collect());
        let text = match (bytes, micros) {
            (Some(bytes), _) => format!("{} MB/s", thousands(bytes / 1e6)),
            (None, Some(micros)) => format!("p50 {micros:.1} µs"),
            (None, None) => continue,
        };
        limits.push((row.case.clone(), text));
    }
    limits
}

/// Who took part, at which version and with which settings.
fn settings(lines: &[Line]) -> Vec<[String; 4]> {
    let mut settings = Vec::new();
    for line in lines {
        let row = [
            line.peer.clone(),
            line.version.clone().unwrap_or_default(),
            line.ack.map_or("", |ack| ack.name()).to_owned(),
            line.settings.clone().unwrap_or_default(),
        ];
        if !settings.contains(&row) {
            settings.push(row);
        }
    }
    settings.sort();
    settings
}

/// Everything on one page that needs nothing else.
pub fn html(machine: &Machine, rows: &[Row], lines: &[Line], plots: &[Plot]) -> String {
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>Felucca measured</title>\n\
         <style>{STYLE}</style>\n<h1>Felucca measured</h1>\n"
    );
    // Writing to a string cannot fail.
    let mut put = |text: &str| {
        let _written = writeln!(page, "{text}");
    };
    put(&format!(
        "<p>{}, {} cores, {} MiB, Linux {}. Servers and clients share the machine, peers took turns with Felucca. \
         A ratio above 1 means that Felucca is better: more records, or less time or space.</p>",
        escaped(&machine.cpu),
        machine.cores,
        machine.memory_bytes >> 20,
        escaped(&machine.kernel)
    ));
    put("<h2>Who took part</h2>\n<table><tr><th>peer<th>version<th>ack<th>settings</tr>");
    for row in settings(lines) {
        let cells: String = row.iter().map(|cell| format!("<td>{}", escaped(cell))).collect();
        put(&format!("<tr>{cells}</tr>"));
    }
    put("</table>\n<h2>The machine</h2>\n<table>");
    for (name, text) in limits(rows) {
        put(&format!("<tr><td>{}<td class=\"n\">{}</tr>", escaped(&name), escaped(&text)));
    }
    put("</table>");
    let mut workloads: Vec<&str> = Vec::new();
    for line in lines {
        if !workloads.contains(&line.workload.as_str()) {
            workloads.push(&line.workload);
        }
    }
    for workload in workloads {
        put(&format!("<h2>{}</h2>", escaped(workload)));
        let prefix = format!("{}-", workload.to_lowercase());
        let kinds = ["rate", "latency", "cost", "timeline"].map(|kind| format!("{prefix}{kind}"));
        for plot in plots.iter().filter(|plot| kinds.contains(&plot.name)) {
            put(&format!("<h3>{}</h3>\n{}", escaped(&plot.title), plot.svg));
        }
        let heading: String = HEADING.iter().map(|name| format!("<th>{name}")).collect();
        put(&format!("<table><tr>{heading}</tr>"));
        for line in lines.iter().filter(|line| line.workload == workload) {
            let cell = |(column, text): (usize, &String)| {
                let class = if column >= FIRST_NUMBER { " class=\"n\"" } else { "" };
                format!("<td{class}>{}", escaped(text))
            };
            let cells: String = cells(line).iter().enumerate().map(cell).collect();
            let class = if line.peer == "felucca" { " class=\"us\"" } else { "" };
            put(&format!("<tr{class}>{cells}</tr>"));
        }
        put("</table>");
    }
    put("</html>");
    page
}
