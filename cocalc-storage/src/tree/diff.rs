//! What is different between two trees, in the order of their paths, a page at
//! a time.

use std::{
    cmp::Ordering,
    ffi::{CStr, CString},
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt as _,
    },
};

use cocalc_core::{
    ids::TreePath,
    storage::{Change, ChangeKind, Changes, NodeKind},
};
use rustix::{
    fs::{AtFlags, FileType, OFlags, Stat},
    io::Errno,
};

use super::{attributes, is_gone, join, names, open};

/// Whether the two trees have one history, so that inode numbers and change
/// times mean the same in both.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Lineage {
    /// Both are snapshots of one volume, or it and its snapshot: a file with
    /// the same inode and change time, which nobody can set, is the same.
    Shared,
    /// Copies of each other. A regular file with the same size and
    /// modification time is taken for the same, as rsync does; who sets the
    /// time back to hide a change, hides it.
    Separate,
}

const CHUNK: usize = 128 << 10;

/// At most `max` differences of `new` from `old`, of those after `after`. It
/// holds the names of the directories on one path, and no more.
///
/// # Errors
///
/// [`io::ErrorKind::CrossesDevices`] at a subvolume or mount inside.
pub(crate) fn diff(
    old: &OwnedFd,
    new: &OwnedFd,
    lineage: Lineage,
    after: Option<&TreePath>,
    max: usize,
) -> io::Result<Changes> {
    let devices = [rustix::fs::fstat(old)?.st_dev, rustix::fs::fstat(new)?.st_dev];
    let after: Option<Vec<&[u8]>> = after.map(|path| path.names().collect());
    let mut trees = Trees { old, new, lineage, devices, changes: Vec::new() };
    let mut frames = Vec::new();
    if let Some(frame) = trees.enter(Vec::new(), after.as_deref())? {
        frames.push(frame);
    }
    while let Some(frame) = frames.last_mut() {
        let Some(name) = frame.names.pop() else {
            frames.pop();
            continue;
        };
        let path = join(&frame.path, &name);
        // Whether `after` is at this name or below it.
        let begins = frame.begin.take().filter(|begin| begin[0] == name.to_bytes());
        let inner = trees.look(frame, &name, &path, begins.is_some())?;
        if trees.changes.len() > max {
            trees.changes.truncate(max);
            return Ok(Changes { changes: trees.changes, more: true });
        }
        if inner {
            // Only one path's directories are open at a time.
            frame.open = None;
            let begin = begins.map(|begin| begin[1..].to_vec()).filter(|begin| !begin.is_empty());
            if let Some(inner) = trees.enter(path, begin.as_deref())? {
                frames.push(inner);
            }
        }
    }
    Ok(Changes { changes: trees.changes, more: false })
}

/// A directory that both trees have.
struct Frame<'a> {
    path: Vec<u8>,
    /// Still to be looked at; the next one is last.
    names: Vec<CString>,
    /// Where to begin: the names of the last change of the page before.
    begin: Option<Vec<&'a [u8]>>,
    open: Option<[OwnedFd; 2]>,
}

struct Trees<'a> {
    old: &'a OwnedFd,
    new: &'a OwnedFd,
    lineage: Lineage,
    devices: [u64; 2],
    changes: Vec<Change>,
}

