//! `felucca config`: the settings of `serve` as they would be in force.

use felucca_broker::config::KEYS;
use felucca_broker::settings::ServerSettings;
use serde::Serialize;

use super::output::{Column, Format, print_json, print_table};
use super::serve::Sources;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  felucca config
  felucca config --config felucca.toml --output json")]
pub(super) struct Config {
    #[command(flatten)]
    sources: Sources,
}

#[derive(Serialize)]
struct Row {
    key: &'static str,
    value: String,
    default: String,
    origin: String,
    environment: String,
    allowed: String,
    help: &'static str,
}

impl Config {
    pub(super) fn run(self, format: Format) -> anyhow::Result<()> {
        let loaded = self.sources.load()?;
        let defaults = ServerSettings::default();
        let rows = KEYS.iter().zip(&loaded.origins).map(|(key, origin)| Row {
            key: key.name,
            value: key.show(&loaded.settings),
            default: key.show(&defaults),
            origin: origin.to_string(),
            environment: key.env(),
            allowed: key.allowed(),
            help: key.help,
        });
        match format {
            Format::Json => print_json(&rows.collect::<Vec<_>>())?,
            Format::Table => print_table(
                &[Column::Text("KEY"), Column::Text("VALUE"), Column::Text("FROM"), Column::Text("MEANING")],
                rows.map(|row| vec![row.key.to_owned(), row.value, row.origin, row.help.to_owned()])
                    .collect(),
            )?,
        }
        Ok(())
    }
}
