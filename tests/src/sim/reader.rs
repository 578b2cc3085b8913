//! Those who read: consumers of groups, and one who reads everything in order and looks at every byte.

use felucca_broker::broker::Broker;
use felucca_broker::engine::types::PartitionKey;
use felucca_broker::log::{ReadError, ReadView, read_record};
use felucca_protocol::batch::{self, BatchHeader};

use super::consumer::Consumer;
use super::content::identify;
use super::leases::Spot;
use super::world::World;

/// Bytes that are read at a time.
const CONSUMER_BYTES: usize = 2 << 10;
const READER_BYTES: usize = 8 << 10;

/// A consumer reads on in what it owns.
pub(crate) fn consume(broker: &Broker, consumer: &mut Consumer) {
    let positions: Vec<(PartitionKey, u64)> = consumer.positions().collect();
    for (key, position) in positions {
        let Ok(view) = broker.view(key) else { continue };
        match view.read(position, CONSUMER_BYTES) {
            Ok(batches) => {
                let last = batches.last().and_then(|batch| BatchHeader::parse(batch).ok());
                // Where nothing is, there may be a hole up to the end.
                let to = last.map_or_else(|| view.high_watermark(), |header| header.last_offset() + 1);
                consumer.advance(key, to.max(position));
            }
            Err(ReadError::BelowStart { log_start }) => consumer.advance(key, log_start),
            Err(ReadError::AboveEnd { .. }) => panic!("a consumer of {key} is at {position}, beyond the end"),
            Err(ReadError::Corrupt { reason, .. }) => panic!("a consumer of {key} finds damage: {reason}"),
            Err(ReadError::Removed | ReadError::Io { .. }) => {}
        }
    }
}

impl World {
    /// Reads on in one partition.
    pub(crate) fn read_some(&mut self) {
        let keys: Vec<PartitionKey> = self.history.logs.keys().copied().collect();
        if self.rng.chance(20) {
            self.check_in_hand();
        } else if let Some(key) = self.rng.pick(&keys).copied() {
            self.read_on(key);
        }
    }

    /// Reads everything that is visible.
    pub(crate) fn read_everything(&mut self) {
        let keys: Vec<PartitionKey> = self.history.logs.keys().copied().collect();
        for key in keys {
            self.history.read_anew(key);
            for tries in 0.. {
                assert!(tries < 10_000, "{key} cannot be read to its end");
                if self.read_on(key) {
                    break;
                }
            }
        }
    }

    /// Reads on in a partition; true at its end.
    fn read_on(&mut self, key: PartitionKey) -> bool {
        let Some(broker) = &self.broker else { return true };
        let Ok(view) = broker.view(key) else { return true };
        self.history.bounds(key, view.log_start(), view.high_watermark());
        let from = self.history.read_to(key);
        match view.read(from, READER_BYTES) {
            Ok(batches) if batches.is_empty() => {
                self.history.read_all(key);
                true
            }
            Ok(batches) => {
                let records = batches.iter().flat_map(|batch| match batch::records(batch) {
                    Ok(records) => records.collect::<Vec<_>>(),
                    Err(error) => vec![Err(error)],
                });
                for record in records.collect::<Vec<_>>() {
                    let record = record.unwrap_or_else(|error| panic!("{key} from {from} on: {error}"));
                    if record.offset >= from {
                        self.read_record(key, &record);
                    }
                }
                // Compacted batches stand for what was behind them, too.
                let last = batches.last().and_then(|batch| BatchHeader::parse(batch).ok());
                self.history.read_past(key, last.map_or(from, |header| header.last_offset() + 1));
                false
            }
            Err(ReadError::Io { .. }) => {
                self.coverage.meet("reply", "read: Io");
                !self.harmed
            }
            Err(ReadError::Corrupt { reason, .. }) => panic!("{key} is damaged from {from} on: {reason}"),
            Err(error) => panic!("{key} cannot be read from {from} on: {error}"),
        }
    }

