//! The broker: connections around one routing core.

mod authorizer;
mod connection;
mod core;
mod local;
mod serve;
mod signing_in;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use cocalc_core::{bus::Bus, subject::Access};
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::{Semaphore, mpsc, oneshot},
    task::JoinHandle,
    time::Instant,
};

use self::{
    core::{Command, Control, Outbox},
    signing_in::SigningIn,
};
use crate::{
    router::{Closed, Failure, Limits, Received, Request, Router, SocketId},
    upgrade::OriginPolicy,
};
pub use authorizer::{Authorizer, Handshake, Identity};
pub(crate) use connection::ws_config;

/// Requests below this don't take a share of the backlog: as many as can wait
/// fit beside it.
const SMALL_BYTES: usize = 64 * 1024;

/// How a broker behaves. The defaults are those of the protocol.
#[derive(Clone, Debug)]
pub struct BrokerConfig {
    /// How many connections there may be. Default: 10,000.
    pub connections_max: usize,
    /// How many of them may belong to one identity. Default: 100.
    pub connections_per_identity_max: usize,
    /// How many may not have signed in yet. Default: 1,000.
    pub signing_in_max: usize,
    /// How many of them may come from one address (of IPv6: one /64 network).
    /// Default: 64.
    ///
    /// Beyond these two, connections are dropped at once, except for those
    /// whose upgrade request carries a token that the authorizer accepts.
    pub signing_in_per_address_max: usize,
    /// How long a connection may take to send its first packet. Default: 45 s.
    pub connect_limit: Duration,
    /// How long the authorizer may take for one answer. Default: 10 s.
    pub authorize_limit: Duration,
    /// How often a client is asked whether it is there. Default: 25 s.
    pub ping_interval: Duration,
    /// How long it may take to say yes. Default: 20 s.
    pub ping_timeout: Duration,
    /// How often `info` is repeated until it is acknowledged. Default: 7.5 s.
    pub info_interval: Duration,
    /// How long it may stay unacknowledged. Default: 2 min.
    pub info_limit: Duration,
    /// How many bytes of requests may wait for the core. Default: 64 MiB.
    pub backlog_bytes_max: usize,
    /// From which origins browsers may connect; only for
    /// [`serve`](Broker::serve), otherwise whoever accepts the upgrade
    /// decides. Default: none but the server's own.
    pub origins: OriginPolicy,
    /// From what group members are drawn, for tests that repeat. Default:
    /// random.
    pub seed: Option<u64>,
}

impl Default for BrokerConfig {
    fn default() -> Self {
        Self {
            connections_max: 10_000,
            connections_per_identity_max: 100,
            signing_in_max: 1000,
            signing_in_per_address_max: 64,
            connect_limit: Duration::from_secs(45),
            authorize_limit: Duration::from_secs(10),
            ping_interval: Duration::from_secs(25),
            ping_timeout: Duration::from_secs(20),
            info_interval: Duration::from_millis(7500),
            info_limit: Duration::from_secs(120),
            backlog_bytes_max: 64 * 1024 * 1024,
            origins: OriginPolicy::SameHost,
            seed: None,
        }
    }
}

/// A broker. Clones are the same one; when the last is dropped, it ends, and
/// all its connections with it.
#[derive(Clone, Debug)]
pub struct Broker(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    shared: Arc<Shared>,
    core: JoinHandle<()>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.core.abort();
    }
}

/// What connections share with the broker, without keeping it alive.
#[derive(Debug)]
struct Shared {
    config: BrokerConfig,
    authorizer: Arc<dyn Authorizer>,
    commands: mpsc::Sender<Command>,
    control: mpsc::UnboundedSender<Control>,
    /// Bytes of requests that wait for the core.
    backlog: Arc<Semaphore>,
    started: Instant,
    next_socket: AtomicU64,
    connected: AtomicUsize,
    by_identity: Mutex<HashMap<Arc<str>, usize>>,
    signing_in: Mutex<SigningIn>,
}

