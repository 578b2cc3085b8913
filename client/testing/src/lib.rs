//! A broker within a test: the real one, on a disk in memory and with a clock that the test moves.
//!
//! ```
//! use std::time::Duration;
//!
//! use felucca_client::{Delivery, Nack, Record};
//! use felucca_testing::TestBroker;
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let broker = TestBroker::start().await?;
//! let client = broker.client().await?;
//! client.admin().create_topic("orders", 1, &[]).await?;
//! client.admin().create_share_group("payment", &["orders"], &[("backoff-initial", "5m"), ("jitter", "0")]).await?;
//! let producer = client.producer().build().await?;
//! producer.send(Record::new("orders", "order 42")).await?;
//!
//! let mut payment = client.share_consumer("payment").build().await?;
//! payment.next().await?.nack(Nack::new("gateway", "no answer")).await?;
//! broker.advance(Duration::from_mins(5)).await;
//! let retry: Delivery = payment.next().await?;
//! assert_eq!((retry.delivery_count, retry.failure_count), (2, 1));
//! retry.ack().await?;
//! # Ok(())
//! # }
//! ```
//!
//! It listens on a port of this machine, and whatever speaks its protocol may be tested with it: [`TestBroker::address`].
//!
//! **Time.** Leases, delays and retention go by the broker's clock, which stands still until
//! [`TestBroker::advance`] moves it. What it passes happens in its order: the clock stops at each thing that is due, and goes on
//! when clients have been quiet for a few milliseconds. What clients time themselves (their own retries of requests, a
//! handler's time limit) goes by the time of the machine, and so do the extensions of leases that a client makes by itself: what it
//! holds when the clock is moved over the end of the lease is handed out again.
//!
//! **Sessions** do not end by the clock: a member that is gone without having left keeps what it holds until its leases end, or
//! until the broker is started again.
//!
//! **Faults.** [`TestBroker::restart`], [`TestBroker::kill`], [`TestBroker::cut_power`],
//! [`TestBroker::fail_next_write`] and [`TestBroker::fail_next_sync`] are the broker's and its disk's;
//! [`TestBroker::disconnect_clients`] and [`TestBroker::delay_replies`] are the network's. Clients keep their address
//! throughout.

mod proxy;

/// The guide's examples are run.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/testing-your-service.md")]
struct Guide;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use felucca_broker::config::Loaded;
use felucca_broker::disk::{MemDisk, RealDisk, WriteFault};
use felucca_broker::environment::Environment;
use felucca_broker::server::{Machine, Server, ServerError};
use felucca_client::Client;
use proxy::Proxy;
use tempfile::TempDir;
use tokio::sync::Mutex;

