//! What happens on purpose during a run, and which dead letters it may lead to.
//!
//! *Gateway outage*: once a tenth of the orders are settled, the payment gateway cannot be reached for a while. The payment group
//! gives an order up after three failures and tries again after 100 ms, so without the broker's outage guard every order that is
//! tried meanwhile is dead; with it none is. Beside that, one order is poison: the payment service panics on it each time. It must
//! end as the only dead letter of its kind, and neither its customer's later orders nor anybody else's may suffer.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::progress::Snapshot;
use crate::input::Purchase;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Scenario {
    /// The payment gateway cannot be reached for a while, and one order is poison.
    GatewayOutage,
}

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
}

impl ScenarioArgs {
    /// What there is to expect of the purchases under this scenario.
    pub(crate) fn expected(&self, orders: Option<usize>, purchases: &[Purchase]) -> anyhow::Result<Expected> {
        let Some(Scenario::GatewayOutage) = self.scenario else {
            return Ok(Expected { orders, ..Expected::default() });
        };
        let poison = poison(purchases)
            .context("no purchase can be poison: none is followed by another of its customer")?;
        let outage_kills = self.outage_guard == Switch::Off;
        Ok(Expected { orders, poison: Some(poison.line), outage_kills })
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
        }
    }

    /// Lets happen what the scenario has in store; `down` is the file that makes the gateway unreachable.
    pub(crate) async fn play(
        &self,
        down: PathBuf,
        mut progress: watch::Receiver<Snapshot>,
    ) -> anyhow::Result<()> {
        if self.scenario.is_none() {
            return Ok(());
        }
        progress.wait_for(|now| now.settled() * 10 >= now.purchases).await?;
        super::say(&format!("the gateway cannot be reached for {}", humantime::format_duration(self.outage)));
        std::fs::write(&down, []).context("cannot begin the outage")?;
        tokio::time::sleep(self.outage).await;
        std::fs::remove_file(&down).context("cannot end the outage")?;
        super::say("the gateway can be reached again");
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
