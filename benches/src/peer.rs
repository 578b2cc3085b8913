//! Who can be measured: names, the durability that each offers, and how to get hold of it.
//!
//! A peer is compared with Felucca at the level of the case or below it, never above: an acknowledgement that promises more
//! may take longer.

use std::path::{Path, PathBuf};
use std::process::Command;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::workload::Ack;

/// A broker with a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Peer {
    Felucca,
    /// Streams with an append-only file.
    Redis,
    /// NATS with file storage.
    Jetstream,
    /// With one node that is broker and controller.
    Kafka,
    /// Quorum queues over AMQP.
    RabbitmqQuorum,
    /// Streams over the stream protocol.
    RabbitmqStream,
}

impl Peer {
    /// Every peer, Felucca first.
    pub const ALL: &[Self] = &[
        Self::Felucca,
        Self::Redis,
        Self::Jetstream,
        Self::Kafka,
        Self::RabbitmqQuorum,
        Self::RabbitmqStream,
    ];

    /// As in results and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Felucca => "felucca",
            Self::Redis => "redis",
            Self::Jetstream => "jetstream",
            Self::Kafka => "kafka",
            Self::RabbitmqQuorum => "rabbitmq-quorum",
            Self::RabbitmqStream => "rabbitmq-stream",
        }
    }

    /// What its acknowledgements can mean, the weakest first.
    pub fn levels(self) -> &'static [Ack] {
        match self {
            Self::Felucca | Self::Redis | Self::Jetstream | Self::Kafka => &[Ack::Written, Ack::Synced],
            Self::RabbitmqQuorum => &[Ack::Synced],
            Self::RabbitmqStream => &[Ack::Written],
        }
    }

    /// The level at which it may stand beside Felucca: the same, or the strongest of the weaker ones.
    pub fn level_beside(self, felucca: Ack) -> Option<Ack> {
        self.levels().iter().copied().filter(|level| *level <= felucca).max()
    }

    /// Several workers can share its records and acknowledge each.
    pub(crate) fn has_groups(self) -> bool {
        // Kafka has share groups, its client in Rust does not.
        !matches!(self, Self::Kafka | Self::RabbitmqStream)
    }

    /// Several readers can each have all its records.
    pub(crate) fn has_readers(self) -> bool {
        self != Self::RabbitmqQuorum
    }

    /// Streams or queues on one node that somebody might want.
    pub(crate) fn most_partitions(self) -> u32 {
        match self {
            Self::Felucca | Self::Redis | Self::Kafka => u32::MAX,
            Self::Jetstream | Self::RabbitmqQuorum | Self::RabbitmqStream => 64,
        }
    }

    /// The cargo feature that builds its driver; Felucca's is always there.
    pub fn feature(self) -> Option<&'static str> {
        match self {
            Self::Felucca => None,
            Self::Redis => Some("redis"),
            Self::Jetstream => Some("jetstream"),
            Self::Kafka => Some("kafka"),
            Self::RabbitmqQuorum | Self::RabbitmqStream => Some("rabbitmq"),
        }
    }

    /// Its driver is part of this program.
    pub fn is_built(self) -> bool {
        match self {
            Self::Felucca => true,
            Self::Redis => cfg!(feature = "redis"),
            Self::Jetstream => cfg!(feature = "jetstream"),
            Self::Kafka => cfg!(feature = "kafka"),
            Self::RabbitmqQuorum | Self::RabbitmqStream => cfg!(feature = "rabbitmq"),
        }
    }

    /// The name of its server's program.
    pub(crate) fn program(self) -> &'static str {
        match self {
            Self::Felucca => "felucca",
            Self::Redis => "redis-server",
            Self::Jetstream => "nats-server",
            Self::Kafka => "kafka-server",
            Self::RabbitmqQuorum | Self::RabbitmqStream => "rabbitmq-server",
        }
    }

    /// The commands that install its server.
    pub fn how_to_get(self) -> &'static str {
        match self {
            Self::Felucca => "cargo build --release -p felucca-broker",
            Self::Redis => "benches/peers/install.sh redis",
            Self::Jetstream => "benches/peers/install.sh jetstream",
            Self::Kafka => "benches/peers/install.sh kafka",
            Self::RabbitmqQuorum | Self::RabbitmqStream => "benches/peers/install.sh rabbitmq",
        }
    }

    /// What a server's program says its version is.
    pub fn version(self, program: &Path) -> Option<String> {
        if matches!(self, Self::RabbitmqQuorum | Self::RabbitmqStream) {
            return rabbitmq_version(program);
        }
        let output = Command::new(program).arg("--version").output().ok()?;
        version_in(&String::from_utf8(output.stdout).ok()?)
    }
}

