//! Projects as processes of the user who runs the daemon: no container, and what
//! the kernel has for keeping such processes apart.

mod confine;
mod services;
mod tree;

pub(crate) use confine::{available as landlock, scopes as landlock_scopes};

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs,
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use cocalc_core::{
    BoxError,
    ids::{Epoch, ProjectId, Timestamp},
    runner::{
        Applied, Capabilities, Error, ExecRequest, LimitKind, Limits, Process, ProjectSpec, Result, Runner,
        State, Stats, Status,
    },
    stream::BoxStream,
};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;

use crate::{
    Unenforceable,
    agent::{self, AgentError, AgentSocket, HELPER, Key},
    kernel, mounts,
    pidfd::PidFd,
};

const BACKEND: &str = "process";
const DIAL_LIMIT: Duration = Duration::from_secs(10);
/// How long killed processes may take to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// Names the supervisor in the environment of every process of a project, so
/// that those which lost it are found too.
const MARK: &str = "COCALC_SUPERVISOR";

/// Runs projects as ordinary processes of this user, each project below a
/// supervisor of its own, for developing where containers can't be had.
///
/// One that [confines](Self::open_confined) them takes their capabilities, and
/// where the kernel has Landlock, a project writes its own home alone, reads the
/// system's directories, and neither signals nor traces the processes of others. It
/// does not keep one from sockets that have a path; to those of other projects'
/// supervisors one can connect, but they listen only to who knows the key that this
/// runner gave them. It is still this user, on this machine's
/// network, and of the limits only that of open files is enforced. The rest of
/// the contract it keeps: one instance, a true status, processes that end with
/// their project, and ports that are only dialed if a process of the project
/// listens there.
#[derive(Clone, Debug)]
pub struct ProcessRunner {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state_dir: PathBuf,
    helper: PathBuf,
    unenforceable: Unenforceable,
    confined: bool,
    landlock: bool,
    projects: Mutex<BTreeMap<ProjectId, Arc<Project>>>,
}

#[derive(Debug, Default)]
struct Project {
    operation: tokio::sync::Mutex<()>,
    view: Mutex<View>,
}

#[derive(Debug, Default)]
struct View {
    phase: Option<State>,
    record: Option<Record>,
    supervisor: Option<Arc<Supervisor>>,
    stopped: bool,
}

/// What survives a restart of the daemon.
#[derive(Clone, Debug, Deserialize, Serialize)]
struct Record {
    epoch: Epoch,
    pid: i32,
    /// When the kernel started that process: with the boot it tells the
    /// process from a later one of the same number.
    ticks: u64,
    boot: String,
    started: Timestamp,
    home: PathBuf,
    env: BTreeMap<String, String>,
    /// What its supervisor wants to hear; `None` of one that an earlier version
    /// started.
    #[serde(default)]
    key: Option<Key>,
}

#[derive(Debug)]
struct Supervisor {
    pid: i32,
    process: PidFd,
    /// Reaps it when it is our child.
    _child: Option<tokio::process::Child>,
}

impl ProcessRunner {
    /// Opens a runner that keeps its records in `state_dir`, and finds the
    /// projects that are running already. `unenforceable` says what to do with
    /// a project that asks for limits: all but that of open files can't be kept.
    ///
    /// # Errors
    ///
    /// A directory that can't be made or written.
    pub async fn open(state_dir: impl Into<PathBuf>, unenforceable: Unenforceable) -> io::Result<Self> {
        Self::open_as(state_dir.into(), unenforceable, false).await
    }

