//! What the client promises while the broker restarts, in order or killed: nothing lost, nothing doubled, nothing reordered.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use felucca_broker::server::Server;
use felucca_broker::settings::ServerSettings;
use felucca_client::{Client, Consumer, Delivery, Outcome, Record, WorkerReport};
use felucca_tests::process::BrokerProcess;
use parking_lot::Mutex;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

/// A broker on a data directory and port of its own, which outlive it.
struct Broker {
    running: Running,
    dir: TempDir,
    address: SocketAddr,
}

enum Running {
    /// Ends in order.
    Server(Box<Server>, Duration),
    /// Is killed.
    Process(BrokerProcess),
    Stopped,
}

const SESSION: Duration = Duration::from_secs(10);

async fn serve(dir: &Path, listen: SocketAddr, session_timeout: Duration) -> Box<Server> {
    let settings =
        ServerSettings { data_dir: dir.to_owned(), listen, session_timeout, ..ServerSettings::default() };
    Box::new(Server::start(settings).await.unwrap())
}

impl Broker {
    async fn start(session_timeout: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let server = serve(dir.path(), "127.0.0.1:0".parse().unwrap(), session_timeout).await;
        let address = server.local_addr();
        Self { running: Running::Server(server, session_timeout), dir, address }
    }

    fn start_process() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let process = BrokerProcess::start(dir.path());
        let address = process.address();
        Self { running: Running::Process(process), dir, address }
    }

    async fn client(&self) -> Client {
        Client::builder(self.address.to_string())
            .request_timeout(Duration::from_secs(30))
            .connect()
            .await
            .unwrap()
    }

    async fn restart(&mut self) {
        match std::mem::replace(&mut self.running, Running::Stopped) {
            Running::Server(server, session_timeout) => {
                server.shutdown().await;
                let server = serve(self.dir.path(), self.address, session_timeout).await;
                self.running = Running::Server(server, session_timeout);
            }
            Running::Process(mut process) => {
                // Waits for the new one, as a supervisor would.
                let process = tokio::task::spawn_blocking(move || {
                    process.kill_and_restart();
                    process
                });
                self.running = Running::Process(process.await.unwrap());
            }
            Running::Stopped => panic!("the broker was stopped"),
        }
    }

    /// So many restarts, a while apart.
    async fn restarts(&mut self, count: usize) {
        for round in 0..count {
            sleep(Duration::from_millis(200 + 130 * (round as u64 % 4))).await;
            self.restart().await;
        }
        sleep(Duration::from_millis(200)).await;
    }
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(60), future).await.expect("in time")
}

fn number(value: Option<&[u8]>) -> u64 {
    std::str::from_utf8(value.unwrap()).unwrap().parse().unwrap()
}

/// Produces 0, 1, 2, … into one topic, key `n % keys`, until told to stop; answers where each is.
fn produce(
    client: &Client,
    topic: &'static str,
    keys: u64,
) -> (Arc<AtomicBool>, JoinHandle<Vec<(u32, u64)>>) {
    let stop = Arc::new(AtomicBool::new(false));
    let (client, stopped) = (client.clone(), stop.clone());
    let producing = tokio::spawn(async move {
        // Small batches, so that several are in flight whenever the broker goes.
        let producer = client.producer().max_batch_bytes(2_000).build().await.unwrap();
        let mut pending = Vec::new();
        while !stopped.load(Ordering::Relaxed) {
            for _ in 0..50 {
                let number = pending.len() as u64;
                let record = Record::new(topic, number.to_string()).key((number % keys).to_string());
                pending.push(producer.enqueue(record).await.unwrap());
            }
            sleep(Duration::from_millis(5)).await;
        }
        let mut places = Vec::with_capacity(pending.len());
        for ack in pending {
            let ack = ack.await.unwrap();
            places.push((ack.partition, ack.offset));
        }
        places
    });
    (stop, producing)
}

/// The numbers of a topic's partitions, from the start of the log to so many records.
async fn read(consumer: &mut Consumer, count: usize) -> BTreeMap<u32, Vec<(u64, u64)>> {
    let mut partitions: BTreeMap<u32, Vec<(u64, u64)>> = BTreeMap::new();
    for _ in 0..count {
        let record = soon(consumer.next()).await.unwrap().unwrap();
        let number = number(record.value.as_deref());
        partitions.entry(record.partition).or_default().push((record.offset, number));
    }
    partitions
}