/// The word that looks like a version: digits and dots, after `v` or `v=` perhaps.
fn version_in(text: &str) -> Option<String> {
    let plain = |word: &str| {
        let word = word.strip_prefix('v').unwrap_or(word).trim_start_matches('=').to_owned();
        let is_version = word.starts_with(|first: char| first.is_ascii_digit()) && word.contains('.');
        is_version.then_some(word)
    };
    text.split_ascii_whitespace().find_map(plain)
}

/// Asking the program takes seconds. Debian names a folder after the version, a release its main plugin.
fn rabbitmq_version(program: &Path) -> Option<String> {
    let home = program.parent()?.parent()?;
    [("lib", "rabbitmq_server-"), ("plugins", "rabbit-")].into_iter().find_map(|(folder, prefix)| {
        let entries = std::fs::read_dir(home.join(folder)).ok()?;
        entries.flatten().find_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            Some(name.strip_prefix(prefix)?.trim_end_matches(".ez").to_owned())
        })
    })
}

/// Where servers' programs are.
#[derive(Clone, Debug)]
pub struct Programs {
    /// Felucca's own, when it was named or lies beside this program.
    pub felucca: PathBuf,
    /// What `benches/peers/install.sh` fills; its `bin` is searched before `PATH`.
    pub folder: PathBuf,
}

impl Programs {
    /// Where peers are installed unless told otherwise: `felucca-bench` in the user's cache folder.
    pub fn default_folder() -> PathBuf {
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
        cache.or_else(home).unwrap_or_else(std::env::temp_dir).join("felucca-bench")
    }

    /// A peer's program, if it is installed.
    pub fn find(&self, peer: Peer) -> Option<PathBuf> {
        if peer == Peer::Felucca {
            return self.felucca.is_file().then(|| self.felucca.clone());
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders = rabbitmq_folders(&self.folder)
            .into_iter()
            .chain([self.folder.join("bin")])
            .chain(std::env::split_paths(&path))
            .chain(["/usr/sbin", "/usr/local/bin", "/usr/bin"].map(PathBuf::from));
        // Debian's `rabbitmq-server` in PATH changes the user and reads the system's configuration.
        let wrapped = |program: &Path| program == Path::new("/usr/sbin/rabbitmq-server");
        folders
            .map(|folder| folder.join(peer.program()))
            .find(|program| program.is_file() && !wrapped(program))
    }
}

/// Where RabbitMQ keeps its own scripts: Debian's, and an unpacked release.
fn rabbitmq_folders(folder: &Path) -> Vec<PathBuf> {
    vec![folder.join("rabbitmq/sbin"), PathBuf::from("/usr/lib/rabbitmq/bin")]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stronger_promise_is_never_compared_with_a_weaker_one() {
        assert_eq!(Peer::Redis.level_beside(Ack::Written), Some(Ack::Written));
        assert_eq!(Peer::Redis.level_beside(Ack::Synced), Some(Ack::Synced));
        assert_eq!(Peer::RabbitmqStream.level_beside(Ack::Synced), Some(Ack::Written));
        assert_eq!(Peer::RabbitmqQuorum.level_beside(Ack::Written), None);
    }

    #[test]
    fn versions_are_found_in_what_programs_say() {
        let cases = [
            ("felucca 0.1.0", "0.1.0"),
            ("Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64", "7.0.15"),
            ("nats-server: v2.12.3", "2.12.3"),
            ("kafka 4.1.0", "4.1.0"),
        ];
        for (said, version) in cases {
            assert_eq!(version_in(said).as_deref(), Some(version), "{said}");
        }
        assert_eq!(version_in("no version"), None);
    }
}
