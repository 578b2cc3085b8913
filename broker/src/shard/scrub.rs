//! The thread that looks through sealed segments at a bounded rate; see [`Scrubber`].

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::log::{ScrubOptions, Scrubbed, Scrubber, Views};
use crate::status::StatusBoard;

/// Ends when dropped, within one piece.
#[derive(Debug)]
pub(crate) struct ScrubThread {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl ScrubThread {
    /// Starts the thread, if there is anything for it to do.
    ///
    /// # Errors
    /// No thread can be started.
    pub(crate) fn start(
        views: Arc<Views>,
        options: ScrubOptions,
        status: Arc<StatusBoard>,
    ) -> io::Result<Self> {
        if options.bytes_per_second == 0 {
            return Ok(Self { stop: None, thread: None });
        }
        let (stop, stopped) = channel::<()>();
        let work = move || {
            let mut scrubber = Scrubber::new(views);
            let mut began = Instant::now();
            let mut damaged = 0_u64;
            loop {
                let pause = match scrubber.step() {
                    Scrubbed::Whole(bytes) => {
                        status.scrubbed(bytes);
                        Duration::from_secs_f64(bytes as f64 / options.bytes_per_second as f64)
                    }
                    Scrubbed::Damaged(damage) => {
                        damaged += 1;
                        tracing::error!(
                            topic = %damage.topic,
                            partition = damage.partition.partition,
                            first = damage.offsets.start,
                            next_readable = damage.offsets.end,
                            file = %damage.file.display(),
                            position = damage.position,
                            reason = damage.reason,
                            "stored records are damaged"
                        );
                        status.damaged(damage);
                        Duration::from_secs(1)
                    }
                    Scrubbed::Round => {
                        tracing::debug!(damaged, took = ?began.elapsed(), "all sealed segments were looked through");
                        status.scrubbed_all();
                        let pause = options.interval.saturating_sub(began.elapsed());
                        (began, damaged) = (Instant::now() + pause, 0);
                        pause
                    }
                };
                if stopped.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
            }
        };
        let thread = thread::Builder::new().name("scrub".to_owned()).spawn(work)?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for ScrubThread {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(thread = "scrub", "ended by a panic");
        }
    }
}
