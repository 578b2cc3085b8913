//! The three services in one process on a broker of their own, whose clock the tests move: what would take minutes takes
//! milliseconds, and nothing sleeps to wait for a retry.

use std::fmt::Debug;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use felucca_client::{Client, RedriveTarget};
use felucca_testing::TestBroker;
use tempfile::TempDir;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::email::mailbox::{self, Mailbox};
use crate::email::{self, Mails, Route};
use crate::events::{self, TraceParent};
use crate::order::store::{NewOrder, Order, Placed, Status, Store};
use crate::payment::gateway::{self, Gateway};
use crate::payment::service::{self as payment_service, Payments, Poison};
use crate::{database, order, payment, topology};

/// What needs no retry takes far less.
const SOON: Duration = Duration::from_secs(10);
const LONG: Duration = Duration::from_mins(3);

/// A shop with its services and their files.
struct Shop {
    dir: TempDir,
    broker: TestBroker,
    client: Client,
    orders: Store,
    outbox: Arc<Notify>,
    stop: CancellationToken,
    services: Vec<JoinHandle<()>>,
}

impl Shop {
    /// Opened with these settings of the payment group, and all services but payment.
    async fn open(payment: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let broker = TestBroker::start().await.unwrap();
        let client = broker.client().await.unwrap();
        topology::create(&client, payment).await.unwrap();
        let orders = Store::open(&dir.path().join("orders.db")).unwrap();
        let (outbox, stop) = (Arc::new(Notify::new()), CancellationToken::new());
        let mut shop = Self { dir, broker, client, orders, outbox, stop, services: Vec::new() };

        let (client, orders, outbox) = (shop.client.clone(), shop.orders.clone(), shop.outbox.clone());
        let stop = shop.stop.clone();
        let exchange = async move { order::exchange(&client, &orders, outbox, "order", stop).await.unwrap() };
        shop.services.push(tokio::spawn(exchange));
        let route = Route::Mailbox(Mailbox::open(&shop.file("mail")).unwrap());
        let mails = Mails { store: email::store::Store::open(&shop.file("email.db")).unwrap(), route };
        let worker = email::worker(&shop.client, "email".to_owned(), 8).await.unwrap();
        let mailing = mails.work(worker, shop.stop.clone());
        shop.serve(async { mailing.await.map(|_| ()) });
        shop
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The payment service, which works until the token is cancelled.
    async fn pay(&mut self, poison: Option<Poison>) -> CancellationToken {
        let payments = Payments {
            store: payment::store::Store::open(&self.file("payment.db")).unwrap(),
            gateway: Gateway::open(&self.file("gateway.db"), 1).unwrap().steady(true),
            poison,
            bug_cds: None,
        };
        // Each its own member, so that a new one need not wait for the end of the old.
        let member = format!("payment-{}", self.services.len());
        let worker = payment_service::worker(&self.client, member, 8).await.unwrap();
        let stop = self.stop.child_token();
        let paying = payments.work(worker, stop.clone());
        self.serve(async { paying.await.map(|_| ()) });
        stop
    }

    fn serve<E: Debug + Send>(&mut self, service: impl Future<Output = Result<(), E>> + Send + 'static) {
        self.services.push(tokio::spawn(async { service.await.expect("a service works") }));
    }

    fn gateway_is_down(&self, down: bool) {
        let file = gateway::outage_file(&self.file("gateway.db"));
        if down {
            std::fs::write(file, []).unwrap();
        } else {
            std::fs::remove_file(file).unwrap();
        }
    }

    async fn place(&self, customer: &str, cents: u64) -> Uuid {
        let new = NewOrder {
            customer: customer.to_owned(),
            ordered_on: jiff::civil::date(2026, 1, 1),
            cds: 1,
            cents,
        };
        let trace = TraceParent::generate().to_string();
        let key = format!("{customer}-{cents}");
        let placed = self.orders.place(key, new, events::now(), trace).await.unwrap();
        let Placed::Created(order) = placed else { panic!("{placed:?}") };
        self.outbox.notify_one();
        order.id
    }

    async fn order(&self, id: Uuid) -> Order {
        self.orders.order(id).await.unwrap().unwrap()
    }

    /// Waits until the order stands so.
    async fn becomes(&self, id: Uuid, status: Status) -> Order {
        let wait = async {
            loop {
                let order = self.order(id).await;
                if order.status == status {
                    return order;
                }
                sleep(Duration::from_millis(2)).await;
            }
        };
        match timeout(SOON, wait).await {
            Ok(order) => order,
            Err(_) => panic!("not {status:?}: {:?}", self.order(id).await),
        }
    }

    /// Waits until so many mails are out.
    async fn mails(&self, count: usize) {
        let directory = self.file("mail");
        let wait = async {
            while mailbox::message_ids(&directory).unwrap().len() < count {
                sleep(Duration::from_millis(2)).await;
            }
        };
        timeout(SOON, wait).await.expect("the mails in time");
        assert_eq!(mailbox::message_ids(&directory).unwrap().len(), count);
    }

    /// Orders that were charged, one entry for each charge.
    fn charges(&self) -> Vec<String> {
        let ledger = database::connect(&self.file("gateway.db")).unwrap();
        let statement = gateway::statement(&ledger).unwrap();
        statement.into_iter().map(|entry| entry.reference).collect()
    }

    async fn close(self) {
        self.stop.cancel();
        for service in self.services {
            timeout(SOON, service).await.expect("an end in time").unwrap();
        }
        self.broker.shutdown().await;
    }
}

#[tokio::test]
async fn an_order_is_charged_confirmed_and_mailed() {
    let mut shop = Shop::open(&[]).await;
    shop.pay(None).await;
    let id = shop.place("ada", 2_933).await;
    shop.becomes(id, Status::Confirmed).await;
    // That it was created, and that it is paid.
    shop.mails(2).await;
    assert_eq!(shop.charges(), [id.to_string()]);
    shop.close().await;
}

#[tokio::test]
async fn an_outage_of_minutes_gives_no_order_up() {
    let mut shop = Shop::open(&[("max-failures", "3"), ("outage-window", "20")]).await;
    shop.pay(None).await;
    shop.gateway_is_down(true);
    let mut ids = Vec::new();
    for customer in 0..30 {
        ids.push(shop.place(&format!("customer {customer}"), 100).await);
    }
    // All are with the payment group before the outage goes on.
    let waiting = async {
        let lag = |group: felucca_client::GroupDescription| -> u64 {
            group.partitions.iter().map(|partition| partition.lag).sum()
        };
        while lag(shop.client.admin().describe_group(topology::PAYMENT_GROUP).await.unwrap()) < 30 {
            sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(SOON, waiting).await.expect("all orders published");
    shop.broker.advance(LONG).await;
    for &id in &ids {
        assert_eq!(shop.order(id).await.status, Status::Pending);
    }
    shop.gateway_is_down(false);
    shop.broker.advance(LONG).await;
    for &id in &ids {
        let order = shop.order(id).await;
        assert!(matches!(order.status, Status::Confirmed | Status::Cancelled), "{order:?}");
    }
    assert_eq!(shop.charges().len(), 30);
    shop.close().await;
}

#[tokio::test]
async fn a_bug_dead_letters_its_order_alone_and_the_fix_and_a_redrive_complete_it() {
    let mut shop = Shop::open(&[("max-failures", "3")]).await;
    let bug = Poison { customer: "ada".to_owned(), cents: 666 };
    let buggy = shop.pay(Some(bug)).await;
    let poison = shop.place("ada", 666).await;
    let next = shop.place("ada", 100).await;
    let other = shop.place("bob", 100).await;
    shop.becomes(other, Status::Confirmed).await;
    shop.broker.advance(LONG).await;
    let given_up = shop.becomes(poison, Status::DeadLettered).await;
    assert!(given_up.reason.is_some_and(|reason| reason.starts_with("panic:")));
    shop.becomes(next, Status::Confirmed).await;

    buggy.cancel();
    shop.pay(None).await;
    let admin = shop.client.admin();
    let redriven = admin.redrive(topology::PAYMENT_GROUP, topology::ORDERS, RedriveTarget::Group).await;
    assert_eq!(redriven.unwrap().redriven, 1);
    shop.becomes(poison, Status::Confirmed).await;
    assert_eq!(shop.charges().iter().filter(|charge| **charge == poison.to_string()).count(), 1);
    shop.close().await;
}

#[tokio::test]
async fn nothing_is_lost_or_charged_twice_when_broker_and_network_fail() {
    let mut shop = Shop::open(&[]).await;
    shop.pay(None).await;
    let mut ids = Vec::new();
    for order in 0..20 {
        ids.push(shop.place(&format!("customer {}", order % 4), 100 + order).await);
        match order {
            5 => shop.broker.disconnect_clients(),
            10 => shop.broker.kill().await.unwrap(),
            15 => shop.broker.cut_power().await.unwrap(),
            _ => {}
        }
    }
    let settled = || async {
        let totals = shop.orders.totals().await.unwrap();
        totals.iter().all(|(status, _)| *status != Status::Pending)
    };
    let wait = async {
        while !settled().await {
            // What was leased to a connection that is gone comes back when its lease ends.
            shop.broker.advance(Duration::from_secs(10)).await;
        }
    };
    timeout(SOON, wait).await.expect("every order settled");
    let mut charges = shop.charges();
    let mut expected: Vec<String> = ids.iter().map(Uuid::to_string).collect();
    charges.sort();
    expected.sort();
    assert_eq!(charges, expected);
    shop.close().await;
}
