//! Measures Felucca and its peers, and in the same run the machine it runs on, so that each figure also reads as a share of what the
//! machine can do.
//!
//! * [`workload`]: what is measured, read from small TOML files; the standard ones are in `benches/workloads/`.
//! * [`run`]: takes workloads case by case, each against servers of its own, and gathers [`row::Row`]s.
//! * [`peer`]: who can be measured. [`server`]: starts and stops them. `driver`: talks to them, each through its own client.
//! * `measure`: one module per kind of work, the same for all drivers. `limits`: the machine.
//! * [`report`]: JSON lines, the tables, plots and the page.
//!
//! **Rules of measuring.** Rates are what was acknowledged within one window of elapsed time, after a warm-up, never a sum of
//! rates per thread. Latencies at a fixed rate count from the time at which a record was due, not from when its turn came.
//! Every answer is checked: a refused, lost or repeated record makes the measurement fail.

mod driver;
mod limits;
mod measure;
pub mod peer;
mod process;
pub mod report;
pub mod row;
pub mod run;
pub mod server;
pub mod workload;
