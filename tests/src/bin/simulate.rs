//! The simulator, for long runs: `cargo run -p felucca-tests --bin simulate -- --seeds 1..1000`. What it does is in
//! docs/testing.md. Exits with 1 when a rule was broken, and says how to see it again; with 2 when it was asked something
//! that makes no sense.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::ops::Range;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use felucca_broker::plants::{PLANTS, plant};
use felucca_tests::sim::{Coverage, FAULTS, Plan, STEPS, Shrunk, Violation, run, shrink};

/// As the broker has it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const USAGE: &str = "\
usage: simulate [OPTION…]
  --seed N        the first seed, 1 when it is not said
  --seeds A..B    these seeds, B not included
  --minutes M     go on for so long, seed after seed
  --steps N       steps of a run, 1000 when it is not said
  --skip A-B,C,…  steps to leave out, as the report of a violation names them
  --shrink S      seconds for cutting a failing run down, 60 when it is not said
  --jobs N        runs at a time, 1 when it is not said
  --plant NAME    with this bug planted
  --plants        lists the bugs that can be planted
  --trace         one run, with all that tells two runs apart";

/// How long a failing run is cut down.
const SHRINKING: Duration = Duration::from_secs(60);

/// So many runs have to meet everything that can be met.
const MANY: u64 = 500;

#[derive(Debug)]
struct Options {
    seeds: Range<u64>,
    time: Option<Duration>,
    steps: u64,
    skipped: BTreeSet<u64>,
    jobs: usize,
    shrinking: Duration,
    plant: Option<String>,
    list: bool,
    trace: bool,
}

fn main() -> ExitCode {
    let outcome = match options() {
        Ok(options) => simulate(&options),
        Err(what) => {
            // There is nobody to tell when that cannot be said.
            let _ = writeln!(io::stderr(), "simulate: {what}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            let _ = writeln!(io::stderr(), "simulate: {error}");
            ExitCode::from(2)
        }
    }
}

fn options() -> Result<Options, String> {
    let mut options = Options {
        seeds: 1..2,
        time: None,
        steps: STEPS,
        skipped: BTreeSet::new(),
        jobs: 1,
        shrinking: SHRINKING,
        plant: None,
        list: false,
        trace: false,
    };
    let mut seed = None;
    let mut seeds = None;
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let mut value = || arguments.next().ok_or_else(|| format!("{name} needs a value"));
        match name.as_str() {
            "--seed" => seed = Some(number(&value()?)?),
            "--seeds" => {
                let text = value()?;
                let (from, to) =
                    text.split_once("..").ok_or_else(|| format!("{text} is no range like 1..100"))?;
                seeds = Some(number(from)?..number(to)?);
            }
            "--minutes" => {
                let text = value()?;
                let minutes: f64 = text.parse().map_err(|_| format!("{text} is no number"))?;
                let time = Duration::try_from_secs_f64(minutes * 60.0).map_err(|error| error.to_string())?;
                options.time = Some(time);
            }
            "--steps" => options.steps = number(&value()?)?,
            "--skip" => options.skipped = steps(&value()?)?,
            "--jobs" => {
                options.jobs = usize::try_from(number(&value()?)?).map_err(|error| error.to_string())?;
            }
            "--shrink" => options.shrinking = Duration::from_secs(number(&value()?)?),
            "--plant" => options.plant = Some(value()?),
            "--plants" => options.list = true,
            "--trace" => options.trace = true,
            _ => return Err(format!("{name} is not known")),
        }
    }
    let first = seed.unwrap_or(1);
    let last = if options.time.is_some() { u64::MAX } else { first.saturating_add(1) };
    options.seeds = seeds.unwrap_or(first..last);
    Ok(options)
}

fn number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("{text} is no number"))
}

/// Steps as `1-4,7`.
fn steps(text: &str) -> Result<BTreeSet<u64>, String> {
    let mut steps = BTreeSet::new();
    for part in text.split(',') {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        steps.extend(number(from)?..=number(to)?);
    }
    Ok(steps)
}

/// The inverse of [`steps`].
fn text_of(steps: &BTreeSet<u64>) -> String {
    let mut parts: Vec<(u64, u64)> = Vec::new();
    for step in steps {
        match parts.last_mut() {
            Some((_, last)) if *last + 1 == *step => *last = *step,
            _ => parts.push((*step, *step)),
        }
    }
    let parts =
        parts.iter().map(|(from, to)| if from == to { from.to_string() } else { format!("{from}-{to}") });
    parts.collect::<Vec<_>>().join(",")
}

