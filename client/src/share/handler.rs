//! Handlers: what a worker calls with its records.
//!
//! A worker drives a [`tower_service::Service`] of batches. Closures, services of single records and batch handlers are
//! brought into that form here, so that the worker knows one kind only.

use std::convert::Infallible;
use std::fmt::Display;
use std::future::Future;
use std::task::{Context, Poll};

use futures::future::BoxFuture;
use futures::{FutureExt, TryFutureExt};
use serde::de::DeserializeOwned;
use tower_service::Service;

use super::delivery::{Delivery, Nack, Reject};
use super::outcome::Outcome;
use crate::record::ConsumedRecord;

/// A closure as a service that is always ready: `Fn(Delivery)`, or `Fn(Vec<Delivery>)` of a batch.
#[derive(Clone, Copy, Debug)]
pub struct HandlerFn<H>(pub H);

impl<H, F, O> Service<Delivery> for HandlerFn<H>
where
    H: Fn(Delivery) -> F,
    F: Future<Output = O> + Send + 'static,
    O: Into<Outcome>,
{
    type Response = Outcome;
    type Error = Infallible;
    type Future = futures::future::Map<F, fn(O) -> Result<Outcome, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, delivery: Delivery) -> Self::Future {
        (self.0)(delivery).map(|outcome| Ok(outcome.into()))
    }
}

impl<H, F> Service<Vec<Delivery>> for HandlerFn<H>
where
    H: Fn(Vec<Delivery>) -> F,
    F: Future<Output = Vec<Outcome>> + Send + 'static,
{
    type Response = Vec<Outcome>;
    type Error = Infallible;
    type Future = futures::future::Map<F, fn(Vec<Outcome>) -> Result<Vec<Outcome>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, batch: Vec<Delivery>) -> Self::Future {
        (self.0)(batch).map(Ok)
    }
}

/// A service of single records as one of batches of one.
#[derive(Debug)]
pub(super) struct OneByOne<S>(pub(super) S);

impl<S> Service<Vec<Delivery>> for OneByOne<S>
where
    S: Service<Delivery, Response = Outcome>,
    S::Future: Send + 'static,
    S::Error: Display,
{
    type Response = Vec<Outcome>;
    type Error = S::Error;
    type Future = futures::future::MapOk<S::Future, fn(Outcome) -> Vec<Outcome>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, mut batch: Vec<Delivery>) -> Self::Future {
        let delivery = batch.pop().expect("a worker hands out what it has");
        self.0.call(delivery).map_ok(|outcome| vec![outcome])
    }
}

/// A handler of JSON values: decodes each record's value and hands it over with its delivery. A value that cannot be decoded
/// is rejected with class `undecodable`; a record without a value decodes as `null`.
///
/// ```no_run
/// use felucca_client::{Client, Delivery, Nack, Result, json};
///
/// #[derive(serde::Deserialize)]
/// struct Order {
///     id: u64,
///     cents: u64,
/// }
///
/// # async fn charge(_: &Order) -> std::result::Result<(), std::io::Error> { Ok(()) }
/// # async fn example(client: Client, shutdown: impl Future<Output = ()>) -> Result<()> {
/// let worker = client.share_consumer("payment").build().await?;
/// let handler = json(|order: Order, _delivery: Delivery| async move {
///     charge(&order).await.map_err(|error| Nack::new("gateway-down", error.to_string()))
/// });
/// worker.run(handler, shutdown).await?;
/// # Ok(())
/// # }
/// ```
pub fn json<T, H, F>(handler: H) -> impl Fn(Delivery) -> BoxFuture<'static, Outcome>
where
    T: DeserializeOwned,
    H: Fn(T, Delivery) -> F,
    F: Future<Output: Into<Outcome>> + Send + 'static,
{
    move |delivery| match delivery.json() {
        Ok(value) => handler(value, delivery).map(Into::into).boxed(),
        Err(undecodable) => futures::future::ready(undecodable.into()).boxed(),
    }
}

impl ConsumedRecord {
    /// The value as JSON; `null` when there is none.
    ///
    /// # Errors
    /// It cannot be decoded: a rejection with class `undecodable`, for a handler to return.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, Reject> {
        serde_json::from_slice(self.value.as_deref().unwrap_or(b"null")).map_err(Reject::undecodable)
    }
}

/// What a service says when it fails without an outcome.
pub(super) fn service_failed(error: &impl Display) -> Nack {
    Nack::new("service", error.to_string())
}
