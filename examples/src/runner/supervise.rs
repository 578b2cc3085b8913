//! The processes of a run: this program again as broker, order, payment and email service.
//!
//! Invariants: a process counts as started when it said that it is ready; a process that ends without being told to is
//! an error of the run; whatever happens to the runner, its processes end with it (they watch their standard input, and
//! a dropped [`Fleet`] kills them).

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, ChildStdout, Command};
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::time::timeout;

use super::work_dir::WorkDir;
use crate::input::Purchase;
use crate::seeded::Seeded;
use crate::service::READY;

const START_TIMEOUT: Duration = Duration::from_secs(30);
const STOP_TIMEOUT: Duration = Duration::from_secs(20);
/// The payment service's option that gives it a bug; its value follows.
const BUG: &str = "--bug-cds";

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Role {
    Broker,
    Order,
    Payment,
    Email,
}

impl Role {
    pub(crate) const ALL: [Self; 4] = [Self::Broker, Self::Order, Self::Payment, Self::Email];

    /// Also the subcommand that runs it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Broker => "broker",
            Self::Order => "order",
            Self::Payment => "payment",
            Self::Email => "email",
        }
    }
}

/// The four processes, which may be killed and started again.
#[derive(Debug)]
pub(crate) struct Fleet {
    /// Address of the broker.
    pub(crate) broker: String,
    /// Base URL of the order service.
    pub(crate) order_url: String,
    processes: [Arc<Process>; 4],
}

#[derive(Debug)]
struct Process {
    role: Role,
    arguments: std::sync::Mutex<Vec<OsString>>,
    log: PathBuf,
    /// Locked while the process is being stopped or started.
    child: Arc<Mutex<Option<Child>>>,
    kills: AtomicU64,
}

impl Fleet {
    /// Prepares the processes of a run; starts none.
    pub(crate) fn new(
        work_dir: &WorkDir,
        seed: u64,
        poison: Option<&Purchase>,
        bug_cds: Option<u32>,
    ) -> anyhow::Result<Self> {
        let [broker_port, order_port] = free_ports()?;
        let broker = format!("127.0.0.1:{broker_port}");
        let order = format!("127.0.0.1:{order_port}");
        let files = work_dir.files();
        let mut payment = vec![
            ("--broker", OsString::from(&broker)),
            ("--database", files.payments.into()),
            ("--gateway", files.gateway.into()),
            ("--seed", OsString::from(seed.to_string())),
        ];
        if let Some(poison) = poison {
            // Played with an outage, beside which the gateway has no whims of its own.
            payment.push(("--poison", OsString::from(format!("{}:{}", poison.customer, poison.cents))));
            payment.push(("--steady-gateway", OsString::from("true")));
        }
        if let Some(most) = bug_cds {
            payment.push((BUG, OsString::from(most.to_string())));
        }
        let process = |role: Role, options: &[(&str, OsString)]| {
            let mut arguments = vec![OsString::from(role.name()), OsString::from("--end-with-parent")];
            for (name, value) in options {
                arguments.extend([OsString::from(name), value.clone()]);
            }
            let log = work_dir.logs().join(format!("{}.log", role.name()));
            let kills = AtomicU64::new(0);
            let arguments = std::sync::Mutex::new(arguments);
            Arc::new(Process { role, arguments, log, child: Arc::default(), kills })
        };
        let processes = [
            process(
                Role::Broker,
                &[("--data-dir", work_dir.broker().into()), ("--listen", OsString::from(&broker))],
            ),
            process(
                Role::Order,
                &[
                    ("--broker", OsString::from(&broker)),
                    ("--listen", OsString::from(&order)),
                    ("--database", files.orders.into()),
                ],
            ),
            process(Role::Payment, &payment),
            process(
                Role::Email,
                &[
                    ("--broker", OsString::from(&broker)),
                    ("--database", files.sent.into()),
                    ("--mailbox", files.mailbox.into()),
                ],
            ),
        ];
        Ok(Self { broker, order_url: format!("http://{order}"), processes })
    }

    /// Starts a process and waits until it is ready.
    pub(crate) async fn start(&self, role: Role) -> anyhow::Result<()> {
        let process = self.process(role);
        let mut child = process.child.lock().await;
        *child = Some(process.spawn().await?);
        Ok(())
    }

    /// Kills a process with SIGKILL, waiting first for a start of it that is under way. The process is dead when this
    /// returns; start it again with [`Killed::restart`].
    pub(crate) async fn kill(&self, role: Role) -> anyhow::Result<Killed> {
        let process = Arc::clone(self.process(role));
        let mut child = Arc::clone(&process.child).lock_owned().await;
        if let Some(mut running) = child.take() {
            if let Some(status) = running.try_wait()? {
                bail!(process.unexpected_end(status));
            }
            running.kill().await.with_context(|| format!("cannot kill the {} process", role.name()))?;
            process.kills.fetch_add(1, Ordering::Relaxed);
        }
        Ok(Killed { process, child })
    }

