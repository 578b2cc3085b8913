//! What compaction may take from a log, and what it must leave.
//!
//! Rules: a record without a key stays; of each key the latest record stays, or it is a tombstone, of whose key nothing
//! is left then. Older records of a key may be there or not: they go when the cleaner comes to it.

use std::collections::{BTreeMap, BTreeSet};

use super::content::Identity;

/// A compacted log that was read in one go, from its start to its end.
#[derive(Debug)]
pub(crate) struct Compacted<'a> {
    /// What was acknowledged or shown, ascending by offset; and whether it is sure to have been there.
    pub(crate) known: Vec<(u64, Identity, bool)>,
    /// What was read.
    pub(crate) found: BTreeMap<u64, Identity>,
    /// Tombstones that may have been there, though nobody was told so.
    pub(crate) unheard: &'a BTreeSet<Identity>,
}

impl Compacted<'_> {
    /// How many tombstones have gone.
    ///
    /// # Errors
    /// What is missing, or back.
    pub(crate) fn check(&self) -> Result<u64, String> {
        let mut latest = BTreeMap::new();
        for (offset, identity, sure) in &self.known {
            match identity.key() {
                Some(key) if *sure => {
                    latest.insert(key, (*offset, *identity));
                }
                None if *sure && !self.found.contains_key(offset) => {
                    return Err(format!("lost: {identity:?} without a key at {offset}"));
                }
                _ => {}
            }
        }
        let left: BTreeMap<_, _> =
            self.found.iter().filter_map(|(offset, identity)| Some((identity.key()?, *offset))).collect();
        let mut gone = 0;
        for (key, (offset, identity)) in latest {
            let left = left.get(&key).copied();
            if left >= Some(offset) || self.may_be_deleted(&key, offset) {
                continue;
            }
            if !identity.is_tombstone() {
                return Err(format!(
                    "lost: the latest of its key, {identity:?} at {offset}; {left:?} is left"
                ));
            }
            if let Some(left) = left {
                return Err(format!("deleted by {identity:?} at {offset}, and back: what is at {left}"));
            }
            gone += 1;
        }
        Ok(gone)
    }

    /// There may be a later tombstone of which it is not sure that it was there.
    fn may_be_deleted(&self, key: &[u8], offset: u64) -> bool {
        let deletes = |identity: &Identity| identity.is_tombstone() && identity.key().as_deref() == Some(key);
        self.unheard.iter().any(deletes)
            || self.known.iter().any(|(at, identity, sure)| *at > offset && !sure && deletes(identity))
    }
}
