//! The `felucca-bench` command.

#![allow(clippy::print_stdout, reason = "the table is what this program is for")]

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use felucca_bench::broker::Launcher;
use felucca_bench::report::{Sink, table};
use felucca_bench::run::{Effort, Run};
use felucca_bench::workload::Workload;
use tokio::signal::unix::{SignalKind, signal};

/// As the broker has it: what is compared is not the allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Measures Felucca and the machine it runs on
#[derive(Debug, Parser)]
#[command(version)]
enum Command {
    /// Measures workloads, each against a broker of its own, and the limits of the machine beside them
    Run(RunArgs),
    /// Lists the standard workloads
    List,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  felucca-bench run
  felucca-bench run --quick W1 W6
  felucca-bench run --raw --reps 3 --out results/raw
  felucca-bench run my-workload.toml --broker 127.0.0.1:7650")]
struct RunArgs {
    /// Standard workloads by name, or TOML files; without any, all standard ones
    #[arg(value_name = "WORKLOAD")]
    workloads: Vec<String>,
    /// Takes the workloads that leave the client library out instead of the standard ones
    #[arg(long, conflicts_with = "workloads")]
    raw: bool,
    /// About a second for each measurement
    #[arg(long)]
    quick: bool,
    /// Leaves out the limits of the machine
    #[arg(long)]
    no_limits: bool,
    /// How often everything is measured; the table has medians
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    reps: u32,
    /// Threads that run the client's tasks; one leaves the broker the other core of a small machine
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    client_threads: u32,
    /// Folder for results.jsonl and machine.json
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// The `felucca` program [default: the one beside this program]
    #[arg(long, value_name = "FILE")]
    broker_binary: Option<PathBuf>,
    /// Measures a broker that runs already, instead of starting one for each case
    #[arg(long, value_name = "ADDR", conflicts_with = "broker_binary")]
    broker: Option<String>,
    /// Where data directories are made, and whose disk is measured [default: the system's temporary directory]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
}

fn main() -> anyhow::Result<ExitCode> {
    match Command::parse() {
        Command::Run(args) => run(args),
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
    let launcher = match &args.broker {
        Some(address) => Launcher::Running(address.clone()),
        None => {
            let beside = || anyhow::Ok(std::env::current_exe()?.with_file_name("felucca"));
            Launcher::binary(&args.broker_binary.clone().map_or_else(beside, Ok)?, &data_dir)?
        }
    };
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
        launcher: launcher.clone(),
        effort,
        repetitions: args.reps,
        limits: !args.no_limits,
        client_threads: args.client_threads,
        data_dir,
    };
    let measuring = std::thread::spawn(move || {
        let result = run.measure(&mut sink);
        (sink, result)
    });
    // A broker that was started must not outlive this program.
    if ended_by_signal(|| measuring.is_finished())? {
        launcher.abandon();
        return Ok(ExitCode::from(130));
    }
    let (sink, result) = measuring.join().map_err(|_| anyhow::anyhow!("the run panicked"))?;
    println!("{}", table(sink.rows()));
    result.map(|()| ExitCode::SUCCESS)
}

/// Waits until it is finished, or until a signal asks this program to end.
fn ended_by_signal(is_finished: impl Fn() -> bool) -> anyhow::Result<bool> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen to signals")?;
        let mut terminate = signal(SignalKind::terminate()).context("cannot listen to signals")?;
        let mut tick = tokio::time::interval(std::time::Duration::from_millis(100));
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
