//! What happens on purpose during a run, and which dead letters it may lead to.
//!
//! *Gateway outage*: once a tenth of the orders are settled, the payment gateway cannot be reached for a while. The payment group
//! gives an order up after three failures and tries again after 100 ms, so without the broker's outage guard every order that is
//! tried meanwhile is dead; with it none is. Beside that, one order is poison: the payment service panics on it each time. It must
//! end as the only dead letter of its kind, and neither its customer's later orders nor anybody else's may suffer.
//!
//! *Fixed bug*: the payment service panics on every order of more CDs than it can count. When all others are settled and those are
//! dead letters, it is replaced by one without the bug, and a redrive completes them.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::ValueEnum;
use felucca_client::{Client, RedriveTarget};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::timeout;

use super::progress::Snapshot;
use super::supervise::Fleet;
use crate::input::Purchase;
use crate::topology;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Scenario {
    /// The payment gateway cannot be reached for a while, and one order is poison.
    GatewayOutage,
    /// A bug of the payment service makes dead letters; it is mended, and they are redriven.
    FixedBug,
}

/// More CDs than a payment service with the bug can count.
const BUG_CDS: u32 = 5;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    On,
    Off,
}

#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct ScenarioArgs {
    /// Something that happens on purpose.
    #[arg(long)]
    pub(crate) scenario: Option<Scenario>,
    /// How long the gateway cannot be reached.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = humantime::parse_duration, requires = "scenario")]
    outage: Duration,
    /// Whether the payment group has an outage guard; without it the orders of the outage end as dead letters.
    #[arg(long, value_name = "SWITCH", default_value = "on", requires = "scenario")]
    outage_guard: Switch,
}

/// What the run is to be held against, beside its purchases. Kept with the run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Expected {
    /// Purchases of the input that are placed, from the first on; all when it is `None`.
    pub(crate) orders: Option<usize>,
    /// Line of the purchase that is poison.
    pub(crate) poison: Option<usize>,
    /// Orders of an outage end as dead letters: at least one, and any number.
    pub(crate) outage_kills: bool,
    /// Purchases of more CDs than that are given up first, and completed by a redrive.
    pub(crate) bug_cds: Option<u32>,
}

impl Expected {
    /// Whether the purchase is given up first and completed by a redrive.
    pub(crate) fn is_mended(&self, purchase: &Purchase) -> bool {
        purchase.cents > 0 && self.bug_cds.is_some_and(|most| purchase.cds > most)
    }
}

/// What a scenario acts on.
#[derive(Debug)]
pub(crate) struct Stage<'a> {
    pub(crate) fleet: &'a Fleet,
    pub(crate) client: &'a Client,
    pub(crate) purchases: &'a [Purchase],
    pub(crate) expected: &'a Expected,
    /// The file that makes the gateway unreachable.
    pub(crate) down: PathBuf,
    pub(crate) progress: watch::Receiver<Snapshot>,
}

impl ScenarioArgs {
    /// What there is to expect of the purchases under this scenario.
    pub(crate) fn expected(&self, orders: Option<usize>, purchases: &[Purchase]) -> anyhow::Result<Expected> {
        let usual = Expected { orders, ..Expected::default() };
        match self.scenario {
            None => Ok(usual),
            Some(Scenario::GatewayOutage) => {
                let poison = poison(purchases)
                    .context("no purchase can be poison: none is followed by another of its customer")?;
                let outage_kills = self.outage_guard == Switch::Off;
                Ok(Expected { poison: Some(poison.line), outage_kills, ..usual })
            }
            Some(Scenario::FixedBug) => {
                let expected = Expected { bug_cds: Some(BUG_CDS), ..usual };
                anyhow::ensure!(
                    purchases.iter().any(|purchase| expected.is_mended(purchase)),
                    "no purchase meets the bug: none is of more than {BUG_CDS} CDs"
                );
                Ok(expected)
            }
        }
    }

    /// Settings of the payment group, on top of the usual ones.
    pub(crate) fn payment_config(&self) -> Vec<(&'static str, &'static str)> {
        match self.scenario {
            None => Vec::new(),
            Some(Scenario::GatewayOutage) => {
                let guard = if self.outage_guard == Switch::On { "on" } else { "off" };
                // A run of a few hundred orders has little traffic, so the guard looks at few outcomes.
                vec![("max-failures", "3"), ("outage-guard", guard), ("outage-window", "20")]
            }
            Some(Scenario::FixedBug) => vec![("max-failures", "3")],
        }
    }

    /// Lets happen what the scenario has in store.
    pub(crate) async fn play(&self, stage: Stage<'_>) -> anyhow::Result<()> {
        match self.scenario {
            None => Ok(()),
            Some(Scenario::GatewayOutage) => stage.gateway_outage(self.outage).await,
            Some(Scenario::FixedBug) => stage.fixed_bug().await,
        }
    }
}

impl Stage<'_> {
    async fn gateway_outage(mut self, outage: Duration) -> anyhow::Result<()> {
        self.progress.wait_for(|now| now.settled() * 10 >= now.purchases).await?;
        super::say(&format!("the gateway cannot be reached for {}", humantime::format_duration(outage)));
        std::fs::write(&self.down, []).context("cannot begin the outage")?;
        tokio::time::sleep(outage).await;
        std::fs::remove_file(&self.down).context("cannot end the outage")?;
        super::say("the gateway can be reached again");
        Ok(())
    }

    async fn fixed_bug(mut self) -> anyhow::Result<()> {
        let given_up =
            self.purchases.iter().filter(|purchase| self.expected.is_mended(purchase)).count() as u64;
        let all = self.purchases.len();
        let dead = self.progress.wait_for(|now| now.settled() == all).await?.dead_lettered;
        super::say(&format!(
            "{dead} orders are dead letters, {given_up} of them because of a bug; it is mended"
        ));
        self.fleet.deploy_fix().await?;
        let admin = self.client.admin();
        let redriven =
            admin.redrive(topology::PAYMENT_GROUP, topology::ORDERS, RedriveTarget::Group).await?.redriven;
        super::say(&format!("{redriven} orders are redriven"));
        let completed = self.progress.wait_for(|now| now.dead_lettered + given_up <= dead);
        timeout(super::PATIENCE, completed).await.context("the redriven orders are not completed")??;
        Ok(())
    }
}

/// A purchase that is told apart by customer and value, and that its customer follows up with another.
pub(crate) fn poison(purchases: &[Purchase]) -> Option<&Purchase> {
    let mut same: HashMap<(&str, u64), usize> = HashMap::new();
    for purchase in purchases {
        *same.entry((&purchase.customer, purchase.cents)).or_default() += 1;
    }
    purchases.iter().enumerate().find_map(|(index, purchase)| {
        let alone = purchase.cents > 0 && same[&(&*purchase.customer, purchase.cents)] == 1;
        let followed = purchases[index + 1..].iter().any(|later| later.customer == purchase.customer);
        (alone && followed).then_some(purchase)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn poison_is_one_order_with_others_of_its_customer_behind_it() {
        let text = "1 1 19970101 1 1.00\n2 2 19970101 1 0.00\n2 2 19970101 1 3.00\n3 3 19970102 1 4.00\n\
                    1 1 19970102 1 1.00\n3 3 19970102 1 1.00\n";
        let purchases = crate::input::parse(text).unwrap();
        assert_eq!(poison(&purchases).map(|purchase| purchase.line), Some(4));
        assert_eq!(poison(&purchases[..3]), None);
    }
}
