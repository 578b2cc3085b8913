//! `felucca group`.

use std::collections::{BTreeMap, BTreeSet};

use clap::Subcommand;
use felucca_broker::settings::ByteSize;
use felucca_client::{Client, GroupDescription, GroupKind, GroupListing, SeekTo, ShareAlarm};
use serde::Serialize;

use super::output::{Column, Format, or_dash, print_json, print_line, print_table, show_millis};
use super::parse::{Pair, Place, borrowed};

#[derive(Debug, Subcommand)]
pub(super) enum Group {
    /// Create a share group, which works through its topics record by record
    #[command(after_help = "\
Settings: lease, max-lease, backoff-initial, backoff-max, backoff-multiplier, jitter, max-failures, max-deliveries,
ordering (none, key), on-exhausted (dead-letter, hold, discard), non-retryable-classes, outage-guard (on, off),
outage-window; and class.NAME.max-failures, class.NAME.backoff-initial, class.NAME.backoff-max for one error class.

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
    #[command(after_help = "Example:\n  felucca group delete payment")]
    Delete { name: String },
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
    /// While the outage guard is on.
    outage: Option<Outage>,
    config: BTreeMap<&'a str, &'a str>,
    #[serde(flatten)]
    totals: Totals,
    members: Vec<Member<'a>>,
    partitions: Vec<Partition<'a>>,
}

#[derive(Serialize)]
struct Outage {
    limit: u32,
    next_probe_ms: u64,
}

/// Sums over the partitions; the age is the oldest one's.
#[derive(Serialize, Default)]
struct Totals {
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
    /// Limits that some partition has reached.
    alarms: BTreeSet<&'static str>,
    memory_bytes: u64,
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
    alarms: Vec<&'static str>,
    memory_bytes: u64,
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
            Self::Delete { name } => {
                admin.delete_group(&name).await?;
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
                kicked(&name, records, format)
            }
            Self::Seek { name, topic, partition, to } => {
                let to = match to {
                    Place::Beginning => SeekTo::Beginning,
                    Place::End => SeekTo::End,
                    Place::Offset(offset) => SeekTo::Offset(offset),
                    Place::Time(millis) => SeekTo::Timestamp(millis),
                };
                admin.seek_group(&name, &topic, partition, to).await?;
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

fn kicked(group: &str, records: u64, format: Format) -> anyhow::Result<()> {
    #[derive(Serialize)]
    struct Kicked<'a> {
        group: &'a str,
        records: u64,
    }
    match format {
        Format::Json => print_json(&Kicked { group, records })?,
        Format::Table => print_line(&format!("{records} records of group {group} are due now"))?,
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
        let mut totals = Totals::default();
        for one in &group.partitions {
            totals.lag += one.lag;
            totals.oldest_unsettled_ms = totals.oldest_unsettled_ms.max(one.oldest_unsettled_ms);
            totals.available += one.available;
            totals.leased += one.leased;
            totals.scheduled += one.scheduled;
            totals.held += one.held;
            totals.exhausted += one.exhausted;
            totals.parked += one.parked;
            totals.acked += one.acked;
            totals.dead_lettered += one.dead_lettered;
            totals.discarded += one.discarded;
            totals.skipped += one.skipped;
            totals.expired += one.expired;
            totals.pinned_bytes += one.pinned_bytes;
            totals.deliveries += one.deliveries;
            totals.failures += one.failures;
            totals.alarms.extend(one.alarms().map(alarm));
            totals.memory_bytes += one.memory_bytes;
        }
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
            lag: one.lag,
            oldest_unsettled_ms: one.oldest_unsettled_ms,
            available: one.available,
            leased: one.leased,
            scheduled: one.scheduled,
            held: one.held,
            exhausted: one.exhausted,
            parked: one.parked,
            acked: one.acked,
            dead_lettered: one.dead_lettered,
            discarded: one.discarded,
            skipped: one.skipped,
            expired: one.expired,
            pinned_bytes: one.pinned_bytes,
            deliveries: one.deliveries,
            failures: one.failures,
            alarms: one.alarms().map(alarm).collect(),
            memory_bytes: one.memory_bytes,
        });
        // The broker has them by topic id.
        let mut partitions: Vec<_> = partitions.collect();
        partitions.sort_by_key(|one| (one.topic, one.partition));
        Self {
            group: &group.group,
            kind: kind(group.kind()),
            paused: group.paused,
            outage: group
                .outage
                .map(|outage| Outage { limit: outage.limit, next_probe_ms: outage.next_probe_ms }),
            config: group.config.iter().map(|entry| (entry.key.as_str(), entry.value.as_str())).collect(),
            totals,
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
    let state = if shown.paused { "paused" } else { "running" };
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
                    one.lag.to_string(),
                    or_dash(one.oldest_unsettled_ms.map(show_millis)),
                    one.leased.to_string(),
                    one.scheduled.to_string(),
                    one.held.to_string(),
                    one.dead_lettered.to_string(),
                ]
            })
            .collect(),
    )?;
    Ok(())
}
