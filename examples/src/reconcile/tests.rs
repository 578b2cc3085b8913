//! A small world built with the services' own stores, consistent at first, then tampered with.

use std::path::Path;

use super::*;
use crate::database::connect;
use crate::email::mailbox::Mailbox;
use crate::events::TraceParent;
use crate::order::store::{NewOrder, Placed, Settlement, Store};
use crate::payment::gateway::{ChargeRequest, Gateway, GatewayError};
use crate::payment::service::result_event;
use crate::payment::store::Payment;
use crate::{email, input, payment};

struct World {
    dir: tempfile::TempDir,
    purchases: Vec<Purchase>,
    log: LogEvidence,
}

impl World {
    /// Takes the first purchases of the sample and one without value all the way, without a broker.
    async fn build() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut purchases = input::parse(include_str!("../../data/cdnow_sample.txt")).unwrap();
        purchases.truncate(60);
        purchases[59].cents = 0;
        let files = files(dir.path());
        let orders = Store::open(&files.orders).unwrap();
        let payments = payment::store::Store::open(&files.payments).unwrap();
        let gateway = Gateway::open(&files.gateway, 1).unwrap();
        let sent = email::store::Store::open(&files.sent).unwrap();
        let mailbox = Mailbox::open(&files.mailbox).unwrap();
        let mut log = LogEvidence::default();
        for purchase in &purchases {
            let order = place(&orders, purchase).await;
            let created = order.created_event(TraceParent::generate());
            let Event::OrderCreated(data) = &created.event else { unreachable!() };
            let (status, result) = if data.cents == 0 {
                log.dead_letters.push((created.clone(), NOTHING_TO_CHARGE.to_owned()));
                (Status::DeadLettered, None)
            } else {
                let result =
                    result_event(&created.trace_parent, data, pay(&gateway, &payments, &order).await);
                let confirmed = matches!(result.event, Event::PaymentProcessed(_));
                (if confirmed { Status::Confirmed } else { Status::Cancelled }, Some(result))
            };
            for envelope in [&created].into_iter().chain(&result) {
                let mail = format!("Message-ID: {}\r\n\r\nmail", message_id(envelope.id));
                mailbox.deliver(envelope.id, mail.as_bytes()).unwrap();
                sent.note_sent(envelope, "t".to_owned()).await.unwrap();
            }
            let settlement = Settlement { order_id: order.id, status, reason: None };
            orders.settle(vec![settlement], "t".to_owned()).await.unwrap();
            log.orders.push(created);
            log.payments.extend(result);
        }
        Self { dir, purchases, log }
    }

    fn reconcile(&self) -> Reconciliation {
        let evidence = Evidence::gather(&files(self.dir.path()), self.log.clone()).unwrap();
        reconcile(&self.purchases, &Expected::default(), &evidence)
    }

    fn tamper(&self, file: fn(LocalFiles) -> std::path::PathBuf, sql: &str) {
        let connection = connect(&file(files(self.dir.path()))).unwrap();
        connection.pragma_update(None, "foreign_keys", false).unwrap();
        let changed = connection.execute(sql, []).unwrap();
        assert!(changed > 0, "nothing was tampered with");
    }
}

fn files(dir: &Path) -> LocalFiles {
    LocalFiles {
        orders: dir.join("orders.db"),
        payments: dir.join("payments.db"),
        gateway: dir.join("gateway.db"),
        sent: dir.join("sent.db"),
        mailbox: dir.join("mailbox"),
        smtp: false,
    }
}

async fn place(orders: &Store, purchase: &Purchase) -> Order {
    let new = NewOrder {
        customer: purchase.customer.clone(),
        ordered_on: purchase.date,
        cds: purchase.cds,
        cents: purchase.cents,
    };
    let placed = orders.place(purchase.idempotency_key(), new, "t".to_owned(), "p".to_owned()).await.unwrap();
    let waiting = orders.waiting(1).await.unwrap();
    orders.mark_published(vec![(waiting[0].sequence, 0, 0)]).await.unwrap();
    let Placed::Created(order) = placed else { unreachable!("{placed:?}") };
    order
}

async fn pay(gateway: &Gateway, payments: &payment::store::Store, order: &Order) -> Payment {
    let id = order.id.to_string();
    let request =
        ChargeRequest { reference: id.clone(), customer: order.new.customer.clone(), cents: order.new.cents };
    let decision = loop {
        match gateway.charge(&id, request.clone()).await {
            Err(GatewayError::Timeout) => {}
            decision => break decision.unwrap(),
        }
    };
    payments.record(id, Payment { decision, decided_at: "t".to_owned() }).await.unwrap()
}

