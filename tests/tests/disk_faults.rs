//! Writes and syncs that fail under a real broker, from outside: system calls answered with an error by `strace`.
//! Needs `strace`, and the right to attach it to a process of one's own (root, or `kernel.yama.ptrace_scope` 0).

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use felucca_client::{BrokerCondition, Client, Error, ErrorCode, Record};
use felucca_tests::process::BrokerProcess;
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(30);
const BEFORE: u64 = 40;

/// Has calls of a running process fail until it is dropped.
struct Failing(Child);

impl Failing {
    fn attach(process: u32, calls: &str, error: &str) -> Self {
        let mut strace = Command::new("strace")
            .args(["-f", "-o", "/dev/null", "-e", &format!("trace={calls}")])
            .args(["-e", &format!("inject={calls}:error={error}"), "-p", &process.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("strace");
        let mut line = String::new();
        BufReader::new(strace.stderr.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.contains("attached"), "{line}");
        Self(strace)
    }
}

impl Drop for Failing {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.0);
        // Only a tracer that is asked to leaves its process alone.
        let _asked = rustix::process::kill_process(pid, rustix::process::Signal::INT);
        let _ended = self.0.wait();
    }
}

fn read_only(error: &Error) -> &str {
    match error {
        Error::Broker { code: ErrorCode::ReadOnly, message, .. } => message,
        other => panic!("{other}"),
    }
}

async fn values(client: &Client) -> Vec<String> {
    let offsets = client.admin().offsets("orders").await.unwrap();
    let end = offsets[0].high_watermark;
    let mut consumer = client.consumer().topics(["orders"]).build().await.unwrap();
    let mut values = Vec::new();
    for offset in 0..end {
        let record = timeout(PATIENCE, consumer.next()).await.expect("a record").unwrap().unwrap();
        assert_eq!(record.offset, offset);
        values.push(String::from_utf8(record.value.unwrap().to_vec()).unwrap());
    }
    values
}

/// A broker whose calls fail for a while is read-only until it is started again, and has lost nothing then.
async fn latches(calls: &str, error: &str, said: &str) {
    let dir = tempfile::tempdir().unwrap();
    let mut broker = BrokerProcess::start(dir.path());
    let client = Client::connect(broker.address().to_string()).await.unwrap();
    client.admin().create_topic("orders", 1, &[]).await.unwrap();
    let producer = client.producer().build().await.unwrap();
    for at in 0..BEFORE {
        let ack = producer.send(Record::new("orders", format!("before {at}"))).await.unwrap();
        assert_eq!(ack.offset, at);
    }

    let failing = Failing::attach(broker.id(), calls, error);
    let refused =
        timeout(PATIENCE, producer.send(Record::new("orders", "during"))).await.unwrap().unwrap_err();
    let reason = read_only(&refused).to_owned();
    assert!(reason.contains(said), "{reason}");
    drop(failing);

    // The cause is gone; what it left behind is not known.
    let another = client.producer().build().await;
    let refused = match another {
        Ok(another) => another.send(Record::new("orders", "after")).await.unwrap_err(),
        Err(error) => error,
    };
    assert_eq!(read_only(&refused), reason, "the first reason stays");
    let refused = client.admin().create_topic("other", 1, &[]).await.unwrap_err();
    assert_eq!(read_only(&refused), reason);
    assert!(broker.log().contains("read-only from now on"), "{}", broker.log());
    let status = client.admin().describe_broker().await.unwrap();
    assert_eq!(status.condition(), BrokerCondition::ReadOnly);
    assert!(status.reason.contains(said) && reason.ends_with(&status.reason), "{reason}; {status:?}");
    assert!(status.since_ms > 0 && status.disk_available_bytes > Some(0), "{status:?}");
    let expected: Vec<String> = (0..BEFORE).map(|at| format!("before {at}")).collect();
    assert_eq!(values(&client).await, expected, "what was shown is shown, and nothing else");

    broker.kill_and_restart();
    let after = values(&client).await;
    assert_eq!(client.admin().describe_broker().await.unwrap().condition(), BrokerCondition::Ok);
    assert_eq!(&after[..expected.len()], expected, "{calls}: what was acknowledged is there");
    // What was refused was not promised to be gone.
    assert!(after[expected.len()..].iter().all(|value| value == "during"), "{after:?}");
    assert!(after.len() <= expected.len() + 1, "{after:?}");
    let ack = client.producer().build().await.unwrap().send(Record::new("orders", "again")).await.unwrap();
    assert_eq!(ack.offset, after.len() as u64);
    assert!(broker.stop());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_sync_makes_the_broker_read_only_until_it_is_restarted() {
    latches("fdatasync", "EIO", "Input/output error").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_write_makes_the_broker_read_only_until_it_is_restarted() {
    latches("pwritev", "EIO", "Input/output error").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_without_room_makes_the_broker_read_only_until_it_is_restarted() {
    latches("pwritev", "ENOSPC", "No space left on device").await;
}
