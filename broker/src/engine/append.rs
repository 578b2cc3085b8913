//! Appending record batches.

use felucca_protocol::batch::BatchHeader;

use super::Engine;
use super::command::{AppendEntry, StagedBatch};
use super::effect::{Advance, Appended, Effects, TopicKind};
use super::error::EngineError;
use super::event::{self, Event, event::Kind};
use super::partition::Sequence;
use super::types::{Level, Lsn, PartitionKey};
use crate::plants::planted;

/// Who appends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin<'a> {
    Producer,
    /// The outputs of a redrive through this hidden group: may also go to the redrive topic, which has the same name.
    Redrive(&'a str),
    /// The engine itself.
    DeadLetter,
}

impl Engine {
    /// Appends each entry or refuses it; one result per entry. Answers also the level at which the reply may leave.
    pub(super) fn append(
        &mut self,
        lsn: Lsn,
        asked: Level,
        entries: Vec<AppendEntry>,
        out: &mut Effects,
    ) -> (Vec<Result<Appended, EngineError>>, Level) {
        let mut level = asked;
        let mut results = Vec::with_capacity(entries.len());
        for entry in entries {
            let header = &entry.batch.header;
            let checked = self.check_append(entry.partition, asked, header, Origin::Producer);
            let count = u64::from(header.last_offset_delta) + 1;
            results.push(checked.map(|sequence| match sequence {
                Sequence::Duplicate(base_offset) if !planted("accept-duplicates") => {
                    let partition = self.partitions.get(&entry.partition);
                    let shown_at = partition.map(|partition| partition.may_show(base_offset + count));
                    level = level.max(shown_at.unwrap_or(Level::Synced));
                    Appended { base_offset, duplicate: true }
                }
                Sequence::Duplicate(_) | Sequence::Next => {
                    let (base_offset, shown_at) = self.append_checked(lsn, entry.partition, entry.batch, out);
                    level = level.max(shown_at);
                    Appended { base_offset, duplicate: false }
                }
            }));
        }
        (results, level)
    }

    pub(super) fn check_append(
        &self,
        key: PartitionKey,
        asked: Level,
        header: &BatchHeader,
        origin: Origin<'_>,
    ) -> Result<Sequence, EngineError> {
        let Some(topic) = self.catalog.get(&key.topic) else {
            return Err(EngineError::UnknownTopic(key.topic.to_string()));
        };
        let Some(partition) = self.partitions.get(&key) else {
            return Err(EngineError::UnknownPartition(key));
        };
        let may_write = match origin {
            Origin::Producer => topic.kind == TopicKind::Standard,
            Origin::Redrive(own) => topic.kind == TopicKind::Standard || *topic.name == *own,
            Origin::DeadLetter => true,
        };
        if !may_write {
            return Err(EngineError::ForeignProducer(topic.name.to_string()));
        }
        if asked == Level::Written && !topic.config.allow_written {
            return Err(EngineError::WrittenNotAllowed(topic.name.to_string()));
        }
        if let Ok(producer_id) = u64::try_from(header.producer_id)
            && producer_id >= self.meta.next_producer_id
        {
            return Err(EngineError::UnknownProducer(producer_id));
        }
        let sequence = partition.check_sequence(header)?;
        match self.no_room {
            // What was taken before is answered as ever. A dead letter is part of settling its source, which goes on.
            Some(no_room) if sequence == Sequence::Next && origin != Origin::DeadLetter => {
                Err(EngineError::DiskFull(no_room))
            }
            _ => Ok(sequence),
        }
    }

    /// Appends a checked batch; answers its base offset, and the level before which its offsets may not be shown.
    pub(super) fn append_checked(
        &mut self,
        lsn: Lsn,
        key: PartitionKey,
        mut batch: StagedBatch,
        out: &mut Effects,
    ) -> (u64, Level) {
        let Some(config) = self.catalog.get(&key.topic).map(|topic| topic.config.clone()) else {
            return (0, Level::Synced);
        };
        let Some(partition) = self.partitions.get(&key) else { return (0, Level::Synced) };
        let (topic_id, index) = (key.topic.0.to_vec(), key.partition);
        if partition.is_full(batch.bytes.len() as u64, config.segment_bytes) {
            self.begin_segment(key, out);
        }
        if config.allow_written
            && let Some(partition) = self.partitions.get(&key)
            && let Some(ceiling) = partition.next_ceiling()
        {
            self.ceilings.push_back((lsn, key, ceiling));
            let raised = event::CeilingRaised { topic_id: topic_id.clone(), partition: index, ceiling };
            self.stage_event(Kind::CeilingRaised(raised), out);
        }
        let Some(partition) = self.partitions.get_mut(&key) else { return (0, Level::Synced) };
        partition.assign(&mut batch.bytes);
        batch.header.base_offset = partition.end;
        let bytes = batch.bytes.freeze();
        let write = partition.append(
            &batch.header,
            bytes.clone(),
            self.wall_ms,
            self.settings.max_producers_per_partition,
        );
        let high_watermark = partition.end;
        let may_show = partition.may_show(high_watermark);
        self.desk.dirty.insert(super::stage::RowKey::Partition(key));
        let appended = event::Appended { topic_id, partition: index, place: None };
        out.events.push(Event { kind: Some(Kind::Appended(appended)) });
        out.batches.push(bytes);
        out.segment_writes.push(write);
        let level = config.visibility.max(may_show);
        out.advances.push(Advance { partition: key, high_watermark, level });
        match level {
            Level::Written => self.unwritten.push_back((lsn, key, high_watermark)),
            Level::Synced => self.unsynced.push_back((lsn, key, high_watermark)),
        }
        (batch.header.base_offset, may_show)
    }
}
