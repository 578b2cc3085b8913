//! What there is at the beginning: settings small enough that their limits are met, topics, groups, clients.

use std::time::Duration;

use felucca_broker::engine::command::Command;
use felucca_broker::engine::config::EngineSettings;
use felucca_broker::engine::effect::{Reply, TopicKind};
use felucca_broker::engine::types::{Level, PartitionKey, TopicId};
use felucca_broker::environment::Environment;
use felucca_broker::journal::JournalOptions;
use felucca_broker::log::{LogOptions, ScrubOptions};
use felucca_broker::shard::{CheckpointOptions, ReferenceOptions, RoomOptions, ShardOptions, StorageOptions};

use super::admin::standard;
use super::client::{Client, Role, Target};
use super::consumer::Consumer;
use super::history::Kind;
use super::producer::Producer;
use super::redriver::Redriver;
use super::worker::Worker;
use super::world::World;
use crate::engine_model::rng::Rng;

/// What the consumer group reads.
const READ: &[&str] = &["plain", "fast", "short", "keyed", "mixed"];
/// What each share group works on.
const WORKED_ON: [&[&str]; 3] = [&["plain"], &["fast", "keyed"], &["plain", "short", "mixed"]];

/// Storage that has much to do with little data.
pub(crate) fn storage(rng: &mut Rng, environment: Environment) -> StorageOptions {
    let engine = EngineSettings {
        segment_bytes: 64 << 10,
        retention_interval: Duration::from_secs(1),
        max_pinned_bytes: [1, 4 << 10, 1 << 30][rng.below(3) as usize],
        session_timeout: Duration::from_secs(4),
        max_leases: [6, 100_000][usize::from(rng.chance(80))],
        max_parked_per_slot: [1, 2, 1_000][rng.below(3) as usize],
        ..EngineSettings::default()
    };
    StorageOptions {
        engine,
        journal: JournalOptions {
            first_file_bytes: 8 << 10,
            file_bytes: 64 << 10,
            max_frame_bytes: 160 << 10,
            spare_files: 2,
            background: false,
            environment: environment.clone(),
        },
        log: LogOptions {
            unwritten_bytes: 32 << 10,
            tail_bytes: 8 << 10,
            reread_bytes: 8 << 10,
            index_bytes: 16 << 10,
            open_files: 8,
            disk_reads: 1,
            linger: Duration::from_millis(20),
            background: false,
            environment: environment.clone(),
        },
        shard: ShardOptions {
            max_unsynced_bytes: 32 << 10,
            reference: ReferenceOptions {
                batch_bytes: [200, 1_000, 4_000, u64::MAX][rng.below(4) as usize],
                synced_bytes: [0, 6_000][rng.below(2) as usize],
                segments: [1, 8][rng.below(2) as usize],
            },
        },
        checkpoint: CheckpointOptions {
            interval: Duration::from_millis(rng.between(300, 3_000)),
            journal_bytes: 16 << 10,
        },
        room: RoomOptions::default(),
        scrub: ScrubOptions::default(),
        sync_interval: Duration::from_millis(50),
        environment,
    }
}

impl World {
    /// Starts a broker on an empty disk and makes what the clients need.
    pub(crate) fn set_up(&mut self) {
        assert!(self.start(), "an empty disk");
        let visibility = [Level::Synced, Level::Written][self.rng.below(2) as usize];
        self.create("plain", 2, &[], standard(false, Level::Synced, false));
        let fast = if visibility == Level::Written { "written" } else { "synced" };
        self.create(
            "fast",
            1,
            &[("allow-written", "true"), ("visibility", fast)],
            standard(true, visibility, false),
        );
        self.create("short", 1, &[("retention.ms", "1m")], standard(false, Level::Synced, true));
        self.create_compacted(visibility);
        let done = self.create("done", 1, &[], standard(false, Level::Synced, false));
        self.done = PartitionKey { topic: done, partition: 0 };
        self.create_groups();
        for number in 0..3 {
            let producer = if number < 2 { Producer::idempotent() } else { Producer::anonymous(number) };
            self.add_client(Role::Producer(producer));
        }
        for member in ["ann", "bob"] {
            self.add_client(Role::Consumer(Consumer::new("readers", member, READ)));
        }
        self.add_client(Role::Admin);
        self.network.slow = [0, 20, 60][self.rng.below(3) as usize];
    }

