//! What `felucca log verify` looks at beside the segments: the checkpoint files, and which segments they speak of.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use felucca_broker::checkpoint::{Whole, inspect, read_rows};
use felucca_broker::disk::RealDisk;
use felucca_broker::engine::Engine;
use felucca_broker::engine::config::EngineSettings;
use felucca_broker::log::SegmentFile;
use serde_json::{Value, json};

use super::super::output::{Format, counted, print_json, print_line};
use super::are_damaged;

pub(super) fn verify(data_dir: &Path, format: Format) -> anyhow::Result<()> {
    let dir = data_dir.join("checkpoint");
    let found = match inspect(&RealDisk, &dir) {
        // There was none yet.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found.with_context(|| format!("cannot read {}", dir.display()))?,
    };
    let mut problems = Vec::new();
    for file in &found {
        match &file.state {
            Ok(Whole { lsn, rows }) => {
                let text = format!("checkpoint after frame {lsn}, {}", counted(*rows, "row"));
                print(format, &json!({"file": file.file, "lsn": lsn, "rows": rows, "damage": []}), &text)?;
            }
            Err(reason) => problems.push((file.file.clone(), reason.clone())),
        }
    }
    let whole = found.iter().filter_map(|file| Some((file.state.as_ref().ok()?.lsn, &file.file)));
    if let Some((_, newest)) = whole.max() {
        problems.extend(not_as_stated(data_dir, newest)?);
    }
    for (file, reason) in &problems {
        let text = format!("DAMAGED  {}: {reason}", file.display());
        print(format, &json!({"file": file, "damage": [reason]}), &text)?;
    }
    if problems.is_empty() { Ok(()) } else { bail!("{}", are_damaged(problems.len() as u64, "file")) }
}

/// Segments that are not as a checkpoint says.
fn not_as_stated(data_dir: &Path, file: &Path) -> anyhow::Result<Vec<(PathBuf, String)>> {
    let mut engine = Engine::new(EngineSettings::default());
    read_rows(&RealDisk, file, |key, value| engine.restore_row(key, value))
        .with_context(|| format!("cannot read {}", file.display()))?;
    let mut problems = Vec::new();
    for (name, bytes) in engine.partitions().flat_map(|info| info.segments) {
        let path = SegmentFile::path_of(data_dir, name);
        match std::fs::metadata(&path) {
            Ok(found) if found.len() >= bytes => {}
            Ok(found) => {
                problems.push((path, format!("{} bytes of at least {bytes} are there", found.len())));
            }
            // Nothing was ever written to it, or its topic was deleted since.
            Err(_) if bytes == 0 || !path.ancestors().nth(2).is_some_and(Path::exists) => {}
            Err(error) => problems.push((path, error.to_string())),
        }
    }
    Ok(problems)
}

fn print(format: Format, value: &Value, text: &str) -> io::Result<()> {
    match format {
        Format::Json => print_json(value),
        Format::Table => print_line(text),
    }
}
