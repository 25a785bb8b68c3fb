//! Removing trees.

use std::{ffi::CStr, io, os::fd::AsFd};

use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags},
    io::Errno,
};

use super::{join, open};

/// How often a tree that somebody still writes into is begun again.
const TRIES: u32 = 32;

/// Removes a tree of ours, read-only directories and all. Harmless if it is
/// not there.
pub(crate) fn remove(path: &std::path::Path) -> io::Result<()> {
    use std::os::unix::ffi::OsStrExt as _;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    remove_at(CWD, &path)
}

/// Removes what is at `name` in an open directory, whatever it is, following no
/// link. Harmless if it is not there.
pub(crate) fn remove_at(parent: impl AsFd, name: &CStr) -> io::Result<()> {
    let parent = parent.as_fd();
    for _ in 0..TRIES {
        match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            // Linux says the first of a directory, POSIX allows the second.
            Err(Errno::ISDIR | Errno::PERM) => {}
            Err(error) => return Err(error.into()),
        }
        empty(parent, name)?;
        match rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            // Filled again, or replaced, by who may write there.
            Err(Errno::NOTEMPTY | Errno::EXIST | Errno::NOTDIR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(io::Error::new(io::ErrorKind::ResourceBusy, "it is filled as fast as it is emptied"))
}

/// Removes all that is in a directory.
fn empty(parent: impl AsFd, name: &CStr) -> io::Result<()> {
    let parent = parent.as_fd();
    let privileged = rustix::process::geteuid().is_root();
    // Without privilege the tree is all ours, and a directory without rights
    // is in the way; with it, a planted link would be followed.
    let unlock = |directory: std::os::fd::BorrowedFd<'_>, name: &CStr| {
        if !privileged {
            let _ = rustix::fs::chmodat(directory, name, Mode::from_raw_mode(0o700), AtFlags::empty());
        }
    };
    unlock(parent, name);
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = match rustix::fs::openat(parent, name, flags, Mode::empty()) {
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(()),
        other => other?,
    };
    let mut directories: Vec<Vec<u8>> = vec![Vec::new()];
    let mut next = 0;
    while let Some(path) = directories.get(next).cloned() {
        next += 1;
        let Ok(directory) = open(&root, &path, OFlags::DIRECTORY) else { continue };
        for found in Dir::read_from(&directory)? {
            let found = found?;
            let name = found.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            if found.file_type() == FileType::Directory {
                unlock(directory.as_fd(), name);
                directories.push(join(&path, name));
                continue;
            }
            match rustix::fs::unlinkat(&directory, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(Errno::ISDIR) => directories.push(join(&path, name)),
                Err(error) => return Err(error.into()),
            }
        }
    }
    // The inner ones come later in the list. One that is not empty any more,
    // or too deep to be named, is left to the next try.
    for path in directories.iter().skip(1).rev() {
        let (outer, name) = match path.iter().rposition(|byte| *byte == b'/') {
            Some(slash) => (&path[..slash], &path[slash + 1..]),
            None => (b"".as_slice(), path.as_slice()),
        };
        if let Ok(outer) = open(&root, outer, OFlags::DIRECTORY) {
            let _ = rustix::fs::unlinkat(&outer, name, AtFlags::REMOVEDIR);
        }
    }
    Ok(())
}