    /// Their places among the targets are known in `content`.
    fn create_compacted(&mut self, visibility: Level) {
        let keep = ["0", "2000"][self.rng.below(2) as usize];
        let mut config = vec![
            ("cleanup.policy", "compact"),
            ("min.cleanable.dirty.ratio", "0"),
            ("delete.retention.ms", keep),
            ("segment.ms", "1s"),
            ("allow-written", "true"),
        ];
        config.extend((visibility == Level::Written).then_some(("visibility", "written")));
        let kind = |allow_written, visibility, retention| Kind::Standard {
            allow_written,
            visibility,
            retention,
            compact: true,
        };
        self.create("keyed", 1, &config, kind(true, visibility, false));
        let config = [
            ("cleanup.policy", "compact,delete"),
            ("retention.ms", "1m"),
            ("min.cleanable.dirty.ratio", "0.2"),
            ("delete.retention.ms", keep),
            ("segment.ms", "1s"),
        ];
        self.create("mixed", 1, &config, kind(false, Level::Synced, true));
    }

    fn add_client(&mut self, role: Role) {
        self.clients.push(Client { role, connection: None, sleeps_until_ms: 0 });
    }

    fn create(&mut self, name: &str, partitions: u32, config: &[(&str, &str)], kind: Kind) -> TopicId {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.rng.bits().to_be_bytes());
        id[8..].copy_from_slice(&self.rng.bits().to_be_bytes());
        let id = TopicId(id);
        let allow_written = matches!(kind, Kind::Standard { allow_written: true, .. });
        let config = config.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let command = Command::CreateTopic { id, name: name.to_owned(), partitions, config };
        let reply = self.ask(command);
        assert!(matches!(reply, Some(Reply::Topic(_))), "{reply:?}");
        for partition in 0..partitions {
            let key = PartitionKey { topic: id, partition };
            self.history.add(key, name, kind.clone());
            if name != "done" {
                self.targets.push(Target { key, allow_written });
            }
            if ["short", "done", "keyed", "mixed"].contains(&name) {
                self.admin.deletable.push((name.to_owned(), key));
            }
        }
        id
    }

    fn create_groups(&mut self) {
        let outcomes = ["dead-letter", "hold", "discard"];
        let first = self.rng.below(3) as usize;
        for (at, topics) in WORKED_ON.iter().enumerate() {
            let group = format!("work{at}");
            let ordered = self.rng.chance(50);
            let on_exhausted = outcomes[(first + at) % 3];
            let mut config = vec![
                ("lease".to_owned(), format!("{}ms", self.rng.between(300, 3_000))),
                ("max-lease".to_owned(), "10s".to_owned()),
                ("backoff-initial".to_owned(), format!("{}ms", self.rng.below(400))),
                ("backoff-max".to_owned(), "1s".to_owned()),
                ("max-failures".to_owned(), self.rng.between(2, 4).to_string()),
                ("on-exhausted".to_owned(), on_exhausted.to_owned()),
                ("ordering".to_owned(), if ordered { "key" } else { "none" }.to_owned()),
            ];
            if self.rng.chance(70) {
                config.push(("outage-guard".to_owned(), "off".to_owned()));
            }
            let topics: Vec<String> = topics.iter().map(|topic| (*topic).to_owned()).collect();
            let command = Command::CreateShareGroup { group: group.clone(), topics, config, from_end: false };
            let reply = self.ask(command);
            assert!(matches!(reply, Some(Reply::Done)), "{reply:?}");
            if ordered {
                self.leases.ordered.insert(group.clone());
            }
            for member in ["cat", "dan"] {
                let number = self.clients.len() as u32;
                self.add_client(Role::Worker(Worker::new(&group, member, number)));
            }
            self.admin.groups.push(group.clone());
        }
        if self.rng.chance(25) {
            self.admin.movable.push(("work1".to_owned(), "fast".to_owned()));
        }
        self.learn_companions();
    }

    /// Topics that came with the groups, and one who redrives.
    fn learn_companions(&mut self) {
        let Some(Reply::Metadata { topics, .. }) = self.ask(Command::Metadata { names: Vec::new() }) else {
            panic!("no topics");
        };
        for topic in &topics {
            let kind = match &topic.kind {
                TopicKind::Standard => continue,
                TopicKind::DeadLetter { .. } => Kind::Letters,
                TopicKind::Redrive { .. } => Kind::Redriven,
            };
            for partition in 0..topic.partitions {
                let key = PartitionKey { topic: topic.id, partition };
                self.history.add(key, &topic.name, kind.clone());
            }
        }
        let Some(Reply::DeadLetters(letters)) = self.ask(Command::ListDeadLetters { group: None }) else {
            panic!("no dead letters");
        };
        for info in letters {
            let target = topics.iter().find(|topic| topic.name == info.redrive_group);
            if let Some(target) = target
                && self.rng.chance(60)
            {
                self.add_client(Role::Redriver(Redriver::new(&info.redrive_group, target.id)));
            }
        }
    }
}
