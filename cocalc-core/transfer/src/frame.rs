//! Small JSON messages with their length before them.

use std::{io, net::IpAddr};

use cocalc_core::{
    connector::Service,
    control::CommandError,
    storage::{SendHeader, Snapshot},
};
use cocalc_ids::MoveId;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// The largest message, in bytes.
const MESSAGE_BYTES_MAX: u32 = 64 * 1024;

/// The first message of a connection.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Hello {
    /// The version of what follows: 1.
    pub(crate) version: u32,
    pub(crate) service: Service,
    pub(crate) source: Option<IpAddr>,
}

/// The answer to [`Hello`].
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Welcome {
    Welcome,
    Refused(String),
}

/// The first message of a snapshot's stream.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Offer {
    pub(crate) move_id: MoveId,
    pub(crate) header: SendHeader,
    /// Whether the sender can begin again, so that what has come is worth
    /// keeping when the connection breaks.
    #[serde(default)]
    pub(crate) again: bool,
}

/// What the sender says to [`Answer::Resume`].
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Decision {
    /// It still looks. Said every few seconds.
    Checking,
    /// The stream still begins so; the rest follows.
    Continue,
    /// It does not: throw that away, and say `Go`.
    Restart,
}

/// What the receiver of a snapshot says.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer {
    /// Send it.
    Go,
    /// So much of it has come already, with this hash in hexadecimal.
    Resume { bytes: u64, sha256: String },
    /// It is being taken in. Said every few seconds, so that silence means a
    /// dead connection.
    Working,
    /// It is here, complete and durable.
    Have(Snapshot),
    /// It is not.
    Refused(CommandError),
}

/// Writes a small message in JSON, with its length before it.
///
/// # Errors
///
/// A message of more than 64 KiB; those of writing.
pub async fn write<T: Serialize + Sync>(to: &mut (impl AsyncWrite + Unpin), message: &T) -> io::Result<()> {
    let body = serde_json::to_vec(message)?;
    let length = u32::try_from(body.len()).ok().filter(|length| *length <= MESSAGE_BYTES_MAX);
    let length = length.ok_or_else(|| invalid("the message is too long"))?;
    to.write_all(&[&length.to_be_bytes()[..], &body].concat()).await?;
    to.flush().await
}

/// Reads one message that [`write_message`](crate::write_message) wrote.
///
/// # Errors
///
/// One that is too long or makes no sense; those of reading.
///
/// # Cancel safety
///
/// What was read of it is lost.
pub async fn read<T: DeserializeOwned>(from: &mut (impl AsyncRead + Unpin)) -> io::Result<T> {
    let length = from.read_u32().await?;
    if length > MESSAGE_BYTES_MAX {
        return Err(invalid("the message is too long"));
    }
    let mut body = vec![0; length as usize];
    from.read_exact(&mut body).await?;
    serde_json::from_slice(&body).map_err(|_| invalid("the message makes no sense"))
}

pub(crate) fn invalid(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}