    /// The same, with projects that have no capabilities and, where the kernel has
    /// Landlock, are kept to their homes and the system's directories. Their
    /// homes must be writable by this user without a privilege.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub async fn open_confined(
        state_dir: impl Into<PathBuf>,
        unenforceable: Unenforceable,
    ) -> io::Result<Self> {
        Self::open_as(state_dir.into(), unenforceable, true).await
    }

    async fn open_as(state_dir: PathBuf, unenforceable: Unenforceable, confined: bool) -> io::Result<Self> {
        let state_dir = std::path::absolute(state_dir)?;
        for dir in ["", "sockets", "projects", "logs"] {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(state_dir.join(dir))?;
        }
        let helper = state_dir.join("helper");
        if fs::read(&helper).ok().as_deref() != Some(HELPER) {
            write_file(&helper, HELPER, 0o700)?;
        }
        let mut projects = BTreeMap::new();
        for entry in fs::read_dir(state_dir.join("projects"))? {
            let path = entry?.path();
            let name = path.file_stem().and_then(|name| name.to_str()).unwrap_or_default();
            let (Ok(project), Ok(text)) = (name.parse::<ProjectId>(), fs::read(&path)) else { continue };
            let Ok(record) = serde_json::from_slice::<Record>(&text) else {
                tracing::warn!(path = %path.display(), "a record that makes no sense, left alone");
                continue;
            };
            let supervisor = record.find()?.map(Arc::new);
            let view = View { record: Some(record), supervisor, ..View::default() };
            projects.insert(project, Arc::new(Project { view: Mutex::new(view), ..Project::default() }));
        }
        let projects = Mutex::new(projects);
        let landlock = confined && confine::available();
        let shared = Shared { state_dir, helper, unenforceable, confined, landlock, projects };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Ends every project of this runner, also those that a killed daemon left;
    /// their files stay.
    ///
    /// # Errors
    ///
    /// The first project that could not be ended; the others are.
    pub async fn cleanup(&self) -> Result<()> {
        let known: Vec<ProjectId> = self.shared.projects().keys().copied().collect();
        let mut done = Ok(());
        for project in known {
            done = done.and(self.remove(project).await);
        }
        done
    }

    async fn run_to_end<T: Send + 'static>(
        &self,
        project: ProjectId,
        operation: &'static str,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        // A caller who goes away must not leave half of it.
        tokio::spawn(work).await.unwrap_or_else(|error| Err(backend(operation, project, error)))
    }
}

impl Record {
    /// The supervisor, if it is still the same process.
    fn find(&self) -> io::Result<Option<Supervisor>> {
        let Some(process) = PidFd::open(self.pid)? else { return Ok(None) };
        let same = boot_id() == self.boot && tree::start_ticks(self.pid) == Some(self.ticks);
        Ok((same && process.is_alive()).then_some(Supervisor { pid: self.pid, process, _child: None }))
    }
}

impl Project {
    fn view(&self) -> MutexGuard<'_, View> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn running(&self) -> Option<Arc<Supervisor>> {
        self.view().supervisor.clone().filter(|supervisor| supervisor.process.is_alive())
    }

    fn status(&self, project: ProjectId) -> Status {
        let alive = self.running().is_some();
        let view = self.view();
        let state = match view.phase {
            Some(phase) => phase,
            None if alive => State::Running,
            None => State::Stopped,
        };
        let died = state == State::Stopped && view.record.is_some() && !view.stopped;
        Status {
            project,
            epoch: view.record.as_ref().map(|record| record.epoch),
            state,
            started: view.record.as_ref().map(|record| record.started),
            reason: died.then(|| "its supervisor ended, or the machine was restarted".into()),
        }
    }

    fn phase(&self, phase: Option<State>) {
        self.view().phase = phase;
    }
}

