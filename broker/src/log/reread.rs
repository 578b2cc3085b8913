//! What was read from disk for share groups, kept for a while: a scan passes over records that are handed out a little later,
//! and a batch is asked for once by every member that gets some of its records.
//!
//! Kept are whole batches, where most of their records are asked for at a time; or only the places of their records, where it
//! is now and then one of them (the heads of keys that are worked through one after the other lie far apart), so that it can
//! be read without the others.
//!
//! Invariants: a kept batch is whole, in its segment, and was visible; places are those of such a batch. Whoever finds one
//! asks the view whether its offset and its segment are still there: the cleaner may have put another in its place.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use felucca_protocol::batch::{BatchError, RecordPlaces};
use parking_lot::Mutex;

use super::files::SegmentFiles;
use super::lru::Lru;
use super::segment::PlacedBatch;
use crate::engine::effect::SegmentName;
use crate::engine::types::PartitionKey;

/// What a run pins beyond its batches: the rest of the buffer that it was read into.
const SLACK: usize = 64 << 10;

/// A partition and the first offset of what is kept.
type Place = (PartitionKey, u64);

#[derive(Clone, Debug)]
enum Kept {
    /// Batches that were read in one go, without one missing in between.
    Run(Arc<[PlacedBatch]>),
    Places(Arc<BatchPlaces>),
}

/// What the cache has of an offset.
#[derive(Debug)]
pub(super) enum Found {
    Batch(PlacedBatch),
    Places(Arc<BatchPlaces>),
}

impl Found {
    /// Where it was read.
    pub(super) fn segment(&self) -> SegmentName {
        match self {
            Self::Batch(batch) => batch.segment.name(),
            Self::Places(places) => places.segment,
        }
    }
}

/// Where the records of a batch stand in their segment.
#[derive(Debug)]
pub(super) struct BatchPlaces {
    segment: SegmentName,
    position: u64,
    records: RecordPlaces,
}

/// Why records cannot be read at their places.
#[derive(Debug, thiserror::Error)]
pub(super) enum PlacesError {
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Batch(#[from] BatchError),
}

impl BatchPlaces {
    /// Batches with fewer records, or smaller ones, are as well read whole.
    const MIN_RECORDS: u32 = 4;
    const MIN_BYTES: usize = 8 << 10;

    /// `None` when it is better to read the batch whole.
    fn of(batch: &PlacedBatch) -> Option<Self> {
        if batch.bytes.len() < Self::MIN_BYTES {
            return None;
        }
        // Whoever wants a record of a malformed batch finds out by reading it.
        let records = RecordPlaces::of(&batch.bytes).ok().flatten()?;
        let enough = records.header().record_count >= Self::MIN_RECORDS;
        enough.then(|| Self { segment: batch.segment.name(), position: batch.position, records })
    }

    /// The first of the (ascending) `offsets` that are of this batch, and whether it is worth reading them one by one.
    pub(super) fn few<'o>(&self, offsets: &'o [u64]) -> Option<&'o [u64]> {
        let header = self.records.header();
        let within = offsets.partition_point(|offset| *offset <= header.last_offset());
        let few = within as u64 * 4 <= u64::from(header.record_count);
        (few && within > 0).then(|| &offsets[..within])
    }

    /// A batch of the records at `offsets`, all of them of this one. Blocks on the disk.
    ///
    /// # Errors
    /// Also when the file has gone or has changed: the batch is to be read as if nothing had been known.
    pub(super) fn read(&self, files: &SegmentFiles, offsets: &[u64]) -> Result<Bytes, PlacesError> {
        let file = files.open(self.segment)?;
        self.records.filter(offsets, |at, buffer| {
            let wanted = buffer.len();
            let read = file.read_full_at(buffer, self.position + u64::from(at))?;
            if read < wanted {
                Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into())
            } else {
                Ok(())
            }
        })
    }
}

/// What is kept of all partitions, within one limit of bytes.
#[derive(Debug)]
pub(super) struct RereadCache(Mutex<Inner>);

#[derive(Debug)]
struct Inner {
    kept: Lru<Place, (Place, Kept)>,
    places: BTreeSet<Place>,
}

impl RereadCache {
    pub(super) fn new(limit: usize) -> Self {
        Self(Mutex::new(Inner { kept: Lru::new(limit), places: BTreeSet::new() }))
    }

