//! Reading and building trees of files, by descriptors that no planted link
//! can lead astray.

mod build;
mod copy;
mod diff;
mod remove;

use std::{
    collections::HashMap,
    ffi::{CStr, CString},
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, SeekFrom, Stat},
    io::Errno,
};

use cocalc_core::{
    ids::{ProjectId, TreePath},
    storage::Error,
};

use crate::failure::Failure;

pub(crate) use build::Builder;
pub(crate) use copy::{Plan, Sharing, copy, remove_left};
pub(crate) use diff::{Lineage, diff};
pub(crate) use remove::{remove, remove_at};

/// What one name in a tree is.
#[derive(Debug)]
pub(crate) enum Kind {
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
pub(crate) struct Entry {
    pub(crate) path: Vec<u8>,
    pub(crate) kind: Kind,
    /// With the type bits.
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    pub(crate) modified: (i64, u32),
    pub(crate) attributes: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Opens what is at `path` below `root`, without following any link.
fn open(root: impl AsFd, path: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
    let path = if path.is_empty() { b".".as_slice() } else { path };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(rustix::fs::openat2(root, path, flags, Mode::empty(), resolve)?)
}

/// Opens the root of a tree.
pub(crate) fn open_root(path: &std::path::Path) -> io::Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Opens the directory at `path` below `root`, without following any link.
pub(crate) fn open_directory_in(root: impl AsFd, path: &[u8]) -> io::Result<OwnedFd> {
    open(root, path, OFlags::DIRECTORY)
}

/// Visits every name below `root` and the root itself, directories before
/// what is in them, with the open file where it is a regular one. What is
/// removed meanwhile is left out, and so is what `skip` names by device and
/// inode.
///
/// # Errors
///
/// [`io::ErrorKind::CrossesDevices`] at a subvolume or mount inside.
pub(crate) fn visit(
    root: impl AsFd,
    skip: Option<(u64, u64)>,
    mut each: impl FnMut(Entry, Option<&File>) -> io::Result<()>,
) -> io::Result<()> {
    let root = root.as_fd();
    let device = rustix::fs::fstat(root)?.st_dev;
    let mut links: HashMap<(u64, u64), Vec<u8>> = HashMap::new();
    let mut todo: Vec<Vec<u8>> = vec![Vec::new()];
    while let Some(path) = todo.pop() {
        let directory = match open(root, &path, OFlags::DIRECTORY) {
            Err(error) if is_gone(&error) && !path.is_empty() => continue,
            other => other?,
        };
        let stat = rustix::fs::fstat(&directory)?;
        if stat.st_dev != device {
            let path = String::from_utf8_lossy(&path).into_owned();
            let message = format!("{path:?} is a subvolume or another file system");
            return Err(io::Error::new(io::ErrorKind::CrossesDevices, message));
        }
        if skip == Some((stat.st_dev, stat.st_ino)) {
            continue;
        }
        each(entry(path.clone(), Kind::Directory, &stat, attributes(&directory)?), None)?;
        for name in names(&directory)? {
            let inner = join(&path, &name);
            let stat = match rustix::fs::statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW) {
                Err(Errno::NOENT) => continue,
                other => other?,
            };
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
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
            if let Some(Seen { entry, file }) = single(&directory, &name, inner, &stat)? {
                each(entry, file.as_ref())?;
            }
        }
    }
    Ok(())
}

/// Says of an error of [`visit`] or [`diff`] what it means for a project.
pub(crate) fn beyond(project: ProjectId, error: io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::CrossesDevices | io::ErrorKind::InvalidFilename => {
            Error::Path { project, path: TreePath::root(), reason: error.to_string() }.into()
        }
        _ => Failure::Io { doing: "read the files", source: error },
    }
}

/// Whether something was removed or replaced while it was looked for.
fn is_gone(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(errno, Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP))
}

/// The names in a directory, in the order of their bytes.
fn names(directory: impl AsFd) -> io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for found in Dir::read_from(directory)? {
        let name = found?.file_name().to_owned();
        if name.as_c_str() != c"." && name.as_c_str() != c".." {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// What there is at one name: its entry, and the open file if it is a regular
/// one.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) entry: Entry,
    pub(crate) file: Option<File>,
}

/// Looks at what is no directory, at `name` in `directory`, which `stat` was
/// found at; `None` if it is gone, or is something else by now.
fn single(directory: &OwnedFd, name: &CStr, path: Vec<u8>, stat: &Stat) -> io::Result<Option<Seen>> {
    let seen = |kind, stat: &Stat, attributes, file| {
        Ok(Some(Seen { entry: entry(path.clone(), kind, stat, attributes), file }))
    };
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {
            // A FIFO in its place by now must not be waited for.
            let file = match open(directory, name.to_bytes(), OFlags::NONBLOCK | OFlags::NOATIME) {
                // Only the owner may ask for that.
                Err(error) if error.raw_os_error() == Some(Errno::PERM.raw_os_error()) => {
                    open(directory, name.to_bytes(), OFlags::NONBLOCK)
                }
                other => other,
            };
            let file = match file {
                Err(error) if is_gone(&error) => return Ok(None),
                other => File::from(other?),
            };
            let stat = rustix::fs::fstat(&file)?;
            if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
                return Ok(None);
            }
            let length = u64::try_from(stat.st_size).unwrap_or(0);
            let attributes = attributes(&file)?;
            seen(Kind::File(length), &stat, attributes, Some(file))
        }
        FileType::Symlink => match rustix::fs::readlinkat(directory, name, Vec::new()) {
            Err(Errno::NOENT | Errno::INVAL) => Ok(None),
            other => seen(Kind::Symlink(other?.into_bytes()), stat, Vec::new(), None),
        },
        _ => seen(Kind::Special { rdev: stat.st_rdev }, stat, Vec::new(), None),
    }
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
pub(crate) fn extents(file: &File, length: u64) -> io::Result<Vec<(u64, u64)>> {
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
