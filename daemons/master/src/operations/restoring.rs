//! Restores from backups: into the project itself, as a whole or one path of
//! it, and into a new project.
//!
//! A backup comes to the host as a snapshot of the project, while that runs on.
//! What follows are commands that there are for snapshots, too, so a restore is
//! interrupted, repeated and undone as they are.

use std::time::Duration;

use cocalc_core::{
    backups::fetched_name,
    control::{
        BackupsCommand, BackupsOutcome, BackupsReply, BackupsWork, CommandError, ErrorCode, HostCommand,
        HostReply, ProjectReport,
    },
    runner::State,
    storage::{CopyOptions, Place},
};
use cocalc_ids::{Epoch, ProjectId, SnapshotName, TreePath};
use cocalc_sqlite::master::{Ended, Job, Operation, Outcome, Project, ProjectState, RestoreTo};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::{
    backing_up::{Rate, phase},
    job::{Call, Failure, done},
};
use crate::shared::Shared;

/// How long a host waits for news before it answers.
const NEWS_MS: u64 = 2_000;
/// How long it may take to answer at all.
const LIMIT: Duration = Duration::from_secs(30);
/// How long to wait before asking again a host that was not there.
const AGAIN: Duration = Duration::from_secs(1);
/// How long a host may be away before nothing more is waited for. Nothing has
/// been changed then.
const AWAY_MAX: Duration = Duration::from_secs(300);
/// How long the processes may take to end.
const GRACE_MS: u64 = 10_000;
/// How often a project is stopped that somebody starts again meanwhile.
const STOPS_MAX: usize = 5;
/// The phases after which the files are the restored ones: what was before must
/// not be done again.
const SWAPPED: &str = "tidying up after a restore";
const STARTING: &str = "starting again";
/// The phase in which what was before is put back.
const UNDOING: &str = "going on as before a restore that failed";

/// A backup of a project as it is to be restored into another, or itself.
pub(super) struct From<'a> {
    pub(super) source: ProjectId,
    pub(super) backup: &'a str,
}

/// Restores into a project.
pub(super) async fn restore(
    call: &Call<'_>,
    project: &Project,
    backup: &str,
    to: &RestoreTo,
    cancel: &mut watch::Receiver<bool>,
) -> Result<Ended, Failure> {
    let from = From { source: project.id, backup };
    match to {
        RestoreTo::InPlace { former, start } => in_place(call, project, from, former, *start, cancel).await,
        RestoreTo::Path { path, target, replace, former } => {
            one_path(call, project, from, [path, target], *replace, former, cancel).await
        }
    }
}

async fn in_place(
    call: &Call<'_>,
    project: &Project,
    from: From<'_>,
    former: &SnapshotName,
    start: bool,
    cancel: &mut watch::Receiver<bool>,
) -> Result<Ended, Failure> {
    let (id, epoch, name) = (project.id, project.epoch, fetched_name(call.operation.id));
    if call.operation.phase == UNDOING {
        let message = "it failed before the master was started again; what was there before is in place";
        let failure = Failure::Refused(CommandError { code: ErrorCode::Failed, message: message.into() });
        return undo(call, project, &name, start, failure).await;
    }
    if ![SWAPPED, STARTING].contains(&&*call.operation.phase) {
        fetch(call, project, &from, &TreePath::root(), cancel).await?;
        if let Err(failure) = swap(call, project, &name, former).await {
            return undo(call, project, &name, start, failure).await;
        }
    }
    call.settle(SWAPPED).await;
    leave(call, id, epoch, &name, SWAPPED).await;
    let report = if start {
        call.settle(STARTING).await;
        match bring_up(call, project, STARTING).await {
            Ok(report) => report,
            // It has been stopped, and does not keep its state.
            Err(failure) => return Ok(failure.ended(&Job::Start, project)),
        }
    } else {
        let command = HostCommand::Report { project: id };
        call.report(SWAPPED, command, Duration::from_secs(60), epoch).await?
    };
    Ok(done(ProjectState::from(report.status.state), Some(report)))
}

/// Nothing has changed but that the project was stopped: it goes on.
async fn undo(
    call: &Call<'_>,
    project: &Project,
    name: &SnapshotName,
    start: bool,
    failure: Failure,
) -> Result<Ended, Failure> {
    call.settle(UNDOING).await;
    let started = if start { bring_up(call, project, UNDOING).await.map(drop) } else { Ok(()) };
    leave(call, project.id, project.epoch, name, UNDOING).await;
    if let Err(second) = started {
        tracing::warn!(project = %project.id, ?second, "not started again after a restore that failed");
        return Ok(failure.ended(&Job::Start, project));
    }
    Err(failure)
}

