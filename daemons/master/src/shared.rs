//! What all parts of a running master share.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use cocalc_core::{
    bus::Bus,
    clock::Clock,
    connector::Peer,
    control::{self, HostCommand, HostReply, Settings},
    moves::NoAnswer,
    router::HostAddress,
};
use cocalc_ids::{HostId, Timestamp};
use cocalc_sqlite::master::{self as store, Store};

use crate::{bus::peers::Peers, bus::streams::Streams, operations::Operations, signing::Signing};

/// A running master's state.
pub(crate) struct Shared {
    pub(crate) store: Arc<Store>,
    pub(crate) issuer: String,
    pub(crate) settings: Settings,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) signing: Signing,
    pub(crate) bus: Arc<dyn Bus>,
    pub(crate) peers: Arc<Peers>,
    pub(crate) streams: Streams,
    pub(crate) operations: Operations,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("issuer", &self.issuer).finish_non_exhaustive()
    }
}

/// Runs a store call where it may block.
pub(crate) async fn on_store<T: Send + 'static>(
    store: &Arc<Store>,
    call: impl FnOnce(&Store) -> store::Result<T> + Send + 'static,
) -> store::Result<T> {
    let store = store.clone();
    match tokio::task::spawn_blocking(move || call(&store)).await {
        Ok(result) => result,
        Err(error) => Err(store::Error::Store(cocalc_sqlite::Error::Failed {
            operation: "finish a call",
            source: error.into(),
        })),
    }
}

impl Shared {
    pub(crate) fn now(&self) -> Timestamp {
        self.clock.wall()
    }

    /// Runs a store call where it may block.
    pub(crate) async fn db<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Store) -> store::Result<T> + Send + 'static,
    ) -> store::Result<T> {
        on_store(&self.store, call).await
    }

    pub(crate) fn lease(&self) -> Duration {
        Duration::from_millis(self.settings.lease_ms)
    }

    /// Whether a peer was heard of within its lease.
    pub(crate) fn alive(&self, peer: Peer) -> bool {
        self.peers.alive(peer, self.clock.boot(), self.lease())
    }

    /// Waits for a peer that has not come back since this process began, until
    /// `limit` after that. It is there or not then.
    pub(crate) async fn returned(&self, peer: Peer, limit: Duration) {
        let mut registrations = self.peers.registrations();
        while self.peers.session(peer).is_none() {
            let until = self.peers.heard(peer).saturating_add(limit);
            let rest = until.saturating_sub(self.clock.boot());
            match tokio::time::timeout(rest, registrations.changed()).await {
                Ok(Ok(())) => {}
                _ => return,
            }
        }
    }

    /// Sends a command to a host, and waits for its answer. A host that is not
    /// connected, or that goes away meanwhile, is not waited for.
    pub(crate) async fn command(
        &self,
        host: HostId,
        command: &HostCommand,
        limit: Duration,
    ) -> Result<HostReply, NoAnswer> {
        let peer = Peer::Host(host);
        let session = self.peers.session(peer).filter(|_| self.alive(peer)).ok_or(NoAnswer)?;
        let payload = cocalc_core::bus::Payload::json(command).map_err(|_| NoAnswer)?;
        let subject = control::inbox_subject(host);
        let request = self.bus.request(&subject, payload, limit);
        let gone = async {
            // A daemon that died sends no goodbye: its lease tells.
            let mut tick = tokio::time::interval(Duration::from_millis(250));
            loop {
                tick.tick().await;
                if self.peers.session(peer) != Some(session) || !self.alive(peer) {
                    return;
                }
            }
        };
        let answer = tokio::select! {
            answer = request => answer,
            () = gone => return Err(NoAnswer),
        };
        let message = answer.map_err(|error| {
            tracing::debug!(%host, project = %command.project(), error = %cocalc_core::chain(&error), "no answer");
            NoAnswer
        })?;
        message.payload.parse().map_err(|error| {
            tracing::warn!(%host, %error, "a host's answer is not readable");
            NoAnswer
        })
    }

    /// Where each host listens.
    pub(crate) async fn addresses(&self) -> store::Result<BTreeMap<HostId, HostAddress>> {
        self.db(|store| Ok(store.hosts()?.into_iter().map(|host| (host.id, host.address)).collect())).await
    }
}
