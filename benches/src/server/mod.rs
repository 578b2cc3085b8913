//! Servers under measurement: started as processes of their own on an empty directory, or a Felucca that runs already.
//!
//! Every measurement has a server and a directory of its own, so that none pays for what another left behind. A server and
//! what it starts are one process group. Whatever ends this program in order also ends the group and removes its directory;
//! see [`Launcher::abandon`] for signals.

mod plan;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tempfile::TempDir;

use crate::peer::{Peer, Programs};
use crate::workload::Ack;
use plan::{Plan, Ready};

/// Longest that a start may take; RabbitMQ takes several seconds.
const START_PATIENCE: Duration = Duration::from_secs(60);
/// Longest that a server may take to stop before it is killed.
const STOP_PATIENCE: Duration = Duration::from_secs(20);

/// Starts servers.
#[derive(Clone, Debug)]
pub struct Launcher {
    /// Used for Felucca instead of starting it. Memory, processor time and starting cannot be measured then.
    running: Option<String>,
    programs: Programs,
    /// Data directories are made in here.
    base: PathBuf,
    current: Arc<Mutex<Option<Current>>>,
}

#[derive(Debug)]
struct Current {
    group: Pid,
    directory: PathBuf,
}

/// A server that answers.
#[derive(Debug)]
pub struct Server {
    pub address: String,
    /// Its process group, when this program started it.
    pub group: Option<u32>,
    /// From the start of the process to the first accepted connection.
    pub started_in: Option<Duration>,
    /// How it was set up, in a few words.
    pub settings: String,
    process: Option<Process>,
}

#[derive(Debug)]
struct Process {
    peer: Peer,
    child: Child,
    /// Has the same group.
    companion: Option<Child>,
    group: Pid,
    current: Arc<Mutex<Option<Current>>>,
    directory: TempDir,
}

impl Launcher {
    /// Starts servers from `programs`, each with its data in a new directory under `base`.
    ///
    /// # Errors
    /// `base` cannot be made.
    pub fn new(programs: Programs, base: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(base).with_context(|| format!("cannot make {}", base.display()))?;
        Ok(Self { running: None, programs, base: base.to_path_buf(), current: Arc::default() })
    }

    /// Takes the broker at this address as Felucca.
    #[must_use]
    pub fn with_running(self, address: String) -> Self {
        Self { running: Some(address), ..self }
    }

    pub(crate) fn runs_already(&self, peer: Peer) -> bool {
        peer == Peer::Felucca && self.running.is_some()
    }

    /// A peer that can be neither started nor reached is named with the way to get it.
    pub(crate) fn check(&self, peer: Peer) -> anyhow::Result<()> {
        if let Some(feature) = peer.feature().filter(|_| !peer.is_built()) {
            bail!("{} needs a build with `--features {feature}`", peer.name());
        }
        let found = self.runs_already(peer) || self.programs.find(peer).is_some();
        ensure!(found, "{} is not installed; get it with: {}", peer.name(), peer.how_to_get());
        Ok(())
    }

    /// What the program says.
    pub(crate) fn version(&self, peer: Peer) -> Option<String> {
        if self.runs_already(peer) { None } else { peer.version(&self.programs.find(peer)?) }
    }

    /// The program itself, if it is one file.
    pub(crate) fn binary(&self, peer: Peer) -> Option<PathBuf> {
        let one_file = !matches!(peer, Peer::Kafka | Peer::RabbitmqQuorum | Peer::RabbitmqStream);
        self.programs.find(peer).filter(|_| one_file)
    }

    /// A server for one measurement.
    ///
    /// # Errors
    /// It does not start, or does not accept connections in time.
    pub fn launch(&self, peer: Peer, level: Ack) -> anyhow::Result<Server> {
        match &self.running {
            Some(address) if peer == Peer::Felucca => Ok(Server {
                address: address.clone(),
                group: None,
                started_in: None,
                settings: "running already".to_owned(),
                process: None,
            }),
            _ => self.start(peer, level).with_context(|| format!("{} did not start", peer.name())),
        }
    }

    fn start(&self, peer: Peer, level: Ack) -> anyhow::Result<Server> {
        let program = self.programs.find(peer).context("its program is not there")?;
        let directory = tempfile::Builder::new().prefix("felucca-bench-").tempdir_in(&self.base)?;
        let Plan { mut command, companion, ready, settings } =
            Plan::new(peer, level, &program, directory.path())?;
        let log = directory.path().join("server.log");
        let announces = matches!(ready, Ready::Announced);
        let companion = match companion {
            Some(mut companion) => Some(
                companion
                    .stdin(Stdio::null())
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .process_group(0)
                    .spawn()?,
            ),
            None => None,
        };
        let began = Instant::now();
        let spawned = command
            .stdin(Stdio::null())
            .stdout(if announces { Stdio::piped() } else { Stdio::from(File::create(&log)?) })
            .stderr(File::options().create(true).append(true).open(&log)?)
            .process_group(companion.as_ref().map_or(0, |companion| companion.id().cast_signed()))
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()));
        let mut child = match (spawned, companion.as_ref()) {
            (Ok(child), _) => child,
            (Err(error), companion) => {
                if let Some(group) = companion.and_then(group_of) {
                    let _gone = kill_process_group(group, Signal::KILL);
                }
                return Err(error);
            }
        };
        let stdout = child.stdout.take();
        let group = group_of(companion.as_ref().unwrap_or(&child)).context("a process without an id")?;
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Current { group, directory: directory.path().to_path_buf() });
        // From here on whatever goes wrong ends the processes, by being dropped.
        let mut process = Process { peer, child, companion, group, current: self.current.clone(), directory };
        let address = match &ready {
            Ready::Announced => stdout
                .context("no standard output")
                .and_then(|stdout| announced_address(stdout, START_PATIENCE))
                .map(|address| vec![address]),
            Ready::Accepting(addresses) => Ok(addresses.clone()),
        };
        let accepted = address.and_then(|addresses| {
            for address in &addresses {
                process.wait_until_it_accepts(*address, began)?;
            }
            addresses.first().copied().context("no address")
        });
        let started_in = Some(began.elapsed());
        let address = accepted.with_context(|| format!("its log:\n{}", last_lines(&log)))?;
        let group = Some(group.as_raw_nonzero().get().cast_unsigned());
        Ok(Server { address: address.to_string(), group, started_in, settings, process: Some(process) })
    }

    /// Kills the server that runs now, if any, and removes its directory: for when this program is about to be ended by a
    /// signal.
    pub fn abandon(&self) {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Current { group, directory }) = current {
            let _gone = kill_process_group(group, Signal::KILL);
            let _left = std::fs::remove_dir_all(directory);
        }
    }
}

