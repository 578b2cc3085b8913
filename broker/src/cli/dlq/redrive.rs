//! `felucca dlq redrive` and `felucca dlq jobs`.

use clap::{Args, Subcommand};
use felucca_client::{Client, Redrive as Job, RedriveAction, RedriveSpec, RedriveState, RedriveTarget};
use serde::Serialize;

use super::Which;
use crate::cli::output::{Column, Format, print_json, print_line, print_table};

#[derive(Debug, Args)]
#[command(after_help = "\
A redrive is about the dead letters that are there when it begins. The broker carries it out by itself, also when this command is
interrupted and when the broker is restarted; `felucca dlq jobs` shows it. The same command with the same --id is the same redrive.

Examples:
  felucca dlq redrive dlq.payment.orders --dry-run
  felucca dlq redrive --group payment --to source
  felucca dlq redrive dlq.payment.orders --class gateway-down --rate 100
  felucca dlq redrive dlq.payment.orders --to orders-fixed --limit 10 --id trial")]
pub(crate) struct Redrive {
    #[command(flatten)]
    which: Which,
    /// Who sees the records again: `group`, the failing group only; `source`, all readers of the source topic; or another topic
    #[arg(long, default_value = "group", value_name = "TARGET")]
    to: String,
    /// Only letters of this error class
    #[arg(long, default_value = "", hide_default_value = true)]
    class: String,
    /// Only letters with this reason: rejected, max_failures, max_deliveries, lease_expired, member_lost
    #[arg(long, default_value = "", hide_default_value = true)]
    reason: String,
    /// Only letters with this key
    #[arg(long)]
    key: Option<String>,
    /// Only what was given up from this time on, as RFC3339
    #[arg(long, value_name = "TIME")]
    since: Option<jiff::Timestamp>,
    /// Only what was given up before this time, as RFC3339
    #[arg(long, value_name = "TIME")]
    until: Option<jiff::Timestamp>,
    /// Only this partition of the dead-letter topic
    #[arg(long, value_name = "N")]
    partition: Option<u32>,
    /// Only letters from this offset on
    #[arg(long, value_name = "OFFSET", default_value_t = 0, requires = "partition")]
    from_offset: u64,
    /// Only letters before this offset
    #[arg(long, value_name = "OFFSET", requires = "partition")]
    until_offset: Option<u64>,
    /// At most so many of each topic
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    limit: u64,
    /// At most so many in a second
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    rate: u32,
    /// Also letters that were redriven three times before
    #[arg(long)]
    force: bool,
    /// Move nothing, and say what would be moved
    #[arg(long)]
    dry_run: bool,
    /// A name for the redrive, so that the command can be repeated; with --group each topic's name is added
    #[arg(long)]
    id: Option<String>,
    /// Do not wait for the end
    #[arg(long)]
    detach: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Jobs {
    /// List redrives: those that are open, and the last thousand that have ended
    List {
        /// Of one share group only
        #[arg(long)]
        group: Option<String>,
    },
    /// Stop moving letters until it is resumed
    Pause { id: String },
    /// Go on where it was paused, or where it failed
    Resume { id: String },
    /// End it; what was moved stays moved
    Cancel { id: String },
}

#[derive(Serialize)]
struct Shown<'a> {
    id: &'a str,
    topic: String,
    target: String,
    state: &'static str,
    failure: &'a str,
    examined: u64,
    moved: u64,
    refused: u64,
    left: u64,
    created_ms: i64,
    changed_ms: i64,
}

impl Redrive {
    pub(super) async fn run(self, client: &Client, format: Format) -> anyhow::Result<()> {
        let admin = client.admin();
        let topics = self.which.find(client).await?;
        let several = topics.len() > 1;
        for one in topics {
            let spec = self.spec(&one.group, &one.source_topic);
            if self.dry_run {
                say(&admin.preview_redrive(spec).await?, "would be redriven", format)?;
                continue;
            }
            let id = match &self.id {
                Some(id) if several => format!("{id}.{}", one.source_topic),
                Some(id) => id.clone(),
                None => uuid::Uuid::new_v4().to_string(),
            };
            let mut job = admin.start_redrive(&id, spec).await?;
            if !self.detach {
                admin.finished_redrive(&id).await?;
                job = admin.start_redrive(&id, job.spec.take().unwrap_or_default()).await?;
            }
            say(&job, "redriven", format)?;
        }
        Ok(())
    }

