//! Operations on backups. They fence nothing: the project is started, stopped
//! and moved meanwhile.

use std::{sync::Arc, time::Duration};

use cocalc_core::{
    backups::{Answer, Progress, Query},
    control::{
        BackupsCommand, BackupsOutcome, BackupsReply, BackupsWork, CommandError, DrillReport, ErrorCode,
        HostCommand, HostReply,
    },
};
use cocalc_ids::{HostId, ProjectId};
use cocalc_sqlite::master::{self as store, Ended, Job, Operation, Outcome, Project, ProjectState};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::job::code;
use crate::shared::Shared;

/// How long a host waits for news before it answers.
const NEWS: Duration = Duration::from_secs(2);
/// How long it may take to answer at all.
const LIMIT: Duration = Duration::from_secs(30);
/// How long to wait before asking again a host that was not there.
const AGAIN: Duration = Duration::from_secs(1);
/// How long a host may be away before its work is given up. It may go on with
/// it by itself.
const AWAY_MAX: Duration = Duration::from_secs(120);

/// Runs the operation, and records its end.
pub(super) async fn run(shared: &Arc<Shared>, operation: &Operation, mut cancel: watch::Receiver<bool>) {
    let done = match &operation.job {
        Job::BackUp => at_host(shared, operation, BackupsWork::BackUp, &mut cancel).await,
        Job::DrillBackup => drill(shared, operation, &mut cancel).await,
        job => crate::backups::tend(shared, operation, job).await,
    };
    let outcome = match done {
        Ok(progress) => {
            shared.note(operation.id, "finishing", progress).await;
            Outcome::Done
        }
        Err(error) if error.code == ErrorCode::Cancelled => Outcome::Cancelled,
        Err(error) if operation.job == Job::DrillBackup && error.code == ErrorCode::RepositoryDamaged => {
            Outcome::Failed { code: "drill_failed".to_owned(), detail: error.message }
        }
        Err(error) => Outcome::Failed { code: code(error.code).to_owned(), detail: error.message },
    };
    // The project's state is none of its business, and stays as it is.
    let ended = Ended { outcome, project: ProjectState::Failed, reason: None, report: None };
    shared.finish(operation.id, ended).await;
}

/// Has a backup tried out, and notes how that went.
async fn drill(
    shared: &Shared,
    operation: &Operation,
    cancel: &mut watch::Receiver<bool>,
) -> Result<Value, CommandError> {
    let done = at_host(shared, operation, BackupsWork::Drill, cancel).await;
    match &done {
        Ok(report) => {
            let Ok(report) = serde_json::from_value::<DrillReport>(report["report"].clone()) else {
                return Err(nonsense());
            };
            if let Some(failure) = shared.drilled(&report).await {
                shared.note(operation.id, "comparing", done.clone().unwrap_or_default()).await;
                return Err(CommandError { code: ErrorCode::RepositoryDamaged, message: failure });
            }
        }
        Err(error) if error.code == ErrorCode::Cancelled => {}
        Err(error) => shared.drill_failed(operation.project, error),
    }
    done
}

/// Has work done at the project's host, wherever that is: a project that moves
/// meanwhile is done at its new host. What came of it, for people.
async fn at_host(
    shared: &Shared,
    operation: &Operation,
    work: BackupsWork,
    cancel: &mut watch::Receiver<bool>,
) -> Result<Value, CommandError> {
    let mut away_since = None;
    let mut rate = Rate::default();
    loop {
        let project = find(shared, operation.project).await?;
        if *cancel.borrow() {
            return cancelled(shared, operation, &project).await;
        }
        let what = BackupsCommand::Work {
            operation: operation.id,
            work: work.clone(),
            wait_ms: u64::try_from(NEWS.as_millis()).unwrap_or(u64::MAX),
        };
        let command = HostCommand::Backups { project: project.id, epoch: project.epoch, what };
        let answer = tokio::select! {
            answer = shared.command(project.host, &command, LIMIT) => answer,
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
                BackupsReply::Done { operation: id, outcome } if id == operation.id => {
                    return Ok(result(outcome));
                }
                _ => return Err(nonsense()),
            },
            // It is on its way to another host, or was: nobody else breaks it off
            // there but who cancels it here.
            Ok(HostReply::Error(error))
                if matches!(error.code, ErrorCode::StaleEpoch | ErrorCode::Cancelled) =>
            {
                let now = find(shared, operation.project).await?;
                if now.state == ProjectState::Moving {
                    away_since = None;
                    "waiting for the project to have moved"
                } else if now.epoch == project.epoch && away_since.is_some() {
                    return Err(error);
                } else {
                    "waiting for the project's host to have it"
                }
            }
            Ok(HostReply::Error(error)) if error.code == ErrorCode::Busy => "waiting for the project",
            Ok(HostReply::Error(error)) => return Err(error),
            Ok(_) => return Err(nonsense()),
            Err(_) => "waiting for the host",
        };
        let since = *away_since.get_or_insert_with(|| shared.clock.boot());
        if shared.clock.boot().saturating_sub(since) >= AWAY_MAX {
            let message = format!("{waiting} took too long; the project is backed up when it is due");
            return Err(CommandError { code: ErrorCode::Unavailable, message });
        }
        shared.note(operation.id, waiting, json!({ "cancellable": true })).await;
        let _ = tokio::time::timeout(AGAIN, cancel.changed()).await;
    }
}