impl Shared {
    fn projects(&self) -> MutexGuard<'_, BTreeMap<ProjectId, Arc<Project>>> {
        self.projects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self, project: ProjectId) -> Option<Arc<Project>> {
        self.projects().get(&project).cloned()
    }

    fn running(&self, project: ProjectId) -> Result<(Arc<Project>, Arc<Supervisor>)> {
        let entry = self.known(project).ok_or(Error::NotRunning { project })?;
        let supervisor = entry.running().ok_or(Error::NotRunning { project })?;
        Ok((entry, supervisor))
    }

    /// The home and the environment of a project's processes.
    fn surroundings(&self, project: ProjectId) -> Result<(String, BTreeMap<String, String>)> {
        let entry = self.known(project).ok_or(Error::NotRunning { project })?;
        let view = entry.view();
        let record = view.record.as_ref().ok_or(Error::NotRunning { project })?;
        Ok((record.home.to_string_lossy().into_owned(), record.env.clone()))
    }

    fn socket(&self, project: ProjectId) -> io::Result<AgentSocket> {
        let key = self.known(project).and_then(|entry| entry.view().record.as_ref()?.key.clone());
        let socket = AgentSocket::new(&self.state_dir.join("sockets"), format!("{project}.sock"))?;
        Ok(socket.with_key(key))
    }

    fn record_path(&self, project: ProjectId) -> PathBuf {
        self.state_dir.join("projects").join(format!("{project}.json"))
    }

    fn log_path(&self, project: ProjectId) -> PathBuf {
        self.state_dir.join("logs").join(format!("{project}.log"))
    }

    fn mark(&self, project: ProjectId) -> String {
        format!("{}/{project}", self.state_dir.display())
    }

    async fn start(&self, spec: ProjectSpec) -> Result<Status> {
        let project = spec.project;
        self.check_limits(project, &spec.limits)?;
        agent::check_env(&spec)?;
        let entry = self.projects().entry(project).or_default().clone();
        let _operation = entry.operation.lock().await;
        if entry.running().is_some() {
            let epoch = entry.view().record.as_ref().map(|record| record.epoch);
            return if epoch == Some(spec.epoch) {
                Ok(entry.status(project))
            } else {
                Err(Error::Busy { project, reason: "it runs under another epoch".into() })
            };
        }
        entry.phase(Some(State::Starting));
        let launched = self.launch(&entry, &spec).await;
        entry.phase(None);
        launched.map_err(|error| backend("start", project, error))?;
        Ok(entry.status(project))
    }

    /// Refuses limits that can't be kept, unless told otherwise.
    fn check_limits(&self, project: ProjectId, limits: &Limits) -> Result<()> {
        let lacking = limits.asked().find(|kind| *kind != LimitKind::Nofile);
        match lacking {
            Some(kind) if self.unenforceable == Unenforceable::Refuse => {
                let reason = format!(
                    "plain processes have no limit of {kind}; leave it out, or let the host accept it \
                     (unenforceable_limits)"
                );
                Err(Error::Invalid { project, reason })
            }
            _ => Ok(()),
        }
    }

    async fn launch(&self, entry: &Project, spec: &ProjectSpec) -> io::Result<()> {
        let project = spec.project;
        // What a supervisor that was killed has left behind.
        self.kill_marked(project).await?;
        let home = spec.volume.join("home");
        make_home(&spec.volume)?;
        let listener = self.socket(project)?.bind()?;
        let key = Key::random()?;
        let log = fs::OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(true)
            .mode(0o600)
            .open(self.log_path(project))?;
        // The shell passes the socket on as descriptor 3, and becomes the helper.
        let mut command = tokio::process::Command::new("/bin/sh");
        command
            .args(["-c", "exec 3<&0 </dev/null; exec \"$1\"", "sh"])
            .arg(&self.helper)
            .env_clear()
            .env(MARK, self.mark(project))
            // Not an argument, which everybody can read.
            .env(Key::VARIABLE, key.digits())
            .current_dir(&home)
            .stdin(Stdio::from(listener))
            .stdout(log.try_clone()?)
            .stderr(log);
        // What is beside the volume are those of others.
        let volume = std::path::absolute(&spec.volume)?;
        let mut private = vec![self.state_dir.clone()];
        private.extend(volume.parent().map(Path::to_owned));
        let mut path = std::env::var_os("PATH");
        let mut temporary = true;
        if self.confined {
            let confinement = confine::Confinement::new(&home, &private, &self.helper)?;
            path = path.map(|path| confinement.search_path(&path));
            temporary = confinement.temporary;
            kernel::confine(command.as_std_mut(), confinement.ruleset, spec.limits.nofile);
        } else {
            kernel::tame(command.as_std_mut(), spec.limits.nofile);
        }
        let child = command.spawn()?;
        drop(command);
        let pid = child.id().map_or(0, u32::cast_signed);
        let process = PidFd::open(pid)?.ok_or(io::ErrorKind::NotFound)?;
        let ticks = tree::start_ticks(pid).ok_or(io::ErrorKind::NotFound)?;
        let mut env = spec.env.clone();
        env.insert(MARK.into(), self.mark(project));
        if !temporary {
            let temporary = home.join(".cache/tmp");
            fs::create_dir_all(&temporary)?;
            env.entry("TMPDIR".into()).or_insert_with(|| temporary.display().to_string());
        }
        let inherited =
            [("PATH", path), ("USER", std::env::var_os("USER")), ("LOGNAME", std::env::var_os("LOGNAME"))];
        for (name, value) in inherited {
            if let Some(Ok(value)) = value.map(OsString::into_string) {
                env.entry(name.into()).or_insert(value);
            }
        }
        let (epoch, started, key) = (spec.epoch, Timestamp::now(), Some(key));
        let record = Record { epoch, pid, ticks, boot: boot_id(), started, home, env, key };
        let text = serde_json::to_vec(&record)?;
        write_file(&self.record_path(project), &text, 0o600)?;
        let mut view = entry.view();
        view.record = Some(record);
        view.supervisor = Some(Arc::new(Supervisor { pid, process, _child: Some(child) }));
        view.stopped = false;
        Ok(())
    }

    async fn stop(&self, project: ProjectId, grace: Duration) -> Result<Status> {
        let Some(entry) = self.known(project) else { return Ok(unknown(project)) };
        let _operation = entry.operation.lock().await;
        self.stop_locked(&entry, project, grace).await?;
        Ok(entry.status(project))
    }

    async fn stop_locked(&self, entry: &Project, project: ProjectId, grace: Duration) -> Result<()> {
        entry.phase(Some(State::Stopping));
        let done = self.end(entry, project, grace).await;
        entry.phase(None);
        done.map_err(|error| backend("stop", project, error))
    }

    async fn end(&self, entry: &Project, project: ProjectId, grace: Duration) -> io::Result<()> {
        let was_running = entry.running();
        if let Some(supervisor) = &was_running {
            let socket = self.socket(project)?;
            if let Err(error) = agent::terminate(&socket, grace).await {
                tracing::warn!(%project, error = %cocalc_core::chain(&error), "killing its processes from outside");
                let pid = supervisor.pid;
                blocking(move || tree::kill_below(pid, KILL_LIMIT)).await?;
                supervisor.process.signal(Signal::KILL);
            }
            if !supervisor.process.ended(KILL_LIMIT).await? {
                return Err(io::ErrorKind::TimedOut.into());
            }
            socket.unlink();
        }
        self.kill_marked(project).await?;
        let mut view = entry.view();
        view.supervisor = None;
        // A supervisor that had died by itself stays a reason.
        view.stopped |= was_running.is_some();
        Ok(())
    }

    /// Kills what belongs to the project and lost its supervisor.
    async fn kill_marked(&self, project: ProjectId) -> io::Result<()> {
        let mark = format!("{MARK}={}", self.mark(project));
        blocking(move || tree::kill_marked(&mark, KILL_LIMIT)).await
    }

    async fn remove(&self, project: ProjectId) -> Result<()> {
        let Some(entry) = self.known(project) else { return Ok(()) };
        let _operation = entry.operation.lock().await;
        self.stop_locked(&entry, project, Duration::ZERO).await?;
        for path in [self.record_path(project), self.log_path(project)] {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(backend("remove", project, error));
                }
                _ => {}
            }
        }
        *entry.view() = View::default();
        if Arc::strong_count(&entry) <= 2 {
            self.projects().remove(&project);
        }
        Ok(())
    }
}

