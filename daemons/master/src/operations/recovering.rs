//! A project of a dead host comes up on another one, from a backup.
//!
//! For the host that it comes to this is a move whose source is a repository:
//! it reserves, fetches the backup as the move's snapshot, and makes that the
//! live volume. Then one transaction gives it the project under the next epoch,
//! if the dead host is still fenced. Before that every failure leaves the
//! project with the dead host, and the other one deletes what has come; after it
//! there is only forward.

use std::{sync::Arc, time::Duration};

use cocalc_core::{
    connector::Peer,
    control::{
        BackupsCommand, BackupsOutcome, BackupsReply, BackupsWork, CommandError, ErrorCode, HostCommand,
        HostReply, MoveCommand, MoveReply, ProjectReport,
    },
    moves::snapshot_prefix,
};
use cocalc_ids::{Epoch, HostId, MoveId, OperationId, SnapshotName, TreePath, VolumeUuid};
use cocalc_sqlite::master::{self as store, Ended, Job, Operation, Outcome, Project, ProjectState};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::{
    PAUSE_MAX, PAUSE_MIN,
    backing_up::{Rate, phase},
    job::code,
};
use crate::shared::Shared;

/// How long a host waits for news of the restore before it answers.
const NEWS: Duration = Duration::from_secs(2);
/// How long it may take to answer at all.
const LIMIT: Duration = Duration::from_secs(60);
/// How long it may take to make what came the live volume, and to start it.
const STEP_LIMIT: Duration = Duration::from_secs(300);
/// How long the host that the project comes to may be away.
const AWAY_MAX: Duration = Duration::from_secs(120);
/// How long to wait before asking it again.
const AGAIN: Duration = Duration::from_millis(500);
/// How many operations of a project are looked through for earlier tries.
const EARLIER_MAX: usize = 1_000;
/// The phase from which on it is known what was fetched.
const STAGING: &str = "staging";

/// Why a project was not brought up.
enum Failure {
    /// The host that it was to come to refused.
    Refused(CommandError),
    /// That host does not answer.
    Away,
    /// It answered something else.
    Nonsense,
    /// Somebody cancelled it.
    Cancelled,
    /// The dead host is not fenced any more.
    Unfenced,
}

impl Failure {
    fn outcome(self) -> Outcome {
        let (code, detail) = match self {
            Self::Cancelled => return Outcome::Cancelled,
            Self::Refused(error) => (code(error.code), error.message),
            Self::Away => {
                ("host_unavailable", "the host that the project was to come to does not answer".to_owned())
            }
            Self::Nonsense => ("internal", "the host answered with the receipt of something else".to_owned()),
            Self::Unfenced => (
                "host_not_fenced",
                "the project's host was unfenced meanwhile, so the project is left to it".to_owned(),
            ),
        };
        Outcome::Failed { code: code.to_owned(), detail }
    }
}

/// One project on its way.
struct Recover<'a> {
    shared: &'a Arc<Shared>,
    operation: &'a Operation,
    move_id: MoveId,
    from: HostId,
    epoch: Epoch,
    to: HostId,
    backup: &'a str,
    was: ProjectState,
}

/// Runs the operation, and records its end.
pub(super) async fn run(shared: &Arc<Shared>, operation: &Operation, mut cancel: watch::Receiver<bool>) {
    let Job::Recover { from, epoch, to, backup, was } = &operation.job else { return };
    let recover = Recover {
        shared,
        operation,
        move_id: MoveId::from_bytes(*operation.id.as_bytes()),
        from: *from,
        epoch: *epoch,
        to: *to,
        backup,
        was: *was,
    };
    let mut pause = PAUSE_MIN;
    let ended = loop {
        let id = operation.project;
        let project = match shared.db(move |store| store.project(id)).await {
            Ok(project) => project,
            Err(error) => {
                tracing::error!(project = %id, error = %cocalc_core::chain(&error), "a recovery cannot go on");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
                continue;
            }
        };
        if (project.host, project.epoch) == (*to, epoch.next()) {
            break recover.forward(&project).await;
        }
        let done = match recover.prepare(&project, &mut cancel).await {
            Ok(()) => recover.commit().await,
            Err(failure) => Err(failure),
        };
        match done {
            // What is stored now says how it goes on.
            Ok(()) => {}
            // What was said of its state before is true again.
            Err(failure) => break Ended { reason: project.reason, ..recover.undo(failure).await },
        }
    };
    shared.finish(operation.id, ended).await;
}

