//! Looking through an image's tree: what may be in it, and its digest.
//!
//! The digest is SHA-256 over `cocalc image 1\n` and then every name of the
//! tree, in the order in which [`visit`] finds them: a directory, then what is
//! in it but directories by the order of their bytes, then its directories from
//! the last to the first. Of each name, with numbers in 8 bytes, the lowest
//! first, and texts after their length: the path, the kind (`d`, `f`, `l`, `h`,
//! `s`), the mode with its type, owner and group, seconds and nanoseconds of the
//! last change (0 for the root, which archives do not agree about), then for a
//! file its length and the SHA-256 of its bytes, for a link where it points, for
//! another name of the same file the first one, and the extended attributes by
//! name, how many and each with its value.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::{fd::AsFd as _, unix::fs::FileExt as _},
    path::Path,
};

use cocalc_core::ids::ImageDigest;
use rustix::fs::{AtFlags, FileType, Timespec, Timestamps};
use sha2::{Digest as _, Sha256};

use super::ImageLimits;
use crate::tree::{Entry, Kind, open_root, visit};

/// Ids from here on are of no use in a project, which has 65,536 of them.
const OWNERS: u32 = 1 << 16;
const CHUNK: usize = 256 << 10;

/// What is done about what has no place in an image.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Strictness {
    /// It is left out.
    LeaveOut,
    /// It is refused: an image has no such thing.
    Refuse,
}

/// What an image turned out to be.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Seen {
    pub(super) digest: ImageDigest,
    pub(super) bytes: u64,
    pub(super) names: u64,
}

/// Why a tree is no image.
#[derive(Debug)]
pub(super) enum Unfit {
    Refused(String),
    Io(io::Error),
}

impl From<io::Error> for Unfit {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Looks through the tree at `root`, removes what has no place in it if it is
/// to be left out, and says what it is.
pub(super) fn settle(root: &Path, limits: &ImageLimits, strictness: Strictness) -> Result<Seen, Unfit> {
    let root = open_root(root)?;
    let mut walk = Walk {
        hash: Sha256::new_with_prefix(b"cocalc image 1\n"),
        chunk: vec![0; CHUNK],
        bytes: 0,
        names: 0,
        limits,
        strictness,
        unwanted: BTreeMap::new(),
        refused: None,
    };
    let visited = visit(&root, None, |entry, file| walk.see(entry, file));
    if let Some(reason) = walk.refused {
        return Err(Unfit::Refused(reason));
    }
    match visited {
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
            return Err(Unfit::Refused(error.to_string()));
        }
        other => other?,
    }
    for (directory, names) in &walk.unwanted {
        remove(&root, directory, names)?;
    }
    rustix::fs::syncfs(&root).map_err(io::Error::from)?;
    let digest = ImageDigest::from_bytes(walk.hash.finalize().into());
    Ok(Seen { digest, bytes: walk.bytes, names: walk.names })
}

/// Removes names from a directory, whose time stays what it was.
fn remove(root: &std::os::fd::OwnedFd, directory: &[u8], names: &[Vec<u8>]) -> io::Result<()> {
    let directory = crate::tree::open_directory_in(root, directory)?;
    let stat = rustix::fs::fstat(&directory)?;
    for name in names {
        rustix::fs::unlinkat(&directory, name.as_slice(), AtFlags::empty())?;
    }
    let nanos = i64::try_from(stat.st_mtime_nsec).unwrap_or(0);
    let times = Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT },
        last_modification: Timespec { tv_sec: stat.st_mtime, tv_nsec: nanos },
    };
    Ok(rustix::fs::futimens(&directory, &times)?)
}

struct Walk<'a> {
    hash: Sha256,
    chunk: Vec<u8>,
    bytes: u64,
    names: u64,
    limits: &'a ImageLimits,
    strictness: Strictness,
    /// By directory, what is to be removed there.
    unwanted: BTreeMap<Vec<u8>, Vec<Vec<u8>>>,
    refused: Option<String>,
}

