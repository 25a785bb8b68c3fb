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
    Access, Attempt, Gate, Login, Sessions, SshIngress, Witness,
    channel::PROJECT_ENDED,
    drive::{Control, Ended, Sink, drive},
    environment,
    wire::{self, Answer, Call, Failure, Frame, Hello, Shown},
    witness::Meter,
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
    ingress: Option<SshIngress>,
    witness: Option<Arc<dyn Witness>>,
    logins: Mutex<HashMap<String, Opened>>,
}

/// A login that lasts.
#[derive(Clone)]
struct Opened {
    proxy: ProxyId,
    project: ProjectId,
    sessions: Arc<dyn Sessions>,
    over: CancellationToken,
    meter: Arc<Meter>,
}

impl fmt::Debug for SshPeers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SshPeers").field("gate", &self.gate).finish_non_exhaustive()
    }
}

impl SshPeers {
    /// Lets in whom `gate` lets in.
    pub fn new(gate: Arc<dyn Gate>) -> Self {
        Self { gate, ingress: None, witness: None, logins: Mutex::default() }
    }

    /// Serves connections that a proxy only passes on with `ingress`. Default:
    /// they are refused.
    pub fn ingress(mut self, ingress: SshIngress) -> Self {
        self.ingress = Some(ingress);
        self
    }

    /// Tells `witness` about users whose connections end at a proxy. Default:
    /// nobody is told.
    pub fn witness(mut self, witness: Arc<dyn Witness>) -> Self {
        self.witness = Some(witness);
        self
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
            Call::Pass { source } => match &self.ingress {
                Some(ingress) => {
                    wire::send(&mut stream, &Answer::Ready).await?;
                    ingress.serve_stream(stream, source).await;
                    Ok(())
                }
                None => {
                    let message = "this host takes no SSH connections from proxies".into();
                    wire::send(&mut stream, &Answer::Failed { why: Failure::Other, message }).await
                }
            },
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
                    .run_until_cancelled(exec(stream, &opened, project, request))
                    .await
                    .unwrap_or(Ok(()))
            }
            Call::Dial { ticket, port } => {
                let opened = self.opened(&ticket, proxy, project)?;
                opened.over.run_until_cancelled(dial(stream, &opened, project, port)).await.unwrap_or(Ok(()))
            }
        }
    }

    async fn login(&self, mut stream: BoxStream, proxy: ProxyId, attempt: Attempt) -> io::Result<()> {
        let source = attempt.source;
        let access = match self.gate.login(attempt).await {
            Ok(Login::Open(access)) => access,
            Ok(Login::Passage(_)) => return Err(io::Error::other("a passage is not for peers")),
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
        let meter = Meter::begin(self.witness.clone(), &access, source);
        let Access { project, account: _, sessions, restrictions, admission } = access;
        let opened = Opened { proxy, project, sessions, over: over.clone(), meter: meter.clone() };
        let _registered = self.register(ticket.clone(), opened)?;
        wire::send(&mut stream, &Answer::LoggedIn { ticket, restrictions }).await?;
        let mut byte = [0];
        tokio::select! {
            reason = admission.revoked() => {
                // Everything under it ends before anybody is told.
                over.cancel();
                let (_, code) = reason.public();
                wire::send(&mut stream, &Answer::Ended { message: code.to_owned() }).await
            }
            () = meter.keep_telling() => Ok(()),
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
    opened: &Opened,
    project: ProjectId,
    request: ExecRequest,
) -> io::Result<()> {
    let pty = request.pty.is_some();
    let process = match opened.sessions.exec(project, request).await {
        Ok(process) => process,
        Err(error) => return wire::send(&mut stream, &failed(&error)).await,
    };
    wire::send(&mut stream, &Answer::Ready).await?;
    let (mut reader, writer) = split(stream);
    let sink = FrameSink { writer: tokio::sync::Mutex::new(writer), meter: opened.meter.clone() };
    let (steer, controls) = mpsc::channel(16);
    let gone = CancellationToken::new();
    let feed = async |stdin| feed(&mut reader, stdin, pty, &steer, &gone, &opened.meter).await;
    let ended = tokio::select! {
        ended = drive(process, pty, feed, &sink, controls) => ended,
        () = gone.cancelled() => Ended::Abandoned,
    };
    let last = match ended {
        Ended::Exit(exit) => Frame::Exit(exit),
        Ended::Lost(error) => Frame::Lost(cocalc_core::chain(&error)),
        Ended::Cut => Frame::Lost(PROJECT_ENDED.into()),
        Ended::Abandoned => return Ok(()),
    };
    let mut writer = sink.writer.into_inner();
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
    meter: &Meter,
) {
    let mut stdin = Some(stdin);
    loop {
        match wire::receive_frame(reader).await {
            Ok(Some(Frame::Stdin(data))) => {
                meter.inward(data.len());
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

async fn dial(mut stream: BoxStream, opened: &Opened, project: ProjectId, port: u16) -> io::Result<()> {
    let mut inside = match opened.sessions.dial(project, port).await {
        Ok(inside) => inside,
        Err(error) => return wire::send(&mut stream, &failed(&error)).await,
    };
    wire::send(&mut stream, &Answer::Ready).await?;
    let copying =
        tokio::io::copy_bidirectional_with_sizes(&mut stream, &mut inside, 64 * 1024, 64 * 1024).await?;
    opened.meter.inward(usize::try_from(copying.0).unwrap_or(usize::MAX));
    opened.meter.outward(usize::try_from(copying.1).unwrap_or(usize::MAX));
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

struct FrameSink {
    writer: tokio::sync::Mutex<WriteHalf<BoxStream>>,
    meter: Arc<Meter>,
}

impl FrameSink {
    async fn send(&self, frame: Frame) -> io::Result<()> {
        wire::send_frame(&mut *self.writer.lock().await, &frame).await
    }
}

impl Sink for FrameSink {
    async fn stdout(&self, data: Bytes) -> io::Result<()> {
        self.meter.outward(data.len());
        self.send(Frame::Stdout(data)).await
    }

    async fn stderr(&self, data: Bytes) -> io::Result<()> {
        self.meter.outward(data.len());
        self.send(Frame::Stderr(data)).await
    }

    async fn end(&self) -> io::Result<()> {
        self.send(Frame::OutputEnd).await
    }
}
