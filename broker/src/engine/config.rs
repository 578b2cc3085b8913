//! Settings of topics and share groups: the keys, their ranges and defaults, and how text becomes a value.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::error::EngineError;
use super::event::ConfigEntry;
use super::types::Level;
use crate::byte_size::ByteSize;

/// Limits that hold for the whole engine. Plain values; the defaults are what a small server wants.
#[derive(Clone, Debug)]
pub struct EngineSettings {
    /// Size at which a partition goes on in a new segment, unless its topic says otherwise. Bytes.
    pub segment_bytes: u64,
    /// How often it is looked what retention wants deleted, and what is to be cleaned.
    pub retention_interval: Duration,
    /// Bytes below the log start that are kept of a partition for share groups; beyond it what they have in hand is copied
    /// aside.
    pub max_pinned_bytes: u64,
    /// A member of a group is lost when nothing was heard of it for so long.
    pub session_timeout: Duration,
    pub max_topics: u64,
    /// Of all topics together.
    pub max_partitions: u64,
    pub max_groups: u64,
    pub max_members_per_group: u64,
    /// Producers remembered per partition; the one that was silent longest is forgotten first.
    pub max_producers_per_partition: u64,
    /// Live leases of one group on one partition; at the limit nothing new is handed out.
    pub max_leases: u64,
    /// Returned records (scheduled, held, …) of one group on one partition; at the limit no new records are handed out.
    pub max_exceptions: u64,
    /// Offsets from the first undecided one of a group on a partition to the last one that is looked at; at the limit no new
    /// records are looked for.
    pub max_span: u64,
    /// Memory of all share groups together, in bytes; when it is spent only a few new records per partition are handed out.
    pub share_state_bytes: u64,
    /// Offsets of one key slot that a share group keeps behind the one that is worked on; the others are read again.
    pub max_parked_per_slot: usize,
}

impl Default for EngineSettings {
    fn default() -> Self {
        Self {
            segment_bytes: 256 << 20,
            retention_interval: Duration::from_secs(10),
            max_pinned_bytes: 1 << 30,
            session_timeout: Duration::from_secs(10),
            max_topics: 10_000,
            max_partitions: 100_000,
            max_groups: 20_000,
            max_members_per_group: 10_000,
            max_producers_per_partition: 10_000,
            max_leases: 100_000,
            max_exceptions: 2_000_000,
            max_span: 1 << 30,
            share_state_bytes: 1 << 30,
            max_parked_per_slot: 1024,
        }
    }
}

const TOPIC_KEYS: &[&str] = &[
    "cleanup.policy",
    "retention.ms",
    "retention.bytes",
    "delete.retention.ms",
    "min.compaction.lag.ms",
    "max.compaction.lag.ms",
    "min.cleanable.dirty.ratio",
    "segment.bytes",
    "segment.ms",
    "allow-written",
    "visibility",
];
/// For ever, or without bound.
const UNLIMITED: &str = "-1";

/// Settings of one topic. Those that Kafka has too are named as there.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TopicConfig {
    /// Records are deleted by age and by size.
    pub(crate) delete: bool,
    /// Of records with the same key only the latest is kept.
    pub(crate) compact: bool,
    /// How long records are kept at least, in milliseconds; `None` = for ever.
    pub(crate) retention_ms: Option<u64>,
    /// Bytes of the newest records that are kept of a partition at least; `None` = all.
    pub(crate) retention_bytes: Option<u64>,
    /// How long a tombstone stays at least once what it deletes is gone, in milliseconds.
    pub(crate) delete_retention_ms: u64,
    /// How long a record is left alone by compaction at least, in milliseconds.
    pub(crate) min_compaction_lag_ms: u64,
    /// After how long it is looked at in any case; `None` = never.
    pub(crate) max_compaction_lag_ms: Option<u64>,
    /// What part of a log must be new before it is compacted again.
    pub(crate) min_dirty_ratio: f64,
    pub(crate) segment_bytes: u64,
    /// A segment ends when its first record is older than that, so that it can be compacted.
    pub(crate) segment_ms: u64,
    /// Producers may ask for the level `written`.
    pub(crate) allow_written: bool,
    /// The level at which records become visible to readers.
    pub(crate) visibility: Level,
}

