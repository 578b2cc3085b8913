//! Results for programs and for people: one JSON line per row as soon as it is measured, and one Markdown table at the end.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::Context;
use comfy_table::{CellAlignment, Table, presets};
use serde::{Deserialize, Serialize};

use crate::row::Row;

/// Rows of one run, one JSON object a line.
pub const RESULTS_FILE: &str = "results.jsonl";
/// The machine of the run.
pub const MACHINE_FILE: &str = "machine.json";

/// What the figures depend on besides the program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    pub cpu: String,
    pub cores: u32,
    pub memory_bytes: u64,
    pub kernel: String,
}

impl Machine {
    /// This machine; what it does not tell is `unknown` or zero.
    pub fn this() -> Self {
        let unknown = || "unknown".to_owned();
        let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let memory =
            memory.lines().find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next());
        let kernel = rustix::system::uname();
        Self {
            cpu: cpu.map_or_else(unknown, |(_, model)| model.to_owned()),
            cores: std::thread::available_parallelism().map_or(0, |cores| cores.get() as u32),
            memory_bytes: memory.and_then(|kibibytes| kibibytes.parse::<u64>().ok()).unwrap_or(0) << 10,
            kernel: kernel.release().to_string_lossy().into_owned(),
        }
    }
}

/// Where rows go.
#[derive(Debug, Default)]
pub struct Sink {
    rows: Vec<Row>,
    file: Option<File>,
    progress: bool,
}

impl Sink {
    /// Keeps rows in memory.
    pub fn memory() -> Self {
        Self::default()
    }

    /// Also tells on stderr what has been measured.
    #[must_use]
    pub fn with_progress(mut self) -> Self {
        self.progress = true;
        self
    }

    /// Also writes them into a folder, which is made. Rows of earlier runs in it are replaced.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn with_folder(mut self, folder: &Path) -> anyhow::Result<Self> {
        let create = || {
            fs::create_dir_all(folder)?;
            let machine = serde_json::to_vec_pretty(&Machine::this())?;
            fs::write(folder.join(MACHINE_FILE), machine)?;
            File::create(folder.join(RESULTS_FILE))
        };
        self.file = Some(create().with_context(|| format!("cannot write results to {}", folder.display()))?);
        Ok(self)
    }

    pub(crate) fn take(&mut self, row: Row) -> anyhow::Result<()> {
        if let Some(file) = &mut self.file {
            let mut line = serde_json::to_vec(&row)?;
            line.push(b'\n');
            file.write_all(&line).context("cannot write a result")?;
        }
        if self.progress {
            eprintln!("{} {}{}: {}", row.workload, row.case, level(&row), headline(&row));
        }
        self.rows.push(row);
        Ok(())
    }

    pub fn rows(&self) -> &[Row] {
        &self.rows
    }
}

fn level(row: &Row) -> String {
    row.ack.map(|ack| format!(", {}", ack.name())).unwrap_or_default()
}

fn headline(row: &Row) -> String {
    let mut text = String::new();
    if let Some(bytes) = row.bytes_per_s {
        // Writing to a string cannot fail.
        let _written = write!(text, "{} MB/s ", thousands(bytes / 1e6));
    }
    if let Some(p50) = row.p50_us {
        let _written = write!(text, "p50 {p50:.1} µs ");
    }
    text
}

/// The rows as a Markdown table; of several repetitions the median of each figure.
pub fn table(rows: &[Row]) -> String {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header([
        "workload",
        "case",
        "ack",
        "records/s",
        "MB/s",
        "p50 µs",
        "p99 µs",
        "p99.9 µs",
        "broker CPU",
        "client CPU",
        "broker RSS MiB",
        "disk MB/s",
    ]);
    let mut done: Vec<(&str, &str, _)> = Vec::new();
    for row in rows {
        let key = (row.workload.as_str(), row.case.as_str(), row.ack);
        if done.contains(&key) {
            continue;
        }
        done.push(key);
        let same: Vec<_> = rows
            .iter()
            .filter(|other| (other.workload.as_str(), other.case.as_str(), other.ack) == key)
            .collect();
        let figure =
            |of: &dyn Fn(&Row) -> Option<f64>| median(same.iter().filter_map(|row| of(row)).collect());
        let whole = |of: &dyn Fn(&Row) -> Option<f64>| figure(of).map_or_else(String::new, thousands);
        let fine = |of: &dyn Fn(&Row) -> Option<f64>| {
            figure(of).map_or_else(String::new, |micros| {
                if micros < 1000.0 { format!("{micros:.1}") } else { thousands(micros) }
            })
        };
        let share = |of: &dyn Fn(&Row) -> Option<f64>| {
            figure(&|row| Some(of(row)? / row.seconds?))
                .map_or_else(String::new, |cores| format!("{cores:.2}"))
        };
        table.add_row([
            row.workload.clone(),
            row.case.clone(),
            row.ack.map_or("", |ack| ack.name()).to_owned(),
            whole(&|row| row.records_per_s),
            whole(&|row| Some(row.bytes_per_s? / 1e6)),
            fine(&|row| row.p50_us),
            fine(&|row| row.p99_us),
            fine(&|row| row.p999_us),
            share(&|row| row.server_cpu_s),
            share(&|row| row.client_cpu_s),
            figure(&|row| Some(row.server_rss_bytes? as f64 / f64::from(1 << 20)))
                .map_or_else(String::new, |mebibytes| format!("{mebibytes:.1}")),
            whole(&|row| Some(row.disk_bytes? as f64 / row.seconds? / 1e6)),
        ]);
    }
    for column in table.column_iter_mut().skip(3) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

fn median(mut figures: Vec<f64>) -> Option<f64> {
    figures.sort_by(f64::total_cmp);
    let middle = figures.len() / 2;
    match figures.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(figures[middle]),
        _ => Some(f64::midpoint(figures[middle - 1], figures[middle])),
    }
}

/// Rounded, with commas.
fn thousands(figure: f64) -> String {
    let digits = format!("{:.0}", figure.max(0.0));
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::Ack;

    fn row(rep: u32, records_per_s: f64) -> Row {
        Row {
            workload: "W1".to_owned(),
            case: "1 connection".to_owned(),
            peer: "felucca".to_owned(),
            ack: Some(Ack::Written),
            rep,
            records_per_s: Some(records_per_s),
            ..Row::default()
        }
    }

    #[test]
    fn repetitions_become_one_line_with_their_median() {
        let text = table(&[row(1, 1_000_000.0), row(2, 3_000_000.0), row(3, 2_000_000.4)]);
        assert_eq!(text.lines().count(), 3);
        assert!(text.contains("| W1 ") && text.contains("2,000,000"), "{text}");
        assert!(median(Vec::new()).is_none());
    }

    #[test]
    fn rows_are_written_as_json_lines() {
        let folder = tempfile::tempdir().unwrap();
        let mut sink = Sink::memory().with_folder(folder.path()).unwrap();
        sink.take(row(1, 5.0)).unwrap();
        sink.take(row(2, 6.0)).unwrap();
        let text = fs::read_to_string(folder.path().join(RESULTS_FILE)).unwrap();
        let rows: Vec<Row> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(rows, sink.rows());
        assert!(text.starts_with(r#"{"workload":"W1""#) && text.contains(r#""ack":"written""#));
        assert!(fs::read_to_string(folder.path().join(MACHINE_FILE)).unwrap().contains("cores"));
    }
}
