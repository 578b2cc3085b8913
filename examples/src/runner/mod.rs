//! The runner: starts the broker and the services, places the purchases, waits until all is quiet, and reconciles.
//!
//! Invariant: what the runner counts on its way serves its display, its pace and its patience. The outcome rests on
//! [`crate::reconcile`] alone.
#![allow(clippy::print_stdout, reason = "the runner is a command, and this is its output")]

mod chaos;
mod place;
mod progress;
pub(crate) mod scenario;
mod supervise;
mod work_dir;

use std::borrow::Cow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::input::{self, Purchase, Totals};
use crate::payment::gateway;
use crate::reconcile::{Evidence, LogEvidence, Reconciliation, reconcile};
use crate::report::{self, Report};
use crate::{service, topology};
use progress::{Snapshot, Watcher};
use scenario::{Expected, ScenarioArgs, Stage};
use supervise::{Fleet, Role};
use work_dir::WorkDir;

/// The run gives up when nothing has moved for so long.
const PATIENCE: Duration = Duration::from_secs(60);
const HTTP_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, clap::Args)]
pub(crate) struct InputArgs {
    /// Purchases to place, instead of the sample of 6,919 that is built in.
    ///
    /// Five columns (customer, customer in the sample, date, CDs, dollars), or four after a header line (customer, date,
    /// CDs, dollars).
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Place only the first N purchases.
    #[arg(long, value_name = "N")]
    orders: Option<usize>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    input: InputArgs,
    /// Seed of the gateway's behaviour and of the kills.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Write the outcome as JSON.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Kill processes at seeded moments: at least 12 times, each at least twice.
    #[arg(long, conflicts_with = "scenario")]
    chaos: bool,
    /// Keep all data and logs in this directory, which must be empty or not exist.
    #[arg(long, value_name = "DIR")]
    work_dir: Option<PathBuf>,
    #[command(flatten)]
    scenario: ScenarioArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ReconcileArgs {
    /// Directory of an earlier run.
    #[arg(long, value_name = "DIR")]
    work_dir: PathBuf,
}

impl InputArgs {
    fn text(&self) -> anyhow::Result<Cow<'static, str>> {
        match &self.input {
            None => Ok(Cow::Borrowed(include_str!("../../data/cdnow_sample.txt"))),
            Some(path) => {
                let text = std::fs::read_to_string(path);
                Ok(Cow::Owned(text.with_context(|| format!("cannot read {}", path.display()))?))
            }
        }
    }

    fn name(&self) -> String {
        self.input
            .as_ref()
            .map_or_else(|| "the built-in sample".to_owned(), |path| path.display().to_string())
    }
}

fn parse(text: &str, orders: Option<usize>) -> anyhow::Result<Vec<Purchase>> {
    let mut purchases = input::parse(text)?;
    purchases.truncate(orders.unwrap_or(usize::MAX));
    anyhow::ensure!(!purchases.is_empty(), "there is no purchase to place");
    Ok(purchases)
}

/// A whole run. True when everything reconciles.
pub(crate) async fn run(args: RunArgs) -> anyhow::Result<bool> {
    let started = Instant::now();
    let text = args.input.text()?;
    let purchases = parse(&text, args.input.orders).with_context(|| args.input.name())?;
    let expected = args.scenario.expected(args.input.orders, &purchases)?;
    let mut work_dir = WorkDir::create(args.work_dir.as_deref())?;
    work_dir.keep_input(&text, &expected)?;
    let poison = purchases.iter().find(|purchase| Some(purchase.line) == expected.poison);
    let fleet = Arc::new(Fleet::new(&work_dir, args.seed, poison, expected.bug_cds)?);
    let outcome = async {
        let trouble = work(&args, &purchases, &expected, &work_dir, &fleet).await?;
        let mut found = look(&purchases, &expected, &work_dir, &fleet).await?;
        found.findings.extend(trouble);
        anyhow::Ok(found)
    };
    let found = match outcome.await {
        Ok(found) => found,
        Err(error) => {
            let kept = work_dir.keep();
            return Err(
                error.context(format!("the run broke off; its data and logs are in {}", kept.display()))
            );
        }
    };

    let report = Report::new(&found, fleet.all_kills(), started.elapsed().as_secs_f64());
    let reconciles = tell(&purchases, &found, &report);
    if let Some(path) = &args.report {
        report.write(path)?;
    }
    if !reconciles || args.work_dir.is_some() {
        say(&format!("data and logs: {}", work_dir.keep().display()));
    } else {
        say("removing the run's data, which --work-dir would keep");
        tokio::task::spawn_blocking(|| work_dir.remove()).await??;
    }
    Ok(reconciles)
}