impl TopicConfig {
    pub(crate) fn new(settings: &EngineSettings) -> Self {
        Self {
            delete: true,
            compact: false,
            retention_ms: None,
            retention_bytes: None,
            delete_retention_ms: DAY_MS,
            min_compaction_lag_ms: 0,
            max_compaction_lag_ms: None,
            min_dirty_ratio: 0.5,
            segment_bytes: settings.segment_bytes,
            segment_ms: 7 * DAY_MS,
            allow_written: false,
            visibility: Level::Synced,
        }
    }

    /// What a dead-letter topic begins with.
    pub(crate) fn dead_letters(settings: &EngineSettings) -> Self {
        Self { retention_ms: Some(14 * DAY_MS), ..Self::new(settings) }
    }

    /// Applies `key=value` pairs; nothing is changed when one of them is refused.
    pub(crate) fn with(mut self, entries: &[(String, String)]) -> Result<Self, EngineError> {
        for (key, value) in entries {
            let limited = Some(value).filter(|value| *value != UNLIMITED);
            let lag = |value: &String| parse_millis(key, value, 0, 3_650 * DAY_MS);
            match key.as_str() {
                "cleanup.policy" => {
                    let choices = [
                        ("delete", (true, false)),
                        ("compact", (false, true)),
                        ("compact,delete", (true, true)),
                        ("delete,compact", (true, true)),
                    ];
                    (self.delete, self.compact) = parse_choice(key, value, &choices)?;
                }
                "retention.ms" => {
                    let parse = |value: &String| parse_millis(key, value, 60_000, 3_650 * DAY_MS);
                    self.retention_ms = limited.map(parse).transpose()?;
                }
                "retention.bytes" => {
                    let most = ByteSize::gib(1 << 20);
                    let parse = |value: &String| parse_bytes(key, value, ByteSize::kib(64), most);
                    self.retention_bytes = limited.map(parse).transpose()?;
                }
                "delete.retention.ms" => self.delete_retention_ms = lag(value)?,
                "min.compaction.lag.ms" => self.min_compaction_lag_ms = lag(value)?,
                "max.compaction.lag.ms" => self.max_compaction_lag_ms = limited.map(lag).transpose()?,
                "min.cleanable.dirty.ratio" => self.min_dirty_ratio = parse_number(key, value, 0.0, 1.0)?,
                "segment.bytes" => {
                    self.segment_bytes = parse_bytes(key, value, ByteSize::kib(64), ByteSize::gib(1))?;
                }
                "segment.ms" => self.segment_ms = parse_millis(key, value, 1_000, 3_650 * DAY_MS)?,
                "allow-written" => {
                    self.allow_written = parse_choice(key, value, &[("true", true), ("false", false)])?;
                }
                "visibility" => {
                    self.visibility =
                        parse_choice(key, value, &[("synced", Level::Synced), ("written", Level::Written)])?;
                }
                _ => return Err(unknown_key("topic", key, TOPIC_KEYS)),
            }
        }
        if self.visibility == Level::Written && !self.allow_written {
            return Err(EngineError::InvalidConfig("visibility=written needs allow-written=true".to_owned()));
        }
        if self.max_compaction_lag_ms.is_some_and(|most| most < self.min_compaction_lag_ms) {
            let why = "max.compaction.lag.ms is below min.compaction.lag.ms";
            return Err(EngineError::InvalidConfig(why.to_owned()));
        }
        Ok(self)
    }

