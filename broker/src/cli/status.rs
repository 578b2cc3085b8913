//! `felucca status`.

use std::time::{Duration, UNIX_EPOCH};

use anyhow::bail;
use felucca_client::{BrokerCondition, BrokerDescription, Client, DamagedRange};
use serde_json::{Value, json};

use super::output::{Format, counted, or_dash, print_json, print_line, show_bytes, show_millis};

pub(super) async fn run(client: Client, format: Format) -> anyhow::Result<()> {
    let broker = client.admin().describe_broker().await?;
    match format {
        Format::Json => print_json(&to_json(&broker))?,
        Format::Table => {
            for line in to_lines(&broker) {
                print_line(&line)?;
            }
        }
    }
    match (broker.condition(), broker.damaged_ranges) {
        (BrokerCondition::Ok, 0) => Ok(()),
        (BrokerCondition::Ok, damaged) => bail!("{} cannot be read", counted(damaged, "range of records")),
        (BrokerCondition::DiskFull, _) => {
            bail!("new records are refused; make room on the disk, and they are taken again")
        }
        (BrokerCondition::ReadOnly, _) => {
            bail!("nothing is taken any more; mend the cause and restart the broker")
        }
        (BrokerCondition::Unspecified, _) => {
            bail!("the broker is in a condition that this version does not know")
        }
    }
}

fn name(condition: BrokerCondition) -> &'static str {
    match condition {
        BrokerCondition::Ok => "ok",
        BrokerCondition::DiskFull => "disk-full",
        BrokerCondition::ReadOnly => "read-only",
        BrokerCondition::Unspecified => "unknown",
    }
}

fn to_json(broker: &BrokerDescription) -> Value {
    let damaged = broker.damaged.iter().map(|range| {
        json!({"topic": range.topic, "partition": range.partition, "first_offset": range.first_offset,
            "end_offset": range.end_offset, "file": range.file, "position": range.position, "reason": range.reason})
    });
    json!({
        "condition": name(broker.condition()), "reason": broker.reason, "since_ms": broker.since_ms,
        "version": broker.version, "boot_epoch": broker.boot_epoch, "uptime_ms": broker.uptime_ms,
        "disk_available_bytes": broker.disk_available_bytes, "disk_low_water_bytes": broker.disk_low_water_bytes,
        "journal_bytes": broker.journal_bytes,
        "checkpoint_lsn": broker.checkpoint_lsn, "checkpoint_ms": broker.checkpoint_ms,
        "scrubbed_bytes": broker.scrubbed_bytes, "scrubbed_ms": broker.scrubbed_ms,
        "damaged_ranges": broker.damaged_ranges, "damaged": damaged.collect::<Vec<_>>(),
    })
}

fn to_lines(broker: &BrokerDescription) -> Vec<String> {
    let mut lines = vec![format!("condition   {}", name(broker.condition()))];
    if !broker.reason.is_empty() {
        lines.push(format!("reason      {}", broker.reason));
    }
    let available = or_dash(broker.disk_available_bytes.map(show_bytes));
    lines.extend([
        format!("since       {}", show_time(broker.since_ms)),
        format!(
            "broker      {}, run {}, up for {}",
            broker.version,
            broker.boot_epoch,
            show_millis(broker.uptime_ms)
        ),
        format!(
            "disk        {available} available, records are refused below {}",
            show_bytes(broker.disk_low_water_bytes)
        ),
        format!("journal     {} since the last checkpoint", show_bytes(broker.journal_bytes)),
        format!(
            "checkpoint  {}",
            broker.checkpoint_ms.map_or_else(|| "before this run".to_owned(), show_time)
        ),
        format!(
            "scrubbed    {} in this run, all of it last at {}",
            show_bytes(broker.scrubbed_bytes),
            or_dash(broker.scrubbed_ms.map(show_time))
        ),
        format!("damaged     {}", counted(broker.damaged_ranges, "range")),
    ]);
    lines.extend(broker.damaged.iter().map(show_damage));
    lines
}

fn show_damage(range: &DamagedRange) -> String {
    let DamagedRange { topic, partition, first_offset, end_offset, file, position, reason } = range;
    format!(
        "  {topic}/{partition} from offset {first_offset} to {end_offset}: {file} at byte {position}: {reason}"
    )
}

fn show_time(unix_ms: i64) -> String {
    let after = Duration::from_millis(unix_ms.try_into().unwrap_or_default());
    UNIX_EPOCH
        .checked_add(after)
        .map_or_else(|| unix_ms.to_string(), |time| humantime::format_rfc3339_seconds(time).to_string())
}
