//! Projects as podman containers.

mod adjust;
mod adopt;
mod builder;
mod cleanup;
mod cli;
mod end;
mod fallback;
mod keepers;
mod lifecycle;
mod limits;
mod look;
mod project;
mod record;
mod seccomp;
mod services;
mod slots;
mod time;

use std::{
    collections::BTreeMap,
    fmt,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use cocalc_core::{
    BoxError,
    ids::{HostId, ProjectId},
    runner::{
        Applied, Capabilities, Error, ExecRequest, Limits, Process, ProjectSpec, Result, Runner, State,
        Stats, Status,
    },
    stream::BoxStream,
};

pub use builder::{BuildError, Images, PodmanBuilder, SLOTS, UID_BASE};
pub use cleanup::{cleanup_instance, leftovers};
pub(crate) use cli::find_program;
pub use limits::Unenforceable;
pub use time::{ParseTimeError, parse_time};

use self::{
    adopt::Adoption,
    builder::Dirs,
    cli::Cli,
    limits::Machine,
    project::{Project, Running},
    record::Records,
};
use crate::{
    agent::{self, AgentError, AgentSocket},
    mounts::ProjectDirs,
    net::{Network, Servers, Sockets},
};

const BACKEND: &str = "podman";
/// How long a connection inside a project may take: the loopback answers at
/// once, unless the listener's queue is full.
const DIAL_LIMIT: Duration = Duration::from_secs(10);

/// Runs projects as podman containers, each with a user namespace, a network
/// namespace and a range of host uids of its own.
///
/// Mounts exist only while a project runs, so a stopped project's volume can
/// be replaced at any time. Operations that were begun go on to their end when
/// their future is dropped; `status` then says `Starting` or `Stopping`.
#[derive(Clone)]
pub struct Podman {
    shared: Arc<Shared>,
}

/// What all projects of a runner share.
pub(crate) struct Shared {
    instance: HostId,
    cli: Cli,
    dirs: Dirs,
    images: Images,
    network: Network,
    sockets: Sockets,
    servers: Arc<Servers>,
    uid_base: u32,
    slots: u32,
    defaults: Limits,
    machine: Machine,
    capabilities: Capabilities,
    records: Records,
    adoption: Adoption,
    look_again: Duration,
    projects: Mutex<BTreeMap<ProjectId, Arc<Project>>>,
}

impl fmt::Debug for Podman {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Podman")
            .field("instance", &self.shared.instance)
            .field("backend", &self.shared.capabilities.backend)
            .finish_non_exhaustive()
    }
}

impl Podman {
    /// Begins to make a runner. `instance` tells the containers of several
    /// hosts on one machine apart; `state_dir` keeps the logs; `images` says
    /// where the files of an image are.
    pub fn builder(instance: HostId, state_dir: impl Into<PathBuf>, images: Images) -> PodmanBuilder {
        PodmanBuilder::new(instance, state_dir.into(), images)
    }

    /// Stops and removes every container, mount, namespace and rule of this
    /// instance; the projects' files stay.
    ///
    /// # Errors
    ///
    /// The first thing that could not be removed; the rest is removed.
    pub async fn cleanup(&self) -> Result<(), BuildError> {
        let runtime_dir = self.shared.dirs.projects.parent().unwrap_or(&self.shared.dirs.projects);
        let done = cleanup_instance(self.shared.instance, Some(runtime_dir)).await;
        self.shared.projects().clear();
        done
    }
}

impl Shared {
    fn projects(&self) -> MutexGuard<'_, BTreeMap<ProjectId, Arc<Project>>> {
        self.projects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The entry of a project, made if it is unknown.
    fn entry(&self, project: ProjectId) -> Arc<Project> {
        self.projects().entry(project).or_insert_with(|| Arc::new(Project::new(project))).clone()
    }

    fn known(&self, project: ProjectId) -> Option<Arc<Project>> {
        self.projects().get(&project).cloned()
    }

    fn running(&self, project: ProjectId) -> Result<(Arc<Project>, Arc<Running>)> {
        let Some(entry) = self.known(project) else {
            self.is_known_stopped(project)?;
            return Err(Error::NotRunning { project });
        };
        let Some(running) = entry.running() else {
            self.certain(&entry)?;
            return Err(Error::NotRunning { project });
        };
        Ok((entry, running))
    }

    fn container(&self, project: ProjectId) -> String {
        format!("cocalc-{}-{project}", self.instance)
    }

    fn mounts(&self, project: ProjectId) -> ProjectDirs {
        ProjectDirs::new(self.dirs.projects.join(project.to_string()))
    }

    fn socket(&self, project: ProjectId) -> std::io::Result<AgentSocket> {
        AgentSocket::new(&self.dirs.sockets, format!("{project}.sock"))
    }

    fn uid(&self, slot: u32) -> u32 {
        self.uid_base + slot * crate::kernel::IDS_PER_PROJECT
    }
}

/// Folds a private error into the public one.
fn backend(operation: &'static str, project: ProjectId, source: impl Into<BoxError>) -> Error {
    Error::Backend { backend: BACKEND, operation, project, source: source.into() }
}

/// Runs work that blocks, off the async threads.
async fn blocking<T: Send + 'static, E: Into<BoxError> + Send + 'static>(
    operation: &'static str,
    project: ProjectId,
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(error)) => Err(backend(operation, project, error)),
        Err(error) => Err(backend(operation, project, error)),
    }
}

