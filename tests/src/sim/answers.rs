//! What leaves the broker is written down, and held against what left it before.

use felucca_broker::engine::command::{LeaseRef, Outcome, Settlement};
use felucca_broker::engine::effect::{Delivery, Reply, SettleResult, SettleStatus};
use felucca_broker::engine::error::EngineError;
use felucca_broker::engine::types::{LeaseId, Level};
use felucca_broker::log::{ReadError, read_record};

use super::admin::standard;
use super::client::Asked;
use super::content::identify;
use super::leases::{Granted, Told, name_of};
use super::world::{Pending, World};

/// The settlement that `complete` stands for.
pub(crate) fn ack(record: LeaseRef) -> Settlement {
    Settlement { record, outcome: Outcome::Ack }
}

/// The name of an error, without what it is about.
fn error_name(error: &EngineError) -> String {
    let text = format!("{error:?}");
    text.split(['(', ' ', '{']).next().unwrap_or_default().to_owned()
}

impl World {
    pub(crate) fn reply_left(&mut self, correlation: u64, reply: &Reply) {
        let lsn = self.written();
        // Answered now, so that it is not looked at twice; the client finds it by the same number.
        let Some(pending) = self.pending.remove(&correlation) else { return };
        self.note(|| format!("  answer {correlation}: {}", short(reply)));
        match (&pending.asked, reply) {
            (Asked::Append { sent, level }, Reply::Appended(results)) => {
                for (sent, result) in sent.iter().zip(results) {
                    match result {
                        Ok(appended) => {
                            let what = if appended.duplicate { "append: duplicate" } else { "append: Ok" };
                            self.coverage.meet("reply", what);
                            let records = sent.identities();
                            self.history.stored(sent.partition, appended.base_offset, records, *level, lsn);
                        }
                        Err(error) => self.coverage.meet("reply", format!("append: {}", error_name(error))),
                    }
                }
            }
            (Asked::Append { .. }, Reply::Error(error)) => {
                self.coverage.meet("reply", format!("append: {}", error_name(error)));
            }
            (Asked::Settle { group, member, level, settlements }, Reply::Settled(results)) => {
                for (at, (settlement, result)) in settlements.iter().zip(results).enumerate() {
                    let stale = pending.stale.get(at).copied().unwrap_or(false);
                    self.settled(&pending, (group, member, *level, stale), settlement, result);
                }
            }
            (
                Asked::Complete { group, member, record, partition, output },
                Reply::Completed { result, base_offsets },
            ) => {
                let stale = pending.stale.first().copied().unwrap_or(false);
                self.settled(&pending, (group, member, Level::Synced, stale), &ack(*record), result);
                self.coverage.meet("reply", format!("complete: {:?}", result.status));
                let done = matches!(result.status, SettleStatus::Ok | SettleStatus::Late);
                assert_eq!(
                    done,
                    base_offsets.len() == 1,
                    "complete: {result:?} with outputs at {base_offsets:?}"
                );
                for base in base_offsets {
                    self.history.stored(*partition, *base, [*output].into_iter(), Level::Synced, lsn);
                }
            }
            (Asked::Commit { group, offsets }, Reply::OffsetsCommitted(results)) => {
                for (offset, result) in offsets.iter().zip(results) {
                    let what = if result.is_ok() { "commit: Ok" } else { "commit: refused" };
                    self.coverage.meet("reply", what);
                    if result.is_ok() {
                        self.committed.insert((group.clone(), offset.partition), offset.offset);
                    }
                }
            }
            (Asked::Fetch { group, .. }, Reply::Offsets(offsets)) => {
                for (key, floor) in &pending.floor {
                    let found =
                        offsets.iter().find(|offset| offset.partition == *key).map(|found| found.offset);
                    assert!(
                        found >= Some(*floor),
                        "{group} had committed {floor} in {key}, and now {found:?}"
                    );
                }
            }
            (Asked::DeleteRecords { key, .. }, Reply::RecordsDeleted { log_start }) => {
                self.coverage.meet("log", "records deleted by command");
                self.history.delete_below(*key, *log_start, true);
            }
            (Asked::CreateTopic { topic }, Reply::Topic(info)) => {
                let kind = standard(false, Level::Synced, false);
                let before =
                    if self.history.deleted.is_empty() { "topic created" } else { "topic created again" };
                self.coverage.meet("log", before);
                for partition in 0..info.partitions {
                    let key = felucca_broker::engine::types::PartitionKey { topic: info.id, partition };
                    self.history.add(key, topic, kind.clone());
                }
            }
            (Asked::DeleteTopic { .. }, Reply::Topic(info)) => {
                self.coverage.meet("log", "topic deleted");
                self.history.deleted.insert(info.id);
            }
            _ => {}
        }
        self.pending.insert(correlation, pending);
    }

