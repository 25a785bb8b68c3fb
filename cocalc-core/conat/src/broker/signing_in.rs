//! Connections that have not signed in: so many, and so many of one address.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
};

use super::{BrokerConfig, Handshake, Identity, Shared};
use crate::router::SocketId;

/// Who is signing in.
#[derive(Debug, Default)]
pub(super) struct SigningIn {
    /// Which names have been revoked since each came.
    revoked: HashMap<SocketId, Vec<Arc<str>>>,
    places: usize,
    /// How many of the places an address has.
    by_address: HashMap<IpAddr, usize>,
}

impl SigningIn {
    /// Notes that `name` was revoked: the core cannot apply it to these yet.
    pub(super) fn revoke(&mut self, name: &Arc<str>) {
        for revoked in self.revoked.values_mut() {
            if !revoked.contains(name) {
                revoked.push(name.clone());
            }
        }
    }

    /// Takes a place, if there is one.
    fn take(&mut self, config: &BrokerConfig, address: Option<IpAddr>) -> bool {
        if self.places >= config.signing_in_max {
            return false;
        }
        if let Some(address) = address {
            if self.by_address.get(&address).is_some_and(|own| *own >= config.signing_in_per_address_max) {
                return false;
            }
            *self.by_address.entry(address).or_default() += 1;
        }
        self.places += 1;
        true
    }

    fn free(&mut self, address: Option<IpAddr>) {
        self.places -= 1;
        if let Some(address) = address
            && let Some(own) = self.by_address.get_mut(&address)
        {
            *own -= 1;
            if *own == 0 {
                self.by_address.remove(&address);
            }
        }
    }
}

/// A connection that has not signed in.
pub(super) struct Newcomer {
    shared: Arc<Shared>,
    socket: SocketId,
    address: Option<IpAddr>,
    /// Whether it has a place.
    place: bool,
}

impl Newcomer {
    /// Registers it, and takes a place for it if there is one.
    pub(super) fn enter(shared: &Arc<Shared>, socket: SocketId, handshake: &Handshake) -> Self {
        let address = handshake.peer.map(|peer| network(peer.ip()));
        let mut signing_in = shared.signing_in();
        signing_in.revoked.insert(socket, Vec::new());
        let place = signing_in.take(&shared.config, address);
        drop(signing_in);
        Self { shared: shared.clone(), socket, address, place }
    }

    /// Whether it has a place, without which it must have shown who it is.
    pub(super) fn has_place(&self) -> bool {
        self.place
    }

    /// Ends it, when the core knows the socket; `false` if `identity` was
    /// revoked before that.
    pub(super) fn finish(self, identity: &Identity) -> bool {
        let revoked = self.shared.signing_in().revoked.remove(&self.socket);
        revoked.is_none_or(|revoked| !revoked.iter().any(|name| **name == *identity.name()))
    }
}

impl Drop for Newcomer {
    fn drop(&mut self) {
        let mut signing_in = self.shared.signing_in();
        signing_in.revoked.remove(&self.socket);
        if self.place {
            signing_in.free(self.address);
        }
    }
}

/// What one party has at its disposal: an address, or a network of IPv6.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        address => address,
    }
}
