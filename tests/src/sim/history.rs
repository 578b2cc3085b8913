//! What has left the broker about records, and must therefore be so for ever.
//!
//! Rules: what was acknowledged or shown is there, at its offset, with its bytes; what was only `written` may go with the
//! power, but its offset is never given to another record; no record of an idempotent producer is at two offsets, and they
//! are in its order, without holes; no other record is there more often than it was sent; offsets are dense but for a gap
//! after lost power; the high watermark never falls; nothing below the log start is deleted but what was to be.

use std::collections::{BTreeMap, BTreeSet};

use felucca_broker::engine::types::{Level, Lsn, PartitionKey, TopicId};
use felucca_protocol::batch::Record;

use super::compacted::Compacted;
use super::content::{Identity, LetterSource, identify, letter_source};

/// Makers below are idempotent producers, known to the broker by this number.
pub(crate) const ANONYMOUS: u32 = 1_000_000;
/// Makers from here on are outputs of `complete`.
pub(crate) const OUTPUTS: u32 = 2_000_000;
/// The numbers of a maker begin with the partition that they are for; so many are in each.
pub(crate) const PER_TARGET: u32 = 1 << 20;

/// A record that must be there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub(crate) identity: Identity,
    /// Of the whole record, once it was read.
    checksum: Option<u32>,
    /// It survives lost power when this frame was synced; 0: in any case.
    needs: Lsn,
    /// The last frame written when it was first heard of; its own is not above.
    known: Lsn,
}

/// What is known of a partition.
#[derive(Debug)]
pub(crate) struct Log {
    pub(crate) topic: String,
    pub(crate) kind: Kind,
    entries: BTreeMap<u64, Entry>,
    /// Went with the power; the offsets are theirs all the same.
    lost: BTreeMap<u64, Identity>,
    /// Offsets that nothing is at, from and to.
    gaps: BTreeSet<(u64, u64)>,
    power_lost: bool,
    high_watermark: u64,
    log_start: u64,
    /// Records below may be deleted by command; and those below the second were, as was answered.
    deletable: u64,
    deleted: u64,
    /// Everything below was read since the last start.
    read_to: u64,
    /// The newest record of each idempotent producer that was read since then.
    newest: BTreeMap<u32, u32>,
    /// Of a compacted log: all that was read since then; and tombstones that may be in it though nobody was told so.
    found: BTreeMap<u64, Identity>,
    unheard: BTreeSet<Identity>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Standard {
        allow_written: bool,
        visibility: Level,
        retention: bool,
        compact: bool,
    },
    /// Dead letters of a share group.
    Letters,
    /// Redriven records of a share group.
    Redriven,
}

/// All partitions, by key.
#[derive(Debug, Default)]
pub(crate) struct History {
    pub(crate) logs: BTreeMap<PartitionKey, Log>,
    /// Where each record is.
    places: BTreeMap<Identity, BTreeSet<(PartitionKey, u64)>>,
    /// How often the broker was handed a record that is not an idempotent producer's.
    handed: BTreeMap<Identity, u64>,
    letters: BTreeMap<LetterSource, (PartitionKey, u64)>,
    /// Gaps after lost power.
    pub(crate) gaps: u64,
    /// How often a log start was raised by retention.
    pub(crate) expiries: u64,
    /// Tombstones that went when their time was over.
    pub(crate) tombstones_gone: u64,
    /// Topics that were deleted, as was answered.
    pub(crate) deleted: BTreeSet<TopicId>,
}

impl History {
    pub(crate) fn add(&mut self, key: PartitionKey, topic: &str, kind: Kind) {
        self.logs.entry(key).or_insert_with(|| Log {
            topic: topic.to_owned(),
            kind,
            entries: BTreeMap::new(),
            lost: BTreeMap::new(),
            gaps: BTreeSet::new(),
            power_lost: false,
            high_watermark: 0,
            log_start: 0,
            deletable: 0,
            deleted: 0,
            read_to: 0,
            newest: BTreeMap::new(),
            found: BTreeMap::new(),
            unheard: BTreeSet::new(),
        });
    }

    /// The broker was given a batch; it may append it once, whatever becomes of the answer.
    pub(crate) fn hand(&mut self, identities: impl Iterator<Item = Identity>) {
        for identity in identities {
            *self.handed.entry(identity).or_default() += 1;
        }
    }

    /// The broker was given records for a partition.
    pub(crate) fn send(&mut self, key: PartitionKey, identities: impl Iterator<Item = Identity>) {
        let Some(log) = self.logs.get_mut(&key).filter(|log| log.is_compacted()) else { return };
        log.unheard.extend(identities.filter(Identity::is_tombstone));
    }

