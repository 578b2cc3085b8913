//! The evidence: what the databases, the gateway's ledger, the mailbox and the log say, read from outside.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use felucca_client::{Client, ConsumedRecord, Start};
use tokio::time::timeout;

use crate::database::connect;
use crate::email::mailbox;
use crate::events::Envelope;
use crate::order::store::Order;
use crate::payment::gateway::{self, LedgerEntry};
use crate::{email, order, payment, topology};

/// The log that stands still while it is read answers well within this.
const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// Everything that the rules look at.
#[derive(Clone, Debug)]
pub(crate) struct Evidence {
    pub(crate) orders: Vec<Order>,
    /// Outbox rows without a place in the log.
    pub(crate) unpublished: u64,
    /// Order id, and whether it was paid, by the payment service's database.
    pub(crate) payments: Vec<(String, bool)>,
    pub(crate) ledger: Vec<LedgerEntry>,
    pub(crate) repeated_gateway_calls: u64,
    /// Message-IDs, one for each mail.
    pub(crate) mails: Vec<String>,
    /// Event ids, by the email service's database.
    pub(crate) sent: Vec<String>,
    pub(crate) log: LogEvidence,
}

/// The events in the log, each partition in its order.
#[derive(Clone, Debug, Default)]
pub(crate) struct LogEvidence {
    pub(crate) orders: Vec<Envelope>,
    pub(crate) payments: Vec<Envelope>,
    /// With the class of the failure.
    pub(crate) dead_letters: Vec<(Envelope, String)>,
}

/// Where the services keep their data.
#[derive(Clone, Debug)]
pub(crate) struct LocalFiles {
    pub(crate) orders: PathBuf,
    pub(crate) payments: PathBuf,
    pub(crate) gateway: PathBuf,
    pub(crate) sent: PathBuf,
    pub(crate) mailbox: PathBuf,
    /// Mails went to an SMTP server, so the email service's own notes have to do for them.
    pub(crate) smtp: bool,
}

impl Evidence {
    /// Reads the files; the services must have stopped. Blocks on the disk.
    pub(crate) fn gather(files: &LocalFiles, log: LogEvidence) -> anyhow::Result<Self> {
        let orders = connect(&files.orders).context("the order database")?;
        let payments = connect(&files.payments).context("the payment database")?;
        let gateway = connect(&files.gateway).context("the gateway's ledger")?;
        let sent = email::store::all_sent(&connect(&files.sent).context("the email database")?)?;
        let mails = if files.smtp {
            sent.iter().filter_map(|id| id.parse().ok()).map(email::message_id).collect()
        } else {
            mailbox::message_ids(&files.mailbox).context("the mailbox")?
        };
        Ok(Self {
            orders: order::store::all_orders(&orders)?,
            unpublished: order::store::unpublished(&orders)?,
            payments: payment::store::all_payments(&payments)?,
            ledger: gateway::statement(&gateway)?,
            repeated_gateway_calls: gateway::repeated_calls(&gateway)?,
            mails,
            sent,
            log,
        })
    }
}

impl LogEvidence {
    /// Reads the topics from their start to where they end now.
    pub(crate) async fn read(client: &Client) -> anyhow::Result<Self> {
        let envelopes = async |topic| {
            let records = read_topic(client, topic).await?;
            records.iter().map(|record| envelope(topic, record)).collect::<anyhow::Result<Vec<_>>>()
        };
        let letters = read_topic(client, topology::DEAD_LETTERS).await?;
        let dead_letters = letters.iter().map(|record| {
            let class = record.header("__dlq.errors.class").map(String::from_utf8_lossy).unwrap_or_default();
            Ok((envelope(topology::DEAD_LETTERS, record)?, class.into_owned()))
        });
        Ok(Self {
            orders: envelopes(topology::ORDERS).await?,
            payments: envelopes(topology::PAYMENTS).await?,
            dead_letters: dead_letters.collect::<anyhow::Result<_>>()?,
        })
    }
}

fn envelope(topic: &str, record: &ConsumedRecord) -> anyhow::Result<Envelope> {
    Envelope::from_record(record)
        .with_context(|| format!("{topic}/{} offset {}", record.partition, record.offset))
}

async fn read_topic(client: &Client, topic: &str) -> anyhow::Result<Vec<ConsumedRecord>> {
    let mut left: Vec<_> = client.admin().offsets(topic).await?;
    left.retain(|partition| partition.log_start < partition.high_watermark);
    let partitions: Vec<u32> = left.iter().map(|partition| partition.partition).collect();
    let mut records = Vec::new();
    if partitions.is_empty() {
        return Ok(records);
    }
    let mut consumer = client.consumer().assign(topic, partitions).start(Start::Beginning).build().await?;
    while !left.is_empty() {
        let record = timeout(READ_TIMEOUT, consumer.next())
            .await
            .with_context(|| format!("no record of {topic} for {READ_TIMEOUT:?}, though there are more"))?
            .with_context(|| format!("reading {topic} ended early"))??;
        left.retain(|end| end.partition != record.partition || record.offset + 1 < end.high_watermark);
        records.push(record);
    }
    consumer.close().await?;
    Ok(records)
}