/// What all runs together came to.
#[derive(Debug, Default)]
struct Total {
    coverage: Coverage,
    runs: u64,
    faults: u64,
    fewest_faults: Option<u64>,
    violation: Option<(Plan, Violation)>,
    /// What tells runs apart.
    traces: Vec<(u64, String)>,
}

fn simulate(options: &Options) -> io::Result<bool> {
    let mut out = io::stdout().lock();
    if options.list {
        for plant in PLANTS {
            writeln!(out, "{:32} {}", plant.name, plant.what)?;
        }
        return Ok(true);
    }
    if !plant(options.plant.as_deref()) {
        let name = options.plant.as_deref().unwrap_or_default();
        let what = format!("{name} cannot be planted: see --plants, and use a build with debug assertions");
        return Err(io::Error::other(what));
    }
    // A violation is a panic that is caught; the runs that cut it down would repeat it again and again.
    std::panic::set_hook(Box::new(|_| {}));
    let began = Instant::now();
    let total = Mutex::new(Total::default());
    let next = AtomicU64::new(options.seeds.start);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..options.jobs.max(1) {
            scope.spawn(|| work(options, began, &next, &stop, &total));
        }
    });
    let mut total = total.into_inner().map_err(|_| io::Error::other("a run ended the simulator"))?;
    let seconds = began.elapsed().as_secs_f64();
    total.traces.sort();
    for (_, text) in &total.traces {
        write!(out, "{text}")?;
    }
    if let Some((plan, violation)) = total.violation {
        report(&mut out, options, &plan, violation)?;
        return Ok(false);
    }
    if options.trace {
        return Ok(true);
    }
    let runs = total.runs;
    let rate = runs as f64 / seconds.max(0.001);
    writeln!(
        out,
        "{runs} runs of {} steps in {seconds:.1} s ({rate:.1} a second), {} faults, at least {} in each",
        options.steps,
        total.faults,
        total.fewest_faults.unwrap_or(0)
    )?;
    write!(out, "{}", total.coverage.report())?;
    let missing = if runs >= MANY { total.coverage.missing() } else { Vec::new() };
    for name in &missing {
        writeln!(out, "never met: {name}")?;
    }
    let enough = options.steps < STEPS || total.fewest_faults.is_none_or(|fewest| fewest >= FAULTS);
    Ok(enough && missing.is_empty())
}

fn work(options: &Options, began: Instant, next: &AtomicU64, stop: &AtomicBool, total: &Mutex<Total>) {
    // Bugs are planted thread by thread; that there is such a bug was looked up before.
    plant(options.plant.as_deref());
    while !stop.load(Ordering::Relaxed) {
        let seed = next.fetch_add(1, Ordering::Relaxed);
        let late = options.time.is_some_and(|time| began.elapsed() >= time);
        if seed >= options.seeds.end || late {
            return;
        }
        let plan = Plan { seed, steps: options.steps, skipped: options.skipped.clone() };
        let outcome = run(&plan);
        let Ok(mut total) = total.lock() else { return };
        match outcome {
            Ok(outcome) => {
                total.runs += 1;
                total.faults += outcome.faults;
                total.fewest_faults =
                    Some(total.fewest_faults.map_or(outcome.faults, |fewest| fewest.min(outcome.faults)));
                total.coverage.add(&outcome.coverage);
                if options.trace {
                    let text = format!(
                        "seed {seed}: trace {:016x}, disk {:08x}\n{}{}",
                        outcome.trace,
                        outcome.disk,
                        outcome.metrics,
                        outcome.coverage.report()
                    );
                    total.traces.push((seed, text));
                }
            }
            Err(violation) => {
                stop.store(true, Ordering::Relaxed);
                // The lowest seed, so that the report does not depend on which was the quickest.
                if total.violation.as_ref().is_none_or(|(known, _)| seed < known.seed) {
                    total.violation = Some((plan, violation));
                }
            }
        }
    }
}

fn report(out: &mut impl Write, options: &Options, plan: &Plan, violation: Violation) -> io::Result<()> {
    writeln!(out, "seed {}: {}", plan.seed, violation.what)?;
    writeln!(out, "cutting it down…")?;
    let Shrunk { plan, violation, left } = shrink(plan, violation, options.shrinking);
    for line in &violation.trace {
        writeln!(out, "{line}")?;
    }
    writeln!(out, "seed {}, {left} steps: {}", plan.seed, violation.what)?;
    let skip =
        if plan.skipped.is_empty() { String::new() } else { format!(" --skip {}", text_of(&plan.skipped)) };
    let planted = options.plant.as_ref().map_or(String::new(), |name| format!(" --plant {name}"));
    writeln!(
        out,
        "again: cargo run -p felucca-tests --bin simulate -- --seed {} --steps {}{skip}{planted}",
        plan.seed, plan.steps
    )
}
