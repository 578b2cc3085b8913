//! Peers beside Felucca: the same figure of the same case, repetition by repetition.
//!
//! A peer whose acknowledgement promises more than Felucca's in the case is refused; one that promises less may stand there.

use anyhow::{bail, ensure};

use super::{key, median};
use crate::peer::Peer;
use crate::row::Row;
use crate::workload::Ack;

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Figure {
    RecordsPerSecond,
    SustainedRecordsPerSecond,
    P50,
    P99,
    P999,
    ResidentMiB,
    BinaryMiB,
}

impl Figure {
    /// With its unit.
    pub fn name(self) -> &'static str {
        match self {
            Self::RecordsPerSecond => "records/s",
            Self::SustainedRecordsPerSecond => "sustained records/s",
            Self::P50 => "p50 µs",
            Self::P99 => "p99 µs",
            Self::P999 => "p99.9 µs",
            Self::ResidentMiB => "RSS MiB",
            Self::BinaryMiB => "program MiB",
        }
    }

    fn is_better_when_higher(self) -> bool {
        matches!(self, Self::RecordsPerSecond | Self::SustainedRecordsPerSecond)
    }

    fn of(self, row: &Row) -> Option<f64> {
        let mebibytes = |bytes: Option<u64>| Some(bytes? as f64 / f64::from(1 << 20));
        match self {
            Self::RecordsPerSecond => row.records_per_s,
            Self::SustainedRecordsPerSecond => row.sustained_records_per_s,
            Self::P50 => row.p50_us,
            Self::P99 => row.p99_us,
            Self::P999 => row.p999_us,
            Self::ResidentMiB => mebibytes(row.server_rss_bytes),
            Self::BinaryMiB => mebibytes(row.binary_bytes),
        }
    }

    /// What matters in a case.
    fn of_case(row: &Row) -> &'static [Self] {
        if row.records_per_s.is_none() {
            &[Self::P50, Self::ResidentMiB, Self::BinaryMiB]
        } else if row.rate.is_some() {
            &[Self::P50, Self::P99, Self::P999]
        } else if row.case.contains("1 record in flight") {
            &[Self::RecordsPerSecond, Self::P50, Self::P99]
        } else {
            &[Self::RecordsPerSecond, Self::SustainedRecordsPerSecond, Self::ResidentMiB]
        }
    }
}

/// Median, smallest and largest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Spread {
    /// `None` of nothing.
    pub(crate) fn of(figures: impl Iterator<Item = f64>) -> Option<Self> {
        let figures: Vec<_> = figures.collect();
        let min = figures.iter().copied().fold(f64::INFINITY, f64::min);
        let max = figures.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        Some(Self { median: median(figures)?, min, max })
    }
}

/// One figure of one peer in one case.
#[derive(Clone, Debug)]
pub struct Line {
    pub workload: String,
    pub case: String,
    pub level: Option<Ack>,
    pub figure: Figure,
    pub peer: String,
    pub version: Option<String>,
    pub ack: Option<Ack>,
    pub settings: Option<String>,
    pub spread: Spread,
    /// How many times better Felucca was, pair by pair; `None` beside Felucca itself, or without a common repetition.
    pub ratio: Option<Spread>,
    pub repetitions: usize,
    /// Of what the machine can do, where there is such a limit.
    pub share_of_limit: Option<f64>,
}

/// Every figure of every case, in the order in which cases were measured; the limits of the machine are left out.
///
/// # Errors
/// A peer was measured at a stronger level than Felucca in the same case.
pub fn compare(rows: &[Row]) -> anyhow::Result<Vec<Line>> {
    let mut lines = Vec::new();
    let mut cases = Vec::new();
    for row in rows.iter().filter(|row| row.workload != "limits") {
        let case = (&row.workload, &row.case, row.level);
        if !cases.contains(&case) {
            cases.push(case);
        }
    }
    for case in cases {
        let all: Vec<_> = rows.iter().filter(|row| (&row.workload, &row.case, row.level) == case).collect();
        for row in &all {
            check(row)?;
        }
        let felucca: Vec<_> = all.iter().copied().filter(|row| row.peer == Peer::Felucca.name()).collect();
        let Some(first) = all.first() else { bail!("a case without rows") };
        let mut peers: Vec<&str> = Vec::new();
        for row in &all {
            if !peers.contains(&row.peer.as_str()) {
                peers.push(&row.peer);
            }
        }
        for figure in Figure::of_case(first) {
            for peer in &peers {
                let same: Vec<_> = all.iter().copied().filter(|row| row.peer == *peer).collect();
                lines.extend(line(*figure, &same, &felucca, rows));
            }
        }
    }
    Ok(lines)
}

