//! The `felucca-bench` command.

#![allow(clippy::print_stdout, reason = "the table is what this program is for")]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use comfy_table::{Table, presets};
use felucca_bench::peer::{Peer, Programs};
use felucca_bench::report::{self, Sink, table};
use felucca_bench::run::{Effort, End, Run};
use felucca_bench::server::Launcher;
use felucca_bench::workload::Workload;
use tokio::signal::unix::{SignalKind, signal};

/// As the broker has it: what is compared is not the allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Measures Felucca, its peers and the machine they run on
#[derive(Debug, Parser)]
#[command(version)]
enum Command {
    /// Measures workloads, peers in turns and each on a server of its own, and the limits of the machine beside them
    Run(RunArgs),
    /// Tells who can be measured, what is installed, and how to get the rest
    Peers(Installed),
    /// Compares what was measured: a Markdown table, plots, and one HTML page with all of it
    Report(ReportArgs),
    /// Lists the standard workloads
    List,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  felucca-bench run
  felucca-bench run --quick W1 W6
  felucca-bench run --raw --reps 3 --out results/raw
  felucca-bench run W1 --peer felucca --peer redis --reps 5 --out results/w1
  felucca-bench run my-workload.toml --broker 127.0.0.1:7650")]
struct RunArgs {
    /// Standard workloads by name, or TOML files; without any, all standard ones
    #[arg(value_name = "WORKLOAD")]
    workloads: Vec<String>,
    /// Takes the workloads that leave the client library out instead of the standard ones
    #[arg(long, conflicts_with = "workloads")]
    raw: bool,
    /// Who is measured, in turns; may be given several times [default: felucca]
    #[arg(long = "peer", value_name = "PEER", value_enum)]
    peers: Vec<Peer>,
    /// A few seconds for each measurement, once
    #[arg(long)]
    quick: bool,
    /// Leaves out the limits of the machine
    #[arg(long)]
    no_limits: bool,
    /// How often everything is measured; the table has medians [default: 5, with --quick 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    reps: Option<u32>,
    /// No measurement of a workload begins later than this; the same command goes on where it stopped
    #[arg(long, value_name = "MINUTES", default_value_t = 25, value_parser = clap::value_parser!(u32).range(1..))]
    longest: u32,
    /// Threads that run the client's tasks; one leaves the broker the other core of a small machine
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    client_threads: u32,
    /// Folder for results.jsonl and machine.json; what is in it already is not measured again
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    #[command(flatten)]
    installed: Installed,
    /// Measures a Felucca that runs already, instead of starting one for each measurement
    #[arg(long, value_name = "ADDR", conflicts_with = "broker_binary")]
    broker: Option<String>,
    /// Where data directories are made, and whose disk is measured [default: the system's temporary directory]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct ReportArgs {
    /// Folders of results, all of one machine
    #[arg(value_name = "DIR", required = true)]
    folders: Vec<PathBuf>,
    /// Where report.md, report.html and the plots are written [default: the first folder]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Where programs are.
#[derive(Debug, clap::Args)]
struct Installed {
    /// The `felucca` program [default: the one beside this program]
    #[arg(long, value_name = "FILE")]
    broker_binary: Option<PathBuf>,
    /// Folder of peers that are not installed in the system [default: felucca-bench in the user's cache folder]
    #[arg(long, value_name = "DIR")]
    peers_dir: Option<PathBuf>,
}

impl Installed {
    fn programs(&self) -> anyhow::Result<Programs> {
        let felucca = match &self.broker_binary {
            Some(binary) => binary.clone(),
            None => std::env::current_exe()?.with_file_name("felucca"),
        };
        Ok(Programs { felucca, folder: self.peers_dir.clone().unwrap_or_else(Programs::default_folder) })
    }
}

fn main() -> anyhow::Result<ExitCode> {
    match Command::parse() {
        Command::Run(args) => run(args),
        Command::Peers(installed) => {
            println!("{}", peers(&installed.programs()?));
            Ok(ExitCode::SUCCESS)
        }
        Command::Report(args) => {
            let out = args.out.as_ref().or(args.folders.first()).context("no folder")?;
            println!("{}", report::write(&args.folders, out)?);
            eprintln!("{} has all of it", out.join("report.html").display());
            Ok(ExitCode::SUCCESS)
        }
        Command::List => {
            for workload in [Workload::standard(false)?, Workload::standard(true)?].concat() {
                println!("{:12} {}", workload.name, workload.about);
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn run(args: RunArgs) -> anyhow::Result<ExitCode> {
    let data_dir = args.data_dir.clone().unwrap_or_else(std::env::temp_dir);
    let mut launcher = Launcher::new(args.installed.programs()?, &data_dir)?;
    if let Some(address) = args.broker {
        launcher = launcher.with_running(address);
    }
    let workloads = if args.workloads.is_empty() {
        Workload::standard(args.raw)?
    } else {
        args.workloads.iter().map(|name| Workload::find(name)).collect::<anyhow::Result<_>>()?
    };
    let effort = if args.quick { Effort::QUICK } else { Effort::FULL };
    let mut sink = Sink::memory().with_progress();
    if let Some(folder) = &args.out {
        sink = sink.with_folder(folder)?;
    }
    let run = Run {
        workloads,
        peers: if args.peers.is_empty() { vec![Peer::Felucca] } else { args.peers },
        launcher: launcher.clone(),
        effort,
        repetitions: args.reps.unwrap_or(if args.quick { 1 } else { 5 }),
        limits: !args.no_limits,
        client_threads: args.client_threads,
        longest: Duration::from_secs(60 * u64::from(args.longest)),
        data_dir,
    };
    let measuring = std::thread::spawn(move || {
        let result = run.measure(&mut sink);
        (sink, result)
    });
    // A server that was started must not outlive this program.
    if ended_by_signal(|| measuring.is_finished())? {
        launcher.abandon();
        return Ok(ExitCode::from(130));
    }
    let (sink, result) = measuring.join().map_err(|_| anyhow::anyhow!("the run panicked"))?;
    println!("{}", table(sink.rows()));
    if result? == End::TimeIsUp {
        eprintln!(
            "the time is up before everything was measured; with --out, the same command goes on from here"
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// Who there is.
fn peers(programs: &Programs) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header(["peer", "acknowledges", "in this build", "installed", "how to get it"]);
    for peer in Peer::ALL {
        let levels: Vec<_> = peer.levels().iter().map(|level| level.name()).collect();
        let built = match peer.feature().filter(|_| !peer.is_built()) {
            Some(feature) => format!("no: --features {feature}"),
            None => "yes".to_owned(),
        };
        let installed = programs.find(*peer).map_or_else(
            || "no".to_owned(),
            |program| {
                let version = peer.version(&program).unwrap_or_default();
                format!("{version} ({})", program.display())
            },
        );
        table.add_row([peer.name(), &levels.join(", "), &built, &installed, peer.how_to_get()]);
    }
    table
}

/// Waits until it is finished, or until a signal asks this program to end.
fn ended_by_signal(is_finished: impl Fn() -> bool) -> anyhow::Result<bool> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen to signals")?;
        let mut terminate = signal(SignalKind::terminate()).context("cannot listen to signals")?;
        let mut tick = tokio::time::interval(Duration::from_millis(100));
        while !is_finished() {
            tokio::select! {
                _ = tick.tick() => {}
                _ = interrupt.recv() => return Ok(true),
                _ = terminate.recv() => return Ok(true),
            }
        }
        Ok(false)
    })
}