    /// A reply said that these records are here. `lsn`: the last frame written when it left.
    pub(crate) fn stored(
        &mut self,
        key: PartitionKey,
        base: u64,
        identities: impl Iterator<Item = Identity>,
        level: Level,
        lsn: Lsn,
    ) {
        let needs = if level == Level::Synced { 0 } else { lsn };
        for (offset, identity) in (base..).zip(identities) {
            self.put(key, offset, identity, None, needs, lsn);
        }
    }

    fn put(
        &mut self,
        key: PartitionKey,
        offset: u64,
        identity: Identity,
        checksum: Option<u32>,
        needs: Lsn,
        known: Lsn,
    ) {
        let Some(log) = self.logs.get_mut(&key) else { return };
        if let Some(lost) = log.lost.get(&offset) {
            assert_eq!(*lost, identity, "offset {offset} of {} {key} was given out before", log.topic);
        }
        let in_gap = log.gaps.iter().find(|(from, to)| (*from..*to).contains(&offset));
        assert!(
            in_gap.is_none(),
            "offset {offset} of {} {key} is used, and was passed over: {in_gap:?}",
            log.topic
        );
        let entry = log.entries.entry(offset).or_insert(Entry { identity, checksum: None, needs, known });
        assert_eq!(entry.identity, identity, "offset {offset} of {} {key} held another record", log.topic);
        if let (Some(before), Some(now)) = (entry.checksum, checksum) {
            assert_eq!(before, now, "offset {offset} of {} {key} has other bytes than before", log.topic);
        }
        log.unheard.remove(&identity);
        entry.checksum = entry.checksum.or(checksum);
        entry.needs = entry.needs.min(needs);
        entry.known = entry.known.min(known);
        if log.kind == Kind::Letters {
            return;
        }
        let places = self.places.entry(identity).or_default();
        places.insert((key, offset));
        let most = if identity.maker < ANONYMOUS && identity.redrives == 0 {
            1
        } else {
            self.handed.get(&identity).copied().unwrap_or(0)
        };
        assert!(places.len() as u64 <= most, "{identity:?} is at {places:?}, and was sent {most} times");
    }

    /// Where the broker says that a partition starts and ends.
    pub(crate) fn bounds(&mut self, key: PartitionKey, log_start: u64, high_watermark: u64) {
        let Some(log) = self.logs.get_mut(&key) else { return };
        let name = &log.topic;
        let before = log.high_watermark;
        assert!(
            high_watermark >= before,
            "the high watermark of {name} {key} fell from {before} to {high_watermark}"
        );
        assert!(
            log_start <= high_watermark,
            "{name} {key} starts at {log_start} and ends at {high_watermark}"
        );
        assert!(
            log_start >= log.deleted,
            "{name} {key} starts at {log_start}, and {} was answered",
            log.deleted
        );
        assert!(
            log.may_start_at(log_start),
            "{name} {key} starts at {log_start}, and at most {} was to be deleted",
            log.deletable
        );
        self.expiries += u64::from(log_start > log.log_start && log_start > log.deletable);
        log.high_watermark = high_watermark;
        log.log_start = log_start;
        if log.read_to < log_start {
            log.read_to = log_start;
            log.newest.clear();
        }
    }

    /// Where the reader of a partition goes on.
    pub(crate) fn read_to(&self, key: PartitionKey) -> u64 {
        self.logs.get(&key).map_or(0, |log| log.read_to)
    }

    /// A record was read, behind those read before. `lsn`: the last frame written then. Returns where it came from, if it is
    /// a dead letter.
    pub(crate) fn read(&mut self, key: PartitionKey, record: &Record, lsn: Lsn) -> Option<LetterSource> {
        let log = self.logs.get_mut(&key)?;
        let offset = record.offset;
        let identity = identify(record)
            .unwrap_or_else(|wrong| panic!("offset {offset} of {} {key}: {wrong}", log.topic));
        assert!(offset >= log.read_to, "offset {offset} of {} {key} was read again", log.topic);
        assert!(offset < log.high_watermark, "offset {offset} of {} {key} is above the end", log.topic);
        self.gaps += u64::from(log.skip(key, offset));
        log.read_to = offset + 1;
        if log.is_compacted() {
            log.found.insert(offset, identity);
        }
        if identity.maker < ANONYMOUS && identity.redrives == 0 && log.kind != Kind::Letters {
            let from_start = log.log_start == 0 && !log.is_compacted();
            let before = log.newest.insert(identity.maker, identity.number);
            let number = identity.number;
            let follows = match before {
                None => !from_start || number.is_multiple_of(PER_TARGET),
                Some(before) if log.is_compacted() => before < number,
                Some(before) => before + 1 == number,
            };
            assert!(follows, "offset {offset} of {} {key}: {identity:?} comes after {before:?}", log.topic);
        }
        let needs = match log.kind {
            Kind::Standard { visibility: Level::Written, .. } => lsn,
            _ => 0,
        };
        let source = (log.kind == Kind::Letters)
            .then(|| letter_source(record).unwrap_or_else(|| panic!("a letter without its source")));
        self.put(key, offset, identity, Some(checksum(record)), needs, lsn);
        source
    }

