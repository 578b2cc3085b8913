//! `felucca group`.

use std::collections::{BTreeMap, BTreeSet};

use clap::Subcommand;
use felucca_broker::settings::ByteSize;
use felucca_client::{Client, GroupDescription, GroupKind, GroupListing, GroupPartition, SeekTo, ShareAlarm};
use serde::Serialize;

use super::output::{Column, Format, or_dash, print_json, print_line, print_table, show_millis};
use super::parse::{Pair, Place, borrowed};

#[derive(Debug, Subcommand)]
pub(super) enum Group {
    /// Create a share group, which works through its topics record by record
    #[command(after_help = "\
Settings: lease, max-lease, backoff-initial, backoff-max, backoff-multiplier, jitter, max-failures, max-deliveries,
ordering (none, key), on-exhausted (dead-letter, hold, discard), non-retryable-classes, outage-guard (on, off),
outage-window, outage-percent; and class.NAME.max-failures, class.NAME.backoff-initial, class.NAME.backoff-max for one error class.

A consumer group comes into being with its first member: felucca consume TOPIC --group NAME

Examples:
  felucca group create payment --share --topic orders --config ordering=key --config max-failures=5
  felucca group create email --share --topic orders --topic payments --from end")]
    Create {
        name: String,
        /// Share groups are the only kind that is created beforehand
        #[arg(long, required = true)]
        share: bool,
        /// A topic that the group works through; may be repeated
        #[arg(long = "topic", required = true, value_name = "TOPIC")]
        topics: Vec<String>,
        /// A setting of the group; may be repeated
        #[arg(long, value_name = "KEY=VALUE")]
        config: Vec<Pair>,
        /// Where the group starts: beginning or end
        #[arg(long, default_value = "beginning", value_parser = ["beginning", "end"], value_name = "PLACE")]
        from: String,
    },
    /// List all groups
    #[command(after_help = "Example:\n  felucca group list")]
    List,
    /// Show lag, leases, retries and dead letters of a group
    #[command(after_help = "Example:\n  felucca group describe payment --output json")]
    Describe { name: String },
    /// Change settings of a share group
    #[command(after_help = "Example:\n  felucca group alter payment --config max-failures=20")]
    Alter {
        name: String,
        /// The new value of a setting; may be repeated
        #[arg(long, required = true, value_name = "KEY=VALUE")]
        config: Vec<Pair>,
    },
    /// Delete a group without members
    #[command(after_help = "\
Records that were redriven to the group and that it has not worked through go with it; then --force is needed.

Example:
  felucca group delete payment")]
    Delete {
        name: String,
        /// Also when records go with it that nobody else has
        #[arg(long)]
        force: bool,
    },
    /// Hand out no new records until `resume`
    #[command(after_help = "Example:\n  felucca group pause payment")]
    Pause { name: String },
    /// Hand out records again
    #[command(after_help = "Example:\n  felucca group resume payment")]
    Resume { name: String },
    /// Try records that wait for their next attempt at once
    #[command(after_help = "\
Examples:
  felucca group kick payment
  felucca group kick payment --topic orders")]
    Kick {
        name: String,
        /// One of the group's topics only
        #[arg(long)]
        topic: Option<String>,
    },
    /// Try held records again, as if they had never failed
    #[command(after_help = "\
Examples:
  felucca group release-held payment
  felucca group release-held payment --topic orders")]
    ReleaseHeld {
        name: String,
        /// One of the group's topics only
        #[arg(long)]
        topic: Option<String>,
    },
    /// Settle held records as discarded
    #[command(after_help = "\
Examples:
  felucca group discard-held payment
  felucca group discard-held payment --topic orders")]
    DiscardHeld {
        name: String,
        /// One of the group's topics only
        #[arg(long)]
        topic: Option<String>,
    },
    /// Move a group to another place in a topic
    #[command(after_help = "\
Examples:
  felucca group seek payment --topic orders --to beginning
  felucca group seek audit --topic orders --partition 2 --to offset:1000
  felucca group seek audit --topic orders --to time:2026-03-01T12:00:00Z")]
    Seek {
        name: String,
        #[arg(long)]
        topic: String,
        /// One partition only
        #[arg(long, value_name = "N")]
        partition: Option<u32>,
        /// beginning, end, offset:N or time:RFC3339
        #[arg(long, value_name = "PLACE")]
        to: Place,
        /// Also when redriven records, or records whose dead letters are being made, are dropped
        #[arg(long)]
        force: bool,
    },
}

