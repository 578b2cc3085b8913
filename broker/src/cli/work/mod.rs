//! `felucca work`: a command per record, as `xargs` runs one per line.
//!
//! [`command`] runs one command and says what its end means for the record; here is the worker around it: how many at a time,
//! when it ends, and that a command that cannot be run ends the tool instead of failing every record.

mod command;

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::{anyhow, bail};
use clap::Args;
use felucca_client::{Client, Delivery, GroupDescription, GroupKind, GroupPartition, Outcome, WorkerReport};
use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use serde::Serialize;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tower_service::Service;

use super::output::{Format, counted};
use super::signals::Signals;
use command::Ended;

/// How often `--until-empty` asks whether something is left.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// With held records in the group: nothing that can be handed out stays for so long.
const STANDSTILL: Duration = Duration::from_secs(3);
/// Running commands are waited for without limit; a second signal stops them.
const AS_LONG_AS_IT_TAKES: Duration = Duration::from_hours(24 * 365);

#[derive(Debug, Args)]
#[command(after_help = "\
The command is run by `sh -c` for each record, with the record's value on standard input and in its environment:
  FELUCCA_RECORD_TOPIC, _PARTITION, _OFFSET, _KEY, _TIMESTAMP (Unix milliseconds), _DELIVERY_COUNT, _LEASE
  FELUCCA_HEADER_NAME for each header, the name in capitals with `_` for what is no letter or digit

Its end decides about the record: 0 acknowledges it, 65 rejects it for good, anything else has it tried again later, with the
last line of standard error as the reason. 126 and 127, by which the shell says that it cannot run the command, end the tool when no command could be run before.
Leases are extended while the command runs. On SIGTERM or Ctrl-C running commands are finished and the rest is released; a
second signal stops them too.

Examples:
  felucca work orders --share-group payment --exec ./charge.sh
  felucca work mails --share-group mail --exec 'sendmail -t' --concurrency 8
  felucca work orders --share-group audit --exec 'jq .total' --until-empty")]
pub(super) struct Work {
    topic: String,
    /// The share group whose records are worked on; it must work through this topic only
    #[arg(long, value_name = "GROUP")]
    share_group: String,
    /// A command line for `sh -c`
    #[arg(long, value_name = "CMD")]
    exec: String,
    /// Commands at a time
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024), value_name = "N")]
    concurrency: u16,
    /// End after so many records
    #[arg(long, value_name = "N", conflicts_with = "until_empty")]
    count: Option<u64>,
    /// End when the group has nothing left to do: no record waits, runs or is to be tried again
    #[arg(long)]
    until_empty: bool,
}

impl Work {
    pub(super) async fn run(self, client: Client, format: Format) -> anyhow::Result<()> {
        self.check(&client).await?;
        if self.count == Some(0) {
            return Ok(());
        }
        let mut signals = Signals::new()?;
        let concurrency = u32::from(self.concurrency);
        let worker = client
            .share_consumer(&self.share_group)
            .concurrency(usize::from(self.concurrency))
            // What waits here is kept from other members.
            .prefetch(
                self.count
                    .map_or(concurrency, |count| u32::try_from(count).unwrap_or(u32::MAX).min(concurrency)),
            )
            .drain_timeout(AS_LONG_AS_IT_TAKES)
            .build()
            .await?;
        let job = Arc::new(Job::new(self.exec.clone(), self.count));
        let until_empty = async {
            if !self.until_empty {
                std::future::pending::<()>().await;
            }
            self.emptied(&client).await
        };
        let shutdown = {
            let stop = job.stop.clone();
            async move { stop.cancelled().await }
        };
        let working = worker.serve(Commands(job.clone()), shutdown);
        tokio::pin!(working, until_empty);
        let mut empty_watched = true;
        let report = loop {
            tokio::select! {
                biased;
                report = &mut working => break report?,
                () = signals.recv() => job.signalled(),
                result = &mut until_empty, if empty_watched => {
                    empty_watched = false;
                    if let Err(error) = result {
                        job.fail(error);
                    }
                    job.stop.cancel();
                }
            }
        };
        tell(&report, format)?;
        job.failure.lock().take().map_or(Ok(()), Err)
    }

    /// One command suits one topic: the group must have no other.
    async fn check(&self, client: &Client) -> anyhow::Result<()> {
        let (topic, name) = (&self.topic, &self.share_group);
        client.admin().topic(topic).await?;
        let group = client.admin().describe_group(name).await?;
        if group.kind() != GroupKind::Share {
            bail!("group {name} is no share group");
        }
        let redriven = redrive_topic(name, topic);
        let others: Vec<&str> = group.partitions.iter().map(|partition| partition.topic.as_str()).collect();
        if !others.contains(&topic.as_str()) {
            bail!("group {name} does not work through topic {topic}");
        }
        let other = others.into_iter().find(|other| other != topic && *other != redriven);
        match other.map(|other| other.strip_prefix(&format!("redrive.{name}.")).unwrap_or(other)) {
            None => Ok(()),
            Some(other) => bail!(
                "group {name} works through topic {other} too, whose records would get the same command"
            ),
        }
    }

