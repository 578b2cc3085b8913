//! What a large data directory costs, of the `felucca` beside this program:
//!
//! ```text
//! cargo build --release -p felucca-broker -p felucca-tests
//! target/release/capacity restart [GIB [DIRECTORY]]
//! target/release/capacity amplification [DIRECTORY [KIB PARTITIONS]]
//! ```
//!
//! `restart`: so many GiB (8 when not said) in segments, 10,000 partitions and 1,000 share groups; how long a start takes after a
//! clean stop and after a kill, and what the broker costs while nobody asks for anything. `amplification`: bytes that reach the
//! device for each byte that is acknowledged, with batches of so many KiB to so many partitions, or with all that the
//! documentation has; nothing else should write to it meanwhile.

use std::error::Error;
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use felucca_client::{Client, Level, Record};
use rustix::fs::{major, minor};
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::sleep;

type Outcome<T> = Result<T, Box<dyn Error>>;

const GROUPS: usize = 1_000;
/// With one partition each of the dead-letter topic and of what is redriven to a group, of every group.
const PARTITIONS: usize = 10_000;
/// Partitions that are written to.
const FILLED: u32 = 16;
const FILL_BYTES: usize = 128 << 10;
/// How long batches of each size are written.
const WRITING: Duration = Duration::from_secs(8);
/// Checkpoints come so soon that the journal uses its files again after what is written first: until then it also fills
/// new ones with zeros.
const SOON: &[&str] = &["--checkpoint-journal-bytes=256MiB"];
const FIRST_BYTES: u64 = 5 << 28;
/// In batches that are too small to be written to their segment only.
const FIRST_BATCH: usize = 16 << 10;
/// KiB of a batch, and partitions.
const BATCHES: &[(usize, u32)] = &[(1, 4), (16, 4), (256, 4), (1, 1_000), (16, 1_000), (256, 1_000)];

#[tokio::main]
async fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut out = io::stdout();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["restart"] => restart(&mut out, 8, &std::env::temp_dir()).await,
        ["restart", gib] => restart(&mut out, gib.parse()?, &std::env::temp_dir()).await,
        ["restart", gib, directory] => restart(&mut out, gib.parse()?, Path::new(directory)).await,
        ["amplification"] => amplification(&mut out, &std::env::temp_dir(), BATCHES).await,
        ["amplification", directory] => amplification(&mut out, Path::new(directory), BATCHES).await,
        ["amplification", directory, kib, partitions] => {
            amplification(&mut out, Path::new(directory), &[(kib.parse()?, partitions.parse()?)]).await
        }
        _ => Err("restart [GIB [DIRECTORY]] or amplification [DIRECTORY [KIB PARTITIONS]]".into()),
    }
}

/// A broker. Killed when dropped.
struct Broker {
    child: Child,
    address: String,
    /// From the beginning of the process to its first line, which says where it listens.
    started_in: Duration,
}

