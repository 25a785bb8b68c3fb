//! How a send stream is written: commands with attributes, as in the kernel's
//! `fs/btrfs/send.h`.

use super::guard::{Refused, refuse};

/// What every stream begins with, before its version.
pub(super) const MAGIC: &[u8; 13] = b"btrfs-stream\0";
/// Length, command, checksum.
pub(super) const COMMAND_HEADER: usize = 4 + 2 + 4;
/// A command of version 1 is built in a buffer of 64 KiB; one of version 2 has
/// 128 KiB of data and 16 KiB for the rest.
pub(super) const COMMAND_MAX: [usize; 2] = [64 << 10, 144 << 10];
/// As the kernel limits it.
pub(super) const PATH_MAX: usize = 4096;

/// Commands.
pub(super) mod command {
    pub(in super::super) const SUBVOL: u16 = 1;
    pub(in super::super) const SNAPSHOT: u16 = 2;
    pub(in super::super) const MKFILE: u16 = 3;
    pub(in super::super) const MKDIR: u16 = 4;
    pub(in super::super) const MKNOD: u16 = 5;
    pub(in super::super) const MKFIFO: u16 = 6;
    pub(in super::super) const MKSOCK: u16 = 7;
    pub(in super::super) const SYMLINK: u16 = 8;
    pub(in super::super) const RENAME: u16 = 9;
    pub(in super::super) const LINK: u16 = 10;
    pub(in super::super) const UNLINK: u16 = 11;
    pub(in super::super) const RMDIR: u16 = 12;
    pub(in super::super) const SET_XATTR: u16 = 13;
    pub(in super::super) const REMOVE_XATTR: u16 = 14;
    pub(in super::super) const WRITE: u16 = 15;
    pub(in super::super) const CLONE: u16 = 16;
    pub(in super::super) const TRUNCATE: u16 = 17;
    pub(in super::super) const CHMOD: u16 = 18;
    pub(in super::super) const CHOWN: u16 = 19;
    pub(in super::super) const UTIMES: u16 = 20;
    pub(in super::super) const END: u16 = 21;
    /// Names an extent without its data: nothing would be written.
    pub(in super::super) const UPDATE_EXTENT: u16 = 22;
    pub(in super::super) const ENCODED_WRITE: u16 = 25;
    /// The last of each version.
    pub(in super::super) const LAST: [u16; 2] = [22, 25];
}

/// Attributes.
pub(super) mod attribute {
    pub(in super::super) const UUID: u16 = 1;
    pub(in super::super) const CTRANSID: u16 = 2;
    pub(in super::super) const SIZE: u16 = 4;
    pub(in super::super) const MODE: u16 = 5;
    pub(in super::super) const UID: u16 = 6;
    pub(in super::super) const GID: u16 = 7;
    pub(in super::super) const RDEV: u16 = 8;
    pub(in super::super) const MTIME: u16 = 10;
    pub(in super::super) const ATIME: u16 = 11;
    pub(in super::super) const XATTR_NAME: u16 = 13;
    pub(in super::super) const XATTR_DATA: u16 = 14;
    pub(in super::super) const PATH: u16 = 15;
    pub(in super::super) const PATH_TO: u16 = 16;
    pub(in super::super) const PATH_LINK: u16 = 17;
    pub(in super::super) const FILE_OFFSET: u16 = 18;
    pub(in super::super) const DATA: u16 = 19;
    pub(in super::super) const CLONE_UUID: u16 = 20;
    pub(in super::super) const CLONE_PATH: u16 = 22;
    pub(in super::super) const CLONE_OFFSET: u16 = 23;
    pub(in super::super) const CLONE_LEN: u16 = 24;
    pub(in super::super) const UNENCODED_FILE_LEN: u16 = 27;
    pub(in super::super) const UNENCODED_LEN: u16 = 28;
    pub(in super::super) const UNENCODED_OFFSET: u16 = 29;
    pub(in super::super) const COMPRESSION: u16 = 30;
    pub(in super::super) const ENCRYPTION: u16 = 31;
    /// The last of each version.
    pub(in super::super) const LAST: [u16; 2] = [24, 31];
    /// One more than the last of all.
    pub(in super::super) const COUNT: usize = 32;
}

/// Calls `check` for each attribute of a command.
pub(super) fn each_attribute<'a>(
    mut body: &'a [u8],
    version: usize,
    mut check: impl FnMut(u16, &'a [u8]) -> Result<(), Refused>,
) -> Result<(), Refused> {
    while !body.is_empty() {
        let Some((kind, rest)) = body.split_first_chunk() else { return refuse("an attribute is cut off") };
        let kind = u16::from_le_bytes(*kind);
        if kind == 0 || kind > attribute::LAST[version] {
            return refuse(format!("it has an unknown attribute {kind}"));
        }
        // From version 2 on, data has no length and goes to the end.
        if kind == attribute::DATA && version > 0 {
            return check(kind, rest);
        }
        let Some((length, rest)) = rest.split_first_chunk() else { return refuse("an attribute is cut off") };
        let Some((value, rest)) = rest.split_at_checked(u16::from_le_bytes(*length).into()) else {
            return refuse("an attribute is cut off");
        };
        check(kind, value)?;
        body = rest;
    }
    Ok(())
}
