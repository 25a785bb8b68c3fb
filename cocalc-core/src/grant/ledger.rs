//! The ledger of one host: entries in memory, saved before they are seen.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use cocalc_ids::{Epoch, HostId, MoveId, ProjectAlias, ProjectId};
use tokio::sync::{OwnedMutexGuard, broadcast};

use super::{Entry, LedgerStore, Refusal};
use crate::{
    BoxError,
    control::{CommandError, ErrorCode, ProjectConfig},
    router::{HostAddress, Route},
};

/// How many route changes a slow receiver may lag behind.
const CHANGES_MAX: usize = 1024;

/// Why a change of the ledger was not made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LedgerError {
    /// The state of the project does not permit it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// It could not be saved.
    #[error("cannot save what this host holds of project {project}")]
    Store {
        /// The project.
        project: ProjectId,
        /// Why.
        source: BoxError,
    },
    /// What was saved cannot be loaded.
    #[error("cannot load what this host holds")]
    Load {
        /// Why.
        source: BoxError,
    },
}

impl From<LedgerError> for CommandError {
    fn from(error: LedgerError) -> Self {
        match error {
            LedgerError::Refused(refusal) => refusal.into(),
            other => Self { code: ErrorCode::Unavailable, message: crate::chain(&other) },
        }
    }
}

/// The grants of one host. Clones share it.
#[derive(Clone)]
pub struct Ledger(Arc<Inner>);

struct Inner {
    host: HostId,
    store: Arc<dyn LedgerStore>,
    state: Mutex<State>,
    /// Changes are made one after the other, so that what is saved is what the
    /// next one sees.
    writing: Arc<tokio::sync::Mutex<()>>,
    routes: broadcast::Sender<Route>,
}

#[derive(Default)]
struct State {
    entries: BTreeMap<ProjectId, Entry>,
    slots: BTreeSet<u32>,
    /// Parked projects, with the time since boot at which that lapses.
    parked: BTreeMap<ProjectId, Duration>,
    locks: BTreeMap<ProjectId, Arc<tokio::sync::Mutex<()>>>,
}

impl fmt::Debug for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ledger").field("host", &self.0.host).finish_non_exhaustive()
    }
}

impl Ledger {
    /// Loads what `host` holds.
    ///
    /// # Errors
    ///
    /// [`LedgerError::Load`].
    pub async fn open(host: HostId, store: Arc<dyn LedgerStore>) -> Result<Self, LedgerError> {
        let mut state = State::default();
        for entry in store.load().await.map_err(|source| LedgerError::Load { source })? {
            state.slots.extend(entry.slot);
            state.entries.insert(entry.project, entry);
        }
        let (routes, _) = broadcast::channel(CHANGES_MAX);
        let writing = Arc::default();
        Ok(Self(Arc::new(Inner { host, store, state: Mutex::new(state), writing, routes })))
    }

    /// Whose ledger it is.
    pub fn host(&self) -> HostId {
        self.0.host
    }

    /// What is known of `project`.
    pub fn entry(&self, project: ProjectId) -> Option<Entry> {
        self.state().entries.get(&project).cloned()
    }

    /// The project of that other name, among those that this host may run.
    pub fn named(&self, alias: &ProjectAlias) -> Option<ProjectId> {
        let state = self.state();
        let has = |entry: &&Entry| entry.config.alias.as_ref() == Some(alias) && entry.may_run().is_some();
        state.entries.values().find(has).map(|entry| entry.project)
    }

    /// Everything that is known, ordered by project.
    pub fn entries(&self) -> Vec<Entry> {
        self.state().entries.values().cloned().collect()
    }

    /// The entry of `project`, if `epoch` may be acted on here.
    ///
    /// # Errors
    ///
    /// As [`Entry::permit`]; [`Refusal::Unknown`] if nothing is known.
    pub fn permit(&self, project: ProjectId, epoch: Epoch) -> Result<Entry, Refusal> {
        let entry = self.known(project)?;
        entry.permit(epoch)?;
        Ok(entry)
    }

    /// The entry of `project`, or [`Refusal::Unknown`].
    ///
    /// # Errors
    ///
    /// If nothing is known of it.
    pub fn known(&self, project: ProjectId) -> Result<Entry, Refusal> {
        self.entry(project).ok_or(Refusal::Unknown { project, reason: "this host never had it" })
    }

    /// Where users find `project`, seen from here.
    pub fn route(&self, project: ProjectId) -> Option<Route> {
        let state = self.state();
        state.entries.get(&project)?.route(self.0.host, state.parked.contains_key(&project))
    }

    /// The changes of routes from now on.
    pub fn routes(&self) -> broadcast::Receiver<Route> {
        self.0.routes.subscribe()
    }

    /// Waits for its turn with `project`. Whoever starts, stops, deletes,
    /// restores or moves a project holds this while doing so.
    pub async fn turn(&self, project: ProjectId) -> OwnedMutexGuard<()> {
        let lock = {
            let mut state = self.state();
            // Nobody waits for a lock that only this map holds.
            state.locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            state.locks.entry(project).or_default().clone()
        };
        lock.lock_owned().await
    }

    /// Takes the first grant of a new project. See [`Entry::create`].
    ///
    /// # Errors
    ///
    /// If it is refused or cannot be saved.
    pub async fn create(
        &self,
        project: ProjectId,
        epoch: Epoch,
        config: ProjectConfig,
    ) -> Result<Entry, LedgerError> {
        self.change(project, move |entry| entry.create(epoch, config)).await
    }

