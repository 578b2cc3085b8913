//! A run: every case of every workload, repetition by repetition and in each peer by peer, with the machine's limits beside
//! them.
//!
//! Peers take turns (A B A B …), so that what drifts in the machine meets all of them. What a results folder has already is
//! not measured again; a run that was ended, or whose time was up, is taken up where it stopped.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use crate::peer::Peer;
use crate::report::Sink;
use crate::row::Row;
use crate::server::Launcher;
use crate::workload::{
    Ack, Cache, Consume, EndToEnd, FanOut, Footprint, Produce, Producers, Rate, Receive, Share, Way, Work,
    Workload,
};
use crate::{limits, measure};

/// How long the machine's limits are measured, each.
const LIMIT_SECONDS: f64 = 0.5;
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
    /// Steady work under a rate. What is over sooner is done again with more, and is an error if that does not help.
    pub shortest: Duration,
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
        shortest: Duration::from_secs(2),
        most_records: u64::MAX,
        most_bytes: u64::MAX,
        most_starts: u32::MAX,
    };

    /// A few seconds for each measurement: shows that everything works, and figures with much noise.
    pub const QUICK: Self = Self {
        longest: Duration::from_secs(2),
        longest_warm_up: Duration::from_millis(300),
        shortest: Duration::from_secs(2),
        most_records: 500_000,
        most_bytes: 6 << 30,
        most_starts: 3,
    };

    pub(crate) fn measured(&self, seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds).min(self.longest)
    }

    /// Of what may be measured for so long at the most.
    pub(crate) fn shortest(&self, measured: Duration) -> Duration {
        self.shortest.min(measured)
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
    Consume { work: Consume, consumers: u32, cache: Cache },
    EndToEnd { work: EndToEnd, ack: Ack, rate: Rate },
    Share { work: Share, members: u32, way: Way },
    FanOut(FanOut),
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
                let case = |(cache, consumers)| Self::Consume { work: work.clone(), consumers, cache };
                product(&work.cache, &work.consumers).map(case).collect()
            }
            Work::EndToEnd(work) => {
                let case = |(ack, rate)| Self::EndToEnd { work: work.clone(), ack, rate };
                product(&work.ack, &work.rates).map(case).collect()
            }
            Work::Share(work) => {
                let case = |(way, members)| Self::Share { work: work.clone(), members, way };
                let of_way = |way: &Way| match way.members {
                    None => product(&[*way], &work.members).map(case).collect(),
                    Some(members) => vec![case((*way, members))],
                };
                work.ways.iter().flat_map(of_way).collect()
            }
            Work::FanOut(work) => vec![Self::FanOut(work.clone())],
            Work::Footprint(work) => vec![Self::Footprint(work.clone())],
        }
    }

    fn name(&self) -> String {
        let on = |connections: u32| count(connections as usize, "connection");
        match self {
            Self::Produce { producers, .. } => {
                let what = match producers.block_records {
                    None => count(producers.in_flight, "record"),
                    Some(records) => format!("{} of {records}", count(producers.in_flight, "block")),
                };
                let partitions = match producers.partitions {
                    None => String::new(),
                    Some(partitions) => format!(", {}", count(partitions as usize, "partition")),
                };
                format!("{}, {what} in flight{partitions}", on(producers.connections))
            }
            Self::Raw { producers, .. } => {
                format!("{}, {} in flight", on(producers.connections), count(producers.in_flight, "request"))
            }
            Self::Consume { consumers, cache: Cache::Warm, .. } => on(*consumers),
            Self::Consume { consumers, cache: Cache::Cold, .. } => format!("{}, cold", on(*consumers)),
            Self::EndToEnd { rate: Rate::Fixed(rate), .. } => format!("{rate} records/s"),
            Self::EndToEnd { rate: Rate::Half, .. } => "half of the fastest rate".to_owned(),
            Self::Share { members, way, .. } => {
                let how = match way.receive {
                    Receive::Next => "next and ack",
                    Receive::Worker => "worker",
                };
                let order = match way.keys {
                    0 => String::new(),
                    keys => format!(", in order of {}", count(keys as usize, "key")),
                };
                format!("{how}, {}{order}", count(*members as usize, "member"))
            }
            Self::FanOut(work) => count(work.groups as usize, "group"),
            Self::Footprint(_) => "start to first accept; idle memory".to_owned(),
        }
    }

    /// What Felucca's acknowledgements mean: the strongest level at which a peer may stand beside it. `None` where nothing
    /// is acknowledged.
    fn level(&self) -> Option<Ack> {
        match self {
            Self::Produce { ack, .. } | Self::Raw { ack, .. } | Self::EndToEnd { ack, .. } => Some(*ack),
            // Of what a member says; whoever produces need not wait for the device.
            Self::Share { way, .. } => Some(way.ack),
            Self::FanOut(_) => Some(Ack::Written),
            Self::Consume { .. } | Self::Footprint(_) => None,
        }
    }

    /// At which level a peer's server is set up, if the case is one for the peer at all.
    fn level_of(&self, peer: Peer) -> Option<Ack> {
        let weakest = || peer.levels().first().copied();
        let takes_part = match self {
            Self::Raw { .. } => peer == Peer::Felucca,
            // The others' clients have one way only, and their servers one level at which it is usual.
            Self::Share { way, .. } => {
                peer == Peer::Felucca || peer.has_groups() && way.is_common() && weakest() == Some(way.ack)
            }
            Self::FanOut(_) => peer.has_readers(),
            // In Redis' memory only, and read from a queue it is gone.
            Self::Consume { cache: Cache::Cold, .. } => peer != Peer::Redis,
            Self::Produce { work, producers, .. } => {
                producers.partitions.unwrap_or(work.partitions) <= peer.most_partitions()
            }
            Self::Consume { .. } | Self::EndToEnd { .. } | Self::Footprint(_) => true,
        };
        if !takes_part {
            return None;
        }
        match self {
            // Records are in the page cache; a peer that always syncs may do so.
            Self::Share { .. } | Self::Consume { .. } | Self::Footprint(_) => weakest(),
            _ => self.level().and_then(|level| peer.level_beside(level)),
        }
    }

    /// Some cases need a server of their own.
    fn can_run_against_others(&self) -> bool {
        !matches!(self, Self::Footprint(_) | Self::Consume { cache: Cache::Cold, .. })
    }

    /// What is stored at most.
    fn stored_bytes(&self, effort: &Effort) -> u64 {
        match self {
            Self::Produce { work, .. } | Self::Raw { work, .. } => effort.bytes(work.max_bytes),
            Self::Consume { work, .. } => effort.records(work.records) * work.record_bytes as u64,
            Self::Share { work, .. } => {
                measure::share::most_records(effort.records(work.records)) * work.record_bytes as u64
            }
            Self::EndToEnd { work, rate, .. } => {
                let time = effort.warm_up(work.warm_up_seconds) + effort.measured(work.seconds);
                match rate {
                    Rate::Fixed(rate) => {
                        (time.as_secs_f64() * f64::from(*rate)) as u64 * work.record_bytes as u64
                    }
                    // Found out by sending as much as that at the most, and then as much again.
                    Rate::Half => effort.bytes(16 << 30),
                }
            }
            Self::FanOut(work) => effort.bytes(work.max_bytes),
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
    /// In the order in which they take turns.
    pub peers: Vec<Peer>,
    pub launcher: Launcher,
    pub effort: Effort,
    pub repetitions: u32,
    /// The machine's limits are measured before each repetition of a workload's first case.
    pub limits: bool,
    /// Threads that run the client's tasks.
    pub client_threads: u32,
    /// No measurement of a workload begins later than this after the workload's first one.
    pub longest: Duration,
    /// On the disk that is measured.
    pub data_dir: PathBuf,
}

/// What became of a run that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Everything is there.
    Complete,
    /// A workload's time was up; the same run into the same folder goes on.
    TimeIsUp,
}