    pub(crate) fn entries(&self) -> Vec<(String, String)> {
        let limit =
            |limit: Option<u64>| limit.map_or_else(|| UNLIMITED.to_owned(), |limit| limit.to_string());
        let policy = match (self.compact, self.delete) {
            (false, _) => "delete",
            (true, false) => "compact",
            (true, true) => "compact,delete",
        };
        [
            ("cleanup.policy", policy.to_owned()),
            ("retention.ms", limit(self.retention_ms)),
            ("retention.bytes", limit(self.retention_bytes)),
            ("delete.retention.ms", self.delete_retention_ms.to_string()),
            ("min.compaction.lag.ms", self.min_compaction_lag_ms.to_string()),
            ("max.compaction.lag.ms", limit(self.max_compaction_lag_ms)),
            ("min.cleanable.dirty.ratio", self.min_dirty_ratio.to_string()),
            ("segment.bytes", self.segment_bytes.to_string()),
            ("segment.ms", self.segment_ms.to_string()),
            ("allow-written", self.allow_written.to_string()),
            ("visibility", if self.visibility == Level::Synced { "synced" } else { "written" }.to_owned()),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into()
    }
}

/// What becomes of a record that is not tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnExhausted {
    DeadLetter,
    /// Kept in place; in key-ordered mode its key stays blocked.
    Hold,
    Discard,
}

/// Settings of one share group.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ShareConfig {
    pub(crate) lease_ms: u64,
    pub(crate) max_lease_ms: u64,
    pub(crate) backoff_initial_ms: u64,
    pub(crate) backoff_max_ms: u64,
    pub(crate) backoff_multiplier: f64,
    pub(crate) jitter: f64,
    pub(crate) max_failures: u32,
    pub(crate) max_deliveries: u32,
    /// `ordering=key`: records of one key never overtake each other.
    pub(crate) ordered: bool,
    pub(crate) on_exhausted: OnExhausted,
    /// Error classes that end a record at once.
    pub(crate) non_retryable: Vec<String>,
    /// What holds for failures of one class instead of the group's own settings.
    pub(crate) classes: BTreeMap<String, ClassConfig>,
    /// Whether an outage of what the handlers depend on is told from bad records.
    pub(crate) outage_guard: bool,
    /// Outcomes that it looks at.
    pub(crate) outage_window: u32,
    /// It comes on when more of them failed than that, in percent.
    pub(crate) outage_percent: u32,
}

/// Settings of one error class; what is absent is the group's.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct ClassConfig {
    max_failures: Option<u32>,
    backoff_initial_ms: Option<u64>,
    backoff_max_ms: Option<u64>,
}

/// What holds for failures of a class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RetryLaw {
    pub(crate) max_failures: u32,
    backoff_initial_ms: u64,
    backoff_max_ms: u64,
}

impl Default for ShareConfig {
    fn default() -> Self {
        Self {
            lease_ms: 30_000,
            max_lease_ms: 12 * 3_600_000,
            backoff_initial_ms: 1_000,
            backoff_max_ms: 300_000,
            backoff_multiplier: 2.0,
            jitter: 0.2,
            max_failures: 10,
            max_deliveries: 100,
            ordered: false,
            on_exhausted: OnExhausted::DeadLetter,
            non_retryable: Vec::new(),
            classes: BTreeMap::new(),
            outage_guard: true,
            outage_window: 100,
            outage_percent: 80,
        }
    }
}

const DAY_MS: u64 = 24 * 3_600_000;
/// Highest limit of failures and deliveries that can be set.
const MAX_FAILURES: u32 = 1_000_000;

const SHARE_KEYS: &[&str] = &[
    "lease",
    "max-lease",
    "backoff-initial",
    "backoff-max",
    "backoff-multiplier",
    "jitter",
    "max-failures",
    "max-deliveries",
    "ordering",
    "on-exhausted",
    "non-retryable-classes",
    "outage-guard",
    "outage-window",
    "outage-percent",
];
const CLASS_KEYS: &[&str] = &["max-failures", "backoff-initial", "backoff-max"];
/// Longest time between a failure and the next attempt, whoever asks for it.
pub(crate) const MAX_BACKOFF_MS: u64 = 7 * DAY_MS;
/// Error classes with settings of their own, those that are not retryable, and longest name of one in bytes.
const MAX_CLASSES: usize = 64;
const MAX_CLASS_BYTES: usize = 128;
/// What a setting of a class is given to be the group's again.
const INHERIT: &str = "inherit";

