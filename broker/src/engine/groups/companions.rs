//! The topics that come with a share group: one for dead letters and one for what is redriven, for each source topic.

use crate::engine::Engine;
use crate::engine::catalog::{self, Topic};
use crate::engine::config::{ShareConfig, TopicConfig, mix};
use crate::engine::effect::{Effects, TopicKind};
use crate::engine::error::EngineError;
use crate::engine::types::TopicId;

impl Engine {
    /// A name that the group needs must be free, or be left from a former group of the same name and topic.
    pub(super) fn check_companion(
        &self,
        companion: &str,
        group: &str,
        source: &Topic,
    ) -> Result<(), EngineError> {
        let Some(existing) = self.catalog.by_name(companion) else { return Ok(()) };
        let own = match &existing.kind {
            TopicKind::DeadLetter { group: g, source: s } | TopicKind::Redrive { group: g, source: s } => {
                g == group && **s == *source.name && existing.partitions == source.partitions
            }
            TopicKind::Standard => false,
        };
        if own { Ok(()) } else { Err(EngineError::TopicExists(companion.to_owned())) }
    }

    /// Whether the topics and groups that come with a share group stay within the limits, so that all are made or none.
    pub(super) fn room_for_companions(&self, group: &str, sources: &[Topic]) -> Result<(), EngineError> {
        let mut more = Room { topics: 0, partitions: 0, groups: 1 };
        for source in sources.iter().filter(|source| source.kind == TopicKind::Standard) {
            let letters = self.catalog.by_name(&catalog::dead_letter_name(group, &source.name)).is_none();
            let redrive = self.catalog.by_name(&catalog::redrive_name(group, &source.name)).is_none();
            more.topics += u64::from(letters) + u64::from(redrive);
            more.partitions += (u64::from(letters) + u64::from(redrive)) * u64::from(source.partitions);
            more.groups += u64::from(letters);
        }
        let settings = &self.settings;
        let groups = (self.groups.len() + self.consumers.len()) as u64;
        for (what, needed, limit) in [
            ("topics", self.catalog.len() + more.topics, settings.max_topics),
            ("partitions", self.catalog.partitions + more.partitions, settings.max_partitions),
            ("groups", groups + more.groups, settings.max_groups),
        ] {
            if needed > limit {
                return Err(EngineError::LimitReached { what, limit });
            }
        }
        Ok(())
    }

    /// Creates the dead-letter topic with the hidden group that redrives it, and the redrive topic; answers the latter's id.
    pub(super) fn add_companions(
        &mut self,
        group: &str,
        source: &Topic,
        entropy: &mut u64,
        out: &mut Effects,
    ) -> Result<TopicId, EngineError> {
        let names = || (group.to_owned(), source.name.to_string());
        let dead_letters = catalog::dead_letter_name(group, &source.name);
        let redrives = catalog::redrive_name(group, &source.name);
        if self.catalog.by_name(&dead_letters).is_none() {
            let (group, source_name) = names();
            let kind = TopicKind::DeadLetter { group, source: source_name };
            let id = topic_id(entropy);
            let config = TopicConfig::dead_letters(&self.settings);
            self.add_topic(id, &dead_letters, source.partitions, kind, config, out)?;
            let holds = ShareConfig::default().with(&[("on-exhausted".to_owned(), "hold".to_owned())])?;
            self.start_group(&redrives, &[id], &holds, false, true, out);
        }
        if let Some(existing) = self.catalog.by_name(&redrives) {
            return Ok(existing.id);
        }
        let (group, source_name) = names();
        let id = topic_id(entropy);
        let kind = TopicKind::Redrive { group, source: source_name };
        let config = TopicConfig::new(&self.settings);
        self.add_topic(id, &redrives, source.partitions, kind, config, out)?;
        Ok(id)
    }

    /// Derives where a group's exhausted records go.
    pub(in crate::engine) fn link_dead_letters(&mut self, name: &str) {
        let Some(group) = self.groups.get_mut(name) else { return };
        group.dead_letter_topics.clear();
        for id in &group.topics {
            let Some(topic) = self.catalog.get(id) else { continue };
            let source: &str = match &topic.kind {
                TopicKind::Standard => &topic.name,
                TopicKind::Redrive { source, .. } => source,
                TopicKind::DeadLetter { .. } => continue,
            };
            if let Some(letters) = self.catalog.by_name(&catalog::dead_letter_name(name, source)) {
                group.dead_letter_topics.insert(*id, letters.id);
            }
        }
    }
}

/// What a share group needs of what is limited.
#[derive(Debug)]
struct Room {
    topics: u64,
    partitions: u64,
    groups: u64,
}

/// A topic id (UUID version 4) from entropy, which is advanced.
fn topic_id(entropy: &mut u64) -> TopicId {
    let mut bytes = [0; 16];
    for half in bytes.chunks_exact_mut(8) {
        *entropy = mix(*entropy);
        half.copy_from_slice(&entropy.to_be_bytes());
    }
    bytes[6] = (bytes[6] & 0x0f) | 0x40;
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    TopicId(bytes)
}
