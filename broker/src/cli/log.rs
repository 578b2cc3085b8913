//! `felucca log`: looking into segment files without a broker.

mod checkpoint;

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, bail};
use bytes::Bytes;
use clap::Subcommand;
use felucca_broker::log::{Inspected, SegmentFile};
use felucca_client::ConsumedRecord;
use felucca_protocol::batch::{self, BatchHeader};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::output::{Format, counted, print_line};
use super::record;

#[derive(Debug, Subcommand)]
pub(super) enum Log {
    /// Print the batches or records of one segment file; changes nothing
    #[command(after_help = "\
A segment is named LOG/TOPIC-ID/PARTITION/BASE-OFFSET-GENERATION.log; `felucca topic list` shows ids. With --records the
topic of a record is its id.

Examples:
  felucca log dump data/log/608b1149-4a94-46bf-ab31-38fd51b8d868/0/00000000000000000000-0.log
  felucca log dump data/log/608b1149-4a94-46bf-ab31-38fd51b8d868/0/00000000000000000000-0.log --records")]
    Dump {
        #[arg(value_name = "FILE")]
        segment: PathBuf,
        /// Print records instead of batches
        #[arg(long)]
        records: bool,
    },
    /// Check every batch of every segment and every row of the checkpoint; changes nothing, fails when something is damaged
    #[command(after_help = "\
What is only in the journal is not looked at. Segments that the newest whole checkpoint knows must be there, and as long as it
says, unless their topic is gone. Bytes at the end of a partition's newest segment that are no whole batch may
be left over from before a crash; they are named and no damage.

Example:
  felucca log verify --data-dir data")]
    Verify {
        /// The broker's data directory
        #[arg(long, value_name = "DIR")]
        data_dir: PathBuf,
    },
}

impl Log {
    pub(super) fn run(self, format: Format) -> anyhow::Result<()> {
        match self {
            Self::Dump { segment, records } => {
                let file = SegmentFile::at(&segment)
                    .with_context(|| format!("{} is no segment of a data directory", segment.display()))?;
                dump(&file, records, format)
            }
            Self::Verify { data_dir } => {
                let files = SegmentFile::list(&data_dir)
                    .with_context(|| format!("cannot read the segments in {}", data_dir.display()))?;
                let checkpoint = checkpoint::verify(&data_dir, format);
                match (checkpoint, verify(&files, format)) {
                    (Err(one), Err(other)) => bail!("{one}; {other}"),
                    (one, other) => one.and(other),
                }
            }
        }
    }
}

fn dump(file: &SegmentFile, records: bool, format: Format) -> anyhow::Result<()> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    let found = file.inspect(|position, header, bytes| {
        if records {
            write_records(&mut out, file, bytes, format)
        } else {
            write_batch(&mut out, position, header, format)
        }
    })?;
    out.flush()?;
    drop(out);
    if let Some(flaw) = found.flaw {
        bail!("{}, position {}: {}", file.path.display(), flaw.position, flaw.reason);
    }
    Ok(())
}

fn write_batch(
    out: &mut impl Write,
    position: u64,
    header: &BatchHeader,
    format: Format,
) -> anyhow::Result<()> {
    let compression = header
        .compression()
        .map_or_else(|error| error.to_string(), |kind| format!("{kind:?}").to_lowercase());
    let (first, last) = (header.base_offset, header.last_offset());
    match format {
        Format::Json => {
            let value = json!({
                "position": position, "base_offset": first, "last_offset": last, "records": header.record_count,
                "bytes": header.length, "epoch": header.partition_epoch, "producer_id": header.producer_id,
                "producer_epoch": header.producer_epoch, "base_sequence": header.base_sequence,
                "max_timestamp": header.max_timestamp, "compression": compression,
            });
            serde_json::to_writer(&mut *out, &value)?;
            out.write_all(b"\n")?;
        }
        Format::Table => writeln!(
            out,
            "{position:>12}  offsets {first} to {last}, {} bytes, epoch {}, producer {} epoch {} sequence {}, {}, {compression}",
            header.length,
            header.partition_epoch,
            header.producer_id,
            header.producer_epoch,
            header.base_sequence,
            record::show_time(header.max_timestamp),
        )?,
    }
    Ok(())
}

