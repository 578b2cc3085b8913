//! How settings come about: defaults, then a TOML file, then `FELUCCA_SERVER_*` in the environment, then flags.
//!
//! [`KEYS`] names every setting once; the file's keys, the variables, the flags, their help, the listing of `felucca config`
//! and the check of `docs/configuration.md` all come from it. A key that it does not hold is an error that names the nearest
//! one, so that a misspelt setting is never silently the default.

use std::ffi::OsString;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::settings::{ByteSize, LogFormat, ServerSettings, SettingsError};

/// What the names of the environment variables begin with.
pub const ENV_PREFIX: &str = "FELUCCA_SERVER_";
/// Names the configuration file, as `--config` does.
pub const ENV_CONFIG: &str = "FELUCCA_SERVER_CONFIG";

/// One setting.
pub struct Key {
    /// As the file has it; a dot stands for a table: `journal.sync-interval`.
    pub name: &'static str,
    pub help: &'static str,
    kind: Kind,
}

/// Where the value lives in [`ServerSettings`] and what is possible, bounds inclusive.
enum Kind {
    Bytes(fn(&mut ServerSettings) -> &mut ByteSize, ByteSize, ByteSize),
    Time(fn(&mut ServerSettings) -> &mut Duration, Duration, Duration),
    Count(fn(&mut ServerSettings) -> &mut u32, u32, u32),
    Limit(fn(&mut ServerSettings) -> &mut u64, u64, u64),
    Flag(fn(&mut ServerSettings) -> &mut bool),
    Path(fn(&mut ServerSettings) -> &mut PathBuf),
    Address(fn(&mut ServerSettings) -> &mut SocketAddr),
    LogFormat(fn(&mut ServerSettings) -> &mut LogFormat),
}

const fn key(name: &'static str, kind: Kind, help: &'static str) -> Key {
    Key { name, help, kind }
}

const MILLI: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_hours(1);
const MAX_LIMIT: u64 = 10_000_000;

