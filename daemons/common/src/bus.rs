//! A host's or proxy's connections to the master's bus, signed in to with
//! assertions of its own identity key.

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use cocalc_auth::{
    identity::Identity,
    peer::{self, PeerId},
};
use cocalc_conat::{Client, ClientOptions, Credentials};
use cocalc_core::{BoxError, connector::Peer, ids::Timestamp};

/// The pauses between attempts to reach the master again. Short: a host that
/// waits is a host that lets nobody in.
const RECONNECT_MIN: Duration = Duration::from_millis(100);
const RECONNECT_MAX: Duration = Duration::from_secs(2);

struct SignIn {
    identity: Arc<Identity>,
    peer: PeerId,
    issuer: String,
}

impl fmt::Debug for SignIn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SignIn").field("peer", &self.peer).finish_non_exhaustive()
    }
}

#[async_trait]
impl Credentials for SignIn {
    async fn bearer(&self) -> Result<String, BoxError> {
        // Made anew for each connection: an assertion lasts a minute, and the
        // master accepts it once.
        Ok(peer::assert(&self.identity, self.peer, &self.issuer, Timestamp::now())?)
    }
}

/// Begins to connect `peer` to the bus of the master at `master_url`
/// (`http://…`), whose tokens `issuer` signs. It connects again by itself.
///
/// # Errors
///
/// Addresses that cannot be dialed.
pub fn connect(
    master_url: &str,
    issuer: &str,
    peer: Peer,
    identity: Arc<Identity>,
) -> Result<Client, BoxError> {
    let address = master_url
        .strip_prefix("http://")
        .ok_or_else(|| format!("{master_url:?}: the bus is reached over http:// for now"))?;
    let peer = match peer {
        Peer::Host(id) => PeerId::Host(id),
        Peer::Proxy(id) => PeerId::Proxy(id),
    };
    let credentials = Arc::new(SignIn { identity, peer, issuer: issuer.to_owned() });
    let options = ClientOptions {
        reconnect_min: RECONNECT_MIN,
        reconnect_max: RECONNECT_MAX,
        ..ClientOptions::default()
    };
    Ok(Client::connect(&format!("ws://{}/", address.trim_end_matches('/')), credentials, options)?)
}
