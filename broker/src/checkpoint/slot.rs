//! One of the two checkpoint files: reading, proving and committing rows.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use redb::{
    Builder, Database, ReadTransaction, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition,
};

use super::backend::{DiskBackend, Untouched};
use super::store::Row;
use crate::disk::DiskFile;
use crate::engine::types::Lsn;
use crate::plants::planted;

/// The newest format that this build reads, and the one it writes.
pub(super) const FORMAT: u32 = 1;

const ROWS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("rows");
const RECENT: TableDefinition<'_, &[u8], ()> = TableDefinition::new("recent");
const META: TableDefinition<'_, (), &[u8]> = TableDefinition::new("meta");

const META_BYTES: usize = 64;

/// Number and sum of checksums of a set: it changes when a member is lost, added or altered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Digest {
    count: u64,
    sum: u64,
}

impl Digest {
    fn add(&mut self, crc: u32) {
        self.count += 1;
        self.sum = self.sum.wrapping_add(u64::from(crc));
    }

    fn take(&mut self, crc: u32) {
        // Saturating, because what was there before may have been damaged; the next load then notices.
        self.count = self.count.saturating_sub(1);
        self.sum = self.sum.wrapping_sub(u64::from(crc));
    }
}

/// What a file says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Meta {
    pub(super) lsn: Lsn,
    pub(super) previous_lsn: Lsn,
    pub(super) monotonic_ms: u64,
    rows: Digest,
    recent: Digest,
}

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum SlotError {
    #[error("format {0}")]
    NewerFormat(u32),
    #[error("{0}")]
    Bad(String),
    /// The caller's function refused a row.
    #[error(transparent)]
    Refused(Box<dyn std::error::Error + Send + Sync>),
}

fn bad(error: impl std::fmt::Display) -> SlotError {
    SlotError::Bad(error.to_string())
}

impl Meta {
    pub(super) fn row_count(&self) -> u64 {
        self.rows.count
    }

    fn encode(&self) -> [u8; META_BYTES] {
        let mut out = [0; META_BYTES];
        out[..4].copy_from_slice(&FORMAT.to_be_bytes());
        let fields = [
            self.lsn,
            self.previous_lsn,
            self.monotonic_ms,
            self.rows.count,
            self.rows.sum,
            self.recent.count,
            self.recent.sum,
        ];
        for (slot, field) in out[4..60].chunks_exact_mut(8).zip(fields) {
            slot.copy_from_slice(&field.to_be_bytes());
        }
        let crc = crc32fast::hash(&out[..60]);
        out[60..].copy_from_slice(&crc.to_be_bytes());
        out
    }

    fn decode(bytes: &[u8]) -> Result<Self, SlotError> {
        let damaged = || bad("the meta value is damaged");
        let (body, crc) = bytes.split_last_chunk::<4>().ok_or_else(damaged)?;
        if crc32fast::hash(body) != u32::from_be_bytes(*crc) {
            return Err(damaged());
        }
        let (version, fields) = body.split_first_chunk::<4>().ok_or_else(damaged)?;
        let version = u32::from_be_bytes(*version);
        if version > FORMAT {
            return Err(SlotError::NewerFormat(version));
        }
        let mut fields = fields
            .chunks_exact(8)
            .map(|field| field.iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte)));
        let mut next = || fields.next().ok_or_else(damaged);
        Ok(Self {
            lsn: next()?,
            previous_lsn: next()?,
            monotonic_ms: next()?,
            rows: Digest { count: next()?, sum: next()? },
            recent: Digest { count: next()?, sum: next()? },
        })
    }
}

fn row_crc(key: &[u8], value: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(key);
    hasher.update(value);
    hasher.finalize()
}

/// Takes the value out of a stored row, with its checksum.
fn open_row<'v>(key: &[u8], stored: &'v [u8]) -> Result<(u32, &'v [u8]), SlotError> {
    let (crc, value) = stored.split_first_chunk::<4>().ok_or_else(|| bad("a row is cut short"))?;
    let crc = u32::from_be_bytes(*crc);
    if row_crc(key, value) == crc || planted("skip-row-crc") {
        Ok((crc, value))
    } else {
        Err(bad("a row is damaged"))
    }
}

