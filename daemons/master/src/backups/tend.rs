//! What is done to repositories with credentials that no host gets: by
//! operations, which people begin, and time.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use cocalc_auth::audit::{Event, shortened};
use cocalc_core::{
    backups::{Answer, CheckOptions, PruneOptions, Query, answer, backup_error, superfluous},
    connector::Peer,
    control::{BackupsCommand, CommandError, DrillReport, ErrorCode, HostCommand, HostReply},
};
use cocalc_ids::{OperationId, ProjectId, Timestamp};
use cocalc_sqlite::master::{self as store, Job, Operation, OperationState, Tending};
use serde_json::{Value, json};

use super::Backups;
use crate::shared::Shared;

/// How often it is looked what is due.
const ROUND: Duration = Duration::from_secs(5);
/// How long until what failed is tried again: at first, and at most. Each time
/// twice as long.
const AGAIN_MIN: Duration = Duration::from_secs(60);
const AGAIN_MAX: Duration = Duration::from_secs(6 * 3600);
/// How long a host may take to hear that backups are gone.
const TELL_LIMIT: Duration = Duration::from_secs(20);

/// What was done, for the metrics.
#[derive(Debug, Default)]
pub(crate) struct Tended {
    pub(crate) failures: AtomicU64,
    pub(crate) forgotten: AtomicU64,
    pub(crate) freed_bytes: AtomicU64,
    pub(crate) erased: AtomicU64,
    pub(crate) drills: AtomicU64,
    pub(crate) drill_failures: AtomicU64,
    /// How the last drill went.
    last_drill: Mutex<Option<LastDrill>>,
}

/// How a drill went.
#[derive(Clone, Debug)]
pub(crate) struct LastDrill {
    pub(crate) project: ProjectId,
    pub(crate) at: Timestamp,
    pub(crate) millis: u64,
    /// Why it failed, if it did.
    pub(crate) failure: Option<String>,
}

impl Tended {
    pub(crate) fn last_drill(&self) -> Option<LastDrill> {
        self.last_drill.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn drilled(&self, last: LastDrill) {
        add(&self.drills, 1);
        add(&self.drill_failures, u64::from(last.failure.is_some()));
        *self.last_drill.lock().unwrap_or_else(PoisonError::into_inner) = Some(last);
    }
}

fn add(counter: &AtomicU64, number: u64) {
    counter.fetch_add(number, Ordering::Relaxed);
}

/// How long a question waits for others, before whoever asked is told to ask
/// again.
const QUESTION_LIMIT: Duration = Duration::from_secs(20);

impl Backups {
    /// Answers a question from the repository itself. Maintenance has places of
    /// its own, so nobody who asks waits for that.
    pub(crate) async fn browse(&self, project: ProjectId, query: &Query) -> Result<Answer, CommandError> {
        let waiting = tokio::time::timeout(QUESTION_LIMIT, self.questions.acquire()).await;
        let _place = match waiting {
            Ok(place) => place.map_err(|_| closed())?,
            Err(_) => {
                let message = "others ask about backups; ask again in a minute".to_owned();
                return Err(CommandError { code: ErrorCode::Unavailable, message });
            }
        };
        answer(self.own(), project, query).await.map_err(|error| backup_error(&error))
    }

    /// Brings the mirror of a repository up to date. How many bytes were copied.
    async fn mirror(&self, project: ProjectId) -> Result<u64, CommandError> {
        let mirrored = self.rustic.mirror(project, &|_| ()).await.map_err(|error| backup_error(&error))?;
        Ok(mirrored.bytes)
    }