impl Broker {
    /// Starts a broker, without a listener.
    ///
    /// # Panics
    ///
    /// Outside a Tokio runtime.
    pub fn start(config: BrokerConfig, authorizer: Arc<dyn Authorizer>) -> Self {
        let (commands, command_queue) = mpsc::channel(256);
        let (control, control_queue) = mpsc::unbounded_channel();
        let seed = config.seed.unwrap_or_else(crate::random::number);
        let backlog = config.backlog_bytes_max.clamp(1, Semaphore::MAX_PERMITS);
        let shared = Arc::new(Shared {
            config,
            authorizer,
            commands,
            control,
            backlog: Arc::new(Semaphore::new(backlog)),
            started: Instant::now(),
            next_socket: AtomicU64::new(1),
            connected: AtomicUsize::new(0),
            by_identity: Mutex::default(),
            signing_in: Mutex::default(),
        });
        let core = core::run(Router::new(seed), shared.started, command_queue, control_queue);
        let core = tokio::spawn(core);
        Self(Arc::new(Inner { shared, core }))
    }

    /// Serves one connection: a byte stream on which the WebSocket upgrade has
    /// been answered (see [`upgrade`](crate::upgrade)). Returns when it has
    /// ended, and why.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future ends the connection.
    pub fn accept(
        &self,
        io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        handshake: Handshake,
    ) -> impl Future<Output = Ended> + Send + 'static {
        connection::run(self.0.shared.clone(), io, Vec::new(), handshake)
    }

    /// Accepts and serves connections from `listener`, at any path that ends
    /// in `/conat/`, until the future is dropped: the simplest way, for
    /// processes that serve nothing else there.
    pub async fn serve(&self, listener: TcpListener) {
        serve::serve(self.0.shared.clone(), listener).await;
    }

    /// Ends all connections and local clients of the identity with this name.
    /// When it returns, nothing more is delivered to them or taken from them;
    /// how many there were. New connections are the authorizer's to refuse.
    pub async fn revoke(&self, name: &str) -> usize {
        let (done, result) = oneshot::channel();
        let name: Arc<str> = name.into();
        // First who is on the way in: once they are no longer on this list,
        // the core knows them.
        self.0.shared.signing_in().revoke(&name);
        if self.0.shared.control.send(Control::Revoke { name, done }).is_err() {
            return 0;
        }
        result.await.unwrap_or(0)
    }

    /// A client within this process, which acts as `identity`. It is subject
    /// to the authorizer like any other.
    pub fn local_bus(&self, identity: Identity) -> Arc<dyn Bus> {
        Arc::new(local::LocalBus::new(self.0.shared.clone(), identity))
    }

    /// How many connections have signed in.
    pub fn connections(&self) -> usize {
        self.0.shared.connected.load(Ordering::Relaxed)
    }
}

/// Why a connection ended.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum Ended {
    /// The client left, or its connection broke.
    ByPeer,
    /// It did not answer in time.
    Silent,
    /// It broke the protocol.
    Protocol(String),
    /// It could not sign in.
    Refused(String),
    /// It was ended from this side.
    Closed(Closed),
    /// There were too many connections.
    Busy,
}

