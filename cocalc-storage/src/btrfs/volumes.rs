//! Live volumes and snapshots. Everything here blocks, and runs when it is the
//! project's turn.

use std::{fs, io, os::unix::fs::DirBuilderExt as _, path::Path};

use cocalc_core::{
    ids::{ProjectId, SnapshotName, VolumeUuid},
    storage::{Error, Snapshot, Volume, VolumeOptions},
};
use rustix::fs::{CWD, RenameFlags};
use serde::{Deserialize, Serialize};

use super::{
    Store,
    layout::{self, need_subvolume, open_directory, subvolume},
    recover::Intent,
    sys::{self, Qgroup},
};
use crate::{
    fail,
    failure::{Doing as _, Failure},
};

/// The user that owns a project's files, and its group, as they are stored.
const USER: u32 = 1000;
/// How many nested subvolumes an error names.
const NAMED_MAX: usize = 3;
/// Beside the snapshots: which restore made the live volume.
const RESTORED: &str = ".restored";

/// Lets a repeated restore be known.
#[derive(Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
struct Restored {
    /// The live volume that the restore made.
    live: VolumeUuid,
    snapshot: VolumeUuid,
    former: SnapshotName,
}

impl Store {
    pub(super) fn list(&self) -> Result<Vec<Volume>, Failure> {
        let mut found = Vec::new();
        for name in layout::entries(&self.layout.projects())? {
            if let Ok(project) = name.parse() {
                found.extend(self.layout.volume(project)?);
            }
        }
        found.sort_by_key(|volume| volume.project);
        Ok(found)
    }

    pub(super) fn create(&self, project: ProjectId, options: &VolumeOptions) -> Result<Volume, Failure> {
        self.refuse_live(project)?;
        let group = self.ensure_project(project)?;
        let staged = self.stage();
        let parent = open_directory(&self.layout.staging()).doing("open staging")?;
        sys::create_subvolume(&parent, &staged.name, group).doing("make a subvolume")?;
        furnish(&staged.path()).doing("furnish a volume")?;
        self.apply(group, options)?;
        fail::point("create.staged");
        self.come_alive(project, &staged.path())
    }

    /// Refuses when there is a live volume.
    pub(super) fn refuse_live(&self, project: ProjectId) -> Result<(), Failure> {
        match self.layout.live(project)? {
            Some(_) => Err(Error::AlreadyExists { project, what: "a volume".to_owned() }.into()),
            None => Ok(()),
        }
    }

    /// Applies the options of a new volume.
    pub(super) fn apply(&self, group: Option<Qgroup>, options: &VolumeOptions) -> Result<(), Failure> {
        match (group, options.limit_bytes) {
            (Some(group), limit) => {
                sys::limit_group(&self.layout.root_fd, group, limit).doing("limit the quota group")
            }
            (None, Some(_)) => {
                tracing::warn!("a limit is ignored: there are no quotas");
                Ok(())
            }
            (None, None) => Ok(()),
        }
    }

    /// Puts a staged subvolume in the place of the live volume, where nothing
    /// is.
    pub(super) fn come_alive(&self, project: ProjectId, staged: &Path) -> Result<Volume, Failure> {
        rename(staged, &self.layout.project(project), RenameFlags::NOREPLACE)?;
        fail::point("create.in-place");
        self.layout.commit()?;
        self.live_volume(project)
    }

    pub(super) fn live_volume(&self, project: ProjectId) -> Result<Volume, Failure> {
        self.layout.volume(project)?.ok_or_else(|| Failure::Wrong("the live volume has vanished".to_owned()))
    }

    pub(super) fn delete(&self, project: ProjectId) -> Result<(), Failure> {
        self.holds.refuse_any(project)?;
        let nothing =
            self.layout.live(project)?.is_none() && subvolume(&self.layout.snapshots(project))?.is_none();
        if nothing {
            return Ok(());
        }
        match self.intending(&Intent::Delete { project }, || self.delete_all(project)) {
            Err(failure) if failure.is_full() => self.delete_at_once(project)?,
            other => other?,
        }
        self.trash.filled();
        Ok(())
    }

