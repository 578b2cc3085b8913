//! What takes the shard's turns: drains the inbox, turns the shard, sleeps when there is nothing to do.
//!
//! A thread does this. While it sleeps, a sender with little to carry takes the turn on its own thread, so that a lone
//! request is answered without waking anybody; whatever takes longer, and everything that comes at a set time, is the
//! thread's.

use std::sync::mpsc::Sender;
use std::thread;
use std::time::{Duration, Instant};

use super::advance::Progress;
use super::checkpoint::Work;
use super::clock::Clock;
use super::core::Shard;
use super::inbox::{DrainLimits, Inbox, News, Submission};
use super::reads::Reads;

/// Most bytes and commands of one turn.
const TURN_BYTES: usize = 4 << 20;
const TURN_COMMANDS: usize = 8192;
/// Quiet after which the journal is told that everything is synced.
const MARK_AFTER: Duration = Duration::from_millis(10);
/// Longest sleep; only so that a mistake in waking would not be for ever.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);
/// Most turns that a sender takes in a row.
const OWN_TURNS: usize = 4;
/// Least time between checkpoints while the disk is full: each may give back journal files and segments.
const CHECKPOINTS_WHEN_FULL: Duration = Duration::from_secs(2);

/// When state is checkpointed; whichever comes first.
#[derive(Clone, Debug)]
pub struct CheckpointOptions {
    pub interval: Duration,
    /// Bytes journaled since the last one was begun.
    pub journal_bytes: u64,
}

/// The shard with all that drives it.
#[derive(Debug)]
pub(crate) struct Runner {
    shard: Shard,
    clock: Clock,
    reads: Reads,
    storage: Sender<Work>,
    options: CheckpointOptions,
    commands: Vec<Submission>,
    news: Vec<News>,
    /// The last frame was written then.
    last_write: Instant,
    /// A mark may be missing for it.
    unmarked: bool,
    last_checkpoint: Instant,
    /// Frame of the last checkpoint.
    checkpointed: u64,
    checkpointing: bool,
    stopping: bool,
    /// When the sleeping thread wakes up by itself.
    alarm: Instant,
}

/// What there is to do after a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum After {
    /// Another turn.
    Turn,
    /// Nothing: the inbox is empty, and its next sender sees to the shard.
    Sleep,
    /// Nothing ever.
    End,
}

impl Runner {
    pub(crate) fn new(
        shard: Shard,
        clock: Clock,
        reads: Reads,
        storage: Sender<Work>,
        options: CheckpointOptions,
    ) -> Self {
        let now = clock.instant();
        Self {
            shard,
            clock,
            reads,
            storage,
            options,
            commands: Vec::new(),
            news: Vec::new(),
            last_write: now,
            unmarked: true,
            last_checkpoint: now,
            checkpointed: 0,
            checkpointing: false,
            stopping: false,
            alarm: now,
        }
    }

    /// Takes the turns of the shard on this thread until told to stop; then carries out what is queued, says in the journal
    /// that the run ended cleanly, and makes a last checkpoint.
    pub(crate) fn run(self, inbox: &Inbox) {
        inbox.attach(self);
        loop {
            // Whoever finds the thread awake leaves the turns to it; so the seat is free while it sleeps, and only then.
            let mut seat = inbox.seat();
            let Some(runner) = seat.as_mut() else {
                tracing::error!("a turn of the shard panicked; restart the broker");
                return;
            };
            match runner.round(inbox) {
                After::Turn => continue,
                After::Sleep => {}
                After::End => break,
            }
            let sleep = runner.sleep();
            runner.alarm = runner.clock.instant() + sleep;
            drop(seat);
            thread::park_timeout(sleep);
        }
        let runner = inbox.seat().take();
        if let Some(mut runner) = runner {
            runner.finish(inbox);
        }
    }

    /// A turn with all that comes with it: what the thread does before it sleeps, and all that a step of a shard without
    /// threads does.
    pub(crate) fn round(&mut self, inbox: &Inbox) -> After {
        let after = self.turn(inbox);
        self.checkpoint_if_due();
        if after == After::Sleep {
            self.mark_if_quiet();
        }
        after
    }

    /// Takes the turn of the sleeping thread, on another. False when the thread has to wake up all the same.
    pub(crate) fn take_turn(&mut self, inbox: &Inbox) -> bool {
        for _ in 0..OWN_TURNS {
            match self.turn(inbox) {
                After::Turn => {}
                After::Sleep => {
                    return !self.is_checkpoint_due() && self.alarm <= self.clock.instant() + self.sleep();
                }
                After::End => return false,
            }
        }
        false
    }