/// Stops the project, and puts the restored files in the place of its own,
/// which are kept.
async fn swap(
    call: &Call<'_>,
    project: &Project,
    name: &SnapshotName,
    former: &SnapshotName,
) -> Result<(), Failure> {
    let (id, epoch) = (project.id, project.epoch);
    for tries in 1.. {
        let stop = HostCommand::Stop { project: id, epoch, grace_ms: GRACE_MS };
        let limit = Duration::from_millis(GRACE_MS) + Duration::from_secs(60);
        call.report("stopping", stop, limit, epoch).await?;
        let restore =
            HostCommand::RestoreSnapshot { project: id, epoch, name: name.clone(), former: former.clone() };
        match call.report("putting it in place", restore, Duration::from_secs(300), epoch).await {
            Ok(_) => return Ok(()),
            // Somebody's request started it in between.
            Err(Failure::Refused(error)) if error.code == ErrorCode::Busy && tries < STOPS_MAX => {}
            Err(failure) => return Err(failure),
        }
    }
    Err(Failure::NoReceipt)
}

async fn bring_up(call: &Call<'_>, project: &Project, phase: &str) -> Result<ProjectReport, Failure> {
    let (id, epoch) = (project.id, project.epoch);
    let command = HostCommand::Start { project: id, epoch, config: project.config.clone() };
    let report = call.report(phase, command, Duration::from_secs(300), epoch).await?;
    if report.status.state == State::Stopped {
        let why = report.status.reason.as_deref().unwrap_or("it ended at once");
        let message = format!("it is restored, and does not start: {why}");
        return Err(Failure::Refused(CommandError { code: ErrorCode::Failed, message }));
    }
    Ok(report)
}

/// The snapshot of the backup has done its service: what it holds is live.
async fn tidy(call: &Call<'_>, id: ProjectId, epoch: Epoch, name: &SnapshotName) -> Result<(), Failure> {
    tidy_in(call, id, epoch, name, SWAPPED).await
}

async fn tidy_in(
    call: &Call<'_>,
    id: ProjectId,
    epoch: Epoch,
    name: &SnapshotName,
    phase: &str,
) -> Result<(), Failure> {
    let command = HostCommand::DeleteSnapshot { project: id, epoch, name: name.clone() };
    match call.perform(phase, command, Duration::from_secs(300)).await {
        // A transfer or backup of it goes on; it is deleted like others then.
        Err(Failure::Refused(error)) if error.code == ErrorCode::InUse => Ok(()),
        other => other.map(drop),
    }
}

/// The same where nothing depends on it: a snapshot that is left costs room.
async fn leave(call: &Call<'_>, id: ProjectId, epoch: Epoch, name: &SnapshotName, phase: &str) {
    if let Err(failure) = tidy_in(call, id, epoch, name, phase).await {
        tracing::warn!(project = %id, ?failure, "what a restore brought is left as a snapshot");
    }
}

async fn one_path(
    call: &Call<'_>,
    project: &Project,
    from: From<'_>,
    [path, target]: [&TreePath; 2],
    replace: bool,
    former: &SnapshotName,
    cancel: &mut watch::Receiver<bool>,
) -> Result<Ended, Failure> {
    let (id, epoch, name) = (project.id, project.epoch, fetched_name(call.operation.id));
    fetch(call, project, &from, path, cancel).await?;
    let copied = async {
        // Taken again, it is the same.
        let keep = HostCommand::Snapshot { project: id, epoch, name: former.clone() };
        call.perform("keeping the state before", keep, Duration::from_secs(120)).await?;
        let Some(last) = path.names().next_back().and_then(|last| TreePath::root().join(last).ok()) else {
            return Err(Failure::NoReceipt);
        };
        let copy = HostCommand::Copy {
            operation: call.operation.id,
            project: id,
            epoch,
            from: Place::frozen(id, name.clone(), last),
            from_epoch: epoch,
            to: target.clone(),
            options: CopyOptions { same_owner: true, replace },
        };
        call.keep("putting it in place", copy, project).await
    }
    .await;
    // Also if it failed: nobody else deletes it.
    let tidied = tidy(call, id, epoch, &name).await;
    let ended = copied?;
    tidied?;
    Ok(ended)
}

/// Fills a project that was just made, and is empty.
pub(super) async fn fill(
    call: &Call<'_>,
    project: &Project,
    from: From<'_>,
    cancel: &mut watch::Receiver<bool>,
) -> Result<ProjectReport, Failure> {
    let (id, epoch, name) = (project.id, project.epoch, fetched_name(call.operation.id));
    if is_filled(call.operation) {
        // It was filled before the master was started again, and may have been
        // worked in since: it is not filled again.
        let command = HostCommand::Report { project: id };
        return call.report(SWAPPED, command, Duration::from_secs(60), epoch).await;
    }
    fetch(call, project, &from, &TreePath::root(), cancel).await?;
    let empty: SnapshotName = "before-first-restore".parse().map_err(|_| Failure::NoReceipt)?;
    let restore =
        HostCommand::RestoreSnapshot { project: id, epoch, name: name.clone(), former: empty.clone() };
    let report = call.report("putting it in place", restore, Duration::from_secs(300), epoch).await?;
    call.settle(SWAPPED).await;
    leave(call, id, epoch, &empty, SWAPPED).await;
    leave(call, id, epoch, &name, SWAPPED).await;
    Ok(report)
}

/// Whether the project of an operation that makes it has got its files.
pub(super) fn is_filled(operation: &Operation) -> bool {
    operation.phase == SWAPPED
}

