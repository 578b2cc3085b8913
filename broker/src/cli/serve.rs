//! `felucca serve`.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::{Arg, ArgAction, ArgMatches, FromArgMatches};
use felucca_broker::config::{ENV_CONFIG, KEYS, Loaded, environment};
use felucca_broker::server::Server;
use felucca_broker::settings::ServerSettings;
use felucca_broker::telemetry;
use tokio::signal::unix::{SignalKind, signal};

/// Keys that the short help shows; `--help` shows all.
const COMMON: &[&str] = &["data-dir", "listen", "insecure", "log-format"];

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Settings come from the defaults, then the file, then the environment, then flags; a later one overrules. Sizes are written
as 512KiB or 16MiB, times as 50ms or 10s. `felucca config` shows what is in force.

Examples:
  felucca serve --data-dir /var/lib/felucca
  felucca serve --data-dir data --listen 127.0.0.1:0
  felucca serve --config felucca.toml --log-format json
  felucca serve --data-dir data --listen 0.0.0.0:7650 --insecure")]
pub(super) struct Serve {
    #[command(flatten)]
    sources: Sources,
}

/// The configuration file and the flags, one for every setting.
#[derive(Debug, clap::Args)]
pub(super) struct Sources {
    /// Configuration file (TOML)
    #[arg(long, env = ENV_CONFIG, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    flags: Flags,
}

impl Sources {
    pub(super) fn load(&self) -> anyhow::Result<Loaded> {
        Ok(Loaded::new(self.config.as_deref(), environment()?, &self.flags.0)?)
    }
}

/// Pairs of a flag's name and its value, for the flags that were given.
#[derive(Debug)]
struct Flags(Vec<(String, String)>);

impl FromArgMatches for Flags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = |flag: String| matches.get_one::<String>(&flag).cloned().map(|value| (flag, value));
        Ok(Self(KEYS.iter().filter_map(|key| given(key.flag())).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl clap::Args for Flags {
    fn augment_args(command: clap::Command) -> clap::Command {
        let defaults = ServerSettings::default();
        command.args(KEYS.iter().map(|key| {
            let arg = Arg::new(key.flag())
                .long(key.flag())
                .action(ArgAction::Set)
                .value_name(key.placeholder())
                .help(format!("{} [default: {}]", key.help, key.show(&defaults)))
                .long_help(format!("{}: {} [default: {}]", key.help, key.allowed(), key.show(&defaults)))
                .hide_short_help(!COMMON.contains(&key.name))
                .help_heading("Settings");
            if key.is_switch() {
                arg.num_args(0..=1).require_equals(true).default_missing_value("true")
            } else {
                arg
            }
        }))
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl Serve {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let settings = self.sources.load()?.settings;
        telemetry::init(settings.log_format, "info")?;
        // The broker's memory is many pieces that come and go. Backed by huge pages it takes twice as much, and each first
        // touch clears 2 MiB. A system that cannot be told so is none the worse.
        #[cfg(target_os = "linux")]
        let _ = rustix::thread::disable_transparent_huge_pages(true);
        tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .thread_name("felucca-io")
            .build()
            .context("cannot start the runtime")?
            .block_on(serve(settings))
    }
}

async fn serve(settings: ServerSettings) -> anyhow::Result<()> {
    // Installed first: a signal during a long recovery must not be the default's sudden end.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let server = tokio::select! {
        server = Server::start(settings) => server?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    announce(&server)?;
    let stopped = tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        () = server.failed() => Err(anyhow::anyhow!("the broker ended by itself; its log says why")),
    };
    tokio::select! {
        () = server.shutdown() => stopped,
        _ = terminate.recv() => bail!("a second signal cut the shutdown short"),
        _ = interrupt.recv() => bail!("a second signal cut the shutdown short"),
    }
}

/// The one line on stdout, for whoever started this process with port 0.
fn announce(server: &Server) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "listening on {}", server.local_addr())?;
    out.flush()
}
