//! The content of a file, as a body that reads as fast as it is taken.

use std::{
    any::Any,
    fs::File,
    io,
    os::unix::fs::FileExt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use cocalc_core::BoxError;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tokio::task::JoinHandle;

/// How much is read at a time, and so held in memory.
const CHUNK_BYTES: u64 = 256 * 1024;

/// A part of a file. If the file has become shorter meanwhile, the body fails,
/// so that nobody takes what came for the whole; what was added is not sent.
#[derive(Debug)]
pub(crate) struct FileBody {
    file: Arc<File>,
    at: u64,
    left: u64,
    reading: Option<JoinHandle<io::Result<Bytes>>>,
    /// What keeps the file readable.
    _held: Held,
}

/// What is kept for as long as something is read.
pub(crate) type Held = Option<Box<dyn Any + Send + Sync>>;

impl FileBody {
    pub(crate) fn new(file: File, at: u64, length: u64, held: Held) -> Self {
        Self { file: Arc::new(file), at, left: length, reading: None, _held: held }
    }
}

/// Reads up to `length` bytes at `at`; fewer only at the end.
pub(crate) fn read_at(file: &File, at: u64, length: u64) -> io::Result<Bytes> {
    let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
    let mut filled = 0;
    while filled < bytes.len() {
        match file.read_at(&mut bytes[filled..], at + filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(filled);
    Ok(bytes.into())
}

impl HttpBody for FileBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        let this = &mut *self;
        let (file, at, length) = (&this.file, this.at, this.left.min(CHUNK_BYTES));
        let reading = this.reading.get_or_insert_with(|| {
            let file = Arc::clone(file);
            tokio::task::spawn_blocking(move || read_at(&file, at, length))
        });
        let read = ready!(Pin::new(reading).poll(cx));
        this.reading = None;
        let bytes = match read {
            Ok(Ok(bytes)) if !bytes.is_empty() => bytes,
            Ok(Ok(_)) => return Poll::Ready(Some(Err("the file became shorter while it was read".into()))),
            Ok(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
            Err(error) => return Poll::Ready(Some(Err(error.into()))),
        };
        let read = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        this.at = this.at.saturating_add(read);
        this.left = this.left.saturating_sub(read);
        Poll::Ready(Some(Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}
