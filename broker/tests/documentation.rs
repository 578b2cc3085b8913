//! What the documents say of settings and commands is what there is.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use felucca_broker::config::KEYS;
use felucca_broker::settings::ServerSettings;

const BEGIN: &str = "<!-- settings: begin -->\n";
const END: &str = "<!-- settings: end -->";

fn document(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name)
}

fn settings_table() -> String {
    let defaults = ServerSettings::default();
    let mut table = String::from("| Key | Default | Possible | Meaning |\n|---|---|---|---|\n");
    for key in KEYS {
        writeln!(table, "| `{}` | `{}` | {} | {} |", key.name, key.show(&defaults), key.allowed(), key.help)
            .unwrap();
    }
    table
}

/// `UPDATE_DOCS=1` rewrites the table instead of comparing it.
#[test]
fn the_table_of_settings_is_complete() {
    let path = document("docs/configuration.md");
    let text = fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(BEGIN).expect("the mark before the table");
    let (table, after) = rest.split_once(END).expect("the mark after the table");
    let wanted = settings_table();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&path, format!("{before}{BEGIN}{wanted}{END}{after}")).unwrap();
    } else {
        assert_eq!(table, wanted, "docs/configuration.md is out of date; `just docs-config` writes it");
    }
}

/// Paths of all subcommands, from the help texts: `topic create`.
fn subcommands(path: &[&str], found: &mut Vec<String>) {
    let output = Command::new(env!("CARGO_BIN_EXE_felucca")).args(path).arg("--help").output().unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    let Some((_, commands)) = help.split_once("\nCommands:\n") else {
        found.push(path.join(" "));
        return;
    };
    for line in commands.lines().take_while(|line| line.starts_with("  ")) {
        let name = line.split_whitespace().next().unwrap();
        // A longer description continues further to the right.
        if name != "help" && !line.starts_with("   ") {
            subcommands(&[path, &[name]].concat(), found);
        }
    }
}

#[test]
fn every_subcommand_is_described() {
    let text = fs::read_to_string(document("docs/cli.md")).unwrap();
    let mut found = Vec::new();
    subcommands(&[], &mut found);
    assert!(found.len() > 20, "{found:?}");
    for command in found {
        assert!(
            text.contains(&format!("`felucca {command}")),
            "docs/cli.md does not describe `felucca {command}`"
        );
    }
}

/// Targets of `[text](target)`.
fn links(text: &str) -> impl Iterator<Item = &str> {
    text.split("](").skip(1).filter_map(|rest| rest.split_once(')').map(|(target, _)| target))
}

#[test]
fn links_between_documents_lead_somewhere() {
    let root = document(".");
    let mut documents: Vec<PathBuf> =
        fs::read_dir(document("docs")).unwrap().map(|entry| entry.unwrap().path()).collect();
    documents.extend(fs::read_dir(&root).unwrap().map(|entry| entry.unwrap().path()));
    documents.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
    assert!(documents.len() > 5, "{documents:?}");
    for path in documents {
        let text = fs::read_to_string(&path).unwrap();
        for target in links(&text).filter(|target| !target.contains("://") && !target.starts_with('#')) {
            let file = target.split('#').next().unwrap();
            let found = path.parent().unwrap().join(file).exists();
            assert!(found, "{} links to {target}, which does not exist", path.display());
        }
    }
}
