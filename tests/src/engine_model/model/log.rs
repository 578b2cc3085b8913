//! Partitions: dense offsets, and what each producer sent last.

use std::collections::{BTreeMap, VecDeque};

use felucca_broker::engine::types::PartitionKey;

use super::Model;

/// A record as far as the model looks into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Differs between any two records that are not copies of each other.
    pub(crate) identity: u64,
    pub(crate) slot: Option<u16>,
    pub(crate) size: u32,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Sent {
    pub(crate) first: u32,
    pub(crate) count: u32,
    pub(crate) base_offset: u64,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Producer {
    pub(crate) epoch: u16,
    /// At most the last five.
    pub(crate) sent: VecDeque<Sent>,
}

impl Producer {
    pub(crate) fn next_sequence(&self) -> u32 {
        self.sent.back().map_or(0, |sent| sent.first + sent.count)
    }
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Log {
    /// Records below it are for share groups that had them in hand before.
    pub(crate) log_start: u64,
    pub(crate) end: u64,
    pub(crate) entries: BTreeMap<u64, Entry>,
    /// When each record was made, or appended if that was before, Unix ms.
    pub(crate) times: BTreeMap<u64, i64>,
    pub(crate) producers: BTreeMap<u64, Producer>,
    /// Records may have been shown before they were synced: a power loss may leave a gap.
    pub(crate) was_written: bool,
}

/// What must become of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Append,
    Duplicate(u64),
    OutOfOrder { expected: u32 },
    Fenced,
    UnknownProducer,
}

/// Producer fields of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Origin {
    pub(crate) producer: u64,
    pub(crate) epoch: u16,
    pub(crate) first: u32,
}

impl Model {
    pub(crate) fn fate(&self, key: &PartitionKey, origin: Option<Origin>, count: u32) -> Fate {
        let Some(origin) = origin else { return Fate::Append };
        if origin.producer >= self.next_producer {
            return Fate::UnknownProducer;
        }
        let next = |expected: u32| {
            if origin.first == expected { Fate::Append } else { Fate::OutOfOrder { expected } }
        };
        let Some(producer) = self.logs[key].producers.get(&origin.producer) else { return next(0) };
        if origin.epoch < producer.epoch {
            return Fate::Fenced;
        }
        if origin.epoch > producer.epoch {
            return next(0);
        }
        let same = |sent: &&Sent| sent.first == origin.first && sent.count == count;
        match producer.sent.iter().find(same) {
            Some(sent) => Fate::Duplicate(sent.base_offset),
            None => next(producer.next_sequence()),
        }
    }

    /// Whether retention may delete everything below `log_start` now.
    pub(crate) fn has_outlived(&self, key: &PartitionKey, log_start: u64, wall_ms: i64) -> bool {
        let Some(retention_ms) = self.topics[&key.topic].retention_ms else { return false };
        let log = &self.logs[key];
        let mut going = log.times.range(log.log_start..log_start).map(|(_, time)| *time);
        going.all(|time| time + retention_ms.cast_signed() < wall_ms)
    }

    /// Deletes what lies below: what no share group was given yet is expired.
    pub(crate) fn raise_log_start(&mut self, key: &PartitionKey, log_start: u64) {
        let log = self.logs.get_mut(key).expect("a known partition");
        assert!((log.log_start..=log.end).contains(&log_start), "{key} starts at {log_start}: {log:?}");
        for part in self.shares.values_mut().filter_map(|share| share.parts.get_mut(key)) {
            let from = part.start.max(log.log_start).min(log_start);
            let going = log.entries.range(from..log_start).map(|(offset, _)| *offset);
            part.counts.expired += going.filter(|offset| !part.records.contains_key(offset)).count() as u64;
        }
        log.log_start = log_start;
    }

    /// Whether a share group still has to do with a record in `from..until`.
    pub(crate) fn in_hand(&self, key: &PartitionKey, from: u64, until: u64) -> bool {
        let parts = self.shares.values().filter_map(|share| share.parts.get(key));
        parts.flat_map(|part| part.records.range(from..until)).any(|(_, record)| !record.is_settled())
    }

    /// Takes in a batch that was appended.
    pub(crate) fn appended(
        &mut self,
        key: &PartitionKey,
        base: u64,
        entries: &[(Entry, i64)],
        origin: Option<Origin>,
        max_producers: u64,
    ) {
        let log = self.logs.get_mut(key).expect("an append to a partition that the model does not have");
        assert_eq!(base, log.end, "offsets of {key} are not dense");
        for (offset, (entry, time)) in (base..).zip(entries) {
            log.entries.insert(offset, *entry);
            log.times.insert(offset, *time);
        }
        log.end += entries.len() as u64;
        let Some(origin) = origin else { return };
        if !log.producers.contains_key(&origin.producer) && log.producers.len() as u64 >= max_producers {
            // The one that was silent longest is forgotten.
            let last = |(id, producer): (&u64, &Producer)| (producer.sent.back().map(|s| s.base_offset), *id);
            let silent = log.producers.iter().map(last).min().map(|(_, id)| id);
            log.producers.retain(|id, _| Some(*id) != silent);
        }
        let fresh = || Producer { epoch: origin.epoch, sent: VecDeque::new() };
        let producer = log.producers.entry(origin.producer).or_insert_with(fresh);
        if producer.epoch != origin.epoch {
            *producer = fresh();
        }
        if producer.sent.len() == 5 {
            producer.sent.pop_front();
        }
        let count = entries.len() as u32;
        producer.sent.push_back(Sent { first: origin.first, count, base_offset: base });
    }
}
