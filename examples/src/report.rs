//! The outcome of a run: a table for people, a JSON file for programs.

use std::path::Path;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use crate::input::{Totals, dollars, thousands};
use crate::reconcile::Reconciliation;

/// Findings that are printed; the rest are counted.
const SHOWN_FINDINGS: usize = 20;

/// The JSON report. Its field names are its format.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Report {
    pub(crate) orders: u64,
    pub(crate) customers: u64,
    pub(crate) cds: u64,
    pub(crate) cents: u64,
    pub(crate) confirmed: u64,
    pub(crate) cancelled: u64,
    pub(crate) dead_lettered: u64,
    pub(crate) charged_cents: u64,
    pub(crate) mails: u64,
    pub(crate) duplicate_charges: u64,
    pub(crate) duplicate_mails: u64,
    pub(crate) order_violations: u64,
    pub(crate) lost: u64,
    pub(crate) retries: u64,
    pub(crate) kills: u64,
    pub(crate) seconds: f64,
}

impl Report {
    pub(crate) fn new(found: &Reconciliation, kills: u64, seconds: f64) -> Self {
        Self {
            orders: found.totals.orders,
            customers: found.totals.customers,
            cds: found.totals.cds,
            cents: found.totals.cents,
            confirmed: found.confirmed,
            cancelled: found.cancelled,
            dead_lettered: found.dead_lettered,
            charged_cents: found.charged_cents,
            mails: found.mails,
            duplicate_charges: found.duplicate_charges,
            duplicate_mails: found.duplicate_mails,
            order_violations: found.order_violations,
            lost: found.lost,
            retries: found.retries,
            kills,
            seconds: (seconds * 1_000.0).round() / 1_000.0,
        }
    }

    pub(crate) fn write(&self, path: &Path) -> anyhow::Result<()> {
        let mut json = serde_json::to_vec_pretty(self)?;
        json.push(b'\n');
        std::fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))
    }

    /// The table that ends a run: what was expected beside what was found.
    pub(crate) fn table(&self, expected: Totals) -> String {
        let settled = self.confirmed + self.cancelled + self.dead_lettered;
        let count = thousands;
        let mut table = Table::default();
        table.row("", "expected", "found");
        table.row("orders", &count(expected.orders), &count(self.orders));
        table.row("customers", &count(expected.customers), &count(self.customers));
        table.row("CDs", &count(expected.cds), &count(self.cds));
        table.row("dollars", &dollars(expected.cents), &dollars(self.cents));
        table.row("settled orders", &count(expected.orders), &count(settled));
        table.row("  confirmed", "", &count(self.confirmed));
        table.row("  cancelled", "", &count(self.cancelled));
        table.row("  dead-lettered", "", &count(self.dead_lettered));
        table.row("dollars charged", "", &dollars(self.charged_cents));
        table.row("mails", &count(self.orders + self.confirmed + self.cancelled), &count(self.mails));
        table.row("duplicate charges", "0", &count(self.duplicate_charges));
        table.row("duplicate mails", "0", &count(self.duplicate_mails));
        table.row("order violations", "0", &count(self.order_violations));
        table.row("lost", "0", &count(self.lost));
        table.row("retried charges", "", &count(self.retries));
        table.row("kills", "", &count(self.kills));
        table.row("seconds", "", &format!("{:.1}", self.seconds));
        table.text
    }
}

#[derive(Default)]
struct Table {
    text: String,
}

impl Table {
    fn row(&mut self, name: &str, expected: &str, found: &str) {
        self.text.push_str(&format!("{name:<20} {expected:>14} {found:>14}\n"));
    }
}

/// Findings as lines, the first few of them.
pub(crate) fn findings(findings: &[String]) -> String {
    let mut text = String::new();
    for finding in findings.iter().take(SHOWN_FINDINGS) {
        text.push_str(&format!("  - {finding}\n"));
    }
    if findings.len() > SHOWN_FINDINGS {
        text.push_str(&format!("  … and {} more\n", findings.len() - SHOWN_FINDINGS));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_has_exactly_the_agreed_keys() {
        let json = serde_json::to_value(Report::new(&Reconciliation::default(), 0, 1.23456)).unwrap();
        let mut keys: Vec<_> = json.as_object().unwrap().keys().map(String::as_str).collect();
        keys.sort_unstable();
        let mut expected = [
            "orders",
            "customers",
            "cds",
            "cents",
            "confirmed",
            "cancelled",
            "dead_lettered",
            "charged_cents",
            "mails",
            "duplicate_charges",
            "duplicate_mails",
            "order_violations",
            "lost",
            "retries",
            "kills",
            "seconds",
        ];
        expected.sort_unstable();
        assert_eq!(keys, expected);
        assert_eq!(json["seconds"], 1.235);
    }
}
