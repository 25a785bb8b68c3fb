//! Project volumes as Btrfs subvolumes.

mod apply;
mod changed;
mod commit;
mod contents;
mod files;
mod format;
mod guard;
mod images;
mod layout;
mod open;
mod quota;
mod receive;
mod recover;
mod send;
mod staged;
mod sys;
mod trash;
mod volumes;

use std::{path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use cocalc_core::{
    ids::{ProjectId, SnapshotName, TreePath},
    storage::{
        Capabilities, Changes, CloneOptions, Copied, CopyOptions, Error, Footprint, Hold, Holds, Place,
        Result, SendHeader, SendOptions, SendStream, Snapshot, Staged, Storage, Usage, UsageSource, Volume,
        VolumeOptions,
    },
    stream::BoxRead,
};

pub use guard::{Refused, StreamGuard};
pub use images::{ImageError, ImageHeader, ImageLimits, ImageRecord, ImageStream, Scratch};
pub use open::{BtrfsBuilder, OpenError, Probe, probe};
pub use quota::QuotaKind;
pub use trash::Trash;

use crate::{
    failure::{Doing as _, Failure},
    locks::Locks,
};
use layout::Layout;
use quota::Quotas;
use sys::Qgroup;

/// The name in [`Capabilities::backend`] and in headers of streams.
pub const BACKEND: &str = "btrfs";

/// The nil id: in errors of what is done for no project.
const NOBODY: ProjectId = ProjectId::from_bytes([0; 16]);

/// Project volumes as Btrfs subvolumes, with snapshots, quotas, and full and
/// delta streams. Clones are one store.
///
/// Below its directory, which only root may enter:
///
/// | path | what it is |
/// |---|---|
/// | `projects/<id>` | the live volume: `home/`, which is the user's, and `system/` |
/// | `snapshots/<id>/<name>` | read-only snapshots |
/// | `images/<digest>` | read-only root file systems, with `<digest>.json` beside them: what is noted of each |
/// | `staging/` | what is being made; emptied when the store opens |
/// | `trash/` | what was deleted and is not gone yet, see [`Trash`] |
///
/// Subvolumes inside a project's own would be in no snapshot and no stream, so
/// while there are any, [`Error::NestedVolumes`] refuses what takes one. They
/// go when the project is deleted.
///
/// What is set aside is charged to nobody, and stays so if it is restored.
///
/// Usage falls when the kernel has freed something, not when it was deleted: a
/// file that a snapshot has too is charged until both are gone, and what only a
/// deleted snapshot had is charged until the kernel's cleaner has run.
///
/// Deleting a project moves it into the trash, in one step; a thread empties
/// that a little at a time, while the store is open. [`trash`](Self::trash)
/// tells what is left.
///
/// A volume that fails or turns read-only under an open store gives
/// [`Error::Backend`] with the kernel's reason; when it can be written again, a
/// new store settles what was cut off.
#[derive(Clone, Debug)]
pub struct Btrfs(
    Arc<Store>,
    #[expect(dead_code, reason = "it ends when the last clone is dropped")] Arc<trash::Reaper>,
);

#[derive(Debug)]
struct Store {
    layout: Layout,
    quotas: Option<Quotas>,
    weaknesses: Vec<String>,
    stall_limit: Duration,
    /// The highest version of streams that can be received here.
    stream_version: u32,
    locks: Locks,
    holds: Holds,
    trash: Arc<trash::Signals>,
    /// Held by whoever changes images or what is noted of them.
    images: std::sync::Mutex<()>,
    /// Holds the lock that keeps a second process out.
    _marker: std::fs::File,
}

impl Btrfs {
    /// Where snapshot `name` of `project` is, if it is there.
    ///
    /// # Errors
    ///
    /// [`Error::NoSnapshot`] if there is none of that name.
    pub async fn snapshot_path(&self, project: ProjectId, name: &SnapshotName) -> Result<PathBuf> {
        let name = name.clone();
        self.blocking(project, "find a snapshot of", move |store| {
            store.layout.need(project, &name)?;
            Ok(store.layout.snapshot(project, &name))
        })
        .await
    }

    /// Bytes that are free on the volume, as the file system estimates them,
    /// without those that it has promised to what is written but not yet on the
    /// disk: of them there may be as many as the machine has memory.
    ///
    /// # Errors
    ///
    /// Those of `statvfs`.
    pub fn free_bytes(&self) -> std::io::Result<u64> {
        self.0.layout.free_bytes()
    }

    /// The directory that this store owns.
    pub fn path(&self) -> &std::path::Path {
        &self.0.layout.root
    }

    /// Runs `work` where it may block, to its end even if the caller is gone.
    async fn blocking<T: Send + 'static>(
        &self,
        project: ProjectId,
        operation: &'static str,
        work: impl FnOnce(&Store) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T> {
        let store = Arc::clone(&self.0);
        let joined = tokio::task::spawn_blocking(move || work(&store)).await;
        let done = joined.unwrap_or_else(|error| Err(Failure::Wrong(error.to_string())));
        done.map_err(|failure| failure.public(BACKEND, project, operation))
    }

    /// The same, when it is the project's turn.
    async fn exclusive<T: Send + 'static>(
        &self,
        project: ProjectId,
        operation: &'static str,
        work: impl FnOnce(&Store) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T> {
        let turn = self.0.locks.lock(project).await;
        self.blocking(project, operation, move |store| {
            let _turn = turn;
            work(store)
        })
        .await
    }
}

#[async_trait]
impl Storage for Btrfs {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            backend: BACKEND.to_owned(),
            deltas: true,
            quotas: self.0.quotas.is_some(),
            constant_usage: self.0.quotas.is_some(),
            shares_bytes: true,
            atomic_snapshots: true,
            full_metadata: true,
            repeatable_streams: true,
            stream_version: self.0.stream_version,
            detects_no_change: true,
            weaknesses: self.0.weaknesses.clone(),
        }
    }

    async fn create(&self, project: ProjectId, options: &VolumeOptions) -> Result<Volume> {
        let options = options.clone();
        self.exclusive(project, "create", move |store| store.create(project, &options)).await
    }

    async fn volume(&self, project: ProjectId) -> Result<Volume> {
        self.blocking(project, "find", move |store| {
            Ok(store.layout.volume(project)?.ok_or(Error::NotFound { project })?)
        })
        .await
    }

    async fn list(&self) -> Result<Vec<Volume>> {
        let store = Arc::clone(&self.0);
        let listed = tokio::task::spawn_blocking(move || store.list()).await;
        listed
            .unwrap_or_else(|error| Err(Failure::Wrong(error.to_string())))
            .map_err(|failure| failure.public(BACKEND, NOBODY, "list"))
    }

    async fn delete(&self, project: ProjectId) -> Result<()> {
        self.exclusive(project, "delete", move |store| store.delete(project)).await
    }

    async fn snapshot(&self, project: ProjectId, name: &SnapshotName) -> Result<Snapshot> {
        let name = name.clone();
        self.exclusive(project, "snapshot", move |store| store.snapshot(project, &name)).await
    }

    async fn snapshots(&self, project: ProjectId) -> Result<Vec<Snapshot>> {
        self.blocking(project, "list the snapshots of", move |store| store.layout.list_snapshots(project))
            .await
    }

    async fn snapshot_path(&self, project: ProjectId, name: &SnapshotName) -> Result<Option<PathBuf>> {
        Self::snapshot_path(self, project, name).await.map(Some)
    }

    async fn delete_snapshot(&self, project: ProjectId, name: &SnapshotName) -> Result<()> {
        let name = name.clone();
        self.exclusive(project, "delete a snapshot of", move |store| store.delete_snapshot(project, &name))
            .await
    }

    async fn hold(&self, project: ProjectId, name: &SnapshotName) -> Result<Hold> {
        let name = name.clone();
        self.exclusive(project, "hold a snapshot of", move |store| {
            store.layout.need(project, &name)?;
            Ok(store.holds.take(project, &name))
        })
        .await
    }

    async fn changed_since(&self, project: ProjectId, name: &SnapshotName) -> Result<bool> {
        let name = name.clone();
        self.blocking(project, "look for changes of", move |store| store.changed_since(project, &name)).await
    }

    async fn restore(
        &self,
        project: ProjectId,
        name: &SnapshotName,
        former: &SnapshotName,
    ) -> Result<Volume> {
        let (name, former) = (name.clone(), former.clone());
        self.exclusive(project, "restore", move |store| store.restore(project, &name, &former)).await
    }

    async fn set_aside(&self, project: ProjectId, keep_as: &SnapshotName) -> Result<Snapshot> {
        let keep_as = keep_as.clone();
        self.exclusive(project, "set aside", move |store| store.set_aside(project, &keep_as)).await
    }

    async fn clone_volume(
        &self,
        source: ProjectId,
        name: &SnapshotName,
        target: ProjectId,
        options: &CloneOptions,
    ) -> Result<Volume> {
        self.clone_from(source, name, target, options).await
    }

    async fn usage(&self, project: ProjectId) -> Result<Usage> {
        self.blocking(project, "measure", move |store| store.usage(project)).await
    }

    async fn set_limit(&self, project: ProjectId, limit_bytes: Option<u64>) -> Result<()> {
        self.exclusive(project, "limit", move |store| store.set_limit(project, limit_bytes)).await
    }

    async fn footprint(&self, project: ProjectId, snapshot: Option<&SnapshotName>) -> Result<Footprint> {
        let held = match snapshot {
            Some(name) => Some(self.hold(project, name).await?),
            None => None,
        };
        let snapshot = snapshot.cloned();
        self.blocking(project, "measure", move |store| {
            let _held = held;
            store.footprint(project, snapshot.as_ref())
        })
        .await
    }

    async fn diff(
        &self,
        project: ProjectId,
        from: &SnapshotName,
        to: Option<&SnapshotName>,
        after: Option<&TreePath>,
        max: usize,
    ) -> Result<Changes> {
        let mut held = vec![self.hold(project, from).await?];
        if let Some(to) = to {
            held.push(self.hold(project, to).await?);
        }
        let (from, to, after) = (from.clone(), to.cloned(), after.cloned());
        self.blocking(project, "compare snapshots of", move |store| {
            let _held = held;
            store.diff(project, &from, to.as_ref(), after.as_ref(), max)
        })
        .await
    }

    async fn copy(&self, from: &Place, to: &Place, options: &CopyOptions) -> Result<Copied> {
        let held = match &from.snapshot {
            Some(name) => Some(self.hold(from.project, name).await?),
            None => None,
        };
        let (from, to, options) = (from.clone(), to.clone(), *options);
        self.exclusive(to.project, "copy files into", move |store| {
            let _held = held;
            store.copy_files(&from, &to, options)
        })
        .await
    }

    async fn send(
        &self,
        project: ProjectId,
        name: &SnapshotName,
        options: &SendOptions,
    ) -> Result<SendStream> {
        self.send_stream(project, name, options).await
    }

    async fn receive(&self, header: &SendHeader, stream: BoxRead) -> Result<Snapshot> {
        self.receive_stream(header, stream).await
    }

    async fn stage(&self, project: ProjectId, name: &SnapshotName) -> Result<Box<dyn Staged>> {
        Ok(Box::new(self.stage_files(project, name).await?))
    }
}

