//! Who may sign in to the bus, and what they may do there.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use cocalc_auth::{
    PublicKey,
    peer::{PeerId, Seen, verify},
};
use cocalc_conat::{Authorizer, Handshake, Identity};
use cocalc_core::{
    clock::Clock,
    connector::Peer,
    control::{
        FRAME_BYTES_MAX, api_subject, images_subject, inbox_subject, keepalive_subject, stream_subject,
    },
    subject::Access,
};
use cocalc_ids::{HostId, ProxyId};
use cocalc_sqlite::master::{self as store, Store};
use serde_json::Value;

use crate::shared::on_store;

/// Assertions that are remembered until they end; more sign-ins than this in
/// a minute and a half are refused.
const SIGN_INS_MAX: usize = 100_000;

/// The bus's gate: peers sign in with an assertion of their registered key,
/// and use their own subjects only.
pub(crate) struct Gate {
    issuer: String,
    store: Arc<Store>,
    clock: Arc<dyn Clock>,
    seen: Mutex<Seen>,
}

/// Who an identity on the bus is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Who {
    Master,
    Peer(Peer),
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate").finish_non_exhaustive()
    }
}

/// The master's own identity on its bus.
pub(crate) fn master() -> Identity {
    Identity::new("master").user(serde_json::json!({ "hub_id": "master" })).with_details(Who::Master)
}

impl Gate {
    pub(crate) fn new(issuer: String, store: Arc<Store>, clock: Arc<dyn Clock>) -> Self {
        Self { issuer, store, clock, seen: Mutex::new(Seen::new(SIGN_INS_MAX)) }
    }

    /// The registered key of whom the assertion claims to be of. Nothing is
    /// believed of the claim but that.
    async fn registered(&self, token: &str) -> BTreeMap<PeerId, PublicKey> {
        let Some(claimed) = claimed_peer(token) else { return BTreeMap::new() };
        let identity = on_store(&self.store, move |store| match claimed {
            PeerId::Host(id) => store.host(id).map(|host| (host.withdrawn, host.address.identity)),
            PeerId::Proxy(id) => store.proxy(id).map(|proxy| (proxy.withdrawn, proxy.address.identity)),
        });
        match identity.await {
            Ok((Some(_), _)) => BTreeMap::new(),
            Ok((None, identity)) => identity.parse().ok().map(|key| (claimed, key)).into_iter().collect(),
            Err(store::Error::NotFound { .. }) => BTreeMap::new(),
            Err(error) => {
                tracing::error!(error = %cocalc_core::chain(&error), "cannot read a peer's key");
                BTreeMap::new()
            }
        }
    }
}

/// Whose assertion this claims to be, before anything is verified.
fn claimed_peer(token: &str) -> Option<PeerId> {
    use base64::Engine;
    #[derive(serde::Deserialize)]
    struct Issuer {
        iss: PeerId,
    }
    let payload = token.split('.').nth(1).filter(|payload| payload.len() <= 2048)?;
    let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(payload).ok()?;
    serde_json::from_slice::<Issuer>(&bytes).ok().map(|claims| claims.iss)
}

#[async_trait]
impl Authorizer for Gate {
    async fn sign_in(&self, handshake: &Handshake, auth: &Value) -> Result<Identity, String> {
        let token = auth.get("bearer").and_then(Value::as_str).or(handshake.bearer.as_deref());
        // One answer for every failure: who may sign in is nobody's business.
        let refused = || "sign-in refused".to_owned();
        let token = token.ok_or_else(refused)?;
        let registered = self.registered(token).await;
        let now = self.clock.wall();
        let claims =
            verify(token, &self.issuer, now, |peer| registered.get(&peer).copied()).map_err(|error| {
                tracing::info!(address = ?handshake.peer, %error, "sign-in refused");
                refused()
            })?;
        if !self.seen.lock().unwrap_or_else(PoisonError::into_inner).first(&claims, now) {
            tracing::warn!(peer = %claims.iss, "an assertion was shown twice");
            return Err(refused());
        }
        let (peer, user) = match claims.iss {
            PeerId::Host(id) => (Peer::Host(id), serde_json::json!({ "host_id": id })),
            PeerId::Proxy(id) => (Peer::Proxy(id), serde_json::json!({ "hub_id": format!("proxy-{id}") })),
        };
        Ok(Identity::new(bus_name(peer))
            .user(user)
            .message_bytes_max(FRAME_BYTES_MAX)
            .subscriptions_max(16)
            .with_details(Who::Peer(peer)))
    }

    async fn may(&self, identity: &Identity, subject: &str, access: Access) -> bool {
        match identity.details() {
            Some(Who::Master) => true,
            Some(Who::Peer(peer)) => may(*peer, subject, access),
            None => false,
        }
    }
}

/// A peer's name on the bus.
pub(crate) fn bus_name(peer: Peer) -> String {
    match peer {
        Peer::Host(id) => format!("host-{id}"),
        Peer::Proxy(id) => format!("proxy-{id}"),
    }
}

/// The whole table of rights of hosts and proxies: exact subjects, so that no
/// pattern passes.
fn may(peer: Peer, subject: &str, access: Access) -> bool {
    match access {
        Access::Publish => subject == api_subject(peer) || subject == keepalive_subject(peer),
        Access::Subscribe => {
            subject == stream_subject(peer)
                || matches!(peer, Peer::Host(host)
                    if subject == inbox_subject(host) || subject == images_subject(host))
        }
    }
}

/// The peer that joined under this id.
pub(crate) fn joined(kind: store::JoinKind, id: [u8; 16]) -> Peer {
    match kind {
        store::JoinKind::Host => Peer::Host(HostId::from_bytes(id)),
        store::JoinKind::Proxy => Peer::Proxy(ProxyId::from_bytes(id)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_uses_its_own_subjects_only() {
        let (host, other) = (HostId::random(), HostId::random());
        let (me, proxy) = (Peer::Host(host), Peer::Proxy(ProxyId::random()));
        for (peer, subject, access, expected) in [
            (me, api_subject(me), Access::Publish, true),
            (me, keepalive_subject(me), Access::Publish, true),
            (me, stream_subject(me), Access::Subscribe, true),
            (me, inbox_subject(host), Access::Subscribe, true),
            (proxy, stream_subject(proxy), Access::Subscribe, true),
            (proxy, api_subject(proxy), Access::Publish, true),
            // Only the master commands hosts.
            (me, inbox_subject(host), Access::Publish, false),
            (me, inbox_subject(other), Access::Publish, false),
            (me, stream_subject(me), Access::Publish, false),
            (me, inbox_subject(other), Access::Subscribe, false),
            (me, stream_subject(proxy), Access::Subscribe, false),
            (me, api_subject(proxy), Access::Publish, false),
            (me, api_subject(me), Access::Subscribe, false),
            (proxy, inbox_subject(host), Access::Subscribe, false),
            (me, ">".into(), Access::Subscribe, false),
            (me, "host.*.inbox".into(), Access::Subscribe, false),
            (me, format!("host.{host}.>"), Access::Subscribe, false),
            (me, format!("host.{host}.*"), Access::Subscribe, false),
            (me, format!("{}.more", api_subject(me)), Access::Publish, false),
        ] {
            assert_eq!(may(peer, &subject, access), expected, "{subject}");
        }
    }

    #[test]
    fn garbage_claims_to_be_nobody() {
        for bad in ["", "a", "a.b.c", "..", "a.e30.c", &format!("a.{}.c", "A".repeat(5000))] {
            assert_eq!(claimed_peer(bad), None, "{bad}");
        }
    }
}
