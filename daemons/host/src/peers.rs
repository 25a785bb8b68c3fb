//! Who the other hosts and the proxies are, as the master's stream tells.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use cocalc_auth::{PublicKey, stream::Entry};
use cocalc_core::{
    connector::Peer,
    ids::{HostId, ProxyId},
    router::HostAddress,
};
use cocalc_transfer::PeerDirectory;
use tokio::sync::watch;

/// The directory that peer connections are checked against.
#[derive(Debug, Default)]
pub(crate) struct Peers {
    known: Mutex<Known>,
    /// Counts changes, for who watches one peer.
    changes: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Known {
    hosts: BTreeMap<HostId, HostAddress>,
    proxies: BTreeMap<ProxyId, PublicKey>,
    /// While the whole state is being sent again: what it has named so far.
    resync: Option<(Vec<HostId>, Vec<ProxyId>)>,
}

impl Peers {
    /// Learns from an entry of the stream.
    pub(crate) fn apply(&self, entry: &Entry) {
        let mut known = self.lock();
        match entry {
            Entry::Reset => known.resync = Some((Vec::new(), Vec::new())),
            Entry::Live => {
                // What the whole state did not name is gone.
                if let Some((hosts, proxies)) = known.resync.take() {
                    known.hosts.retain(|host, _| hosts.contains(host));
                    known.proxies.retain(|proxy, _| proxies.contains(proxy));
                }
            }
            Entry::Host { host, address } => {
                match serde_json::from_value(address.clone()) {
                    Ok(address) => drop(known.hosts.insert(*host, address)),
                    Err(error) => tracing::warn!(%host, %error, "an address cannot be read"),
                }
                if let Some((hosts, _)) = &mut known.resync {
                    hosts.push(*host);
                }
            }
            Entry::Proxy { proxy, identity } => {
                match identity.as_deref().map(str::parse) {
                    Some(Ok(key)) => drop(known.proxies.insert(*proxy, key)),
                    Some(Err(_)) => tracing::warn!(%proxy, "its identity key cannot be read"),
                    None => drop(known.proxies.remove(proxy)),
                }
                if let Some((_, proxies)) = &mut known.resync {
                    proxies.push(*proxy);
                }
            }
            _ => return,
        }
        drop(known);
        self.changes.send_modify(|count| *count += 1);
    }

    /// Resolves when `peer` has no longer the key it has now: it was withdrawn,
    /// or came with another. Cancel safe.
    pub(crate) async fn gone(&self, peer: Peer) {
        let mut changes = self.changes.subscribe();
        let Some(key) = self.key(peer) else { return };
        // The sender lives as long as `self`.
        while changes.changed().await.is_ok() {
            if self.key(peer).as_ref() != Some(&key) {
                return;
            }
        }
    }

    fn key(&self, peer: Peer) -> Option<String> {
        let known = self.lock();
        match peer {
            Peer::Host(host) => Some(known.hosts.get(&host)?.identity.clone()),
            Peer::Proxy(proxy) => Some(known.proxies.get(&proxy)?.to_string()),
        }
    }

    /// Where a host listens.
    pub(crate) fn address(&self, host: HostId) -> Option<HostAddress> {
        self.lock().hosts.get(&host).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PeerDirectory for Peers {
    fn peer(&self, key: &PublicKey) -> Option<Peer> {
        let known = self.lock();
        let text = key.to_string();
        let host = known.hosts.iter().find(|(_, address)| address.identity == text);
        let proxy = || known.proxies.iter().find(|(_, identity)| *identity == key);
        host.map(|(id, _)| Peer::Host(*id)).or_else(|| proxy().map(|(id, _)| Peer::Proxy(*id)))
    }
}
