//! Backs up what is due, and what somebody asks for.

mod fetch;
mod numbers;

use std::{
    collections::{BTreeMap, btree_map},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use cocalc_ids::{Epoch, OperationId, ProjectId};
use tokio::{
    sync::{OwnedMutexGuard, Semaphore},
    task::JoinSet,
};

pub use self::numbers::Numbers;
use self::numbers::{Counters, add};
use super::{
    Backup, BackupKind, BackupSource, Backups, Last, Policy, Query, Status, StatusStore, Step, Work, Works,
    backup_error, works::cancelled,
};
use crate::{
    BoxError,
    clock::Clock,
    control::{
        BackupsCommand, BackupsOutcome, BackupsReply, BackupsWork, CommandError, DrillReport, ErrorCode,
        ProjectConfig,
    },
    grant::{Entry, Ledger},
    moves::host::storage_error,
    snapshots::{self, Outcome, Schedule},
    storage::{Hold, Snapshot, Storage},
};

/// How often there is a round.
const ROUND: Duration = Duration::from_secs(1);
/// How often the ledger is asked which projects there are.
const LOOK: Duration = Duration::from_secs(10);
/// How many looks may go on at once: those that wait for a place count.
const LOOKS_MAX: usize = 256;
/// How long a project that is being started, stopped or restored is waited
/// for, before the next one is looked at.
const TURN_LIMIT: Duration = Duration::from_secs(2);
/// The same where somebody asked.
const TURN_LIMIT_ASKED: Duration = Duration::from_secs(120);
/// How long an answer about work may wait for news.
const NEWS_MAX: Duration = Duration::from_secs(20);
/// How many questions about what is in repositories are answered at once: each
/// is a process that reads an index.
const QUESTIONS_MAX: usize = 4;
/// How long a question waits for others.
const QUESTION_LIMIT: Duration = Duration::from_secs(20);
/// How long work that is cancelled may take to end, before that is said.
const CANCEL_LIMIT: Duration = Duration::from_secs(20);

/// With what a [`Keeper`] works.
pub struct KeeperParts {
    /// Who holds what.
    pub ledger: Ledger,
    /// The files.
    pub storage: Arc<dyn Storage>,
    /// Their repositories.
    pub backups: Arc<dyn Backups>,
    /// Takes the snapshots that are backed up.
    pub snapshots: snapshots::Keeper,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// Keeps how each project stands.
    pub statuses: Arc<dyn StatusStore>,
    /// Hears how a project stands when that changes.
    pub tell: Arc<dyn Fn(&Status) + Send + Sync>,
    /// The backups of any project, to be read for the sake of one that is this
    /// host's in that epoch, or is to be: the master decides whose.
    pub reading: Arc<dyn Fn(ProjectId, Epoch) -> Arc<dyn Backups> + Send + Sync>,
    /// How much is free on the volume.
    pub free_bytes: Arc<dyn Fn() -> u64 + Send + Sync>,
    /// How many backups may be made at once, and how many restored.
    pub jobs_max: usize,
    /// Tries out backups, if this host can.
    pub trial: Option<Arc<dyn Trial>>,
}

/// Tries out whether backups can be restored.
#[async_trait]
pub trait Trial: fmt::Debug + Send + Sync + 'static {
    /// Restores the newest backup of a project where nobody serves it, compares
    /// it, and deletes what was restored. `whole` if backups leave nothing out.
    async fn drill(
        &self,
        project: ProjectId,
        backups: &dyn Backups,
        status: &Status,
        whole: bool,
        work: &Work,
    ) -> Result<DrillReport, CommandError>;
}

impl fmt::Debug for KeeperParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeeperParts").field("backups", &self.backups).finish_non_exhaustive()
    }
}

/// Keeps the backups of the projects of one host. Clones share it.
///
/// It backs up only projects that this host may run, from a snapshot that it
/// takes in the project's turn and holds. Nothing waits for it: a project is
/// stopped, started and restored while its backup goes on from that snapshot.
/// A project that leaves, by a move or by being deleted, takes its grant along:
/// its backup is broken off at once, and made where it is then, from what has
/// been stored already.
#[derive(Clone)]
pub struct Keeper(Arc<Inner>);

