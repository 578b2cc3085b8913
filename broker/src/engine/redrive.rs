//! Redrives: durable jobs that give dead letters another chance.
//!
//! A redrive names a dead-letter topic, where its records go, and which of them. What it has come to stands in the engine, and is
//! journaled in the frame in which letters are moved; so it goes on after a crash where it was, and no letter is moved twice, not by
//! two redrives either: a letter is moved when nobody has settled or leased it in the hidden group of its topic, and is settled
//! there in the frame that appends its record to the target.
//!
//! Looking for letters and reading them is done outside ([`crate::redrive`]), which tells the engine what was found.

use super::Engine;
use super::append::Origin;
use super::catalog;
use super::command::{FoundLetters, RedriveAction};
use super::effect::{Effects, Reply, TopicKind};
use super::error::EngineError;
use super::event::{RedriveForgotten, RedriveRow, RedriveSpec, event::Kind};
use super::types::{Level, Lsn, Now, PartitionKey, TopicId};

/// Redrives that are running or paused.
const MAX_OPEN: usize = 100;
/// Redrives that have ended, of which the one that ended first is forgotten.
const MAX_ENDED: usize = 1_000;

/// Values of `RedriveRow::state`; persisted.
pub mod state {
    pub const RUNNING: u32 = 1;
    pub const PAUSED: u32 = 2;
    pub const DONE: u32 = 3;
    pub const CANCELLED: u32 = 4;
    pub const FAILED: u32 = 5;
}

/// Values of `RedriveSpec::target`; persisted.
pub mod target {
    pub const GROUP: u32 = 0;
    pub const SOURCE: u32 = 1;
    pub const TOPIC: u32 = 2;
}

impl RedriveRow {
    /// Offsets that are still to be looked at.
    pub fn left(&self) -> u64 {
        self.positions.iter().zip(&self.ends).map(|(position, end)| end.saturating_sub(*position)).sum()
    }

    /// Letters that may still be moved; `None` without a limit.
    pub fn room(&self) -> Option<u64> {
        let limit = self.spec.as_ref().map_or(0, |spec| spec.limit);
        (limit > 0).then(|| limit.saturating_sub(self.moved))
    }

    /// The hidden group of its dead-letter topic, and the topic that only its group sees.
    fn redrive_name(&self) -> String {
        let spec = self.spec.as_ref();
        spec.map_or_else(String::new, |spec| catalog::redrive_name(&spec.group, &spec.source_topic))
    }

    /// The topic of its letters.
    pub fn dead_letters(&self) -> Option<TopicId> {
        TopicId::from_slice(&self.dead_letters_id)
    }

    /// The topic that they are moved to.
    pub fn target(&self) -> Option<TopicId> {
        TopicId::from_slice(&self.target_id)
    }
}

impl Engine {
    /// What a redrive of this specification would be, at its beginning.
    pub(super) fn plan_redrive(
        &self,
        now: Now,
        id: &str,
        spec: RedriveSpec,
    ) -> Result<RedriveRow, EngineError> {
        let letters = self.catalog.require(&catalog::dead_letter_name(&spec.group, &spec.source_topic))?;
        let redrives = catalog::redrive_name(&spec.group, &spec.source_topic);
        let target = self.catalog.require(match spec.target {
            target::GROUP => &redrives,
            target::SOURCE => &spec.source_topic,
            target::TOPIC => &spec.topic,
            other => return Err(EngineError::InvalidRequest(format!("unknown redrive target {other}"))),
        })?;
        if target.kind != TopicKind::Standard && *target.name != *redrives {
            let why =
                format!("topic {:?} belongs to a share group: nothing is redriven to it", &*target.name);
            return Err(EngineError::InvalidRequest(why));
        }
        if spec.partition.is_some_and(|partition| partition >= letters.partitions) {
            let partition = spec.partition.unwrap_or_default();
            return Err(EngineError::UnknownPartition(PartitionKey { topic: letters.id, partition }));
        }
        let (mut positions, mut ends) = (Vec::new(), Vec::new());
        for key in letters.keys() {
            let log = self.partitions.get(&key);
            let (start, end) = log.map_or((0, 0), |log| (log.log_start, log.end));
            let chosen = spec.partition.is_none_or(|partition| partition == key.partition);
            let end = if chosen { end.min(spec.until_offset.unwrap_or(end)) } else { 0 };
            positions.push(start.max(spec.from_offset).min(end));
            ends.push(end);
        }
        Ok(RedriveRow {
            id: id.to_owned(),
            dead_letters_id: letters.id.0.to_vec(),
            target_id: target.id.0.to_vec(),
            spec: Some(spec),
            state: state::RUNNING,
            positions,
            ends,
            created_ms: now.wall_ms,
            changed_ms: now.wall_ms,
            ..RedriveRow::default()
        })
    }

    pub(super) fn start_redrive(
        &mut self,
        now: Now,
        id: &str,
        spec: RedriveSpec,
        out: &mut Effects,
    ) -> Result<Reply, EngineError> {
        catalog::check_name("redrive", id)?;
        if let Some(known) = self.redrives.get(id) {
            if known.spec.as_ref() == Some(&spec) {
                return Ok(Reply::Redrive(Box::new(known.clone())));
            }
            return Err(EngineError::InvalidRequest(format!("redrive {id:?} is another one")));
        }
        let row = self.plan_redrive(now, id, spec)?;
        let ended = |row: &&RedriveRow| row.state > state::PAUSED;
        let ended_first = self.redrives.values().filter(ended).min_by_key(|row| (row.changed_ms, &row.id));
        let ended_count = self.redrives.values().filter(ended).count();
        if self.redrives.len() - ended_count >= MAX_OPEN {
            return Err(EngineError::LimitReached { what: "redrives", limit: MAX_OPEN as u64 });
        }
        if ended_count >= MAX_ENDED
            && let Some(first) = ended_first
        {
            let forgotten = RedriveForgotten { id: first.id.clone() };
            self.stage_event(Kind::RedriveForgotten(forgotten), out);
        }
        Ok(self.note_redrive(now, row, out))
    }