#[derive(Serialize)]
struct Listed<'a> {
    group: &'a str,
    kind: &'static str,
    members: u32,
    topics: &'a [String],
}

#[derive(Serialize)]
struct Shown<'a> {
    group: &'a str,
    kind: &'static str,
    paused: bool,
    /// Why it refuses to serve, if it does.
    corrupt: Option<&'a str>,
    /// While the outage guard is on.
    outage: Option<Outage>,
    config: BTreeMap<&'a str, &'a str>,
    #[serde(flatten)]
    totals: Counts,
    members: Vec<Member<'a>>,
    partitions: Vec<Partition<'a>>,
}

#[derive(Serialize)]
struct Outage {
    limit: u32,
    next_probe_ms: u64,
}

/// Of a partition, or of all together: sums, and the oldest one's age.
#[derive(Serialize, Default)]
struct Counts {
    lag: u64,
    oldest_unsettled_ms: Option<u64>,
    available: u64,
    leased: u64,
    scheduled: u64,
    held: u64,
    exhausted: u64,
    parked: u64,
    acked: u64,
    dead_lettered: u64,
    discarded: u64,
    skipped: u64,
    expired: u64,
    pinned_bytes: u64,
    deliveries: u64,
    failures: u64,
    /// Limits that are reached.
    alarms: BTreeSet<&'static str>,
    memory_bytes: u64,
}

impl Counts {
    fn add(&mut self, one: &GroupPartition) {
        self.lag += one.lag;
        self.oldest_unsettled_ms = self.oldest_unsettled_ms.max(one.oldest_unsettled_ms);
        self.available += one.available;
        self.leased += one.leased;
        self.scheduled += one.scheduled;
        self.held += one.held;
        self.exhausted += one.exhausted;
        self.parked += one.parked;
        self.acked += one.acked;
        self.dead_lettered += one.dead_lettered;
        self.discarded += one.discarded;
        self.skipped += one.skipped;
        self.expired += one.expired;
        self.pinned_bytes += one.pinned_bytes;
        self.deliveries += one.deliveries;
        self.failures += one.failures;
        self.alarms.extend(one.alarms().map(alarm));
        self.memory_bytes += one.memory_bytes;
    }

    fn of<'a>(partitions: impl IntoIterator<Item = &'a GroupPartition>) -> Self {
        let mut counts = Self::default();
        partitions.into_iter().for_each(|one| counts.add(one));
        counts
    }
}

#[derive(Serialize)]
struct Member<'a> {
    member: &'a str,
    partitions: usize,
    leased: u64,
}

#[derive(Serialize)]
struct Partition<'a> {
    topic: &'a str,
    partition: u32,
    log_start: u64,
    high_watermark: u64,
    position: Option<u64>,
    #[serde(flatten)]
    counts: Counts,
    /// While the next records cannot be read.
    unreadable: Option<Unreadable<'a>>,
}

#[derive(Serialize)]
struct Unreadable<'a> {
    offset: u64,
    reason: &'a str,
}

fn alarm(alarm: ShareAlarm) -> &'static str {
    match alarm {
        ShareAlarm::Leases => "leases",
        ShareAlarm::Exceptions => "exceptions",
        ShareAlarm::Span => "span",
        ShareAlarm::Memory => "memory",
        ShareAlarm::Unknown => "unknown",
    }
}

fn kind(kind: GroupKind) -> &'static str {
    match kind {
        GroupKind::Consumer => "consumer",
        GroupKind::Share => "share",
    }
}

