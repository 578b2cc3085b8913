//! The order service's HTTP API.
//!
//! - `POST /orders` with an `Idempotency-Key`: 201 and the order; 200 and the same order when the key repeats; 422 when
//!   the key was used for another order. A `traceparent` is taken over.
//! - `GET /orders/{id}`: the order.
//! - `GET /orders?status=…&after=…&limit=…`: a page of orders in the order of acceptance, and how many there are of
//!   each status.
//!
//! Errors are `{"error": "…"}`. A reply leaves after the commit it reports: a client that got none may repeat its
//! request under the same key.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::Router;
use axum::extract::rejection::JsonRejection;
use axum::extract::{DefaultBodyLimit, Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use uuid::Uuid;

use super::store::{NewOrder, Order, Placed, Status, Store};
use crate::database::DatabaseError;
use crate::events::{self, TraceParent};

const MAX_BODY_BYTES: usize = 16 * 1024;
const MAX_KEY_BYTES: usize = 128;
const MAX_CUSTOMER_BYTES: usize = 64;
/// Ten million dollars.
const MAX_CENTS: u64 = 1_000_000_000;
const MAX_PAGE: u32 = 1_000;

#[derive(Clone, Debug)]
struct Api {
    store: Store,
    /// Rung when there is something to publish.
    outbox: Arc<Notify>,
}

pub(crate) fn router(store: Store, outbox: Arc<Notify>) -> Router {
    Router::new()
        .route("/orders", post(place).get(list))
        .route("/orders/{id}", get(show))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(Api { store, outbox })
}

async fn place(
    State(api): State<Api>,
    headers: HeaderMap,
    body: Result<Json<NewOrder>, JsonRejection>,
) -> Result<Response, ApiError> {
    let key = text(&headers, "idempotency-key")
        .filter(|key| !key.is_empty() && key.len() <= MAX_KEY_BYTES)
        .ok_or_else(|| {
        ApiError::bad_request(format!("Idempotency-Key must hold 1 to {MAX_KEY_BYTES} characters"))
    })?;
    let Json(new) =
        body.map_err(|rejection| ApiError { status: rejection.status(), error: rejection.body_text() })?;
    if new.customer.is_empty() || new.customer.len() > MAX_CUSTOMER_BYTES {
        return Err(ApiError::bad_request(format!("customer must hold 1 to {MAX_CUSTOMER_BYTES} bytes")));
    }
    if new.cents > MAX_CENTS {
        return Err(ApiError::bad_request(format!("cents must be at most {MAX_CENTS}")));
    }
    let trace = text(&headers, "traceparent").and_then(TraceParent::parse);
    let trace = trace.map_or_else(TraceParent::generate, |caller| caller.child());

    let (status, order) = match api.store.place(key.to_owned(), new, events::now(), trace.to_string()).await?
    {
        Placed::Created(order) => {
            api.outbox.notify_one();
            (StatusCode::CREATED, order)
        }
        Placed::Repeated(order) => (StatusCode::OK, order),
        Placed::KeyReused => {
            let error = "this Idempotency-Key was used for another order".to_owned();
            return Err(ApiError { status: StatusCode::UNPROCESSABLE_ENTITY, error });
        }
    };
    Ok((status, [(header::LOCATION, format!("/orders/{}", order.id))], Json(order)).into_response())
}

async fn show(State(api): State<Api>, Path(id): Path<Uuid>) -> Result<Json<Order>, ApiError> {
    let order = api.store.order(id).await?;
    order.map(Json).ok_or_else(|| ApiError { status: StatusCode::NOT_FOUND, error: format!("no order {id}") })
}

#[derive(Debug, Deserialize)]
struct ListQuery {
    status: Option<Status>,
    /// `sequence` of the last order of the page before.
    #[serde(default)]
    after: i64,
    limit: Option<u32>,
}

/// A page of orders, and the counts of all.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct OrderList {
    pub(crate) totals: BTreeMap<String, u64>,
    pub(crate) orders: Vec<Order>,
}

