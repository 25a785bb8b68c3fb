//! Receiving snapshots from other hosts.

use std::{
    collections::BTreeMap,
    fmt, io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use cocalc_core::{
    connector::Peer,
    control::{CommandError, ErrorCode},
    moves::host::Inbound,
    storage::SendHeader,
    stream::BoxStream,
};
use cocalc_ids::{HostId, MoveId};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, MissedTickBehavior, interval_at, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    Incoming,
    chunks::Pace,
    frame::{self, Answer, Decision, Offer},
    send::PACE,
    session::Session,
};

/// Takes in the snapshots that authenticated hosts send. Clones are one
/// receiver.
///
/// When the connection of a sender that can begin again breaks, what has come
/// is kept for a while: the sender comes back, hears how much that is and its
/// hash, and goes on from there if its stream still begins so. Only the same
/// host may, for the same move and the same snapshot. Nothing survives the
/// process.
#[derive(Clone)]
pub struct SnapshotReceiver(Arc<Inner>);

struct Inner {
    inbound: Arc<dyn Inbound>,
    pace: Pace,
    wait: Duration,
    waiting_max: usize,
    sessions: Mutex<BTreeMap<Key, Entry>>,
}

/// Each host sends one snapshot of a move at a time.
type Key = (HostId, MoveId);

struct Entry {
    session: Arc<Session>,
    /// Since when nobody feeds it.
    waiting: Option<Instant>,
}

impl fmt::Debug for SnapshotReceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SnapshotReceiver").field("inbound", &self.0.inbound).finish_non_exhaustive()
    }
}

/// Makes a [`SnapshotReceiver`].
#[derive(Debug)]
pub struct SnapshotReceiverBuilder {
    inbound: Arc<dyn Inbound>,
    pace: Pace,
    wait: Duration,
    waiting_max: usize,
}

impl SnapshotReceiverBuilder {
    /// How long what has come is kept for a sender that is gone. Default: two
    /// minutes. The storage must not give up before.
    pub fn wait(mut self, limit: Duration) -> Self {
        self.wait = limit;
        self
    }

    /// How many snapshots wait so at once; the one that has waited longest goes
    /// first. Each takes up to three MiB. Default: 16.
    pub fn waiting_max(mut self, max: usize) -> Self {
        self.waiting_max = max;
        self
    }

    /// The receiver.
    pub fn build(self) -> SnapshotReceiver {
        SnapshotReceiver(Arc::new(Inner {
            inbound: self.inbound,
            pace: self.pace,
            wait: self.wait,
            waiting_max: self.waiting_max,
            sessions: Mutex::default(),
        }))
    }
}

impl SnapshotReceiver {
    /// Gives what it takes in to `inbound`.
    pub fn builder(inbound: Arc<dyn Inbound>) -> SnapshotReceiverBuilder {
        SnapshotReceiverBuilder { inbound, pace: PACE, wait: Duration::from_secs(120), waiting_max: 16 }
    }

    /// With the defaults.
    pub fn new(inbound: Arc<dyn Inbound>) -> Self {
        Self::builder(inbound).build()
    }

    /// How many snapshots wait for their senders.
    pub fn waiting(&self) -> usize {
        self.0.sessions().values().filter(|entry| entry.waiting.is_some()).count()
    }

    /// Takes in the snapshot that a host sends, if it is expected, and answers
    /// with its receipt or the reason why not.
    ///
    /// # Errors
    ///
    /// If the connection broke or the peer spoke out of turn.
    ///
    /// # Cancel safety
    ///
    /// Dropping it is like a connection that breaks.
    pub async fn serve(&self, incoming: Incoming) -> io::Result<()> {
        let Peer::Host(host) = incoming.peer else {
            return Err(frame::invalid("only hosts send snapshots"));
        };
        self.receive(host, incoming.stream).await
    }

