//! Long-running operations: each is a fence in the database and a task here.
//!
//! The task may end anywhere, with the process; the next process finds the
//! operation in the database and does the step again. Commands to hosts are
//! idempotent, and name the epoch that they are for.

mod backing_up;
mod job;
mod leftovers;
mod moving;
mod restoring;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use cocalc_ids::{AccountId, OperationId, ProjectId};
use cocalc_sqlite::master::{self as store, Job, NewProject, Operation, Project, ProjectState};
use futures_util::FutureExt;
use serde_json::Value;
use tokio::sync::{broadcast, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub(crate) use self::{
    job::{CHECKING, OTHER_HOST, QUEUED, code},
    moving::NewMoveError,
    restoring::restores_from,
};
use crate::shared::Shared;

/// The running operations of this process.
#[derive(Debug)]
pub(crate) struct Operations {
    changed: broadcast::Sender<OperationId>,
    cancels: Mutex<BTreeMap<OperationId, watch::Sender<bool>>>,
    /// Moves that are driven now.
    streams: moving::Streams,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Operations {
    pub(crate) fn new() -> Self {
        Self {
            changed: broadcast::Sender::new(256),
            cancels: Mutex::default(),
            streams: moving::Streams::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        }
    }

    /// Hears which operations changed, from now on. Who lags looks again.
    pub(crate) fn changes(&self) -> broadcast::Receiver<OperationId> {
        self.changed.subscribe()
    }

    fn notify(&self, id: OperationId) {
        // Nobody listening is the usual case.
        let _ = self.changed.send(id);
    }

    /// Stops all tasks where they are, and waits until they have. Their
    /// operations go on with the next process.
    pub(crate) async fn stop(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Stops all tasks where they are, without waiting.
    pub(crate) fn abandon(&self) {
        self.stop.cancel();
    }

    /// How many operations go on in this process.
    pub(crate) fn running(&self) -> usize {
        self.cancels().len()
    }

    fn cancels(&self) -> std::sync::MutexGuard<'_, BTreeMap<OperationId, watch::Sender<bool>>> {
        self.cancels.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Does an operation's work from its stored state to its end.
async fn work(shared: &Arc<Shared>, id: OperationId, cancelled: watch::Receiver<bool>) {
    let operation = loop {
        match shared.db(move |store| store.operation(id)).await {
            Ok(operation) => break operation,
            Err(error) => {
                tracing::error!(operation = %id, error = %cocalc_core::chain(&error), "cannot read an operation");
                tokio::time::sleep(PAUSE_MIN).await;
            }
        }
    };
    if operation.state != store::OperationState::Running {
        return;
    }
    match operation.job {
        Job::Move { .. } => moving::run(shared, &operation, cancelled).await,
        _ if operation.job.is_beside() => backing_up::run(shared, &operation, cancelled).await,
        _ => job::run(shared, &operation, cancelled).await,
    }
}

/// How long to wait after something that should not have failed: at first, and
/// at most.
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// Does `work` again, as the next process would, if it panics: what it began
/// must come to an end, because it holds a project.
async fn despite_panics<F: Future<Output = ()>>(id: OperationId, mut work: impl FnMut() -> F) {
    let mut pause = PAUSE_MIN;
    while std::panic::AssertUnwindSafe(work()).catch_unwind().await.is_err() {
        tracing::error!(operation = %id, "an operation panicked, and goes on from its stored state");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

impl Shared {
    /// Makes a project, and begins to create it on its host, as `job` says.
    #[expect(clippy::too_many_arguments, reason = "each is a column of the new row")]
    pub(crate) async fn create_project(
        self: &Arc<Self>,
        id: ProjectId,
        operation: OperationId,
        name: String,
        owner: AccountId,
        config: cocalc_core::control::ProjectConfig,
        host: cocalc_ids::HostId,
        job: Job,
    ) -> store::Result<Project> {
        let now = self.now();
        let project = self
            .db(move |store| {
                let (name, config, job) = (&name, &config, &job);
                let new = NewProject { id, name, owner, config, host, operation, job };
                store.create_project(&new, now)
            })
            .await?;
        self.run_if_new(operation).await?;
        Ok(project)
    }

    /// Begins an operation on a project, in one of the `allowed` states.
    pub(crate) async fn begin(
        self: &Arc<Self>,
        id: OperationId,
        project: ProjectId,
        account: AccountId,
        job: Job,
        allowed: &[ProjectState],
    ) -> store::Result<Operation> {
        let (now, allowed) = (self.now(), allowed.to_vec());
        let operation = self.db(move |store| store.begin(id, project, account, &job, &allowed, now)).await?;
        self.run_if_new(id).await?;
        Ok(operation)
    }

    /// Begins an operation that fences nothing, on a project in any state.
    pub(crate) async fn begin_beside(
        self: &Arc<Self>,
        id: OperationId,
        project: ProjectId,
        account: AccountId,
        job: Job,
    ) -> store::Result<Operation> {
        let now = self.now();
        let operation = self.db(move |store| store.begin_beside(id, project, account, &job, now)).await?;
        self.run_if_new(id).await?;
        Ok(operation)
    }

    /// Goes on with what an earlier process began.
    pub(crate) async fn resume(self: &Arc<Self>) -> store::Result<()> {
        for operation in self.db(|store| store.operations_running()).await? {
            tracing::info!(operation = %operation.id, project = %operation.project, kind = operation.job.kind(),
                "going on with an operation");
            self.run(operation);
        }
        Ok(())
    }

    async fn run_if_new(self: &Arc<Self>, id: OperationId) -> store::Result<()> {
        if self.operations.cancels().contains_key(&id) {
            return Ok(());
        }
        let operation = self.db(move |store| store.operation(id)).await?;
        if operation.state == store::OperationState::Running {
            self.run(operation);
        }
        Ok(())
    }

    /// Runs an operation to its end, unless it runs already.
    fn run(self: &Arc<Self>, operation: Operation) {
        let cancelled = {
            let mut cancels = self.operations.cancels();
            if cancels.contains_key(&operation.id) {
                return;
            }
            let sender = watch::Sender::new(operation.cancel);
            let receiver = sender.subscribe();
            cancels.insert(operation.id, sender);
            receiver
        };
        let (shared, id) = (self.clone(), operation.id);
        drop(operation);
        let stop = self.operations.stop.clone();
        self.operations.tasks.spawn(async move {
            let work = despite_panics(id, || work(&shared, id, cancelled.clone()));
            let ended = stop.run_until_cancelled(work).await;
            shared.operations.cancels().remove(&id);
            if ended.is_some() {
                shared.operations.notify(id);
            }
        });
    }

    /// Asks an operation to cancel. Only moves, backups and restores can be: the others
    /// are one step on the host, which would have to be waited for anyway.
    pub(crate) async fn cancel(&self, id: OperationId) -> store::Result<Operation> {
        let now = self.now();
        let operation = self.db(move |store| store.cancel(id, now)).await?;
        if let Some(cancel) = self.operations.cancels().get(&id) {
            cancel.send_replace(true);
        }
        self.operations.notify(id);
        Ok(operation)
    }

    /// Records what an operation is doing. Losing such a record harms nobody.
    pub(crate) async fn note(&self, id: OperationId, phase: &str, progress: Value) {
        let (now, text) = (self.now(), phase.to_owned());
        if let Err(error) = self.db(move |store| store.progress(id, &text, &progress, now)).await {
            tracing::warn!(operation = %id, error = %cocalc_core::chain(&error), "cannot record progress");
        }
        self.operations.notify(id);
    }

    /// Ends an operation, for as long as it takes to record it: a fence that
    /// is not lifted would hold its project for ever.
    async fn finish(&self, id: OperationId, ended: store::Ended) {
        let mut pause = Duration::from_millis(100);
        loop {
            let (now, ended) = (self.now(), ended.clone());
            match self.db(move |store| store.end(id, &ended, now)).await {
                Ok(operation) => {
                    tracing::info!(operation = %id, project = %operation.project, kind = operation.job.kind(),
                        state = operation.state.as_str(), "an operation ended");
                    return self.operations.notify(id);
                }
                Err(error) => {
                    tracing::error!(operation = %id, error = %cocalc_core::chain(&error), "cannot end an operation");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(10));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_panics_is_done_again() {
        let mut tries = 0;
        let work = despite_panics(OperationId::random(), || {
            tries += 1;
            let bad = tries < 3;
            async move {
                tokio::task::yield_now().await;
                assert!(!bad, "on purpose");
            }
        });
        work.await;
        assert_eq!(tries, 3);
    }
}