    fn settled(
        &mut self,
        pending: &Pending,
        (group, member, level, stale): (&str, &str, Level, bool),
        settlement: &Settlement,
        result: &SettleResult,
    ) {
        let status = result.status;
        self.note(|| {
            let LeaseRef { partition, offset, lease } = settlement.record;
            let lease = (lease.boot_epoch, lease.sequence);
            format!(
                "    {group} {} {offset} {lease:?} {:?}: {result:?}",
                partition.partition, settlement.outcome
            )
        });
        self.coverage.meet("reply", format!("{}: {status:?}", name_of(&settlement.outcome)));
        if status == SettleStatus::Ok
            && let Some(state) = result.state
        {
            self.coverage.meet("state", format!("{state:?}"));
        }
        if matches!(settlement.outcome, Outcome::Ack) && status == SettleStatus::Ok {
            self.coverage.meet("state", "Acked");
        }
        let lsn = self.written();
        let told = Told { asked_ms: pending.handed_ms, lsn, level, group, member, stale };
        self.leases.answered(told, settlement, result);
    }

    /// Records are handed out: their bytes are what was sent, and their leases are new.
    pub(crate) fn delivery_left(&mut self, delivery: &Delivery) {
        let lsn = self.written();
        let now_ms = self.monotonic_ms();
        let key = delivery.partition;
        let Some((group, member)) = self.member_of(delivery) else { return };
        let view = self.broker.as_ref().and_then(|broker| broker.view(key).ok());
        self.coverage.meet("state", "Leased");
        if let Some(view) = &view {
            self.history.bounds(key, view.log_start(), view.high_watermark());
        }
        for (at, record) in (0..).zip(&delivery.records) {
            let lease = LeaseId { sequence: delivery.first_lease.sequence + at, ..delivery.first_lease };
            let mut slot = None;
            match view.as_ref().map(|view| read_record(view, record.offset)) {
                Some(Ok(Some(found))) => {
                    let identity = identify(&found).unwrap_or_else(|wrong| {
                        panic!("{group} is handed {} of {key}: {wrong}", record.offset)
                    });
                    self.history.shown(key, record.offset, identity);
                    slot = found.key.map(|key| key.to_vec());
                }
                Some(Ok(None)) => panic!("{group} is handed {} of {key}, which is not there", record.offset),
                Some(Err(ReadError::Corrupt { reason, .. })) => {
                    panic!("{group} is handed {} of {key}: {reason}", record.offset)
                }
                Some(Err(_)) | None => {}
            }
            self.note(|| {
                let (epoch, sequence) = (lease.boot_epoch, lease.sequence);
                format!("  {group} {member} is handed {} {record:?} ({epoch}, {sequence})", key.partition)
            });
            self.leases.grant(
                now_ms,
                lsn,
                Granted {
                    group: &group,
                    member: &member,
                    key,
                    lease,
                    lease_ms: delivery.lease_ms,
                    record: *record,
                    slot,
                },
            );
        }
    }
}

/// An answer, in few words.
fn short(reply: &Reply) -> String {
    match reply {
        Reply::Settled(results) => format!("{} settled", results.len()),
        Reply::Group(description) => format!("{} described", description.group),
        other => format!("{other:?}"),
    }
}
