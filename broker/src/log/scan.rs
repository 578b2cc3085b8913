//! Looking at records inside batches: scans for share groups, single records, and lookup by time.
//!
//! Everything here may read the disk and blocks on it; the async forms run on the view's disk threads.

use std::sync::Arc;

use felucca_protocol::batch::{self, BatchError, Record};

use super::error::ReadError;
use super::segment::PlacedBatch;
use super::view::{ReadView, Reader};
use crate::engine::command::ScannedRecord;
use crate::engine::effect::Scan;
use crate::engine::share::key_slot;

/// Bytes read at a time.
const SCAN_BYTES: usize = 1024 * 1024;

/// All records that exist from where the scan began up to `next`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scanned {
    /// Where to go on.
    pub next: u64,
    pub records: Vec<ScannedRecord>,
}

/// Lists the records that `scan` asks for, up to its limit.
///
/// Also those below the log start that are still there: whether they are wanted is for the engine to say. Blocks on the disk.
///
/// # Errors
/// [`ReadError::AboveEnd`] when the scan begins above the high watermark; damage and failures of the disk, unless they
/// come after records that can be given out.
pub fn scan(view: &ReadView, scan: &Scan) -> Result<Scanned, ReadError> {
    // Records of a key wait for one another: far more is scanned than handed out soon.
    let keep = scan.soon;
    let read = |offset| {
        let batches = if keep {
            view.read_kept(offset, SCAN_BYTES)
        } else {
            view.read_placed(Reader::ShareGroup, offset, SCAN_BYTES)
        };
        batches.map(Some)
    };
    // Every read answers, so the scan does.
    scan_with(view, scan, &read).map(Option::unwrap_or_default)
}

/// As [`scan()`], without ever blocking: `None` if the disk would have to be asked before anything can be given out.
///
/// # Errors
/// As [`scan()`], for what is in memory.
pub fn scan_memory(view: &ReadView, scan: &Scan) -> Result<Option<Scanned>, ReadError> {
    scan_with(view, scan, &|offset| view.read_memory(Reader::ShareGroup, offset, SCAN_BYTES))
}

type Read<'a> = dyn Fn(u64) -> Result<Option<Vec<PlacedBatch>>, ReadError> + 'a;

/// `read` gives the batches from an offset on, or `None` where it cannot say.
fn scan_with(view: &ReadView, scan: &Scan, read: &Read<'_>) -> Result<Option<Scanned>, ReadError> {
    let mut scanned = Scanned { next: scan.from, records: Vec::new() };
    while scanned.next < scan.until && scanned.records.len() < scan.max_records {
        let batches = match read(scanned.next) {
            Ok(Some(batches)) => batches,
            Ok(None) if scanned.records.is_empty() => return Ok(None),
            Ok(None) => break,
            Err(_) if !scanned.records.is_empty() => break,
            Err(error) => return Err(error),
        };
        if batches.is_empty() {
            // What is asked for is visible, so there is a hole up to there.
            scanned.next = scan.until.min(view.high_watermark());
            break;
        }
        for batch in &batches {
            if scanned.next >= scan.until || scanned.records.len() >= scan.max_records {
                break;
            }
            match scan_batch(batch, scan, &mut scanned) {
                Ok(()) => {}
                Err(_) if !scanned.records.is_empty() => return Ok(Some(scanned)),
                Err(error) => return Err(corrupt(view, batch, &error)),
            }
        }
    }
    scanned.next = scanned.next.min(scan.until.max(scan.from));
    Ok(Some(scanned))
}

/// Adds the records of one batch. On an error nothing of the batch was added.
fn scan_batch(batch: &PlacedBatch, scan: &Scan, scanned: &mut Scanned) -> Result<(), BatchError> {
    let opened = batch::scan(&batch.bytes)?;
    let known = scanned.records.len();
    for record in &opened {
        let record = match record {
            Ok(record) => record,
            Err(error) => {
                scanned.records.truncate(known);
                return Err(error);
            }
        };
        if record.offset < scanned.next {
            continue;
        }
        if record.offset >= scan.until {
            break;
        }
        if scanned.records.len() >= scan.max_records {
            scanned.next = record.offset;
            return Ok(());
        }
        scanned.records.push(ScannedRecord {
            offset: record.offset,
            slot: record.key.map(key_slot),
            size: record.size,
        });
    }
    scanned.next = batch.last_offset + 1;
    Ok(())
}

