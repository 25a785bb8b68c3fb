//! Building a tree from its entries.

use std::{
    ffi::{CStr, CString},
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    fs::{AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags},
    io::Errno,
};

use super::{Entry, Kind, open};

/// Builds a tree below an empty directory.
pub(crate) struct Builder {
    root: OwnedFd,
    privileged: bool,
    /// Directories get their modes and times last: they may be read-only, and
    /// what is made in them changes them.
    directories: Vec<Entry>,
}

impl Builder {
    pub(crate) fn new(root: OwnedFd) -> Self {
        Self { root, privileged: rustix::process::geteuid().is_root(), directories: Vec::new() }
    }

    /// Makes one name; the open file, if it is a regular one, still has to be
    /// given its data and then to be [finished](Self::finish_file).
    pub(crate) fn add(&mut self, entry: Entry) -> io::Result<Option<(File, Entry)>> {
        if entry.path.is_empty() {
            if !matches!(entry.kind, Kind::Directory) {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "its root is not a directory"));
            }
            self.directories.push(entry);
            return Ok(None);
        }
        let (parent, name) = self.place(&entry.path)?;
        let mode = Mode::from_raw_mode(0o600);
        match &entry.kind {
            Kind::Directory => {
                rustix::fs::mkdirat(&parent, &name, Mode::from_raw_mode(0o700))?;
                self.directories.push(entry);
            }
            Kind::File(_) => {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = File::from(rustix::fs::openat(&parent, &name, flags, mode)?);
                return Ok(Some((file, entry)));
            }
            Kind::Symlink(target) => {
                rustix::fs::symlinkat(target.as_slice(), &parent, &name)?;
                self.own(&parent, &name, &entry)?;
                set_times(&parent, &name, &entry)?;
            }
            Kind::Link(target) => {
                let (from, old) = self.place(target)?;
                rustix::fs::linkat(&from, &old, &parent, &name, AtFlags::empty())?;
            }
            Kind::Special { rdev } => {
                let kind = FileType::from_raw_mode(entry.mode);
                match rustix::fs::mknodat(&parent, &name, kind, mode, *rdev) {
                    Err(Errno::PERM) if !self.privileged => {
                        tracing::warn!("a device is left out: only root may make it");
                        return Ok(None);
                    }
                    other => other?,
                }
                self.own(&parent, &name, &entry)?;
                rustix::fs::chmodat(&parent, &name, permissions(&entry), AtFlags::empty())?;
                set_times(&parent, &name, &entry)?;
            }
        }
        Ok(None)
    }

    /// Gives a file, which has its data, what else it has.
    pub(crate) fn finish_file(&self, file: &File, entry: &Entry) -> io::Result<()> {
        if let Kind::File(length) = entry.kind {
            rustix::fs::ftruncate(file, length)?;
        }
        self.dress(file, entry)
    }

    /// Gives the directories what they have.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        while let Some(entry) = self.directories.pop() {
            let directory = open(&self.root, &entry.path, OFlags::DIRECTORY)?;
            self.dress(&directory, &entry)?;
        }
        Ok(())
    }

    /// The parent of a path, opened, and the last name.
    fn place(&self, path: &[u8]) -> io::Result<(OwnedFd, CString)> {
        let (parent, name) = match path.iter().rposition(|byte| *byte == b'/') {
            Some(slash) => (&path[..slash], &path[slash + 1..]),
            None => (b"".as_slice(), path),
        };
        if name.is_empty() || name == b"." || name == b".." {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it has a path that is no name"));
        }
        Ok((open(&self.root, parent, OFlags::DIRECTORY)?, CString::new(name)?))
    }

    fn own(&self, parent: &OwnedFd, name: &CStr, entry: &Entry) -> io::Result<()> {
        if self.privileged {
            let (user, group) = (Uid::from_raw(entry.owner.0), Gid::from_raw(entry.owner.1));
            rustix::fs::chownat(parent, name, Some(user), Some(group), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        Ok(())
    }

    fn dress(&self, fd: impl AsFd, entry: &Entry) -> io::Result<()> {
        let fd = fd.as_fd();
        if self.privileged {
            let (user, group) = (Uid::from_raw(entry.owner.0), Gid::from_raw(entry.owner.1));
            rustix::fs::fchown(fd, Some(user), Some(group))?;
        }
        for (name, value) in &entry.attributes {
            match rustix::fs::fsetxattr(fd, name.as_slice(), value, XattrFlags::empty()) {
                Err(Errno::PERM | Errno::ACCESS) if !self.privileged => {
                    tracing::warn!("an extended attribute is left out: only root may set it");
                }
                Err(Errno::OPNOTSUPP) => {
                    tracing::warn!("an extended attribute is left out: the file system has none");
                }
                other => other?,
            }
        }
        // After the owner, whose change clears setuid.
        rustix::fs::fchmod(fd, permissions(entry))?;
        Ok(rustix::fs::futimens(fd, &times(entry))?)
    }
}

fn permissions(entry: &Entry) -> Mode {
    Mode::from_raw_mode(entry.mode & 0o7777)
}

fn times(entry: &Entry) -> Timestamps {
    let (tv_sec, nanos) = entry.modified;
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT },
        last_modification: Timespec { tv_sec, tv_nsec: nanos.min(999_999_999).into() },
    }
}

fn set_times(parent: &OwnedFd, name: &CStr, entry: &Entry) -> io::Result<()> {
    Ok(rustix::fs::utimensat(parent, name, &times(entry), AtFlags::SYMLINK_NOFOLLOW)?)
}
