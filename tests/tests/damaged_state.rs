//! A flipped bit in the journal or in the checkpoint of a real broker: it says where, serves nothing wrong, and drops nothing
//! unless it is told to.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use felucca_broker::checkpoint;
use felucca_broker::disk::RealDisk;
use felucca_broker::journal::{Dump, DumpItem, DumpedFrame};
use felucca_client::{Client, Record};
use felucca_tests::process::{BrokerProcess, felucca_binary};
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(30);
const RECORDS: u64 = 100;

fn value(at: u64) -> String {
    format!("{at} {}", "x".repeat(700))
}

fn felucca(arguments: &[&str], data: &Path) -> (Output, String) {
    let output = Command::new(felucca_binary()).args(arguments).arg("--data-dir").arg(data).output().unwrap();
    let text = String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned();
    (output, text)
}

fn flip(file: &Path, position: u64) {
    let mut bytes = fs::read(file).unwrap();
    bytes[usize::try_from(position).unwrap()] ^= 0x10;
    fs::write(file, bytes).unwrap();
}

async fn produce(client: &Client, range: std::ops::Range<u64>) -> Vec<u64> {
    let producer = client.producer().build().await.unwrap();
    let mut offsets = Vec::new();
    for at in range {
        offsets.push(producer.send(Record::new("orders", value(at))).await.unwrap().offset);
    }
    offsets
}

/// Reads `count` records from the beginning: their offsets, with the values checked.
async fn consume(client: &Client, expected: &[(u64, u64)]) {
    let mut consumer = client.consumer().topics(["orders"]).build().await.unwrap();
    for (offset, at) in expected {
        let record = timeout(PATIENCE, consumer.next()).await.expect("a record").unwrap().unwrap();
        assert_eq!((record.offset, record.value.unwrap().as_ref()), (*offset, value(*at).as_bytes()));
    }
}

fn frames(data: &Path) -> Vec<DumpedFrame> {
    let dump = Dump::open(Arc::new(RealDisk), &data.join("journal")).unwrap();
    dump.filter_map(|item| match item.unwrap() {
        DumpItem::Frame(frame) if !frame.batches.is_empty() => Some(frame),
        _ => None,
    })
    .collect()
}

fn journal_files(data: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(data.join("journal"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "journal"))
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect();
    files.sort();
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_journal_is_refused_until_somebody_accepts_the_loss() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path();
    let mut broker = BrokerProcess::start(data);
    let client = Client::connect(broker.address().to_string()).await.unwrap();
    client.admin().create_topic("orders", 1, &[]).await.unwrap();
    assert_eq!(produce(&client, 0..RECORDS).await, (0..RECORDS).collect::<Vec<_>>());
    // Not stopped in order: that would leave a checkpoint of all of it.
    broker.kill();

    let damaged = frames(data).swap_remove(40);
    flip(&damaged.path, damaged.position + damaged.size / 2);
    let place = format!("{} is damaged at byte {}", damaged.path.display(), damaged.position);
    let before = journal_files(data);
    for _ in 0..2 {
        let (output, text) = felucca(&["serve", "--listen", "127.0.0.1:0"], data);
        assert!(!output.status.success() && text.contains(&place), "{text}");
    }
    let (output, text) = felucca(&["journal", "repair"], data);
    assert!(!output.status.success() && text.contains(&place), "{text}");
    let lost = format!("lost: frame {} and everything after it", damaged.lsn);
    for part in [lost.as_str(), "orders/0", "at offsets 41 to 99", "nothing was changed"] {
        assert!(text.contains(part), "{part:?} in {text}");
    }
    assert!(journal_files(data) == before, "a look changes nothing");

    let (output, text) = felucca(&["journal", "repair", "--accept-loss"], data);
    assert!(output.status.success(), "{text}");
    for (file, bytes) in before {
        let kept = PathBuf::from(format!("{}.damaged", file.display()));
        assert!(fs::read(kept).unwrap() == bytes, "{} is kept as it was", file.display());
    }
    let (output, text) = felucca(&["journal", "repair"], data);
    assert!(output.status.success() && text.contains("nothing to repair"), "{text}");

    // What was in front of the damage is there; offsets of what was lost are not given to others, after another start either.
    let mut expected: Vec<(u64, u64)> = (0..40).map(|at| (at, at)).collect();
    for round in 0..2 {
        let broker = BrokerProcess::start(data);
        let client = Client::connect(broker.address().to_string()).await.unwrap();
        let offset = produce(&client, 1_000 + round..1_001 + round).await[0];
        assert!(offset >= RECORDS, "{offset} is used again");
        expected.push((offset, 1_000 + round));
        consume(&client, &expected).await;
        assert!(broker.stop());
    }
    assert_eq!(expected[41].0, expected[40].0 + 1, "offsets are passed over once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_checkpoint_is_named_and_the_other_one_serves() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path();
    for round in 0..3 {
        let broker = BrokerProcess::start(data);
        let client = Client::connect(broker.address().to_string()).await.unwrap();
        if round == 0 {
            client.admin().create_topic("orders", 1, &[]).await.unwrap();
        }
        produce(&client, round * 10..round * 10 + 10).await;
        // Each orderly end makes a checkpoint.
        assert!(broker.stop());
    }
    let (output, text) = felucca(&["log", "verify"], data);
    assert!(output.status.success() && text.matches("checkpoint after frame").count() == 2, "{text}");

    let found = checkpoint::inspect(&RealDisk, &data.join("checkpoint")).unwrap();
    let newest = found.iter().max_by_key(|found| found.state.as_ref().unwrap().lsn).unwrap().file.clone();
    let bytes = fs::read(&newest).unwrap();
    // Everywhere that a row with the topic's name is, old ones too.
    let places = bytes.windows(6).enumerate().filter(|(_, window)| *window == b"orders");
    let places: Vec<u64> = places.map(|(at, _)| at as u64).collect();
    assert!(!places.is_empty());
    for place in places {
        flip(&newest, place);
    }
    let name = newest.display().to_string();
    let (output, text) = felucca(&["log", "verify"], data);
    assert!(!output.status.success() && text.contains(&format!("DAMAGED  {name}")), "{text}");

    let broker = BrokerProcess::start(data);
    let client = Client::connect(broker.address().to_string()).await.unwrap();
    consume(&client, &(0..30).map(|at| (at, at)).collect::<Vec<_>>()).await;
    assert_eq!(produce(&client, 30..31).await, [30]);
    let log = broker.log();
    let told = log.lines().find(|line| line.contains("a checkpoint is not usable")).unwrap_or(&log);
    assert!(told.contains(&name), "{told}");
    assert!(newest.with_extension("damaged").exists());
    assert!(broker.stop());
    let (output, text) = felucca(&["log", "verify"], data);
    assert!(output.status.success(), "{text}");

    // Without any that can be used nothing is served, and nothing is changed.
    let files: Vec<PathBuf> = fs::read_dir(data.join("checkpoint"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "redb"))
        .collect();
    assert_eq!(files.len(), 2);
    for file in &files {
        fs::write(file, b"no checkpoint").unwrap();
    }
    let (output, text) = felucca(&["serve", "--listen", "127.0.0.1:0"], data);
    assert!(!output.status.success() && text.contains("no checkpoint is usable"), "{text}");
    assert!(files.iter().all(|file| text.contains(&file.display().to_string())), "{text}");
    assert!(files.iter().all(|file| fs::read(file).unwrap() == b"no checkpoint"));
    let (output, text) = felucca(&["journal", "repair", "--accept-loss"], data);
    assert!(!output.status.success() && text.contains("no checkpoint can be read"), "{text}");
}
