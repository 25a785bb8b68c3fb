//! One channel of a user's connection: a process, or a connection to a port.

use std::{io, net::IpAddr, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use cocalc_core::{
    ids::ProjectId,
    runner::{Error, ExecRequest, Exit, Process, Tool},
    stream::{BoxStream, BoxWrite},
    wake::Awake,
};
use russh::{
    ChannelOpenFailure, ChannelWriteHalf, Sig,
    server::{ChannelOpenHandle, Handle, Msg},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt, split},
    sync::mpsc,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    Access, Login,
    drive::{Control, Ended, Sink, drive},
    input::InputReceiver,
    reverse::{self, Connected, Kind, Reverse},
    witness::Meter,
};

/// How long a session waits for a stopped project to start.
pub(crate) const WAKE_MAX: Duration = Duration::from_secs(180);
/// How often it asks.
const WAKE_EVERY: Duration = Duration::from_millis(300);
/// How long starting a process or opening a port may take.
pub(crate) const OPEN_MAX: Duration = Duration::from_secs(60);
/// How long a message of ours waits for the client to take it.
const SAY_MAX: Duration = Duration::from_secs(1);
/// How long what was lost waits for the word that the access itself has ended:
/// at a proxy both come from the host, on connections of their own.
const LAST_WORD_MAX: Duration = Duration::from_secs(1);
/// What a shell at a passage says.
const NO_PROJECT: &str = "this is a way to projects, and none itself: ssh -J jump@this-server ID@ID";
/// How long what a client sent before it closed a channel may take to be read.
pub(crate) const DELIVER_MAX: Duration = Duration::from_secs(60);
/// What is said when a command has ended only because its project has.
pub(crate) const PROJECT_ENDED: &str = "the project has ended, and the command with it";
/// What OpenSSH returns when it, and not the remote command, failed.
const OUR_FAILURE: u32 = 255;
const STDERR: u32 = 1;

/// The end of a channel that leads to the user.
pub(crate) struct Outward {
    pub(crate) write: ChannelWriteHalf<Msg>,
    pub(crate) handle: Handle,
    pub(crate) meter: Option<Arc<Meter>>,
}

/// Runs `request` in the project, from its start to the channel's end.
///
/// Dropping the future kills the process and says nothing to the user.
pub(crate) async fn session(
    outward: Outward,
    login: Arc<Login>,
    mut request: ExecRequest,
    wishes: Wishes,
    input: InputReceiver,
    controls: mpsc::Receiver<Control>,
    overflow: CancellationToken,
) {
    let pty = request.pty.is_some();
    // They listen for as long as the session lasts.
    let mut listeners = Vec::new();
    let run = async {
        let access = match &*login {
            Login::Open(access) => access,
            Login::Moved(moved) => return Err(moved.to_string()),
            Login::Passage(_) => return Err(NO_PROJECT.into()),
        };
        if !wishes.is_empty() {
            wake(access, Instant::now() + WAKE_MAX, Some((&outward, pty))).await?;
            for (variable, kind, what) in wishes.kinds {
                match wishes.reverse.listen(kind).await {
                    Ok(listener) => {
                        request.env.insert(variable.to_owned(), listener.place.clone());
                        listeners.push(listener);
                    }
                    Err(reason) => outward.say(&format!("{what} is not forwarded: {reason}"), pty).await,
                }
            }
        }
        let process = start(access, request, &outward).await?;
        match drive(process, pty, |stdin| feed(input, stdin, pty), &outward, controls).await {
            Ended::Exit(exit) => Ok(Some(exit)),
            Ended::Lost(error) => {
                last_word(access).await;
                tracing::warn!(project = %access.project, error = %cocalc_core::chain(&error), "a process was lost");
                Err(format!("the process was lost: {}", cocalc_core::chain(&error)))
            }
            Ended::Cut => Err(PROJECT_ENDED.into()),
            Ended::Abandoned => Ok(None),
        }
    };
    let ended = tokio::select! {
        ended = run => ended,
        () = overflow.cancelled() => Err("the command does not read its input, and the server has no room for more of it".into()),
    };
    match ended {
        Ok(Some(exit)) => outward.finish(exit).await,
        Ok(None) => {
            let _ = outward.write.close().await;
        }
        Err(reason) => {
            outward.say(&reason, pty).await;
            outward.close(OUR_FAILURE).await;
        }
    }
}

/// What else a session asks for: variables whose values are places inside the
/// project that lead to its user.
pub(crate) struct Wishes {
    pub(crate) reverse: Reverse,
    pub(crate) kinds: Vec<(&'static str, Kind, &'static str)>,
}

impl Wishes {
    fn is_empty(&self) -> bool {
        self.kinds.is_empty()
    }
}

/// Where a channel leads.
#[derive(Clone, Debug)]
pub(crate) enum Target {
    /// A port on the project's loopback addresses.
    Port(u16),
    /// Whatever the project itself can reach by this name.
    Beyond { host: String, port: u16 },
    /// A Unix socket of the project.
    Socket(String),
    /// The SSH server of this project's host, for a user from there.
    Project(ProjectId, Option<IpAddr>),
}

