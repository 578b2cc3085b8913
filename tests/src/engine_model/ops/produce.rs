//! Producers: new batches, repeated ones, and ones that must be refused.

use felucca_broker::engine::command::{AppendEntry, Command};
use felucca_broker::engine::effect::{Appended, Reply};
use felucca_broker::engine::error::EngineError;
use felucca_broker::engine::types::{Level, PartitionKey};
use felucca_protocol::batch::BatchBuilder;

use crate::engine_model::answers::staged;
use crate::engine_model::model::log::{Fate, Origin};
use crate::engine_model::model::topics::Kind;
use crate::engine_model::promises::Fact;
use crate::engine_model::world::World;

/// The last two share a slot.
const KEYS: [&str; 5] = ["ada", "bob", "cyd", "customer 8", "customer 2040"];

impl World {
    pub(crate) fn init_producer(&mut self) {
        let reply = self.ask(Command::InitProducer, Level::Synced);
        assert_eq!(reply, Reply::Producer { producer_id: self.model.next_producer, epoch: 0 });
        self.model.next_producer += 1;
    }

    /// A batch of records that were never seen before.
    pub(crate) fn new_batch(&mut self, origin: Option<Origin>, count: u32) -> bytes::BytesMut {
        let mut builder = BatchBuilder::new();
        if let Some(Origin { producer, epoch, first }) = origin {
            builder = builder.producer(producer.cast_signed(), epoch.cast_signed(), first.cast_signed());
        }
        for _ in 0..count {
            self.next_value += 1;
            let key = if self.rng.chance(self.keyed) { self.rng.pick(&KEYS).copied() } else { None };
            let mut value = format!("value {}", self.next_value).into_bytes();
            if self.rng.chance(2) {
                value.resize(20_000, b'.');
            }
            let headers: &[(&str, Option<&[u8]>)] = if self.rng.chance(20) {
                &[("traceparent", Some(b"00-1-2-01")), ("empty", None)]
            } else {
                &[]
            };
            builder
                .push(self.now.wall_ms, key.map(str::as_bytes), Some(&value), headers)
                .expect("a small record");
        }
        builder.finish()
    }

    fn draw_origin(&mut self, key: &PartitionKey, count: &mut u32) -> Option<Origin> {
        if self.model.next_producer == 0 || self.rng.chance(30) {
            return None;
        }
        let unknown = u64::from(self.rng.chance(3));
        let producer = self.rng.below(self.model.next_producer.min(3) + unknown);
        let known = self.model.logs[key].producers.get(&producer).cloned();
        let epoch = known.as_ref().map_or(0, |known| known.epoch);
        let next = known.as_ref().map_or(0, |known| known.next_sequence());
        let draw = self.rng.below(100);
        let (epoch, first) = match (draw, known) {
            (0..30, Some(known)) => {
                let sent: Vec<_> = known.sent.iter().cloned().collect();
                let recent = if self.rng.chance(50) { sent.len().saturating_sub(1) } else { 0 };
                let sent = self.rng.pick(&sent[recent..]).cloned()?;
                *count = sent.count;
                (epoch, sent.first)
            }
            (30..34, _) => (epoch, next + 1 + self.rng.below(3) as u32),
            (34..38, Some(_)) => (epoch + 1, 0),
            (38..41, Some(_)) if epoch > 0 => (epoch - 1, next),
            _ => (epoch, next),
        };
        Some(Origin { producer, epoch, first })
    }

    pub(crate) fn produce(&mut self) {
        let asked = if self.rng.chance(40) { Level::Written } else { Level::Synced };
        let mut entries = Vec::new();
        let mut plan: Vec<(PartitionKey, Option<Origin>, u32, bytes::BytesMut)> = Vec::new();
        for _ in 0..self.rng.between(1, 2) {
            let Some(key) = self.any_partition() else { return };
            // Two batches of one request for one partition would make the second depend on the first.
            if plan.iter().any(|(other, ..)| *other == key) {
                continue;
            }
            let mut count = self.rng.between(1, 5) as u32;
            let origin = self.draw_origin(&key, &mut count);
            let batch = staged(self.new_batch(origin, count));
            plan.push((key, origin, count, batch.bytes.clone()));
            entries.push(AppendEntry { partition: key, batch });
        }
        self.note(|| {
            let plan: Vec<_> = plan.iter().map(|(key, origin, count, _)| (key, origin, count)).collect();
            format!("append {asked:?} {plan:?}")
        });
        let Reply::Appended(results) = self.ask(Command::Append { level: asked, entries }, asked) else {
            panic!("appended")
        };
        assert_eq!(results.len(), plan.len());
        for ((key, origin, count, bytes), result) in plan.into_iter().zip(results) {
            self.check_append(asked, key, origin, count, &bytes, result);
        }
    }

    fn check_append(
        &mut self,
        asked: Level,
        key: PartitionKey,
        origin: Option<Origin>,
        count: u32,
        bytes: &[u8],
        result: Result<Appended, EngineError>,
    ) {
        let topic = &self.model.topics[&key.topic];
        if topic.kind != Kind::Standard {
            assert!(matches!(result, Err(EngineError::ForeignProducer(_))), "{result:?}");
            return;
        }
        if asked == Level::Written && !topic.allow_written {
            assert!(matches!(result, Err(EngineError::WrittenNotAllowed(_))), "{result:?}");
            return;
        }
        let fate = self.model.fate(&key, origin, count);
        match (fate, &result) {
            (Fate::Append, Ok(Appended { base_offset, duplicate: false })) => {
                let fresh = self.take_fresh();
                let (mine, others): (Vec<_>, Vec<_>) = fresh.into_iter().partition(|batch| batch.key == key);
                self.put_back_fresh(others);
                let [batch] = mine.as_slice() else { panic!("one batch for {key}: {mine:?}") };
                assert_eq!(batch.base, *base_offset);
                assert_eq!(batch.bytes[16..], bytes[16..], "the batch as it was sent");
                self.append_to_model(batch, origin);
                self.promise_stored(key, batch.base, count);
            }
            (Fate::Duplicate(first), Ok(Appended { base_offset, duplicate: true })) => {
                assert_eq!(*base_offset, first, "a repeated batch is answered with its first offset");
                self.promise_stored(key, first, count);
            }
            (Fate::OutOfOrder { expected: right }, Err(EngineError::OutOfOrderSequence { expected, .. })) => {
                assert_eq!(*expected, right);
            }
            (Fate::Fenced, Err(EngineError::ProducerFenced { .. }))
            | (Fate::UnknownProducer, Err(EngineError::UnknownProducer(_))) => {}
            _ => panic!("{key} {origin:?} of {count}: expected {fate:?}, got {result:?}"),
        }
    }

    fn promise_stored(&mut self, key: PartitionKey, base: u64, count: u32) {
        let entries = &self.model.logs[&key].entries;
        let identities = entries.range(base..base + u64::from(count)).map(|(_, e)| e.identity).collect();
        self.promise(Fact::Stored { key, base, identities });
    }
}
