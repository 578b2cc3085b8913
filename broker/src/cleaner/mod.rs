//! The cleaner: compacts logs by key, and copies aside what share groups pin, beside the shard and slower than it could.
//!
//! The engine says what is to be cleaned and what must stay ([`crate::engine::cleaning`]); what is decided here is only which
//! records of a key are old. One thread cleans one partition at a time: memory is bounded by the map of keys, reading and
//! writing by a rate.
//!
//! Order of reading: [`pass`] (one cleaning), [`judge`] (what is kept), [`keys`], [`pace`]; [`stepped`] is the cleaner without a
//! thread.

mod judge;
mod keys;
mod pace;
mod pass;
mod stepped;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use pace::{Pace, Stop};
pub use pass::{CleanError, Cleaned};
pub use stepped::{Step, SteppedCleaner};

use crate::broker::{Broker, BrokerError};
use crate::engine::command::Command;
use crate::engine::effect::Reply;

#[derive(Clone, Debug)]
pub struct CleanerOptions {
    /// Pause between two looks for work.
    pub interval: Duration,
    /// Memory for keys; what has more keys is cleaned in several goes.
    pub key_bytes: u64,
    /// Read and written together.
    pub bytes_per_second: u64,
}

/// The thread that cleans. One that is dropped ends after what it is at, without being waited for.
#[derive(Debug)]
pub struct Cleaner {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

impl Cleaner {
    /// # Errors
    /// The thread cannot be started.
    pub fn start(broker: Broker, options: CleanerOptions) -> io::Result<Self> {
        let stop = Arc::new(Stop::default());
        let thread = std::thread::Builder::new().name("cleaner".into()).spawn({
            let stop = Arc::clone(&stop);
            move || {
                while !stop.wait(options.interval) {
                    work(&broker, &options, &stop);
                }
            }
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Ends it and waits for that. Blocks.
    pub fn stop(mut self) {
        self.stop.set();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the cleaner panicked");
        }
    }
}

impl Drop for Cleaner {
    fn drop(&mut self) {
        self.stop.set();
    }
}

/// Cleans until there is nothing to clean.
fn work(broker: &Broker, options: &CleanerOptions, stop: &Stop) {
    while !stop.wait(Duration::ZERO) {
        match clean_next(broker, options, stop) {
            Ok(true) => {}
            Ok(false) | Err(CleanError::Stopping) => return,
            // The partition is left alone for a while; others may have their turn.
            Err(error) => {
                tracing::error!(%error, "a cleaning ended early");
                return;
            }
        }
    }
}

/// Cleans the partition that is most in need of it; false when there is none.
fn clean_next(broker: &Broker, options: &CleanerOptions, stop: &Stop) -> Result<bool, CleanError> {
    let cleaning = match broker.call_blocking(Command::NextCleaning)? {
        Reply::Cleaning(Some(cleaning)) => cleaning,
        Reply::Cleaning(None) => return Ok(false),
        _ => return Err(BrokerError::Unexpected("NextCleaning").into()),
    };
    let mut pace = Pace::new(options.bytes_per_second, stop);
    let partition = cleaning.partition;
    let Cleaned { bytes_before, bytes_after, dropped, cut_short } =
        pass::run(broker, cleaning, options.key_bytes, &mut pace)?;
    tracing::info!(
        %partition,
        bytes_before,
        bytes_after,
        dropped,
        cut_short,
        "cleaned"
    );
    Ok(true)
}
