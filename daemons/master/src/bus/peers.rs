//! Which hosts and proxies are there, as far as this process knows.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use cocalc_core::connector::Peer;
use cocalc_ids::{HostId, SessionId};
use tokio::sync::watch;

/// The peers that registered with this process, and when they were heard of.
#[derive(Debug)]
pub(crate) struct Peers {
    /// When this process began, on the boot clock. Whoever has not been heard
    /// of may hold a lease of the process before, renewed until just then.
    began: Duration,
    live: Mutex<BTreeMap<Peer, Live>>,
    /// Those that were withdrawn since, and are still connected perhaps.
    withdrawn: Mutex<BTreeSet<Peer>>,
    /// The hosts that an operator has said to be dead.
    fenced: Mutex<BTreeSet<HostId>>,
    /// Counts registrations, for who waits for one.
    registrations: watch::Sender<u64>,
}

#[derive(Clone, Copy, Debug)]
struct Live {
    session: SessionId,
    heard: Duration,
}

impl Peers {
    pub(crate) fn new(began: Duration, fenced: impl IntoIterator<Item = HostId>) -> Self {
        Self {
            began,
            live: Mutex::default(),
            withdrawn: Mutex::default(),
            fenced: Mutex::new(fenced.into_iter().collect()),
            registrations: watch::Sender::new(0),
        }
    }

    /// A peer's process introduced itself.
    pub(crate) fn registered(&self, peer: Peer, session: SessionId, now: Duration) {
        self.withdrawn.lock().unwrap_or_else(PoisonError::into_inner).remove(&peer);
        self.lock().insert(peer, Live { session, heard: now });
        self.registrations.send_modify(|count| *count += 1);
    }

    /// A peer renews its lease; `false` if this is not the process that
    /// registered last, or a host that is fenced.
    pub(crate) fn renew(&self, peer: Peer, session: SessionId, now: Duration) -> bool {
        if self.is_fenced(peer) {
            return false;
        }
        match self.lock().get_mut(&peer) {
            Some(live) if live.session == session => {
                live.heard = live.heard.max(now);
                true
            }
            _ => false,
        }
    }

    /// It is let in no more: it renews nothing, and nothing is asked of it.
    pub(crate) fn withdraw(&self, peer: Peer) {
        self.withdrawn.lock().unwrap_or_else(PoisonError::into_inner).insert(peer);
        // When its last lease began is remembered, its process is not.
        if let Some(live) = self.lock().get_mut(&peer) {
            live.session = SessionId::random();
        }
    }

    /// Whether it was withdrawn, and has not come with another key since.
    pub(crate) fn is_withdrawn(&self, peer: Peer) -> bool {
        self.withdrawn.lock().unwrap_or_else(PoisonError::into_inner).contains(&peer)
    }

    /// Somebody has said that a host is dead: it renews nothing, and nothing is
    /// asked of it, also if it turns out to live.
    pub(crate) fn fence(&self, host: HostId) {
        self.fenced.lock().unwrap_or_else(PoisonError::into_inner).insert(host);
    }

    /// That is taken back.
    pub(crate) fn unfence(&self, host: HostId) {
        self.fenced.lock().unwrap_or_else(PoisonError::into_inner).remove(&host);
    }

    /// Whether it is a host that is fenced.
    pub(crate) fn is_fenced(&self, peer: Peer) -> bool {
        match peer {
            Peer::Host(host) => self.fenced.lock().unwrap_or_else(PoisonError::into_inner).contains(&host),
            Peer::Proxy(_) => false,
        }
    }

    /// The process that registered last, if one did.
    pub(crate) fn session(&self, peer: Peer) -> Option<SessionId> {
        self.lock().get(&peer).map(|live| live.session)
    }

    /// Whether the peer was heard of within `lease`.
    pub(crate) fn alive(&self, peer: Peer, now: Duration, lease: Duration) -> bool {
        self.lock().get(&peer).is_some_and(|live| now < live.heard.saturating_add(lease))
            && !self.is_withdrawn(peer)
            && !self.is_fenced(peer)
    }

    /// When the peer was heard of last by this process, if it was.
    pub(crate) fn heard_of(&self, peer: Peer) -> Option<Duration> {
        self.lock().get(&peer).map(|live| live.heard)
    }

    /// When the last lease that the peer can hold began at the latest.
    pub(crate) fn heard(&self, peer: Peer) -> Duration {
        self.lock().get(&peer).map_or(self.began, |live| live.heard)
    }

    /// Hears of registrations from now on.
    pub(crate) fn registrations(&self) -> watch::Receiver<u64> {
        self.registrations.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Peer, Live>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_process_renews_nothing() {
        let peer = Peer::Host(HostId::random());
        let (old, new) = (SessionId::random(), SessionId::random());
        let secs = Duration::from_secs;
        let peers = Peers::new(secs(100), []);
        assert_eq!(peers.heard(peer), secs(100));
        assert!(!peers.renew(peer, old, secs(101)));
        peers.registered(peer, old, secs(110));
        peers.registered(peer, new, secs(111));
        assert!(!peers.renew(peer, old, secs(120)));
        assert!(peers.renew(peer, new, secs(120)));
        assert!(peers.alive(peer, secs(149), secs(30)));
        assert!(!peers.alive(peer, secs(150), secs(30)));
        assert_eq!((peers.session(peer), peers.heard(peer)), (Some(new), secs(120)));
    }
    #[test]
    fn a_fenced_host_renews_nothing_until_that_is_taken_back() {
        let (host, session) = (HostId::random(), SessionId::random());
        let (peer, secs) = (Peer::Host(host), Duration::from_secs);
        let peers = Peers::new(secs(0), [host]);
        peers.registered(peer, session, secs(1));
        assert!(!peers.renew(peer, session, secs(2)) && !peers.alive(peer, secs(2), secs(30)));
        peers.unfence(host);
        assert!(peers.renew(peer, session, secs(3)) && peers.alive(peer, secs(3), secs(30)));
        peers.fence(host);
        assert!(!peers.alive(peer, secs(3), secs(30)));
        assert_eq!(peers.heard_of(peer), Some(secs(3)), "what was heard was heard");
    }
}
