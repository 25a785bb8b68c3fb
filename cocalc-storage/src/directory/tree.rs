//! Reading and building trees of files, by descriptors that no planted link
//! can lead astray.

use std::{
    collections::HashMap,
    ffi::{CStr, CString},
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    fs::{
        AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, SeekFrom, Stat, Timespec, Timestamps, Uid,
        XattrFlags,
    },
    io::Errno,
};

/// What one name in a tree is.
#[derive(Debug)]
pub(super) enum Kind {
    Directory,
    /// A regular file of this length; its data comes separately.
    File(u64),
    Symlink(Vec<u8>),
    /// Another name of the file at this path, which came before.
    Link(Vec<u8>),
    /// A pipe, socket or device.
    Special {
        rdev: u64,
    },
}

/// One name in a tree. Paths are relative to the root, which is empty.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) path: Vec<u8>,
    pub(super) kind: Kind,
    /// With the type bits.
    pub(super) mode: u32,
    pub(super) owner: (u32, u32),
    pub(super) modified: (i64, u32),
    pub(super) attributes: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Opens what is at `path` below `root`, without following any link.
fn open(root: impl AsFd, path: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
    let path = if path.is_empty() { b".".as_slice() } else { path };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(rustix::fs::openat2(root, path, flags, Mode::empty(), resolve)?)
}

/// Opens the root of a tree.
pub(super) fn open_root(path: &std::path::Path) -> io::Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Visits every name below `root` and the root itself, directories before
/// what is in them, with the open file where it is a regular one. What is
/// removed meanwhile is left out.
pub(super) fn visit(
    root: impl AsFd,
    mut each: impl FnMut(Entry, Option<&File>) -> io::Result<()>,
) -> io::Result<()> {
    let root = root.as_fd();
    let mut links: HashMap<(u64, u64), Vec<u8>> = HashMap::new();
    let mut todo: Vec<Vec<u8>> = vec![Vec::new()];
    while let Some(path) = todo.pop() {
        let directory = match open(root, &path, OFlags::DIRECTORY) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && !path.is_empty() => continue,
            other => other?,
        };
        let stat = rustix::fs::fstat(&directory)?;
        each(entry(path.clone(), Kind::Directory, &stat, attributes(&directory)?), None)?;
        let mut names = Vec::new();
        for found in Dir::read_from(&directory)? {
            let name = found?.file_name().to_owned();
            if name.as_c_str() != c"." && name.as_c_str() != c".." {
                names.push(name);
            }
        }
        names.sort();
        for name in names {
            let inner = join(&path, &name);
            let stat = match rustix::fs::statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW) {
                Err(Errno::NOENT) => continue,
                other => other?,
            };
            let kind = FileType::from_raw_mode(stat.st_mode);
            if kind == FileType::Directory {
                todo.push(inner);
                continue;
            }
            if stat.st_nlink > 1 {
                let first = links.entry((stat.st_dev, stat.st_ino)).or_insert_with(|| inner.clone());
                if *first != inner {
                    each(entry(inner, Kind::Link(first.clone()), &stat, Vec::new()), None)?;
                    continue;
                }
            }
            match kind {
                FileType::RegularFile => {
                    let file = match open(root, &inner, OFlags::NONBLOCK | OFlags::NOATIME) {
                        // Only the owner may ask for that.
                        Err(error) if error.raw_os_error() == Some(Errno::PERM.raw_os_error()) => {
                            open(root, &inner, OFlags::NONBLOCK)
                        }
                        other => other,
                    };
                    let file = match file {
                        Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                        other => File::from(other?),
                    };
                    let stat = rustix::fs::fstat(&file)?;
                    let length = u64::try_from(stat.st_size).unwrap_or(0);
                    each(entry(inner, Kind::File(length), &stat, attributes(&file)?), Some(&file))?;
                }
                FileType::Symlink => {
                    let target = rustix::fs::readlinkat(&directory, &name, Vec::new())?.into_bytes();
                    each(entry(inner, Kind::Symlink(target), &stat, Vec::new()), None)?;
                }
                _ => each(entry(inner, Kind::Special { rdev: stat.st_rdev }, &stat, Vec::new()), None)?,
            }
        }
    }
    Ok(())
}

fn entry(path: Vec<u8>, kind: Kind, stat: &Stat, attributes: Vec<(Vec<u8>, Vec<u8>)>) -> Entry {
    Entry {
        path,
        kind,
        mode: stat.st_mode,
        owner: (stat.st_uid, stat.st_gid),
        modified: (stat.st_mtime, u32::try_from(stat.st_mtime_nsec).unwrap_or(0)),
        attributes,
    }
}

