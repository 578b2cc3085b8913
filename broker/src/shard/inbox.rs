//! The way into the shard: two lanes of commands, and news for the shard thread, under one short lock.
//!
//! Settlements, queries and everything else that is small goes before bulk (appends), so that a flood of records never
//! delays an acknowledgement. What senders queue was admitted before (see `admission`). The shard thread parks when there
//! is nothing for it; one sender unparks it, however many send meanwhile, or, with little to do, takes the shard's turn
//! itself (see `runner`).

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;
use std::thread::Thread;

use parking_lot::{Mutex, MutexGuard};

use crate::engine::command::Command;
use crate::engine::types::Lsn;

use super::advance::Progress;
use super::runner::Runner;
use super::sink::Responder;

/// A command on its way to the engine, and who waits for its answer.
#[derive(Debug)]
pub struct Submission {
    pub(crate) command: Command,
    pub(crate) responder: Option<Responder>,
    /// What it may add to a journal frame, about.
    bytes: usize,
}

impl Submission {
    /// A command that came as `bytes` bytes, its batches included or not, and who waits for its answer.
    pub fn new(command: Command, responder: Responder, bytes: usize) -> Self {
        let bytes = bytes.max(command.batch_bytes());
        Self { command, responder: Some(responder), bytes }
    }

    /// A command without an answer.
    pub fn silent(command: Command) -> Self {
        let bytes = command.batch_bytes();
        Self { command, responder: None, bytes }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

/// What other threads tell the shard thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum News {
    /// Every frame up to this one is on the device.
    Synced(Lsn),
    /// A sync or a checkpoint failed: nothing may be written any more.
    Failed(String),
    /// A checkpoint is stored; the one before it was made at this frame, and older ones are gone.
    Checkpointed { previous: Lsn },
    /// The segment writer has room again, or has failed.
    Room,
    /// Stop as soon as everything queued has been carried out.
    Stop,
}

/// How much one drain takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DrainLimits {
    pub(crate) bytes: usize,
    pub(crate) commands: usize,
    /// False: appends wait (too much is unsynced or unwritten).
    pub(crate) bulk: bool,
}

#[derive(Debug, Default)]
struct Lanes {
    control: VecDeque<Submission>,
    bulk: VecDeque<Submission>,
    news: Vec<News>,
    sleeping: bool,
    closed: bool,
}

/// Most bytes with which a sender takes the turn itself: what takes longer to write than a thread to wake is better done
/// beside the sender.
const OWN_TURN_BYTES: usize = 16 << 10;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    lanes: Mutex<Lanes>,
    thread: OnceLock<Thread>,
    /// Whoever holds it takes the turns; empty before the start and after the end.
    seat: Mutex<Option<Runner>>,
}

impl Inbox {
    /// Names the thread to wake, and gives it what takes the turns; called once, by that thread, before it first drains.
    pub(crate) fn attach(&self, runner: Runner) {
        // A second call would name the same thread.
        let _ = self.thread.set(std::thread::current());
        *self.seat.lock() = Some(runner);
    }

