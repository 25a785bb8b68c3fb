//! A folder as one stream: a tar archive, written while it is read.

use std::{
    ffi::OsStr,
    io::{self, Read, Write},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
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
use rustix::{
    fs::{FileType, Stat},
    io::Errno,
};
use tokio::{
    runtime::Handle,
    sync::mpsc::{self, error::SendTimeoutError},
};

use super::tree::Node;

/// How much is held before it is sent on, and how many such pieces wait.
const PIECE_BYTES: usize = 128 * 1024;
const PIECES_MAX: usize = 4;
/// How many names of a directory are held at a time.
const NAMES_MAX: usize = 1_000;
/// How deep it goes: each level holds a directory open.
const DEPTH_MAX: usize = 100;

/// Begins an archive of everything in `directory`, under the name `root`. What
/// is neither file, directory nor link is left out, and so is what vanishes
/// meanwhile. A file that becomes shorter is filled up with zeros, as GNU tar
/// does; any other failure breaks the stream off. `held` is kept until it is
/// done, nobody listens, or who listens takes nothing for as long as `idle`.
pub(crate) fn tar(directory: Node, root: &[u8], idle: Duration, held: impl Send + 'static) -> ArchiveBody {
    let (sender, pieces) = mpsc::channel(PIECES_MAX);
    let runtime = Handle::current();
    let is_whole = Arc::new(AtomicBool::new(false));
    let whole = Arc::clone(&is_whole);
    let root = PathBuf::from(OsStr::from_bytes(root));
    tokio::task::spawn_blocking(move || {
        let failed = sender.clone();
        let mut builder = tar::Builder::new(Pieces { sender, held: BytesMut::new(), runtime, idle });
        let written = walk(&mut builder, &directory, &root, DEPTH_MAX)
            .and_then(|()| builder.into_inner())
            .and_then(|mut pieces| pieces.flush());
        if let Err(error) = written {
            // If nobody listens any more, nobody needs to know; if nothing more
            // fits, the end of the stream tells that it is not the whole.
            let _ = failed.try_send(Err(error));
        } else {
            whole.store(true, Ordering::Release);
        }
        drop((failed, held));
    });
    ArchiveBody { pieces, is_whole: Some(is_whole) }
}

fn walk(builder: &mut tar::Builder<Pieces>, directory: &Node, path: &Path, depth: usize) -> io::Result<()> {
    let Some(depth) = depth.checked_sub(1) else {
        return Err(io::Error::other(format!("{} is nested too deeply", path.display())));
    };
    let mut head = header(&directory.stat, tar::EntryType::Directory, 0);
    builder.append_data(&mut head, path, io::empty())?;
    let mut after = Vec::new();
    loop {
        let page = directory.list(&after, NAMES_MAX)?;
        for entry in &page.entries {
            let path = path.join(OsStr::from_bytes(&entry.name));
            match FileType::from_raw_mode(entry.stat.st_mode) {
                FileType::Directory | FileType::RegularFile => {
                    if let Some(node) = there(directory.entry(&entry.name))? {
                        add(builder, &node, &path, depth)?;
                    }
                }
                FileType::Symlink => {
                    if let Some(target) = there(directory.link(&entry.name))? {
                        let mut head = header(&entry.stat, tar::EntryType::Symlink, 0);
                        builder.append_link(&mut head, &path, OsStr::from_bytes(&target))?;
                    }
                }
                _ => {}
            }
        }
        match page.entries.last() {
            Some(last) if page.more => after.clone_from(&last.name),
            _ => return Ok(()),
        }
    }
}

fn add(builder: &mut tar::Builder<Pieces>, node: &Node, path: &Path, depth: usize) -> io::Result<()> {
    match node.kind() {
        FileType::Directory => walk(builder, node, path, depth),
        FileType::RegularFile => {
            let file = node.read()?;
            let mut head = header(&node.stat, tar::EntryType::Regular, node.length());
            let content = file.chain(io::repeat(0)).take(node.length());
            builder.append_data(&mut head, path, content)
        }
        // It became something else meanwhile.
        _ => Ok(()),
    }
}

/// What is there, if it is still what it was.
fn there<T>(found: io::Result<T>) -> io::Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) => match Errno::from_io_error(&error) {
            Some(Errno::NOENT | Errno::LOOP | Errno::NOTDIR | Errno::INVAL | Errno::XDEV) => Ok(None),
            _ => Err(error),
        },
    }
}

fn header(stat: &Stat, kind: tar::EntryType, bytes: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(bytes);
    // Neither owners, which mean nothing elsewhere, nor bits that lend them.
    header.set_mode(stat.st_mode & 0o777);
    header.set_mtime(u64::try_from(stat.st_mtime).unwrap_or(0));
    header
}

/// Sends what is written, in pieces.
struct Pieces {
    sender: mpsc::Sender<io::Result<Bytes>>,
    held: BytesMut,
    runtime: Handle,
    idle: Duration,
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.held.extend_from_slice(bytes);
        if self.held.len() >= PIECE_BYTES {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.held.is_empty() {
            return Ok(());
        }
        let piece = self.held.split().freeze();
        match self.runtime.block_on(self.sender.send_timeout(Ok(piece), self.idle)) {
            Ok(()) => Ok(()),
            Err(SendTimeoutError::Closed(_)) => Err(io::ErrorKind::BrokenPipe.into()),
            Err(SendTimeoutError::Timeout(_)) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

/// The archive as it is written.
#[derive(Debug)]
pub(crate) struct ArchiveBody {
    pieces: mpsc::Receiver<io::Result<Bytes>>,
    /// Whether everything is in it, until that has been asked.
    is_whole: Option<Arc<AtomicBool>>,
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

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;

    /// Whoever takes nothing is left, and gets no archive that looks whole.
    #[tokio::test]
    async fn a_reader_that_stops_gives_its_place_back_and_gets_a_broken_stream() {
        let directory = tempfile::tempdir().unwrap();
        for number in 0..20 {
            std::fs::write(directory.path().join(number.to_string()), vec![1; 100_000]).unwrap();
        }
        let root = std::fs::File::open(directory.path()).unwrap();
        let node = crate::files::tree::Tree(root.into())
            .open(&super::super::path::FilePath::parse("").unwrap())
            .unwrap();
        let place = Arc::new(());
        let mut body = tar(node, b"root", Duration::from_millis(50), Arc::clone(&place));
        while Arc::strong_count(&place) > 1 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let mut frames = Vec::new();
        while let Some(frame) = body.frame().await {
            frames.push(frame.is_ok());
        }
        assert!(frames.len() > 1 && frames.ends_with(&[false]), "{frames:?}");
    }
}
