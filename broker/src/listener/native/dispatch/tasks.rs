//! Requests that run beside the connection: reads of the log, and what takes several steps. A bounded number at a time.

use std::time::Duration;

use felucca_protocol::{Api, ErrorCode, message as wire};
use prost::Message;

use super::super::convert::{self, invalid};
use super::super::outbox::OutFrame;
use super::super::subscription::Fetch;
use super::{Dispatcher, Next};
use crate::broker::{BrokerError, SeekTarget};
use crate::engine::command::{Command, SeekTo};
use crate::engine::effect::Reply;
use crate::engine::types::PartitionKey;
use crate::redrive;

/// Requests of one connection that may run beside it at a time.
const MAX_TASKS: usize = 256;
/// Longest that a fetch may ask to wait.
const MAX_FETCH_WAIT: Duration = Duration::from_secs(60);
/// What is kept of a frame for its header and message when its payload is as large as it may be.
const FRAME_ROOM: u32 = 64 << 10;

impl Dispatcher {
    pub(super) fn fetch(&mut self, correlation: u64, request: &wire::Fetch) -> Result<Next, wire::Error> {
        let key = convert::partition_key(&request.topic_id, request.partition)?;
        let view = self.broker.view(key).map_err(|error| convert::engine_error(&error))?;
        let max_bytes = request.max_bytes.clamp(1, self.max_frame_bytes - FRAME_ROOM) as usize;
        let max_wait = Duration::from_millis(request.max_wait_ms.into()).min(MAX_FETCH_WAIT);
        let fetch = Fetch { correlation, view, offset: request.offset, max_bytes, max_wait };
        let task = fetch.run(self.broker.clone(), self.outbox.clone());
        self.spawn(task)
    }

    pub(super) fn list_offsets(
        &mut self,
        correlation: u64,
        request: wire::ListOffsets,
    ) -> Result<Next, wire::Error> {
        let topic = convert::topic_id(&request.topic_id)?;
        let broker = self.broker.clone();
        self.answer_later(Api::ListOffsets, correlation, async move {
            let known = |error| convert::engine_error(&error);
            let views = if request.partitions.is_empty() {
                broker.views_of(topic).map_err(known)?
            } else {
                let keys = request.partitions.iter().map(|&partition| PartitionKey { topic, partition });
                keys.map(|key| broker.view(key)).collect::<Result<_, _>>().map_err(known)?
            };
            let mut partitions = Vec::with_capacity(views.len());
            for view in views {
                let offset_for_timestamp = match request.timestamp {
                    Some(timestamp) => {
                        view.find_timestamp(timestamp).await.map_err(|error| convert::read_error(&error))?
                    }
                    None => None,
                };
                partitions.push(wire::PartitionOffsets {
                    partition: view.partition().partition,
                    log_start: view.log_start(),
                    high_watermark: view.high_watermark(),
                    offset_for_timestamp,
                    bytes: view.bytes(),
                });
            }
            Ok(wire::ListOffsetsReply { partitions })
        })
    }

    pub(super) fn describe_group(
        &mut self,
        correlation: u64,
        request: wire::DescribeGroup,
    ) -> Result<Next, wire::Error> {
        let broker = self.broker.clone();
        self.answer_later(Api::DescribeGroup, correlation, async move {
            let (description, oldest) =
                broker.describe_group(&request.group).await.map_err(|error| convert::broker_error(&error))?;
            let now = jiff::Timestamp::now().as_millisecond();
            let log_start = |key: Option<PartitionKey>| {
                key.and_then(|key| broker.view(key).ok()).map_or(0, |view| view.log_start())
            };
            let starts: Vec<u64> =
                description.partitions.iter().map(|info| log_start(info.partition)).collect();
            Ok(convert::group_description(description, |index| wire::GroupPartition {
                log_start: starts[index],
                // A clock that ran backwards shows as an age of 0.
                oldest_unsettled_ms: oldest[index].map(|then| u64::try_from(now - then).unwrap_or(0)),
                ..Default::default()
            }))
        })
    }

