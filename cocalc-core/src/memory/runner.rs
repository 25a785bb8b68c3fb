//! A runner of nothing: projects that exist in memory alone.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use cocalc_ids::{Epoch, ProjectId, Timestamp};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, DuplexStream},
    sync::{mpsc, watch},
};

use crate::{
    clock::Clock,
    runner::{
        Applied, Capabilities, Command, Error, ExecRequest, Exit, LimitKind, Limits, Process, ProcessHandle,
        ProjectSpec, Result, Runner, State, Stats, Status, WindowSize,
    },
    stream::BoxStream,
};

/// How many bytes a pipe holds before its writer waits.
const PIPE_BYTES: usize = 64 * 1024;
/// How many connections wait to be accepted.
const BACKLOG: usize = 16;

/// Runs projects in memory, for tests. Clones share their projects, as a daemon
/// after its restart shares them with the one before.
///
/// Processes are tasks that know a few commands: `echo`, `printenv`, `cat`,
/// `sleep`, `stty size`, `true`, `exit`, separated by `;`, with `>&2`. What
/// listens on a port is a [`MemoryListener`] of the test.
#[derive(Clone)]
pub struct MemoryRunner {
    clock: Arc<dyn Clock>,
    projects: Arc<Mutex<BTreeMap<ProjectId, Project>>>,
}

#[derive(Default)]
struct Project {
    epoch: Option<Epoch>,
    running: Option<Running>,
    started: Option<Timestamp>,
    env: BTreeMap<String, String>,
}

/// One life of a project; dropping it ends its processes.
struct Running {
    processes: BTreeSet<u64>,
    next: u64,
    listeners: BTreeMap<u16, mpsc::Sender<DuplexStream>>,
    alive: watch::Sender<()>,
}

impl fmt::Debug for MemoryRunner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryRunner").finish_non_exhaustive()
    }
}

