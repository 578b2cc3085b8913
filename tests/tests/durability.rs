//! No `synced` reply leaves before its `fdatasync` has returned, of the journal and of a segment that it refers to: seen from
//! outside, in the system calls of a real broker.
//! Needs `strace`.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;

use felucca_client::{Client, Level, Record};
use felucca_tests::process::BrokerProcess;
use tokio::time::sleep;

/// More than the page that every frame is written with, be it a mark.
const VALUE_BYTES: usize = 5000;
/// So much that the journal only refers to it.
const LARGE_BYTES: usize = 400_000;
const RECORDS: usize = 50;

/// One system call as it began or ended, in the order of the trace.
#[derive(Debug, PartialEq, Eq)]
enum Call {
    /// A write of a record has returned.
    Write,
    SyncBegan,
    SyncEnded,
    /// Bytes begin to leave to a client.
    Send,
}

/// Parses `strace -f` lines: `PID name(args) = result`, or split into `PID name(args <unfinished ...>` and
/// `PID <... name resumed>args) = result`. Of writes and syncs those count that are of files in `place`.
fn parse(trace: &str, place: &str) -> Vec<Call> {
    let mut calls = Vec::new();
    // Threads whose unfinished call is of such a file: the line that resumes it does not name the file.
    let mut there = HashSet::new();
    for line in trace.lines() {
        let Some((thread, call)) = line.split_once(|c: char| c.is_ascii_whitespace()) else { continue };
        let call = call.trim_start();
        let begins = !call.starts_with("<...");
        let ends = !call.ends_with("<unfinished ...>");
        let name = call.trim_start_matches("<... ").split(['(', ' ']).next().unwrap_or_default();
        match name {
            "pwritev" | "pwritev2" | "pwrite64" => {
                if begins && call.contains(place) {
                    there.insert(thread);
                }
                let written = call.rsplit("= ").next().and_then(|result| result.trim().parse::<usize>().ok());
                if ends && there.remove(thread) && written.is_some_and(|bytes| bytes >= VALUE_BYTES) {
                    calls.push(Call::Write);
                }
            }
            "fdatasync" | "fsync" => {
                if begins && call.contains(place) {
                    there.insert(thread);
                    calls.push(Call::SyncBegan);
                }
                if ends && there.remove(thread) {
                    assert!(call.ends_with("= 0"), "{line}");
                    calls.push(Call::SyncEnded);
                }
            }
            "sendto" | "sendmsg" | "writev" | "write" if begins && call.contains("TCP") => {
                calls.push(Call::Send);
            }
            _ => {}
        }
    }
    calls
}

/// The sends after a journal write that no sync, begun after that write, had ended before; and all sends.
fn too_early(calls: &[Call]) -> (usize, usize) {
    let (mut written, mut covered_by_running, mut synced) = (0_u64, 0_u64, 0_u64);
    let (mut early, mut sends) = (0, 0);
    for call in calls {
        match call {
            Call::Write => written += 1,
            Call::SyncBegan => covered_by_running = written,
            Call::SyncEnded => synced = synced.max(covered_by_running),
            Call::Send => {
                sends += 1;
                early += usize::from(synced < written);
            }
        }
    }
    (early, sends)
}

async fn trace(
    level: Level,
    config: &[(&str, &str)],
    value_bytes: usize,
    place: &str,
    dir: &Path,
) -> Vec<Call> {
    std::fs::create_dir_all(dir).unwrap();
    let file = dir.join("trace");
    let strace = ["strace", "-f", "-yy", "-o", file.to_str().unwrap()];
    let filter = ["-e", "trace=pwritev,pwritev2,pwrite64,fdatasync,fsync,sendto,sendmsg,writev,write", "--"];
    // The broker ends with its tracer, which the test kills.
    let tied = ["setpriv", "--pdeathsig", "KILL"];
    let program: Vec<&str> = strace.into_iter().chain(filter).chain(tied).collect();
    let broker = BrokerProcess::start_under(&program, &dir.join("data"), "127.0.0.1:0", &[]);
    let client = Client::connect(broker.address().to_string()).await.unwrap();
    client.admin().create_topic("orders", 1, config).await.unwrap();
    let producer = client.producer().level(level).build().await.unwrap();
    producer.send(Record::new("orders", "first")).await.unwrap();
    // Everything so far is synced; from here on one record is in flight at a time and nothing else goes on.
    sleep(Duration::from_millis(300)).await;
    let before = std::fs::read_to_string(&file).unwrap().len();
    for _ in 0..RECORDS {
        producer.send(Record::new("orders", vec![b'x'; value_bytes])).await.unwrap();
    }
    let trace = std::fs::read_to_string(&file).unwrap();
    // A sync in the background may stand there with half of its line.
    let whole = trace.rfind('\n').map_or(0, |end| end + 1);
    parse(&trace[before..whole], place)
}

#[tokio::test(flavor = "multi_thread")]
async fn no_synced_reply_leaves_before_its_fdatasync_returned() {
    let dir = tempfile::tempdir().unwrap();
    for (value_bytes, place) in [(VALUE_BYTES, "/journal/"), (LARGE_BYTES, "/log/")] {
        let calls =
            trace(Level::Synced, &[], value_bytes, place, &dir.path().join(value_bytes.to_string())).await;
        let writes = calls.iter().filter(|call| **call == Call::Write).count();
        let (early, sends) = too_early(&calls);
        assert!(writes >= RECORDS, "{writes} writes in {place} seen: {calls:?}");
        assert!(sends >= RECORDS, "{sends} sends seen: {calls:?}");
        assert_eq!(early, 0, "{calls:?}");
    }
}

/// The same eyes on the level that does not wait: it shows that they would see an early reply.
#[tokio::test(flavor = "multi_thread")]
async fn a_written_reply_does_not_wait() {
    let dir = tempfile::tempdir().unwrap();
    let config = [("allow-written", "true"), ("visibility", "written")];
    let calls = trace(Level::Written, &config, VALUE_BYTES, "/journal/", dir.path()).await;
    let (early, sends) = too_early(&calls);
    assert!(sends >= RECORDS && early > RECORDS / 2, "{early} of {sends}: {calls:?}");
}