/// The checksum that a stored row states.
fn stated_crc(stored: &[u8]) -> u32 {
    stored.first_chunk::<4>().map_or(0, |crc| u32::from_be_bytes(*crc))
}

/// An open file. redb does not promise to return an error for every damage it meets, so every call into it is guarded
/// against panics, and a panic is damage.
#[derive(Debug)]
pub(super) struct Slot {
    database: Option<Database>,
}

impl Slot {
    /// Opens a file, or makes a store in an empty one.
    pub(super) fn open(file: Arc<dyn DiskFile>, cache_bytes: usize) -> Result<Self, SlotError> {
        Self::with(DiskBackend(file), cache_bytes)
    }

    /// Opens a file without changing it: what is written to it, as when it is opened, stays in memory.
    pub(super) fn look(file: Arc<dyn DiskFile>, cache_bytes: usize) -> Result<Self, SlotError> {
        Self::with(Untouched::new(file).map_err(bad)?, cache_bytes)
    }

    fn with(backend: impl StorageBackend, cache_bytes: usize) -> Result<Self, SlotError> {
        let open = || {
            let mut builder = Builder::new();
            builder.set_cache_size(cache_bytes);
            // Rows have checksums of their own; what redb knows of free pages is read by the next commit only, and damage
            // there makes it panic while it unwinds, which nobody can guard against.
            builder.set_check_integrity_on_open(!planted("skip-row-crc"));
            builder.create_with_backend(backend).map_err(bad)
        };
        Ok(Self { database: Some(guarded(open)?) })
    }

    fn read<R>(&self, work: impl FnOnce(&ReadTransaction) -> Result<R, SlotError>) -> Result<R, SlotError> {
        guarded(|| {
            let database = self.database.as_ref().ok_or_else(|| bad("closed"))?;
            work(&database.begin_read().map_err(bad)?)
        })
    }

    pub(super) fn meta(&self) -> Result<Meta, SlotError> {
        self.read(|transaction| {
            let table = transaction.open_table(META).map_err(bad)?;
            let value = table.get(()).map_err(bad)?.ok_or_else(|| bad("there is no meta value"))?;
            Meta::decode(value.value())
        })
    }

    /// Reads and proves every row and every recent key.
    pub(super) fn verify(&self) -> Result<(), SlotError> {
        let meta = self.meta()?;
        let mut rows = Digest::default();
        self.each_stored(|key, stored| {
            rows.add(open_row(key, stored)?.0);
            Ok(())
        })?;
        let mut recent = Digest::default();
        self.each_recent(|key| {
            recent.add(crc32fast::hash(key));
            Ok(())
        })?;
        if rows != meta.rows || recent != meta.recent {
            return Err(bad(format!(
                "rows are missing or left over: {rows:?} and {recent:?} found, {meta:?} stated"
            )));
        }
        Ok(())
    }

    /// Passes every row to `apply`, in the order of keys.
    pub(super) fn each_row(
        &self,
        mut apply: impl FnMut(&[u8], &[u8]) -> Result<(), SlotError>,
    ) -> Result<(), SlotError> {
        self.each_stored(|key, stored| apply(key, open_row(key, stored)?.1))
    }

    fn each_stored(
        &self,
        mut apply: impl FnMut(&[u8], &[u8]) -> Result<(), SlotError>,
    ) -> Result<(), SlotError> {
        self.read(|transaction| {
            let table = transaction.open_table(ROWS).map_err(bad)?;
            for row in table.iter().map_err(bad)? {
                let (key, stored) = row.map_err(bad)?;
                apply(key.value(), stored.value())?;
            }
            Ok(())
        })
    }