    /// Waits until there are few enough jobs.
    async fn place(&self) -> Result<tokio::sync::OwnedSemaphorePermit, CommandError> {
        Arc::clone(&self.places).acquire_owned().await.map_err(|_| closed())
    }
}

fn closed() -> CommandError {
    CommandError { code: ErrorCode::Failed, message: "the master is shutting down".into() }
}

/// Does the work of an operation on a repository. What came of it, for people.
pub(crate) async fn tend(shared: &Shared, operation: &Operation, job: &Job) -> Result<Value, CommandError> {
    let none = || CommandError { code: ErrorCode::Invalid, message: "this federation has no backups".into() };
    let backups = shared.backups.as_ref().ok_or_else(none)?;
    shared.note(operation.id, "waiting for a place", json!({})).await;
    let _place = backups.place().await?;
    let done = match job {
        Job::ForgetBackups { backups: ids } => forget(shared, backups, operation, ids).await,
        Job::PruneBackups => prune(shared, backups, operation).await,
        Job::CheckBackups { read_data } => check(shared, backups, operation, *read_data).await,
        Job::EraseBackups => erase(shared, backups, operation).await,
        _ => Err(CommandError { code: ErrorCode::Invalid, message: "not a job of the master's".into() }),
    };
    if done.is_err() {
        add(&backups.tended.failures, 1);
    }
    done
}

async fn forget(
    shared: &Shared,
    backups: &Backups,
    operation: &Operation,
    ids: &[String],
) -> Result<Value, CommandError> {
    let (id, own) = (operation.project, backups.own());
    shared.note(operation.id, "forgetting", json!({})).await;
    let before = own.list(id).await.map_err(|error| backup_error(&error))?;
    let known: Vec<String> =
        before.iter().filter(|one| ids.contains(&one.id)).map(|one| one.id.clone()).collect();
    own.forget(id, &known).await.map_err(|error| backup_error(&error))?;
    add(&backups.tended.forgotten, known.len().try_into().unwrap_or(u64::MAX));
    if !known.is_empty() && !tell_gone(shared, id, known.clone()).await {
        tracing::warn!(project = %id, "its host did not hear that backups are gone: it makes the next when something changes");
    }
    Ok(json!({ "forgotten": known, "left": before.len() - known.len() }))
}

/// The project's host, if it has one, is to back up again what only these had,
/// and breaks off what it makes if all are gone. Whether that is so.
async fn tell_gone(shared: &Shared, id: ProjectId, backups: Vec<String>) -> bool {
    let Ok(project) = shared.db(move |store| store.project(id)).await else { return true };
    // It gets no key, and its credentials have ended with its lease.
    if shared.peers.is_fenced(Peer::Host(project.host)) {
        return true;
    }
    let what = BackupsCommand::Gone { backups };
    let command = HostCommand::Backups { project: id, epoch: project.epoch, what };
    matches!(shared.command(project.host, &command, TELL_LIMIT).await, Ok(HostReply::Backups { .. }))
}

/// Forgets what the policy does not keep, and deletes what nothing needs.
async fn prune(shared: &Shared, backups: &Backups, operation: &Operation) -> Result<Value, CommandError> {
    let (id, own) = (operation.project, backups.own());
    shared.note(operation.id, "forgetting", json!({})).await;
    let project = shared.db(move |store| store.project(id)).await;
    let policy = project.ok().and_then(|project| project.config.backups).unwrap_or_else(|| backups.policy());
    let list = own.list(id).await.map_err(|error| backup_error(&error))?;
    let gone = superfluous(&policy, &list, shared.now());
    if !gone.is_empty() {
        own.forget(id, &gone).await.map_err(|error| backup_error(&error))?;
    }
    add(&backups.tended.forgotten, gone.len().try_into().unwrap_or(u64::MAX));
    shared.note(operation.id, "pruning", json!({ "forgotten": gone.len() })).await;
    let grace = Duration::from_secs(3600 * u64::from(backups.config.unneeded_hours));
    let pruned = own.prune(id, &PruneOptions { grace }).await.map_err(|error| backup_error(&error))?;
    add(&backups.tended.freed_bytes, pruned.freed_bytes);
    let mut copied = 0;
    if backups.config.mirror.is_some() {
        shared.note(operation.id, "mirroring", json!({})).await;
        copied = backups.mirror(id).await?;
    }
    let now = shared.now();
    noted(shared.db(move |store| store.tended_backups(id, Tending::Pruned, now)).await)?;
    Ok(json!({
        "mirrored_bytes": copied,
        "forgotten": gone.len(), "left": list.len() - gone.len(), "freed_bytes": pruned.freed_bytes,
        "marked_bytes": pruned.marked_bytes, "kept_bytes": pruned.kept_bytes,
    }))
}

async fn check(
    shared: &Shared,
    backups: &Backups,
    operation: &Operation,
    read_data: bool,
) -> Result<Value, CommandError> {
    let (id, own) = (operation.project, backups.own());
    shared.note(operation.id, "checking", json!({})).await;
    let options = CheckOptions { read_data, repair: false };
    let mut found = own.check(id, &options).await.map_err(|error| backup_error(&error))?;
    let damaged = found.damage.clone();
    if !found.is_sound() && backups.config.mirror.is_some() {
        tracing::warn!(project = %id, damage = ?found.damage, "backups are damaged; repairing them from the mirror");
        shared.note(operation.id, "repairing", json!({ "damage": found.damage })).await;
        let options = CheckOptions { repair: true, ..options };
        found = own.check(id, &options).await.map_err(|error| backup_error(&error))?;
    }
    let damage = (!found.is_sound()).then(|| found.damage.clone());
    if let Some(damage) = &damage {
        tracing::error!(project = %id, ?damage, affected = ?found.affected, "backups are damaged");
    }
    let now = shared.now();
    let note = move |store: &store::Store| {
        store.set_backup_damage(id, damage.as_deref())?;
        store.tended_backups(id, Tending::Checked, now)
    };
    noted(shared.db(note).await)?;
    let lost: Vec<Value> = found
        .lost
        .iter()
        .map(|lost| json!({ "backup": lost.backup, "path": lost.path.to_string() }))
        .collect();
    Ok(json!({
        "sound": found.is_sound(), "damage": found.damage, "affected": found.affected, "lost": lost,
        "found": damaged, "repaired": found.repaired,
    }))
}

/// Deletes all backups of a project, with proof.
async fn erase(shared: &Shared, backups: &Backups, operation: &Operation) -> Result<Value, CommandError> {
    let (id, own) = (operation.project, backups.own());
    shared.note(operation.id, "erasing", json!({})).await;
    // No host gets the key while this goes on; what one makes with the key that
    // it has must have ended.
    if !tell_gone(shared, id, Vec::new()).await {
        let message = "the project's host did not say that it makes no backup now".to_owned();
        return Err(CommandError { code: ErrorCode::Unavailable, message });
    }
    let listed = own.list(id).await.map_err(|error| backup_error(&error))?.len();
    let erased = own.erase(id).await.map_err(|error| backup_error(&error))?;
    // Asked of the place itself, after its key is gone.
    let left = own.list(id).await.map_err(|error| backup_error(&error))?.len();
    noted(shared.db(move |store| store.forget_backup_repository(id)).await)?;
    add(&backups.tended.erased, 1);
    add(&backups.tended.freed_bytes, erased.freed_bytes);
    let result = json!({
        "backups": listed, "left": left, "objects": erased.objects, "freed_bytes": erased.freed_bytes,
        "marked_bytes": erased.marked_bytes,
    });
    let mut event = Event::new("erase", "backups erased", shared.now());
    event.project = Some(id);
    event.account = Some(operation.account);
    event.action = Some("backup.erase".to_owned());
    event.subject = Some(shortened(result.to_string()));
    shared.audit.record(event);
    tracing::info!(project = %id, %result, "backups erased");
    if left > 0 {
        let message = format!("{left} backups are still listed");
        return Err(CommandError { code: ErrorCode::Failed, message });
    }
    Ok(result)
}

fn noted<T>(noted: store::Result<T>) -> Result<T, CommandError> {
    noted.map_err(|error| {
        tracing::error!(error = %cocalc_core::chain(&error), "the database failed");
        CommandError { code: ErrorCode::Failed, message: "the master's database failed".into() }
    })
}

impl Shared {
    /// A project was deleted: its backups are erased when their time has come.
    pub(crate) async fn backups_of_deleted(&self, project: ProjectId) {
        let Some(backups) = &self.backups else { return };
        let at = self.now().plus(hours(backups.config.erase_after_hours));
        if let Err(error) = self.db(move |store| store.schedule_erasures(Some(project), at)).await {
            // It is found again when the master starts.
            tracing::warn!(%project, error = %cocalc_core::chain(&error), "cannot say when its backups go");
        }
    }

