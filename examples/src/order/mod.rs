//! The order service: takes orders over HTTP, publishes that they were created, and settles them by what payment says.
//!
//! Its one source of truth is its database. An order and the event about it are written in one transaction (the
//! *transactional outbox*), so neither exists without the other; [`relay`] brings the event to the broker, and
//! [`results`] brings the outcome back.
//!
//! Crash windows of `POST /orders`: killed *before the commit*, there is no order and the caller got no reply; killed
//! *after the commit*, the order stands, and the caller, who may have got no reply, repeats its request under the same
//! idempotency key and is shown that order.

mod api;
mod relay;
mod results;
pub(crate) mod store;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use felucca_client::Client;
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

pub(crate) use api::OrderList;

use crate::service;
use store::Store;

/// CloudEvents `source` of this service's events.
pub(crate) const SOURCE: &str = "/services/order";

/// What was under way when the service was told to stop may take so long.
const GRACE: Duration = Duration::from_secs(10);

#[derive(Debug, clap::Args)]
pub(crate) struct OrderArgs {
    /// Address of the broker.
    #[arg(long)]
    broker: String,
    /// Address to serve HTTP on.
    #[arg(long)]
    listen: SocketAddr,
    /// The service's database file.
    #[arg(long)]
    database: PathBuf,
    /// Name of this instance; an instance that comes back under its name keeps its partitions.
    #[arg(long, default_value = "order-1")]
    member: String,
    /// Stop when standard input closes.
    #[arg(long)]
    end_with_parent: bool,
}

/// Runs the service until it is told to stop.
pub(crate) async fn run(args: OrderArgs) -> anyhow::Result<()> {
    let stop = service::shutdown_token(args.end_with_parent)?;
    let store = Store::open(&args.database).context("cannot open the order database")?;
    let listener =
        TcpListener::bind(args.listen).await.with_context(|| format!("cannot listen on {}", args.listen))?;
    service::announce_ready()?;

    // Orders are taken from the first moment, also while the broker is away: the outbox holds what they have to say.
    let outbox = Arc::new(Notify::new());
    let router = api::router(store.clone(), Arc::clone(&outbox));
    let serve = axum::serve(listener, router).with_graceful_shutdown(stop.clone().cancelled_owned());
    let serve = async { serve.await.context("the HTTP server failed") };
    let exchanging = async {
        let client = tokio::select! {
            client = service::connect(&args.broker, "order") => client?,
            () = stop.cancelled() => return Ok(()),
        };
        exchange(&client, &store, outbox, &args.member, stop.clone()).await
    };
    let exchanging = async {
        tokio::select! {
            done = exchanging => done,
            // As after a kill: the outbox and the positions have what the next start needs.
            () = grace_over(&stop) => {
                tracing::warn!("the broker does not answer; stopping without it");
                Ok(())
            }
        }
    };
    tokio::try_join!(serve, exchanging)?;
    Ok(())
}

/// Brings orders to the broker and results back, until `stop`.
pub(crate) async fn exchange(
    client: &Client,
    store: &Store,
    outbox: Arc<Notify>,
    member: &str,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let relay = relay::run(client, store, outbox, stop.clone());
    let results = results::run(client, store, member, stop);
    tokio::try_join!(relay, results).map(|_| ())
}

/// Ready when the broker has had its time to answer what was under way when the service was told to stop.
async fn grace_over(stop: &CancellationToken) {
    stop.cancelled().await;
    tokio::time::sleep(GRACE).await;
}
