//! Moves: the effects of the state machine of `cocalc-core` on this master.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use cocalc_core::{
    BoxError,
    connector::Peer,
    control::{ErrorCode, HostCommand, HostReply, MoveReply},
    moves::{
        Change, DriveError, MoveEffects, MoveOutcome, MoveSpec, MoveState, NoAnswer, Saved, Step, Tuning,
        drive,
    },
};
use cocalc_ids::{AccountId, HostId, MoveId, OperationId, ProjectId};
use cocalc_sqlite::master::{
    self as store, Ended, MoveChange, MoveSaved, NewMove, Operation, Outcome, ProjectState,
};
use tokio::sync::watch;

use super::{
    PAUSE_MAX, PAUSE_MIN,
    job::{AWAY_MAX, CHECKING, QUEUED},
};
use crate::shared::Shared;

/// How the names of snapshots begin that moves and hosts make themselves.
const OWN_SNAPSHOTS: [&str; 3] = ["move-", "undo-", "conflict-"];
/// How many snapshots a refusal names.
const NAMES_SHOWN: usize = 10;

/// Why no move was begun.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NewMoveError {
    #[error("the project is on that host already")]
    There,
    #[error("the destination is not connected")]
    NotConnected,
    #[error("the hosts keep files in different ways: {from} and {to}")]
    Storage { from: String, to: String },
    #[error(transparent)]
    Store(#[from] store::Error),
}