#[async_trait]
impl Runner for ProcessRunner {
    fn capabilities(&self) -> Capabilities {
        let mut weaknesses = Vec::new();
        let mut weak = |what: &str| weaknesses.push(what.to_owned());
        if self.shared.landlock {
            weak("projects are this host's user: they read what that user can in the system's directories");
            if !confine::scopes() {
                weak(
                    "projects can end each other's processes and this host's, and reach abstract sockets: the \
                     kernel's Landlock is older than version 6 (Linux 6.12)",
                );
            }
            weak("projects can connect to services of this machine whose sockets have a path");
        } else if self.shared.confined {
            weak(
                "no isolation, for the kernel has no Landlock: a project can do whatever this host's user can",
            );
        } else {
            weak("no isolation, for none was asked for: a project can do whatever this host's user can");
        }
        weak("no limits on memory, processor or processes");
        weak("no image and no root: packages can't be installed, only the home moves");
        weak("all projects share the machine's network and ports, whatever their policy says");
        weak("a process that leaves its supervisor and clears its environment outlives a stop");
        Capabilities {
            backend: BACKEND.into(),
            isolation: false,
            limits: false,
            weaknesses,
            unenforced: LimitKind::ALL.into_iter().filter(|kind| *kind != LimitKind::Nofile).collect(),
        }
    }

    async fn prepare(&self, spec: &ProjectSpec) -> Result<()> {
        self.shared.projects().entry(spec.project).or_default();
        make_home(&spec.volume).map_err(|error| backend("prepare", spec.project, error))
    }

    async fn start(&self, spec: &ProjectSpec) -> Result<Status> {
        let (shared, spec) = (self.shared.clone(), spec.clone());
        self.run_to_end(spec.project, "start", async move { shared.start(spec).await }).await
    }