impl ShareConfig {
    /// Applies `key=value` pairs; nothing is changed when one of them is refused.
    pub(crate) fn with(mut self, entries: &[(String, String)]) -> Result<Self, EngineError> {
        for (key, value) in entries {
            match key.as_str() {
                "lease" => self.lease_ms = parse_millis(key, value, 100, 12 * 3_600_000)?,
                "max-lease" => self.max_lease_ms = parse_millis(key, value, 1_000, 7 * DAY_MS)?,
                "backoff-initial" => self.backoff_initial_ms = parse_millis(key, value, 0, DAY_MS)?,
                "backoff-max" => self.backoff_max_ms = parse_millis(key, value, 0, MAX_BACKOFF_MS)?,
                "backoff-multiplier" => self.backoff_multiplier = parse_number(key, value, 1.0, 100.0)?,
                "jitter" => self.jitter = parse_number(key, value, 0.0, 1.0)?,
                "max-failures" => self.max_failures = parse_number(key, value, 1, MAX_FAILURES)?,
                "max-deliveries" => self.max_deliveries = parse_number(key, value, 1, MAX_FAILURES)?,
                "ordering" => self.ordered = parse_choice(key, value, &[("none", false), ("key", true)])?,
                "on-exhausted" => {
                    self.on_exhausted = parse_choice(
                        key,
                        value,
                        &[
                            ("dead-letter", OnExhausted::DeadLetter),
                            ("hold", OnExhausted::Hold),
                            ("discard", OnExhausted::Discard),
                        ],
                    )?;
                }
                "non-retryable-classes" => self.non_retryable = parse_classes(key, value)?,
                "outage-guard" => {
                    self.outage_guard = parse_choice(key, value, &[("on", true), ("off", false)])?;
                }
                "outage-window" => self.outage_window = parse_number(key, value, 10, 100)?,
                "outage-percent" => self.outage_percent = parse_number(key, value, 50, 99)?,
                _ => match key.strip_prefix("class.").and_then(|rest| rest.rsplit_once('.')) {
                    Some((class, setting)) => self.set_class(key, class, setting, value)?,
                    None => return Err(unknown_key("share group", key, SHARE_KEYS)),
                },
            }
        }
        for class in self.classes.keys() {
            let law = self.law(class);
            if law.backoff_max_ms < law.backoff_initial_ms {
                let why = format!("class.{class}.backoff-max is below class.{class}.backoff-initial");
                return Err(EngineError::InvalidConfig(why));
            }
        }
        if self.backoff_max_ms < self.backoff_initial_ms {
            return Err(EngineError::InvalidConfig("backoff-max is below backoff-initial".to_owned()));
        }
        if self.max_lease_ms < self.lease_ms {
            return Err(EngineError::InvalidConfig("max-lease is below lease".to_owned()));
        }
        Ok(self)
    }

    fn set_class(&mut self, key: &str, class: &str, setting: &str, value: &str) -> Result<(), EngineError> {
        if class.is_empty() || class.len() > MAX_CLASS_BYTES || class.contains(char::is_whitespace) {
            let wanted = format!("the class is 1 to {MAX_CLASS_BYTES} bytes without spaces");
            return Err(invalid(key, value, &wanted));
        }
        if !self.classes.contains_key(class) && self.classes.len() >= MAX_CLASSES {
            let why = format!("{key}: at most {MAX_CLASSES} classes have settings of their own");
            return Err(EngineError::InvalidConfig(why));
        }
        let entry = self.classes.entry(class.to_owned()).or_default();
        let given = Some(value).filter(|value| *value != INHERIT);
        match setting {
            "max-failures" => {
                entry.max_failures =
                    given.map(|value| parse_number(key, value, 1, MAX_FAILURES)).transpose()?;
            }
            "backoff-initial" => {
                entry.backoff_initial_ms =
                    given.map(|value| parse_millis(key, value, 0, DAY_MS)).transpose()?;
            }
            "backoff-max" => {
                entry.backoff_max_ms =
                    given.map(|value| parse_millis(key, value, 0, 7 * DAY_MS)).transpose()?;
            }
            _ => return Err(unknown_key("class", setting, CLASS_KEYS)),
        }
        if *entry == ClassConfig::default() {
            self.classes.remove(class);
        }
        Ok(())
    }

