//! Keeps the knowledge current: registers, follows the stream, acknowledges,
//! renews the lease.

use std::{fmt, future::Future, pin::Pin, sync::Arc, time::Duration};

use async_trait::async_trait;
use cocalc_auth::{
    audit::Head,
    identity::Identity,
    stream::{Entry, Frame},
};
use cocalc_core::{
    bus::{self, Bus, Payload},
    chain,
    connector::Peer,
    control::{
        Keepalive, KeepaliveReply, PeerReply, PeerRequest, Register, Registered, api_subject,
        keepalive_subject, stream_subject,
    },
    ids::SessionId,
};
use futures_util::FutureExt;
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
};

use crate::{AuditLog, Knowledge, knowledge};

/// How long the master may take to answer.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);
/// How long closed connections may take to go before their change is
/// acknowledged nevertheless.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);
/// Frames that are saved together.
const BATCH: usize = 256;
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(5);
const TIDY_EVERY: Duration = Duration::from_secs(60);
/// How often the master is told the head of the audit chain: what is rewritten
/// within that time does not show.
const AUDIT_EVERY: Duration = Duration::from_secs(300);
const AUDIT_RETRY: Duration = Duration::from_secs(10);

/// What the daemon does for the driver. Calls return quickly.
#[async_trait]
pub trait PeerHandler: Send + Sync + 'static {
    /// Introduces this process; called for each registration.
    async fn register(&self) -> Register;

    /// The master's answer. Projects that it names as another host's, or of a
    /// higher epoch, must be stopped.
    fn registered(&self, reply: &Registered);

    /// An entry of the stream, in order, `Reset` and `Live` included; first,
    /// those that an earlier life of the daemon had saved.
    fn entry(&self, entry: &Entry);
}

/// What a [`StreamDriver`] drives with.
pub struct DriverConfig {
    /// Who this is.
    pub peer: Peer,
    /// This start of the process.
    pub session: SessionId,
    /// Commands and the stream.
    pub bus: Arc<dyn Bus>,
    /// A connection of its own for the lease: a large frame on the other must
    /// not hold it up.
    pub keepalive: Arc<dyn Bus>,
    /// The daemon.
    pub handler: Arc<dyn PeerHandler>,
    /// The log whose head the master is told.
    pub audit: Option<AuditReport>,
}

/// A log whose head the master is told: every five minutes if there was
/// anything, whenever a file is closed, and when
/// [`StreamDriver::report_audit`] is called.
#[derive(Clone, Debug)]
pub struct AuditReport {
    /// The log.
    pub log: AuditLog,
    /// Whose it is: signs the head.
    pub identity: Arc<Identity>,
}

impl fmt::Debug for DriverConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DriverConfig").field("peer", &self.peer).finish_non_exhaustive()
    }
}

/// Runs until it is dropped.
pub struct StreamDriver {
    connected: watch::Receiver<bool>,
    shared: Arc<Shared>,
    _tasks: JoinSet<()>,
}

impl StreamDriver {
    /// Starts to keep `knowledge` current. Must be called in a runtime.
    pub fn start(knowledge: Arc<Knowledge>, config: DriverConfig) -> Self {
        knowledge.fetch_from(config.bus.clone(), config.peer);
        let (connected, receiver) = watch::channel(false);
        let shared = Arc::new(Shared {
            knowledge,
            config,
            connected,
            progress: watch::Sender::new(None),
            again: Notify::new(),
            resync: Notify::new(),
            renewed: Notify::new(),
            registered: Notify::new(),
        });
        for entry in shared.knowledge.take_loaded() {
            shared.config.handler.entry(&entry);
        }
        let mut tasks = JoinSet::new();
        tasks.spawn(shared.clone().follow());
        tasks.spawn(shared.clone().acknowledge());
        tasks.spawn(shared.clone().keep_alive());
        tasks.spawn(shared.clone().expire());
        tasks.spawn(shared.clone().tidy());
        if shared.config.audit.is_some() {
            tasks.spawn(shared.clone().report_audit());
        }
        Self { connected: receiver, shared, _tasks: tasks }
    }

