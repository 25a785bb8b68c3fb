//! What stays free on the volume while an image comes: projects write there, too.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use cocalc_core::stream::BoxRead;
use tokio::io::{AsyncRead, ReadBuf};

use super::{ImageError, ImageLimits, bad};
use crate::btrfs::Btrfs;

/// How often the free space is looked at, in bytes that have come.
const LOOK_BYTES: u64 = 16 << 20;

/// Looks at the free space, now and then.
#[derive(Debug)]
pub(super) struct Floor {
    store: Btrfs,
    bytes: u64,
    came: u64,
    looked: u64,
}

impl Floor {
    pub(super) fn new(store: &Btrfs, limits: &ImageLimits) -> Self {
        Self { store: store.clone(), bytes: limits.free_bytes, came: 0, looked: 0 }
    }

    /// Refuses what would leave less than that.
    pub(super) fn fits(&self, bytes: u64) -> Result<(), ImageError> {
        match self.store.free_bytes().map_err(bad)? < self.bytes.saturating_add(bytes) {
            true => Err(ImageError::NoSpace),
            false => Ok(()),
        }
    }

    /// Hears that so many bytes have come, and looks if it was not done lately.
    pub(super) fn came(&mut self, bytes: usize) -> Result<(), ImageError> {
        self.came = self.came.saturating_add(u64::try_from(bytes).unwrap_or(u64::MAX));
        if self.came < self.looked {
            return Ok(());
        }
        self.looked = self.came.saturating_add(LOOK_BYTES);
        self.fits(0)
    }
}

/// A stream that fails when what it brings leaves too little.
pub(super) struct Watched {
    stream: BoxRead,
    floor: Floor,
    full: Arc<AtomicBool>,
}

impl Watched {
    /// With it comes whether that was why it failed.
    pub(super) fn new(stream: BoxRead, floor: Floor) -> (Self, Arc<AtomicBool>) {
        let full = Arc::new(AtomicBool::new(false));
        (Self { stream, floor, full: Arc::clone(&full) }, full)
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(self.stream.as_mut().poll_read(cx, buf))?;
        match self.floor.came(buf.filled().len() - before) {
            Ok(()) => Poll::Ready(Ok(())),
            Err(error) => {
                self.full.store(matches!(error, ImageError::NoSpace), Ordering::Relaxed);
                Poll::Ready(Err(io::Error::other(error)))
            }
        }
    }
}
