//! The parent's side: one worker process per call.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
use cocalc_core::{
    BoxError,
    backups::{
        Backup, BackupSource, Backups, CheckOptions, Checked, Entries, Erased, Error, ProgressSink,
        PruneOptions, Pruned, Restored, Result,
    },
    ids::{ProjectId, TreePath},
};
use serde::{Deserialize, Serialize};

use crate::{
    bounds::Bounds,
    location::Secret,
    protocol::{Event, Failure, FailureKind, Job, Task, Work},
    repositories::{Access, Repositories},
    worker::{BuildError, Lost, Source, Worker},
};

/// Backups in rustic's, which is restic's, repository format.
///
/// Each call runs in a process of its own, `cocalc-backup-worker`: it can be
/// killed, its memory is bounded, it steps back for others on processor and
/// disk, in a control group of its own where there are such, and nothing blocks
/// the async runtime.
#[derive(Clone, Debug)]
pub struct Rustic {
    repositories: Arc<dyn Repositories>,
    worker: Worker,
}

/// Makes a [`Rustic`].
#[derive(Debug)]
pub struct RusticBuilder {
    repositories: Arc<dyn Repositories>,
    worker: Option<PathBuf>,
    bounds: Bounds,
}

impl RusticBuilder {
    /// The worker's program. Default: `cocalc-backup-worker` beside the program
    /// that runs.
    #[must_use]
    pub fn worker(mut self, program: impl Into<PathBuf>) -> Self {
        self.worker = Some(program.into());
        self
    }

    /// What a worker may take.
    #[must_use]
    pub fn bounds(mut self, bounds: Bounds) -> Self {
        self.bounds = bounds;
        self
    }

    /// Checks what can be checked without a repository.
    ///
    /// # Errors
    ///
    /// If the worker's program is not there.
    pub fn build(self) -> Result<Rustic, BuildError> {
        Ok(Rustic { repositories: self.repositories, worker: Worker::new(self.worker, self.bounds)? })
    }
}

/// What a mirror got that it did not have.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Mirrored {
    /// How many files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Rustic {
    /// Backups in `repositories`.
    pub fn builder(repositories: Arc<dyn Repositories>) -> RusticBuilder {
        RusticBuilder { repositories, worker: None, bounds: Bounds::default() }
    }

    /// The same worker and bounds, with other repositories.
    #[must_use]
    pub fn with_repositories(&self, repositories: Arc<dyn Repositories>) -> Self {
        Self { repositories, ..self.clone() }
    }

    /// Copies to the mirror of the project's repository what it does not have
    /// yet. Nothing is ever deleted or changed there, so that it outlives what
    /// happens to the repository; a repair takes from it what is damaged.
    ///
    /// # Errors
    ///
    /// [`Invalid`](Error::Invalid) if the repository has no mirror; otherwise as
    /// the calls of [`Backups`].
    pub async fn mirror(&self, project: ProjectId, progress: ProgressSink<'_>) -> Result<Mirrored> {
        match self.run("mirror backups of", project, Access::Append, Task::Mirror, progress).await? {
            Event::Mirrored(mirrored) => Ok(mirrored),
            _ => Err(unexpected("mirror backups of", project)),
        }
    }

    /// Lets `password` open the repository with stock programs, too: the first
    /// step of a rotation. Keep the new key, then call
    /// [`keep_password`](Self::keep_password).
    ///
    /// # Errors
    ///
    /// As the calls of [`Backups`].
    pub async fn add_password(&self, project: ProjectId, password: &Secret) -> Result<()> {
        let task = Task::AddPassword { password: password.clone() };
        match self.run("set the password of", project, Access::Append, task, &|_| ()).await? {
            Event::PasswordSet => Ok(()),
            _ => Err(unexpected("set the password of", project)),
        }
    }

    /// Lets only the password of the repository's key open it with stock
    /// programs: former passwords, and the escrow files that hold them, open
    /// nothing any more. May be repeated.
    ///
    /// # Errors
    ///
    /// As the calls of [`Backups`].
    pub async fn keep_password(&self, project: ProjectId) -> Result<()> {
        match self.run("set the password of", project, Access::Delete, Task::KeepPassword, &|_| ()).await? {
            Event::PasswordSet => Ok(()),
            _ => Err(unexpected("set the password of", project)),
        }
    }

    /// Runs one job to its outcome. The worker is killed when this is dropped.
    #[tracing::instrument(name = "backup.call", skip_all, fields(%project, operation))]
    async fn run(
        &self,
        operation: &'static str,
        project: ProjectId,
        access: Access,
        task: Task,
        progress: ProgressSink<'_>,
    ) -> Result<Event> {
        let failed = |source: BoxError| Error::Backend { operation, project, source };
        let repository = self.repositories.repository(project, access).await.map_err(failed)?;
        let job = Box::new(Job { project, repository, access, task });
        let source = Source { repositories: &*self.repositories, project, access };
        match self.worker.run(Work::Job(job), Some(source), progress).await {
            Ok(Event::Failed(failure)) => Err(public(operation, project, failure)),
            Ok(event) => Ok(event),
            Err(Lost::Ended(error)) => Err(failed(error)),
            Err(Lost::Late(within)) => Err(Error::Unavailable {
                project,
                source: format!("it took longer than {} s", within.as_secs()).into(),
            }),
        }
    }
}

