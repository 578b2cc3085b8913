//! The measurements, one module per kind of work, and what they share: topics, and records to send.

mod consume;
mod end_to_end;
mod fan_out;
mod footprint;
mod pacing;
mod produce;
mod raw;
pub(crate) mod share;
pub(crate) mod window;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use tokio::task::JoinSet;

use crate::driver::{self, Driver, Topic};
use crate::peer::Peer;
use crate::row::Row;
use crate::run::{Case, Effort};
use crate::server::Launcher;
use crate::workload::{Ack, Producers};

/// Longest wait for something that should have come long before.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// Records that each connection has in flight when topics are filled.
const FILL_IN_FLIGHT: usize = 16_384;

/// What a measurement runs against.
#[derive(Clone, Debug)]
pub(crate) struct Session {
    address: String,
    /// What an acknowledgement means.
    level: Ack,
    /// The server's process group, when this program started it.
    group: Option<u32>,
    /// Where its data is, when this program chose it.
    data: Option<PathBuf>,
    effort: Effort,
}

impl Session {
    /// Cleans up on a server that goes on; one that was started for this measurement ends with its data.
    async fn discard<D: Driver>(&self, driver: &D, topic: &Topic, groups: &[String]) -> anyhow::Result<()> {
        if self.group.is_some() { Ok(()) } else { driver.discard(topic, groups).await }
    }
}

/// Measures one case against a server of its own at this level. What names the row is left to the caller.
pub(crate) fn measure(
    launcher: &Launcher,
    peer: Peer,
    level: Ack,
    effort: &Effort,
    client_threads: u32,
    case: &Case,
) -> anyhow::Result<Row> {
    if let Case::Footprint(work) = case {
        return footprint::measure(launcher, peer, level, effort, work);
    }
    let server = launcher.launch(peer, level)?;
    let session = Session {
        address: server.address.clone(),
        level,
        group: server.group,
        data: server.data_dir(),
        effort: *effort,
    };
    let settings = Some(server.settings.clone());
    let threads = client_threads.max(1) as usize;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()?;
    // In a task, because the thread that waits here would be one more.
    let case = case.clone();
    let task = runtime.spawn(async move {
        match peer {
            Peer::Felucca => run::<driver::Felucca>(session, case).await,
            #[cfg(feature = "redis")]
            Peer::Redis => run::<driver::Redis>(session, case).await,
            #[cfg(feature = "jetstream")]
            Peer::Jetstream => run::<driver::Jetstream>(session, case).await,
            #[cfg(feature = "kafka")]
            Peer::Kafka => run::<driver::Kafka>(session, case).await,
            #[cfg(feature = "rabbitmq")]
            Peer::RabbitmqQuorum => run::<driver::RabbitmqQuorum>(session, case).await,
            #[cfg(feature = "rabbitmq")]
            Peer::RabbitmqStream => run::<driver::RabbitmqStream>(session, case).await,
            #[cfg(not(all(
                feature = "redis",
                feature = "jetstream",
                feature = "kafka",
                feature = "rabbitmq"
            )))]
            other => anyhow::bail!("{} is not part of this build", other.name()),
        }
    });
    let row = runtime.block_on(task).context("the measurement panicked");
    runtime.shutdown_timeout(Duration::from_secs(5));
    let row = row.and_then(|row| row);
    // That the server died is the better explanation of a measurement that failed.
    server.stop().and(row).map(|row| Row { settings, ..row })
}

async fn run<D: Driver>(session: Session, case: Case) -> anyhow::Result<Row> {
    match &case {
        Case::Produce { work, producers, .. } => produce::measure::<D>(&session, work, *producers).await,
        Case::Raw { work, producers, .. } => raw::measure(&session, work, *producers).await,
        Case::Consume { work, consumers, cache } => {
            consume::measure::<D>(&session, work, *consumers, *cache).await
        }
        Case::EndToEnd { work, rate, .. } => end_to_end::measure::<D>(&session, work, *rate).await,
        Case::Share { work, members, way } => share::measure::<D>(&session, work, *members, *way).await,
        Case::FanOut(work) => fan_out::measure::<D>(&session, work).await,
        Case::Footprint(_) => anyhow::bail!("a footprint starts its servers itself"),
    }
}

/// A topic of a measurement. To be discarded at its end.
async fn create_topic<D: Driver>(driver: &D, partitions: u32) -> anyhow::Result<Topic> {
    let topic = Topic { name: unique("bench").into(), partitions };
    driver.create_topic(&topic).await?;
    Ok(topic)
}

/// A name that no earlier measurement used, whether or not it ended well.
fn unique(prefix: &str) -> String {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let (now, count) = (since.as_millis(), COUNTER.fetch_add(1, Ordering::Relaxed));
    format!("{prefix}-{}-{now}-{count}", std::process::id())
}

/// Bytes that do not compress, the same in every run.
fn value(bytes: usize) -> Bytes {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let step = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(step).take(bytes).collect()
}

/// Waits for tasks that should be at their end, and fails with the first that failed.
async fn join<T: 'static>(tasks: JoinSet<anyhow::Result<T>>) -> anyhow::Result<Vec<T>> {
    join_within(PATIENCE, tasks).await
}

async fn join_within<T: 'static>(
    patience: Duration,
    mut tasks: JoinSet<anyhow::Result<T>>,
) -> anyhow::Result<Vec<T>> {
    let mut results = Vec::new();
    let joined = async {
        while let Some(result) = tasks.join_next().await {
            results.push(result.context("a task panicked")??);
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(patience, joined).await.context("a task did not end")??;
    Ok(results)
}
