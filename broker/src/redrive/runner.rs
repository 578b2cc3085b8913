//! Carries out the redrives that are to run: one task for each, which finds letters and has the engine move them.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::{sleep, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::find::{Piece, piece};
use crate::broker::{Broker, BrokerError};
use crate::engine::command::{Command, FoundLetters};
use crate::engine::effect::Reply;
use crate::engine::error::EngineError;
use crate::engine::event::RedriveRow;
use crate::engine::redrive::state;

/// How often it is looked for redrives that nobody has told of: those of a former run.
const LOOK: Duration = Duration::from_secs(1);
/// Letters moved in one frame.
const TOGETHER: usize = 256;
/// Pause after a failure that may pass, and before looking again for letters that are not visible yet.
const PAUSE: Duration = Duration::from_millis(200);

/// Runs until the broker stops.
pub(crate) async fn run(broker: Broker) {
    let mut tasks: HashMap<String, AbortOnDropHandle<()>> = HashMap::new();
    loop {
        if let Ok(Reply::Redrives(rows)) = broker.call(Command::ListRedrives { group: None }).await {
            tasks.retain(|_, task| !task.is_finished());
            for row in rows.into_iter().filter(|row| row.state == state::RUNNING) {
                let id = row.id.clone();
                tasks
                    .entry(id)
                    .or_insert_with(|| AbortOnDropHandle::new(tokio::spawn(redrive(broker.clone(), row))));
            }
        }
        tokio::select! {
            // At the latest after a while.
            _ = timeout(LOOK, broker.redrives_changed()) => {}
            () = broker.stopping() => return,
        }
    }
}

/// Works on one redrive until it runs no more.
async fn redrive(broker: Broker, mut row: RedriveRow) {
    while row.state == state::RUNNING {
        row = match step(&broker, &row).await {
            Ok(row) => row,
            Err(error) if passes(&error) => {
                sleep(PAUSE).await;
                continue;
            }
            Err(BrokerError::Engine(EngineError::Stopping | EngineError::ReadOnly(_))) => return,
            Err(error) => {
                tracing::error!(redrive = row.id, %error, "a redrive cannot go on");
                let failed = Command::FailRedrive { id: row.id.clone(), failure: error.to_string() };
                if let Err(error) = broker.call(failed).await {
                    tracing::error!(redrive = row.id, %error, "and that cannot be noted");
                }
                return;
            }
        };
    }
    tracing::info!(
        redrive = row.id,
        state = row.state,
        examined = row.examined,
        moved = row.moved,
        refused = row.refused,
        "a redrive runs no more"
    );
}

/// Whether it may go on by itself.
fn passes(error: &BrokerError) -> bool {
    matches!(error, BrokerError::Timeout(_) | BrokerError::Engine(EngineError::DiskFull(_)))
}

/// Moves the letters of the next piece; answers how the redrive stands then.
async fn step(broker: &Broker, row: &RedriveRow) -> Result<RedriveRow, BrokerError> {
    let rate = row.spec.as_ref().map_or(0, |spec| spec.rate);
    // At a set rate in pieces of a tenth of a second.
    let paced = if rate == 0 { TOGETHER } else { (rate as usize / 10).clamp(1, TOGETHER) };
    let most = row.room().map_or(paced, |room| paced.min(usize::try_from(room).unwrap_or(usize::MAX)));
    let unfinished = row.positions.iter().zip(&row.ends).position(|(position, end)| position < end);
    let place = unfinished.unwrap_or_default();
    let partition = u32::try_from(place).unwrap_or(u32::MAX);
    let from = row.positions.get(place).copied().unwrap_or_default();
    let Piece { next, examined, refused, letters } = piece(broker, row, partition, most).await?;
    if next == from && unfinished.is_some() {
        // What is there is not visible yet.
        sleep(PAUSE).await;
    }
    let found = Box::new(FoundLetters { partition, from, next, examined, refused, letters });
    let command = Command::MoveLetters { id: row.id.clone(), found };
    let Reply::Redrive(moved) = broker.call(command).await? else {
        return Err(BrokerError::Unexpected("MoveLetters"));
    };
    if rate > 0 {
        let letters = moved.moved.saturating_sub(row.moved);
        sleep(Duration::from_secs(1) * u32::try_from(letters).unwrap_or(u32::MAX) / rate).await;
    }
    Ok(*moved)
}