/// Why there is no broker.
#[derive(Debug, thiserror::Error)]
pub enum TestError {
    #[error(transparent)]
    Settings(#[from] felucca_broker::config::ConfigError),
    #[error(transparent)]
    Start(#[from] ServerError),
    #[error("cannot listen on this machine, or make a temporary directory: {0}")]
    Io(#[from] io::Error),
}

/// Where the data directory is in memory.
const IN_MEMORY: &str = "/felucca";
/// What a test needs less of than a server, and may set otherwise.
const SETTINGS: &[(&str, &str)] = &[
    ("journal-first-file-bytes", "1MiB"),
    ("journal-file-bytes", "4MiB"),
    ("disk-reserve-bytes", "0"),
    ("disk-low-water-bytes", "0"),
    ("retention-check-interval", "1m"),
    ("shutdown-timeout", "1s"),
];

/// Settings of a [`TestBroker`].
#[derive(Clone, Debug)]
pub struct TestBrokerBuilder {
    settings: Vec<(String, String)>,
    on_disk: bool,
    clock: SystemTime,
}

impl TestBrokerBuilder {
    /// A setting of the broker by the name of its flag, `max-record-bytes` say; `felucca config show` lists them.
    #[must_use]
    pub fn setting(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.settings.push((name.into(), value.into()));
        self
    }

    /// On a temporary directory, which is removed at the end, instead of in memory: for more data than fits there. Faults of
    /// the disk, and the end of broker or power without warning, are for brokers in memory only.
    #[must_use]
    pub fn on_disk(mut self) -> Self {
        self.on_disk = true;
        self
    }

    /// When the clock begins; by default now, as records have the time of the machine on which their producer runs. Times before
    /// 1970 count as 1970.
    #[must_use]
    pub fn clock(mut self, time: SystemTime) -> Self {
        self.clock = time;
        self
    }

    /// Starts the broker, which takes a few milliseconds. To be called within a tokio runtime with several threads, or with
    /// one.
    ///
    /// # Errors
    /// See [`TestError`].
    pub async fn start(self) -> Result<TestBroker, TestError> {
        let dir = if self.on_disk { Some(tempfile::tempdir()?) } else { None };
        let data_dir = dir.as_ref().map_or_else(|| PathBuf::from(IN_MEMORY), |dir| dir.path().to_owned());
        let mut flags = vec![
            ("data-dir".to_owned(), data_dir.display().to_string()),
            ("listen".to_owned(), "127.0.0.1:0".to_owned()),
        ];
        flags.extend(SETTINGS.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())));
        flags.extend(self.settings);
        let settings = Loaded::new(None, [], &flags)?.settings;
        let since_1970 = self.clock.duration_since(UNIX_EPOCH).unwrap_or_default();
        let wall_ms = i64::try_from(since_1970.as_millis()).unwrap_or(i64::MAX);
        let storage = dir.map_or_else(|| Storage::Memory(MemDisk::new()), Storage::Directory);
        let environment = Environment::by_hand(wall_ms);
        let start = Start { settings, storage, environment };
        let server = start.server().await?;
        let proxy = Proxy::start(server.local_addr()).await?;
        Ok(TestBroker { start, proxy, server: Mutex::new(Some(server)) })
    }
}

/// What is there before and after a broker's life.
#[derive(Debug)]
struct Start {
    settings: felucca_broker::settings::ServerSettings,
    storage: Storage,
    environment: Environment,
}

#[derive(Debug)]
enum Storage {
    Memory(MemDisk),
    /// Removed with the value.
    Directory(#[expect(dead_code, reason = "kept for its end")] TempDir),
}

impl Start {
    async fn server(&self) -> Result<Server, TestError> {
        let disk: Arc<dyn felucca_broker::disk::Disk> = match &self.storage {
            // Threads of a broker that was killed find its disk gone.
            Storage::Memory(disk) => Arc::new(disk.mount()),
            Storage::Directory(_) => Arc::new(RealDisk),
        };
        let machine = Machine { disk, environment: self.environment.clone() };
        Ok(Server::start_on(self.settings.clone(), machine).await?)
    }

    /// # Panics
    /// The broker is on a directory.
    fn memory(&self, fault: &str) -> &MemDisk {
        match &self.storage {
            Storage::Memory(disk) => disk,
            Storage::Directory(_) => {
                panic!("{fault} is for brokers in memory, and this one is on a directory")
            }
        }
    }
}

/// A broker that ends with its value. See the crate's documentation.
#[derive(Debug)]
pub struct TestBroker {
    start: Start,
    proxy: Proxy,
    /// Empty while it is being started again, and after a start that failed.
    server: Mutex<Option<Server>>,
}

impl TestBroker {
    /// A broker in memory, with default settings.
    ///
    /// # Errors
    /// See [`TestError`].
    pub async fn start() -> Result<Self, TestError> {
        Self::builder().start().await
    }

    /// Settings for a broker.
    pub fn builder() -> TestBrokerBuilder {
        TestBrokerBuilder { settings: Vec::new(), on_disk: false, clock: SystemTime::now() }
    }

    /// Where clients connect; the same over restarts.
    pub fn address(&self) -> String {
        self.proxy.address().to_string()
    }

