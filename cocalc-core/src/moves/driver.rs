//! Does what a move's state says, through the master's effects.

use std::{fmt, time::Duration};

use async_trait::async_trait;
use cocalc_ids::HostId;
use tokio::sync::watch;

use super::{Change, Event, MoveOutcome, MoveState, Todo};
use crate::{
    BoxError,
    control::{CommandError, ErrorCode, HostCommand, HostReply},
};

/// What a move does to the world.
#[async_trait]
pub trait MoveEffects: fmt::Debug + Send + Sync {
    /// Sends a command to a host and waits for its answer, for at most
    /// `timeout`. A host that is not connected, or whose session ends, is
    /// [`NoAnswer`] at once.
    async fn command(
        &self,
        host: HostId,
        command: HostCommand,
        timeout: Duration,
    ) -> Result<HostReply, NoAnswer>;

    /// Stores `state` durably in the place of revision `expected`, and makes
    /// `change` to the project's row, in one transaction. After an `Err` it is
    /// called again; if the first call did store it after all, the answer to
    /// the second is [`Saved::Superseded`], and the stored state is to be
    /// loaded and driven again.
    async fn save(&self, state: &MoveState, expected: u64, change: Change) -> Result<Saved, BoxError>;

    /// Waits for `delay`, or for less if `host` connects meanwhile.
    async fn pause(&self, host: Option<HostId>, delay: Duration);

    /// Shows people how far it is.
    fn progress(&self, state: &MoveState);
}

/// No answer came: the command may have been done, or not, or be under way.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("the host did not answer")]
pub struct NoAnswer;

/// What became of a [`MoveEffects::save`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Saved {
    /// It is stored, and the change is made.
    Yes,
    /// Another revision is stored: somebody else drives this move.
    Superseded,
    /// The revision fits, but the project's row has another epoch or fence.
    /// Nothing was stored.
    Lost,
}

/// Why a move is not driven on from here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DriveError {
    /// Somebody else drives it.
    #[error("another controller drives this move")]
    Superseded,
}

/// Drives a move from its stored `state` to its end. Dropping the future stops
/// it anywhere; whoever loads the stored state drives it on.
///
/// `cancel` becomes true when somebody wants it cancelled. A cancel waits for
/// the step in flight, except for streams, which the abort's own commands end.
///
/// # Errors
///
/// [`DriveError::Superseded`] if another controller has advanced it.
///
/// # Cancel safety
///
/// Cancel safe: every step can be repeated.
pub async fn drive(
    effects: &dyn MoveEffects,
    mut state: MoveState,
    mut cancel: watch::Receiver<bool>,
) -> Result<MoveOutcome, DriveError> {
    loop {
        effects.progress(&state);
        let wanted = *cancel.borrow();
        let event = if wanted && state.cancellable() {
            Event::Cancel
        } else {
            match state.todo() {
                Todo::Finished(outcome) => return Ok(outcome),
                Todo::Command { host, command, timeout } => {
                    perform(effects, &state, &mut cancel, host, command, timeout).await
                }
            }
        };
        let Some((next, change)) = state.after(event).or_else(|| state.after(unexpected())) else {
            return Err(DriveError::Superseded);
        };
        state = store(effects, state, next, change).await?;
    }
}

/// A receipt that is not of the step that was asked for counts as a failure,
/// so that the step is tried again after a pause, and not for ever.
fn unexpected() -> Event {
    let message = "the host answered with the receipt of another step".into();
    Event::Failed(CommandError { code: ErrorCode::Failed, message })
}

async fn perform(
    effects: &dyn MoveEffects,
    state: &MoveState,
    cancel: &mut watch::Receiver<bool>,
    host: HostId,
    command: HostCommand,
    timeout: Duration,
) -> Event {
    let work = async {
        let pause = state.pause();
        if !pause.is_zero() {
            effects.pause(Some(host), pause).await;
        }
        effects.command(host, command, timeout).await
    };
    let reply = if state.interruptible() {
        tokio::select! {
            biased;
            () = wanted(cancel) => return Event::Cancel,
            reply = work => reply,
        }
    } else {
        work.await
    };
    match reply {
        Ok(HostReply::Move { move_id, receipt }) if move_id == state.spec.move_id => Event::Receipt(receipt),
        Ok(HostReply::Error(error)) => Event::Failed(error),
        // An answer to another question tells nothing of this step.
        Ok(_) | Err(NoAnswer) => Event::NoAnswer,
    }
}

/// Becomes ready when the move is to be cancelled; never, if nobody can ask
/// for it any more.
async fn wanted(cancel: &mut watch::Receiver<bool>) {
    if cancel.wait_for(|wanted| *wanted).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Stores the successor, for as long as it takes: the store is the master's
/// own, and without it nothing may go on.
async fn store(
    effects: &dyn MoveEffects,
    state: MoveState,
    mut next: MoveState,
    mut change: Change,
) -> Result<MoveState, DriveError> {
    let mut delay = Duration::from_millis(100);
    loop {
        match effects.save(&next, state.revision, change).await {
            Ok(Saved::Yes) => return Ok(next),
            Ok(Saved::Superseded) => return Err(DriveError::Superseded),
            Ok(Saved::Lost) => match state.after(Event::Lost) {
                Some((lost, none)) if next != lost => (next, change) = (lost, none),
                // Only a store that refuses a plain save comes here.
                _ => return Err(DriveError::Superseded),
            },
            Err(error) => {
                tracing::warn!(
                    project = %state.spec.project,
                    move_id = %state.spec.move_id,
                    error = %crate::chain(&*error),
                    "cannot store the move; trying again"
                );
                effects.pause(None, delay).await;
                delay = (delay * 2).min(Duration::from_secs(10));
            }
        }
    }
}
