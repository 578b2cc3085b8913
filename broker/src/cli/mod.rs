//! The command line: arguments, one module per group of subcommands, and what they share.
//!
//! Answers go to stdout, as tables or JSON; everything else goes to stderr. Exit codes: 0 done, 1 refused or failed, 2 wrong
//! usage, 3 the broker could not be reached or may accept the same later. A reader that closes stdout ends a command quietly.

mod config;
mod consume;
mod dlq;
mod group;
mod journal;
mod log;
mod output;
mod parse;
mod produce;
mod record;
mod serve;
mod signals;
mod status;
mod topic;
mod work;

use std::future::Future;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{CommandFactory, Parser, Subcommand};
use felucca_client::Client;

use output::Format;

/// Requests that take as long as there are records may take so long.
const LONG_WORK: Duration = Duration::from_mins(15);

/// A message broker: topics read as logs or worked through as queues, on one journal.
#[derive(Debug, Parser)]
#[command(
    name = "felucca",
    version,
    propagate_version = true,
    max_term_width = 110,
    arg_required_else_help = true
)]
#[command(after_help = "\
Examples:
  felucca serve --data-dir data
  felucca topic create orders --partitions 4
  echo 'customer-1:hello' | felucca produce orders --key-separator :
  felucca consume orders --from beginning
  felucca group create payment --share --topic orders --config ordering=key
  felucca work orders --share-group payment --exec ./charge.sh
  felucca dlq redrive dlq.payment.orders

Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 broker not reachable or asks to try again later.")]
struct Cli {
    #[command(flatten)]
    connection: Connection,
    #[command(subcommand)]
    command: Command,
}

/// How the broker is reached and how it answers; ignored by commands that ask no broker.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Broker and output")]
struct Connection {
    /// The broker's address
    #[arg(
        long,
        global = true,
        env = "FELUCCA_BROKER",
        default_value = "127.0.0.1:7650",
        value_name = "ADDR"
    )]
    broker: String,
    /// How answers look [default: table, for consume json]
    #[arg(long, global = true, value_enum, value_name = "FORMAT")]
    output: Option<Format>,
    /// How long connecting and each request may take
    #[arg(long, global = true, default_value = "10s", value_parser = humantime::parse_duration, value_name = "TIME")]
    timeout: Duration,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the broker
    Serve(serve::Serve),
    /// Show every setting of `serve`, its value and where the value comes from
    Config(config::Config),
    /// Create, list, describe, change and delete topics
    #[command(subcommand)]
    Topic(topic::Topic),
    /// Write records, one per line of the input
    Produce(produce::Produce),
    /// Read records, one JSON object per line
    Consume(consume::Consume),
    /// Run a command for each record of a share group
    Work(work::Work),
    /// Consumer groups and share groups
    #[command(subcommand)]
    Group(group::Group),
    /// Records that were given up: list, show, redrive, purge
    #[command(subcommand)]
    Dlq(dlq::Dlq),
    /// Say how the broker is: whether it takes records, its disk, its checkpoints, damage that was found
    #[command(after_help = "\
Fails with exit code 1 when new records are refused or stored records were found damaged, and says why.

Examples:
  felucca status
  felucca status --output json")]
    Status,
    /// Look into a journal, offline
    #[command(subcommand)]
    Journal(journal::Journal),
    /// Look into segment files, offline
    #[command(subcommand)]
    Log(log::Log),
    /// Print a completion script for a shell
    #[command(after_help = "Example:\n  felucca completions bash > /etc/bash_completion.d/felucca")]
    Completions { shell: clap_complete::Shell },
}

/// Runs the command that the process was started with.
pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", in_full(&error));
            ExitCode::from(exit_code(&error))
        }
    }
}

