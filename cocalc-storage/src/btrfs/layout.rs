//! Where everything is on the volume, and how it is found.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use cocalc_core::{
    ids::{ImageDigest, ProjectId, SnapshotName, Timestamp, VolumeUuid},
    storage::{Error, Snapshot, Volume},
};
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use super::{commit::Commits, sys};
use crate::failure::{Doing as _, Failure};

/// The file that says whose volume this is.
pub(super) const MARKER: &str = ".cocalc-volume";
/// The layout that this code writes and reads.
pub(super) const VERSION: u32 = 1;
/// The directories of the layout.
pub(super) const DIRECTORIES: [&str; 5] = ["projects", "snapshots", "images", "staging", "trash"];

/// The content of [`MARKER`].
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Marker {
    /// The version of the layout.
    pub(super) layout: u32,
    /// Identifies the volume.
    pub(super) id: VolumeUuid,
}

/// The open volume.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) root: PathBuf,
    pub(super) root_fd: File,
    pub(super) commits: Commits,
    /// What is promised to data that is not on the disk yet, as the kernel shows it.
    pub(super) promised: PathBuf,
}

/// A subvolume: an open descriptor of its root, and what the kernel knows.
#[derive(Debug)]
pub(super) struct Subvolume {
    pub(super) fd: File,
    pub(super) info: sys::SubvolInfo,
}

impl Subvolume {
    pub(super) fn uuid(&self) -> VolumeUuid {
        VolumeUuid::from_bytes(self.info.uuid)
    }
}

impl Layout {
    pub(super) fn free_bytes(&self) -> io::Result<u64> {
        let stat = rustix::fs::fstatvfs(&self.root_fd)?;
        // Where the kernel does not show it, what is free falls when it is written out.
        let promised = fs::read_to_string(&self.promised).ok().and_then(|text| text.trim().parse().ok());
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize).saturating_sub(promised.unwrap_or(0)))
    }

    pub(super) fn projects(&self) -> PathBuf {
        self.root.join("projects")
    }

    pub(super) fn project(&self, project: ProjectId) -> PathBuf {
        self.projects().join(project.to_string())
    }

    /// A subvolume itself, outside the project's quota group: its tree id,
    /// which the kernel never gives twice, is the group's number, and
    /// snapshots can be made and deleted in it when the quota is full.
    pub(super) fn snapshots(&self, project: ProjectId) -> PathBuf {
        self.root.join("snapshots").join(project.to_string())
    }

    pub(super) fn snapshot(&self, project: ProjectId, name: &SnapshotName) -> PathBuf {
        self.snapshots(project).join(name.as_str())
    }

    pub(super) fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    pub(super) fn image(&self, digest: &ImageDigest) -> PathBuf {
        self.images().join(digest.to_string())
    }

    pub(super) fn staging(&self) -> PathBuf {
        self.root.join("staging")
    }

    pub(super) fn trash(&self) -> PathBuf {
        self.root.join("trash")
    }

    /// The live volume.
    pub(super) fn live(&self, project: ProjectId) -> Result<Option<Subvolume>, Failure> {
        subvolume(&self.project(project))
    }

    /// The live volume, as the contract shows it.
    pub(super) fn volume(&self, project: ProjectId) -> Result<Option<Volume>, Failure> {
        let live = self.live(project)?;
        Ok(live.map(|live| Volume { project, uuid: live.uuid(), path: Some(self.project(project)) }))
    }

    /// A finished snapshot. One that is still writable is being received.
    pub(super) fn find(&self, project: ProjectId, name: &SnapshotName) -> Result<Option<Subvolume>, Failure> {
        let found = subvolume(&self.snapshot(project, name))?;
        Ok(found.filter(|subvolume| subvolume.info.read_only))
    }

    /// A finished snapshot that must be there.
    pub(super) fn need(&self, project: ProjectId, name: &SnapshotName) -> Result<Subvolume, Failure> {
        let found = self.find(project, name)?;
        found.ok_or_else(|| Error::NoSnapshot { project, name: name.clone() }.into())
    }

    /// The finished snapshots, oldest first.
    pub(super) fn list_snapshots(&self, project: ProjectId) -> Result<Vec<Snapshot>, Failure> {
        let mut found = Vec::new();
        for entry in entries(&self.snapshots(project))? {
            // What does not parse is ours and hidden, or nobody's.
            let Ok(name) = entry.parse::<SnapshotName>() else { continue };
            if let Some(subvolume) = self.find(project, &name)? {
                let info = &subvolume.info;
                // Clocks go back; transactions don't.
                found.push((info.created_transid, info.tree, snapshot(project, &name, info)));
            }
        }
        found.sort_by_key(|(transaction, tree, _)| (*transaction, *tree));
        Ok(found.into_iter().map(|(_, _, snapshot)| snapshot).collect())
    }

    /// Makes what was done survive a loss of power.
    pub(super) fn commit(&self) -> Result<(), Failure> {
        self.commits.commit(&self.root_fd)
    }
}

