//! Applying a stream to a subvolume in staging: every command is a call to the
//! kernel on a name below it.
//!
//! The subvolume is nobody else's: it is below a directory that only root may
//! enter, and one thread applies to it. So what was looked at a moment ago is
//! what is changed. What the stream itself made can still be hostile: links are
//! never followed, and only regular files are ever opened.

use std::{
    ffi::CString,
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd as _, OwnedFd},
        unix::fs::FileExt as _,
    },
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use cocalc_core::{
    ids::{ProjectId, VolumeUuid},
    storage::Error,
};
use rustix::{
    fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags},
    io::Errno,
};

use super::{
    format::{COMMAND_HEADER, MAGIC, attribute, command, each_attribute},
    guard::Refused,
    sys::stream::{Encoding, clone_range, encoded_write},
};
use crate::failure::Failure;

/// The sectors of a Btrfs that sends are of this size, or of a multiple of it.
const SECTOR: u64 = 4096;
/// How much is cloned in one call: what is of many small extents takes its time,
/// and is not interrupted.
const CLONE_MAX: u64 = 16 << 20;

/// Applies what the [`StreamGuard`](super::StreamGuard) lets through.
pub(super) struct Applier {
    root: File,
    origin: VolumeUuid,
    /// Snapshots that it may clone from, by origin.
    sources: Vec<(VolumeUuid, File)>,
    /// The index of the stream's version, when that is known.
    version: Option<usize>,
    sent_transid: u64,
    /// The last directory that something was named in, and the last file that
    /// was written, by path: most commands are about the same ones.
    directory: Option<(Vec<u8>, OwnedFd)>,
    file: Option<(Vec<u8>, File)>,
    /// Set when nobody waits for it any more.
    gone: Arc<AtomicBool>,
}

/// Why something was not applied.
#[derive(Debug)]
pub(super) enum NotApplied {
    /// The stream is wrong.
    Stream(String),
    /// A call failed on this path.
    Call { doing: &'static str, path: String, source: io::Error },
}

impl From<Refused> for NotApplied {
    fn from(refused: Refused) -> Self {
        Self::Stream(refused.to_string())
    }
}

impl NotApplied {
    /// What the contract says of it.
    pub(super) fn failure(self, project: ProjectId) -> Failure {
        let reason = match self {
            Self::Stream(reason) => reason,
            Self::Call { doing, path, source } => match source.raw_os_error().map(Errno::from_raw_os_error) {
                // These are not the stream's doing.
                Some(
                    Errno::NOSPC
                    | Errno::DQUOT
                    | Errno::IO
                    | Errno::ROFS
                    | Errno::NOMEM
                    | Errno::MFILE
                    | Errno::NFILE
                    | Errno::UCLEAN,
                ) => return Failure::Io { doing: "apply a stream", source },
                _ => format!("could not {doing} {path:?}: {source}"),
            },
        };
        Error::BadStream { project, reason }.into()
    }
}

/// The attributes of one command; of one that is repeated, the last.
struct Attributes<'a>([Option<&'a [u8]>; attribute::COUNT]);

impl<'a> Attributes<'a> {
    fn read(body: &'a [u8], version: usize) -> Result<Self, Refused> {
        let mut found = [None; attribute::COUNT];
        each_attribute(body, version, |kind, value| {
            if let Some(place) = found.get_mut(usize::from(kind)) {
                *place = Some(value);
            }
            Ok(())
        })?;
        Ok(Self(found))
    }

