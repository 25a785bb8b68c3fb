//! A tenant's tree, entered one way only: from its root, beneath it, without
//! following a link or crossing into another file system.
//!
//! The tenant may change everything at any moment. So nothing is looked at
//! twice by name: what was opened is what is asked and read, and it is opened
//! for reading only once it is known to be a file, because opening a pipe or a
//! device does something.

use std::{
    collections::BinaryHeap,
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

use rustix::{
    fs::{AtFlags, Dir, FileType, Mode, OFlags, RenameFlags, ResolveFlags, Stat},
    io::Errno,
};

use super::{
    conditions::{Version, seconds},
    path::FilePath,
};

/// How long reading the names of a directory may take.
const SCAN_LIMIT: Duration = Duration::from_secs(10);

/// The root of a project's files.
#[derive(Debug)]
pub(crate) struct Tree(pub(crate) OwnedFd);

/// What is at a path: opened, but not for reading.
#[derive(Debug)]
pub(crate) struct Node {
    fd: OwnedFd,
    pub(crate) stat: Stat,
}

/// A part of a directory.
#[derive(Debug)]
pub(crate) struct Page {
    /// In the order of their names' bytes.
    pub(crate) entries: Vec<Entry>,
    /// Whether there is more after the last of them.
    pub(crate) more: bool,
}

/// Something in a directory.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) name: Vec<u8>,
    pub(crate) stat: Stat,
}

impl Tree {
    /// Opens what is at `path`, without any effect on it. A link at its end, or
    /// on the way, is [`Errno::LOOP`].
    pub(crate) fn open(&self, path: &FilePath) -> io::Result<Node> {
        Node::open(&self.0, &path.relative())
    }

    /// Whom new files belong to: whoever has the root.
    pub(crate) fn owner(&self) -> io::Result<(u32, u32)> {
        let stat = rustix::fs::fstat(&self.0)?;
        Ok((stat.st_uid, stat.st_gid))
    }
}

