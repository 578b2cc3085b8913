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

    /// Whether a lane has enough for a large write, or had a moment ago.
    pub(super) fn has_full(&self) -> bool {
        !self.full.is_empty()
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use bytes::Bytes;
    use tokio::sync::Semaphore;

    use super::*;
    use crate::disk::MemDisk;
    use crate::engine::PartitionInfo;
    use crate::engine::effect::SegmentName;
    use crate::engine::types::TopicId;
    use crate::log::files::SegmentFiles;
    use crate::log::reread::RereadCache;
    use crate::log::segment::Segment;
    use crate::log::tail::TailBudget;
    use crate::log::view::LogContext;

    const LINGER: Duration = Duration::from_millis(100);

    struct Partition {
        view: Arc<ReadView>,
        segment: Arc<Segment>,
        position: u64,
    }

    fn partition(number: u32) -> Partition {
        let partition = PartitionKey { topic: TopicId([1; 16]), partition: number };
        let name = SegmentName { partition, base_offset: 0, generation: 0 };
        let info = PartitionInfo {
            partition,
            topic: String::new(),
            log_start: 0,
            end: 0,
            segments: vec![(name, 0)],
        };
        let context = LogContext {
            files: SegmentFiles::new(Arc::new(MemDisk::new()), Path::new("/").into(), 1, 0),
            budget: TailBudget::new(0),
            rereads: RereadCache::new(0),
            disk_reads: Arc::new(Semaphore::new(1)),
        };
        let view = Arc::new(ReadView::new(Arc::new(context), &info));
        let segment = Arc::clone(&view.segments()[0]);
        Partition { view, segment, position: 0 }
    }

    impl Partition {
        fn push(&mut self, queue: &mut Queue, now: Instant, bytes: usize) {
            let batch = PlacedBatch {
                segment: Arc::clone(&self.segment),
                position: self.position,
                base_offset: self.position,
                last_offset: self.position,
                max_timestamp: 0,
                bytes: Bytes::from(vec![0; bytes]),
                stored: false,
            };
            self.position += bytes as u64;
            queue.push(now, &self.view, batch);
        }
    }

    /// Takes the next run and reports its partition and bytes.
    fn run(queue: &mut Queue, now: Instant, eager: bool) -> Option<(u32, usize)> {
        let Next::Write(run) = queue.next(now, eager) else { return None };
        queue.done(&run);
        let bytes = run.batches.iter().map(|batch| batch.bytes.len()).sum();
        Some((run.view.partition().partition, bytes))
    }

    #[test]
    fn small_writes_wait_for_company_and_large_ones_do_not() {
        let now = Instant::now();
        let mut queue = Queue::new(LINGER);
        let (mut a, mut b) = (partition(0), partition(1));
        a.push(&mut queue, now, 100);
        a.push(&mut queue, now + LINGER / 2, 100);
        b.push(&mut queue, now + LINGER / 2, FULL_BYTES);
        assert_eq!(run(&mut queue, now + LINGER / 2, false), Some((1, FULL_BYTES)));
        let Next::Wait(wait) = queue.next(now + LINGER / 2, false) else { panic!("a small write is due") };
        assert_eq!(wait, LINGER / 2);
        assert_eq!(run(&mut queue, now + LINGER, false), Some((0, 200)));
        assert!(matches!(queue.next(now + LINGER, false), Next::Empty));
    }

    #[test]
    fn full_lanes_take_turns_and_starve_nobody() {
        let now = Instant::now();
        let mut queue = Queue::new(LINGER);
        let (mut a, mut b, mut c) = (partition(0), partition(1), partition(2));
        for _ in 0..3 {
            a.push(&mut queue, now, RUN_BYTES);
            b.push(&mut queue, now, RUN_BYTES);
        }
        c.push(&mut queue, now, 10);
        let order: Vec<u32> =
            std::iter::from_fn(|| run(&mut queue, now, false)).map(|(partition, _)| partition).collect();
        assert_eq!(order, [0, 1, 0, 1, 0, 1]);
        for _ in 0..10 {
            a.push(&mut queue, now + LINGER, RUN_BYTES);
        }
        assert_eq!(run(&mut queue, now + LINGER, false), Some((2, 10)), "its time has come");
        assert_eq!(run(&mut queue, now + LINGER, false), Some((0, RUN_BYTES)));
    }

    #[test]
    fn a_run_is_bounded_and_never_skips() {
        let now = Instant::now();
        let mut queue = Queue::new(LINGER);
        let mut a = partition(0);
        for _ in 0..RUN_BATCHES + 5 {
            a.push(&mut queue, now, 1);
        }
        a.position += 1;
        a.push(&mut queue, now, RUN_BYTES + 1);
        assert_eq!(run(&mut queue, now, true), Some((0, RUN_BATCHES)));
        assert_eq!(run(&mut queue, now, true), Some((0, 5)), "what does not follow is a write of its own");
        assert_eq!(run(&mut queue, now, true), Some((0, RUN_BYTES + 1)), "one batch is always taken");
        assert_eq!(run(&mut queue, now, true), None);
    }

    #[test]
    fn a_barrier_makes_everything_before_it_due() {
        let now = Instant::now();
        let mut queue = Queue::new(LINGER);
        let (mut a, mut b, mut c) = (partition(0), partition(1), partition(2));
        for partition in [&mut a, &mut b, &mut c] {
            partition.push(&mut queue, now, 10);
        }
        let Next::Write(in_flight) = queue.next(now, true) else { panic!("nothing to write") };
        queue.set_barrier();
        a.push(&mut queue, now, 10);
        assert_eq!(run(&mut queue, now, false), Some((1, 10)));
        assert!(!queue.reached_barrier());
        assert_eq!(queue.discard(c.view.partition()), 10);
        assert!(!queue.reached_barrier(), "one is being written");
        queue.done(&in_flight);
        assert!(queue.reached_barrier());
        assert!(matches!(queue.next(now, false), Next::Wait(_)), "what came later may linger");
        queue.set_barrier();
        assert!(!queue.reached_barrier());
        assert_eq!(run(&mut queue, now, false), Some((0, 10)));
        assert!(queue.reached_barrier());
    }

    #[test]
    fn lines_do_not_grow_with_lanes_that_had_their_turn() {
        let now = Instant::now();
        let mut queue = Queue::new(LINGER);
        let (mut a, mut b) = (partition(0), partition(1));
        for _ in 0..100 {
            a.push(&mut queue, now, FULL_BYTES);
            b.push(&mut queue, now, FULL_BYTES);
            assert!(run(&mut queue, now, true).is_some());
            assert!(run(&mut queue, now, false).is_some());
        }
        assert!(matches!(queue.next(now, true), Next::Empty));
        assert_eq!((queue.turns.len(), queue.full.len(), queue.lanes.len()), (0, 0, 0));
    }
}
