//! Finding the letters that a redrive is about, and making the records that it appends of them.

use felucca_protocol::batch::{self, BatchHeader, Record};
use felucca_protocol::partitioner::partition_for_key;

use crate::broker::{Broker, BrokerError};
use crate::engine::command::{AppendEntry, Command, StagedBatch};
use crate::engine::dead_letter;
use crate::engine::effect::Reply;
use crate::engine::error::EngineError;
use crate::engine::event::{RedriveRow, RedriveSpec};
use crate::engine::redrive::target;
use crate::engine::types::PartitionKey;

/// A record that was redriven so often is left where it is unless forced: it would go round for ever.
const MAX_REDRIVES: u32 = 3;
/// Bytes read of a dead-letter topic at a time.
const READ_BYTES: usize = 1 << 20;

/// A piece of a dead-letter topic's partition, looked through.
#[derive(Debug, Default)]
pub(super) struct Piece {
    /// The next offset to look at; where the piece began when nothing can be seen there yet.
    pub(super) next: u64,
    pub(super) examined: u64,
    pub(super) refused: u64,
    /// Offsets ascend.
    pub(super) letters: Vec<(u64, AppendEntry)>,
}

/// Looks through what comes after the redrive's position in a partition, until `most` letters are found.
///
/// # Errors
/// The letters cannot be read, or a topic is gone.
pub(super) async fn piece(
    broker: &Broker,
    row: &RedriveRow,
    partition: u32,
    most: usize,
) -> Result<Piece, BrokerError> {
    let gone = || EngineError::UnknownTopic(format!("a topic of redrive {:?}", row.id));
    let (topic, to) = row.dead_letters().zip(row.target()).ok_or_else(gone)?;
    let spec = row.spec.clone().unwrap_or_default();
    let place = partition as usize;
    let (from, end) = row.positions.get(place).copied().zip(row.ends.get(place).copied()).unwrap_or_default();
    let view = broker.view(PartitionKey { topic, partition })?;
    let partitions = u32::try_from(broker.views_of(to)?.len()).unwrap_or(u32::MAX);
    let batches = view.fetch_kept(from, READ_BYTES).await?;
    let mut piece = Piece { next: from, ..Piece::default() };
    for batch in &batches {
        for letter in batch::records(batch).map_err(unreadable)? {
            let letter = letter.map_err(unreadable)?;
            if letter.offset < from {
                continue;
            }
            if letter.offset >= end || piece.letters.len() >= most {
                piece.next = letter.offset.min(end);
                return Ok(piece);
            }
            piece.next = letter.offset + 1;
            piece.examined += 1;
            if !matches(&spec, &letter) {
                continue;
            }
            if !spec.force && dead_letter::redrive_count(&letter) >= MAX_REDRIVES {
                piece.refused += 1;
                continue;
            }
            let bytes = dead_letter::redriven(&letter, broker.wall_ms()).map_err(unreadable)?;
            let header = BatchHeader::parse(&bytes).map_err(unreadable)?;
            let to = PartitionKey { topic: to, partition: place_of(&spec, &letter, partition, partitions) };
            let entry = AppendEntry { partition: to, batch: StagedBatch { header, bytes } };
            piece.letters.push((letter.offset, entry));
        }
    }
    if batches.is_empty() && view.high_watermark() >= end {
        // Nothing is there any more.
        piece.next = end;
    }
    Ok(piece)
}

fn unreadable(error: batch::BatchError) -> BrokerError {
    EngineError::InvalidRequest(format!("a dead letter cannot be read: {error}")).into()
}

/// Letters stay in the partition that they are in, unless they go to a topic that need not have as many.
fn place_of(spec: &RedriveSpec, letter: &Record, partition: u32, partitions: u32) -> u32 {
    if spec.target != target::TOPIC {
        return partition;
    }
    letter.key.as_ref().map_or(partition % partitions.max(1), |key| partition_for_key(key, partitions))
}

fn matches(spec: &RedriveSpec, letter: &Record) -> bool {
    let text = |name: &str| dead_letter::header(letter, name).unwrap_or_default();
    (spec.class.is_empty() || text("class") == spec.class)
        && (spec.reason.is_empty() || text("reason") == spec.reason)
        && spec.key.as_ref().is_none_or(|key| letter.key.as_deref() == Some(&key[..]))
        && spec.from_ms.is_none_or(|from| letter.timestamp >= from)
        && spec.until_ms.is_none_or(|until| letter.timestamp < until)
}

/// What a redrive would do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Preview {
    pub examined: u64,
    pub moved: u64,
    pub refused: u64,
}

/// Goes through the letters as the redrive `row`, which has not begun, would; moves none.
///
/// # Errors
/// The letters cannot be read.
pub async fn preview(broker: &Broker, row: &RedriveRow) -> Result<Preview, BrokerError> {
    let mut row = row.clone();
    let mut seen = Preview::default();
    let spec = row.spec.clone().unwrap_or_default();
    for partition in 0..u32::try_from(row.positions.len()).unwrap_or(u32::MAX) {
        let place = partition as usize;
        while row.positions[place] < row.ends[place] && row.room() != Some(0) {
            let most = row.room().map_or(usize::MAX, |room| usize::try_from(room).unwrap_or(usize::MAX));
            let piece = piece(broker, &row, partition, most).await?;
            if piece.next == row.positions[place] {
                break;
            }
            let pending = Command::PendingLetters {
                group: spec.group.clone(),
                source_topic: spec.source_topic.clone(),
                partition,
                offsets: piece.letters.iter().map(|(offset, _)| *offset).collect(),
            };
            let Reply::PendingLetters(pending) = broker.call(pending).await? else {
                return Err(BrokerError::Unexpected("PendingLetters"));
            };
            row.positions[place] = piece.next;
            row.moved += pending.len() as u64;
            seen.examined += piece.examined;
            seen.refused += piece.refused;
        }
    }
    Ok(Preview { moved: row.moved, ..seen })
}
