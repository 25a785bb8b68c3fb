//! How a client connects.

use std::{fmt, io, sync::Arc, time::Duration};

use async_trait::async_trait;
use cocalc_core::{BoxError, stream::BoxStream};
use tokio::net::TcpStream;

/// Yields the token to sign in with. Asked before each connection, so that a
/// token may be short-lived.
#[async_trait]
pub trait Credentials: fmt::Debug + Send + Sync + 'static {
    /// The bearer token of the next connection.
    async fn bearer(&self) -> Result<String, BoxError>;
}

/// A token that stays the same.
#[derive(Clone)]
pub struct Bearer(
    /// The token.
    pub String,
);

impl fmt::Debug for Bearer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Bearer")
    }
}

#[async_trait]
impl Credentials for Bearer {
    async fn bearer(&self) -> Result<String, BoxError> {
        Ok(self.0.clone())
    }
}

/// Opens the byte stream below a connection: TCP by default; whoever needs
/// TLS, or a tunnel, brings their own.
#[async_trait]
pub trait Dial: fmt::Debug + Send + Sync + 'static {
    /// Opens a stream to this host and port, as named in the URL.
    async fn dial(&self, host: &str, port: u16) -> io::Result<BoxStream>;
}

/// Plain TCP.
#[derive(Debug)]
pub(super) struct Tcp;

#[async_trait]
impl Dial for Tcp {
    async fn dial(&self, host: &str, port: u16) -> io::Result<BoxStream> {
        let stream = TcpStream::connect((host, port)).await?;
        stream.set_nodelay(true)?;
        Ok(Box::pin(stream))
    }
}

/// How a client behaves.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// The pause after the first failure; it doubles up to `reconnect_max`,
    /// and up to half of it is left to chance. Default: 500 ms.
    pub reconnect_min: Duration,
    /// The longest pause. Default: 15 s.
    pub reconnect_max: Duration,
    /// How long a connection may take, sign-in included. Default: 15 s.
    pub connect_limit: Duration,
    /// How long calls wait for a connection before they fail. Default: 5 s.
    pub patience: Duration,
    /// How long the broker may take to answer a publication or subscription.
    /// Default: 30 s.
    pub answer_limit: Duration,
    /// How much each subscription queues, in bytes. Default: 32 MiB.
    pub queue_bytes_max: usize,
    /// How large a message may be, sent or received. Default: 256 MiB.
    pub message_bytes_max: usize,
    /// How much may wait to be sent, in bytes; beyond, calls wait. Default:
    /// 32 MiB.
    pub send_bytes_max: usize,
    /// Below which subject replies are received. Default: what the broker
    /// says, or the one that belongs to the user it says we are.
    pub inbox_prefix: Option<String>,
    /// What opens connections. Default: TCP.
    pub dial: Option<Arc<dyn Dial>>,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            reconnect_min: Duration::from_millis(500),
            reconnect_max: Duration::from_secs(15),
            connect_limit: Duration::from_secs(15),
            patience: Duration::from_secs(5),
            answer_limit: Duration::from_secs(30),
            queue_bytes_max: 32 * 1024 * 1024,
            message_bytes_max: 256 * 1024 * 1024,
            send_bytes_max: 32 * 1024 * 1024,
            inbox_prefix: None,
            dial: None,
        }
    }
}
