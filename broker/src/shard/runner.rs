//! The shard's thread: drains the inbox, turns the shard, sleeps when there is nothing to do.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread;
use std::time::{Duration, Instant};

use super::clock::Clock;
use super::core::{Checkpoint, Shard};
use super::inbox::{DrainLimits, Inbox, News};
use super::reads::Reads;

/// Most bytes and commands of one turn.
const TURN_BYTES: usize = 4 << 20;
const TURN_COMMANDS: usize = 8192;
/// Quiet after which the journal is told that everything is synced.
const MARK_AFTER: Duration = Duration::from_millis(10);
/// Longest sleep; only so that a mistake in waking would not be for ever.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);

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
    pub(crate) shard: Shard,
    pub(crate) clock: Clock,
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) reads: Reads,
    pub(crate) checkpoints: Sender<Checkpoint>,
    pub(crate) options: CheckpointOptions,
}

/// What the loop remembers from turn to turn.
#[derive(Debug)]
struct Habits {
    /// The last frame was written then.
    last_write: Instant,
    /// A mark may be missing for it.
    unmarked: bool,
    last_checkpoint: Instant,
    /// Frame of the last checkpoint.
    checkpointed: u64,
    checkpointing: bool,
    stopping: bool,
}

impl Runner {
    /// Runs until told to stop; then carries out what is queued, says in the journal that the run ended cleanly, and
    /// makes a last checkpoint.
    pub(crate) fn run(mut self) {
        self.inbox.attach();
        let now = Instant::now();
        let mut habits = Habits {
            last_write: now,
            unmarked: true,
            last_checkpoint: now,
            checkpointed: 0,
            checkpointing: false,
            stopping: false,
        };
        let mut commands = Vec::new();
        let mut news = Vec::new();
        loop {
            let bulk = self.shard.takes_bulk();
            let limits = DrainLimits { bytes: TURN_BYTES, commands: TURN_COMMANDS, bulk };
            let more = self.inbox.drain(limits, &mut commands, &mut news);
            for news in news.drain(..) {
                match &news {
                    News::Stop => habits.stopping = true,
                    News::Checkpointed { .. } => habits.checkpointing = false,
                    _ => {}
                }
                self.shard.learn(news);
            }
            let now = self.clock.now();
            if !commands.is_empty() || self.shard.is_due(now.monotonic_ms) {
                let before = self.shard.written();
                self.shard.turn(now, &mut commands);
                for read in self.shard.take_reads() {
                    self.reads.start(read);
                }
                if self.shard.written() != before {
                    habits.last_write = Instant::now();
                    habits.unmarked = true;
                }
                self.checkpoint_if_due(&mut habits);
                continue;
            }
            if habits.stopping && !more {
                break;
            }
            self.checkpoint_if_due(&mut habits);
            self.mark_if_quiet(&mut habits);
            if self.inbox.fall_asleep(bulk) {
                thread::park_timeout(self.sleep(&habits));
            }
        }
        self.finish(&habits);
    }

    fn checkpoint_if_due(&mut self, habits: &mut Habits) {
        let due = self.shard.journaled() >= self.options.journal_bytes
            || habits.last_checkpoint.elapsed() >= self.options.interval;
        if !due || habits.checkpointing || self.shard.read_only().is_some() {
            return;
        }
        habits.last_checkpoint = Instant::now();
        if self.shard.written() > habits.checkpointed {
            habits.checkpointing = true;
            habits.checkpointed = self.shard.written();
            let checkpoint = self.shard.checkpoint(self.clock.now());
            // A thread that has ended has said why; the shard is read-only then.
            let _ = self.checkpoints.send(checkpoint);
        }
    }

    fn mark_if_quiet(&mut self, habits: &mut Habits) {
        let quiet = habits.last_write.elapsed() >= MARK_AFTER;
        if habits.unmarked && quiet && self.shard.is_synced() && self.shard.read_only().is_none() {
            habits.unmarked = false;
            self.shard.mark();
        }
    }

    fn sleep(&self, habits: &Habits) -> Duration {
        let mut sleep = LONGEST_SLEEP;
        if let Some(deadline) = self.shard.next_deadline() {
            sleep = sleep.min(self.clock.until(deadline));
        }
        if habits.unmarked && self.shard.is_synced() {
            sleep = sleep.min(MARK_AFTER.saturating_sub(habits.last_write.elapsed()));
        }
        sleep.max(Duration::from_millis(1))
    }

    fn finish(mut self, habits: &Habits) {
        self.inbox.close();
        self.inbox.clear();
        if self.shard.read_only().is_some() {
            return;
        }
        let now = self.clock.now();
        self.shard.stop(now);
        if self.shard.written() > habits.checkpointed {
            let checkpoint = self.shard.checkpoint(now);
            let _ = self.checkpoints.send(checkpoint);
        }
        self.shard.mark();
    }
}
