//! Takes the snapshots that are due, deletes those that are not kept, and sees
//! to it that they don't fill the project.

mod numbers;
mod space;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use cocalc_ids::{ProjectId, SnapshotName, Timestamp};

use self::{numbers::Counters, space::Space};
pub use self::{numbers::Numbers, space::RaisedRoom};
use super::{Outcome, Policy, Schedule, auto_name, latest, superfluous};
use crate::{
    backups::is_fetched,
    clock::Clock,
    control::ProjectConfig,
    grant::{Entry, Ledger},
    runner::{Runner, State},
    storage::{self, Snapshot, Storage},
};

/// How often there is a round.
const ROUND: Duration = Duration::from_secs(1);
/// How often the runner is asked what runs.
const LOOK: Duration = Duration::from_secs(10);
/// How long a project that is being started, stopped or restored is waited
/// for, before the next one is looked at.
const TURN_LIMIT: Duration = Duration::from_secs(2);

/// How long what a restore has brought may wait for its use: longer than any
/// operation goes on with a host or a master away.
const FETCHED_MAX: Duration = Duration::from_secs(2 * 24 * 3_600);

/// How a [`Keeper`] works.
#[derive(Clone, Copy, Debug)]
pub struct KeeperSettings {
    /// For projects whose owner has said nothing.
    pub policy: Policy,
    /// The most projects looked at in one round, of which there is one per
    /// second.
    pub round_max: usize,
}

impl Default for KeeperSettings {
    fn default() -> Self {
        Self { policy: Policy::default(), round_max: 16 }
    }
}

/// Keeps the automatic snapshots of the projects of one host. Clones share it.
///
/// It touches only projects that this host may run, each in its turn
/// ([`Ledger::turn`]), and never one that a move has frozen. Nothing waits for
/// it but a stop, and nothing it does is in the way of a start, except that a
/// project's own snapshot may just be being taken.
#[derive(Clone)]
pub struct Keeper(Arc<Inner>);

struct Inner {
    ledger: Ledger,
    storage: Arc<dyn Storage>,
    runner: Arc<dyn Runner>,
    clock: Arc<dyn Clock>,
    settings: KeeperSettings,
    state: Mutex<Kept>,
    counters: Counters,
}

#[derive(Default)]
struct Kept {
    schedule: Schedule,
    /// When the runner was asked last.
    looked: Option<Duration>,
    /// Why the last snapshot of a project could not be taken.
    failures: BTreeMap<ProjectId, String>,
    space: Space,
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keeper").field("settings", &self.0.settings).finish_non_exhaustive()
    }
}

impl Keeper {
    /// A keeper of what the ledger says that this host may run.
    pub fn new(
        ledger: Ledger,
        storage: Arc<dyn Storage>,
        runner: Arc<dyn Runner>,
        clock: Arc<dyn Clock>,
        settings: KeeperSettings,
    ) -> Self {
        let (state, counters) = Default::default();
        Self(Arc::new(Inner { ledger, storage, runner, clock, settings, state, counters }))
    }

    /// Goes on until the future is dropped.
    pub async fn run(self) {
        loop {
            self.round().await;
            tokio::time::sleep(ROUND).await;
        }
    }

    /// One round: a bounded amount of what is due now.
    ///
    /// # Cancel safety
    ///
    /// Dropping it is like a crash: what it was doing is done whole or not at
    /// all, and is due again with the next process.
    pub async fn round(&self) {
        self.look().await;
        let due = {
            let now = self.0.clock.boot();
            self.state().schedule.due(now, self.0.settings.round_max)
        };
        for project in due {
            let outcome = self.visit(project).await;
            let now = self.0.clock.boot();
            self.state().schedule.done(project, outcome, now);
        }
        self.sweep().await;
    }

    /// The policy of a project: its own, or the host's.
    pub fn policy(&self, config: &ProjectConfig) -> Policy {
        config.snapshots.unwrap_or(self.0.settings.policy)
    }

    /// The limit of a project's live volume and snapshots together; `None` if
    /// its plan has none.
    pub fn limit_bytes(&self, config: &ProjectConfig) -> Option<u64> {
        Some(self.policy(config).limit_bytes(config.quota_bytes?))
    }

