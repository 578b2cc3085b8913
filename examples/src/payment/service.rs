//! The payment service: charges orders through the gateway and publishes how that ended.
//!
//! It works on `orders` in share group `payment`, which hands out one customer's orders one after the other, also when
//! one of them has to wait for its next attempt. The acknowledgement of an order and the result that it leads to are one
//! step ([`Outcome::Complete`]): the broker holds both or neither.
//!
//! An order can arrive again: it was handed out before a crash, or the order service published it twice. Crash windows:
//! - *before the charge*: nothing happened, the next delivery charges;
//! - *between the charge and the row in our database*, or after a timeout of which nobody knows what it did: the next
//!   delivery asks the gateway again under the same idempotency key, the order's id, and gets the same answer;
//! - *between the row and the completion*: the next delivery finds the row, asks nobody, and publishes the same event;
//! - *after the completion*: the order is not delivered again. If the order service published it twice, the second copy
//!   leads to a second copy of the result under the same event id, which its readers recognise.
//!
//! Outcomes: a decline is business and final (`PaymentFailed`, no retry); a gateway that fails is worth a retry, counted
//! and delayed by the broker, under a class that says how it failed; a record that can never be charged is rejected to the
//! dead-letter topic. While the gateway is down nothing is given up: the broker's outage guard sees to that.

use std::path::PathBuf;

use anyhow::Context as _;
use felucca_client::{Client, ConsumedRecord, Delivery, Nack, Outcome, Reject, ShareConsumer, WorkerReport};
use tokio_util::sync::CancellationToken;

use super::gateway::{ChargeRequest, Decision, Gateway, GatewayError};
use super::store::{Payment, Store};
use crate::database::DatabaseError;
use crate::events::{self, Envelope, Event, OrderCreated, PaymentFailed, PaymentProcessed, TraceParent};
use crate::{service, topology};

/// CloudEvents `source` of this service's events.
const SOURCE: &str = "/services/payment";

#[derive(Debug, clap::Args)]
pub(crate) struct PaymentArgs {
    /// Address of the broker.
    #[arg(long)]
    broker: String,
    /// The service's database file.
    #[arg(long)]
    database: PathBuf,
    /// The gateway's ledger, which belongs to the gateway alone.
    #[arg(long)]
    gateway: PathBuf,
    /// Seed of the gateway's behaviour.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Orders worked on at once.
    #[arg(long, default_value_t = 64)]
    concurrency: usize,
    /// The gateway answers every call promptly.
    #[arg(long, default_value_t = false, action = clap::ArgAction::Set)]
    steady_gateway: bool,
    /// An order on which this service panics, as CUSTOMER:CENTS.
    #[arg(long, value_parser = parse_poison)]
    poison: Option<Poison>,
    /// A bug: this service panics on orders of more CDs than that.
    #[arg(long)]
    bug_cds: Option<u32>,
    /// Name of this instance; an instance that comes back under its name keeps what it was working on.
    #[arg(long, default_value = "payment-1")]
    member: String,
    /// Stop when standard input closes.
    #[arg(long)]
    end_with_parent: bool,
}

/// Runs the service until it is told to stop; orders that are being worked on are finished first.
pub(crate) async fn run(args: PaymentArgs) -> anyhow::Result<()> {
    let stop = service::shutdown_token(args.end_with_parent)?;
    let payments = Payments {
        store: Store::open(&args.database).context("cannot open the payment database")?,
        gateway: Gateway::open(&args.gateway, args.seed)
            .context("cannot open the gateway's ledger")?
            .steady(args.steady_gateway),
        poison: args.poison,
        bug_cds: args.bug_cds,
    };
    let client = tokio::select! {
        client = service::connect(&args.broker, "payment") => client?,
        () = stop.cancelled() => return Ok(()),
    };
    let worker = worker(&client, args.member, args.concurrency).await?;
    service::announce_ready()?;
    let report = payments.work(worker, stop).await?;
    tracing::info!(?report, "stopped");
    Ok(())
}

/// Joins the payment group.
pub(crate) async fn worker(
    client: &Client,
    member: String,
    concurrency: usize,
) -> felucca_client::Result<ShareConsumer> {
    client.share_consumer(topology::PAYMENT_GROUP).member_id(member).concurrency(concurrency).build().await
}

/// What the service works with.
#[derive(Clone, Debug)]
pub(crate) struct Payments {
    pub(crate) store: Store,
    pub(crate) gateway: Gateway,
    pub(crate) poison: Option<Poison>,
    /// Orders of more CDs are too much for it.
    pub(crate) bug_cds: Option<u32>,
}

