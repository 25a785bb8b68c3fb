//! Idle connections to apps and hosts, for the next request.

use std::{
    collections::HashMap,
    fmt,
    future::Future,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use cocalc_core::{
    ids::{Epoch, HostId, ProjectId},
    stream::{BoxStream, Notice, Noticed},
};
use hyper::client::conn::http1::{Builder, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::task::AbortHandle;

use crate::{body::Body, limits::Limits};

/// To whom a connection leads.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(crate) enum Key {
    /// A port of a project, for as long as this host owns it in this epoch.
    App(ProjectId, Epoch, u16),
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
    targets: HashMap<Key, Vec<(Open, Instant)>>,
    count: usize,
}

/// A connection.
#[derive(Debug)]
struct Open {
    sender: SendRequest<Body>,
    heard: Arc<AtomicBool>,
    task: AbortHandle,
}

/// The task of a connection in use; dropped, it ends, whatever the far end does.
struct Running(Option<AbortHandle>);

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

impl fmt::Debug for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Running")
    }
}

/// A connection in use. Dropped, it is closed.
#[derive(Debug)]
pub(crate) struct Lease {
    pool: Arc<Pool>,
    key: Key,
    open: Open,
    running: Running,
    /// Whether it served a request before.
    pub(crate) reused: bool,
    /// Whether no other request can follow on it.
    pub(crate) spent: bool,
}

impl Lease {
    /// What requests are sent by.
    pub(crate) fn sender(&mut self) -> &mut SendRequest<Body> {
        &mut self.open.sender
    }

    /// Begins to listen for an answer.
    pub(crate) fn listen(&self) {
        self.open.heard.store(false, Ordering::Release);
    }

    /// Whether a byte came since [`Self::listen`].
    pub(crate) fn has_heard(&self) -> bool {
        self.open.heard.load(Ordering::Acquire)
    }

    /// Keeps the connection for another request. It may still be sending this
    /// one, to an app that has answered early, and goes on with that in any case.
    pub(crate) fn give_back(mut self) {
        if !self.spent {
            self.running.0 = None;
            self.pool.clone().put(self.key, self.open);
        }
    }

    /// Leaves the connection to what it was switched to.
    pub(crate) fn leave(mut self) {
        self.running.0 = None;
    }
}

/// Notes that something has come.
struct Heard(Arc<AtomicBool>);

impl Notice for Heard {
    fn read(&mut self, _bytes: &[u8]) {
        if !self.0.load(Ordering::Relaxed) {
            self.0.store(true, Ordering::Release);
        }
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

    /// The most recently used idle connection, if it has not been idle for
    /// longer than `age`.
    pub(crate) async fn take(self: &Arc<Self>, key: Key, age: Duration) -> Option<Lease> {
        loop {
            let mut open = self.pop(key, age.min(self.keep))?;
            if open.sender.is_closed() {
                continue;
            }
            // The last response has been read; its connection notices a
            // moment later. One that is still sending a request is busy.
            if !open.sender.is_ready() {
                match tokio::time::timeout(Duration::from_millis(20), open.sender.ready()).await {
                    Ok(Ok(())) => {}
                    _ => continue,
                }
            }
            return Some(self.lend(key, open, true));
        }
    }

    /// Begins HTTP on a new connection.
    pub(crate) async fn begin(self: &Arc<Self>, key: Key, stream: BoxStream) -> Result<Lease, hyper::Error> {
        let heard = Arc::new(AtomicBool::new(false));
        let stream = Noticed::new(stream, Heard(heard.clone()));
        let (sender, connection) = Builder::new()
            .max_header_size(self.head_bytes)
            .max_buf_size(self.head_bytes + 64 * 1024)
            .title_case_headers(true)
            .handshake(TokioIo::new(stream))
            .await?;
        // The task ends with the lease, or when the far end closes.
        let task = tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "an upstream connection ended");
            }
        });
        Ok(self.lend(key, Open { sender, heard, task: task.abort_handle() }, false))
    }

    fn lend(self: &Arc<Self>, key: Key, open: Open, reused: bool) -> Lease {
        let running = Running(Some(open.task.clone()));
        Lease { pool: self.clone(), key, open, running, reused, spent: false }
    }

    /// A connection: one that has been idle for no longer than `age`, or what
    /// `dial` opens.
    pub(crate) async fn lease<E, F>(
        self: &Arc<Self>,
        key: Key,
        age: Option<Duration>,
        dial: impl FnOnce() -> F,
    ) -> Result<Lease, LeaseError<E>>
    where
        F: Future<Output = Result<BoxStream, E>>,
    {
        if let Some(age) = age
            && let Some(lease) = self.take(key, age).await
        {
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
            senders.retain(|(open, since)| {
                !open.sender.is_closed() && now.saturating_duration_since(*since) < self.keep
            });
            !senders.is_empty()
        });
        idle.count = idle.targets.values().map(Vec::len).sum();
    }

    /// Closes what is idle to the apps of a project, but for those of the epoch
    /// in which it is here.
    pub(crate) fn forget(&self, project: ProjectId, here: Option<Epoch>) {
        let mut idle = self.lock();
        idle.targets.retain(
            |key, _| !matches!(key, Key::App(of, epoch, _) if *of == project && Some(*epoch) != here),
        );
        idle.count = idle.targets.values().map(Vec::len).sum();
    }

    /// Closes everything that is idle.
    pub(crate) fn clear(&self) {
        *self.lock() = Idle::default();
    }

    fn pop(&self, key: Key, age: Duration) -> Option<Open> {
        let now = Instant::now();
        let mut idle = self.lock();
        let senders = idle.targets.get_mut(&key)?;
        let popped = senders.pop();
        if senders.is_empty() {
            idle.targets.remove(&key);
        }
        let (open, since) = popped?;
        idle.count -= 1;
        // If the most recent one is too old, so are all the others; they are
        // swept later.
        (now.saturating_duration_since(since) < age).then_some(open)
    }

    fn put(&self, key: Key, open: Open) {
        if open.sender.is_closed() {
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
        senders.push((open, Instant::now()));
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
