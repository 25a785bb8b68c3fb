//! What is written by a thread, as the body of a response.

use std::{
    io::{self, Write},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use cocalc_core::BoxError;
use hyper::body::{Body as HttpBody, Frame};
use tokio::{
    runtime::Handle,
    sync::mpsc::{self, error::SendTimeoutError},
};

/// How much is held before it is sent on, and how many such pieces wait.
const PIECE_BYTES: usize = 128 * 1024;
pub(super) const PIECES_MAX: usize = 4;

/// Sends what is written, in pieces.
pub(super) struct Pieces {
    sender: mpsc::Sender<io::Result<Bytes>>,
    held: BytesMut,
    runtime: Handle,
    idle: Duration,
    /// Nothing more gets through. What encoders write when they are dropped
    /// does not wait once more.
    broken: bool,
}

impl Pieces {
    pub(super) fn new(sender: mpsc::Sender<io::Result<Bytes>>, runtime: Handle, idle: Duration) -> Self {
        Self { sender, held: BytesMut::new(), runtime, idle, broken: false }
    }

    /// Sends the rest.
    pub(super) fn finish(mut self) -> io::Result<()> {
        self.send()
    }

    fn send(&mut self) -> io::Result<()> {
        if self.broken {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if self.held.is_empty() {
            return Ok(());
        }
        let piece = self.held.split().freeze();
        let kind = match self.runtime.block_on(self.sender.send_timeout(Ok(piece), self.idle)) {
            Ok(()) => return Ok(()),
            Err(SendTimeoutError::Closed(_)) => io::ErrorKind::BrokenPipe,
            Err(SendTimeoutError::Timeout(_)) => io::ErrorKind::TimedOut,
        };
        self.broken = true;
        Err(kind.into())
    }
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.held.extend_from_slice(bytes);
        if self.held.len() >= PIECE_BYTES {
            self.send()?;
        }
        Ok(bytes.len())
    }

    /// Archives flush after each file; pieces stay whole all the same.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The archive as it is written.
#[derive(Debug)]
pub(crate) struct ArchiveBody {
    pieces: mpsc::Receiver<io::Result<Bytes>>,
    /// Whether everything is in it, until that has been asked.
    is_whole: Option<Arc<AtomicBool>>,
}

impl ArchiveBody {
    pub(super) fn new(pieces: mpsc::Receiver<io::Result<Bytes>>, is_whole: Arc<AtomicBool>) -> Self {
        Self { pieces, is_whole: Some(is_whole) }
    }
}

impl HttpBody for ArchiveBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let Some(piece) = ready!(self.pieces.poll_recv(cx)) else {
            // An archive that is cut between two files looks like a whole one.
            let whole = self.is_whole.take().is_none_or(|whole| whole.load(Ordering::Acquire));
            let broken = || BoxError::from(io::Error::from(io::ErrorKind::UnexpectedEof));
            return Poll::Ready((!whole).then(|| Err(broken())));
        };
        if piece.is_err() {
            self.is_whole = None;
        }
        Poll::Ready(Some(piece.map(Frame::data).map_err(BoxError::from)))
    }
}
