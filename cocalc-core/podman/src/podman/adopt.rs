//! Finding what runs already, and going on to look.

use std::{
    collections::BTreeSet,
    path::Path,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::{Duration, Instant},
};

use cocalc_core::{
    ids::ProjectId,
    runner::{Error, Result},
};
use tokio::sync::{Notify, watch};

use super::{
    Podman, Shared, keepers,
    project::{Project, Running},
};

/// How long a new runner waits for podman to say which containers there are.
const FIRST_LIMIT: Duration = Duration::from_secs(20);
/// How long a change of a project waits for that, before it is refused.
const PATIENCE: Duration = Duration::from_secs(10);
/// After how long podman is asked again at first, and at most.
const AGAIN: Duration = Duration::from_secs(1);
const AGAIN_MAX: Duration = Duration::from_secs(60);
/// How long a change of a project waits for an answer of podman about that one, and
/// how often it is looked whether a doubt has been settled.
const DOUBT_PATIENCE: Duration = Duration::from_secs(5);
const DOUBT_LOOK: Duration = Duration::from_millis(500);
/// What ends not knowing, for people.
const ADVICE: &str = "podman is asked again at least once a minute; if this lasts, see what \
    `podman ps --all` says on its host, and mend podman there";

/// Whether podman has said which containers there are.
#[derive(Debug)]
pub(crate) struct Adoption {
    lacks: watch::Sender<Option<String>>,
    /// Something has become unknown, or somebody waits to know it.
    doubt: Arc<Notify>,
    /// Containers with our label that are no project's, which was said.
    pub(super) strangers: Mutex<BTreeSet<String>>,
}

impl Default for Adoption {
    fn default() -> Self {
        Self {
            lacks: watch::Sender::new(Some("podman has not answered yet".into())),
            doubt: Arc::default(),
            strangers: Mutex::default(),
        }
    }
}

impl Adoption {
    /// Why what runs is not known yet; `None` once it is.
    pub(super) fn lacks(&self) -> Option<String> {
        self.lacks.borrow().clone()
    }

    /// Waits until podman has answered; whether it has within `limit`.
    async fn done(&self, limit: Duration) -> bool {
        let mut answers = self.lacks.subscribe();
        // The sender lives as long as this.
        tokio::time::timeout(limit, answers.wait_for(Option::is_none)).await.is_ok()
    }

    /// Says that a container is left alone, once.
    pub(super) fn stranger(&self, name: &str) {
        let mut strangers = self.strangers.lock().unwrap_or_else(PoisonError::into_inner);
        if strangers.insert(name.to_owned()) {
            tracing::warn!(container = name, "it has this host's label and is no project's; left alone");
        }
    }
}

impl Podman {
    /// Finds the containers of this instance that are there already. If podman does
    /// not say, what is noted to run is found, and podman is asked on.
    /// `answers` is false if podman is known not to.
    pub(super) async fn adopt(&self, answers: bool) {
        let shared = &self.shared;
        // First: what runs does so also if podman has forgotten it.
        let found = shared.adopt_noted().await;
        tokio::spawn(look_on(Arc::downgrade(shared)));
        let patience = if answers { FIRST_LIMIT } else { Duration::ZERO };
        if !shared.adoption.done(patience).await {
            tracing::warn!(
                found,
                why = shared.adoption.lacks().unwrap_or_default(),
                "podman does not say which containers there are; what is noted to run goes on, and nothing \
                 is started or stopped until it does"
            );
        }
    }
}

/// Asks podman which containers there are until it has answered once, and from then
/// on again and again: soon where something is not known, and else now and then.
async fn look_on(shared: Weak<Shared>) {
    let (mut pause, mut limit) = (AGAIN, FIRST_LIMIT);
    loop {
        let Some(runner) = shared.upgrade() else { return };
        let looked = runner.look(limit).await;
        let settled = match looked {
            Ok(count) => {
                if runner.adoption.lacks.send_replace(None).is_some() {
                    tracing::info!(count, "found the containers that are there");
                    (pause, limit) = (AGAIN, FIRST_LIMIT);
                }
                !runner.doubts()
            }
            Err(error) => {
                let error = cocalc_core::chain(&error);
                tracing::warn!(error, again_in = ?pause, "cannot list the containers that are there");
                if runner.adoption.lacks().is_some() {
                    let reason = format!("podman does not say what runs: {error}");
                    runner.adoption.lacks.send_replace(Some(reason));
                }
                false
            }
        };
        let wait = if settled { runner.look_again } else { pause };
        let doubt = Arc::clone(&runner.adoption.doubt);
        // One that is gone is not held.
        drop(runner);
        tokio::select! {
            () = tokio::time::sleep(wait) => {
                // It may be slow, for all it has to look through.
                (pause, limit) = if settled {
                    (AGAIN, FIRST_LIMIT)
                } else {
                    ((pause * 2).min(AGAIN_MAX), (limit * 2).min(AGAIN_MAX))
                };
            }
            // Somebody wants to know: that makes nothing slower.
            () = doubt.notified() => {}
        }
    }
}