    fn read_record(&mut self, key: PartitionKey, record: &batch::Record) {
        let lsn = self.written();
        let Some(source) = self.history.read(key, record, lsn) else { return };
        let Some(at) = self.history.key_of(&source.topic, source.partition) else { return };
        if !self.leases.moved.contains(&source.group) {
            let spot: Spot = (source.group.clone(), at, source.offset);
            self.history.letter(source, key, record.offset);
            self.leases.buried(spot);
        }
    }

    /// What share groups have in hand can be read, whatever was deleted or compacted meanwhile.
    pub(crate) fn check_in_hand(&mut self) {
        let now_ms = self.monotonic_ms();
        let Some(broker) = &self.broker else { return };
        for (group, key, offset) in self.leases.in_hand(now_ms) {
            let Ok(view) = broker.view(*key) else { continue };
            let record = match read_record(&view, *offset) {
                Ok(Some(record)) => record,
                Err(ReadError::Io { .. }) => continue,
                other => panic!("{group} has {offset} of {key} in hand, which is not there: {other:?}"),
            };
            let identity =
                identify(&record).unwrap_or_else(|wrong| panic!("{group} has {offset} of {key}: {wrong}"));
            self.history.shown(*key, *offset, identity);
            if self.history.is_superseded(*key, *offset, &identity) {
                self.coverage.meet("log", "in hand and superseded");
            }
            if *offset < view.log_start() {
                self.coverage.meet("log", "in hand below the log start");
            }
        }
    }

    /// What can be looked at after every step.
    pub(crate) fn check_step(&mut self) {
        let (Some(broker), Some(shard)) = (&self.broker, &self.shard) else { return };
        let keys: Vec<PartitionKey> = self.history.logs.keys().copied().collect();
        for key in keys {
            match broker.view(key) {
                Ok(view) => self.history.bounds(key, view.log_start(), view.high_watermark()),
                Err(error) => panic!("a partition that was made is gone: {error}"),
            }
        }
        let shard_options = &self.options.shard;
        // A turn that begins below the limit may go beyond it by its own frame.
        let most = shard_options.max_unsynced_bytes + self.options.journal.max_frame_bytes;
        assert!(shard.unsynced_bytes() <= most, "{} bytes are unsynced", shard.unsynced_bytes());
        let log = shard.log();
        let most = self.options.log.unwritten_bytes + self.options.journal.max_frame_bytes;
        assert!(log.unwritten_bytes() <= most, "{} bytes are unwritten", log.unwritten_bytes());
        let most = self.options.log.tail_bytes as u64 + log.unwritten_bytes();
        assert!(log.tail_bytes() as u64 <= most, "{} bytes are in the tails", log.tail_bytes());
    }
}

/// The records of a view, those behind damage too: what was found, and offsets at which damage was reported. `next`: where
/// to go on behind an offset that cannot be read.
pub(crate) fn read_around_damage(
    view: &ReadView,
    next: impl Fn(u64) -> Option<u64>,
    mut each: impl FnMut(Result<&batch::Record, u64>),
) {
    let mut at = view.log_start();
    let end = view.high_watermark();
    while at < end {
        match view.read(at, READER_BYTES) {
            Ok(batches) if batches.is_empty() => return,
            Ok(batches) => {
                for batch in &batches {
                    let Ok(header) = BatchHeader::parse(batch) else { panic!("a batch without a header") };
                    let records =
                        batch::records(batch).unwrap_or_else(|error| panic!("a served batch: {error}"));
                    for record in records {
                        let record = record.unwrap_or_else(|error| panic!("a served record: {error}"));
                        if record.offset >= at {
                            each(Ok(&record));
                        }
                    }
                    at = at.max(header.last_offset() + 1);
                }
            }
            Err(_) => {
                each(Err(at));
                let Some(next) = next(at) else { return };
                at = next;
            }
        }
    }
}
