//! `order-flow`: three sample services around a Felucca broker, and the runner that starts them, feeds them and checks
//! to the cent what they did.
//!
//! Where to look: [`events`] and [`topology`] for what travels where; [`order`], [`payment`] and [`email`] for the
//! services, each documenting what happens when it is killed at any point; [`runner`] and [`reconcile`] for the proof.

mod broker;
mod database;
mod email;
mod events;
#[cfg(test)]
mod flow_tests;
mod input;
mod order;
mod payment;
mod reconcile;
mod report;
mod runner;
mod seeded;
mod service;
mod topology;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Places real purchases through sample order, payment and email services and reconciles every cent.
#[derive(Debug, Parser)]
#[command(name = "order-flow", version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(flatten)]
    run: runner::RunArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Reconcile what an earlier run left in its working directory.
    Reconcile(runner::ReconcileArgs),
    /// Run the broker.
    #[command(hide = true)]
    Broker(broker::BrokerArgs),
    /// Run the order service.
    #[command(hide = true)]
    Order(order::OrderArgs),
    /// Run the payment service.
    #[command(hide = true)]
    Payment(payment::service::PaymentArgs),
    /// Run the email service.
    #[command(hide = true)]
    Email(email::EmailArgs),
}

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    service::init_logs(if cli.command.is_some() { "info" } else { "error" });
    let outcome = match cli.command {
        None => unless_interrupted(runner::run(cli.run)).await,
        Some(Command::Reconcile(args)) => unless_interrupted(runner::reconcile_again(args)).await,
        Some(Command::Broker(args)) => broker::run(args).await.map(|()| true),
        Some(Command::Order(args)) => order::run(args).await.map(|()| true),
        Some(Command::Payment(args)) => payment::service::run(args).await.map(|()| true),
        Some(Command::Email(args)) => email::run(args).await.map(|()| true),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Ends the runner on Ctrl-C in a way that cleans up behind it.
async fn unless_interrupted(run: impl Future<Output = anyhow::Result<bool>>) -> anyhow::Result<bool> {
    tokio::select! {
        outcome = run => outcome,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
    }
}