    fn bytes(&self, kind: u16) -> Result<&'a [u8], NotApplied> {
        let value = self.0.get(usize::from(kind)).copied().flatten();
        value.ok_or_else(|| NotApplied::Stream(format!("a command lacks its attribute {kind}")))
    }

    /// A little-endian number of at most eight bytes.
    fn number(&self, kind: u16) -> Result<u64, NotApplied> {
        let value = self.bytes(kind)?;
        let mut bytes = [0; 8];
        match bytes.get_mut(..value.len()) {
            Some(low) => low.copy_from_slice(value),
            None => return Err(NotApplied::Stream(format!("attribute {kind} is too long"))),
        }
        Ok(u64::from_le_bytes(bytes))
    }

    fn word(&self, kind: u16) -> Result<u32, NotApplied> {
        u32::try_from(self.number(kind)?)
            .map_err(|_| NotApplied::Stream(format!("attribute {kind} is too large")))
    }

    /// Seconds of eight bytes, then nanoseconds of four.
    fn time(&self, kind: u16) -> Result<Timespec, NotApplied> {
        let wrong = || NotApplied::Stream(format!("attribute {kind} is no time"));
        let (seconds, nanos) = self.bytes(kind)?.split_first_chunk().ok_or_else(wrong)?;
        let nanos = u32::from_le_bytes(nanos.try_into().map_err(|_| wrong())?);
        if nanos > 999_999_999 {
            return Err(wrong());
        }
        Ok(Timespec { tv_sec: i64::from_le_bytes(*seconds), tv_nsec: nanos.into() })
    }
}

impl Applier {
    /// Applies to the subvolume `root`. What is cloned comes from it, where the
    /// stream names its own `origin`, or from `sources`.
    pub(super) fn new(
        root: File,
        origin: VolumeUuid,
        sources: Vec<(VolumeUuid, File)>,
        gone: Arc<AtomicBool>,
    ) -> Self {
        Self { root, origin, sources, version: None, sent_transid: 0, directory: None, file: None, gone }
    }

    /// Writes out all that was applied, and tells whether that went well.
    ///
    /// Taking a snapshot writes it out too, but does not tell of a disk that
    /// failed meanwhile: the snapshot would lack what was not written. This
    /// descriptor is older than what was written, so it hears of it.
    pub(super) fn write_out(&mut self) -> io::Result<()> {
        self.file = None;
        Ok(rustix::fs::syncfs(&self.root)?)
    }

    fn refuse_gone(&self) -> Result<(), NotApplied> {
        if self.gone.load(Ordering::Relaxed) {
            return Err(NotApplied::Stream("nobody waits for it any more".to_owned()));
        }
        Ok(())
    }

    /// Applies whole commands, the first time after the stream's header.
    pub(super) fn push(&mut self, commands: &[u8]) -> Result<(), NotApplied> {
        let cut = || NotApplied::Stream("a command is cut off".to_owned());
        let mut rest = commands;
        while !rest.is_empty() {
            let Some(version) = self.version else {
                let after = rest.strip_prefix(MAGIC).and_then(|rest| rest.split_first_chunk());
                let (version, after) = after.ok_or_else(cut)?;
                self.version = Some(usize::from(u32::from_le_bytes(*version) >= 2));
                rest = after;
                continue;
            };
            let ([l0, l1, l2, l3, c0, c1, ..], after) =
                rest.split_first_chunk::<COMMAND_HEADER>().ok_or_else(cut)?;
            let length = u32::from_le_bytes([*l0, *l1, *l2, *l3]) as usize;
            let (body, after) = after.split_at_checked(length).ok_or_else(cut)?;
            self.refuse_gone()?;
            self.command(u16::from_le_bytes([*c0, *c1]), &Attributes::read(body, version)?)?;
            rest = after;
        }
        Ok(())
    }

    /// The sender's transaction, which the first command tells.
    pub(super) fn sent_transid(&self) -> u64 {
        self.sent_transid
    }