    async fn receive(&self, host: HostId, wire: BoxStream) -> io::Result<()> {
        let pace = self.0.pace;
        let (mut from, mut to) = tokio::io::split(wire);
        let offer: io::Result<Offer> = timeout(pace.stall, frame::read(&mut from)).await?;
        let Offer { move_id, header, again } = offer?;
        let known = match self.0.inbound.offered(host, move_id, &header).await {
            Ok(None) => None,
            Ok(Some(snapshot)) => Some(Answer::Have(snapshot)),
            Err(error) => Some(Answer::Refused(error)),
        };
        if let Some(answer) = known {
            return timeout(pace.stall, frame::write(&mut to, &answer)).await?;
        }
        let key = (host, move_id);
        if again
            && let Some(session) = self.0.find(key, &header)
            && let Some(turn) = Turn::take(&self.0, key, session).await
        {
            let prefix = turn.session.feeder.try_lock().map(|feeder| feeder.prefix.clone());
            let prefix = prefix.map_err(|_| frame::invalid("two connections send the same snapshot"))?;
            let answer = Answer::Resume { bytes: prefix.bytes, sha256: prefix.hex() };
            timeout(pace.stall, frame::write(&mut to, &answer)).await??;
            loop {
                // It reads all of that again before it answers.
                let decision: io::Result<Decision> = timeout(pace.stall, frame::read(&mut from)).await?;
                match decision? {
                    Decision::Checking => {}
                    Decision::Continue => return turn.feed(&mut from, &mut to).await,
                    Decision::Restart => break,
                }
            }
            turn.end();
        }
        let session = self.0.begin(key, header);
        let Some(mut turn) = Turn::take(&self.0, key, session).await else {
            return Err(frame::invalid("another connection has taken its place"));
        };
        turn.keep = again;
        timeout(pace.stall, frame::write(&mut to, &Answer::Go)).await??;
        turn.feed(&mut from, &mut to).await
    }
}

impl Inner {
    fn sessions(&self) -> MutexGuard<'_, BTreeMap<Key, Entry>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What goes on with the same snapshot.
    fn find(&self, key: Key, header: &SendHeader) -> Option<Arc<Session>> {
        let sessions = self.sessions();
        let session = &sessions.get(&key)?.session;
        (session.header == *header && session.lives()).then(|| Arc::clone(session))
    }

    /// Begins with a snapshot; what the host has sent of another for the move
    /// is thrown away.
    fn begin(self: &Arc<Self>, (host, move_id): Key, header: SendHeader) -> Arc<Session> {
        let (inbound, announced) = (Arc::clone(&self.inbound), header.clone());
        let session = Arc::new(Session::start(header, move |stream| async move {
            inbound.receive(host, move_id, &announced, stream).await
        }));
        let entry = Entry { session: Arc::clone(&session), waiting: None };
        let before = self.sessions().insert((host, move_id), entry);
        if let Some(before) = before {
            before.session.replaced().cancel();
        }
        session
    }

    /// Forgets a session, unless another one has its place.
    fn forget(&self, key: Key, session: &Arc<Session>) {
        let mut sessions = self.sessions();
        if sessions.get(&key).is_some_and(|entry| Arc::ptr_eq(&entry.session, session)) {
            sessions.remove(&key);
        }
    }

    /// Keeps a session that nobody feeds any more, for a while.
    fn park(self: &Arc<Self>, key: Key, session: &Arc<Session>) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return self.forget(key, session);
        };
        let since = Instant::now();
        {
            let mut sessions = self.sessions();
            let Some(entry) = sessions.get_mut(&key) else { return };
            if !Arc::ptr_eq(&entry.session, session) {
                return;
            }
            entry.waiting = Some(since);
            let mut waiting: Vec<_> =
                sessions.iter().filter_map(|(key, entry)| Some((entry.waiting?, *key))).collect();
            waiting.sort_unstable_by_key(|(since, _)| *since);
            for (_, key) in waiting.iter().rev().skip(self.waiting_max) {
                sessions.remove(key);
            }
        }
        let (this, limit, session) = (Arc::downgrade(self), self.wait, Arc::downgrade(session));
        runtime.spawn(async move {
            let ended = async {
                // Or until it has ended by itself: it was stopped, for instance.
                let outcome = session.upgrade().map(|session| session.outcome());
                if let Some(mut outcome) = outcome {
                    let _ = outcome.wait_for(Option::is_some).await;
                }
            };
            let _ = timeout(limit, ended).await;
            let Some(this) = this.upgrade() else { return };
            let mut sessions = this.sessions();
            if sessions.get(&key).is_some_and(|entry| entry.waiting == Some(since)) {
                sessions.remove(&key);
            }
        });
    }
}

