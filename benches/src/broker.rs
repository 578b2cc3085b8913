//! The broker under measurement: started as a process of its own on an empty directory, or one that runs already.
//!
//! Every case has a broker and a directory of its own, so that no case pays for what another left behind. Whatever ends this
//! program in order also ends the broker and removes its directory; see [`Launcher::abandon`] for signals.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// Longest that a start may take.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// Longest that a broker may take to stop before it is killed.
const STOP_PATIENCE: Duration = Duration::from_secs(20);

/// Where the broker of a case comes from.
#[derive(Clone, Debug)]
pub enum Launcher {
    /// Starts this program.
    Binary(Binary),
    /// Uses the broker at this address. Memory, processor time and starting cannot be measured.
    Running(String),
}

/// How to start brokers.
#[derive(Clone, Debug)]
pub struct Binary {
    path: PathBuf,
    /// Data directories are made in here.
    base: PathBuf,
    current: Arc<Mutex<Option<Current>>>,
}

#[derive(Debug)]
struct Current {
    pid: Pid,
    directory: PathBuf,
}

/// A broker that answers.
#[derive(Debug)]
pub struct Broker {
    pub address: String,
    /// Known when this program started it.
    pub pid: Option<u32>,
    /// From the start of the process to the first accepted connection.
    pub started_in: Option<Duration>,
    process: Option<Process>,
}

#[derive(Debug)]
struct Process {
    child: Child,
    current: Arc<Mutex<Option<Current>>>,
    directory: TempDir,
}

impl Launcher {
    /// Starts `binary` for each case, with data in a new directory under `base`.
    ///
    /// # Errors
    /// There is no such program, or `base` cannot be made.
    pub fn binary(binary: &Path, base: &Path) -> anyhow::Result<Self> {
        ensure!(binary.is_file(), "{} is not there: build it, or name another one", binary.display());
        std::fs::create_dir_all(base).with_context(|| format!("cannot make {}", base.display()))?;
        Ok(Self::Binary(Binary {
            path: binary.to_path_buf(),
            base: base.to_path_buf(),
            current: Arc::default(),
        }))
    }

    /// A broker for one case.
    ///
    /// # Errors
    /// It does not start, or says so only after 30 s.
    pub fn launch(&self) -> anyhow::Result<Broker> {
        match self {
            Self::Binary(binary) => binary.launch(),
            Self::Running(address) => {
                Ok(Broker { address: address.clone(), pid: None, started_in: None, process: None })
            }
        }
    }

    /// What `--version` of the program says, without its name.
    pub fn version(&self) -> Option<String> {
        let Self::Binary(binary) = self else { return None };
        let output = Command::new(&binary.path).arg("--version").output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        Some(text.split_ascii_whitespace().last()?.to_owned())
    }

    /// Kills the broker that runs now, if any, and removes its directory: for when this program is about to be ended by a
    /// signal.
    pub fn abandon(&self) {
        let Self::Binary(binary) = self else { return };
        let current = binary.current.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Current { pid, directory }) = current {
            let _gone = kill_process(pid, Signal::KILL);
            let _left = std::fs::remove_dir_all(directory);
        }
    }
}

impl Binary {
    fn launch(&self) -> anyhow::Result<Broker> {
        let directory = tempfile::Builder::new().prefix("felucca-bench-").tempdir_in(&self.base)?;
        let log = directory.path().join("broker.log");
        let began = Instant::now();
        let mut child = Command::new(&self.path)
            .args(["serve", "--listen", "127.0.0.1:0", "--data-dir"])
            .arg(directory.path().join("data"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&log)?)
            .spawn()
            .with_context(|| format!("cannot start {}", self.path.display()))?;
        let stdout = child.stdout.take();
        let id = child.id();
        if let Some(pid) = i32::try_from(id).ok().and_then(Pid::from_raw) {
            *self.current.lock().unwrap_or_else(PoisonError::into_inner) =
                Some(Current { pid, directory: directory.path().to_path_buf() });
        }
        // From here on whatever goes wrong ends the process, by being dropped.
        let process = Process { child, current: self.current.clone(), directory };
        let address = stdout
            .context("the broker has no standard output")
            .and_then(|stdout| announced_address(stdout, START_PATIENCE))
            .with_context(|| format!("the broker did not start; its log:\n{}", last_lines(&log)))?;
        let _accepted = TcpStream::connect(address).context("the broker does not accept")?;
        let started_in = Some(began.elapsed());
        Ok(Broker { address: address.to_string(), pid: Some(id), started_in, process: Some(process) })
    }
}

impl Broker {
    /// Where the data is of a broker that this program started.
    pub(crate) fn data_dir(&self) -> Option<PathBuf> {
        self.process.as_ref().map(|process| process.directory.path().to_path_buf())
    }

    /// Stops a broker that this program started, in order, and removes its data.
    ///
    /// # Errors
    /// It had ended before, or did not end well.
    pub fn stop(mut self) -> anyhow::Result<()> {
        let Some(mut process) = self.process.take() else { return Ok(()) };
        if let Some(status) = process.child.try_wait()? {
            let log = last_lines(&process.directory.path().join("broker.log"));
            bail!("the broker ended by itself ({status}); its log:\n{log}");
        }
        let status = process.terminate()?;
        let log = last_lines(&process.directory.path().join("broker.log"));
        ensure!(
            status.is_some_and(|status| status.success()),
            "the broker did not stop in order; its log:\n{log}"
        );
        Ok(())
    }
}

impl Process {
    /// Asks the process to end. `None` when it had to be killed.
    fn terminate(&mut self) -> anyhow::Result<Option<std::process::ExitStatus>> {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
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
        // Both fail only when the process has ended.
        let _ended = self.child.kill();
        let _ended = self.child.wait();
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
        let launcher = Launcher::binary(Path::new("/bin/false"), base.path()).unwrap();
        let error = launcher.launch().unwrap_err();
        assert!(format!("{error:#}").contains("did not start"), "{error:#}");
        assert_eq!(std::fs::read_dir(base.path()).unwrap().count(), 0);
        assert!(Launcher::binary(&base.path().join("absent"), base.path()).is_err());
    }
}
