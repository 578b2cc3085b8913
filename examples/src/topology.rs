//! Which topics and groups the sample uses, and their creation, which may be repeated.
//!
//! ```text
//!  order ──OrderCreated──▶ orders ──┬─▶ share group `payment` (key order) ──PaymentProcessed/Failed──▶ payments
//!    ▲                              │            └─ rejected ─▶ dlq.payment.orders                       │
//!    │                              └─▶ share group `email` ◀────────────────────────────────────────────┤
//!    └──────────── consumer group `order` ◀── payments, dlq.payment.orders ◀─────────────────────────────┘
//! ```

use anyhow::Context as _;
use felucca_client::{Admin, Client, Error, ErrorCode};

pub(crate) const ORDERS: &str = "orders";
pub(crate) const PAYMENTS: &str = "payments";
/// Created by the broker together with the group that it belongs to.
pub(crate) const DEAD_LETTERS: &str = "dlq.payment.orders";

/// Share group of the payment service on [`ORDERS`].
pub(crate) const PAYMENT_GROUP: &str = "payment";
/// Share group of the email service on [`ORDERS`] and [`PAYMENTS`].
pub(crate) const EMAIL_GROUP: &str = "email";
/// Consumer group of the order service on [`PAYMENTS`] and [`DEAD_LETTERS`].
pub(crate) const ORDER_GROUP: &str = "order";

const PARTITIONS: u32 = 8;

/// Creates what is missing; `payment` are settings of the payment group on top of the usual ones.
pub(crate) async fn create(client: &Client, payment: &[(&str, &str)]) -> anyhow::Result<()> {
    let admin = client.admin();
    for topic in [ORDERS, PAYMENTS] {
        unless_it_exists(admin.create_topic(topic, PARTITIONS, &[]).await, ErrorCode::TopicExists)
            .with_context(|| format!("cannot create topic {topic}"))?;
    }
    // Charges of one customer follow the order of their purchases, also across retries; hence the order by key. The
    // sample's gateway recovers within moments, so waiting starts far below the default.
    let usual = [
        ("ordering", "key"),
        ("backoff-initial", "100ms"),
        ("backoff-max", "5s"),
        // The charge may be made already: worth asking again soon, however often.
        ("class.gateway-timeout.backoff-max", "1s"),
    ];
    let payment = [&usual, payment].concat();
    create_share_group(&admin, PAYMENT_GROUP, &[ORDERS], &payment).await?;
    create_share_group(&admin, EMAIL_GROUP, &[ORDERS, PAYMENTS], &[]).await
}

async fn create_share_group(
    admin: &Admin,
    group: &str,
    topics: &[&str],
    config: &[(&str, &str)],
) -> anyhow::Result<()> {
    unless_it_exists(admin.create_share_group(group, topics, config).await, ErrorCode::GroupExists)
        .with_context(|| format!("cannot create share group {group}"))
}

fn unless_it_exists<T>(outcome: Result<T, Error>, exists: ErrorCode) -> Result<(), Error> {
    match outcome {
        Ok(_) => Ok(()),
        Err(Error::Broker { code, .. }) if code == exists => Ok(()),
        Err(error) => Err(error),
    }
}