    /// Lets a process finish what it is doing and end; kills it when that takes too long.
    pub(crate) async fn stop(&self, role: Role) -> anyhow::Result<()> {
        let process = self.process(role);
        let Some(mut child) = process.child.lock().await.take() else { return Ok(()) };
        if let Some(pid) = child.id().and_then(|id| rustix::process::Pid::from_raw(id.cast_signed())) {
            rustix::process::kill_process(pid, rustix::process::Signal::TERM)
                .context("cannot signal a process")?;
        }
        match timeout(STOP_TIMEOUT, child.wait()).await {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => Err(process.unexpected_end(status)),
            Ok(Err(error)) => Err(error).context("cannot wait for a process"),
            Err(_) => {
                child.kill().await?;
                bail!("the {} process did not stop within {STOP_TIMEOUT:?}", role.name())
            }
        }
    }

    /// Replaces the payment service by one without the bug.
    pub(crate) async fn deploy_fix(&self) -> anyhow::Result<()> {
        self.stop(Role::Payment).await?;
        let mut arguments = self.process(Role::Payment).arguments();
        if let Some(bug) = arguments.iter().position(|argument| argument == BUG) {
            arguments.drain(bug..bug + 2);
        }
        *self.process(Role::Payment).arguments.lock().unwrap_or_else(PoisonError::into_inner) = arguments;
        self.start(Role::Payment).await
    }

    /// Fails when a process has ended by itself.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        for process in &self.processes {
            // Whoever holds the lock is stopping or starting the process and looks after it.
            let Ok(mut child) = process.child.try_lock() else { continue };
            if let Some(status) = child.as_mut().map(Child::try_wait).transpose()?.flatten() {
                bail!(process.unexpected_end(status));
            }
        }
        Ok(())
    }

    /// How often a process was killed.
    pub(crate) fn kills(&self, role: Role) -> u64 {
        self.process(role).kills.load(Ordering::Relaxed)
    }

    pub(crate) fn all_kills(&self) -> u64 {
        Role::ALL.into_iter().map(|role| self.kills(role)).sum()
    }

    fn process(&self, role: Role) -> &Arc<Process> {
        &self.processes[role as usize]
    }
}

/// A process that was killed and waits to be started again.
#[derive(Debug)]
pub(crate) struct Killed {
    process: Arc<Process>,
    child: OwnedMutexGuard<Option<Child>>,
}

impl Killed {
    pub(crate) async fn restart(mut self) -> anyhow::Result<()> {
        *self.child = Some(self.process.spawn().await?);
        Ok(())
    }
}

impl Process {
    async fn spawn(&self) -> anyhow::Result<Child> {
        let program = std::env::current_exe().context("cannot find this program")?;
        let mut child = Command::new(program)
            .args(self.arguments())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(append_to(&self.log)?)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start the {} process", self.role.name()))?;
        let output = child.stdout.take().context("a process without standard output")?;
        match timeout(START_TIMEOUT, until_ready(output)).await {
            Ok(true) => Ok(child),
            Ok(false) => Err(self.unexpected_end(child.wait().await?)),
            Err(_) => bail!("the {} process was not ready within {START_TIMEOUT:?}", self.role.name()),
        }
    }

    fn arguments(&self) -> Vec<OsString> {
        self.arguments.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn unexpected_end(&self, status: std::process::ExitStatus) -> anyhow::Error {
        let tail = last_lines(&self.log, 5);
        anyhow::anyhow!(
            "the {} process ended by itself ({status}); its last words:\n{tail}",
            self.role.name()
        )
    }
}

/// Waits for the line that says so; false when the output ends without it.
async fn until_ready(output: ChildStdout) -> bool {
    let mut lines = BufReader::new(output).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if line == READY {
            return true;
        }
    }
    false
}

fn append_to(log: &Path) -> anyhow::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("cannot write {}", log.display()))
}

fn last_lines(log: &Path, count: usize) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// Ports for the two servers, kept over restarts.
///
/// They lie below the range from which systems take ports for outgoing connections. Otherwise, while a server is down,
/// another connection could be given its port; and a client that keeps trying to reach a port of that range is now and
/// then connected to itself.
fn free_ports() -> anyhow::Result<[u16; 2]> {
    let mut chance = Seeded::for_name(u64::from(std::process::id()), &crate::events::now());
    let mut taken = Vec::new();
    for _ in 0..1_000 {
        let port = 15_000 + chance.below(17_000) as u16;
        // Both stay bound until both are found, so that they differ.
        taken.extend(std::net::TcpListener::bind(("127.0.0.1", port)).ok().map(|listener| (port, listener)));
        if let [(first, _), (second, _)] = taken[..] {
            return Ok([first, second]);
        }
    }
    bail!("no free port between 15000 and 32000")
}
