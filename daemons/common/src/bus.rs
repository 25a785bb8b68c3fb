//! A host's or proxy's connections to the master's bus, signed in to with
//! assertions of its own identity key.

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use cocalc_auth::{
    identity::Identity,
    peer::{self, PeerId},
};
use cocalc_conat::{Client, ClientOptions, Credentials, Dial};
use cocalc_core::{BoxError, connector::Peer, ids::Timestamp};

use crate::tls::OverTls;

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
/// (`http://…` or `https://…`), whose tokens `issuer` signs. It connects again by itself.
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
    let (scheme, address, dial): (_, _, Option<Arc<dyn Dial>>) =
        match (master_url.strip_prefix("https://"), master_url.strip_prefix("http://")) {
            (Some(address), _) => ("wss", address, Some(Arc::new(OverTls::new()?))),
            (None, Some(address)) => ("ws", address, None),
            (None, None) => return Err(format!("{master_url:?} is no address of a master").into()),
        };
    let peer = match peer {
        Peer::Host(id) => PeerId::Host(id),
        Peer::Proxy(id) => PeerId::Proxy(id),
    };
    let credentials = Arc::new(SignIn { identity, peer, issuer: issuer.to_owned() });
    let options = ClientOptions {
        reconnect_min: RECONNECT_MIN,
        reconnect_max: RECONNECT_MAX,
        dial,
        ..ClientOptions::default()
    };
    Ok(Client::connect(&format!("{scheme}://{}/", address.trim_end_matches('/')), credentials, options)?)
}