    /// What takes the turns; empty after the end.
    pub(crate) fn seat(&self) -> MutexGuard<'_, Option<Runner>> {
        self.seat.lock()
    }

    /// Queues commands in order. After [`Self::close`] they are dropped, which answers them.
    ///
    /// When the shard sleeps and the commands are small, they are carried out before this returns: that spares two changes
    /// of threads, which take longer than the commands.
    pub(crate) fn submit(&self, submissions: impl IntoIterator<Item = Submission>) {
        let mut refused = Vec::new();
        let mut bytes = 0;
        let sleeps = self.change(|lanes| {
            for submission in submissions {
                bytes += submission.bytes;
                if lanes.closed {
                    refused.push(submission);
                } else if matches!(submission.command, Command::Append { .. }) {
                    lanes.bulk.push_back(submission);
                } else {
                    lanes.control.push_back(submission);
                }
            }
        });
        // Answered here, without the lock.
        drop(refused);
        if sleeps && !(bytes <= OWN_TURN_BYTES && self.take_turn()) {
            self.wake();
        }
    }

    pub(crate) fn tell(&self, news: News) {
        if self.change(|lanes| lanes.news.push(news)) {
            self.wake();
        }
    }

    /// Returns whether the shard sleeps and the caller is the one to see that it does not sleep on.
    fn change(&self, change: impl FnOnce(&mut Lanes)) -> bool {
        let mut lanes = self.lanes.lock();
        change(&mut lanes);
        std::mem::take(&mut lanes.sleeping)
    }

    /// How far the shard is; waits for the turn that it is in. Empty after its end.
    pub(super) fn progress(&self) -> Progress {
        self.seat().as_ref().map_or_else(Progress::default, Runner::progress)
    }

    fn wake(&self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    /// Takes the shard's turn; false when its thread has to be woken all the same.
    fn take_turn(&self) -> bool {
        let Some(mut seat) = self.seat.try_lock() else { return false };
        let Some(runner) = seat.as_mut() else { return false };
        match catch_unwind(AssertUnwindSafe(|| runner.take_turn(self))) {
            Ok(may_sleep_on) => may_sleep_on,
            Err(_) => {
                // Half a turn is taken: nobody may take another. The thread finds the seat empty and ends the shard.
                *seat = None;
                false
            }
        }
    }

    /// Moves what is queued to `commands` and `news`, within the limits; the first command is taken whatever its size.
    /// Returns true when something that may be taken is left.
    pub(crate) fn drain(
        &self,
        limits: DrainLimits,
        commands: &mut Vec<Submission>,
        news: &mut Vec<News>,
    ) -> bool {
        let mut lanes = self.lanes.lock();
        news.append(&mut lanes.news);
        let mut bytes = 0;
        while commands.len() < limits.commands {
            let Some(next) = lanes.control.front() else { break };
            if bytes > 0 && bytes + next.bytes > limits.bytes {
                break;
            }
            bytes += next.bytes;
            commands.extend(lanes.control.pop_front());
        }
        while limits.bulk && commands.len() < limits.commands {
            let Some(next) = lanes.bulk.front() else { break };
            if bytes > 0 && bytes + next.bytes > limits.bytes {
                break;
            }
            bytes += next.bytes;
            commands.extend(lanes.bulk.pop_front());
        }
        !lanes.control.is_empty() || (limits.bulk && !lanes.bulk.is_empty())
    }

    /// True when nothing waits that may be taken now; the next sender will then unpark the thread.
    pub(crate) fn fall_asleep(&self, bulk: bool) -> bool {
        let mut lanes = self.lanes.lock();
        let idle = lanes.news.is_empty() && lanes.control.is_empty() && (!bulk || lanes.bulk.is_empty());
        lanes.sleeping = idle;
        idle
    }

    /// Refuses everything from now on; what is queued can still be drained.
    pub(crate) fn close(&self) {
        self.lanes.lock().closed = true;
    }

    /// Drops what is queued, which answers it.
    pub(crate) fn clear(&self) {
        let mut lanes = self.lanes.lock();
        let queued = (std::mem::take(&mut lanes.control), std::mem::take(&mut lanes.bulk));
        drop(lanes);
        drop(queued);
    }
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use felucca_protocol::batch::{BatchBuilder, BatchHeader};

    use super::*;
    use crate::engine::command::{AppendEntry, StagedBatch};
    use crate::engine::types::{Level, PartitionKey, TopicId};

    fn append(bytes: usize) -> Submission {
        let mut builder = BatchBuilder::new();
        builder.push(0, None, Some(&vec![0; bytes]), &[]).unwrap();
        let bytes: BytesMut = builder.finish();
        let header = BatchHeader::parse(&bytes).unwrap();
        let partition = PartitionKey { topic: TopicId([0; 16]), partition: 0 };
        let size = bytes.len();
        let entries = vec![AppendEntry { partition, batch: StagedBatch { header, bytes } }];
        Submission {
            command: Command::Append { level: Level::Synced, entries },
            responder: None,
            bytes: size,
        }
    }

    fn drained(inbox: &Inbox, bytes: usize, bulk: bool) -> (usize, bool) {
        let mut commands = Vec::new();
        let more = inbox.drain(DrainLimits { bytes, commands: 100, bulk }, &mut commands, &mut Vec::new());
        (commands.len(), more)
    }

    #[test]
    fn small_commands_overtake_bulk() {
        let inbox = Inbox::default();
        inbox.submit([append(10), Submission::silent(Command::ListGroups)]);
        let mut commands = Vec::new();
        let limits = DrainLimits { bytes: 1000, commands: 100, bulk: true };
        assert!(!inbox.drain(limits, &mut commands, &mut Vec::new()));
        assert!(matches!(commands[0].command, Command::ListGroups));
        assert!(matches!(commands[1].command, Command::Append { .. }));
    }

    #[test]
    fn a_drain_keeps_to_its_bytes_and_takes_one_that_is_larger() {
        let inbox = Inbox::default();
        inbox.submit([append(1000), append(100), append(100)]);
        assert_eq!(drained(&inbox, 500, true), (1, true));
        assert_eq!(drained(&inbox, 500, true), (2, false));
    }

    #[test]
    fn bulk_can_be_held_back() {
        let inbox = Inbox::default();
        inbox.submit([append(10), Submission::silent(Command::ListGroups)]);
        assert_eq!(drained(&inbox, 500, false), (1, false));
        assert!(inbox.fall_asleep(false));
        assert!(!inbox.fall_asleep(true));
        assert_eq!(drained(&inbox, 500, true), (1, false));
    }
}
