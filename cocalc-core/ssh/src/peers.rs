//! The host's side of SSH that ends at a proxy.

use std::{
    collections::HashMap,
    fmt, io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use cocalc_core::{
    auth::{Credential, Secret},
    ids::{ProjectId, ProxyId},
    runner::{Error, ExecRequest},
    stream::{BoxStream, BoxWrite},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf, split},
    sync::mpsc,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::{
    Access, Attempt, Gate, Login, Sessions,
    drive::{Control, Ended, Sink, drive},
    environment,
    wire::{self, Answer, Call, Failure, Frame, Hello, Shown},
};

/// How long a proxy has to say what it wants.
const HELLO_MAX: Duration = Duration::from_secs(10);
/// How many logins of users of all proxies are held at a time.
const LOGINS_MAX: usize = 65_536;

/// Serves the SSH channels of users whom proxies have authenticated, each
/// stream on its own.
///
/// The host decides about every login itself, by its own [`Gate`]; of the
/// proxy it believes only that the user holds the key, and only as far as its
/// `Auth` believes that proxy. When a login's stream ends, so does everything
/// that was opened under it.
pub struct SshPeers {
    gate: Arc<dyn Gate>,
    logins: Mutex<HashMap<String, Opened>>,
}

/// A login that lasts.
#[derive(Clone)]
struct Opened {
    proxy: ProxyId,
    project: ProjectId,
    sessions: Arc<dyn Sessions>,
    over: CancellationToken,
}

impl fmt::Debug for SshPeers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SshPeers").field("gate", &self.gate).finish_non_exhaustive()
    }
}

impl SshPeers {
    /// Lets in whom `gate` lets in.
    pub fn new(gate: Arc<dyn Gate>) -> Self {
        Self { gate, logins: Mutex::default() }
    }

    /// Serves one stream that `proxy`, authenticated, has opened to this
    /// host's SSH service, until it ends.
    ///
    /// # Errors
    ///
    /// The stream broke off, or the proxy does not speak this protocol.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future ends what the stream stands for.
    pub async fn serve(&self, mut stream: BoxStream, proxy: ProxyId) -> io::Result<()> {
        let hello: Hello = timeout(HELLO_MAX, wire::receive(&mut stream)).await??;
        if hello.version != wire::VERSION {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "another version of the SSH peer protocol",
            ));
        }
        let project = hello.project;
        match hello.call {
            Call::Login { credential, source } => {
                let credential = match credential {
                    Shown::Key(key) => Credential::AttestedSshKey { key, proxy: proxy.to_string() },
                    Shown::Certificate(certificate) => {
                        Credential::AttestedSshCertificate { certificate, proxy: proxy.to_string() }
                    }
                    Shown::Token(token) => Credential::Token(Secret::new(token)),
                };
                self.login(stream, proxy, Attempt { project, credential, source }).await
            }
            Call::Wake { ticket } => {
                let opened = self.opened(&ticket, proxy, project)?;
                let awake = opened.sessions.wake(project).await;
                wire::send(&mut stream, &Answer::from(awake)).await
            }
            Call::Exec { ticket, mut request } => {
                // What a proxy passes on is no more than a client could ask for.
                request.user = None;
                environment::retain(&mut request.env);
                let opened = self.opened(&ticket, proxy, project)?;
                opened
                    .over
                    .run_until_cancelled(exec(stream, &*opened.sessions, project, request))
                    .await
                    .unwrap_or(Ok(()))
            }
            Call::Dial { ticket, port } => {
                let opened = self.opened(&ticket, proxy, project)?;
                opened
                    .over
                    .run_until_cancelled(dial(stream, &*opened.sessions, project, port))
                    .await
                    .unwrap_or(Ok(()))
            }
        }
    }

    async fn login(&self, mut stream: BoxStream, proxy: ProxyId, attempt: Attempt) -> io::Result<()> {
        let Access { project, sessions, restrictions, admission } = match self.gate.login(attempt).await {
            Ok(Login::Open(access)) => access,
            Ok(Login::Moved(moved)) => {
                return wire::send(&mut stream, &Answer::Moved { host: moved.host, ssh: moved.ssh }).await;
            }
            Err(refusal) => {
                let answer = match refusal.elsewhere {
                    Some(moved) => Answer::Moved { host: moved.host, ssh: moved.ssh },
                    None => Answer::Refused { code: refusal.code, message: refusal.message },
                };
                return wire::send(&mut stream, &answer).await;
            }
        };
        let ticket = ticket()?;
        let over = CancellationToken::new();
        let _registered =
            self.register(ticket.clone(), Opened { proxy, project, sessions, over: over.clone() })?;
        wire::send(&mut stream, &Answer::LoggedIn { ticket, restrictions }).await?;
        let mut byte = [0];
        tokio::select! {
            reason = admission.revoked() => {
                // Everything under it ends before anybody is told.
                over.cancel();
                let (_, code) = reason.public();
                wire::send(&mut stream, &Answer::Ended { message: code.to_owned() }).await
            }
            // The proxy says nothing more; whatever it does is the end.
            _ = stream.read(&mut byte) => Ok(()),
        }
    }

    fn register(&self, ticket: String, opened: Opened) -> io::Result<Registered<'_>> {
        let mut logins = self.logins.lock().unwrap_or_else(PoisonError::into_inner);
        if logins.len() >= LOGINS_MAX {
            return Err(io::Error::other("too many SSH logins through proxies"));
        }
        let over = opened.over.clone();
        logins.insert(ticket.clone(), opened);
        Ok(Registered { peers: self, ticket, over })
    }

    fn opened(&self, ticket: &str, proxy: ProxyId, project: ProjectId) -> io::Result<Opened> {
        let logins = self.logins.lock().unwrap_or_else(PoisonError::into_inner);
        match logins.get(ticket) {
            Some(opened) if opened.proxy == proxy && opened.project == project => Ok(opened.clone()),
            _ => Err(io::Error::new(io::ErrorKind::PermissionDenied, "no such login")),
        }
    }
}