    /// What holds for failures of this class.
    pub(crate) fn law(&self, class: &str) -> RetryLaw {
        let own = self.classes.get(class).cloned().unwrap_or_default();
        RetryLaw {
            max_failures: own.max_failures.unwrap_or(self.max_failures),
            backoff_initial_ms: own.backoff_initial_ms.unwrap_or(self.backoff_initial_ms),
            backoff_max_ms: own.backoff_max_ms.unwrap_or(self.backoff_max_ms),
        }
    }

    pub(crate) fn entries(&self) -> Vec<(String, String)> {
        let millis = |ms: u64| humantime::format_duration(Duration::from_millis(ms)).to_string();
        let on_exhausted = match self.on_exhausted {
            OnExhausted::DeadLetter => "dead-letter",
            OnExhausted::Hold => "hold",
            OnExhausted::Discard => "discard",
        };
        let own = [
            ("lease", millis(self.lease_ms)),
            ("max-lease", millis(self.max_lease_ms)),
            ("backoff-initial", millis(self.backoff_initial_ms)),
            ("backoff-max", millis(self.backoff_max_ms)),
            ("backoff-multiplier", self.backoff_multiplier.to_string()),
            ("jitter", self.jitter.to_string()),
            ("max-failures", self.max_failures.to_string()),
            ("max-deliveries", self.max_deliveries.to_string()),
            ("ordering", if self.ordered { "key" } else { "none" }.to_owned()),
            ("on-exhausted", on_exhausted.to_owned()),
            ("non-retryable-classes", self.non_retryable.join(" ")),
            ("outage-guard", if self.outage_guard { "on" } else { "off" }.to_owned()),
            ("outage-window", self.outage_window.to_string()),
            ("outage-percent", self.outage_percent.to_string()),
        ]
        .map(|(key, value)| (key.to_owned(), value));
        let classes = self.classes.iter().flat_map(|(class, own)| {
            let named = |setting: &str| format!("class.{class}.{setting}");
            [
                own.max_failures.map(|count| (named("max-failures"), count.to_string())),
                own.backoff_initial_ms.map(|ms| (named("backoff-initial"), millis(ms))),
                own.backoff_max_ms.map(|ms| (named("backoff-max"), millis(ms))),
            ]
        });
        own.into_iter().chain(classes.flatten()).collect()
    }

    pub(crate) fn is_non_retryable(&self, class: &str) -> bool {
        !class.is_empty() && self.non_retryable.iter().any(|declared| declared == class)
    }

    /// The wait before the attempt after the `failures`-th failure:
    /// `min(max, initial · multiplier^(failures-1)) · U(1-jitter, 1+jitter)`, milliseconds.
    pub(crate) fn backoff_ms(&self, law: RetryLaw, failures: u32, entropy: u64) -> u64 {
        let exponent = failures.saturating_sub(1).min(1_000);
        let grown = law.backoff_initial_ms as f64 * self.backoff_multiplier.powi(exponent.cast_signed());
        let base = grown.min(law.backoff_max_ms as f64);
        // 53 bits make a uniform fraction in 0..1.
        let fraction = (mix(entropy) >> 11) as f64 / (1_u64 << 53) as f64;
        (base * (1.0 - self.jitter + 2.0 * self.jitter * fraction)).round() as u64
    }
}

/// Derives independent bits from given ones (the finalizer of SplitMix64, Steele et al. 2014).
pub(crate) fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

pub(crate) fn to_entries(config: &[(String, String)]) -> Vec<ConfigEntry> {
    config.iter().map(|(key, value)| ConfigEntry { key: key.clone(), value: value.clone() }).collect()
}

