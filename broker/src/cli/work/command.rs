//! One command for one record: its environment, its input, and what its end means.
//!
//! A command runs in a process group of its own: a Ctrl-C at the terminal reaches the tool only, which lets it finish, and what
//! the command started is stopped with it. When its future is dropped (the lease is over) the group gets SIGTERM, and SIGKILL
//! [`GRACE`] later.

use std::ffi::{OsStr, OsString};
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use felucca_client::{ConsumedRecord, Delivery, Nack, Outcome, Reject};
use futures::FutureExt;
use futures::future::FusedFuture;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, Command};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

const RECORD: &str = "FELUCCA_RECORD_";
const HEADER: &str = "FELUCCA_HEADER_";
/// `EX_DATAERR` of sysexits.h.
const DATA_ERROR: i32 = 65;
/// What a shell answers when it cannot run a command: found but not executable, and not found.
const CANNOT_RUN: [i32; 2] = [126, 127];
/// How much of standard error is kept.
const TAIL_BYTES: usize = 8 << 10;
/// How long standard error is read on after the command's end: what it left behind may keep it open for ever.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How long a command that is to stop has before it is killed.
const GRACE: Duration = Duration::from_secs(5);

/// How a command ended.
#[derive(Debug)]
pub(super) enum Ended {
    Outcome(Outcome),
    /// It cannot be run, whatever the record.
    NotRun(anyhow::Error),
    /// The shell says that it cannot run it. So with every record, unless it could with another.
    Unknown(Nack),
}

/// Runs the command to its end, or until `kill`.
pub(super) async fn run(command: &str, delivery: &Delivery, kill: &CancellationToken) -> Ended {
    let mut shell = Command::new("sh");
    inherited().for_each(|name| {
        shell.env_remove(name);
    });
    let spawned = shell
        .arg("-c")
        .arg(command)
        .envs(environment(delivery))
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn();
    let child = match spawned {
        Ok(child) => child,
        // The keys and headers of this record do not fit an environment.
        Err(error) if error.kind() == io::ErrorKind::ArgumentListTooLong => {
            let reason = format!("key and headers do not fit the environment of a command: {error}");
            return Ended::Outcome(Reject::new("environment", reason).into());
        }
        Err(error) => return Ended::NotRun(anyhow::Error::new(error).context("cannot run sh")),
    };
    let mut tail = Tail::default();
    match attend(Running::new(child), delivery, &mut tail, kill).await {
        Ok(status) => judge(status, &tail),
        Err(error) => Ended::NotRun(anyhow::Error::new(error).context("cannot wait for the command")),
    }
}

/// Feeds the command and listens to it until it ends.
async fn attend(
    mut running: Running,
    delivery: &Delivery,
    tail: &mut Tail,
    kill: &CancellationToken,
) -> io::Result<ExitStatus> {
    let child = running.child.as_mut();
    let (input, errors) = child.map_or((None, None), |child| (child.stdin.take(), child.stderr.take()));
    let feed = async {
        if let (Some(mut input), Some(value)) = (input, &delivery.value) {
            // A command need not read its input.
            let _unread = input.write_all(value).await;
        }
    };
    let listen = async {
        if let Some(errors) = errors {
            tail.read(errors).await;
        }
    };
    let talk = async { tokio::join!(feed, listen) }.fuse();
    tokio::pin!(talk);
    let mut killed = false;
    let status = loop {
        tokio::select! {
            status = running.wait() => break status?,
            _ = &mut talk => {}
            () = kill.cancelled(), if !killed => {
                killed = true;
                running.signal(Signal::TERM);
            }
        }
    };
    if !talk.is_terminated() {
        let _left_open = timeout(LAST_WORDS, talk).await;
    }
    Ok(status)
}

