//! Which batches are written next: large writes first, everybody's turn comes, nobody waits longer than the linger.
//!
//! Batches wait in one lane per partition, in order. A lane is *full* when it has enough for one large write. Full lanes
//! take turns; a lane that does not fill up takes its turn when its first batch has waited for the linger time. When
//! somebody waits for everything to be written, or memory runs short, all lanes take turns at once.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::segment::PlacedBatch;
use super::view::ReadView;
use crate::engine::types::PartitionKey;

/// Enough for one write: more per call gains little, and would make other partitions wait.
pub(super) const RUN_BYTES: usize = 4 * 1024 * 1024;
/// Enough for a write ahead of the linger time.
const FULL_BYTES: usize = 512 * 1024;
/// Batches in one write; one system call takes as many slices.
const RUN_BATCHES: usize = crate::disk::MAX_SLICES;

#[derive(Debug)]
struct Lane {
    view: Arc<ReadView>,
    /// With the number in which they came.
    batches: VecDeque<(u64, PlacedBatch)>,
    bytes: usize,
    since: Instant,
    /// Names the entries in `turns` and `full` that stand for this lane; others are left over.
    ticket: u64,
    /// Stands in `full`.
    full: bool,
}

/// Batches that follow each other in one segment.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) view: Arc<ReadView>,
    pub(super) batches: Vec<PlacedBatch>,
    numbers: Vec<u64>,
}

#[derive(Debug)]
pub(super) enum Next {
    Write(Run),
    /// Nothing is due before this much time has passed.
    Wait(Duration),
    Empty,
}

#[derive(Debug)]
pub(super) struct Queue {
    lanes: HashMap<PartitionKey, Lane>,
    /// Lanes in the order in which they began to wait.
    turns: VecDeque<(u64, PartitionKey)>,
    full: VecDeque<(u64, PartitionKey)>,
    linger: Duration,
    next_number: u64,
    next_ticket: u64,
    /// Batches that were taken or wait.
    outstanding: u64,
    /// Everything numbered below is to be written at once; how many of those are left.
    barrier: u64,
    before_barrier: u64,
}

impl Queue {
    pub(super) fn new(linger: Duration) -> Self {
        Self {
            lanes: HashMap::new(),
            turns: VecDeque::new(),
            full: VecDeque::new(),
            linger,
            next_number: 0,
            next_ticket: 0,
            outstanding: 0,
            barrier: 0,
            before_barrier: 0,
        }
    }

    pub(super) fn push(&mut self, now: Instant, view: &Arc<ReadView>, batch: PlacedBatch) {
        let partition = view.partition();
        let lane = self.lanes.entry(partition).or_insert_with(|| {
            self.next_ticket += 1;
            self.turns.push_back((self.next_ticket, partition));
            Lane {
                view: Arc::clone(view),
                batches: VecDeque::new(),
                bytes: 0,
                since: now,
                ticket: self.next_ticket,
                full: false,
            }
        });
        lane.bytes += batch.bytes.len();
        lane.batches.push_back((self.next_number, batch));
        self.next_number += 1;
        self.outstanding += 1;
        if lane.bytes >= FULL_BYTES && !lane.full {
            lane.full = true;
            self.full.push_back((lane.ticket, partition));
        }
    }

    /// Makes everything that is outstanding now due at once; see [`Self::reached_barrier`].
    pub(super) fn set_barrier(&mut self) {
        self.barrier = self.next_number;
        self.before_barrier = self.outstanding;
    }

    /// Everything that was outstanding when the barrier was set is done.
    pub(super) fn reached_barrier(&self) -> bool {
        self.before_barrier == 0
    }

    /// What to write now. `eager` makes everything due. The run counts as outstanding until [`Self::done`].
    pub(super) fn next(&mut self, now: Instant, eager: bool) -> Next {
        let eager = eager || !self.reached_barrier();
        self.drop_leftovers();
        let Some(&(_, first)) = self.turns.front() else { return Next::Empty };
        let due = self.lanes.get(&first).map_or(now, |lane| lane.since + self.linger);
        if eager || due <= now {
            return self.take(now, first);
        }
        match self.full.front() {
            Some(&(_, partition)) => self.take(now, partition),
            None => Next::Wait(due - now),
        }
    }

    /// Lets go of entries at the head of both lines whose lane has had its turn.
    fn drop_leftovers(&mut self) {
        let lanes = &self.lanes;
        let left_over =
            |&(ticket, partition): &_| lanes.get(&partition).is_none_or(|lane: &Lane| lane.ticket != ticket);
        for line in [&mut self.turns, &mut self.full] {
            while line.pop_front_if(|entry| left_over(entry)).is_some() {}
        }
    }

    fn take(&mut self, now: Instant, partition: PartitionKey) -> Next {
        let Some(mut lane) = self.lanes.remove(&partition) else { return Next::Empty };
        let mut run = Run { view: Arc::clone(&lane.view), batches: Vec::new(), numbers: Vec::new() };
        let mut bytes = 0;
        while let Some((_, batch)) = lane.batches.front() {
            let follows = run.batches.last().is_none_or(|last| {
                Arc::ptr_eq(&last.segment, &batch.segment)
                    && last.position + last.bytes.len() as u64 == batch.position
                    && bytes + batch.bytes.len() <= RUN_BYTES
                    && run.batches.len() < RUN_BATCHES
            });
            if !follows {
                break;
            }
            if let Some((number, batch)) = lane.batches.pop_front() {
                bytes += batch.bytes.len();
                run.numbers.push(number);
                run.batches.push(batch);
            }
        }
        lane.bytes -= bytes;
        // What is left goes to the end of the line: that is what makes it fair.
        if !lane.batches.is_empty() {
            self.next_ticket += 1;
            lane.ticket = self.next_ticket;
            lane.since = now;
            lane.full = lane.bytes >= FULL_BYTES;
            self.turns.push_back((lane.ticket, partition));
            if lane.full {
                self.full.push_back((lane.ticket, partition));
            }
            self.lanes.insert(partition, lane);
        }
        Next::Write(run)
    }

    /// The run was written.
    pub(super) fn done(&mut self, run: &Run) {
        self.settle(run.numbers.iter().copied());
    }

    fn settle(&mut self, numbers: impl Iterator<Item = u64>) {
        for number in numbers {
            self.outstanding -= 1;
            if number < self.barrier {
                self.before_barrier -= 1;
            }
        }
    }

    /// Drops what waits for a partition that is gone; returns its bytes.
    pub(super) fn discard(&mut self, partition: PartitionKey) -> usize {
        let Some(lane) = self.lanes.remove(&partition) else { return 0 };
        self.settle(lane.batches.iter().map(|(number, _)| *number));
        lane.bytes
    }
}