struct Inner {
    parts: KeeperParts,
    places: Arc<Semaphore>,
    restores: Arc<Semaphore>,
    questions: Semaphore,
    works: Works,
    state: Mutex<State>,
    counters: Counters,
}

#[derive(Default)]
struct State {
    /// For projects whose owner has said nothing; `None` as long as the master
    /// has not said that there are backups.
    policy: Option<Policy>,
    schedule: Schedule,
    /// When the ledger was asked last.
    looked: Option<Duration>,
    statuses: BTreeMap<ProjectId, Status>,
    running: BTreeMap<ProjectId, Running>,
    /// How many restores into a project go on.
    restoring: BTreeMap<ProjectId, usize>,
    /// One backup of a project after the other.
    gates: BTreeMap<ProjectId, Arc<tokio::sync::Mutex<()>>>,
}

/// A backup that goes on.
struct Running {
    epoch: Epoch,
    work: Work,
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keeper").field("backups", &self.0.parts.backups).finish_non_exhaustive()
    }
}

/// How a look at a project ended.
enum Looked {
    /// There is nothing that its last backup has not.
    Unchanged,
    /// There is a new backup.
    Made(Box<Backup>),
    /// It is not backed up by itself, or not here.
    Passed,
}

/// What is read, and kept from being deleted meanwhile.
struct Held {
    entry: Entry,
    epoch: Epoch,
    snapshot: Snapshot,
    path: std::path::PathBuf,
    /// Whether the snapshot is there for the sake of the backup only.
    only_for_this: bool,
    _hold: Hold,
}

impl Keeper {
    /// A keeper of what the ledger says that this host may run, which knows
    /// what an earlier process kept.
    ///
    /// # Errors
    ///
    /// If that cannot be read.
    pub async fn open(parts: KeeperParts) -> Result<Self, BoxError> {
        let statuses = parts.statuses.load().await?;
        let state = State {
            statuses: statuses.into_iter().map(|status| (status.project, status)).collect(),
            ..State::default()
        };
        let places = Arc::new(Semaphore::new(parts.jobs_max.max(1)));
        let restores = Arc::new(Semaphore::new(parts.jobs_max.max(1)));
        let questions = Semaphore::new(QUESTIONS_MAX);
        let (works, counters) = Default::default();
        let state = Mutex::new(state);
        Ok(Self(Arc::new(Inner { parts, places, restores, questions, works, state, counters })))
    }

    /// Hears from the master how projects are backed up whose owners have said
    /// nothing; `None` if the federation has no backups.
    pub fn set_policy(&self, policy: Option<Policy>) {
        let mut state = self.state();
        if state.policy != policy {
            state.policy = policy;
            state.looked = None;
        }
    }

    /// The policy of a project: its own, or the master's. `None` if there are no
    /// backups.
    pub fn policy(&self, config: &ProjectConfig) -> Option<Policy> {
        let default = self.state().policy.clone()?;
        Some(config.backups.clone().unwrap_or(default))
    }