/// The record at `offset`, also below the log start if it is kept; `None` if there is no such record (any more). Blocks on the disk.
///
/// # Errors
/// Damage and failures of the disk.
pub fn read_record(view: &ReadView, offset: u64) -> Result<Option<Record>, ReadError> {
    let batches = match view.read_placed(Reader::ShareGroup, offset, 0) {
        Ok(batches) => batches,
        Err(ReadError::AboveEnd { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    let Some(batch) = batches.first() else { return Ok(None) };
    let records = batch::records(&batch.bytes).map_err(|error| corrupt(view, batch, &error))?;
    for record in records {
        let record = record.map_err(|error| corrupt(view, batch, &error))?;
        if record.offset >= offset {
            return Ok(Some(record).filter(|record| record.offset == offset));
        }
    }
    Ok(None)
}

impl ReadView {
    /// As [`scan()`], on one of the view's disk threads. Dropping the future is safe.
    ///
    /// # Errors
    /// As [`scan()`].
    pub async fn scan(self: &Arc<Self>, wanted: Scan) -> Result<Scanned, ReadError> {
        self.on_disk_thread(move |view| scan(view, &wanted)).await
    }

    /// As [`read_record`], on one of the view's disk threads. Dropping the future is safe.
    ///
    /// # Errors
    /// As [`read_record`].
    pub async fn record(self: &Arc<Self>, offset: u64) -> Result<Option<Record>, ReadError> {
        self.on_disk_thread(move |view| read_record(view, offset)).await
    }
}

/// See [`ReadView::offset_for_timestamp`].
pub(super) fn offset_for_timestamp(view: &ReadView, timestamp: i64) -> Result<Option<u64>, ReadError> {
    'again: loop {
        let start = view.log_start();
        let end = view.high_watermark();
        // The tail first: what leaves it meanwhile is found on disk.
        let in_tail = |from| Ok(view.tail().lock().find_timestamp(timestamp, from));
        let mut found = first_at(view, &in_tail, timestamp, start)?;
        for segment in view.segments_from(start) {
            let in_segment = |from| segment.find_timestamp(&view.context().files, timestamp, from);
            match first_at(view, &in_segment, timestamp, start) {
                Ok(None) => {}
                Ok(Some(offset)) => {
                    found = Some(found.map_or(offset, |other| other.min(offset)));
                    break;
                }
                // Its file may have been removed under our hands.
                Err(_) if view.segment(segment.name()).is_none() && !view.is_removed() => continue 'again,
                Err(error) => return Err(error),
            }
        }
        return Ok(found.filter(|offset| *offset < end));
    }
}

/// The first record at or above `from` of at least `timestamp`, in the batches that `next_batch` finds.
fn first_at(
    view: &ReadView,
    next_batch: &dyn Fn(u64) -> Result<Option<PlacedBatch>, ReadError>,
    timestamp: i64,
    mut from: u64,
) -> Result<Option<u64>, ReadError> {
    while let Some(batch) = next_batch(from)? {
        let opened = batch::scan(&batch.bytes).map_err(|error| corrupt(view, &batch, &error))?;
        for record in &opened {
            let record = record.map_err(|error| corrupt(view, &batch, &error))?;
            if record.offset >= from && record.timestamp >= timestamp {
                return Ok(Some(record.offset));
            }
        }
        // The record with the batch's greatest timestamp lies below `from`.
        from = batch.last_offset + 1;
    }
    Ok(None)
}

fn corrupt(view: &ReadView, batch: &PlacedBatch, error: &BatchError) -> ReadError {
    view.context().files.corrupt(batch.segment.name(), batch.position, batch.base_offset, error.to_string())
}