async fn list(State(api): State<Api>, Query(query): Query<ListQuery>) -> Result<Json<OrderList>, ApiError> {
    let limit = query.limit.unwrap_or(100).min(MAX_PAGE);
    let orders = match limit {
        0 => Vec::new(),
        limit => api.store.orders(query.status, query.after, limit).await?,
    };
    let mut totals: BTreeMap<_, _> =
        Status::ALL.into_iter().map(|status| (status.name().to_owned(), 0)).collect();
    totals.extend(
        api.store.totals().await?.into_iter().map(|(status, count)| (status.name().to_owned(), count)),
    );
    Ok(Json(OrderList { totals, orders }))
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

#[derive(Debug)]
struct ApiError {
    status: StatusCode,
    error: String,
}

impl ApiError {
    fn bad_request(error: String) -> Self {
        Self { status: StatusCode::BAD_REQUEST, error }
    }
}

impl From<DatabaseError> for ApiError {
    fn from(error: DatabaseError) -> Self {
        tracing::error!(%error, "the database failed");
        Self {
            status: StatusCode::INTERNAL_SERVER_ERROR,
            error: "the order could not be stored or read".to_owned(),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.status, Json(serde_json::json!({ "error": self.error }))).into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use reqwest::StatusCode as Code;
    use serde_json::{Value, json};

    struct Served {
        url: String,
        http: reqwest::Client,
        _dir: tempfile::TempDir,
    }

    impl Served {
        async fn start() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let store = Store::open(&dir.path().join("orders.db")).unwrap();
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("http://{}/orders", listener.local_addr().unwrap());
            let router = router(store, Arc::new(Notify::new()));
            tokio::spawn(async { axum::serve(listener, router).await });
            Self { url, http: reqwest::Client::builder().no_proxy().build().unwrap(), _dir: dir }
        }

        async fn post(&self, key: &str, body: &Value) -> (Code, Value) {
            let request = self.http.post(&self.url).header("idempotency-key", key).json(body);
            answer(request).await
        }

        async fn get(&self, rest: &str) -> (Code, Value) {
            answer(self.http.get(format!("{}{rest}", self.url))).await
        }
    }

    async fn answer(request: reqwest::RequestBuilder) -> (Code, Value) {
        let response = request.send().await.unwrap();
        let status = response.status();
        (status, serde_json::from_str(&response.text().await.unwrap()).unwrap_or_default())
    }

    fn order(cents: u64) -> Value {
        json!({ "customer": "00004", "ordered_on": "1997-01-01", "cds": 2, "cents": cents })
    }

    #[tokio::test]
    async fn a_repeated_request_places_one_order() {
        let served = Served::start().await;
        let (status, created) = served.post("a", &order(5)).await;
        assert_eq!((status, &created["status"]), (Code::CREATED, &json!("pending")));
        assert_eq!(served.post("a", &order(5)).await, (Code::OK, created.clone()));
        assert_eq!(served.post("a", &order(6)).await.0, Code::UNPROCESSABLE_ENTITY);
        let read: Order = serde_json::from_value(created.clone()).unwrap();
        assert_eq!((read.new.cents, read.status), (5, Status::Pending));
        let id = created["id"].as_str().unwrap();
        assert_eq!(served.get(&format!("/{id}")).await, (Code::OK, created));
    }

    #[tokio::test]
    async fn orders_are_listed_in_pages_and_by_status() {
        let served = Served::start().await;
        for key in ["a", "b", "c"] {
            served.post(key, &order(5)).await;
        }
        let (_, page) = served.get("?limit=2").await;
        assert_eq!(page["orders"].as_array().unwrap().len(), 2);
        let after = &page["orders"][1]["sequence"];
        let (_, page) = served.get(&format!("?limit=2&after={after}")).await;
        assert_eq!(page["orders"].as_array().unwrap().len(), 1);
        let (_, page) = served.get("?status=confirmed").await;
        assert_eq!(page["orders"], json!([]));
        assert_eq!(
            page["totals"],
            json!({ "pending": 3, "confirmed": 0, "cancelled": 0, "dead_lettered": 0 })
        );
        assert_eq!(served.get("?status=lost").await.0, Code::BAD_REQUEST);
    }

    #[tokio::test]
    async fn what_is_no_order_is_refused() {
        let served = Served::start().await;
        let without_key = answer(served.http.post(&served.url).json(&order(5))).await;
        assert_eq!(without_key.0, Code::BAD_REQUEST);
        for body in [
            json!({}),
            json!({ "customer": "1", "ordered_on": "1997-02-30", "cds": 1, "cents": 5 }),
            json!({ "customer": "", "ordered_on": "1997-01-01", "cds": 1, "cents": 5 }),
            json!({ "customer": "1", "ordered_on": "1997-01-01", "cds": 1, "cents": -5 }),
            json!({ "customer": "1", "ordered_on": "1997-01-01", "cds": 1, "cents": 5, "currency": "EUR" }),
            order(MAX_CENTS + 1),
        ] {
            let (status, error) = served.post("a", &body).await;
            assert!(status.is_client_error() && error["error"].is_string(), "{body}: {status} {error}");
        }
        assert_eq!(served.get(&format!("/{}", Uuid::nil())).await.0, Code::NOT_FOUND);
    }
}
