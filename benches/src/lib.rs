//! Measures Felucca, and in the same run the machine it runs on, so that each figure also reads as a share of what the
//! machine can do.
//!
//! * [`workload`]: what is measured, read from small TOML files; the standard ones are in `benches/workloads/`.
//! * [`run`]: takes workloads case by case, each against a broker of its own, and gathers [`row::Row`]s.
//! * [`broker`]: starts and stops the broker. `measure`: one module per kind of work. `limits`: the machine.
//! * [`report`]: JSON lines and the table.
//!
//! **Rules of measuring.** Rates are what was acknowledged within one window of elapsed time, after a warm-up, never a sum of
//! rates per thread. Latencies at a fixed rate count from the time at which a record was due, not from when its turn came.
//! Every answer is checked: a refused, lost or repeated record makes the measurement fail.

pub mod broker;
mod limits;
mod measure;
mod process;
pub mod report;
pub mod row;
pub mod run;
pub mod workload;