fn judge(status: ExitStatus, tail: &Tail) -> Ended {
    let (said, detail) = (tail.last_line(), tail.text());
    let or = |otherwise: String| if said.is_empty() { otherwise } else { said.clone() };
    let nack = |code: i32| Nack {
        detail: detail.clone(),
        ..Nack::new(format!("exit-{code}"), or(format!("the command ended with {code}")))
    };
    Ended::Outcome(match (status.code(), status.signal()) {
        (Some(0), _) => Outcome::Ack,
        (Some(DATA_ERROR), _) => {
            let reason = or(format!("the command ended with {DATA_ERROR}"));
            Reject { class: format!("exit-{DATA_ERROR}"), reason, detail }.into()
        }
        (Some(code), _) if CANNOT_RUN.contains(&code) => return Ended::Unknown(nack(code)),
        (Some(code), _) => nack(code).into(),
        (None, signal) => {
            let signal = signal.unwrap_or_default();
            let reason = or(format!("the command was killed by signal {signal}"));
            Nack { detail, ..Nack::new(format!("signal-{signal}"), reason) }.into()
        }
    })
}

/// A command that runs; stopped with all that it started when this is dropped before its end.
struct Running {
    /// Taken when it is dropped.
    child: Option<Child>,
    group: Option<Pid>,
}

impl Running {
    fn new(child: Child) -> Self {
        let group = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        Self { child: Some(child), group }
    }

    /// Cancellation safe.
    async fn wait(&mut self) -> io::Result<ExitStatus> {
        let Some(child) = &mut self.child else { return Err(io::ErrorKind::NotFound.into()) };
        let status = child.wait().await?;
        self.child = None;
        Ok(status)
    }

    fn signal(&self, signal: Signal) {
        if let Some(group) = self.group {
            // It may have ended meanwhile.
            let _ended = kill_process_group(group, signal);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let (Some(mut child), Some(group)) = (self.child.take(), self.group) else { return };
        self.signal(Signal::TERM);
        // The group's number is taken until its leader is waited for.
        tokio::spawn(async move {
            if timeout(GRACE, child.wait()).await.is_err() {
                let _ended = kill_process_group(group, Signal::KILL);
                let _status = child.wait().await;
            }
        });
    }
}

/// The end of what a command said on standard error; all of it goes on to ours.
#[derive(Debug, Default)]
struct Tail(Vec<u8>);

impl Tail {
    async fn read(&mut self, mut errors: impl AsyncRead + Unpin) {
        let mut chunk = [0; 4096];
        while let Ok(length @ 1..) = errors.read(&mut chunk).await {
            // Nobody may be listening to us.
            let _unheard = io::stderr().lock().write_all(&chunk[..length]);
            self.0.extend_from_slice(&chunk[..length]);
            let excess = self.0.len().saturating_sub(TAIL_BYTES);
            self.0.drain(..excess);
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0).trim().to_owned()
    }