impl Walk<'_> {
    /// Ends the visit.
    fn refuse(&mut self, path: &[u8], reason: &str) -> io::Error {
        self.refused = Some(format!("{:?} {reason}", String::from_utf8_lossy(path)));
        io::ErrorKind::InvalidData.into()
    }

    fn see(&mut self, mut entry: Entry, file: Option<&File>) -> io::Result<()> {
        let is_device =
            matches!(FileType::from_raw_mode(entry.mode), FileType::CharacterDevice | FileType::BlockDevice);
        if is_device {
            // Another name of one has to go, too.
            return match self.strictness {
                Strictness::Refuse => Err(self.refuse(&entry.path, "is a device, which no image has")),
                Strictness::LeaveOut => {
                    let slash = entry.path.iter().rposition(|byte| *byte == b'/');
                    let (directory, name) = match slash {
                        Some(slash) => (&entry.path[..slash], &entry.path[slash + 1..]),
                        None => (b"".as_slice(), entry.path.as_slice()),
                    };
                    self.unwanted.entry(directory.to_vec()).or_default().push(name.to_vec());
                    Ok(())
                }
            };
        }
        self.names += 1;
        if self.names > self.limits.names {
            let reason = format!("is one too many: an image has at most {} names", self.limits.names);
            return Err(self.refuse(&entry.path, &reason));
        }
        if entry.owner.0 >= OWNERS || entry.owner.1 >= OWNERS {
            let reason = format!(
                "belongs to {}:{}; a project has the ids up to 65535 only",
                entry.owner.0, entry.owner.1
            );
            return Err(self.refuse(&entry.path, &reason));
        }
        if let Some((name, _)) =
            entry.attributes.iter().find(|(name, _)| name.starts_with(b"trusted.overlay."))
        {
            let reason = format!(
                "has the attribute {}, which means something to an overlay",
                String::from_utf8_lossy(name)
            );
            return Err(self.refuse(&entry.path, &reason));
        }
        if let Kind::File(length) = entry.kind {
            self.bytes = self.bytes.saturating_add(length);
            if self.bytes > self.limits.bytes {
                let reason = format!("makes it larger than {} bytes", self.limits.bytes);
                return Err(self.refuse(&entry.path, &reason));
            }
        }
        entry.attributes.sort();
        self.take(&entry, file)
    }

    fn take(&mut self, entry: &Entry, file: Option<&File>) -> io::Result<()> {
        let is_root = entry.path.is_empty();
        self.text(&entry.path);
        let kind = match entry.kind {
            Kind::Directory => b"d",
            Kind::File(_) => b"f",
            Kind::Symlink(_) => b"l",
            Kind::Link(_) => b"h",
            Kind::Special { .. } => b"s",
        };
        self.hash.update(kind);
        let (secs, nanos) = if is_root { (0, 0) } else { entry.modified };
        self.number(entry.mode.into());
        self.number(entry.owner.0.into());
        self.number(entry.owner.1.into());
        self.hash.update(secs.to_le_bytes());
        self.number(nanos.into());
        match &entry.kind {
            Kind::Directory | Kind::Special { .. } => {}
            Kind::Symlink(target) | Kind::Link(target) => self.text(target),
            Kind::File(length) => {
                self.number(*length);
                let file = file.ok_or_else(|| io::Error::other("a file was not opened"))?;
                let hash = self.content(file, *length)?;
                self.hash.update(hash);
            }
        }
        self.number(entry.attributes.len() as u64);
        for (name, value) in &entry.attributes {
            self.text(name);
            self.text(value);
        }
        Ok(())
    }

    fn content(&mut self, file: &File, length: u64) -> io::Result<[u8; 32]> {
        let mut hash = Sha256::new();
        let mut at = 0;
        while at < length {
            let want = usize::try_from(length - at).unwrap_or(CHUNK).min(CHUNK);
            match file.read_at(&mut self.chunk[..want], at)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                got => {
                    hash.update(&self.chunk[..got]);
                    at += got as u64;
                }
            }
        }
        // What was read once is not read again soon; it must not push out what
        // projects need.
        let _ = rustix::fs::fadvise(file.as_fd(), 0, None, rustix::fs::Advice::DontNeed);
        Ok(hash.finalize().into())
    }

    fn number(&mut self, number: u64) {
        self.hash.update(number.to_le_bytes());
    }

    fn text(&mut self, text: &[u8]) {
        self.number(text.len() as u64);
        self.hash.update(text);
    }
}