/// Connects the channel to `target`, once that has accepted.
pub(crate) async fn forward(
    outward: Outward,
    reply: ChannelOpenHandle,
    login: Arc<Login>,
    target: Target,
    input: InputReceiver,
    ends: Ends,
) {
    let access = match (&*login, &target) {
        (Login::Open(access), _) => access,
        (Login::Passage(passage), Target::Project(project, source)) => {
            match timeout(OPEN_MAX, passage.pass(*project, *source)).await {
                Ok(Ok(stream)) => {
                    reply.accept().await;
                    let (from, to) = split(stream);
                    pump(&outward, input, from, Box::pin(to), &ends).await;
                    let _ = outward.write.close().await;
                }
                _ => reply.reject(ChannelOpenFailure::ConnectFailed).await,
            }
            return;
        }
        _ => return reply.reject(ChannelOpenFailure::AdministrativelyProhibited).await,
    };
    let connected = match &target {
        Target::Project(..) => Err("that is for a passage".into()),
        Target::Port(port) => dial(access, *port).await.map(Way::Stream),
        Target::Beyond { host, port } => {
            reach(access, Tool::ConnectTcp { host: host.clone(), port: *port }).await
        }
        Target::Socket(path) => reach(access, Tool::ConnectUnix { path: path.clone() }).await,
    };
    let way = match connected {
        Ok(way) => way,
        Err(reason) => {
            tracing::debug!(project = %access.project, ?target, reason, "a connection was not forwarded");
            return reply.reject(ChannelOpenFailure::ConnectFailed).await;
        }
    };
    // Only now: what the server says first must find an open channel.
    reply.accept().await;
    match way {
        Way::Stream(stream) => {
            let (from, to) = split(stream);
            pump(&outward, input, from, Box::pin(to), &ends).await;
        }
        Way::Tool(connected) => connected.carry(&outward, input, &ends).await,
    }
    let _ = outward.write.close().await;
}

/// What ends a connection that is carried, beside its own ends.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ends {
    /// At once.
    pub(crate) overflow: CancellationToken,
    /// The client has closed the channel: it takes nothing more, but what it
    /// has sent still goes where it should.
    pub(crate) closed: CancellationToken,
}

enum Way {
    Stream(BoxStream),
    Tool(Connected),
}

async fn reach(access: &Access, tool: Tool) -> Result<Way, String> {
    wake(access, Instant::now() + WAKE_MAX, None).await?;
    reverse::connect(access, tool).await.map(Way::Tool)
}

/// Carries bytes in both directions until both have ended.
pub(crate) async fn pump(
    outward: &Outward,
    input: InputReceiver,
    mut from: impl AsyncRead + Send + Unpin,
    to: BoxWrite,
    ends: &Ends,
) {
    let inward = feed(input, to, false);
    let outwards = async {
        let mut buffer = BytesMut::new();
        loop {
            buffer.reserve(32 * 1024);
            match (&mut from).take(32 * 1024).read_buf(&mut buffer).await {
                Ok(0) | Err(_) => break,
                Ok(count) => {
                    if outward.write.data_bytes(buffer.split().freeze()).await.is_err() {
                        return;
                    }
                    outward.count(count);
                }
            }
        }
        let _ = outward.write.eof().await;
    };
    tokio::select! {
        _ = async { tokio::join!(inward, ends.closed.run_until_cancelled(outwards)) } => {}
        () = ends.overflow.cancelled() => {}
        () = async { ends.closed.cancelled().await; sleep(DELIVER_MAX).await } => {}
    }
}

/// Writes what the user sends, until the user or the process ends it.
async fn feed(mut input: InputReceiver, mut stdin: BoxWrite, pty: bool) {
    while let Some(data) = input.next().await {
        let written = async {
            stdin.write_all(&data).await?;
            stdin.flush().await
        };
        if written.await.is_err() {
            // It reads no more: dropping the receiver drops what still comes.
            return;
        }
    }
    // A terminal has no half-close; sshd sends nothing either.
    if !pty {
        let _ = stdin.shutdown().await;
    } else {
        drop(input);
        std::future::pending::<()>().await;
    }
}

/// Starts the process, after the project if need be.
async fn start(access: &Access, request: ExecRequest, outward: &Outward) -> Result<Process, String> {
    let pty = request.pty.is_some();
    let deadline = Instant::now() + WAKE_MAX;
    loop {
        wake(access, deadline, Some((outward, pty))).await?;
        match timeout(OPEN_MAX, access.sessions.exec(access.project, request.clone())).await {
            Ok(Ok(process)) => return Ok(process),
            // It was stopped again just now.
            Ok(Err(Error::NotRunning { .. })) if Instant::now() < deadline => sleep(WAKE_EVERY).await,
            Ok(Err(error)) => {
                if matches!(error, Error::Backend { .. }) {
                    last_word(access).await;
                }
                tracing::info!(project = %access.project, error = %cocalc_core::chain(&error), "no process was started");
                return Err(error.to_string());
            }
            Err(_) => return Err("the project does not answer".into()),
        }
    }
}