/// The error and its causes. Some name their cause in their own text; it is said once.
fn in_full(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

impl Cli {
    fn run(self) -> anyhow::Result<()> {
        let connection = self.connection;
        match self.command {
            Command::Serve(command) => command.run(),
            Command::Config(command) => command.run(connection.format()),
            Command::Topic(command) => connection.ask(|client, format| command.run(client, format)),
            Command::Produce(command) => connection.ask(|client, format| command.run(client, format)),
            Command::Consume(command) => {
                let format = connection.output.unwrap_or(Format::Json);
                connection.ask(|client, _| command.run(client, format))
            }
            Command::Work(command) => connection.ask(|client, format| command.run(client, format)),
            Command::Group(command) => connection.ask(|client, format| command.run(client, format)),
            Command::Dlq(command) => {
                let patience =
                    if command.is_long() { connection.timeout.max(LONG_WORK) } else { connection.timeout };
                connection.ask_patiently(patience, |client, format| command.run(client, format))
            }
            Command::Status => connection.ask(status::run),
            Command::Journal(command) => command.run(connection.format()),
            Command::Log(command) => command.run(connection.format()),
            Command::Completions { shell } => {
                // By way of memory: the generator panics when stdout is closed.
                let mut script = Vec::new();
                clap_complete::generate(shell, &mut Cli::command(), "felucca", &mut script);
                Ok(io::stdout().write_all(&script)?)
            }
        }
    }
}

impl Connection {
    fn format(&self) -> Format {
        self.output.unwrap_or(Format::Table)
    }

    fn ask<F>(&self, command: impl FnOnce(Client, Format) -> F) -> anyhow::Result<()>
    where
        F: Future<Output = anyhow::Result<()>>,
    {
        self.ask_patiently(self.timeout, command)
    }

    /// Connects and runs `command` on this thread; each of its requests may take as long as `patience`.
    fn ask_patiently<F>(
        &self,
        patience: Duration,
        command: impl FnOnce(Client, Format) -> F,
    ) -> anyhow::Result<()>
    where
        F: Future<Output = anyhow::Result<()>>,
    {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let result = runtime.block_on(async {
            let builder = Client::builder(&self.broker).client_name("felucca-cli").request_timeout(patience);
            let client = tokio::time::timeout(self.timeout, builder.connect())
                .await
                .unwrap_or(Err(felucca_client::Error::Timeout("connecting")))
                .with_context(|| format!("cannot reach the broker at {}", self.broker))?;
            command(client, self.format()).await
        });
        // A thread may still be waiting for input; the process ends without it.
        runtime.shutdown_background();
        result
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

fn exit_code(error: &anyhow::Error) -> u8 {
    let retryable = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref::<felucca_client::Error>().is_some_and(felucca_client::Error::retryable)
    };
    if error.chain().any(retryable) { 3 } else { 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_of_the_arguments_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_of_the_connection_stand_anywhere() {
        for line in [
            "felucca --broker b:1 --output json topic list",
            "felucca topic --broker b:1 list --output json",
            "felucca topic list --output json --broker b:1 --timeout 10s",
        ] {
            let cli = Cli::try_parse_from(line.split(' ')).unwrap();
            assert_eq!(cli.connection.broker, "b:1");
            assert_eq!(cli.connection.output, Some(Format::Json));
            assert_eq!(cli.connection.timeout, Duration::from_secs(10));
        }
    }

    #[test]
    fn every_command_line_of_the_help_parses() {
        fn examples(command: &mut clap::Command, found: &mut Vec<String>) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            found.extend(help.lines().filter_map(|line| line.strip_prefix("  felucca ")).map(str::to_owned));
            for subcommand in command.get_subcommands_mut() {
                examples(subcommand, found);
            }
        }
        let mut found = Vec::new();
        examples(&mut Cli::command(), &mut found);
        assert!(found.len() > 20, "{} examples", found.len());
        for line in found {
            let words = shlex::split(&line).unwrap().into_iter();
            let words = words.take_while(|word| !["|", "<", ">"].contains(&word.as_str()));
            let words = ["felucca".to_owned()].into_iter().chain(words);
            if let Err(error) = Cli::try_parse_from(words) {
                panic!("{line}: {error}");
            }
        }
    }

    #[test]
    fn a_closed_stdout_is_told_from_other_failures() {
        let closed = anyhow::Error::new(io::Error::from(io::ErrorKind::BrokenPipe)).context("writing");
        assert!(is_broken_pipe(&closed));
        assert!(!is_broken_pipe(&anyhow::anyhow!("broken pipe")));
    }
}
