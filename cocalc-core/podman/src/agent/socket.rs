//! The helper's socket: bound by the host, inherited by the helper.

use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{
    fs::{AtFlags, Mode},
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags},
};
use tokio::{
    io::{AsyncReadExt, Interest},
    net::UnixStream,
};

use super::{ANSWER_BYTES_MAX, AgentError};

/// Where the helper of one project listens. The name is resolved below a
/// directory descriptor: socket addresses hold 108 bytes, directories more.
#[derive(Debug)]
pub(crate) struct AgentSocket {
    directory: OwnedFd,
    name: String,
}

impl AgentSocket {
    /// The socket `name` in `directory`.
    pub(crate) fn new(directory: &Path, name: String) -> io::Result<Self> {
        Ok(Self { directory: crate::mounts::open_dir(directory)?, name })
    }

    fn address(&self) -> PathBuf {
        format!("/proc/self/fd/{}/{}", self.directory.as_raw_fd(), self.name).into()
    }

    /// Binds it anew, for the helper to inherit; who held the former one is not
    /// reached any more.
    pub(crate) fn bind(&self) -> io::Result<OwnedFd> {
        self.unlink();
        let listener = UnixListener::bind(self.address())?;
        rustix::fs::chmodat(&self.directory, self.name.as_str(), Mode::RUSR | Mode::WUSR, AtFlags::empty())?;
        Ok(listener.into())
    }

    /// Removes the name.
    pub(crate) fn unlink(&self) {
        let _ = rustix::fs::unlinkat(&self.directory, self.name.as_str(), AtFlags::empty());
    }

    /// Connects to the helper. Never blocks a thread: a tenant who lets the
    /// queue fill up would hold one for each attempt.
    pub(crate) async fn connect(&self) -> io::Result<UnixStream> {
        loop {
            match UnixStream::connect(self.address()).await {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                other => return other,
            }
        }
    }
}

/// Sends a request with its descriptors.
pub(super) async fn send_request(
    stream: &UnixStream,
    kind: u8,
    fds: &[BorrowedFd<'_>],
    body: &[u8],
) -> io::Result<()> {
    loop {
        stream.writable().await?;
        let sent = stream.try_io(Interest::WRITABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(fds));
            }
            let byte = [kind];
            Ok(rustix::net::sendmsg(
                stream.as_fd(),
                &[IoSlice::new(&byte)],
                &mut control,
                SendFlags::NOSIGNAL,
            )?)
        });
        match sent {
            Ok(_) => break,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    let length = u32::try_from(body.len()).map_err(io::Error::other)?.to_be_bytes();
    for mut rest in [length.as_slice(), body] {
        while !rest.is_empty() {
            stream.writable().await?;
            match stream.try_write(rest) {
                Ok(count) => rest = &rest[count..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

/// The next frame. Cancel safe: what was read so far is in `buffer`.
pub(crate) async fn next_frame(
    stream: &mut (impl tokio::io::AsyncRead + Unpin),
    buffer: &mut Vec<u8>,
) -> Result<Vec<u8>, AgentError> {
    loop {
        if let Some((length, rest)) = buffer.split_first_chunk::<4>() {
            let length = u32::from_be_bytes(*length) as usize;
            if length > ANSWER_BYTES_MAX {
                return Err(io::Error::from(io::ErrorKind::InvalidData).into());
            }
            if let Some(frame) = rest.get(..length) {
                let frame = frame.to_vec();
                buffer.drain(..4 + length);
                return Ok(frame);
            }
        }
        if stream.read_buf(buffer).await? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
    }
}