impl Recover<'_> {
    /// The snapshot that is fetched, which is the move's.
    fn name(&self) -> Result<SnapshotName, Failure> {
        format!("{}0", snapshot_prefix(self.move_id)).parse().map_err(|_| Failure::Nonsense)
    }

    fn shown(&self, more: Value) -> Value {
        let mut shown = json!({ "backup_id": self.backup, "host_id": self.to.to_string() });
        if let (Some(shown), Value::Object(more)) = (shown.as_object_mut(), more) {
            shown.extend(more);
        }
        shown
    }

    /// Makes the backup the live volume at the other host, which has no grant
    /// for it.
    async fn prepare(&self, project: &Project, cancel: &mut watch::Receiver<bool>) -> Result<(), Failure> {
        let epoch = self.epoch;
        let fetched = (self.operation.phase == STAGING)
            .then(|| self.operation.progress["origin"].as_str()?.parse::<VolumeUuid>().ok())
            .flatten();
        let origin = match fetched {
            // An earlier process had it fetched.
            Some(origin) => origin,
            None => {
                self.shared.note(self.operation.id, "reserving", self.shown(json!({}))).await;
                self.discard_earlier(cancel).await?;
                let reserve = MoveCommand::Reserve {
                    epoch,
                    source: self.from,
                    bytes: 0,
                    config: project.config.clone(),
                    snapshots: Vec::new(),
                };
                match self.step(reserve, LIMIT, Some(cancel)).await? {
                    MoveReply::Reserved => {}
                    _ => return Err(Failure::Nonsense),
                }
                self.fetch(cancel).await?
            }
        };
        let shown = self.shown(json!({ "origin": origin.to_string(), "cancellable": false }));
        self.shared.note(self.operation.id, STAGING, shown).await;
        let stage = MoveCommand::Stage { epoch, name: self.name()?, origin, snapshots: Vec::new() };
        match self.step(stage, STEP_LIMIT, None).await? {
            MoveReply::Staged { origin: staged } if staged == origin => Ok(()),
            _ => Err(Failure::Nonsense),
        }
    }

    /// Discards what earlier tries of the same recovery may have left at the
    /// other host, which expects one of them only: the word of their undo may
    /// not have reached it.
    async fn discard_earlier(&self, cancel: &watch::Receiver<bool>) -> Result<(), Failure> {
        let (id, project) = (self.operation.id, self.operation.project);
        let (to, epoch) = (self.to, self.epoch);
        let found = self.shared.db(move |store| store.operations_of(project, EARLIER_MAX)).await;
        let found = found.map_err(|error| {
            tracing::error!(%project, error = %cocalc_core::chain(&error), "cannot read earlier recoveries");
            Failure::Refused(CommandError {
                code: ErrorCode::Failed,
                message: "the master's database failed".into(),
            })
        })?;
        for earlier in earlier_tries(&found, id, (epoch, to)) {
            let move_id = MoveId::from_bytes(*earlier.as_bytes());
            match self.step_of(move_id, MoveCommand::Discard, LIMIT, Some(cancel)).await {
                Ok(_) => {}
                // It never heard of it.
                Err(Failure::Refused(error)) if error.code == ErrorCode::NotFound => {}
                Err(failure) => return Err(failure),
            }
        }
        Ok(())
    }

    /// Has the backup restored, verified, as a snapshot at the other host.
    async fn fetch(&self, cancel: &mut watch::Receiver<bool>) -> Result<VolumeUuid, Failure> {
        let project = self.operation.project;
        let what = BackupsCommand::Work {
            operation: self.operation.id,
            work: BackupsWork::Fetch {
                source: project,
                backup: self.backup.to_owned(),
                path: TreePath::root(),
                name: self.name()?,
                move_id: Some(self.move_id),
            },
            wait_ms: u64::try_from(NEWS.as_millis()).unwrap_or(u64::MAX),
        };
        let command = HostCommand::Backups { project, epoch: self.epoch, what };
        let (mut away_since, mut rate) = (None, Rate::default());
        loop {
            if *cancel.borrow() {
                return Err(Failure::Cancelled);
            }
            let answer = tokio::select! {
                answer = self.shared.command(self.to, &command, LIMIT) => answer,
                _ = cancel.changed() => continue,
            };
            match answer {
                Ok(HostReply::Backups { project: id, answer }) if id == project => match answer {
                    BackupsReply::Working { operation, progress } if operation == self.operation.id => {
                        away_since = None;
                        let (phase, shown) = match progress {
                            Some(progress) => {
                                (phase(&progress), rate.shown(&progress, self.shared.clock.boot()))
                            }
                            None => ("waiting for a place".to_owned(), json!({ "cancellable": true })),
                        };
                        self.shared.note(self.operation.id, &phase, self.shown(shown)).await;
                        continue;
                    }
                    BackupsReply::Done { operation, outcome: BackupsOutcome::Fetched { snapshot, .. } }
                        if operation == self.operation.id =>
                    {
                        return Ok(snapshot.origin);
                    }
                    _ => return Err(Failure::Nonsense),
                },
                Ok(HostReply::Error(error))
                    if !matches!(
                        error.code,
                        ErrorCode::Unavailable | ErrorCode::StateUnknown | ErrorCode::Busy
                    ) =>
                {
                    return Err(Failure::Refused(error));
                }
                Ok(HostReply::Error(_)) | Err(_) => {}
                Ok(_) => return Err(Failure::Nonsense),
            }
            let since = *away_since.get_or_insert_with(|| self.shared.clock.boot());
            if self.shared.clock.boot().saturating_sub(since) >= AWAY_MAX {
                return Err(Failure::Away);
            }
            let _ = tokio::time::timeout(AGAIN, cancel.changed()).await;
        }
    }

    /// Sends a step to the other host until it has answered, while it is there,
    /// or not away for long.
    async fn step(
        &self,
        step: MoveCommand,
        limit: Duration,
        cancel: Option<&watch::Receiver<bool>>,
    ) -> Result<MoveReply, Failure> {
        self.step_of(self.move_id, step, limit, cancel).await
    }

    async fn step_of(
        &self,
        move_id: MoveId,
        step: MoveCommand,
        limit: Duration,
        cancel: Option<&watch::Receiver<bool>>,
    ) -> Result<MoveReply, Failure> {
        let project = self.operation.project;
        let command = HostCommand::Move { move_id, project, step };
        let mut away_since = None;
        loop {
            if cancel.is_some_and(|cancel| *cancel.borrow()) {
                return Err(Failure::Cancelled);
            }
            let failure = match self.shared.command(self.to, &command, limit).await {
                Ok(HostReply::Move { move_id: id, receipt }) if id == move_id => return Ok(receipt),
                Ok(HostReply::Error(error))
                    if matches!(
                        error.code,
                        ErrorCode::Unavailable | ErrorCode::StateUnknown | ErrorCode::Busy
                    ) =>
                {
                    Failure::Refused(error)
                }
                Ok(HostReply::Error(error)) => return Err(Failure::Refused(error)),
                Ok(_) => return Err(Failure::Nonsense),
                Err(_) => Failure::Away,
            };
            let since = *away_since.get_or_insert_with(|| self.shared.clock.boot());
            let fenced = self.shared.peers.is_fenced(Peer::Host(self.to));
            if fenced || self.shared.clock.boot().saturating_sub(since) >= AWAY_MAX {
                return Err(failure);
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Gives the project to the other host.
    async fn commit(&self) -> Result<(), Failure> {
        let (id, project, owner, to) =
            (self.operation.id, self.operation.project, (self.from, self.epoch), self.to);
        match self.shared.db(move |store| store.recover_project(id, project, owner, to)).await {
            Ok(Some(_)) => Ok(()),
            Ok(None) => Err(Failure::Unfenced),
            Err(error) => {
                // Whether it was done, the database says when it is read again.
                tracing::error!(%project, error = %cocalc_core::chain(&error), "a commit may have failed");
                tokio::time::sleep(PAUSE_MIN).await;
                Ok(())
            }
        }
    }

    /// The project is the other host's: that takes the grant, and everybody
    /// hears. Nothing is undone any more.
    async fn forward(&self, project: &Project) -> Ended {
        let id = project.id;
        self.shared.note(self.operation.id, "activating", self.shown(json!({ "cancellable": false }))).await;
        let mut pause = PAUSE_MIN;
        while let Err(error) = self.shared.announce_owner(id, self.from).await {
            tracing::error!(project = %id, error = %cocalc_core::chain(&error), "cannot announce an owner");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
        let start = matches!(self.was, ProjectState::Running | ProjectState::Starting);
        let mut pause = PAUSE_MIN;
        let report = loop {
            let activate =
                MoveCommand::Activate { epoch: project.epoch, config: project.config.clone(), start };
            let failure = match self.step(activate, STEP_LIMIT, None).await {
                Ok(MoveReply::Activated { epoch, report }) if epoch == project.epoch => break report,
                Ok(_) => Failure::Nonsense,
                Err(failure) => failure,
            };
            let outcome = failure.outcome();
            if self.shared.peers.is_fenced(Peer::Host(self.to)) {
                let reason = "its new host was fenced before it had it: restore what that host had, too";
                let reason = Some(reason.to_owned());
                return Ended { outcome, project: ProjectState::Failed, reason, report: None };
            }
            tracing::warn!(project = %id, ?outcome, "a host does not take its grant yet");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        };
        self.clean().await;
        ended(report)
    }

    /// Deletes the snapshot that was only a step. If that fails it costs space,
    /// and nothing else.
    async fn clean(&self) {
        let names = self.name().into_iter().collect();
        if !matches!(self.step(MoveCommand::Clean { names }, LIMIT, None).await, Ok(MoveReply::Cleaned)) {
            tracing::warn!(project = %self.operation.project, "the snapshot of a recovery is left");
        }
    }

    /// The other host deletes what has come, and the project is left to the dead
    /// one.
    async fn undo(&self, failure: Failure) -> Ended {
        self.shared.note(self.operation.id, "undoing", self.shown(json!({ "cancellable": false }))).await;
        let (id, project) = (self.operation.id, self.operation.project);
        let what = BackupsCommand::Cancel { operation: id };
        let cancel = HostCommand::Backups { project, epoch: self.epoch, what };
        // If it is not heard, the reservation that is discarded ends it.
        let _ = self.shared.command(self.to, &cancel, LIMIT).await;
        if !matches!(self.step(MoveCommand::Discard, LIMIT, None).await, Ok(MoveReply::Discarded)) {
            tracing::warn!(%project, host = %self.to, "what came of a recovery is left until the project is \
                another host's");
        }
        Ended { outcome: failure.outcome(), project: self.was, reason: None, report: None }
    }
}

fn ended(report: ProjectReport) -> Ended {
    Ended {
        outcome: Outcome::Done,
        project: ProjectState::from(report.status.state),
        reason: report.status.reason.clone(),
        report: Some(report),
    }
}

/// The operations that were to bring a project to the same host before `id`, in
/// the same epoch: one of an earlier epoch the host discards by itself.
fn earlier_tries(
    operations: &[Operation],
    id: OperationId,
    place: (Epoch, HostId),
) -> impl Iterator<Item = OperationId> {
    let there = move |job: &Job| matches!(job, Job::Recover { epoch, to, .. } if (*epoch, *to) == place);
    operations.iter().filter(move |one| one.id != id && there(&one.job)).map(|one| one.id)
}

/// The hosts that a project came from and went to by recoveries.
pub(super) fn hosts(operations: &[store::Operation]) -> Vec<HostId> {
    let hosts = operations.iter().filter_map(|operation| match operation.job {
        Job::Recover { from, to, .. } => Some([from, to]),
        _ => None,
    });
    hosts.flatten().collect()
}

#[cfg(test)]
mod tests {
    use cocalc_ids::{AccountId, ProjectId, Timestamp};
    use cocalc_sqlite::master::OperationState;

    use super::*;

    #[test]
    fn only_earlier_tries_at_the_same_host_and_in_the_same_epoch_are_discarded() {
        let (to, other) = (HostId::random(), HostId::random());
        let recover = |epoch, to| Operation {
            id: OperationId::random(),
            project: ProjectId::random(),
            account: AccountId::random(),
            job: Job::Recover {
                from: HostId::random(),
                epoch,
                to,
                backup: "0123456789".into(),
                was: ProjectState::Running,
            },
            state: OperationState::Failed,
            cancel: false,
            phase: String::new(),
            progress: Value::Null,
            error: None,
            created: Timestamp::UNIX_EPOCH,
            updated: Timestamp::UNIX_EPOCH,
        };
        let (one, later) = (Epoch::FIRST, Epoch::FIRST.next());
        let all = [recover(one, to), recover(one, other), recover(later, to), recover(one, to)];
        let found: Vec<_> = earlier_tries(&all, all[3].id, (one, to)).collect();
        assert_eq!(found, [all[0].id]);
    }
}
