//! Which batches of a turn are written to their segments at once, so that the journal needs only to refer to them.
//!
//! A batch in the journal is written twice: there, and later to its segment. One that the journal refers to is written
//! once, but its segment must be synced with the journal, and a file that grows takes longer for that than the journal,
//! whose files are recycled. So it pays for much in few segments: see [`ReferenceOptions`].
//!
//! Invariant: no more segments than [`ReferenceOptions::segments`] wait for any sync of the journal.

use std::collections::{BTreeMap, BTreeSet};

use felucca_protocol::batch::HEADER_LEN;

use crate::engine::effect::{Effects, SegmentName, SegmentWrite};
use crate::engine::event::{BatchPlace, event::Kind};
use crate::engine::types::{Level, Lsn};
use crate::journal::Outside;
use crate::log::{LogFailure, SegmentWriter};

/// When the journal refers to batches.
#[derive(Clone, Debug)]
pub struct ReferenceOptions {
    /// Least size of such a batch, in bytes.
    pub batch_bytes: u64,
    /// Least bytes of such batches for one segment in a turn whose outcome somebody waits for to be synced.
    pub synced_bytes: u64,
    /// Most segments in a turn, with those of earlier turns that are not synced yet; where there are more, the journal
    /// holds everything.
    pub segments: usize,
}

impl Default for ReferenceOptions {
    fn default() -> Self {
        Self { batch_bytes: 64 << 10, synced_bytes: 128 << 10, segments: 4 }
    }
}

/// Decides turn by turn.
#[derive(Debug)]
pub(super) struct References {
    options: ReferenceOptions,
    /// Segments that frames refer to, and the last such frame; without those known to be synced.
    unsynced: BTreeMap<SegmentName, Lsn>,
}

impl References {
    pub(super) fn new(options: ReferenceOptions) -> Self {
        Self { options, unsynced: BTreeMap::new() }
    }

    /// Writes the batches to refer to and leaves references in their places; answers what the frame `lsn` then rests on.
    /// Frames up to `synced` are.
    ///
    /// # Errors
    /// The log has failed: the shard must stop.
    pub(super) fn refer(
        &mut self,
        effects: &mut Effects,
        log: &SegmentWriter,
        lsn: Lsn,
        synced: Lsn,
    ) -> Result<Outside, LogFailure> {
        self.unsynced.retain(|_, last| *last > synced);
        let mut chosen = choose(effects, log, &self.options);
        let waiting: BTreeSet<&SegmentName> = self.unsynced.keys().chain(chosen.keys()).collect();
        if waiting.len() > self.options.segments {
            chosen.clear();
        }
        self.unsynced.extend(chosen.keys().map(|segment| (*segment, lsn)));
        write_ahead(effects, log, chosen)
    }
}

/// Writes the chosen batches, and shortens them in the frame.
fn write_ahead(
    effects: &mut Effects,
    log: &SegmentWriter,
    chosen: BTreeMap<SegmentName, Vec<usize>>,
) -> Result<Outside, LogFailure> {
    let mut outside = Outside::default();
    for writes in chosen.values() {
        let writes: Vec<&SegmentWrite> = writes.iter().map(|at| &effects.segment_writes[*at]).collect();
        outside.files.extend(log.write_ahead(&writes)?);
        outside.bytes += writes.iter().map(|write| write.length - HEADER_LEN as u64).sum::<u64>();
    }
    let mut stored = chosen.into_values().flatten().collect::<Vec<_>>();
    stored.sort_unstable();
    let mut stored = stored.into_iter().peekable();
    let appended = effects.events.iter_mut().filter_map(|event| match &mut event.kind {
        Some(Kind::Appended(appended)) => Some(appended),
        _ => None,
    });
    let batches = effects.batches.iter_mut().zip(&mut effects.segment_writes);
    for (at, (event, (batch, write))) in appended.zip(batches).enumerate() {
        if stored.next_if_eq(&at).is_some() {
            let SegmentName { base_offset, generation, .. } = write.segment;
            event.place = Some(BatchPlace { base_offset, generation, position: write.position });
            write.stored = true;
            *batch = batch.slice(..HEADER_LEN);
        }
    }
    Ok(outside)
}

/// The writes that are large enough, by segment, as indexes.
fn choose(
    effects: &Effects,
    log: &SegmentWriter,
    options: &ReferenceOptions,
) -> BTreeMap<SegmentName, Vec<usize>> {
    let mut chosen: BTreeMap<SegmentName, Vec<usize>> = BTreeMap::new();
    for (at, write) in effects.segment_writes.iter().enumerate() {
        if write.length >= options.batch_bytes && write.length > HEADER_LEN as u64 {
            chosen.entry(write.segment).or_default().push(at);
        }
    }
    if chosen.is_empty() {
        return chosen;
    }
    let is_awaited = effects.replies.iter().any(|reply| reply.level == Level::Synced);
    chosen.retain(|segment, writes| {
        let bytes: u64 = writes.iter().map(|at| effects.segment_writes[*at].length).sum();
        (!is_awaited || bytes >= options.synced_bytes) && log.knows(*segment)
    });
    chosen
}