impl Group {
    pub(super) async fn run(self, client: Client, format: Format) -> anyhow::Result<()> {
        let admin = client.admin();
        match self {
            Self::Create { name, share: _, topics, config, from } => {
                let topics: Vec<&str> = topics.iter().map(String::as_str).collect();
                let config = borrowed(&config);
                if from == "end" {
                    admin.create_share_group_at_end(&name, &topics, &config).await?;
                } else {
                    admin.create_share_group(&name, &topics, &config).await?;
                }
                done(&name, "created", format)
            }
            Self::Alter { name, config } => {
                admin.alter_share_group(&name, &borrowed(&config)).await?;
                done(&name, "changed", format)
            }
            Self::Delete { name, force } => {
                admin.delete_group(&name, force).await?;
                done(&name, "deleted", format)
            }
            Self::Pause { name } => {
                admin.pause_group(&name, true).await?;
                done(&name, "paused", format)
            }
            Self::Resume { name } => {
                admin.pause_group(&name, false).await?;
                done(&name, "resumed", format)
            }
            Self::Kick { name, topic } => {
                let records = admin.kick_group(&name, topic.as_deref()).await?;
                counted(&name, records, "are due now", format)
            }
            Self::ReleaseHeld { name, topic } => {
                let records = admin.release_held(&name, topic.as_deref()).await?;
                counted(&name, records, "are tried again", format)
            }
            Self::DiscardHeld { name, topic } => {
                let records = admin.discard_held(&name, topic.as_deref()).await?;
                counted(&name, records, "are discarded", format)
            }
            Self::Seek { name, topic, partition, to, force } => {
                let to = match to {
                    Place::Beginning => SeekTo::Beginning,
                    Place::End => SeekTo::End,
                    Place::Offset(offset) => SeekTo::Offset(offset),
                    Place::Time(millis) => SeekTo::Timestamp(millis),
                };
                admin.seek_group(&name, &topic, partition, to, force).await?;
                done(&name, "moved", format)
            }
            Self::List => list(&admin.groups().await?, format),
            Self::Describe { name } => describe(&admin.describe_group(&name).await?, format),
        }
    }
}

fn done(group: &str, what: &str, format: Format) -> anyhow::Result<()> {
    #[derive(Serialize)]
    struct Done<'a> {
        group: &'a str,
        done: &'a str,
    }
    match format {
        Format::Json => print_json(&Done { group, done: what })?,
        Format::Table => print_line(&format!("{what} group {group}"))?,
    }
    Ok(())
}

fn counted(group: &str, records: u64, what: &str, format: Format) -> anyhow::Result<()> {
    #[derive(Serialize)]
    struct Counted<'a> {
        group: &'a str,
        records: u64,
    }
    match format {
        Format::Json => print_json(&Counted { group, records })?,
        Format::Table => print_line(&format!("{records} records of group {group} {what}"))?,
    }
    Ok(())
}

fn list(groups: &[GroupListing], format: Format) -> anyhow::Result<()> {
    let listed = groups.iter().map(|group| Listed {
        group: &group.group,
        kind: kind(group.kind()),
        members: group.members,
        topics: &group.topics,
    });
    match format {
        Format::Json => print_json(&listed.collect::<Vec<_>>())?,
        Format::Table => print_table(
            &[Column::Text("GROUP"), Column::Text("KIND"), Column::Number("MEMBERS"), Column::Text("TOPICS")],
            listed
                .map(|row| {
                    vec![
                        row.group.to_owned(),
                        row.kind.to_owned(),
                        row.members.to_string(),
                        row.topics.join(", "),
                    ]
                })
                .collect(),
        )?,
    }
    Ok(())
}