/// An order that this service has a bug with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Poison {
    pub(crate) customer: String,
    pub(crate) cents: u64,
}

fn parse_poison(text: &str) -> Result<Poison, String> {
    let parsed = text.rsplit_once(':').and_then(|(customer, cents)| {
        Some(Poison { customer: customer.to_owned(), cents: cents.parse().ok()? })
    });
    parsed.ok_or_else(|| format!("`{text}` is not CUSTOMER:CENTS"))
}

impl Payments {
    /// Works on orders until `stop`, and then to the end of those that have been begun.
    pub(crate) async fn work(
        self,
        worker: ShareConsumer,
        stop: CancellationToken,
    ) -> felucca_client::Result<WorkerReport> {
        let handler = |delivery: Delivery| {
            let payments = self.clone();
            async move { payments.handle(&delivery).await }
        };
        worker.run(handler, stop.cancelled_owned()).await
    }

    async fn handle(&self, record: &ConsumedRecord) -> Outcome {
        let envelope = match Envelope::from_record(record) {
            Ok(envelope) => envelope,
            Err(error) => return Reject::undecodable(error).into(),
        };
        let Event::OrderCreated(order) = &envelope.event else {
            return Outcome::reject(
                "unexpected-event",
                format!("{} is no order", envelope.event.type_name()),
            );
        };
        if order.cents == 0 {
            return Outcome::reject(
                "invalid-amount",
                format!("order {} has nothing to charge", order.order_id),
            );
        }
        // The worker makes this a nack of class `panic`; what else it does goes on.
        let bearable = !self.is_poison(order) && self.bug_cds.is_none_or(|most| order.cds <= most);
        assert!(bearable, "order {} is more than this service can bear", order.order_id);
        match self.pay(order).await {
            Ok(payment) => complete(&envelope.trace_parent, order, payment),
            Err(PayError::Gateway(error @ GatewayError::Timeout)) => retry("gateway-timeout", &error),
            Err(PayError::Gateway(error @ GatewayError::Unreachable)) => retry("gateway-down", &error),
            Err(error) => {
                tracing::error!(%error, order = %order.order_id, "could not pay, will try again");
                retry("internal", &error)
            }
        }
    }

    fn is_poison(&self, order: &OrderCreated) -> bool {
        self.poison
            .as_ref()
            .is_some_and(|poison| poison.customer == order.customer && poison.cents == order.cents)
    }

    /// The decision about an order, made at most once.
    async fn pay(&self, order: &OrderCreated) -> Result<Payment, PayError> {
        let order_id = order.order_id.to_string();
        if let Some(payment) = self.store.payment(order_id.clone()).await? {
            return Ok(payment);
        }
        let request = ChargeRequest {
            reference: order_id.clone(),
            customer: order.customer.clone(),
            cents: order.cents,
        };
        let decision = self.gateway.charge(&order_id, request).await?;
        Ok(self.store.record(order_id, Payment { decision, decided_at: events::now() }).await?)
    }
}

#[derive(Debug, thiserror::Error)]
enum PayError {
    #[error(transparent)]
    Gateway(#[from] GatewayError),
    #[error("the payment database failed: {0}")]
    Database(#[from] DatabaseError),
}

fn retry(class: &str, error: &dyn std::fmt::Display) -> Outcome {
    Nack::new(class, error.to_string()).into()
}

/// The acknowledgement together with the result.
fn complete(cause: &TraceParent, order: &OrderCreated, payment: Payment) -> Outcome {
    match result_event(cause, order, payment).to_record(topology::PAYMENTS) {
        Ok(record) => Outcome::Complete(vec![record]),
        Err(error) => retry("internal", &error),
    }
}

/// The event that says how the payment of an order ended.
pub(crate) fn result_event(cause: &TraceParent, order: &OrderCreated, payment: Payment) -> Envelope {
    let OrderCreated { order_id, customer, cents, .. } = order.clone();
    let event = match payment.decision {
        Decision::Charged { charge_id } => {
            Event::PaymentProcessed(PaymentProcessed { order_id, customer, cents, charge_id })
        }
        Decision::Declined { reason } => {
            Event::PaymentFailed(PaymentFailed { order_id, customer, cents, reason })
        }
    };
    Envelope::new(SOURCE, payment.decided_at, cause.child(), event)
}