    /// A new client.
    ///
    /// # Errors
    /// The broker was killed, or takes no connections within the client's time for requests.
    pub async fn client(&self) -> felucca_client::Result<Client> {
        Client::connect(self.address()).await
    }

    // ---- Time ----

    /// What the broker's clock shows.
    pub fn now(&self) -> SystemTime {
        UNIX_EPOCH
            + Duration::from_millis(u64::try_from(self.start.environment.wall_ms()).unwrap_or_default())
    }

    /// Moves the clock, from one thing that is due to the next. Clients have a few milliseconds before, in between and after it
    /// to act; what they do of their own may well take longer. When the future is dropped, the clock stands where it is.
    pub async fn advance(&self, by: Duration) {
        self.advance_until(by, || false).await;
    }

    /// Moves the clock until the condition holds, at most so far; answers whether it held. It is looked at before the clock moves,
    /// and whenever something was due.
    pub async fn advance_until(&self, most: Duration, mut condition: impl FnMut() -> bool) -> bool {
        let server = self.server.lock().await;
        let mut left = most;
        if let Some(server) = &*server {
            server.settle().await;
        }
        while !condition() {
            if left.is_zero() {
                return false;
            }
            left = match &*server {
                Some(server) => left.saturating_sub(server.step_clock(left).await),
                None => {
                    self.start.environment.pass(left);
                    Duration::ZERO
                }
            };
        }
        true
    }

    // ---- Faults ----

    /// Ends the broker in order and starts it on what it has stored.
    ///
    /// # Errors
    /// It does not start.
    pub async fn restart(&self) -> Result<(), TestError> {
        let mut server = self.server.lock().await;
        if let Some(server) = server.take() {
            server.shutdown().await;
        }
        self.start_again(&mut server).await
    }

    /// Ends the broker as `kill -9` would and starts it: what it had written is there.
    ///
    /// # Errors
    /// It does not start.
    ///
    /// # Panics
    /// The broker is not in memory.
    pub async fn kill(&self) -> Result<(), TestError> {
        let disk = self.start.memory("kill");
        let mut server = self.server.lock().await;
        disk.kill();
        drop(server.take());
        self.start_again(&mut server).await
    }

    /// Cuts the power and starts the broker: only what was synced is there.
    ///
    /// # Errors
    /// It does not start.
    ///
    /// # Panics
    /// The broker is not in memory.
    pub async fn cut_power(&self) -> Result<(), TestError> {
        let disk = self.start.memory("cut_power");
        let mut server = self.server.lock().await;
        disk.power_cut_losing_all();
        self.start.environment.restart_machine();
        drop(server.take());
        self.start_again(&mut server).await
    }

    async fn start_again(&self, server: &mut Option<Server>) -> Result<(), TestError> {
        self.proxy.disconnect();
        let started = self.start.server().await?;
        self.proxy.forward_to(started.local_addr());
        *server = Some(started);
        Ok(())
    }

    /// Makes the next write of the broker fail: from then on it takes nothing until it is started again.
    ///
    /// # Panics
    /// The broker is not in memory.
    pub fn fail_next_write(&self) {
        self.start.memory("fail_next_write").fail_write(0, WriteFault::Io);
    }

    /// Makes the next sync of the broker fail: from then on it takes nothing until it is started again.
    ///
    /// # Panics
    /// The broker is not in memory.
    pub fn fail_next_sync(&self) {
        self.start.memory("fail_next_sync").fail_sync(0);
    }

    /// Cuts all connections that are open now. Clients connect again by themselves.
    pub fn disconnect_clients(&self) {
        self.proxy.disconnect();
    }

    /// Delays what the broker sends from now on, in the time of the machine; zero ends that.
    pub fn delay_replies(&self, by: Duration) {
        self.proxy.delay(by);
    }

    /// Ends the broker in order. One that is dropped ends in the background.
    pub async fn shutdown(self) {
        if let Some(server) = self.server.into_inner() {
            server.shutdown().await;
        }
    }
}