/// A login in the table; dropping it ends all that was opened under it.
struct Registered<'a> {
    peers: &'a SshPeers,
    ticket: String,
    over: CancellationToken,
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        self.over.cancel();
        self.peers.logins.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.ticket);
    }
}

/// 256 random bits.
fn ticket() -> io::Result<String> {
    let mut bytes = [0_u8; 32];
    getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

async fn exec(
    mut stream: BoxStream,
    sessions: &dyn Sessions,
    project: ProjectId,
    request: ExecRequest,
) -> io::Result<()> {
    let pty = request.pty.is_some();
    let process = match sessions.exec(project, request).await {
        Ok(process) => process,
        Err(error) => return wire::send(&mut stream, &failed(&error)).await,
    };
    wire::send(&mut stream, &Answer::Ready).await?;
    let (mut reader, writer) = split(stream);
    let sink = FrameSink(tokio::sync::Mutex::new(writer));
    let (steer, controls) = mpsc::channel(16);
    let gone = CancellationToken::new();
    let feed = async |stdin| feed(&mut reader, stdin, pty, &steer, &gone).await;
    let ended = tokio::select! {
        ended = drive(process, pty, feed, &sink, controls) => ended,
        () = gone.cancelled() => Ended::Abandoned,
    };
    let last = match ended {
        Ended::Exit(exit) => Frame::Exit(exit),
        Ended::Lost(error) => Frame::Lost(cocalc_core::chain(&error)),
        Ended::Abandoned => return Ok(()),
    };
    let mut writer = sink.0.into_inner();
    wire::send_frame(&mut writer, &last).await?;
    writer.shutdown().await
}

/// Reads the proxy's frames until it goes away.
async fn feed(
    reader: &mut ReadHalf<BoxStream>,
    stdin: BoxWrite,
    pty: bool,
    steer: &mpsc::Sender<Control>,
    gone: &CancellationToken,
) {
    let mut stdin = Some(stdin);
    loop {
        match wire::receive_frame(reader).await {
            Ok(Some(Frame::Stdin(data))) => {
                if let Some(open) = &mut stdin {
                    let written = async {
                        open.write_all(&data).await?;
                        open.flush().await
                    };
                    // It reads no more; what still comes is dropped.
                    if written.await.is_err() {
                        stdin = None;
                    }
                }
            }
            Ok(Some(Frame::StdinEnd)) => {
                if !pty && let Some(mut open) = stdin.take() {
                    let _ = open.shutdown().await;
                }
            }
            Ok(Some(Frame::Resize(size))) => {
                let _ = steer.send(Control::Resize(size)).await;
            }
            Ok(Some(Frame::Signal(name))) => {
                let _ = steer.send(Control::Signal(name)).await;
            }
            Ok(Some(_) | None) | Err(_) => {
                gone.cancel();
                return;
            }
        }
    }
}

async fn dial(
    mut stream: BoxStream,
    sessions: &dyn Sessions,
    project: ProjectId,
    port: u16,
) -> io::Result<()> {
    let mut inside = match sessions.dial(project, port).await {
        Ok(inside) => inside,
        Err(error) => return wire::send(&mut stream, &failed(&error)).await,
    };
    wire::send(&mut stream, &Answer::Ready).await?;
    tokio::io::copy_bidirectional_with_sizes(&mut stream, &mut inside, 64 * 1024, 64 * 1024).await?;
    Ok(())
}

fn failed(error: &Error) -> Answer {
    let why = match error {
        Error::NotRunning { .. } => Failure::NotRunning,
        Error::Refused { .. } => Failure::PortRefused,
        _ => Failure::Other,
    };
    Answer::Failed { why, message: error.to_string() }
}

struct FrameSink(tokio::sync::Mutex<WriteHalf<BoxStream>>);

impl FrameSink {
    async fn send(&self, frame: Frame) -> io::Result<()> {
        wire::send_frame(&mut *self.0.lock().await, &frame).await
    }
}

impl Sink for FrameSink {
    async fn stdout(&self, data: Bytes) -> io::Result<()> {
        self.send(Frame::Stdout(data)).await
    }

    async fn stderr(&self, data: Bytes) -> io::Result<()> {
        self.send(Frame::Stderr(data)).await
    }

    async fn end(&self) -> io::Result<()> {
        self.send(Frame::OutputEnd).await
    }
}
