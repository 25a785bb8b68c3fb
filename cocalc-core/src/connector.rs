//! Byte streams to a host's services.

use std::{fmt, net::IpAddr, time::Duration};

use async_trait::async_trait;
use cocalc_ids::HostId;
use serde::{Deserialize, Serialize};

use crate::{BoxError, stream::BoxStream};

/// Opens byte streams to the services of hosts.
///
/// # Contract
///
/// - The stream's far end has proved that it holds the identity key that the
///   master published for `host`.
/// - `open` ends within `deadline`, one way or the other. Cancel safe.
#[async_trait]
pub trait Connector: fmt::Debug + Send + Sync + 'static {
    /// Opens a stream to `service` of `host`, on behalf of a user at `source`.
    async fn open(
        &self,
        host: HostId,
        service: Service,
        source: Option<IpAddr>,
        deadline: Duration,
    ) -> Result<BoxStream, Error>;
}

/// What a host offers to its authenticated peers.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Service {
    /// HTTP/1.1, as at its public address. Proxies.
    Http,
    /// SSH channels of users whom the peer authenticated. Proxies.
    Ssh,
    /// Streams of snapshots. Hosts.
    Transfer,
    /// Streams of images. Hosts.
    Images,
}

/// Who is at the far end of an authenticated peer connection.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Peer {
    /// A host.
    Host(HostId),
    /// A proxy.
    Proxy(cocalc_ids::ProxyId),
}

/// Why no stream could be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No address is known for that host.
    #[error("host {host} is not known")]
    Unknown {
        /// The host.
        host: HostId,
    },
    /// Whoever answered is not that host, or does not accept us.
    #[error("host {host} could not be authenticated: {reason}")]
    Untrusted {
        /// The host.
        host: HostId,
        /// Why.
        reason: String,
    },
    /// It did not answer in time.
    #[error("host {host} did not answer within {limit:?}")]
    TimedOut {
        /// The host.
        host: HostId,
        /// The deadline.
        limit: Duration,
    },
    /// It cannot be reached.
    #[error("host {host} cannot be reached")]
    Unreachable {
        /// The host.
        host: HostId,
        /// Why.
        source: BoxError,
    },
}
