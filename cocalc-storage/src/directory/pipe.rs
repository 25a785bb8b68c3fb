//! Bytes between a thread that may block and a task that may not. Either side
//! learns when the other goes away; an end without a good end is an error.

use std::{
    io::{self, Read, Write},
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, ReadBuf},
    sync::mpsc,
};

/// Chunks under way at a time.
const QUEUE: usize = 8;
const CHUNK: usize = 64 << 10;

/// One step of a stream; `Ok(None)` is its good end.
type Step = io::Result<Option<Vec<u8>>>;

/// A pipe from a blocking writer to an asynchronous reader.
pub(super) fn outward() -> (BlockingWriter, AsyncReader) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let reader = AsyncReader { receiver, current: Vec::new(), at: 0, ended: false };
    (BlockingWriter { sender, pending: Vec::with_capacity(CHUNK) }, reader)
}

/// A pipe from an asynchronous sender to a blocking reader.
pub(super) fn inward() -> (mpsc::Sender<Step>, BlockingReader) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    (sender, BlockingReader { receiver, current: Vec::new(), at: 0, ended: false })
}

fn broken() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the other side went away")
}

pub(super) struct BlockingWriter {
    sender: mpsc::Sender<Step>,
    pending: Vec<u8>,
}

impl BlockingWriter {
    /// Says how it ended.
    pub(super) fn end(mut self, outcome: io::Result<()>) {
        let last = outcome.and_then(|()| self.flush()).map(|()| None);
        // Nobody reads any more: nobody to tell.
        let _ = self.sender.blocking_send(last);
    }
}

impl Write for BlockingWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.pending.extend_from_slice(bytes);
        if self.pending.len() >= CHUNK {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let chunk = std::mem::replace(&mut self.pending, Vec::with_capacity(CHUNK));
        self.sender.blocking_send(Ok(Some(chunk))).map_err(|_| broken())
    }
}

pub(super) struct AsyncReader {
    receiver: mpsc::Receiver<Step>,
    current: Vec<u8>,
    at: usize,
    ended: bool,
}

impl AsyncRead for AsyncReader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.at == self.current.len() && !self.ended {
            match ready!(self.receiver.poll_recv(cx)) {
                Some(Ok(Some(chunk))) => (self.current, self.at) = (chunk, 0),
                Some(Ok(None)) => self.ended = true,
                Some(Err(error)) => return Poll::Ready(Err(error)),
                None => return Poll::Ready(Err(broken())),
            }
        }
        let length = buf.remaining().min(self.current.len() - self.at);
        buf.put_slice(&self.current[self.at..self.at + length]);
        self.at += length;
        Poll::Ready(Ok(()))
    }
}

pub(super) struct BlockingReader {
    receiver: mpsc::Receiver<Step>,
    current: Vec<u8>,
    at: usize,
    ended: bool,
}

impl Read for BlockingReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.at == self.current.len() && !self.ended {
            match self.receiver.blocking_recv() {
                Some(Ok(Some(chunk))) => (self.current, self.at) = (chunk, 0),
                Some(Ok(None)) => self.ended = true,
                Some(Err(error)) => return Err(error),
                None => return Err(broken()),
            }
        }
        let length = buf.len().min(self.current.len() - self.at);
        buf[..length].copy_from_slice(&self.current[self.at..self.at + length]);
        self.at += length;
        Ok(length)
    }
}
