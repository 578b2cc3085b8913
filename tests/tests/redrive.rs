//! Redrives: what they choose, that they go on through whatever happens to the broker, and that nothing is lost or moved twice.
//!
//! `FELUCCA_REDRIVE_LETTERS` sets how many letters the long test moves.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use felucca_client::{
    Client, Delivery, ErrorCode, Outcome, Record, Redrive, RedriveAction, RedriveSpec, RedriveState,
    RedriveTarget, Redriven, Reject, Start,
};
use felucca_testing::TestBroker;
use felucca_tests::process::BrokerProcess;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

const SOON: Duration = Duration::from_secs(60);

/// What a redrive of the only dead-letter topic is to do.
fn all() -> RedriveSpec {
    RedriveSpec {
        group: "g".to_owned(),
        source_topic: "t".to_owned(),
        target: RedriveTarget::Source.into(),
        ..RedriveSpec::default()
    }
}

/// Makes a dead letter of each record: value and key are its number, its class is the number's rest by three.
async fn letters(client: &Client, partitions: u32, count: u64) {
    let admin = client.admin();
    admin.create_topic("t", partitions, &[]).await.unwrap();
    admin.create_share_group("g", &["t"], &[]).await.unwrap();
    let producer = client.producer().build().await.unwrap();
    for number in 0..count {
        let record = Record::new("t", number.to_string()).key(number.to_string());
        drop(producer.enqueue(record).await.unwrap());
    }
    producer.flush().await.unwrap();
    let member = client.share_consumer("g").prefetch(1_000).concurrency(1_000).build().await.unwrap();
    let handler = |delivery: Delivery| async move {
        let number: u64 = std::str::from_utf8(&delivery.value.clone().unwrap()).unwrap().parse().unwrap();
        Outcome::Reject(Reject::new(format!("class-{}", number % 3), "no"))
    };
    let stop = CancellationToken::new();
    let worker = tokio::spawn(member.run(handler, stop.clone().cancelled_owned()));
    pending(client, count).await;
    stop.cancel();
    worker.await.unwrap().unwrap();
}