pub(crate) fn from_entries(entries: &[ConfigEntry]) -> Vec<(String, String)> {
    entries.iter().map(|entry| (entry.key.clone(), entry.value.clone())).collect()
}

fn invalid(key: &str, value: &str, wanted: &str) -> EngineError {
    EngineError::InvalidConfig(format!("{key}={value}: {wanted}"))
}

fn unknown_key(what: &str, key: &str, known: &[&str]) -> EngineError {
    let nearest = known.iter().min_by_key(|candidate| strsim::damerau_levenshtein(key, candidate));
    let hint = nearest.map(|nearest| format!("; did you mean {nearest:?}?")).unwrap_or_default();
    EngineError::InvalidConfig(format!("unknown {what} setting {key:?}{hint}"))
}

fn parse_choice<T: Copy>(key: &str, value: &str, choices: &[(&str, T)]) -> Result<T, EngineError> {
    choices.iter().find(|(name, _)| *name == value).map(|(_, choice)| *choice).ok_or_else(|| {
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        invalid(key, value, &format!("expected one of {}", names.join(", ")))
    })
}

fn parse_number<T: std::str::FromStr + PartialOrd + std::fmt::Display>(
    key: &str,
    value: &str,
    min: T,
    max: T,
) -> Result<T, EngineError> {
    match value.parse::<T>() {
        Ok(number) if number >= min && number <= max => Ok(number),
        _ => Err(invalid(key, value, &format!("expected a number from {min} to {max}"))),
    }
}

/// Distinct classes, separated by spaces.
fn parse_classes(key: &str, value: &str) -> Result<Vec<String>, EngineError> {
    let classes: BTreeSet<&str> = value.split_whitespace().collect();
    if classes.len() > MAX_CLASSES || classes.iter().any(|class| class.len() > MAX_CLASS_BYTES) {
        let wanted = format!("at most {MAX_CLASSES} classes, of up to {MAX_CLASS_BYTES} bytes each");
        return Err(invalid(key, value, &wanted));
    }
    Ok(classes.into_iter().map(str::to_owned).collect())
}

fn parse_millis(key: &str, value: &str, min: u64, max: u64) -> Result<u64, EngineError> {
    let timed = || humantime::parse_duration(value).ok();
    let plain = || value.parse().ok().filter(|_| key.ends_with(".ms"));
    let millis = plain().or_else(|| timed().and_then(|duration| u64::try_from(duration.as_millis()).ok()));
    match millis {
        Some(millis) if millis >= min && millis <= max => Ok(millis),
        _ => {
            let shown = |ms| humantime::format_duration(Duration::from_millis(ms)).to_string();
            Err(invalid(
                key,
                value,
                &format!("expected a time such as 500ms, 30s or 5m, from {} to {}", shown(min), shown(max)),
            ))
        }
    }
}

