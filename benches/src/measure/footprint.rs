//! What a server costs before it does anything: size of its program, time to start on an empty directory, resident memory.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use crate::peer::Peer;
use crate::process;
use crate::row::{Row, latencies, record};
use crate::run::Effort;
use crate::server::Launcher;
use crate::workload::{Ack, Footprint};

/// How long a started broker is left alone before its memory is read.
const IDLE: Duration = Duration::from_millis(500);

/// Latencies are the times from start to first accepted connection, memory is the median.
pub(super) fn measure(
    launcher: &Launcher,
    peer: Peer,
    level: Ack,
    effort: &Effort,
    work: &Footprint,
) -> anyhow::Result<Row> {
    let mut settings = None;
    let mut starts = latencies();
    let mut resident = Vec::new();
    let began = Instant::now();
    for _ in 0..effort.starts(work.starts) {
        let server = launcher.launch(peer, level)?;
        record(&mut starts, server.started_in.context("only a server that is started here can be measured")?);
        std::thread::park_timeout(IDLE);
        resident.extend(server.group.and_then(process::group_resident_bytes));
        settings = Some(server.settings.clone());
        server.stop()?;
    }
    ensure!(!starts.is_empty(), "nothing was started");
    resident.sort_unstable();
    let mut row = Row {
        records: Some(starts.len()),
        seconds: Some(began.elapsed().as_secs_f64()),
        server_rss_bytes: resident.get(resident.len() / 2).copied(),
        binary_bytes: launcher.binary(peer).and_then(|binary| stripped_bytes(&binary)),
        settings,
        ..Row::default()
    };
    row.set_latencies(&starts);
    Ok(row)
}

/// Size of a program without symbols; as it is where there is no `strip`.
fn stripped_bytes(program: &Path) -> Option<u64> {
    let folder = tempfile::tempdir().ok()?;
    let stripped = folder.path().join("stripped");
    let status = Command::new("strip").arg("-o").arg(&stripped).arg(program).stderr(Stdio::null()).status();
    let worked = status.is_ok_and(|status| status.success());
    Some(std::fs::metadata(if worked { &stripped } else { program }).ok()?.len())
}
