//! A run: every case of every workload, repetition by repetition, with the machine's limits beside them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};

use crate::broker::Launcher;
use crate::report::Sink;
use crate::row::Row;
use crate::workload::{
    Ack, Consume, EndToEnd, Footprint, Produce, Producers, Receive, Share, Work, Workload,
};
use crate::{limits, measure};

/// How long the machine's limits are measured, each.
const LIMIT_SECONDS: f64 = 1.0;
/// Size of the file with which the disk is measured.
const LIMIT_FILE_BYTES: u64 = 1 << 30;
/// Of the disk: what is produced goes through the journal into segments, and something must stay free.
const DISK_FACTOR: u64 = 2;
const DISK_RESERVE: u64 = 1 << 30;

/// Bounds on every measurement, whatever its workload says. Also scales a run down to a smoke test.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Effort {
    /// Longest measured time.
    pub longest: Duration,
    pub longest_warm_up: Duration,
    /// Records produced before something is measured with them.
    pub most_records: u64,
    pub most_bytes: u64,
    pub most_starts: u32,
}

impl Effort {
    /// What the workloads say.
    pub const FULL: Self = Self {
        longest: Duration::MAX,
        longest_warm_up: Duration::MAX,
        most_records: u64::MAX,
        most_bytes: u64::MAX,
        most_starts: u32::MAX,
    };

    /// About a second for each measurement: shows that everything works, and figures with much noise.
    pub const QUICK: Self = Self {
        longest: Duration::from_millis(700),
        longest_warm_up: Duration::from_millis(300),
        most_records: 200_000,
        most_bytes: 512 << 20,
        most_starts: 3,
    };

    pub(crate) fn measured(&self, seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds).min(self.longest)
    }

    pub(crate) fn warm_up(&self, seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds).min(self.longest_warm_up)
    }

    pub(crate) fn records(&self, records: u64) -> u64 {
        records.min(self.most_records)
    }

    pub(crate) fn bytes(&self, bytes: u64) -> u64 {
        bytes.min(self.most_bytes)
    }

    pub(crate) fn starts(&self, starts: u32) -> u32 {
        starts.min(self.most_starts)
    }
}

/// One combination of a workload's lists.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Case {
    Produce { work: Produce, ack: Ack, producers: Producers },
    Raw { work: Produce, ack: Ack, producers: Producers },
    Consume { work: Consume, consumers: u32 },
    EndToEnd { work: EndToEnd, ack: Ack },
    Share { work: Share, members: u32, receive: Receive },
    Footprint(Footprint),
}

impl Case {
    fn all(work: &Work) -> Vec<Self> {
        match work {
            Work::Produce(work) => {
                let case = |(ack, producers)| Self::Produce { work: work.clone(), ack, producers };
                product(&work.ack, &work.producers).map(case).collect()
            }
            Work::Raw(work) => {
                let case = |(ack, producers)| Self::Raw { work: work.clone(), ack, producers };
                product(&work.ack, &work.producers).map(case).collect()
            }
            Work::Consume(work) => {
                let case = |consumers: &u32| Self::Consume { work: work.clone(), consumers: *consumers };
                work.consumers.iter().map(case).collect()
            }
            Work::EndToEnd(work) => {
                let case = |ack: &Ack| Self::EndToEnd { work: work.clone(), ack: *ack };
                work.ack.iter().map(case).collect()
            }
            Work::Share(work) => {
                let case = |(receive, members)| Self::Share { work: work.clone(), members, receive };
                product(&work.receive, &work.members).map(case).collect()
            }
            Work::Footprint(work) => vec![Self::Footprint(work.clone())],
        }
    }

    fn name(&self) -> String {
        let on = |connections: u32| count(connections as usize, "connection");
        match self {
            Self::Produce { producers, .. } => {
                format!("{}, {} in flight", on(producers.connections), count(producers.in_flight, "record"))
            }
            Self::Raw { producers, .. } => {
                format!("{}, {} in flight", on(producers.connections), count(producers.in_flight, "request"))
            }
            Self::Consume { consumers, .. } => on(*consumers),
            Self::EndToEnd { work, .. } => format!("{} records/s", work.rate),
            Self::Share { members, receive, .. } => {
                let how = match receive {
                    Receive::Next => "next and ack",
                    Receive::Worker => "worker",
                };
                format!("{how}, {}", count(*members as usize, "member"))
            }
            Self::Footprint(_) => "start to first accept; idle memory".to_owned(),
        }
    }

