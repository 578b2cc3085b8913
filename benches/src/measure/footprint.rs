//! What a broker costs before it does anything: time to start on an empty directory, and resident memory.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use crate::broker::Launcher;
use crate::process;
use crate::row::{Row, latencies, record};
use crate::run::Effort;
use crate::workload::Footprint;

/// How long a started broker is left alone before its memory is read.
const IDLE: Duration = Duration::from_millis(500);

/// Latencies are the times from start to first accepted connection, memory is the median.
pub(super) fn measure(launcher: &Launcher, effort: &Effort, work: &Footprint) -> anyhow::Result<Row> {
    let mut starts = latencies();
    let mut resident = Vec::new();
    let began = Instant::now();
    for _ in 0..effort.starts(work.starts) {
        let broker = launcher.launch()?;
        record(&mut starts, broker.started_in.context("only a broker that is started here can be measured")?);
        std::thread::park_timeout(IDLE);
        resident.extend(broker.pid.and_then(process::resident_bytes));
        broker.stop()?;
    }
    ensure!(!starts.is_empty(), "nothing was started");
    resident.sort_unstable();
    let mut row = Row {
        records: Some(starts.len()),
        seconds: Some(began.elapsed().as_secs_f64()),
        server_rss_bytes: resident.get(resident.len() / 2).copied(),
        ..Row::default()
    };
    row.set_latencies(&starts);
    Ok(row)
}