fn group_of(child: &Child) -> Option<Pid> {
    i32::try_from(child.id()).ok().and_then(Pid::from_raw)
}

impl Server {
    /// Where the data is of a server that this program started.
    pub(crate) fn data_dir(&self) -> Option<PathBuf> {
        self.process.as_ref().map(|process| process.directory.path().to_path_buf())
    }

    /// Stops a server that this program started and removes its data. Felucca is asked to and has to end well; of the others
    /// nothing is kept that would be worth waiting for.
    ///
    /// # Errors
    /// It had ended before, or did not end well.
    pub fn stop(mut self) -> anyhow::Result<()> {
        let Some(mut process) = self.process.take() else { return Ok(()) };
        let log = process.directory.path().join("server.log");
        if let Some(status) = process.child.try_wait()? {
            bail!("the server ended by itself ({status}); its log:\n{}", last_lines(&log));
        }
        if process.peer == Peer::Felucca {
            let status = process.terminate()?;
            ensure!(
                status.is_some_and(|status| status.success()),
                "the server did not stop in order; its log:\n{}",
                last_lines(&log)
            );
        }
        Ok(())
    }
}

impl Process {
    fn wait_until_it_accepts(&mut self, address: SocketAddr, began: Instant) -> anyhow::Result<()> {
        while TcpStream::connect(address).is_err() {
            if let Some(status) = self.child.try_wait()? {
                bail!("it ended ({status})");
            }
            ensure!(began.elapsed() < START_PATIENCE, "it does not accept connections");
            std::thread::park_timeout(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Asks the process to end. `None` when it had to be killed.
    fn terminate(&mut self) -> anyhow::Result<Option<std::process::ExitStatus>> {
        if let Some(pid) = group_of(&self.child) {
            kill_process(pid, Signal::TERM)?;
        }
        let deadline = Instant::now() + STOP_PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                return Ok(Some(status));
            }
            std::thread::park_timeout(Duration::from_millis(5));
        }
        self.child.kill()?;
        self.child.wait()?;
        Ok(None)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // All of it fails only when the processes have ended.
        let _ended = kill_process_group(self.group, Signal::KILL);
        let _ended = self.child.wait();
        if let Some(companion) = &mut self.companion {
            let _ended = companion.wait();
        }
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// The address at the end of the first line that ends in one.
fn announced_address(
    stdout: impl std::io::Read + Send + 'static,
    patience: Duration,
) -> anyhow::Result<SocketAddr> {
    let (sender, receiver) = mpsc::channel();
    // Goes on reading, so that the broker can always write; ends with the broker.
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if let Some(address) = line.split_ascii_whitespace().last().and_then(|word| word.parse().ok()) {
                let _satisfied = sender.send(address);
            }
        }
    });
    receiver.recv_timeout(patience).map_err(|error| match error {
        mpsc::RecvTimeoutError::Timeout => anyhow::anyhow!("no address within {patience:?}"),
        mpsc::RecvTimeoutError::Disconnected => anyhow::anyhow!("it ended without an address"),
    })
}

fn last_lines(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launcher(felucca: &str, base: &Path) -> Launcher {
        let programs = Programs { felucca: PathBuf::from(felucca), folder: base.join("peers") };
        Launcher::new(programs, base).unwrap()
    }

    #[test]
    fn the_address_is_found_in_what_the_broker_says() {
        let said = &b"starting\nlistening on 127.0.0.1:4711\nmore\n"[..];
        let address = announced_address(said, Duration::from_secs(5)).unwrap();
        assert_eq!(address, "127.0.0.1:4711".parse().unwrap());
        assert!(announced_address(&b"refused\n"[..], Duration::from_secs(5)).is_err());
    }

    #[test]
    fn a_program_that_ends_at_once_is_reported_with_its_log() {
        let base = tempfile::tempdir().unwrap();
        let error = launcher("/bin/false", base.path()).launch(Peer::Felucca, Ack::Written).unwrap_err();
        assert!(format!("{error:#}").contains("did not start"), "{error:#}");
        assert_eq!(std::fs::read_dir(base.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_program_that_is_not_there_is_refused_with_the_way_to_get_it() {
        let base = tempfile::tempdir().unwrap();
        let error = launcher("/no/such/program", base.path()).check(Peer::Felucca).unwrap_err();
        assert!(error.to_string().contains("cargo build"), "{error:#}");
    }
}
