//! How far the run is, as the broker and the order service tell it, and its display.

use std::io::IsTerminal as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use felucca_client::{Admin, Client};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::watch;

use super::supervise::Fleet;
use crate::input::thousands;
use crate::order::OrderList;
use crate::order::store::Status;
use crate::topology;

const LOOK_AT_ORDERS_EVERY: Duration = Duration::from_millis(50);
const LOOK_AT_GROUPS_EVERY: Duration = Duration::from_millis(250);
/// Between two lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(2);

/// What can be seen of the run at one moment. Only for display, pace and patience; what counts is reconciled later.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Snapshot {
    pub(crate) purchases: usize,
    pub(crate) placed: usize,
    pub(crate) pending: u64,
    pub(crate) confirmed: u64,
    pub(crate) cancelled: u64,
    pub(crate) dead_lettered: u64,
    pub(crate) retries: u64,
    pub(crate) mails: u64,
    /// Records that the groups have not settled yet.
    pub(crate) lag: u64,
    pub(crate) kills: u64,
}

impl Snapshot {
    pub(crate) fn settled(&self) -> usize {
        (self.confirmed + self.cancelled + self.dead_lettered) as usize
    }

    /// From 0 to 1, placing and settling being half the way each.
    pub(crate) fn fraction(&self) -> f64 {
        (self.placed + self.settled()) as f64 / (2 * self.purchases.max(1)) as f64
    }
}

/// Keeps a [`Snapshot`] up to date.
#[derive(Debug)]
pub(crate) struct Watcher {
    pub(crate) fleet: Arc<Fleet>,
    pub(crate) http: reqwest::Client,
    pub(crate) client: Client,
    /// Counted by those who place them.
    pub(crate) placed: Arc<AtomicUsize>,
    pub(crate) snapshot: watch::Sender<Snapshot>,
}

impl Watcher {
    /// Looks until it is dropped or a process ends by itself; whoever does not answer is asked again later.
    pub(crate) async fn run(&self) -> anyhow::Result<()> {
        tokio::select! {
            ended = self.watch_orders() => ended,
            () = self.watch_groups() => Ok(()),
        }
    }

    async fn watch_orders(&self) -> anyhow::Result<()> {
        let url = format!("{}/orders?limit=0", self.fleet.order_url);
        loop {
            self.fleet.check()?;
            let list =
                async { self.http.get(&url).send().await?.error_for_status()?.json::<OrderList>().await };
            let list = list.await.ok();
            self.snapshot.send_modify(|snapshot| {
                snapshot.placed = self.placed.load(Ordering::Relaxed);
                snapshot.kills = self.fleet.all_kills();
                if let Some(OrderList { totals, .. }) = list {
                    let count = |status: Status| totals.get(status.name()).copied().unwrap_or_default();
                    snapshot.pending = count(Status::Pending);
                    snapshot.confirmed = count(Status::Confirmed);
                    snapshot.cancelled = count(Status::Cancelled);
                    snapshot.dead_lettered = count(Status::DeadLettered);
                }
            });
            tokio::time::sleep(LOOK_AT_ORDERS_EVERY).await;
        }
    }

    async fn watch_groups(&self) {
        let admin = self.client.admin();
        loop {
            if let Ok(groups) = Groups::look(&admin).await {
                self.snapshot.send_modify(|snapshot| {
                    snapshot.retries = groups.retries;
                    snapshot.mails = groups.mails;
                    snapshot.lag = groups.lag;
                });
            }
            tokio::time::sleep(LOOK_AT_GROUPS_EVERY).await;
        }
    }
}

/// What the broker says about the groups.
#[derive(Clone, Copy, Debug, Default)]
struct Groups {
    retries: u64,
    mails: u64,
    lag: u64,
}

impl Groups {
    /// Asks for payment before email: when payment's lag is 0, nothing more can come to email from there.
    async fn look(admin: &Admin) -> Result<Self, felucca_client::Error> {
        let payment = admin.describe_group(topology::PAYMENT_GROUP).await?;
        let email = admin.describe_group(topology::EMAIL_GROUP).await?;
        Ok(Self {
            retries: payment.partitions.iter().map(|partition| partition.failures).sum(),
            mails: email.partitions.iter().map(|partition| partition.acked).sum(),
            lag: payment.partitions.iter().chain(&email.partitions).map(|partition| partition.lag).sum(),
        })
    }
}

/// Waits until every order is settled and the groups have nothing left, or until nothing has moved for `patience`;
/// tells which of the two.
pub(crate) async fn until_quiet(
    client: &Client,
    mut progress: watch::Receiver<Snapshot>,
    patience: Duration,
) -> bool {
    let admin = client.admin();
    let mut last = progress.borrow().clone();
    let mut moved = Instant::now();
    while moved.elapsed() < patience {
        let now = progress.borrow_and_update().clone();
        if now.placed >= now.purchases
            && now.settled() >= now.purchases
            && Groups::look(&admin).await.is_ok_and(|groups| groups.lag == 0)
        {
            return true;
        }
        if now != last {
            moved = Instant::now();
            last = now;
        }
        tokio::time::sleep(LOOK_AT_ORDERS_EVERY).await;
    }
    false
}

/// Shows the run: one line that changes on a terminal, a line now and then elsewhere.
pub(crate) async fn display(mut progress: watch::Receiver<Snapshot>) {
    let bar = std::io::stderr().is_terminal().then(|| {
        let bar = ProgressBar::new(2 * progress.borrow().purchases as u64);
        let style = ProgressStyle::with_template("{spinner} [{elapsed_precise}] {bar:16} {wide_msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar
    });
    loop {
        let snapshot = progress.borrow_and_update().clone();
        match &bar {
            Some(bar) => {
                bar.set_position((snapshot.placed + snapshot.settled()) as u64);
                bar.set_message(line(&snapshot));
                tokio::time::sleep(LOOK_AT_ORDERS_EVERY).await;
            }
            None => {
                super::say(&line(&snapshot));
                tokio::time::sleep(LINE_EVERY).await;
            }
        }
        if progress.changed().await.is_err() {
            break;
        }
    }
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
}

fn line(snapshot: &Snapshot) -> String {
    let kills = if snapshot.kills > 0 { format!(", {} kills", snapshot.kills) } else { String::new() };
    format!(
        "orders {}/{}, payments {} ok {} declined, retries {}, dead letters {}, mails {}, lag {}{kills}",
        thousands(snapshot.placed as u64),
        thousands(snapshot.purchases as u64),
        thousands(snapshot.confirmed),
        thousands(snapshot.cancelled),
        thousands(snapshot.retries),
        thousands(snapshot.dead_lettered),
        thousands(snapshot.mails),
        thousands(snapshot.lag),
    )
}