impl Shared {
    fn socket(&self) -> SocketId {
        SocketId(self.next_socket.fetch_add(1, Ordering::Relaxed))
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Makes the core know a socket; `false` if the broker has ended.
    async fn open(&self, socket: SocketId, identity: &Identity, outbox: Outbox) -> bool {
        let (done, opened) = oneshot::channel();
        let (name, limits) = (identity.shared_name(), identity.limits());
        let open = Command::Open { socket, name, limits, outbox, done };
        self.commands.send(open).await.is_ok() && opened.await.is_ok()
    }

    /// Hands a request to the core, when there is room for it; `false` if the
    /// broker has ended.
    async fn ask(&self, received: Received) -> bool {
        let bytes = match &received.request {
            Request::Publish(publication) => publication.bytes(),
            Request::Call(call) => call.blob.as_ref().map_or(0, bytes::Bytes::len),
            Request::Answer { value, .. } => value.blob.as_ref().map_or(0, bytes::Bytes::len),
            _ => 0,
        };
        // Small ones are bounded by the length of the queue.
        let permit = if bytes < SMALL_BYTES {
            None
        } else {
            let share = bytes.min(self.config.backlog_bytes_max).try_into().unwrap_or(u32::MAX);
            self.backlog.clone().acquire_many_owned(share).await.ok()
        };
        self.commands.send(Command::Request { received, permit }).await.is_ok()
    }

    /// Whether `identity` may do this. An authorizer that doesn't answer has
    /// not said yes.
    async fn may(&self, identity: &Identity, subject: &str, access: Access) -> bool {
        if let Some(answer) = identity.may_use_inbox(subject, access) {
            return answer;
        }
        let answer = self.authorizer.may(identity, subject, access);
        tokio::time::timeout(self.config.authorize_limit, answer).await.unwrap_or(false)
    }

    /// Replaces what `identity` may not do by the refusal of it, and returns
    /// what was refused.
    async fn authorize(&self, identity: &Identity, request: &mut Request) -> Vec<(String, Access)> {
        let mut refused = Vec::new();
        match request {
            Request::Publish(publication) => {
                let subject = &publication.subject;
                self.check_one(identity, subject, &mut refused).await;
                // Whoever answers does so with rights of its own, so nobody
                // may send the answer to a subject that is not its own.
                if let Some(reply) = publication.reply()
                    && identity.may_use_inbox(&reply, Access::Subscribe) != Some(true)
                {
                    refused.push((reply, Access::Publish));
                }
            }
            Request::WaitForInterest { subject, .. } => self.check_one(identity, subject, &mut refused).await,
            Request::Call(call) => self.check_one(identity, &call.subject, &mut refused).await,
            Request::Subscribe(batch) | Request::Serve(batch) => {
                for item in &mut batch.items {
                    let Ok(listen) = item else { continue };
                    let pattern = &listen.pattern;
                    if !cocalc_core::subject::is_pattern(pattern) {
                        *item = Err(Failure::subject());
                    } else if !self.may(identity, pattern, Access::Subscribe).await {
                        refused.push((pattern.clone(), Access::Subscribe));
                        *item = Err(denied(pattern, Access::Subscribe));
                    }
                }
                return refused;
            }
            Request::Unsubscribe(_)
            | Request::StopServing(_)
            | Request::Subscriptions
            | Request::Answer { .. }
            | Request::Refuse(_)
            | Request::Echo(_)
            | Request::Tell(_) => {}
        }
        if let Some((subject, access)) = refused.first() {
            *request = Request::Refuse(denied(subject, *access));
        }
        refused
    }

    async fn check_one(&self, identity: &Identity, subject: &str, refused: &mut Vec<(String, Access)>) {
        // The core refuses malformed subjects; nobody is asked about those.
        let asked = cocalc_core::subject::is_subject(subject);
        if asked && !self.may(identity, subject, Access::Publish).await {
            refused.push((subject.to_owned(), Access::Publish));
        }
    }

    fn signing_in(&self) -> MutexGuard<'_, SigningIn> {
        self.signing_in.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a connection of `identity`, unless there are too many.
    fn admit(self: &Arc<Self>, identity: &Identity) -> Option<Admitted> {
        let name = identity.shared_name();
        let mut by_identity = self.by_identity.lock().unwrap_or_else(PoisonError::into_inner);
        let own = by_identity.get(&name).copied().unwrap_or(0);
        if own >= self.config.connections_per_identity_max
            || self.connected.load(Ordering::Relaxed) >= self.config.connections_max
        {
            return None;
        }
        by_identity.insert(name.clone(), own + 1);
        self.connected.fetch_add(1, Ordering::Relaxed);
        Some(Admitted { shared: self.clone(), name })
    }
}

/// A connection that is counted until this is dropped.
#[derive(Debug)]
struct Admitted {
    shared: Arc<Shared>,
    name: Arc<str>,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.shared.connected.fetch_sub(1, Ordering::Relaxed);
        let mut by_identity = self.shared.by_identity.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = by_identity.get_mut(&self.name) {
            *own -= 1;
            if *own == 0 {
                by_identity.remove(&self.name);
            }
        }
    }
}

fn denied(subject: &str, access: Access) -> Failure {
    let action = match access {
        Access::Publish => "publishing to",
        Access::Subscribe => "subscribing to",
    };
    Failure { code: 403, message: format!("permission denied {action} '{subject}'") }
}

/// What a client is told about its connection.
fn info(identity: Result<&Identity, &Failure>, id: &str) -> Value {
    let (user, limits, inbox) = match identity {
        Ok(identity) => (identity.user_value().clone(), identity.limits(), Some(identity.inbox_prefix())),
        Err(failure) => {
            let user = serde_json::json!({
                "error": format!("Error: {}", failure.message),
                "code": failure.code,
            });
            (user, Limits::default(), None)
        }
    };
    let max_payload = limits.message_bytes_max.min(crate::wire::MESSAGE_BYTES_MAX);
    serde_json::json!({ "max_payload": max_payload, "id": id, "user": user, "inbox": inbox })
}
