//! A real `felucca` process for tests: started on a free port, killed and restarted at will, ended with the test.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

/// The `felucca` binary, built when it is not there yet.
pub fn felucca_binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let built = Command::new(cargo)
            .args(["build", "--quiet", "--package", "felucca-broker", "--bin", "felucca"])
            .stdin(Stdio::null())
            .status();
        assert!(built.is_ok_and(|status| status.success()), "cargo could not build the felucca binary");
        // Tests lie in target/<profile>/deps, binaries in target/<profile>.
        let test = std::env::current_exe().expect("the path of this test");
        let profile = test.parent().and_then(Path::parent).expect("target/<profile>");
        profile.join("felucca")
    })
}

/// A broker process. Killed when dropped.
#[derive(Debug)]
pub struct BrokerProcess {
    child: Child,
    address: SocketAddr,
    data_dir: PathBuf,
    log: Arc<Mutex<String>>,
}

impl BrokerProcess {
    /// Starts a broker on a free port.
    pub fn start(data_dir: &Path) -> Self {
        Self::start_at(data_dir, "127.0.0.1:0", &[])
    }

    /// Starts a broker at `listen` with further arguments, and waits until it listens.
    pub fn start_at(data_dir: &Path, listen: &str, arguments: &[&str]) -> Self {
        Self::start_under(&[], data_dir, listen, arguments)
    }

    /// As [`Self::start_at`], run by another program (say a tracer) that is given first.
    pub fn start_under(program: &[&str], data_dir: &Path, listen: &str, arguments: &[&str]) -> Self {
        let felucca = felucca_binary().to_str().expect("a path in UTF-8");
        let words: Vec<&str> = program.iter().copied().chain([felucca]).collect();
        let mut child = Command::new(words[0])
            .args(&words[1..])
            .arg("serve")
            .arg("--data-dir")
            .arg(data_dir)
            .args(["--listen", listen])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{words:?}: {error}"));
        let stdout = child.stdout.take().expect("piped");
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).expect("the broker's first line");
        let address = line.trim().strip_prefix("listening on ").and_then(|address| address.parse().ok());
        let Some(address) = address else {
            let output = child.wait_with_output().expect("the broker's output");
            panic!("the broker did not start: {line:?} {}", String::from_utf8_lossy(&output.stderr));
        };
        // Read at once: a full pipe must not stop the broker.
        let stderr = child.stderr.take().expect("piped");
        let log = Arc::<Mutex<String>>::default();
        let written = log.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let mut log = written.lock();
                log.push_str(&line);
                log.push('\n');
            }
        });
        Self { child, address, data_dir: data_dir.to_owned(), log }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// SIGKILL; gone when this returns.
    pub fn kill(&mut self) {
        // It may have ended already; then there is nothing to kill.
        let _ended = self.child.kill();
        self.child.wait().expect("the broker's exit");
    }

    /// SIGKILL, then a new process on the same data and port.
    pub fn kill_and_restart(&mut self) {
        self.kill();
        let address = self.address.to_string();
        *self = Self::start_at(&self.data_dir.clone(), &address, &[]);
    }

    /// SIGTERM; answers whether it ended well.
    pub fn stop(mut self) -> bool {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("signal the broker");
        self.child.wait().expect("the broker's exit").success()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("the broker's state").is_none()
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        self.log.lock().clone()
    }

    /// Most memory that it had so far, in bytes.
    pub fn peak_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id())).expect("its status");
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
        peak.and_then(|kib| kib.parse::<u64>().ok()).expect("its peak memory") << 10
    }

    /// Its process id (of the program that it runs under, if any).
    pub fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for BrokerProcess {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}
