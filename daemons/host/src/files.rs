//! The raw files of projects, as the HTTP ingress serves them.

use std::{any::Any, io, os::fd::OwnedFd, path::PathBuf, sync::Arc};

use async_trait::async_trait;
use cocalc_core::{
    grant::Ledger,
    ids::{OperationId, ProjectId, SnapshotName, TreePath},
    snapshots::auto_time,
    storage::{self, CopyOptions, Place, Snapshot, Storage},
};
use cocalc_http::{Copying, Former, FormerState, ProjectFiles};
use rustix::fs::{Mode, OFlags, ResolveFlags};

/// The homes in the volumes of the projects that this host may run.
#[derive(Debug)]
pub(crate) struct VolumeFiles {
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) ledger: Ledger,
}

#[async_trait]
impl ProjectFiles for VolumeFiles {
    async fn root(&self, project: ProjectId) -> io::Result<Option<OwnedFd>> {
        let volume = match self.storage.volume(project).await {
            Ok(volume) => volume.path,
            Err(storage::Error::NotFound { .. }) => None,
            Err(error) => return Err(io::Error::other(error)),
        };
        let Some(volume) = volume else { return Ok(None) };
        home(volume).await
    }

    async fn turn(&self, project: ProjectId) -> Option<Box<dyn Any + Send>> {
        let turn = self.ledger.turn(project).await;
        // Frozen for a move, or given up: what is written now would be lost.
        self.ledger.entry(project).and_then(|entry| entry.may_run())?;
        Some(Box::new(turn))
    }

    async fn states(&self, project: ProjectId) -> io::Result<Vec<FormerState>> {
        let mut states: Vec<_> = match self.storage.snapshots(project).await {
            Ok(snapshots) => snapshots.into_iter().map(former_state).collect(),
            Err(storage::Error::NotFound { .. }) => vec![],
            Err(error) => return Err(io::Error::other(error)),
        };
        states.sort_by_key(|state| state.taken);
        Ok(states)
    }

    async fn state(&self, project: ProjectId, name: &SnapshotName) -> io::Result<Option<Former>> {
        let gone = |error: &storage::Error| {
            matches!(error, storage::Error::NoSnapshot { .. } | storage::Error::NotFound { .. })
        };
        let held = match self.storage.hold(project, name).await {
            Ok(held) => held,
            Err(error) if gone(&error) => return Ok(None),
            Err(error) => return Err(io::Error::other(error)),
        };
        let path = match self.storage.snapshot_path(project, name).await {
            Ok(path) => path,
            Err(error) if gone(&error) => None,
            Err(error) => return Err(io::Error::other(error)),
        };
        let Some(path) = path else { return Ok(None) };
        Ok(home(path).await?.map(|root| Former { root, held: Box::new(held) }))
    }

    async fn copy(&self, project: ProjectId, what: Copying) -> Result<(), storage::Error> {
        let below = |path: &[u8]| {
            TreePath::from_bytes(&[b"home/", path].concat()).map_err(|error| storage::Error::Path {
                project,
                path: TreePath::root(),
                reason: error.to_string(),
            })
        };
        let (path, to) = (below(&what.path)?, below(&what.to)?);
        // The same kind of name as when the master has a path restored.
        let kept = match what.replace {
            true => Some(format!("before-restore-{}", OperationId::random())),
            false => None,
        };
        if let Some(Ok(kept)) = kept.map(|name| name.parse::<SnapshotName>()) {
            self.storage.snapshot(project, &kept).await?;
        }
        let _held = match &what.from {
            Some(name) => Some(self.storage.hold(project, name).await?),
            None => None,
        };
        let from = Place { project, snapshot: what.from, path };
        let options = CopyOptions { same_owner: true, replace: what.replace };
        self.storage.copy(&from, &Place::live(project, to), &options).await?;
        Ok(())
    }
}

/// What people choose a snapshot by. An automatic one says when it was taken also
/// where the file system has forgotten it.
fn former_state(snapshot: Snapshot) -> FormerState {
    let automatic = auto_time(&snapshot.name);
    FormerState {
        taken: automatic.unwrap_or(snapshot.created),
        automatic: automatic.is_some(),
        name: snapshot.name,
    }
}

/// Opens the home in a volume or a snapshot of one.
async fn home(volume: PathBuf) -> io::Result<Option<OwnedFd>> {
    let opened = tokio::task::spawn_blocking(move || {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let volume = rustix::fs::open(&volume, flags, Mode::empty())?;
        // Where a runner does not confine them, tenants can move it away.
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        rustix::fs::openat2(&volume, "home", flags, Mode::empty(), resolve)
    });
    match opened.await.map_err(io::Error::other)? {
        Ok(home) => Ok(Some(home)),
        Err(rustix::io::Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