    async fn stop(&self, project: ProjectId, grace: Duration) -> Result<Status> {
        let shared = self.shared.clone();
        self.run_to_end(project, "stop", async move { shared.stop(project, grace).await }).await
    }

    async fn remove(&self, project: ProjectId) -> Result<()> {
        let shared = self.shared.clone();
        self.run_to_end(project, "remove", async move { shared.remove(project).await }).await
    }

    async fn status(&self, project: ProjectId) -> Result<Status> {
        Ok(self.shared.known(project).map_or_else(|| unknown(project), |entry| entry.status(project)))
    }

    async fn list(&self) -> Result<Vec<Status>> {
        Ok(self.shared.projects().iter().map(|(project, entry)| entry.status(*project)).collect())
    }

    async fn exec(&self, project: ProjectId, request: ExecRequest) -> Result<Process> {
        let (entry, _supervisor) = self.shared.running(project)?;
        if request.user.is_some() {
            let reason = "this runner has no other users than its own".into();
            return Err(Error::Invalid { project, reason });
        }
        let (home, env) = self.shared.surroundings(project)?;
        let socket = self.shared.socket(project).map_err(|error| backend("reach", project, error))?;
        agent::exec(&socket, &request, env.iter(), &home).await.map_err(|error| match error {
            AgentError::Refused(reason) => Error::Invalid { project, reason },
            _ if entry.running().is_none() => Error::NotRunning { project },
            error => backend("start a process in", project, error),
        })
    }

    async fn dial(&self, project: ProjectId, port: u16) -> Result<BoxStream> {
        let (_, supervisor) = self.shared.running(project)?;
        let pid = supervisor.pid;
        let listens = blocking(move || Ok(tree::listens(pid, port)))
            .await
            .map_err(|error| backend("connect to a port of", project, error))?;
        if !listens {
            return Err(Error::Refused { project, port });
        }
        let attempt = async {
            match TcpStream::connect(("127.0.0.1", port)).await {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    TcpStream::connect(("::1", port)).await.map_err(|_| error)
                }
                other => other,
            }
        };
        match tokio::time::timeout(DIAL_LIMIT, attempt).await {
            Ok(Ok(stream)) => {
                // A delay that Nagle's algorithm adds is not worth an error.
                let _ = stream.set_nodelay(true);
                Ok(Box::pin(stream))
            }
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
                Err(Error::Refused { project, port })
            }
            Ok(Err(error)) => Err(backend("connect to a port of", project, error)),
            Err(_) => Err(Error::TimedOut { project, operation: "connecting to a port", limit: DIAL_LIMIT }),
        }
    }

    async fn stats(&self, project: ProjectId) -> Result<Stats> {
        let (_, supervisor) = self.shared.running(project)?;
        let pid = supervisor.pid;
        blocking(move || Ok(tree::stats(pid))).await.map_err(|error| backend("measure", project, error))
    }

    async fn set_limits(&self, project: ProjectId, limits: &Limits) -> Result<Applied> {
        self.shared.running(project)?;
        self.shared.check_limits(project, limits)?;
        // A process's limit of open files can't be raised again by everybody.
        let later = limits.nofile.map(|_| LimitKind::Nofile).into_iter().collect();
        Ok(Applied { limits: limits.clone(), later })
    }

    async fn logs(&self, project: ProjectId, lines: usize) -> Result<String> {
        let text = match fs::read(self.shared.log_path(project)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
            read => read.map_err(|error| backend("read the log of", project, error))?,
        };
        let text = String::from_utf8_lossy(&text);
        let all: Vec<&str> = text.lines().collect();
        Ok(all[all.len().saturating_sub(lines)..].iter().flat_map(|line| [*line, "\n"]).collect())
    }
}

fn unknown(project: ProjectId) -> Status {
    Status { project, epoch: None, state: State::Stopped, started: None, reason: None }
}

fn backend(operation: &'static str, project: ProjectId, source: impl Into<BoxError>) -> Error {
    Error::Backend { backend: BACKEND, operation, project, source: source.into() }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)))
}

fn make_home(volume: &Path) -> io::Result<()> {
    let volume = mounts::open_dir(volume)?;
    mounts::enter(&volume, "home", 0o700, None).map(drop)
}

fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().into()
}

fn write_file(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let draft = path.with_extension("new");
    let _ = fs::remove_file(&draft);
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&draft)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    drop(file);
    fs::rename(draft, path)
}