    /// Drains the inbox, and carries out what was in it.
    fn turn(&mut self, inbox: &Inbox) -> After {
        let bulk = self.shard.takes_bulk();
        let bytes = TURN_BYTES.min(self.shard.turn_bytes());
        let limits = DrainLimits { bytes, commands: TURN_COMMANDS, bulk };
        let more = inbox.drain(limits, &mut self.commands, &mut self.news);
        for news in self.news.drain(..) {
            match &news {
                News::Stop => self.stopping = true,
                News::Checkpointed { .. } => self.checkpointing = false,
                _ => {}
            }
            self.shard.learn(news);
        }
        let now = self.clock.now();
        self.shard.look_at_room(now.monotonic_ms);
        if !self.commands.is_empty() || self.shard.is_due(now.monotonic_ms) {
            let before = self.shard.written();
            self.shard.turn(now, &mut self.commands);
            for read in self.shard.take_reads() {
                self.reads.start(read);
            }
            if self.shard.written() != before {
                self.last_write = self.clock.instant();
                self.unmarked = true;
            }
            self.free();
        } else if self.stopping && !more {
            return After::End;
        }
        let busy = self.stopping || self.shard.is_due(self.clock.monotonic_ms());
        if busy || !inbox.fall_asleep(self.shard.takes_bulk()) { After::Turn } else { After::Sleep }
    }

    /// Has the space of deleted topics given back.
    fn free(&self) {
        let files = self.shard.take_freed();
        if !files.is_empty() {
            // A thread that has ended has said why; the shard is read-only then.
            let _ = self.storage.send(Work::Free { lsn: self.shard.written(), files });
        }
    }

    pub(crate) fn shard(&self) -> &Shard {
        &self.shard
    }

    pub(crate) fn clock(&self) -> &Clock {
        &self.clock
    }

    pub(super) fn progress(&self) -> Progress {
        Progress {
            written: self.shard.written(),
            synced: self.shard.synced(),
            until_due: self.shard.next_deadline().map(|deadline| self.clock.until(deadline)),
        }
    }

    fn since(&self, past: Instant) -> Duration {
        self.clock.instant().saturating_duration_since(past)
    }

    fn is_checkpoint_due(&self) -> bool {
        let interval = if self.shard.is_full() {
            self.options.interval.min(CHECKPOINTS_WHEN_FULL)
        } else {
            self.options.interval
        };
        let due = self.shard.journaled() >= self.options.journal_bytes
            || self.since(self.last_checkpoint) >= interval;
        due && !self.checkpointing && self.shard.read_only().is_none()
    }

    fn checkpoint_if_due(&mut self) {
        if !self.is_checkpoint_due() {
            return;
        }
        self.last_checkpoint = self.clock.instant();
        if self.shard.written() > self.checkpointed {
            self.checkpointing = true;
            self.checkpointed = self.shard.written();
            let checkpoint = self.shard.checkpoint(self.clock.now());
            // A thread that has ended has said why; the shard is read-only then.
            let _ = self.storage.send(Work::Checkpoint(checkpoint));
        }
    }

    fn mark_if_quiet(&mut self) {
        let quiet = self.since(self.last_write) >= MARK_AFTER;
        if self.unmarked && quiet && self.shard.is_synced() && self.shard.read_only().is_none() {
            self.unmarked = false;
            self.shard.mark();
        }
    }

    fn sleep(&self) -> Duration {
        let mut sleep = LONGEST_SLEEP;
        if let Some(deadline) = self.shard.next_deadline() {
            sleep = sleep.min(self.clock.until(deadline));
        }
        if self.unmarked && self.shard.is_synced() {
            sleep = sleep.min(MARK_AFTER.saturating_sub(self.since(self.last_write)));
        }
        sleep.max(Duration::from_millis(1))
    }

    /// Ends the run cleanly.
    pub(crate) fn finish(&mut self, inbox: &Inbox) {
        inbox.close();
        inbox.clear();
        if self.shard.read_only().is_some() {
            return;
        }
        let now = self.clock.now();
        self.shard.stop(now);
        if self.shard.written() > self.checkpointed {
            let checkpoint = self.shard.checkpoint(now);
            let _ = self.storage.send(Work::Checkpoint(checkpoint));
        }
        self.shard.mark();
    }
}
