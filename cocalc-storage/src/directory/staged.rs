//! Places in staging that others write into, for what comes from backups.

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use cocalc_core::{
    ids::{ProjectId, SnapshotName, VolumeUuid},
    storage::{Error, Result, Snapshot, Staged},
};

use super::Directory;

#[derive(Debug)]
struct StagedFiles {
    storage: Directory,
    project: ProjectId,
    name: SnapshotName,
    /// `None` once it is published or removed.
    staging: Option<VolumeUuid>,
    path: PathBuf,
}

impl Directory {
    pub(super) async fn stage_files(
        &self,
        project: ProjectId,
        name: &SnapshotName,
    ) -> Result<impl Staged + 'static> {
        let (storage, name) = (self.clone(), name.clone());
        self.exclusive(project, "make a place for", move |store| {
            let staging = VolumeUuid::random();
            let path = store.stage_files(staging, project, &name)?;
            // Made here, so that a caller who has gone leaves nothing.
            Ok(StagedFiles { storage, project, name, staging: Some(staging), path })
        })
        .await
    }
}

#[async_trait]
impl Staged for StagedFiles {
    fn path(&self) -> &Path {
        &self.path
    }

    async fn publish(mut self: Box<Self>) -> Result<Snapshot> {
        let (project, name) = (self.project, self.name.clone());
        let Some(staging) = self.staging.take() else { return Err(Error::NotFound { project }) };
        let publish = move |store: &super::Store| store.publish_files(staging, project, &name);
        self.storage.exclusive(project, "publish what was restored of", publish).await
    }
}

impl Drop for StagedFiles {
    fn drop(&mut self) {
        let Some(staging) = self.staging.take() else { return };
        let (storage, project) = (self.storage.clone(), self.project);
        let remove = async move {
            let removed =
                storage.blocking(project, "clean up after", move |store| store.remove_files(staging));
            if let Err(error) = removed.await {
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
