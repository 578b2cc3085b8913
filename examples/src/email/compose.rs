//! The mails: what is written to whom about which event.
//!
//! Invariant: the same event gives the same mail, byte for byte, date and Message-ID included, so that a mail system can
//! recognise a second copy.

use std::time::SystemTime;

use anyhow::Context as _;
use jiff::Timestamp;
use lettre::Message;
use lettre::message::Mailbox;
use lettre::message::header::{ContentType, HeaderName, HeaderValue};

use crate::events::{Envelope, Event};
use crate::input::dollars;

const FROM: &str = "The Music Shop <orders@shop.example>";
/// Headers by which software finds its way in the mailbox.
const ORDER_HEADER: &str = "X-Order-Id";
const EVENT_TYPE_HEADER: &str = "X-Event-Type";

/// The Message-ID of the mail about an event.
pub(crate) fn message_id(event_id: uuid::Uuid) -> String {
    format!("<{event_id}@shop.example>")
}

/// Writes the mail about an event.
pub(crate) fn compose(envelope: &Envelope) -> anyhow::Result<Message> {
    let event = &envelope.event;
    let (subject, body) = text(event);
    let time: Timestamp = envelope.time.parse().context("the event's time")?;
    let mut message = Message::builder()
        .from(FROM.parse::<Mailbox>().context("the sender")?)
        .to(recipient(event.customer())?)
        .date(SystemTime::from(time))
        .message_id(Some(message_id(envelope.id)))
        .subject(subject)
        .header(ContentType::TEXT_PLAIN)
        .body(body)
        .context("the mail")?;
    for (name, value) in
        [(ORDER_HEADER, event.order_id().to_string()), (EVENT_TYPE_HEADER, event.type_name().into())]
    {
        message.headers_mut().insert_raw(HeaderValue::new(HeaderName::new_from_ascii_str(name), value));
    }
    Ok(message)
}

fn recipient(customer: &str) -> anyhow::Result<Mailbox> {
    let address = format!("customer-{customer}@customers.example");
    Ok(Mailbox::new(None, address.parse().with_context(|| format!("no mail can be sent to `{address}`"))?))
}

fn text(event: &Event) -> (String, String) {
    let order = event.order_id();
    let amount = dollars(event.cents());
    match event {
        Event::OrderCreated(data) => (
            format!("We have your order {order}"),
            format!("Thank you: {} CD(s) for ${amount}, ordered on {}.\r\n", data.cds, data.ordered_on),
        ),
        Event::PaymentProcessed(data) => (
            format!("Your order {order} is paid"),
            format!("We charged ${amount} (reference {}). Your order is confirmed.\r\n", data.charge_id),
        ),
        Event::PaymentFailed(data) => (
            format!("Your order {order} is cancelled"),
            format!("We could not charge ${amount}: {}. Your order is cancelled.\r\n", data.reason),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::{OrderCreated, TraceParent};

    fn created(customer: &str) -> Envelope {
        let event = Event::OrderCreated(OrderCreated {
            order_id: uuid::Uuid::from_u128(1),
            customer: customer.to_owned(),
            ordered_on: "1997-01-01".to_owned(),
            cds: 2,
            cents: 2_933,
        });
        Envelope::new("/test", "2026-01-02T03:04:05.678Z".to_owned(), TraceParent::generate(), event)
    }

    #[test]
    fn the_same_event_gives_the_same_mail() {
        let first = compose(&created("00004")).unwrap().formatted();
        assert_eq!(first, compose(&created("00004")).unwrap().formatted());
        let text = String::from_utf8(first).unwrap();
        assert!(text.contains(&message_id(created("00004").id)), "{text}");
        assert!(text.contains("customer-00004@customers.example"), "{text}");
        assert!(text.contains("$29.33"), "{text}");
        assert!(text.contains("Fri, 02 Jan 2026 03:04:05 +0000"), "{text}");
    }

    #[test]
    fn an_impossible_address_is_an_error() {
        assert!(compose(&created("no body@home")).is_err());
    }
}