async fn cancelled(shared: &Shared, operation: &Operation, project: &Project) -> Result<Value, CommandError> {
    shared.note(operation.id, "cancelling", json!({})).await;
    let what = BackupsCommand::Cancel { operation: operation.id };
    let command = HostCommand::Backups { project: project.id, epoch: project.epoch, what };
    match shared.command(project.host, &command, LIMIT).await {
        // It has not ended yet: what it does is harmless, and is told.
        Ok(HostReply::Error(error)) if error.code == ErrorCode::Busy => Err(error),
        _ => Err(CommandError { code: ErrorCode::Cancelled, message: "cancelled".into() }),
    }
}

async fn find(shared: &Shared, id: ProjectId) -> Result<Project, CommandError> {
    shared.db(move |store| store.project(id)).await.map_err(|error| match error {
        store::Error::NotFound { .. } => {
            CommandError { code: ErrorCode::NotFound, message: "the project was deleted meanwhile".into() }
        }
        error => {
            tracing::error!(project = %id, error = %cocalc_core::chain(&error), "cannot read a project");
            CommandError { code: ErrorCode::Failed, message: "the master's database failed".into() }
        }
    })
}

fn nonsense() -> CommandError {
    CommandError { code: ErrorCode::Failed, message: "the host's answer makes no sense".into() }
}

fn result(outcome: BackupsOutcome) -> Value {
    match outcome {
        BackupsOutcome::BackedUp { backup } => json!({
            "backup_id": backup.id, "bytes": backup.bytes, "added_bytes": backup.added_bytes,
            "files": backup.files, "files_read": backup.files_read, "cancellable": false,
        }),
        BackupsOutcome::Fetched { backup, restored, .. } => json!({
            "backup_id": backup.id, "bytes": restored.bytes, "entries": restored.entries,
            "cancellable": false,
        }),
        BackupsOutcome::Drilled { report } => json!({
            "backup_id": report.backup.id, "bytes": report.bytes, "entries": report.entries,
            "millis": report.millis, "against": report.against, "wrong": report.wrong,
            "cancellable": false, "report": report,
        }),
    }
}

/// What is being done, for people.
pub(crate) fn phase(progress: &Progress) -> String {
    match serde_json::to_value(progress.phase) {
        Ok(Value::String(phase)) => phase,
        _ => "working".to_owned(),
    }
}

/// How fast something is.
#[derive(Debug, Default)]
pub(crate) struct Rate {
    begun: Option<(String, Duration, u64)>,
}

impl Rate {
    /// Bytes, rate and estimate, as operations show them.
    pub(crate) fn shown(&mut self, progress: &Progress, now: Duration) -> Value {
        let phase = phase(progress);
        if self.begun.as_ref().is_none_or(|(begun, ..)| *begun != phase) {
            self.begun = Some((phase, now, progress.bytes));
        }
        let mut shown = json!({
            "bytes": progress.bytes, "bytes_expected": progress.total_bytes, "cancellable": true,
        });
        if let Some((_, since, from)) = &self.begun
            && let millis @ 1.. = now.saturating_sub(*since).as_millis()
        {
            let rate = u128::from(progress.bytes.saturating_sub(*from)) * 1000 / millis;
            shown["bytes_per_sec"] = u64::try_from(rate).unwrap_or(u64::MAX).into();
            let left = progress.total_bytes.map(|total| u128::from(total.saturating_sub(progress.bytes)));
            if let Some(secs) = left.and_then(|left| left.checked_div(rate)) {
                shown["remaining_secs"] = u64::try_from(secs).unwrap_or(u64::MAX).into();
            }
        }
        shown
    }
}

impl Shared {
    /// Asks about the backups of a project: its host, or, if that is not there,
    /// the repository itself. Who answered.
    pub(crate) async fn ask_backups(
        &self,
        project: &Project,
        query: Query,
    ) -> Result<(Answer, Option<HostId>), CommandError> {
        let Some(backups) = &self.backups else {
            let message = "this federation has no backups".to_owned();
            return Err(CommandError { code: ErrorCode::Invalid, message });
        };
        let what = BackupsCommand::Ask { query: query.clone() };
        let command = HostCommand::Backups { project: project.id, epoch: project.epoch, what };
        match self.command(project.host, &command, LIMIT).await {
            Ok(HostReply::Backups { project: id, answer: BackupsReply::Answered { answer } })
                if id == project.id =>
            {
                return Ok((answer, Some(project.host)));
            }
            // Nor is a busy host gone around: that would be twice the work.
            Ok(HostReply::Error(error))
                if matches!(error.code, ErrorCode::NotFound | ErrorCode::Invalid | ErrorCode::Busy) =>
            {
                return Err(error);
            }
            // Whatever keeps the host from it need not keep the master.
            Ok(other) => tracing::debug!(project = %project.id, ?other, "the master looks itself"),
            Err(_) => {}
        }
        let answer = backups.browse(project.id, &query).await?;
        Ok((answer, None))
    }
}

#[cfg(test)]
mod tests {
    use cocalc_core::backups::Phase;

    use super::*;

    #[test]
    fn rates_count_within_a_phase() {
        let mut rate = Rate::default();
        let at = |phase, bytes| Progress { phase, bytes, total_bytes: Some(3_000) };
        let secs = Duration::from_secs;
        assert_eq!(rate.shown(&at(Phase::Opening, 0), secs(1))["bytes_per_sec"], Value::Null);
        rate.shown(&at(Phase::Storing, 0), secs(10));
        let shown = rate.shown(&at(Phase::Storing, 1_000), secs(12));
        assert_eq!((&shown["bytes_per_sec"], &shown["remaining_secs"]), (&json!(500), &json!(4)));
        assert_eq!(rate.shown(&at(Phase::Storing, 0), secs(12))["remaining_secs"], Value::Null);
    }
}