    /// Tells the master where the audit chain is now, for instance before the
    /// daemon ends; whether the master has kept it. Takes at most 15 seconds;
    /// without a log or a master, no time.
    ///
    /// # Cancel safety
    ///
    /// What was sent stays sent.
    pub async fn report_audit(&self) -> bool {
        *self.connected.borrow() && self.shared.report_head().await.unwrap_or(false)
    }

    /// Whether this process is registered and the whole state was received.
    pub fn connected(&self) -> watch::Receiver<bool> {
        self.connected.clone()
    }
}

impl fmt::Debug for StreamDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamDriver").field("connected", &self.connected).finish_non_exhaustive()
    }
}

struct Shared {
    knowledge: Arc<Knowledge>,
    config: DriverConfig,
    connected: watch::Sender<bool>,
    /// What was applied and saved, and is to be acknowledged.
    progress: watch::Sender<Option<(u64, u64)>>,
    /// The master does not know this session any more.
    again: Notify,
    /// The stream lags behind what the master says.
    resync: Notify,
    /// A lease was renewed: deadlines are later.
    renewed: Notify,
    /// The master knows this session: a lease can be had.
    registered: Notify,
}

/// Why a session with the master ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("the bus failed")]
    Bus(#[from] bus::Error),
    #[error("a message is not what was agreed")]
    Json(#[from] serde_json::Error),
    #[error("what came could not be kept")]
    Knowledge(#[from] knowledge::Error),
    #[error("the master refused: {0}")]
    Refused(String),
    #[error("the stream's subscription ended")]
    Unsubscribed,
    #[error("the master asks to register again")]
    Again,
}

type Syncing<'a> = Pin<Box<dyn Future<Output = Result<(), Ended>> + Send + 'a>>;

impl Shared {
    async fn request(&self, request: &PeerRequest, limit: Duration) -> Result<PeerReply, Ended> {
        let subject = api_subject(self.config.peer);
        let reply = self.config.bus.request(&subject, Payload::json(request)?, limit).await?;
        match reply.payload.parse()? {
            PeerReply::Error { message } => Err(Ended::Refused(message)),
            reply => Ok(reply),
        }
    }

    /// One session with the master after the other.
    async fn follow(self: Arc<Self>) {
        let mut wait = RETRY_MIN;
        loop {
            let ended = match self.session(&mut wait).await {
                Err(ended) => ended,
                Ok(never) => match never {},
            };
            self.connected.send_replace(false);
            tracing::info!(reason = %chain(&ended), retry_ms = wait.as_millis(), "not connected to the master");
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(RETRY_MAX);
        }
    }

    async fn session(&self, wait: &mut Duration) -> Result<std::convert::Infallible, Ended> {
        let subject = stream_subject(self.config.peer);
        let mut stream = self.config.bus.subscribe(&subject, None).await?;
        let register = Box::new(self.config.handler.register().await);
        let sent = self.knowledge.clock.boot();
        let registered = match self.request(&PeerRequest::Register(register), REQUEST_LIMIT).await? {
            PeerReply::Registered(registered) => registered,
            _ => return Err(Ended::Refused("the answer is to another question".to_owned())),
        };
        self.knowledge.registered(&registered, sent);
        self.config.handler.registered(&registered);
        // Said of an earlier session.
        let _ = self.again.notified().now_or_never();
        self.registered.notify_one();
        // Frames may come before the answer: both are listened to at once.
        let mut syncing: Option<Syncing<'_>> = Some(Box::pin(self.sync()));
        loop {
            let message = tokio::select! {
                biased;
                // A session that is over must not eat what is left of its stream.
                () = self.again.notified() => return Err(Ended::Again),
                done = async { match &mut syncing { Some(sync) => sync.await, None => std::future::pending().await } } => {
                    done?;
                    syncing = None;
                    continue;
                }
                () = self.resync.notified(), if syncing.is_none() => {
                    syncing = Some(Box::pin(self.sync()));
                    continue;
                }
                // A stream with nothing new is whole once the master says so.
                () = self.renewed.notified() => {
                    self.connected.send_if_modified(|old| {
                        let live = self.knowledge.is_live();
                        std::mem::replace(old, live) != live
                    });
                    continue;
                }
                message = stream.next() => message.ok_or(Ended::Unsubscribed)?,
            };
            let mut frames = decode(&message.payload)?;
            let mut ended = false;
            while frames.len() < BATCH {
                match stream.next().now_or_never() {
                    Some(Some(message)) => frames.extend(decode(&message.payload)?),
                    Some(None) => {
                        ended = true;
                        break;
                    }
                    None => break,
                }
            }
            let need_sync = self.knowledge.apply(&frames, |entry| self.config.handler.entry(entry)).await?;
            if self.knowledge.is_live() {
                *wait = RETRY_MIN;
                self.connected.send_replace(true);
                let position = self.knowledge.position().map(|at| (at.stream, at.seq));
                self.progress.send_if_modified(|old| std::mem::replace(old, position) != position);
            }
            if ended {
                return Err(Ended::Unsubscribed);
            }
            if need_sync {
                self.connected.send_replace(false);
                syncing = Some(Box::pin(self.sync()));
            }
        }
    }

    async fn sync(&self) -> Result<(), Ended> {
        let position = self.knowledge.begin_sync();
        self.request(&PeerRequest::Sync { position }, REQUEST_LIMIT).await?;
        Ok(())
    }

    async fn acknowledge(self: Arc<Self>) {
        let mut progress = self.progress.subscribe();
        while progress.changed().await.is_ok() {
            let Some((stream, seq)) = *progress.borrow_and_update() else { continue };
            if !self.knowledge.closed(CLOSE_LIMIT).await {
                tracing::warn!(seq, "connections that were told to close are still there");
            }
            self.knowledge.acknowledged(stream, seq);
            // A lost acknowledgement is made good by the next, or by the
            // position in the next keepalive.
            let request = PeerRequest::Acknowledge { stream, seq };
            if let Err(error) = self.request(&request, REQUEST_LIMIT).await {
                tracing::debug!(error = %chain(&error), "cannot acknowledge");
            }
        }
    }

    async fn keep_alive(self: Arc<Self>) {
        let mut behind_at = None;
        // Before that, nobody would know this session.
        self.registered.notified().await;
        loop {
            let settings = self.knowledge.settings();
            let every = Duration::from_millis(settings.keepalive_ms.max(50));
            let sent = self.knowledge.clock.boot();
            let position = self.knowledge.is_live().then(|| self.knowledge.position()).flatten();
            let position = position.map(|at| (at.stream, at.seq));
            // The master settles receipts by this: not by what is not on disk yet,
            // or has connections to close.
            let in_force = self.knowledge.in_force();
            let pause = match self.renew(in_force, every.max(RETRY_MIN)).await {
                Ok(reply) if reply.lease_ms == 0 => {
                    self.again.notify_one();
                    RETRY_MIN
                }
                Ok(reply) => {
                    let behind = self.knowledge.renewed(&reply, sent, position);
                    self.renewed.notify_waiters();
                    // One beat behind is a frame under way; two without a step
                    // forward is a stream that does not come.
                    let now_at = self.knowledge.position();
                    if behind && behind_at == Some(now_at) {
                        self.resync.notify_one();
                    }
                    behind_at = behind.then_some(now_at);
                    if let Err(error) = self.knowledge.save_standing().await {
                        tracing::warn!(error = %chain(&error), "the lease is not saved");
                    }
                    every.saturating_sub(self.knowledge.clock.boot().saturating_sub(sent))
                }
                Err(error) => {
                    tracing::debug!(error = %chain(&error), "the lease was not renewed");
                    (every / 4).max(RETRY_MIN)
                }
            };
            // After a registration at once: the lease may have been refused.
            let _ = tokio::time::timeout(pause, self.registered.notified()).await;
        }
    }

    async fn renew(&self, position: Option<(u64, u64)>, limit: Duration) -> Result<KeepaliveReply, Ended> {
        let request = Keepalive { session: self.config.session, position };
        let subject = keepalive_subject(self.config.peer);
        let reply = self.config.keepalive.request(&subject, Payload::json(&request)?, limit).await?;
        Ok(reply.payload.parse()?)
    }

    /// Closes what time alone has ended.
    async fn expire(self: Arc<Self>) {
        loop {
            let renewed = self.renewed.notified();
            let next = self.knowledge.expire();
            let now = self.knowledge.clock.boot();
            // At most a second, for a connection with a stricter grace may be
            // admitted meanwhile, and the machine may sleep.
            let wait = next.map_or(RETRY_MAX, |next| next.saturating_sub(now)).min(Duration::from_secs(1));
            let _ = tokio::time::timeout(wait.max(Duration::from_millis(5)), renewed).await;
        }
    }

    /// Forgets used tokens and sessions whose time is over.
    async fn tidy(self: Arc<Self>) {
        loop {
            if let Err(error) = self.knowledge.tidy().await {
                tracing::warn!(error = %chain(&error), "cannot forget what is over");
            }
            tokio::time::sleep(TIDY_EVERY).await;
        }
    }

    async fn report_audit(self: Arc<Self>) {
        let Some(report) = &self.config.audit else { return };
        let mut rotations = report.log.rotations();
        let mut connected = self.connected.subscribe();
        let mut reported = None;
        loop {
            if connected.wait_for(|connected| *connected).await.is_err() {
                return;
            }
            let mut wait = AUDIT_EVERY;
            let now = Some(report.log.head());
            if now != reported {
                match self.report_head().await {
                    // What the master does not want it will not want later.
                    Ok(_) => reported = now,
                    Err(error) => {
                        tracing::debug!(error = %chain(&error), "the audit chain's head was not told");
                        wait = AUDIT_RETRY;
                    }
                }
            }
            let _ = tokio::time::timeout(wait, rotations.changed()).await;
        }
    }

    /// Tells the master the head of the chain; whether it was kept.
    async fn report_head(&self) -> Result<bool, Ended> {
        let Some(AuditReport { log, identity }) = self.config.audit.clone() else { return Ok(false) };
        let head = tokio::task::spawn_blocking(move || log.durable_head());
        let Ok(Some((count, hash))) = head.await else {
            return Err(Ended::Refused("the audit log is not durable".to_owned()));
        };
        if count == 0 {
            return Ok(true);
        }
        let head = Head { count, hash, time: self.knowledge.clock.wall() };
        let signature = head.sign(&peer_name(self.config.peer), &identity);
        let Head { count, hash: head, time } = head;
        let request = PeerRequest::AuditHead { count, head, time, signature };
        match self.request(&request, REQUEST_LIMIT).await {
            Ok(_) => Ok(true),
            Err(Ended::Refused(reason)) => {
                tracing::error!(reason, "the master does not take the audit chain's head");
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}

/// As the master calls it.
fn peer_name(peer: Peer) -> String {
    match peer {
        Peer::Host(id) => format!("host:{id}"),
        Peer::Proxy(id) => format!("proxy:{id}"),
    }
}

/// One frame, or several in an array.
fn decode(payload: &Payload) -> Result<Vec<Frame>, serde_json::Error> {
    if payload.data.first() == Some(&b'[') { payload.parse() } else { Ok(vec![payload.parse()?]) }
}
