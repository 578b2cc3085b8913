//! `felucca dlq`: dead-letter topics. [`redrive`] has what gives their letters another chance.

mod redrive;

use std::io::Write;

use anyhow::bail;
use clap::{Args, Subcommand};
use felucca_client::{Client, DeadLetterTopic};
use redrive::{Jobs, Redrive};
use serde::Serialize;

use crate::cli::consume;
use crate::cli::output::{Column, Format, print_json, print_line, print_table};
use crate::cli::record;

#[derive(Debug, Subcommand)]
pub(super) enum Dlq {
    /// List dead-letter topics and how many dead letters wait in them
    #[command(after_help = "Examples:\n  felucca dlq list\n  felucca dlq list --group payment --output json")]
    List {
        /// Of one share group only
        #[arg(long)]
        group: Option<String>,
    },
    /// Print dead letters, also those redriven or purged that the log still holds
    ///
    /// Why a record was given up stands in its headers `__dlq.errors.*`.
    #[command(after_help = "Example:\n  felucca dlq show dlq.payment.orders --count 10")]
    Show {
        /// The dead-letter topic, as `dlq list` names it
        topic: String,
        /// At most so many
        #[arg(long, value_name = "N")]
        count: Option<u64>,
    },
    /// Give dead letters another chance: all that wait, or those that a filter chooses
    Redrive(Box<Redrive>),
    /// List redrives, pause, resume and cancel them
    #[command(subcommand)]
    Jobs(Jobs),
    /// Drop every waiting dead letter
    #[command(after_help = "Example:\n  felucca dlq purge dlq.payment.orders")]
    Purge {
        #[command(flatten)]
        which: Which,
    },
}

/// One dead-letter topic or all of a group.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(super) struct Which {
    /// The dead-letter topic, as `dlq list` names it
    topic: Option<String>,
    /// All dead-letter topics of a share group
    #[arg(long)]
    group: Option<String>,
}

#[derive(Serialize)]
struct Listed<'a> {
    topic: &'a str,
    group: &'a str,
    source_topic: &'a str,
    partitions: u32,
    pending: u64,
    redriven: u64,
    purged: u64,
}

#[derive(Serialize)]
struct Purged<'a> {
    topic: &'a str,
    purged: u64,
}

impl Dlq {
    /// Whether the broker answers only when it has gone through all dead letters.
    pub(super) fn is_long(&self) -> bool {
        matches!(self, Self::Purge { .. })
    }

    pub(super) async fn run(self, client: Client, format: Format) -> anyhow::Result<()> {
        match self {
            Self::List { group } => list(&client.admin().dead_letter_topics(group.as_deref()).await?, format),
            Self::Show { topic, count } => show(client, &topic, count, format).await,
            Self::Redrive(redrive) => redrive.run(&client, format).await,
            Self::Jobs(jobs) => jobs.run(&client, format).await,
            Self::Purge { which } => purge(&client, &which, format).await,
        }
    }
}

impl Which {
    /// The dead-letter topics that are meant: at least one.
    async fn find(&self, client: &Client) -> anyhow::Result<Vec<DeadLetterTopic>> {
        let mut found = client.admin().dead_letter_topics(self.group.as_deref()).await?;
        if let Some(topic) = &self.topic {
            found.retain(|one| one.topic == *topic);
        }
        match (&self.topic, &self.group) {
            _ if !found.is_empty() => Ok(found),
            (Some(topic), _) => bail!("{topic:?} is not a dead-letter topic; `felucca dlq list` names them"),
            (None, group) => {
                bail!("group {:?} has no dead-letter topics", group.as_deref().unwrap_or_default())
            }
        }
    }
}

fn list(topics: &[DeadLetterTopic], format: Format) -> anyhow::Result<()> {
    let listed = topics.iter().map(|one| Listed {
        topic: &one.topic,
        group: &one.group,
        source_topic: &one.source_topic,
        partitions: one.partitions,
        pending: one.pending,
        redriven: one.redriven,
        purged: one.purged,
    });
    match format {
        Format::Json => print_json(&listed.collect::<Vec<_>>())?,
        Format::Table => print_table(
            &[
                Column::Text("TOPIC"),
                Column::Text("GROUP"),
                Column::Text("SOURCE"),
                Column::Number("PENDING"),
                Column::Number("REDRIVEN"),
                Column::Number("PURGED"),
            ],
            listed
                .map(|one| {
                    vec![
                        one.topic.to_owned(),
                        one.group.to_owned(),
                        one.source_topic.to_owned(),
                        one.pending.to_string(),
                        one.redriven.to_string(),
                        one.purged.to_string(),
                    ]
                })
                .collect(),
        )?,
    }
    Ok(())
}

async fn show(client: Client, topic: &str, count: Option<u64>, format: Format) -> anyhow::Result<()> {
    Which { topic: Some(topic.to_owned()), group: None }.find(&client).await?;
    consume::read_all(client, topic, count, |out, record| {
        record::write(out, record, format)?;
        if format == Format::Table {
            for header in &record.headers {
                if let (Some(name), Some(value)) = (header.name.strip_prefix("__dlq.errors."), &header.value)
                {
                    writeln!(out, "    {name}: {}", String::from_utf8_lossy(value).escape_debug())?;
                }
            }
        }
        Ok(())
    })
    .await
}

async fn purge(client: &Client, which: &Which, format: Format) -> anyhow::Result<()> {
    for one in which.find(client).await? {
        let purged = client.admin().purge_dead_letters(&one.group, &one.source_topic).await?;
        match format {
            Format::Json => print_json(&Purged { topic: &one.topic, purged })?,
            Format::Table => print_line(&format!("{}: {purged} purged", one.topic))?,
        }
    }
    Ok(())
}