    fn spec(&self, group: &str, source_topic: &str) -> RedriveSpec {
        let (target, topic) = match self.to.as_str() {
            "group" => (RedriveTarget::Group, ""),
            "source" => (RedriveTarget::Source, ""),
            topic => (RedriveTarget::Topic, topic),
        };
        RedriveSpec {
            group: group.to_owned(),
            source_topic: source_topic.to_owned(),
            target: target.into(),
            topic: topic.to_owned(),
            class: self.class.clone(),
            reason: self.reason.clone(),
            key: self.key.clone().map(Into::into),
            from_ms: self.since.map(jiff::Timestamp::as_millisecond),
            until_ms: self.until.map(jiff::Timestamp::as_millisecond),
            partition: self.partition,
            from_offset: self.from_offset,
            until_offset: self.until_offset,
            limit: self.limit,
            rate: self.rate,
            force: self.force,
        }
    }
}

impl Jobs {
    pub(super) async fn run(self, client: &Client, format: Format) -> anyhow::Result<()> {
        let admin = client.admin();
        let (id, action) = match self {
            Self::List { group } => {
                let mut jobs = admin.redrives(group.as_deref()).await?;
                jobs.sort_by(|a, b| (a.created_ms, &a.id).cmp(&(b.created_ms, &b.id)));
                return list(&jobs, format);
            }
            Self::Pause { id } => (id, RedriveAction::Pause),
            Self::Resume { id } => (id, RedriveAction::Resume),
            Self::Cancel { id } => (id, RedriveAction::Cancel),
        };
        list(&[admin.alter_redrive(&id, action).await?], format)
    }
}

fn shown(job: &Job) -> Shown<'_> {
    let spec = job.spec.clone().unwrap_or_default();
    let target = match spec.target() {
        RedriveTarget::Group => "group".to_owned(),
        RedriveTarget::Source => "source".to_owned(),
        RedriveTarget::Topic => spec.topic,
    };
    let state = match job.state() {
        RedriveState::Unspecified => "unknown",
        RedriveState::Running => "running",
        RedriveState::Paused => "paused",
        RedriveState::Done => "done",
        RedriveState::Cancelled => "cancelled",
        RedriveState::Failed => "failed",
    };
    Shown {
        id: &job.id,
        topic: format!("dlq.{}.{}", spec.group, spec.source_topic),
        target,
        state,
        failure: &job.failure,
        examined: job.examined,
        moved: job.moved,
        refused: job.refused,
        left: job.left,
        created_ms: job.created_ms,
        changed_ms: job.changed_ms,
    }
}

fn say(job: &Job, what: &str, format: Format) -> anyhow::Result<()> {
    let Shown { id, topic, state, examined, moved, refused, .. } = shown(job);
    match format {
        Format::Json => print_json(&shown(job)),
        Format::Table => {
            let job = if id.is_empty() { String::new() } else { format!(", {id} is {state}") };
            print_line(&format!(
                "{topic}: {moved} of {examined} {what}, {refused} refused by the loop guard{job}"
            ))
        }
    }?;
    Ok(())
}

fn list(jobs: &[Job], format: Format) -> anyhow::Result<()> {
    match format {
        Format::Json => print_json(&jobs.iter().map(shown).collect::<Vec<_>>())?,
        Format::Table => print_table(
            &[
                Column::Text("ID"),
                Column::Text("TOPIC"),
                Column::Text("TARGET"),
                Column::Text("STATE"),
                Column::Number("EXAMINED"),
                Column::Number("MOVED"),
                Column::Number("REFUSED"),
                Column::Number("LEFT"),
            ],
            jobs.iter()
                .map(|job| {
                    let Shown { id, topic, target, state, examined, moved, refused, left, .. } = shown(job);
                    let counts = [examined, moved, refused, left].map(|count| count.to_string());
                    [id.to_owned(), topic, target, state.to_owned()].into_iter().chain(counts).collect()
                })
                .collect(),
        )?,
    }
    Ok(())
}
