//! The shard: one engine in front of one journal.
//!
//! [`Shard::turn`] is one turn of the loop, and one journal frame: commands go through the engine, what they staged is
//! written with one vectored write, and everything is let go that may be shown once a frame is written; the rest goes to
//! the sync thread ([`super::release`]). The shard owns no thread and reads no clock, so that it can be driven step by step.
//!
//! ```text
//!   commands ─▶ engine.step … ─▶ effects ─▶ (large batches to their segments) ─▶ journal.append ─▶ views, tails, segment writer
//!                  ▲                                      ├─▶ replies and deliveries at `written`
//!                  │ scans from memory                    └─▶ Release ─▶ sync thread ─▶ high watermarks, replies
//! ```
//!
//! **One release rule.** Every reply, also a rejection's or a query's, waits until the last frame that had been staged when
//! it was decided has reached the reply's level.
//!
//! **A frame has room for every turn.** What a turn takes in, and each single request, is at most three quarters of what a frame
//! may hold; what is larger is refused before the engine sees it, for the engine cannot take anything back.
//!
//! **After a failed write** the shard latches read-only: the first reason is kept, what had been staged is never shown, and
//! every later command but a query is refused with it.

use std::collections::HashMap;
use std::mem::take;
use std::sync::Arc;

use super::inbox::{News, Submission};
use super::reads::Read;
use super::reference::{ReferenceOptions, References};
use super::release::{Release, Releases};
use super::room::Room;
use super::sink::{Responder, Sink, Wakes};
use crate::checkpoint::Row;
use crate::engine::Engine;
use crate::engine::command::Command;
use crate::engine::effect::{Effects, Reply};
use crate::engine::error::EngineError;
use crate::engine::types::{Level, Lsn, Now, RequestId, SubscriptionId};
use crate::journal::{Journal, JournalError};
use crate::log::{Condemned, SegmentWriter, scan_memory};
use crate::plants::planted;
use crate::status::StatusBoard;

/// Rounds of scans that one turn answers from memory before it writes.
const SCAN_ROUNDS: usize = 4;

/// Limits of the shard.
#[derive(Clone, Debug)]
pub struct ShardOptions {
    /// Written and not yet synced; beyond it appends wait.
    pub max_unsynced_bytes: u64,
    pub reference: ReferenceOptions,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Shard {
    engine: Engine,
    journal: Journal,
    log: Arc<SegmentWriter>,
    releases: Arc<Releases>,
    max_unsynced_bytes: u64,
    references: References,
    room: Room,
    status: Arc<StatusBoard>,
    effects: Effects,
    /// Requests of this turn, by request id.
    requests: Vec<Option<Responder>>,
    subscriptions: HashMap<SubscriptionId, Arc<dyn Sink>>,
    reads: Vec<Read>,
    wakes: Wakes,
    written: Lsn,
    synced: Lsn,
    /// What the engine was last told of `written` and `synced`.
    told: (Lsn, Lsn),
    /// Bytes of the journal's files that were used before the last checkpoint was begun.
    checkpointed: u64,
    read_only: Option<String>,
}

/// What a shard keeps its records and state on.
#[derive(Debug)]
pub(crate) struct ShardStorage {
    pub(crate) journal: Journal,
    pub(crate) log: Arc<SegmentWriter>,
    pub(crate) room: Room,
}

/// A checkpoint that is to be stored.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    /// The rows are the state after this frame.
    pub(crate) lsn: Lsn,
    pub(crate) monotonic_ms: u64,
    pub(crate) rows: Vec<Row>,
    /// Files to remove once it is stored.
    pub(crate) condemned: Condemned,
}

impl Shard {
    /// A shard on a recovered engine, journal and log. Everything in the journal is synced.
    pub(crate) fn new(
        engine: Engine,
        storage: ShardStorage,
        releases: Arc<Releases>,
        options: ShardOptions,
        status: Arc<StatusBoard>,
    ) -> Self {
        let ShardStorage { journal, log, room } = storage;
        let (written, synced) = (journal.written(), journal.synced());
        Self {
            engine,
            journal,
            log,
            releases,
            max_unsynced_bytes: options.max_unsynced_bytes,
            references: References::new(options.reference),
            room,
            status,
            effects: Effects::default(),
            requests: Vec::new(),
            subscriptions: HashMap::new(),
            reads: Vec::new(),
            wakes: Wakes::default(),
            written,
            synced,
            told: (written, synced),
            checkpointed: 0,
            read_only: None,
        }
    }

