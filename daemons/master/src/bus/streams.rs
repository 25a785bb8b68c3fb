//! The ordered stream to each host and proxy.
//!
//! Every entry is read from the database while the peer's stream is locked,
//! after the change was committed: what is later on a stream is never older
//! than what came before it. The stream's epoch is new with each process, so
//! that positions need not be stored: after a restart every peer gets the
//! whole state once.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
};

use cocalc_auth::stream::{Entry, Frame};
use cocalc_core::{
    bus::{Bus, Payload},
    connector::Peer,
    control::{FRAME_BYTES_MAX, stream_subject},
    router::HostAddress,
};
use cocalc_ids::{AccountId, HostId, ProjectId, ProxyId};
use cocalc_sqlite::master::{self as store, Store};
use tokio::sync::watch;

use crate::shared::{Shared, on_store};

/// How many sent frames are kept for who missed some; who missed more gets the
/// whole state.
const KEPT_FRAMES: usize = 1024;
const KEPT_BYTES: usize = 4 * 1024 * 1024;

/// The streams of all peers.
#[derive(Debug)]
pub(crate) struct Streams {
    epoch: u64,
    /// The federation's grace.
    grace_ms: u64,
    bus: Arc<dyn Bus>,
    store: Arc<Store>,
    peers: Mutex<BTreeMap<Peer, Arc<Stream>>>,
}

#[derive(Debug)]
struct Stream {
    peer: Peer,
    log: tokio::sync::Mutex<Log>,
    /// The last frame that the peer has applied.
    applied: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Log {
    seq: u64,
    kept: VecDeque<(u64, Payload)>,
    kept_bytes: usize,
    /// Whether the peer has had everything so far. Otherwise frames are only
    /// counted, until it asks.
    live: bool,
}

/// What an entry is about, as far as graces go: everything, if nothing is named.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct About {
    pub(crate) project: Option<ProjectId>,
}

/// A frame that must be applied before a change is in force at `peer`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Target {
    pub(crate) peer: Peer,
    pub(crate) seq: u64,
    /// The longest grace that the peer may know of what it is about.
    pub(crate) grace_ms: u64,
}

impl Streams {
    pub(crate) fn new(epoch: u64, grace_ms: u64, bus: Arc<dyn Bus>, store: Arc<Store>) -> Self {
        Self { epoch, grace_ms, bus, store, peers: Mutex::default() }
    }

    /// The epoch of this process's streams.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// What the peer has acknowledged.
    pub(crate) fn applied(&self, peer: Peer) -> (u64, u64) {
        (self.epoch, *self.stream(peer).applied.borrow())
    }

    fn stream(&self, peer: Peer) -> Arc<Stream> {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Arc::new(Stream { peer, log: Default::default(), applied: watch::Sender::new(0) });
        peers.entry(peer).or_insert_with(new).clone()
    }

    /// Where the peer's stream is: its epoch and the last frame.
    pub(crate) async fn position(&self, peer: Peer) -> (u64, u64) {
        (self.epoch, self.stream(peer).log.lock().await.seq)
    }

    /// The peer has applied everything up to `seq`; whether that can be, and is
    /// news.
    pub(crate) async fn acknowledge(&self, peer: Peer, epoch: u64, seq: u64) -> bool {
        let stream = self.stream(peer);
        let sent = stream.log.lock().await.seq;
        epoch == self.epoch
            && seq <= sent
            && stream.applied.send_if_modified(|applied| std::mem::replace(applied, seq.max(*applied)) < seq)
    }

    /// Appends what `read` finds in the database, and returns the last frame's
    /// number, by which the change is in force.
    pub(crate) async fn send(
        &self,
        peer: Peer,
        about: About,
        read: impl FnOnce(&Store) -> store::Result<Vec<Entry>> + Send + 'static,
    ) -> store::Result<Target> {
        let stream = self.stream(peer);
        let mut log = stream.log.lock().await;
        let default_ms = self.grace_ms;
        let (entries, grace_ms) = on_store(&self.store, move |store| {
            let grace_ms = match peer {
                Peer::Host(host) => store.longest_grace(host, about.project, default_ms)?,
                Peer::Proxy(_) => default_ms,
            };
            Ok((read(store)?, grace_ms))
        })
        .await?;
        for entry in entries {
            self.append(&stream, &mut log, entry).await;
        }
        Ok(Target { peer, seq: log.seq, grace_ms })
    }

    /// Continues the stream after `position`, or sends the whole state that
    /// `read` finds.
    pub(crate) async fn sync(
        &self,
        peer: Peer,
        position: Option<(u64, u64)>,
        read: impl FnOnce(&Store) -> store::Result<Vec<Entry>> + Send + 'static,
    ) -> store::Result<()> {
        let stream = self.stream(peer);
        let mut log = stream.log.lock().await;
        let known = position.filter(|(epoch, seq)| *epoch == self.epoch && *seq <= log.seq);
        if let Some((_, seq)) = known
            && log.kept.front().map_or(log.seq == seq, |(first, _)| *first <= seq + 1)
        {
            log.live = true;
            let missed: Vec<Payload> =
                log.kept.iter().filter(|(kept, _)| *kept > seq).map(|(_, frame)| frame.clone()).collect();
            for frame in missed {
                self.publish(&stream, &mut log, frame).await;
            }
            return Ok(());
        }
        let state = on_store(&self.store, read).await?;
        log.live = true;
        // What came before is in the state.
        log.kept.clear();
        log.kept_bytes = 0;
        self.append(&stream, &mut log, Entry::Reset).await;
        for entry in state {
            self.append(&stream, &mut log, entry).await;
        }
        self.append(&stream, &mut log, Entry::Live).await;
        Ok(())
    }

