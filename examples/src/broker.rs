//! The broker as a process of a run: the library that the `felucca` command is a shell around.

use std::net::SocketAddr;
use std::path::PathBuf;

use felucca_broker::server::Server;
use felucca_broker::settings::ServerSettings;

use crate::service;

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

/// Runs the broker until it is told to stop; what it has taken in is on the disk then.
pub(crate) async fn run(args: BrokerArgs) -> anyhow::Result<()> {
    let stop = service::shutdown_token(args.end_with_parent)?;
    let settings =
        ServerSettings { data_dir: args.data_dir, listen: args.listen, ..ServerSettings::default() };
    settings.validate()?;
    let server = Server::start(settings).await?;
    service::announce_ready()?;
    tokio::select! {
        () = stop.cancelled() => {
            server.shutdown().await;
            Ok(())
        }
        () = server.failed() => anyhow::bail!("the broker has failed; its log says why"),
    }
}
