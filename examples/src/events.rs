//! The events of the sample and how they travel: CloudEvents 1.0 in binary mode, the attributes as record headers
//! `ce_…` beside a W3C `traceparent`, the data as JSON in the value.
//!
//! Invariant: an event's id follows from the order it is about and its type. Whoever has to publish an event again
//! publishes it under the same id, and whoever consumes events may tell a repeat by the id alone.

use bytes::Bytes;
use felucca_client::{ConsumedRecord, Record};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use uuid::Uuid;

const SPEC_VERSION: &str = "1.0";

/// An order was accepted. Published by the order service to [`crate::topology::ORDERS`], keyed by customer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OrderCreated {
    pub(crate) order_id: Uuid,
    pub(crate) customer: String,
    /// `yyyy-mm-dd`
    pub(crate) ordered_on: String,
    pub(crate) cds: u32,
    pub(crate) cents: u64,
}

/// An order was paid. Published by the payment service to [`crate::topology::PAYMENTS`], keyed by customer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PaymentProcessed {
    pub(crate) order_id: Uuid,
    pub(crate) customer: String,
    pub(crate) cents: u64,
    /// The gateway's name for the charge.
    pub(crate) charge_id: String,
}

/// An order will not be paid: a business outcome, final. Published like [`PaymentProcessed`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PaymentFailed {
    pub(crate) order_id: Uuid,
    pub(crate) customer: String,
    pub(crate) cents: u64,
    pub(crate) reason: String,
}

/// Everything that can be in the sample's topics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    OrderCreated(OrderCreated),
    PaymentProcessed(PaymentProcessed),
    PaymentFailed(PaymentFailed),
}

impl Event {
    pub(crate) const ORDER_CREATED: &str = "com.example.shop.OrderCreated";
    pub(crate) const PAYMENT_PROCESSED: &str = "com.example.shop.PaymentProcessed";
    pub(crate) const PAYMENT_FAILED: &str = "com.example.shop.PaymentFailed";

    pub(crate) fn type_name(&self) -> &'static str {
        match self {
            Self::OrderCreated(_) => Self::ORDER_CREATED,
            Self::PaymentProcessed(_) => Self::PAYMENT_PROCESSED,
            Self::PaymentFailed(_) => Self::PAYMENT_FAILED,
        }
    }

    pub(crate) fn order_id(&self) -> Uuid {
        match self {
            Self::OrderCreated(data) => data.order_id,
            Self::PaymentProcessed(data) => data.order_id,
            Self::PaymentFailed(data) => data.order_id,
        }
    }

    pub(crate) fn customer(&self) -> &str {
        match self {
            Self::OrderCreated(data) => &data.customer,
            Self::PaymentProcessed(data) => &data.customer,
            Self::PaymentFailed(data) => &data.customer,
        }
    }

    pub(crate) fn cents(&self) -> u64 {
        match self {
            Self::OrderCreated(data) => data.cents,
            Self::PaymentProcessed(data) => data.cents,
            Self::PaymentFailed(data) => data.cents,
        }
    }

    /// The id under which this event is published, whenever and how often that happens.
    pub(crate) fn id(&self) -> Uuid {
        Uuid::new_v5(&self.order_id(), self.type_name().as_bytes())
    }

    pub(crate) fn to_json(&self) -> Result<Vec<u8>, EventError> {
        let json = match self {
            Self::OrderCreated(data) => serde_json::to_vec(data),
            Self::PaymentProcessed(data) => serde_json::to_vec(data),
            Self::PaymentFailed(data) => serde_json::to_vec(data),
        };
        json.map_err(|source| EventError::Data { type_name: self.type_name(), source })
    }

    fn from_json(type_name: &str, json: &[u8]) -> Result<Self, EventError> {
        fn data<T: DeserializeOwned>(type_name: &'static str, json: &[u8]) -> Result<T, EventError> {
            serde_json::from_slice(json).map_err(|source| EventError::Data { type_name, source })
        }
        match type_name {
            Self::ORDER_CREATED => data(Self::ORDER_CREATED, json).map(Self::OrderCreated),
            Self::PAYMENT_PROCESSED => data(Self::PAYMENT_PROCESSED, json).map(Self::PaymentProcessed),
            Self::PAYMENT_FAILED => data(Self::PAYMENT_FAILED, json).map(Self::PaymentFailed),
            other => Err(EventError::Type(other.to_owned())),
        }
    }
}

/// Why a record is not one of our events. Never worth a retry: the record will not change.
#[derive(Debug, Error)]
pub(crate) enum EventError {
    #[error("header `{0}` is missing or not text")]
    Header(&'static str),
    #[error("CloudEvents version `{0}` is not {SPEC_VERSION}")]
    Version(String),
    #[error("unknown event type `{0}`")]
    Type(String),
    #[error("the data is not a {type_name}: {source}")]
    Data { type_name: &'static str, source: serde_json::Error },
}

/// An event with its attributes, as received or ready to be published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Envelope {
    pub(crate) id: Uuid,
    /// The service that published the event, as a URI reference.
    pub(crate) source: String,
    /// RFC 3339
    pub(crate) time: String,
    pub(crate) trace_parent: TraceParent,
    pub(crate) event: Event,
}

impl Envelope {
    pub(crate) fn new(source: &str, time: String, trace_parent: TraceParent, event: Event) -> Self {
        Self { id: event.id(), source: source.to_owned(), time, trace_parent, event }
    }