    fn each_recent(&self, mut apply: impl FnMut(&[u8]) -> Result<(), SlotError>) -> Result<(), SlotError> {
        self.read(|transaction| {
            let table = transaction.open_table(RECENT).map_err(bad)?;
            for key in table.iter().map_err(bad)? {
                apply(key.map_err(bad)?.0.value())?;
            }
            Ok(())
        })
    }

    /// Passes what the last commit changed: each key with its value, or `None` when it was removed.
    fn each_recent_row(
        &self,
        mut apply: impl FnMut(&[u8], Option<&[u8]>) -> Result<(), SlotError>,
    ) -> Result<(), SlotError> {
        self.read(|transaction| {
            let rows = transaction.open_table(ROWS).map_err(bad)?;
            let recent = transaction.open_table(RECENT).map_err(bad)?;
            for key in recent.iter().map_err(bad)? {
                let (key, ()) = key.map(|(key, nothing)| (key, nothing.value())).map_err(bad)?;
                match rows.get(key.value()).map_err(bad)? {
                    Some(stored) => apply(key.value(), Some(open_row(key.value(), stored.value())?.1))?,
                    None => apply(key.value(), None)?,
                }
            }
            Ok(())
        })
    }

    /// Commits a checkpoint in one transaction, and returns when it is on the device. `newer` is the other file, if it
    /// holds a checkpoint; its last interval is taken over first, or all of it when this file does not stand one commit
    /// behind it (`base` tells).
    pub(super) fn commit(
        &self,
        base: Option<&Meta>,
        newer: Option<(&Self, &Meta)>,
        lsn: Lsn,
        monotonic_ms: u64,
        rows: &[Row],
    ) -> Result<Meta, SlotError> {
        guarded(|| {
            let database = self.database.as_ref().ok_or_else(|| bad("closed"))?;
            let mut transaction = database.begin_write().map_err(bad)?;
            // Costs a little more per commit; a start after a crash then need not walk the whole file.
            transaction.set_quick_repair(true);
            transaction.delete_table(RECENT).map_err(bad)?;
            let mut digest = base.map_or(Digest::default(), |meta| meta.rows);
            let mut recent = Digest::default();
            {
                let mut table = transaction.open_table(ROWS).map_err(bad)?;
                let mut put = |key: &[u8], value: Option<&[u8]>| {
                    let before = match value {
                        Some(value) => {
                            let crc = row_crc(key, value);
                            digest.add(crc);
                            let stored = [&crc.to_be_bytes()[..], value].concat();
                            table.insert(key, stored.as_slice()).map_err(bad)?
                        }
                        None => table.remove(key).map_err(bad)?,
                    };
                    if let Some(before) = before {
                        digest.take(stated_crc(before.value()));
                    }
                    Ok(())
                };
                match newer {
                    Some((newer, _)) if base.is_some() => newer.each_recent_row(&mut put)?,
                    Some((newer, _)) => newer.each_row(|key, value| put(key, Some(value)))?,
                    None => {}
                }
                let mut changed = transaction.open_table(RECENT).map_err(bad)?;
                for (key, value) in rows {
                    put(key, value.as_deref())?;
                    if changed.insert(key.as_slice(), ()).map_err(bad)?.is_none() {
                        recent.add(crc32fast::hash(key));
                    }
                }
            }
            let previous_lsn = newer.map_or(0, |(_, meta)| meta.lsn);
            let meta = Meta { lsn, previous_lsn, monotonic_ms, rows: digest, recent };
            transaction.open_table(META).map_err(bad)?.insert((), meta.encode().as_slice()).map_err(bad)?;
            transaction.commit().map_err(bad)?;
            Ok(meta)
        })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // Closing writes; on a damaged file even that may panic, and there is nobody to tell.
        let database = self.database.take();
        drop(catch_unwind(AssertUnwindSafe(|| drop(database))));
    }
}

fn guarded<R>(work: impl FnOnce() -> Result<R, SlotError>) -> Result<R, SlotError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(SlotError::Bad(panic_message(&*panic))))
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("the store panicked")
        .to_owned()
}
