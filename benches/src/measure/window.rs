//! The window of elapsed time in which is counted.
//!
//! Tasks work all the time and count what they finish; [`Window::observe`] takes the difference between two moments. What
//! warms up before and what is still on its way afterwards is not counted.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::{PATIENCE, Session};
use crate::process;
use crate::row::Row;

/// How often the counts are looked at.
const TICK: Duration = Duration::from_millis(5);

/// A count alone on its cache lines, so that tasks on several cores do not slow each other down by counting.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Count(AtomicU64);

impl Count {
    pub(super) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }
}

/// Shared by the tasks of a measurement.
#[derive(Debug)]
pub(super) struct Window {
    phase: AtomicU8,
    counts: Box<[Count]>,
}

const WARMING: u8 = 0;
const COUNTING: u8 = 1;
const OVER: u8 = 2;

/// How long is measured.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub(super) warm_up: Duration,
    pub(super) measured: Duration,
    /// The window closes early when so many were counted, the warm-up included.
    pub(super) most: u64,
}

impl Window {
    /// With a count for each of so many tasks.
    pub(super) fn new(tasks: usize) -> Self {
        let counts = std::iter::repeat_with(Count::default).take(tasks).collect();
        Self { phase: AtomicU8::new(WARMING), counts }
    }

    pub(super) fn count(&self, task: usize) -> &Count {
        &self.counts[task]
    }

    /// Latencies are recorded now.
    pub(super) fn is_counting(&self) -> bool {
        self.phase.load(Ordering::Relaxed) == COUNTING
    }

    /// Tasks are to end.
    pub(super) fn is_over(&self) -> bool {
        self.phase.load(Ordering::Relaxed) == OVER
    }

    fn total(&self) -> u64 {
        self.counts.iter().map(|count| count.0.load(Ordering::Relaxed)).sum()
    }

    /// Warms up, counts, closes; returns a row with rates and usage. Neither warm-up nor window ends before something was
    /// counted in it, unless nothing ever is. When the warm-up took most of the work, the window began with it.
    pub(super) async fn observe(&self, session: &Session, span: &Span, bytes_per_record: u64) -> Row {
        let whole = Meter::start(session);
        self.pass(span.warm_up, span.most / 2).await;
        let warmed_up = self.total();
        let (meter, before) =
            if warmed_up > span.most / 2 { (whole, 0) } else { (Meter::start(session), warmed_up) };
        self.phase.store(COUNTING, Ordering::Relaxed);
        self.pass(span.measured, span.most).await;
        let row = meter.finish(self.total() - before, bytes_per_record);
        self.phase.store(OVER, Ordering::Relaxed);
        row
    }

    /// Lets time pass, or less when the total is reached before.
    async fn pass(&self, time: Duration, most: u64) {
        let (began, before) = (Instant::now(), self.total());
        loop {
            let (elapsed, total) = (began.elapsed(), self.total());
            let enough = elapsed >= time && (total > before || elapsed >= PATIENCE);
            if enough || total >= most {
                return;
            }
            tokio::time::sleep(TICK.min(time.saturating_sub(elapsed)).max(Duration::from_millis(1))).await;
        }
    }
}

/// Elapsed time, and what was used of the machine within it.
#[derive(Debug)]
pub(super) struct Meter {
    began: Instant,
    session: Session,
    before: Usage,
}

#[derive(Clone, Copy, Debug)]
struct Usage {
    server_cpu: Option<f64>,
    client_cpu: Option<f64>,
    disk_bytes: Option<u64>,
}

impl Usage {
    fn now(session: &Session) -> Self {
        Self {
            server_cpu: session.pid.and_then(process::cpu_seconds),
            client_cpu: process::cpu_seconds(std::process::id()),
            disk_bytes: session.data.as_deref().and_then(process::device_bytes),
        }
    }
}

impl Meter {
    pub(super) fn start(session: &Session) -> Self {
        Self { before: Usage::now(session), session: session.clone(), began: Instant::now() }
    }

    pub(super) fn finish(self, records: u64, bytes_per_record: u64) -> Row {
        let mut row = Row::default();
        row.set_rate(records, bytes_per_record, self.began.elapsed());
        let (before, after) = (self.before, Usage::now(&self.session));
        let spent = |before: Option<f64>, after: Option<f64>| Some(after? - before?);
        row.server_cpu_s = spent(before.server_cpu, after.server_cpu);
        row.client_cpu_s = spent(before.client_cpu, after.client_cpu);
        row.disk_bytes =
            before.disk_bytes.zip(after.disk_bytes).map(|(before, after)| after.saturating_sub(before));
        row.server_rss_bytes = self.session.pid.and_then(process::resident_bytes);
        row
    }
}
