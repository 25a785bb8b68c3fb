//! The gate of a proxy: it asks the project's host.

use std::{fmt, io, net::IpAddr, sync::Arc, time::Duration};

use async_trait::async_trait;
use cocalc_core::{
    auth::{Admission, Credential, Denial},
    connector::{Connector, Service},
    ids::{HostId, ProjectId},
    router::{Reach, Router},
    runner::{Error, ExecRequest, Process},
    stream::BoxStream,
    wake::Awake,
};
use tokio::{sync::watch, time::timeout};
use tokio_util::task::AbortOnDropHandle;

use super::{Access, Attempt, Gate, Login, Passage, Refusal};
use crate::{
    Sessions,
    remote::remote_process,
    wire::{self, Answer, Call, Failure, Hello, Shown},
};

/// How long opening a stream to a host may take.
const OPEN_MAX: Duration = Duration::from_secs(10);
/// How long a host may think about a login: it may be waiting for a move.
const LOGIN_MAX: Duration = Duration::from_secs(30);
/// How long a host may take for anything else.
const ANSWER_MAX: Duration = Duration::from_secs(60);
/// How often a project may have moved since the route was learned.
const HOPS_MAX: usize = 3;

/// Lets people in if the project's host does, which decides by its own rights
/// and keeps the login: when it is revoked there, it ends here.
#[derive(Clone)]
pub struct RemoteGate {
    router: Arc<dyn Router>,
    connector: Arc<dyn Connector>,
    decoy: Option<Arc<Decoy>>,
}

type Decoy = dyn Fn(ProjectId) -> Option<HostId> + Send + Sync;

impl fmt::Debug for RemoteGate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteGate").field("router", &self.router).finish_non_exhaustive()
    }
}

impl RemoteGate {
    /// Makes a gate to the hosts that `router` names and `connector` reaches.
    pub fn new(router: Arc<dyn Router>, connector: Arc<dyn Connector>) -> Self {
        Self { router, connector, decoy: None }
    }

    /// Asks for projects that nobody knows at the host that `decoy` names, always
    /// the same for one project, which refuses them as it refuses everybody, and
    /// passes connections to them on to it. Default: they are refused and closed
    /// at once, which tells that there is no such project.
    pub fn decoy(mut self, decoy: impl Fn(ProjectId) -> Option<HostId> + Send + Sync + 'static) -> Self {
        self.decoy = Some(Arc::new(decoy));
        self
    }

    async fn ask(&self, host: HostId, attempt: &Attempt) -> io::Result<(Answer, BoxStream)> {
        let credential = match &attempt.credential {
            Credential::SshKey(key) => Shown::Key(key.clone()),
            Credential::SshCertificate(certificate) => Shown::Certificate(certificate.clone()),
            Credential::Token(token) => Shown::Token(token.expose().to_owned()),
            _ => return Err(io::Error::other("a credential that SSH does not have")),
        };
        let call = Call::Login { credential, source: attempt.source };
        call_host(&*self.connector, host, attempt.project, attempt.source, call, LOGIN_MAX).await
    }
}

#[async_trait]
impl Gate for RemoteGate {
    async fn login(&self, attempt: Attempt) -> Result<Login, Refusal> {
        let project = attempt.project;
        let route = match self.router.route(project).await {
            Ok(route) => route,
            Err(error) => {
                tracing::info!(%project, reason = %cocalc_core::chain(&error), "SSH login refused");
                // What nobody knows takes as long as what is forbidden: a host is
                // asked, which does not know it either.
                if let Some(host) = self.decoy.as_ref().and_then(|decoy| decoy(project)) {
                    let _ = self.ask(host, &attempt).await;
                }
                return Err(Refusal::access_denied());
            }
        };
        let Reach::Remote(_) = route.how else { return Err(Refusal::access_denied()) };
        let mut host = route.host;
        for _ in 0..HOPS_MAX {
            let (answer, stream) = self.ask(host, &attempt).await.map_err(|error| {
                tracing::warn!(%project, %host, %error, "the host of a project did not answer an SSH login");
                Refusal::access_denied()
            })?;
            match answer {
                Answer::LoggedIn { ticket, restrictions } => {
                    let sessions = RemoteSessions {
                        connector: self.connector.clone(),
                        host,
                        source: attempt.source,
                        ticket,
                    };
                    let admission = watch_login(stream);
                    let sessions = Arc::new(sessions);
                    let access = Access { project, account: None, sessions, restrictions, admission };
                    return Ok(Login::Open(access));
                }
                // A route lags behind a move; whoever was there knows better.
                Answer::Moved { host: next, .. } => host = next,
                Answer::Refused { code, message } => return Err(Refusal { code, message, elsewhere: None }),
                answer => {
                    tracing::warn!(%project, %host, ?answer, "the host answered an SSH login with something else");
                    return Err(Refusal::access_denied());
                }
            }
        }
        tracing::warn!(%project, "hosts send each other around for a project");
        Err(Refusal::access_denied())
    }
}