    /// Goes on until the future is dropped, which breaks off what is due by
    /// itself.
    pub async fn run(self) {
        let mut looks = JoinSet::new();
        let mut routes = self.0.parts.ledger.routes();
        loop {
            self.round(&mut looks).await;
            let next = tokio::time::sleep(ROUND);
            tokio::pin!(next);
            loop {
                tokio::select! {
                    () = &mut next => break,
                    // Who leaves is not read any further; also if some of that
                    // was not heard.
                    Ok(_) | Err(_) = routes.recv() => {}
                }
                self.break_off_departed();
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }

    /// One round: begins a bounded number of looks at what is due now.
    async fn round(&self, looks: &mut JoinSet<()>) {
        while looks.try_join_next().is_some() {}
        self.look().await;
        self.break_off_departed();
        let due = {
            let now = self.0.parts.clock.boot();
            self.state().schedule.due(now, LOOKS_MAX.saturating_sub(looks.len()))
        };
        for project in due {
            let keeper = self.clone();
            looks.spawn(async move { keeper.visit(project).await });
        }
    }

    /// One round to its end: everything that is due is looked at, and backed
    /// up.
    pub async fn round_to_end(&self) {
        let mut looks = JoinSet::new();
        self.round(&mut looks).await;
        while looks.join_next().await.is_some() {}
    }

    /// Carries out a command of the master.
    ///
    /// # Errors
    ///
    /// Why it was not done.
    pub async fn execute(
        &self,
        project: ProjectId,
        epoch: Epoch,
        command: BackupsCommand,
    ) -> Result<BackupsReply, CommandError> {
        match command {
            BackupsCommand::Work { operation, work, wait_ms } => {
                let wait = Duration::from_millis(wait_ms).min(NEWS_MAX);
                self.work(operation, project, epoch, work, wait).await
            }
            BackupsCommand::Cancel { operation } => {
                if self.0.works.cancel(operation, CANCEL_LIMIT).await {
                    return Ok(BackupsReply::Cancelled { operation });
                }
                let message = "the work has not ended yet".to_owned();
                Err(CommandError { code: ErrorCode::Busy, message })
            }
            BackupsCommand::Ask { query } => {
                self.0.parts.ledger.permit(project, epoch)?;
                let waiting = tokio::time::timeout(QUESTION_LIMIT, self.0.questions.acquire()).await;
                let _place = match waiting {
                    Ok(place) => place.map_err(|_| cancelled("the question"))?,
                    Err(_) => {
                        let message = "others ask about backups at this host; ask again in a minute";
                        return Err(CommandError { code: ErrorCode::Busy, message: message.into() });
                    }
                };
                let answer = match &query {
                    Query::Diff { .. } => return self.compare(project, epoch, &query).await,
                    _ => super::answer(&*self.0.parts.backups, project, &query).await,
                };
                Ok(BackupsReply::Answered { answer: answer.map_err(|error| backup_error(&error))? })
            }
            BackupsCommand::Gone { backups } => {
                self.0.parts.ledger.permit(project, epoch)?;
                self.gone(project, &backups).await;
                Ok(BackupsReply::Status { status: self.status(project) })
            }
            BackupsCommand::Status => {
                self.0.parts.ledger.permit(project, epoch)?;
                Ok(BackupsReply::Status { status: self.status(project) })
            }
        }
    }

    /// Compares a backup with a snapshot of the project's present state, which
    /// stays only if automatic snapshots do.
    async fn compare(
        &self,
        project: ProjectId,
        epoch: Epoch,
        query: &Query,
    ) -> Result<BackupsReply, CommandError> {
        let Some(held) = self.hold(project, Some(epoch), TURN_LIMIT_ASKED).await? else {
            let message = "the project is not here any more".to_owned();
            return Err(CommandError { code: ErrorCode::NotFound, message });
        };
        let answer = super::compare(&*self.0.parts.backups, project, query, &held.path).await;
        let Held { snapshot, only_for_this, _hold: hold, .. } = held;
        drop(hold);
        if only_for_this
            && let Err(error) = self.0.parts.storage.delete_snapshot(project, &snapshot.name).await
        {
            // A backup that began meanwhile reads it, and deletes it afterwards.
            tracing::debug!(%project, snapshot = %snapshot.name, error = %crate::chain(&error),
                "the snapshot of a comparison stays");
        }
        Ok(BackupsReply::Answered { answer: answer.map_err(|error| backup_error(&error))? })
    }

    async fn work(
        &self,
        operation: OperationId,
        project: ProjectId,
        epoch: Epoch,
        work: BackupsWork,
        wait: Duration,
    ) -> Result<BackupsReply, CommandError> {
        // Before it is begun, which counts.
        match &work {
            // The project may be one that this host is to have only.
            BackupsWork::Fetch { move_id, .. } => self.may_fetch(project, epoch, *move_id)?,
            BackupsWork::BackUp | BackupsWork::Drill => {
                self.0.parts.ledger.permit(project, epoch)?;
            }
        }
        let keeper = self.clone();
        let step = match work {
            BackupsWork::Drill => match &self.0.parts.trial {
                Some(trial) => {
                    let (trial, host) = (Arc::clone(trial), self.clone());
                    let begin = move |work: Work| async move {
                        let _place = host.place().await?;
                        let entry = host.0.parts.ledger.permit(project, epoch)?;
                        let status = host.status_of(project, epoch);
                        let policy = host.policy(&entry.config).unwrap_or_default();
                        let whole = policy.fields().excludes.is_empty();
                        tokio::select! {
                            report = trial.drill(project, &*host.0.parts.backups, &status, whole, &work) => {
                                Ok(BackupsOutcome::Drilled { report: report? })
                            }
                            () = work.cancelled() => Err(cancelled("the drill")),
                        }
                    };
                    self.0.works.ask(operation, wait, begin).await?
                }
                None => {
                    let message = "this host has no place to try out backups".to_owned();
                    return Err(CommandError { code: ErrorCode::Invalid, message });
                }
            },
            BackupsWork::BackUp => {
                let begin = move |work: Work| async move {
                    match keeper.back_up(project, Some(epoch), &work).await {
                        Ok(Looked::Made(backup)) => Ok(BackupsOutcome::BackedUp { backup: *backup }),
                        Ok(Looked::Unchanged | Looked::Passed) => {
                            let message = "there are no backups in this federation".to_owned();
                            Err(CommandError { code: ErrorCode::Invalid, message })
                        }
                        Err(error) => Err(error),
                    }
                };
                self.0.works.ask(operation, wait, begin).await?
            }
            BackupsWork::Fetch { source, backup, path, name, move_id } => {
                let what = fetch::Fetch { source, backup, path, name, move_id };
                let begin = move |work: Work| async move { keeper.fetch(project, epoch, what, &work).await };
                self.0.works.ask(operation, wait, begin).await?
            }
        };
        match step {
            Step::Waiting => Ok(BackupsReply::Working { operation, progress: None }),
            Step::Working(progress) => Ok(BackupsReply::Working { operation, progress: Some(progress) }),
            Step::Ended(Ok(outcome)) => Ok(BackupsReply::Done { operation, outcome }),
            Step::Ended(Err(error)) => Err(error),
        }
    }

    /// A project has stopped: it is backed up as soon as there is a place, if
    /// anything has changed. The caller has its turn, and does not wait for
    /// that.
    pub async fn stopped(&self, entry: &Entry) {
        let Some(epoch) = entry.may_run() else { return };
        if !self.policy(&entry.config).is_some_and(|policy| policy.fields().enabled) {
            return;
        }
        // At least it is known, and kept, that there is something to back up.
        if self.has_changed(entry.project, epoch).await.unwrap_or(true) {
            let status = self.status_of(entry.project, epoch);
            let now = self.0.parts.clock.wall();
            let pending_since = status.pending_since.or(Some(now));
            self.keep(Status { pending_since, stopped: true, ..status }).await;
            let now = self.0.parts.clock.boot();
            self.state().schedule.at_once(entry.project, now);
        }
    }

    /// Backups were deleted: what the last one had is to be backed up again.
    async fn gone(&self, project: ProjectId, backups: &[String]) {
        if backups.is_empty() {
            // What is being made would be missing half of it.
            let gate = {
                let mut state = self.state();
                if let Some(running) = state.running.get(&project) {
                    running.work.cancel();
                }
                gate(&mut state, project)
            };
            let _settled = gate.lock().await;
        }
        let Some(status) = self.status(project) else { return };
        let lost = |last: &&Last| backups.is_empty() || backups.contains(&last.backup.id);
        if status.last.as_ref().filter(lost).is_some() {
            let pending_since = status.pending_since.or(Some(self.0.parts.clock.wall()));
            self.keep(Status { last: None, pending_since, ..status }).await;
            let now = self.0.parts.clock.boot();
            self.state().schedule.at_once(project, now);
        }
    }

    /// All files of a project were written anew, by a restore: their change
    /// times mean nothing to the next backup.
    pub async fn rewritten(&self, project: ProjectId) {
        let status = self.state().statuses.get(&project).cloned();
        if let Some(status) = status {
            self.keep(Status { rewritten: true, ..status }).await;
        }
    }

    /// Breaks off the backups of a project, and waits until nothing of it is
    /// read any more. The caller has made sure that no other begins.
    pub async fn leave(&self, project: ProjectId) {
        let gate = {
            let mut state = self.state();
            state.schedule.forget(project);
            if let Some(running) = state.running.get(&project) {
                running.work.cancel();
            }
            gate(&mut state, project)
        };
        let _settled = gate.lock().await;
    }

    /// Nothing of the project is here any more.
    pub async fn forget(&self, project: ProjectId) {
        {
            let mut state = self.state();
            state.schedule.forget(project);
            state.statuses.remove(&project);
        }
        if let Err(error) = self.0.parts.statuses.remove(project).await {
            tracing::warn!(%project, error = %crate::chain(&*error), "cannot forget how its backups stood");
        }
    }

    /// How a project stands, if it is known.
    pub fn status(&self, project: ProjectId) -> Option<Status> {
        self.state().statuses.get(&project).cloned()
    }

    /// Every status that is known.
    pub fn statuses(&self) -> Vec<Status> {
        self.state().statuses.values().cloned().collect()
    }

    /// What the project's owner should know; `None` if all is well.
    pub fn notice(&self, project: ProjectId) -> Option<String> {
        self.state().statuses.get(&project)?.notice()
    }

    /// What is done with a project now that its end would not break off, but
    /// that people wait for: a backup, or a restore of one.
    pub fn occupies(&self, project: ProjectId) -> Option<&'static str> {
        let state = self.state();
        if state.running.contains_key(&project) {
            return Some("a backup");
        }
        state.restoring.contains_key(&project).then_some("a restore")
    }

    /// Work that takes long, by operation.
    pub fn works(&self) -> &Works {
        &self.0.works
    }

    /// What it has done since it began, and how it stands.
    pub fn numbers(&self) -> Numbers {
        let (boot, wall) = (self.0.parts.clock.boot(), self.0.parts.clock.wall());
        let state = self.state();
        let count = |number: usize| u64::try_from(number).unwrap_or(u64::MAX);
        let pending = || state.statuses.values().filter(|status| status.pending_since.is_some());
        let oldest = pending().filter_map(|status| status.pending_since).min();
        Numbers {
            running: count(state.running.len()),
            pending: count(pending().count()),
            failing: count(pending().filter(|status| status.failure.is_some()).count()),
            oldest: oldest.map_or(Duration::ZERO, |since| wall.since(since)),
            overdue: state.schedule.overdue(boot),
            ..self.0.counters.read()
        }
    }

    /// Hears from the ledger which projects there are.
    async fn look(&self) {
        let now = self.0.parts.clock.boot();
        let first = {
            let mut state = self.state();
            if state.looked.is_some_and(|at| now < at + LOOK) {
                return;
            }
            state.looked.replace(now).is_none()
        };
        let entries = self.0.parts.ledger.entries();
        let mut gone = Vec::new();
        {
            let mut state = self.state();
            let default = state.policy.clone();
            for entry in &entries {
                let policy = default.as_ref().map(|default| entry.config.backups.as_ref().unwrap_or(default));
                match policy.filter(|policy| policy.fields().enabled && entry.may_run().is_some()) {
                    Some(policy) => {
                        state.schedule.runs(entry.project, policy.rpo(), now);
                        // What an earlier process left undone is due now, and what
                        // came from another host, where more may have been due.
                        let epoch = entry.may_run();
                        let known = state.statuses.get(&entry.project);
                        let undone = match known.filter(|status| Some(status.epoch) == epoch) {
                            // What fails here has its own time.
                            Some(status) => {
                                status.pending_since.is_some() && (first || status.failure.is_none())
                            }
                            None => epoch > Some(Epoch::FIRST),
                        };
                        if undone && !state.running.contains_key(&entry.project) {
                            state.schedule.at_once(entry.project, now);
                        }
                    }
                    None => state.schedule.forget(entry.project),
                }
                let elsewhere = entry.granted.is_none() && entry.reserved.is_none();
                if elsewhere && state.statuses.contains_key(&entry.project) {
                    gone.push(entry.project);
                }
            }
        }
        for project in gone {
            self.forget(project).await;
        }
    }

    /// Breaks off backups of projects that are not this host's any more.
    fn break_off_departed(&self) {
        let state = self.state();
        for (project, running) in &state.running {
            if self.0.parts.ledger.permit(*project, running.epoch).is_err() {
                running.work.cancel();
            }
        }
    }

    /// Looks after one project that is due.
    async fn visit(&self, project: ProjectId) {
        let outcome = match self.back_up(project, None, &Work::unseen()).await {
            Ok(_) => Outcome::Done,
            // Somebody has it for a while, or took it away.
            Err(error) if matches!(error.code, ErrorCode::Busy | ErrorCode::Cancelled) => Outcome::Failed,
            Err(error) => {
                tracing::warn!(%project, error = error.message, "cannot back it up");
                Outcome::Failed
            }
        };
        let now = self.0.parts.clock.boot();
        self.state().schedule.done(project, outcome, now);
    }

    /// Backs up a project: in `asked`, the epoch of who asks for it, or if
    /// anything has changed.
    #[tracing::instrument(name = "backup", skip_all, fields(%project))]
    async fn back_up(
        &self,
        project: ProjectId,
        asked: Option<Epoch>,
        work: &Work,
    ) -> Result<Looked, CommandError> {
        let limit = if asked.is_some() { TURN_LIMIT_ASKED } else { TURN_LIMIT };
        let kind = {
            let _turn = self.turn(project, limit).await?;
            let Some((entry, epoch)) = self.permitted(project, asked)? else { return Ok(Looked::Passed) };
            let Some(policy) = self.policy(&entry.config) else { return Ok(Looked::Passed) };
            if asked.is_none() && !policy.fields().enabled {
                return Ok(Looked::Passed);
            }
            let changed = self.has_changed(project, epoch).await.map_err(storage_error)?;
            if !changed && asked.is_none() {
                self.note_unchanged(project, epoch).await;
                return Ok(Looked::Unchanged);
            }
            if changed {
                self.note_pending(project, epoch).await;
            }
            match asked {
                Some(_) => BackupKind::Manual,
                None if self.status_of(project, epoch).stopped => BackupKind::Stop,
                None => BackupKind::Scheduled,
            }
        };
        let epoch_now = || self.0.parts.ledger.entry(project).and_then(|entry| entry.may_run());
        let made = tokio::select! {
            made = self.in_place(project, asked, kind, limit, work) => made,
            () = work.cancelled() => Err(cancelled("the backup")),
        };
        match &made {
            Err(error) if error.code == ErrorCode::Cancelled => add(&self.0.counters.cancelled, 1),
            Err(error) if error.code == ErrorCode::Busy => {}
            Err(error) => {
                add(&self.0.counters.failed, 1);
                if let Some(epoch) = epoch_now() {
                    let mut status = self.status_of(project, epoch);
                    status.failed(error, self.0.parts.clock.wall());
                    self.keep(status).await;
                }
            }
            Ok(_) => {}
        }
        made
    }

    /// Waits until there are few enough jobs.
    async fn place(&self) -> Result<tokio::sync::OwnedSemaphorePermit, CommandError> {
        Arc::clone(&self.0.places).acquire_owned().await.map_err(|_| cancelled("the work"))
    }

    /// Waits for a place and for its line, and backs up what is there then.
    async fn in_place(
        &self,
        project: ProjectId,
        asked: Option<Epoch>,
        kind: BackupKind,
        limit: Duration,
        work: &Work,
    ) -> Result<Looked, CommandError> {
        let _place = self.place().await?;
        let gate = gate(&mut self.state(), project);
        let _alone = gate.lock_owned().await;
        // From here on, whoever takes the project away breaks this off.
        let Some((_, epoch)) = self.permitted(project, asked)? else { return Ok(Looked::Passed) };
        let _running = self.running(project, epoch, work);
        let Some(held) = self.hold(project, Some(epoch), limit).await? else { return Ok(Looked::Passed) };
        let begun = self.0.parts.clock.boot();
        let backup = self.store(&held, kind, work).await?;
        let took = self.0.parts.clock.boot().saturating_sub(begun);
        self.made(&held, &backup, took).await;
        Ok(Looked::Made(Box::new(backup)))
    }

    /// The snapshot of its present state, in its turn, if this host may.
    async fn hold(
        &self,
        project: ProjectId,
        asked: Option<Epoch>,
        limit: Duration,
    ) -> Result<Option<Held>, CommandError> {
        let storage = &self.0.parts.storage;
        let _turn = self.turn(project, limit).await?;
        let Some((entry, epoch)) = self.permitted(project, asked)? else { return Ok(None) };
        let before = storage.snapshots(project).await.map_err(storage_error)?;
        let name = self.0.parts.snapshots.capture(&entry).await.map_err(storage_error)?;
        let known = before.iter().any(|snapshot| snapshot.name == name);
        let kept = self.0.parts.snapshots.policy(&entry.config).fields().enabled;
        let hold = storage.hold(project, &name).await.map_err(storage_error)?;
        let all = storage.snapshots(project).await.map_err(storage_error)?;
        let missing =
            || CommandError { code: ErrorCode::NotFound, message: format!("snapshot {name} is gone") };
        let snapshot = all.into_iter().find(|snapshot| snapshot.name == name).ok_or_else(missing)?;
        let path = storage.snapshot_path(project, &name).await.map_err(storage_error)?;
        let path = path.ok_or_else(|| CommandError {
            code: ErrorCode::Invalid,
            message: "this host's storage has no files that could be backed up".into(),
        })?;
        let only_for_this = !kept && !known;
        Ok(Some(Held { entry, epoch, snapshot, path, only_for_this, _hold: hold }))
    }

    async fn store(&self, held: &Held, kind: BackupKind, work: &Work) -> Result<Backup, CommandError> {
        let project = held.entry.project;
        let backups = &self.0.parts.backups;
        let status = self.status_of(project, held.epoch);
        let known = status.last.as_ref().filter(|_| !status.rewritten);
        let (parent, moved) = match known {
            Some(last) => (Some(last.backup.id.clone()), false),
            // The first here, or after a restore: the newest of all there are,
            // whoever made it.
            None => {
                let all = backups.list(project).await.map_err(|error| backup_error(&error))?;
                let newest = all.into_iter().max_by(Backup::order);
                let moved = newest.is_some();
                (newest.map(|backup| backup.id), moved)
            }
        };
        let policy = self.policy(&held.entry.config).unwrap_or_default();
        let source = BackupSource {
            project,
            host: self.0.parts.ledger.host(),
            epoch: held.epoch,
            snapshot: held.snapshot.name.clone(),
            taken: held.snapshot.created,
            path: held.path.clone(),
            kind,
            parent,
            moved,
            excludes: policy.fields().excludes.clone(),
        };
        backups.back_up(&source, &|state| work.progress(state)).await.map_err(|error| backup_error(&error))
    }

    /// Notes a new backup, and deletes a snapshot that was there only for the
    /// one before.
    async fn made(&self, held: &Held, backup: &Backup, took: Duration) {
        let project = held.entry.project;
        let millis = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        let counters = &self.0.counters;
        add(&counters.made, 1);
        add(&counters.bytes, backup.bytes);
        add(&counters.added_bytes, backup.added_bytes);
        add(&counters.millis, millis);
        tracing::info!(%project, backup = backup.id, snapshot = %held.snapshot.name, bytes = backup.bytes,
            added_bytes = backup.added_bytes, millis, "backed up");
        let mut status = self.status_of(project, held.epoch);
        let last = Last {
            backup: backup.clone(),
            snapshot: held.snapshot.name.clone(),
            only_for_this: held.only_for_this,
            finished: self.0.parts.clock.wall(),
            millis,
        };
        let former = status.last.replace(last);
        (status.pending_since, status.failure) = (None, None);
        (status.rewritten, status.stopped) = (false, false);
        self.keep(status).await;
        let former = former.filter(|last| last.only_for_this && last.snapshot != held.snapshot.name);
        if let Some(last) = former
            && let Err(error) = self.0.parts.storage.delete_snapshot(project, &last.snapshot).await
        {
            tracing::warn!(%project, snapshot = %last.snapshot, error = %crate::chain(&error),
                "cannot delete the snapshot of an earlier backup");
        }
    }

    /// The project's turn, unless somebody has it for long.
    async fn turn(&self, project: ProjectId, limit: Duration) -> Result<OwnedMutexGuard<()>, CommandError> {
        tokio::time::timeout(limit, self.0.parts.ledger.turn(project)).await.map_err(|_| CommandError {
            code: ErrorCode::Busy,
            message: format!("project {project} is busy: it is being started, stopped, restored or moved"),
        })
    }

    /// What is known of a project that this host may run, and in which epoch.
    /// `None` only if nobody asked.
    fn permitted(
        &self,
        project: ProjectId,
        asked: Option<Epoch>,
    ) -> Result<Option<(Entry, Epoch)>, CommandError> {
        match asked {
            Some(epoch) => Ok(Some((self.0.parts.ledger.permit(project, epoch)?, epoch))),
            None => {
                let entry = self.0.parts.ledger.entry(project);
                Ok(entry.and_then(|entry| entry.may_run().map(|epoch| (entry, epoch))))
            }
        }
    }

    /// Whether there may be something that the last backup has not.
    async fn has_changed(&self, project: ProjectId, epoch: Epoch) -> crate::storage::Result<bool> {
        let Some(last) = self.status_of(project, epoch).last else { return Ok(true) };
        match self.0.parts.storage.changed_since(project, &last.snapshot).await {
            // A newer one took its place, so something had changed.
            Err(crate::storage::Error::NoSnapshot { .. } | crate::storage::Error::Unsupported { .. }) => {
                Ok(true)
            }
            answer => answer,
        }
    }

    /// The status in this epoch: what was known of an earlier one is another
    /// host's, or was before a move.
    fn status_of(&self, project: ProjectId, epoch: Epoch) -> Status {
        let known = self.state().statuses.get(&project).cloned();
        match known {
            Some(status) if status.epoch == epoch => status,
            Some(Status { pending_since, .. }) => Status { pending_since, ..Status::new(project, epoch) },
            None => Status::new(project, epoch),
        }
    }

    async fn note_pending(&self, project: ProjectId, epoch: Epoch) {
        let status = self.status_of(project, epoch);
        if status.pending_since.is_none() {
            let pending_since = Some(self.0.parts.clock.wall());
            self.keep(Status { pending_since, ..status }).await;
        }
    }

    async fn note_unchanged(&self, project: ProjectId, epoch: Epoch) {
        let status = self.status_of(project, epoch);
        if status.pending_since.is_some() || status.failure.is_some() {
            self.keep(Status { pending_since: None, failure: None, stopped: false, ..status }).await;
        }
    }

    /// Keeps a status, and tells the master.
    async fn keep(&self, status: Status) {
        self.state().statuses.insert(status.project, status.clone());
        if let Err(error) = self.0.parts.statuses.save(&status).await {
            // The next process takes it for changed, which is harmless.
            tracing::warn!(project = %status.project, error = %crate::chain(&*error),
                "cannot keep how its backups stand");
        }
        (self.0.parts.tell)(&status);
    }

    fn running(&self, project: ProjectId, epoch: Epoch, work: &Work) -> Ends {
        self.state().running.insert(project, Running { epoch, work: work.clone() });
        Ends { keeper: self.clone(), project }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A backup that goes on until this is dropped.
struct Ends {
    keeper: Keeper,
    project: ProjectId,
}

impl Drop for Ends {
    fn drop(&mut self) {
        self.keeper.state().running.remove(&self.project);
    }
}

/// A restore that goes on until this is dropped.
struct Restoring {
    keeper: Keeper,
    project: ProjectId,
}

impl Restoring {
    fn begin(keeper: &Keeper, project: ProjectId) -> Self {
        *keeper.state().restoring.entry(project).or_default() += 1;
        Self { keeper: keeper.clone(), project }
    }
}

impl Drop for Restoring {
    fn drop(&mut self) {
        if let btree_map::Entry::Occupied(mut count) = self.keeper.state().restoring.entry(self.project) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

fn gate(state: &mut State, project: ProjectId) -> Arc<tokio::sync::Mutex<()>> {
    state.gates.retain(|other, gate| *other == project || Arc::strong_count(gate) > 1);
    match state.gates.entry(project) {
        btree_map::Entry::Occupied(gate) => Arc::clone(gate.get()),
        btree_map::Entry::Vacant(empty) => Arc::clone(empty.insert(Arc::default())),
    }
}

#[cfg(test)]
mod tests;