impl Session {
    fn replaced(&self) -> MutexGuard<'_, CancellationToken> {
        self.replaced.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection's turn to feed a session. When it is dropped in the middle,
/// the session is kept for the next one.
struct Turn {
    receiver: Arc<Inner>,
    key: Key,
    session: Arc<Session>,
    replaced: CancellationToken,
    /// Whether it is kept for a sender that comes back.
    keep: bool,
    over: bool,
}

impl Turn {
    /// Takes the turn from whichever connection has it: the other end has given
    /// that one up, even if nobody noticed here. `None` if the session is forgotten.
    async fn take(receiver: &Arc<Inner>, key: Key, session: Arc<Session>) -> Option<Self> {
        let replaced = CancellationToken::new();
        std::mem::replace(&mut *session.replaced(), replaced.clone()).cancel();
        // It ends at its next wait.
        drop(timeout(receiver.pace.stall, session.feeder.lock()).await.ok()?);
        let turn = Self { receiver: Arc::clone(receiver), key, session, replaced, keep: true, over: false };
        let mut sessions = turn.receiver.sessions();
        let ours = sessions.get_mut(&key).filter(|entry| Arc::ptr_eq(&entry.session, &turn.session));
        let ours = ours.map(|entry| entry.waiting = None).is_some();
        drop(sessions);
        // One that has ended meanwhile still has to say how.
        ours.then_some(turn)
    }

    /// Throws away what has come.
    fn end(mut self) {
        self.keep = false;
    }

    async fn feed(
        mut self,
        from: &mut (impl AsyncRead + Unpin),
        to: &mut (impl AsyncWrite + Unpin),
    ) -> io::Result<()> {
        let pace = self.receiver.pace;
        let session = Arc::clone(&self.session);
        let mut ended = Box::pin(session.ended());
        let replaced = self.replaced.clone();
        let mut feed = Box::pin(async {
            let mut feeder = session.feeder.lock().await;
            feeder.feed(from, pace).await
        });
        let mut fed = false;
        let mut beat = interval_at(Instant::now() + pace.beat, pace.beat);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let last = loop {
            tokio::select! {
                biased;
                () = replaced.cancelled() => {
                    // Another connection has the turn now, and keeps it.
                    self.over = true;
                    return Err(io::ErrorKind::ConnectionAborted.into());
                }
                done = &mut ended => break match done {
                    Some(Ok(snapshot))
                        if snapshot.origin == session.header.origin && snapshot.name == session.header.name =>
                    {
                        Answer::Have(snapshot)
                    }
                    Some(Ok(_)) => failed(format!("what arrived is not {}", session.header.name)),
                    Some(Err(error)) => Answer::Refused(error),
                    None => failed("taking it in was cut off".to_owned()),
                },
                end = &mut feed, if !fed => match end {
                    Ok(()) => fed = true,
                    // Whoever applies it has gone, and says why.
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => fed = true,
                    Err(error) => {
                        // What is wrong itself stays so.
                        self.keep &= error.kind() != io::ErrorKind::InvalidData;
                        return Err(error);
                    }
                },
                _ = beat.tick() => timeout(pace.stall, frame::write(to, &Answer::Working)).await??,
            }
        };
        self.keep = false;
        timeout(pace.stall, frame::write(to, &last)).await?
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        if self.keep && self.session.lives() {
            self.receiver.park(self.key, &self.session);
        } else {
            self.receiver.forget(self.key, &self.session);
        }
    }
}

fn failed(message: String) -> Answer {
    Answer::Refused(CommandError { code: ErrorCode::Failed, message })
}
