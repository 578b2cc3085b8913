//! Results for programs and for people: one JSON line per row as soon as it is measured, a Markdown table at the end of a
//! run, and of folders of results the comparison with its plots and its page.

pub mod compare;
pub mod page;
pub mod plot;

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use comfy_table::{CellAlignment, Table, presets};
use serde::{Deserialize, Serialize};

use crate::peer::Peer;
use crate::row::Row;
use crate::workload::Ack;

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

/// Writes `report.md`, `report.html` and the plots about folders of results, and returns the Markdown.
///
/// # Errors
/// Results that cannot be read, that are of different machines, or that must not be compared; files that cannot be written.
pub fn write(folders: &[PathBuf], out: &Path) -> anyhow::Result<String> {
    let mut machine = None;
    let mut rows = Vec::new();
    for folder in folders {
        let (here, mut more) = read_folder(folder)?;
        let first = machine.get_or_insert_with(|| here.clone());
        ensure!(*first == here, "{} is of another machine: {here:?}, not {first:?}", folder.display());
        rows.append(&mut more);
    }
    let machine = machine.context("no folder of results")?;
    let lines = compare::compare(&rows)?;
    let plots = plot::plots(&rows, &lines)?;
    let markdown = page::markdown(&lines);
    let save = || {
        fs::create_dir_all(out)?;
        fs::write(out.join("report.md"), format!("{markdown}\n"))?;
        fs::write(out.join("report.html"), page::html(&machine, &rows, &lines, &plots))?;
        plots.iter().try_for_each(|plot| fs::write(out.join(format!("{}.svg", plot.name)), &plot.svg))
    };
    save().with_context(|| format!("cannot write the report to {}", out.display()))?;
    Ok(markdown)
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

    /// Also writes them into a folder, which is made. Rows of earlier runs in it stay, and count as measured.
    ///
    /// # Errors
    /// The folder cannot be written, or has results of another machine.
    pub fn with_folder(mut self, folder: &Path) -> anyhow::Result<Self> {
        let this = Machine::this();
        if folder.join(RESULTS_FILE).exists() {
            let (machine, rows) = read_folder(folder)?;
            ensure!(machine == this, "{} has results of another machine: {machine:?}", folder.display());
            self.rows = rows;
        }
        let open = || {
            fs::create_dir_all(folder)?;
            fs::write(folder.join(MACHINE_FILE), serde_json::to_vec_pretty(&this)?)?;
            File::options().create(true).append(true).open(folder.join(RESULTS_FILE))
        };
        self.file = Some(open().with_context(|| format!("cannot write results to {}", folder.display()))?);
        Ok(self)
    }

    /// This has been measured.
    pub(crate) fn has(&self, workload: &str, case: &str, level: Option<Ack>, peer: Peer, rep: u32) -> bool {
        self.rows.iter().any(|row| {
            (row.workload.as_str(), row.case.as_str(), row.level) == (workload, case, level)
                && (row.peer.as_str(), row.rep) == (peer.name(), rep)
        })
    }

    /// The machine has been measured in this repetition of a workload.
    pub(crate) fn has_limits(&self, workload: &str, rep: u32) -> bool {
        self.rows.iter().any(|row| (row.beside.as_str(), row.rep) == (workload, rep))
    }

    pub(crate) fn take(&mut self, row: Row) -> anyhow::Result<()> {
        if let Some(file) = &mut self.file {
            let mut line = serde_json::to_vec(&row)?;
            line.push(b'\n');
            file.write_all(&line).context("cannot write a result")?;
        }
        if self.progress {
            eprintln!("{} {}, {}{}: {}", row.workload, row.case, row.peer, level(&row), headline(&row));
        }
        self.rows.push(row);
        Ok(())
    }

    /// Tells on stderr, where it tells what was measured, that something was not.
    pub(crate) fn failed(&self, why: &str) {
        if self.progress {
            eprintln!("failed: {why}");
        }
    }

    pub fn rows(&self) -> &[Row] {
        &self.rows
    }
}