async fn producer_and_reader(mut broker: Broker, restarts: usize) {
    let client = broker.client().await;
    client.admin().create_topic("numbers", 3, &[]).await.unwrap();
    let (stop, producing) = produce(&client, "numbers", 10);
    // Reads all the while, over a connection of its own.
    let reader = broker.client().await;
    let enough = Arc::new(Mutex::new(None));
    let (total, consumer) = (enough.clone(), reader.consumer().topics(["numbers"]).build().await.unwrap());
    let reading = tokio::spawn(async move {
        let mut consumer = consumer;
        let mut seen: BTreeMap<u32, Vec<(u64, u64)>> = BTreeMap::new();
        let mut count = 0;
        while total.lock().is_none_or(|total| count < total) {
            let Ok(record) = timeout(Duration::from_millis(100), consumer.next()).await else { continue };
            let record = record.unwrap().unwrap();
            seen.entry(record.partition).or_default().push((record.offset, number(record.value.as_deref())));
            count += 1;
        }
        seen
    });
    broker.restarts(restarts).await;
    stop.store(true, Ordering::Relaxed);
    let places = soon(producing).await.unwrap();
    assert!(places.len() > 500, "only {} records", places.len());
    *enough.lock() = Some(places.len());
    let seen = soon(reading).await.unwrap();

    let mut consumer = client.consumer().topics(["numbers"]).build().await.unwrap();
    let log = read(&mut consumer, places.len()).await;
    assert_eq!(seen, log, "who read meanwhile saw the same");
    let mut last_of_key = BTreeMap::new();
    for (partition, records) in &log {
        for (place, (offset, number)) in records.iter().enumerate() {
            assert_eq!(*offset, place as u64, "no gap and no repetition");
            assert_eq!(places[*number as usize], (*partition, *offset), "where it was said to be");
            let last = last_of_key.insert(number % 10, *number);
            assert!(last.is_none_or(|last| last + 10 == *number), "{last:?} then {number}");
        }
    }
    assert!(timeout(Duration::from_millis(200), consumer.next()).await.is_err(), "nothing else is there");
}

#[tokio::test(flavor = "multi_thread")]
async fn records_are_appended_and_read_once_and_in_order_while_the_broker_restarts() {
    producer_and_reader(Broker::start(SESSION).await, 4).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn records_are_appended_and_read_once_and_in_order_while_the_broker_is_killed() {
    producer_and_reader(Broker::start_process(), 4).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn members_of_a_group_keep_their_partitions_and_places_over_restarts_and_hand_over_when_they_leave() {
    let mut broker = Broker::start(SESSION).await;
    let client = broker.client().await;
    client.admin().create_topic("numbers", 4, &[]).await.unwrap();
    let member = |id: &'static str| {
        let builder = client.consumer().group("readers").member_id(id).topics(["numbers"]);
        builder.auto_commit(Some(Duration::from_millis(100))).build()
    };
    let mut first = member("a").await.unwrap();
    let mut second = member("b").await.unwrap();
    let balanced = async {
        loop {
            let [a, b] = [&first, &second].map(|one| one.assignment().get("numbers").map_or(0, Vec::len));
            if (a, b) == (2, 2) {
                return;
            }
            // Nothing is there to read: this only gives the members time.
            sleep(Duration::from_millis(20)).await;
        }
    };
    soon(balanced).await;
    let assigned = (first.assignment(), second.assignment());

    let (stop, producing) = produce(&client, "numbers", 40);
    let seen: Arc<Mutex<Vec<(u32, u64)>>> = Arc::default();
    let mut readers = Vec::new();
    for mut consumer in [first, second] {
        let (seen, stop) = (seen.clone(), stop.clone());
        readers.push(tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                if let Ok(record) = timeout(Duration::from_millis(50), consumer.next()).await {
                    let record = record.unwrap().unwrap();
                    seen.lock().push((record.partition, record.offset));
                }
            }
            consumer
        }));
    }
    broker.restarts(3).await;
    stop.store(true, Ordering::Relaxed);
    let places = soon(producing).await.unwrap();
    second = soon(readers.remove(1)).await.unwrap();
    first = soon(readers.remove(0)).await.unwrap();
    assert_eq!((first.assignment(), second.assignment()), assigned, "a restart moves nothing");
    soon(first.close()).await.unwrap();

    // The rest is for the one who stays: from where the other one stopped.
    while seen.lock().len() < places.len() {
        let record = soon(second.next()).await.unwrap().unwrap();
        seen.lock().push((record.partition, record.offset));
    }
    let mut next = BTreeMap::new();
    for (partition, offset) in seen.lock().iter() {
        let expected = next.entry(*partition).or_insert(0_u64);
        assert_eq!(offset, expected, "partition {partition}");
        *expected += 1;
    }
    soon(second.close()).await.unwrap();
    let committed = client.admin().committed("readers").await.unwrap();
    let committed: BTreeMap<u32, u64> =
        committed.into_iter().map(|committed| (committed.partition, committed.offset)).collect();
    assert_eq!(committed, next);
}

