//! No `synced` reply leaves before its `fdatasync` has returned: seen from outside, in the system calls of a real broker.
//! Needs `strace`.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;

use felucca_client::{Client, Level, Record};
use felucca_tests::process::BrokerProcess;
use tokio::time::sleep;

const VALUE_BYTES: usize = 3000;
const RECORDS: usize = 50;

/// One system call as it began or ended, in the order of the trace.
#[derive(Debug, PartialEq, Eq)]
enum Call {
    /// A write of a record into the journal has returned.
    JournalWrite,
    SyncBegan,
    SyncEnded,
    /// Bytes begin to leave to a client.
    Send,
}

/// Parses `strace -f` lines: `PID name(args) = result`, or split into `PID name(args <unfinished ...>` and
/// `PID <... name resumed>args) = result`.
fn parse(trace: &str) -> Vec<Call> {
    let mut calls = Vec::new();
    // Threads whose unfinished write goes to the journal: the line that resumes it does not name the file.
    let mut into_journal = HashSet::new();
    for line in trace.lines() {
        let Some((thread, call)) = line.split_once(|c: char| c.is_ascii_whitespace()) else { continue };
        let call = call.trim_start();
        let begins = !call.starts_with("<...");
        let ends = !call.ends_with("<unfinished ...>");
        let name = call.trim_start_matches("<... ").split(['(', ' ']).next().unwrap_or_default();
        match name {
            "pwritev" | "pwritev2" | "pwrite64" => {
                if begins && call.contains("/journal/") {
                    into_journal.insert(thread);
                }
                let written = call.rsplit("= ").next().and_then(|result| result.trim().parse::<usize>().ok());
                if ends && into_journal.remove(thread) && written.is_some_and(|bytes| bytes >= VALUE_BYTES) {
                    calls.push(Call::JournalWrite);
                }
            }
            "fdatasync" | "fsync" => {
                if begins {
                    calls.push(Call::SyncBegan);
                }
                if ends {
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
            Call::JournalWrite => written += 1,
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

async fn trace(level: Level, config: &[(&str, &str)], dir: &Path) -> Vec<Call> {
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
        producer.send(Record::new("orders", vec![b'x'; VALUE_BYTES])).await.unwrap();
    }
    let trace = std::fs::read_to_string(&file).unwrap();
    parse(&trace[before..])
}

#[tokio::test(flavor = "multi_thread")]
async fn no_synced_reply_leaves_before_its_fdatasync_returned() {
    let dir = tempfile::tempdir().unwrap();
    let calls = trace(Level::Synced, &[], dir.path()).await;
    let writes = calls.iter().filter(|call| **call == Call::JournalWrite).count();
    let (early, sends) = too_early(&calls);
    assert!(writes >= RECORDS, "{writes} journal writes seen: {calls:?}");
    assert!(sends >= RECORDS, "{sends} sends seen: {calls:?}");
    assert_eq!(early, 0, "{calls:?}");
}

/// The same eyes on the level that does not wait: it shows that they would see an early reply.
#[tokio::test(flavor = "multi_thread")]
async fn a_written_reply_does_not_wait() {
    let dir = tempfile::tempdir().unwrap();
    let config = [("allow-written", "true"), ("visibility", "written")];
    let calls = trace(Level::Written, &config, dir.path()).await;
    let (early, sends) = too_early(&calls);
    assert!(sends >= RECORDS && early > RECORDS / 2, "{early} of {sends}: {calls:?}");
}
