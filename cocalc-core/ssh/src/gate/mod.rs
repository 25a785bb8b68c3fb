//! Who is let in, and to what.

mod local;
mod remote;
mod restricted;

use std::{fmt, net::IpAddr, sync::Arc};

use async_trait::async_trait;
use cocalc_core::{
    auth::{Admission, Credential, Denial},
    ids::{AccountId, ProjectAlias, ProjectId, Restrictions},
    stream::BoxStream,
};

pub use local::LocalGate;
pub use remote::RemoteGate;

use crate::Sessions;

/// Decides about logins.
///
/// # Contract
///
/// - `login` decides on this one attempt; nothing is remembered between
///   attempts.
/// - An unknown project and a forbidden one are refused in the same words.
#[async_trait]
pub trait Gate: fmt::Debug + Send + Sync + 'static {
    /// Verifies and admits, or refuses.
    async fn login(&self, attempt: Attempt) -> Result<Login, Refusal>;
}

/// Leads to the SSH servers of projects' hosts without a look at what passes.
///
/// # Contract
///
/// - Whoever asks has proved nothing. What an unknown project leads to cannot be
///   told from what a forbidden one does: a host refuses both.
#[async_trait]
pub trait Passage: fmt::Debug + Send + Sync + 'static {
    /// A new connection to the SSH server of `project`'s host, for a user at
    /// `source`.
    async fn pass(&self, project: ProjectId, source: Option<IpAddr>) -> Result<BoxStream, Refusal>;
}

/// Knows projects by other names than their ids.
///
/// # Contract
///
/// - Whoever asks has proved nothing. What it is asked for is any text that can
///   be such a name; a wrong answer lets nobody in.
#[async_trait]
pub trait Names: fmt::Debug + Send + Sync + 'static {
    /// The project of that name, if there is one, as far as it can be known
    /// within a few seconds.
    async fn project(&self, alias: &ProjectAlias) -> Option<ProjectId>;
}

/// Somebody asks to be let into a project. The possession of a key has been
/// proved already.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// The project that is asked for.
    pub project: ProjectId,
    /// What proves who asks.
    pub credential: Credential,
    /// From where, as far as it is known.
    pub source: Option<IpAddr>,
}

/// What an authenticated user gets.
#[derive(Debug)]
#[non_exhaustive]
pub enum Login {
    /// The project.
    Open(Access),
    /// The news that the project is on another host.
    Moved(Moved),
    /// Nothing but a way on, to the projects' own hosts.
    Passage(Arc<dyn Passage>),
}

/// The right to use one project, until it is revoked.
#[derive(Debug)]
pub struct Access {
    /// Which project.
    pub project: ProjectId,
    /// Who it is, as far as this server knows.
    pub account: Option<AccountId>,
    /// Its processes and ports, within the restrictions.
    pub sessions: Arc<dyn Sessions>,
    /// What the key or certificate limits it to. A server refuses terminals
    /// accordingly; `sessions` keeps to it in any case.
    pub restrictions: Restrictions,
    /// Ends the connection when it is revoked.
    pub admission: Admission,
}

/// Where a project has gone.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Moved {
    /// Which project.
    pub project: ProjectId,
    /// The host that has it.
    pub host: cocalc_core::ids::HostId,
    /// `host:port` of that host's SSH server.
    pub ssh: String,
}

impl fmt::Display for Moved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { project, ssh, .. } = self;
        match ssh.rsplit_once(':') {
            Some((host, port)) => write!(
                f,
                "project {project} has moved to {ssh}: use  ssh -p {port} {project}@{}",
                host.trim_start_matches('[').trim_end_matches(']')
            ),
            None => write!(f, "project {project} has moved to another host"),
        }
    }
}

/// Why somebody was not let in, in words that may be shown to anybody.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// The stable code: `access_denied`, `token_expired`, `rate_limited` or
    /// `unauthenticated`.
    pub code: String,
    /// For people.
    pub message: String,
    /// Where the project is, if this host has given it away and therefore
    /// cannot decide. Not for the user, who has proved nothing; a proxy asks
    /// there instead.
    pub elsewhere: Option<Moved>,
}

impl Refusal {
    /// The refusal that tells nothing: of unknown projects, unknown keys, bad
    /// tokens, and of hosts that do not answer.
    pub fn access_denied() -> Self {
        Self {
            code: "access_denied".into(),
            message:
                "Access denied: there is no such project here, or this key or token does not open it, or \
                      its host cannot be reached."
                    .into(),
            elsewhere: None,
        }
    }
}

impl From<&Denial> for Refusal {
    fn from(denial: &Denial) -> Self {
        let (_, code) = denial.public();
        let message = match denial {
            Denial::TokenExpired => "The connect token has expired: get a new one.".to_owned(),
            Denial::RateLimited { retry_after } => {
                format!("Too many attempts: try again in {} s.", retry_after.as_secs().max(1))
            }
            Denial::Unauthenticated => "No credential was shown.".to_owned(),
            _ => return Self::access_denied(),
        };
        Self { code: code.to_owned(), message, elsewhere: None }
    }
}