impl Broker {
    /// `settings`: those that are not the default, as flags.
    fn start(data: &Path, settings: &[&str]) -> Outcome<Self> {
        let felucca: PathBuf = std::env::current_exe()?.with_file_name("felucca");
        let began = Instant::now();
        let mut child = Command::new(&felucca)
            .arg("serve")
            .arg("--data-dir")
            .arg(data)
            .args(["--listen", "127.0.0.1:0"])
            .args(settings)
            .env("FELUCCA_LOG", "warn")
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("{}: {error}", felucca.display()))?;
        let stdout = child.stdout.take().ok_or("no output")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        let started_in = began.elapsed();
        let address = line.trim().strip_prefix("listening on ").ok_or("the broker did not start")?.to_owned();
        Ok(Self { child, address, started_in })
    }

    async fn client(&self) -> Outcome<Client> {
        let builder = Client::builder(self.address.as_str());
        Ok(builder.request_timeout(Duration::from_secs(60)).connect().await?)
    }

    /// Ends in order; answers how long that takes.
    fn stop(mut self) -> Outcome<Duration> {
        let began = Instant::now();
        kill_process(Pid::from_child(&self.child), Signal::TERM)?;
        let status = self.child.wait()?;
        if status.success() { Ok(began.elapsed()) } else { Err(status.to_string().into()) }
    }

    /// Resident memory in bytes, open files, and processor time so far.
    fn cost(&self) -> Outcome<(u64, usize, Duration)> {
        let process = PathBuf::from(format!("/proc/{}", self.child.id()));
        let statm = fs::read_to_string(process.join("statm"))?;
        let pages: u64 = statm.split_whitespace().nth(1).ok_or("no resident memory")?.parse()?;
        let stat = fs::read_to_string(process.join("stat"))?;
        let fields = stat.rsplit(") ").next().unwrap_or_default().split_whitespace();
        let ticks: Vec<u64> = fields.skip(11).take(2).map(str::parse).collect::<Result<_, _>>()?;
        let seconds = ticks.iter().sum::<u64>() as f64 / rustix::param::clock_ticks_per_second() as f64;
        let files = fs::read_dir(process.join("fd"))?.count();
        Ok((pages * rustix::param::page_size() as u64, files, Duration::from_secs_f64(seconds)))
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// Batches of one record each, to the partitions in turns.
async fn fill(client: &Client, topic: &str, bytes: u64, batch: usize) -> Outcome<()> {
    let producer = client.producer().level(Level::Written).max_batch_bytes(1).build().await?;
    let value = Bytes::from(vec![b'x'; batch - 512]);
    for number in 0..bytes / batch as u64 {
        let partition = (number % u64::from(FILLED)) as u32;
        let record = Record::new(topic, value.clone()).partition(partition);
        // The flush says whether all of them were taken.
        drop(producer.enqueue(record).await?);
    }
    Ok(producer.flush().await?)
}

async fn restart(out: &mut impl Write, gib: u64, directory: &Path) -> Outcome<()> {
    let data = tempfile::tempdir_in(directory)?;
    let broker = Broker::start(data.path(), &[])?;
    writeln!(out, "start of an empty broker: {:?}", broker.started_in)?;
    let client = broker.client().await?;
    let admin = client.admin();
    let began = Instant::now();
    admin.create_topic("filled", FILLED, &[("allow-written", "true")]).await?;
    admin.create_topic("jobs", 1, &[]).await?;
    for group in 0..GROUPS {
        admin.create_share_group(&format!("group-{group}"), &["jobs"], &[]).await?;
    }
    let mut known: usize = admin.topics().await?.iter().map(|topic| topic.partitions as usize).sum();
    let mut number = 0;
    while known < PARTITIONS {
        let partitions = (PARTITIONS - known).min(100);
        admin.create_topic(&format!("quiet-{number}"), partitions as u32, &[]).await?;
        (known, number) = (known + partitions, number + 1);
    }
    writeln!(out, "{known} partitions and {GROUPS} share groups made in {:?}", began.elapsed())?;
    let began = Instant::now();
    fill(&client, "filled", gib << 30, FILL_BYTES).await?;
    writeln!(out, "{gib} GiB written in {:?}", began.elapsed())?;
    drop(client);
    writeln!(out, "clean stop: {:?}", broker.stop()?)?;
    let broker = Broker::start(data.path(), &[])?;
    writeln!(out, "start after a clean stop: {:?}", broker.started_in)?;
    sleep(Duration::from_secs(5)).await;
    let (_, _, before) = broker.cost()?;
    sleep(Duration::from_secs(10)).await;
    let (resident, files, after) = broker.cost()?;
    let busy = (after - before).as_secs_f64() * 10.0;
    writeln!(out, "idle: {} MiB resident, {files} open files, {busy:.1} % of a core", resident >> 20)?;
    let client = broker.client().await?;
    let began = Instant::now();
    // Little less than what makes a checkpoint due.
    fill(&client, "filled", 900 << 20, FIRST_BATCH).await?;
    let written_in = began.elapsed();
    drop(client);
    drop(broker);
    writeln!(out, "killed after 900 MiB more, in {written_in:?}")?;
    let broker = Broker::start(data.path(), &[])?;
    writeln!(out, "start after the kill: {:?}", broker.started_in)?;
    writeln!(out, "clean stop: {:?}", broker.stop()?)?;
    Ok(())
}

/// Bytes written so far to the device that a directory is on.
fn device_bytes(path: &Path) -> Outcome<u64> {
    rustix::fs::sync();
    let device = fs::metadata(path)?.dev();
    let stat = fs::read_to_string(format!("/sys/dev/block/{}:{}/stat", major(device), minor(device)))?;
    let sectors: u64 = stat.split_ascii_whitespace().nth(6).ok_or("no sectors")?.parse()?;
    Ok(sectors * 512)
}

async fn amplification(out: &mut impl Write, directory: &Path, batches: &[(usize, u32)]) -> Outcome<()> {
    writeln!(out, "batch KiB  partitions  acknowledged MiB  MiB/s  bytes on the device for each")?;
    for &(kib, partitions) in batches {
        let data = tempfile::tempdir_in(directory)?;
        let broker = Broker::start(data.path(), SOON)?;
        let client = broker.client().await?;
        client.admin().create_topic("orders", partitions, &[]).await?;
        client.admin().create_topic("filled", FILLED, &[("allow-written", "true")]).await?;
        fill(&client, "filled", FIRST_BYTES, FIRST_BATCH).await?;
        let value = Bytes::from(vec![b'x'; (kib << 10) - 100]);
        // Each record a batch of its own.
        let producer = client.producer().max_batch_bytes(1).build().await?;
        let before = device_bytes(data.path())?;
        let began = Instant::now();
        let mut records = 0_u64;
        while began.elapsed() < WRITING {
            let partition = (records % u64::from(partitions)) as u32;
            drop(producer.enqueue(Record::new("orders", value.clone()).partition(partition)).await?);
            records += 1;
        }
        producer.flush().await?;
        let elapsed = began.elapsed().as_secs_f64();
        drop((producer, client));
        broker.stop()?;
        let written = device_bytes(data.path())? - before;
        let acknowledged = records * (kib << 10) as u64;
        let rate = acknowledged as f64 / elapsed / f64::from(1 << 20);
        let each = written as f64 / acknowledged as f64;
        writeln!(out, "{kib:>9}  {partitions:>10}  {:>16}  {rate:>5.0}  {each:>28.2}", acknowledged >> 20)?;
    }
    Ok(())
}