    pub(super) fn seek_group(
        &mut self,
        correlation: u64,
        request: wire::SeekGroup,
    ) -> Result<Next, wire::Error> {
        use wire::seek_group::To;
        let to = match request.to {
            Some(To::Beginning(_)) => SeekTarget::To(SeekTo::Beginning),
            Some(To::End(_)) => SeekTarget::To(SeekTo::End),
            Some(To::Offset(offset)) => SeekTarget::To(SeekTo::Offset(offset)),
            Some(To::Timestamp(timestamp)) => SeekTarget::Timestamp(timestamp),
            None => return Err(invalid("the request does not say where to move the group")),
        };
        let broker = self.broker.clone();
        self.answer_later(Api::SeekGroup, correlation, async move {
            let wire::SeekGroup { group, topic, partition, force, .. } = request;
            let moved = broker.seek_group(&group, &topic, partition, to, force).await;
            moved.map(|()| wire::Empty {}).map_err(|error| convert::broker_error(&error))
        })
    }

    pub(super) fn redrive(&mut self, correlation: u64, request: wire::Redrive) -> Result<Next, wire::Error> {
        let spec = Box::new(convert::redrive_spec(request.spec)?);
        let (id, dry_run) = (request.id, request.dry_run);
        let broker = self.broker.clone();
        self.answer_later(Api::Redrive, correlation, async move {
            let failed = |error| convert::broker_error(&error);
            let command =
                if dry_run { Command::PlanRedrive { spec } } else { Command::StartRedrive { id, spec } };
            let Reply::Redrive(mut row) = broker.call(command).await.map_err(failed)? else {
                return Err(failed(BrokerError::Unexpected("Redrive")));
            };
            if dry_run {
                let seen = redrive::preview(&broker, &row).await.map_err(failed)?;
                (row.examined, row.moved, row.refused) = (seen.examined, seen.moved, seen.refused);
            } else {
                broker.note_redrives_changed();
            }
            Ok(convert::redrive(*row))
        })
    }

    pub(super) fn alter_redrive(
        &mut self,
        correlation: u64,
        request: wire::AlterRedrive,
    ) -> Result<Next, wire::Error> {
        let action = convert::redrive_action(request.action())?;
        let broker = self.broker.clone();
        self.answer_later(Api::AlterRedrive, correlation, async move {
            let failed = |error| convert::broker_error(&error);
            let command = Command::AlterRedrive { id: request.id, action };
            let Reply::Redrive(row) = broker.call(command).await.map_err(failed)? else {
                return Err(failed(BrokerError::Unexpected("AlterRedrive")));
            };
            broker.note_redrives_changed();
            Ok(convert::redrive(*row))
        })
    }

    pub(super) fn purge(
        &mut self,
        correlation: u64,
        request: wire::PurgeDeadLetters,
    ) -> Result<Next, wire::Error> {
        let broker = self.broker.clone();
        self.answer_later(Api::PurgeDeadLetters, correlation, async move {
            let purged = redrive::purge(&broker, &request.group, &request.source_topic).await;
            let purged = purged.map_err(|error| convert::purge_error(&error))?;
            Ok(wire::PurgeDeadLettersReply { purged })
        })
    }

    fn answer_later<M: Message>(
        &mut self,
        api: Api,
        correlation: u64,
        work: impl Future<Output = Result<M, wire::Error>> + Send + 'static,
    ) -> Result<Next, wire::Error> {
        let outbox = self.outbox.clone();
        self.spawn(async move {
            let head = match work.await {
                Ok(reply) => convert::reply_frame(api, correlation, &reply, 0),
                Err(error) => convert::error_frame(api.into(), correlation, &error),
            };
            outbox.send(OutFrame { head, payload: Vec::new(), origin: None });
        })
    }

    fn spawn(&mut self, task: impl Future<Output = ()> + Send + 'static) -> Result<Next, wire::Error> {
        while self.tasks.try_join_next().is_some() {}
        if self.tasks.len() >= MAX_TASKS + self.ordered.len() {
            let message = format!("{MAX_TASKS} requests of one connection run already");
            return Err(wire::Error::new(ErrorCode::Overloaded, message));
        }
        self.tasks.spawn(task);
        Ok(Next::Nothing)
    }
}
