//! What the root directory of a backup has itself. rustic stores only what is
//! below it, so it travels in the description of the snapshot, as JSON.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::{
        ffi::{OsStrExt as _, OsStringExt as _},
        fs::{MetadataExt as _, PermissionsExt as _, lchown},
    },
    path::Path,
};

use cocalc_backup::protocol::FailureKind;
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, XattrFlags};
use serde::{Deserialize, Serialize};

use crate::failure::Failed;

/// The most that Linux gives for the names, or for one value.
const ATTRIBUTE_BYTES_MAX: usize = 64 << 10;

/// Owner, mode, time of modification and extended attributes of a directory.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct Root {
    mode: u32,
    uid: u32,
    gid: u32,
    modified: (i64, i64),
    attributes: Vec<(Vec<u8>, Vec<u8>)>,
    /// What the backup leaves out, by pattern.
    #[serde(default)]
    pub(crate) excludes: Vec<String>,
}

impl Root {
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        let metadata = fs::symlink_metadata(path)?;
        let attributes = attributes(path)?;
        Ok(Self {
            mode: metadata.mode() & 0o7777,
            uid: metadata.uid(),
            gid: metadata.gid(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            attributes,
            excludes: Vec::new(),
        })
    }

    /// Reads it from the description of a snapshot.
    pub(crate) fn from_description(text: Option<&str>) -> Result<Self, Failed> {
        text.and_then(|text| serde_json::from_str(text).ok())
            .ok_or_else(|| Failed::new(FailureKind::Damaged, "the attributes of the root are missing"))
    }

    /// Gives it to an empty or restored directory.
    pub(crate) fn set(&self, path: &Path) -> io::Result<()> {
        for (name, value) in &self.attributes {
            let name = std::ffi::OsStr::from_bytes(name);
            rustix::fs::lsetxattr(path, name, value, XattrFlags::empty())?;
        }
        lchown(path, Some(self.uid), Some(self.gid))?;
        fs::set_permissions(path, fs::Permissions::from_mode(self.mode))?;
        let to = Timespec { tv_sec: self.modified.0, tv_nsec: self.modified.1 };
        let times = Timestamps { last_access: to, last_modification: to };
        Ok(rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
    }
}

/// The extended attributes of what is at a path itself, whatever it is.
pub(crate) fn attributes(path: &Path) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut names = vec![0; ATTRIBUTE_BYTES_MAX];
    let length = match rustix::fs::llistxattr(path, &mut names[..]) {
        // The file system has none.
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        length => length?,
    };
    let mut attributes = Vec::new();
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; ATTRIBUTE_BYTES_MAX];
        let length = rustix::fs::lgetxattr(path, OsString::from_vec(name.to_vec()), &mut value[..])?;
        value.truncate(length);
        attributes.push((name.to_vec(), value));
    }
    Ok(attributes)
}
