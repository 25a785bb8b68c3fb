//! Byte streams, as they pass between traits.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A source of bytes. A failure of whatever produces them is an error of the
/// last read, never a silent end.
pub type BoxRead = Pin<Box<dyn AsyncRead + Send>>;

/// A sink of bytes. `shutdown` says that no more will come.
pub type BoxWrite = Pin<Box<dyn AsyncWrite + Send>>;

/// Both directions of a connection; shutting down the write half leaves the
/// read half open.
pub trait ByteStream: AsyncRead + AsyncWrite + Send {}

impl<T: AsyncRead + AsyncWrite + Send> ByteStream for T {}

/// A connection of any kind.
pub type BoxStream = Pin<Box<dyn ByteStream>>;

/// Learns of what passes through a [`Noticed`] stream.
pub trait Notice: Unpin {
    /// Called before each read, with the task that will be woken by it.
    ///
    /// # Errors
    ///
    /// They become those of the read.
    fn before_read(&mut self, _cx: &mut Context<'_>) -> io::Result<()> {
        Ok(())
    }

    /// Called before each write.
    ///
    /// # Errors
    ///
    /// They become those of the write.
    fn before_write(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Bytes have come; never none.
    fn read(&mut self, _bytes: &[u8]) {}

    /// So many bytes were taken; never none.
    fn written(&mut self, _count: usize) {}
}

/// A stream, or one direction of one, of which somebody takes notice; for the rest
/// it is what it is made of.
#[derive(Debug)]
pub struct Noticed<S, N> {
    stream: S,
    by: N,
}

impl<S, N> Noticed<S, N> {
    /// The stream, noticed by `by`.
    pub fn new(stream: S, by: N) -> Self {
        Self { stream, by }
    }
}

impl<S: AsyncRead + Unpin, N: Notice> AsyncRead for Noticed<S, N> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.by.before_read(cx)?;
        let before = buffer.filled().len();
        let read = ready!(Pin::new(&mut self.stream).poll_read(cx, buffer));
        if let Some(bytes) = buffer.filled().get(before..).filter(|bytes| !bytes.is_empty()) {
            self.by.read(bytes);
        }
        Poll::Ready(read)
    }
}

impl<S: AsyncWrite + Unpin, N: Notice> AsyncWrite for Noticed<S, N> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.by.before_write()?;
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, bytes));
        if let Ok(count @ 1..) = written {
            self.by.written(count);
        }
        Poll::Ready(written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.by.before_write()?;
        let written = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, bytes));
        if let Ok(count @ 1..) = written {
            self.by.written(count);
        }
        Poll::Ready(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
