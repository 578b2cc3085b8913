//! The partitions that can be read, by key.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::RwLock;

use super::view::ReadView;
use crate::engine::types::PartitionKey;

/// Locks are split so that creating a topic of many partitions does not hold up every reader.
const SHARDS: usize = 16;

/// Registry of read views. Readers look a partition up once and keep its view; a view that was removed stays valid for
/// those who hold it, but does not grow any more.
#[derive(Debug, Default)]
pub struct Views {
    shards: [RwLock<HashMap<PartitionKey, Arc<ReadView>>>; SHARDS],
}

impl Views {
    fn shard(&self, partition: PartitionKey) -> &RwLock<HashMap<PartitionKey, Arc<ReadView>>> {
        // Topic ids are random, so any of their bytes spreads well; partitions of one topic are spread by number.
        let at = usize::from(partition.topic.0[15]).wrapping_add(partition.partition as usize);
        &self.shards[at % SHARDS]
    }

    pub fn get(&self, partition: PartitionKey) -> Option<Arc<ReadView>> {
        self.shard(partition).read().get(&partition).map(Arc::clone)
    }

    /// Partitions that can be read now, in no order.
    pub fn all(&self) -> Vec<Arc<ReadView>> {
        self.shards
            .iter()
            .flat_map(|shard| shard.read().values().map(Arc::clone).collect::<Vec<_>>())
            .collect()
    }

    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.read().len()).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn insert(&self, view: Arc<ReadView>) {
        self.shard(view.partition()).write().insert(view.partition(), view);
    }

    pub(super) fn remove(&self, partition: PartitionKey) -> Option<Arc<ReadView>> {
        self.shard(partition).write().remove(&partition)
    }
}
