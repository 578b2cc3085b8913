//! `felucca produce`: lines in, acknowledgements out.
//!
//! Three parties, joined by bounded queues: a thread that reads lines (stdin cannot be waited for without one), a sender that
//! enqueues them, a reporter that prints acknowledgements in the order of the input. Memory is bounded by the producer's
//! buffer, the reader's chunks and [`MAX_WAITING`] acknowledgements.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use clap::{Args, ValueEnum};
use felucca_client::{Ack, Client, Compression, Level, PendingAck, Producer, Record};
use futures::FutureExt;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use tokio::sync::mpsc;

use super::output::{Format, counted, print_line};
use super::parse::{self, Pair};

/// No record may be larger, whatever the broker allows; a line beyond it ends the input with an error.
const MAX_LINE_BYTES: u64 = 64 << 20;
/// Lines are handed on when so many bytes are gathered, or when the input pauses.
const CHUNK_BYTES: usize = 64 << 10;
/// Acknowledgements that are waited for at once.
const MAX_WAITING: usize = 16_384;

#[derive(Debug, Args)]
#[command(after_help = "\
Each line is the value of one record; its end (LF) is not part of it. With --output json every acknowledged record is a line
{\"partition\",\"offset\",\"timestamp\",\"ack\"} in the order of the input, written as soon as it is acknowledged.

Examples:
  echo hello | felucca produce orders
  felucca produce orders --file orders.txt --key-separator : --header source=import
  felucca produce orders --file orders.txt --output json")]
pub(super) struct Produce {
    topic: String,
    /// Read lines from a file instead of stdin
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// What stands before the first of these on a line is the record's key (\t is a tab); every line must have one
    #[arg(long, value_parser = parse::separator, value_name = "TEXT")]
    key_separator: Option<String>,
    /// A header of every record; may be repeated
    #[arg(long = "header", value_name = "NAME=VALUE")]
    headers: Vec<Pair>,
    /// The partition of every record; otherwise chosen by key
    #[arg(long, value_name = "N")]
    partition: Option<u32>,
    /// What an acknowledgement means: synced survives power loss, written (where the topic allows it) a killed broker
    #[arg(long, value_enum, default_value_t = AckLevel::Synced, value_name = "LEVEL")]
    ack: AckLevel,
    /// Compress batches with lz4
    #[arg(long)]
    lz4: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum AckLevel {
    Synced,
    Written,
}

#[derive(Serialize)]
struct Acked {
    partition: u32,
    offset: u64,
    timestamp: i64,
    ack: &'static str,
}

/// A line without its end.
type Line = Vec<u8>;

impl Produce {
    pub(super) async fn run(self, client: Client, format: Format) -> anyhow::Result<()> {
        // Known now rather than with the first line, which may be long in coming.
        client.admin().topic(&self.topic).await?;
        let level = match self.ack {
            AckLevel::Synced => Level::Synced,
            AckLevel::Written => Level::Written,
        };
        let compression = if self.lz4 { Compression::Lz4 } else { Compression::None };
        let producer = client.producer().level(level).compression(compression).build().await?;

        let (waiting, acknowledged) = mpsc::channel(MAX_WAITING);
        let reporter = Reporter::new(&self.topic, self.ack, format, self.file.is_some());
        let chunks = read_lines(self.file.as_deref())?;
        let (sent, reported) =
            futures::join!(self.send(&producer, chunks, waiting), reporter.report(acknowledged));
        // What the broker said about an earlier line explains more than why sending ended.
        reported.and(sent)
    }

    async fn send(
        &self,
        producer: &Producer,
        mut chunks: mpsc::Receiver<io::Result<Vec<Line>>>,
        waiting: mpsc::Sender<(u64, PendingAck)>,
    ) -> anyhow::Result<()> {
        let mut number = 0;
        loop {
            // The reporter drops its end when a record failed; then no more are sent.
            let chunk = tokio::select! {
                biased;
                () = waiting.closed() => return Ok(()),
                chunk = chunks.recv() => chunk,
            };
            let Some(chunk) = chunk else {
                return Ok(());
            };
            for line in chunk.context("cannot read the input")? {
                number += 1;
                let record = self.record(line).with_context(|| format!("line {number}"))?;
                let pending = producer.enqueue(record).await.with_context(|| format!("line {number}"))?;
                if waiting.send((number, pending)).await.is_err() {
                    return Ok(());
                }
            }
        }
    }

    fn record(&self, mut line: Line) -> anyhow::Result<Record> {
        let mut key = None;
        if let Some(separator) = &self.key_separator {
            let separator = separator.as_bytes();
            let Some(at) = line.windows(separator.len()).position(|window| window == separator) else {
                bail!("no key separator {:?}", String::from_utf8_lossy(separator));
            };
            let value = line.split_off(at + separator.len());
            line.truncate(at);
            key = Some(std::mem::replace(&mut line, value));
        }
        let mut record = Record::new(self.topic.as_str(), line);
        if let Some(key) = key {
            record = record.key(key);
        }
        for header in &self.headers {
            record = record.header(&header.key, header.value.clone());
        }
        if let Some(partition) = self.partition {
            record = record.partition(partition);
        }
        Ok(record)
    }
}

/// Starts the thread that reads. It ends with the input, or at the next line after the receiver is dropped.
fn read_lines(file: Option<&Path>) -> anyhow::Result<mpsc::Receiver<io::Result<Vec<Line>>>> {
    let input: Box<dyn Read + Send> = match file {
        Some(path) => Box::new(File::open(path).with_context(|| format!("cannot open {}", path.display()))?),
        None => Box::new(io::stdin()),
    };
    let (sender, receiver) = mpsc::channel(4);
    std::thread::Builder::new().name("felucca-lines".to_owned()).spawn(move || {
        let mut reader = BufReader::with_capacity(CHUNK_BYTES, input);
        loop {
            let chunk = read_chunk(&mut reader);
            let last = !matches!(&chunk, Ok(lines) if !lines.is_empty());
            let nothing_left = matches!(&chunk, Ok(lines) if lines.is_empty());
            if nothing_left || sender.blocking_send(chunk).is_err() || last {
                return;
            }
        }
    })?;
    Ok(receiver)
}

/// The next lines: at least one unless the input ended, and more while they need no waiting.
fn read_chunk(reader: &mut BufReader<impl Read>) -> io::Result<Vec<Line>> {
    let mut lines = VecDeque::new();
    let mut bytes = 0;
    loop {
        let mut line = Vec::new();
        let taken = reader.by_ref().take(MAX_LINE_BYTES + 1).read_until(b'\n', &mut line)?;
        if taken == 0 {
            break;
        }
        if line.last() == Some(&b'\n') {
            line.pop();
        } else if taken as u64 > MAX_LINE_BYTES {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("a line is longer than {MAX_LINE_BYTES} bytes"),
            ));
        }
        bytes += line.len();
        lines.push_back(line);
        if bytes >= CHUNK_BYTES || !reader.buffer().contains(&b'\n') {
            break;
        }
    }
    Ok(lines.into())
}

