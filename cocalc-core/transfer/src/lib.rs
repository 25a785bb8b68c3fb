//! The authenticated channel between hosts and proxies, and the snapshots
//! that travel on it.
//!
//! A connection is TLS 1.3 in which both ends prove their Ed25519 identity
//! key, as a raw public key (RFC 7250): there are no certificates, no names
//! and no dates in it, so nothing to parse but 44 bytes and nothing to expire.
//! Who dials knows which key to expect, because the master published it; who
//! listens looks the key up in its [`PeerDirectory`]. Weak keys are refused,
//! signatures are checked by the strict rules, sessions are never resumed.
//!
//! Then a short header names the [`Service`](cocalc_core::connector::Service)
//! and, for proxies, the address of the user, and after its acknowledgement
//! the stream is the service's own.
//!
//! | type | what it is |
//! |---|---|
//! | [`PeerListener`] | accepts peers, and hands each stream to a [`PeerHandler`] |
//! | [`DirectConnector`] | the [`Connector`](cocalc_core::connector::Connector) that dials them |
//! | [`PeerTransfer`], [`SnapshotReceiver`] | the two ends of a snapshot's way to another host, over as many connections as it takes |
//! | [`Throttle`] | how fast snapshots leave a host |
//!
//! It is no VPN and no proxy: it carries one stream per connection, to a peer
//! that can be dialed.
//!
//! ```
//! use std::{sync::Arc, time::Duration};
//! use cocalc_auth::identity::Identity;
//! use cocalc_core::{connector::{Connector, Peer, Service}, ids::{HostId, ProxyId}, router::HostAddress};
//! use cocalc_transfer::{DirectConnector, Incoming, PeerListener};
//! use tokio::io::{AsyncReadExt, AsyncWriteExt};
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (host, proxy) = (Identity::generate()?, Identity::generate()?);
//! let (host_id, proxy_id) = (HostId::random(), ProxyId::random());
//!
//! // The host knows the proxy's key, from the master.
//! let proxy_key = proxy.public_key();
//! let directory = move |key: &cocalc_auth::PublicKey| (*key == proxy_key).then_some(Peer::Proxy(proxy_id));
//! let greet = async |incoming: Incoming| {
//!     let mut stream = incoming.stream;
//!     let _ = stream.write_all(b"hello").await;
//!     let _ = stream.shutdown().await;
//! };
//! let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
//! let address = HostAddress {
//!     peer: socket.local_addr()?.to_string(),
//!     identity: host.public_key().to_string(),
//!     ..HostAddress::default()
//! };
//! let listener = PeerListener::builder(&host, Arc::new(directory), Arc::new(greet)).build()?;
//! let serving = tokio::spawn(async move { listener.serve(socket, std::future::pending()).await });
//!
//! // The proxy knows where the host is and what proves it, from the master.
//! let book = move |host| (host == host_id).then(|| address.clone());
//! let connector = DirectConnector::new(&proxy, Arc::new(book))?;
//! let mut stream = connector.open(host_id, Service::Http, None, Duration::from_secs(5)).await?;
//! let mut greeting = String::new();
//! stream.read_to_string(&mut greeting).await?;
//! assert_eq!(greeting, "hello");
//! serving.abort();
//! # Ok(()) }
//! ```

mod chunks;
mod connector;
mod frame;
#[doc(hidden)]
pub mod fuzzing;
mod listener;
mod receive;
mod send;
mod session;
mod throttle;
mod tls;

pub use connector::{AddressBook, DirectConnector};
pub use frame::{read as read_message, write as write_message};
pub use listener::{Incoming, PeerDirectory, PeerHandler, PeerListener, PeerListenerBuilder};
pub use receive::{SnapshotReceiver, SnapshotReceiverBuilder};
pub use send::PeerTransfer;
pub use throttle::Throttle;
pub use tls::SetupError;
