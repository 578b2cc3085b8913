//! The Rust client of Felucca.
//!
//! ```no_run
//! use felucca_client::{Client, Record, Result};
//!
//! # async fn example() -> Result<()> {
//! let client = Client::connect("127.0.0.1:7650").await?;
//! client.admin().create_topic("orders", 8, &[]).await?;
//!
//! let producer = client.producer().build().await?;
//! let ack = producer.send(Record::new("orders", "2 books").key("customer-7")).await?;
//! println!("stored at {}/{}", ack.partition, ack.offset);
//!
//! let mut consumer = client.consumer().topics(["orders"]).build().await?;
//! if let Some(record) = consumer.next().await {
//!     println!("{:?}", record?.value);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! A [`Client`] is one connection that finds its way back by itself; [`Producer`], [`Consumer`] and [`ShareConsumer`] go on
//! after a lost connection or a restart of the broker without losing or reordering anything. Every wait has a timeout.
//!
//! Working through records with acknowledgement, retry and dead letters:
//!
//! ```no_run
//! use felucca_client::{Client, Outcome, Result};
//!
//! # async fn charge(_: &[u8]) -> std::result::Result<(), String> { Ok(()) }
//! # async fn example(client: Client) -> Result<()> {
//! let worker = client.share_consumer("payment").concurrency(16).build().await?;
//! let handler = |delivery: felucca_client::Delivery| async move {
//!     match charge(delivery.value.as_deref().unwrap_or_default()).await {
//!         Ok(()) => Outcome::Ack,
//!         Err(error) => Outcome::nack(error),
//!     }
//! };
//! let shutdown = async { tokio::signal::ctrl_c().await.unwrap_or(()) };
//! let report = worker.run(handler, shutdown).await?;
//! println!("{} done", report.acked);
//! # Ok(())
//! # }
//! ```

mod admin;
mod backoff;
mod client;
mod connection;
mod consumer;
mod error;
mod gaps;
mod link;
#[cfg(test)]
mod link_tests;
mod producer;
mod record;
mod share;
#[cfg(test)]
mod testing;

pub use admin::{
    Admin, BrokerCondition, BrokerDescription, CommittedOffset, DamagedRange, DeadLetterTopic,
    GroupDescription, GroupKind, GroupListing, GroupMember, GroupOutage, GroupPartition, PartitionOffsets,
    Redrive, RedriveAction, RedriveSpec, RedriveState, RedriveTarget, Redriven, SeekTo, ShareAlarm, Topic,
    TopicKind,
};
pub use client::{Client, ClientBuilder};
pub use consumer::{Consumer, ConsumerBuilder, OutOfRange, Start};
pub use error::{Error, Result};
pub use felucca_protocol::ErrorCode;
pub use felucca_protocol::batch::Compression;
pub use producer::{Ack, Level, PendingAck, Producer, ProducerBuilder};
pub use record::{ConsumedRecord, Header, Record};
pub use share::{
    Breaker, Delivery, Guarded, HandlerFn, Lease, Nack, Outcome, RecordState, Reject, SettleResult,
    SettleStatus, ShareConsumer, ShareConsumerBuilder, WorkerReport, json,
};
