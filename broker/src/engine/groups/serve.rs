//! The commands of share members, and the dead letters that follow from them.

use crate::engine::Engine;
use crate::engine::append::Origin;
use crate::engine::catalog;
use crate::engine::command::{AppendEntry, LeaseRef, LetterError, Settlement, StagedBatch};
use crate::engine::effect::{Effects, Reply};
use crate::engine::error::EngineError;
use crate::engine::partition::Sequence;
use crate::engine::share::settle;
use crate::engine::types::{Level, Lsn, Now, PartitionKey, SubscriptionId};
use crate::plants::planted;

impl Engine {
    #[expect(clippy::too_many_arguments, reason = "the fields of one command")]
    pub(in crate::engine) fn share_subscribe(
        &mut self,
        now: Now,
        lsn: Lsn,
        id: SubscriptionId,
        name: &str,
        member: &str,
        credit: (u32, u32),
        held: &[LeaseRef],
        out: &mut Effects,
    ) -> Result<Reply, EngineError> {
        if member.is_empty() || member.len() > catalog::MAX_NAME_BYTES {
            return Err(EngineError::InvalidRequest("member id: expected 1 to 200 bytes".to_owned()));
        }
        let max_members = self.settings.max_members_per_group;
        let group = self.served_group(name)?;
        if group.members().len() as u64 >= max_members && !group.members().contains_key(member) {
            return Err(EngineError::LimitReached { what: "members of the group", limit: max_members });
        }
        let name = group.name.clone();
        if let Some(group) = self.groups.get_mut(&name) {
            group.subscribe(&mut self.desk.stage(now, lsn, out), id, member, credit, held);
        }
        self.subscriptions.insert(id, name.clone());
        self.note_awake(&name);
        self.desk.pump.insert(name);
        Ok(Reply::Done)
    }

    pub(in crate::engine) fn share_credit(&mut self, id: SubscriptionId, records: u32, bytes: u32) {
        let Some(name) = self.subscriptions.get(&id) else { return };
        if let Some(group) = self.groups.get_mut(name) {
            group.add_credit(id, records, bytes);
            self.desk.pump.insert(name.clone());
        }
    }

    pub(in crate::engine) fn share_unsubscribe(&mut self, id: SubscriptionId) {
        if let Some(name) = self.subscriptions.remove(&id)
            && let Some(group) = self.groups.get_mut(&name)
        {
            group.unsubscribe(id);
            self.note_awake(&name);
        }
    }

    pub(in crate::engine) fn members_seen(
        &mut self,
        now: Now,
        lsn: Lsn,
        members: &[(String, String)],
        out: &mut Effects,
    ) {
        for (name, member) in members {
            if let Some(group) = self.groups.get_mut(name.as_str()) {
                if group.members().contains_key(member.as_str()) {
                    group.seen(&mut self.desk.stage(now, lsn, out), member);
                }
            } else if let Some(group) = self.consumers.get_mut(name.as_str())
                && let Some(entry) = group.members.get_mut(member.as_str())
            {
                entry.last_seen_ms = now.monotonic_ms;
            }
        }
    }

    pub(in crate::engine) fn settle(
        &mut self,
        now: Now,
        lsn: Lsn,
        name: &str,
        member: &str,
        settlements: &[Settlement],
        out: &mut Effects,
    ) -> Result<Reply, EngineError> {
        let group_name = self.served_group(name)?.name.clone();
        let Some(group) = self.groups.get_mut(&group_name) else {
            return Err(EngineError::UnknownGroup(name.to_owned()));
        };
        let results = group.settle(&mut self.desk.stage(now, lsn, out), member, settlements);
        Ok(Reply::Settled(results))
    }

    /// The ack and the outputs in one frame, or neither.
    #[expect(clippy::too_many_arguments, reason = "the fields of one command")]
    pub(in crate::engine) fn complete(
        &mut self,
        now: Now,
        lsn: Lsn,
        name: &str,
        member: &str,
        record: &LeaseRef,
        outputs: Vec<AppendEntry>,
        out: &mut Effects,
    ) -> Result<Reply, EngineError> {
        let group_name = self.served_group(name)?.name.clone();
        let origin = match self.groups.get(&group_name) {
            Some(group) if group.hidden => Origin::Redrive(&group_name),
            _ => Origin::Producer,
        };
        for output in &outputs {
            self.check_append(output.partition, Level::Synced, &output.batch.header, origin)?;
            if output.batch.header.producer_id >= 0 {
                let why = "an output of complete carries a producer id; its lease makes it exactly-once";
                return Err(EngineError::InvalidRequest(why.to_owned()));
            }
        }
        let Some(group) = self.groups.get_mut(&group_name) else {
            return Err(EngineError::UnknownGroup(name.to_owned()));
        };
        let mut stage = self.desk.stage(now, lsn, out);
        group.seen(&mut stage, member);
        let status = match group.can_complete(&stage, member, record) {
            Err(status) => {
                return Ok(Reply::Completed { result: settle::unchanged(status), base_offsets: Vec::new() });
            }
            Ok(status) => status,
        };
        group.ack(&mut stage, record);
        let base_offsets = outputs
            .into_iter()
            .map(|output| self.append_checked(lsn, output.partition, output.batch, out).0)
            .collect();
        Ok(Reply::Completed { result: settle::result(status, None, now), base_offsets })
    }

    /// Appends a dead letter and settles its source record, in one frame (rule R3).
    #[expect(clippy::too_many_arguments, reason = "the fields of one command")]
    pub(in crate::engine) fn dead_letter_built(
        &mut self,
        now: Now,
        lsn: Lsn,
        name: &str,
        key: PartitionKey,
        offset: u64,
        letter: Result<StagedBatch, LetterError>,
        out: &mut Effects,
    ) {
        let Some(group) = self.groups.get(name) else { return };
        if !group.awaits_letter(&key, offset) {
            // The group was moved meanwhile.
            return;
        }
        let name = group.name.clone();
        let target = group.dead_letter_topics.get(&key.topic).copied();
        let target = target.map(|topic| PartitionKey { topic, partition: key.partition });
        let letter = match letter {
            Ok(batch) => Ok(batch),
            Err(LetterError::Record(reason)) => Err(reason),
            Err(LetterError::Disk) => {
                if let Some(group) = self.groups.get_mut(&name) {
                    group.letter_failed(&mut self.desk.stage(now, lsn, out), key, offset);
                }
                return;
            }
        };
        let held = match (letter, target) {
            (Ok(batch), Some(target)) => {
                match self.check_append(target, Level::Synced, &batch.header, Origin::DeadLetter) {
                    Ok(Sequence::Next) => {
                        self.append_checked(lsn, target, batch, out);
                        if planted("split-dead-letter") {
                            return;
                        }
                        None
                    }
                    Ok(Sequence::Duplicate(_)) => None,
                    Err(error) => Some(error.to_string()),
                }
            }
            (Ok(_), None) => Some("the group has no dead-letter topic".to_owned()),
            (Err(reason), _) => Some(reason),
        };
        if let Some(group) = self.groups.get_mut(&name) {
            group.letter_done(&mut self.desk.stage(now, lsn, out), key, offset, held);
        }
    }
}