impl MemoryRunner {
    /// A runner without projects.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self { clock, projects: Arc::default() }
    }

    /// Listens on a port of a running project, until it is dropped or the
    /// project stops.
    ///
    /// # Errors
    ///
    /// A project that is not running, or a port that is taken.
    pub fn listen(&self, project: ProjectId, port: u16) -> Result<MemoryListener> {
        let mut projects = self.lock();
        let running = running(&mut projects, project)?;
        if running.listeners.get(&port).is_some_and(|listener| !listener.is_closed()) {
            return Err(Error::Invalid { project, reason: format!("port {port} is taken") });
        }
        let (sender, connections) = mpsc::channel(BACKLOG);
        running.listeners.insert(port, sender);
        Ok(MemoryListener { connections })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ProjectId, Project>> {
        self.projects.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Listens on a port of a project in memory.
#[derive(Debug)]
pub struct MemoryListener {
    connections: mpsc::Receiver<DuplexStream>,
}

impl MemoryListener {
    /// The next connection; `None` when the project has stopped. Cancel safe.
    pub async fn accept(&mut self) -> Option<DuplexStream> {
        self.connections.recv().await
    }
}

fn running(projects: &mut BTreeMap<ProjectId, Project>, project: ProjectId) -> Result<&mut Running> {
    projects
        .get_mut(&project)
        .and_then(|project| project.running.as_mut())
        .ok_or(Error::NotRunning { project })
}

fn status(project: ProjectId, known: Option<&Project>) -> Status {
    Status {
        project,
        epoch: known.and_then(|known| known.epoch),
        state: match known {
            Some(Project { running: Some(_), .. }) => State::Running,
            _ => State::Stopped,
        },
        started: known.and_then(|known| known.started),
        reason: None,
    }
}

#[async_trait]
impl Runner for MemoryRunner {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            backend: "memory".into(),
            isolation: true,
            limits: false,
            weaknesses: vec!["nothing really runs".into()],
            unenforced: LimitKind::ALL.to_vec(),
        }
    }

    async fn prepare(&self, spec: &ProjectSpec) -> Result<()> {
        self.lock().entry(spec.project).or_default();
        Ok(())
    }

    async fn start(&self, spec: &ProjectSpec) -> Result<Status> {
        let project = spec.project;
        if spec.env.iter().any(forbidden) {
            return Err(Error::Invalid { project, reason: "its environment is malformed".into() });
        }
        // Also in memory a start can be dropped at an await.
        tokio::task::yield_now().await;
        let mut projects = self.lock();
        let known = projects.entry(project).or_default();
        if known.running.is_some() {
            return if known.epoch == Some(spec.epoch) {
                Ok(status(project, Some(known)))
            } else {
                Err(Error::Busy { project, reason: "it runs under another epoch".into() })
            };
        }
        known.epoch = Some(spec.epoch);
        known.started = Some(self.clock.wall());
        known.env = spec.env.clone();
        known.running = Some(Running {
            processes: BTreeSet::new(),
            next: 0,
            listeners: BTreeMap::new(),
            alive: watch::Sender::new(()),
        });
        Ok(status(project, Some(known)))
    }

    async fn stop(&self, project: ProjectId, _grace: Duration) -> Result<Status> {
        let mut projects = self.lock();
        if let Some(known) = projects.get_mut(&project) {
            known.running = None;
        }
        Ok(status(project, projects.get(&project)))
    }

    async fn remove(&self, project: ProjectId) -> Result<()> {
        self.lock().remove(&project);
        Ok(())
    }

    async fn status(&self, project: ProjectId) -> Result<Status> {
        Ok(status(project, self.lock().get(&project)))
    }

    async fn list(&self) -> Result<Vec<Status>> {
        Ok(self.lock().iter().map(|(project, known)| status(*project, Some(known))).collect())
    }

    async fn exec(&self, project: ProjectId, request: ExecRequest) -> Result<Process> {
        let invalid = |reason: &str| Err(Error::Invalid { project, reason: reason.into() });
        if request.env.iter().any(forbidden) {
            return invalid("the environment is malformed");
        }
        let line = match &request.command {
            Command::Shell => None,
            Command::Line(line) => Some(line.clone()),
            Command::Argv(args) if args.is_empty() => return invalid("there is no program to run"),
            Command::Argv(args) => Some(args.join(" ")),
            Command::Sftp => return invalid("there is no sftp server in memory"),
            Command::Tool(_) => return invalid("nothing can be reached in memory"),
        };
        if line.as_ref().is_some_and(|line| line.contains('\0')) {
            return invalid("the command contains a NUL");
        }
        let mut projects = self.lock();
        let mut env = projects.get(&project).map(|known| known.env.clone()).unwrap_or_default();
        env.extend(request.env);
        let running = running(&mut projects, project)?;
        let id = running.next;
        running.next += 1;
        running.processes.insert(id);
        let ended = Ended { projects: self.projects.clone(), project, id };
        let alive = running.alive.subscribe();
        drop(projects);

        let (stdin, from_host) = tokio::io::duplex(PIPE_BYTES);
        let (to_host, stdout) = tokio::io::duplex(PIPE_BYTES);
        let (errors_to_host, stderr) = tokio::io::duplex(PIPE_BYTES);
        let pty = request.pty.is_some();
        let size = request.pty.map_or(WindowSize { cols: 0, rows: 0 }, |pty| pty.size);
        let (signal, signals) = watch::channel(None);
        let (size, sizes) = watch::channel(size);
        let (exit, exited) = watch::channel(None);
        let shell = Shell {
            env,
            stdin: BufReader::new(from_host),
            stdout: to_host,
            stderr: (!pty).then_some(errors_to_host),
            size: sizes,
        };
        tokio::spawn(live(shell, line, signals, alive, exit, ended));
        Ok(Process {
            stdin: Box::pin(stdin),
            stdout: Box::pin(stdout),
            stderr: (!pty).then(|| Box::pin(stderr) as _),
            handle: Box::new(Handle { signal, size, exited }),
        })
    }

    async fn dial(&self, project: ProjectId, port: u16) -> Result<BoxStream> {
        let listener = running(&mut self.lock(), project)?.listeners.get(&port).cloned();
        let refused = Error::Refused { project, port };
        let Some(listener) = listener else { return Err(refused) };
        let (ours, theirs) = tokio::io::duplex(PIPE_BYTES);
        if listener.try_send(theirs).is_err() {
            return Err(refused);
        }
        Ok(Box::pin(ours))
    }

    async fn stats(&self, project: ProjectId) -> Result<Stats> {
        let mut projects = self.lock();
        let running = running(&mut projects, project)?;
        Ok(Stats { pids: 1 + running.processes.len() as u64, ..Stats::default() })
    }

    async fn set_limits(&self, project: ProjectId, limits: &Limits) -> Result<Applied> {
        running(&mut self.lock(), project)?;
        // What uses nothing keeps every limit.
        Ok(Applied { limits: limits.clone(), later: Vec::new() })
    }

    async fn logs(&self, _project: ProjectId, _lines: usize) -> Result<String> {
        Ok(String::new())
    }
}

fn forbidden((name, value): (&String, &String)) -> bool {
    name.is_empty() || name.contains(['=', '\0']) || value.contains('\0')
}

/// Takes a process off its project's list, however it ends.
struct Ended {
    projects: Arc<Mutex<BTreeMap<ProjectId, Project>>>,
    project: ProjectId,
    id: u64,
}

