//! `felucca journal repair`.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use felucca_broker::checkpoint::{self, Whole};
use felucca_broker::disk::RealDisk;
use felucca_broker::engine::Engine;
use felucca_broker::engine::config::EngineSettings;
use felucca_broker::engine::event::{self, event::Kind};
use felucca_broker::engine::types::{PartitionKey, TopicId};
use felucca_broker::environment::Environment;
use felucca_broker::journal::{DumpedFrame, Repair};
use felucca_broker::server::DirLock;
use felucca_protocol::batch::BatchHeader;
use prost::Message;
use serde_json::json;

use super::super::output::{Format, counted, print_json, print_line};

/// The newest checkpoint that can be used: what a start begins with.
struct Base {
    lsn: u64,
    /// Names of the topics in it, and of those created since.
    topics: BTreeMap<TopicId, String>,
}

/// What frames that can be read, and are given up, would have done.
#[derive(Debug, Default)]
struct Loss {
    /// Records by partition: the first offset, the one behind the last, and how many.
    records: BTreeMap<PartitionKey, (u64, u64, u64)>,
    /// Other changes, by what they are.
    changes: BTreeMap<String, u64>,
}

pub(super) fn run(data_dir: &Path, accept_loss: bool, format: Format) -> anyhow::Result<()> {
    let _lock = DirLock::take(data_dir)?;
    let mut base = base(data_dir)?;
    let dir = data_dir.join("journal");
    let plan = Repair::plan(Arc::new(RealDisk), &dir, base.lsn)
        .with_context(|| format!("cannot repair the journal in {}", dir.display()))?;
    let Some(plan) = plan else {
        return match format {
            Format::Json => Ok(print_json(&json!({"damaged": false}))?),
            Format::Table => Ok(print_line("the journal is whole: nothing to repair")?),
        };
    };
    let mut loss = Loss::default();
    plan.each_kept(|frame| base.learn(&frame)).context("cannot read on")?;
    plan.each_lost(|frame| {
        base.learn(&frame);
        loss.add(&frame);
    })
    .context("cannot read on")?;
    match format {
        Format::Json => write_json(&base, &plan, &loss)?,
        Format::Table => write_text(&base, &plan, &loss)?,
    }
    if !accept_loss {
        bail!("nothing was changed; repeat with --accept-loss to give this up");
    }
    let kept = plan.apply(&Environment::default())?;
    if format == Format::Table {
        print_line("")?;
        print_line("repaired. The old files are kept:")?;
        for file in kept {
            print_line(&format!("  {}", file.display()))?;
        }
    }
    Ok(())
}

fn base(data_dir: &Path) -> anyhow::Result<Base> {
    let dir = data_dir.join("checkpoint");
    let found = match checkpoint::inspect(&RealDisk, &dir) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", dir.display())),
    };
    let whole = |file: &checkpoint::Inspected| {
        let Whole { lsn, .. } = *file.state.as_ref().ok()?;
        Some((lsn, file.file.clone()))
    };
    let newest: Option<(u64, PathBuf)> = found.iter().filter_map(whole).max();
    match newest {
        Some((lsn, file)) => {
            let mut engine = Engine::new(EngineSettings::default());
            checkpoint::read_rows(&RealDisk, &file, |key, value| engine.restore_row(key, value))
                .with_context(|| format!("cannot read {}", file.display()))?;
            let topics = engine.partitions().map(|info| (info.partition.topic, info.topic)).collect();
            Ok(Base { lsn, topics })
        }
        None if found.is_empty() => Ok(Base { lsn: 0, topics: BTreeMap::new() }),
        None => bail!("no checkpoint can be read: see `felucca log verify`"),
    }
}

impl Base {
    fn learn(&mut self, frame: &DumpedFrame) {
        let events =
            event::Frame::decode(&frame.events[..]).map(|decoded| decoded.events).unwrap_or_default();
        for event in events {
            if let Some(Kind::TopicCreated(created)) = event.kind
                && let Ok(id) = <[u8; 16]>::try_from(&created.id[..])
            {
                self.topics.insert(TopicId(id), created.name);
            }
        }
    }
}