    /// Begins the run: see [`Engine::boot`]. Nothing may be served before the frame is synced.
    pub(crate) fn boot(&mut self, now: Now, machine_boot: &str) -> Result<(), JournalError> {
        self.engine.boot(now, self.journal.next_lsn(), machine_boot, &mut self.effects);
        for (group, reason) in self.engine.corrupt_groups() {
            tracing::error!(
                group,
                reason,
                "the group refuses to serve; move it with `felucca group seek`, or delete it"
            );
        }
        let release = self.commit(now);
        let synced = self.journal.syncer().sync()?;
        self.learn(News::Synced(synced));
        for (partition, high_watermark) in release.unwrap_or_default().high_watermarks {
            if let Some(view) = self.log.views().get(partition) {
                view.publish(high_watermark);
            }
        }
        Ok(())
    }

    /// Ends the run: the last frame says that it ended cleanly.
    pub(crate) fn stop(&mut self, now: Now) {
        if self.read_only.is_none() {
            self.engine.stop(&mut self.effects);
            let release = self.commit(now);
            self.hand_over(release);
        }
    }

    pub(crate) fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Prepares journal files on this thread; for journals that have none of their own for that.
    pub(crate) fn prepare_files(&self) {
        self.journal.prepare_files();
    }

    pub(crate) fn journal(&self) -> &Journal {
        &self.journal
    }

    pub(crate) fn written(&self) -> Lsn {
        self.written
    }

    /// Bytes of the journal's files that were used since the last checkpoint was begun.
    pub(crate) fn journaled(&self) -> u64 {
        self.journal.used_bytes() - self.checkpointed
    }

    /// True while new records are refused because the disk is nearly full.
    pub(crate) fn is_full(&self) -> bool {
        self.room.full().is_some()
    }

    /// Asks the disk for its room when it is time, and has the engine act on it.
    pub(crate) fn look_at_room(&mut self, monotonic_ms: u64) {
        if self.room.look(monotonic_ms) {
            self.engine.set_room(self.room.full().copied());
            self.status.room(self.room.full().copied());
        }
    }

    /// The last frame known to be on the device.
    pub(crate) fn synced(&self) -> Lsn {
        self.synced
    }

    /// True while every frame is on the device.
    pub(crate) fn is_synced(&self) -> bool {
        self.synced >= self.written
    }

    /// Why nothing is written any more, if so.
    pub(crate) fn read_only(&self) -> Option<&str> {
        self.read_only.as_deref()
    }

    /// Most bytes of requests that one frame is for. The rest of it is for what the engine adds to them, and does by itself.
    pub(crate) fn turn_bytes(&self) -> usize {
        usize::try_from(self.journal.max_frame_bytes() / 4 * 3).unwrap_or(usize::MAX)
    }

    /// Whether appends may be taken in now. After a "no" the sync thread or the segment writer brings news.
    pub(crate) fn takes_bulk(&self) -> bool {
        // Refusing needs no room.
        self.read_only.is_some()
            || (self.journal.unsynced_bytes() < self.max_unsynced_bytes && self.log.has_room())
    }

    /// True when the engine has something to do by itself now.
    pub(crate) fn is_due(&self, monotonic_ms: u64) -> bool {
        self.read_only.is_none()
            && (self.told != (self.written, self.synced)
                || self.engine.next_deadline().is_some_and(|deadline| deadline <= monotonic_ms))
    }

    /// When [`Self::is_due`] next becomes true by itself, in monotonic milliseconds.
    pub(crate) fn next_deadline(&self) -> Option<u64> {
        self.engine.next_deadline().filter(|_| self.read_only.is_none())
    }

    /// Takes note of what another thread says.
    pub(crate) fn learn(&mut self, news: News) {
        match news {
            News::Synced(synced) => self.synced = self.synced.max(synced),
            News::Failed(reason) => self.latch(reason),
            News::Checkpointed { .. } if planted("release-journal-early") => {
                self.journal.release(self.journal.next_lsn());
            }
            News::Checkpointed { previous } => self.journal.release(previous + 1),
            News::Room => {
                if let Some(failure) = self.log.failure() {
                    self.latch(failure.to_string());
                }
            }
            News::Stop => {}
        }
    }

    /// Carries out commands and writes what they staged. What the engine wants read is left in [`Self::take_reads`].
    pub(crate) fn turn(&mut self, now: Now, commands: &mut Vec<Submission>) {
        if self.read_only.is_none() {
            self.advance(now, commands);
        } else {
            self.refuse(now, commands);
        }
        let release = self.commit(now);
        self.status.journaled(self.journaled());
        // First those whose answers are there, then the thread that makes others wait for the disk.
        self.wakes.wake_all();
        self.hand_over(release);
    }

