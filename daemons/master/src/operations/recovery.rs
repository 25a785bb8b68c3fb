//! All that a dead host had comes up elsewhere: one operation after the other,
//! a few at a time. What became of each project is in the database, from which
//! the next process goes on.

use std::{sync::Arc, time::Duration};

use cocalc_core::backups::{Answer, Backup, Query, Status};
use cocalc_ids::{AccountId, HostId, OperationId, ProjectId, Timestamp};
use cocalc_sqlite::master::{
    self as store, Operation, OperationState, Project, ProjectState, RecoveredProject, Recovery,
    RecoveryOutcome,
};
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::sync::watch;

use super::{PAUSE_MAX, PAUSE_MIN, despite_panics};
use crate::{
    api::time,
    placement::{Needs, place},
    shared::Shared,
};

/// How many projects are brought up at once.
const AT_ONCE: usize = 4;
/// How often an operation is looked at whose news were missed.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// What a host keeps free beside what comes.
const RESERVE_BYTES: u64 = 256 << 20;

impl Shared {
    /// Begins to bring up what the fenced `host` has.
    pub(crate) async fn begin_recovery(
        self: &Arc<Self>,
        id: OperationId,
        host: HostId,
        account: AccountId,
        to: Vec<HostId>,
    ) -> store::Result<Recovery> {
        let now = self.now();
        let recovery = self.db(move |store| store.begin_recovery(id, host, account, &to, now)).await?;
        if recovery.state == OperationState::Running {
            self.recover_all(&recovery);
        }
        Ok(recovery)
    }

    /// Goes on with the recoveries that an earlier process began.
    pub(super) async fn resume_recoveries(self: &Arc<Self>) -> store::Result<()> {
        for recovery in self.db(|store| store.recoveries_running()).await? {
            tracing::info!(operation = %recovery.id, host = %recovery.host, "going on with a recovery");
            self.recover_all(&recovery);
        }
        Ok(())
    }

    fn recover_all(self: &Arc<Self>, recovery: &Recovery) {
        let id = recovery.id;
        let cancelled = {
            let mut cancels = self.operations.cancels();
            if cancels.contains_key(&id) {
                return;
            }
            let sender = watch::Sender::new(recovery.cancel);
            let receiver = sender.subscribe();
            cancels.insert(id, sender);
            receiver
        };
        let (shared, stop) = (self.clone(), self.operations.stop.clone());
        self.operations.tasks.spawn(async move {
            let work = despite_panics(id, || work(&shared, id, cancelled.clone()));
            let ended = stop.run_until_cancelled(work).await;
            shared.operations.cancels().remove(&id);
            if ended.is_some() {
                shared.operations.notify(id);
            }
        });
    }

    /// Asks a recovery to begin no further project.
    pub(crate) async fn cancel_recovery(&self, id: OperationId) -> store::Result<Recovery> {
        let now = self.now();
        let recovery = self.db(move |store| store.cancel_recovery(id, now)).await?;
        if let Some(cancel) = self.operations.cancels().get(&id) {
            cancel.send_replace(true);
        }
        self.operations.notify(id);
        Ok(recovery)
    }
}

