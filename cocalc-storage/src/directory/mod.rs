//! Project volumes as plain directories: works everywhere, as any user.

mod pipe;
mod staged;
mod store;
mod stream;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
use cocalc_core::{
    BoxError,
    ids::{ProjectId, SnapshotName, TreePath, VolumeUuid},
    storage::{
        Capabilities, Changes, CloneOptions, Copied, CopyOptions, Error, Footprint, Hold, Place, Result,
        SendHeader, SendOptions, SendStream, Snapshot, Staged, Storage, Usage, UsageSource, Volume,
        VolumeOptions,
    },
    stream::BoxRead,
};
use tokio::io::AsyncReadExt as _;

use crate::{
    failure::{Doing as _, Failure},
    locks::Locks,
    tree::{self, Lineage},
};
use store::{Extra, Store};

/// The name in [`Capabilities::backend`] and in headers of streams.
pub const BACKEND: &str = "directory";
const CHUNK: usize = 64 << 10;

/// Project volumes as plain directories. Snapshots are copies, which share
/// data where the file system can (`FICLONE`: Btrfs, XFS); streams are always
/// whole. It needs no privilege; what that costs is in
/// [`Capabilities::weaknesses`]. Clones are one store.
///
/// Below its directory: `projects/<id>/live` and
/// `projects/<id>/snapshots/<name>`, each with `tree/`, the files, and
/// `about.json`; `staging/` and `trash/`, which are emptied when it opens.
#[derive(Clone, Debug)]
pub struct Directory(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    store: Store,
    locks: Locks,
}

/// Why a directory could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("could not open the directory storage at {path}")]
pub struct DirectoryError {
    path: PathBuf,
    source: BoxError,
}

impl Directory {
    /// Opens the store at `path`, which is made if it is not there, finishes
    /// what a crash cut off, and empties staging.
    ///
    /// # Errors
    ///
    /// A directory that holds anything unknown, or is in use by another
    /// process, is refused with nothing changed.
    pub async fn open(path: impl Into<PathBuf>) -> Result<Self, DirectoryError> {
        let path = path.into();
        let root = path.clone();
        let opened = tokio::task::spawn_blocking(move || Store::open(root)).await;
        let store = match opened {
            Ok(Ok(store)) => store,
            Ok(Err(failure)) => return Err(DirectoryError { path, source: failure.into() }),
            Err(error) => return Err(DirectoryError { path, source: error.into() }),
        };
        Ok(Self(Arc::new(Inner { store, locks: Locks::default() })))
    }

    /// Where the files of snapshot `name` of `project` are, if it is there.
    ///
    /// # Errors
    ///
    /// [`Error::NoSnapshot`] if there is none of that name.
    pub async fn snapshot_path(&self, project: ProjectId, name: &SnapshotName) -> Result<PathBuf> {
        let name = name.clone();
        self.blocking(project, "find a snapshot of", move |store| {
            store.need(project, &name)?;
            Ok(store.snapshot_dir(project, &name).join("tree"))
        })
        .await
    }