fn write_records(
    out: &mut impl Write,
    file: &SegmentFile,
    bytes: &[u8],
    format: Format,
) -> anyhow::Result<()> {
    let topic: Arc<str> = file.partition.topic.to_string().into();
    for one in batch::records(&Bytes::copy_from_slice(bytes))? {
        let one = one?;
        let record = ConsumedRecord {
            topic: topic.clone(),
            partition: file.partition.partition,
            offset: one.offset,
            timestamp: one.timestamp,
            key: one.key,
            value: one.value,
            headers: one.headers,
        };
        record::write(out, &record, format)?;
    }
    Ok(())
}

fn verify(files: &[SegmentFile], format: Format) -> anyhow::Result<()> {
    let sizes = files.iter().map(|file| std::fs::metadata(&file.path).map_or(0, |found| found.len()));
    let shown = format == Format::Table && io::stderr().is_terminal();
    let progress = if shown { ProgressBar::new(sizes.sum()) } else { ProgressBar::hidden() };
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}") {
        progress.set_style(style);
    }
    let mut damaged = 0;
    let mut total = (0, 0);
    let mut before: Option<(&SegmentFile, u64)> = None;
    for file in files {
        let found = file.inspect(|_, header, _| {
            progress.inc(u64::from(header.length));
            Ok::<_, io::Error>(())
        });
        let found = found.with_context(|| format!("cannot read {}", file.path.display()))?;
        let mut problems = problems(file, &found);
        if let Some((earlier, end)) = before.filter(|(earlier, _)| earlier.partition == file.partition)
            && end > file.base_offset
        {
            problems
                .push((true, format!("begins at {}, within {}", file.base_offset, earlier.path.display())));
        }
        damaged += u64::from(problems.iter().any(|(damage, _)| *damage));
        total = (total.0 + found.batches, total.1 + found.records);
        before = Some((file, found.end_offset));
        progress.suspend(|| report(file, &found, &problems, format))?;
    }
    progress.finish_and_clear();
    if format == Format::Table {
        let batches = if total.0 == 1 { "1 batch".to_owned() } else { format!("{} batches", total.0) };
        let (segments, records) = (counted(files.len() as u64, "segment"), counted(total.1, "record"));
        print_line(&format!("{segments}, {batches}, {records}"))?;
    }
    if damaged > 0 {
        bail!("{}", are_damaged(damaged, "segment"));
    }
    Ok(())
}

fn are_damaged(count: u64, what: &str) -> String {
    let verb = if count == 1 { "is" } else { "are" };
    format!("{} {verb} damaged", counted(count, what))
}

/// What is to be said of a segment, and whether it is damage.
fn problems(file: &SegmentFile, found: &Inspected) -> Vec<(bool, String)> {
    let mut problems = Vec::new();
    if let Some(flaw) = &found.flaw {
        let what = format!("position {}, offset {}: {}", flaw.position, found.end_offset, flaw.reason);
        if found.is_damaged(file.newest) {
            problems.push((true, what));
        } else {
            problems.push((
                false,
                format!("{} bytes at the end are no whole batch ({what})", found.bytes - flaw.position),
            ));
        }
    }
    problems
        .extend(found.index.iter().map(|reason| (false, format!("index: {reason}; it will be made again"))));
    problems
}

fn report(
    file: &SegmentFile,
    found: &Inspected,
    problems: &[(bool, String)],
    format: Format,
) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match format {
        Format::Json => {
            let (damage, notes): (Vec<_>, Vec<_>) = problems.iter().partition(|(damage, _)| *damage);
            let texts =
                |of: Vec<&(bool, String)>| of.into_iter().map(|(_, text)| text.clone()).collect::<Vec<_>>();
            let value = json!({
                "file": file.path, "topic_id": file.partition.topic.to_string(), "partition": file.partition.partition,
                "base_offset": file.base_offset, "end_offset": found.end_offset, "batches": found.batches,
                "records": found.records, "bytes": found.bytes, "damage": texts(damage), "notes": texts(notes),
            });
            serde_json::to_writer(&mut out, &value)?;
            out.write_all(b"\n")
        }
        Format::Table => {
            for (damage, text) in problems {
                let what = if *damage { "DAMAGED" } else { "note" };
                writeln!(out, "{what}  {}: {text}", file.path.display())?;
            }
            Ok(())
        }
    }
}
