//! Reads of the log that the engine asks for and that may touch the disk: they run beside the shard, and come back as
//! commands.

use std::sync::Arc;

use felucca_protocol::batch::BatchHeader;
use tokio::runtime::Handle;

use super::inbox::{Inbox, Submission};
use crate::engine::command::{Command, StagedBatch};
use crate::engine::dead_letter;
use crate::engine::effect::{DeadLetterRead, Scan};
use crate::log::{ReadError, Scanned, Views};

/// Something to be read.
#[derive(Debug)]
pub(crate) enum Read {
    Scan(Scan),
    /// `topic` is the name of the record's topic.
    DeadLetter {
        read: Box<DeadLetterRead>,
        topic: String,
    },
}

/// The command that answers a scan.
pub(crate) fn scanned(scan: &Scan, scanned: Scanned) -> Command {
    Command::Scanned {
        group: scan.group.clone(),
        partition: scan.partition,
        from: scan.from,
        next: scanned.next,
        records: scanned.records,
    }
}

/// The command that answers a scan that found nothing but an error.
pub(crate) fn scan_failed(scan: &Scan, error: &ReadError) -> Command {
    tracing::error!(group = scan.group, partition = %scan.partition, from = scan.from, %error, "cannot scan the log");
    failed(scan, error.to_string())
}

fn failed(scan: &Scan, reason: String) -> Command {
    Command::ScanFailed { group: scan.group.clone(), partition: scan.partition, from: scan.from, reason }
}

/// Starts reads on the runtime's threads; the disk part of each is bounded by the log.
#[derive(Debug)]
pub(crate) struct Reads {
    pub(crate) runtime: Handle,
    pub(crate) views: Arc<Views>,
    pub(crate) inbox: Arc<Inbox>,
}

impl Reads {
    pub(crate) fn start(&self, read: Read) {
        let (views, inbox) = (self.views.clone(), self.inbox.clone());
        self.runtime.spawn(async move {
            let answer = match read {
                Read::Scan(scan) => run_scan(&views, scan).await,
                Read::DeadLetter { read, topic } => build_letter(&views, *read, &topic).await,
            };
            inbox.submit([Submission::silent(answer)]);
        });
    }
}

async fn run_scan(views: &Views, scan: Scan) -> Command {
    let Some(view) = views.get(scan.partition) else {
        // Its topic was deleted meanwhile, and the engine knows.
        return failed(&scan, "the partition is gone".to_owned());
    };
    match view.scan(scan.clone()).await {
        Ok(found) => scanned(&scan, found),
        Err(error) => scan_failed(&scan, &error),
    }
}

async fn build_letter(views: &Views, read: DeadLetterRead, topic: &str) -> Command {
    let DeadLetterRead { group, partition, offset, context } = read;
    let letter = match views.get(partition) {
        None => Err("the partition is gone".to_owned()),
        Some(view) => match view.record(offset).await {
            Ok(Some(record)) => dead_letter::build(&record, &context, topic)
                .and_then(|bytes| BatchHeader::parse(&bytes).map(|header| StagedBatch { header, bytes }))
                .map_err(|error| error.to_string()),
            Ok(None) => Err("the record is gone".to_owned()),
            Err(error) => Err(error.to_string()),
        },
    };
    if let Err(reason) = &letter {
        tracing::error!(group, %partition, offset, reason, "cannot make a dead letter");
    }
    Command::DeadLetterBuilt { group, partition, offset, letter }
}
