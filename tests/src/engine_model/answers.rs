//! The log's side: what the shard would read and hand back to the engine, and the passing of time.

use bytes::BytesMut;
use felucca_broker::engine::command::{Command, LetterError, ScannedRecord, StagedBatch};
use felucca_broker::engine::dead_letter;
use felucca_broker::engine::effect::{DeadLetterRead, Scan};
use felucca_broker::engine::types::PartitionKey;
use felucca_protocol::batch::{BatchHeader, Record};

use super::store::Appended;
use super::world::World;

pub(crate) fn staged(bytes: BytesMut) -> StagedBatch {
    let header = BatchHeader::parse(&bytes).expect("a batch that was just built");
    StagedBatch { header, bytes }
}

impl World {
    pub(crate) fn advance(&mut self, ms: u64) {
        self.note(|| format!("{ms} ms pass"));
        self.now.monotonic_ms += ms;
        self.now.wall_ms += ms.cast_signed();
        if self.rng.chance(5) {
            self.now.wall_ms += self.rng.below(7_200_000).cast_signed() - 3_600_000;
        }
    }

    /// Answers each open scan with this probability.
    pub(crate) fn answer_scans(&mut self, percent: u64) {
        for scan in std::mem::take(&mut self.scans) {
            if !self.rng.chance(percent) {
                self.scans.push(scan);
            } else if percent < 100 && self.rng.chance(4) {
                self.note(|| format!("scan fails: {scan:?}"));
                self.live.scans_paused_until = self.now.monotonic_ms + 1_000;
                let (group, partition, from) = (scan.group, scan.partition, scan.from);
                self.tell(Command::ScanFailed { group, partition, from, reason: "the disk".to_owned() });
            } else {
                self.answer_scan(scan);
            }
        }
        self.check_fresh();
    }

    fn answer_scan(&mut self, scan: Scan) {
        let Scan { group, partition, from, until, max_records, soon: _ } = scan;
        let most = if self.rng.chance(40) { self.rng.between(1, 6) as usize } else { max_records };
        let found =
            self.logs.records.get(&partition).into_iter().flat_map(|records| records.range(from..until));
        let records: Vec<ScannedRecord> = found
            .take(most)
            .map(|(offset, (entry, _))| ScannedRecord { offset: *offset, slot: entry.slot, size: entry.size })
            .collect();
        let cut = records.len() == most;
        let next = records.last().filter(|_| cut).map_or(until, |record| record.offset + 1);
        self.note(|| format!("scan of {group} {partition} {from}..{next}: {} records", records.len()));
        self.tell(Command::Scanned { group, partition, from, next, records });
    }

    /// Hands in each dead letter that is being made with this probability.
    pub(crate) fn answer_letters(&mut self, percent: u64) {
        for read in std::mem::take(&mut self.letters) {
            if !self.rng.chance(percent) {
                self.letters.push(read);
                continue;
            }
            if self.rng.chance(5) {
                // A second answer changes nothing.
                self.answer_letter(&read);
            }
            self.answer_letter(&read);
        }
    }

    fn answer_letter(&mut self, read: &DeadLetterRead) {
        let DeadLetterRead { group, partition, offset, context } = read;
        let record = self.logs.records.get(partition).and_then(|records| records.get(offset)).cloned();
        let (_, record) = record.expect("a record that was handed out is in the log");
        let name =
            self.model.topics.get(&partition.topic).map_or_else(String::new, |topic| topic.name.clone());
        let readable = !self.rng.chance(self.unreadable);
        let letter = if readable {
            Ok(staged(dead_letter::build(&record, context, &name).expect("a dead letter")))
        } else {
            Err(LetterError::Record("damaged".to_owned()))
        };
        self.note(|| format!("dead letter of {group} {partition} {offset}, readable {readable}"));
        let awaited = self.model.awaits_letter(group, (*partition, *offset));
        self.live.letters.remove(&(group.clone(), *partition, *offset));
        let (group, partition, offset) = (group.clone(), *partition, *offset);
        self.tell(Command::DeadLetterBuilt { group: group.clone(), partition, offset, letter });
        let at = self.moment();
        if awaited {
            self.model.letter_in(at, &group, (partition, offset), readable);
        }
        if !(awaited && readable) {
            self.check_fresh();
            return;
        }
        let topic = self.model.letters_of(&group, partition.topic).expect("a dead-letter topic");
        let target = PartitionKey { topic, partition: partition.partition };
        let fresh = self.take_fresh();
        assert_eq!(fresh.len(), 1, "one dead letter in the frame of its settlement");
        assert_eq!(fresh[0].key, target);
        check_letter(&record, &fresh[0].records, &group, partition, offset);
        self.append_to_model(&fresh[0], None);
    }

    pub(crate) fn append_to_model(&mut self, batch: &Appended, origin: Option<super::model::log::Origin>) {
        let times = batch.records.iter().map(|record| record.timestamp.min(self.now.wall_ms));
        let entries: Vec<_> = batch.entries.iter().copied().zip(times).collect();
        self.model.appended(
            &batch.key,
            batch.base,
            &entries,
            origin,
            self.settings.max_producers_per_partition,
        );
        let early = self.model.topics[&batch.key.topic].early;
        let end = batch.base + batch.entries.len() as u64;
        self.live.raised(batch.key, self.lsn(), end, early);
    }
}

/// A dead letter is the record as it was, with headers that say where it comes from.
fn check_letter(source: &Record, letters: &[Record], group: &str, key: PartitionKey, offset: u64) {
    let [letter] = letters else { panic!("one record: {letters:?}") };
    assert_eq!((&letter.key, &letter.value), (&source.key, &source.value));
    let own = |name: &str| name.starts_with("__dlq.errors.");
    let kept = |record: &Record| -> Vec<_> {
        record.headers.iter().filter(|header| !own(&header.name)).cloned().collect()
    };
    assert_eq!(kept(letter), kept(source), "headers of the original");
    let text = |name: &str| {
        let name = format!("__dlq.errors.{name}");
        let header = letter.headers.iter().find(|header| header.name == name);
        String::from_utf8(header.and_then(|header| header.value.clone()).unwrap_or_default().to_vec())
            .expect("text")
    };
    assert_eq!(text("group"), group);
    assert_eq!(text("partition"), key.partition.to_string());
    assert_eq!(text("offset"), offset.to_string());
}