#[async_trait]
impl Passage for RemoteGate {
    async fn pass(&self, project: ProjectId, source: Option<IpAddr>) -> Result<BoxStream, Refusal> {
        let host = match self.router.route(project).await {
            Ok(route) => Some(route.host),
            Err(_) => self.decoy.as_ref().and_then(|decoy| decoy(project)),
        };
        let host = host.ok_or_else(Refusal::access_denied)?;
        let call = Call::Pass { source };
        match call_host(&*self.connector, host, project, source, call, ANSWER_MAX).await {
            Ok((Answer::Ready, stream)) => Ok(stream),
            Ok(_) => Err(Refusal::access_denied()),
            Err(error) => {
                tracing::warn!(%project, %host, %error, "a host did not take an SSH connection");
                Err(Refusal::access_denied())
            }
        }
    }
}

/// Turns a login's stream into an admission that ends with it.
fn watch_login(mut stream: BoxStream) -> Admission {
    let (end, revoked) = watch::channel(None);
    let watching = tokio::spawn(async move {
        let reason = match wire::receive::<Answer>(&mut stream).await {
            Ok(Answer::Ended { message }) => Denial::Forbidden(format!("revoked by the host: {message}")),
            Ok(_) => Denial::Forbidden("the host broke the protocol".into()),
            Err(_) => Denial::NotHere("the connection to the host was lost".into()),
        };
        let _ = end.send(Some(reason));
    });
    Admission::new(revoked, AbortOnDropHandle::new(watching))
}

/// Opens a stream to a host, says what it is for, and returns the answer.
async fn call_host(
    connector: &dyn Connector,
    host: HostId,
    project: ProjectId,
    source: Option<IpAddr>,
    call: Call,
    limit: Duration,
) -> io::Result<(Answer, BoxStream)> {
    let mut stream = connector
        .open(host, Service::Ssh, source, OPEN_MAX)
        .await
        .map_err(|error| io::Error::other(cocalc_core::chain(&error)))?;
    let exchange = async {
        wire::send(&mut stream, &Hello { version: wire::VERSION, project, call }).await?;
        wire::receive::<Answer>(&mut stream).await
    };
    let answer = timeout(limit, exchange).await??;
    Ok((answer, stream))
}

/// Processes and connections of one login at one host, each on a stream of
/// its own.
#[derive(Debug)]
struct RemoteSessions {
    connector: Arc<dyn Connector>,
    host: HostId,
    source: Option<IpAddr>,
    ticket: String,
}

impl RemoteSessions {
    async fn call(&self, project: ProjectId, call: Call) -> io::Result<(Answer, BoxStream)> {
        call_host(&*self.connector, self.host, project, self.source, call, ANSWER_MAX).await
    }

    async fn open(
        &self,
        project: ProjectId,
        operation: &'static str,
        port: u16,
        call: Call,
    ) -> Result<BoxStream, Error> {
        let failed = |source| Error::Backend { backend: "the host", operation, project, source };
        match self.call(project, call).await.map_err(|error| failed(error.into()))? {
            (Answer::Ready, stream) => Ok(stream),
            (Answer::Failed { why: Failure::NotRunning, .. }, _) => Err(Error::NotRunning { project }),
            (Answer::Failed { why: Failure::PortRefused, .. }, _) => Err(Error::Refused { project, port }),
            (Answer::Failed { message, .. }, _) => Err(failed(message.into())),
            (_, _) => Err(failed("it broke the protocol".into())),
        }
    }
}

#[async_trait]
impl Sessions for RemoteSessions {
    async fn wake(&self, project: ProjectId) -> Awake {
        match self.call(project, Call::Wake { ticket: self.ticket.clone() }).await {
            Ok((Answer::Running, _)) => Awake::Running,
            Ok((Answer::Starting { phase }, _)) => Awake::Starting { phase },
            Ok((Answer::Failed { message, .. }, _)) => Awake::Failed { reason: message },
            Ok(_) => Awake::Failed { reason: "the host broke the protocol".into() },
            Err(error) => {
                tracing::warn!(%project, host = %self.host, %error, "the host did not answer");
                Awake::Failed { reason: "the project's host does not answer".into() }
            }
        }
    }

    async fn exec(&self, project: ProjectId, request: ExecRequest) -> Result<Process, Error> {
        let pty = request.pty.is_some();
        let call = Call::Exec { ticket: self.ticket.clone(), request };
        let stream = self.open(project, "run a command in", 0, call).await?;
        Ok(remote_process(stream, project, pty))
    }

    async fn dial(&self, project: ProjectId, port: u16) -> Result<BoxStream, Error> {
        let call = Call::Dial { ticket: self.ticket.clone(), port };
        self.open(project, "connect to a port of", port, call).await
    }
}