/// Returns unless the access has ended, of which the connection itself tells.
async fn last_word(access: &Access) {
    if timeout(LAST_WORD_MAX, access.admission.revoked()).await.is_ok() {
        std::future::pending::<()>().await;
    }
}

async fn dial(access: &Access, port: u16) -> Result<BoxStream, String> {
    let deadline = Instant::now() + WAKE_MAX;
    loop {
        wake(access, deadline, None).await?;
        match timeout(OPEN_MAX, access.sessions.dial(access.project, port)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(Error::NotRunning { .. })) if Instant::now() < deadline => sleep(WAKE_EVERY).await,
            Ok(Err(error)) => return Err(error.to_string()),
            Err(_) => return Err("the port does not answer".into()),
        }
    }
}

/// Waits until the project runs, and tells `watcher` how far it is.
pub(crate) async fn wake(
    access: &Access,
    deadline: Instant,
    watcher: Option<(&Outward, bool)>,
) -> Result<(), String> {
    let mut said = String::new();
    loop {
        match timeout(OPEN_MAX, access.sessions.wake(access.project)).await {
            Ok(Awake::Running) => return Ok(()),
            Ok(Awake::Starting { phase }) if phase != said => {
                if let Some((outward, pty)) = watcher {
                    outward.say(&format!("the project is starting: {phase}"), pty).await;
                }
                said = phase;
            }
            Ok(Awake::Failed { reason }) => return Err(format!("the project cannot be started: {reason}")),
            Ok(_) | Err(_) => {}
        }
        if Instant::now() >= deadline {
            return Err(format!("the project did not start within {} s", WAKE_MAX.as_secs()));
        }
        sleep(WAKE_EVERY).await;
    }
}

impl Outward {
    fn count(&self, bytes: usize) {
        if let Some(meter) = &self.meter {
            meter.outward(bytes);
        }
    }

    /// Tells the user something, beside the output of their command.
    async fn say(&self, text: &str, pty: bool) {
        let line_end = if pty { "\r\n" } else { "\n" };
        let line = Bytes::from(format!("cocalc: {text}{line_end}"));
        let _ = timeout(SAY_MAX, self.write.extended_data_bytes(STDERR, line)).await;
    }

    /// Says how the process ended, after all of its output, and closes.
    async fn finish(&self, exit: Exit) {
        match exit {
            Exit::Code(code) => self.close(u32::from(code)).await,
            Exit::Signal(name) => {
                let id = self.write.id();
                let _ = self
                    .handle
                    .exit_signal_request(id, signal(&name), false, String::new(), String::new())
                    .await;
                let _ = self.write.eof().await;
                let _ = self.write.close().await;
            }
        }
    }

    /// The status goes before the end of output, as in OpenSSH: a client that
    /// has sent the end of its input closes the channel when it receives
    /// ours, the library answers that at once, and nothing can follow.
    async fn close(&self, status: u32) {
        let _ = self.write.exit_status(status).await;
        let _ = self.write.eof().await;
        let _ = self.write.close().await;
    }
}

impl Sink for Outward {
    async fn stdout(&self, data: Bytes) -> io::Result<()> {
        self.count(data.len());
        self.write.data_bytes(data).await.map_err(io::Error::other)
    }

    async fn stderr(&self, data: Bytes) -> io::Result<()> {
        self.count(data.len());
        self.write.extended_data_bytes(STDERR, data).await.map_err(io::Error::other)
    }

    async fn end(&self) -> io::Result<()> {
        // Said by `close`, and not sooner.
        Ok(())
    }
}

/// A signal by its name without `SIG`.
pub(crate) fn signal(name: &str) -> Sig {
    match name {
        "ABRT" => Sig::ABRT,
        "ALRM" => Sig::ALRM,
        "FPE" => Sig::FPE,
        "HUP" => Sig::HUP,
        "ILL" => Sig::ILL,
        "INT" => Sig::INT,
        "KILL" => Sig::KILL,
        "PIPE" => Sig::PIPE,
        "QUIT" => Sig::QUIT,
        "SEGV" => Sig::SEGV,
        "TERM" => Sig::TERM,
        "USR1" => Sig::USR1,
        other => Sig::Custom(other.to_owned()),
    }
}

/// The name of a signal that a client asks for; `None` for what is no name.
pub(crate) fn signal_name(signal: &Sig) -> Option<&str> {
    Some(match signal {
        Sig::ABRT => "ABRT",
        Sig::ALRM => "ALRM",
        Sig::FPE => "FPE",
        Sig::HUP => "HUP",
        Sig::ILL => "ILL",
        Sig::INT => "INT",
        Sig::KILL => "KILL",
        Sig::PIPE => "PIPE",
        Sig::QUIT => "QUIT",
        Sig::SEGV => "SEGV",
        Sig::TERM => "TERM",
        Sig::USR1 => "USR1",
        Sig::Custom(name)
            if (1..=16).contains(&name.len())
                && name.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit()) =>
        {
            name
        }
        Sig::Custom(_) => return None,
    })
}
