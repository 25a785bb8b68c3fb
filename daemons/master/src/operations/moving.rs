//! Moves: the effects of the state machine of `cocalc-core` on this master.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use cocalc_core::{
    BoxError,
    connector::Peer,
    control::{ErrorCode, HostCommand, HostReply, MoveCommand, MoveReply},
    moves::{
        Change, DriveError, MoveEffects, MoveOutcome, MoveSpec, MoveState, NoAnswer, Saved, Step, Tuning,
        drive,
    },
};
use cocalc_ids::{AccountId, HostId, MoveId, OperationId, ProjectId, SnapshotName};
use cocalc_sqlite::master::{
    self as store, Ended, MoveChange, MoveSaved, NewMove, Operation, Outcome, ProjectState,
};
use tokio::sync::watch;

use super::{
    PAUSE_MAX, PAUSE_MIN,
    job::{AWAY_MAX, CHECKING, QUEUED},
};
use crate::shared::Shared;

/// How often a move that has been committed looks whether its destination is
/// said to be dead.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// The moves that are driven now, each with its source and what that says of
/// its stream.
pub(super) type Streams = Mutex<Driven>;
type Driven = BTreeMap<MoveId, (HostId, watch::Sender<Option<Live>>)>;

/// How far a stream is, as its source says.
#[derive(Clone, Debug)]
pub(super) struct Live {
    name: SnapshotName,
    bytes: u64,
    estimated_bytes: u64,
    bytes_per_sec: u64,
}

