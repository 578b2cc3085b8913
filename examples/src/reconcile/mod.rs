//! Whether everything adds up: the purchases in the file against every trace that they left.
//!
//! The rules look at [`Evidence`] alone, which is read from where things happened; nothing that the runner counted on
//! its way is believed. Each broken rule is a finding in words; a run reconciles when there is none.

mod evidence;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use uuid::Uuid;

pub(crate) use evidence::{Evidence, LocalFiles, LogEvidence};

use crate::email::message_id;
use crate::events::{Envelope, Event};
use crate::input::{Purchase, Totals};
use crate::order::store::{Order, Status};
use crate::payment::gateway::LedgerEntry;
use crate::runner::scenario::Expected;

/// Class under which the payment service rejects what it cannot charge.
const NOTHING_TO_CHARGE: &str = "invalid-amount";
/// Class of an order on which the payment service panics.
const POISON: &str = "panic";
/// Class of an order that was given up because the gateway could not be reached.
const OUTAGE: &str = "gateway-down";
/// What a dead letter is called among the events of an order.
const DEAD_LETTER: &str = "dead letter";

/// What was found, in numbers and in words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reconciliation {
    /// As the order service has them.
    pub(crate) totals: Totals,
    pub(crate) confirmed: u64,
    pub(crate) cancelled: u64,
    pub(crate) dead_lettered: u64,
    /// By the gateway's ledger.
    pub(crate) charged_cents: u64,
    pub(crate) mails: u64,
    /// Charges beyond the first for an order.
    pub(crate) duplicate_charges: u64,
    /// Mails beyond the first about an event.
    pub(crate) duplicate_mails: u64,
    /// Neighbours in a customer's charges that stand in another order than the purchases.
    pub(crate) order_violations: u64,
    /// Things that should be there and are not: orders, results, charges, events, mails.
    pub(crate) lost: u64,
    /// Calls to the gateway beyond the first for an order.
    pub(crate) retries: u64,
    /// Records in the log that repeat an event; harmless, its readers know them by their id.
    pub(crate) repeated_events: u64,
    pub(crate) findings: Vec<String>,
}

/// Holds the purchases against the evidence.
pub(crate) fn reconcile(purchases: &[Purchase], expected: &Expected, evidence: &Evidence) -> Reconciliation {
    let mut check = Check::new(purchases, expected, evidence);
    check.orders();
    check.charges();
    check.charge_order();
    check.payments();
    check.log();
    check.dead_letters();
    check.mails();
    check.sums();
    check.result
}

/// An order with the purchase that it was placed for.
#[derive(Clone, Copy)]
struct Pair<'a> {
    purchase: &'a Purchase,
    order: &'a Order,
}

struct Check<'a> {
    purchases: &'a [Purchase],
    expected: &'a Expected,
    evidence: &'a Evidence,
    /// By order id, as the services write it.
    pairs: HashMap<Uuid, Pair<'a>>,
    result: Reconciliation,
}

impl<'a> Check<'a> {
    fn new(purchases: &'a [Purchase], expected: &'a Expected, evidence: &'a Evidence) -> Self {
        let retries = evidence.repeated_gateway_calls;
        let result = Reconciliation { retries, ..Reconciliation::default() };
        Self { purchases, expected, evidence, pairs: HashMap::new(), result }
    }

    fn finding(&mut self, text: String) {
        self.result.findings.push(text);
    }

    fn lost(&mut self, text: String) {
        self.result.lost += 1;
        self.finding(text);
    }

