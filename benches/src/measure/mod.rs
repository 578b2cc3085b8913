//! The measurements, one module per kind of work, and what they share: topics, and records to send.

mod consume;
mod end_to_end;
mod footprint;
mod pacing;
mod produce;
mod raw;
mod share;
mod window;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bytes::Bytes;
use felucca_client::{Client, ErrorCode};
use tokio::task::JoinSet;

use crate::broker::Launcher;
use crate::row::Row;
use crate::run::{Case, Effort};
use crate::workload::{Ack, Producers};

/// Longest wait for something that should have come long before.
const PATIENCE: Duration = Duration::from_secs(60);
/// Records that each connection has in flight when topics are filled.
const FILL_IN_FLIGHT: usize = 16_384;

/// What a measurement runs against.
#[derive(Clone, Debug)]
struct Session {
    address: String,
    /// The broker's process, when this program started it.
    pid: Option<u32>,
    /// Where its data is, when this program chose it.
    data: Option<PathBuf>,
    effort: Effort,
}

/// Measures one case against a broker of its own. The names of workload, case and version are left to the caller.
pub(crate) fn measure(
    launcher: &Launcher,
    effort: &Effort,
    client_threads: u32,
    case: &Case,
) -> anyhow::Result<Row> {
    if let Case::Footprint(work) = case {
        return footprint::measure(launcher, effort, work);
    }
    let broker = launcher.launch()?;
    let session = Session {
        address: broker.address.clone(),
        pid: broker.pid,
        data: broker.data_dir(),
        effort: *effort,
    };
    let threads = client_threads.max(1) as usize;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()?;
    // In a task, because the thread that waits here would be one more.
    let task = runtime.spawn(run(session, case.clone()));
    let row = runtime.block_on(task).context("the measurement panicked");
    runtime.shutdown_timeout(Duration::from_secs(5));
    let row = row.and_then(|row| row);
    // That the broker died is the better explanation of a measurement that failed.
    broker.stop().and(row)
}

async fn run(session: Session, case: Case) -> anyhow::Result<Row> {
    match &case {
        Case::Produce { work, ack, producers } => produce::measure(&session, work, *ack, *producers).await,
        Case::Raw { work, ack, producers } => raw::measure(&session, work, *ack, *producers).await,
        Case::Consume { work, consumers } => consume::measure(&session, work, *consumers).await,
        Case::EndToEnd { work, ack } => end_to_end::measure(&session, work, *ack).await,
        Case::Share { work, members, receive } => share::measure(&session, work, *members, *receive).await,
        Case::Footprint(_) => anyhow::bail!("a footprint starts its brokers itself"),
    }
}

/// A topic of a measurement. To be discarded at its end.
#[derive(Clone, Debug)]
struct Topic {
    client: Client,
    address: String,
    name: String,
    id: Bytes,
    partitions: u32,
}

impl Topic {
    async fn create(session: &Session, partitions: u32, ack: Ack) -> anyhow::Result<Self> {
        let client = Client::connect(session.address.clone()).await?;
        let name = unique("bench");
        let created = client.admin().create_topic(&name, partitions, ack.topic_config()).await?;
        Ok(Self { client, address: session.address.clone(), name, id: created.id, partitions })
    }

    /// Deletes topic and share groups from a broker that goes on; one that was started for this case ends with its data.
    async fn discard(self, session: &Session, groups: &[String]) -> anyhow::Result<()> {
        if session.pid.is_some() {
            return Ok(());
        }
        let began = Instant::now();
        for group in groups {
            // Members that went are members until their session times out.
            while let Err(error) = self.client.admin().delete_group(group).await {
                let waits = error.code() == Some(ErrorCode::GroupNotEmpty) && began.elapsed() < PATIENCE;
                ensure!(waits, error);
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        self.client.admin().delete_topic(&self.name).await?;
        Ok(())
    }

    /// Produces records of which nothing is measured.
    async fn fill(
        &self,
        records: u64,
        record_bytes: usize,
        batch_bytes: usize,
        ack: Ack,
    ) -> anyhow::Result<()> {
        let sender = produce::Sender::new(self, batch_bytes, ack).await?;
        sender.send_all(records, &value(record_bytes), FILL_IN_FLIGHT).await
    }
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
async fn join<T: 'static>(mut tasks: JoinSet<anyhow::Result<T>>) -> anyhow::Result<Vec<T>> {
    let mut results = Vec::new();
    let joined = async {
        while let Some(result) = tasks.join_next().await {
            results.push(result.context("a task panicked")??);
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(PATIENCE, joined).await.context("a task did not end")??;
    Ok(results)
}
