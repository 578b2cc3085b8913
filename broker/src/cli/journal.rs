//! `felucca journal`: looking into a journal without a broker, and repairing a damaged one.

mod repair;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use clap::Subcommand;
use felucca_broker::disk::RealDisk;
use felucca_broker::engine::event;
use felucca_broker::journal::{Dump, DumpItem, DumpedFile, DumpedFrame, FrameKind, FrameState};
use felucca_protocol::batch::BatchHeader;
use prost::Message;
use serde::Serialize;
use serde_json::json;

use super::output::Format;

#[derive(Debug, Subcommand)]
pub(super) enum Journal {
    /// Print the frames of a journal, damaged ones too; changes nothing
    #[command(after_help = "\
Frames are whole, void (overruled by a later recovery) or damaged. Recovery, not this command, decides what counts.

Examples:
  felucca journal dump --data-dir data
  felucca journal dump --data-dir data --events --output json")]
    Dump {
        /// The broker's data directory
        #[arg(long, value_name = "DIR")]
        data_dir: PathBuf,
        /// Also print the events and batches of each frame
        #[arg(long)]
        events: bool,
    },
    /// Show what a broker that refuses a damaged journal would lose by going on, and do so if told to
    #[command(after_help = "\
Without --accept-loss nothing is changed: the damage is named, and everything that would be lost, as far as it can be
read. With it the journal ends in front of the first frame that is missing, and the old files are kept as *.damaged. The
offsets of lost records are not used again: each partition goes on at least 268,435,456 offsets later. Restore a copy of the data
directory instead, where there is one.

Examples:
  felucca journal repair --data-dir data
  felucca journal repair --data-dir data --accept-loss")]
    Repair {
        /// The broker's data directory
        #[arg(long, value_name = "DIR")]
        data_dir: PathBuf,
        /// Give up what is shown as lost
        #[arg(long)]
        accept_loss: bool,
    },
}

/// A batch in a frame.
#[derive(Serialize)]
struct Batch {
    base_offset: u64,
    records: u32,
    bytes: usize,
    /// Only its header is in the frame.
    in_segment: bool,
}

impl Journal {
    pub(super) fn run(self, format: Format) -> anyhow::Result<()> {
        match self {
            Self::Dump { data_dir, events } => Self::dump(&data_dir, events, format),
            Self::Repair { data_dir, accept_loss } => repair::run(&data_dir, accept_loss, format),
        }
    }

    fn dump(data_dir: &Path, events: bool, format: Format) -> anyhow::Result<()> {
        let dir = data_dir.join("journal");
        let dump = Dump::open(Arc::new(RealDisk), &dir)
            .with_context(|| format!("cannot read the journal in {}", dir.display()))?;
        let mut out = io::BufWriter::new(io::stdout().lock());
        for item in dump {
            let item = item.context("cannot read on")?;
            match format {
                Format::Json => write_json(&mut out, &item, events)?,
                Format::Table => write_text(&mut out, &item, events)?,
            }
        }
        Ok(out.flush()?)
    }
}

fn state(frame: &DumpedFrame) -> &'static str {
    match frame.state {
        FrameState::Whole => "whole",
        FrameState::Damaged => "damaged",
        FrameState::Void => "void",
    }
}

fn kind(frame: &DumpedFrame) -> &'static str {
    match frame.kind {
        FrameKind::Data => "data",
        FrameKind::Mark => "mark",
    }
}

fn events_of(frame: &DumpedFrame) -> Vec<String> {
    match event::Frame::decode(&frame.events[..]) {
        Ok(decoded) => decoded
            .events
            .into_iter()
            .filter_map(|event| event.kind)
            .map(|kind| format!("{kind:?}"))
            .collect(),
        Err(error) => vec![format!("cannot be decoded: {error}")],
    }
}

fn batches_of(frame: &DumpedFrame) -> Vec<Batch> {
    let headers = frame.batches.iter().map(|bytes| (BatchHeader::parse(bytes), bytes.len()));
    headers
        .map(|(header, bytes)| match header {
            Ok(header) => Batch {
                base_offset: header.base_offset,
                records: header.record_count,
                bytes: header.length as usize,
                in_segment: bytes < header.length as usize,
            },
            Err(_) => Batch { base_offset: 0, records: 0, bytes, in_segment: false },
        })
        .collect()
}

fn write_json(out: &mut impl Write, item: &DumpItem, events: bool) -> io::Result<()> {
    let value = match item {
        DumpItem::File(DumpedFile { path, sequence, previous, first_lsn, synced, length }) => {
            json!({"file": path, "sequence": sequence, "previous": previous, "first_lsn": first_lsn, "synced": synced,
                "bytes": length})
        }
        DumpItem::UnreadableFile { path, reason } => json!({"file": path, "unreadable": reason}),
        DumpItem::Gap { path, position, bytes } => json!({"file": path, "position": position, "gap": bytes}),
        DumpItem::Frame(frame) => {
            let mut value = json!({"file": frame.path, "position": frame.position, "bytes": frame.size,
                "kind": kind(frame), "state": state(frame), "lsn": frame.lsn, "synced": frame.synced});
            if events && frame.kind == FrameKind::Data && frame.state != FrameState::Damaged {
                value["events"] = json!(events_of(frame));
                value["batches"] = json!(batches_of(frame));
            }
            value
        }
    };
    serde_json::to_writer(&mut *out, &value)?;
    out.write_all(b"\n")
}

fn write_text(out: &mut impl Write, item: &DumpItem, events: bool) -> io::Result<()> {
    match item {
        DumpItem::File(file) => writeln!(
            out,
            "file {}: continues {}, first lsn {}, synced to {}, {} bytes",
            file.path.display(),
            file.previous,
            file.first_lsn,
            file.synced,
            file.length
        ),
        DumpItem::UnreadableFile { path, reason } => {
            writeln!(out, "file {}: cannot be read: {reason}", path.display())
        }
        DumpItem::Gap { position, bytes, .. } => {
            writeln!(out, "{position:>12}  {bytes} bytes that are no frame")
        }
        DumpItem::Frame(frame) => {
            writeln!(
                out,
                "{:>12}  {} lsn {} synced {} {} {} bytes",
                frame.position,
                kind(frame),
                frame.lsn,
                frame.synced,
                state(frame),
                frame.size
            )?;
            if events && frame.kind == FrameKind::Data && frame.state != FrameState::Damaged {
                for event in events_of(frame) {
                    writeln!(out, "              {event}")?;
                }
                for batch in batches_of(frame) {
                    let Batch { base_offset, records, bytes, in_segment } = batch;
                    let place = if in_segment { " in its segment" } else { "" };
                    writeln!(
                        out,
                        "              batch at {base_offset}: {records} records, {bytes} bytes{place}"
                    )?;
                }
            }
            Ok(())
        }
    }
}