    /// Takes the snapshot with which a stop is complete, if anything has changed
    /// since the last. The caller has the project's turn, and its processes have
    /// ended. What goes wrong is tried again by itself, and told by
    /// [`notice`](Self::notice): a project that cannot be snapshotted can be
    /// stopped all the same.
    pub async fn stopped(&self, entry: &Entry) {
        let project = entry.project;
        let policy = self.policy(&entry.config);
        if !policy.fields().enabled {
            return;
        }
        let here = self.0.storage.snapshots(project).await;
        if self.keep(project, &policy, here).await.is_err() {
            let now = self.0.clock.boot();
            self.state().schedule.rests(project, policy.interval(), now);
        }
    }

    /// An automatic snapshot of the project's present state: the last one, if
    /// nothing has changed since. The caller has the project's turn.
    ///
    /// # Errors
    ///
    /// As of the storage.
    pub async fn capture(&self, entry: &Entry) -> storage::Result<SnapshotName> {
        let project = entry.project;
        let names = names(self.0.storage.snapshots(project).await?);
        Ok(self.take(project, &names).await?.0)
    }

    /// What the project's owner should know: that no snapshot can be taken, or
    /// that the space for them is used up. `None` if all is well.
    pub fn notice(&self, project: ProjectId) -> Option<String> {
        let state = self.state();
        let failure = state
            .failures
            .get(&project)
            .map(|reason| format!("the last automatic snapshot could not be taken: {reason}"));
        match (failure, state.space.notice(project)) {
            (Some(failure), Some(space)) => Some(format!("{space}; {failure}")),
            (failure, space) => space.or(failure),
        }
    }

    /// What it has done since it began, and how it stands.
    pub fn numbers(&self) -> Numbers {
        let overdue = {
            let now = self.0.clock.boot();
            self.state().schedule.overdue(now)
        };
        self.0.counters.read(overdue)
    }

    /// Hears from ledger and runner which projects there are.
    async fn look(&self) {
        let now = self.0.clock.boot();
        let first = {
            let state = self.state();
            if state.looked.is_some_and(|at| now < at + LOOK) {
                return;
            }
            state.looked.is_none()
        };
        let running: BTreeSet<ProjectId> = match self.0.runner.list().await {
            Ok(list) => list.into_iter().filter(|s| s.state == State::Running).map(|s| s.project).collect(),
            Err(error) => {
                tracing::warn!(error = %crate::chain(&error), "cannot tell which projects need snapshots");
                return;
            }
        };
        // Whatever was left without a last snapshot when the host went down.
        let held: Vec<Entry> = if first { self.0.ledger.entries() } else { Vec::new() };
        let known: Vec<Entry> = running.iter().filter_map(|project| self.0.ledger.entry(*project)).collect();
        let mut state = self.state();
        state.looked = Some(now);
        state.space.doubt(held.iter().filter(|entry| entry.may_run().is_some()).map(|entry| entry.project));
        for entry in held.iter().filter(|entry| entry.may_run().is_some()) {
            state.schedule.rests(entry.project, self.policy(&entry.config).interval(), now);
        }
        for entry in known.iter().filter(|entry| entry.may_run().is_some()) {
            state.schedule.runs(entry.project, self.policy(&entry.config).interval(), now);
        }
        let ended: Vec<ProjectId> =
            state.schedule.running().filter(|project| !running.contains(project)).collect();
        for project in ended {
            state.schedule.rests(project, self.0.settings.policy.interval(), now);
        }
    }

    /// Looks after one project that is due.
    async fn visit(&self, project: ProjectId) -> Outcome {
        let Some(_turn) = self.turn(project).await else { return Outcome::Failed };
        // Asked in its turn: nothing takes it away meanwhile.
        let Some(entry) = self.0.ledger.entry(project).filter(|entry| entry.may_run().is_some()) else {
            let mut state = self.state();
            state.schedule.forget(project);
            state.failures.remove(&project);
            state.space.forget(project);
            return Outcome::Done;
        };
        let here = self.0.storage.snapshots(project).await;
        if let Ok(here) = &here
            && let Err(error) = self.sweep_fetched(project, here).await
        {
            tracing::warn!(%project, error = %crate::chain(&error), "cannot look for what restores have left");
        }
        let policy = self.policy(&entry.config);
        if !policy.fields().enabled {
            return Outcome::Done;
        }
        match self.keep(project, &policy, here).await {
            Ok(()) => Outcome::Done,
            Err(_) => Outcome::Failed,
        }
    }