impl Node {
    fn open(from: impl AsFd, path: &[u8]) -> io::Result<Self> {
        let resolve = ResolveFlags::BENEATH
            | ResolveFlags::NO_SYMLINKS
            | ResolveFlags::NO_MAGICLINKS
            | ResolveFlags::NO_XDEV;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat2(from, path, flags, Mode::empty(), resolve)?;
        let stat = rustix::fs::fstat(&fd)?;
        // A link at the end is what `O_PATH` opens itself.
        if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
            return Err(Errno::LOOP.into());
        }
        Ok(Self { fd, stat })
    }

    /// Opens an entry of this directory.
    pub(crate) fn entry(&self, name: &[u8]) -> io::Result<Self> {
        Self::open(&self.fd, name)
    }

    pub(crate) fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.stat.st_mode)
    }

    pub(crate) fn length(&self) -> u64 {
        u64::try_from(self.stat.st_size).unwrap_or(0)
    }

    pub(crate) fn version(&self) -> Version {
        version(&self.stat)
    }

    /// Opens the regular file for reading.
    pub(crate) fn read(&self) -> io::Result<File> {
        if self.kind() != FileType::RegularFile {
            return Err(Errno::INVAL.into());
        }
        // The very file that was looked at, whatever its name means by now.
        let path = format!("/proc/self/fd/{}", self.fd.as_raw_fd());
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        Ok(rustix::fs::open(path, flags, Mode::empty())?.into())
    }

    /// At most `max` entries with names after `after`, in order. The memory
    /// that this takes does not depend on the size of the directory.
    pub(crate) fn list(&self, after: &[u8], max: usize) -> io::Result<Page> {
        let directory = self.directory()?;
        let until = Instant::now() + SCAN_LIMIT;
        let mut first: BinaryHeap<Vec<u8>> = BinaryHeap::new();
        for (index, entry) in Dir::read_from(&directory)?.enumerate() {
            if index % 4096 == 0 && Instant::now() > until {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            let wanted = name != b"." && name != b".." && (after.is_empty() || name > after);
            let full = first.len() > max;
            if !wanted || full && first.peek().is_some_and(|last| name >= last.as_slice()) {
                continue;
            }
            if full {
                first.pop();
            }
            first.push(name.to_vec());
        }
        let mut names = first.into_sorted_vec();
        let more = names.len() > max;
        names.truncate(max);
        let mut entries = Vec::with_capacity(names.len());
        for name in names {
            match rustix::fs::statat(&directory, name.as_slice(), AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => entries.push(Entry { name, stat }),
                // It was there when its name was read.
                Err(Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Page { entries, more })
    }

    /// What the entry `name` of this directory is, if there is one.
    pub(crate) fn look(&self, name: &[u8]) -> io::Result<Option<Stat>> {
        match rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// What the link `name` in this directory says.
    pub(crate) fn link(&self, name: &[u8]) -> io::Result<Vec<u8>> {
        Ok(rustix::fs::readlinkat(&self.fd, name, Vec::new())?.into_bytes())
    }

    /// This directory, opened so that its names can be read.
    pub(super) fn directory(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&self.fd, ".", flags, Mode::empty())?)
    }

    /// A new file in this directory that has no name yet, for `owner`. What a
    /// crash leaves of it is nothing.
    pub(crate) fn nameless(&self, owner: (u32, u32)) -> io::Result<File> {
        let flags = OFlags::WRONLY | OFlags::TMPFILE | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.fd, ".", flags, Mode::from_raw_mode(0o600))?;
        give(&fd, owner)?;
        Ok(fd.into())
    }

    /// Gives a nameless file a name that nothing has: [`Errno::EXIST`] else.
    pub(crate) fn name(&self, file: &File, name: &[u8]) -> io::Result<()> {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        rustix::fs::linkat(rustix::fs::CWD, path, &self.fd, name, AtFlags::SYMLINK_FOLLOW)?;
        Ok(())
    }

    /// Gives a nameless file a name, in the place of the file that has it.
    pub(crate) fn name_over(&self, file: &File, name: &[u8]) -> io::Result<()> {
        // Only a name can replace a name.
        let passing = format!(".cocalc-{}", cocalc_core::ids::OperationId::random());
        self.name(file, passing.as_bytes())?;
        if let Err(error) = rustix::fs::renameat(&self.fd, passing.as_str(), &self.fd, name) {
            let _ = rustix::fs::unlinkat(&self.fd, passing.as_str(), AtFlags::empty());
            return Err(error.into());
        }
        Ok(())
    }

    /// Makes the directory `name` in this one, for `owner`.
    pub(crate) fn make_directory(&self, name: &[u8], owner: (u32, u32)) -> io::Result<()> {
        // Nobody else enters it before it is its owner's.
        rustix::fs::mkdirat(&self.fd, name, Mode::from_raw_mode(0o700))?;
        let made = self.entry(name)?;
        let (uid, gid) = owners(owner);
        rustix::fs::chownat(&made.fd, "", uid, gid, AtFlags::EMPTY_PATH)?;
        let path = format!("/proc/self/fd/{}", made.fd.as_raw_fd());
        rustix::fs::chmodat(rustix::fs::CWD, path, Mode::from_raw_mode(0o755), AtFlags::empty())?;
        Ok(())
    }

    /// Removes the entry `name`, which is a directory if `directory`.
    pub(crate) fn remove(&self, name: &[u8], directory: bool) -> io::Result<()> {
        let flags = if directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        Ok(rustix::fs::unlinkat(&self.fd, name, flags)?)
    }

    /// Whether this and the other are one and the same.
    pub(crate) fn is(&self, other: &Self) -> bool {
        (self.stat.st_dev, self.stat.st_ino) == (other.stat.st_dev, other.stat.st_ino)
    }

    /// Gives the entry `name` of this directory the name `to` in another one. If
    /// that is taken, it is [`Errno::EXIST`], or what has it is replaced.
    pub(crate) fn rename(&self, name: &[u8], into: &Self, to: &[u8], replace: bool) -> io::Result<()> {
        let flags = if replace { RenameFlags::empty() } else { RenameFlags::NOREPLACE };
        Ok(rustix::fs::renameat_with(&self.fd, name, &into.fd, to, flags)?)
    }

    /// Makes what was named or removed in this directory last.
    pub(crate) fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::fsync(self.directory()?)?)
    }
}

/// Identifies a state of a file: which file, how long, and when its content and
/// anything else of it last changed. The tenant can't set the last of these.
pub(crate) fn version(stat: &Stat) -> Version {
    let tag = format!(
        "\"{:x}-{:x}-{:x}.{:x}-{:x}.{:x}\"",
        stat.st_ino, stat.st_size, stat.st_mtime, stat.st_mtime_nsec, stat.st_ctime, stat.st_ctime_nsec
    );
    Version { tag, modified: seconds(stat.st_mtime) }
}

fn give(fd: &OwnedFd, owner: (u32, u32)) -> io::Result<()> {
    let (uid, gid) = owners(owner);
    Ok(rustix::fs::fchown(fd, uid, gid)?)
}

fn owners((uid, gid): (u32, u32)) -> (Option<rustix::fs::Uid>, Option<rustix::fs::Gid>) {
    (Some(rustix::fs::Uid::from_raw(uid)), Some(rustix::fs::Gid::from_raw(gid)))
}
