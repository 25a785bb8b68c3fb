//! The host's end of a terminal that the runtime carries into a container.
//!
//! The runtime gets the other end as its own terminal, and copies between that and
//! the one that it opens inside. This one is raw: what is typed means something only
//! inside.

use std::{
    io,
    os::fd::OwnedFd,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use cocalc_core::runner::WindowSize;
use rustix::{
    fs::OFlags,
    pty::OpenptFlags,
    termios::{OptionalActions, OutputModes, Winsize},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, unix::AsyncFd};

/// What ends the input of a terminal.
const END: u8 = 4;

#[derive(Clone, Debug)]
pub(super) struct Terminal(Arc<AsyncFd<OwnedFd>>);

impl Terminal {
    /// One of this size, and the end that is not the host's. What is shown gets no
    /// returns here if it `has_returns`, and so is as it was shown.
    pub(super) fn open(size: WindowSize, has_returns: bool) -> io::Result<(Self, OwnedFd)> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let host = rustix::pty::openpt(flags)?;
        rustix::pty::grantpt(&host)?;
        rustix::pty::unlockpt(&host)?;
        let other = rustix::pty::ioctl_tiocgptpeer(&host, flags)?;
        let mut modes = rustix::termios::tcgetattr(&other)?;
        modes.make_raw();
        if has_returns {
            // The runtime turns on again whatever else is to be done to it.
            modes.output_modes = OutputModes::empty();
        }
        rustix::termios::tcsetattr(&other, OptionalActions::Now, &modes)?;
        rustix::fs::fcntl_setfl(&host, OFlags::NONBLOCK)?;
        let terminal = Self(Arc::new(crate::kernel::watch(host)?));
        terminal.resize(size)?;
        Ok((terminal, other))
    }

    pub(super) fn resize(&self, size: WindowSize) -> io::Result<()> {
        let size = Winsize { ws_row: size.rows, ws_col: size.cols, ws_xpixel: 0, ws_ypixel: 0 };
        Ok(rustix::termios::tcsetwinsize(self.0.get_ref(), size)?)
    }

    /// Where it is typed.
    pub(super) fn keyboard(&self) -> Keyboard {
        Keyboard { terminal: self.clone(), ended: false }
    }

    /// What it shows, to the end: until the runtime has gone.
    pub(super) fn screen(&self) -> Screen {
        Screen(self.clone())
    }

    fn poll_write(&self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.0.poll_write_ready(cx))?;
            if let Ok(written) = ready.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), bytes)?)) {
                return Poll::Ready(written);
            }
        }
    }
}

#[derive(Debug)]
pub(super) struct Keyboard {
    terminal: Terminal,
    ended: bool,
}

impl AsyncWrite for Keyboard {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.ended {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        self.terminal.poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.ended {
            // Who reads no more has ended.
            let _ = ready!(self.terminal.poll_write(cx, &[END]));
            self.ended = true;
        }
        Poll::Ready(Ok(()))
    }
}

#[derive(Debug)]
pub(super) struct Screen(Terminal);

impl AsyncRead for Screen {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.0.0.poll_read_ready(cx))?;
            let space = buf.initialize_unfilled();
            match ready.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut *space)?)) {
                Ok(Ok(count)) => {
                    buf.advance(count);
                    return Poll::Ready(Ok(()));
                }
                // Nobody has the other end any more.
                Ok(Err(error)) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => {
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_) => {}
            }
        }
    }
}
