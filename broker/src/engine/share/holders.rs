//! Who holds how many leases in a group. Derived state: counted anew after a start.

use std::collections::BTreeMap;
use std::sync::Arc;

/// What one member holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Holding {
    pub(crate) leases: u64,
    /// What it holds is to be alone: it gets nothing else.
    pub(crate) alone: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Holders {
    by_member: BTreeMap<Arc<str>, Holding>,
    leases: u64,
}

impl Holders {
    pub(crate) fn of(&self, member: &str) -> Holding {
        self.by_member.get(member).copied().unwrap_or_default()
    }

    /// Leases of all members together.
    pub(crate) fn leases(&self) -> u64 {
        self.leases
    }

    pub(crate) fn granted(&mut self, member: &Arc<str>, alone: bool) {
        let holding = self.by_member.entry(member.clone()).or_default();
        holding.leases += 1;
        self.leases += 1;
        holding.alone |= alone;
    }

    /// A lease of the member ended.
    pub(crate) fn ended(&mut self, member: &str) {
        if let Some(holding) = self.by_member.get_mut(member) {
            holding.leases -= 1;
            self.leases -= 1;
            if holding.leases == 0 {
                self.by_member.remove(member);
            }
        }
    }
}