    /// The record to publish, keyed by customer: all events of one customer share a partition, and its order.
    pub(crate) fn to_record(&self, topic: &str) -> Result<Record, EventError> {
        Ok(Record::new(topic, self.event.to_json()?)
            .key(self.event.customer().to_owned())
            .header("ce_specversion", SPEC_VERSION)
            .header("ce_id", self.id.to_string())
            .header("ce_source", self.source.clone())
            .header("ce_type", self.event.type_name())
            .header("ce_time", self.time.clone())
            .header("content-type", "application/json")
            .header("traceparent", self.trace_parent.to_string()))
    }

    pub(crate) fn from_record(record: &ConsumedRecord) -> Result<Self, EventError> {
        let text = |name: &'static str| {
            record
                .header(name)
                .and_then(|value| std::str::from_utf8(value).ok())
                .ok_or(EventError::Header(name))
        };
        let version = text("ce_specversion")?;
        if version != SPEC_VERSION {
            return Err(EventError::Version(version.to_owned()));
        }
        let json = record.value.as_ref().map_or(&[][..], Bytes::as_ref);
        Ok(Self {
            id: text("ce_id")?.parse().map_err(|_| EventError::Header("ce_id"))?,
            source: text("ce_source")?.to_owned(),
            time: text("ce_time")?.to_owned(),
            trace_parent: text("traceparent")
                .ok()
                .and_then(TraceParent::parse)
                .unwrap_or_else(TraceParent::generate),
            event: Event::from_json(text("ce_type")?, json)?,
        })
    }
}

/// W3C Trace Context, version 00: which trace an event belongs to and which step of it caused the event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TraceParent {
    trace: String,
    parent: String,
    flags: String,
}

impl TraceParent {
    /// The first step of a new trace.
    pub(crate) fn generate() -> Self {
        Self { trace: Uuid::new_v4().simple().to_string(), parent: span_id(), flags: "01".to_owned() }
    }

    /// The next step of the same trace.
    pub(crate) fn child(&self) -> Self {
        Self { parent: span_id(), ..self.clone() }
    }

    /// `None` unless the text is a valid header of version 00.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut fields = text.split('-');
        let mut hex = |length: usize| {
            fields.next().filter(|field| {
                field.len() == length && field.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
            })
        };
        let not_zero = |field: &&str| field.bytes().any(|b| b != b'0');
        hex(2).filter(|version| *version == "00")?;
        let trace = hex(32).filter(not_zero)?.to_owned();
        let parent = hex(16).filter(not_zero)?.to_owned();
        let flags = hex(2)?.to_owned();
        fields.next().is_none().then_some(Self { trace, parent, flags })
    }
}

impl std::fmt::Display for TraceParent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "00-{}-{}-{}", self.trace, self.parent, self.flags)
    }
}

fn span_id() -> String {
    Uuid::new_v4().simple().to_string().split_off(16)
}

/// The current time as CloudEvents writes it.
pub(crate) fn now() -> String {
    format!("{:.3}", jiff::Timestamp::now())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paid(order_id: Uuid) -> Event {
        Event::PaymentProcessed(PaymentProcessed {
            order_id,
            customer: "00004".to_owned(),
            cents: 2_933,
            charge_id: "ch_1".to_owned(),
        })
    }

    #[test]
    fn an_event_keeps_its_id_when_it_is_made_again() {
        let order = Uuid::new_v4();
        assert_eq!(paid(order).id(), paid(order).id());
        assert_ne!(paid(order).id(), paid(Uuid::new_v4()).id());
        let failed = Event::PaymentFailed(PaymentFailed {
            order_id: order,
            customer: "00004".to_owned(),
            cents: 2_933,
            reason: "declined".to_owned(),
        });
        assert_ne!(paid(order).id(), failed.id());
    }

    #[test]
    fn data_survives_json() {
        let event = paid(Uuid::new_v4());
        let json = event.to_json().unwrap();
        assert_eq!(Event::from_json(Event::PAYMENT_PROCESSED, &json).unwrap(), event);
        assert!(matches!(Event::from_json(Event::ORDER_CREATED, &json), Err(EventError::Data { .. })));
        assert!(matches!(Event::from_json("x", &json), Err(EventError::Type(_))));
    }

    #[test]
    fn a_trace_is_carried_on() {
        let first = TraceParent::generate();
        let child = first.child();
        assert_eq!(TraceParent::parse(&child.to_string()), Some(child.clone()));
        assert_eq!(first.trace, child.trace);
        assert_ne!(first.parent, child.parent);
        for bad in [
            "",
            "00-1-2-01",
            "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
        ] {
            assert_eq!(TraceParent::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn time_is_rfc_3339_in_milliseconds() {
        let time = now();
        assert!(time.ends_with('Z') && time.len() == "2026-01-01T00:00:00.000Z".len(), "{time}");
    }
}
