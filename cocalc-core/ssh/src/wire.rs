//! What a proxy and a host say to each other about SSH.
//!
//! Every stream begins with one [`Hello`] and its [`Answer`], each as JSON
//! behind its length. A login's stream stays open as long as the user's
//! connection, and says when the login is revoked. Each process and each
//! forwarded connection has a stream of its own, so that one that does not
//! read stops nobody else: the kernel's flow control holds for each.

use std::{io, net::IpAddr};

use bytes::Bytes;
use cocalc_core::{
    auth::Secret,
    ids::{HostId, ProjectId, Restrictions},
    runner::{ExecRequest, Exit, WindowSize},
    wake::Awake,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// The largest JSON message. A command line may be 64 KiB, and JSON can make
/// six bytes of one.
const MESSAGE_BYTES_MAX: usize = 512 * 1024;
/// The largest payload of a frame.
pub(crate) const FRAME_BYTES_MAX: usize = 64 * 1024;

/// The first words of a proxy on a stream.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Hello {
    pub(crate) version: u32,
    pub(crate) project: ProjectId,
    pub(crate) call: Call,
}

pub(crate) const VERSION: u32 = 1;

#[derive(Debug, Deserialize, Serialize)]
#[serde(tag = "call", rename_all = "snake_case")]
pub(crate) enum Call {
    /// Let this user in, and keep the stream for as long as they are.
    Login { credential: Shown, source: Option<IpAddr> },
    /// Have the project run.
    Wake { ticket: String },
    /// Start a process; frames follow.
    Exec { ticket: String, request: ExecRequest },
    /// Talk to the host's own SSH server; bytes follow. Whoever does has proved
    /// nothing yet.
    Pass { source: Option<IpAddr> },
    /// Connect to a port; bytes follow.
    Dial { ticket: String, port: u16 },
}

/// What the user showed to the proxy.
#[derive(Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Shown {
    /// A key whose possession the proxy has verified.
    Key(String),
    /// A certificate, the possession of whose key the proxy has verified.
    Certificate(String),
    /// A connect token.
    Token(String),
}

impl std::fmt::Debug for Shown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Key(key) => f.debug_tuple("Key").field(key).finish(),
            Self::Certificate(text) => f.debug_tuple("Certificate").field(text).finish(),
            Self::Token(token) => f.debug_tuple("Token").field(&Secret::new(token.as_str())).finish(),
        }
    }
}

/// The host's answer, and on a login's stream its last words.
#[derive(Debug, Deserialize, Serialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub(crate) enum Answer {
    /// Let in. The ticket opens processes and connections until this stream
    /// ends, within the restrictions: the proxy need not try what they forbid.
    LoggedIn {
        ticket: String,
        #[serde(default)]
        restrictions: Restrictions,
    },
    /// Not decided: the project is there now.
    Moved { host: HostId, ssh: String },
    /// Not let in.
    Refused { code: String, message: String },
    /// The login is over.
    Ended { message: String },
    /// To `Wake`.
    Running,
    /// To `Wake`.
    Starting { phase: String },
    /// To `Exec` and `Dial`: it goes on with frames or bytes.
    Ready,
    /// To `Wake`, `Exec` and `Dial`.
    Failed { why: Failure, message: String },
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Failure {
    NotRunning,
    PortRefused,
    Other,
}

impl From<Awake> for Answer {
    fn from(awake: Awake) -> Self {
        match awake {
            Awake::Running => Self::Running,
            Awake::Starting { phase } => Self::Starting { phase },
            Awake::Failed { reason } => Self::Failed { why: Failure::Other, message: reason },
            _ => Self::Failed { why: Failure::Other, message: "unknown state".into() },
        }
    }
}

/// A piece of a process's stream.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Frame {
    /// Proxy to host: standard input.
    Stdin(Bytes),
    /// Proxy to host: no more input.
    StdinEnd,
    /// Proxy to host.
    Resize(WindowSize),
    /// Proxy to host.
    Signal(String),
    /// Host to proxy.
    Stdout(Bytes),
    /// Host to proxy.
    Stderr(Bytes),
    /// Host to proxy: no more output of either kind.
    OutputEnd,
    /// Host to proxy, last: how it ended.
    Exit(Exit),
    /// Host to proxy, last: it cannot be known how it ended.
    Lost(String),
}

/// Sends one JSON message.
pub(crate) async fn send<T: Serialize>(
    writer: &mut (impl AsyncWrite + Unpin),
    message: &T,
) -> io::Result<()> {
    let json = serde_json::to_vec(message)?;
    if json.len() > MESSAGE_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "message too long"));
    }
    let mut packet = Vec::with_capacity(4 + json.len());
    packet.extend_from_slice(&u32::try_from(json.len()).unwrap_or(u32::MAX).to_be_bytes());
    packet.extend_from_slice(&json);
    writer.write_all(&packet).await?;
    writer.flush().await
}

