//! Counting what a volume holds, where no quota group knows it.

use std::{
    collections::HashSet,
    ffi::CStr,
    fs::File,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use cocalc_core::storage::Footprint;
use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat},
    io::Errno,
};

use crate::{
    extents::{Extents, extents},
    failure::{Doing as _, Failure},
};

/// How long a path the kernel is given at once; its limit is 4096. Projects
/// make deeper trees.
const PART_MAX: usize = 3000;

/// What data within metadata counts as, about which nothing is known.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Inline {
    Exclusive,
    Shared,
}

/// Bytes that the files below `root` occupy; a file with several names counts
/// once. The project may be changing the tree meanwhile, and may have planted
/// links: nothing outside is ever opened.
pub(crate) fn occupied(root: &Path) -> Result<u64, Failure> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = rustix::fs::open(root, flags, Mode::empty()).doing("open the volume")?;
    let mut total = 0u64;
    each(root.as_fd(), |_, _, stat, first| {
        if first {
            total = total.saturating_add(blocks(stat));
        }
        Ok(())
    })?;
    Ok(total)
}

/// What the files below `root` occupy, and how much of it is theirs alone. An
/// extent that is shared within the tree, too, is told as shared. Where the
/// file system cannot tell, all is taken as exclusive.
pub(crate) fn footprint(root: BorrowedFd<'_>, inline: Inline) -> Result<Footprint, Failure> {
    let mut footprint = Footprint::default();
    each(root, |directory, name, stat, first| {
        footprint.entries += 1;
        if !first {
            return Ok(());
        }
        let occupied = blocks(stat);
        let mut shared = 0;
        if occupied > 0 && FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
            let found = open_file(directory, name, stat).map(extents).transpose();
            let found = found.doing("find the extents of a file")?.flatten();
            if let Some(Extents { shared_bytes, inline: within }) = found {
                let all = within && inline == Inline::Shared;
                shared = if all { occupied } else { shared_bytes.min(occupied) };
            }
        }
        footprint.total_bytes = footprint.total_bytes.saturating_add(occupied);
        footprint.exclusive_bytes = footprint.exclusive_bytes.saturating_add(occupied - shared);
        Ok(())
    })?;
    Ok(footprint)
}

fn blocks(stat: &Stat) -> u64 {
    u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512)
}

/// Opens the file that was looked at, and nothing that has taken its place: to
/// open a pipe would wait, and to open a device may do anything. `None` if it
/// has gone, or is not ours to read.
fn open_file(directory: BorrowedFd<'_>, name: &CStr, stat: &Stat) -> Option<File> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = rustix::fs::openat(directory, name, flags, Mode::empty()).ok()?;
    let now = rustix::fs::fstat(&found).ok()?;
    if (now.st_dev, now.st_ino) != (stat.st_dev, stat.st_ino)
        || FileType::from_raw_mode(now.st_mode) != FileType::RegularFile
    {
        return None;
    }
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&found));
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    rustix::fs::openat(CWD, path, flags, Mode::empty()).ok().map(File::from)
}

/// Visits every name below `root`, with its directory, what it is, and whether
/// it is the first of this file. Needs memory for the directories that are
/// still to be visited, and for the files that have several names.
fn each(
    root: BorrowedFd<'_>,
    mut visit: impl FnMut(BorrowedFd<'_>, &CStr, &Stat, bool) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut linked: HashSet<(u64, u64)> = HashSet::new();
    let mut todo: Vec<Vec<u8>> = vec![Vec::new()];
    while let Some(path) = todo.pop() {
        let directory = match open_directory(root, &path) {
            // It was removed or replaced, another file system is mounted on
            // it, or without privilege, it is closed to us.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV | Errno::ACCESS)
                if !path.is_empty() =>
            {
                continue;
            }
            other => other.doing("walk the volume")?,
        };
        for entry in Dir::read_from(&directory).doing("walk the volume")? {
            let entry = entry.doing("walk the volume")?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let Ok(stat) = rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
            let first = is_directory || stat.st_nlink == 1 || linked.insert((stat.st_dev, stat.st_ino));
            visit(directory.as_fd(), name, &stat, first)?;
            if is_directory {
                let separator: &[u8] = if path.is_empty() { b"" } else { b"/" };
                todo.push([path.as_slice(), separator, name.to_bytes()].concat());
            }
        }
    }
    Ok(())
}

/// Opens a directory below `root`, however deep, following no link and
/// crossing to no other mount.
fn open_directory(root: BorrowedFd<'_>, path: &[u8]) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    let step = |from: BorrowedFd<'_>, part: &[u8]| {
        let part = if part.is_empty() { b".".as_slice() } else { part };
        rustix::fs::openat2(from, part, flags, Mode::empty(), resolve)
    };
    let mut rest = path;
    let mut at: Option<OwnedFd> = None;
    while rest.len() > PART_MAX {
        // A name is at most 255 bytes long, so there is a slash.
        let slash = rest[..PART_MAX].iter().rposition(|byte| *byte == b'/').unwrap_or(PART_MAX);
        let from = at.as_ref().map_or(root, |at| at.as_fd());
        at = Some(step(from, &rest[..slash])?);
        rest = rest.get(slash + 1..).unwrap_or_default();
    }
    step(at.as_ref().map_or(root, |at| at.as_fd()), rest)
}