/// Every setting, in the order in which help and documents list them.
pub static KEYS: &[Key] = &[
    key("data-dir", Kind::Path(|s| &mut s.data_dir), "Directory of journal, segments and checkpoints"),
    key("listen", Kind::Address(|s| &mut s.listen), "Address of the native protocol; port 0 picks one"),
    key(
        "insecure",
        Kind::Flag(|s| &mut s.insecure),
        "Allows a listen address that is not loopback, without encryption or authentication",
    ),
    key("log-format", Kind::LogFormat(|s| &mut s.log_format), "How log lines look"),
    key(
        "max-frame-bytes",
        Kind::Bytes(|s| &mut s.max_frame_bytes, ByteSize::kib(128), ByteSize::mib(256)),
        "Largest protocol frame",
    ),
    key(
        "max-batch-bytes",
        Kind::Bytes(|s| &mut s.max_batch_bytes, ByteSize::kib(16), ByteSize::mib(128)),
        "Largest record batch",
    ),
    key(
        "max-record-bytes",
        Kind::Bytes(|s| &mut s.max_record_bytes, ByteSize::kib(1), ByteSize::mib(64)),
        "Largest record (key, value and headers)",
    ),
    key("max-headers", Kind::Count(|s| &mut s.max_headers, 0, 65_535), "Headers per record"),
    key("max-connections", Kind::Count(|s| &mut s.max_connections, 1, 1_000_000), "Open connections"),
    key(
        "in-flight-bytes",
        Kind::Bytes(|s| &mut s.in_flight_bytes, ByteSize::mib(1), ByteSize::gib(2)),
        "Bytes of unanswered requests, all connections together",
    ),
    key(
        "connection-in-flight-bytes",
        Kind::Bytes(|s| &mut s.connection_in_flight_bytes, ByteSize::kib(128), ByteSize::gib(2)),
        "Bytes of unanswered requests per connection",
    ),
    key(
        "session-timeout",
        Kind::Time(|s| &mut s.session_timeout, SECOND, HOUR),
        "Silence after which a member of a group is lost",
    ),
    key(
        "handshake-timeout",
        Kind::Time(|s| &mut s.handshake_timeout, Duration::from_millis(100), Duration::from_mins(5)),
        "Time for a new connection to say hello",
    ),
    key(
        "admission-timeout",
        Kind::Time(|s| &mut s.admission_timeout, MILLI, Duration::from_mins(5)),
        "Time for a request to find room before it is refused",
    ),
    key(
        "idle-timeout",
        Kind::Time(|s| &mut s.idle_timeout, SECOND, HOUR),
        "Silence after which a connection is closed",
    ),
    key(
        "write-timeout",
        Kind::Time(|s| &mut s.write_timeout, MILLI, Duration::from_mins(10)),
        "Time for a client to take something of what is written to it",
    ),
    key(
        "outbox-bytes",
        Kind::Bytes(|s| &mut s.outbox_bytes, ByteSize::kib(64), ByteSize::gib(1)),
        "Records queued for one connection",
    ),
    key(
        "shutdown-timeout",
        Kind::Time(|s| &mut s.shutdown_timeout, Duration::ZERO, Duration::from_mins(10)),
        "How long a stopping server waits for running requests",
    ),
    key(
        "journal.first-file-bytes",
        Kind::Bytes(|s| &mut s.journal.first_file_bytes, ByteSize::mib(1), ByteSize::gib(4)),
        "Size of the first journal file",
    ),
    key(
        "journal.file-bytes",
        Kind::Bytes(|s| &mut s.journal.file_bytes, ByteSize::mib(1), ByteSize::gib(4)),
        "Size of the later journal files",
    ),
    key(
        "journal.max-unsynced-bytes",
        Kind::Bytes(|s| &mut s.journal.max_unsynced_bytes, ByteSize::kib(64), ByteSize::gib(1)),
        "Bytes written and not yet synced before producers wait",
    ),
    key(
        "journal.reference-bytes",
        Kind::Bytes(|s| &mut s.journal.reference_bytes, ByteSize::kib(1), ByteSize::gib(1)),
        "Batches from this size on may be written to their segment only",
    ),
    key(
        "journal.sync-interval",
        Kind::Time(|s| &mut s.journal.sync_interval, MILLI, Duration::from_secs(10)),
        "Longest time between syncs while anything is unsynced",
    ),
    key(
        "segment.bytes",
        Kind::Bytes(|s| &mut s.segment.bytes, ByteSize::kib(64), ByteSize::gib(1)),
        "Size of a segment, unless its topic says otherwise",
    ),
    key(
        "retention.check-interval",
        Kind::Time(|s| &mut s.retention.check_interval, Duration::from_millis(100), HOUR),
        "How often it is looked what the retention of topics wants deleted, and what is to be compacted",
    ),
    key(
        "retention.pinned-bytes",
        Kind::Bytes(|s| &mut s.retention.pinned_bytes, ByteSize::kib(64), ByteSize::gib(1024)),
        "Bytes below its log start that a partition keeps for share groups before what they have in hand is copied aside",
    ),
    key(
        "cleaner.interval",
        Kind::Time(|s| &mut s.cleaner.interval, Duration::from_millis(10), HOUR),
        "Pause of the cleaner between two looks for work",
    ),
    key(
        "cleaner.dedupe-buffer-bytes",
        Kind::Bytes(|s| &mut s.cleaner.dedupe_buffer_bytes, ByteSize::mib(1), ByteSize::gib(64)),
        "Memory for keys while a partition is compacted, 24 bytes for each",
    ),
    key(
        "cleaner.max-bytes-per-second",
        Kind::Bytes(|s| &mut s.cleaner.max_bytes_per_second, ByteSize::kib(64), ByteSize::gib(64)),
        "What the cleaner reads and writes together in a second",
    ),
    key(
        "disk.low-water-bytes",
        Kind::Bytes(|s| &mut s.disk.low_water_bytes, ByteSize::mib(0), ByteSize::gib(1024)),
        "Free bytes on the disk below which new records are refused, and everything else goes on; 0 never refuses",
    ),
    key(
        "disk.reserve-bytes",
        Kind::Bytes(|s| &mut s.disk.reserve_bytes, ByteSize::mib(0), ByteSize::gib(64)),
        "Size of a file that holds room against other programs, given up when they have nearly filled the disk",
    ),
    key(
        "scrub.bytes-per-second",
        Kind::Bytes(|s| &mut s.scrub.bytes_per_second, ByteSize::mib(0), ByteSize::gib(4)),
        "Most bytes of old segments read in a second to look for damage; 0 looks at nothing",
    ),
    key(
        "scrub.interval",
        Kind::Time(|s| &mut s.scrub.interval, SECOND, Duration::from_hours(24 * 365)),
        "Time between the beginnings of two looks at all old segments",
    ),
    key(
        "unwritten-bytes",
        Kind::Bytes(|s| &mut s.unwritten_bytes, ByteSize::mib(1), ByteSize::gib(64)),
        "Bytes journaled and not yet in segments before producers wait",
    ),
    key(
        "tail-cache-bytes",
        Kind::Bytes(|s| &mut s.tail_cache_bytes, ByteSize::mib(1), ByteSize::gib(64)),
        "Memory for the most recent batches",
    ),
    key(
        "reread-cache-bytes",
        Kind::Bytes(|s| &mut s.reread_cache_bytes, ByteSize::mib(0), ByteSize::gib(64)),
        "Memory for batches read from disk for share groups",
    ),
    key(
        "share-state-bytes",
        Kind::Bytes(|s| &mut s.share_state_bytes, ByteSize::mib(1), ByteSize::gib(1024)),
        "Memory for the state of all share groups before new records are handed out a few at a time",
    ),
    key("open-files", Kind::Count(|s| &mut s.open_files, 16, 1_000_000), "Segment files held open"),
    key(
        "checkpoint.interval",
        Kind::Time(|s| &mut s.checkpoint.interval, SECOND, HOUR),
        "Longest time between checkpoints while anything changes",
    ),
    key(
        "checkpoint.journal-bytes",
        Kind::Bytes(|s| &mut s.checkpoint.journal_bytes, ByteSize::mib(1), ByteSize::gib(64)),
        "Journal written before the next checkpoint",
    ),
    key("limits.topics", Kind::Limit(|s| &mut s.limits.topics, 1, MAX_LIMIT), "Topics"),
    key(
        "limits.partitions",
        Kind::Limit(|s| &mut s.limits.partitions, 1, MAX_LIMIT),
        "Partitions of all topics together",
    ),
    key("limits.groups", Kind::Limit(|s| &mut s.limits.groups, 1, MAX_LIMIT), "Groups of both kinds"),
    key(
        "limits.members-per-group",
        Kind::Limit(|s| &mut s.limits.members_per_group, 1, MAX_LIMIT),
        "Members of one group",
    ),
    key(
        "limits.producers-per-partition",
        Kind::Limit(|s| &mut s.limits.producers_per_partition, 1, MAX_LIMIT),
        "Idempotent producers remembered per partition",
    ),
    key(
        "limits.leases",
        Kind::Limit(|s| &mut s.limits.leases, 1, MAX_LIMIT),
        "Live leases of one share group on one partition",
    ),
    key(
        "limits.exceptions",
        Kind::Limit(|s| &mut s.limits.exceptions, 1, 100_000_000),
        "Scheduled, held and returned records of one share group on one partition",
    ),
    key(
        "limits.span",
        Kind::Limit(|s| &mut s.limits.span, 1, 10_000_000_000),
        "Offsets that a share group looks beyond its first undecided one on a partition",
    ),
    key(
        "limits.parked-per-key",
        Kind::Limit(|s| &mut s.limits.parked_per_key, 1, 1 << 17),
        "Offsets that a share group keeps behind one that its key waits for; the others are read again",
    ),
];

