//! A cleaner without a thread: whoever owns it says when it goes on. For simulation, beside [`crate::shard::Stepped`].
//!
//! Dropping it at any moment is the death of the process.

use tokio::sync::oneshot::Receiver;
use tokio::sync::oneshot::error::TryRecvError;

use super::pace::{Pace, Stop};
use super::pass::{CleanError, Cleaned, Pass};
use crate::broker::{Broker, BrokerError};
use crate::engine::cleaning::Goal;
use crate::engine::command::Command;
use crate::engine::effect::Reply;
use crate::engine::error::EngineError;

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It waits for the shard, or there is nothing to clean.
    Nothing,
    Work,
    /// A cleaning has ended.
    Cleaned(Goal, Cleaned),
}

/// See the module's documentation.
#[derive(Debug)]
pub struct SteppedCleaner {
    broker: Broker,
    key_bytes: u64,
    stop: Stop,
    pass: Option<Pass>,
    asked: Option<Receiver<Reply>>,
}

impl SteppedCleaner {
    /// `key_bytes`: memory for keys.
    pub fn new(broker: Broker, key_bytes: u64) -> Self {
        Self { broker, key_bytes, stop: Stop::default(), pass: None, asked: None }
    }

    /// Goes on until it needs the shard: one file, or a few, is written meanwhile.
    ///
    /// # Errors
    /// The cleaning under way has ended early; the next step begins another one.
    pub fn step(&mut self) -> Result<Step, CleanError> {
        let done = self.try_step();
        if done.is_err() {
            (self.pass, self.asked) = (None, None);
        }
        done
    }

    fn try_step(&mut self) -> Result<Step, CleanError> {
        // As fast as it can.
        let pace = &mut Pace::new(u64::MAX, &self.stop);
        if let Some(asked) = &mut self.asked {
            let answer = match asked.try_recv() {
                Ok(Reply::Error(error)) => Err(BrokerError::from(error)),
                Ok(reply) => Ok(reply),
                Err(TryRecvError::Empty) => return Ok(Step::Nothing),
                Err(TryRecvError::Closed) => Err(EngineError::Stopping.into()),
            };
            self.asked = None;
            match &mut self.pass {
                Some(pass) => pass.answered(answer)?,
                None => match answer? {
                    Reply::Cleaning(Some(cleaning)) => {
                        self.pass = Some(Pass::begin(&self.broker, cleaning, self.key_bytes, pace)?);
                    }
                    Reply::Cleaning(None) => return Ok(Step::Nothing),
                    _ => return Err(BrokerError::Unexpected("NextCleaning").into()),
                },
            }
            return Ok(Step::Work);
        }
        let command = match &mut self.pass {
            None => Command::NextCleaning,
            Some(pass) => match pass.next(pace)? {
                Some(command) => command,
                None => {
                    let (goal, done) = (pass.goal, pass.done);
                    self.pass = None;
                    return Ok(Step::Cleaned(goal, done));
                }
            },
        };
        self.asked = Some(self.broker.ask(command));
        Ok(Step::Work)
    }
}