    /// Changes how a project is run. See [`Entry::configure`].
    ///
    /// # Errors
    ///
    /// If it is refused or cannot be saved.
    pub async fn configure(
        &self,
        project: ProjectId,
        epoch: Epoch,
        config: ProjectConfig,
    ) -> Result<Entry, LedgerError> {
        self.change(project, move |entry| entry.configure(epoch, config)).await
    }

    /// Gives up the grant of a project that is to be deleted; its files are
    /// deleted afterwards. See [`Entry::delete`].
    ///
    /// # Errors
    ///
    /// If it is refused or cannot be saved.
    pub async fn delete(&self, project: ProjectId, epoch: Epoch) -> Result<Entry, LedgerError> {
        self.change(project, move |entry| entry.delete(epoch)).await
    }

    /// Hears who owns a project. See [`Entry::observe`]. Projects of which
    /// this host has nothing are passed over.
    ///
    /// # Errors
    ///
    /// If it cannot be saved.
    pub async fn observe(
        &self,
        project: ProjectId,
        owner: HostId,
        epoch: Epoch,
        address: Option<HostAddress>,
    ) -> Result<Option<Entry>, LedgerError> {
        if self.entry(project).is_none() {
            return Ok(None);
        }
        let here = self.0.host;
        let observe = move |entry: &mut Entry| {
            entry.observe(here, owner, epoch, address);
            Ok(())
        };
        self.change(project, observe).await.map(Some)
    }

    /// The start that a grant asked for has been tried, or is not wanted.
    ///
    /// # Errors
    ///
    /// If it cannot be saved.
    pub async fn start_settled(&self, project: ProjectId) -> Result<(), LedgerError> {
        if self.entry(project).is_none_or(|entry| !entry.start_pending) {
            return Ok(());
        }
        let settle = |entry: &mut Entry| {
            entry.start_settled();
            Ok(())
        };
        self.change(project, settle).await.map(drop)
    }

    /// Frees the number of a project that is not here any more, after its
    /// runner has removed it.
    ///
    /// # Errors
    ///
    /// If it cannot be saved.
    pub async fn free_slot(&self, project: ProjectId) -> Result<(), LedgerError> {
        if self.entry(project).is_none_or(|entry| entry.slot.is_none() || entry.needs_slot()) {
            return Ok(());
        }
        let free = |entry: &mut Entry| {
            if !entry.needs_slot() {
                entry.slot = None;
            }
            Ok(())
        };
        self.change(project, free).await.map(drop)
    }

    /// Makes requests for `project` wait, until `until` (time since boot) at
    /// the latest. Not durable: what is, is the freeze that follows.
    ///
    /// # Errors
    ///
    /// As [`Entry::source`].
    pub fn park(
        &self,
        project: ProjectId,
        move_id: MoveId,
        epoch: Epoch,
        until: Duration,
    ) -> Result<(), Refusal> {
        self.known(project)?.source(move_id, epoch)?;
        self.with_route(project, |state| {
            state.parked.insert(project, until);
        });
        Ok(())
    }

    /// Lets requests for `project` go on.
    pub fn unpark(&self, project: ProjectId) {
        self.with_route(project, |state| {
            state.parked.remove(&project);
        });
    }

    /// Lets requests go on if `project` is still parked until `until`, and was
    /// not parked anew.
    pub(crate) fn unpark_if(&self, project: ProjectId, until: Duration) {
        if self.state().parked.get(&project) == Some(&until) {
            self.unpark(project);
        }
    }

    /// Lets requests go on for every project that is parked for longer than
    /// was agreed. A freeze is not ended by this.
    pub fn unpark_lapsed(&self, now: Duration) {
        let lapsed: Vec<_> =
            self.state().parked.iter().filter(|(_, until)| **until <= now).map(|(p, _)| *p).collect();
        for project in lapsed {
            self.unpark(project);
        }
    }

    /// Makes a change: decided by `decide`, saved, then seen. Goes on to its
    /// end when the caller stops waiting.
    pub(crate) async fn change(
        &self,
        project: ProjectId,
        decide: impl FnOnce(&mut Entry) -> Result<(), Refusal> + Send + 'static,
    ) -> Result<Entry, LedgerError> {
        let ledger = self.clone();
        // In a task of its own: if the caller were cancelled between the save
        // and the change in memory, the two would differ.
        let task = tokio::spawn(async move {
            let _writing = ledger.0.writing.lock().await;
            let before = ledger.entry(project);
            let mut after = before.clone().unwrap_or_else(|| Entry::new(project));
            decide(&mut after)?;
            if after.slot.is_none() && after.needs_slot() {
                after.slot = ledger.state().free_slot();
            }
            if before.as_ref() == Some(&after) {
                return Ok(after);
            }
            ledger.0.store.save(&after).await.map_err(|source| LedgerError::Store { project, source })?;
            let saved = after.clone();
            ledger.with_route(project, |state| {
                if let Some(slot) = before.and_then(|entry| entry.slot) {
                    state.slots.remove(&slot);
                }
                state.slots.extend(saved.slot);
                if saved.may_run().is_none() {
                    state.parked.remove(&project);
                }
                state.entries.insert(project, saved);
            });
            Ok(after)
        });
        match task.await {
            Ok(result) => result,
            Err(error) => Err(LedgerError::Store { project, source: error.into() }),
        }
    }

    fn with_route(&self, project: ProjectId, change: impl FnOnce(&mut State)) {
        let before = self.route(project);
        change(&mut self.state());
        if let Some(after) = self.route(project)
            && before.as_ref() != Some(&after)
        {
            // Nobody may be listening.
            let _ = self.0.routes.send(after);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn free_slot(&self) -> Option<u32> {
        (0..u32::MAX).find(|slot| !self.slots.contains(slot))
    }
}

#[cfg(test)]
mod tests;