    /// Deletes all of a project where there is no room to write down that it
    /// is to be deleted: the kernel deletes subvolumes from its own reserve
    /// (`btrfs_delete_subvolume` in fs/btrfs/inode.c). Cut off, it leaves a part
    /// that deleting again removes. The quota group is removed with others
    /// that nothing uses.
    fn delete_at_once(&self, project: ProjectId) -> Result<(), Failure> {
        let group = self.group(project)?;
        if let Some(live) = self.layout.live(project)? {
            self.destroy_with_nested(live.info.tree, group)?;
        }
        if let Some(holder) = subvolume(&self.layout.snapshots(project))? {
            self.destroy_with_nested(holder.info.tree, None)?;
        }
        self.layout.commit()
    }

    /// Moves all of a project, or what is left of it, into the trash.
    pub(super) fn delete_all(&self, project: ProjectId) -> Result<(), Failure> {
        let group = self.group(project)?;
        if let Some(live) = self.layout.live(project)? {
            self.bury(&self.layout.project(project), live.info.tree, group)?;
        }
        fail::point("delete.live");
        if let Some(group) = group {
            self.bury_group(group)?;
        }
        fail::point("delete.group");
        // The snapshots are in it. Its tree id named the group, so it is last.
        if let Some(holder) = subvolume(&self.layout.snapshots(project))? {
            self.bury(&self.layout.snapshots(project), holder.info.tree, None)?;
        }
        fail::point("delete.snapshots");
        Ok(())
    }

    pub(super) fn snapshot(&self, project: ProjectId, name: &SnapshotName) -> Result<Snapshot, Failure> {
        if let Some(found) = self.layout.find(project, name)? {
            return Ok(layout::snapshot(project, name, &found.info));
        }
        let live = self.layout.live(project)?.ok_or(Error::NotFound { project })?;
        self.refuse_nested(project, &live)?;
        let group = self.ensure_project(project)?;
        self.freeze(project, &live, name, group)
    }

    /// Refuses when there are subvolumes in the live volume: a snapshot does
    /// not hold them, nor does a stream.
    fn refuse_nested(&self, project: ProjectId, live: &layout::Subvolume) -> Result<(), Failure> {
        let root = &self.layout.root_fd;
        let nested = sys::children(root, live.info.tree).doing("list nested subvolumes")?;
        if nested.is_empty() {
            return Ok(());
        }
        let path = |child| sys::path_of(root, live.info.tree, child).doing("name a nested subvolume");
        let paths = nested.iter().take(NAMED_MAX).map(path).collect::<Result<_, _>>()?;
        Err(Error::NestedVolumes { project, paths }.into())
    }

    /// Takes a snapshot of the live volume; the kernel commits it.
    fn freeze(
        &self,
        project: ProjectId,
        live: &layout::Subvolume,
        name: &SnapshotName,
        group: Option<Qgroup>,
    ) -> Result<Snapshot, Failure> {
        let parent = open_directory(&self.layout.snapshots(project)).doing("open the snapshots")?;
        sys::create_snapshot(&live.fd, &parent, name.as_str(), true, group).doing("take a snapshot")?;
        fail::point("snapshot.taken");
        let made = self.layout.need(project, name)?;
        Ok(layout::snapshot(project, name, &made.info))
    }

    pub(super) fn delete_snapshot(&self, project: ProjectId, name: &SnapshotName) -> Result<(), Failure> {
        self.holds.refuse_held(project, name)?;
        if let Some(found) = self.layout.find(project, name)? {
            self.destroy(found.info.tree)?;
            fail::point("delete-snapshot.destroyed");
            self.layout.commit()?;
            self.forget_if_empty(project)?;
        }
        Ok(())
    }