#[tokio::test]
async fn a_consistent_world_reconciles() {
    let world = World::build().await;
    let found = world.reconcile();
    assert_eq!(found.findings, Vec::<String>::new());
    assert_eq!(found.totals, Totals::of(&world.purchases));
    assert_eq!(found.confirmed + found.cancelled + found.dead_lettered, 60);
    assert_eq!(found.dead_lettered, 1);
    assert!(found.cancelled > 0 && found.retries > 0, "the seed draws neither: {found:?}");
    assert_eq!(found.mails, 60 + 59);
}

#[tokio::test]
async fn a_repeated_event_is_no_finding() {
    let mut world = World::build().await;
    world.log.orders.push(world.log.orders[59].clone());
    let found = world.reconcile();
    assert_eq!(found.findings, Vec::<String>::new());
    assert_eq!(found.repeated_events, 1);
}

#[tokio::test]
async fn a_deleted_mail_is_found() {
    let world = World::build().await;
    let mail = world.log.payments[7].id;
    std::fs::remove_file(world.dir.path().join("mailbox").join(format!("{mail}.eml"))).unwrap();
    let found = world.reconcile();
    assert_eq!((found.lost, found.mails), (1, 118));
    assert!(!found.findings.is_empty());
}

#[tokio::test]
async fn a_doubled_mail_is_found() {
    let world = World::build().await;
    let mailbox = world.dir.path().join("mailbox");
    let mail = mailbox.join(format!("{}.eml", world.log.orders[3].id));
    std::fs::copy(mail, mailbox.join("copy.eml")).unwrap();
    let found = world.reconcile();
    assert_eq!(found.duplicate_mails, 1);
    assert!(!found.findings.is_empty());
}

#[tokio::test]
async fn a_doubled_charge_is_found() {
    let world = World::build().await;
    let again = "INSERT INTO ledger (reference, customer, cents, declined)
                 SELECT reference, customer, cents, declined FROM ledger WHERE declined IS NULL LIMIT 1";
    world.tamper(|files| files.gateway, again);
    let found = world.reconcile();
    assert_eq!((found.duplicate_charges, found.order_violations), (1, 0));
    assert!(!found.findings.is_empty());
}

#[tokio::test]
async fn a_swapped_pair_is_found() {
    let world = World::build().await;
    // The sample is sorted by customer, so its first two lines are one customer's, charged one after the other.
    assert_eq!(world.purchases[0].customer, world.purchases[1].customer);
    world.tamper(|files| files.gateway, "UPDATE ledger SET sequence = -sequence WHERE sequence = 2");
    let found = world.reconcile();
    assert_eq!((found.order_violations, found.lost, found.duplicate_charges), (1, 0, 0));
    assert!(!found.findings.is_empty());
}

#[tokio::test]
async fn anything_else_missing_or_changed_is_found() {
    let world = World::build().await;
    let evidence = Evidence::gather(&files(world.dir.path()), world.log.clone()).unwrap();
    type Change = fn(&mut Evidence);
    let changes: [(&str, Change); 15] = [
        ("an order gone", |e| drop(e.orders.remove(4))),
        ("an order too many", |e| {
            let mut order = e.orders[4].clone();
            order.id = Uuid::from_u128(1);
            order.idempotency_key = "other".to_owned();
            e.orders.push(order);
        }),
        ("an order never settled", |e| e.orders[4].status = Status::Pending),
        ("an order settled otherwise", |e| e.orders[4].status = Status::DeadLettered),
        ("another amount", |e| e.orders[4].new.cents += 1),
        ("an event never published", |e| e.unpublished = 1),
        ("a charge over another amount", |e| e.ledger[4].cents += 1),
        ("a charge gone", |e| drop(e.ledger.remove(4))),
        ("a decline for a charge", |e| e.ledger[4].declined = !e.ledger[4].declined),
        ("a payment gone", |e| drop(e.payments.pop())),
        ("a note of a mail gone", |e| drop(e.sent.pop())),
        ("a mail about nothing", |e| e.mails.push("<x>".to_owned())),
        ("a result gone from the log", |e| drop(e.log.payments.remove(4))),
        ("events in another order", |e| e.log.orders.swap(0, 1)),
        ("a dead letter of another class", |e| e.log.dead_letters[0].1 = "internal".to_owned()),
    ];
    for (what, change) in changes {
        let mut changed = evidence.clone();
        change(&mut changed);
        assert!(
            !reconcile(&world.purchases, &Expected::default(), &changed).findings.is_empty(),
            "not found: {what}"
        );
    }
}