    /// Everything that the engine does within one frame.
    fn advance(&mut self, now: Now, commands: &mut Vec<Submission>) {
        let lsn = self.journal.next_lsn();
        if self.told != (self.written, self.synced) {
            self.told = (self.written, self.synced);
            self.engine.progress(now, lsn, self.written, self.synced, &mut self.effects);
        }
        for submission in commands.drain(..) {
            self.step(now, lsn, submission);
        }
        self.engine.tick(now, lsn, &mut self.effects);
        self.engine.finish(now, lsn, &mut self.effects);
        for _ in 0..SCAN_ROUNDS {
            if self.effects.scans.is_empty() {
                return;
            }
            for scan in take(&mut self.effects.scans) {
                match self.scan_memory(&scan) {
                    Some(answer) => self.engine.step(now, lsn, None, answer, &mut self.effects),
                    None => self.reads.push(Read::Scan(scan)),
                }
            }
            self.engine.finish(now, lsn, &mut self.effects);
        }
        self.reads.extend(take(&mut self.effects.scans).into_iter().map(Read::Scan));
    }

    fn step(&mut self, now: Now, lsn: Lsn, submission: Submission) {
        let (bytes, limit) = (submission.bytes(), self.turn_bytes());
        let Submission { command, responder, .. } = submission;
        let responder = match responder {
            // It depends on nothing that could be lost, and so need not wait.
            Some(responder) if bytes > limit => {
                let refused = EngineError::RequestTooLarge { bytes: bytes as u64, limit: limit as u64 };
                responder.answer(Reply::Error(refused), &mut self.wakes);
                return;
            }
            responder => responder,
        };
        let opens = match &command {
            Command::ShareSubscribe { subscription, .. } => Some(*subscription),
            Command::ShareUnsubscribe { subscription } => {
                self.subscriptions.remove(subscription);
                None
            }
            _ => None,
        };
        if let (Some(subscription), Some(sink)) = (opens, responder.as_ref().and_then(Responder::sink)) {
            self.subscriptions.insert(subscription, sink.clone());
        }
        let request = responder.map(|responder| {
            self.requests.push(Some(responder));
            RequestId(self.requests.len() as u64 - 1)
        });
        self.engine.step(now, lsn, request, command, &mut self.effects);
        if let Some(subscription) = opens
            && let Some(last) = self.effects.replies.last()
            && Some(last.request) == request
            && matches!(last.reply, Reply::Error(_))
        {
            self.subscriptions.remove(&subscription);
        }
    }

    /// The answer to a scan whose records are in memory.
    fn scan_memory(&self, scan: &crate::engine::effect::Scan) -> Option<Command> {
        let view = self.log.views().get(scan.partition)?;
        match scan_memory(&view, scan) {
            Ok(None) => None,
            Ok(Some(scanned)) => Some(super::reads::scanned(scan, scanned)),
            Err(error) => Some(super::reads::scan_failed(scan, &error)),
        }
    }

    /// Answers commands when nothing may be written: queries, and the reason for everything else.
    fn refuse(&mut self, now: Now, commands: &mut Vec<Submission>) {
        let lsn = self.journal.next_lsn();
        for submission in commands.drain(..) {
            let is_query = matches!(
                submission.command,
                Command::Metadata { .. }
                    | Command::FetchOffsets { .. }
                    | Command::ListGroups
                    | Command::DescribeGroup { .. }
                    | Command::ListDeadLetters { .. }
            );
            if is_query {
                self.step(now, lsn, submission);
            } else if let Some(responder) = submission.responder {
                let reason = self.read_only.clone().unwrap_or_default();
                responder.answer(Reply::Error(EngineError::ReadOnly(reason)), &mut self.wakes);
            }
        }
    }

    /// Writes what is staged and lets go what may be shown; returns what waits for a sync.
    fn commit(&mut self, now: Now) -> Option<Release> {
        let mut release = None;
        if planted("grant-before-write") {
            self.let_go();
        }
        if !self.effects.events.is_empty() {
            let lsn = self.journal.next_lsn();
            let outside = match self.references.refer(&mut self.effects, &self.log, lsn, self.synced) {
                Ok(outside) => outside,
                Err(failure) => {
                    self.latch(failure.to_string());
                    return None;
                }
            };
            let referred = outside.bytes;
            let events = Engine::encode_frame(now, &mut self.effects);
            let used = self.journal.used_bytes();
            match self.journal.append_with(&events, &self.effects.batches, outside) {
                Ok(lsn) => {
                    self.written = lsn;
                    self.room.spend(self.journal.used_bytes() - used + referred);
                }
                Err(_) if planted("apply-failed-write") => {
                    self.show();
                    self.release(true);
                    self.let_go();
                    return None;
                }
                Err(error) => {
                    self.latch(error.to_string());
                    return None;
                }
            }
            self.show();
            release = Some(self.release(false));
        } else if !self.effects.replies.is_empty() {
            // A shard that is read-only syncs nothing any more, and still answers queries.
            let at_once = self.is_synced() || self.read_only.is_some();
            release = Some(self.release(at_once)).filter(|_| !at_once);
        }
        self.let_go();
        release
    }

