//! The raw files of projects, as the HTTP ingress serves them.

use std::{any::Any, io, os::fd::OwnedFd, sync::Arc};

use async_trait::async_trait;
use cocalc_core::{
    grant::Ledger,
    ids::ProjectId,
    storage::{self, Storage},
};
use cocalc_http::ProjectFiles;
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

    async fn turn(&self, project: ProjectId) -> Option<Box<dyn Any + Send>> {
        let turn = self.ledger.turn(project).await;
        // Frozen for a move, or given up: what is written now would be lost.
        self.ledger.entry(project).and_then(|entry| entry.may_run())?;
        Some(Box::new(turn))
    }
}
