//! Drives the routing core: one task, one request after the other.

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock},
    time::Duration,
};

use tokio::{
    sync::{Notify, OwnedSemaphorePermit, mpsc, oneshot},
    time::Instant,
};

use super::Closed;
use crate::router::{Effect, Limits, Outgoing, Received, Router, SocketId};

/// What arrives in order.
#[derive(Debug)]
pub(super) enum Command {
    /// Admits a socket.
    Open { socket: SocketId, name: Arc<str>, limits: Limits, outbox: Outbox, done: oneshot::Sender<()> },
    /// A request of one; the permit is its share of the backlog.
    Request { received: Received, permit: Option<OwnedSemaphorePermit> },
    /// The socket has said all it wanted to say.
    Close { socket: SocketId },
}

/// What overtakes the commands. There is little of it: one `Wrote` for each
/// thing sent at most, one `Close` for each socket.
#[derive(Debug)]
pub(super) enum Control {
    /// So many bytes are on their way.
    Wrote { socket: SocketId, bytes: usize },
    /// The connection broke.
    Close { socket: SocketId },
    /// Ends what belongs to this identity.
    Revoke { name: Arc<str>, done: oneshot::Sender<usize> },
}

/// Where the core puts what is to be sent to one socket. Its length is bounded
/// by the core, which counts what was not yet reported as written.
#[derive(Debug)]
pub(super) struct Outbox {
    pub(super) queue: mpsc::UnboundedSender<Outgoing>,
    pub(super) closed: Arc<CloseSignal>,
}

/// Tells a connection that it was ended, and why.
#[derive(Debug, Default)]
pub(super) struct CloseSignal {
    reason: OnceLock<Closed>,
    notify: Notify,
}

impl CloseSignal {
    pub(super) fn close(&self, reason: Closed) {
        let _ = self.reason.set(reason);
        self.notify.notify_waiters();
    }

    pub(super) fn reason(&self) -> Option<Closed> {
        self.reason.get().copied()
    }

    /// Waits for the end. Cancel safe.
    pub(super) async fn closed(&self) -> Closed {
        loop {
            let notified = self.notify.notified();
            if let Some(reason) = self.reason() {
                return reason;
            }
            notified.await;
        }
    }
}

struct Peer {
    name: Arc<str>,
    outbox: Outbox,
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Also when the core ends, and takes its peers with it.
        self.outbox.closed.close(Closed::Shutdown);
    }
}

/// Runs until every sender is gone, or it is aborted.
pub(super) async fn run(
    mut router: Router,
    started: Instant,
    mut commands: mpsc::Receiver<Command>,
    mut control: mpsc::UnboundedReceiver<Control>,
) {
    let mut peers: HashMap<SocketId, Peer> = HashMap::new();
    loop {
        let now = || started.elapsed();
        tokio::select! {
            biased;
            control = control.recv() => match control {
                None => return,
                Some(Control::Wrote { socket, bytes }) => router.wrote(socket, bytes),
                Some(Control::Close { socket }) => {
                    router.close(socket);
                    peers.remove(&socket);
                }
                Some(Control::Revoke { name, done }) => {
                    let theirs: Vec<_> =
                        peers.iter().filter(|(_, peer)| peer.name == name).map(|(id, _)| *id).collect();
                    for socket in &theirs {
                        router.kick(*socket, Closed::Revoked);
                    }
                    perform(&mut router, &mut peers);
                    let _ = done.send(theirs.len());
                }
            },
            command = commands.recv() => match command {
                None => return,
                Some(Command::Open { socket, name, limits, outbox, done }) => {
                    router.open(socket, limits);
                    peers.insert(socket, Peer { name, outbox });
                    let _ = done.send(());
                }
                Some(Command::Request { received, permit }) => {
                    router.request(received, now());
                    drop(permit);
                }
                Some(Command::Close { socket }) => {
                    router.close(socket);
                    peers.remove(&socket);
                }
            },
            () = at(started, router.deadline()) => {}
        }
        // Also when commands keep coming, before which timers never get a turn.
        router.expire(now());
        perform(&mut router, &mut peers);
    }
}

fn perform(router: &mut Router, peers: &mut HashMap<SocketId, Peer>) {
    while let Some(effect) = router.effect() {
        match effect {
            Effect::Send { socket, outgoing } => {
                if let Some(peer) = peers.get(&socket) {
                    // A connection that has just ended says so itself.
                    let _ = peer.outbox.queue.send(outgoing);
                }
            }
            Effect::Close { socket, reason } => {
                if let Some(peer) = peers.remove(&socket) {
                    peer.outbox.closed.close(reason);
                }
            }
        }
    }
}

async fn at(started: Instant, deadline: Option<Duration>) {
    match deadline.and_then(|deadline| started.checked_add(deadline)) {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
