//! The simulator in short; see `felucca_tests::sim`. `.ci/run` runs more of it, docs/testing.md says how to run it for long.

use std::process::Command;

use felucca_broker::plants::{PLANTS, plant};
use felucca_tests::sim::{FAULTS, Plan, STEPS, run};

/// Seeds within which a planted bug must be found.
const SEEDS: u64 = 1_000;

fn simulate(arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_simulate")).args(arguments).output().expect("it runs");
    (output.status.code(), String::from_utf8(output.stdout).expect("text"))
}

#[test]
fn some_seeds_keep_every_rule() {
    for seed in 1..=12 {
        match run(&Plan::new(seed, STEPS)) {
            Ok(outcome) => assert!(outcome.faults >= FAULTS, "seed {seed} met {} faults", outcome.faults),
            Err(violation) => panic!("{}\nseed {seed}: {}", violation.trace.join("\n"), violation.what),
        }
    }
}

#[test]
fn a_seed_means_the_same_in_every_process() {
    let (status, first) = simulate(&["--seeds", "20..26", "--trace"]);
    assert_eq!(status, Some(0), "{first}");
    assert_eq!(first.matches("trace ").count(), 6, "{first}");
    let (_, second) = simulate(&["--seeds", "20..26", "--trace", "--jobs", "3"]);
    assert_eq!(first, second);
}

#[test]
fn every_planted_bug_is_found() {
    let found = |name: &str| {
        assert!(plant(Some(name)));
        let found = (1..=SEEDS).any(|seed| run(&Plan::new(seed, STEPS)).is_err());
        assert!(plant(None));
        found
    };
    let missed: Vec<&str> = PLANTS.iter().map(|bug| bug.name).filter(|name| !found(name)).collect();
    assert!(missed.is_empty(), "{missed:?} are not found by {SEEDS} seeds");
}

#[test]
fn a_planted_bug_is_found_and_cut_down() {
    let name = "reply-before-sync";
    let (status, report) = simulate(&["--seeds", &format!("1..{SEEDS}"), "--plant", name, "--shrink", "5"]);
    assert_eq!(status, Some(1), "{report}");
    let again = report.lines().last().expect("a report");
    let arguments = again.split_once("-- ").expect("how to see it again").1;
    let (status, report) =
        simulate(&[&arguments.split(' ').collect::<Vec<_>>()[..], &["--shrink", "0"]].concat());
    assert_eq!(status, Some(1), "{report}");
}

#[test]
fn bugs_are_listed_and_others_refused() {
    let (status, list) = simulate(&["--plants"]);
    assert_eq!((status, list.lines().count()), (Some(0), PLANTS.len()));
    assert!(PLANTS.len() >= 12);
    assert_eq!(simulate(&["--plant", "no-such-bug"]).0, Some(2));
}