// ---- Share groups ----

/// Runs a worker in the background until told to stop.
fn work<F>(
    worker: felucca_client::ShareConsumer,
    handler: impl Fn(Delivery) -> F + Send + 'static,
) -> (tokio::sync::oneshot::Sender<()>, JoinHandle<WorkerReport>)
where
    F: Future<Output = Outcome> + Send + 'static,
{
    let (finish, finished) = tokio::sync::oneshot::channel::<()>();
    let shutdown = async {
        finished.await.ok();
    };
    (finish, tokio::spawn(async move { worker.run(handler, shutdown).await.unwrap() }))
}

async fn drained(client: &Client, group: &str) {
    let drained = async {
        loop {
            let group = client.admin().describe_group(group).await.unwrap();
            if group.partitions.iter().all(|partition| partition.lag == 0) {
                return group;
            }
            sleep(Duration::from_millis(50)).await;
        }
    };
    let group = soon(drained).await;
    for partition in group.partitions {
        assert_eq!((partition.failures, partition.dead_lettered), (0, 0), "a restart is no failure");
    }
}

async fn workers(mut broker: Broker, restarts: usize) {
    let client = broker.client().await;
    let admin = client.admin();
    admin.create_topic("orders", 2, &[]).await.unwrap();
    admin.create_topic("done", 2, &[]).await.unwrap();
    admin.create_share_group("work", &["orders"], &[("ordering", "key")]).await.unwrap();
    let handled: Arc<Mutex<Vec<u64>>> = Arc::default();
    let mut running = Vec::new();
    for _ in 0..2 {
        let (own, handled) = (broker.client().await, handled.clone());
        let worker = own.share_consumer("work").concurrency(8).prefetch(40).build().await.unwrap();
        running.push(work(worker, move |delivery| {
            let handled = handled.clone();
            async move {
                let value = delivery.value.clone().unwrap();
                handled.lock().push(number(Some(&value)));
                sleep(Duration::from_millis(2)).await;
                Outcome::Complete(vec![Record::new("done", value).key(delivery.key.clone().unwrap())])
            }
        }));
    }
    let (stop, producing) = produce(&client, "orders", 30);
    broker.restarts(restarts).await;
    stop.store(true, Ordering::Relaxed);
    let places = soon(producing).await.unwrap();
    drained(&client, "work").await;
    let mut acked = 0;
    for (finish, worker) in running {
        finish.send(()).unwrap();
        let report = soon(worker).await.unwrap();
        assert_eq!((report.nacked, report.rejected, report.lost), (0, 0, 0), "{report:?}");
        acked += report.acked;
    }
    assert_eq!(acked, places.len() as u64);
    // Leases outlive the restart: nothing is handed out twice.
    let handled = std::mem::take(&mut *handled.lock());
    assert_eq!(handled.len(), places.len());
    let mut last_of_key = BTreeMap::new();
    for number in handled {
        let last = last_of_key.insert(number % 30, number);
        assert!(last.is_none_or(|last| last + 30 == number), "{last:?} then {number}");
    }
    let mut consumer = client.consumer().topics(["done"]).build().await.unwrap();
    let outputs = read(&mut consumer, places.len()).await;
    let numbers: BTreeSet<u64> = outputs.values().flatten().map(|(_, number)| *number).collect();
    assert_eq!(numbers.len(), places.len(), "each output once");
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_complete_each_record_once_while_the_broker_restarts() {
    workers(Broker::start(SESSION).await, 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_complete_each_record_once_while_the_broker_is_killed() {
    workers(Broker::start_process(), 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_is_settled_under_its_name_after_a_restart() {
    let mut broker = Broker::start(SESSION).await;
    let client = broker.client().await;
    client.admin().create_topic("orders", 1, &[]).await.unwrap();
    client.admin().create_share_group("work", &["orders"], &[]).await.unwrap();
    let producer = client.producer().build().await.unwrap();
    for number in 0..3 {
        producer.send(Record::new("orders", number.to_string())).await.unwrap();
    }
    let mut member = client.share_consumer("work").build().await.unwrap();
    let held = soon(member.next()).await.unwrap();
    broker.restart().await;
    assert!(soon(held.extend(Duration::from_secs(60))).await.unwrap().remaining > Duration::from_secs(50));
    assert!(soon(held.ack()).await.unwrap().is_done());
    for number in 1..3 {
        let delivery = soon(member.next()).await.unwrap();
        assert_eq!((delivery.offset, delivery.failure_count), (number, 0));
        assert!(soon(delivery.ack()).await.unwrap().is_done());
    }
    drained(&client, "work").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn handlers_and_queues_longer_than_a_lease_and_a_session_fail_nothing() {
    // Long enough for a machine that stands still for a second.
    let session = Duration::from_secs(3);
    let broker = Broker::start(session).await;
    let client = broker.client().await;
    client.admin().create_topic("orders", 1, &[]).await.unwrap();
    client.admin().create_share_group("work", &["orders"], &[("lease", "3s")]).await.unwrap();
    let producer = client.producer().build().await.unwrap();
    for number in 0..3 {
        producer.send(Record::new("orders", number.to_string())).await.unwrap();
    }
    // One after the other: the last is queued for more than two leases.
    let worker = client.share_consumer("work").concurrency(1).prefetch(10).build().await.unwrap();
    let started = Arc::new(AtomicBool::new(false));
    let last = started.clone();
    let (finish, running) = work(worker, move |delivery| {
        last.store(delivery.offset == 2, Ordering::Relaxed);
        async {
            sleep(Duration::from_secs(4)).await;
            Outcome::Ack
        }
    });
    soon(async {
        while !started.load(Ordering::Relaxed) {
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    // The last handler ends long after the member stopped taking records.
    finish.send(()).unwrap();
    let report = soon(running).await.unwrap();
    assert_eq!((report.acked, report.lost), (3, 0));
    drained(&client, "work").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_is_dropped_gives_everything_back_at_once() {
    let broker = Broker::start(SESSION).await;
    let client = broker.client().await;
    client.admin().create_topic("orders", 1, &[]).await.unwrap();
    client.admin().create_share_group("work", &["orders"], &[]).await.unwrap();
    let producer = client.producer().build().await.unwrap();
    let mut pending = Vec::new();
    for number in 0..500 {
        pending.push(producer.enqueue(Record::new("orders", number.to_string())).await.unwrap());
    }
    producer.flush().await.unwrap();
    let mut member = client.share_consumer("work").prefetch(300).build().await.unwrap();
    let _looked_at = soon(member.next()).await.unwrap();
    drop((_looked_at, member));
    let started = Instant::now();
    let mut member = client.share_consumer("work").prefetch(300).build().await.unwrap();
    for _ in 0..500 {
        let delivery = soon(member.next()).await.unwrap();
        assert_eq!(delivery.failure_count, 0);
        assert!(soon(delivery.ack()).await.unwrap().is_done());
    }
    assert!(started.elapsed() < SESSION, "nobody had to time out");
    drained(&client, "work").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_is_dropped_leaves_its_partitions_to_others_at_once() {
    let broker = Broker::start(Duration::from_secs(60)).await;
    let client = broker.client().await;
    client.admin().create_topic("numbers", 2, &[]).await.unwrap();
    let producer = client.producer().build().await.unwrap();
    for number in 0..10 {
        producer.send(Record::new("numbers", number.to_string()).partition(0)).await.unwrap();
    }
    let build = || client.consumer().group("readers").topics(["numbers"]).build();
    let mut first = build().await.unwrap();
    for offset in 0..5 {
        assert_eq!(soon(first.next()).await.unwrap().unwrap().offset, offset);
    }
    drop(first);
    let mut second = build().await.unwrap();
    // The record in hand was not processed.
    for offset in 4..10 {
        assert_eq!(soon(second.next()).await.unwrap().unwrap().offset, offset);
    }
}
