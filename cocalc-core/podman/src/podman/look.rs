//! Making of what podman says of a container what is known of its project.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use cocalc_core::ids::{Epoch, ProjectId, Timestamp};

use super::{
    Shared,
    cli::{CliError, Container},
    end::End,
    lifecycle::{LABEL_EPOCH, LABEL_LIMITS, LABEL_PROJECT, LABEL_SLOT, LABEL_SPEC},
    project::{Project, Running},
    record::{Record, Run},
};
use crate::oom;

/// How long the processes of a project have to end that somebody else has started.
const GRACE: Duration = Duration::from_secs(10);
/// How long podman may take to say which containers are being removed.
const REMOVING_LIMIT: Duration = Duration::from_secs(10);

/// What a container is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Condition {
    /// Its first process is there.
    Runs,
    /// None of it is.
    Rests,
    /// Somebody broke off while it was being started or removed.
    HalfMade,
    /// podman does not know, or says what this program does not understand.
    Unknown,
}

/// What a container is of which podman says `status`, and whose first process lives,
/// where it may wait to be told to start, or does not: a process that is seen counts
/// more than words.
fn condition(status: &str, lives: bool, waits: bool) -> Condition {
    match (status, lives) {
        ("removing", _) | ("initialized", false) => Condition::HalfMade,
        // Nobody tells it any more.
        (_, true) if waits => Condition::HalfMade,
        (_, true) => Condition::Runs,
        // Of the latter podman has not noticed yet that they ended.
        ("created" | "configured" | "exited" | "stopped" | "running" | "stopping" | "paused", false) => {
            Condition::Rests
        }
        _ => Condition::Unknown,
    }
}

impl Shared {
    /// Looks at the containers that podman knows of: all the first time, and then those
    /// that are not as they should be. How many there are.
    pub(super) async fn look(self: &Arc<Self>, limit: Duration) -> Result<usize, CliError> {
        let listed = self.cli.listed(&super::cleanup::label(self.instance), limit).await?;
        let first = self.adoption.lacks().is_some();
        let mut there = BTreeSet::new();
        let mut news = Vec::new();
        for (name, state) in &listed {
            match self.project_of(name) {
                Some(project) => {
                    there.insert(project);
                    if first || self.is_news(project, state) {
                        news.push((project, name.clone()));
                    }
                }
                None => self.adoption.stranger(name),
            }
        }
        if first {
            let names: Vec<String> = news.into_iter().map(|(_, name)| name).collect();
            for (name, container) in self.cli.inspect_each(&names).await? {
                let Some(project) = self.project_of(&name) else { continue };
                let entry = self.entry(project);
                let _operation = entry.operation.lock().await;
                self.found(&entry, container, true).await;
            }
        } else {
            let doubtful: Vec<ProjectId> = self
                .projects()
                .values()
                .filter(|entry| entry.doubt().is_some() && !there.contains(&entry.id))
                .map(|entry| entry.id)
                .collect();
            for project in news.into_iter().map(|(project, _)| project).chain(doubtful) {
                let entry = self.entry(project);
                let _operation = entry.operation.lock().await;
                self.look_at(&entry).await;
                // It was removed since it was listed.
                if entry.view().is_empty() && Arc::strong_count(&entry) <= 2 {
                    self.projects().remove(&project);
                }
            }
        }
        if first {
            let noted: Vec<Arc<Project>> = self
                .projects()
                .values()
                .filter(|entry| entry.doubt().is_some() && !there.contains(&entry.id))
                .cloned()
                .collect();
            for entry in noted {
                let _operation = entry.operation.lock().await;
                self.look_at(&entry).await;
            }
            let shared = Arc::clone(self);
            let kept = tokio::task::spawn_blocking(move || shared.adopt_remains()).await;
            match kept {
                Ok(kept) => self.end_unheld(kept).await,
                Err(error) => tracing::error!(%error, "cannot look for what is left over"),
            }
        }
        Ok(listed.len())
    }

    /// Ends what a podman that was killed has left of these projects, of which nothing
    /// is held to run.
    async fn end_unheld(&self, kept: BTreeSet<ProjectId>) {
        for project in kept {
            let entry = self.entry(project);
            let _operation = entry.operation.lock().await;
            if entry.running().is_none() && entry.doubt().is_none() {
                self.end_keepers(project).await;
            }
        }
    }