    /// The batch that holds `offset`, or the first above it in the same run; or where its records stand.
    pub(super) fn find(&self, partition: PartitionKey, offset: u64) -> Option<Found> {
        let mut inner = self.0.lock();
        let place = *inner.places.range(..=(partition, offset)).next_back()?;
        if place.0 != partition {
            return None;
        }
        let (_, kept) = inner.kept.get(&place)?;
        drop(inner);
        match kept {
            Kept::Run(run) => {
                let at = run.partition_point(|batch| batch.last_offset < offset);
                run.get(at).cloned().map(Found::Batch)
            }
            Kept::Places(places) => {
                (offset <= places.records.header().last_offset()).then_some(Found::Places(places))
            }
        }
    }

    /// Keeps batches that were read in one go.
    pub(super) fn keep(&self, partition: PartitionKey, batches: &[PlacedBatch]) {
        let Some(first) = batches.first() else { return };
        let weight = SLACK + batches.iter().map(|batch| batch.bytes.len()).sum::<usize>();
        self.insert((partition, first.base_offset), Kept::Run(batches.into()), weight);
    }

    /// Keeps where the records of a batch stand, or the batch where that is better.
    pub(super) fn keep_places(&self, partition: PartitionKey, batch: &PlacedBatch) {
        match BatchPlaces::of(batch) {
            Some(places) => {
                let weight = size_of::<BatchPlaces>() + places.records.memory();
                self.insert((partition, batch.base_offset), Kept::Places(Arc::new(places)), weight);
            }
            None => self.keep(partition, std::slice::from_ref(batch)),
        }
    }

    fn insert(&self, place: Place, kept: Kept, weight: usize) {
        let mut inner = self.0.lock();
        let evicted = inner.kept.insert(place, (place, kept), weight);
        for (evicted, _) in &evicted {
            inner.places.remove(evicted);
        }
        inner.places.insert(place);
        drop(inner);
    }

    /// Frees what is kept of a partition.
    pub(super) fn forget(&self, partition: PartitionKey) {
        let mut inner = self.0.lock();
        let places: Vec<Place> =
            inner.places.range((partition, 0)..=(partition, u64::MAX)).copied().collect();
        let forgotten: Vec<_> = places
            .into_iter()
            .map(|place| {
                inner.places.remove(&place);
                inner.kept.remove(&place)
            })
            .collect();
        drop(inner);
        drop(forgotten);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::engine::effect::SegmentName;
    use crate::engine::types::TopicId;
    use crate::log::segment::Segment;

    fn partition(number: u32) -> PartitionKey {
        PartitionKey { topic: TopicId([1; 16]), partition: number }
    }

    /// Batches of ten offsets each.
    fn run(partition: PartitionKey, base_offset: u64, batches: u64) -> Vec<PlacedBatch> {
        let name = SegmentName { partition, base_offset: 0, generation: 0 };
        let segment = Arc::new(Segment::new(name, 0, u64::MAX, false));
        let batch = |at: u64| PlacedBatch {
            segment: Arc::clone(&segment),
            position: 0,
            base_offset: base_offset + at * 10,
            last_offset: base_offset + at * 10 + 9,
            max_timestamp: 0,
            bytes: Bytes::from(vec![0; 1000]),
            stored: true,
        };
        (0..batches).map(batch).collect()
    }

    fn found(cache: &RereadCache, partition: PartitionKey, offset: u64) -> Option<u64> {
        match cache.find(partition, offset)? {
            Found::Batch(batch) => Some(batch.base_offset),
            Found::Places(places) => Some(places.records.header().base_offset),
        }
    }

    #[test]
    fn a_kept_batch_is_found_by_any_of_its_offsets() {
        let cache = RereadCache::new(1 << 20);
        cache.keep(partition(1), &run(partition(1), 100, 3));
        let expected =
            [(99, None), (100, Some(100)), (109, Some(100)), (110, Some(110)), (129, Some(120)), (130, None)];
        for (offset, base_offset) in expected {
            assert_eq!(found(&cache, partition(1), offset), base_offset, "{offset}");
        }
        assert_eq!(found(&cache, partition(2), 100), None);
        assert_eq!(found(&cache, partition(0), 100), None);
    }

    #[test]
    fn what_was_used_longest_ago_leaves_and_so_does_what_is_gone() {
        let cache = RereadCache::new(3 * (SLACK + 1000));
        for base_offset in [0, 10, 20] {
            cache.keep(partition(1), &run(partition(1), base_offset, 1));
        }
        assert_eq!(found(&cache, partition(1), 0), Some(0));
        cache.keep(partition(2), &run(partition(2), 0, 1));
        assert_eq!(found(&cache, partition(1), 10), None);
        assert_eq!(found(&cache, partition(1), 0), Some(0));
        cache.forget(partition(1));
        assert_eq!((found(&cache, partition(1), 0), found(&cache, partition(2), 0)), (None, Some(0)));
        assert_eq!(cache.0.lock().places.len(), 1);
    }
}