impl super::Operations {
    fn streams(&self) -> MutexGuard<'_, Driven> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hears from `host` how far a stream of a move is: its bytes, about how
    /// many it has, and how many a second. Of a move from elsewhere, or one
    /// that is over, it is nothing.
    pub(crate) fn heard_of_stream(
        &self,
        host: HostId,
        move_id: MoveId,
        name: SnapshotName,
        [bytes, estimated_bytes, bytes_per_sec]: [u64; 3],
    ) {
        if let Some((source, live)) = self.streams().get(&move_id)
            && *source == host
        {
            live.send_replace(Some(Live { name, bytes, estimated_bytes, bytes_per_sec }));
        }
    }
}

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
        let stream_version = destination.capabilities.as_ref().map_or(0, |can| can.storage.stream_version);
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
            // The source says so when it is asked.
            bytes: 0,
            stream_version,
            deltas: from.1 && at.1,
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
            if let Some(image) = state.spec.config.image
                && let Err(error) =
                    super::job::ensure_image(shared, operation, state.spec.destination, image).await
            {
                let outcome =
                    Outcome::Failed { code: super::job::code(error.code).into(), detail: error.message };
                return refuse(shared, operation, &state, outcome).await;
            }
            unchecked = false;
            shared.note(operation.id, step_name(state.step), shown(&state, None)).await;
        }
        let (show, showing) = watch::channel(state.clone());
        let seen = showing.clone();
        let effects = Effects { shared: shared.clone(), show, activated: Default::default() };
        let (tell, live) = watch::channel(None);
        shared.operations.streams().insert(id, (state.spec.source, tell));
        let notes = notes(shared, operation, showing, live);
        let driven = tokio::select! {
            driven = drive(&effects, state, cancel.clone()) => driven,
            () = notes => continue,
            () = gone(shared, &seen) => {
                shared.operations.streams().remove(&id);
                return give_up(shared, operation).await;
            }
        };
        match driven {
            Ok(outcome) => {
                shared.operations.streams().remove(&id);
                return finish(shared, operation, id, outcome).await;
            }
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

/// Waits until somebody has said that the owner of the project is dead, which it
/// became by the commit and which has not taken its grant: nobody else may go on
/// with it, and nothing will ever come of this move.
async fn gone(shared: &Shared, seen: &watch::Receiver<MoveState>) {
    loop {
        let waits_for = {
            let state = seen.borrow();
            (state.step == Step::Activating).then_some(state.spec.destination)
        };
        if waits_for.is_some_and(|host| shared.peers.is_fenced(Peer::Host(host))) {
            return;
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// Leaves the project to its new owner, which is fenced: it can be restored
/// elsewhere like all that the dead host had. That is begun by people only.
async fn give_up(shared: &Shared, operation: &Operation) {
    let detail = "the host that it was moved to was fenced before it had it: restore what that host had; \
        the host that it came from keeps the files as they were, aside"
        .to_owned();
    let outcome = Outcome::Failed { code: "host_fenced".to_owned(), detail: detail.clone() };
    let ended = Ended { outcome, project: ProjectState::Failed, reason: Some(detail), report: None };
    shared.finish(operation.id, ended).await;
}

/// Shows people the latest of what is being done, for ever; what they missed
/// does not hold the move up.
async fn notes(
    shared: &Shared,
    operation: &Operation,
    mut showing: watch::Receiver<MoveState>,
    mut live: watch::Receiver<Option<Live>>,
) {
    let mut most = 0;
    loop {
        let open = tokio::select! {
            changed = showing.changed() => changed.is_ok(),
            changed = live.changed() => changed.is_ok(),
        };
        if !open {
            return std::future::pending().await;
        }
        let state = showing.borrow_and_update().clone();
        let of_this = |live: &Live| state.sending().as_ref() == Some(&live.name);
        let live = live.borrow_and_update().clone().filter(of_this);
        let mut progress = shown(&state, live.as_ref());
        // A stream that began again has been further; people are not told.
        most = progress["bytes"].as_u64().unwrap_or(0).max(most);
        progress["bytes"] = most.into();
        shared.note(operation.id, step_name(state.step), progress).await;
    }
}

/// Whether the source can say what there is to be moved. Nothing has been done
/// yet, so that a move that makes no sense holds up nobody.
async fn check(
    shared: &Shared,
    operation: &Operation,
    state: &MoveState,
    cancel: &watch::Receiver<bool>,
) -> Result<(), Outcome> {
    let failed = |code: &str, detail: String| Outcome::Failed { code: code.to_owned(), detail };
    shared.note(operation.id, CHECKING, shown(state, None)).await;
    let spec = &state.spec;
    let (move_id, project) = (spec.move_id, spec.project);
    let command = HostCommand::Move { move_id, project, step: MoveCommand::Survey { epoch: spec.epoch } };
    shared.returned(Peer::Host(spec.source), AWAY_MAX).await;
    let began = shared.clock.boot();
    loop {
        if *cancel.borrow() {
            return Err(Outcome::Cancelled);
        }
        let (code, detail) = match shared.command(spec.source, &command, Duration::from_secs(20)).await {
            Ok(HostReply::Move { receipt: MoveReply::Surveyed { .. }, .. }) => return Ok(()),
            // It does not know it; the move says so itself.
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
        Ok(HostReply::Error(error)) if error.code == ErrorCode::StateUnknown => {
            let (project, reason) = (ProjectState::Unknown, Some(error.message));
            return shared.finish(operation.id, Ended { outcome, project, reason, report: None }).await;
        }
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
        shared.note(operation.id, "finishing", shown(state, None)).await;
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
    show: watch::Sender<MoveState>,
    /// What the owner said of the project when it took the grant.
    activated: Mutex<Option<ProjectState>>,
}

#[async_trait]
impl MoveEffects for Effects {
    async fn command(
        &self,
        host: HostId,
        command: HostCommand,
        timeout: Duration,
    ) -> Result<HostReply, NoAnswer> {
        if self.shared.peers.is_fenced(Peer::Host(host))
            && let Some(reply) = over_at_the_dead(&command)
        {
            return Ok(reply);
        }
        self.shared.returned(Peer::Host(host), AWAY_MAX).await;
        let reply = self.shared.command(host, &command, timeout).await?;
        if let HostReply::Move { receipt: MoveReply::Activated { report, .. }, .. } = &reply {
            let state = ProjectState::from(report.status.state);
            *self.activated.lock().unwrap_or_else(PoisonError::into_inner) = Some(state);
        }
        Ok(reply)
    }

    async fn save(&self, state: &MoveState, expected: u64, change: Change) -> Result<Saved, BoxError> {
        let (id, project, source) = (state.spec.move_id, state.spec.project, state.spec.source);
        let text = to_text(state)?;
        // Where nothing was frozen, the owner's own report follows at once.
        let was = if state.was_running { ProjectState::Running } else { ProjectState::Stopped };
        let seen = *self.activated.lock().unwrap_or_else(PoisonError::into_inner);
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
        self.show.send_replace(state.clone());
    }
}

/// What counts as done at a host that somebody has said to be dead: what lets it
/// go on, or let go, or tidy up. If it comes back, it hears who has what.
fn over_at_the_dead(command: &HostCommand) -> Option<HostReply> {
    let HostCommand::Move { move_id, step, .. } = command else { return None };
    let receipt = match step {
        MoveCommand::Thaw { epoch, .. } => MoveReply::Thawed { epoch: *epoch },
        MoveCommand::Retire { .. } => MoveReply::Retired,
        MoveCommand::Discard => MoveReply::Discarded,
        MoveCommand::Clean { .. } => MoveReply::Cleaned,
        _ => return None,
    };
    Some(HostReply::Move { move_id: *move_id, receipt })
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

/// What people are shown of a move: bytes on the wire so far, out of about how
/// many, the rate, and how long the rest takes, where that is known. `live` is
/// the stream that is under way; without it, the last one tells the rate, and a
/// delta is taken for about as large as the one before.
fn shown(state: &MoveState, live: Option<&Live>) -> serde_json::Value {
    let progress = state.progress();
    let bytes = progress.bytes_sent.saturating_add(live.map_or(0, |live| live.bytes));
    let mut shown = serde_json::json!({
        "bytes": bytes,
        "rounds": progress.rounds,
        "snapshots": progress.snapshots,
        "snapshots_arrived": progress.snapshots_arrived,
        "left_out": progress.left_out,
        "cancellable": progress.cancellable,
        "held_up_by": progress.failure.map(|failure| failure.message),
    });
    // Until all of it is there once, the source's usage is what there is to
    // be sent; afterwards, the stream that is under way.
    let stream = live.map_or(0, |live| progress.bytes_sent.saturating_add(live.estimated_bytes));
    let whole =
        if state.step <= Step::Seeding && state.rounds.is_empty() { progress.bytes_expected } else { 0 };
    let expected = stream.max(whole);
    if expected > 0 && state.sending().is_some() {
        shown["bytes_expected"] = expected.max(bytes).into();
    }
    if let Some(live) = live.filter(|live| live.bytes_per_sec > 0) {
        shown["bytes_per_sec"] = live.bytes_per_sec.into();
        if expected > 0 {
            shown["remaining_secs"] = expected.saturating_sub(bytes).div_ceil(live.bytes_per_sec).into();
        }
        return shown;
    }
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
        Step::Surveying => "surveying",
        Step::Reserving => "reserving",
        Step::Carrying => "carrying",
        Step::Announcing => "announcing",
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
            stream_version: 2,
            deltas: true,
            tuning: Tuning::default(),
        });
        assert_eq!(shown(&state, None)["bytes"], 0);
        let answer = |state: &mut MoveState, receipt| {
            *state = state.after(Event::Receipt(receipt)).unwrap().0;
            (step_name(state.step), shown(state, None))
        };
        // The stream that is under way.
        let sent = |state: &MoveState, bytes, millis| MoveReply::Sent {
            name: state.snapshot_names()[state.rounds.len()].clone(),
            origin: VolumeUuid::from_bytes([1; 16]),
            bytes,
            millis,
            left_out: Vec::new(),
        };
        answer(&mut state, MoveReply::Surveyed { bytes: 4_000_000_000, snapshots: Vec::new() });
        let (phase, progress) = answer(&mut state, MoveReply::Reserved);
        assert_eq!((phase, &progress["bytes_per_sec"]), ("seeding", &serde_json::Value::Null));
        // While it is under way, its source says how far it is.
        let name = state.sending().unwrap();
        let live = Live { name, bytes: 500_000_000, estimated_bytes: 900_000_000, bytes_per_sec: 50_000_000 };
        let seen = shown(&state, Some(&live));
        assert_eq!(
            (&seen["bytes"], &seen["bytes_expected"], &seen["bytes_per_sec"], &seen["remaining_secs"]),
            (&500_000_000.into(), &4_000_000_000_u64.into(), &50_000_000.into(), &70.into())
        );
        let receipt = sent(&state, 1_000_000_000, 20_000);
        let (phase, progress) = answer(&mut state, receipt);
        assert_eq!(
            (phase, &progress["bytes"], &progress["bytes_per_sec"]),
            ("seeding", &1_000_000_000_u64.into(), &50_000_000.into())
        );
        assert!(progress.get("remaining_secs").is_none(), "nobody knows how large the first delta is");
        let live = Live { bytes: 40_000_000, estimated_bytes: 90_000_000, ..live };
        let seen = shown(&state, Some(&live));
        assert_eq!(
            (&seen["bytes"], &seen["bytes_expected"], &seen["remaining_secs"]),
            (&1_040_000_000.into(), &1_090_000_000.into(), &1.into())
        );
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