    /// Gives the sync thread what waits for it.
    fn hand_over(&self, release: Option<Release>) {
        if let Some(release) = release {
            let soon = self.journal.unsynced_bytes() >= self.max_unsynced_bytes / 2;
            self.releases.wrote(release, soon);
        }
    }

    /// Changes what readers can see, though nothing above the high watermark is seen yet.
    fn show(&mut self) {
        self.effects.batches.clear();
        for change in self.effects.view_changes.drain(..) {
            self.log.apply(&change);
        }
        if let Err(failure) = self.log.append(take(&mut self.effects.segment_writes)) {
            // The frame stands, and what it answers is true; but nothing more can follow it.
            self.read_only.get_or_insert_with(|| failure.to_string());
        }
    }

    /// Sends what waits for `written` (`is_synced`: and for `synced`), and returns what waits for `synced`.
    fn release(&mut self, is_synced: bool) -> Release {
        let mut release = Release { lsn: self.written, ..Release::default() };
        for advance in self.effects.advances.drain(..) {
            if advance.level == Level::Synced && !is_synced && !planted("show-before-sync") {
                release.high_watermarks.push((advance.partition, advance.high_watermark));
            } else if let Some(view) = self.log.views().get(advance.partition) {
                view.publish(advance.high_watermark);
            }
        }
        for pending in self.effects.replies.drain(..) {
            let slot = usize::try_from(pending.request.0).ok().and_then(|index| self.requests.get_mut(index));
            let Some(responder) = slot.and_then(Option::take) else { continue };
            if pending.level == Level::Synced && !is_synced && !planted("reply-before-sync") {
                release.replies.push((responder, pending.reply));
            } else {
                responder.answer(pending.reply, &mut self.wakes);
            }
        }
        self.requests.clear();
        release
    }

    /// Sends deliveries, and gathers what is to be read.
    fn let_go(&mut self) {
        for delivery in self.effects.deliveries.drain(..) {
            if let Some(sink) = self.subscriptions.get(&delivery.subscription)
                && sink.deliver(delivery)
            {
                self.wakes.add(sink.clone());
            }
        }
        for (subscription, error) in self.effects.ended.drain(..) {
            if let Some(sink) = self.subscriptions.remove(&subscription)
                && sink.ended(subscription, error)
            {
                self.wakes.add(sink);
            }
        }
        for read in self.effects.dead_letter_reads.drain(..) {
            let topic = self.engine.topic_name(&read.context.topic).unwrap_or_default().to_owned();
            self.reads.push(Read::DeadLetter { read: Box::new(read), topic });
        }
    }

    /// Nothing is written any more, for this reason unless there is an earlier one; what is staged is not shown.
    fn latch(&mut self, reason: String) {
        if self.read_only.is_none() {
            tracing::error!(
                reason,
                "the shard is read-only from now on; restart the broker when the cause is gone"
            );
        }
        let reason = self.read_only.get_or_insert(reason).clone();
        self.status.read_only(&reason);
        self.effects = Effects::default();
        for responder in self.requests.drain(..).flatten() {
            responder.answer(Reply::Error(EngineError::ReadOnly(reason.clone())), &mut self.wakes);
        }
    }

    /// What the engine wants read, since the last call.
    pub(crate) fn take_reads(&mut self) -> std::vec::Drain<'_, Read> {
        self.reads.drain(..)
    }

    /// Begins a checkpoint of the state as it is now, between turns.
    pub(crate) fn checkpoint(&mut self, now: Now) -> Checkpoint {
        self.checkpointed = self.journal.used_bytes();
        self.status.journaled(0);
        // In this order: what is condemned is gone from the rows.
        let condemned = self.log.take_condemned();
        let rows = self.engine.take_dirty_rows();
        Checkpoint { lsn: self.written, monotonic_ms: now.monotonic_ms, rows, condemned }
    }

    /// Files of deleted topics, to be removed once [`Self::written`] is synced.
    pub(crate) fn take_freed(&self) -> Condemned {
        self.log.take_freed()
    }

    /// Says in the journal that everything is synced, if no frame says so yet.
    pub(crate) fn mark(&mut self) {
        match self.journal.mark() {
            // It is synced in its turn, with the next sync at the latest.
            Ok(true) => self.releases.wrote(Release { lsn: self.written, ..Release::default() }, false),
            Ok(false) => {}
            Err(error) => self.latch(error.to_string()),
        }
    }
}
