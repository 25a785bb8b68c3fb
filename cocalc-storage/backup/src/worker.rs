//! One worker process: started, told its work, heard to the end.

use std::{
    ffi::OsString,
    io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use cocalc_core::{BoxError, backups::ProgressSink, ids::ProjectId};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    process::{Child, ChildStderr, Command},
};
use zeroize::Zeroizing;

use crate::{
    bounds::Bounds,
    group::{self, Group},
    protocol::{Event, LINE_BYTES_MAX, Order, Renewed, Work},
    repositories::{Access, Repositories},
};

/// How much of what a worker says for people is kept.
const WORDS_MAX: usize = 2000;

/// How long a worker may take to end after its outcome.
const END_MAX: Duration = Duration::from_secs(10);

/// The worker's program, and what each of its processes may take.
#[derive(Clone, Debug)]
pub(crate) struct Worker {
    program: PathBuf,
    bounds: Bounds,
}

/// The worker's program is not there.
#[derive(Debug, thiserror::Error)]
#[error("the backup worker {} is not there", program.display())]
pub struct BuildError {
    program: PathBuf,
    source: io::Error,
}

/// A worker came to no outcome.
#[derive(Debug)]
pub(crate) enum Lost {
    /// It took too long, and is no more.
    Late(Duration),
    /// It could not be started, or ended too early.
    Ended(BoxError),
}

/// Who is asked when the credentials of a job run out.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a> {
    pub(crate) repositories: &'a dyn Repositories,
    pub(crate) project: ProjectId,
    pub(crate) access: Access,
}

impl Source<'_> {
    async fn renewed(self) -> Renewed {
        match self.repositories.repository(self.project, self.access).await {
            Ok(repository) => Renewed { location: Some(repository.location), mirror: repository.mirror },
            Err(error) => {
                tracing::warn!(project = %self.project, "no other credentials: {error}");
                Renewed { location: None, mirror: None }
            }
        }
    }
}

/// A process and its group. Dropping it kills the one, then removes the other.
struct Running {
    child: Option<Child>,
    group: Option<Group>,
}

impl Drop for Running {
    fn drop(&mut self) {
        let (Some(mut child), group) = (self.child.take(), self.group.take()) else { return };
        let _ = child.start_kill();
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                let _ = child.wait().await;
                drop(group);
            });
        }
    }
}

impl Worker {
    /// Takes `program`, or the one beside the program that runs.
    pub(crate) fn new(program: Option<PathBuf>, bounds: Bounds) -> Result<Self, BuildError> {
        let program = match program {
            Some(program) => program,
            None => std::env::current_exe()
                .map_err(|source| BuildError { program: PathBuf::from("cocalc-backup-worker"), source })?
                .with_file_name("cocalc-backup-worker"),
        };
        if let Err(source) = std::fs::metadata(&program) {
            return Err(BuildError { program, source });
        }
        if let Some(parent) = &bounds.control_group {
            group::sweep(Path::new(group::MOUNT), parent);
        }
        Ok(Self { program, bounds })
    }

    /// Runs one process to its outcome. It is killed when this is dropped.
    pub(crate) async fn run(
        &self,
        work: Work,
        source: Option<Source<'_>>,
        progress: ProgressSink<'_>,
    ) -> Result<Event, Lost> {
        let ended = |error: BoxError| Lost::Ended(error);
        let group = self
            .bounds
            .control_group
            .as_ref()
            .and_then(|parent| Group::make(Path::new(group::MOUNT), parent, &self.bounds));
        let groups = group.as_ref().map(|group| group.directories().to_vec()).unwrap_or_default();
        let order = Order { bounds: self.bounds.clone(), groups, work };
        let mut line = Zeroizing::new(serde_json::to_vec(&order).map_err(|error| ended(error.into()))?);
        line.push(b'\n');

        let child = self.spawn().map_err(|error| ended(error.into()))?;
        let mut running = Running { child: Some(child), group };
        let Some(worker) = &mut running.child else { return Err(ended("no process".into())) };
        let words = worker.stderr.take().map(|stderr| tokio::spawn(last_words(stderr)));
        let within = self.bounds.time_max;
        let outcome = tokio::time::timeout(within, converse(worker, &line, source, progress)).await;
        // Standard input ends with the worker's last use of it.
        drop(worker.stdin.take());
        let status = match tokio::time::timeout(END_MAX, worker.wait()).await {
            Ok(Ok(status)) => status.to_string(),
            _ => {
                let _ = worker.kill().await;
                "it did not end by itself".to_owned()
            }
        };
        match outcome {
            Ok(Ok(event)) => Ok(event),
            Ok(Err(error)) => {
                let words = match words {
                    Some(words) => words.await.unwrap_or_default(),
                    None => String::new(),
                };
                let said = format!("the worker ended without an outcome ({status}): {error}: {words}");
                Err(ended(said.into()))
            }
            Err(_) => Err(Lost::Late(within)),
        }
    }

    fn spawn(&self) -> io::Result<Child> {
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
        arguments.push(self.program.clone().into());
        Command::new("prlimit")
            .args(arguments)
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C.UTF-8")
            .current_dir("/")
            // What is sent to the daemon's group, as a terminal does, is for the
            // daemon to answer; the worker ends with its standard input.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
    }
}

/// Tells the worker its work and hears it to the end.
async fn converse(
    worker: &mut Child,
    line: &[u8],
    source: Option<Source<'_>>,
    progress: ProgressSink<'_>,
) -> Result<Event, BoxError> {
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
            Event::Renew => {
                let renewed = match source {
                    Some(source) => source.renewed().await,
                    None => Renewed { location: None, mirror: None },
                };
                let mut answer = Zeroizing::new(serde_json::to_vec(&renewed)?);
                answer.push(b'\n');
                stdin.write_all(&answer).await?;
                stdin.flush().await?;
            }
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
