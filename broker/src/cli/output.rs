//! What commands print: tables for people, JSON for programs.

use std::io::{self, Write};

use clap::ValueEnum;
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    Table,
    Json,
}

/// A column of a table: its title and whether it holds numbers.
pub(super) enum Column {
    Text(&'static str),
    Number(&'static str),
}

/// Prints one JSON document on one line.
pub(super) fn print_json(value: &impl Serialize) -> io::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, value)?;
    out.write_all(b"\n")
}

/// Prints a line for people.
pub(super) fn print_line(line: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(line.as_bytes())?;
    out.write_all(b"\n")
}

/// A number and what it counts, such as `1 record` and `2 records`.
pub(super) fn counted(count: u64, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}

/// Prints rows under a header. Nothing is wrapped, so that other programs find whole values.
pub(super) fn print_table(columns: &[Column], rows: Vec<Vec<String>>) -> io::Result<()> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(columns.iter().map(|column| match column {
        Column::Text(title) | Column::Number(title) => *title,
    }));
    for row in rows {
        table.add_row(row);
    }
    for (index, column) in columns.iter().enumerate() {
        if let Some(shown) = table.column_mut(index) {
            shown.set_padding((0, 2));
            if matches!(column, Column::Number(_)) {
                shown.set_cell_alignment(CellAlignment::Right);
            }
        }
    }
    let mut out = io::stdout().lock();
    for line in table.lines() {
        out.write_all(line.trim_end().as_bytes())?;
        out.write_all(b"\n")?;
    }
    Ok(())
}

/// `3` or, when there is none, `-`.
pub(super) fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// A size for people, to three or four digits.
pub(super) fn show_bytes(bytes: u64) -> String {
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match units.into_iter().find(|(_, shift)| bytes >> shift > 0) {
        Some((unit, shift)) => format!("{:.1} {unit}", bytes as f64 / (1_u64 << shift) as f64),
        None => format!("{bytes} B"),
    }
}

/// A time span for people, at most to the millisecond.
pub(super) fn show_millis(millis: u64) -> String {
    // Above a minute nobody reads the milliseconds.
    let shown = if millis > 60_000 { millis - millis % 1_000 } else { millis };
    humantime::format_duration(std::time::Duration::from_millis(shown)).to_string()
}