impl Shared {
    /// Waits a moment for podman to have said which containers there are: before that
    /// nothing of a project is changed, for it might run.
    pub(super) async fn adopted(&self, project: ProjectId) -> Result<()> {
        let runs = || self.known(project).is_some_and(|entry| entry.running().is_some());
        if !runs() && !self.adoption.done(PATIENCE).await && !runs() {
            return self.adoption.lacks().map_or(Ok(()), |reason| Err(doubtful(project, &reason)));
        }
        // Podman may be mended by now. Whoever goes on sees for themselves.
        let begun = Instant::now();
        while self.known(project).is_some_and(|entry| entry.doubt().is_some())
            && begun.elapsed() < DOUBT_PATIENCE
        {
            self.adoption.doubt.notify_one();
            tokio::time::sleep(DOUBT_LOOK).await;
        }
        Ok(())
    }

    /// Refuses to call a project stopped of which that is not known.
    pub(super) fn is_known_stopped(&self, project: ProjectId) -> Result<()> {
        match self.adoption.lacks() {
            Some(reason) if self.records.may_run(project) => Err(doubtful(project, &reason)),
            _ => Ok(()),
        }
    }

    /// Refuses where what this project does is not known, which it is of others. For
    /// whoever holds its operation.
    pub(super) fn certain(&self, entry: &Project) -> Result<()> {
        match entry.doubt() {
            Some(reason) => Err(doubtful(entry.id, &reason)),
            None => Ok(()),
        }
    }

    /// What a project does is not known from now on; podman is asked soon.
    pub(super) fn doubt(&self, entry: &Project, reason: String) {
        tracing::warn!(project = %entry.id, reason, "what it does is not known");
        entry.view().doubt = Some(reason);
        self.adoption.doubt.notify_one();
    }

    /// Whether of any project it is not known what it does.
    fn doubts(&self) -> bool {
        self.projects().values().any(|entry| entry.doubt().is_some())
    }

    /// Adopts what is noted to run and does; how many.
    async fn adopt_noted(&self) -> usize {
        let mut found = 0;
        for (project, record) in self.records.all() {
            let Some(run) = record.run else { continue };
            let entry = self.entry(project);
            let _operation = entry.operation.lock().await;
            if entry.running().is_some() {
                continue;
            }
            let running = match Running::of(run.pid, &run.container) {
                Ok(Some(running)) => running,
                // Ended: podman will say of what.
                Ok(None) => continue,
                Err(error) => {
                    self.doubt(&entry, format!("cannot look at its first process: {error}"));
                    continue;
                }
            };
            {
                let mut view = entry.view();
                view.env = Arc::new(self.read_env(project));
                view.epoch = Some(record.epoch);
                view.slot = Some(record.slot);
                view.limits = record.limits;
                view.made_from = record.made_from;
                view.container = Some(run.container);
                view.running = Some(running);
                view.started = run.started;
            }
            found += 1;
            self.resolve_found(project, record.slot).await;
        }
        found
    }

    /// Starts the resolver of a project that was found running.
    pub(super) async fn resolve_found(&self, project: ProjectId, slot: u32) {
        let entry = self.entry(project);
        let policy = self.network.policy(project);
        if let Err(error) = self.resolve(&entry, slot, &policy).await {
            // It runs all the same; names come back with its next start.
            tracing::warn!(%project, error = %cocalc_core::chain(&error), "no names for a project");
        }
    }

    /// Lists what is left of projects whose container is gone, so that it can be
    /// removed: a removal that was cut off has taken that first. Those of which
    /// something is kept that runs. Blocks.
    pub(super) fn adopt_remains(&self) -> BTreeSet<ProjectId> {
        let dirs = &self.dirs;
        let places: [&Path; 7] = [
            &dirs.projects,
            &dirs.networks,
            &dirs.sockets,
            dirs.pids(),
            &dirs.logs,
            &dirs.environments,
            self.records.directory(),
        ];
        let mut found = BTreeSet::new();
        for name in places.into_iter().filter_map(|place| std::fs::read_dir(place).ok()).flatten().flatten() {
            let name = name.file_name();
            let id: Option<ProjectId> =
                name.to_str().and_then(|name| name.split('.').next()).and_then(|id| id.parse().ok());
            found.extend(id);
        }
        let keepers = keepers::find(|name| self.project_of(name).is_some());
        let kept: BTreeSet<_> = keepers.iter().filter_map(|keeper| self.project_of(&keeper.name)).collect();
        found.extend(&kept);
        for project in found {
            let entry = self.entry(project);
            if entry.view().slot.is_none() {
                // Nobody else gets its number while its network is there, unless they
                // have it already.
                let slot = self.network.slot(project).filter(|slot| !self.is_taken(&entry, *slot));
                entry.view().slot = slot;
            }
            // What is noted to run, or to be about to, and does not.
            if entry.running().is_none() && entry.doubt().is_none() {
                self.records.forget(project);
            }
        }
        kept
    }

    /// Whether another project has this number.
    pub(super) fn is_taken(&self, entry: &Project, slot: u32) -> bool {
        let projects = self.projects();
        projects.values().any(|other| other.id != entry.id && other.view().slot == Some(slot))
    }
}

/// What a project does is not known.
fn doubtful(project: ProjectId, reason: &str) -> Error {
    Error::Unknown { project, reason: format!("{reason}; {ADVICE}") }
}
