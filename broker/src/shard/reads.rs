//! Reads of the log that the engine asks for and that may touch the disk: they run beside the shard, and come back as
//! commands.

use std::collections::VecDeque;
use std::sync::Arc;

use felucca_protocol::batch::{BatchHeader, Record};
use parking_lot::Mutex;
use tokio::runtime::Handle;

use super::inbox::{Inbox, Submission};
use crate::engine::command::{Command, LetterError, StagedBatch};
use crate::engine::dead_letter;
use crate::engine::effect::{DeadLetterRead, Scan};
use crate::log::{self, ReadError, Scanned, Views};

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

/// Where reads are made.
#[derive(Debug)]
pub(crate) enum Readers {
    /// On the runtime's threads; the disk part of each is bounded by the log.
    Runtime(Handle),
    /// On the thread that asks for the next one, one at a time. Bounded by what the engine has under way.
    Queue(Arc<Mutex<VecDeque<Read>>>),
}

/// Starts reads.
#[derive(Debug)]
pub(crate) struct Reads {
    pub(crate) readers: Readers,
    pub(crate) views: Arc<Views>,
    pub(crate) inbox: Arc<Inbox>,
}

impl Reads {
    pub(crate) fn start(&self, read: Read) {
        let runtime = match &self.readers {
            Readers::Runtime(runtime) => runtime,
            Readers::Queue(queue) => return queue.lock().push_back(read),
        };
        let (views, inbox) = (self.views.clone(), self.inbox.clone());
        runtime.spawn(async move {
            let answer = match read {
                Read::Scan(scan) => match views.get(scan.partition) {
                    Some(view) => scan_answer(&scan, view.scan(scan.clone()).await),
                    None => scan_of_nothing(&scan),
                },
                Read::DeadLetter { read, topic } => {
                    let found = match views.get(read.partition) {
                        Some(view) => Some(view.record(read.offset).await),
                        None => None,
                    };
                    build_letter(*read, &topic, found)
                }
            };
            inbox.submit([Submission::silent(answer)]);
        });
    }
}

/// Makes a read on this thread.
pub(crate) fn read_here(views: &Views, read: Read) -> Command {
    match read {
        Read::Scan(scan) => match views.get(scan.partition) {
            Some(view) => scan_answer(&scan, log::scan(&view, &scan)),
            None => scan_of_nothing(&scan),
        },
        Read::DeadLetter { read, topic } => {
            let found = views.get(read.partition).map(|view| log::read_record(&view, read.offset));
            build_letter(*read, &topic, found)
        }
    }
}

fn scan_answer(scan: &Scan, found: Result<Scanned, ReadError>) -> Command {
    match found {
        Ok(found) => scanned(scan, found),
        Err(error) => scan_failed(scan, &error),
    }
}

/// The partition's topic was deleted meanwhile, and the engine knows.
fn scan_of_nothing(scan: &Scan) -> Command {
    failed(scan, "the partition is gone".to_owned())
}

/// `found`: what reading the record came to, if its partition is still there.
fn build_letter(
    read: DeadLetterRead,
    topic: &str,
    found: Option<Result<Option<Record>, ReadError>>,
) -> Command {
    let DeadLetterRead { group, partition, offset, context } = read;
    let built = match &found {
        None => Err("the partition is gone".to_owned()),
        Some(Ok(Some(record))) => dead_letter::build(record, &context, topic)
            .and_then(|bytes| BatchHeader::parse(&bytes).map(|header| StagedBatch { header, bytes }))
            .map_err(|error| error.to_string()),
        Some(Ok(None)) => Err("the record is gone".to_owned()),
        Some(Err(error)) => Err(error.to_string()),
    };
    let letter = built.map_err(|reason| {
        tracing::error!(group, %partition, offset, reason, "cannot make a dead letter");
        if matches!(found, Some(Err(ReadError::Io { .. }))) {
            LetterError::Disk
        } else {
            LetterError::Record(reason)
        }
    });
    Command::DeadLetterBuilt { group, partition, offset, letter }
}