    fn last_line(&self) -> String {
        self.text().lines().next_back().unwrap_or_default().trim().to_owned()
    }
}

fn environment(delivery: &Delivery) -> Vec<(OsString, OsString)> {
    let mut set = record_environment(delivery);
    let lease = &delivery.lease;
    set.push((variable(RECORD, "DELIVERY_COUNT"), delivery.delivery_count.to_string().into()));
    set.push((variable(RECORD, "LEASE"), format!("{}-{}", lease.boot_epoch, lease.sequence).into()));
    set
}

/// What a record says of itself. Bytes go in as they are; what holds a zero byte, which no environment can, goes in as base64
/// under the name with `_BASE64`. Of headers with one name the first counts; one without value is left out.
fn record_environment(record: &ConsumedRecord) -> Vec<(OsString, OsString)> {
    let mut set: Vec<(OsString, OsString)> = vec![
        (variable(RECORD, "TOPIC"), record.topic.to_string().into()),
        (variable(RECORD, "PARTITION"), record.partition.to_string().into()),
        (variable(RECORD, "OFFSET"), record.offset.to_string().into()),
        (variable(RECORD, "TIMESTAMP"), record.timestamp.to_string().into()),
    ];
    set.extend(record.key.as_ref().map(|key| bytes_variable(variable(RECORD, "KEY"), key)));
    let mut names = Vec::new();
    for header in &record.headers {
        let name = variable(HEADER, &header.name);
        if !names.contains(&name) {
            set.extend(header.value.as_ref().map(|value| bytes_variable(name.clone(), value)));
            names.push(name);
        }
    }
    set
}

/// A variable's name: capitals, digits and `_`; anything else becomes `_`.
fn variable(prefix: &str, name: &str) -> OsString {
    let letters = name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' });
    prefix.chars().chain(letters).collect::<String>().into()
}

fn bytes_variable(mut name: OsString, bytes: &[u8]) -> (OsString, OsString) {
    if bytes.contains(&0) {
        name.push("_BASE64");
        return (name, BASE64_STANDARD.encode(bytes).into());
    }
    (name, OsStr::from_bytes(bytes).to_owned())
}

/// Variables of ours that this process itself was given, for a record of its own.
fn inherited() -> impl Iterator<Item = OsString> {
    let ours = |name: &OsString| {
        [RECORD, HEADER].iter().any(|prefix| name.as_bytes().starts_with(prefix.as_bytes()))
    };
    std::env::vars_os().map(|(name, _)| name).filter(ours)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use felucca_client::Header;

    use super::*;

    #[test]
    fn the_environment_says_what_the_record_says() {
        let header = |name: &str, value: Option<&'static [u8]>| Header {
            name: name.to_owned(),
            value: value.map(Bytes::from_static),
        };
        let record = ConsumedRecord {
            topic: "orders".into(),
            partition: 3,
            offset: 41,
            timestamp: 1_767_225_600_000,
            key: Some(Bytes::from_static(b"caf\xe9")),
            value: None,
            headers: vec![
                header("ce-type", Some(b"order.created")),
                header("CE_TYPE", Some(b"the second of one name")),
                header("na\u{ef}ve header", Some(b"a=b\nc")),
                header("binary", Some(b"\x00\x01")),
                header("none", None),
            ],
        };
        let set: Vec<(String, Vec<u8>)> = record_environment(&record)
            .into_iter()
            .map(|(name, value)| (name.into_string().unwrap(), value.as_bytes().to_vec()))
            .collect();
        let expected: [(&str, &[u8]); 8] = [
            ("FELUCCA_RECORD_TOPIC", b"orders"),
            ("FELUCCA_RECORD_PARTITION", b"3"),
            ("FELUCCA_RECORD_OFFSET", b"41"),
            ("FELUCCA_RECORD_TIMESTAMP", b"1767225600000"),
            ("FELUCCA_RECORD_KEY", b"caf\xe9"),
            ("FELUCCA_HEADER_CE_TYPE", b"order.created"),
            ("FELUCCA_HEADER_NA_VE_HEADER", b"a=b\nc"),
            ("FELUCCA_HEADER_BINARY_BASE64", b"AAE="),
        ];
        assert_eq!(set, expected.map(|(name, value)| (name.to_owned(), value.to_vec())));
    }

    #[tokio::test]
    async fn the_tail_is_bounded_and_its_last_line_is_the_reason() {
        let mut tail = Tail::default();
        tail.read(&[b'x'; 3 * TAIL_BYTES][..]).await;
        assert_eq!(tail.0.len(), TAIL_BYTES);
        tail.read(&b"\nfirst\n  no route to host \n\n"[..]).await;
        assert_eq!(tail.last_line(), "no route to host");
        assert_eq!(tail.0.len(), TAIL_BYTES);
    }

    #[test]
    fn a_commands_end_decides_about_the_record() {
        let mut tail = Tail::default();
        let outcome = |raw, tail: &Tail| match judge(ExitStatus::from_raw(raw), tail) {
            Ended::Outcome(outcome) => Some(outcome),
            Ended::NotRun(_) | Ended::Unknown(_) => None,
        };
        assert_eq!(outcome(0, &tail), Some(Outcome::Ack));
        assert_eq!(outcome(75 << 8, &tail), Some(Nack::new("exit-75", "the command ended with 75").into()));
        let killed = Nack::new("signal-9", "the command was killed by signal 9");
        assert_eq!(outcome(9, &tail), Some(killed.into()));
        assert_eq!((outcome(126 << 8, &tail), outcome(127 << 8, &tail)), (None, None));
        tail.0.extend_from_slice(b"checking\nno such customer\n");
        let reject = Reject {
            class: "exit-65".to_owned(),
            reason: "no such customer".to_owned(),
            detail: "checking\nno such customer".to_owned(),
        };
        assert_eq!(outcome(65 << 8, &tail), Some(reject.into()));
    }
}