async fn work(shared: &Arc<Shared>, id: OperationId, cancelled: watch::Receiver<bool>) {
    let (recovery, projects) = read(shared, id).await;
    let open =
        |one: &RecoveredProject| matches!(one.outcome, RecoveryOutcome::Waiting | RecoveryOutcome::Restoring);
    let open: Vec<RecoveredProject> = projects.into_iter().filter(open).collect();
    stream::iter(open)
        .for_each_concurrent(AT_ONCE, |one| {
            let (recovery, cancelled) = (&recovery, &cancelled);
            async move {
                if one.outcome == RecoveryOutcome::Waiting && *cancelled.borrow() {
                    return;
                }
                let known = one.clone();
                let ended = match bring_up(shared, recovery, one).await {
                    Ok(ended) => ended,
                    Err(error) => {
                        tracing::error!(project = %known.project, error = %cocalc_core::chain(&error),
                            "a project of a dead host is left");
                        failed(known, "the master's database failed; its log says why")
                    }
                };
                note(shared, id, ended).await;
            }
        })
        .await;
    let (_, projects) = read(shared, id).await;
    let count = |outcome| projects.iter().filter(|one| one.outcome == outcome).count();
    let state = if count(RecoveryOutcome::Waiting) > 0 {
        OperationState::Cancelled
    } else if count(RecoveryOutcome::Failed) + count(RecoveryOutcome::NoBackup) > 0 {
        OperationState::Failed
    } else {
        OperationState::Done
    };
    let now = shared.now();
    let mut pause = PAUSE_MIN;
    while let Err(error) = shared.db(move |store| store.end_recovery(id, state, now)).await {
        tracing::error!(operation = %id, error = %cocalc_core::chain(&error), "cannot end a recovery");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
    tracing::info!(operation = %id, host = %recovery.host, restored = count(RecoveryOutcome::Restored),
        failed = count(RecoveryOutcome::Failed), no_backup = count(RecoveryOutcome::NoBackup),
        "a recovery ended");
}

async fn read(shared: &Shared, id: OperationId) -> (Recovery, Vec<RecoveredProject>) {
    let mut pause = PAUSE_MIN;
    loop {
        match shared.db(move |store| store.recovery(id)).await {
            Ok(found) => return found,
            Err(error) => {
                tracing::error!(operation = %id, error = %cocalc_core::chain(&error), "cannot read a recovery");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
        }
    }
}

/// Records what became of a project, for as long as that takes: what is not
/// recorded would be done again.
async fn note(shared: &Shared, id: OperationId, one: RecoveredProject) {
    let mut pause = PAUSE_MIN;
    loop {
        let (now, row) = (shared.now(), one.clone());
        match shared.db(move |store| store.note_recovered(id, &row, now)).await {
            Ok(()) => return shared.operations.notify(id),
            Err(error) => {
                tracing::error!(operation = %id, error = %cocalc_core::chain(&error), "cannot note a project");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
        }
    }
}

fn failed(one: RecoveredProject, detail: impl Into<String>) -> RecoveredProject {
    ended(one, RecoveryOutcome::Failed, detail)
}

fn ended(mut one: RecoveredProject, outcome: RecoveryOutcome, detail: impl Into<String>) -> RecoveredProject {
    one.outcome = outcome;
    one.details["detail"] = detail.into().into();
    one
}

/// The operation of a project, the same in every process.
fn operation_of(recovery: OperationId, project: ProjectId) -> OperationId {
    let digest = Sha256::new()
        .chain_update(b"recover")
        .chain_update(recovery.as_bytes())
        .chain_update(project.as_bytes())
        .finalize();
    let mut id = [0; 16];
    id.copy_from_slice(&digest[..16]);
    OperationId::from_random_bytes(id)
}

/// Brings one project up, and says what became of it.
async fn bring_up(
    shared: &Arc<Shared>,
    recovery: &Recovery,
    mut one: RecoveredProject,
) -> store::Result<RecoveredProject> {
    let (id, account) = (one.project, recovery.account);
    let operation = operation_of(recovery.id, id);
    // An earlier process may have begun it just before its end.
    let known = match shared.db(move |store| store.operation(operation)).await {
        Ok(known) => Some(known),
        Err(store::Error::NotFound { .. }) => None,
        Err(error) => return Err(error),
    };
    if known.is_none() {
        let project = match shared.db(move |store| store.project(id)).await {
            Ok(project) => project,
            Err(store::Error::NotFound { .. }) => {
                return Ok(ended(one, RecoveryOutcome::Passed, "it was deleted"));
            }
            Err(error) => return Err(error),
        };
        one.details["name"] = project.name.clone().into();
        if project.host != recovery.host {
            return Ok(ended(one, RecoveryOutcome::Passed, "another host has it now"));
        }
        let host = recovery.host;
        let fence = shared.db(move |store| store.host(host)).await?.fenced;
        let heard = fence.as_ref().and_then(|fence| fence.heard);
        let newest = match newest(shared, id).await {
            Ok(newest) => newest,
            Err(detail) => return Ok(failed(one, detail)),
        };
        let Some(backup) = newest else {
            one.details["last_heard"] = heard.map(time).into();
            let detail = "it has no backup, so it was not touched: it is lost until its host returns";
            return Ok(ended(one, RecoveryOutcome::NoBackup, detail));
        };
        one.details["backup_id"] = backup.id.clone().into();
        one.details["lost"] = loss(&backup, project.backup.as_ref(), heard);
        let to = match destination(shared, recovery, &project, &backup).await? {
            Ok(to) => to,
            Err(detail) => return Ok(failed(one, detail)),
        };
        one.details["host_id"] = to.to_string().into();
        let (now, from) = (shared.now(), recovery.host);
        let begun = shared.db(move |store| {
            store.begin_recover(operation, id, account, from, to, &backup.id, &ALLOWED, now)
        });
        match begun.await {
            Ok(_) => {}
            Err(store::Error::Busy { operation }) => {
                let detail = format!("it is busy with operation {operation}; when that has ended, ask again");
                return Ok(failed(one, detail));
            }
            Err(error @ (store::Error::WrongState { .. } | store::Error::NotFenced)) => {
                return Ok(failed(one, error.to_string()));
            }
            Err(store::Error::Stale { .. }) => {
                return Ok(ended(one, RecoveryOutcome::Passed, "another host has it now"));
            }
            Err(error) => return Err(error),
        }
    }
    (one.operation, one.outcome) = (Some(operation), RecoveryOutcome::Restoring);
    note(shared, recovery.id, one.clone()).await;
    shared.run_if_new(operation).await?;
    let done = settled(shared, operation).await?;
    let text = |key: &str| done.error.as_ref().and_then(|error| error[key].as_str()).map(str::to_owned);
    Ok(match done.state {
        OperationState::Done => {
            let mut one = one;
            if let Some(details) = one.details.as_object_mut() {
                details.remove("detail");
            }
            RecoveredProject { outcome: RecoveryOutcome::Restored, ..one }
        }
        OperationState::Cancelled => failed(one, "its operation was cancelled"),
        _ => failed(one, text("detail").unwrap_or_else(|| "its operation failed".to_owned())),
    })
}

/// In which states a project of a dead host can be that nobody is busy with.
const ALLOWED: [ProjectState; 6] = [
    ProjectState::Unknown,
    ProjectState::Stopped,
    ProjectState::Starting,
    ProjectState::Running,
    ProjectState::Stopping,
    ProjectState::Failed,
];

/// Waits until an operation has ended.
async fn settled(shared: &Shared, id: OperationId) -> store::Result<Operation> {
    let mut changes = shared.operations.changes();
    loop {
        let operation = shared.db(move |store| store.operation(id)).await?;
        if operation.state != OperationState::Running {
            return Ok(operation);
        }
        let _ = tokio::time::timeout(LOOK_AGAIN, changes.recv()).await;
    }
}

/// The newest backup of a project, if it has one; else why that is not known.
async fn newest(shared: &Shared, project: ProjectId) -> Result<Option<Backup>, String> {
    let Some(backups) = &shared.backups else { return Err("this federation has no backups".to_owned()) };
    match backups.browse(project, &Query::List).await {
        Ok(Answer::Backups { backups, .. }) => Ok(backups.into_iter().max_by(Backup::order)),
        Ok(Answer::Entries(_) | Answer::Changes(_)) => {
            Err("the repository's answer makes no sense".to_owned())
        }
        Err(error) => Err(format!("its repository cannot be read: {}", error.message)),
    }
}

/// Where a project goes; else why nowhere.
async fn destination(
    shared: &Shared,
    recovery: &Recovery,
    project: &Project,
    backup: &Backup,
) -> store::Result<Result<HostId, String>> {
    let mut candidates = shared.candidates().await?;
    candidates.retain(|one| {
        one.host != recovery.host && (recovery.to.is_empty() || recovery.to.contains(&one.host))
    });
    for one in &mut candidates {
        // Who names a cordoned host gets it.
        one.cordoned &= recovery.to.is_empty();
    }
    let needs = Needs { image: project.config.image, quota_bytes: project.config.quota_bytes, only: None };
    let before = place(&candidates, &needs);
    candidates.retain(|one| one.free_bytes >= backup.bytes.saturating_add(RESERVE_BYTES));
    Ok(match (before, place(&candidates, &needs)) {
        (_, Ok(host)) => Ok(host),
        (Err(reason), Err(_)) => Err(format!("{reason}; when there is one, ask again")),
        (Ok(_), Err(_)) => {
            Err(format!("no host has room for its {} bytes; make room, and ask again", backup.bytes))
        }
    })
}

/// What is not in the backup, as far as it is known.
fn loss(backup: &Backup, status: Option<&Status>, heard: Option<Timestamp>) -> Value {
    let pending = status.and_then(|status| status.pending_since);
    let is_last =
        status.and_then(|status| status.last.as_ref()).is_some_and(|last| last.backup.id == backup.id);
    let span = heard.map(|heard| heard.since(backup.taken));
    let host = span.map_or_else(
        || "when its host was last heard of is not known".to_owned(),
        |span| format!("its host was last heard of {} after that", age(span)),
    );
    let text = match pending {
        Some(since) => format!("what changed from {} on is lost: no backup had it; {host}", time(since)),
        // Silence is no proof: perhaps nobody looked.
        None if is_last => format!(
            "what changed after the backup of {} is lost, though its host told of no change; {host}",
            time(backup.taken)
        ),
        None => format!("what changed after the backup of {} is lost; {host}", time(backup.taken)),
    };
    json!({
        "taken": time(backup.taken),
        "pending_since": pending.map(time),
        "last_heard": heard.map(time),
        "at_most_secs": span.map(|span| span.as_secs()),
        "text": text,
    })
}

/// A span of time for people.
fn age(span: Duration) -> String {
    let secs = span.as_secs();
    match secs {
        0..=119 => format!("{secs} s"),
        120..=7_199 => format!("{} min", secs / 60),
        7_200..=172_799 => format!("{} h", secs / 3_600),
        _ => format!("{} days", secs / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use cocalc_core::backups::{BackupKind, Last};
    use cocalc_ids::Epoch;

    use super::*;

    #[test]
    fn what_was_lost_is_said_as_far_as_it_is_known() {
        let (project, taken) = (ProjectId::random(), Timestamp::from_secs(1_800_000_000));
        let backup = Backup {
            id: "b".repeat(64),
            project,
            host: HostId::random(),
            epoch: Epoch::FIRST,
            kind: BackupKind::Scheduled,
            taken,
            bytes: 1,
            added_bytes: 1,
            files: 1,
            files_read: 1,
        };
        let heard = Some(taken.plus(Duration::from_secs(3 * 3600)));
        let unknown = loss(&backup, None, None);
        assert!(unknown["text"].as_str().unwrap().contains("is not known"), "{unknown}");
        assert_eq!(unknown["at_most_secs"], Value::Null);
        let after = loss(&backup, None, heard);
        let text = after["text"].as_str().unwrap();
        assert!(text.starts_with("what changed after") && text.ends_with("3 h after that"), "{text}");
        assert_eq!(after["at_most_secs"], 3 * 3600);
        let mut status = Status::new(project, Epoch::FIRST);
        status.last = Some(Last {
            backup: backup.clone(),
            snapshot: "s".parse().unwrap(),
            only_for_this: false,
            finished: taken,
            millis: 1,
        });
        let none = loss(&backup, Some(&status), heard);
        assert!(none["text"].as_str().unwrap().contains("told of no change"), "{none}");
        status.pending_since = Some(taken.plus(Duration::from_secs(60)));
        let pending = loss(&backup, Some(&status), heard);
        assert!(pending["text"].as_str().unwrap().starts_with("what changed from 20"), "{pending}");
    }

    #[test]
    fn the_operation_of_a_project_is_the_same_in_every_process() {
        let (one, two) = (OperationId::random(), OperationId::random());
        let project = ProjectId::random();
        assert_eq!(operation_of(one, project), operation_of(one, project));
        assert_ne!(operation_of(one, project), operation_of(two, project));
        assert_ne!(operation_of(one, project), operation_of(one, ProjectId::random()));
    }
}