fn join(path: &[u8], name: &CStr) -> Vec<u8> {
    if path.is_empty() { name.to_bytes().to_vec() } else { [path, b"/", name.to_bytes()].concat() }
}

/// The extended attributes of an open file.
fn attributes(fd: impl AsFd) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let fd = fd.as_fd();
    let mut names = vec![0; 64 << 10];
    let length = match rustix::fs::flistxattr(fd, &mut names[..]) {
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        other => other?,
    };
    let mut found = Vec::new();
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; 64 << 10];
        match rustix::fs::fgetxattr(fd, name, &mut value[..]) {
            // Removed meanwhile, or not ours to read.
            Err(Errno::NODATA | Errno::PERM | Errno::ACCESS) => continue,
            other => value.truncate(other?),
        }
        found.push((name.to_vec(), value));
    }
    Ok(found)
}

/// The parts of a file that hold data, as offset and length; the rest are
/// holes.
pub(super) fn extents(file: &File, length: u64) -> io::Result<Vec<(u64, u64)>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < length {
        let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Err(Errno::NXIO) => break,
            Err(Errno::INVAL) => return Ok(vec![(0, length)]),
            other => other?,
        };
        let hole = rustix::fs::seek(file, SeekFrom::Hole(data))?.min(length);
        if hole <= data {
            break;
        }
        found.push((data, hole - data));
        at = hole;
    }
    Ok(found)
}

/// Builds a tree below an empty directory.
pub(super) struct Builder {
    root: OwnedFd,
    privileged: bool,
    /// Directories get their modes and times last: they may be read-only, and
    /// what is made in them changes them.
    directories: Vec<Entry>,
}

impl Builder {
    pub(super) fn new(root: OwnedFd) -> Self {
        Self { root, privileged: rustix::process::geteuid().is_root(), directories: Vec::new() }
    }

    /// Makes one name; the open file, if it is a regular one, still has to be
    /// given its data and then to be [finished](Self::finish_file).
    pub(super) fn add(&mut self, entry: Entry) -> io::Result<Option<(File, Entry)>> {
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
    pub(super) fn finish_file(&self, file: &File, entry: &Entry) -> io::Result<()> {
        if let Kind::File(length) = entry.kind {
            rustix::fs::ftruncate(file, length)?;
        }
        self.dress(file, entry)
    }

    /// Gives the directories what they have.
    pub(super) fn finish(mut self) -> io::Result<()> {
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

/// Copies the tree `from` into the empty directory `to`, sharing data where
/// the file system can.
pub(super) fn copy(from: impl AsFd, to: OwnedFd) -> io::Result<()> {
    let mut builder = Builder::new(to);
    visit(from, |entry, source| {
        if let (Some((file, entry)), Some(source)) = (builder.add(entry)?, source) {
            if rustix::fs::ioctl_ficlone(&file, source).is_err() {
                let Kind::File(length) = entry.kind else { return Ok(()) };
                for (offset, length) in extents(source, length)? {
                    copy_extent(source, &file, offset, length)?;
                }
            }
            builder.finish_file(&file, &entry)?;
        }
        Ok(())
    })?;
    builder.finish()
}

fn copy_extent(from: &File, to: &File, offset: u64, length: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt as _;
    let mut buffer = vec![0; 128 << 10];
    let (mut at, end) = (offset, offset + length);
    while at < end {
        let most = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
        let read = from.read_at(&mut buffer[..most], at)?;
        if read == 0 {
            // It was cut meanwhile.
            break;
        }
        to.write_all_at(&buffer[..read], at)?;
        at += read as u64;
    }
    Ok(())
}

/// Removes a tree, read-only directories and all.
pub(super) fn remove(path: &std::path::Path) -> io::Result<()> {
    let root = match open_root(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    let mut todo: Vec<Vec<u8>> = vec![Vec::new()];
    while let Some(path) = todo.pop() {
        let flags = OFlags::DIRECTORY | OFlags::PATH;
        let parent = open(&root, &path, flags)?;
        // A path descriptor cannot be changed, but names in it can.
        let _ = rustix::fs::chmodat(&parent, ".", Mode::from_raw_mode(0o700), AtFlags::empty());
        for found in Dir::read_from(open(&root, &path, OFlags::DIRECTORY)?)? {
            let found = found?;
            let name = found.file_name();
            if found.file_type() == FileType::Directory && name != c"." && name != c".." {
                // Without the right to search it, it could not be opened.
                let _ = rustix::fs::chmodat(&parent, name, Mode::from_raw_mode(0o700), AtFlags::empty());
                todo.push(join(&path, name));
            }
        }
    }
    std::fs::remove_dir_all(path)
}
