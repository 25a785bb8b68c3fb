//! Finding what runs already.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use cocalc_core::{
    ids::{Epoch, ProjectId, Timestamp},
    runner::{Error, Result},
};
use tokio::sync::watch;

use super::{
    Podman, Shared,
    cli::{CliError, Container},
    end::End,
    lifecycle::{LABEL_EPOCH, LABEL_LIMITS, LABEL_PROJECT, LABEL_SLOT, LABEL_SPEC},
    project::Running,
};
use crate::oom;

/// How long a new runner waits for podman to say which containers there are.
const FIRST_LIMIT: Duration = Duration::from_secs(20);
/// How long a change of a project waits for that, before it is refused.
const PATIENCE: Duration = Duration::from_secs(10);
/// After how long podman is asked again at first, and at most.
const AGAIN: Duration = Duration::from_secs(1);
const AGAIN_MAX: Duration = Duration::from_secs(60);

/// Whether podman has said which containers there are.
#[derive(Debug)]
pub(crate) struct Adoption(watch::Sender<Option<String>>);

impl Default for Adoption {
    fn default() -> Self {
        Self(watch::Sender::new(Some("podman has not answered yet".into())))
    }
}

impl Adoption {
    /// Why what runs is not known yet; `None` once it is.
    fn lacks(&self) -> Option<String> {
        self.0.borrow().clone()
    }

    /// Waits until podman has answered; whether it has within `limit`.
    async fn done(&self, limit: Duration) -> bool {
        let mut answers = self.0.subscribe();
        // The sender lives as long as this.
        tokio::time::timeout(limit, answers.wait_for(Option::is_none)).await.is_ok()
    }
}

impl Podman {
    /// Finds the containers of this instance that are there already. If podman does
    /// not say, what is noted to run is found, and podman is asked on.
    /// `answers` is false if podman is known not to.
    pub(super) async fn adopt(&self, answers: bool) {
        let shared = &self.shared;
        tokio::spawn(ask_on(Arc::downgrade(shared)));
        let patience = if answers { FIRST_LIMIT } else { Duration::ZERO };
        if !shared.adoption.done(patience).await {
            let found = shared.adopt_noted().await;
            tracing::warn!(
                found,
                why = shared.adoption.lacks().unwrap_or_default(),
                "podman does not say which containers there are; what is noted to run goes on, and nothing \
                 is started or stopped until it does"
            );
        }
    }
}

/// Asks podman until it has answered once, or the runner is gone.
async fn ask_on(shared: Weak<Shared>) {
    let (mut pause, mut limit) = (AGAIN, FIRST_LIMIT);
    loop {
        let Some(runner) = shared.upgrade() else { return };
        match runner.adopt_containers(limit).await {
            Ok(count) => {
                if runner.adoption.0.send_replace(None).is_some() {
                    tracing::info!(count, "found the containers that are there");
                }
                return;
            }
            Err(error) => {
                let error = cocalc_core::chain(&error);
                tracing::warn!(error, again_in = ?pause, "cannot list the containers that are there");
                runner.adoption.0.send_replace(Some(format!("podman does not say what runs: {error}")));
            }
        }
        drop(runner);
        tokio::time::sleep(pause).await;
        // It may be slow, for all it has to look through.
        (pause, limit) = ((pause * 2).min(AGAIN_MAX), (limit * 2).min(AGAIN_MAX));
    }
}

impl Shared {
    /// Waits a moment for podman to have said which containers there are: before that
    /// nothing of a project is changed, for it might run.
    pub(super) async fn adopted(&self, project: ProjectId) -> Result<()> {
        let runs = || self.known(project).is_some_and(|entry| entry.running().is_some());
        if runs() || self.adoption.done(PATIENCE).await || runs() {
            return Ok(());
        }
        self.unknown_because(project)
    }

    /// Refuses to call a project stopped of which that is not known.
    pub(super) fn is_known_stopped(&self, project: ProjectId) -> Result<()> {
        if self.adoption.lacks().is_some() && self.records.may_run(project) {
            return self.unknown_because(project);
        }
        Ok(())
    }

    fn unknown_because(&self, project: ProjectId) -> Result<()> {
        match self.adoption.lacks() {
            Some(reason) => Err(Error::Unknown { project, reason }),
            None => Ok(()),
        }
    }

    /// Adopts what podman knows of; how many.
    async fn adopt_containers(&self, limit: Duration) -> Result<usize, CliError> {
        let names = self.cli.labelled(&super::cleanup::label(self.instance), limit).await?;
        let found = self.cli.inspect_present(&names).await?;
        for container in &found {
            self.adopt_container(container).await;
        }
        Ok(found.len())
    }

    async fn adopt_container(&self, container: &Container) {
        let label = |name: &str| container.labels.get(name).map(String::as_str).unwrap_or_default();
        let (Ok(project), Ok(epoch), Ok(slot)) =
            (label(LABEL_PROJECT).parse(), label(LABEL_EPOCH).parse::<Epoch>(), label(LABEL_SLOT).parse())
        else {
            tracing::warn!(container = container.name, "its labels make no sense, left alone");
            return;
        };
        let entry = self.entry(project);
        let _operation = entry.operation.lock().await;
        if entry.running().is_some() {
            // By its note, while podman did not answer.
            return;
        }
        // The descriptor table is full, or the like: then it is taken for stopped,
        // and its start finds it.
        let running = Running::find(container).unwrap_or_else(|error| {
            tracing::warn!(%project, %error, "cannot find its first process");
            None
        });
        let runs = running.is_some();
        let reason = self.reason_found(project, container).await;
        {
            let mut view = entry.view();
            view.env = Arc::new(self.read_env(project));
            view.epoch = Some(epoch);
            view.slot = Some(slot);
            view.limits = serde_json::from_str(label(LABEL_LIMITS)).unwrap_or_default();
            view.made_from = Some(label(LABEL_SPEC).to_owned());
            view.container = Some(container.id.clone());
            view.running = running;
            view.started = self.records.started(project, container).or(container.started);
            view.reason = reason;
        }
        if runs {
            self.resolve_found(project, slot).await;
        }
    }

    /// Why a container does not run that was found; `None` if it does, or never did.
    async fn reason_found(&self, project: ProjectId, container: &Container) -> Option<String> {
        let exit = container.exit.clone()?;
        let mut end = End { exit: Some(exit), ..End::default() };
        // What was stopped has no note; and of its processes nobody had notices.
        if let Some(run) = self.records.run_of(project, container) {
            let ago = run.started.map_or(Duration::MAX, |started| Timestamp::now().since(started));
            let since = oom::log_time().saturating_sub(ago);
            let victim = tokio::task::spawn_blocking(move || oom::victim(run.pid, since)).await;
            end.victim = victim.unwrap_or_default();
        }
        Some(end.words())
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
                    tracing::warn!(%project, %error, "cannot find its first process");
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
    async fn resolve_found(&self, project: ProjectId, slot: u32) {
        let entry = self.entry(project);
        let policy = self.network.policy(project);
        if let Err(error) = self.resolve(&entry, slot, &policy).await {
            // It runs all the same; names come back with its next start.
            tracing::warn!(%project, error = %cocalc_core::chain(&error), "no names for a project");
        }
    }
}
