//! What runs have met, so that a simulator that tests nothing is noticed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

/// Everything that a range of seeds has to meet, by kind.
const WANTED: &[(&str, &[&str])] = &[
    (
        "fault",
        &[
            "kill",
            "power cut",
            "power cut losing all",
            "power fails in the middle",
            "power cut behind a checkpoint",
            "crash in recovery",
            "clean restart",
            "write: EIO",
            "write: ENOSPC",
            "write: short",
            "write: torn",
            "sync: EIO",
            "read: EIO",
            "disk full",
            "bit rot: journal",
            "bit rot: log",
            "bit rot: checkpoint",
            "clock: back",
            "clock: ahead",
            "connection cut",
            "connection left",
            "slow connections",
            "client pause",
            "stall",
            "long pause",
        ],
    ),
    (
        "state",
        &[
            "Available",
            "Leased",
            "Acked",
            "Scheduled",
            "DeadLettered",
            "Held",
            "Discarded",
            "Expired",
            "Skipped",
        ],
    ),
    (
        "reply",
        &[
            "ack: Ok",
            "ack: Duplicate",
            "ack: Conflict",
            "ack: Late",
            "ack: Stale",
            "ack: AlreadySettled",
            "ack: NotOwner",
            "ack: Fenced",
            "nack: Ok",
            "nack: Duplicate",
            "nack: Conflict",
            "nack: Stale",
            "nack: AlreadySettled",
            "nack: NotOwner",
            "nack: Fenced",
            "reject: Ok",
            "reject: Duplicate",
            "reject: Conflict",
            "reject: Stale",
            "reject: NotOwner",
            "release: Ok",
            "release: Duplicate",
            "release: Conflict",
            "release: Stale",
            "release: NotOwner",
            "extend: Ok",
            "extend: Gone",
            "extend: Stale",
            "extend: NotOwner",
            "complete: Ok",
            "complete: Late",
            "complete: Stale",
            "append: Ok",
            "append: duplicate",
            "append: ReadOnly",
            "commit: Ok",
            "commit: refused",
            "read: Io",
        ],
    ),
    (
        "log",
        &[
            "records compacted away",
            "tombstone gone",
            "cleaning failed",
            "cleaning cut short",
            "pinned records copied aside",
            "in hand and superseded",
            "in hand below the log start",
            "records deleted by command",
            "records deleted by retention",
            "topic created",
            "topic created again",
            "topic deleted",
        ],
    ),
    (
        "recovery",
        &[
            "started",
            "start failed",
            "from the other checkpoint",
            "offsets passed over after lost power",
            "damaged journal refused",
            "damaged journal repaired",
            "damaged checkpoint refused",
            "damaged end cut",
            "referred batch replayed",
            "referring frame completed",
            "referring frame cut",
            "damaged range reported",
        ],
    ),
];

/// How often each thing was met, by kind and name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage(BTreeMap<(&'static str, String), u64>);

impl Coverage {
    pub(crate) fn meet(&mut self, kind: &'static str, name: impl Into<String>) {
        self.meet_often(kind, name, 1);
    }

    pub(crate) fn meet_often(&mut self, kind: &'static str, name: impl Into<String>, times: u64) {
        if times > 0 {
            *self.0.entry((kind, name.into())).or_default() += times;
        }
    }

    /// Adds what another run has met.
    pub fn add(&mut self, other: &Self) {
        for (key, count) in &other.0 {
            *self.0.entry(key.clone()).or_default() += count;
        }
    }

    /// How often something of a kind was met.
    pub fn count(&self, kind: &str) -> u64 {
        self.0.iter().filter(|((known, _), _)| *known == kind).map(|(_, count)| count).sum()
    }

    /// What should have been met and was not.
    pub fn missing(&self) -> Vec<String> {
        let met: BTreeSet<(&str, &str)> = self.0.keys().map(|(kind, name)| (*kind, name.as_str())).collect();
        let wanted = WANTED.iter().flat_map(|(kind, names)| names.iter().map(move |name| (*kind, *name)));
        wanted.filter(|key| !met.contains(key)).map(|(kind, name)| format!("{kind}: {name}")).collect()
    }

    /// One line for each thing met.
    pub fn report(&self) -> String {
        self.0.iter().fold(String::new(), |mut text, ((kind, name), count)| {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{count:>9}  {kind}: {name}");
            text
        })
    }
}
