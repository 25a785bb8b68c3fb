//! Dialing peers.

use std::{
    collections::BTreeMap,
    fmt, io,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use cocalc_auth::{PublicKey, identity::Identity};
use cocalc_core::{
    connector::{Connector, Error, Service},
    router::HostAddress,
    stream::BoxStream,
};
use cocalc_ids::HostId;
use rustls::pki_types::ServerName;
use tokio::{net::TcpStream, sync::Semaphore};
use tokio_rustls::TlsConnector;

use crate::{
    frame::{self, Hello, Welcome},
    tls::{SetupError, Tls},
};

/// How many handshakes with one host are under way at once; more wait for their
/// turn. Half of what a listener allows an address by default, at which two peers
/// may be.
const HANDSHAKES_PER_HOST: usize = 32;

/// Where hosts are and what proves them, as the master published it.
pub type AddressBook = Arc<dyn Fn(HostId) -> Option<HostAddress> + Send + Sync>;

/// Opens streams to hosts by dialing their peer address.
#[derive(Clone)]
pub struct DirectConnector {
    dialer: Dialer,
    book: AddressBook,
}

impl fmt::Debug for DirectConnector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirectConnector").finish_non_exhaustive()
    }
}

impl DirectConnector {
    /// Dials as `identity` whoever is in `book`.
    ///
    /// # Errors
    ///
    /// If TLS does not accept the identity.
    pub fn new(identity: &Identity, book: AddressBook) -> Result<Self, SetupError> {
        Ok(Self { dialer: Dialer::new(identity)?, book })
    }
}

#[async_trait]
impl Connector for DirectConnector {
    async fn open(
        &self,
        host: HostId,
        service: Service,
        source: Option<IpAddr>,
        deadline: Duration,
    ) -> Result<BoxStream, Error> {
        let address = (self.book)(host).ok_or(Error::Unknown { host })?;
        self.dialer.dial(host, &address, service, source, deadline).await
    }
}

/// Dials with one identity.
#[derive(Clone, Debug)]
pub(crate) struct Dialer {
    tls: Tls,
    turns: Arc<Mutex<BTreeMap<HostId, Arc<Semaphore>>>>,
}

impl Dialer {
    pub(crate) fn new(identity: &Identity) -> Result<Self, SetupError> {
        Ok(Self { tls: Tls::new(identity)?, turns: Arc::default() })
    }

    /// Who waits for a host that is silent keeps nobody from another.
    fn turns(&self, host: HostId) -> Arc<Semaphore> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(turns) = turns.get(&host) {
            return Arc::clone(turns);
        }
        // Hosts come and go; those that nobody dials now are made again.
        turns.retain(|_, turns| Arc::strong_count(turns) > 1);
        Arc::clone(turns.entry(host).or_insert_with(|| Arc::new(Semaphore::new(HANDSHAKES_PER_HOST))))
    }

    pub(crate) async fn dial(
        &self,
        host: HostId,
        address: &HostAddress,
        service: Service,
        source: Option<IpAddr>,
        deadline: Duration,
    ) -> Result<BoxStream, Error> {
        let untrusted = |reason: String| Error::Untrusted { host, reason };
        let key: PublicKey = address.identity.parse().map_err(|error| untrusted(format!("{error}")))?;
        let config = self.tls.client(key).map_err(|error| untrusted(cocalc_core::chain(&error)))?;
        let turns = self.turns(host);
        let connect = async {
            // Nobody closes it; without a turn the dialing would only be refused.
            let _turn = turns.acquire().await;
            let stream = TcpStream::connect(&address.peer).await.map_err(unreachable(host))?;
            stream.set_nodelay(true).map_err(unreachable(host))?;
            let name = ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into());
            let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await;
            let mut stream = stream.map_err(|error| handshake(host, error))?;
            let hello = Hello { version: 1, service, source };
            frame::write(&mut stream, &hello).await.map_err(|error| handshake(host, error))?;
            match frame::read(&mut stream).await.map_err(|error| handshake(host, error))? {
                Welcome::Welcome => Ok(Box::pin(stream) as BoxStream),
                Welcome::Refused(reason) => Err(untrusted(reason)),
            }
        };
        match tokio::time::timeout(deadline, connect).await {
            Ok(result) => result,
            Err(_) => Err(Error::TimedOut { host, limit: deadline }),
        }
    }
}

fn unreachable(host: HostId) -> impl Fn(io::Error) -> Error {
    move |error| Error::Unreachable { host, source: error.into() }
}

/// TLS reports a refused key, ours or theirs, as invalid data.
fn handshake(host: HostId, error: io::Error) -> Error {
    let tls = error.get_ref().is_some_and(|source| source.is::<rustls::Error>());
    if tls { Error::Untrusted { host, reason: error.to_string() } } else { unreachable(host)(error) }
}