    /// Takes the word of a host for how a drill went. Why it failed, if it did.
    pub(crate) async fn drilled(&self, report: &DrillReport) -> Option<String> {
        let backups = self.backups.as_ref()?;
        let (project, now) = (report.backup.project, self.now());
        let failure = (!report.wrong.is_empty()).then(|| report.wrong.join("; "));
        if let Some(failure) = &failure {
            tracing::error!(%project, backup = report.backup.id, failure, "a backup cannot be restored as it was");
        }
        backups.tended.drilled(LastDrill {
            project,
            at: now,
            millis: report.millis,
            failure: failure.clone(),
        });
        let noted = self.db(move |store| store.tended_backups(project, Tending::Drilled, now)).await;
        if let Err(error) = noted {
            tracing::warn!(%project, error = %cocalc_core::chain(&error), "cannot note a drill");
        }
        failure
    }

    /// A drill came to no result.
    pub(crate) fn drill_failed(&self, project: ProjectId, error: &CommandError) {
        if let Some(backups) = &self.backups {
            let failure = Some(error.message.clone());
            backups.tended.drilled(LastDrill { project, at: self.now(), millis: 0, failure });
        }
    }

    /// A project that can be drilled now: of those whose hosts are there, one by
    /// chance. `None` if there is none.
    pub(crate) async fn drill_candidate(
        &self,
        host: Option<cocalc_ids::HostId>,
    ) -> store::Result<Option<ProjectId>> {
        let now = self.now();
        // The longest ago first, so that everybody's turn comes.
        let due = self.db(move |store| {
            let rows = store.backup_repositories_due(Tending::Drilled, now, 200)?;
            rows.into_iter()
                .map(|row| store.ownership(row.project).map(|owned| (row.project, owned)))
                .collect()
        });
        let due: Vec<(ProjectId, _)> = due.await?;
        let here: Vec<ProjectId> = due
            .into_iter()
            .filter_map(|(project, owned)| match owned {
                Some((owner, _, false))
                    if host.is_none_or(|host| host == owner) && self.alive(Peer::Host(owner)) =>
                {
                    Some(project)
                }
                _ => None,
            })
            .collect();
        let mut bytes = [0; 8];
        if here.is_empty() || getrandom::fill(&mut bytes).is_err() {
            return Ok(here.first().copied());
        }
        let at = u64::from_le_bytes(bytes) % u64::try_from(here.len()).unwrap_or(1);
        Ok(usize::try_from(at).ok().and_then(|at| here.get(at).copied()))
    }
}

/// What failed, and when it is tried again.
#[derive(Debug, Default)]
struct Failed(BTreeMap<(ProjectId, &'static str), (u32, Duration)>);

impl Failed {
    /// Whether it is too early to try this.
    fn waits(&self, project: ProjectId, kind: &'static str, now: Duration) -> bool {
        self.0.get(&(project, kind)).is_some_and(|(_, until)| now < *until)
    }

    fn ended(&mut self, project: ProjectId, kind: &'static str, well: bool, now: Duration) {
        if well {
            self.0.remove(&(project, kind));
            return;
        }
        let times = self.0.get(&(project, kind)).map_or(0, |(times, _)| times + 1);
        let pause = AGAIN_MIN.saturating_mul(1 << times.min(16)).min(AGAIN_MAX);
        self.0.insert((project, kind), (times, now + pause));
    }
}

/// Begins what is due, until the future is dropped.
pub(crate) async fn keep_tending(shared: Arc<Shared>) {
    let Some(backups) = &shared.backups else { return };
    let (mut failed, mut begun) = (Failed::default(), BTreeMap::new());
    let mut swept = false;
    loop {
        tokio::time::sleep(ROUND).await;
        if !swept {
            // Those that were deleted while this process or its backups were
            // not there.
            let at = shared.now().plus(hours(backups.config.erase_after_hours));
            swept = shared.db(move |store| store.schedule_erasures(None, at)).await.is_ok();
        }
        if let Err(error) = round(&shared, backups, &mut failed, &mut begun).await {
            tracing::warn!(error = %cocalc_core::chain(&error), "cannot see which backups are to be tended");
        }
    }
}

fn hours(hours: u32) -> Duration {
    Duration::from_secs(3600 * u64::from(hours))
}

async fn round(
    shared: &Arc<Shared>,
    backups: &Backups,
    failed: &mut Failed,
    begun: &mut BTreeMap<OperationId, (ProjectId, &'static str)>,
) -> store::Result<()> {
    for (id, (project, kind)) in begun.clone() {
        let ended = match shared.db(move |store| store.operation(id)).await {
            Ok(operation) if operation.state == OperationState::Running => continue,
            Ok(operation) => operation.state == OperationState::Done,
            Err(store::Error::NotFound { .. }) => true,
            Err(error) => return Err(error),
        };
        begun.remove(&id);
        failed.ended(project, kind, ended, shared.clock.boot());
    }
    let config = &backups.config;
    let most = 2 * usize::from(config.jobs_max);
    let now = shared.now();
    let ago = |hours: u32| Timestamp::from_millis(now.millis().saturating_sub(i64::from(hours) * 3_600_000));
    let (pruned, checked) = (ago(config.prune_hours), ago(config.check_hours));
    let due = shared.db(move |store| {
        let mut due: Vec<(ProjectId, Job)> = Vec::new();
        let limit = 100;
        due.extend(store.erasures_due(now, limit)?.into_iter().map(|row| (row.project, Job::EraseBackups)));
        let prunes = store.backup_repositories_due(Tending::Pruned, pruned, limit)?;
        due.extend(prunes.into_iter().map(|row| (row.project, Job::PruneBackups)));
        let checks = store.backup_repositories_due(Tending::Checked, checked, limit)?;
        due.extend(checks.into_iter().map(|row| (row.project, Job::CheckBackups { read_data: false })));
        Ok(due)
    });
    let boot = shared.clock.boot();
    let mut due = due.await?;
    if config.drill_hours > 0 {
        let last = backups.tended.last_drill().map(|last| last.at);
        let old = last.is_none_or(|at| at < ago(config.drill_hours));
        if old && !begun.values().any(|(_, kind)| *kind == Job::DrillBackup.kind()) {
            due.extend(shared.drill_candidate(None).await?.map(|project| (project, Job::DrillBackup)));
        }
    }
    for (project, job) in due {
        let kind = job.kind();
        if begun.len() >= most {
            break;
        }
        if failed.waits(project, kind, boot) || begun.values().any(|(busy, _)| *busy == project) {
            continue;
        }
        let account = shared.db(move |store| store.owner_ever(project)).await?;
        match shared.begin_beside(OperationId::random(), project, account, job).await {
            Ok(operation) => drop(begun.insert(operation.id, (project, kind))),
            // Somebody else has begun it.
            Err(store::Error::Busy { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_is_tried_less_and_less_often_and_at_once_when_it_went_well() {
        let (mut failed, project, kind) = (Failed::default(), ProjectId::random(), "prune_backups");
        let mut now = Duration::from_secs(10);
        let mut pauses = Vec::new();
        for _ in 0..12 {
            failed.ended(project, kind, false, now);
            let begun = now;
            while failed.waits(project, kind, now) {
                now += Duration::from_secs(60);
            }
            pauses.push((now - begun).as_secs() / 60);
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 64, 128, 256, 360, 360, 360]);
        failed.ended(project, kind, true, now);
        assert!(!failed.waits(project, kind, now) && !failed.waits(ProjectId::random(), kind, now));
    }
}