    /// Bytes that are free on its file system.
    ///
    /// # Errors
    ///
    /// Those of `statvfs`.
    pub fn free_bytes(&self) -> std::io::Result<u64> {
        let stat = rustix::fs::statvfs(self.path())?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// The directory that this store owns.
    pub fn path(&self) -> &Path {
        &self.0.store.root
    }

    /// Runs `work` where it may block, to its end even if the caller is gone.
    async fn blocking<T: Send + 'static>(
        &self,
        project: ProjectId,
        operation: &'static str,
        work: impl FnOnce(&Store) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T> {
        let inner = Arc::clone(&self.0);
        let joined = tokio::task::spawn_blocking(move || work(&inner.store)).await;
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
impl Storage for Directory {
    fn capabilities(&self) -> Capabilities {
        let mut weaknesses = vec![
            "no quotas".to_owned(),
            "every stream is whole: moves send all files again after the stop".to_owned(),
            "a snapshot of a running project is not of one moment".to_owned(),
            "snapshots are read-only by convention".to_owned(),
        ];
        if !rustix::process::geteuid().is_root() {
            weaknesses
                .push("owners, devices and trusted attributes are not kept; not run as root".to_owned());
        }
        Capabilities {
            backend: BACKEND.to_owned(),
            full_metadata: rustix::process::geteuid().is_root(),
            repeatable_streams: true,
            weaknesses,
            ..Capabilities::default()
        }
    }

    async fn create(&self, project: ProjectId, options: &VolumeOptions) -> Result<Volume> {
        if options.limit_bytes.is_some() {
            tracing::warn!("a limit is ignored: there are no quotas");
        }
        self.exclusive(project, "create", move |store| store.create(project)).await
    }

    async fn volume(&self, project: ProjectId) -> Result<Volume> {
        self.blocking(project, "find", move |store| {
            Ok(store.volume(project)?.ok_or(Error::NotFound { project })?)
        })
        .await
    }

    async fn list(&self) -> Result<Vec<Volume>> {
        // A listing is of no project; the nil id says so.
        self.blocking(ProjectId::from_bytes([0; 16]), "list", Store::list).await
    }

    async fn delete(&self, project: ProjectId) -> Result<()> {
        self.exclusive(project, "delete", move |store| store.delete(project)).await
    }

    async fn snapshot(&self, project: ProjectId, name: &SnapshotName) -> Result<Snapshot> {
        let name = name.clone();
        self.exclusive(project, "snapshot", move |store| store.snapshot(project, &name)).await
    }

    async fn snapshots(&self, project: ProjectId) -> Result<Vec<Snapshot>> {
        self.blocking(project, "list the snapshots of", move |store| store.snapshots(project)).await
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
            store.need(project, &name)?;
            Ok(store.holds.take(project, &name))
        })
        .await
    }

    async fn changed_since(&self, project: ProjectId, name: &SnapshotName) -> Result<bool> {
        let name = name.clone();
        self.blocking(project, "look for changes of", move |store| {
            store.need(project, &name)?;
            Ok(true)
        })
        .await
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
        if options.volume.limit_bytes.is_some() {
            tracing::warn!("a limit is ignored: there are no quotas");
        }
        let name = name.clone();
        self.exclusive(target, "clone into", move |store| store.clone_from(source, &name, target)).await
    }

    async fn usage(&self, project: ProjectId) -> Result<Usage> {
        self.blocking(project, "measure", move |store| {
            let volume = store.volume(project)?;
            let path = volume.and_then(|volume| volume.path).ok_or(Error::NotFound { project })?;
            let charged_bytes = crate::walk::occupied(&path)?;
            Ok(Usage { charged_bytes, limit_bytes: None, source: UsageSource::Walk })
        })
        .await
    }

    async fn set_limit(&self, _project: ProjectId, _limit_bytes: Option<u64>) -> Result<()> {
        Err(Error::Unsupported { backend: BACKEND, operation: "limit a project: it has no quotas" })
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
            let (old, new) = (store.root_of(project, Some(&from))?, store.root_of(project, to.as_ref())?);
            tree::diff(&old, &new, Lineage::Separate, after.as_ref(), max)
                .map_err(|error| tree::beyond(project, error))
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
        let mut holds = vec![self.hold(project, name).await?];
        for named in options.base.iter().chain(&options.sources) {
            holds.push(self.hold(project, named).await?);
        }
        let (from, base) = (name.clone(), options.base.clone());
        let (header, root) = self
            .blocking(project, "send", move |store| {
                let snapshot = store.need(project, &from)?;
                let base = base.map(|base| store.need(project, &base).map(|found| (base, found.origin)));
                let root = store.snapshot_dir(project, &from).join("tree");
                let root = tree::open_root(&root).doing("open a snapshot")?;
                let header = SendHeader {
                    backend: BACKEND.to_owned(),
                    project,
                    name: from,
                    origin: snapshot.origin,
                    base: base.transpose()?,
                    extra: serde_json::to_string(&Extra { created: snapshot.created })
                        .map_err(|error| Failure::Wrong(error.to_string()))?,
                    estimated_bytes: 0,
                    left_out: Vec::new(),
                };
                Ok((header, root))
            })
            .await?;
        let (mut writer, reader) = pipe::outward();
        let origin = header.origin;
        // It ends when the reader is dropped: its next write fails.
        tokio::task::spawn_blocking(move || {
            let outcome = stream::write(&root, origin, &mut writer);
            writer.end(outcome);
        });
        Ok(SendStream { header, reader: Hold::during(Box::pin(reader), holds) })
    }

    async fn receive(&self, header: &SendHeader, mut stream: BoxRead) -> Result<Snapshot> {
        let project = header.project;
        let bad = |reason: String| Error::BadStream { project, reason };
        if header.backend != BACKEND {
            return Err(bad(format!("it is of {} storage, this is {BACKEND}", header.backend)));
        }
        let announced = header.clone();
        let admitted = self.exclusive(project, "receive", move |store| store.admit(&announced)).await?;
        if let Some(snapshot) = admitted {
            return Ok(snapshot);
        }
        let (sender, reader) = pipe::inward();
        let (this, announced) = (self.clone(), header.clone());
        let building = tokio::spawn(async move {
            let staging = VolumeUuid::random();
            let (inner, header) = (Arc::clone(&this.0), announced.clone());
            let built =
                tokio::task::spawn_blocking(move || inner.store.build(staging, &header, reader)).await;
            let built = built.unwrap_or_else(|error| Err(Failure::Wrong(error.to_string())));
            this.exclusive(project, "receive", move |store| store.publish(staging, &announced, built)).await
        });
        let mut chunk = vec![0; CHUNK];
        let broke = loop {
            let (step, last) = match stream.read(&mut chunk).await {
                Ok(0) => (Ok(None), true),
                Ok(length) => (Ok(Some(chunk[..length].to_vec())), false),
                Err(error) => break Some(error),
            };
            // It takes no more when it has found something wrong.
            if sender.send(step).await.is_err() || last {
                break None;
            }
        };
        drop(sender);
        let built = building.await.unwrap_or_else(|error| {
            Err(Error::Backend { backend: BACKEND, operation: "receive", project, source: error.into() })
        });
        match broke {
            Some(error) => Err(bad(format!("it broke off: {error}"))),
            None => built,
        }
    }

    async fn stage(&self, project: ProjectId, name: &SnapshotName) -> Result<Box<dyn Staged>> {
        Ok(Box::new(self.stage_files(project, name).await?))
    }
}
