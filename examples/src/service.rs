//! What the three services and the broker have in common as processes: logs, readiness, an orderly end.

use std::io::{Read as _, Write as _};
use std::time::Duration;

use anyhow::Context as _;
use felucca_client::Client;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// The line by which a process says that it has set itself up.
pub(crate) const READY: &str = "ready";

/// Sends logs to standard error; `RUST_LOG` overrides the level.
pub(crate) fn init_logs(default_level: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default_level));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
}

/// Tells whoever started this process that it is ready.
pub(crate) fn announce_ready() -> anyhow::Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "{READY}")
        .and_then(|()| out.flush())
        .context("cannot announce readiness on standard output")
}

/// A token that is cancelled on SIGTERM, on Ctrl-C, and, with `end_with_parent`, when standard input closes: the runner
/// holds the other end of that pipe, so even a killed runner leaves no process behind.
pub(crate) fn shutdown_token(end_with_parent: bool) -> anyhow::Result<CancellationToken> {
    let token = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let stop = token.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("stopping: SIGTERM"),
            _ = interrupt.recv() => tracing::info!("stopping: interrupted"),
            () = parent_gone(), if end_with_parent => tracing::info!("stopping: the parent process is gone"),
        }
        stop.cancel();
    });
    Ok(token)
}

/// Waits for standard input to close. On a thread of its own, because a read of it cannot be given up: a runtime that
/// held it could not end.
async fn parent_gone() {
    let (gone, closed) = oneshot::channel::<()>();
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while matches!(std::io::stdin().read(&mut buffer), Ok(read) if read > 0) {}
        drop(gone);
    });
    // An error is what is waited for: the thread never sends.
    let _ = closed.await;
}

/// Connects to the broker, however long it takes to come up. After this the client reconnects by itself.
pub(crate) async fn connect(broker: &str, name: &str) -> anyhow::Result<Client> {
    loop {
        match Client::builder(broker).client_name(name).connect().await {
            Ok(client) => return Ok(client),
            Err(error) if error.retryable() => {
                tracing::warn!(%error, broker, "the broker does not answer yet");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            Err(error) => {
                return Err(error).with_context(|| format!("cannot connect to the broker at {broker}"));
            }
        }
    }
}
