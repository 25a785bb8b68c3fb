//! Accepting peers.

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
    connector::{Peer, Service},
    stream::BoxStream,
};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::TlsAcceptor;

use crate::{
    frame::{self, Hello, Welcome},
    tls::{SetupError, Tls, presented},
};

/// Knows which keys are peers'.
pub trait PeerDirectory: Send + Sync + 'static {
    /// Whose key it is; `None` if it is nobody's, or was withdrawn. Must not
    /// block.
    fn peer(&self, key: &PublicKey) -> Option<Peer>;
}

/// A function is a directory.
impl<F> PeerDirectory for F
where
    F: Fn(&PublicKey) -> Option<Peer> + Send + Sync + 'static,
{
    fn peer(&self, key: &PublicKey) -> Option<Peer> {
        self(key)
    }
}

/// A connection of an authenticated peer.
pub struct Incoming {
    /// Who it is.
    pub peer: Peer,
    /// What it wants.
    pub service: Service,
    /// The user's address, as a proxy attests it.
    pub source: Option<IpAddr>,
    /// Everything after the header.
    pub stream: BoxStream,
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = f.debug_struct("Incoming");
        f.field("peer", &self.peer).field("service", &self.service).finish_non_exhaustive()
    }
}

/// Serves the streams of peers.
#[async_trait]
pub trait PeerHandler: Send + Sync + 'static {
    /// Serves one, to its end. Dropped when the listener stops.
    async fn handle(&self, incoming: Incoming);
}

/// An async function is a handler.
#[async_trait]
impl<F, Fut> PeerHandler for F
where
    F: Fn(Incoming) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send,
{
    async fn handle(&self, incoming: Incoming) {
        self(incoming).await;
    }
}

/// Accepts connections of peers: TLS, who it is, what it wants, and then the
/// handler, each connection in a task of its own.
pub struct PeerListener {
    acceptor: TlsAcceptor,
    directory: Arc<dyn PeerDirectory>,
    handler: Arc<dyn PeerHandler>,
    handshake_limit: Duration,
    connections_max: usize,
    handshakes_per_address: usize,
    drain: Duration,
}

impl fmt::Debug for PeerListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerListener").field("connections_max", &self.connections_max).finish_non_exhaustive()
    }
}

/// Makes a [`PeerListener`].
pub struct PeerListenerBuilder {
    tls: Result<TlsAcceptor, SetupError>,
    directory: Arc<dyn PeerDirectory>,
    handler: Arc<dyn PeerHandler>,
    handshake_limit: Duration,
    connections_max: usize,
    handshakes_per_address: usize,
    drain: Duration,
}

impl fmt::Debug for PeerListenerBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerListenerBuilder").finish_non_exhaustive()
    }
}

impl PeerListenerBuilder {
    /// How long TLS and the header may take together. Default: 10 s.
    pub fn handshake_limit(mut self, limit: Duration) -> Self {
        self.handshake_limit = limit;
        self
    }

    /// How many connections are held at once; more are closed. Default: 4096.
    pub fn connections_max(mut self, max: usize) -> Self {
        self.connections_max = max;
        self
    }

    /// How many connections of one address may be in their handshake at once;
    /// more are closed, so that nobody without a key takes the place of those
    /// who have one. Default: 64.
    pub fn handshakes_per_address(mut self, max: usize) -> Self {
        self.handshakes_per_address = max;
        self
    }

    /// How long open connections may go on after the shutdown, for handlers that
    /// end by themselves then. Default: not at all.
    pub fn drain(mut self, limit: Duration) -> Self {
        self.drain = limit;
        self
    }

    /// The listener.
    ///
    /// # Errors
    ///
    /// If TLS does not accept the identity.
    pub fn build(self) -> Result<PeerListener, SetupError> {
        Ok(PeerListener {
            acceptor: self.tls?,
            directory: self.directory,
            handler: self.handler,
            handshake_limit: self.handshake_limit,
            connections_max: self.connections_max,
            handshakes_per_address: self.handshakes_per_address,
            drain: self.drain,
        })
    }
}