    fn command(&mut self, command: u16, attributes: &Attributes<'_>) -> Result<(), NotApplied> {
        match command {
            command::SUBVOL | command::SNAPSHOT => {
                self.sent_transid = attributes.number(attribute::CTRANSID)?;
                return Ok(());
            }
            command::END => return Ok(()),
            _ => {}
        }
        let path = attributes.bytes(attribute::PATH)?;
        let failed = |doing| move |source| NotApplied::Call { doing, path: lossy(path), source };
        match command {
            command::MKFILE => self.make_file(path).map_err(failed("make the file")),
            command::MKDIR => self
                .named(path, |parent, name| rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o700)))
                .map_err(failed("make the directory")),
            command::MKNOD | command::MKFIFO | command::MKSOCK => {
                let (kind, device) = match command {
                    command::MKFIFO => (FileType::Fifo, 0),
                    command::MKSOCK => (FileType::Socket, 0),
                    _ => (
                        FileType::from_raw_mode(attributes.word(attribute::MODE)?),
                        attributes.number(attribute::RDEV)?,
                    ),
                };
                if !matches!(
                    kind,
                    FileType::Fifo
                        | FileType::Socket
                        | FileType::CharacterDevice
                        | FileType::BlockDevice
                        | FileType::RegularFile
                ) {
                    return Err(NotApplied::Stream("it makes a node of no known kind".to_owned()));
                }
                let mode = Mode::from_raw_mode(0o600);
                self.named(path, |parent, name| rustix::fs::mknodat(parent, name, kind, mode, device))
                    .map_err(failed("make the node"))
            }
            command::SYMLINK => {
                let target = attributes.bytes(attribute::PATH_LINK)?;
                self.named(path, |parent, name| rustix::fs::symlinkat(target, parent, name))
                    .map_err(failed("make the symbolic link"))
            }
            command::RENAME => {
                self.rename(path, attributes.bytes(attribute::PATH_TO)?).map_err(failed("rename"))
            }
            command::LINK => {
                let existing = attributes.bytes(attribute::PATH_LINK)?;
                self.link(existing, path).map_err(failed("make the hard link"))
            }
            command::UNLINK => {
                self.file = None;
                self.named(path, |parent, name| rustix::fs::unlinkat(parent, name, AtFlags::empty()))
                    .map_err(failed("remove"))
            }
            command::RMDIR => {
                self.directory = None;
                self.named(path, |parent, name| rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR))
                    .map_err(failed("remove the directory"))
            }
            command::SET_XATTR => {
                let (name, value) =
                    (attributes.bytes(attribute::XATTR_NAME)?, attributes.bytes(attribute::XATTR_DATA)?);
                self.set_attribute(path, name, Some(value)).map_err(failed("set an extended attribute of"))
            }
            command::REMOVE_XATTR => {
                let name = attributes.bytes(attribute::XATTR_NAME)?;
                self.set_attribute(path, name, None).map_err(failed("remove an extended attribute of"))
            }
            command::WRITE => {
                let (offset, data) =
                    (attributes.number(attribute::FILE_OFFSET)?, attributes.bytes(attribute::DATA)?);
                let write = self.writable(path).and_then(|file| file.write_all_at(data, offset));
                write.map_err(failed("write"))
            }
            command::ENCODED_WRITE => {
                let encoding = Encoding {
                    len: attributes.number(attribute::UNENCODED_FILE_LEN)?,
                    unencoded_len: attributes.number(attribute::UNENCODED_LEN)?,
                    unencoded_offset: attributes.number(attribute::UNENCODED_OFFSET)?,
                    compression: attributes.word(attribute::COMPRESSION)?,
                };
                let (offset, data) =
                    (attributes.number(attribute::FILE_OFFSET)?, attributes.bytes(attribute::DATA)?);
                let write = self.writable(path).and_then(|file| {
                    // The kernel takes an end within a sector only at the end of
                    // the file, and cuts a file that became shorter afterwards.
                    // Such an end is the new one, so it may be cut before.
                    let end = offset.saturating_add(encoding.len);
                    if end % SECTOR != 0 && file.metadata()?.len() > end {
                        file.set_len(offset)?;
                    }
                    encoded_write(file, offset, encoding, data)
                });
                write.map_err(failed("write compressed data of"))
            }
            command::CLONE => self.clone_from(path, attributes),
            command::TRUNCATE => {
                let size = attributes.number(attribute::SIZE)?;
                self.writable(path).and_then(|file| file.set_len(size)).map_err(failed("cut"))
            }
            command::CHMOD => {
                let mode = Mode::from_raw_mode(attributes.word(attribute::MODE)? & 0o7777);
                self.set_mode(path, mode).map_err(failed("set the mode of"))
            }
            command::CHOWN => {
                let (user, group) = (attributes.word(attribute::UID)?, attributes.word(attribute::GID)?);
                if user == u32::MAX || group == u32::MAX {
                    return Err(NotApplied::Stream("it has an owner that nobody can be".to_owned()));
                }
                let owner = (Some(Uid::from_raw(user)), Some(Gid::from_raw(group)));
                self.set_owner(path, owner).map_err(failed("set the owner of"))
            }
            command::UTIMES => {
                let times = Timestamps {
                    last_access: attributes.time(attribute::ATIME)?,
                    last_modification: attributes.time(attribute::MTIME)?,
                };
                if path.is_empty() {
                    return rustix::fs::futimens(&self.root, &times)
                        .map_err(|error| failed("set the times of")(error.into()));
                }
                self.named(path, |parent, name| {
                    rustix::fs::utimensat(parent, name, &times, AtFlags::SYMLINK_NOFOLLOW)
                })
                .map_err(failed("set the times of"))
            }
            other => Err(NotApplied::Stream(format!("it has command {other}, which no kernel sends"))),
        }
    }

    /// Calls `call` with the open directory of `path` and the name in it.
    fn named(
        &mut self,
        path: &[u8],
        call: impl FnOnce(&OwnedFd, &[u8]) -> rustix::io::Result<()>,
    ) -> io::Result<()> {
        let (directory, name) = split(path)?;
        Ok(call(self.parent(directory)?, name)?)
    }

    fn parent(&mut self, directory: &[u8]) -> io::Result<&OwnedFd> {
        let known = self.directory.take_if(|(path, _)| path == directory);
        let found = match known {
            Some((_, found)) => found,
            None => beneath(&self.root, directory, OFlags::PATH | OFlags::DIRECTORY)?,
        };
        Ok(&self.directory.insert((directory.to_vec(), found)).1)
    }

    fn make_file(&mut self, path: &[u8]) -> io::Result<()> {
        let (directory, name) = split(path)?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = rustix::fs::openat(self.parent(directory)?, name, flags, Mode::from_raw_mode(0o600))?;
        // What is made is usually written next.
        self.file = Some((path.to_vec(), File::from(made)));
        Ok(())
    }

    /// The file at `path`, open for writing.
    fn writable(&mut self, path: &[u8]) -> io::Result<&File> {
        let known = self.file.take_if(|(known, _)| known == path);
        let file = match known {
            Some((_, file)) => file,
            None => regular(&self.root, path, OFlags::WRONLY)?,
        };
        Ok(&self.file.insert((path.to_vec(), file)).1)
    }

    fn rename(&mut self, from: &[u8], to: &[u8]) -> io::Result<()> {
        let ((from_directory, from_name), (to_directory, to_name)) = (split(from)?, split(to)?);
        let source = beneath(&self.root, from_directory, OFlags::PATH | OFlags::DIRECTORY)?;
        rustix::fs::renameat(&source, from_name, self.parent(to_directory)?, to_name)?;
        // Whatever was below it has another path now.
        self.directory = None;
        match &mut self.file {
            Some((path, _)) if path == from => *path = to.to_vec(),
            // What was written last may be below it, or be what it replaced.
            _ => self.file = None,
        }
        Ok(())
    }

    fn link(&mut self, existing: &[u8], path: &[u8]) -> io::Result<()> {
        let (directory, name) = split(existing)?;
        let source = beneath(&self.root, directory, OFlags::PATH | OFlags::DIRECTORY)?;
        self.named(path, |parent, new| rustix::fs::linkat(&source, name, parent, new, AtFlags::empty()))
    }

    fn set_owner(&mut self, path: &[u8], (user, group): (Option<Uid>, Option<Gid>)) -> io::Result<()> {
        if path.is_empty() {
            return Ok(rustix::fs::fchown(&self.root, user, group)?);
        }
        self.named(path, |parent, name| {
            let found = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
            rustix::fs::chownat(parent, name, user, group, AtFlags::SYMLINK_NOFOLLOW)?;
            // That clears setuid and setgid, which the kernel sends again only if
            // the mode has changed, too.
            let kept = FileType::from_raw_mode(found.st_mode) != FileType::Symlink;
            if kept && found.st_mode & 0o6000 != 0 {
                let mode = Mode::from_raw_mode(found.st_mode & 0o7777);
                rustix::fs::chmodat(parent, name, mode, AtFlags::empty())?;
            }
            Ok(())
        })
    }

    fn set_mode(&mut self, path: &[u8], mode: Mode) -> io::Result<()> {
        if path.is_empty() {
            return Ok(rustix::fs::fchmod(&self.root, mode)?);
        }
        self.named(path, |parent, name| {
            // The call follows a link, whose mode nobody sends.
            let found = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
            if FileType::from_raw_mode(found.st_mode) == FileType::Symlink {
                return Err(Errno::LOOP);
            }
            rustix::fs::chmodat(parent, name, mode, AtFlags::empty())
        })
    }

    /// Sets or removes an extended attribute of anything, a link itself too.
    fn set_attribute(&mut self, path: &[u8], attribute: &[u8], value: Option<&[u8]>) -> io::Result<()> {
        let set = |at: &[u8]| match value {
            Some(value) => rustix::fs::lsetxattr(at, attribute, value, XattrFlags::empty()),
            None => rustix::fs::lremovexattr(at, attribute),
        };
        if path.is_empty() {
            return Ok(match value {
                Some(value) => rustix::fs::fsetxattr(&self.root, attribute, value, XattrFlags::empty()),
                None => rustix::fs::fremovexattr(&self.root, attribute),
            }?);
        }
        self.named(path, |parent, name| {
            // There is no call that takes a directory; its descriptor has a name.
            let directory = format!("/proc/self/fd/{}/", parent.as_raw_fd());
            set(&[directory.as_bytes(), name].concat())
        })
    }

    fn clone_from(&mut self, path: &[u8], attributes: &Attributes<'_>) -> Result<(), NotApplied> {
        let origin = attributes.bytes(attribute::CLONE_UUID)?;
        let source = if origin == self.origin.as_bytes() {
            &self.root
        } else {
            let found = self.sources.iter().find(|(known, _)| origin == known.as_bytes());
            let unknown = || NotApplied::Stream("it clones from what is not here".to_owned());
            &found.ok_or_else(unknown)?.1
        };
        let from_path = attributes.bytes(attribute::CLONE_PATH)?;
        let failed = |doing, path| move |source| NotApplied::Call { doing, path: lossy(path), source };
        let from = regular(source, from_path, OFlags::RDONLY).map_err(failed("open", from_path))?;
        let (from_offset, length, offset) = (
            attributes.number(attribute::CLONE_OFFSET)?,
            attributes.number(attribute::CLONE_LEN)?,
            attributes.number(attribute::FILE_OFFSET)?,
        );
        let too_long = || NotApplied::Stream("it clones beyond what a file can be".to_owned());
        let end = |start: u64| start.checked_add(length).ok_or_else(too_long);
        end(from_offset)?;
        end(offset)?;
        let mut done = 0;
        // Nothing is no call: the kernel would take it as "to the end".
        while done < length {
            self.refuse_gone()?;
            let part = (length - done).min(CLONE_MAX);
            let cloned = self
                .writable(path)
                .and_then(|to| clone_range(&from, from_offset + done, part, to, offset + done));
            cloned.map_err(failed("clone into", path))?;
            done += part;
        }
        Ok(())
    }
}

/// The directory of a path, and the name in it.
fn split(path: &[u8]) -> io::Result<(&[u8], &[u8])> {
    let (directory, name) = match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (b"".as_slice(), path),
    };
    if name.is_empty() || name == b"." || name == b".." {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no name"));
    }
    Ok((directory, name))
}

/// Opens what is at `path` below `root`, without following any link.
fn beneath(root: &File, path: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
    let path = CString::new(if path.is_empty() { b".".as_slice() } else { path })?;
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat2(root.as_fd(), path.as_c_str(), flags, Mode::empty(), resolve)?)
}

/// Opens a regular file, and nothing else: opening a device or a pipe does
/// things, or waits.
fn regular(root: &File, path: &[u8], flags: OFlags) -> io::Result<File> {
    let (directory, name) = split(path)?;
    let parent = beneath(root, directory, OFlags::PATH | OFlags::DIRECTORY)?;
    let found = rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
    if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
    }
    let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::openat(&parent, name, flags, Mode::empty())?))
}

fn lossy(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}
