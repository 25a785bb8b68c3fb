//! The parent's side: one worker process per call.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
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
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    process::{Child, ChildStderr, Command},
};
use zeroize::Zeroizing;

use crate::{
    bounds::Bounds,
    protocol::{Event, Failure, FailureKind, Job, LINE_BYTES_MAX, Task},
    repositories::{Access, Repositories},
};

/// How much of what a worker says for people is kept.
const WORDS_MAX: usize = 2000;

/// How long a worker may take to end after its outcome.
const END_MAX: Duration = Duration::from_secs(10);

/// Backups in rustic's, which is restic's, repository format.
///
/// Each call runs in a process of its own, `cocalc-backup-worker`: it can be
/// killed, its memory is bounded, it steps back for others on processor and
/// disk, and nothing blocks the async runtime.
#[derive(Clone, Debug)]
pub struct Rustic {
    repositories: Arc<dyn Repositories>,
    worker: PathBuf,
    bounds: Bounds,
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
        let worker = match self.worker {
            Some(worker) => worker,
            None => std::env::current_exe()
                .map_err(|source| BuildError { program: PathBuf::from("cocalc-backup-worker"), source })?
                .with_file_name("cocalc-backup-worker"),
        };
        if let Err(source) = std::fs::metadata(&worker) {
            return Err(BuildError { program: worker, source });
        }
        Ok(Rustic { repositories: self.repositories, worker, bounds: self.bounds })
    }
}

/// The worker's program is not there.
#[derive(Debug, thiserror::Error)]
#[error("the backup worker {} is not there", program.display())]
pub struct BuildError {
    program: PathBuf,
    source: std::io::Error,
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
        let job = Job { project, repository, bounds: self.bounds.clone(), task };
        let mut line = Zeroizing::new(serde_json::to_vec(&job).map_err(|error| failed(error.into()))?);
        line.push(b'\n');

        let mut worker = self.spawn().map_err(|error| failed(error.into()))?;
        let words = worker.stderr.take().map(|stderr| tokio::spawn(last_words(stderr)));
        let within = self.bounds.time_max;
        let outcome = tokio::time::timeout(within, converse(&mut worker, &line, progress)).await;
        // Standard input ends with the worker's last use of it.
        drop(worker.stdin.take());
        let ended = match tokio::time::timeout(END_MAX, worker.wait()).await {
            Ok(Ok(status)) => status.to_string(),
            _ => {
                let _ = worker.kill().await;
                "it did not end by itself".to_owned()
            }
        };
        match outcome {
            Ok(Ok(Event::Failed(failure))) => Err(public(operation, project, failure)),
            Ok(Ok(event)) => Ok(event),
            Ok(Err(error)) => {
                let words = match words {
                    Some(words) => words.await.unwrap_or_default(),
                    None => String::new(),
                };
                Err(failed(format!("the worker ended without an outcome ({ended}): {error}: {words}").into()))
            }
            Err(_) => Err(Error::Unavailable {
                project,
                source: format!("it took longer than {} s", within.as_secs()).into(),
            }),
        }
    }

    fn spawn(&self) -> std::io::Result<Child> {
        // util-linux and coreutils set what a process has for its life; each
        // becomes the next, so a kill reaches the worker. Memory for data is
        // bounded before the first line of it runs.
        let mut arguments: Vec<OsString> = vec![
            format!("--data={}", self.bounds.memory_bytes_max).into(),
            "nice".into(),
            "-n".into(),
            self.bounds.nice.clamp(0, 19).to_string().into(),
            "ionice".into(),
            "-c2".into(),
            "-n7".into(),
        ];
        arguments.push(self.worker.clone().into());
        Command::new("prlimit")
            .args(arguments)
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C.UTF-8")
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
    }
}

/// Tells the worker its job and hears it to the end.
async fn converse(worker: &mut Child, line: &[u8], progress: ProgressSink<'_>) -> Result<Event, BoxError> {
    let stdin = worker.stdin.as_mut().ok_or("no standard input")?;
    stdin.write_all(line).await?;
    stdin.flush().await?;
    let stdout = worker.stdout.take().ok_or("no standard output")?;
    let mut lines = BufReader::new(stdout);
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = (&mut lines).take(LINE_BYTES_MAX as u64).read_until(b'\n', &mut line).await?;
        if read == 0 {
            return Err("no outcome".into());
        }
        match serde_json::from_slice(&line)? {
            Event::Progress(state) => progress(state),
            event => return Ok(event),
        }
    }
}

/// Reads what a worker says for people, and keeps the end of it.
async fn last_words(mut stderr: ChildStderr) -> String {
    let mut kept = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(read @ 1..) = stderr.read(&mut buffer).await {
        kept.extend_from_slice(&buffer[..read]);
        let surplus = kept.len().saturating_sub(WORDS_MAX);
        kept.drain(..surplus);
    }
    String::from_utf8_lossy(&kept).trim().to_owned()
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
        let access = if options.repair_index { Access::Delete } else { Access::Read };
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
