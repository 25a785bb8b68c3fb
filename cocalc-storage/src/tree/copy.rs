//! Copying trees, and parts of trees, among what tenants can change meanwhile.

use std::{
    ffi::CString,
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
};

use cocalc_core::{
    ids::{ProjectId, TreePath, VolumeUuid},
    storage::{Copied, CopyOptions, Error, Place},
};
use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, Stat},
    io::Errno,
};

use super::{Builder, Kind, Seen, extents, open, remove_at, single, visit};
use crate::failure::{Doing as _, Failure};

/// Whether a copy may share its bytes with the source.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Sharing {
    /// Where the file system can.
    Allowed,
    /// Every byte is written anew, so that whoever owns the copy is charged
    /// for it: a simple quota charges the first writer for ever.
    Forbidden,
}

/// Copies the tree `from` into the empty directory `to`. What is at `skip`, by
/// device and inode, is left out.
pub(crate) fn copy(
    from: impl AsFd,
    to: OwnedFd,
    sharing: Sharing,
    skip: Option<(u64, u64)>,
) -> io::Result<Copied> {
    let mut builder = Builder::new(to);
    let mut copied = Copied::default();
    visit(from, skip, |entry, source| fill(&mut builder, &mut copied, sharing, entry, source))?;
    builder.finish()?;
    Ok(copied)
}

/// Adds one entry, with its data.
fn fill(
    builder: &mut Builder,
    copied: &mut Copied,
    sharing: Sharing,
    entry: super::Entry,
    source: Option<&File>,
) -> io::Result<()> {
    copied.entries += 1;
    let link = matches!(entry.kind, Kind::Link(_));
    let added = match builder.add(entry) {
        // Its other name was gone before it was copied.
        Err(error) if link && error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    if let (Some((file, entry)), Some(source)) = (added, source) {
        let Kind::File(length) = entry.kind else { return Ok(()) };
        copied.bytes += length;
        if sharing == Sharing::Allowed && rustix::fs::ioctl_ficlone(&file, source).is_ok() {
            copied.shared_bytes += length;
        } else {
            for (offset, length) in extents(source, length)? {
                copy_extent(source, &file, offset, length)?;
            }
        }
        builder.finish_file(&file, &entry)?;
    }
    Ok(())
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

/// A copy of one path into a live volume, step by step: [`build`](Self::build)
/// makes it under a temporary name beside its place, [`put`](Self::put) gives
/// it its name, and [`clean`](Self::clean) removes what is at the temporary
/// name: the unfinished copy, or what it has replaced. In between, the caller
/// makes each durable.
#[derive(Debug)]
pub(crate) struct Plan {
    source: OwnedFd,
    from: Place,
    to: Place,
    /// Where it goes: the open directory, and the name in it.
    parent: OwnedFd,
    name: CString,
    temporary: CString,
    sharing: Sharing,
    replace: bool,
}

impl Plan {
    /// Checks what can be checked before anything is made. `source` and
    /// `target` are the roots of the two trees.
    pub(crate) fn new(
        source: OwnedFd,
        from: &Place,
        target: &OwnedFd,
        to: &Place,
        options: CopyOptions,
    ) -> Result<Self, Failure> {
        if to.snapshot.is_some() {
            return Err(refused(to, "snapshots never change"));
        }
        let Some((directory, name)) = to.path.split_last() else {
            return Err(refused(to, "the root itself is restored, not copied"));
        };
        if from.snapshot.is_none() && from.project == to.project && to.path.is_within(&from.path) {
            return Err(refused(to, "it is within what would be copied"));
        }
        let parent = open(target, directory.as_bytes(), OFlags::DIRECTORY)
            .map_err(|error| unreachable(to, error, "its directory does not exist"))?;
        let whole = rustix::fs::fstat(target).doing("look at a volume")?;
        if rustix::fs::fstat(&parent).doing("look at a directory")?.st_dev != whole.st_dev {
            return Err(refused(to, "it would be in a subvolume of its own, which no snapshot holds"));
        }
        let name = CString::new(name).map_err(|_| refused(to, "it holds a NUL"))?;
        let temporary = temporary_name();
        let sharing = if options.same_owner || from.project == to.project {
            Sharing::Allowed
        } else {
            Sharing::Forbidden
        };
        let (from, to) = (from.clone(), to.clone());
        let plan = Self { source, from, to, parent, name, temporary, sharing, replace: options.replace };
        plan.find_source()?;
        if !plan.replace && plan.occupant()?.is_some() {
            return Err(plan.taken());
        }
        Ok(plan)
    }

    /// What is at the source; its directory and name, unless it is the root.
    fn find_source(&self) -> Result<(Stat, Option<(OwnedFd, CString)>), Failure> {
        const MISSING: &str = "there is nothing";
        let from = &self.from;
        let Some((directory, name)) = from.path.split_last() else {
            return Ok((rustix::fs::fstat(&self.source).doing("look at a volume")?, None));
        };
        let directory = open(&self.source, directory.as_bytes(), OFlags::DIRECTORY)
            .map_err(|error| unreachable(from, error, MISSING))?;
        let name = CString::new(name).map_err(|_| refused(from, "it holds a NUL"))?;
        let stat = rustix::fs::statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|error| unreachable(from, error.into(), MISSING))?;
        Ok((stat, Some((directory, name))))
    }

    fn occupant(&self) -> Result<Option<Stat>, Failure> {
        match rustix::fs::statat(&self.parent, &self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(unreachable(&self.to, error.into(), "there is nothing")),
        }
    }

    fn taken(&self) -> Failure {
        Error::AlreadyExists { project: self.to.project, what: format!("{:?}", self.to.path) }.into()
    }

    /// Where the copy is made, for whoever has to remove it after a crash.
    pub(crate) fn temporary(&self) -> Result<TreePath, Failure> {
        let directory = self.to.path.split_last().map(|(directory, _)| directory).unwrap_or_default();
        directory.join(self.temporary.to_bytes()).map_err(|_| refused(&self.to, "its path is too long"))
    }

    /// Makes the copy under its temporary name.
    pub(crate) fn build(&self) -> Result<Copied, Failure> {
        let (stat, place) = self.find_source()?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            let source = open(&self.source, self.from.path.as_bytes(), OFlags::DIRECTORY)
                .map_err(|error| unreachable(&self.from, error, "there is nothing"))?;
            // Nobody else may enter it before it is finished.
            rustix::fs::mkdirat(&self.parent, &self.temporary, Mode::from_raw_mode(0o700))
                .doing("make a directory")?;
            let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let made = rustix::fs::openat(&self.parent, &self.temporary, flags, Mode::empty())
                .doing("open a directory that was just made")?;
            let itself = rustix::fs::fstat(&made).doing("look at a directory")?;
            // If the project moves it into the source meanwhile, it must not
            // be copied into itself for ever.
            return copy(source, made, self.sharing, Some((itself.st_dev, itself.st_ino)))
                .map_err(|error| self.failed(error));
        }
        let Some((directory, name)) = place else {
            return Err(Failure::Wrong("the root of a volume is no directory".to_owned()));
        };
        let parent = self.parent.try_clone().doing("duplicate a descriptor")?;
        let (mut builder, mut copied) = (Builder::new(parent), Copied::default());
        let path = self.temporary.to_bytes().to_vec();
        let seen = single(&directory, &name, path, &stat).map_err(|error| self.failed(error))?;
        let Some(Seen { entry, file }) = seen else {
            return Err(refused(&self.from, "there is nothing"));
        };
        fill(&mut builder, &mut copied, self.sharing, entry, file.as_ref())
            .map_err(|error| self.failed(error))?;
        Ok(copied)
    }

    fn failed(&self, error: io::Error) -> Failure {
        if error.kind() == io::ErrorKind::CrossesDevices || error.kind() == io::ErrorKind::InvalidFilename {
            return refused(&self.from, &error.to_string());
        }
        Failure::Io { doing: "copy files", source: error }
    }

    /// Gives the copy its name.
    pub(crate) fn put(&self) -> Result<(), Failure> {
        // Whatever is in its place may come and go as often as the project
        // likes; not for ever.
        for _ in 0..16 {
            let flags = RenameFlags::NOREPLACE;
            match rustix::fs::renameat_with(&self.parent, &self.temporary, &self.parent, &self.name, flags) {
                Err(Errno::EXIST) if self.replace => {}
                Err(Errno::EXIST) => return Err(self.taken()),
                other => return other.doing("put a copy in its place"),
            }
            let flags = RenameFlags::EXCHANGE;
            match rustix::fs::renameat_with(&self.parent, &self.temporary, &self.parent, &self.name, flags) {
                Err(Errno::NOENT) => {}
                other => return other.doing("put a copy in its place"),
            }
        }
        Err(refused(&self.to, "it changes all the time"))
    }

    /// Removes what is at the temporary name.
    pub(crate) fn clean(&self) -> Result<(), Failure> {
        remove_at(&self.parent, &self.temporary).doing("remove what is left of a copy")
    }
}