/// Receives one JSON message.
pub(crate) async fn receive<T: DeserializeOwned>(reader: &mut (impl AsyncRead + Unpin)) -> io::Result<T> {
    let length = reader.read_u32().await? as usize;
    if length > MESSAGE_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "message too long"));
    }
    // Grows with what arrives, not with what is announced.
    let mut json = Vec::new();
    (&mut *reader).take(length as u64).read_to_end(&mut json).await?;
    if json.len() < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_slice(&json)?)
}

/// Sends one frame. The caller cuts data to [`FRAME_BYTES_MAX`].
pub(crate) async fn send_frame(writer: &mut (impl AsyncWrite + Unpin), frame: &Frame) -> io::Result<()> {
    let (kind, payload) = match frame {
        Frame::Stdin(data) => (0, data.clone()),
        Frame::StdinEnd => (1, Bytes::new()),
        Frame::Resize(size) => {
            let [a, b] = size.cols.to_be_bytes();
            let [c, d] = size.rows.to_be_bytes();
            (2, Bytes::copy_from_slice(&[a, b, c, d]))
        }
        Frame::Signal(name) => (3, Bytes::copy_from_slice(name.as_bytes())),
        Frame::Stdout(data) => (16, data.clone()),
        Frame::Stderr(data) => (17, data.clone()),
        Frame::OutputEnd => (18, Bytes::new()),
        Frame::Exit(exit) => (19, serde_json::to_vec(exit)?.into()),
        Frame::Lost(reason) => (20, Bytes::copy_from_slice(reason.as_bytes())),
    };
    if payload.len() > FRAME_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "frame too long"));
    }
    let mut packet = Vec::with_capacity(5 + payload.len());
    packet.push(kind);
    packet.extend_from_slice(&u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes());
    packet.extend_from_slice(&payload);
    writer.write_all(&packet).await?;
    writer.flush().await
}

/// Receives one frame; `None` if the stream ended between two.
pub(crate) async fn receive_frame(reader: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Frame>> {
    let kind = match reader.read_u8().await {
        Ok(kind) => kind,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    let length = reader.read_u32().await? as usize;
    if length > FRAME_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "frame too long"));
    }
    let mut payload = vec![0; length];
    reader.read_exact(&mut payload).await?;
    let text = |payload| {
        String::from_utf8(payload)
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "frame is not text"))
    };
    Ok(Some(match (kind, payload.as_slice()) {
        (0, _) => Frame::Stdin(payload.into()),
        (1, []) => Frame::StdinEnd,
        (2, &[a, b, c, d]) => {
            Frame::Resize(WindowSize { cols: u16::from_be_bytes([a, b]), rows: u16::from_be_bytes([c, d]) })
        }
        (3, _) => Frame::Signal(text(payload)?),
        (16, _) => Frame::Stdout(payload.into()),
        (17, _) => Frame::Stderr(payload.into()),
        (18, []) => Frame::OutputEnd,
        (19, json) => Frame::Exit(serde_json::from_slice(json)?),
        (20, _) => Frame::Lost(text(payload)?),
        _ => return Err(io::Error::new(io::ErrorKind::InvalidData, "unknown frame")),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn frames_arrive_as_they_were_sent() {
        let frames = [
            Frame::Stdin(Bytes::from(vec![7; FRAME_BYTES_MAX])),
            Frame::StdinEnd,
            Frame::Resize(WindowSize { cols: 300, rows: 2 }),
            Frame::Signal("TERM".into()),
            Frame::Stdout(Bytes::new()),
            Frame::Stderr(Bytes::from_static(b"\0\xff")),
            Frame::OutputEnd,
            Frame::Exit(Exit::Code(255)),
            Frame::Exit(Exit::Signal("KILL".into())),
            Frame::Lost("gone".into()),
        ];
        let mut wire = Vec::new();
        for frame in &frames {
            send_frame(&mut wire, frame).await.unwrap();
        }
        let mut reader = wire.as_slice();
        for frame in frames {
            assert_eq!(receive_frame(&mut reader).await.unwrap(), Some(frame));
        }
        assert_eq!(receive_frame(&mut reader).await.unwrap(), None);
    }

    #[tokio::test]
    async fn garbage_is_an_error_and_no_allocation() {
        for bad in [
            &[0, 0xff, 0xff, 0xff, 0xff][..],
            &[2, 0, 0, 0, 3, 1, 2, 3],
            &[99, 0, 0, 0, 0],
            &[3, 0, 0, 0, 1, 0xff],
            &[19, 0, 0, 0, 1, b'{'],
            &[0, 0, 0, 0, 9, 1],
        ] {
            assert!(receive_frame(&mut &*bad).await.is_err(), "{bad:?}");
        }
        assert!(receive::<Answer>(&mut &[0xff, 0xff, 0xff, 0xff, b'{'][..]).await.is_err());
        assert!(receive::<Answer>(&mut &[0, 0, 0, 9, b'{'][..]).await.is_err());
    }

    #[test]
    fn a_token_is_not_printed() {
        let shown = format!("{:?}", Shown::Token("secret".into()));
        assert!(!shown.contains("secret"), "{shown}");
    }
}