    async fn append(&self, stream: &Stream, log: &mut Log, entry: Entry) {
        log.seq += 1;
        let frame = Frame { stream: self.epoch, seq: log.seq, entry };
        let payload = match Payload::json(&frame) {
            Ok(payload) if payload.data.len() <= FRAME_BYTES_MAX => payload,
            // The store's limits on sets keep frames well below. The number
            // is used up: the peer sees a gap and stays closed, rather than
            // going on without this entry.
            refused => {
                let error = refused.err().map_or_else(|| "too large".to_owned(), |error| error.to_string());
                tracing::error!(peer = ?stream.peer, error, "a frame cannot be sent");
                log.live = false;
                log.kept.clear();
                log.kept_bytes = 0;
                return;
            }
        };
        log.kept_bytes += payload.data.len();
        log.kept.push_back((log.seq, payload.clone()));
        while log.kept.len() > KEPT_FRAMES || log.kept_bytes > KEPT_BYTES {
            let Some((_, old)) = log.kept.pop_front() else { break };
            log.kept_bytes -= old.data.len();
        }
        self.publish(stream, log, payload).await;
    }

    async fn publish(&self, stream: &Stream, log: &mut Log, frame: Payload) {
        if !log.live {
            return;
        }
        match self.bus.publish(&stream_subject(stream.peer), frame).await {
            Ok(receivers) if receivers > 0 => {}
            // It is not there. It will notice by its keepalive that it is
            // behind, and ask.
            result => {
                tracing::debug!(peer = ?stream.peer, ?result, "a peer's stream was not delivered");
                log.live = false;
            }
        }
    }
}

/// As people and programs see a peer.
pub(crate) fn peer_name(peer: Peer) -> String {
    match peer {
        Peer::Host(id) => format!("host:{id}"),
        Peer::Proxy(id) => format!("proxy:{id}"),
    }
}

/// What a project's owner is told of it: its members, then the whole ACL.
pub(crate) fn project_entries(store: &Store, host: HostId, project: ProjectId) -> store::Result<Vec<Entry>> {
    let gone = vec![Entry::ProjectGone { project }];
    match store.project(project) {
        Ok(found) if found.host == host => {}
        Ok(_) | Err(store::Error::NotFound { .. }) => return Ok(gone),
        Err(error) => return Err(error),
    }
    let acl = store.project_acl(project)?;
    let mut accounts: Vec<AccountId> = acl.members.iter().map(|(account, _)| *account).collect();
    accounts.extend(acl.keys.iter().map(|key| key.account));
    accounts.sort_unstable();
    accounts.dedup();
    let mut entries = accounts
        .into_iter()
        .map(|account| Ok(Entry::Account(store.account_state(account)?)))
        .collect::<store::Result<Vec<_>>>()?;
    entries.push(Entry::Project(acl));
    Ok(entries)
}

/// Everything that a host is told at the beginning.
pub(crate) fn host_state(store: &Store, shared: &Shared, host: HostId) -> store::Result<Vec<Entry>> {
    let mut entries = peer_state(store, shared)?;
    for proxy in store.proxies()? {
        entries.push(Entry::Proxy { proxy: proxy.id, identity: Some(proxy.address.identity) });
    }
    for account in store.accounts_of_host(host)? {
        entries.push(Entry::Account(store.account_state(account.id)?));
    }
    for project in store.projects_of_host(host)? {
        entries.push(Entry::Project(store.project_acl(project.id)?));
    }
    Ok(entries)
}

/// Everything that a proxy is told at the beginning. Routes it asks for.
pub(crate) fn peer_state(store: &Store, shared: &Shared) -> store::Result<Vec<Entry>> {
    let mut entries =
        vec![Entry::KeyRing(shared.signing.public()), Entry::SshAuthorities(shared.ssh_ca.public())];
    // Of those that were withdrawn, that they are nowhere: who was away
    // meanwhile may still know them.
    for host in store.hosts()?.into_iter().chain(store.withdrawn_hosts()?) {
        entries.push(host_entry(&host)?);
    }
    Ok(entries)
}

/// Where a host is. One that was withdrawn or fenced is nowhere, and no key
/// proves it.
pub(crate) fn host_entry(host: &store::Host) -> store::Result<Entry> {
    let address = if host.is_out() { HostAddress::default() } else { host.address.clone() };
    let address = serde_json::to_value(&address).map_err(|error| {
        store::Error::Store(cocalc_sqlite::Error::Failed {
            operation: "write an address",
            source: error.into(),
        })
    })?;
    Ok(Entry::Host { host: host.id, address })
}

/// What hosts are told of a proxy.
pub(crate) fn proxy_entry(store: &Store, proxy: ProxyId) -> store::Result<Entry> {
    let identity = match store.proxy(proxy) {
        Ok(proxy) if proxy.withdrawn.is_some() => None,
        Ok(proxy) => Some(proxy.address.identity),
        Err(store::Error::NotFound { .. }) => None,
        Err(error) => return Err(error),
    };
    Ok(Entry::Proxy { proxy, identity })
}