/// Brings a backup, or a path of it, to the project's host, as a snapshot.
async fn fetch(
    call: &Call<'_>,
    project: &Project,
    from: &From<'_>,
    path: &TreePath,
    cancel: &mut watch::Receiver<bool>,
) -> Result<(), Failure> {
    let work = BackupsWork::Fetch {
        source: from.source,
        backup: from.backup.to_owned(),
        path: path.clone(),
        name: fetched_name(call.operation.id),
        move_id: None,
    };
    let (shared, operation) = (call.shared, call.operation);
    let mut away_since = None;
    let mut rate = Rate::default();
    loop {
        if *cancel.borrow() {
            return Err(cancelled(shared, operation, project).await);
        }
        let what = BackupsCommand::Work { operation: operation.id, work: work.clone(), wait_ms: NEWS_MS };
        let command = HostCommand::Backups { project: project.id, epoch: project.epoch, what };
        let answer = tokio::select! {
            answer = shared.command(call.host, &command, LIMIT) => answer,
            _ = cancel.changed() => continue,
        };
        let waiting = match answer {
            Ok(HostReply::Backups { project: id, answer }) if id == project.id => match answer {
                BackupsReply::Working { operation: id, progress } if id == operation.id => {
                    away_since = None;
                    let (phase, shown) = match progress {
                        Some(progress) => (phase(&progress), rate.shown(&progress, shared.clock.boot())),
                        None => ("waiting for a place".to_owned(), json!({ "cancellable": true })),
                    };
                    shared.note(operation.id, &phase, shown).await;
                    continue;
                }
                BackupsReply::Done {
                    operation: id,
                    outcome: BackupsOutcome::Fetched { backup, restored, .. },
                } if id == operation.id => {
                    let shown: Value = json!({
                        "backup_id": backup.id, "bytes": restored.bytes, "entries": restored.entries,
                        "cancellable": false,
                    });
                    shared.note(operation.id, "restored and verified", shown).await;
                    return Ok(());
                }
                _ => return Err(Failure::NoReceipt),
            },
            Ok(HostReply::Error(error)) if error.code == ErrorCode::Busy => "waiting for the project",
            Ok(HostReply::Error(error)) => return Err(Failure::Refused(error)),
            Ok(_) => return Err(Failure::NoReceipt),
            Err(_) => "waiting for the host",
        };
        let since = *away_since.get_or_insert_with(|| shared.clock.boot());
        if shared.clock.boot().saturating_sub(since) >= AWAY_MAX {
            let message = format!("{waiting} took too long; nothing was changed");
            // It may be there, and only busy; else it finds what is left itself.
            end_fetch(shared, operation, project).await;
            return Err(Failure::Refused(CommandError { code: ErrorCode::Unavailable, message }));
        }
        shared.note(operation.id, waiting, json!({ "cancellable": true })).await;
        let _ = tokio::time::timeout(AGAIN, cancel.changed()).await;
    }
}

async fn cancelled(shared: &Shared, operation: &Operation, project: &Project) -> Failure {
    shared.note(operation.id, "cancelling", json!({})).await;
    end_fetch(shared, operation, project).await;
    Failure::Refused(CommandError { code: ErrorCode::Cancelled, message: "cancelled".into() })
}

async fn end_fetch(shared: &Shared, operation: &Operation, project: &Project) {
    let what = BackupsCommand::Cancel { operation: operation.id };
    let command = HostCommand::Backups { project: project.id, epoch: project.epoch, what };
    // What it may have brought just before is deleted.
    let _ = shared.command(project.host, &command, LIMIT).await;
    let name = fetched_name(operation.id);
    let tidy = HostCommand::DeleteSnapshot { project: project.id, epoch: project.epoch, name };
    if !matches!(shared.command(project.host, &tidy, LIMIT).await, Ok(HostReply::Snapshots { .. })) {
        tracing::warn!(project = %project.id, operation = %operation.id, "what a restore brought may be left");
    }
}

/// Whether an operation restores backups of `source` into its project.
pub(crate) fn restores_from(job: &Job, source: ProjectId, project: ProjectId) -> bool {
    match job {
        Job::RestoreBackup { .. } => source == project,
        Job::FromBackup { source: of, .. } => *of == source,
        _ => false,
    }
}

/// What was begun and is cancelled leaves the project as it is.
pub(super) fn outcome(code: &str, detail: String) -> Outcome {
    match code {
        "cancelled" => Outcome::Cancelled,
        code => Outcome::Failed { code: code.to_owned(), detail },
    }
}

impl Call<'_> {
    /// Records what must not be done again, for as long as it takes.
    async fn settle(&self, phase: &'static str) {
        let (id, mut pause) = (self.operation.id, Duration::from_millis(100));
        loop {
            let now = self.shared.now();
            let stored = self.shared.db(move |store| store.progress(id, phase, &json!({}), now));
            match stored.await {
                Ok(()) => return,
                Err(error) => {
                    tracing::error!(operation = %id, error = %cocalc_core::chain(&error), "cannot record a step");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(10));
                }
            }
        }
    }
}