impl Key {
    /// The environment variable: `FELUCCA_SERVER_JOURNAL_SYNC_INTERVAL`.
    pub fn env(&self) -> String {
        format!("{ENV_PREFIX}{}", self.name.replace(['.', '-'], "_").to_ascii_uppercase())
    }

    /// The flag without its dashes: `journal-sync-interval`.
    pub fn flag(&self) -> String {
        self.name.replace('.', "-")
    }

    /// Whether the flag may stand without a value, meaning `true`.
    pub fn is_switch(&self) -> bool {
        matches!(self.kind, Kind::Flag(_))
    }

    /// What may stand after the flag, for its help.
    pub fn placeholder(&self) -> &'static str {
        match self.kind {
            Kind::Bytes(..) => "SIZE",
            Kind::Time(..) => "TIME",
            Kind::Count(..) | Kind::Limit(..) => "N",
            Kind::Flag(_) => "true|false",
            Kind::Path(_) => "DIR",
            Kind::Address(_) => "ADDR",
            Kind::LogFormat(_) => "text|json",
        }
    }

    /// The values that are possible, in words.
    pub fn allowed(&self) -> String {
        match &self.kind {
            Kind::Bytes(_, min, max) => format!("a size from {min} to {max}"),
            Kind::Time(_, min, max) => format!("a time from {} to {}", show_time(*min), show_time(*max)),
            Kind::Count(_, min, max) => format!("a number from {min} to {max}"),
            Kind::Limit(_, min, max) => format!("a number from {min} to {max}"),
            Kind::Flag(_) => "true or false".to_owned(),
            Kind::Path(_) => "a directory".to_owned(),
            Kind::Address(_) => "an IP address and a port such as 127.0.0.1:7650".to_owned(),
            Kind::LogFormat(_) => "text or json".to_owned(),
        }
    }

    /// The value in `settings`, as text that [`Key::set`] reads back.
    pub fn show(&self, settings: &ServerSettings) -> String {
        // The accessors serve both directions and so want a value that they may change.
        let mut settings = settings.clone();
        let settings = &mut settings;
        match self.kind {
            Kind::Bytes(at, ..) => at(settings).to_string(),
            Kind::Time(at, ..) => show_time(*at(settings)),
            Kind::Count(at, ..) => at(settings).to_string(),
            Kind::Limit(at, ..) => at(settings).to_string(),
            Kind::Flag(at) => at(settings).to_string(),
            Kind::Path(at) => at(settings).display().to_string(),
            Kind::Address(at) => at(settings).to_string(),
            Kind::LogFormat(at) => match at(settings) {
                LogFormat::Text => "text".to_owned(),
                LogFormat::Json => "json".to_owned(),
            },
        }
    }

    /// Sets the value from text; `None`, and nothing changed, when it is not one of [`Key::allowed`].
    fn set(&self, settings: &mut ServerSettings, text: &str) -> Option<()> {
        fn within<T: PartialOrd>(value: T, min: &T, max: &T) -> Option<T> {
            (value >= *min && value <= *max).then_some(value)
        }
        match &self.kind {
            Kind::Bytes(at, min, max) => *at(settings) = within(text.parse().ok()?, min, max)?,
            Kind::Time(at, min, max) => {
                *at(settings) = within(humantime::parse_duration(text).ok()?, min, max)?;
            }
            Kind::Count(at, min, max) => *at(settings) = within(text.parse().ok()?, min, max)?,
            Kind::Limit(at, min, max) => *at(settings) = within(text.parse().ok()?, min, max)?,
            Kind::Flag(at) => *at(settings) = text.parse().ok()?,
            Kind::Path(at) => {
                *at(settings) = Some(PathBuf::from(text)).filter(|path| !path.as_os_str().is_empty())?;
            }
            Kind::Address(at) => *at(settings) = text.parse().ok()?,
            Kind::LogFormat(at) => {
                *at(settings) = match text {
                    "text" => LogFormat::Text,
                    "json" => LogFormat::Json,
                    _ => return None,
                }
            }
        }
        Some(())
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

fn show_time(time: Duration) -> String {
    humantime::format_duration(time).to_string()
}

/// Where a value came from, later ones overruling earlier ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    Default,
    File(PathBuf),
    /// The variable's name.
    Environment(String),
    /// The flag with its dashes.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => path.display().fmt(f),
            Self::Environment(name) | Self::Flag(name) => f.write_str(name),
        }
    }
}