/// A snapshot, as the contract shows it.
pub(super) fn snapshot(project: ProjectId, name: &SnapshotName, info: &sys::SubvolInfo) -> Snapshot {
    let (secs, nanos) = taken(info);
    let millis = i64::try_from(secs).unwrap_or(0).saturating_mul(1000);
    // What a sender says of it may be anything.
    let millis = millis.saturating_add(i64::from(nanos / 1_000_000));
    Snapshot {
        project,
        name: name.clone(),
        uuid: VolumeUuid::from_bytes(info.uuid),
        origin: origin(info),
        created: Timestamp::from_millis(millis),
    }
}

/// When a snapshot was taken, on whichever host that was.
pub(super) fn taken(info: &sys::SubvolInfo) -> (u64, u32) {
    if info.received_uuid != [0; 16] && info.sent_time != (0, 0) { info.sent_time } else { info.created }
}

/// The uuid that a snapshot has on every host.
pub(super) fn origin(info: &sys::SubvolInfo) -> VolumeUuid {
    let received = info.received_uuid;
    VolumeUuid::from_bytes(if received == [0; 16] { info.uuid } else { received })
}

/// Opens a directory without following a link in its place.
pub(super) fn open_directory(path: &Path) -> io::Result<File> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
    Ok(rustix::fs::open(path, flags, Mode::empty())?.into())
}

/// Opens the subvolume at `path`; `None` if nothing is there. Works during
/// changes by others: it may be deleted, or another put in its place, at any
/// moment.
pub(super) fn subvolume(path: &Path) -> Result<Option<Subvolume>, Failure> {
    // What is going, kept open so that the number of its device is not given
    // to another.
    let mut going: Option<(File, u64)> = None;
    loop {
        let fd = match open_directory(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.doing("open a subvolume")?,
        };
        if !sys::is_subvolume(&fd).doing("look at a subvolume")? {
            return Err(Failure::Wrong(format!("{} is not a subvolume", path.display())));
        }
        let info = match sys::subvolume_info(&fd) {
            // It was deleted after it was opened, or is being deleted: its
            // name goes last.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let device = rustix::fs::fstat(&fd).doing("look at a subvolume")?.st_dev;
                if going.replace((fd, device)).is_some_and(|(_, before)| before == device) {
                    return Ok(None);
                }
                // Another may have its place by now.
                continue;
            }
            other => other.doing("look at a subvolume")?,
        };
        return Ok(Some(Subvolume { fd, info }));
    }
}

/// Opens the subvolume at `path`, which must be there.
pub(super) fn need_subvolume(path: &Path) -> Result<Subvolume, Failure> {
    subvolume(path)?.ok_or_else(|| Failure::Wrong(format!("{} has vanished", path.display())))
}

/// The names in a directory, without those that are not UTF-8, which are not
/// ours; empty if there is none.
pub(super) fn entries(path: &Path) -> Result<Vec<String>, Failure> {
    let directory = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.doing("list a directory")?,
    };
    let mut names = Vec::new();
    for entry in directory {
        if let Ok(name) = entry.doing("list a directory")?.file_name().into_string() {
            names.push(name);
        }
    }
    Ok(names)
}

/// Makes a directory that only we may enter; one that exists is kept.
pub(super) fn private_directory(path: &Path) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            fs::set_permissions(path, fs::Permissions::from_mode(0o700))
        }
        other => other,
    }
}

/// Writes a small file so that it is there whole or not at all.
pub(super) fn write_atomically(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let written = File::create(&temporary).and_then(|mut file| {
        io::Write::write_all(&mut file, content)?;
        // The name must not be durable before the content is.
        file.sync_all()?;
        fs::rename(&temporary, path)
    });
    if written.is_err() {
        // The volume is full, for instance. If this fails too, the next opening
        // removes it.
        let _ = fs::remove_file(&temporary);
    }
    written
}