impl Trees<'_> {
    fn open(&self, path: &[u8]) -> io::Result<Option<[OwnedFd; 2]>> {
        let open = |root| match open(root, path, OFlags::DIRECTORY) {
            Err(error) if is_gone(&error) => Ok(None),
            other => other.map(Some),
        };
        let (Some(old), Some(new)) = (open(self.old)?, open(self.new)?) else { return Ok(None) };
        for (directory, device) in [&old, &new].into_iter().zip(self.devices) {
            if rustix::fs::fstat(directory)?.st_dev != device {
                let path = String::from_utf8_lossy(path).into_owned();
                let message = format!("{path:?} is a subvolume or another file system");
                return Err(io::Error::new(io::ErrorKind::CrossesDevices, message));
            }
        }
        Ok(Some([old, new]))
    }

    fn enter<'b>(&self, path: Vec<u8>, begin: Option<&[&'b [u8]]>) -> io::Result<Option<Frame<'b>>> {
        let Some(open) = self.open(&path)? else { return Ok(None) };
        let mut all = names(&open[0])?;
        all.append(&mut names(&open[1])?);
        all.sort();
        all.dedup();
        if let Some(begin) = begin {
            all.retain(|name| name.to_bytes() >= begin[0]);
        }
        all.reverse();
        Ok(Some(Frame { path, names: all, begin: begin.map(<[_]>::to_vec), open: Some(open) }))
    }

    /// Compares one name; whether it is a directory in both, to be entered.
    /// With `told`, it was on the page before.
    fn look(&mut self, frame: &mut Frame<'_>, name: &CStr, path: &[u8], told: bool) -> io::Result<bool> {
        if frame.open.is_none() {
            frame.open = self.open(&frame.path)?;
        }
        // Gone while it was looked at: as if it had ended here.
        let Some([old, new]) = &frame.open else { return Ok(false) };
        let (before, now) = (stat(old, name)?, stat(new, name)?);
        let directory = |stat: &Stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        let both = before.as_ref().zip(now.as_ref());
        let inner = both.is_some_and(|(before, now)| directory(before) && directory(now));
        if told {
            return Ok(inner);
        }
        let (kind, shown) = match (&before, &now) {
            (None, None) => return Ok(false),
            (None, Some(now)) => (ChangeKind::Added, now),
            (Some(before), None) => (ChangeKind::Removed, before),
            (Some(before), Some(now)) => match self.compare([old, new], name, before, now)? {
                Some(kind) => (kind, now),
                None => return Ok(inner),
            },
        };
        let node = node(shown);
        let bytes = if node == NodeKind::File { u64::try_from(shown.st_size).unwrap_or(0) } else { 0 };
        let path = TreePath::from_bytes(path)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidFilename, error.to_string()))?;
        self.changes.push(Change { path, kind, node, bytes });
        Ok(inner)
    }

    fn compare(
        &self,
        directories: [&OwnedFd; 2],
        name: &CStr,
        before: &Stat,
        now: &Stat,
    ) -> io::Result<Option<ChangeKind>> {
        let kind = FileType::from_raw_mode(now.st_mode);
        if kind != FileType::from_raw_mode(before.st_mode) {
            return Ok(Some(ChangeKind::Modified));
        }
        let unchanged = before.st_ino == now.st_ino
            && (before.st_ctime, before.st_ctime_nsec) == (now.st_ctime, now.st_ctime_nsec);
        if self.lineage == Lineage::Shared && unchanged {
            return Ok(None);
        }
        let same_time = (before.st_mtime, before.st_mtime_nsec) == (now.st_mtime, now.st_mtime_nsec);
        let mut same =
            (before.st_mode, before.st_uid, before.st_gid) == (now.st_mode, now.st_uid, now.st_gid);
        match kind {
            FileType::RegularFile => {
                if before.st_size != now.st_size {
                    return Ok(Some(ChangeKind::Modified));
                }
                same &= same_time;
                let [old, new] = directories.map(|directory| file(directory, name));
                let (Some(old), Some(new)) = (old?, new?) else {
                    // Not to be opened, or replaced meanwhile: the times decide.
                    return Ok(if same_time { metadata(same) } else { Some(ChangeKind::Modified) });
                };
                let trusted = self.lineage == Lineage::Separate && same_time;
                if !trusted && !equal(&old, &new)? {
                    return Ok(Some(ChangeKind::Modified));
                }
                same &= sorted(attributes(&old)?) == sorted(attributes(&new)?);
            }
            FileType::Directory => {
                // Its times change with what is in it, which is shown itself.
                let [old, new] =
                    directories.map(|directory| open(directory, name.to_bytes(), OFlags::DIRECTORY));
                if let (Ok(old), Ok(new)) = (old, new) {
                    same &= sorted(attributes(&old)?) == sorted(attributes(&new)?);
                }
            }
            FileType::Symlink => {
                let target = |directory| rustix::fs::readlinkat(directory, name, Vec::new());
                if target(directories[0]).ok() != target(directories[1]).ok() {
                    return Ok(Some(ChangeKind::Modified));
                }
                same &= same_time;
            }
            _ => {
                if before.st_rdev != now.st_rdev {
                    return Ok(Some(ChangeKind::Modified));
                }
                same &= same_time;
            }
        }
        Ok(metadata(same))
    }
}

fn metadata(same: bool) -> Option<ChangeKind> {
    if same { None } else { Some(ChangeKind::Metadata) }
}

fn node(stat: &Stat) -> NodeKind {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => NodeKind::File,
        FileType::Directory => NodeKind::Directory,
        FileType::Symlink => NodeKind::Symlink,
        _ => NodeKind::Special,
    }
}

fn stat(directory: &OwnedFd, name: &CStr) -> io::Result<Option<Stat>> {
    match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => Ok(None),
        other => Ok(Some(other?)),
    }
}

/// Opens a regular file; `None` if it is none by now, or not ours to read.
fn file(directory: impl AsFd, name: &CStr) -> io::Result<Option<File>> {
    let opened = match open(directory, name.to_bytes(), OFlags::NONBLOCK) {
        Err(error) if is_gone(&error) || error.kind() == io::ErrorKind::PermissionDenied => return Ok(None),
        other => File::from(other?),
    };
    let regular = FileType::from_raw_mode(rustix::fs::fstat(&opened)?.st_mode) == FileType::RegularFile;
    Ok(regular.then_some(opened))
}

fn equal(old: &File, new: &File) -> io::Result<bool> {
    let mut buffers = [vec![0; CHUNK], vec![0; CHUNK]];
    let mut at = 0;
    loop {
        let [a, b] = &mut buffers;
        let (from_old, from_new) = (fill(old, a, at)?, fill(new, b, at)?);
        if a[..from_old].cmp(&b[..from_new]) != Ordering::Equal {
            return Ok(false);
        }
        if from_old < CHUNK {
            return Ok(true);
        }
        at += CHUNK as u64;
    }
}

/// Reads until the buffer is full or the file ends.
fn fill(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], at + filled as u64)? {
            0 => break,
            read => filled += read,
        }
    }
    Ok(filled)
}

fn sorted(mut attributes: Vec<(Vec<u8>, Vec<u8>)>) -> Vec<(Vec<u8>, Vec<u8>)> {
    attributes.sort();
    attributes
}