impl<'a> Shown<'a> {
    fn new(group: &'a GroupDescription) -> Self {
        let members = group.members.iter().map(|member| Member {
            member: &member.member_id,
            partitions: member.assigned.len(),
            leased: member.leased,
        });
        let partitions = group.partitions.iter().map(|one| Partition {
            topic: &one.topic,
            partition: one.partition,
            log_start: one.log_start,
            high_watermark: one.high_watermark,
            position: one.position,
            counts: Counts::of([one]),
            unreadable: one
                .unreadable
                .as_ref()
                .map(|unreadable| Unreadable { offset: unreadable.offset, reason: &unreadable.reason }),
        });
        // The broker has them by topic id.
        let mut partitions: Vec<_> = partitions.collect();
        partitions.sort_by_key(|one| (one.topic, one.partition));
        Self {
            group: &group.group,
            kind: kind(group.kind()),
            paused: group.paused,
            corrupt: Some(group.corrupt.as_str()).filter(|reason| !reason.is_empty()),
            outage: group
                .outage
                .map(|outage| Outage { limit: outage.limit, next_probe_ms: outage.next_probe_ms }),
            config: group.config.iter().map(|entry| (entry.key.as_str(), entry.value.as_str())).collect(),
            totals: Counts::of(&group.partitions),
            members: members.collect(),
            partitions,
        }
    }
}

fn describe(group: &GroupDescription, format: Format) -> anyhow::Result<()> {
    let shown = Shown::new(group);
    if format == Format::Json {
        print_json(&shown)?;
        return Ok(());
    }
    let state = match (shown.corrupt, shown.paused) {
        (Some(reason), _) => format!("corrupt: {reason}"),
        (None, true) => "paused".to_owned(),
        (None, false) => "running".to_owned(),
    };
    print_line(&format!("group  {}\nkind   {}\nstate  {state}", shown.group, shown.kind))?;
    print_line(&format!("lag    {}", shown.totals.lag))?;
    print_line(&format!("oldest {}", or_dash(shown.totals.oldest_unsettled_ms.map(show_millis))))?;
    if shown.totals.pinned_bytes > 0 {
        print_line(&format!("pinned {} below the log start", ByteSize(shown.totals.pinned_bytes)))?;
    }
    if let Some(outage) = &shown.outage {
        let (limit, next) = (outage.limit, show_millis(outage.next_probe_ms));
        print_line(&format!("outage {limit} leases at a time, next probe in {next}"))?;
    }
    for alarm in &shown.totals.alarms {
        print_line(&format!("ALARM  {alarm}: the limit is reached, new records wait"))?;
    }
    for (one, unreadable) in
        shown.partitions.iter().filter_map(|one| one.unreadable.as_ref().map(|unreadable| (one, unreadable)))
    {
        let (topic, partition, offset) = (one.topic, one.partition, unreadable.offset);
        print_line(&format!(
            "ALARM  unreadable: {topic}/{partition} from {offset} on: {}",
            unreadable.reason
        ))?;
    }
    for (key, value) in &shown.config {
        print_line(&format!("config {key}={value}"))?;
    }
    print_line("")?;
    print_table(
        &[Column::Text("MEMBER"), Column::Number("PARTITIONS"), Column::Number("LEASED")],
        shown
            .members
            .iter()
            .map(|one| vec![one.member.to_owned(), one.partitions.to_string(), one.leased.to_string()])
            .collect(),
    )?;
    print_line("")?;
    print_table(
        &[
            Column::Text("TOPIC"),
            Column::Number("PARTITION"),
            Column::Number("POSITION"),
            Column::Number("HIGH WATERMARK"),
            Column::Number("LAG"),
            Column::Text("OLDEST"),
            Column::Number("LEASED"),
            Column::Number("SCHEDULED"),
            Column::Number("HELD"),
            Column::Number("DEAD-LETTERED"),
        ],
        shown
            .partitions
            .iter()
            .map(|one| {
                vec![
                    one.topic.to_owned(),
                    one.partition.to_string(),
                    or_dash(one.position),
                    one.high_watermark.to_string(),
                    one.counts.lag.to_string(),
                    or_dash(one.counts.oldest_unsettled_ms.map(show_millis)),
                    one.counts.leased.to_string(),
                    one.counts.scheduled.to_string(),
                    one.counts.held.to_string(),
                    one.counts.dead_lettered.to_string(),
                ]
            })
            .collect(),
    )?;
    Ok(())
}
