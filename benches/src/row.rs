//! One measurement as it is reported.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::workload::Ack;

/// One repetition of one case. What does not apply, or could not be read, is `None` (`null` in JSON).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Name of the workload, `limits` for the machine.
    pub workload: String,
    /// Of limits: the workload beside which they were measured.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub beside: String,
    /// The variant of the workload.
    pub case: String,
    /// Who was measured: a peer's name, or `machine`.
    pub peer: String,
    pub peer_version: Option<String>,
    /// How the server was set up.
    #[serde(default)]
    pub settings: Option<String>,
    /// What an acknowledgement meant.
    pub ack: Option<Ack>,
    /// What it means in this case to Felucca: the strongest level that a peer beside it may have.
    #[serde(default)]
    pub level: Option<Ack>,
    /// Counts from 1.
    pub rep: u32,
    /// Records, or operations, within the measured time.
    pub records: Option<u64>,
    pub seconds: Option<f64>,
    pub records_per_s: Option<f64>,
    /// Of record values (of whole batches where encoded batches are sent).
    pub bytes_per_s: Option<f64>,
    /// At which records were sent, where that is fixed, in records per second.
    #[serde(default)]
    pub rate: Option<u32>,
    /// As long as the server took until it had come to rest counts too: what it can take in all the time.
    #[serde(default)]
    pub sustained_records_per_s: Option<f64>,
    #[serde(default)]
    pub sustained_bytes_per_s: Option<f64>,
    /// From the last acknowledgement until the server came to rest.
    #[serde(default)]
    pub drain_s: Option<f64>,
    pub p50_us: Option<f64>,
    pub p99_us: Option<f64>,
    pub p999_us: Option<f64>,
    /// Processor time of the server within the measured time.
    pub server_cpu_s: Option<f64>,
    /// Processor time of this process within the measured time.
    pub client_cpu_s: Option<f64>,
    /// Resident memory of the server at the end.
    pub server_rss_bytes: Option<u64>,
    /// Bytes that reached the device of the server's data within the measured time, by whomever; what is still in the page
    /// cache is not in it.
    pub disk_bytes: Option<u64>,
    /// Size of the server's program without symbols.
    #[serde(default)]
    pub binary_bytes: Option<u64>,
    /// Latencies as pairs of percentile and microseconds.
    #[serde(default)]
    pub percentiles: Vec<(f64, f64)>,
    /// Records (requests, where encoded batches are sent) in each tenth of a second.
    #[serde(default)]
    pub timeline: Vec<u64>,
}

impl Row {
    /// Sets records, seconds and the rates that follow from them.
    pub(crate) fn set_rate(&mut self, records: u64, bytes_per_record: u64, elapsed: Duration) {
        let seconds = elapsed.as_secs_f64();
        self.records = Some(records);
        self.seconds = Some(seconds);
        self.records_per_s = Some(records as f64 / seconds);
        if bytes_per_record > 0 {
            self.bytes_per_s = Some(records as f64 * bytes_per_record as f64 / seconds);
        }
    }

    /// Two measurements of the same one after the other, as one.
    pub(crate) fn and(self, after: &Self) -> Self {
        fn both<T: std::ops::Add<Output = T>>(first: Option<T>, second: Option<T>) -> Option<T> {
            Some(first? + second?)
        }
        let records = both(self.records, after.records);
        let seconds = both(self.seconds, after.seconds);
        let rate = |amount: Option<f64>| Some(amount? / seconds?);
        let bytes = |row: &Self| Some(row.bytes_per_s? * row.seconds?);
        Self {
            records,
            seconds,
            records_per_s: rate(records.map(|records| records as f64)),
            bytes_per_s: rate(both(bytes(&self), bytes(after))),
            server_cpu_s: both(self.server_cpu_s, after.server_cpu_s),
            client_cpu_s: both(self.client_cpu_s, after.client_cpu_s),
            disk_bytes: both(self.disk_bytes, after.disk_bytes),
            server_rss_bytes: self.server_rss_bytes.max(after.server_rss_bytes),
            ..self
        }
    }

    /// Sets the percentiles from latencies in nanoseconds; leaves them out when there are none.
    pub(crate) fn set_latencies(&mut self, nanoseconds: &Histogram<u64>) {
        if nanoseconds.is_empty() {
            return;
        }
        let quantile = |q| Some(nanoseconds.value_at_quantile(q) as f64 / 1e3);
        self.p50_us = quantile(0.5);
        self.p99_us = quantile(0.99);
        self.p999_us = quantile(0.999);
        self.percentiles = PERCENTILES
            .iter()
            .map(|percentile| (*percentile, nanoseconds.value_at_percentile(*percentile) as f64 / 1e3))
            .collect();
    }
}

/// Points of a latency curve, denser towards the end.
const PERCENTILES: &[f64] = &[0.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.5, 99.9, 99.95, 99.99, 100.0];
/// Longest latency that is told from longer ones.
const LONGEST: Duration = Duration::from_secs(3600);

/// An empty histogram of nanoseconds, three digits.
pub(crate) fn latencies() -> Histogram<u64> {
    Histogram::new_with_max(LONGEST.as_nanos() as u64, 3).expect("the bounds are possible")
}

/// Adds one latency.
pub(crate) fn record(histogram: &mut Histogram<u64>, latency: Duration) {
    histogram.saturating_record(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_in_microseconds() {
        let mut histogram = latencies();
        let mut row = Row::default();
        row.set_latencies(&histogram);
        assert_eq!(row.p50_us, None);
        for _ in 0..99 {
            record(&mut histogram, Duration::from_micros(250));
        }
        record(&mut histogram, Duration::from_secs(7200));
        row.set_latencies(&histogram);
        let near = |figure: Option<f64>, expected: f64| (figure.unwrap() / expected - 1.0).abs() < 1e-3;
        assert!(near(row.p50_us, 250.0) && near(row.p99_us, 250.0), "{row:?}");
        assert!(near(row.p999_us, 3.6e9), "{row:?}");
    }

    #[test]
    fn rates_follow_from_the_elapsed_time() {
        let mut row = Row::default();
        row.set_rate(1000, 100, Duration::from_millis(500));
        assert_eq!((row.records_per_s, row.bytes_per_s), (Some(2000.0), Some(200_000.0)));
        row.set_rate(1000, 0, Duration::from_secs(1));
        assert_eq!(row.records_per_s, Some(1000.0));
    }

    #[test]
    fn two_measurements_are_one_of_both_together() {
        let row = |records, seconds| {
            let mut row = Row { server_cpu_s: Some(0.5), ..Row::default() };
            row.set_rate(records, 100, Duration::from_secs(seconds));
            row
        };
        let both = row(1000, 1).and(&row(5000, 2));
        assert_eq!((both.records, both.seconds, both.server_cpu_s), (Some(6000), Some(3.0), Some(1.0)));
        assert_eq!((both.records_per_s, both.bytes_per_s), (Some(2000.0), Some(200_000.0)));
        assert_eq!(both.client_cpu_s, None);
    }
}