fn check(row: &Row) -> anyhow::Result<()> {
    if let (Some(ack), Some(level)) = (row.ack, row.level) {
        ensure!(
            ack <= level || row.peer == Peer::Felucca.name(),
            "{} {}: {} was measured {}, and is not compared with the weaker promise {}",
            row.workload,
            row.case,
            row.peer,
            ack.name(),
            level.name()
        );
    }
    Ok(())
}

fn line(figure: Figure, same: &[&Row], felucca: &[&Row], rows: &[Row]) -> Option<Line> {
    let first = same.first()?;
    let ratios = same.iter().filter_map(|row| {
        let beside = felucca.iter().find(|beside| beside.rep == row.rep && key(beside) != key(row))?;
        let (ours, theirs) = (figure.of(beside)?, figure.of(row)?);
        Some(if figure.is_better_when_higher() { ours / theirs } else { theirs / ours })
    });
    let spread = Spread::of(same.iter().filter_map(|row| figure.of(row)))?;
    let share = |row: &&Row| Some(row.bytes_per_s? / limit(row, rows)?);
    let is_rate = figure == Figure::RecordsPerSecond;
    Some(Line {
        workload: first.workload.clone(),
        case: first.case.clone(),
        level: first.level,
        figure,
        peer: first.peer.clone(),
        version: first.peer_version.clone(),
        ack: first.ack,
        settings: first.settings.clone(),
        spread,
        ratio: Spread::of(ratios),
        repetitions: same.len(),
        share_of_limit: is_rate.then(|| median(same.iter().filter_map(share).collect())).flatten(),
    })
}

/// What the machine can move at the most for this row, in bytes per second: out of a socket, and into a file where records
/// are stored.
fn limit(row: &Row, rows: &[Row]) -> Option<f64> {
    let measured = |case: &str| {
        let beside = rows.iter().filter(|limit| limit.beside == row.workload && limit.case == case);
        median(beside.filter_map(|limit| limit.bytes_per_s).collect())
    };
    let streams = if row.case.starts_with("1 connection") { "1 stream" } else { "4 streams" };
    match row.level {
        Some(Ack::Synced) => measured("sequential write, 100 KiB, fdatasync each MiB"),
        Some(Ack::Written | Ack::Memory) if row.case.contains("in flight") => {
            measured(&format!("loopback copy into a file, 100 KiB, {streams}"))
        }
        _ => measured(&format!("loopback copy, 100 KiB, {streams}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(peer: &str, rep: u32, records_per_s: f64) -> Row {
        Row {
            workload: "W1".to_owned(),
            case: "1 connection, 1 record in flight".to_owned(),
            peer: peer.to_owned(),
            ack: Some(Ack::Written),
            level: Some(Ack::Written),
            rep,
            records_per_s: Some(records_per_s),
            p50_us: Some(1e6 / records_per_s),
            ..Row::default()
        }
    }

    #[test]
    fn ratios_are_taken_pair_by_pair_and_are_better_above_one() {
        let rows = [
            row("felucca", 1, 100.0),
            row("redis", 1, 50.0),
            row("felucca", 2, 300.0),
            row("redis", 2, 100.0),
            row("felucca", 3, 400.0),
        ];
        let lines = compare(&rows).unwrap();
        let of = |peer: &str, figure| lines.iter().find(|line| line.peer == peer && line.figure == figure);
        let redis = of("redis", Figure::RecordsPerSecond).unwrap();
        assert_eq!(redis.ratio, Some(Spread { median: 2.5, min: 2.0, max: 3.0 }));
        assert_eq!(redis.spread, Spread { median: 75.0, min: 50.0, max: 100.0 });
        let latency = of("redis", Figure::P50).unwrap().ratio.unwrap();
        assert!((latency.median - 2.5).abs() < 1e-9);
        let felucca = of("felucca", Figure::RecordsPerSecond).unwrap();
        assert_eq!((felucca.ratio, felucca.repetitions), (None, 3));
    }

    #[test]
    fn a_stronger_promise_is_refused() {
        let stronger = Row { ack: Some(Ack::Synced), ..row("redis", 1, 50.0) };
        let error = compare(&[row("felucca", 1, 100.0), stronger]).unwrap_err();
        assert!(error.to_string().contains("weaker promise"), "{error}");
        let weaker = Row { ack: Some(Ack::Memory), ..row("redis", 1, 50.0) };
        assert!(compare(&[row("felucca", 1, 100.0), weaker]).is_ok());
    }

    #[test]
    fn figures_read_as_a_share_of_what_the_machine_can_do() {
        let limit = Row {
            workload: "limits".to_owned(),
            beside: "W1".to_owned(),
            case: "loopback copy into a file, 100 KiB, 1 stream".to_owned(),
            bytes_per_s: Some(400.0),
            ..Row::default()
        };
        let rows = [limit, Row { bytes_per_s: Some(100.0), ..row("felucca", 1, 1.0) }];
        assert_eq!(compare(&rows).unwrap()[0].share_of_limit, Some(0.25));
    }
}
