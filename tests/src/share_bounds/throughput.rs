//! What one lease and its acknowledgement cost the engine.

use std::time::Duration;

use felucca_broker::engine::command::{Outcome, ScannedRecord, Settlement};
use felucca_broker::engine::config::EngineSettings;
use felucca_broker::engine::share::key_slot;

use super::bench::Bench;

/// Records that a member works on at a time, of all members together.
const IN_FLIGHT: u32 = 4_096;

/// What [`throughput`] is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    pub records: u64,
    pub members: u32,
    /// Keys of a key-ordered group; 0 = unordered.
    pub keys: u32,
    /// Settlements of one request.
    pub per_request: usize,
}

/// What it took.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    pub records: u64,
    /// On the processor, in the engine and for encoding its frames.
    pub time: Duration,
    pub frame_bytes: u64,
}

impl Cost {
    /// Records leased and acknowledged per second of processor time.
    pub fn per_second(&self) -> f64 {
        self.records as f64 / self.time.as_secs_f64()
    }
}

/// Leases and acknowledges every record, as many as fit at a time.
pub fn throughput(load: Load) -> Cost {
    let slots: Vec<u16> = (0..load.keys).map(|key| key_slot(&key.to_be_bytes())).collect();
    let record_at = move |offset: u64| ScannedRecord {
        offset,
        // An odd stride, so that neighbours are of different keys.
        slot: (!slots.is_empty()).then(|| slots[(offset * 7_919 % slots.len() as u64) as usize]),
        size: 100,
    };
    let mut bench = Bench::new(EngineSettings::default(), 1, record_at);
    let ordering = if load.keys > 0 { "key" } else { "none" };
    bench.create_group("pay", &[("ordering", ordering)]);
    bench.append(0, load.records);
    let credit = (IN_FLIGHT / load.members).max(1);
    let members: Vec<String> = (0..load.members).map(|i| format!("member-{i:032}")).collect();
    for (id, member) in (0..).zip(&members) {
        bench.subscribe("pay", id, member, credit);
    }
    bench.engine_time = Duration::ZERO;
    bench.frame_bytes = 0;
    let mut acked = 0;
    while acked < load.records {
        let mut commands = Vec::new();
        let mut settled = 0;
        for (id, member) in (0..).zip(&members) {
            let leases = bench.take_granted(id);
            for some in leases.chunks(load.per_request) {
                let settlements =
                    some.iter().map(|record| Settlement { record: *record, outcome: Outcome::Ack });
                commands.push(Bench::settlement("pay", member, settlements.collect()));
            }
            settled += leases.len() as u64;
            if !leases.is_empty() {
                commands.push(Bench::credit(id, leases.len() as u32));
            }
        }
        acked += settled;
        bench.pass(1);
        bench.turn(commands);
    }
    let left = bench.partition("pay", 0);
    assert_eq!((left.acked, left.lag), (load.records, 0));
    Cost { records: load.records, time: bench.engine_time, frame_bytes: bench.frame_bytes }
}