    pub(super) fn restore(
        &self,
        project: ProjectId,
        name: &SnapshotName,
        former: &SnapshotName,
    ) -> Result<Volume, Failure> {
        let snapshot = self.layout.need(project, name)?;
        let live = self.layout.live(project)?;
        if let Some(live) = &live {
            let this = Restored { live: live.uuid(), snapshot: snapshot.uuid(), former: former.clone() };
            if self.restored(project) == Some(this) {
                return self.live_volume(project);
            }
            self.refuse_snapshot(project, former)?;
            self.refuse_nested(project, live)?;
        }
        let group = self.ensure_project(project)?;
        let staged = self.stage();
        let parent = open_directory(&self.layout.staging()).doing("open staging")?;
        sys::create_snapshot(&snapshot.fd, &parent, &staged.name, false, group).doing("copy a snapshot")?;
        fail::point("restore.staged");
        let made = need_subvolume(&staged.path())?;
        // It only counts while that volume is the live one, so it may be
        // written before.
        let mark = Restored { live: made.uuid(), snapshot: snapshot.uuid(), former: former.clone() };
        let mark = serde_json::to_vec(&mark).map_err(|error| Failure::Wrong(error.to_string()))?;
        layout::write_atomically(&self.layout.snapshots(project).join(RESTORED), &mark)
            .doing("write down the restore")?;
        fail::point("restore.marked");

        let Some(live) = live else {
            return self.come_alive(project, &staged.path());
        };
        let intent = Intent::Replace { project, live: live.uuid(), kept: former.clone() };
        self.intending(&intent, || {
            self.freeze(project, &live, former, group)?;
            fail::point("restore.frozen");
            rename(&staged.path(), &self.layout.project(project), RenameFlags::EXCHANGE)?;
            fail::point("restore.exchanged");
            Ok(())
        })?;
        self.live_volume(project)
    }

    fn restored(&self, project: ProjectId) -> Option<Restored> {
        serde_json::from_slice(&fs::read(self.layout.snapshots(project).join(RESTORED)).ok()?).ok()
    }

    pub(super) fn refuse_snapshot(&self, project: ProjectId, name: &SnapshotName) -> Result<(), Failure> {
        match self.layout.find(project, name)? {
            Some(_) => Err(Error::AlreadyExists { project, what: format!("a snapshot {name}") }.into()),
            None => Ok(()),
        }
    }

    pub(super) fn set_aside(&self, project: ProjectId, keep_as: &SnapshotName) -> Result<Snapshot, Failure> {
        let Some(live) = self.layout.live(project)? else {
            let kept = self.layout.find(project, keep_as)?.ok_or(Error::NotFound { project })?;
            self.uncharge_all(project)?;
            return Ok(layout::snapshot(project, keep_as, &kept.info));
        };
        self.refuse_snapshot(project, keep_as)?;
        self.refuse_nested(project, &live)?;
        self.ensure_project(project)?;
        let staged = self.stage();
        let intent = Intent::Replace { project, live: live.uuid(), kept: keep_as.clone() };
        let kept = self.intending(&intent, || {
            // Kept for people who undo things, not by the project: it must not
            // be in the way when the project comes back.
            let kept = self.freeze(project, &live, keep_as, None)?;
            fail::point("set-aside.frozen");
            rename(&self.layout.project(project), &staged.path(), RenameFlags::NOREPLACE)?;
            fail::point("set-aside.renamed");
            Ok(kept)
        })?;
        drop(staged);
        self.uncharge_all(project)?;
        Ok(kept)
    }

    /// Charges a project that has no live volume for nothing it left here.
    fn uncharge_all(&self, project: ProjectId) -> Result<(), Failure> {
        match self.group(project)? {
            Some(group) => self.uncharge(group),
            None => Ok(()),
        }
    }
}

pub(super) fn rename(from: &Path, to: &Path, flags: RenameFlags) -> Result<(), Failure> {
    rustix::fs::renameat_with(CWD, from, CWD, to, flags).doing("put a volume in its place")
}

/// Makes what a new volume has.
fn furnish(volume: &Path) -> io::Result<()> {
    let mut directories = fs::DirBuilder::new();
    directories.mode(0o755);
    fs::set_permissions(volume, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    directories.create(volume.join("home"))?;
    std::os::unix::fs::chown(volume.join("home"), Some(USER), Some(USER))?;
    directories.create(volume.join("system"))
}