/// Removes what a copy that was cut off has left at its temporary name, if it
/// is still there.
pub(crate) fn remove_left(target: &OwnedFd, path: &TreePath) -> Result<(), Failure> {
    let Some((directory, name)) = path.split_last() else { return Ok(()) };
    let Ok(name) = CString::new(name) else { return Ok(()) };
    // If the project has moved it, or its directory, it is the project's.
    let Ok(parent) = open(target, directory.as_bytes(), OFlags::DIRECTORY) else { return Ok(()) };
    remove_at(&parent, &name).doing("remove what is left of a copy")
}

fn temporary_name() -> CString {
    // A uuid holds no NUL.
    CString::new(format!(".cocalc-copy-{}", VolumeUuid::random())).unwrap_or_default()
}

fn refused(place: &Place, reason: &str) -> Failure {
    path_error(place.project, &place.path, reason)
}

fn path_error(project: ProjectId, path: &TreePath, reason: &str) -> Failure {
    Error::Path { project, path: path.clone(), reason: reason.to_owned() }.into()
}

fn unreachable(place: &Place, error: io::Error, missing: &str) -> Failure {
    let reason = match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::NOENT) => missing,
        Some(Errno::NOTDIR) => "something on the way is no directory",
        Some(Errno::LOOP) => "there is a symbolic link on the way, and links are not followed",
        Some(Errno::XDEV) => "it leads out of the volume",
        Some(Errno::NAMETOOLONG) => "its path is too long",
        _ => return Failure::Io { doing: "look for a path", source: error },
    };
    refused(place, reason)
}