    /// Every purchase is one settled order, and there is no other order.
    fn orders(&mut self) {
        let mut by_key: HashMap<&str, Vec<&'a Order>> = HashMap::new();
        for order in &self.evidence.orders {
            by_key.entry(&order.idempotency_key).or_default().push(order);
        }
        for purchase in self.purchases {
            let orders = by_key.remove(purchase.idempotency_key().as_str()).unwrap_or_default();
            let Some(order) = orders.first() else {
                self.lost(format!("line {}: no order", purchase.line));
                continue;
            };
            if orders.len() > 1 {
                self.finding(format!("line {}: {} orders", purchase.line, orders.len()));
            }
            let new = &order.new;
            if (&new.customer, new.ordered_on, new.cds, new.cents)
                != (&purchase.customer, purchase.date, purchase.cds, purchase.cents)
            {
                self.finding(format!("line {}: order {} is for something else", purchase.line, order.id));
            }
            match order.status {
                Status::Pending => self.lost(format!("order {} was never settled", order.id)),
                Status::Confirmed => self.result.confirmed += 1,
                Status::Cancelled => self.result.cancelled += 1,
                Status::DeadLettered => self.result.dead_lettered += 1,
            }
            self.pairs.insert(order.id, Pair { purchase, order });
        }
        for order in by_key.into_values().flatten() {
            self.finding(format!("order {} belongs to no purchase", order.id));
        }
        if self.evidence.unpublished > 0 {
            self.finding(format!("{} events are still in the outbox", self.evidence.unpublished));
        }
    }

    /// Confirmed = charged once; cancelled = declined once; dead-lettered = unknown to the gateway.
    fn charges(&mut self) {
        let mut by_reference: HashMap<&str, (u64, u64)> = HashMap::new();
        for entry in &self.evidence.ledger {
            let (charges, declines) = by_reference.entry(&entry.reference).or_default();
            if entry.declined {
                *declines += 1;
            } else {
                *charges += 1;
                self.result.charged_cents += entry.cents;
            }
            match self.pair_of(entry) {
                Some(pair)
                    if (&pair.purchase.customer, pair.purchase.cents) == (&entry.customer, entry.cents) => {}
                Some(_) => {
                    self.finding(format!("ledger {}: not what order {} is", entry.sequence, entry.reference));
                }
                None => self.finding(format!("ledger {}: no order {}", entry.sequence, entry.reference)),
            }
        }
        let orders: Vec<_> = self.pairs.values().map(|pair| pair.order).collect();
        for order in orders {
            let (charges, declines) = by_reference.remove(order.id.to_string().as_str()).unwrap_or_default();
            if charges > 1 {
                self.result.duplicate_charges += charges - 1;
                self.finding(format!("order {} was charged {charges} times", order.id));
            }
            match order.status {
                Status::Confirmed if charges == 0 => self.lost(format!("order {} has no charge", order.id)),
                Status::Confirmed if declines == 0 => {}
                Status::Cancelled if (charges, declines) == (0, 1) => {}
                Status::DeadLettered | Status::Pending if (charges, declines) == (0, 0) => {}
                status => self.finding(format!(
                    "order {} is {}, with {charges} charges and {declines} declines",
                    order.id,
                    status.name()
                )),
            }
        }
    }

    /// The ledger has every customer's orders in the order of the file.
    fn charge_order(&mut self) {
        let mut last: HashMap<&str, usize> = HashMap::new();
        let mut seen = HashSet::new();
        for entry in &self.evidence.ledger {
            let Some(Pair { purchase, .. }) = self.pair_of(entry) else { continue };
            // Its customer's later orders did not wait for the redrive.
            if self.expected.is_mended(purchase) {
                continue;
            }
            // A second charge is reported as such; it says nothing about the order of the first ones.
            if !seen.insert(&entry.reference) {
                continue;
            }
            if let Some(before) = last.insert(&purchase.customer, purchase.line)
                && before > purchase.line
            {
                self.result.order_violations += 1;
                self.finding(format!("line {before} was charged before line {}", purchase.line));
            }
        }
    }