impl Run {
    /// Measures everything. Each row goes to the sink as soon as it is there. A measurement that fails does not keep the
    /// others from being made.
    ///
    /// # Errors
    /// A peer that is not there, or that may stand beside Felucca in no case; results that cannot be written; or, at the end,
    /// the measurements that failed, by name.
    pub fn measure(&self, sink: &mut Sink) -> anyhow::Result<End> {
        for peer in &self.peers {
            self.launcher.check(*peer)?;
            self.check_takes_part(*peer)?;
        }
        let mut end = End::Complete;
        let mut failures = Vec::new();
        for workload in &self.workloads {
            let began = Instant::now();
            for (index, case) in Case::all(&workload.work).iter().enumerate() {
                for rep in 1..=self.repetitions {
                    if index == 0 && self.limits && began.elapsed() < self.longest {
                        self.measure_limits(&workload.name, rep, sink)?;
                    }
                    for peer in &self.peers {
                        if began.elapsed() < self.longest {
                            failures.extend(self.measure_once(workload, case, *peer, rep, sink)?);
                        } else {
                            end = End::TimeIsUp;
                        }
                    }
                }
            }
        }
        ensure!(failures.is_empty(), "{}", failures.join("\n"));
        Ok(end)
    }

    /// What somebody asked for is not silently left out.
    fn check_takes_part(&self, peer: Peer) -> anyhow::Result<()> {
        let cases = self.workloads.iter().flat_map(|workload| Case::all(&workload.work));
        let takes_part = cases.map(|case| case.level_of(peer)).any(|level| level.is_some());
        let levels: Vec<_> = peer.levels().iter().map(|level| level.name()).collect();
        ensure!(
            takes_part,
            "{} has no case in these workloads: it acknowledges {}, and is not compared with a weaker promise",
            peer.name(),
            levels.join(" or ")
        );
        Ok(())
    }

