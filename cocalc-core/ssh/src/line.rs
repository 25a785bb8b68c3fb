//! The byte stream under an SSH connection, with a hand on it.

use std::{
    future::Future,
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use cocalc_core::stream::BoxStream;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::Notify,
    time::timeout,
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// A stream that can be cut, and that can be made to read later.
pub(crate) struct Line {
    stream: BoxStream,
    grip: Grip,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    rest: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

/// Holds a [`Line`] from elsewhere.
#[derive(Clone, Debug, Default)]
pub(crate) struct Grip {
    cut: CancellationToken,
    rest: Arc<Mutex<Option<Duration>>>,
    wake: Arc<Notify>,
}

impl Grip {
    /// Makes every read and write fail from now on. The protocol library has
    /// no way to end a connection whose peer does not read.
    pub(crate) fn cut(&self) {
        self.cut.cancel();
    }

    /// Reads nothing for `time`, once, or until [`Self::wake`].
    pub(crate) fn rest(&self, time: Duration) {
        *self.rest.lock().unwrap_or_else(PoisonError::into_inner) = Some(time);
    }

    /// What ends a rest early; one that comes when there is none ends the next.
    pub(crate) fn wake(&self) -> &Arc<Notify> {
        &self.wake
    }
}

impl Line {
    pub(crate) fn new(stream: BoxStream, grip: Grip) -> Self {
        Self { stream, cut: Box::pin(grip.cut.clone().cancelled_owned()), grip, rest: None }
    }

    fn poll_cut(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        // The future must not be polled again once it is ready.
        if self.grip.cut.is_cancelled() || self.cut.as_mut().poll(cx).is_ready() {
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the connection was cut"));
        }
        Ok(())
    }
}

impl AsyncRead for Line {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.poll_cut(cx)?;
        let rest = self.grip.rest.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(time) = rest {
            let wake = Arc::clone(&self.grip.wake);
            self.rest = Some(Box::pin(async move {
                let _ = timeout(time, wake.notified()).await;
            }));
        }
        if let Some(rest) = &mut self.rest {
            std::task::ready!(rest.as_mut().poll(cx));
            self.rest = None;
        }
        self.stream.as_mut().poll_read(cx, buf)
    }
}

impl AsyncWrite for Line {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_cut(cx)?;
        self.stream.as_mut().poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_cut(cx)?;
        self.stream.as_mut().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream.as_mut().poll_shutdown(cx)
    }
}