impl Store {
    /// The project's quota group, if there are quotas and the project has
    /// anything here.
    fn group(&self, project: ProjectId) -> Result<Option<Qgroup>, Failure> {
        if self.quotas.is_none() {
            return Ok(None);
        }
        let holder = layout::subvolume(&self.layout.snapshots(project))?;
        Ok(holder.map(|holder| Qgroup::level_1(holder.info.tree)))
    }

    /// Makes what every project has: the subvolume of its snapshots, whose
    /// tree id names its quota group, and the group.
    fn ensure_project(&self, project: ProjectId) -> Result<Option<Qgroup>, Failure> {
        let path = self.layout.snapshots(project);
        if layout::subvolume(&path)?.is_none() {
            let parent = layout::open_directory(&self.layout.root.join("snapshots"));
            let parent = parent.doing("open the directory of snapshots")?;
            sys::create_subvolume(&parent, &project.to_string(), None).doing("make a place for snapshots")?;
        }
        let group = self.group(project)?;
        if let (Some(quotas), Some(group)) = (&self.quotas, group) {
            quotas.ensure(&self.layout.root_fd, group)?;
        }
        Ok(group)
    }

    fn usage(&self, project: ProjectId) -> Result<Usage, Failure> {
        let group = self.group(project)?;
        if let (Some(quotas), Some(group)) = (&self.quotas, group) {
            quotas.ensure(&self.layout.root_fd, group)?;
            return quotas.usage(group);
        }
        let volume = self.layout.volume(project)?;
        let path = volume.and_then(|volume| volume.path).ok_or(Error::NotFound { project })?;
        Ok(Usage {
            charged_bytes: crate::walk::occupied(&path)?,
            limit_bytes: None,
            source: UsageSource::Walk,
        })
    }

    fn set_limit(&self, project: ProjectId, limit_bytes: Option<u64>) -> Result<(), Failure> {
        if self.quotas.is_none() {
            return Err(Error::Unsupported {
                backend: BACKEND,
                operation: "limit a project: it has no quotas",
            }
            .into());
        }
        let group = self.group(project)?.ok_or(Error::NotFound { project })?;
        self.ensure_project(project)?;
        sys::limit_group(&self.layout.root_fd, group, limit_bytes).doing("limit the quota group")?;
        self.layout.commit()
    }
}