fn public(operation: &'static str, project: ProjectId, failure: Failure) -> Error {
    let Failure { kind, words } = failure;
    let said = words.join("; ");
    match kind {
        FailureKind::NotFound => Error::NotFound { project, what: said },
        FailureKind::Invalid => Error::Invalid { project, reason: said },
        FailureKind::WrongKey => Error::WrongKey { project, source: said.into() },
        FailureKind::Denied => Error::Denied { project, source: said.into() },
        FailureKind::Full => Error::Full { project, source: said.into() },
        FailureKind::Unavailable => Error::Unavailable { project, source: said.into() },
        FailureKind::Damaged => Error::Damaged { project, source: said.into() },
        FailureKind::Incomplete => Error::Incomplete { project, what: words },
        FailureKind::Other => Error::Backend { operation, project, source: said.into() },
    }
}

/// An outcome of another job than was given.
fn unexpected(operation: &'static str, project: ProjectId) -> Error {
    Error::Backend { operation, project, source: "the worker answered something else".into() }
}

#[async_trait]
impl Backups for Rustic {
    async fn back_up(&self, source: &BackupSource, progress: ProgressSink<'_>) -> Result<Backup> {
        let project = source.project;
        match self.run("back up", project, Access::Append, Task::BackUp(source.clone()), progress).await? {
            Event::BackedUp(backup) => Ok(backup),
            _ => Err(unexpected("back up", project)),
        }
    }

    async fn list(&self, project: ProjectId) -> Result<Vec<Backup>> {
        match self.run("list backups of", project, Access::Read, Task::List, &|_| ()).await? {
            Event::Listed(backups) => Ok(backups),
            _ => Err(unexpected("list backups of", project)),
        }
    }

    async fn ls(
        &self,
        project: ProjectId,
        backup: &str,
        directory: &TreePath,
        after: Option<&TreePath>,
        max: usize,
    ) -> Result<Entries> {
        let task =
            Task::Ls { backup: backup.into(), directory: directory.clone(), after: after.cloned(), max };
        match self.run("browse a backup of", project, Access::Read, task, &|_| ()).await? {
            Event::Entries(entries) => Ok(entries),
            _ => Err(unexpected("browse a backup of", project)),
        }
    }

    async fn find(&self, project: ProjectId, backup: &str, text: &str, max: usize) -> Result<Entries> {
        let task = Task::Find { backup: backup.into(), text: text.into(), max };
        match self.run("search a backup of", project, Access::Read, task, &|_| ()).await? {
            Event::Entries(entries) => Ok(entries),
            _ => Err(unexpected("search a backup of", project)),
        }
    }

    async fn restore(
        &self,
        project: ProjectId,
        backup: &str,
        path: &TreePath,
        target: &Path,
        progress: ProgressSink<'_>,
    ) -> Result<Restored> {
        let task = Task::Restore { backup: backup.into(), path: path.clone(), target: target.into() };
        match self.run("restore", project, Access::Read, task, progress).await? {
            Event::Restored(restored) => Ok(restored),
            _ => Err(unexpected("restore", project)),
        }
    }

    async fn forget(&self, project: ProjectId, backups: &[String]) -> Result<()> {
        let task = Task::Forget { backups: backups.to_vec() };
        match self.run("forget backups of", project, Access::Delete, task, &|_| ()).await? {
            Event::Forgotten => Ok(()),
            _ => Err(unexpected("forget backups of", project)),
        }
    }

    async fn prune(&self, project: ProjectId, options: &PruneOptions) -> Result<Pruned> {
        match self.run("prune", project, Access::Delete, Task::Prune(*options), &|_| ()).await? {
            Event::Pruned(pruned) => Ok(pruned),
            _ => Err(unexpected("prune", project)),
        }
    }

    async fn check(&self, project: ProjectId, options: &CheckOptions) -> Result<Checked> {
        let access = if options.repair { Access::Delete } else { Access::Read };
        match self.run("check", project, access, Task::Check(*options), &|_| ()).await? {
            Event::Checked(checked) => Ok(checked),
            _ => Err(unexpected("check", project)),
        }
    }

    async fn erase(&self, project: ProjectId) -> Result<Erased> {
        match self.run("erase", project, Access::Delete, Task::Erase, &|_| ()).await? {
            Event::Erased(erased) => {
                let gone = self.repositories.erased(project).await;
                gone.map_err(|source| Error::Backend { operation: "erase the key of", project, source })?;
                Ok(erased)
            }
            _ => Err(unexpected("erase", project)),
        }
    }
}
