//! The window of elapsed time in which is counted.
//!
//! Tasks work all the time and count what they finish; [`Window::observe`] takes the difference between two moments. What
//! warms up before and what is still on its way afterwards is not counted.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::ensure;
use tokio::sync::watch;

use super::{PATIENCE, Session};
use crate::process;
use crate::row::Row;

/// How often the counts are looked at.
const TICK: Duration = Duration::from_millis(5);

/// Between two points of a row's timeline.
const POINT: Duration = Duration::from_millis(100);
/// Times the warm-up, at the most, until enough was written.
const LONGEST_WARM_UP: u32 = 4;
/// A server that uses less of a core for [`QUIET_TIME`] is at rest.
const QUIET_SHARE: f64 = 0.15;
const QUIET_TIME: Duration = Duration::from_millis(200);
/// Longest wait for a server to come to rest.
const LONGEST_DRAIN: Duration = Duration::from_secs(60);

/// A count alone on its cache lines, so that tasks on several cores do not slow each other down by counting.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Count(AtomicU64);

impl Count {
    pub(crate) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }
}

/// Shared by the tasks of a measurement.
#[derive(Debug)]
pub(crate) struct Window {
    phase: AtomicU8,
    counts: Box<[Count]>,
    over: watch::Sender<bool>,
}

const WARMING: u8 = 0;
const COUNTING: u8 = 1;
const OVER: u8 = 2;

/// How long is measured.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub(super) warm_up: Duration,
    /// Warming up takes longer, up to [`LONGEST_WARM_UP`] times as long, until so many were counted.
    pub(super) warm_up_units: u64,
    pub(super) measured: Duration,
    /// The window closes early when so many were counted, the warm-up included.
    pub(super) most: u64,
}

impl Window {
    /// With a count for each of so many tasks.
    pub(super) fn new(tasks: usize) -> Self {
        let counts = std::iter::repeat_with(Count::default).take(tasks).collect();
        Self { phase: AtomicU8::new(WARMING), counts, over: watch::Sender::new(false) }
    }

    pub(crate) fn count(&self, task: usize) -> &Count {
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

    /// Ends it without having observed it.
    pub(super) fn close(&self) {
        self.phase.store(OVER, Ordering::Relaxed);
        self.over.send_replace(true);
    }

    /// Resolves when tasks are to end.
    pub(super) async fn over(&self) {
        let mut over = self.over.subscribe();
        // The sender lives as long as this.
        let _closed = over.wait_for(|over| *over).await;
    }

    fn total(&self) -> u64 {
        self.counts.iter().map(|count| count.0.load(Ordering::Relaxed)).sum()
    }

    /// Warms up, counts, closes; returns a row with rates and usage, and where the window began. Neither warm-up nor window
    /// ends before something was counted in it, unless nothing ever is. When the warm-up took most of the work, the window
    /// began with it.
    pub(super) async fn observe(
        &self,
        session: &Session,
        span: &Span,
        bytes_per_unit: u64,
    ) -> (Row, Opening) {
        let shortest = session.effort.shortest(span.measured);
        let whole = Meter::start(session);
        let most = span.most / 2;
        self.pass(span.warm_up, most, None).await;
        if self.total() < span.warm_up_units {
            let rest = span.warm_up.saturating_mul(LONGEST_WARM_UP - 1);
            self.pass(rest, most.min(span.warm_up_units), None).await;
        }
        let warmed_up = self.total();
        let (meter, before) = if warmed_up > most { (whole, 0) } else { (Meter::start(session), warmed_up) };
        let (began, warm) = (meter.began, Instant::now());
        self.phase.store(COUNTING, Ordering::Relaxed);
        let mut timeline = Vec::new();
        self.pass(span.measured, span.most, Some(&mut timeline)).await;
        let mut row = meter.finish(self.total() - before, bytes_per_unit);
        self.close();
        row.timeline = timeline;
        (row, Opening { began, before, steady: warm.elapsed(), shortest })
    }

    /// Lets time pass, or less when the total is reached before; notes what was counted in each [`POINT`].
    async fn pass(&self, time: Duration, most: u64, mut timeline: Option<&mut Vec<u64>>) {
        let (began, before) = (Instant::now(), self.total());
        let (mut next_point, mut noted) = (POINT, before);
        loop {
            let (elapsed, total) = (began.elapsed(), self.total());
            if let Some(timeline) = timeline.as_deref_mut().filter(|_| elapsed >= next_point) {
                timeline.push(total - noted);
                (next_point, noted) = (next_point + POINT, total);
            }
            let enough = elapsed >= time && (total > before || elapsed >= PATIENCE);
            if enough || total >= most {
                return;
            }
            tokio::time::sleep(TICK.min(time.saturating_sub(elapsed)).max(Duration::from_millis(1))).await;
        }
    }
}

/// Where a window began.
#[derive(Clone, Copy, Debug)]
pub(super) struct Opening {
    began: Instant,
    /// Counted before that.
    before: u64,
    /// From the end of the warm-up to the end of the window.
    steady: Duration,
    shortest: Duration,
}

impl Opening {
    /// The work lasted as long as it has to for a figure.
    pub(super) fn is_steady(&self) -> bool {
        self.steady >= self.shortest
    }

