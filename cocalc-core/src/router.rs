//! Which host has a project.

use std::fmt;

use async_trait::async_trait;
use cocalc_ids::{Epoch, HostId, ProjectId};
use serde::{Deserialize, Serialize};

use crate::BoxError;

/// Says where projects are.
///
/// # Contract
///
/// - A route names an epoch; for one project, later answers never have a
///   lower one.
/// - `changes` carries every change that happens after it was called. A
///   receiver that lags learns so, and asks again with `route`.
#[async_trait]
pub trait Router: fmt::Debug + Send + Sync + 'static {
    /// Where `project` is now.
    async fn route(&self, project: ProjectId) -> Result<Route, Error>;

    /// The changes from now on.
    fn changes(&self) -> tokio::sync::broadcast::Receiver<Route>;
}

/// Where a project is.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Route {
    /// Which project.
    pub project: ProjectId,
    /// The host that owns it.
    pub host: HostId,
    /// The owner's epoch.
    pub epoch: Epoch,
    /// How to get there from here.
    pub how: Reach,
}

/// How a project is reached from where the [`Router`] is.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Reach {
    /// It is on this host and may be served.
    Local,
    /// It is on this host, and requests wait: a move is cutting over.
    Parked,
    /// It is on another host, at these addresses.
    Remote(HostAddress),
}

/// Where a host listens, for users and for peers.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct HostAddress {
    /// Base URL for browsers and programs, without a trailing slash, for
    /// instance `http://127.0.0.1:7810`.
    pub url: String,
    /// The domain under which each project has its own origin,
    /// `<project_id>.<domain>`, with port if not the scheme's own; for
    /// instance `alpha.localhost:7810`. Empty if names cannot be had.
    pub domain: String,
    /// `host:port` of the SSH server.
    pub ssh: String,
    /// `host:port` for peers: transfers between hosts, and proxies.
    pub peer: String,
    /// The host's Ed25519 identity key, base64url without padding, which its
    /// peer connections are pinned to.
    pub identity: String,
}

/// Why there is no route.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No such project is known.
    #[error("project {project} has no route")]
    NotFound {
        /// The project.
        project: ProjectId,
    },
    /// Whoever knows did not answer.
    #[error("cannot find the route of project {project}")]
    Unavailable {
        /// The project.
        project: ProjectId,
        /// Why.
        source: BoxError,
    },
}
