//! `felucca topic`.

use std::collections::BTreeMap;

use clap::Subcommand;
use felucca_client::{Client, PartitionOffsets, Topic as Described, TopicKind};
use serde::Serialize;
use uuid::Uuid;

use super::output::{Column, Format, counted, print_json, print_line, print_table};
use super::parse::{Pair, borrowed};

#[derive(Debug, Subcommand)]
pub(super) enum Topic {
    /// Create a topic
    #[command(after_help = "\
Settings: cleanup.policy (delete, compact, or compact,delete), retention.ms, retention.bytes, delete.retention.ms,
min.compaction.lag.ms, max.compaction.lag.ms, min.cleanable.dirty.ratio, segment.bytes, segment.ms, allow-written, visibility.

Examples:
  felucca topic create orders --partitions 4
  felucca topic create clicks --partitions 8 --config allow-written=true --config segment.bytes=64MiB
  felucca topic create customers --config cleanup.policy=compact
  felucca topic create audit --config retention.ms=30days --config retention.bytes=10GiB")]
    Create {
        name: String,
        /// Number of partitions; records of one key stay in one partition
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..), value_name = "N")]
        partitions: u32,
        /// A setting of the topic; may be repeated
        #[arg(long, value_name = "KEY=VALUE")]
        config: Vec<Pair>,
    },
    /// List all topics
    #[command(after_help = "Example:\n  felucca topic list --output json")]
    List,
    /// Show settings and partitions of a topic
    #[command(after_help = "Example:\n  felucca topic describe orders")]
    Describe { name: String },
    /// Change settings of a topic
    #[command(after_help = "Example:\n  felucca topic alter orders --config segment.bytes=64MiB")]
    Alter {
        name: String,
        /// The new value of a setting; may be repeated
        #[arg(long, required = true, value_name = "KEY=VALUE")]
        config: Vec<Pair>,
    },
    /// Delete the oldest records of a partition, for every reader
    #[command(after_help = "\
Records that a share group has in hand stay until it is done with them; those that it was never given expire.

Example:
  felucca topic delete-records orders --partition 2 --before 1000")]
    DeleteRecords {
        name: String,
        #[arg(long, value_name = "N")]
        partition: u32,
        /// The first offset to keep, at most the high watermark
        #[arg(long, value_name = "OFFSET")]
        before: u64,
    },
    /// Delete a topic and its records
    #[command(after_help = "Example:\n  felucca topic delete orders")]
    Delete { name: String },
}

#[derive(Serialize)]
struct Shown<'a> {
    name: &'a str,
    id: String,
    partitions: u32,
    kind: &'static str,
    config: BTreeMap<&'a str, &'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    offsets: Option<Vec<Partition>>,
}

#[derive(Serialize)]
struct Partition {
    partition: u32,
    log_start: u64,
    high_watermark: u64,
    bytes: u64,
}

#[derive(Serialize)]
struct Deleted<'a> {
    topic: &'a str,
    partition: u32,
    log_start: u64,
}

fn show_id(id: &[u8]) -> String {
    Uuid::from_slice(id).map_or_else(|_| "-".to_owned(), |id| id.to_string())
}

fn kind(kind: TopicKind) -> &'static str {
    match kind {
        TopicKind::Standard => "standard",
        TopicKind::DeadLetter => "dead-letter",
        TopicKind::Redrive => "redrive",
    }
}

impl<'a> Shown<'a> {
    fn new(topic: &'a Described, offsets: Option<Vec<PartitionOffsets>>) -> Self {
        Self {
            name: &topic.name,
            id: show_id(&topic.id),
            partitions: topic.partitions,
            kind: kind(topic.kind),
            config: topic.config.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect(),
            offsets: offsets.map(|offsets| {
                offsets
                    .into_iter()
                    .map(|offsets| Partition {
                        partition: offsets.partition,
                        log_start: offsets.log_start,
                        high_watermark: offsets.high_watermark,
                        bytes: offsets.bytes,
                    })
                    .collect()
            }),
        }
    }
}

impl Topic {
    pub(super) async fn run(self, client: Client, format: Format) -> anyhow::Result<()> {
        let admin = client.admin();
        match self {
            Self::Create { name, partitions, config } => {
                let topic = admin.create_topic(&name, partitions, &borrowed(&config)).await?;
                done(&topic, format, "created")
            }
            Self::Alter { name, config } => {
                done(&admin.alter_topic(&name, &borrowed(&config)).await?, format, "changed")
            }
            Self::Delete { name } => done(&admin.delete_topic(&name).await?, format, "deleted"),
            Self::DeleteRecords { name, partition, before } => {
                let log_start = admin.delete_records(&name, partition, before).await?;
                deleted(&name, partition, log_start, format)
            }
            Self::List => list(&admin.topics().await?, format),
            Self::Describe { name } => {
                let topic = admin.topic(&name).await?;
                let offsets = admin.offsets(&name).await?;
                describe(&topic, offsets, format)
            }
        }
    }
}

fn deleted(topic: &str, partition: u32, log_start: u64, format: Format) -> anyhow::Result<()> {
    match format {
        Format::Json => print_json(&Deleted { topic, partition, log_start })?,
        Format::Table => {
            print_line(&format!("partition {partition} of topic {topic} starts at {log_start}"))?;
        }
    }
    Ok(())
}

fn done(topic: &Described, format: Format, what: &str) -> anyhow::Result<()> {
    match format {
        Format::Json => print_json(&Shown::new(topic, None))?,
        Format::Table => {
            let partitions = counted(topic.partitions.into(), "partition");
            print_line(&format!("{what} topic {} ({partitions})", topic.name))?;
        }
    }
    Ok(())
}

fn list(topics: &[Described], format: Format) -> anyhow::Result<()> {
    let shown = topics.iter().map(|topic| Shown::new(topic, None));
    match format {
        Format::Json => print_json(&shown.collect::<Vec<_>>())?,
        Format::Table => print_table(
            &[Column::Text("NAME"), Column::Number("PARTITIONS"), Column::Text("KIND"), Column::Text("ID")],
            shown
                .map(|topic| {
                    vec![topic.name.to_owned(), topic.partitions.to_string(), topic.kind.to_owned(), topic.id]
                })
                .collect(),
        )?,
    }
    Ok(())
}

fn describe(topic: &Described, offsets: Vec<PartitionOffsets>, format: Format) -> anyhow::Result<()> {
    let shown = Shown::new(topic, Some(offsets));
    if format == Format::Json {
        print_json(&shown)?;
        return Ok(());
    }
    print_line(&format!("topic  {}\nid     {}\nkind   {}", shown.name, shown.id, shown.kind))?;
    for (key, value) in &shown.config {
        print_line(&format!("config {key}={value}"))?;
    }
    print_line("")?;
    print_table(
        &[
            Column::Number("PARTITION"),
            Column::Number("LOG START"),
            Column::Number("HIGH WATERMARK"),
            Column::Number("BYTES"),
        ],
        shown
            .offsets
            .unwrap_or_default()
            .into_iter()
            .map(|one| {
                [u64::from(one.partition), one.log_start, one.high_watermark, one.bytes]
                    .map(|number| number.to_string())
                    .into()
            })
            .collect(),
    )?;
    Ok(())
}
