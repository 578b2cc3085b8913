//! What can be set about a server, as plain values with their units in their types.
//!
//! Nothing here reads files or the environment (see [`crate::config`]) and nothing here acts on the values. Whoever holds a
//! [`ServerSettings`] that [`ServerSettings::validate`] has accepted may rely on every relation that it checks.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

pub use crate::byte_size::{ByteSize, ParseByteSizeError};

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people; coloured on a terminal.
    Text,
    /// One JSON object a line.
    Json,
}

/// Everything that can be set about a server. The defaults are a server on this machine only.
#[derive(Clone, Debug, PartialEq)]
pub struct ServerSettings {
    /// Where journal, segments and checkpoints live; created when missing, locked while in use.
    pub data_dir: PathBuf,
    /// Where the native protocol is served; port 0 lets the system pick one.
    pub listen: SocketAddr,
    /// Allows a listen address that other machines can reach, without encryption or authentication.
    pub insecure: bool,
    pub log_format: LogFormat,
    /// Largest frame of the protocol, enforced from its length alone.
    pub max_frame_bytes: ByteSize,
    /// Largest record batch.
    pub max_batch_bytes: ByteSize,
    /// Largest record: key, value and headers.
    pub max_record_bytes: ByteSize,
    /// Headers per record.
    pub max_headers: u32,
    /// Open connections; more are closed at once with an error.
    pub max_connections: u32,
    /// Bytes of requests taken in and not yet answered, of all connections together.
    pub in_flight_bytes: ByteSize,
    /// The same for one connection; beyond it the connection is not read.
    pub connection_in_flight_bytes: ByteSize,
    /// A member of a group is lost when nothing was heard of it for so long.
    pub session_timeout: Duration,
    /// A connection that has not said hello after so long is closed.
    pub handshake_timeout: Duration,
    /// A request for whose bytes there is no room after so long is refused.
    pub admission_timeout: Duration,
    /// A connection of which nothing is heard for so long is closed; never less than three session timeouts.
    pub idle_timeout: Duration,
    /// A client that takes nothing of what is written to it for so long is disconnected.
    pub write_timeout: Duration,
    /// Records queued for one connection and not yet written.
    pub outbox_bytes: ByteSize,
    /// How long a stopping server waits for running requests.
    pub shutdown_timeout: Duration,
    pub journal: JournalSettings,
    pub segment: SegmentSettings,
    pub retention: RetentionSettings,
    pub cleaner: CleanerSettings,
    pub disk: DiskSettings,
    pub scrub: ScrubSettings,
    /// Bytes journaled and not yet written to segments; beyond it producers wait.
    pub unwritten_bytes: ByteSize,
    /// Memory for the most recent batches of all partitions, so that readers near the end need no disk.
    pub tail_cache_bytes: ByteSize,
    /// Memory for batches read from disk for share groups, which come back for the rest of their records.
    pub reread_cache_bytes: ByteSize,
    /// Memory for the state of all share groups; when it is spent, new records are handed out a few at a time.
    pub share_state_bytes: ByteSize,
    /// Segment files held open.
    pub open_files: u32,
    pub checkpoint: CheckpointSettings,
    pub limits: Limits,
}

/// The write-ahead journal.
#[derive(Clone, Debug, PartialEq)]
pub struct JournalSettings {
    /// Size of the first journal file: small, so that a fresh start is quick.
    pub first_file_bytes: ByteSize,
    /// Size of every later journal file.
    pub file_bytes: ByteSize,
    /// Written and not yet synced; beyond it producers wait.
    pub max_unsynced_bytes: ByteSize,
    /// Batches from this size on may be written to their segment only, where the journal refers to them.
    pub reference_bytes: ByteSize,
    /// While anything is unsynced, a sync begins at least this often.
    pub sync_interval: Duration,
}

/// Segment files.
#[derive(Clone, Debug, PartialEq)]
pub struct SegmentSettings {
    /// Size at which a partition goes on in a new segment, unless its topic says otherwise.
    pub bytes: ByteSize,
}