/// Prints acknowledgements in order.
struct Reporter {
    topic: String,
    ack: &'static str,
    format: Format,
    progress: ProgressBar,
    count: u64,
}

impl Reporter {
    fn new(topic: &str, ack: AckLevel, format: Format, from_file: bool) -> Self {
        let ack = match ack {
            AckLevel::Synced => "synced",
            AckLevel::Written => "written",
        };
        let lines_are_typed = !from_file && io::stdin().is_terminal();
        let shown = format == Format::Table && !lines_are_typed && io::stderr().is_terminal();
        let progress = if shown { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
        if let Ok(style) = ProgressStyle::with_template("{spinner} {human_pos} records, {per_sec}") {
            progress.set_style(style);
        }
        progress.enable_steady_tick(Duration::from_millis(100));
        Self { topic: topic.to_owned(), ack, format, progress, count: 0 }
    }

    /// Ends with the sender, or with the first record that failed once all earlier ones are reported.
    async fn report(mut self, mut acknowledged: mpsc::Receiver<(u64, PendingAck)>) -> anyhow::Result<()> {
        let mut out = io::BufWriter::new(io::stdout().lock());
        let mut failure = None;
        loop {
            let next = match acknowledged.try_recv() {
                Ok(next) => Some(next),
                Err(_) => {
                    out.flush()?;
                    acknowledged.recv().await
                }
            };
            let Some((number, mut pending)) = next else {
                break;
            };
            let result = match (&mut pending).now_or_never() {
                Some(result) => result,
                None => {
                    // Whoever reads our lines must not wait for a line that is acknowledged later.
                    out.flush()?;
                    pending.await
                }
            };
            match result {
                Ok(ack) => self.acknowledged(&mut out, &ack)?,
                Err(error) => {
                    // No further lines are sent; what is under way may still succeed and is then reported.
                    acknowledged.close();
                    failure.get_or_insert_with(|| anyhow!(error).context(format!("line {number}")));
                }
            }
        }
        out.flush()?;
        drop(out);
        self.progress.finish_and_clear();
        if self.format == Format::Table {
            print_line(&format!(
                "{} acknowledged ({}) in topic {}",
                counted(self.count, "record"),
                self.ack,
                self.topic
            ))?;
        }
        failure.map_or(Ok(()), Err)
    }

    fn acknowledged(&mut self, out: &mut impl Write, ack: &Ack) -> io::Result<()> {
        self.count += 1;
        self.progress.inc(1);
        if self.format == Format::Json {
            let ack = match ack.level {
                Level::Synced => Acked {
                    partition: ack.partition,
                    offset: ack.offset,
                    timestamp: ack.timestamp,
                    ack: "synced",
                },
                Level::Written => Acked {
                    partition: ack.partition,
                    offset: ack.offset,
                    timestamp: ack.timestamp,
                    ack: "written",
                },
            };
            serde_json::to_writer(&mut *out, &ack)?;
            out.write_all(b"\n")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(input: &[u8]) -> Vec<Line> {
        let mut reader = BufReader::new(input);
        let mut all = Vec::new();
        loop {
            let chunk = read_chunk(&mut reader).unwrap();
            if chunk.is_empty() {
                return all;
            }
            all.extend(chunk);
        }
    }

    #[test]
    fn lines_end_with_a_line_feed_or_with_the_input() {
        assert_eq!(lines(b""), Vec::<Line>::new());
        assert_eq!(lines(b"a\nb"), [b"a", b"b"]);
        assert_eq!(lines(b"a\n\nb\n"), [b"a".to_vec(), b"".to_vec(), b"b".to_vec()]);
        assert_eq!(lines(b"\xff\r\n"), [b"\xff\r"]);
        let long = vec![b'x'; 3 * CHUNK_BYTES];
        assert_eq!(lines(&[&long[..], b"\n", &long[..]].concat()), [long.clone(), long]);
    }

    #[test]
    fn a_line_beyond_the_limit_is_an_error() {
        let endless = io::repeat(b'x').take(MAX_LINE_BYTES + 1);
        assert!(read_chunk(&mut BufReader::new(endless)).unwrap_err().to_string().contains("67108864"));
    }
}