    /// Deletes what a restore brought and nobody has deleted: its master or this
    /// host was away when it failed. With it goes the room that it had.
    async fn sweep_fetched(&self, project: ProjectId, here: &[Snapshot]) -> storage::Result<()> {
        let now = self.0.clock.wall();
        for snapshot in here {
            if is_fetched(&snapshot.name) && now.since(snapshot.created) >= FETCHED_MAX {
                self.delete(project, &snapshot.name).await?;
                let now = self.0.clock.boot();
                self.state().space.end(project, &snapshot.name, now);
                tracing::info!(%project, name = %snapshot.name, "what a restore had left is deleted");
            }
        }
        Ok(())
    }

    /// The project's turn, unless somebody has it for long.
    async fn turn(&self, project: ProjectId) -> Option<tokio::sync::OwnedMutexGuard<()>> {
        tokio::time::timeout(TURN_LIMIT, self.0.ledger.turn(project)).await.ok()
    }

    /// Takes a snapshot if something has changed since those that are `here`, and
    /// deletes what is not kept.
    async fn keep(
        &self,
        project: ProjectId,
        policy: &Policy,
        here: storage::Result<Vec<Snapshot>>,
    ) -> storage::Result<()> {
        let kept = match here {
            Ok(here) => self.keep_now(project, policy, names(here)).await,
            Err(error) => Err(error),
        };
        let mut state = self.state();
        match &kept {
            Ok(()) => drop(state.failures.remove(&project)),
            // It was deleted, or never made.
            Err(storage::Error::NotFound { .. }) => {
                state.schedule.forget(project);
                return Ok(());
            }
            Err(error) => {
                self.0.counters.failed();
                let reason = crate::chain(error);
                tracing::warn!(%project, error = reason, "cannot keep its automatic snapshots");
                state.failures.insert(project, reason);
            }
        }
        kept
    }

    async fn keep_now(
        &self,
        project: ProjectId,
        policy: &Policy,
        mut names: Vec<SnapshotName>,
    ) -> storage::Result<()> {
        let (name, new) = self.take(project, &names).await?;
        if new {
            names.push(name);
        }
        for name in superfluous(policy, &names, self.0.clock.wall()) {
            self.delete(project, &name).await?;
        }
        Ok(())
    }

    /// The automatic snapshot of the present state, and whether it is new.
    async fn take(
        &self,
        project: ProjectId,
        names: &[SnapshotName],
    ) -> storage::Result<(SnapshotName, bool)> {
        let (storage, now) = (&self.0.storage, self.0.clock.wall());
        if let Some(last) = latest(names, now) {
            match storage.changed_since(project, last).await {
                Ok(false) => return Ok((last.clone(), false)),
                // It may have been deleted this moment; and who cannot tell says yes.
                Ok(true) | Err(storage::Error::NoSnapshot { .. } | storage::Error::Unsupported { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let name = unused(names, now);
        storage.snapshot(project, &name).await?;
        self.0.counters.taken();
        tracing::debug!(%project, %name, "automatic snapshot");
        Ok((name, true))
    }

    /// Deletes one, unless it is held; whether it did.
    async fn delete(&self, project: ProjectId, name: &SnapshotName) -> storage::Result<bool> {
        match self.0.storage.delete_snapshot(project, name).await {
            Ok(()) => {
                self.0.counters.deleted();
                tracing::debug!(%project, %name, "automatic snapshot deleted");
                Ok(true)
            }
            // The next look finds it again.
            Err(storage::Error::InUse { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn state(&self) -> MutexGuard<'_, Kept> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn names(snapshots: Vec<Snapshot>) -> Vec<SnapshotName> {
    snapshots.into_iter().map(|snapshot| snapshot.name).collect()
}

/// A name that is not taken: to take a snapshot under one that is there returns
/// the old one.
fn unused(names: &[SnapshotName], now: Timestamp) -> SnapshotName {
    let mut at = now;
    loop {
        let name = auto_name(at);
        if !names.contains(&name) {
            return name;
        }
        at = at.plus(Duration::from_secs(1));
    }
}

#[cfg(test)]
mod tests;