    fn pair_of(&self, entry: &LedgerEntry) -> Option<Pair<'a>> {
        self.pairs.get(&Uuid::try_parse(&entry.reference).ok()?).copied()
    }

    /// The payment service's own book agrees with the orders.
    fn payments(&mut self) {
        let paid: BTreeMap<_, _> =
            self.evidence.payments.iter().map(|(id, paid)| (id.clone(), *paid)).collect();
        let expected: BTreeMap<_, _> = self
            .pairs
            .values()
            .filter_map(|pair| match pair.order.status {
                Status::Confirmed => Some((pair.order.id.to_string(), true)),
                Status::Cancelled => Some((pair.order.id.to_string(), false)),
                Status::Pending | Status::DeadLettered => None,
            })
            .collect();
        let keys: BTreeSet<_> = paid.keys().chain(expected.keys()).collect();
        for id in keys {
            if paid.get(id) != expected.get(id) {
                self.finding(format!("order {id}: the payment service and the order service disagree"));
            }
        }
    }

    /// The log has what happened to every order, and nothing else.
    fn log(&mut self) {
        let log = &self.evidence.log;
        let mut last: HashMap<&str, usize> = HashMap::new();
        let created = self.distinct(&log.orders, "orders");
        for envelope in &created {
            let Some(Pair { purchase, .. }) = self.pairs.get(&envelope.event.order_id()).copied() else {
                continue;
            };
            if let Some(before) = last.insert(&purchase.customer, purchase.line)
                && before > purchase.line
            {
                self.finding(format!("line {before} was published before line {}", purchase.line));
            }
        }
        let results = self.distinct(&log.payments, "payments");
        let letters: Vec<_> = log.dead_letters.iter().map(|(envelope, _)| envelope.clone()).collect();
        let letters = self.distinct(&letters, "dead letters");

        let mut found: HashMap<Uuid, Vec<&'static str>> = HashMap::new();
        for envelope in created.iter().chain(&results) {
            found.entry(envelope.event.order_id()).or_default().push(envelope.event.type_name());
        }
        for envelope in &letters {
            found.entry(envelope.event.order_id()).or_default().push(DEAD_LETTER);
        }
        let pairs: Vec<_> = self.pairs.values().copied().collect();
        for Pair { purchase, order } in pairs {
            let mut expected = match order.status {
                Status::Pending => vec![Event::ORDER_CREATED],
                Status::Confirmed => vec![Event::ORDER_CREATED, Event::PAYMENT_PROCESSED],
                Status::Cancelled => vec![Event::ORDER_CREATED, Event::PAYMENT_FAILED],
                Status::DeadLettered => vec![Event::ORDER_CREATED, DEAD_LETTER],
            };
            // The letter stays in the log when its record was redriven.
            if order.status != Status::DeadLettered && self.expected.is_mended(purchase) {
                expected.push(DEAD_LETTER);
            }
            let found = found.remove(&order.id).unwrap_or_default();
            for missing in expected.iter().filter(|kind| !found.contains(kind)) {
                self.lost(format!("order {}: no {missing} in the log", order.id));
            }
            for extra in found.iter().filter(|kind| !expected.contains(kind)) {
                self.finding(format!(
                    "order {} is {}, but the log has {extra}",
                    order.id,
                    order.status.name()
                ));
            }
        }
    }

    /// Only what has to be dead is, and for its own reason.
    fn dead_letters(&mut self) {
        let mut of_outage = 0;
        let mut poison_found = false;
        for (envelope, class) in &self.evidence.log.dead_letters {
            let Some(Pair { purchase, order }) = self.pairs.get(&envelope.event.order_id()).copied() else {
                continue;
            };
            let is_poison = Some(purchase.line) == self.expected.poison;
            match class.as_str() {
                NOTHING_TO_CHARGE if purchase.cents == 0 => {}
                POISON if is_poison => poison_found = true,
                POISON if self.expected.is_mended(purchase) && order.status != Status::DeadLettered => {}
                OUTAGE if self.expected.outage_kills && !is_poison => of_outage += 1,
                _ => self.finding(format!("order {} was dead-lettered as `{class}`", order.id)),
            }
        }
        if let Some(line) = self.expected.poison.filter(|_| !poison_found) {
            self.finding(format!("line {line} is poison, and no dead letter"));
        }
        if self.expected.outage_kills && of_outage == 0 {
            self.finding("no order was given up in the outage, though nothing guards against it".to_owned());
        }
    }

    /// The first record of every event; checks that each is about its purchase and that repeats say the same.
    fn distinct(&mut self, envelopes: &[Envelope], place: &str) -> Vec<Envelope> {
        let mut first: HashMap<Uuid, &Envelope> = HashMap::new();
        let mut distinct = Vec::new();
        for envelope in envelopes {
            let event = &envelope.event;
            match self.pairs.get(&event.order_id()) {
                Some(Pair { purchase, .. })
                    if (purchase.customer.as_str(), purchase.cents) == (event.customer(), event.cents()) => {}
                _ => self.finding(format!("{place}: {} {} fits no purchase", event.type_name(), envelope.id)),
            }
            match first.get(&envelope.id) {
                None => {
                    first.insert(envelope.id, envelope);
                    distinct.push(envelope.clone());
                }
                Some(known) => {
                    self.result.repeated_events += 1;
                    if known.event != *event || known.time != envelope.time {
                        self.finding(format!("{place}: event {} says two different things", envelope.id));
                    }
                }
            }
        }
        distinct
    }

    /// One mail about every order and one about every result, each once.
    fn mails(&mut self) {
        let log = &self.evidence.log;
        let about: BTreeSet<Uuid> =
            log.orders.iter().chain(&log.payments).map(|envelope| envelope.id).collect();
        let mut mails: HashMap<&str, u64> = HashMap::new();
        for id in &self.evidence.mails {
            *mails.entry(id).or_default() += 1;
        }
        self.result.mails = self.evidence.mails.len() as u64;
        let noted: HashSet<&str> = self.evidence.sent.iter().map(String::as_str).collect();
        for id in &about {
            match mails.remove(message_id(*id).as_str()) {
                None => self.lost(format!("no mail about event {id}")),
                Some(1) => {}
                Some(copies) => {
                    self.result.duplicate_mails += copies - 1;
                    self.finding(format!("{copies} mails about event {id}"));
                }
            }
            if !noted.contains(id.to_string().as_str()) {
                self.finding(format!("the email service has no note of event {id}"));
            }
        }
        for id in mails.into_keys() {
            self.finding(format!("mail {id} is about no event"));
        }
        if noted.len() != about.len() {
            self.finding(format!("the email service notes {} mails, expected {}", noted.len(), about.len()));
        }
    }

    fn sums(&mut self) {
        let orders = &self.evidence.orders;
        self.result.totals = Totals {
            orders: orders.len() as u64,
            customers: orders.iter().map(|order| &order.new.customer).collect::<HashSet<_>>().len() as u64,
            cds: orders.iter().map(|order| u64::from(order.new.cds)).sum(),
            cents: orders.iter().map(|order| order.new.cents).sum(),
        };
        let confirmed_cents: u64 = orders
            .iter()
            .filter(|order| order.status == Status::Confirmed)
            .map(|order| order.new.cents)
            .sum();
        let expected = Totals::of(self.purchases);
        let found = self.result.clone();
        let settled = found.confirmed + found.cancelled + found.dead_lettered;
        let mails = found.totals.orders + found.confirmed + found.cancelled;
        for (what, found, expected) in [
            ("orders", found.totals.orders, expected.orders),
            ("customers", found.totals.customers, expected.customers),
            ("CDs", found.totals.cds, expected.cds),
            ("cents", found.totals.cents, expected.cents),
            ("settled orders", settled, found.totals.orders),
            ("mails", found.mails, mails),
            ("charged cents", found.charged_cents, confirmed_cents),
        ] {
            if found != expected {
                self.finding(format!("{what}: {found}, expected {expected}"));
            }
        }
    }
}
