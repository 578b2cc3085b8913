//! Workloads: what is measured, as plain values read from TOML.
//!
//! The standard files are part of the program, so that it measures the same wherever it is run; other files may be named
//! instead. A key that is not known is an error. A workload with lists stands for one case per combination.

use std::path::Path;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

/// The standard workloads in the order in which they run.
const STANDARD: &[&str] = &[
    include_str!("../workloads/w1.toml"),
    include_str!("../workloads/w1-callers.toml"),
    include_str!("../workloads/w2.toml"),
    include_str!("../workloads/w3.toml"),
    include_str!("../workloads/w3-small.toml"),
    include_str!("../workloads/w4.toml"),
    include_str!("../workloads/w4-synced.toml"),
    include_str!("../workloads/w5.toml"),
    include_str!("../workloads/w6.toml"),
    include_str!("../workloads/w7.toml"),
    include_str!("../workloads/w9.toml"),
];

/// Those that leave the client library out.
const RAW: &[&str] =
    &[include_str!("../workloads/raw-blocks.toml"), include_str!("../workloads/raw-singles.toml")];

/// What an acknowledgement means; the weakest promise is the smallest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ack {
    /// In the server's memory.
    Memory,
    /// In the page cache.
    Written,
    /// On the device.
    Synced,
}

impl Ack {
    /// As in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Written => "written",
            Self::Synced => "synced",
        }
    }
}

/// One file.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// How results name it.
    pub name: String,
    /// One line for people.
    pub about: String,
    pub work: Work,
}

/// What is done.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Work {
    /// Records through the client's producer.
    Produce(Produce),
    /// Encoded batches straight onto the connection.
    Raw(Produce),
    Consume(Consume),
    EndToEnd(EndToEnd),
    Share(Share),
    FanOut(FanOut),
    Footprint(Footprint),
}

/// Producing as fast as the records in flight allow.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Produce {
    pub ack: Vec<Ack>,
    /// Size of a record's value.
    pub record_bytes: usize,
    pub partitions: u32,
    /// Size of a batch; at least one record goes into each.
    pub batch_bytes: usize,
    pub producers: Vec<Producers>,
    pub warm_up_seconds: f64,
    pub seconds: f64,
    /// The measurement ends early when so much was produced: the bound on the disk that it needs.
    pub max_bytes: u64,
}

/// How producing is spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Producers {
    pub connections: u32,
    /// Records, or blocks of them (raw: requests), that each connection has unacknowledged.
    pub in_flight: usize,
    /// Records that are handed to the producer together; one by one without it.
    #[serde(default)]
    pub block_records: Option<usize>,
    /// Other than the workload's.
    #[serde(default)]
    pub partitions: Option<u32>,
}

/// Reading what was produced before.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Consume {
    pub record_bytes: usize,
    pub partitions: u32,
    pub batch_bytes: usize,
    pub consumers: Vec<u32>,
    /// Whether records are in the page cache.
    pub cache: Vec<Cache>,
    pub records: u64,
}

/// Where records are when they are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cache {
    /// Where they were left when they were written, not long ago.
    Warm,
    /// On the device only, if the server keeps them in files.
    Cold,
}

/// Producing at a fixed rate and reading at the same time.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct EndToEnd {
    pub ack: Vec<Ack>,
    pub record_bytes: usize,
    pub partitions: u32,
    pub rates: Vec<Rate>,
    pub warm_up_seconds: f64,
    pub seconds: f64,
}

/// How fast records are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rate {
    /// Records per second.
    Fixed(u32),
    /// Half of what the same server takes in from one connection as fast as it can: `"half"`.
    Half,
}

impl<'de> Deserialize<'de> for Rate {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Number(u32),
            Word(String),
        }
        match Written::deserialize(deserializer)? {
            Written::Number(rate) => Ok(Self::Fixed(rate)),
            Written::Word(word) if word == "half" => Ok(Self::Half),
            Written::Word(word) => {
                Err(serde::de::Error::custom(format!("{word:?} is neither a number nor \"half\"")))
            }
        }
    }
}

/// One producer and many readers of everything, each on a connection of its own.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct FanOut {
    pub record_bytes: usize,
    pub partitions: u32,
    pub batch_bytes: usize,
    pub groups: u32,
    /// Records that the producer has unacknowledged.
    pub in_flight: usize,
    pub warm_up_seconds: f64,
    pub seconds: f64,
    /// Produced at the most.
    pub max_bytes: u64,
}

/// Working through records with a share group.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Share {
    pub record_bytes: usize,
    pub partitions: u32,
    pub batch_bytes: usize,
    pub members: Vec<u32>,
    pub ways: Vec<Way>,
    /// Records that each member holds leased.
    pub prefetch: u32,
    pub records: u64,
    pub warm_up_seconds: f64,
    pub seconds: f64,
}