    /// Whether podman says of a container what is not held here.
    fn is_news(&self, project: ProjectId, state: &str) -> bool {
        let Some(entry) = self.known(project) else { return true };
        // Some versions say it in words: `Up 5 seconds`, `Exited (0) 2 hours ago`.
        let rests =
            ["created", "configured", "exited", "stopped"].iter().any(|rests| state.starts_with(rests));
        entry.doubt().is_some() || (!rests && entry.is_at_rest())
    }

    /// Looks at the container of a project, whose operation the caller holds.
    pub(super) async fn look_at(&self, entry: &Arc<Project>) {
        if entry.running().is_some() {
            entry.view().doubt = None;
            return;
        }
        let name = self.container(entry.id);
        match self.cli.inspect(std::slice::from_ref(&name)).await {
            Err(error) if error.is_missing() => {
                // And what was noted to run was looked for.
                let mut view = entry.view();
                (view.doubt, view.made_from, view.container) = (None, None, None);
                drop(view);
                self.records.forget(entry.id);
            }
            Err(error) => self.found(entry, Err(error), false).await,
            Ok(mut found) => match found.pop() {
                Some(container) => self.found(entry, Ok(container), false).await,
                None => self.doubt_again(entry, "podman says nothing of its container".into()),
            },
        }
    }

    /// Stays in doubt, or comes to be.
    fn doubt_again(&self, entry: &Project, reason: String) {
        if entry.doubt().is_none() {
            tracing::warn!(project = %entry.id, reason, "what it does is not known");
        }
        entry.view().doubt = Some(reason);
    }

    /// Takes in what podman says of the container of a project.
    async fn found(&self, entry: &Arc<Project>, container: Result<Container, CliError>, first: bool) {
        if entry.running().is_some() {
            // By its note.
            return;
        }
        let container = match container {
            Ok(container) => container,
            Err(_) if self.is_being_removed(entry.id).await => return self.remove_half(entry).await,
            Err(error) => {
                let reason =
                    format!("podman does not say what its container does: {}", cocalc_core::chain(&error));
                return self.doubt_again(entry, reason);
            }
        };
        let Some((epoch, slot)) = self.labels(entry.id, &container) else {
            return self.adoption.stranger(&container.name);
        };
        let noted = self.records.run_of(entry.id, &container);
        let others = [noted.as_ref().map(|run| run.pid), self.dirs.pid(entry.id)];
        let running = match Running::find(&container, others.into_iter().flatten()) {
            Ok(running) => running,
            // The table of descriptors is full, or the like.
            Err(error) => {
                return self.doubt_again(entry, format!("cannot look at its first process: {error}"));
            }
        };
        let label = |name: &str| container.labels.get(name).map(String::as_str).unwrap_or_default();
        let (doubted, at_rest) = (entry.doubt().is_some(), entry.view().made_from.is_some());
        let condition = match &running {
            Some(_) if container.status != "running" => {
                condition(&container.status, true, self.waits_to_start(&container.id).await)
            }
            found => condition(&container.status, found.is_some(), false),
        };
        let reason = match condition {
            Condition::Rests => self.reason_found(entry.id, &container).await,
            _ => None,
        };
        {
            let mut view = entry.view();
            view.env = Arc::new(self.read_env(entry.id));
            view.epoch = Some(epoch);
            view.slot = Some(slot);
            view.limits = serde_json::from_str(label(LABEL_LIMITS)).unwrap_or_default();
            view.made_from = Some(label(LABEL_SPEC).to_owned());
            view.container = Some(container.id.clone());
            view.doubt = None;
            if reason.is_some() {
                view.reason = reason;
            }
        }
        match (condition, running) {
            (Condition::Runs, Some(running)) => {
                let started = noted.and_then(|run| run.started).or(container.started);
                {
                    let mut view = entry.view();
                    view.running = Some(Arc::clone(&running));
                    (view.started, view.reason) = (started, None);
                }
                if !first && at_rest && !doubted {
                    tracing::warn!(project = %entry.id, "somebody else has started it; it is stopped");
                    if let Err(error) = self.stop_locked(entry, GRACE).await {
                        tracing::warn!(project = %entry.id, error = %cocalc_core::chain(&error), "it goes on");
                    }
                    return;
                }
                self.resolve_found(entry.id, slot).await;
                self.note_found(entry, &running);
            }
            (Condition::HalfMade, _) => self.remove_half(entry).await,
            (Condition::Unknown, _) | (Condition::Runs, None) => {
                let status = &container.status;
                self.doubt_again(entry, format!("podman says that its container is {status:?}"));
            }
            (Condition::Rests, _) => {
                let mut view = entry.view();
                view.started = view.started.or(noted.and_then(|run| run.started)).or(container.started);
            }
        }
    }

