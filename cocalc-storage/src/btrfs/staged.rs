//! Places in staging that others write into, for what comes from backups.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use async_trait::async_trait;
use cocalc_core::{
    ids::{ProjectId, SnapshotName, VolumeUuid},
    storage::{Error, Result, Snapshot, Staged},
};

use super::{
    Btrfs, Store,
    layout::{self, need_subvolume, open_directory},
    sys::{self, Qgroup},
};
use crate::{
    fail,
    failure::{Doing as _, Failure},
};

/// A writable subvolume in staging, in the project's quota group.
#[derive(Debug)]
struct StagedFiles {
    storage: Btrfs,
    project: ProjectId,
    name: SnapshotName,
    staging: String,
    path: PathBuf,
    group: Option<Qgroup>,
    /// Opened before anything is written, so that it hears of every write that
    /// fails; `None` once it is published or removed.
    root: Option<File>,
}

impl Btrfs {
    pub(super) async fn stage_files(
        &self,
        project: ProjectId,
        name: &SnapshotName,
    ) -> Result<impl Staged + 'static> {
        let (staging, name) = (VolumeUuid::random().to_string(), name.clone());
        let storage = self.clone();
        self.exclusive(project, "make a place for", move |store| {
            store.refuse_snapshot(project, &name)?;
            let (group, root, _) = store.prepare(project, &staging, None, &[])?;
            fail::point("stage.prepared");
            let path = store.layout.staging().join(&staging);
            // Made here, so that a caller who has gone leaves nothing.
            Ok(StagedFiles { storage, project, name, staging, path, group, root: Some(root) })
        })
        .await
    }
}

impl Store {
    /// A read-only subvolume cannot be moved to another directory, so a
    /// read-only snapshot is taken there: one step, which the kernel commits.
    fn publish_files(
        &self,
        project: ProjectId,
        name: &SnapshotName,
        staging: &str,
        group: Option<Qgroup>,
    ) -> Result<Snapshot, Failure> {
        if self.ensure_project(project)? != group {
            return Err(Failure::Wrong("the project was deleted while its files came".to_owned()));
        }
        self.refuse_snapshot(project, name)?;
        let staged = need_subvolume(&self.layout.staging().join(staging))?;
        let parent = open_directory(&self.layout.snapshots(project)).doing("open the snapshots")?;
        sys::create_snapshot(&staged.fd, &parent, name.as_str(), true, group)
            .doing("take a snapshot of what was restored")?;
        fail::point("stage.published");
        let made = self.layout.need(project, name)?;
        Ok(layout::snapshot(project, name, &made.info))
    }

    fn remove_files(&self, project: ProjectId, staging: &str, group: Option<Qgroup>) -> Result<(), Failure> {
        self.remove_staged(staging, group)?;
        self.forget_if_empty(project)
    }
}

#[async_trait]
impl Staged for StagedFiles {
    fn path(&self) -> &Path {
        &self.path
    }

    async fn publish(mut self: Box<Self>) -> Result<Snapshot> {
        let Some(root) = self.root.take() else {
            return Err(Error::NotFound { project: self.project });
        };
        let (project, name, staging, group) =
            (self.project, self.name.clone(), self.staging.clone(), self.group);
        let storage = self.storage.clone();
        // A task of its own, so that staging is removed even if the caller goes
        // away. What it has taken over is not removed a second time.
        let task = tokio::spawn(async move {
            // Not in the project's turn: it may take long.
            let written = storage.blocking(project, "write out what was restored of", move |_| {
                rustix::fs::syncfs(&root).map_err(std::io::Error::from).doing("write out what was restored")
            });
            let outcome = match written.await {
                Ok(()) => {
                    let staging = staging.clone();
                    let publish = move |store: &Store| store.publish_files(project, &name, &staging, group);
                    storage.exclusive(project, "publish what was restored of", publish).await
                }
                Err(error) => Err(error),
            };
            let remove = move |store: &Store| store.remove_files(project, &staging, group);
            if let Err(error) = storage.exclusive(project, "clean up after", remove).await {
                let error = cocalc_core::chain(&error);
                tracing::warn!(%project, error, "staging is left until the store opens again");
            }
            outcome
        });
        task.await.unwrap_or_else(|error| {
            let source = error.into();
            Err(Error::Backend { backend: super::BACKEND, operation: "publish", project, source })
        })
    }
}

impl Drop for StagedFiles {
    fn drop(&mut self) {
        if self.root.take().is_none() {
            return;
        }
        let (storage, project, staging, group) =
            (self.storage.clone(), self.project, std::mem::take(&mut self.staging), self.group);
        let remove = async move {
            let remove = move |store: &Store| store.remove_files(project, &staging, group);
            if let Err(error) = storage.exclusive(project, "clean up after", remove).await {
                let error = cocalc_core::chain(&error);
                tracing::warn!(%project, error, "staging is left until the store opens again");
            }
        };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn(remove)),
            // The process ends; opening the store removes it.
            Err(_) => tracing::debug!(%project, "staging is left until the store opens again"),
        }
    }
}
