//! Processes in a project whose helper does not do its work: it was bent, stopped
//! or replaced by somebody who is root in there.
//!
//! The runtime enters the container by itself. What it starts has the container's
//! namespaces, control group, capabilities and seccomp filter, as the container's
//! own configuration has them; nothing inside takes part in that. It is slower, and
//! otherwise the same: users are those of the project's own files (`inside`), and for
//! a terminal the runtime carries what is typed and shown (`terminal`).

mod inside;
mod terminal;

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    pin::Pin,
    process::{ExitStatus, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use cocalc_core::{
    ids::ProjectId,
    runner::{Command, Error, ExecRequest, Exit, Process, ProcessHandle, Pty, Result, WindowSize},
};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};
use tokio::{io::AsyncWrite, process::ChildStdin};

use self::{inside::Inside, terminal::Terminal};
use super::{Shared, backend, lifecycle::HELPER_INSIDE, project::Running};
use crate::{cgroup::Groups, pidfd::PidFd, signals};

/// Where the runtime keeps what it knows of containers.
const RUNTIME_STATE: &str = "/run/runc";
/// Where images keep the sftp server.
const SFTP_SERVERS: [&str; 4] = [
    "/usr/lib/openssh/sftp-server",
    "/usr/libexec/openssh/sftp-server",
    "/usr/lib/ssh/sftp-server",
    "/usr/libexec/sftp-server",
];
/// How long the runtime may take to say which process it has started, and how often
/// it is looked.
const START_LIMIT: Duration = Duration::from_secs(10);
const LOOK_AGAIN: Duration = Duration::from_millis(10);
const SEARCH_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

impl Shared {
    /// A copy of what the runtime knows of a container, without its network, in a
    /// directory of ours that the runtime takes for its own.
    ///
    /// The runtime enters the user namespace first, and may not enter the network
    /// from there, which is not of that namespace but ours. So it is started in
    /// that network, and told of none.
    ///
    /// Says also whether its processes may gain no privileges.
    fn without_network(&self, container: &str) -> io::Result<(PathBuf, bool)> {
        // A name of podman's, but it becomes a path.
        if container.is_empty() || !container.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let text = fs::read(Path::new(RUNTIME_STATE).join(container).join("state.json"))?;
        let mut state: serde_json::Value = serde_json::from_slice(&text)?;
        if let Some(paths) = state["namespace_paths"].as_object_mut() {
            paths.remove("NEWNET");
        }
        if let Some(namespaces) = state["config"]["namespaces"].as_array_mut() {
            namespaces.retain(|one| one["type"] != "NEWNET");
        }
        let root = self.dirs.sockets.join("entered");
        let directory = root.join(container);
        fs::create_dir_all(&directory)?;
        super::builder::write_file(&directory.join("state.json"), &serde_json::to_vec(&state)?, 0o600)?;
        Ok((root, state["config"]["no_new_privileges"].as_bool().unwrap_or(false)))
    }