/// How records are taken and acknowledged. Peers have the ways that are nothing but `receive = "next"`, each the one whose
/// `ack` is its usual level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Way {
    pub receive: Receive,
    /// Distinct keys, taken in turn, whose order the group keeps; 0 = no keys, no order.
    #[serde(default)]
    pub keys: u32,
    /// When an acknowledgement is answered.
    pub ack: Ack,
    /// Other than the workload's.
    #[serde(default)]
    pub members: Option<u32>,
}

impl Way {
    /// Whether other brokers' clients can do it, too.
    pub(crate) fn is_common(&self) -> bool {
        self.receive == Receive::Next && self.keys == 0
    }
}

/// Which part of the client's interface takes the records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Receive {
    /// The caller takes deliveries and acknowledges them.
    Next,
    /// The client runs a handler for each.
    Worker,
}

/// Starting the broker on an empty directory.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Footprint {
    pub starts: u32,
}

impl Workload {
    /// Reads a workload.
    ///
    /// # Errors
    /// No such TOML, or values with which nothing can be measured.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let workload: Self = toml::from_str(text)?;
        workload.check().with_context(|| format!("workload {}", workload.name))?;
        Ok(workload)
    }

    /// The standard workloads, or those without the client library.
    ///
    /// # Errors
    /// None in a tested build.
    pub fn standard(raw: bool) -> anyhow::Result<Vec<Self>> {
        let texts = if raw { RAW } else { STANDARD };
        texts.iter().map(|text| Self::parse(text)).collect()
    }

    /// A standard workload by its name, whatever the case, or else one from a file.
    ///
    /// # Errors
    /// Neither is there, or the file is not a workload.
    pub fn find(name: &str) -> anyhow::Result<Self> {
        for text in STANDARD.iter().chain(RAW) {
            let workload = Self::parse(text)?;
            if workload.name.eq_ignore_ascii_case(name) {
                return Ok(workload);
            }
        }
        let path = Path::new(name);
        let text = std::fs::read_to_string(path).with_context(|| {
            format!("{name:?} is neither a standard workload nor a file that can be read")
        })?;
        Self::parse(&text).with_context(|| format!("in {name}"))
    }

    fn check(&self) -> anyhow::Result<()> {
        let sound = match &self.work {
            Work::Produce(work) | Work::Raw(work) => {
                let some = |producers: &Producers| {
                    producers.connections > 0
                        && producers.in_flight > 0
                        && producers.block_records != Some(0)
                        && producers.partitions != Some(0)
                };
                work.producers.iter().all(some)
                    && !work.ack.contains(&Ack::Memory)
                    && work.partitions > 0
                    && lasts(work.warm_up_seconds, work.seconds)
            }
            Work::Consume(work) => work.records > 0 && work.partitions > 0 && !work.consumers.contains(&0),
            Work::EndToEnd(work) => {
                !work.rates.contains(&Rate::Fixed(0))
                    && !work.ack.contains(&Ack::Memory)
                    && work.partitions > 0
                    && work.record_bytes >= 8
                    && lasts(work.warm_up_seconds, work.seconds)
            }
            Work::Share(work) => {
                work.records > 0
                    && work.partitions > 0
                    && work.prefetch > 0
                    && !work.members.contains(&0)
                    && work.ways.iter().all(|way| way.ack != Ack::Memory && way.members != Some(0))
                    && lasts(work.warm_up_seconds, work.seconds)
            }
            Work::FanOut(work) => {
                work.partitions > 0
                    && work.groups > 0
                    && work.in_flight > 0
                    && lasts(work.warm_up_seconds, work.seconds)
            }
            Work::Footprint(work) => work.starts > 0,
        };
        if !sound {
            bail!(
                "counts and seconds must be above zero, end-to-end records have at least 8 bytes, and records are \
                 acknowledged \"written\" or \"synced\""
            );
        }
        Ok(())
    }
}

/// Not a day: a slip of the pen should not fill the disk.
fn lasts(warm_up: f64, seconds: f64) -> bool {
    (0.0..=86_400.0).contains(&warm_up) && seconds > 0.0 && seconds <= 86_400.0
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_file_of_the_folder_is_known_and_sound() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("workloads");
        let mut files = BTreeSet::new();
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            let workload = Workload::parse(&std::fs::read_to_string(&path).unwrap()).unwrap();
            assert_eq!(workload.name.to_lowercase(), name);
            files.insert(name);
        }
        let known: BTreeSet<_> = [Workload::standard(false).unwrap(), Workload::standard(true).unwrap()]
            .concat()
            .into_iter()
            .map(|workload| workload.name.to_lowercase())
            .collect();
        assert_eq!(files, known);
    }

    #[test]
    fn slips_are_refused() {
        let with = |line: &str| {
            Workload::parse(&format!("name = 'x'\nabout = 'y'\n[work]\nkind = 'footprint'\n{line}"))
        };
        assert!(with("starts = 3").is_ok());
        assert!(with("starts = 0").is_err());
        assert!(with("starts = 3\nends = 3").is_err());
        assert!(Workload::find("no such workload").is_err());
        assert_eq!(Workload::find("w1").unwrap().name, "W1");
    }
}
