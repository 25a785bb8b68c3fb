//! What was begun and not finished: intents, staging, and their removal.
//!
//! A step that is one call to the kernel needs no intent. An operation that
//! must take a snapshot *and* change the live volume writes first, durably,
//! what has to be undone if the change does not come.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use cocalc_core::ids::{ImageDigest, ProjectId, SnapshotName, TreePath, VolumeUuid};
use serde::{Deserialize, Serialize};

use super::{
    Store,
    layout::{self, entries, need_subvolume, subvolume},
    sys::{self, Qgroup},
};
use crate::{
    fail,
    failure::{Doing as _, Failure},
};

/// What an operation is about to do.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(tag = "intent", rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Intent {
    /// To keep the live volume as snapshot `kept` and put something else, or
    /// nothing, in its place. If `live` is still in its place, it was not done.
    Replace { project: ProjectId, live: VolumeUuid, kept: SnapshotName },
    /// To put a subvolume in an image's place and then make it read-only, which
    /// is when it counts.
    Image { digest: ImageDigest },
    /// To copy files into a live volume, under this name until they are whole.
    Copy { project: ProjectId, path: TreePath },
    /// To delete all of a project.
    Delete { project: ProjectId },
}

const INTENT: &str = ".intent";

/// A place in staging that is emptied and removed when this is dropped.
#[derive(Debug)]
pub(super) struct Staged<'a> {
    store: &'a Store,
    pub(super) name: String,
}

impl Staged<'_> {
    pub(super) fn path(&self) -> PathBuf {
        self.store.layout.staging().join(&self.name)
    }
}

impl Drop for Staged<'_> {
    fn drop(&mut self) {
        let removed = match subvolume(&self.path()) {
            Ok(Some(staged)) => self.store.destroy(staged.info.tree),
            Ok(None) => Ok(()),
            Err(failure) => Err(failure),
        };
        if let Err(failure) = removed {
            let error = cocalc_core::chain(&failure);
            tracing::warn!(error, name = self.name, "staging is left until the store opens again");
        }
    }
}