    /// Stages how a redrive stands now.
    fn note_redrive(&mut self, now: Now, mut row: RedriveRow, out: &mut Effects) -> Reply {
        if row.state == state::RUNNING && (row.left() == 0 || row.room() == Some(0)) {
            row.state = state::DONE;
        }
        row.changed_ms = now.wall_ms;
        self.stage_event(Kind::RedriveNoted(Box::new(row.clone())), out);
        Reply::Redrive(Box::new(row))
    }

    fn redrive_row(&self, id: &str) -> Result<RedriveRow, EngineError> {
        let row = self.redrives.get(id).cloned();
        row.ok_or_else(|| EngineError::InvalidRequest(format!("there is no redrive {id:?}")))
    }

    pub(super) fn alter_redrive(
        &mut self,
        now: Now,
        id: &str,
        action: RedriveAction,
        out: &mut Effects,
    ) -> Result<Reply, EngineError> {
        let mut row = self.redrive_row(id)?;
        let to = match (action, row.state) {
            (RedriveAction::Pause, state::RUNNING | state::PAUSED) => state::PAUSED,
            (RedriveAction::Resume, state::RUNNING | state::PAUSED | state::FAILED) => state::RUNNING,
            (RedriveAction::Cancel, state::RUNNING | state::PAUSED | state::FAILED | state::CANCELLED) => {
                state::CANCELLED
            }
            _ => return Err(EngineError::InvalidRequest(format!("redrive {id:?} has ended"))),
        };
        if to == row.state {
            return Ok(Reply::Redrive(Box::new(row)));
        }
        (row.state, row.failure) = (to, String::new());
        Ok(self.note_redrive(now, row, out))
    }

    pub(super) fn fail_redrive(
        &mut self,
        now: Now,
        id: &str,
        failure: String,
        out: &mut Effects,
    ) -> Result<Reply, EngineError> {
        let mut row = self.redrive_row(id)?;
        if row.state != state::RUNNING {
            return Ok(Reply::Redrive(Box::new(row)));
        }
        (row.state, row.failure) = (state::FAILED, failure);
        Ok(self.note_redrive(now, row, out))
    }

    pub(super) fn list_redrives(&self, group: Option<&str>) -> Reply {
        let chosen = |row: &&RedriveRow| {
            group.is_none_or(|group| row.spec.as_ref().is_some_and(|spec| spec.group == group))
        };
        Reply::Redrives(self.redrives.values().filter(chosen).cloned().collect())
    }

    /// Moves letters, and the redrive on; all in one frame.
    pub(super) fn move_letters(
        &mut self,
        now: Now,
        lsn: Lsn,
        id: &str,
        found: FoundLetters,
        out: &mut Effects,
    ) -> Result<Reply, EngineError> {
        let mut row = self.redrive_row(id)?;
        let place = found.partition as usize;
        let stands = row.state == state::RUNNING && row.positions.get(place) == Some(&found.from);
        if !stands || found.next < found.from {
            return Ok(Reply::Redrive(Box::new(row)));
        }
        let Some(topic) = row.dead_letters().filter(|topic| self.catalog.get(topic).is_some()) else {
            return Err(EngineError::UnknownTopic(format!("the dead-letter topic of redrive {id:?}")));
        };
        let key = PartitionKey { topic, partition: found.partition };
        let hidden = self.served_group(&row.redrive_name())?;
        let is_pending =
            |offset: u64| hidden.partition(&key).is_some_and(|letters| letters.is_pending(offset));
        let mut letters = found.letters;
        letters.retain(|(offset, _)| is_pending(*offset));
        if row.room().is_some_and(|room| letters.len() as u64 > room) {
            return Err(EngineError::InvalidRequest(format!(
                "redrive {id:?} is to move no more than its limit"
            )));
        }
        let name = hidden.name.clone();
        for (_, entry) in &letters {
            self.check_append(entry.partition, Level::Synced, &entry.batch.header, Origin::Redrive(&name))?;
        }
        if let Some(group) = self.groups.get_mut(&name) {
            let offsets = letters.iter().map(|(offset, _)| *offset).collect();
            group.take_out(&mut self.desk.stage(now, lsn, out), key, offsets);
        }
        row.moved += letters.len() as u64;
        for (_, entry) in letters {
            self.append_checked(lsn, entry.partition, entry.batch, out);
        }
        row.examined += found.examined;
        row.refused += found.refused;
        if let (Some(position), Some(end)) = (row.positions.get_mut(place), row.ends.get(place)) {
            *position = found.next.min(*end);
        }
        Ok(self.note_redrive(now, row, out))
    }

    pub(super) fn pending_letters(
        &mut self,
        group: &str,
        source: &str,
        partition: u32,
        mut offsets: Vec<u64>,
    ) -> Result<Reply, EngineError> {
        let topic = self.catalog.require(&catalog::dead_letter_name(group, source))?.id;
        let hidden = self.served_group(&catalog::redrive_name(group, source))?;
        let letters = hidden.partition(&PartitionKey { topic, partition });
        offsets.retain(|offset| letters.is_some_and(|letters| letters.is_pending(*offset)));
        Ok(Reply::PendingLetters(offsets))
    }
}
