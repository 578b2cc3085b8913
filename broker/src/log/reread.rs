//! What was read from disk for share groups, kept for a while: a scan passes over records that are handed out a little later,
//! and a batch is asked for once by every member that gets some of its records.
//!
//! Invariants: a kept batch is whole, in its segment, and was visible. Whoever finds one asks the view first whether its
//! offset is still there.

use std::collections::BTreeSet;
use std::sync::Arc;

use parking_lot::Mutex;

use super::lru::Lru;
use super::segment::PlacedBatch;
use crate::engine::types::PartitionKey;

/// What a run pins beyond its batches: the rest of the buffer that it was read into.
const SLACK: usize = 64 << 10;

/// A partition and the first offset of a run.
type Place = (PartitionKey, u64);

/// Batches that were read in one go, without one missing in between.
type Run = Arc<[PlacedBatch]>;

/// The runs of all partitions, within one limit of bytes.
#[derive(Debug)]
pub(super) struct RereadCache(Mutex<Runs>);

#[derive(Debug)]
struct Runs {
    runs: Lru<Place, (Place, Run)>,
    places: BTreeSet<Place>,
}

impl RereadCache {
    pub(super) fn new(limit: usize) -> Self {
        Self(Mutex::new(Runs { runs: Lru::new(limit), places: BTreeSet::new() }))
    }

    /// The batch that holds `offset`, or the first above it in the same run.
    pub(super) fn find(&self, partition: PartitionKey, offset: u64) -> Option<PlacedBatch> {
        let mut kept = self.0.lock();
        let place = *kept.places.range(..=(partition, offset)).next_back()?;
        if place.0 != partition {
            return None;
        }
        let (_, run) = kept.runs.get(&place)?;
        drop(kept);
        let at = run.partition_point(|batch| batch.last_offset < offset);
        run.get(at).cloned()
    }

    /// Keeps batches that were read in one go.
    pub(super) fn keep(&self, partition: PartitionKey, batches: &[PlacedBatch]) {
        let Some(first) = batches.first() else { return };
        let place = (partition, first.base_offset);
        let weight = SLACK + batches.iter().map(|batch| batch.bytes.len()).sum::<usize>();
        let mut kept = self.0.lock();
        let evicted = kept.runs.insert(place, (place, batches.into()), weight);
        for (evicted, _) in &evicted {
            kept.places.remove(evicted);
        }
        kept.places.insert(place);
        drop(kept);
    }

    /// Frees what is kept of a partition that is gone.
    pub(super) fn forget(&self, partition: PartitionKey) {
        let mut kept = self.0.lock();
        let places: Vec<Place> = kept.places.range((partition, 0)..=(partition, u64::MAX)).copied().collect();
        let forgotten: Vec<_> = places
            .into_iter()
            .map(|place| {
                kept.places.remove(&place);
                kept.runs.remove(&place)
            })
            .collect();
        drop(kept);
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
        let segment = Arc::new(Segment::new(name, 0, false));
        let batch = |at: u64| PlacedBatch {
            segment: Arc::clone(&segment),
            position: 0,
            base_offset: base_offset + at * 10,
            last_offset: base_offset + at * 10 + 9,
            max_timestamp: 0,
            bytes: Bytes::from(vec![0; 1000]),
        };
        (0..batches).map(batch).collect()
    }

    fn found(cache: &RereadCache, partition: PartitionKey, offset: u64) -> Option<u64> {
        cache.find(partition, offset).map(|batch| batch.base_offset)
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
