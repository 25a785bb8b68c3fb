//! Supervises the apps that projects declare in `~/.cocalc/apps.toml`.
//!
//! The file is read from the volume and is a tenant's: bounded, beneath the
//! project's home, nothing in it believed. Apps run inside as services of the
//! helper, so they outlive this daemon, which finds them again by their names.

mod manifest;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use cocalc_core::{
    apps::{Action, AppName, AppStatus, ServiceOutput, Services, Supervisor},
    clock::Clock,
    ids::{ProjectId, Timestamp},
    runner::{Command, ExecRequest, Runner, State},
    storage::Storage,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// How often apps are looked at.
const TICK: Duration = Duration::from_secs(1);
/// How often the file is.
const REREAD: Duration = Duration::from_secs(3);
/// How long looking at one project may take in a round.
const ROUND_LIMIT: Duration = Duration::from_secs(40);
/// How long an app that is no longer wanted may take to end.
const GRACE: Duration = Duration::from_secs(10);
/// How long an app may take to answer.
const PROBE_LIMIT: Duration = Duration::from_secs(3);

/// Watches the apps. Clones share it.
#[derive(Clone)]
pub struct Apps(Arc<Inner>);

struct Inner {
    clock: Arc<dyn Clock>,
    runner: Arc<dyn Runner>,
    services: Arc<dyn Services>,
    storage: Arc<dyn Storage>,
    projects: Mutex<BTreeMap<ProjectId, Watched>>,
    /// Those that are being looked at.
    busy: Mutex<BTreeSet<ProjectId>>,
}

impl fmt::Debug for Apps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Apps").finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Watched {
    started: Option<Timestamp>,
    supervisor: Supervisor,
    stamp: Option<manifest::Stamp>,
    complaint: Option<String>,
    read: Option<Duration>,
    /// Whether anything was ever declared in this run.
    any: bool,
}

impl Apps {
    pub(crate) fn new(
        clock: Arc<dyn Clock>,
        runner: Arc<dyn Runner>,
        services: Arc<dyn Services>,
        storage: Arc<dyn Storage>,
    ) -> Self {
        let (projects, busy) = (Mutex::default(), Mutex::default());
        Self(Arc::new(Inner { clock, runner, services, storage, projects, busy }))
    }

    fn projects(&self) -> MutexGuard<'_, BTreeMap<ProjectId, Watched>> {
        self.0.projects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn busy(&self) -> MutexGuard<'_, BTreeSet<ProjectId>> {
        self.0.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The apps of a project that runs, and what is wrong with its file.
    pub(crate) fn list(&self, project: ProjectId) -> (Vec<AppStatus>, Option<String>) {
        let now = self.0.clock.boot();
        match self.projects().get(&project) {
            Some(one) => (one.supervisor.statuses(now), one.complaint.clone()),
            None => (Vec::new(), None),
        }
    }

    /// What an app has printed from byte `offset` on; `None` if there is no such app.
    pub(crate) async fn output(
        &self,
        project: ProjectId,
        name: &AppName,
        offset: u64,
    ) -> cocalc_core::runner::Result<Option<ServiceOutput>> {
        let service = self.projects().get(&project).and_then(|one| one.supervisor.service(name));
        let Some(service) = service else { return Ok(None) };
        self.0.services.service_output(project, &service, offset).await.map(Some)
    }

    /// Ends an app, so that it is started anew; whether there is such an app.
    pub(crate) async fn restart(
        &self,
        project: ProjectId,
        name: &AppName,
    ) -> cocalc_core::runner::Result<bool> {
        let service = self.projects().get(&project).and_then(|one| one.supervisor.service(name));
        let Some(service) = service else { return Ok(false) };
        self.0.services.stop_service(project, &service, GRACE).await?;
        if let Some(one) = self.projects().get_mut(&project) {
            one.supervisor.retry(name);
        }
        Ok(true)
    }

