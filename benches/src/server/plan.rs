//! How each server is started: its command, its settings, and how it is seen that it is ready.
//!
//! Settings are those that users choose for durable messages on one node; where a default would slow the peer down within
//! a measurement (Redis' snapshots and rewrites of its file), it is off.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::Command;

use anyhow::ensure;

use crate::peer::Peer;
use crate::workload::Ack;

/// A server about to be started.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) command: Command,
    /// A process that the server needs beside it.
    pub(super) companion: Option<Command>,
    pub(super) ready: Ready,
    /// For the results.
    pub(super) settings: String,
}

/// When it is up.
#[derive(Debug)]
pub(super) enum Ready {
    /// It prints the address on which it listens.
    Announced,
    /// All these accept connections; the first is the clients'.
    Accepting(Vec<SocketAddr>),
}

impl Plan {
    /// For a server with all its data below `directory`, which exists and is empty.
    pub(super) fn new(peer: Peer, level: Ack, program: &Path, directory: &Path) -> anyhow::Result<Self> {
        match peer {
            Peer::Felucca => Ok(felucca(program, directory)),
            Peer::Redis => redis(level, program, directory),
            Peer::Jetstream => nats(level, program, directory),
            Peer::Kafka => kafka(level, program, directory),
            Peer::RabbitmqQuorum | Peer::RabbitmqStream => rabbitmq(peer, program, directory),
        }
    }
}

/// A port that was free a moment ago.
fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

fn local(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

fn felucca(program: &Path, directory: &Path) -> Plan {
    let mut command = Command::new(program);
    command.args(["serve", "--listen", "127.0.0.1:0", "--data-dir"]).arg(directory.join("data"));
    Plan { command, companion: None, ready: Ready::Announced, settings: "defaults".to_owned() }
}

fn redis(level: Ack, program: &Path, directory: &Path) -> anyhow::Result<Plan> {
    let port = free_port()?;
    let policy = if level == Ack::Synced { "always" } else { "everysec" };
    let mut command = Command::new(program);
    command
        .args(["--bind", "127.0.0.1", "--port", &port.to_string(), "--appendonly", "yes"])
        .args(["--appendfsync", policy, "--auto-aof-rewrite-percentage", "0", "--save", "", "--dir"])
        .arg(directory);
    Ok(Plan {
        command,
        companion: None,
        ready: Ready::Accepting(vec![local(port)]),
        settings: format!("appendonly yes, appendfsync {policy}, no snapshots, no rewrites"),
    })
}

fn nats(level: Ack, program: &Path, directory: &Path) -> anyhow::Result<Plan> {
    let port = free_port()?;
    let (sync, settings) = match level {
        Ack::Synced => ("sync_interval: always", "file storage, sync_interval always"),
        Ack::Written | Ack::Memory => ("", "file storage, default sync_interval (2 minutes)"),
    };
    let store = directory.join("data");
    let file = directory.join("nats.conf");
    let config = format!("listen: 127.0.0.1:{port}\njetstream {{\nstore_dir: {store:?}\n{sync}\n}}\n");
    fs::write(&file, config)?;
    let mut command = Command::new(program);
    command.arg("--config").arg(file);
    Ok(Plan {
        command,
        companion: None,
        ready: Ready::Accepting(vec![local(port)]),
        settings: settings.to_owned(),
    })
}

/// One node that is broker and controller, its storage formatted beforehand as it is once in the life of a server.
fn kafka(level: Ack, program: &Path, directory: &Path) -> anyhow::Result<Plan> {
    let (port, controller) = (free_port()?, free_port()?);
    let (sync, settings) = match level {
        Ack::Synced => ("log.flush.interval.messages=1\n", "KRaft, one node, flush after each batch"),
        Ack::Written | Ack::Memory => ("", "KRaft, one node, no flush (default)"),
    };
    let config = format!(
        "process.roles=broker,controller\nnode.id=1\ncontroller.quorum.voters=1@127.0.0.1:{controller}\n\
         listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}\n\
         advertised.listeners=PLAINTEXT://127.0.0.1:{port}\ncontroller.listener.names=CONTROLLER\n\
         offsets.topic.replication.factor=1\nlog.dirs={}\n{sync}",
        directory.join("data").display()
    );
    let file = directory.join("server.properties");
    fs::write(&file, config)?;
    let format = Command::new(program).arg("format").arg(&file).output()?;
    ensure!(
        format.status.success(),
        "its storage was not formatted: {}",
        String::from_utf8_lossy(&format.stderr)
    );
    let mut command = Command::new(program);
    command.arg(file);
    Ok(Plan {
        command,
        companion: None,
        ready: Ready::Accepting(vec![local(port)]),
        settings: settings.to_owned(),
    })
}

/// With a port mapper of its own, which would otherwise be started for the whole machine and outlive the server.
fn rabbitmq(peer: Peer, program: &Path, directory: &Path) -> anyhow::Result<Plan> {
    let (amqp, stream, mapper, distribution) = (free_port()?, free_port()?, free_port()?, free_port()?);
    let config = format!(
        "listeners.tcp.1 = 127.0.0.1:{amqp}\nstream.listeners.tcp.1 = 127.0.0.1:{stream}\n\
         stream.advertised_host = 127.0.0.1\nstream.advertised_port = {stream}\nlog.file.level = warning\n"
    );
    let file = directory.join("rabbitmq.conf");
    fs::write(&file, config)?;
    let plugins = directory.join("plugins");
    let is_stream = peer == Peer::RabbitmqStream;
    fs::write(&plugins, if is_stream { "[rabbitmq_stream].\n" } else { "[].\n" })?;
    let mut command = Command::new(program);
    command
        .env("HOME", directory)
        .env("ERL_EPMD_PORT", mapper.to_string())
        .env("RABBITMQ_NODENAME", format!("felucca-bench-{amqp}@localhost"))
        .env("RABBITMQ_DIST_PORT", distribution.to_string())
        .env("RABBITMQ_CONFIG_FILE", file)
        .env("RABBITMQ_CONF_ENV_FILE", directory.join("absent.conf"))
        .env("RABBITMQ_ENABLED_PLUGINS_FILE", plugins)
        .env("RABBITMQ_MNESIA_BASE", directory.join("data"))
        .env("RABBITMQ_LOG_BASE", directory.join("log"))
        .env("RABBITMQ_PID_FILE", directory.join("pid"));
    let mut companion = Command::new("epmd");
    companion.args(["-port", &mapper.to_string()]);
    let (ports, settings) = if is_stream {
        (vec![local(stream), local(amqp)], "streams, defaults")
    } else {
        (vec![local(amqp)], "quorum queues, defaults")
    };
    Ok(Plan {
        command,
        companion: Some(companion),
        ready: Ready::Accepting(ports),
        settings: settings.to_owned(),
    })
}