    /// A dead letter was read, of a record that can have one only.
    pub(crate) fn letter(&mut self, source: LetterSource, key: PartitionKey, offset: u64) {
        let before = self.letters.insert(source.clone(), (key, offset));
        assert!(
            before.is_none_or(|before| before == (key, offset)),
            "{source:?} has two dead letters: {before:?} and {key} {offset}"
        );
    }

    /// Whether the record's dead letter was read.
    pub(crate) fn has_letter(&self, source: &LetterSource) -> bool {
        self.letters.contains_key(source)
    }

    /// The partition of a topic, by the topic's name.
    pub(crate) fn key_of(&self, topic: &str, partition: u32) -> Option<PartitionKey> {
        let mut found =
            self.logs.iter().filter(|(key, log)| log.topic == topic && key.partition == partition);
        found.next().map(|(key, _)| *key)
    }

    /// Nothing more is below the high watermark.
    pub(crate) fn read_all(&mut self, key: PartitionKey) {
        if let Some(log) = self.logs.get_mut(&key) {
            self.gaps += u64::from(log.skip(key, log.high_watermark));
            log.read_to = log.read_to.max(log.high_watermark);
        }
    }

    /// Up to there nothing more is in a compacted log.
    pub(crate) fn read_past(&mut self, key: PartitionKey, to: u64) {
        if let Some(log) = self.logs.get_mut(&key).filter(|log| log.is_compacted()) {
            log.read_to = log.read_to.max(to);
        }
    }

    /// A compacted log is read from its start again, since what is missing from it can be judged in one go only.
    pub(crate) fn read_anew(&mut self, key: PartitionKey) {
        if let Some(log) = self.logs.get_mut(&key).filter(|log| log.is_compacted()) {
            log.begin_reading();
        }
    }

    /// Whether a later record of the same key is known.
    pub(crate) fn is_superseded(&self, key: PartitionKey, offset: u64, identity: &Identity) -> bool {
        let Some(log) = self.logs.get(&key).filter(|log| log.is_compacted()) else { return false };
        let slot = identity.key();
        slot.is_some() && log.entries.range(offset + 1..).any(|(_, entry)| entry.identity.key() == slot)
    }

    /// The broker was asked to delete what is below an offset; `answered`: and did.
    pub(crate) fn delete_below(&mut self, key: PartitionKey, offset: u64, answered: bool) {
        let Some(log) = self.logs.get_mut(&key) else { return };
        log.deletable = log.deletable.max(offset);
        if answered {
            log.deleted = log.deleted.max(offset);
        }
    }

    /// The topic is gone, and may come again under its name with other ids.
    pub(crate) fn remove_topic(&mut self, topic: &str) {
        self.logs.retain(|_, log| log.topic != topic);
    }

    /// The process ended. With `Some(synced)` the power was lost: what needed a later frame may be gone.
    pub(crate) fn crash(&mut self, synced: Option<Lsn>) {
        for (key, log) in &mut self.logs {
            log.begin_reading();
            let Some(synced) = synced else { continue };
            log.power_lost = true;
            let gone: Vec<u64> =
                log.entries.iter().filter(|(_, entry)| entry.needs > synced).map(|(at, _)| *at).collect();
            for offset in gone {
                let Some(entry) = log.entries.remove(&offset) else { continue };
                log.lost.insert(offset, entry.identity);
                log.unheard.extend(Some(entry.identity).filter(Identity::is_tombstone));
                if let Some(places) = self.places.get_mut(&entry.identity) {
                    places.remove(&(*key, offset));
                }
            }
        }
    }

    /// After a start, when everything was read: nothing is missing, and all of it is on the device.
    pub(crate) fn check_complete(&mut self) {
        for (key, log) in &mut self.logs {
            let beyond = log.entries.range(log.high_watermark..).next();
            assert!(
                beyond.is_none(),
                "lost: {} {key} ends at {}, and this was acknowledged or shown: {beyond:?}",
                log.topic,
                log.high_watermark
            );
            if log.is_compacted() {
                let known = log.entries.range(log.log_start..).map(|(at, entry)| (*at, entry.identity, true));
                let found = log.found.range(log.log_start..).map(|(at, identity)| (*at, *identity));
                let compacted =
                    Compacted { known: known.collect(), found: found.collect(), unheard: &log.unheard };
                match compacted.check() {
                    Ok(gone) => self.tombstones_gone += gone,
                    Err(wrong) => panic!("{} {key}: {wrong}", log.topic),
                }
            }
            for entry in log.entries.values_mut() {
                entry.needs = 0;
            }
        }
    }