    fn measure_limits(&self, workload: &str, rep: u32, sink: &mut Sink) -> anyhow::Result<()> {
        if sink.has_limits(workload, rep) {
            return Ok(());
        }
        let time = self.effort.measured(LIMIT_SECONDS);
        let limits = limits::measure(&self.data_dir, time, self.effort.bytes(LIMIT_FILE_BYTES));
        for row in limits.context("cannot measure the machine")? {
            sink.take(Row { rep, beside: workload.to_owned(), ..row })?;
        }
        Ok(())
    }

    /// Returns why it failed, if it did.
    fn measure_once(
        &self,
        workload: &Workload,
        case: &Case,
        peer: Peer,
        rep: u32,
        sink: &mut Sink,
    ) -> anyhow::Result<Option<String>> {
        let Some(level) = case.level_of(peer) else { return Ok(None) };
        if self.launcher.runs_already(peer) && !case.can_run_against_others() {
            return Ok(None);
        }
        let name = case.name();
        let promised = case.level();
        if sink.has(&workload.name, &name, promised, peer, rep) {
            return Ok(None);
        }
        let row = match self.measure_case(peer, level, case) {
            Ok(row) => row,
            Err(error) => {
                let failure = format!("{} {name}, {}, rep {rep}: {error:#}", workload.name, peer.name());
                sink.failed(&failure);
                return Ok(Some(failure));
            }
        };
        let ack = match case {
            Case::Share { way, .. } if peer == Peer::Felucca => Some(way.ack),
            Case::Consume { .. } | Case::Footprint(_) => None,
            _ => Some(level),
        };
        sink.take(Row {
            workload: workload.name.clone(),
            case: name,
            peer: peer.name().to_owned(),
            peer_version: self.launcher.version(peer),
            ack,
            level: promised,
            rep,
            ..row
        })?;
        Ok(None)
    }

    fn measure_case(&self, peer: Peer, level: Ack, case: &Case) -> anyhow::Result<Row> {
        let needed = case.stored_bytes(&self.effort).saturating_mul(DISK_FACTOR).saturating_add(DISK_RESERVE);
        let free = free_bytes(&self.data_dir)?;
        ensure!(
            free >= needed,
            "{} has {} MiB free, this may need {} MiB",
            self.data_dir.display(),
            free >> 20,
            needed >> 20
        );
        measure::measure(&self.launcher, peer, level, &self.effort, self.client_threads, case)
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
                assert!(names.insert((workload.name.clone(), case.name(), case.level())), "{case:?}");
            }
        }
        assert!(names.len() > 20);
    }

    #[test]
    fn no_peer_stands_beside_a_weaker_promise() {
        let synced = Workload::find("W6").unwrap();
        let written = Workload::find("W1").unwrap();
        let level = |workload: &Workload, peer| Case::all(&workload.work)[0].level_of(peer);
        assert_eq!(level(&written, Peer::RabbitmqQuorum), None);
        assert_eq!(level(&written, Peer::Redis), Some(Ack::Written));
        assert_eq!(level(&synced, Peer::RabbitmqQuorum), Some(Ack::Synced));
        assert_eq!(level(&synced, Peer::RabbitmqStream), Some(Ack::Written));
        let base = tempfile::tempdir().unwrap();
        let programs = crate::peer::Programs { felucca: PathBuf::new(), folder: PathBuf::new() };
        let run = Run {
            workloads: vec![written],
            peers: Vec::new(),
            launcher: Launcher::new(programs, base.path()).unwrap(),
            effort: Effort::QUICK,
            repetitions: 1,
            limits: false,
            client_threads: 1,
            longest: Duration::MAX,
            data_dir: base.path().to_owned(),
        };
        assert!(run.check_takes_part(Peer::RabbitmqStream).is_ok());
        let error = run.check_takes_part(Peer::RabbitmqQuorum).unwrap_err();
        assert!(error.to_string().contains("weaker promise"), "{error}");
    }

    #[test]
    fn peers_share_records_at_their_usual_level() {
        let cases = Case::all(&Workload::find("W5").unwrap().work);
        let beside = |peer: Peer| -> Vec<_> {
            cases.iter().filter(|case| case.level_of(peer).is_some()).map(Case::level).collect()
        };
        assert_eq!(beside(Peer::Redis), [Some(Ack::Written); 3]);
        assert_eq!(beside(Peer::RabbitmqQuorum), [Some(Ack::Synced); 3]);
        assert_eq!(beside(Peer::RabbitmqStream), []);
        assert_eq!(beside(Peer::Felucca).len(), cases.len());
    }

    #[test]
    fn effort_bounds_what_a_workload_says() {
        assert_eq!(Effort::FULL.measured(4.0), Duration::from_secs(4));
        assert_eq!(Effort::QUICK.measured(4.0), Duration::from_secs(2));
        assert_eq!(Effort::QUICK.shortest(Duration::from_secs(1)), Duration::from_secs(1));
        assert_eq!(Effort::QUICK.records(10), 10);
        let most = Workload::standard(false)
            .unwrap()
            .iter()
            .flat_map(|workload| Case::all(&workload.work))
            .map(|case| case.stored_bytes(&Effort::QUICK))
            .max();
        assert!(most.unwrap() <= 6 << 30);
    }
}