    /// Returns once nothing is left that this group could be given. Records behind a held one of their key wait for a person: they
    /// are told by nothing being handed out for [`STANDSTILL`].
    async fn emptied(&self, client: &Client) -> anyhow::Result<()> {
        let mut last = None;
        let mut since = Instant::now();
        loop {
            tokio::time::sleep(LOOK_INTERVAL).await;
            let group = match client.admin().describe_group(&self.share_group).await {
                Ok(group) => group,
                Err(error) if error.retryable() => continue,
                Err(error) => return Err(error.into()),
            };
            let sum = |count: fn(&GroupPartition) -> u64| group.partitions.iter().map(count).sum::<u64>();
            let [lag, held, deliveries] =
                [sum(|one| one.lag), sum(|one| one.held), sum(|one| one.deliveries)];
            let moving = is_moving(&group);
            if !moving && lag <= held {
                return Ok(());
            }
            if moving || held == 0 || last != Some((lag, deliveries)) {
                (last, since) = (Some((lag, deliveries)), Instant::now());
            } else if since.elapsed() >= STANDSTILL {
                return Ok(());
            }
        }
    }
}

/// Whether records that are handed out to nobody at the moment will be: after their backoff, when the group goes on, or when the
/// outage guard lets the next one try.
fn is_moving(group: &GroupDescription) -> bool {
    let busy = |one: &GroupPartition| one.leased + one.scheduled + one.exhausted > 0;
    group.partitions.iter().any(busy) || group.paused || group.outage.is_some()
}

/// Where a group finds what was redriven to it alone.
fn redrive_topic(group: &str, topic: &str) -> String {
    format!("redrive.{group}.{topic}")
}

/// What all commands share.
#[derive(Debug)]
struct Job {
    command: String,
    /// Records still to start.
    left: AtomicU64,
    /// Commands still to end before the tool does.
    unfinished: AtomicU64,
    /// Nothing more is started.
    stop: CancellationToken,
    /// What runs is stopped too.
    kill: CancellationToken,
    /// Some command could be run.
    ran: AtomicBool,
    /// Why the tool cannot go on.
    failure: Mutex<Option<anyhow::Error>>,
}

impl Job {
    fn new(command: String, count: Option<u64>) -> Self {
        let count = count.unwrap_or(u64::MAX);
        Self {
            command,
            left: AtomicU64::new(count),
            unfinished: AtomicU64::new(count),
            stop: CancellationToken::new(),
            kill: CancellationToken::new(),
            ran: AtomicBool::new(false),
            failure: Mutex::new(None),
        }
    }

    fn signalled(&self) {
        if self.stop.is_cancelled() {
            self.kill.cancel();
        }
        self.stop.cancel();
    }

    /// The first failure is the one that is told.
    fn fail(&self, error: anyhow::Error) {
        self.failure.lock().get_or_insert(error);
        self.stop.cancel();
    }

    async fn work(&self, delivery: Delivery) -> Outcome {
        let outcome = match command::run(&self.command, &delivery, &self.kill).await {
            Ended::Outcome(outcome) => {
                self.ran.store(true, Ordering::Relaxed);
                outcome
            }
            // Some part of it, then, that this record wants.
            Ended::Unknown(nack) if self.ran.load(Ordering::Relaxed) => nack.into(),
            Ended::Unknown(nack) => {
                self.fail(anyhow!("the command cannot be run: {}", nack.reason));
                Outcome::Release
            }
            Ended::NotRun(error) => {
                self.fail(error);
                Outcome::Release
            }
        };
        if self.unfinished.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.stop.cancel();
        }
        outcome
    }
}

/// A command per record; after the last one that was asked for it is never ready again.
#[derive(Debug)]
struct Commands(Arc<Job>);

impl Service<Delivery> for Commands {
    type Response = Outcome;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Outcome, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // The worker is stopped when the last one ends, so nobody needs to be woken.
        if self.0.left.load(Ordering::Relaxed) == 0 { Poll::Pending } else { Poll::Ready(Ok(())) }
    }

    fn call(&mut self, delivery: Delivery) -> Self::Future {
        let job = self.0.clone();
        job.left.fetch_sub(1, Ordering::Relaxed);
        async move { Ok(job.work(delivery).await) }.boxed()
    }
}

#[derive(Serialize)]
struct Report {
    acked: u64,
    nacked: u64,
    rejected: u64,
    released: u64,
    lost: u64,
}

/// Standard output belongs to the commands.
fn tell(report: &WorkerReport, format: Format) -> anyhow::Result<()> {
    let WorkerReport { acked, nacked, rejected, released, lost } = *report;
    match format {
        Format::Json => {
            eprintln!("{}", serde_json::to_string(&Report { acked, nacked, rejected, released, lost })?);
        }
        Format::Table => {
            let lost =
                if lost > 0 { format!(", {lost} lost to the end of their leases") } else { String::new() };
            let acked = counted(acked, "record");
            eprintln!(
                "{acked} done, {nacked} to be tried again, {rejected} rejected, {released} released{lost}"
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_whose_outage_guard_is_on_is_not_at_a_standstill() {
        let quiet = GroupDescription::default();
        let guarded = GroupDescription { outage: Some(Default::default()), ..Default::default() };
        assert_eq!((is_moving(&quiet), is_moving(&guarded)), (false, true));
    }
}
