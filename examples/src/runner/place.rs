//! Places the purchases through the order service's API.
//!
//! Customers buy at the same time, each of them one purchase after the other in the order of the file. A request without
//! an answer is repeated under the same idempotency key until there is one.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use futures::{StreamExt as _, TryStreamExt as _};
use reqwest::StatusCode;
use tokio::sync::watch;

use crate::events::TraceParent;
use crate::input::Purchase;
use crate::order::store::{NewOrder, Order};

/// Customers who buy at once.
const CONCURRENCY: usize = 64;
const RETRY_EVERY: Duration = Duration::from_millis(50);

/// Places all purchases; at any moment at most as many as are `admitted` have been begun.
pub(crate) async fn all(
    http: &reqwest::Client,
    order_url: &str,
    purchases: &[Purchase],
    admitted: watch::Receiver<usize>,
    placed: &AtomicUsize,
    patience: Duration,
) -> anyhow::Result<()> {
    let url = &format!("{order_url}/orders");
    let begun = &AtomicUsize::new(0);
    futures::stream::iter(by_customer(purchases))
        .map(Ok)
        .try_for_each_concurrent(CONCURRENCY, |own| {
            let mut admitted = admitted.clone();
            async move {
                for purchase in own {
                    let turn = begun.fetch_add(1, Ordering::Relaxed);
                    admitted.wait_for(|admitted| turn < *admitted).await?;
                    place(http, url, purchase, patience)
                        .await
                        .with_context(|| format!("line {} could not be placed", purchase.line))?;
                    placed.fetch_add(1, Ordering::Relaxed);
                }
                anyhow::Ok(())
            }
        })
        .await
}

/// Each customer's purchases in the order of the file; customers in the order of their first.
fn by_customer(purchases: &[Purchase]) -> Vec<Vec<&Purchase>> {
    let mut index = HashMap::new();
    let mut customers: Vec<Vec<&Purchase>> = Vec::new();
    for purchase in purchases {
        let position = *index.entry(&purchase.customer).or_insert(customers.len());
        match customers.get_mut(position) {
            Some(own) => own.push(purchase),
            None => customers.push(vec![purchase]),
        }
    }
    customers
}

async fn place(
    http: &reqwest::Client,
    url: &str,
    purchase: &Purchase,
    patience: Duration,
) -> anyhow::Result<()> {
    let new = NewOrder {
        customer: purchase.customer.clone(),
        ordered_on: purchase.date,
        cds: purchase.cds,
        cents: purchase.cents,
    };
    let trace = TraceParent::generate().to_string();
    let started = Instant::now();
    loop {
        let response = http
            .post(url)
            .header("idempotency-key", purchase.idempotency_key())
            .header("traceparent", &trace)
            .json(&new)
            .send()
            .await;
        let trouble = match response {
            Ok(response) => match response.status() {
                StatusCode::CREATED | StatusCode::OK => match response.json::<Order>().await {
                    Ok(order) => {
                        ensure!(order.new == new, "the order service answered with another order: {order:?}");
                        return Ok(());
                    }
                    Err(error) => error.to_string(),
                },
                status if status.is_server_error() => status.to_string(),
                status => bail!("{status}: {}", response.text().await.unwrap_or_default()),
            },
            Err(error) => error.to_string(),
        };
        if started.elapsed() > patience {
            bail!("the order service has not answered for {patience:?}: {trouble}");
        }
        tokio::time::sleep(RETRY_EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_customers_purchases_stay_in_order() {
        let text = "1 1 19970101 1 1.00\n2 2 19970101 1 1.00\n1 1 19970102 1 1.00\n";
        let purchases = crate::input::parse(text).unwrap();
        let lines: Vec<Vec<_>> =
            by_customer(&purchases).iter().map(|own| own.iter().map(|p| p.line).collect()).collect();
        assert_eq!(lines, [vec![1, 3], vec![2]]);
    }
}
