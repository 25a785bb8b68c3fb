//! A folder as one stream: an archive that is written while it is read.

mod body;
mod tar;
mod zip;

use std::{
    ffi::OsStr,
    io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use rustix::{
    fs::{FileType, Stat},
    io::Errno,
};
use tokio::{runtime::Handle, sync::mpsc};

pub(crate) use self::body::ArchiveBody;
use self::body::{PIECES_MAX, Pieces};
use super::tree::Node;

/// How many names of a directory are held at a time.
const NAMES_MAX: usize = 1_000;
/// How deep it goes: each level holds a directory open.
const DEPTH_MAX: usize = 100;

/// Which archive.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Format {
    /// Knows every name and mode, and has no end to what it holds.
    Tar,
    /// Opens everywhere. What it says of its entries at its end is held in
    /// memory until then, so that it ends by a limit.
    Zip,
}

impl Format {
    /// The extension of its files.
    pub(crate) fn extension(self) -> &'static str {
        match self {
            Self::Tar => "tar",
            Self::Zip => "zip",
        }
    }

    /// Its media type.
    pub(crate) fn media_type(self) -> &'static str {
        match self {
            Self::Tar => "application/x-tar",
            Self::Zip => "application/zip",
        }
    }
}

/// Begins an archive of everything in `directory`, under the name `root`. What
/// is neither file, directory nor link is left out, and so is what vanishes
/// meanwhile. A file that becomes shorter is filled up with zeros, as GNU tar
/// does, and what is added to one while it is read is not in it; any other
/// failure breaks the stream off. `held` is kept until it is done, nobody
/// listens, or who listens takes nothing for as long as `idle`.
pub(crate) fn begin(
    format: Format,
    directory: Node,
    root: &[u8],
    idle: Duration,
    held: impl Send + 'static,
) -> ArchiveBody {
    let (sender, pieces) = mpsc::channel(PIECES_MAX);
    let runtime = Handle::current();
    let is_whole = Arc::new(AtomicBool::new(false));
    let whole = Arc::clone(&is_whole);
    let root = PathBuf::from(OsStr::from_bytes(root));
    tokio::task::spawn_blocking(move || {
        let failed = sender.clone();
        let pieces = Pieces::new(sender, runtime, idle);
        let written = match format {
            Format::Tar => all(tar::Tar::new(pieces), &directory, &root),
            Format::Zip => all(zip::Zip::new(pieces), &directory, &root),
        };
        match written.and_then(Pieces::finish) {
            Ok(()) => whole.store(true, Ordering::Release),
            Err(error) => {
                tracing::debug!(%error, "an archive was broken off");
                // If nobody listens any more, nobody needs to know; if nothing
                // more fits, the end of the stream tells that it is not whole.
                let _ = failed.try_send(Err(error));
            }
        }
        drop((failed, held));
    });
    ArchiveBody::new(pieces, is_whole)
}

/// An archive that is being written.
trait Archive {
    fn directory(&mut self, path: &Path, stat: &Stat) -> io::Result<()>;

    fn link(&mut self, path: &Path, stat: &Stat, target: &[u8]) -> io::Result<()>;

    /// `content` has exactly as many bytes as `stat` says.
    fn file(&mut self, path: &Path, stat: &Stat, content: &mut dyn io::Read) -> io::Result<()>;

    /// Writes what comes at the end.
    fn end(self) -> io::Result<Pieces>;
}

fn all(mut archive: impl Archive, directory: &Node, root: &Path) -> io::Result<Pieces> {
    walk(&mut archive, directory, root, DEPTH_MAX)?;
    archive.end()
}

fn walk(archive: &mut impl Archive, directory: &Node, path: &Path, depth: usize) -> io::Result<()> {
    let Some(depth) = depth.checked_sub(1) else {
        return Err(io::Error::other(format!("{} is nested too deeply", path.display())));
    };
    archive.directory(path, &directory.stat)?;
    let mut after = Vec::new();
    loop {
        let page = directory.list(&after, NAMES_MAX)?;
        for entry in &page.entries {
            let path = path.join(OsStr::from_bytes(&entry.name));
            match FileType::from_raw_mode(entry.stat.st_mode) {
                FileType::Directory | FileType::RegularFile => {
                    if let Some(node) = there(directory.entry(&entry.name))? {
                        add(archive, &node, &path, depth)?;
                    }
                }
                FileType::Symlink => {
                    if let Some(target) = there(directory.link(&entry.name))? {
                        archive.link(&path, &entry.stat, &target)?;
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

fn add(archive: &mut impl Archive, node: &Node, path: &Path, depth: usize) -> io::Result<()> {
    match node.kind() {
        FileType::Directory => walk(archive, node, path, depth),
        FileType::RegularFile => {
            let mut content = io::Read::take(io::Read::chain(node.read()?, io::repeat(0)), node.length());
            archive.file(path, &node.stat, &mut content)
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

/// The permissions that go into an archive: neither owners, which mean nothing
/// elsewhere, nor bits that lend them.
fn permissions(stat: &Stat) -> u32 {
    stat.st_mode & 0o777
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;
    use crate::files::{path::FilePath, tree::Tree};

    /// Whoever takes nothing is left, and gets no archive that looks whole.
    #[tokio::test]
    async fn a_reader_that_stops_gives_its_place_back_and_gets_a_broken_stream() {
        let directory = tempfile::tempdir().unwrap();
        for number in 0..20_u32 {
            // Noise, which a zip cannot make smaller.
            let mut seed = number + 1;
            let noise: Vec<u8> = (0..100_000)
                .map(|_| {
                    seed ^= seed << 13;
                    seed ^= seed >> 17;
                    seed ^= seed << 5;
                    seed.to_le_bytes()[1]
                })
                .collect();
            std::fs::write(directory.path().join(number.to_string()), noise).unwrap();
        }
        for format in [Format::Tar, Format::Zip] {
            let root = std::fs::File::open(directory.path()).unwrap();
            let node = Tree(root.into()).open(&FilePath::parse("").unwrap()).unwrap();
            let place = Arc::new(());
            let mut body = begin(format, node, b"root", Duration::from_millis(50), Arc::clone(&place));
            while Arc::strong_count(&place) > 1 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            let mut frames = Vec::new();
            while let Some(frame) = body.frame().await {
                frames.push(frame.is_ok());
            }
            assert!(frames.len() > 1 && frames.ends_with(&[false]), "{format:?}: {frames:?}");
        }
    }
}