#[async_trait]
impl Runner for Podman {
    fn capabilities(&self) -> Capabilities {
        self.shared.capabilities.clone()
    }

    async fn prepare(&self, spec: &ProjectSpec) -> Result<()> {
        self.run_to_end(spec.project, "prepare", {
            let (shared, spec) = (self.shared.clone(), spec.clone());
            async move { shared.prepare(spec).await }
        })
        .await
    }

    async fn start(&self, spec: &ProjectSpec) -> Result<Status> {
        self.run_to_end(spec.project, "start", {
            let (shared, spec) = (self.shared.clone(), spec.clone());
            async move { shared.start(spec).await }
        })
        .await
    }

    fn start_phases(&self, project: ProjectId) -> Vec<(String, u64)> {
        self.shared.known(project).map(|entry| entry.view().phases.clone()).unwrap_or_default()
    }

    async fn stop(&self, project: ProjectId, grace: Duration) -> Result<Status> {
        self.run_to_end(project, "stop", {
            let shared = self.shared.clone();
            async move { shared.stop(project, grace).await }
        })
        .await
    }

    async fn remove(&self, project: ProjectId) -> Result<()> {
        self.run_to_end(project, "remove", {
            let shared = self.shared.clone();
            async move { shared.remove(project).await }
        })
        .await
    }

    async fn status(&self, project: ProjectId) -> Result<Status> {
        self.shared.status(project).await
    }

    async fn list(&self) -> Result<Vec<Status>> {
        let known: Vec<ProjectId> = self.shared.projects().keys().copied().collect();
        let mut list = Vec::with_capacity(known.len());
        for project in known {
            match self.shared.status(project).await {
                Err(Error::Unknown { reason, .. }) => {
                    let epoch = self.shared.known(project).and_then(|entry| entry.view().epoch);
                    let (state, reason) = (State::Unknown, Some(reason));
                    list.push(Status { project, epoch, state, started: None, reason });
                }
                status => list.push(status?),
            }
        }
        Ok(list)
    }

    async fn exec(&self, project: ProjectId, request: ExecRequest) -> Result<Process> {
        let (entry, running) = self.shared.running(project)?;
        let env = entry.env();
        if running.helper_fails() {
            return self.shared.exec_without_helper(project, &running, &request, env.iter());
        }
        let socket = self.shared.socket(project).map_err(|error| backend("reach", project, error))?;
        match agent::exec(&socket, &request, env.iter(), "/").await {
            Ok(process) => Ok(process),
            Err(AgentError::Refused(reason)) => Err(Error::Invalid { project, reason }),
            Err(error) if entry.running().is_none() => {
                tracing::debug!(%error, %project, "it ended while a process was being started");
                Err(Error::NotRunning { project })
            }
            Err(error) => {
                tracing::warn!(%project, error = %cocalc_core::chain(&error), "entering it without its helper");
                running.helper_failed();
                self.shared.exec_without_helper(project, &running, &request, env.iter())
            }
        }
    }

    async fn dial(&self, project: ProjectId, port: u16) -> Result<BoxStream> {
        let (entry, _running) = self.shared.running(project)?;
        let path = self.shared.network.path(project);
        match self.shared.sockets.connect(&path, port, DIAL_LIMIT).await {
            Ok(stream) => Ok(Box::pin(stream)),
            Err(_) if entry.running().is_none() => Err(Error::NotRunning { project }),
            Err(error) => match error.kind() {
                std::io::ErrorKind::ConnectionRefused => Err(Error::Refused { project, port }),
                std::io::ErrorKind::TimedOut => {
                    Err(Error::TimedOut { project, operation: "connecting to a port", limit: DIAL_LIMIT })
                }
                _ => Err(backend("connect to a port of", project, error)),
            },
        }
    }

    async fn stats(&self, project: ProjectId) -> Result<Stats> {
        let (entry, running) = self.shared.running(project)?;
        let slot = entry.view().slot;
        let network = self.shared.network.clone();
        blocking("measure", project, move || {
            let (received_bytes, sent_bytes) =
                slot.and_then(|slot| network.traffic(slot)).unwrap_or_default();
            Ok::<_, std::io::Error>(Stats { received_bytes, sent_bytes, ..running.stats() })
        })
        .await
    }

    async fn set_limits(&self, project: ProjectId, limits: &Limits) -> Result<Applied> {
        self.run_to_end(project, "limit", {
            let (shared, limits) = (self.shared.clone(), limits.clone());
            async move { shared.set_limits(project, limits).await }
        })
        .await
    }

    async fn logs(&self, project: ProjectId, lines: usize) -> Result<String> {
        let path = self.shared.dirs.logs.join(format!("{project}.log"));
        blocking("read the log of", project, move || lifecycle::read_log(&path, lines)).await
    }
}

impl Podman {
    /// Runs an operation in a task of its own, so that a caller who goes away
    /// leaves no half of it.
    async fn run_to_end<T: Send + 'static>(
        &self,
        project: ProjectId,
        operation: &'static str,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        match tokio::spawn(work).await {
            Ok(done) => done,
            Err(error) => Err(backend(operation, project, error)),
        }
    }
}

/// The phase that a status shows while an operation runs.
pub(crate) type Phase = Option<State>;