impl PeerListener {
    /// Begins with who we are, whom we know, and who serves them.
    pub fn builder(
        identity: &Identity,
        directory: Arc<dyn PeerDirectory>,
        handler: Arc<dyn PeerHandler>,
    ) -> PeerListenerBuilder {
        let server = Tls::new(identity).and_then(|tls| tls.server(Arc::clone(&directory)));
        PeerListenerBuilder {
            tls: server.map(|config| TlsAcceptor::from(Arc::new(config))),
            directory,
            handler,
            handshake_limit: Duration::from_secs(10),
            connections_max: 4096,
            handshakes_per_address: 64,
            drain: Duration::ZERO,
        }
    }

    /// Serves `socket` until `shutdown` is ready; then every connection ends,
    /// after [`drain`](PeerListenerBuilder::drain) at the latest.
    ///
    /// # Cancel safety
    ///
    /// Dropping it ends all connections.
    pub async fn serve(&self, socket: TcpListener, shutdown: impl Future<Output = ()> + Send) {
        let mut shutdown = std::pin::pin!(shutdown);
        let handshakes = Arc::<Handshakes>::default();
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                biased;
                () = &mut shutdown => break,
                // Not only when somebody comes: ended tasks must not pile up.
                Some(_) = connections.join_next() => continue,
                accepted = socket.accept() => accepted,
            };
            let (stream, from) = match accepted {
                Ok((stream, from)) => (stream, from.ip()),
                Err(error) => {
                    // Out of descriptors, mostly; trying at once would spin.
                    tracing::warn!(%error, "cannot accept a peer");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            if connections.len() >= self.connections_max {
                tracing::warn!(max = self.connections_max, "too many peer connections; closed one");
                continue;
            }
            let Some(place) = handshakes.enter(from, self.handshakes_per_address) else {
                tracing::debug!(%from, "too many handshakes; closed one");
                continue;
            };
            let (acceptor, directory) = (self.acceptor.clone(), Arc::clone(&self.directory));
            let (handler, limit) = (Arc::clone(&self.handler), self.handshake_limit);
            connections.spawn(async move {
                let incoming = tokio::time::timeout(limit, welcome(acceptor, &*directory, stream)).await;
                drop(place);
                match incoming {
                    Ok(Ok(incoming)) => handler.handle(incoming).await,
                    Ok(Err(error)) => tracing::debug!(%from, %error, "refused a peer"),
                    Err(_) => tracing::debug!(%from, "a peer did not finish its handshake in time"),
                }
            });
        }
        drop(socket);
        let ended = async { while connections.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(self.drain, ended).await;
        connections.shutdown().await;
    }
}

async fn welcome(
    acceptor: TlsAcceptor,
    directory: &dyn PeerDirectory,
    stream: TcpStream,
) -> io::Result<Incoming> {
    stream.set_nodelay(true)?;
    let mut stream = acceptor.accept(stream).await?;
    let key = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let key = key.ok_or_else(|| frame::invalid("the peer showed no key"))?;
    let key = presented(key).map_err(io::Error::other)?;
    // Asked again: it may have been withdrawn since the handshake began.
    let peer = directory.peer(&key).ok_or_else(|| frame::invalid("nobody's key"))?;
    let hello: Hello = frame::read(&mut stream).await?;
    if hello.version != 1 || !permitted(peer, hello.service) {
        let reason = "this peer has no such service here".to_owned();
        frame::write(&mut stream, &Welcome::Refused(reason)).await?;
        return Err(frame::invalid("asked for a service that is not for it"));
    }
    frame::write(&mut stream, &Welcome::Welcome).await?;
    Ok(Incoming { peer, service: hello.service, source: hello.source, stream: Box::pin(stream) })
}

/// Hosts send snapshots; proxies carry users. Neither has use for the other's.
fn permitted(peer: Peer, service: Service) -> bool {
    match service {
        Service::Transfer | Service::Images => matches!(peer, Peer::Host(_)),
        Service::Http | Service::Ssh => matches!(peer, Peer::Proxy(_)),
        _ => false,
    }
}

/// Handshakes under way, by address.
#[derive(Debug, Default)]
struct Handshakes(Mutex<BTreeMap<IpAddr, usize>>);

impl Handshakes {
    fn enter(self: &Arc<Self>, from: IpAddr, max: usize) -> Option<Place> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(from).or_default();
        if *count >= max {
            return None;
        }
        *count += 1;
        Some(Place { all: Arc::clone(self), from })
    }
}

/// One handshake's place; given back when it is dropped.
struct Place {
    all: Arc<Handshakes>,
    from: IpAddr,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.all.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.from) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.from);
            }
        }
    }
}
