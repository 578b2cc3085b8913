//! How a record looks on a line.

use std::io::{self, Write};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use felucca_client::ConsumedRecord;
use serde::ser::{Serialize, SerializeMap, SerializeSeq, Serializer};

use super::output::Format;

/// A record as `{"topic","partition","offset","timestamp","key","value","headers"}`. Bytes that are not UTF-8 are base64, and
/// a member beside them says so: `"value_encoding":"base64"`. Headers are a list, as they may repeat.
pub(super) struct Line<'a>(pub(super) &'a ConsumedRecord);

impl Serialize for Line<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let record = self.0;
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("topic", &*record.topic)?;
        map.serialize_entry("partition", &record.partition)?;
        map.serialize_entry("offset", &record.offset)?;
        map.serialize_entry("timestamp", &record.timestamp)?;
        serialize_bytes(&mut map, "key", "key_encoding", record.key.as_deref())?;
        serialize_bytes(&mut map, "value", "value_encoding", record.value.as_deref())?;
        map.serialize_entry("headers", &Headers(record))?;
        map.end()
    }
}

struct Headers<'a>(&'a ConsumedRecord);

impl Serialize for Headers<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(Some(self.0.headers.len()))?;
        for header in &self.0.headers {
            list.serialize_element(&OneHeader { name: &header.name, value: header.value.as_deref() })?;
        }
        list.end()
    }
}

struct OneHeader<'a> {
    name: &'a str,
    value: Option<&'a [u8]>,
}

impl Serialize for OneHeader<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("name", self.name)?;
        serialize_bytes(&mut map, "value", "value_encoding", self.value)?;
        map.end()
    }
}

fn serialize_bytes<M: SerializeMap>(
    map: &mut M,
    name: &'static str,
    encoding: &'static str,
    bytes: Option<&[u8]>,
) -> Result<(), M::Error> {
    match bytes.map(|bytes| (bytes, std::str::from_utf8(bytes))) {
        None => map.serialize_entry(name, &()),
        Some((_, Ok(text))) => map.serialize_entry(name, text),
        Some((bytes, Err(_))) => {
            map.serialize_entry(name, &BASE64_STANDARD.encode(bytes))?;
            map.serialize_entry(encoding, "base64")
        }
    }
}

/// Writes a record as one line.
pub(super) fn write(out: &mut impl Write, record: &ConsumedRecord, format: Format) -> io::Result<()> {
    match format {
        Format::Json => {
            serde_json::to_writer(&mut *out, &Line(record))?;
            out.write_all(b"\n")
        }
        Format::Table => {
            write!(out, "{}\t{}\t{}\t", record.partition, record.offset, show_time(record.timestamp))?;
            write_cell(out, record.key.as_deref())?;
            out.write_all(b"\t")?;
            write_cell(out, record.value.as_deref())?;
            out.write_all(b"\n")
        }
    }
}

/// One cell of a line for people: control characters and foreign bytes are escaped, so that a line stays a line.
fn write_cell(out: &mut impl Write, bytes: Option<&[u8]>) -> io::Result<()> {
    let Some(bytes) = bytes else {
        return out.write_all(b"-");
    };
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c.is_control() { write!(out, "{}", c.escape_default())? } else { write!(out, "{c}")? }
        }
        for byte in chunk.invalid() {
            write!(out, "\\x{byte:02x}")?;
        }
    }
    Ok(())
}

/// Unix milliseconds as RFC 3339; what lies outside the calendar stays a number.
pub(super) fn show_time(millis: i64) -> String {
    jiff::Timestamp::from_millisecond(millis).map_or_else(|_| millis.to_string(), |time| format!("{time:.3}"))
}
