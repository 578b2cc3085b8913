//! Acknowledged offsets as the journal keeps them: ranges, and one event for many requests of a frame.

use std::sync::Arc;

use crate::engine::effect::Effects;
use crate::engine::event::{Event, Settled, event::Kind};
use crate::engine::types::{Lsn, PartitionKey};

/// Events that are looked through for one to add to.
const MAX_OPEN: usize = 32;

/// The last events of a frame, as long as they hold nothing but acknowledgements: those of other partitions do not depend
/// on their order, so that one more can be added to any of them.
#[derive(Debug, Default)]
pub(crate) struct OpenAcks {
    lsn: Lsn,
    /// Events of the frame after the last one was added.
    events: usize,
    open: Vec<Open>,
}

#[derive(Debug)]
struct Open {
    event: usize,
    group: Arc<str>,
    partition: PartitionKey,
    /// After the last range.
    end: u64,
}

impl OpenAcks {
    /// Stages acknowledgements that were applied. Answers whether it took an event of its own.
    pub(crate) fn push(
        &mut self,
        out: &mut Effects,
        at: (Lsn, u64),
        group: &Arc<str>,
        partition: PartitionKey,
        acked: &[u64],
    ) -> bool {
        let (lsn, now_ms) = at;
        if self.lsn != lsn || self.events != out.events.len() || self.open.len() >= MAX_OPEN {
            (self.lsn, self.events) = (lsn, out.events.len());
            self.open.clear();
        }
        let is_same = |open: &&mut Open| open.partition == partition && open.group == *group;
        if let Some(open) = self.open.iter_mut().rev().find(is_same)
            && let Some(Event { kind: Some(Kind::Settled(event)) }) = out.events.get_mut(open.event)
            && event.now_ms == now_ms
        {
            open.end = push_ranges(&mut event.acked, open.end, acked);
            return false;
        }
        let mut ranges = Vec::with_capacity(8);
        let end = push_ranges(&mut ranges, 0, acked);
        self.open.push(Open { event: out.events.len(), group: group.clone(), partition, end });
        let event = Settled {
            group: group.to_string(),
            topic_id: partition.topic.0.to_vec(),
            partition: partition.partition,
            acked: ranges,
            now_ms,
            ..Settled::default()
        };
        out.events.push(Event { kind: Some(Kind::Settled(event)) });
        self.events = out.events.len();
        true
    }
}

/// Adds offsets to pairs of a range's distance from the end of the one before (zigzag) and its length. `end` is that of the
/// last range; answers the new one.
pub(crate) fn push_ranges(ranges: &mut Vec<u64>, mut end: u64, offsets: &[u64]) -> u64 {
    for &offset in offsets {
        match ranges.last_mut() {
            Some(length) if offset == end => *length += 1,
            _ => {
                let distance = offset.wrapping_sub(end).cast_signed();
                ranges.extend([((distance << 1) ^ (distance >> 63)).cast_unsigned(), 1]);
            }
        }
        end = offset + 1;
    }
    end
}

/// The offsets in what [`push_ranges`] made. Ranges that no partition can have end the list.
pub(crate) fn offsets(ranges: &[u64]) -> impl Iterator<Item = u64> {
    let mut end = 0_u64;
    ranges
        .chunks_exact(2)
        .map_while(move |range| {
            let distance = (range[0] >> 1).cast_signed() ^ -(range[0] & 1).cast_signed();
            let first = end.checked_add_signed(distance)?;
            end = first.checked_add(range[1])?;
            Some(first..end)
        })
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_in_any_order_survive_as_ranges() {
        let all = [5, 6, 7, 3, 2, 1_000_000, 1_000_001, 0, 1 << 62];
        let mut ranges = Vec::new();
        let end = push_ranges(&mut ranges, 0, &all[..4]);
        push_ranges(&mut ranges, end, &all[4..]);
        assert_eq!(offsets(&ranges).collect::<Vec<_>>(), all);
        assert_eq!(offsets(&[10, 5]).collect::<Vec<_>>(), [5, 6, 7, 8, 9]);
        assert_eq!(offsets(&[3, 5]).count(), 0, "before the beginning");
    }

    #[test]
    fn acks_of_a_frame_share_events_until_something_else_happens() {
        let key = |partition| PartitionKey { topic: crate::engine::types::TopicId([1; 16]), partition };
        let (mut acks, mut out) = (OpenAcks::default(), Effects::default());
        let (a, b): (Arc<str>, Arc<str>) = ("a".into(), "b".into());
        assert!(acks.push(&mut out, (1, 5), &a, key(0), &[1]));
        assert!(acks.push(&mut out, (1, 5), &b, key(0), &[1]));
        assert!(acks.push(&mut out, (1, 5), &a, key(1), &[1]));
        assert!(!acks.push(&mut out, (1, 5), &a, key(0), &[2, 3]));
        let Some(Kind::Settled(event)) = &out.events[0].kind else { panic!() };
        assert_eq!(offsets(&event.acked).collect::<Vec<_>>(), [1, 2, 3]);
        out.events.push(Event::default());
        assert!(acks.push(&mut out, (1, 5), &a, key(0), &[4]));
        assert_eq!(out.events.len(), 5);
        // The next frame has as many events already.
        out.events = vec![Event::default(); 5];
        assert!(acks.push(&mut out, (2, 6), &a, key(0), &[5]));
    }
}