    /// Watches until the future is dropped.
    pub(crate) async fn run(self) {
        let mut rounds = tokio::task::JoinSet::new();
        loop {
            match self.0.runner.list().await {
                Ok(all) => {
                    let running: BTreeMap<ProjectId, Option<Timestamp>> = all
                        .into_iter()
                        .filter(|status| status.state == State::Running)
                        .map(|status| (status.project, status.started))
                        .collect();
                    self.projects().retain(|project, one| running.get(project) == Some(&one.started));
                    for (project, started) in running {
                        // A project that does not answer holds up nobody else.
                        if self.busy().insert(project) {
                            let apps = self.clone();
                            rounds.spawn(async move {
                                let round = apps.round(project, started);
                                if tokio::time::timeout(ROUND_LIMIT, round).await.is_err() {
                                    tracing::info!(%project, "its apps could not be looked at in time");
                                }
                                apps.busy().remove(&project);
                            });
                        }
                    }
                }
                Err(error) => {
                    tracing::warn!(error = %cocalc_core::chain(&error), "cannot tell what runs");
                }
            }
            tokio::time::sleep(TICK).await;
            while rounds.try_join_next().is_some() {}
        }
    }

    async fn round(&self, project: ProjectId, started: Option<Timestamp>) {
        self.reread(project, started).await;
        let watch = self.projects().get(&project).is_some_and(|one| one.any);
        if !watch {
            return;
        }
        let services = &self.0.services;
        let list = match services.services(project, 0, Duration::ZERO).await {
            Ok(list) => list,
            Err(error) => {
                tracing::debug!(%project, error = %cocalc_core::chain(&error), "its apps are not known");
                return;
            }
        };
        let now = self.0.clock.boot();
        let actions = match self.projects().get_mut(&project) {
            Some(one) => one.supervisor.step(&list.services, now),
            None => return,
        };
        for action in actions {
            let done = match action {
                Action::Start { service, name, command } => {
                    tracing::info!(%project, app = %name, "starting an app");
                    let request = ExecRequest { command: Command::Line(command), ..ExecRequest::default() };
                    services.start_service(project, &service, &request).await
                }
                Action::Stop { service } => services.stop_service(project, &service, GRACE).await,
                Action::Probe { name, port, path } => {
                    let ready = self.probe(project, port, path.as_deref()).await;
                    if let Some(one) = self.projects().get_mut(&project) {
                        one.supervisor.probed(&name, ready);
                    }
                    Ok(())
                }
            };
            if let Err(error) = done {
                tracing::info!(%project, error = %cocalc_core::chain(&error), "an app could not be seen to");
            }
        }
    }

    /// Reads the file, if it has changed.
    async fn reread(&self, project: ProjectId, started: Option<Timestamp>) {
        let now = self.0.clock.boot();
        let before = {
            let mut projects = self.projects();
            let one = projects.entry(project).or_insert_with(|| Watched {
                started,
                supervisor: Supervisor::default(),
                stamp: None,
                complaint: None,
                read: None,
                any: false,
            });
            if one.read.is_some_and(|read| now.saturating_sub(read) < REREAD) {
                return;
            }
            one.read = Some(now);
            one.stamp
        };
        let Ok(volume) = self.0.storage.volume(project).await else { return };
        let Some(path) = volume.path else { return };
        let read = tokio::task::spawn_blocking(move || manifest::read(&path, before)).await;
        let Ok(read) = read else { return };
        let mut projects = self.projects();
        let Some(one) = projects.get_mut(&project) else { return };
        match read {
            manifest::Read::Unchanged => {}
            manifest::Read::Missing => {
                one.stamp = None;
                one.complaint = None;
                one.supervisor.declare(BTreeMap::new());
            }
            manifest::Read::Found(stamp, parsed) => {
                one.stamp = Some(stamp);
                match parsed {
                    Ok(manifest) => {
                        one.any |= !manifest.apps.is_empty();
                        one.complaint = None;
                        one.supervisor.declare(manifest.apps);
                    }
                    // What ran goes on: a slip of the pen must not end it.
                    Err(complaint) => one.complaint = Some(complaint),
                }
            }
        }
    }

    /// Whether an app answers on its port, and with its path if it has one.
    async fn probe(&self, project: ProjectId, port: u16, path: Option<&str>) -> bool {
        let probe = async {
            let mut stream = self.0.runner.dial(project, port).await.ok()?;
            let Some(path) = path else { return Some(true) };
            let request = format!("GET {path} HTTP/1.0\r\nHost: localhost\r\nConnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await.ok()?;
            let mut head = [0; 12];
            stream.read_exact(&mut head).await.ok()?;
            // `HTTP/1.1 200`
            Some(head.starts_with(b"HTTP/1.") && matches!(head[9], b'2' | b'3'))
        };
        matches!(tokio::time::timeout(PROBE_LIMIT, probe).await, Ok(Some(true)))
    }
}