fn parse_bytes(key: &str, value: &str, min: ByteSize, max: ByteSize) -> Result<u64, EngineError> {
    match value.parse::<ByteSize>() {
        Ok(size) if size >= min && size <= max => Ok(size.0),
        _ => {
            Err(invalid(key, value, &format!("expected a size such as 512KiB or 64MiB, from {min} to {max}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(entries: &[(&str, &str)]) -> Vec<(String, String)> {
        entries.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn backoff_grows_to_its_bound_and_stays_within_jitter() {
        let config = ShareConfig::default();
        for (failures, base) in
            [(1, 1_000.0), (2, 2_000.0), (5, 16_000.0), (30, 300_000.0), (u32::MAX, 300_000.0)]
        {
            for seed in 0..200 {
                let delay = config.backoff_ms(config.law(""), failures, seed) as f64;
                assert!(delay >= base * 0.8 - 1.0 && delay <= base * 1.2 + 1.0, "{failures}: {delay}");
            }
        }
    }

    #[test]
    fn settings_survive_a_round_trip_through_text() {
        let config = ShareConfig::default()
            .with(&pairs(&[
                ("lease", "45s"),
                ("jitter", "0.5"),
                ("ordering", "key"),
                ("on-exhausted", "hold"),
                ("outage-guard", "off"),
                ("outage-percent", "55"),
                ("class.gateway.timeout.max-failures", "50"),
                ("class.gateway.timeout.backoff-max", "1h"),
            ]))
            .unwrap();
        assert_eq!(ShareConfig::default().with(&config.entries()).unwrap(), config);
        let topic = TopicConfig::new(&EngineSettings::default())
            .with(&pairs(&[
                ("cleanup.policy", "compact,delete"),
                ("segment.bytes", "1MiB"),
                ("allow-written", "true"),
                ("visibility", "written"),
                ("retention.ms", "30days"),
                ("retention.bytes", "3GiB"),
                ("min.compaction.lag.ms", "60000"),
                ("max.compaction.lag.ms", "3h"),
                ("min.cleanable.dirty.ratio", "0.25"),
            ]))
            .unwrap();
        assert_eq!((topic.min_compaction_lag_ms, topic.max_compaction_lag_ms), (60_000, Some(10_800_000)));
        assert_eq!(TopicConfig::new(&EngineSettings::default()).with(&topic.entries()).unwrap(), topic);
    }

    #[test]
    fn a_class_has_settings_of_its_own_until_it_inherits_again() {
        let config = ShareConfig::default().with(&pairs(&[("class.io.max-failures", "3")])).unwrap();
        assert_eq!((config.law("io").max_failures, config.law("cpu").max_failures), (3, 10));
        assert_eq!(config.law("io").backoff_initial_ms, config.backoff_initial_ms);
        let config = config.with(&pairs(&[("class.io.max-failures", "inherit")])).unwrap();
        assert_eq!(config, ShareConfig::default());
        let many: Vec<(String, String)> =
            (0..65).map(|i| (format!("class.c{i}.max-failures"), "2".to_owned())).collect();
        assert!(ShareConfig::default().with(&many).unwrap_err().to_string().contains("at most 64"));
    }

    #[test]
    fn topic_settings_are_refused_where_they_contradict_each_other() {
        let given = |entries: &[(&str, &str)]| {
            TopicConfig::new(&EngineSettings::default())
                .with(&pairs(entries))
                .map_err(|error| error.to_string())
        };
        let forever =
            given(&[("retention.ms", "1h"), ("retention.ms", "-1"), ("retention.bytes", "-1")]).unwrap();
        assert_eq!((forever.retention_ms, forever.retention_bytes), (None, None));
        assert!(given(&[("retention.ms", "12")]).unwrap_err().contains("from 1m to"));
        assert!(given(&[("retention", "1h")]).unwrap_err().contains("retention.ms"));
        assert!(given(&[("cleanup.policy", "shrink")]).unwrap_err().contains("compact,delete"));
        let lags = [("min.compaction.lag.ms", "10s"), ("max.compaction.lag.ms", "9s")];
        assert!(given(&lags).unwrap_err().contains("is below"));
    }

    #[test]
    fn refusals_name_the_key_and_what_is_allowed() {
        let refused =
            |entries: &[(&str, &str)]| ShareConfig::default().with(&pairs(entries)).unwrap_err().to_string();
        assert!(refused(&[("max-failure", "3")]).contains("max-failures"));
        assert!(refused(&[("jitter", "2")]).contains("from 0 to 1"));
        assert!(refused(&[("lease", "soon")]).contains("lease=soon"));
        assert!(refused(&[("ordering", "keys")]).contains("none, key"));
        assert!(refused(&[("outage-guard", "maybe")]).contains("on, off"));
        assert!(refused(&[("outage-window", "5")]).contains("from 10 to 100"));
        assert!(refused(&[("outage-percent", "100")]).contains("from 50 to 99"));
        assert!(refused(&[("class.io.max-failure", "3")]).contains("max-failures"));
        assert!(refused(&[("class..max-failures", "3")]).contains("1 to 128 bytes"));
        assert!(refused(&[("class.io.backoff-initial", "1h")]).contains("class.io.backoff-max is below"));
    }
}