    /// Starts a process without the helper.
    pub(super) fn exec_without_helper<'a>(
        &self,
        project: ProjectId,
        running: &Running,
        request: &'a ExecRequest,
        env: impl IntoIterator<Item = (&'a String, &'a String)>,
    ) -> Result<Process> {
        let invalid = |reason: &str| Error::Invalid { project, reason: reason.into() };
        let enter = |error| backend("enter", project, error);
        let inside = Inside::of(running).map_err(enter)?;
        let name = request.user.as_deref();
        let Some(user) = inside.user(name) else {
            return Err(invalid(&format!("no user {:?} in the project", name.unwrap_or_default())));
        };
        let helper = |tool: Vec<String>| std::iter::once(HELPER_INSIDE.to_owned()).chain(tool).collect();
        let shell = if inside.has(&user.shell) { user.shell.clone() } else { "/bin/sh".to_owned() };
        let args: Vec<String> = match &request.command {
            Command::Shell => vec![shell.clone(), "-l".into()],
            Command::Line(line) => vec![shell.clone(), "-c".into(), line.clone()],
            Command::Argv(args) if !args.is_empty() => args.clone(),
            Command::Sftp => match SFTP_SERVERS.into_iter().find(|server| inside.has(server)) {
                Some(server) => vec![server.into()],
                None => helper(vec!["tool".into(), "sftp".into()]),
            },
            Command::Tool(tool) => helper(tool.args()),
            _ => return Err(invalid("there is no program to run")),
        };
        // The terminal inside is the runtime's. Its modes are set where the process
        // begins: by the time that the host could reach it, the process would run. The
        // helper's program cannot be changed from within, whatever became of the helper;
        // but it may be that of an older host, which does not know of this.
        let sets_modes = request.pty.is_some() && inside.has_file(HELPER_INSIDE, &self.dirs.helper);
        let args = match &request.pty {
            Some(pty) if sets_modes => {
                let some = pty.modes.iter().take(Pty::MODES_MAX);
                let modes: Vec<String> = some.map(|(code, value)| format!("{code}={value}")).collect();
                let tool = ["tool".to_owned(), "terminal".to_owned(), modes.join(",")];
                helper(tool.into_iter().chain(args).collect())
            }
            _ => args,
        };
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("exec-{}-{number}.pid", std::process::id());
        let pid_file = self.dirs.sockets.join(name);
        let (root, strict) = self.without_network(&running.container).map_err(enter)?;
        let network = fs::File::open(self.network.path(project)).map_err(enter)?;
        let own = [
            ("PATH", SEARCH_PATH),
            ("HOME", &user.home),
            ("SHELL", &shell),
            ("USER", &user.name),
            ("LOGNAME", &user.name),
            ("LANG", "C.UTF-8"),
        ];
        let own = own.iter().map(|(name, value)| format!("{name}={value}"));
        let given = env.into_iter().chain(&request.env).map(|(name, value)| format!("{name}={value}"));
        let shows = request.pty.iter().map(|pty| format!("TERM={}", pty.term));
        let who = &user.identity;
        let mut process = serde_json::json!({
            "terminal": request.pty.is_some(),
            "user": { "uid": who.uid, "gid": who.gid, "additionalGids": who.groups },
            "args": args,
            "env": own.chain(given).chain(shows).collect::<Vec<_>>(),
            "cwd": if inside.has_directory(&user.home) { user.home.as_str() } else { "/" },
            "noNewPrivileges": strict,
        });
        if let Some(pty) = &request.pty {
            process["consoleSize"] = serde_json::json!({ "height": pty.size.rows, "width": pty.size.cols });
        }
        let described = in_memory(process.to_string().as_bytes()).map_err(enter)?;
        let mut command = tokio::process::Command::new(&self.cli.runtime);
        crate::kernel::spawn_in_network(&mut command, network.into());
        command.arg("--root").arg(root).arg("exec").arg("--pid-file").arg(&pid_file);
        // Whoever is on the machine may read command lines, and an environment is
        // the project's own.
        let described = crate::kernel::hand_over(&mut command, described);
        command.arg("--process").arg(described);
        command.arg(&running.container);
        command.kill_on_drop(true);
        let container = running.container.clone();
        let started = Started { pid_file, container };
        let entered =
            |child, terminal| Box::new(Entered { child: Some(child), started, terminal, ended: None });
        if let Some(pty) = &request.pty {
            let (terminal, end) = Terminal::open(pty.size, sets_modes).map_err(enter)?;
            let end = || end.try_clone().map(Stdio::from);
            command.stdin(end().map_err(enter)?).stdout(end().map_err(enter)?).stderr(end().map_err(enter)?);
            let child = command.spawn().map_err(enter)?;
            // Its ends of the terminal are the runtime's alone.
            drop(command);
            let (stdin, stdout) = (Box::pin(terminal.keyboard()), Box::pin(terminal.screen()));
            return Ok(Process { stdin, stdout, stderr: None, handle: entered(child, Some(terminal)) });
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(enter)?;
        let (Some(stdin), Some(stdout), Some(stderr)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(backend("enter", project, "a pipe is missing"));
        };
        Ok(Process {
            stdin: Box::pin(Closing(Some(stdin))),
            stdout: Box::pin(stdout),
            stderr: Some(Box::pin(stderr)),
            handle: entered(child, None),
        })
    }
}

