//! As tar, which has a place for everything that a folder has.

use std::{ffi::OsStr, io, os::unix::ffi::OsStrExt, path::Path};

use rustix::fs::Stat;

use super::{Archive, body::Pieces, permissions};

/// An archive in the format of GNU tar.
pub(super) struct Tar(tar::Builder<Pieces>);

impl Tar {
    pub(super) fn new(pieces: Pieces) -> Self {
        Self(tar::Builder::new(pieces))
    }
}

impl Archive for Tar {
    fn directory(&mut self, path: &Path, stat: &Stat) -> io::Result<()> {
        let mut head = header(stat, tar::EntryType::Directory, 0);
        self.0.append_data(&mut head, path, io::empty())
    }

    fn link(&mut self, path: &Path, stat: &Stat, target: &[u8]) -> io::Result<()> {
        let mut head = header(stat, tar::EntryType::Symlink, 0);
        self.0.append_link(&mut head, path, OsStr::from_bytes(target))
    }

    fn file(&mut self, path: &Path, stat: &Stat, content: &mut dyn io::Read) -> io::Result<()> {
        let length = u64::try_from(stat.st_size).unwrap_or(0);
        let mut head = header(stat, tar::EntryType::Regular, length);
        self.0.append_data(&mut head, path, content)
    }

    fn end(self) -> io::Result<Pieces> {
        self.0.into_inner()
    }
}

fn header(stat: &Stat, kind: tar::EntryType, bytes: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(bytes);
    header.set_mode(permissions(stat));
    header.set_mtime(u64::try_from(stat.st_mtime).unwrap_or(0));
    header
}