/// Waits until so many letters are pending.
async fn pending(client: &Client, count: u64) {
    let wait = async {
        while client.admin().dead_letter_topics(Some("g")).await.unwrap()[0].pending != count {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(SOON, wait).await.expect("the letters in time");
}

/// How often each value is in the topic, its first `skip` records of each partition left out.
async fn values(client: &Client, topic: &str, skip: &[u64]) -> BTreeMap<Bytes, u64> {
    let mut found = BTreeMap::new();
    for offsets in client.admin().offsets(topic).await.unwrap() {
        let from = skip.get(offsets.partition as usize).copied().unwrap_or(0);
        if from >= offsets.high_watermark {
            continue;
        }
        let consumer = client.consumer().assign(topic, [offsets.partition]).start(Start::Beginning);
        let mut consumer = consumer.build().await.unwrap();
        loop {
            let record = timeout(SOON, consumer.next()).await.unwrap().unwrap().unwrap();
            if record.offset >= from {
                *found.entry(record.value.unwrap()).or_default() += 1;
            }
            if record.offset + 1 == offsets.high_watermark {
                break;
            }
        }
    }
    found
}

async fn ends(client: &Client, topic: &str) -> Vec<u64> {
    let offsets = client.admin().offsets(topic).await.unwrap();
    offsets.iter().map(|partition| partition.high_watermark).collect()
}

async fn find(client: &Client, id: &str) -> Redrive {
    let all = client.admin().redrives(Some("g")).await.unwrap();
    all.into_iter().find(|redrive| redrive.id == id).unwrap()
}

async fn moved_so_many(client: &Client, id: &str, count: u64) {
    let wait = async {
        while find(client, id).await.moved < count {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(SOON, wait).await.expect("progress in time");
}

#[tokio::test]
async fn a_redrive_moves_what_its_filter_chooses_and_a_dry_run_nothing() {
    let broker = TestBroker::start().await.unwrap();
    let client = broker.client().await.unwrap();
    letters(&client, 2, 30).await;
    let before = ends(&client, "t").await;
    let admin = client.admin();

    let of_class = RedriveSpec { class: "class-1".to_owned(), ..all() };
    let seen = admin.preview_redrive(of_class.clone()).await.unwrap();
    assert_eq!((seen.examined, seen.moved, seen.refused), (30, 10, 0));
    assert_eq!(ends(&client, "t").await, before);
    assert_eq!(admin.redrives(None).await.unwrap(), []);

    admin.start_redrive("class", of_class.clone()).await.unwrap();
    let done = Redriven { redriven: 10, refused: 0 };
    assert_eq!(admin.finished_redrive("class").await.unwrap(), done);
    let moved = values(&client, "t", &before).await;
    let numbers: Vec<u64> = moved.keys().map(|v| std::str::from_utf8(v).unwrap().parse().unwrap()).collect();
    assert!(numbers.iter().all(|number| number % 3 == 1) && numbers.len() == 10, "{numbers:?}");
    pending(&client, 20).await;
    assert_eq!(admin.preview_redrive(of_class).await.unwrap().moved, 0);

    for (id, spec, count) in [
        ("key", RedriveSpec { key: Some(Bytes::from("2")), ..all() }, 1),
        ("reason", RedriveSpec { reason: "max_failures".to_owned(), ..all() }, 0),
        ("limit", RedriveSpec { limit: 4, ..all() }, 4),
        ("later", RedriveSpec { from_ms: Some(i64::MAX), ..all() }, 0),
        ("earlier", RedriveSpec { until_ms: Some(0), ..all() }, 0),
        ("offsets", RedriveSpec { partition: Some(1), until_offset: Some(0), ..all() }, 0),
        ("rest", all(), 15),
    ] {
        admin.start_redrive(id, spec).await.unwrap();
        assert_eq!(admin.finished_redrive(id).await.unwrap().redriven, count, "{id}");
    }
    let moved = values(&client, "t", &before).await;
    assert_eq!((moved.len(), moved.values().max()), (30, Some(&1)));
}

#[tokio::test]
async fn a_redrive_to_another_topic_keeps_keys_together() {
    let broker = TestBroker::start().await.unwrap();
    let client = broker.client().await.unwrap();
    letters(&client, 4, 50).await;
    let admin = client.admin();
    admin.create_topic("fixed", 3, &[]).await.unwrap();
    let to =
        |topic: &str| RedriveSpec { target: RedriveTarget::Topic.into(), topic: topic.to_owned(), ..all() };
    admin.start_redrive("fixed", to("fixed")).await.unwrap();
    assert_eq!(admin.finished_redrive("fixed").await.unwrap().redriven, 50);
    assert_eq!(values(&client, "fixed", &[]).await.len(), 50);
    // As a producer would have chosen the partition.
    for number in 0..50 {
        let partition = felucca_protocol::partitioner::partition_for_key(number.to_string().as_bytes(), 3);
        let consumer = client.consumer().assign("fixed", [partition]).start(Start::Beginning);
        let mut consumer = consumer.build().await.unwrap();
        let value = number.to_string();
        let found = async {
            while consumer.next().await.unwrap().unwrap().value.as_deref() != Some(value.as_bytes()) {}
        };
        timeout(SOON, found).await.expect("the record in the partition of its key");
    }
    for (topic, code) in [("dlq.g.t", ErrorCode::InvalidRequest), ("nowhere", ErrorCode::UnknownTopic)] {
        let refused = admin.start_redrive("refused", to(topic)).await.unwrap_err();
        assert_eq!(refused.code(), Some(code), "{refused}");
    }
    let other = admin.start_redrive("fixed", all()).await.unwrap_err();
    assert_eq!(other.code(), Some(ErrorCode::InvalidRequest), "{other}");
    assert_eq!(admin.start_redrive("fixed", to("fixed")).await.unwrap().moved, 50, "the same");
}

#[tokio::test]
async fn what_was_redriven_too_often_is_refused_unless_forced() {
    let broker = TestBroker::start().await.unwrap();
    let client = broker.client().await.unwrap();
    letters(&client, 1, 3).await;
    let admin = client.admin();
    for round in 0..4 {
        let redriven = admin.redrive("g", "t", RedriveTarget::Group).await.unwrap();
        let expected = if round < 3 { (3, 0) } else { (0, 3) };
        assert_eq!((redriven.redriven, redriven.refused), expected, "round {round}");
        if round < 3 {
            let mut member = client.share_consumer("g").build().await.unwrap();
            for _ in 0..3 {
                let again = timeout(SOON, member.next()).await.unwrap().unwrap();
                again.reject(Reject::new("still", "no")).await.unwrap();
            }
            pending(&client, 3).await;
        }
    }
    admin.start_redrive("forced", RedriveSpec { force: true, ..all() }).await.unwrap();
    assert_eq!(admin.finished_redrive("forced").await.unwrap().redriven, 3);
}

#[tokio::test]
async fn a_redrive_is_paused_resumed_and_cancelled() {
    let broker = TestBroker::start().await.unwrap();
    let client = broker.client().await.unwrap();
    letters(&client, 2, 1_000).await;
    let admin = client.admin();
    admin.start_redrive("slow", RedriveSpec { rate: 200, ..all() }).await.unwrap();
    moved_so_many(&client, "slow", 20).await;
    admin.alter_redrive("slow", RedriveAction::Pause).await.unwrap();
    let paused = find(&client, "slow").await;
    sleep(Duration::from_millis(300)).await;
    let still = find(&client, "slow").await;
    assert_eq!((still.state(), still.moved), (RedriveState::Paused, paused.moved));
    assert!(still.moved < 1_000);

    admin.alter_redrive("slow", RedriveAction::Resume).await.unwrap();
    moved_so_many(&client, "slow", paused.moved + 20).await;
    let cancelled = admin.alter_redrive("slow", RedriveAction::Cancel).await.unwrap();
    assert_eq!(cancelled.state(), RedriveState::Cancelled);
    pending(&client, 1_000 - cancelled.moved).await;
    let refused = admin.alter_redrive("slow", RedriveAction::Resume).await.unwrap_err();
    assert_eq!(refused.code(), Some(ErrorCode::InvalidRequest));
    let ended = admin.finished_redrive("slow").await.unwrap_err().to_string();
    assert!(ended.contains("cancelled"), "{ended}");
}

#[tokio::test]
async fn a_rate_is_kept() {
    let broker = TestBroker::start().await.unwrap();
    let client = broker.client().await.unwrap();
    letters(&client, 1, 200).await;
    let began = std::time::Instant::now();
    client.admin().start_redrive("paced", RedriveSpec { rate: 200, ..all() }).await.unwrap();
    client.admin().finished_redrive("paced").await.unwrap();
    // The last piece need not be waited for.
    assert!(began.elapsed() > Duration::from_millis(800), "{:?}", began.elapsed());
}

#[tokio::test]
async fn two_redrives_and_a_purge_never_take_one_letter_twice() {
    let broker = TestBroker::start().await.unwrap();
    let client = broker.client().await.unwrap();
    const COUNT: u64 = 2_000;
    letters(&client, 2, COUNT).await;
    let before = ends(&client, "t").await;
    let admin = client.admin();
    for id in ["one", "two"] {
        admin.start_redrive(id, RedriveSpec { rate: 5_000, ..all() }).await.unwrap();
    }
    let purged = admin.purge_dead_letters("g", "t").await.unwrap();
    let one = admin.finished_redrive("one").await.unwrap().redriven;
    let two = admin.finished_redrive("two").await.unwrap().redriven;
    let moved = values(&client, "t", &before).await;
    assert_eq!(moved.values().max(), Some(&1), "each once");
    assert_eq!(moved.len() as u64, one + two);
    pending(&client, COUNT - one - two - purged).await;
}

#[tokio::test]
async fn a_redrive_goes_on_after_a_restart_a_kill_and_a_power_cut() {
    let broker = TestBroker::start().await.unwrap();
    let client = broker.client().await.unwrap();
    letters(&client, 3, 600).await;
    let before = ends(&client, "t").await;
    client.admin().start_redrive("steady", RedriveSpec { rate: 1_000, ..all() }).await.unwrap();
    for step in 1..=5 {
        moved_so_many(&client, "steady", step * 100).await;
        match step {
            1 => broker.restart().await.unwrap(),
            2 | 4 => broker.kill().await.unwrap(),
            _ => broker.cut_power().await.unwrap(),
        }
    }
    let done = timeout(SOON, client.admin().finished_redrive("steady")).await.unwrap().unwrap();
    assert_eq!(done.redriven, 600);
    let moved = values(&client, "t", &before).await;
    assert_eq!((moved.len(), moved.values().max()), (600, Some(&1)));
    pending(&client, 0).await;
}

#[tokio::test]
async fn many_letters_are_moved_once_each_by_a_broker_that_is_killed_meanwhile() {
    let count = std::env::var("FELUCCA_REDRIVE_LETTERS").map_or(4_000, |count| count.parse().unwrap());
    let data = tempfile::tempdir().unwrap();
    let mut broker = BrokerProcess::start(data.path());
    let address = broker.address().to_string();
    let client = Client::connect(&address).await.unwrap();
    letters(&client, 4, count).await;
    let before = ends(&client, "t").await;
    client.admin().start_redrive("many", RedriveSpec { rate: 4_000, ..all() }).await.unwrap();
    for step in 1..=3 {
        moved_so_many(&client, "many", step * count / 5).await;
        if step == 2 {
            client.admin().alter_redrive("many", RedriveAction::Pause).await.unwrap();
        }
        broker.kill();
        broker = BrokerProcess::start_at(data.path(), &address, &[]);
        if step == 2 {
            assert_eq!(find(&client, "many").await.state(), RedriveState::Paused);
            client.admin().alter_redrive("many", RedriveAction::Resume).await.unwrap();
        }
    }
    let done = client.admin().finished_redrive("many").await.unwrap();
    assert_eq!(done.redriven, count);
    let moved = values(&client, "t", &before).await;
    assert_eq!((moved.len() as u64, moved.values().max()), (count, Some(&1)));
    pending(&client, 0).await;
    assert!(broker.stop());
}