    /// Whether podman has begun to remove the container of a project. It has nothing
    /// else to say of one whose files it has removed already, when it was killed.
    async fn is_being_removed(&self, project: ProjectId) -> bool {
        let name = self.container(project);
        let label = super::cleanup::label(self.instance);
        let listed = self.cli.listed(&label, REMOVING_LIMIT).await.unwrap_or_default();
        listed.iter().any(|(other, state)| *other == name && state == "removing")
    }

    /// Removes a container that is half started or half removed.
    async fn remove_half(&self, entry: &Arc<Project>) {
        match self.remove_container(entry.id).await {
            Ok(()) => {
                tracing::info!(project = %entry.id, "removed a container that was half started or removed");
                let mut view = entry.view();
                (view.doubt, view.made_from, view.container) = (None, None, None);
                drop(view);
                self.records.forget(entry.id);
            }
            Err(error) => {
                self.doubt_again(entry, format!("cannot remove what was half made: {error}"));
            }
        }
    }

    /// Notes what was found running, if no note tells of it.
    fn note_found(&self, entry: &Project, running: &Running) {
        let (record, project) = {
            let view = entry.view();
            let (Some(epoch), Some(slot)) = (view.epoch, view.slot) else { return };
            let run = Run { container: running.container.clone(), pid: running.pid, started: view.started };
            let (limits, made_from) = (view.limits.clone(), view.made_from.clone());
            (Record { epoch, slot, limits, made_from, run: Some(run) }, entry.id)
        };
        if !self.records.tells(project, running.pid)
            && let Err(error) = self.records.write(project, &record)
        {
            tracing::warn!(%project, %error, "it is not noted that it runs");
        }
    }

    /// Whose container it is, by its name.
    pub(super) fn project_of(&self, name: &str) -> Option<ProjectId> {
        name.strip_prefix(&format!("cocalc-{}-", self.instance))?.parse().ok()
    }

    /// What the labels of a container of a project say, if they make sense.
    fn labels(&self, project: ProjectId, container: &Container) -> Option<(Epoch, u32)> {
        let label = |name: &str| container.labels.get(name).map(String::as_str).unwrap_or_default();
        let of: ProjectId = label(LABEL_PROJECT).parse().ok()?;
        (of == project).then_some(())?;
        Some((label(LABEL_EPOCH).parse().ok()?, label(LABEL_SLOT).parse().ok()?))
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_lives_counts_more_than_what_podman_says() {
        use Condition::{HalfMade, Rests, Runs, Unknown};
        for status in ["created", "configured", "initialized", "exited", "unknown"] {
            assert_eq!(condition(status, true, true), HalfMade, "{status:?}");
        }
        for (status, lives, expected) in [
            ("running", true, Runs),
            ("running", false, Rests),
            ("paused", true, Runs),
            ("stopping", true, Runs),
            ("exited", true, Runs),
            ("unknown", true, Runs),
            ("", true, Runs),
            ("exited", false, Rests),
            ("created", false, Rests),
            ("configured", false, Rests),
            ("stopped", false, Rests),
            ("initialized", true, Runs),
            ("created", true, Runs),
            ("initialized", false, HalfMade),
            ("removing", false, HalfMade),
            ("unknown", false, Unknown),
            ("improper", false, Unknown),
            ("", false, Unknown),
        ] {
            assert_eq!(condition(status, lives, false), expected, "{status:?} {lives}");
        }
    }
}