impl Loss {
    fn add(&mut self, frame: &DumpedFrame) {
        let Ok(decoded) = event::Frame::decode(&frame.events[..]) else {
            *self.changes.entry("that cannot be decoded".to_owned()).or_default() += 1;
            return;
        };
        let mut batches = frame.batches.iter();
        for kind in decoded.events.into_iter().filter_map(|event| event.kind) {
            if let Kind::Appended(appended) = &kind {
                let header = batches.next().and_then(|bytes| BatchHeader::parse(bytes).ok());
                let topic = <[u8; 16]>::try_from(&appended.topic_id[..]).ok();
                if let (Some(header), Some(topic)) = (header, topic) {
                    let key = PartitionKey { topic: TopicId(topic), partition: appended.partition };
                    let (first, end) = (header.base_offset, header.last_offset() + 1);
                    let known = self.records.entry(key).or_insert((first, end, 0));
                    *known = (known.0.min(first), known.1.max(end), known.2 + u64::from(header.record_count));
                }
                continue;
            }
            let text = format!("{kind:?}");
            let name = text.split('(').next().unwrap_or_default().to_owned();
            *self.changes.entry(name).or_default() += 1;
        }
    }
}

fn write_text(base: &Base, plan: &Repair, loss: &Loss) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let damage = plan.damage();
    writeln!(out, "{} is damaged at byte {}: {}", damage.file.display(), damage.position, damage.reason)?;
    writeln!(out)?;
    writeln!(
        out,
        "kept: the checkpoint up to frame {}, and {} behind it",
        base.lsn,
        counted(plan.kept(), "frame")
    )?;
    writeln!(out, "lost: frame {} and everything after it", plan.cut())?;
    writeln!(out)?;
    writeln!(out, "what cannot be read:")?;
    for part in plan.unreadable() {
        let what = match (part.lsn, part.bytes) {
            (Some(lsn), Some(bytes)) => format!("frame {lsn}, {bytes} bytes"),
            (_, Some(bytes)) => format!("{bytes} bytes"),
            (_, None) => "the whole file".to_owned(),
        };
        writeln!(out, "  {} at byte {}: {what}", part.file.display(), part.position)?;
    }
    writeln!(out, "what can be read, and is lost with it: {}", counted(plan.lost(), "frame"))?;
    for (key, (first, end, count)) in &loss.records {
        let topic = base.topics.get(&key.topic).cloned().unwrap_or_else(|| key.topic.to_string());
        writeln!(
            out,
            "  {topic}/{}: {} at offsets {first} to {}",
            key.partition,
            counted(*count, "record"),
            end - 1
        )?;
    }
    for (name, count) in &loss.changes {
        writeln!(out, "  {name}: {count}")?;
    }
    Ok(())
}

fn write_json(base: &Base, plan: &Repair, loss: &Loss) -> io::Result<()> {
    let damage = plan.damage();
    let unreadable: Vec<_> = plan
        .unreadable()
        .iter()
        .map(|part| json!({"file": part.file, "position": part.position, "bytes": part.bytes, "lsn": part.lsn}))
        .collect();
    let records: Vec<_> = loss
        .records
        .iter()
        .map(|(key, (first, end, count))| {
            json!({"topic": base.topics.get(&key.topic), "topic_id": key.topic.to_string(), "partition": key.partition,
                "first_offset": first, "last_offset": end - 1, "records": count})
        })
        .collect();
    print_json(&json!({
        "damaged": true, "file": damage.file, "position": damage.position, "reason": damage.reason,
        "checkpoint": base.lsn, "kept_frames": plan.kept(), "first_lost": plan.cut(), "readable_lost_frames": plan.lost(),
        "unreadable": unreadable, "lost_records": records, "lost_changes": loss.changes,
    }))
}