/// A file that is nowhere but in memory, and nobody's who is not given it.
fn in_memory(bytes: &[u8]) -> io::Result<fs::File> {
    let file = rustix::fs::memfd_create("process", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut file = fs::File::from(file);
    file.write_all(bytes)?;
    Ok(file)
}

/// A process that the runtime has started, and the runtime's own beside it.
#[derive(Debug)]
struct Entered {
    /// Gone when this is being dropped, and else there.
    child: Option<tokio::process::Child>,
    started: Started,
    terminal: Option<Terminal>,
    ended: Option<Exit>,
}

/// What the runtime says of what it has started.
#[derive(Clone, Debug)]
struct Started {
    pid_file: PathBuf,
    container: String,
}

impl Started {
    /// Its number. The runtime says it a little later than it starts it.
    fn pid(&self) -> Option<i32> {
        fs::read_to_string(&self.pid_file).ok()?.trim().parse().ok()
    }

    /// The same, when it is said; `None` if that takes too long, or the runtime has
    /// ended without.
    async fn told(&self, ended: impl Fn() -> bool) -> Option<i32> {
        let begun = Instant::now();
        loop {
            // Before it is looked: what ended has said all that it says.
            let last = ended() || begun.elapsed() >= START_LIMIT;
            match self.pid() {
                None if !last => tokio::time::sleep(LOOK_AGAIN).await,
                pid => return pid,
            }
        }
    }

    /// Signals it if it is there: a signal to the runtime's own would not reach it.
    fn signal(&self, pid: i32, signal: Signal) {
        if let Ok(Some(process)) = PidFd::open(pid)
            && Groups::of(pid).is_ok_and(|groups| groups.of_container(&self.container).is_some())
        {
            process.signal(signal);
        }
    }
}

impl Entered {
    /// The runtime's number, as long as nobody has waited for its end.
    fn runtime(&self) -> Option<Pid> {
        Pid::from_raw(self.child.as_ref()?.id()?.cast_signed())
    }

    /// Whether the runtime has ended, waited for or not.
    fn runtime_has_ended(&self) -> bool {
        let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let looked = self.runtime().map(|pid| rustix::process::waitid(WaitId::Pid(pid), look));
        !matches!(looked, Some(Ok(None)))
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let (started, child) = (self.started.clone(), self.child.take());
        let end = move |pid: Option<i32>| {
            if let Some(pid) = pid {
                started.signal(pid, Signal::KILL);
            }
            let _ = fs::remove_file(&started.pid_file);
        };
        if self.ended.is_some() {
            return end(None);
        }
        let pid = self.started.pid();
        // Without the runtime, which is killed with its handle, nobody would know what
        // it is just starting.
        match (pid, child, tokio::runtime::Handle::try_current()) {
            (None, Some(mut child), Ok(tokio)) => {
                let started = self.started.clone();
                tokio.spawn(async move {
                    tokio::select! {
                        pid = started.told(|| false) => end(pid),
                        _ = child.wait() => end(started.pid()),
                    }
                });
            }
            _ => end(pid),
        }
    }
}

#[async_trait]
impl ProcessHandle for Entered {
    async fn resize(&self, size: WindowSize) -> Result<()> {
        let Some(terminal) = &self.terminal else { return Ok(()) };
        // A lost resize is not worth an error: the next one repairs it.
        if let Err(error) = terminal.resize(size) {
            tracing::debug!(%error, "could not pass on a window size");
        }
        // The runtime passes it on when it hears that there is another. It is not
        // reaped while this has not waited for it, so its number is its own.
        if let Some(runtime) = self.runtime() {
            let _ = rustix::process::kill_process(runtime, Signal::WINCH);
        }
        Ok(())
    }

    async fn signal(&self, signal: &str) -> Result<()> {
        let number = signals::number(signal).and_then(|number| Signal::from_named_raw(number.into()));
        if let Some(signal) = number
            && let Some(pid) = self.started.told(|| self.runtime_has_ended()).await
        {
            self.started.signal(pid, signal);
        }
        Ok(())
    }

    async fn wait(&mut self) -> Result<Exit> {
        if let Some(exit) = &self.ended {
            return Ok(exit.clone());
        }
        let status = match &mut self.child {
            Some(child) => child.wait().await.ok(),
            None => None,
        };
        let exit = status.map_or_else(|| Exit::Signal("KILL".into()), exit_of);
        self.ended = Some(exit.clone());
        Ok(exit)
    }
}

fn exit_of(status: ExitStatus) -> Exit {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        // The runtime says of a signal what a shell says.
        (Some(code @ 129..=192), _) => Exit::Signal(signals::name(u8::try_from(code - 128).unwrap_or(9))),
        (Some(code), _) => Exit::Code(u8::try_from(code).unwrap_or(255)),
        (None, signal) => Exit::Signal(signals::name(signal.and_then(|s| u8::try_from(s).ok()).unwrap_or(9))),
    }
}

/// A pipe that a shutdown closes.
#[derive(Debug)]
struct Closing(Option<ChildStdin>);

impl AsyncWrite for Closing {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.0 {
            Some(pipe) => Pin::new(pipe).poll_write(cx, bytes),
            None => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.0 {
            Some(pipe) => Pin::new(pipe).poll_flush(cx),
            None => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0 = None;
        Poll::Ready(Ok(()))
    }
}
