//! Whole runs of the command, with a broker and services as processes of their own.

#![allow(clippy::unwrap_used, reason = "a panic is how a test reports")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use rusqlite::Connection;
use serde_json::Value;

fn order_flow(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_order-flow")).args(arguments).env_remove("SMTP_URL").output().unwrap()
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A run that must reconcile; its report.
fn run(dir: &Path, arguments: &[&str]) -> Value {
    let report = dir.join("report.json");
    let output = order_flow(&[&["--report", report.to_str().unwrap()], arguments].concat());
    assert!(output.status.success(), "{}", text(&output));
    serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap()
}

/// What a kept run says when it is reconciled again.
fn reconcile(work_dir: &Path) -> Output {
    order_flow(&["reconcile", "--work-dir", work_dir.to_str().unwrap()])
}

fn assert_found(work_dir: &Path, figure: &str, what: &str) {
    let output = reconcile(work_dir);
    let text = text(&output);
    assert_eq!(output.status.code(), Some(1), "{what} was not found: {text}");
    assert!(text.lines().any(|line| line.starts_with(figure) && line.ends_with(" 1")), "{what}: {text}");
}

#[test]
fn a_run_reconciles_and_whatever_is_changed_afterwards_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let work_dir = dir.path().join("run");
    let report = run(dir.path(), &["--orders", "120", "--work-dir", work_dir.to_str().unwrap()]);
    let count = |name: &str| report[name].as_u64().unwrap_or_else(|| panic!("{name} in {report}"));
    assert_eq!(count("orders"), 120);
    assert_eq!(count("orders"), count("confirmed") + count("cancelled") + count("dead_lettered"));
    assert_eq!(count("mails"), count("orders") + count("confirmed") + count("cancelled"));
    assert_eq!(count("kills"), 0);

    let output = reconcile(&work_dir);
    assert!(output.status.success(), "{}", text(&output));

    let mail = any_mail(&work_dir.join("email/mailbox"));
    let aside = dir.path().join("aside.eml");
    std::fs::rename(&mail, &aside).unwrap();
    assert_found(&work_dir, "lost", "a deleted mail");
    std::fs::rename(&aside, &mail).unwrap();

    let ledger = Connection::open(work_dir.join("gateway/ledger.db")).unwrap();
    ledger.pragma_update(None, "foreign_keys", false).unwrap();
    let double = "INSERT INTO ledger (reference, customer, cents, declined)
                  SELECT reference, customer, cents, declined FROM ledger WHERE declined IS NULL LIMIT 1";
    ledger.execute(double, []).unwrap();
    assert_found(&work_dir, "duplicate charges", "a doubled charge");
    ledger.execute("DELETE FROM ledger WHERE sequence = last_insert_rowid()", []).unwrap();

    // The only two entries of a customer change places.
    let swap = "WITH last AS (SELECT customer, max(sequence) AS b FROM ledger GROUP BY customer HAVING count(*) = 2 LIMIT 1),
                     pair AS (SELECT max(l.sequence) AS a, b FROM ledger l JOIN last USING (customer) WHERE l.sequence < b)
                UPDATE ledger SET sequence = -sequence WHERE sequence IN (SELECT a FROM pair UNION SELECT b FROM pair)";
    assert_eq!(ledger.execute(swap, []).unwrap(), 2);
    assert_found(&work_dir, "order violations", "a swapped pair");
    ledger.execute("UPDATE ledger SET sequence = -sequence WHERE sequence < 0", []).unwrap();

    let output = reconcile(&work_dir);
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn a_run_with_kills_reconciles() {
    let dir = tempfile::tempdir().unwrap();
    let report = run(dir.path(), &["--orders", "300", "--chaos", "--seed", "7"]);
    assert!(report["kills"].as_u64().unwrap() >= 12, "{report}");
    for zero in ["duplicate_charges", "duplicate_mails", "order_violations", "lost"] {
        assert_eq!(report[zero], 0, "{report}");
    }
}

/// A short outage, and one poison order.
const OUTAGE: [&str; 6] = ["--scenario", "gateway-outage", "--outage", "4s", "--orders", "400"];

#[test]
fn an_outage_kills_no_order_and_poison_only_itself() {
    let dir = tempfile::tempdir().unwrap();
    // That only the poison order is dead, and every customer's order of charges, is part of what reconciles.
    let report = run(dir.path(), &OUTAGE);
    assert_eq!(report["order_violations"], 0, "{report}");
    let dead = report["dead_lettered"].as_u64().unwrap();
    assert_eq!(report["confirmed"].as_u64().unwrap() + report["cancelled"].as_u64().unwrap() + dead, 400);
}

#[test]
fn without_the_outage_guard_orders_of_the_outage_are_dead_and_the_rest_keeps_its_order() {
    let dir = tempfile::tempdir().unwrap();
    let work_dir = dir.path().join("run");
    let kept = ["--outage-guard", "off", "--work-dir", work_dir.to_str().unwrap()];
    let report = run(dir.path(), &[&OUTAGE[..], &kept].concat());
    assert!(report["dead_lettered"].as_u64().unwrap() > 10, "{report}");
    assert_eq!((&report["order_violations"], &report["lost"]), (&0.into(), &0.into()), "{report}");
    let output = reconcile(&work_dir);
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn a_bug_makes_dead_letters_and_its_fix_and_a_redrive_complete_them() {
    let dir = tempfile::tempdir().unwrap();
    let work_dir = dir.path().join("run");
    let kept = ["--scenario", "fixed-bug", "--orders", "400", "--work-dir", work_dir.to_str().unwrap()];
    // That each order which met the bug has a dead letter and is completed all the same is part of what reconciles.
    let report = run(dir.path(), &kept);
    assert_eq!((&report["duplicate_charges"], &report["lost"]), (&0.into(), &0.into()), "{report}");
    let output = reconcile(&work_dir);
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn other_purchases_can_be_placed() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("purchases.csv");
    std::fs::write(
        &input,
        "customer,date,cds,dollars\r\nada,1997-01-01,1,10.00\r\nada,1997-01-01,1,10.00\r\n",
    )
    .unwrap();
    let report = run(dir.path(), &["--input", input.to_str().unwrap()]);
    assert_eq!(
        (&report["orders"], &report["customers"], &report["cents"]),
        (&2.into(), &1.into(), &2_000.into())
    );
}

#[test]
fn an_input_that_is_none_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("purchases.txt");
    std::fs::write(&input, "1 1 19970101 1 5.00\r\n1 1 19970101 1 five\r\n").unwrap();
    let output = order_flow(&["--input", input.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("line 2: `five`"), "{}", text(&output));
}

fn any_mail(mailbox: &Path) -> PathBuf {
    let mut files = std::fs::read_dir(mailbox).unwrap().map(|entry| entry.unwrap().path());
    files.find(|path| path.extension().is_some_and(|extension| extension == "eml")).unwrap()
}
