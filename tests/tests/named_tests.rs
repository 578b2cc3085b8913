//! The tables of docs/testing.md name a test for every rule of share groups and of the log; every one of them exists, and
//! every situation of the table of replies in docs/protocol.md is among the rules.

use std::path::Path;

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A chapter of a document.
fn chapter(document: &str, title: &str) -> String {
    let document = read(document);
    let (_, rest) = document.split_once(&format!("\n## {title}\n")).expect("it has the chapter");
    rest.split("\n## ").next().unwrap_or_default().to_owned()
}

/// First and last cell of every row of its tables.
fn rows(chapter: &str) -> Vec<(&str, &str)> {
    let rows = chapter.lines().filter(|line| line.starts_with('|') && !line.starts_with("|--"));
    let cells = rows.filter_map(|row| row.trim_matches(['|', ' ']).split_once(" | "));
    cells.map(|(first, rest)| (first, rest.rsplit(" | ").next().unwrap_or(rest))).collect()
}

#[test]
fn every_test_that_the_document_names_exists() {
    let document = ["Share groups", "The log"].map(|title| chapter("docs/testing.md", title)).concat();
    let mut count = 0;
    for (rule, tests) in rows(&document) {
        // Between backticks is every second piece.
        for named in tests.split('`').skip(1).step_by(2) {
            let (file, name) = named.split_once(": ").unwrap_or_else(|| panic!("{rule}: {named:?}"));
            let place = if file.contains('/') { "" } else { "broker/src/engine/share/tests/" };
            let source = read(&format!("{place}{file}"));
            let (attributes, _) = source
                .split_once(&format!("fn {name}()"))
                .unwrap_or_else(|| panic!("{rule}: {file} has no {name}"));
            let before = attributes.trim_end_matches("async ").trim_end();
            let is_test = before.lines().last().is_some_and(|line| {
                let line = line.trim();
                line == "#[test]" || line.starts_with("#[tokio::test")
            });
            assert!(is_test, "{rule}: {name} is not a test");
            count += 1;
        }
    }
    assert!(count > 60, "{count} tests are named");
}

#[test]
fn every_situation_of_the_table_of_replies_has_a_test() {
    let (protocol, testing) =
        (chapter("docs/protocol.md", "Share groups"), chapter("docs/testing.md", "Share groups"));
    let (_, table) = protocol.split_once("| Situation |").expect("the table of replies");
    let table = table.split("\n\n").next().unwrap_or_default();
    let tested = rows(&testing);
    let situations = rows(table);
    assert!(situations.len() >= 9, "{situations:?}");
    for (situation, _) in situations {
        let situation = situation.trim_start_matches("| ");
        let has_test = tested.iter().any(|(rule, tests)| *rule == situation && tests.contains('`'));
        assert!(has_test, "{situation}");
    }
}
