//! Idle connections to apps and hosts, for the next request.

use std::{
    collections::HashMap,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use cocalc_core::{
    ids::{HostId, ProjectId},
    stream::BoxStream,
};
use hyper::client::conn::http1::{Builder, SendRequest};
use hyper_util::rt::TokioIo;

use crate::{body::Body, limits::Limits};

/// To whom a connection leads.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(crate) enum Key {
    App(ProjectId, u16),
    Host(HostId),
}

/// Connections that wait for a request.
#[derive(Debug)]
pub(crate) struct Pool {
    idle: Mutex<Idle>,
    per_target: usize,
    total: usize,
    keep: Duration,
    head_bytes: usize,
}

#[derive(Debug, Default)]
struct Idle {
    targets: HashMap<Key, Vec<(SendRequest<Body>, Instant)>>,
    count: usize,
}

/// A connection in use. Dropped, it is closed.
#[derive(Debug)]
pub(crate) struct Lease {
    pool: Arc<Pool>,
    key: Key,
    pub(crate) sender: SendRequest<Body>,
    /// Whether it served a request before.
    pub(crate) reused: bool,
}

impl Lease {
    /// Keeps the connection for another request.
    pub(crate) fn give_back(self) {
        self.pool.clone().put(self.key, self.sender);
    }
}

impl Pool {
    pub(crate) fn new(limits: &Limits) -> Arc<Self> {
        Arc::new(Self {
            idle: Mutex::default(),
            per_target: limits.idle_per_target,
            total: limits.idle_total,
            keep: limits.idle_for,
            head_bytes: limits.head_bytes.max(8 * 1024),
        })
    }

    /// The most recently used idle connection.
    pub(crate) async fn take(self: &Arc<Self>, key: Key) -> Option<Lease> {
        loop {
            let mut sender = self.pop(key)?;
            if sender.is_closed() {
                continue;
            }
            // The last response has been read; its connection notices a
            // moment later. One that is still sending a request is busy.
            if !sender.is_ready() {
                match tokio::time::timeout(Duration::from_millis(20), sender.ready()).await {
                    Ok(Ok(())) => {}
                    _ => continue,
                }
            }
            return Some(Lease { pool: self.clone(), key, sender, reused: true });
        }
    }

    /// Begins HTTP on a new connection.
    pub(crate) async fn begin(self: &Arc<Self>, key: Key, stream: BoxStream) -> Result<Lease, hyper::Error> {
        let (sender, connection) = Builder::new()
            .max_header_size(self.head_bytes)
            .max_buf_size(self.head_bytes + 64 * 1024)
            .title_case_headers(true)
            .handshake(TokioIo::new(stream))
            .await?;
        // The task ends when the sender is dropped or the far end closes.
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "an upstream connection ended");
            }
        });
        Ok(Lease { pool: self.clone(), key, sender, reused: false })
    }

    /// A connection: an idle one, or what `dial` opens.
    pub(crate) async fn lease<E, F>(
        self: &Arc<Self>,
        key: Key,
        fresh: bool,
        dial: impl FnOnce() -> F,
    ) -> Result<Lease, LeaseError<E>>
    where
        F: Future<Output = Result<BoxStream, E>>,
    {
        if !fresh && let Some(lease) = self.take(key).await {
            return Ok(lease);
        }
        let stream = dial().await.map_err(LeaseError::Dial)?;
        self.begin(key, stream).await.map_err(LeaseError::Begin)
    }

    /// Closes what has been idle for too long.
    pub(crate) fn sweep(&self) {
        let now = Instant::now();
        let mut idle = self.lock();
        idle.targets.retain(|_, senders| {
            senders.retain(|(sender, since)| {
                !sender.is_closed() && now.saturating_duration_since(*since) < self.keep
            });
            !senders.is_empty()
        });
        idle.count = idle.targets.values().map(Vec::len).sum();
    }

    /// Closes everything that is idle.
    pub(crate) fn clear(&self) {
        *self.lock() = Idle::default();
    }

    fn pop(&self, key: Key) -> Option<SendRequest<Body>> {
        let now = Instant::now();
        let mut idle = self.lock();
        let senders = idle.targets.get_mut(&key)?;
        let popped = senders.pop();
        if senders.is_empty() {
            idle.targets.remove(&key);
        }
        let (sender, since) = popped?;
        idle.count -= 1;
        if now.saturating_duration_since(since) >= self.keep {
            // The most recent one is too old, so all of them are.
            let rest = idle.targets.remove(&key).map_or(0, |senders| senders.len());
            idle.count -= rest;
            return None;
        }
        Some(sender)
    }

    fn put(&self, key: Key, sender: SendRequest<Body>) {
        if sender.is_closed() {
            return;
        }
        let mut idle = self.lock();
        if idle.count >= self.total {
            return;
        }
        let senders = idle.targets.entry(key).or_default();
        if senders.len() >= self.per_target {
            return;
        }
        senders.push((sender, Instant::now()));
        idle.count += 1;
    }

    fn lock(&self) -> MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why there is no connection.
#[derive(Debug)]
pub(crate) enum LeaseError<E> {
    Dial(E),
    Begin(hyper::Error),
}
