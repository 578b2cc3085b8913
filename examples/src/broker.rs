//! The broker as a process of a run: the library that the `felucca` command is a shell around.

use std::net::SocketAddr;
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub(crate) struct BrokerArgs {
    #[arg(long)]
    data_dir: PathBuf,
    #[arg(long)]
    listen: SocketAddr,
    /// Stop when standard input closes.
    #[arg(long)]
    end_with_parent: bool,
}

/// Runs the broker until it is told to stop.
pub(crate) async fn run(args: BrokerArgs) -> anyhow::Result<()> {
    anyhow::bail!("no server yet for {args:?}")
}
