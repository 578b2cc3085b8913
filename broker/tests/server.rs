//! A whole server over real sockets, spoken to frame by frame.

mod wire;

use std::time::Duration;

use bytes::Bytes;
use felucca_broker::server::Server;
use felucca_broker::settings::ByteSize;
use felucca_protocol::batch::{self, BatchBuilder};
use felucca_protocol::frame::Kind;
use felucca_protocol::{Api, ErrorCode, message as msg};
use tokio::io::AsyncWriteExt;
use wire::{Connection, batch_of, settings};

#[tokio::test(flavor = "multi_thread")]
async fn records_are_fetched_as_they_were_produced() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(settings(dir.path())).await.unwrap();
    let mut client = Connection::open(server.local_addr()).await;
    let topic = client.create_topic("orders", 2).await;
    let reply = client.produce(&topic, 1, msg::Level::Synced, batch_of(0, 3)).await;
    assert_eq!((reply.base_offset, reply.duplicate), (0, false));
    let reply = client.produce(&topic, 1, msg::Level::Synced, batch_of(3, 2)).await;
    assert_eq!(reply.base_offset, 3);

    let (reply, payload) = client.fetch(&topic, 1, 0, 0).await;
    assert_eq!((reply.log_start, reply.high_watermark), (0, 5));
    let values: Vec<Bytes> = batch::split(&payload)
        .flat_map(|batch| batch::records(&batch.unwrap()).unwrap())
        .map(|record| record.unwrap().value.unwrap())
        .collect();
    assert_eq!(values, ["value 0", "value 1", "value 2", "value 3", "value 4"]);
    let (reply, payload) = client.fetch(&topic, 0, 0, 0).await;
    assert_eq!((reply.high_watermark, payload.len()), (0, 0));
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pipelined_requests_are_each_answered_once() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(settings(dir.path())).await.unwrap();
    let mut client = Connection::open(server.local_addr()).await;
    let topic = client.create_topic("orders", 1).await;
    let correlations: Vec<u64> = (0..1000).map(|_| client.send_produce(&topic, 0, batch_of(0, 1))).collect();
    client.flush().await;
    let mut answered = Vec::new();
    let mut offsets = Vec::new();
    for _ in &correlations {
        let frame = client.receive().await;
        assert_eq!(frame.kind, Kind::Reply);
        answered.push(frame.correlation);
        offsets.push(frame.decode_message::<msg::ProduceReply>().unwrap().results[0].base_offset);
    }
    answered.sort_unstable();
    assert_eq!(answered, correlations);
    offsets.sort_unstable();
    assert!(offsets.into_iter().eq(0..1000));
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_acknowledged_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    for round in 0..4_u64 {
        let server = Server::start(settings(dir.path())).await.unwrap();
        let mut client = Connection::open(server.local_addr()).await;
        let topic = match round {
            0 => client.create_topic("orders", 1).await,
            _ => client.topic("orders").await,
        };
        let (reply, _) = client.fetch(&topic, 0, 0, 0).await;
        assert_eq!(reply.high_watermark, round * 10);
        for at in 0..10 {
            let reply = client.produce(&topic, 0, msg::Level::Synced, batch_of(at, 1)).await;
            assert_eq!(reply.base_offset, round * 10 + at);
        }
        server.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fetch_waits_for_a_record() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(settings(dir.path())).await.unwrap();
    let mut reader = Connection::open(server.local_addr()).await;
    let topic = reader.create_topic("orders", 1).await;
    let waiting = tokio::spawn({
        let topic = topic.clone();
        async move { reader.fetch(&topic, 0, 0, 20_000).await }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut writer = Connection::open(server.local_addr()).await;
    writer.produce(&topic, 0, msg::Level::Synced, batch_of(0, 1)).await;
    let (reply, payload) = waiting.await.unwrap();
    assert_eq!(reply.high_watermark, 1);
    assert!(!payload.is_empty());
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscription_pushes_while_credit_lasts() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(settings(dir.path())).await.unwrap();
    let mut client = Connection::open(server.local_addr()).await;
    let topic = client.create_topic("orders", 1).await;
    for at in 0..4 {
        client.produce(&topic, 0, msg::Level::Synced, batch_of(at, 1)).await;
    }
    let position = msg::Position { topic_id: topic.clone(), partition: 0, offset: 1 };
    let subscribe = msg::Subscribe {
        subscription: 5,
        positions: vec![position],
        credit_records: 2,
        credit_bytes: 1 << 20,
    };
    client.call::<msg::Empty>(Api::Subscribe, &subscribe).await.unwrap();
    let mut offsets = client.pushed(5, 2).await;
    assert_eq!(offsets, [1, 2]);
    client.send(Api::Credit, &msg::Credit { subscription: 5, records: 10, bytes: 0 }, &[]);
    client.flush().await;
    offsets = client.pushed(5, 1).await;
    assert_eq!(offsets, [3]);
    client.produce_apart(&topic, 0, batch_of(4, 1)).await;
    offsets = client.pushed(5, 1).await;
    assert_eq!(offsets, [4]);
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn leased_records_are_pushed_and_settled() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(settings(dir.path())).await.unwrap();
    let mut client = Connection::open(server.local_addr()).await;
    let topic = client.create_topic("orders", 1).await;
    client.produce(&topic, 0, msg::Level::Synced, batch_of(0, 5)).await;
    client.create_share_group("payment", "orders").await;
    client.share_subscribe(9, "payment", "m-1", 3).await;
    let (leases, records) = client.leased(9).await;
    assert_eq!(records.iter().map(|record| record.offset).collect::<Vec<_>>(), [0, 1, 2]);
    let settlements = [msg::Outcome::Ack, msg::Outcome::Reject, msg::Outcome::Ack];
    let results = client.settle("payment", "m-1", &leases, &settlements).await;
    assert!(results.iter().all(|result| result.status() == msg::SettleStatus::Ok));

    // The rejected one is a dead letter, with its reason, and goes back to the group when it is redriven.
    let letters = client.dead_letters("payment", 1).await;
    assert_eq!(letters.topic, "dlq.payment.orders");
    let (_, payload) = client.fetch(&letters.topic_id, 0, 0, 10_000).await;
    let letter = batch::records(&payload).unwrap().next().unwrap().unwrap();
    assert_eq!(letter.value.as_deref(), Some(&b"value 1"[..]));
    assert!(letter.headers.iter().any(|header| header.name == "__dlq.errors.reason"));
    let done = client.redrive("payment", "orders", msg::RedriveTarget::Group).await;
    assert_eq!((done.moved, done.refused), (1, 0));
    client.send(Api::Credit, &msg::Credit { subscription: 9, records: 10, bytes: 1 << 20 }, &[]);
    client.flush().await;
    let mut values = Vec::new();
    while values.len() < 3 {
        let (_, records) = client.leased(9).await;
        values.extend(records.into_iter().map(|record| record.value.unwrap()));
    }
    values.sort_unstable();
    assert_eq!(values, ["value 1", "value 3", "value 4"]);
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_letter_that_was_redriven_too_often_stays() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(settings(dir.path())).await.unwrap();
    let mut client = Connection::open(server.local_addr()).await;
    let topic = client.create_topic("orders", 1).await;
    for count in [2, 3] {
        let mut builder = BatchBuilder::new();
        let count = format!("{count}");
        let headers = [("__dlq.errors.redrive.count", Some(count.as_bytes()))];
        builder.push(0, None, Some(b"again"), &headers).unwrap();
        client.produce(&topic, 0, msg::Level::Synced, builder.finish()).await;
    }
    client.create_share_group("payment", "orders").await;
    client.share_subscribe(9, "payment", "m-1", 2).await;
    let (leases, _) = client.leased(9).await;
    client.settle("payment", "m-1", &leases, &[msg::Outcome::Reject; 2]).await;
    client.dead_letters("payment", 2).await;
    let done = client.redrive("payment", "orders", msg::RedriveTarget::Source).await;
    assert_eq!((done.moved, done.refused), (1, 1));
    client.dead_letters("payment", 1).await;
    let (reply, _) = client.fetch(&topic, 0, 2, 0).await;
    assert_eq!(reply.high_watermark, 3);
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_letters_are_redriven_each_once() {
    const LETTERS: u32 = 500;
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(settings(dir.path())).await.unwrap();
    let mut client = Connection::open(server.local_addr()).await;
    let topic = client.create_topic("orders", 1).await;
    client.produce(&topic, 0, msg::Level::Synced, batch_of(0, LETTERS.into())).await;
    client.create_share_group("payment", "orders").await;
    client.share_subscribe(9, "payment", "m-1", LETTERS).await;
    let mut leased = 0;
    while leased < LETTERS as usize {
        let (leases, _) = client.leased(9).await;
        leased += leases.len();
        client.settle("payment", "m-1", &leases, &vec![msg::Outcome::Reject; leases.len()]).await;
    }
    client.dead_letters("payment", LETTERS.into()).await;
    let done = client.redrive("payment", "orders", msg::RedriveTarget::Source).await;
    assert_eq!((done.moved, done.refused), (LETTERS.into(), 0));
    let (reply, _) = client.fetch(&topic, 0, 0, 0).await;
    assert_eq!(reply.high_watermark, 2 * u64::from(LETTERS));
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_can_be_purged() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(settings(dir.path())).await.unwrap();
    let mut client = Connection::open(server.local_addr()).await;
    let topic = client.create_topic("orders", 1).await;
    client.produce(&topic, 0, msg::Level::Synced, batch_of(0, 3)).await;
    client.create_share_group("payment", "orders").await;
    client.share_subscribe(9, "payment", "m-1", 3).await;
    let (leases, _) = client.leased(9).await;
    client.settle("payment", "m-1", &leases, &[msg::Outcome::Reject; 3]).await;
    client.dead_letters("payment", 3).await;
    let purge = msg::PurgeDeadLetters { group: "payment".to_owned(), source_topic: "orders".to_owned() };
    let done: msg::PurgeDeadLettersReply = client.call(Api::PurgeDeadLetters, &purge).await.unwrap();
    assert_eq!(done.purged, 3);
    client.dead_letters("payment", 0).await;
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn live_leases_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(settings(dir.path())).await.unwrap();
    let mut client = Connection::open(server.local_addr()).await;
    let topic = client.create_topic("orders", 1).await;
    client.produce(&topic, 0, msg::Level::Synced, batch_of(0, 1)).await;
    client.create_share_group("payment", "orders").await;
    client.share_subscribe(9, "payment", "m-1", 3).await;
    let (leases, _) = client.leased(9).await;
    server.shutdown().await;

    let server = Server::start(settings(dir.path())).await.unwrap();
    let mut client = Connection::open(server.local_addr()).await;
    let results = client.settle("payment", "m-1", &leases, &[msg::Outcome::Ack]).await;
    assert_eq!(results[0].status(), msg::SettleStatus::Ok);
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_harms_nobody_else() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(settings(dir.path())).await.unwrap();
    let address = server.local_addr();
    let mut good = Connection::open(address).await;
    let topic = good.create_topic("orders", 1).await;

    // Garbage instead of a frame: an error, then the end.
    let mut garbage = Connection::open(address).await;
    garbage.raw(&[0, 0, 0, 20, 9, 9, 9, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).await;
    assert_eq!(garbage.last_error().await, ErrorCode::InvalidRequest);

    // A frame over the limit, from its length alone.
    let mut oversized = Connection::open(address).await;
    oversized.raw(&u32::MAX.to_be_bytes()).await;
    assert_eq!(oversized.last_error().await, ErrorCode::FrameTooLarge);

    // A frame that ends early.
    let mut truncated = Connection::open(address).await;
    truncated.raw(&[0, 0, 1, 0, 0, 21]).await;
    truncated.socket.shutdown().await.unwrap();
    truncated.end().await;

    // A request that nobody knows: an error with its correlation, and the connection goes on.
    let mut unknown = Connection::open(address).await;
    let correlation = unknown.send_raw(200, &[], &[]);
    unknown.flush().await;
    let frame = unknown.receive().await;
    assert_eq!((frame.kind, frame.correlation), (Kind::Error, correlation));
    assert_eq!(frame.decode_message::<msg::Error>().unwrap().error_code(), ErrorCode::UnknownApi);
    unknown.call::<msg::Empty>(Api::Ping, &msg::Ping {}).await.unwrap();

    // A message that is none.
    let correlation = unknown.send_raw(Api::Produce.into(), &[0xff; 7], &[]);
    unknown.flush().await;
    let frame = unknown.receive().await;
    assert_eq!((frame.kind, frame.correlation), (Kind::Error, correlation));

    // A batch with a wrong CRC.
    let mut wrong = batch_of(0, 1);
    let last = wrong.len() - 1;
    wrong[last] ^= 1;
    let error = unknown.try_produce(&topic, 0, wrong).await.unwrap_err();
    assert_eq!(error.error_code(), ErrorCode::CorruptBatch);

    // A record over the limit, which the error names.
    let mut builder = BatchBuilder::new();
    builder.push(0, None, Some(&vec![0; (1 << 20) + 1]), &[]).unwrap();
    let error = unknown.try_produce(&topic, 0, builder.finish()).await.unwrap_err();
    assert_eq!(error.error_code(), ErrorCode::RecordTooLarge);
    assert!(error.message.contains("1048576"), "{}", error.message);

    // A topic that does not exist.
    let result = unknown.produce(&Bytes::from(vec![7; 16]), 0, msg::Level::Synced, batch_of(0, 1)).await;
    assert_eq!(result.error.unwrap().error_code(), ErrorCode::UnknownTopic);

    // A client from the future, and one that does not say hello.
    let mut future = Connection::bare(address).await;
    let hello = msg::Hello { min_version: 100, max_version: 101, ..Default::default() };
    let error = future.call::<msg::Welcome>(Api::Hello, &hello).await.unwrap_err();
    assert_eq!(error.error_code(), ErrorCode::UnsupportedVersion);
    assert!(future.next_frame().await.is_none(), "said once");
    let mut rude = Connection::bare(address).await;
    let error = rude.call::<msg::Empty>(Api::Ping, &msg::Ping {}).await.unwrap_err();
    assert_eq!(error.error_code(), ErrorCode::InvalidRequest);
    assert!(rude.next_frame().await.is_none(), "said once");

    assert_eq!(good.produce(&topic, 0, msg::Level::Synced, batch_of(0, 1)).await.base_offset, 0);
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_takes_nothing_does_not_hold_up_others() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(settings(dir.path())).await.unwrap();
    let mut slow = Connection::open(server.local_addr()).await;
    let topic = slow.create_topic("orders", 1).await;
    let mut good = Connection::open(server.local_addr()).await;
    let mut builder = BatchBuilder::new();
    builder.push(0, None, Some(&vec![1; 900_000]), &[]).unwrap();
    let large = builder.finish();
    for _ in 0..16 {
        good.produce(&topic, 0, msg::Level::Synced, large.clone()).await;
    }
    // Far more answers than the sockets and the outbox hold, none of them read.
    for _ in 0..200 {
        let fetch = msg::Fetch {
            topic_id: topic.clone(),
            partition: 0,
            offset: 0,
            max_bytes: 8 << 20,
            max_wait_ms: 0,
        };
        slow.send(Api::Fetch, &fetch, &[]);
    }
    slow.flush().await;
    for _ in 0..16 {
        good.produce(&topic, 0, msg::Level::Synced, large.clone()).await;
    }
    let (reply, _) = good.fetch(&topic, 0, 31, 0).await;
    assert_eq!(reply.high_watermark, 32);
    drop(slow);
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_takes_nothing_is_disconnected() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = settings(dir.path());
    settings.write_timeout = Duration::from_millis(300);
    let server = Server::start(settings.clone()).await.unwrap();
    let mut slow = Connection::open(server.local_addr()).await;
    let topic = slow.create_topic("orders", 1).await;
    let mut builder = BatchBuilder::new();
    builder.push(0, None, Some(&vec![1; 900_000]), &[]).unwrap();
    slow.produce(&topic, 0, msg::Level::Synced, builder.finish()).await;
    for _ in 0..100 {
        let fetch = msg::Fetch {
            topic_id: topic.clone(),
            partition: 0,
            offset: 0,
            max_bytes: 1 << 20,
            max_wait_ms: 0,
        };
        slow.send(Api::Fetch, &fetch, &[]);
    }
    slow.flush().await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    // What the sockets held can still be read; then comes the end, long before the last answer.
    let mut answers = 0;
    while slow.try_receive().await.is_some() {
        answers += 1;
    }
    assert!(answers < 100);
    assert_eq!(server.broker().gate().available(), settings.in_flight_bytes.as_usize());
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_ends_a_connection_with_a_word() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = settings(dir.path());
    settings.session_timeout = Duration::from_millis(100);
    settings.idle_timeout = Duration::from_millis(300);
    settings.handshake_timeout = Duration::from_millis(300);
    let server = Server::start(settings).await.unwrap();
    let mut idle = Connection::open(server.local_addr()).await;
    let mut silent = Connection::bare(server.local_addr()).await;
    assert_eq!(idle.last_error().await, ErrorCode::Timeout);
    assert_eq!(silent.last_error().await, ErrorCode::Timeout);
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_connection_too_many_is_told_so() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = settings(dir.path());
    settings.max_connections = 2;
    let server = Server::start(settings).await.unwrap();
    let first = Connection::open(server.local_addr()).await;
    let mut second = Connection::open(server.local_addr()).await;
    let mut third = Connection::bare(server.local_addr()).await;
    assert_eq!(third.last_error().await, ErrorCode::LimitReached);
    drop(first);
    second.call::<msg::Empty>(Api::Ping, &msg::Ping {}).await.unwrap();
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_directory_serves_one_broker_and_no_newer_format() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(settings(dir.path())).await.unwrap();
    let refused = Server::start(settings(dir.path())).await.unwrap_err().to_string();
    assert!(refused.contains(&format!("process {}", std::process::id())), "{refused}");
    server.shutdown().await;
    std::fs::write(dir.path().join("FORMAT"), "99\n").unwrap();
    let refused = Server::start(settings(dir.path())).await.unwrap_err().to_string();
    assert!(refused.contains("newer version"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_new_records_for_now_and_answers_for_old_ones() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(settings(dir.path())).await.unwrap();
    let mut client = Connection::open(server.local_addr()).await;
    let topic = client.create_topic("orders", 1).await;
    client.produce(&topic, 0, msg::Level::Synced, batch_of(0, 2)).await;
    server.shutdown().await;

    let mut full = settings(dir.path());
    // More than any disk of a test has free.
    full.disk.low_water_bytes = ByteSize::gib(1 << 20);
    let server = Server::start(full).await.unwrap();
    let mut client = Connection::open(server.local_addr()).await;
    let refused = client.produce(&topic, 0, msg::Level::Synced, batch_of(2, 1)).await.error.unwrap();
    assert_eq!(refused.error_code(), ErrorCode::DiskFull);
    assert!(refused.error_code().retryable() && refused.retry_after_ms > 0);
    assert!(refused.message.contains("bytes are free"), "{}", refused.message);
    let (reply, _) = client.fetch(&topic, 0, 0, 0).await;
    assert_eq!(reply.high_watermark, 2);
    client.create_topic("other", 1).await;
    server.shutdown().await;
    assert!(!dir.path().join("RESERVE").exists(), "there was no room for one");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_server_ends_idle_connections() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(settings(dir.path())).await.unwrap();
    let mut idle = Connection::open(server.local_addr()).await;
    server.shutdown().await;
    assert_eq!(idle.last_error().await, ErrorCode::Stopping);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vanished_client_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(settings(dir.path())).await.unwrap();
    let mut client = Connection::open(server.local_addr()).await;
    let topic = client.create_topic("orders", 1).await;
    for _ in 0..20 {
        let mut gone = Connection::open(server.local_addr()).await;
        for _ in 0..50 {
            gone.send_produce(&topic, 0, batch_of(0, 1));
        }
        gone.flush().await;
        gone.socket.shutdown().await.unwrap();
        drop(gone);
    }
    tokio::time::timeout(Duration::from_secs(10), async {
        while server.broker().gate().available() != settings(dir.path()).in_flight_bytes.as_usize() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap();
    server.shutdown().await;
}
