//! `felucca consume`: records out, one per line.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use felucca_client::{Client, ConsumedRecord, Consumer, Start};
use futures::FutureExt;
use tokio::time::{Instant, sleep_until};

use super::output::Format;
use super::parse::Place;
use super::record;
use super::signals::Signals;

/// While a group reads without --follow and nothing arrives, how often to ask whether other members have finished the rest.
const PROGRESS_POLL: Duration = Duration::from_millis(500);
/// How often a group's position is committed while records arrive.
const COMMIT_INTERVAL: Duration = Duration::from_secs(1);
/// What is below the high watermark can be read at once; after so long without any of it something is wrong.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Debug, Args)]
#[command(after_help = "\
Each record is a line {\"topic\",\"partition\",\"offset\",\"timestamp\",\"key\",\"value\",\"headers\"}. Bytes that are not UTF-8 are base64,
and a member beside them says so (\"value_encoding\":\"base64\"). With --output table: partition, offset, time, key and value,
separated by tabs.

Without --follow it ends at the end that the topic had when it began. A group goes on where it stopped; what was printed is
committed, so that a record is printed again only after a crash.

Examples:
  felucca consume orders
  felucca consume orders --from offset:100 --count 10
  felucca consume orders --group audit --follow
  felucca consume orders --from time:2026-03-01T12:00:00Z --output table")]
pub(super) struct Consume {
    topic: String,
    /// Read as a member of a consumer group, which shares the partitions and remembers its positions
    #[arg(long)]
    group: Option<String>,
    /// Where to start: beginning, end, offset:N or time:RFC3339; with --group only where it has no position yet
    #[arg(long, default_value = "beginning", value_name = "PLACE")]
    from: Place,
    /// Only these partitions; may be repeated
    #[arg(long = "partition", value_name = "N", conflicts_with = "group")]
    partitions: Vec<u32>,
    /// End after so many records
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    /// Wait for more records at the end
    #[arg(long)]
    follow: bool,
}

impl Consume {
    pub(super) async fn run(self, client: Client, format: Format) -> anyhow::Result<()> {
        let start = match self.from {
            Place::Beginning => Start::Beginning,
            Place::End => Start::End,
            Place::Offset(offset) => Start::Offset(offset),
            Place::Time(millis) => Start::Timestamp(millis),
        };
        let topic = client.admin().topic(&self.topic).await?;
        if let Some(unknown) = self.partitions.iter().find(|&&partition| partition >= topic.partitions) {
            bail!("topic {} has no partition {unknown}, only 0 to {}", self.topic, topic.partitions - 1);
        }
        let mut wanted = self.partitions.clone();
        if wanted.is_empty() {
            wanted.extend(0..topic.partitions);
        }
        let mut ends = None;
        if !self.follow {
            let found = Ends::find(&client, &self.topic, &wanted, self.from, self.group.as_deref()).await?;
            if let (Place::Offset(offset), None) = (self.from, &self.group) {
                found.refuse_beyond(&self.topic, offset)?;
            }
            wanted = found.unfinished().collect();
            ends = Some(found);
        }
        if wanted.is_empty() || self.count == Some(0) {
            return Ok(());
        }
        let consumer = client.consumer().start(start).auto_commit(None);
        let consumer = match &self.group {
            Some(group) => consumer.group(group).topics([&self.topic]),
            None => consumer.assign(&self.topic, wanted),
        };
        let consumer = consumer.build().await?;
        let mut reader = Reader::new(client, self.topic, self.group, consumer, ends, self.count);
        let mut out = io::BufWriter::new(io::stdout().lock());
        let result = reader.read(&mut out, |out, record| record::write(out, record, format)).await;
        // Also after a failure: what was printed should not be printed again.
        let ended = reader.end().await;
        result.and(ended)
    }
}

/// Reads what `topic` holds now, at most `count` records of it, and hands each to `show`.
pub(super) async fn read_all(
    client: Client,
    topic: &str,
    count: Option<u64>,
    show: impl FnMut(&mut io::BufWriter<io::StdoutLock<'_>>, &ConsumedRecord) -> io::Result<()>,
) -> anyhow::Result<()> {
    let partitions: Vec<u32> = (0..client.admin().topic(topic).await?.partitions).collect();
    let ends = Ends::find(&client, topic, &partitions, Place::Beginning, None).await?;
    let wanted: Vec<u32> = ends.unfinished().collect();
    if wanted.is_empty() || count == Some(0) {
        return Ok(());
    }
    let consumer =
        client.consumer().start(Start::Beginning).auto_commit(None).assign(topic, wanted).build().await?;
    let mut reader = Reader::new(client, topic.to_owned(), None, consumer, Some(ends), count);
    reader.read(&mut io::BufWriter::new(io::stdout().lock()), show).await?;
    reader.end().await
}

/// Per partition: the next offset to come and the end that it had when the command began, exclusive.
#[derive(Debug, PartialEq, Eq)]
struct Ends(BTreeMap<u32, (u64, u64)>);

impl Ends {
    async fn find(
        client: &Client,
        topic: &str,
        wanted: &[u32],
        from: Place,
        group: Option<&str>,
    ) -> anyhow::Result<Self> {
        let admin = client.admin();
        let offsets = match from {
            Place::Time(millis) => admin.offsets_for_timestamp(topic, millis).await?,
            _ => admin.offsets(topic).await?,
        };
        let mut ends = Self(BTreeMap::new());
        for one in offsets.into_iter().filter(|one| wanted.contains(&one.partition)) {
            let end = one.high_watermark;
            let next = match from {
                Place::Beginning => one.log_start,
                Place::End => end,
                Place::Offset(offset) => offset.min(end),
                Place::Time(_) => one.offset_for_timestamp.unwrap_or(end),
            };
            ends.0.insert(one.partition, (next, end));
        }
        if let Some(group) = group {
            ends.pass_committed(client, topic, group).await?;
        }
        Ok(ends)
    }

    /// An offset that no partition has come to yet is a mistake; one at the end leaves nothing to read.
    fn refuse_beyond(&self, topic: &str, offset: u64) -> anyhow::Result<()> {
        match self.0.iter().max_by_key(|(_, (_, end))| *end) {
            Some((partition, (_, end))) if offset > *end => {
                bail!(
                    "offset {offset} is beyond the end of topic {topic}: partition {partition}, the longest, ends at {end}"
                )
            }
            _ => Ok(()),
        }
    }

    /// Counts in what the members of a group have finished.
    async fn pass_committed(&mut self, client: &Client, topic: &str, group: &str) -> anyhow::Result<()> {
        for one in client.admin().committed(group).await? {
            if one.topic == topic
                && let Some((next, _)) = self.0.get_mut(&one.partition)
            {
                *next = one.offset.max(*next);
            }
        }
        Ok(())
    }

    /// Finishes the partitions whose last offsets have no record: none will come for them.
    async fn pass_gaps(&mut self, client: &Client, topic: &str) -> anyhow::Result<()> {
        for partition in self.unfinished().collect::<Vec<_>>() {
            if let Some((next, end)) = self.0.get_mut(&partition)
                && client
                    .admin()
                    .next_offset(topic, partition, *next)
                    .await?
                    .is_none_or(|found| found >= *end)
            {
                *next = *end;
            }
        }
        Ok(())
    }

    /// Whether a record lies below the end; then its partition has come past it.
    fn pass(&mut self, partition: u32, offset: u64) -> bool {
        match self.0.get_mut(&partition) {
            Some((next, end)) if offset < *end => {
                *next = offset + 1;
                true
            }
            Some((next, end)) => {
                // Something beyond the end: everything below it has been seen.
                *next = *end;
                false
            }
            None => false,
        }
    }

    fn unfinished(&self) -> impl Iterator<Item = u32> {
        self.0.iter().filter(|(_, (next, end))| next < end).map(|(partition, _)| *partition)
    }
}

struct Reader {
    client: Client,
    topic: String,
    group: Option<String>,
    consumer: Consumer,
    /// `None` follows the topic without end.
    ends: Option<Ends>,
    /// Records still to print.
    count: Option<u64>,
    /// Something was printed that is not committed.
    uncommitted: bool,
    /// Partitions of which records beyond their end were taken, which nobody has seen.
    overshot: BTreeSet<u32>,
}

enum Event {
    Record(ConsumedRecord),
    Quiet,
    Stop,
}

impl Event {
    fn from_stream(next: Option<felucca_client::Result<ConsumedRecord>>) -> anyhow::Result<Self> {
        Ok(Self::Record(next.context("the stream of records ended")??))
    }
}

impl Reader {
    fn new(
        client: Client,
        topic: String,
        group: Option<String>,
        consumer: Consumer,
        ends: Option<Ends>,
        count: Option<u64>,
    ) -> Self {
        Self { client, topic, group, consumer, ends, count, uncommitted: false, overshot: BTreeSet::new() }
    }

    /// Returns at the end, after `count` records, or on a signal.
    async fn read<W: Write>(
        &mut self,
        out: &mut W,
        mut show: impl FnMut(&mut W, &ConsumedRecord) -> io::Result<()>,
    ) -> anyhow::Result<()> {
        let mut signals = Signals::new()?;
        let mut commit_at = Instant::now() + COMMIT_INTERVAL;
        let mut last_record = Instant::now();
        while self.ends.as_ref().is_none_or(|ends| ends.unfinished().next().is_some()) {
            let event = match self.consumer.next().now_or_never() {
                Some(record) => Event::from_stream(record)?,
                None => {
                    // Whoever reads our lines must not wait for the next record to see this one.
                    out.flush()?;
                    self.wait(&mut signals, commit_at).await?
                }
            };
            match event {
                Event::Stop => break,
                Event::Record(record) => {
                    last_record = Instant::now();
                    if self.ends.as_mut().is_none_or(|ends| ends.pass(record.partition, record.offset)) {
                        show(out, &record)?;
                        self.uncommitted = true;
                        if let Some(count) = &mut self.count {
                            *count -= 1;
                            if *count == 0 {
                                break;
                            }
                        }
                    } else {
                        self.overshot.insert(record.partition);
                    }
                }
                Event::Quiet => self.check_progress(last_record).await?,
            }
            if Instant::now() >= commit_at {
                out.flush()?;
                self.commit().await?;
                commit_at = Instant::now() + COMMIT_INTERVAL;
            }
        }
        out.flush()?;
        Ok(())
    }

    async fn wait(&mut self, signals: &mut Signals, commit_at: Instant) -> anyhow::Result<Event> {
        let mut wake = Instant::now() + PROGRESS_POLL;
        if self.uncommitted {
            wake = wake.min(commit_at);
        }
        tokio::select! {
            biased;
            () = signals.recv() => Ok(Event::Stop),
            record = self.consumer.next() => Event::from_stream(record),
            () = sleep_until(wake) => Ok(Event::Quiet),
        }
    }

    /// Nothing arrived for a while: others may have read the rest, there may be none, or it will not come.
    async fn check_progress(&mut self, last_record: Instant) -> anyhow::Result<()> {
        let Some(ends) = &mut self.ends else {
            return Ok(());
        };
        if let Some(group) = &self.group {
            return ends.pass_committed(&self.client, &self.topic, group).await;
        }
        ends.pass_gaps(&self.client, &self.topic).await?;
        if last_record.elapsed() < PATIENCE {
            return Ok(());
        }
        let waiting: Vec<String> = ends
            .unfinished()
            .filter_map(|partition| {
                ends.0.get(&partition).map(|(next, end)| format!("{partition} ({next} to {end})"))
            })
            .collect();
        bail!(
            "no record arrived for {} s; missing of partitions: {}",
            PATIENCE.as_secs(),
            waiting.join(", ")
        );
    }

    /// Remembers for the group what was printed.
    async fn commit(&mut self) -> anyhow::Result<()> {
        // What was taken beyond the end would be committed with the rest; that has to wait for `end`.
        if self.group.is_some() && self.uncommitted && self.overshot.is_empty() {
            self.consumer.commit().await.context("cannot commit the group's position")?;
        }
        self.uncommitted = false;
        Ok(())
    }

    async fn end(mut self) -> anyhow::Result<()> {
        if self.group.is_none() {
            return Ok(());
        }
        for (partition, (_, end)) in self.ends.iter().flat_map(|ends| &ends.0) {
            if self.overshot.contains(partition) {
                // Refused when the partition went to another member, which then begins at what is committed.
                let _ = self.consumer.seek(&self.topic, *partition, *end).await;
            }
        }
        self.consumer.commit().await.context("cannot commit the group's position")?;
        self.consumer.close().await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offset_beyond_every_end_is_refused() {
        let ends = Ends(BTreeMap::from([(0, (2, 2)), (1, (5, 5))]));
        assert!(ends.refuse_beyond("t", 5).is_ok());
        let said = ends.refuse_beyond("t", 6).unwrap_err().to_string();
        assert!(said.contains("offset 6") && said.contains("partition 1, the longest, ends at 5"), "{said}");
    }

    #[test]
    fn a_partition_is_finished_at_the_end_it_had() {
        let mut ends = Ends(BTreeMap::from([(0, (0, 2)), (1, (5, 5)), (2, (0, 9))]));
        assert_eq!(ends.unfinished().collect::<Vec<_>>(), [0, 2]);
        assert!(ends.pass(0, 0));
        assert!(ends.pass(0, 1));
        assert!(!ends.pass(0, 2), "appended after the command began");
        assert!(!ends.pass(7, 0), "a partition that was not asked for");
        assert_eq!(ends.unfinished().collect::<Vec<_>>(), [2]);
        assert!(!ends.pass(2, 20), "offsets 0 to 8 do not exist any more");
        assert_eq!(ends.unfinished().count(), 0);
    }
}