    /// A record was seen at an offset, by somebody who does not read in order.
    pub(crate) fn shown(&self, key: PartitionKey, offset: u64, identity: Identity) {
        let Some(log) = self.logs.get(&key) else { return };
        assert!(offset < log.high_watermark, "offset {offset} of {} {key} is shown above the end", log.topic);
        let known = log.entries.get(&offset).map(|entry| entry.identity);
        assert!(
            known.is_none_or(|known| known == identity),
            "offset {offset} of {} {key} holds {identity:?}, it held {known:?}",
            log.topic
        );
    }
}

impl Log {
    /// The first offset that nothing visible is at.
    pub(crate) fn end(&self) -> u64 {
        self.high_watermark
    }

    pub(crate) fn is_compacted(&self) -> bool {
        matches!(self.kind, Kind::Standard { compact: true, .. })
    }

    fn begin_reading(&mut self) {
        self.read_to = 0;
        self.newest.clear();
        self.found.clear();
    }

    /// Nothing was found from where the reader is to an offset. Returns whether that is news.
    fn skip(&mut self, key: PartitionKey, to: u64) -> bool {
        let from = self.read_to;
        if from >= to || self.is_compacted() {
            return false;
        }
        let missing = self.entries.range(from..to).next();
        assert!(
            missing.is_none(),
            "lost: {} {key} has nothing at {from}..{to}, where this was: {missing:?}",
            self.topic
        );
        let may = matches!(self.kind, Kind::Standard { allow_written: true, .. }) && self.power_lost;
        assert!(may, "{} {key} has a hole at {from}..{to}", self.topic);
        self.gaps.insert((from, to))
    }

    /// The next offset of which something is known.
    pub(crate) fn known_behind(&self, offset: u64) -> Option<u64> {
        self.entries.range(offset + 1..).next().map(|(at, _)| *at)
    }

    /// Whether all below the offset may have been deleted.
    pub(crate) fn may_start_at(&self, log_start: u64) -> bool {
        let retention = matches!(self.kind, Kind::Standard { retention: true, .. } | Kind::Letters);
        log_start <= self.deletable || retention
    }

    /// What must be there in a copy of the disk that has lost its power, or of which the journal behind a frame is gone, when
    /// the log starts at `log_start` there: a deletion that nobody was told of may be in it.
    pub(crate) fn must_have(&self, last: Option<Lsn>, log_start: u64) -> impl Iterator<Item = (u64, &Entry)> {
        let sure = move |entry: &Entry| entry.needs == 0 && last.is_none_or(|last| entry.known <= last);
        self.entries
            .range(self.log_start.max(log_start)..)
            .filter(move |(_, entry)| sure(entry))
            .map(|(at, entry)| (*at, entry))
    }

    /// What compaction may have left in such a copy, of which this was found.
    pub(crate) fn compacted(
        &self,
        last: Option<Lsn>,
        log_start: u64,
        found: BTreeMap<u64, Identity>,
    ) -> Compacted<'_> {
        let sure: BTreeSet<u64> = self.must_have(last, log_start).map(|(at, _)| at).collect();
        let known = self.entries.range(self.log_start.max(log_start)..);
        let known = known.map(|(at, entry)| (*at, entry.identity, sure.contains(at))).collect();
        Compacted { known, found, unheard: &self.unheard }
    }

    /// Whether a record read from a copy of the disk is what is known of it, if anything is.
    pub(crate) fn agrees(&self, record: &Record) -> Result<(), String> {
        let identity = identify(record).map_err(|wrong| format!("offset {}: {wrong}", record.offset))?;
        match self.entries.get(&record.offset) {
            Some(entry) if entry.identity != identity => {
                Err(format!("offset {} holds {identity:?}, it held {:?}", record.offset, entry.identity))
            }
            Some(entry) if entry.checksum.is_some_and(|known| known != checksum(record)) => {
                Err(format!("offset {} has other bytes than before", record.offset))
            }
            _ => Ok(()),
        }
    }
}

/// Of everything in a record.
fn checksum(record: &Record) -> u32 {
    let mut bytes = record.offset.to_be_bytes().to_vec();
    for part in [&record.key, &record.value] {
        bytes.extend_from_slice(part.as_deref().unwrap_or_default());
        bytes.push(0);
    }
    for header in &record.headers {
        bytes.extend_from_slice(header.name.as_bytes());
        bytes.extend_from_slice(header.value.as_deref().unwrap_or_default());
    }
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}