impl Drop for Ended {
    fn drop(&mut self) {
        let mut projects = self.projects.lock().unwrap_or_else(PoisonError::into_inner);
        if let Ok(running) = running(&mut projects, self.project) {
            running.processes.remove(&self.id);
        }
    }
}

/// The life of one process: its commands, until a signal, the end of its
/// project, or its holder's.
async fn live(
    mut shell: Shell,
    line: Option<String>,
    mut signals: watch::Receiver<Option<String>>,
    mut alive: watch::Receiver<()>,
    exit: watch::Sender<Option<Exit>>,
    ended: Ended,
) {
    let end = tokio::select! {
        biased;
        // An error says that the project has stopped.
        _ = alive.changed() => Exit::Signal("KILL".into()),
        signal = signals.wait_for(Option::is_some) => {
            // An error says that the handle was dropped.
            Exit::Signal(signal.ok().and_then(|signal| signal.clone()).unwrap_or_else(|| "KILL".into()))
        }
        code = shell.run(line.as_deref()) => Exit::Code(code),
    };
    drop((shell, ended));
    exit.send_replace(Some(end));
}

/// Knows a few commands.
struct Shell {
    env: BTreeMap<String, String>,
    stdin: BufReader<DuplexStream>,
    stdout: DuplexStream,
    stderr: Option<DuplexStream>,
    size: watch::Receiver<WindowSize>,
}

impl Shell {
    async fn run(&mut self, line: Option<&str>) -> u8 {
        let Some(line) = line else {
            let mut code = 0;
            let mut typed = String::new();
            while matches!(self.stdin.read_line(&mut typed).await, Ok(1..)) {
                match self.line(typed.trim_end()).await {
                    (exit, true) => return exit,
                    (exit, false) => code = exit,
                }
                typed.clear();
            }
            return code;
        };
        self.line(line).await.0
    }

    /// Runs the commands of a line: the last status, and whether it said `exit`.
    async fn line(&mut self, line: &str) -> (u8, bool) {
        let mut code = 0;
        for command in line.split(';').map(str::trim).filter(|command| !command.is_empty()) {
            let (command, to_errors) = match command.strip_suffix(">&2") {
                Some(command) => (command.trim(), true),
                None => (command, false),
            };
            let (program, argument) = command.split_once(' ').unwrap_or((command, ""));
            let said = match program {
                "true" => continue,
                "exit" => return (argument.parse().unwrap_or(2), true),
                "echo" => format!("{argument}\n"),
                "printenv" => match self.env.get(argument) {
                    Some(value) => format!("{value}\n"),
                    None => {
                        code = 1;
                        continue;
                    }
                },
                "stty" => {
                    let size = *self.size.borrow();
                    format!("{} {}\n", size.rows, size.cols)
                }
                "sleep" => {
                    tokio::time::sleep(Duration::from_secs(argument.parse().unwrap_or(0))).await;
                    continue;
                }
                "cat" => {
                    code = u8::from(copy(&mut self.stdin, &mut self.stdout).await.is_err());
                    continue;
                }
                _ => {
                    code = 127;
                    self.say(true, &format!("{program}: command not found\n")).await;
                    continue;
                }
            };
            code = 0;
            self.say(to_errors, &said).await;
        }
        (code, false)
    }

    async fn say(&mut self, to_errors: bool, text: &str) {
        let stream = match &mut self.stderr {
            Some(stderr) if to_errors => stderr,
            _ => &mut self.stdout,
        };
        // A reader that went away is what a broken pipe is.
        let _ = stream.write_all(text.as_bytes()).await;
    }
}

async fn copy(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
) -> std::io::Result<()> {
    let mut buffer = vec![0; 8192];
    loop {
        match from.read(&mut buffer).await? {
            0 => return Ok(()),
            count => to.write_all(&buffer[..count]).await?,
        }
    }
}

#[derive(Debug)]
struct Handle {
    signal: watch::Sender<Option<String>>,
    size: watch::Sender<WindowSize>,
    exited: watch::Receiver<Option<Exit>>,
}

#[async_trait]
impl ProcessHandle for Handle {
    async fn resize(&self, size: WindowSize) -> Result<()> {
        self.size.send_replace(size);
        Ok(())
    }

    async fn signal(&self, signal: &str) -> Result<()> {
        self.signal.send_replace(Some(signal.into()));
        Ok(())
    }

    async fn wait(&mut self) -> Result<Exit> {
        let exit = self.exited.wait_for(Option::is_some).await;
        // The task always says how it ended, unless its runtime was shut down.
        Ok(exit.ok().and_then(|exit| exit.clone()).unwrap_or_else(|| Exit::Signal("KILL".into())))
    }
}