impl Store {
    /// A fresh name in staging, where the caller makes a subvolume.
    pub(super) fn stage(&self) -> Staged<'_> {
        Staged { store: self, name: VolumeUuid::random().to_string() }
    }

    /// Removes the subvolume of this name in staging, if it is there, with
    /// what was received into it.
    pub(super) fn remove_staged(&self, name: &str, group: Option<Qgroup>) -> Result<(), Failure> {
        match subvolume(&self.layout.staging().join(name))? {
            Some(staged) => self.destroy_with_nested(staged.info.tree, group),
            None => Ok(()),
        }
    }

    /// Destroys a subvolume, which must have none in it.
    pub(super) fn destroy(&self, tree: u64) -> Result<(), Failure> {
        match sys::destroy_subvolume(&self.layout.root_fd, tree) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.doing("delete a subvolume"),
        }
    }

    /// Destroys a subvolume and all that are in it. What a project nests is in
    /// no snapshot, so this is only for what is wanted no more.
    pub(super) fn destroy_with_nested(&self, tree: u64, group: Option<Qgroup>) -> Result<(), Failure> {
        self.destroy_some(tree, group, usize::MAX, &mut Vec::new())
    }

    /// Begins to do that, and stops when `max` of them are destroyed, which
    /// are added to `destroyed`.
    pub(super) fn destroy_some(
        &self,
        tree: u64,
        group: Option<Qgroup>,
        max: usize,
        destroyed: &mut Vec<u64>,
    ) -> Result<(), Failure> {
        let root = &self.layout.root_fd;
        // A post-order walk without recursion: a project can nest deeply.
        let mut todo = vec![(tree, false)];
        while let Some((tree, emptied)) = todo.pop() {
            if destroyed.len() >= max {
                break;
            }
            let inner = if emptied {
                Vec::new()
            } else {
                sys::children(root, tree).doing("list nested subvolumes")?
            };
            if inner.is_empty() {
                self.destroy(tree)?;
                destroyed.push(tree);
                continue;
            }
            if let Some(group) = group {
                // Removing a name takes space in the tree that holds it, and a
                // full quota would refuse even that. Outside the group it has
                // no limit. Where it is not a member, there is nothing to do.
                let member = Qgroup::of_subvolume(tree);
                if sys::leave_group(root, member, group).is_ok() {
                    // Nobody would find it afterwards.
                    self.bury_member(member)?;
                }
            }
            todo.push((tree, true));
            todo.extend(inner.into_iter().map(|child| (child.tree, false)));
        }
        Ok(())
    }

    /// Writes down, durably, what is about to be done.
    fn intend(&self, intent: &Intent) -> Result<PathBuf, Failure> {
        let path = self.layout.staging().join(format!("{}{INTENT}", VolumeUuid::random()));
        let text = serde_json::to_vec(intent).map_err(|error| Failure::Wrong(error.to_string()))?;
        layout::write_atomically(&path, &text).doing("write an intent")?;
        let directory = layout::open_directory(&self.layout.staging()).doing("open staging")?;
        directory.sync_all().doing("write an intent")?;
        Ok(path)
    }

    /// Finishes or undoes an operation, by what the volume shows of it.
    fn settle(&self, intent: &Intent) -> Result<(), Failure> {
        match intent {
            Intent::Copy { project, path } => self.remove_copy(*project, path),
            Intent::Delete { project } => self.delete_all(*project),
            Intent::Image { digest } => self.remove_writable(&self.layout.image(digest)),
            Intent::Replace { project, live, kept } => {
                let in_place = self.layout.live(*project)?.is_some_and(|found| found.uuid() == *live);
                if !in_place {
                    return Ok(());
                }
                match subvolume(&self.layout.snapshot(*project, kept))? {
                    Some(found) if found.info.parent_uuid == *live.as_bytes() => {
                        self.destroy(found.info.tree)
                    }
                    _ => Ok(()),
                }
            }
        }
    }

    fn remove_writable(&self, path: &Path) -> Result<(), Failure> {
        match subvolume(path)? {
            Some(found) if !found.info.read_only => self.destroy(found.info.tree),
            _ => Ok(()),
        }
    }

    /// Does `work` between writing the intent and removing it, and undoes it
    /// if it fails.
    pub(super) fn intending<T>(
        &self,
        intent: &Intent,
        work: impl FnOnce() -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let path = self.intend(intent)?;
        fail::point("intent.written");
        let done = work();
        fail::point("intent.done");
        if done.is_err() {
            // If this fails too, the intent stays for the next opening.
            self.settle(intent)?;
        }
        self.layout.commit()?;
        fail::point("intent.committed");
        fs::remove_file(&path).doing("remove an intent")?;
        done
    }

    /// Brings the volume, just opened, to a state in which every operation was
    /// done or was not.
    pub(super) fn recover(&self) -> Result<(), Failure> {
        let staging = self.layout.staging();
        let (intents, others): (Vec<_>, Vec<_>) =
            entries(&staging)?.into_iter().partition(|name| name.ends_with(INTENT));
        for name in intents {
            let path = staging.join(&name);
            match serde_json::from_slice(&fs::read(&path).doing("read an intent")?) {
                Ok(intent) => {
                    tracing::info!(?intent, "settling what was cut off");
                    self.settle(&intent)?;
                }
                // Intents are durable before anything is done, so nothing was.
                Err(error) => tracing::warn!(name, %error, "an intent cannot be read"),
            }
            self.layout.commit()?;
            fs::remove_file(&path).doing("remove an intent")?;
        }
        for name in others {
            let path = staging.join(&name);
            if path.is_dir() {
                self.destroy_with_nested(need_subvolume(&path)?.info.tree, None)?;
            } else {
                fs::remove_file(&path).doing("empty staging")?;
            }
        }
        self.layout.commit()
    }

    /// Charges the project no more for what it wrote into volumes that are
    /// gone, whichever snapshots hold it still.
    pub(super) fn uncharge(&self, group: Qgroup) -> Result<(), Failure> {
        let root = &self.layout.root_fd;
        for member in sys::members(root, group).doing("read the quota group")? {
            if sys::is_gone(root, member.number()).doing("look for a subvolume")? {
                // Nobody would find it afterwards.
                self.bury_member(member)?;
                match sys::leave_group(root, member, group) {
                    // The kernel removes the group of a subvolume that is gone when
                    // nothing is charged to it any more, also just now.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    left => left.doing("leave the quota group")?,
                }
            }
        }
        self.trash.filled();
        Ok(())
    }

    /// Removes the place of a project's snapshots, and its quota group, when
    /// nothing of the project is here, nor on its way.
    pub(super) fn forget_if_empty(&self, project: ProjectId) -> Result<(), Failure> {
        let root = &self.layout.root_fd;
        let Some(holder) = subvolume(&self.layout.snapshots(project))? else { return Ok(()) };
        let inner = sys::children(root, holder.info.tree).doing("list snapshots")?;
        if !inner.is_empty() || self.layout.live(project)?.is_some() {
            return Ok(());
        }
        if let Some(group) = self.group(project)? {
            for member in sys::members(root, group).doing("read the quota group")? {
                // One in staging, which is being received into.
                if !sys::is_gone(root, member.number()).doing("look for a subvolume")? {
                    return Ok(());
                }
            }
            self.bury_group(group)?;
        }
        self.destroy(holder.info.tree)?;
        self.layout.commit()?;
        self.trash.filled();
        Ok(())
    }
}