/// The results of one folder.
///
/// # Errors
/// They are not there, or not what this program writes.
pub fn read_folder(folder: &Path) -> anyhow::Result<(Machine, Vec<Row>)> {
    let read = |name: &str| {
        let path = folder.join(name);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let machine = serde_json::from_str(&read(MACHINE_FILE)?)?;
    let rows = read(RESULTS_FILE)?;
    let rows = rows.lines().map(serde_json::from_str).collect::<Result<_, _>>();
    Ok((machine, rows.with_context(|| format!("a line of {}", folder.display()))?))
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
        "peer",
        "ack",
        "records/s",
        "MB/s",
        "sustained MB/s",
        "p50 µs",
        "p99 µs",
        "p99.9 µs",
        "server CPU",
        "client CPU",
        "server RSS MiB",
        "disk MB/s",
    ]);
    let mut done = Vec::new();
    for row in rows {
        let key = key(row);
        if done.contains(&key) {
            continue;
        }
        done.push(key);
        let same: Vec<_> = rows.iter().filter(|other| self::key(other) == key).collect();
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
            row.peer.clone(),
            row.ack.map_or("", |ack| ack.name()).to_owned(),
            whole(&|row| row.records_per_s),
            whole(&|row| Some(row.bytes_per_s? / 1e6)),
            whole(&|row| Some(row.sustained_bytes_per_s? / 1e6)),
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
    for column in table.column_iter_mut().skip(4) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

/// Rows with the same one are repetitions of one another.
pub(crate) fn key(row: &Row) -> (&str, &str, &str, Option<Ack>) {
    (&row.workload, &row.case, &row.peer, row.level.or(row.ack))
}

pub(crate) fn median(mut figures: Vec<f64>) -> Option<f64> {
    figures.sort_by(f64::total_cmp);
    let middle = figures.len() / 2;
    match figures.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(figures[middle]),
        _ => Some(f64::midpoint(figures[middle - 1], figures[middle])),
    }
}

/// Rounded, with commas.
pub(crate) fn thousands(figure: f64) -> String {
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
    fn a_report_has_its_table_its_plots_and_a_page() {
        let folder = tempfile::tempdir().unwrap();
        let mut sink = Sink::memory().with_folder(folder.path()).unwrap();
        for peer in ["felucca", "redis"] {
            let peer = peer.to_owned();
            sink.take(Row { peer: peer.clone(), timeline: vec![1, 2, 3], ..row(1, 5000.0) }).unwrap();
            let percentiles = vec![(50.0, 100.0), (99.0, 900.0), (100.0, 5000.0)];
            let latencies =
                Row { workload: "W4".to_owned(), peer, percentiles, rate: Some(5), ..row(1, 5.0) };
            sink.take(Row { p50_us: Some(100.0), ..latencies }).unwrap();
        }
        let out = folder.path().join("out");
        let markdown = write(&[folder.path().to_path_buf()], &out).unwrap();
        assert!(markdown.contains("1.00×") && markdown.contains("5,000"), "{markdown}");
        let page = fs::read_to_string(out.join("report.html")).unwrap();
        assert_eq!(page.matches("<svg").count(), 4, "{page}");
        assert!(out.join("w1-rate.svg").exists() && out.join("w4-latency.svg").exists());

        let other = tempfile::tempdir().unwrap();
        let machine = Machine { cores: 4096, ..Machine::this() };
        fs::write(other.path().join(MACHINE_FILE), serde_json::to_vec(&machine).unwrap()).unwrap();
        fs::write(other.path().join(RESULTS_FILE), "").unwrap();
        let both = [folder.path().to_path_buf(), other.path().to_path_buf()];
        let error = write(&both, &out).unwrap_err();
        assert!(error.to_string().contains("another machine"), "{error}");
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

        // Taken up again.
        let sink = Sink::memory().with_folder(folder.path()).unwrap();
        assert!(sink.has("W1", "1 connection", None, Peer::Felucca, 2));
        assert!(!sink.has("W1", "1 connection", None, Peer::Felucca, 3));
        assert!(!sink.has("W1", "1 connection", None, Peer::Redis, 2));

        let other = Machine { cores: 4096, ..Machine::this() };
        fs::write(folder.path().join(MACHINE_FILE), serde_json::to_vec(&other).unwrap()).unwrap();
        let error = Sink::memory().with_folder(folder.path()).unwrap_err();
        assert!(error.to_string().contains("another machine"), "{error}");
    }
}