/// The end of records.
#[derive(Clone, Debug, PartialEq)]
pub struct RetentionSettings {
    /// How often it is looked what the retention of topics wants deleted.
    pub check_interval: Duration,
    /// Bytes below the log start that are kept of a partition for share groups; beyond it what they have in hand is copied
    /// aside.
    pub pinned_bytes: ByteSize,
}

/// Compaction by key.
#[derive(Clone, Debug, PartialEq)]
pub struct CleanerSettings {
    /// Pause between two looks for work.
    pub interval: Duration,
    /// Memory for keys.
    pub dedupe_buffer_bytes: ByteSize,
    /// Read and written together, in a second.
    pub max_bytes_per_second: ByteSize,
}

/// Room on the disk of the data directory.
#[derive(Clone, Debug, PartialEq)]
pub struct DiskSettings {
    /// New records are refused while fewer bytes are free; what is left is for everything else. 0: never.
    pub low_water_bytes: ByteSize,
    /// Held in a file against other programs, and given up when they have taken nearly all the rest. 0: none.
    pub reserve_bytes: ByteSize,
}

/// The look for damage in stored records.
#[derive(Clone, Debug, PartialEq)]
pub struct ScrubSettings {
    /// Bytes read in a second at most; 0: nothing is looked at.
    pub bytes_per_second: ByteSize,
    /// Time between the beginnings of two looks at everything.
    pub interval: Duration,
}

/// When state is checkpointed; whichever comes first.
#[derive(Clone, Debug, PartialEq)]
pub struct CheckpointSettings {
    pub interval: Duration,
    /// Journal written since the last checkpoint: bounds how much a start has to replay.
    pub journal_bytes: ByteSize,
}

/// Counts that the broker refuses to exceed.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    pub topics: u64,
    /// Of all topics together.
    pub partitions: u64,
    pub groups: u64,
    pub members_per_group: u64,
    /// Producers remembered per partition; the one that was silent longest is forgotten first.
    pub producers_per_partition: u64,
    /// Live leases of one share group on one partition.
    pub leases: u64,
    /// Scheduled, held and returned records of one share group on one partition.
    pub exceptions: u64,
    /// Offsets between the first undecided one of a share group on a partition and the last that it looks at.
    pub span: u64,
    /// Offsets of one key that a share group keeps behind the one that is worked on; the others are read again.
    pub parked_per_key: u64,
}

impl Default for ServerSettings {
    fn default() -> Self {
        Self {
            data_dir: PathBuf::from("felucca-data"),
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 7650)),
            insecure: false,
            log_format: LogFormat::Text,
            max_frame_bytes: ByteSize::mib(16),
            max_batch_bytes: ByteSize::mib(8),
            max_record_bytes: ByteSize::mib(1),
            max_headers: 256,
            max_connections: 10_000,
            in_flight_bytes: ByteSize::mib(64),
            connection_in_flight_bytes: ByteSize::mib(32),
            session_timeout: Duration::from_secs(10),
            handshake_timeout: Duration::from_secs(5),
            admission_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_mins(2),
            write_timeout: Duration::from_secs(20),
            outbox_bytes: ByteSize::mib(8),
            shutdown_timeout: Duration::from_secs(10),
            journal: JournalSettings {
                first_file_bytes: ByteSize::mib(4),
                file_bytes: ByteSize::mib(64),
                max_unsynced_bytes: ByteSize::mib(64),
                reference_bytes: ByteSize::kib(64),
                sync_interval: Duration::from_millis(50),
            },
            segment: SegmentSettings { bytes: ByteSize::mib(256) },
            retention: RetentionSettings {
                check_interval: Duration::from_secs(10),
                pinned_bytes: ByteSize::gib(1),
            },
            cleaner: CleanerSettings {
                interval: Duration::from_secs(15),
                dedupe_buffer_bytes: ByteSize::mib(128),
                max_bytes_per_second: ByteSize::mib(64),
            },
            disk: DiskSettings { low_water_bytes: ByteSize::mib(512), reserve_bytes: ByteSize::mib(64) },
            scrub: ScrubSettings { bytes_per_second: ByteSize::mib(4), interval: Duration::from_hours(24) },
            unwritten_bytes: ByteSize::mib(64),
            tail_cache_bytes: ByteSize::mib(64),
            reread_cache_bytes: ByteSize::mib(128),
            share_state_bytes: ByteSize::gib(1),
            open_files: 1024,
            checkpoint: CheckpointSettings {
                interval: Duration::from_mins(1),
                journal_bytes: ByteSize::gib(1),
            },
            limits: Limits {
                topics: 10_000,
                partitions: 100_000,
                groups: 20_000,
                members_per_group: 10_000,
                producers_per_partition: 10_000,
                leases: 100_000,
                exceptions: 2_000_000,
                span: 1 << 30,
                parked_per_key: 1_024,
            },
        }
    }
}