impl Shared {
    /// Begins a move of `project` to `to`.
    pub(crate) async fn begin_move(
        self: &Arc<Self>,
        id: OperationId,
        project: ProjectId,
        account: AccountId,
        to: HostId,
    ) -> Result<Operation, NewMoveError> {
        let now = self.now();
        // A repeated call finds what it began, whatever has become of it.
        match self.db(move |store| store.operation(id)).await {
            Ok(operation) => return Ok(operation),
            Err(store::Error::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        let (found, source, destination) = self
            .db(move |store| {
                let found = store.project(project)?;
                let source = store.host(found.host)?;
                Ok((found, source, store.host(to)?))
            })
            .await?;
        if let Some(operation) = found.fence {
            return Err(store::Error::Busy { operation }.into());
        }
        if found.host == to {
            return Err(NewMoveError::There);
        }
        if !self.alive(Peer::Host(to)) {
            return Err(NewMoveError::NotConnected);
        }
        let backend = |host: &store::Host| {
            host.capabilities.as_ref().map(|can| (can.storage.backend.clone(), can.storage.deltas))
        };
        let (from, at) = (backend(&source).unwrap_or_default(), backend(&destination).unwrap_or_default());
        if from.0 != at.0 {
            return Err(NewMoveError::Storage { from: from.0, to: at.0 });
        }
        let spec = MoveSpec {
            move_id: MoveId::from_bytes(*id.as_bytes()),
            project,
            source: found.host,
            destination: to,
            destination_address: destination.address,
            epoch: found.epoch,
            config: found.config,
            bytes: 0,
            deltas: from.1 && at.1,
            stream_version: 0,
            tuning: Tuning::default(),
        };
        let operation = self
            .db(move |store| {
                let state = MoveState::new(spec);
                let text = to_text(&state)?;
                let new = NewMove {
                    id: state.spec.move_id,
                    project,
                    account,
                    from: (state.spec.source, state.spec.epoch),
                    to,
                    state: &text,
                };
                let allowed = [ProjectState::Stopped, ProjectState::Running, ProjectState::Failed];
                store.begin_move(&new, &allowed, now)
            })
            .await?;
        self.run_if_new(id).await?;
        Ok(operation)
    }
}

fn to_text(state: &MoveState) -> store::Result<String> {
    serde_json::to_string(state).map_err(|error| {
        store::Error::Store(cocalc_sqlite::Error::Failed { operation: "write a move", source: error.into() })
    })
}

/// Drives a move from its stored state to its end.
pub(super) async fn run(shared: &Arc<Shared>, operation: &Operation, cancel: watch::Receiver<bool>) {
    let id = MoveId::from_bytes(*operation.id.as_bytes());
    let mut pause = PAUSE_MIN;
    let mut unchecked = [QUEUED, CHECKING].contains(&&*operation.phase);
    loop {
        let state = match load(shared, id).await {
            Ok(state) => state,
            Err(error) => {
                // Nothing may be decided without it. If this doesn't pass, an
                // operator has to look.
                tracing::error!(move_id = %id, project = %operation.project,
                    error = %cocalc_core::chain(&*error), "a move cannot be read");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
                continue;
            }
        };
        if unchecked {
            if let Err(outcome) = check(shared, operation, &state, &cancel).await {
                return refuse(shared, operation, &state, outcome).await;
            }
            unchecked = false;
            shared.note(operation.id, step_name(state.step), shown(&state)).await;
        }
        let (shown, mut show) = watch::channel(None);
        let effects = Effects { shared: shared.clone(), shown, activated: Default::default() };
        // People see the latest of what is being done; what they missed does
        // not hold the move up.
        let notes = async {
            while show.changed().await.is_ok() {
                let latest: Option<(&'static str, serde_json::Value)> = show.borrow_and_update().clone();
                if let Some((phase, progress)) = latest {
                    shared.note(operation.id, phase, progress).await;
                }
            }
            std::future::pending::<()>().await;
        };
        let driven = tokio::select! {
            driven = drive(&effects, state, cancel.clone()) => driven,
            () = notes => continue,
        };
        match driven {
            Ok(outcome) => return finish(shared, operation, id, outcome).await,
            Err(DriveError::Superseded) => {
                // Only this process has the database: it was an earlier save
                // of ours. What is stored counts.
                tracing::warn!(move_id = %id, "driving a move again from its stored state");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            Err(error) => {
                tracing::error!(move_id = %id, error = %cocalc_core::chain(&error), "a move stands still");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
        }
    }
}

/// Whether the project has snapshots, which a move would leave behind. Nothing
/// has been done yet, and nobody takes one while the move is the fence.
async fn check(
    shared: &Shared,
    operation: &Operation,
    state: &MoveState,
    cancel: &watch::Receiver<bool>,
) -> Result<(), Outcome> {
    let failed = |code: &str, detail: String| Outcome::Failed { code: code.to_owned(), detail };
    shared.note(operation.id, CHECKING, shown(state)).await;
    let spec = &state.spec;
    let command = HostCommand::Snapshots { project: spec.project, epoch: spec.epoch };
    shared.returned(Peer::Host(spec.source), AWAY_MAX).await;
    let began = shared.clock.boot();
    loop {
        if *cancel.borrow() {
            return Err(Outcome::Cancelled);
        }
        let (code, detail) = match shared.command(spec.source, &command, Duration::from_secs(20)).await {
            Ok(HostReply::Snapshots { snapshots, .. }) => {
                let mut names = snapshots.iter().map(|snapshot| snapshot.name.to_string());
                let own = |name: &String| OWN_SNAPSHOTS.iter().any(|prefix| name.starts_with(prefix));
                let names: Vec<String> = names.by_ref().filter(|name| !own(name)).collect();
                if names.is_empty() {
                    return Ok(());
                }
                let mut shown = names.iter().take(NAMES_SHOWN).cloned().collect::<Vec<_>>().join(", ");
                if names.len() > NAMES_SHOWN {
                    shown.push_str(&format!(" and {} more", names.len() - NAMES_SHOWN));
                }
                let detail = format!("a move would leave its snapshots behind: delete them first: {shown}");
                return Err(failed("project_has_snapshots", detail));
            }
            // It has no files there, so no snapshots; the move says so itself.
            Ok(HostReply::Error(error))
                if matches!(error.code, ErrorCode::NotFound | ErrorCode::StaleEpoch) =>
            {
                return Ok(());
            }
            Ok(HostReply::Error(error))
                if !matches!(error.code, ErrorCode::Unavailable | ErrorCode::Busy) =>
            {
                return Err(failed(super::job::code(error.code), error.message));
            }
            Ok(HostReply::Error(error)) => (super::job::code(error.code), error.message),
            Ok(_) => ("host_failed", "the host's answer makes no sense".to_owned()),
            Err(NoAnswer) => ("host_unavailable", "the project's host does not answer".to_owned()),
        };
        if shared.clock.boot().saturating_sub(began) >= AWAY_MAX {
            return Err(failed(code, detail));
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// Ends a move of which nothing has been done.
async fn refuse(shared: &Shared, operation: &Operation, state: &MoveState, outcome: Outcome) {
    let report = HostCommand::Report { project: operation.project };
    let report = match shared.command(state.spec.source, &report, Duration::from_secs(5)).await {
        Ok(HostReply::Project(report)) => Some(report),
        _ => None,
    };
    // If the host is not there now, it says so when it is.
    let project =
        report.as_ref().map_or(ProjectState::Stopped, |report| ProjectState::from(report.status.state));
    let reason = report.as_ref().and_then(|report| report.status.reason.clone());
    shared.finish(operation.id, Ended { outcome, project, reason, report }).await;
}

async fn load(shared: &Shared, id: MoveId) -> Result<MoveState, BoxError> {
    let row = shared.db(move |store| store.move_row(id)).await?;
    Ok(serde_json::from_str(&row.state)?)
}

async fn finish(shared: &Shared, operation: &Operation, id: MoveId, outcome: MoveOutcome) {
    let state = load(shared, id).await.ok();
    if let Some(state) = &state {
        // The last of it may not have been shown.
        shared.note(operation.id, "finishing", shown(state)).await;
    }
    let failure = state.and_then(|state| state.failure);
    let outcome = match outcome {
        MoveOutcome::Moved => Outcome::Done,
        MoveOutcome::Aborted => {
            let id = operation.id;
            let cancelled = shared.db(move |store| store.operation(id)).await.is_ok_and(|found| found.cancel);
            if cancelled {
                Outcome::Cancelled
            } else {
                let (code, detail) = match failure {
                    Some(failure) => {
                        (failure.code.map_or("host_unavailable", super::job::code), failure.message)
                    }
                    None => ("move_aborted", "the move was aborted".to_owned()),
                };
                Outcome::Failed { code: code.to_owned(), detail }
            }
        }
    };
    // The fence was lifted on the way, so the project's state is its own.
    let ended = Ended { outcome, project: ProjectState::Stopped, reason: None, report: None };
    shared.finish(operation.id, ended).await;
}

/// What a move does to this master and its hosts.
#[derive(Debug)]
struct Effects {
    shared: Arc<Shared>,
    shown: watch::Sender<Option<(&'static str, serde_json::Value)>>,
    /// What the owner said of the project when it took the grant.
    activated: std::sync::Mutex<Option<ProjectState>>,
}

#[async_trait]
impl MoveEffects for Effects {
    async fn command(
        &self,
        host: HostId,
        command: HostCommand,
        timeout: Duration,
    ) -> Result<HostReply, NoAnswer> {
        self.shared.returned(Peer::Host(host), AWAY_MAX).await;
        let reply = self.shared.command(host, &command, timeout).await?;
        if let HostReply::Move { receipt: MoveReply::Activated { report, .. }, .. } = &reply {
            let state = ProjectState::from(report.status.state);
            *self.activated.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(state);
        }
        Ok(reply)
    }

    async fn save(&self, state: &MoveState, expected: u64, change: Change) -> Result<Saved, BoxError> {
        let (id, project, source) = (state.spec.move_id, state.spec.project, state.spec.source);
        let text = to_text(state)?;
        // Where nothing was frozen, the owner's own report follows at once.
        let was = if state.was_running { ProjectState::Running } else { ProjectState::Stopped };
        let seen = *self.activated.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let made = match change {
            Change::None => MoveChange::None,
            Change::Commit { to_host, from, to } => MoveChange::Owner { from, to, owner: Some(to_host) },
            Change::Regrant { from, to } => MoveChange::Owner { from, to, owner: None },
            Change::Release => MoveChange::Release { state: seen.unwrap_or(was) },
        };
        let saved = self.shared.db(move |store| store.save_move(id, expected, &text, made)).await?;
        if saved == MoveSaved::Yes {
            match change {
                Change::Commit { .. } | Change::Regrant { .. } => {
                    self.shared.announce_owner(project, source).await?;
                }
                Change::Release => self.look(project).await,
                Change::None => {}
            }
        }
        Ok(match saved {
            MoveSaved::Yes => Saved::Yes,
            MoveSaved::Superseded => Saved::Superseded,
            MoveSaved::Lost => Saved::Lost,
        })
    }

    async fn pause(&self, host: Option<HostId>, delay: Duration) {
        let mut registrations = self.shared.peers.registrations();
        let until = tokio::time::sleep(delay);
        tokio::pin!(until);
        loop {
            let before = host.and_then(|host| self.shared.peers.session(Peer::Host(host)));
            tokio::select! {
                () = &mut until => return,
                changed = registrations.changed(), if host.is_some() => {
                    let now = host.and_then(|host| self.shared.peers.session(Peer::Host(host)));
                    if changed.is_err() || now != before {
                        return;
                    }
                }
            }
        }
    }

    fn progress(&self, state: &MoveState) {
        self.shown.send_replace(Some((step_name(state.step), shown(state))));
    }
}

impl Effects {
    /// Asks the owner for the project's state, once it is its own again. If it
    /// does not answer, its next report tells.
    async fn look(&self, project: ProjectId) {
        let Ok(Some((host, _, _))) = self.shared.db(move |store| store.ownership(project)).await else {
            return;
        };
        let report = HostCommand::Report { project };
        if let Ok(HostReply::Project(report)) =
            self.shared.command(host, &report, Duration::from_secs(5)).await
            && let Err(error) = self.shared.db(move |store| store.observe(host, &report)).await
        {
            tracing::warn!(%project, error = %cocalc_core::chain(&error), "cannot record a project's state");
        }
    }
}

/// What people are shown of a move: bytes on the wire so far, the rate of the
/// last stream, and how long the rest takes, where that is known: of a first
/// stream whose size is known, and of a delta after another, which has about
/// as much to send.
fn shown(state: &MoveState) -> serde_json::Value {
    let progress = state.progress();
    let mut shown = serde_json::json!({
        "bytes": progress.bytes_sent,
        "rounds": progress.rounds,
        "cancellable": progress.cancellable,
        "held_up_by": progress.failure.map(|failure| failure.message),
    });
    let Some(last) = state.rounds.last() else { return shown };
    // What takes no time has no rate.
    let rate = (u128::from(last.bytes) * 1000).checked_div(last.millis.into());
    if let Some(rate) = rate.and_then(|rate| u64::try_from(rate).ok()) {
        shown["bytes_per_sec"] = rate.into();
    }
    let sending = state.step <= Step::CatchingUp;
    if sending && state.rounds.len() > 1 {
        shown["remaining_secs"] = last.millis.div_ceil(1000).into();
    }
    shown
}

fn step_name(step: Step) -> &'static str {
    match step {
        Step::Reserving => "reserving",
        Step::Seeding => "seeding",
        Step::Parking => "parking",
        Step::Freezing => "freezing",
        Step::CatchingUp => "catching_up",
        Step::Staging => "staging",
        Step::Activating => "activating",
        Step::Retiring => "retiring",
        Step::CleaningSource | Step::CleaningDestination => "cleaning",
        Step::Done => "done",
        Step::Thawing => "thawing",
        Step::Discarding => "discarding",
        Step::Aborted => "aborted",
        _ => "moving",
    }
}

#[cfg(test)]
mod tests {
    use cocalc_core::{moves::Event, router::HostAddress};
    use cocalc_ids::{Epoch, VolumeUuid};

    use super::*;

    #[test]
    fn rate_and_estimate_follow_from_the_streams_so_far() {
        let move_id = MoveId::random();
        let mut state = MoveState::new(MoveSpec {
            move_id,
            project: ProjectId::random(),
            source: HostId::random(),
            destination: HostId::random(),
            destination_address: HostAddress::default(),
            epoch: Epoch::FIRST,
            config: Default::default(),
            bytes: 0,
            deltas: true,
            tuning: Tuning::default(),
        });
        assert_eq!(shown(&state)["bytes"], 0);
        let answer = |state: &mut MoveState, receipt| {
            *state = state.after(Event::Receipt(receipt)).unwrap().0;
            (step_name(state.step), shown(state))
        };
        // The stream that is under way.
        let sent = |state: &MoveState, bytes, millis| MoveReply::Sent {
            name: state.snapshot_names()[state.rounds.len()].clone(),
            origin: VolumeUuid::from_bytes([1; 16]),
            bytes,
            millis,
        };
        let (phase, progress) = answer(&mut state, MoveReply::Reserved);
        assert_eq!((phase, &progress["bytes_per_sec"]), ("seeding", &serde_json::Value::Null));
        let receipt = sent(&state, 1_000_000_000, 20_000);
        let (phase, progress) = answer(&mut state, receipt);
        assert_eq!(
            (phase, &progress["bytes"], &progress["bytes_per_sec"]),
            ("seeding", &1_000_000_000_u64.into(), &50_000_000.into())
        );
        assert!(progress.get("remaining_secs").is_none(), "nobody knows how large the first delta is");
        let receipt = sent(&state, 100_000_000, 2_500);
        let (phase, progress) = answer(&mut state, receipt);
        assert_eq!(
            (phase, &progress["bytes"], &progress["bytes_per_sec"], &progress["remaining_secs"]),
            ("seeding", &1_100_000_000_u64.into(), &40_000_000.into(), &3.into())
        );
        let receipt = sent(&state, 10, 0);
        let (phase, progress) = answer(&mut state, receipt);
        assert_eq!(
            (phase, progress.get("bytes_per_sec"), &progress["remaining_secs"]),
            ("parking", None, &0.into())
        );
    }
}