    /// # Errors
    /// It did not.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        let (steady, shortest) = (self.steady, self.shortest);
        ensure!(self.is_steady(), "the work was done after {steady:?}, a figure needs {shortest:?} of it");
        Ok(())
    }

    /// Once nothing is sent any more: waits until the server has come to rest, that is until what it took in has been put
    /// where it stays, and sets the rate at which it can do that all the time.
    pub(super) async fn sustained(
        self,
        session: &Session,
        window: &Window,
        bytes_per_unit: u64,
        row: &mut Row,
    ) {
        let Some(group) = session.group else { return };
        let stopped = Instant::now();
        let mut quiet_since = stopped;
        let mut used = process::group_cpu_seconds(group);
        while quiet_since.elapsed() < QUIET_TIME && stopped.elapsed() < LONGEST_DRAIN {
            let asked = Instant::now();
            tokio::time::sleep(POINT).await;
            let now = process::group_cpu_seconds(group);
            let share = now.zip(used).map_or(0.0, |(now, used)| (now - used) / asked.elapsed().as_secs_f64());
            used = now;
            if share > QUIET_SHARE {
                quiet_since = Instant::now();
            }
        }
        let elapsed = quiet_since.duration_since(self.began).as_secs_f64();
        let units = (window.total() - self.before) as f64;
        row.drain_s = Some(quiet_since.duration_since(stopped).as_secs_f64());
        row.sustained_records_per_s = Some(units / elapsed);
        row.sustained_bytes_per_s = Some(units * bytes_per_unit as f64 / elapsed);
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
            server_cpu: session.group.and_then(process::group_cpu_seconds),
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
        row.server_rss_bytes = self.session.group.and_then(process::group_resident_bytes);
        row
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::run::Effort;
    use crate::workload::Ack;

    /// Counts `units` in every millisecond, and returns whether the window was long enough.
    async fn observed(units: u64, most: u64) -> anyhow::Result<()> {
        let effort = Effort { shortest: Duration::from_millis(60), ..Effort::FULL };
        let session =
            Session { address: String::new(), level: Ack::Written, group: None, data: None, effort };
        let window = Arc::new(Window::new(1));
        let counting = tokio::spawn({
            let window = window.clone();
            async move {
                while !window.is_over() {
                    window.count(0).add(units);
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
        });
        let (warm_up, measured) = (Duration::from_millis(20), Duration::from_millis(80));
        let span = Span { warm_up, warm_up_units: 0, measured, most };
        let (_, opening) = window.observe(&session, &span, 1).await;
        counting.await?;
        opening.check()
    }

    #[tokio::test]
    async fn work_that_is_done_too_soon_has_no_figure() {
        observed(1, u64::MAX).await.unwrap();
        let error = observed(1000, 2000).await.unwrap_err();
        assert!(error.to_string().contains("a figure needs 60ms"), "{error}");
    }
}
