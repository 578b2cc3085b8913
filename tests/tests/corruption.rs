//! A flipped bit in a stored segment: readers and tools name the place, everything around it stays readable, nobody hangs.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use felucca_broker::log::SegmentFile;
use felucca_client::{BrokerCondition, Client, Error, ErrorCode, Outcome, Record, SeekTo, Start};
use felucca_tests::process::{BrokerProcess, felucca_binary};
use tokio::time::{sleep, timeout};

const PATIENCE: Duration = Duration::from_secs(30);
const RECORDS: u64 = 200;
const SETTINGS: [&str; 6] =
    ["--segment-bytes", "64KiB", "--scrub-interval", "1s", "--scrub-bytes-per-second", "1GiB"];

fn value(at: u64) -> String {
    format!("{at} {}", "x".repeat(2000))
}

/// A batch in a sealed segment.
struct Place {
    file: SegmentFile,
    position: u64,
    first: u64,
    last: u64,
}

/// The third batch of the second segment.
fn place(data: &Path) -> Place {
    let file = SegmentFile::list(data).unwrap().remove(1);
    assert!(!file.newest);
    let mut batches = Vec::new();
    file.inspect(|position, header, _| {
        batches.push((position, header.base_offset, header.last_offset()));
        Ok::<_, std::io::Error>(())
    })
    .unwrap();
    let (position, first, last) = batches[2];
    Place { file, position, first, last }
}

fn flip(place: &Place) {
    let mut bytes = fs::read(&place.file.path).unwrap();
    bytes[usize::try_from(place.position).unwrap() + 500] ^= 0x10;
    fs::write(&place.file.path, bytes).unwrap();
}

fn corrupt(error: &Error) -> &str {
    match error {
        Error::Broker { code: ErrorCode::CorruptLog, message, .. } => message,
        other => panic!("{other}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_is_named_and_everything_else_can_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let broker = BrokerProcess::start_at(dir.path(), "127.0.0.1:0", &SETTINGS);
    let client = Client::connect(broker.address().to_string()).await.unwrap();
    client.admin().create_topic("orders", 1, &[]).await.unwrap();
    client.admin().create_share_group("work", &["orders"], &[]).await.unwrap();
    let producer = client.producer().build().await.unwrap();
    for at in 0..RECORDS {
        producer.send(Record::new("orders", value(at))).await.unwrap();
    }
    assert!(broker.stop());
    let damaged = place(dir.path());
    flip(&damaged);

    // Offline: the file, the position, the offsets; and a failure.
    let output = Command::new(felucca_binary())
        .args(["log", "verify", "--data-dir"])
        .arg(dir.path())
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(!output.status.success(), "{text}");
    let name = damaged.file.path.file_name().unwrap().to_str().unwrap();
    for part in [name, &format!("position {}", damaged.position), &format!("offset {}", damaged.first)] {
        assert!(text.contains(part), "{part} in {text}");
    }

    let broker = BrokerProcess::start_at(dir.path(), "127.0.0.1:0", &SETTINGS);
    let client = Client::connect(broker.address().to_string()).await.unwrap();
    // An ordered reader gets everything in front, then an error that names the place, never a gap.
    let mut consumer = client.consumer().topics(["orders"]).build().await.unwrap();
    for at in 0..damaged.first {
        let record = timeout(PATIENCE, consumer.next()).await.expect("a record").unwrap().unwrap();
        assert_eq!((record.offset, record.value.unwrap().as_ref()), (at, value(at).as_bytes()));
    }
    let error = timeout(PATIENCE, consumer.next()).await.expect("an answer").unwrap().unwrap_err();
    let said = corrupt(&error);
    assert!(said.contains(name) && said.contains(&format!("offset {}", damaged.first)), "{said}");
    // Whoever goes around the place reads on.
    let behind = client.consumer().topics(["orders"]).start(Start::Offset(damaged.last + 1));
    let mut consumer = behind.build().await.unwrap();
    for at in damaged.last + 1..RECORDS {
        let record = timeout(PATIENCE, consumer.next()).await.expect("a record").unwrap().unwrap();
        assert_eq!((record.offset, record.value.unwrap().as_ref()), (at, value(at).as_bytes()));
    }

    // A share group is given what can be read in front, and waits at the place without spinning; an operator moves it on.
    let worker = client.share_consumer("work").build().await.unwrap();
    let (finish, finished) = tokio::sync::oneshot::channel::<()>();
    let working = tokio::spawn(worker.run(
        |delivery| {
            assert!(
                delivery.value.as_deref().unwrap().starts_with(format!("{} ", delivery.offset).as_bytes())
            );
            async { Outcome::Ack }
        },
        async {
            finished.await.ok();
        },
    ));
    let admin = client.admin();
    let orders = async || {
        let group = admin.describe_group("work").await.unwrap();
        group.partitions.into_iter().find(|one| one.topic == "orders").unwrap()
    };
    let lag = async |expected| {
        let reached = timeout(PATIENCE, async {
            while orders().await.lag != expected {
                sleep(Duration::from_millis(50)).await;
            }
        });
        let found = reached.await;
        assert!(found.is_ok(), "{:?}", orders().await);
    };
    lag(RECORDS - damaged.first).await;
    sleep(Duration::from_secs(2)).await;
    let log = broker.log();
    let complaints = log.matches("cannot scan the log").count();
    assert!((1..20).contains(&complaints), "{complaints} complaints: {log}");

    let unreadable = orders().await.unreadable.expect("an alarm");
    assert_eq!(unreadable.offset, damaged.first);
    assert!(unreadable.reason.contains(name), "{}", unreadable.reason);
    admin.seek_group("work", "orders", Some(0), SeekTo::Offset(damaged.last + 1), false).await.unwrap();
    lag(0).await;
    assert!(orders().await.unreadable.is_none());

    // The look for damage has found it meanwhile.
    let found = log.lines().find(|line| line.contains("stored records are damaged")).expect(&log);
    for part in [
        "orders".to_owned(),
        format!("first={}", damaged.first),
        format!("next_readable={}", damaged.last + 1),
        name.to_owned(),
        format!("position={}", damaged.position),
    ] {
        assert!(found.contains(&part), "{part} in {found}");
    }
    let status = admin.describe_broker().await.unwrap();
    assert_eq!((status.condition(), status.damaged_ranges), (BrokerCondition::Ok, 1));
    assert!(status.scrubbed_bytes > 0, "{status:?}");
    let range = &status.damaged[0];
    assert_eq!((range.topic.as_str(), range.partition), ("orders", 0));
    assert_eq!((range.first_offset, range.end_offset), (damaged.first, damaged.last + 1));
    assert!(range.file.ends_with(name) && range.position == damaged.position, "{range:?}");
    finish.send(()).unwrap();
    timeout(PATIENCE, working).await.unwrap().unwrap().unwrap();
    assert!(broker.stop());
}