/// Values that are fine alone and impossible together.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    #[error("{larger} = {larger_value} must be at least {reason} = {needed}")]
    TooSmall { larger: &'static str, larger_value: ByteSize, reason: &'static str, needed: ByteSize },
    #[error(
        "listen = {0} can be reached from other machines, and this version has neither encryption nor authentication; \
         add --insecure when the network itself is trusted, or listen on 127.0.0.1"
    )]
    NotLoopback(SocketAddr),
}

/// What a frame needs besides the batches that it carries.
const FRAME_OVERHEAD: ByteSize = ByteSize::kib(64);

impl ServerSettings {
    /// Checks what concerns several values at once; [`crate::config`] has checked each alone.
    pub fn validate(&self) -> Result<(), SettingsError> {
        if !self.listen.ip().is_loopback() && !self.insecure {
            return Err(SettingsError::NotLoopback(self.listen));
        }
        let at_least = |larger, larger_value: ByteSize, reason, needed: ByteSize| {
            if larger_value >= needed {
                Ok(())
            } else {
                Err(SettingsError::TooSmall { larger, larger_value, reason, needed })
            }
        };
        let framed = ByteSize(self.max_batch_bytes.0 + FRAME_OVERHEAD.0);
        at_least("max-batch-bytes", self.max_batch_bytes, "max-record-bytes", self.max_record_bytes)?;
        at_least("max-frame-bytes", self.max_frame_bytes, "max-batch-bytes + 64KiB", framed)?;
        at_least(
            "connection-in-flight-bytes",
            self.connection_in_flight_bytes,
            "max-frame-bytes",
            self.max_frame_bytes,
        )?;
        at_least(
            "in-flight-bytes",
            self.in_flight_bytes,
            "connection-in-flight-bytes",
            self.connection_in_flight_bytes,
        )?;
        at_least("unwritten-bytes", self.unwritten_bytes, "max-frame-bytes", self.max_frame_bytes)?;
        if self.disk.low_water_bytes.0 > 0 {
            // What was taken before the mark was reached is still to be written to segments.
            at_least(
                "disk.low-water-bytes",
                self.disk.low_water_bytes,
                "unwritten-bytes",
                self.unwritten_bytes,
            )?;
        }
        at_least(
            "journal.file-bytes",
            self.journal.file_bytes,
            "journal.first-file-bytes",
            self.journal.first_file_bytes,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid() {
        assert_eq!(ServerSettings::default().validate(), Ok(()));
    }

    #[test]
    fn a_reachable_address_needs_consent() {
        let mut settings =
            ServerSettings { listen: "0.0.0.0:7650".parse().unwrap(), ..ServerSettings::default() };
        assert!(settings.validate().unwrap_err().to_string().contains("--insecure"));
        settings.insecure = true;
        assert_eq!(settings.validate(), Ok(()));
        settings = ServerSettings { listen: "[::1]:7650".parse().unwrap(), ..ServerSettings::default() };
        assert_eq!(settings.validate(), Ok(()));
    }

    #[test]
    fn sizes_must_fit_into_one_another() {
        let settings = ServerSettings { max_batch_bytes: ByteSize::mib(16), ..ServerSettings::default() };
        let message = settings.validate().unwrap_err().to_string();
        assert!(message.contains("max-frame-bytes = 16MiB"), "{message}");
    }
}