/// Why there are no settings. Each says what to change.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the configuration file {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path} is not TOML: {message}")]
    Syntax { path: PathBuf, message: String },
    #[error("unknown setting {key:?} in {origin}; did you mean {nearest:?}?")]
    UnknownKey { origin: String, key: String, nearest: String },
    #[error("{key} = {value} (from {origin}): expected {allowed}")]
    BadValue { origin: Origin, key: &'static str, value: String, allowed: String },
    #[error("the value of {0} is not UTF-8")]
    NotUtf8(String),
    #[error(transparent)]
    Conflict(#[from] SettingsError),
}

/// The variables of this process that concern settings, the configuration file's name not among them.
pub fn environment() -> Result<Vec<(String, String)>, ConfigError> {
    let ours = |(name, value): (OsString, OsString)| {
        let name =
            name.into_string().ok().filter(|name| name.starts_with(ENV_PREFIX) && name != ENV_CONFIG)?;
        let value = value.into_string().map_err(|_| ConfigError::NotUtf8(name.clone()));
        Some(value.map(|value| (name, value)))
    };
    std::env::vars_os().filter_map(ours).collect()
}

/// Settings and where each came from.
#[derive(Debug)]
pub struct Loaded {
    pub settings: ServerSettings,
    /// One per entry of [`KEYS`].
    pub origins: Vec<Origin>,
}

impl Loaded {
    /// Puts the sources on top of one another. `environment` is what [`environment`] gives; `flags` are pairs of a flag name
    /// without dashes (one of [`Key::flag`]) and its value.
    pub fn new(
        file: Option<&Path>,
        environment: impl IntoIterator<Item = (String, String)>,
        flags: &[(String, String)],
    ) -> Result<Self, ConfigError> {
        let mut loaded =
            Self { settings: ServerSettings::default(), origins: vec![Origin::Default; KEYS.len()] };
        if let Some(path) = file {
            let text = std::fs::read_to_string(path)
                .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
            loaded.add_file(path, &text)?;
        }
        for (name, value) in environment {
            let index = find(&name, Key::env, || "the environment".to_owned())?;
            loaded.set(index, &value, Origin::Environment(name))?;
        }
        for (flag, value) in flags {
            let index = find(flag, Key::flag, || "the flags".to_owned())?;
            loaded.set(index, value, Origin::Flag(format!("--{flag}")))?;
        }
        loaded.settings.validate()?;
        Ok(loaded)
    }

    fn add_file(&mut self, path: &Path, text: &str) -> Result<(), ConfigError> {
        let table: toml::Table = text.parse().map_err(|error: toml::de::Error| ConfigError::Syntax {
            path: path.to_owned(),
            message: error.to_string().trim_end().to_owned(),
        })?;
        let mut entries = Vec::new();
        flatten("", table, &mut entries);
        for (name, value) in entries {
            let index = find(&name, |key| key.name.to_owned(), || path.display().to_string())?;
            let text = match value {
                toml::Value::String(text) => text,
                other => other.to_string(),
            };
            self.set(index, &text, Origin::File(path.to_owned()))?;
        }
        Ok(())
    }

    fn set(&mut self, index: usize, value: &str, origin: Origin) -> Result<(), ConfigError> {
        let key = &KEYS[index];
        if key.set(&mut self.settings, value).is_none() {
            let (key, allowed, value) = (key.name, key.allowed(), value.to_owned());
            return Err(ConfigError::BadValue { origin, key, value, allowed });
        }
        self.origins[index] = origin;
        Ok(())
    }
}

/// Turns nested tables into dotted names.
fn flatten(prefix: &str, table: toml::Table, entries: &mut Vec<(String, toml::Value)>) {
    for (name, value) in table {
        let name = if prefix.is_empty() { name } else { format!("{prefix}.{name}") };
        match value {
            toml::Value::Table(inner) => flatten(&name, inner, entries),
            value => entries.push((name, value)),
        }
    }
}

/// Position of the key whose `spelling` is `name`; otherwise the error names the nearest.
fn find(
    name: &str,
    spelling: impl Fn(&Key) -> String,
    origin: impl Fn() -> String,
) -> Result<usize, ConfigError> {
    if let Some(index) = KEYS.iter().position(|key| spelling(key) == name) {
        return Ok(index);
    }
    let nearest = KEYS
        .iter()
        .map(&spelling)
        .min_by_key(|known| strsim::damerau_levenshtein(known, name))
        .unwrap_or_default();
    Err(ConfigError::UnknownKey { origin: origin(), key: name.to_owned(), nearest })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(entries: &[(&str, &str)]) -> Vec<(String, String)> {
        entries.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn load(
        file: Option<&str>,
        environment: &[(&str, &str)],
        flags: &[(&str, &str)],
    ) -> Result<Loaded, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = file.map(|text| {
            let path = dir.path().join("felucca.toml");
            std::fs::write(&path, text).unwrap();
            path
        });
        Loaded::new(path.as_deref(), pairs(environment), &pairs(flags))
    }

    fn refused(file: &str) -> String {
        load(Some(file), &[], &[]).unwrap_err().to_string()
    }

    #[test]
    fn later_sources_overrule_earlier_ones() {
        let file =
            "max-headers = 1\nmax-connections = 1\nopen-files = 100\n[journal]\nsync-interval = \"7ms\"\n";
        let environment = [("FELUCCA_SERVER_MAX_CONNECTIONS", "2"), ("FELUCCA_SERVER_OPEN_FILES", "200")];
        let loaded = load(Some(file), &environment, &[("open-files", "300")]).unwrap();
        let settings = &loaded.settings;
        assert_eq!((settings.max_headers, settings.max_connections, settings.open_files), (1, 2, 300));
        assert_eq!(settings.journal.sync_interval, Duration::from_millis(7));
        assert_eq!(settings.max_frame_bytes, ByteSize::mib(16), "untouched ones keep their default");

        let origin =
            |name: &str| loaded.origins[KEYS.iter().position(|key| key.name == name).unwrap()].to_string();
        assert!(origin("max-headers").ends_with("felucca.toml"));
        assert_eq!(origin("max-connections"), "FELUCCA_SERVER_MAX_CONNECTIONS");
        assert_eq!(origin("open-files"), "--open-files");
        assert_eq!(origin("listen"), "default");
    }

    #[test]
    fn sizes_and_numbers_are_taken_as_toml_has_them() {
        let settings =
            load(Some("max-record-bytes = 4096\ninsecure = true\nlisten = \"0.0.0.0:0\""), &[], &[])
                .unwrap()
                .settings;
        assert_eq!(settings.max_record_bytes, ByteSize::kib(4));
        assert!(settings.insecure);
    }

    #[test]
    fn an_unknown_key_names_the_nearest_in_every_source() {
        let message = refused("[journal]\nsync-intervall = \"1s\"");
        assert!(message.contains("\"journal.sync-intervall\""), "{message}");
        assert!(message.contains("\"journal.sync-interval\""), "{message}");
        let message = refused("max_headers = 3");
        assert!(message.contains("\"max-headers\""), "{message}");
        let message = load(None, &[("FELUCCA_SERVER_LISTN", "x")], &[]).unwrap_err().to_string();
        assert!(message.contains("FELUCCA_SERVER_LISTEN"), "{message}");
    }

    #[test]
    fn an_impossible_value_names_key_value_and_range() {
        let message = refused("max-connections = 0");
        assert!(message.contains("max-connections = 0 (from"), "{message}");
        assert!(message.contains("from 1 to 1000000"), "{message}");
        let message = load(None, &[], &[("session-timeout", "10")]).unwrap_err().to_string();
        assert_eq!(message, "session-timeout = 10 (from --session-timeout): expected a time from 1s to 1h");
        for wrong in [
            "max-headers = -1",
            "listen = \"here\"",
            "log-format = \"xml\"",
            "data-dir = \"\"",
            "insecure = 1",
        ] {
            assert!(refused(wrong).contains("expected"), "{wrong}");
        }
        assert!(refused("max-headers = [1]").contains("[1]"));
        assert!(refused("max-headers = ").contains("is not TOML"));
        assert!(
            Loaded::new(Some(Path::new("/nonexistent/f.toml")), [], &[])
                .unwrap_err()
                .to_string()
                .contains("/nonexistent/f.toml")
        );
    }

    #[test]
    fn values_are_checked_against_each_other() {
        let message = refused("max-batch-bytes = \"64MiB\"");
        assert!(message.contains("max-frame-bytes"), "{message}");
        let message = load(None, &[], &[("listen", "0.0.0.0:7650")]).unwrap_err().to_string();
        assert!(message.contains("--insecure"), "{message}");
    }

    #[test]
    fn every_default_is_possible_and_reads_back() {
        let defaults = ServerSettings::default();
        for key in KEYS {
            let text = key.show(&defaults);
            let mut settings = defaults.clone();
            assert_eq!(key.set(&mut settings, &text), Some(()), "{} = {text}: {}", key.name, key.allowed());
            assert_eq!(settings, defaults, "{} = {text}", key.name);
        }
    }

    #[test]
    fn every_spelling_is_unique() {
        for spelling in [Key::env as fn(&Key) -> String, Key::flag, |key: &Key| key.name.to_owned()] {
            let mut names: Vec<String> = KEYS.iter().map(spelling).collect();
            names.sort();
            names.dedup();
            assert_eq!(names.len(), KEYS.len());
        }
    }
}