    fn ack(&self) -> Option<Ack> {
        match self {
            Self::Produce { ack, .. } | Self::Raw { ack, .. } | Self::EndToEnd { ack, .. } => Some(*ack),
            Self::Consume { .. } | Self::Share { .. } | Self::Footprint(_) => None,
        }
    }

    /// What is stored at most.
    fn stored_bytes(&self, effort: &Effort) -> u64 {
        match self {
            Self::Produce { work, .. } | Self::Raw { work, .. } => effort.bytes(work.max_bytes),
            Self::Consume { work, .. } => effort.records(work.records) * work.record_bytes as u64,
            Self::Share { work, .. } => effort.records(work.records) * work.record_bytes as u64,
            Self::EndToEnd { work, .. } => {
                let time = effort.warm_up(work.warm_up_seconds) + effort.measured(work.seconds);
                (time.as_secs_f64() * f64::from(work.rate)) as u64 * work.record_bytes as u64
            }
            Self::Footprint(_) => 0,
        }
    }
}

fn count(number: usize, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

/// Every pair, the first list's order outermost.
fn product<A: Copy, B: Copy>(firsts: &[A], seconds: &[B]) -> impl Iterator<Item = (A, B)> {
    firsts.iter().flat_map(|first| seconds.iter().map(|second| (*first, *second)))
}

/// What to measure, and with what.
#[derive(Debug)]
pub struct Run {
    pub workloads: Vec<Workload>,
    pub launcher: Launcher,
    pub effort: Effort,
    pub repetitions: u32,
    /// The machine's limits are measured in each repetition.
    pub limits: bool,
    /// Threads that run the client's tasks.
    pub client_threads: u32,
    /// On the disk that is measured.
    pub data_dir: PathBuf,
}

impl Run {
    /// Measures everything. Each row goes to the sink as soon as it is there.
    ///
    /// # Errors
    /// The first measurement that failed, by name. Rows measured before it are in the sink.
    pub fn measure(&self, sink: &mut Sink) -> anyhow::Result<()> {
        let version = self.launcher.version();
        for rep in 1..=self.repetitions {
            if self.limits {
                let time = self.effort.measured(LIMIT_SECONDS);
                let limits = limits::measure(&self.data_dir, time, self.effort.bytes(LIMIT_FILE_BYTES));
                for row in limits.context("cannot measure the machine")? {
                    sink.take(Row { rep, ..row })?;
                }
            }
            for workload in &self.workloads {
                for case in Case::all(&workload.work) {
                    if matches!((&self.launcher, &case), (Launcher::Running(_), Case::Footprint(_))) {
                        continue;
                    }
                    let name = case.name();
                    let row = self
                        .measure_case(&case)
                        .with_context(|| format!("{}, {name}: the measurement failed", workload.name))?;
                    sink.take(Row {
                        workload: workload.name.clone(),
                        case: name,
                        peer: "felucca".to_owned(),
                        peer_version: version.clone(),
                        ack: case.ack().or(row.ack),
                        rep,
                        ..row
                    })?;
                }
            }
        }
        Ok(())
    }

    fn measure_case(&self, case: &Case) -> anyhow::Result<Row> {
        let needed = case.stored_bytes(&self.effort).saturating_mul(DISK_FACTOR).saturating_add(DISK_RESERVE);
        let free = free_bytes(&self.data_dir)?;
        ensure!(
            free >= needed,
            "{} has {} MiB free, this may need {} MiB",
            self.data_dir.display(),
            free >> 20,
            needed >> 20
        );
        measure::measure(&self.launcher, &self.effort, self.client_threads, case)
    }
}

fn free_bytes(directory: &Path) -> anyhow::Result<u64> {
    let disk = rustix::fs::statvfs(directory)?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_case_has_a_name_of_its_own() {
        let workloads = [Workload::standard(false).unwrap(), Workload::standard(true).unwrap()].concat();
        let mut names = HashSet::new();
        for workload in &workloads {
            for case in Case::all(&workload.work) {
                assert!(names.insert((workload.name.clone(), case.name(), case.ack())), "{case:?}");
            }
        }
        assert!(names.len() > 20);
    }

    #[test]
    fn effort_bounds_what_a_workload_says() {
        assert_eq!(Effort::FULL.measured(4.0), Duration::from_secs(4));
        assert_eq!(Effort::QUICK.measured(4.0), Duration::from_millis(700));
        assert_eq!(Effort::QUICK.records(10), 10);
        let most = Workload::standard(false)
            .unwrap()
            .iter()
            .flat_map(|workload| Case::all(&workload.work))
            .map(|case| case.stored_bytes(&Effort::QUICK))
            .max();
        assert!(most.unwrap() <= 1 << 30);
    }
}
