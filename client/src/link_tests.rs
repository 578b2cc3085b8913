//! The connection against a broker that refuses, stays silent, answers in any order and hangs up.

use std::time::{Duration, Instant};

use felucca_protocol::frame::Kind;
use felucca_protocol::{Api, ErrorCode, message};

use crate::testing::{FakeBroker, soon, topic};
use crate::{Client, Error};

fn reply(names: &[&str]) -> message::MetadataReply {
    message::MetadataReply { topics: names.iter().map(|name| topic(name, 1)).collect(), errors: Vec::new() }
}

#[tokio::test]
async fn a_broker_that_refuses_this_client_is_told_at_once() {
    let broker = FakeBroker::start().await;
    let started = Instant::now();
    let connecting = tokio::spawn(Client::connect(broker.address()));
    let mut connection = broker.accept_silently().await;
    let hello = connection.expect::<message::Hello>(Api::Hello).await;
    assert_eq!((hello.message.min_version, hello.message.max_version), (1, 1));
    connection.refuse(&hello, ErrorCode::UnsupportedVersion).await;
    let error = soon(connecting).await.unwrap().unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::UnsupportedVersion));
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn connecting_gives_up_after_the_request_timeout_and_says_why() {
    let broker = FakeBroker::start().await;
    let address = broker.address();
    drop(broker);
    let builder = Client::builder(address.clone()).request_timeout(Duration::from_millis(200));
    let error = soon(builder.connect()).await.unwrap_err();
    assert!(error.retryable() && error.to_string().contains(&address), "{error}");
}

#[tokio::test]
async fn answers_find_their_requests_in_whatever_order_they_come() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let ask = |name: &'static str| {
        let admin = client.admin();
        tokio::spawn(async move { admin.topic(name).await })
    };
    let (a, b) = (ask("a"), ask("b"));
    let first = connection.expect::<message::Metadata>(Api::Metadata).await;
    let second = connection.expect::<message::Metadata>(Api::Metadata).await;
    for asked in [second, first] {
        let name = asked.message.topics[0].clone();
        connection.reply(&asked, &reply(&[&name])).await;
    }
    assert_eq!(soon(a).await.unwrap().unwrap().name, "a");
    assert_eq!(soon(b).await.unwrap().unwrap().name, "b");
}

#[tokio::test]
async fn what_may_be_repeated_is_asked_again_and_what_may_not_is_not() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let admin = client.admin();
    let creating = tokio::spawn(async move { admin.create_topic("t", 1, &[]).await });
    connection.expect::<message::CreateTopic>(Api::CreateTopic).await;
    drop(connection);
    assert_eq!(soon(creating).await.unwrap(), Err(Error::Disconnected));

    let mut connection = broker.accept().await;
    let admin = client.admin();
    let listing = tokio::spawn(async move { admin.topics().await });
    connection.expect::<message::Metadata>(Api::Metadata).await;
    drop(connection);
    let mut connection = broker.accept().await;
    let asked = connection.expect::<message::Metadata>(Api::Metadata).await;
    connection.refuse(&asked, ErrorCode::Overloaded).await;
    let asked = connection.expect::<message::Metadata>(Api::Metadata).await;
    connection.reply(&asked, &reply(&["t"])).await;
    assert_eq!(soon(listing).await.unwrap().unwrap().len(), 1);
}

#[tokio::test]
async fn a_broker_that_does_not_answer_costs_the_request_timeout() {
    let broker = FakeBroker::start().await;
    let builder = Client::builder(broker.address()).request_timeout(Duration::from_millis(300));
    let (client, mut connection) = tokio::join!(builder.connect(), broker.accept());
    let admin = client.unwrap().admin();
    let asking = tokio::spawn(async move { admin.delete_topic("t").await });
    connection.expect::<message::DeleteTopic>(Api::DeleteTopic).await;
    assert_eq!(soon(asking).await.unwrap(), Err(Error::Timeout("waiting for an answer")));
}

#[tokio::test]
async fn a_broker_of_which_nothing_is_heard_is_given_up() {
    let mut broker = FakeBroker::start().await;
    broker.welcome.session_timeout_ms = 300;
    let (_client, silent) = broker.client().await;
    let _again = broker.accept().await;
    drop(silent);
}

#[tokio::test]
async fn a_connection_that_carries_rubbish_is_made_anew() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    connection.raw(&[0xff; 64]).await;
    let mut connection = broker.accept().await;
    let admin = client.admin();
    let listing = tokio::spawn(async move { admin.topics().await });
    let asked = connection.expect::<message::Metadata>(Api::Metadata).await;
    // Frames that nobody asked for change nothing.
    connection.push(Api::Records, 999, &message::Records::default(), b"").await;
    connection.send(Kind::Reply, Api::Metadata, 12_345, &reply(&[]), &[]).await;
    connection.reply(&asked, &reply(&["t"])).await;
    assert_eq!(soon(listing).await.unwrap().unwrap().len(), 1);
}

#[tokio::test]
async fn a_request_over_the_frame_limit_is_refused_here() {
    let mut broker = FakeBroker::start().await;
    broker.welcome.max_frame_bytes = 1_000;
    let (client, mut connection) = broker.client().await;
    let error = soon(client.admin().create_topic(&"t".repeat(1_000), 1, &[])).await.unwrap_err();
    assert!(!error.retryable() && error.to_string().contains("1000"), "{error}");
    connection.expect_quiet().await;
}

#[tokio::test]
async fn the_connection_ends_with_the_last_handle_after_what_was_queued() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    client.link.tell(Api::Unsubscribe, &message::Unsubscribe { subscription: 7 });
    drop(client);
    assert_eq!(connection.expect::<message::Unsubscribe>(Api::Unsubscribe).await.message.subscription, 7);
    assert!(connection.request().await.is_none());
}
