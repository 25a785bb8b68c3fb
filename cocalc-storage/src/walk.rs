//! Counting what a volume holds, where no quota group knows it.

use std::{ffi::CString, os::fd::AsFd, path::Path};

use rustix::{
    fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
};

use crate::failure::{Doing as _, Failure};

/// Bytes that the files below `root` occupy; a file with several names counts
/// for each. The project may be changing the tree meanwhile, and may have
/// planted links: nothing outside is ever opened.
pub(crate) fn occupied(root: &Path) -> Result<u64, Failure> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = rustix::fs::open(root, flags, Mode::empty()).doing("open the volume")?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let mut total: u64 = 0;
    let mut todo: Vec<CString> = vec![c".".to_owned()];
    while let Some(path) = todo.pop() {
        let directory = match rustix::fs::openat2(root.as_fd(), &path, flags, Mode::empty(), resolve) {
            // It was removed or replaced, or is too deep to be named.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NAMETOOLONG) => continue,
            other => other.doing("walk the volume")?,
        };
        for entry in Dir::read_from(&directory).doing("walk the volume")? {
            let entry = entry.doing("walk the volume")?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let Ok(stat) = rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            total = total.saturating_add(u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512));
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                let inner = [path.to_bytes(), b"/", name.to_bytes()].concat();
                // Neither part can hold a NUL.
                todo.extend(CString::new(inner));
            }
        }
    }
    Ok(total)
}