/// Reconciles what an earlier run left. True when everything reconciles.
pub(crate) async fn reconcile_again(args: ReconcileArgs) -> anyhow::Result<bool> {
    let started = Instant::now();
    let work_dir = WorkDir::open(&args.work_dir)?;
    let (text, expected) = work_dir.input()?;
    let purchases = parse(&text, expected.orders)?;
    let fleet = Fleet::new(&work_dir, 0, None, None)?;
    fleet.start(Role::Broker).await?;
    let found = look(&purchases, &expected, &work_dir, &fleet).await?;
    let report = Report::new(&found, 0, started.elapsed().as_secs_f64());
    Ok(tell(&purchases, &found, &report))
}

/// Starts everything, places the purchases, waits until all is quiet, and stops the services. Returns what went wrong
/// on the way without breaking the run off.
async fn work(
    args: &RunArgs,
    purchases: &[Purchase],
    expected: &Expected,
    work_dir: &WorkDir,
    fleet: &Arc<Fleet>,
) -> anyhow::Result<Vec<String>> {
    fleet.start(Role::Broker).await?;
    let client = service::connect(&fleet.broker, "order-flow").await?;
    topology::create(&client, &args.scenario.payment_config()).await?;
    tokio::try_join!(fleet.start(Role::Order), fleet.start(Role::Payment), fleet.start(Role::Email))?;

    let http = reqwest::Client::builder().timeout(HTTP_TIMEOUT).no_proxy().build()?;
    let (snapshot, progress) = watch::channel(Snapshot { purchases: purchases.len(), ..Snapshot::default() });
    let placed = Arc::default();
    let watcher = Watcher {
        fleet: Arc::clone(fleet),
        http: http.clone(),
        client: client.clone(),
        placed: Arc::clone(&placed),
        snapshot,
    };
    let _display = Background(tokio::spawn(progress::display(progress.clone())).abort_handle());

    let mut trouble = Vec::new();
    let flow = async {
        let (admitted, admission) = watch::channel(usize::MAX);
        let place = place::all(&http, &fleet.order_url, purchases, admission, &placed, PATIENCE);
        if args.chaos {
            let plan = chaos::plan(args.seed);
            admitted.send_replace(0);
            tokio::try_join!(place, chaos::run(plan, Arc::clone(fleet), progress.clone(), admitted))?;
            trouble.extend(chaos::check(fleet).err().map(|error| error.to_string()));
        } else {
            let stage = Stage {
                fleet,
                client: &client,
                purchases,
                expected,
                down: gateway::outage_file(&work_dir.files().gateway),
                progress: progress.clone(),
            };
            tokio::try_join!(place, args.scenario.play(stage))?;
        }
        if !progress::until_quiet(&client, progress, PATIENCE).await {
            trouble.push(format!("gave up waiting: nothing has moved for {PATIENCE:?}"));
        }
        anyhow::Ok(())
    };
    tokio::select! {
        done = flow => done?,
        ended = watcher.run() => ended?,
    }
    // They have nothing left to do; an orderly stop also empties their databases' write-ahead logs.
    tokio::try_join!(fleet.stop(Role::Order), fleet.stop(Role::Payment), fleet.stop(Role::Email))?;
    Ok(trouble)
}

/// Reads the evidence, with the broker running and the services stopped, and reconciles; stops the broker.
async fn look(
    purchases: &[Purchase],
    expected: &Expected,
    work_dir: &WorkDir,
    fleet: &Fleet,
) -> anyhow::Result<Reconciliation> {
    let client = service::connect(&fleet.broker, "order-flow-reconcile").await?;
    let log = LogEvidence::read(&client).await.context("cannot read the log")?;
    fleet.stop(Role::Broker).await?;
    let files = work_dir.files();
    let evidence = tokio::task::spawn_blocking(move || Evidence::gather(&files, log)).await??;
    Ok(reconcile(purchases, expected, &evidence))
}

/// Prints the outcome. True when everything reconciles.
fn tell(purchases: &[Purchase], found: &Reconciliation, report: &Report) -> bool {
    say(&format!("\n{}", report.table(Totals::of(purchases))));
    if found.repeated_events > 0 {
        say(&format!(
            "{} events are in the log more than once, as may be after a kill",
            found.repeated_events
        ));
    }
    if found.findings.is_empty() {
        say("everything reconciles");
    } else {
        say(&format!("DOES NOT RECONCILE:\n{}", report::findings(&found.findings)));
    }
    found.findings.is_empty()
}

/// A line for whoever started the command.
fn say(line: &str) {
    println!("{line}");
}

/// A task that ends with its owner.
#[derive(Debug)]
struct Background(AbortHandle);

impl Drop for Background {
    fn drop(&mut self) {
        self.0.abort();
    }
}
