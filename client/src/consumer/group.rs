//! The consumer as a member of its group: heartbeats, assignment, commits.
//!
//! A partition that is to be given up is first no longer returned to the caller, then what was processed of it is committed,
//! and only then is it reported as no longer owned: its next owner begins where this one stopped.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use felucca_protocol::{Api, ErrorCode, message};

use super::positions::{Key, Partition};
use super::task::{Repeat, Task};
use crate::error::{Error, Result};

/// What is known of the membership.
#[derive(Debug)]
pub(super) struct Membership {
    generation: u64,
    interval: Duration,
    next: Instant,
}

impl Default for Membership {
    fn default() -> Self {
        Self { generation: 0, interval: Duration::from_millis(500), next: Instant::now() }
    }
}

impl Task {
    /// Whether the group assigns the partitions.
    pub(super) fn is_member(&self) -> bool {
        self.settings.group.is_some() && self.settings.assigned.is_empty()
    }

    pub(super) fn next_heartbeat(&self) -> Option<Instant> {
        self.is_member().then_some(self.membership.next)
    }

    /// The next heartbeat is due no later than after `pause`.
    pub(super) fn heartbeat_in(&mut self, pause: Duration) {
        self.membership.next = self.membership.next.min(Instant::now() + pause);
    }

    /// Says what is owned, learns what should be, and goes there. Leaves a subscription that matches, or none.
    pub(super) async fn heartbeat(&mut self) -> Result<()> {
        self.membership.next = Instant::now() + self.membership.interval;
        let owned: BTreeSet<Key> = self.positions.all().iter().map(|known| known.key.clone()).collect();
        let reply = self.send_heartbeat(&owned, false).await?;
        self.membership.generation = reply.generation;
        self.membership.interval = Duration::from_millis(u64::from(reply.interval_ms.max(10)));
        self.membership.next = Instant::now() + self.membership.interval;
        let assigned: BTreeSet<Key> =
            reply.assigned.into_iter().map(|partition| (partition.topic_id, partition.partition)).collect();
        let mut changed = false;
        for partition in self.positions.all() {
            // One that was to be given up, and may be kept after all, was skipped meanwhile.
            let revoked = !assigned.contains(&partition.key);
            changed |= partition.set_revoked(revoked) != revoked;
        }
        let lost: Vec<Key> = owned.difference(&assigned).cloned().collect();
        let added: Vec<Key> = assigned.difference(&owned).cloned().collect();
        if !lost.is_empty() {
            if self.settings.auto_commit.is_some() {
                self.commit().await?;
            }
            lost.iter().for_each(|key| self.positions.remove(key));
        }
        if !added.is_empty() {
            changed = true;
            self.add_partitions(added).await?;
        }
        if changed {
            self.subscribe().await?;
        }
        if !lost.is_empty() {
            // At once, so that the next owner need not wait for the interval.
            let owned = self.positions.all().iter().map(|known| known.key.clone()).collect();
            self.send_heartbeat(&owned, false).await?;
        }
        Ok(())
    }

    async fn send_heartbeat(
        &mut self,
        owned: &BTreeSet<Key>,
        leave: bool,
    ) -> Result<message::GroupHeartbeatReply> {
        let request = message::GroupHeartbeat {
            group: self.settings.group.clone().unwrap_or_default(),
            member_id: self.settings.member_id.clone(),
            topics: self.settings.topics.clone(),
            owned: owned.iter().map(topic_partition).collect(),
            generation: self.membership.generation,
            leave,
        };
        self.ask(Api::GroupHeartbeat, &request, Repeat::No).await
    }

    pub(super) async fn leave(&mut self) -> Result<()> {
        self.send_heartbeat(&BTreeSet::new(), true).await.map(|_| ())
    }

    // ---- Commits ----

    pub(super) async fn fetch_committed(&self, keys: &[Key]) -> Result<HashMap<Key, u64>> {
        let Some(group) = self.settings.group.clone().filter(|_| !keys.is_empty()) else {
            return Ok(HashMap::new());
        };
        let request = message::FetchOffsets { group, partitions: keys.iter().map(topic_partition).collect() };
        let (reply, _): (message::FetchOffsetsReply, _) =
            self.client.link.ask_until(Api::FetchOffsets, &request, Vec::new()).await?;
        let entry = |offset: message::CommittedOffset| ((offset.topic_id, offset.partition), offset.offset);
        Ok(reply.offsets.into_iter().map(entry).collect())
    }

    /// Commits what was processed since the last time.
    pub(super) async fn commit(&mut self) -> Result<()> {
        let news = |partition: Arc<Partition>| partition.uncommitted().map(|offset| (partition, offset));
        let offsets = self.positions.all().into_iter().filter_map(news).collect();
        self.commit_offsets(offsets).await
    }

    /// Commits one partition at an offset of the caller's choice.
    pub(super) async fn commit_at(&mut self, partition: Arc<Partition>, offset: u64) -> Result<()> {
        self.commit_offsets(vec![(partition, offset)]).await
    }

    async fn commit_offsets(&mut self, offsets: Vec<(Arc<Partition>, u64)>) -> Result<()> {
        let Some(group) = self.settings.group.clone() else {
            return Err(Error::Record("a consumer without a group has nothing to commit to".to_owned()));
        };
        if offsets.is_empty() {
            return Ok(());
        }
        let item = |(partition, offset): &(Arc<Partition>, u64)| message::CommittedOffset {
            topic_id: partition.key.0.clone(),
            partition: partition.key.1,
            offset: *offset,
            metadata: String::new(),
        };
        let member_id = if self.is_member() { self.settings.member_id.clone() } else { String::new() };
        let request = message::CommitOffsets {
            group,
            member_id,
            generation: self.membership.generation,
            offsets: offsets.iter().map(item).collect(),
        };
        let reply: message::CommitOffsetsReply =
            self.ask(Api::CommitOffsets, &request, Repeat::UntilAnswered).await?;
        if reply.results.len() != offsets.len() {
            return Err(Error::Protocol("a commit answer of another length".to_owned()));
        }
        let mut first_error = None;
        for ((partition, offset), result) in offsets.into_iter().zip(reply.results) {
            match result.error.map(Error::from) {
                None => partition.committed(offset),
                // It has another owner, or the session ended: the next heartbeat sorts it out.
                Some(Error::Broker {
                    code: ErrorCode::NotAssigned | ErrorCode::StaleGeneration | ErrorCode::UnknownMember,
                    message,
                    ..
                }) => {
                    tracing::debug!(message, "a commit came too late");
                    self.heartbeat_in(Duration::ZERO);
                }
                Some(error) => first_error = first_error.or(Some(error)),
            }
        }
        first_error.map_or(Ok(()), Err)
    }
}

fn topic_partition((topic_id, partition): &Key) -> message::TopicPartition {
    message::TopicPartition { topic_id: topic_id.clone(), partition: *partition }
}
