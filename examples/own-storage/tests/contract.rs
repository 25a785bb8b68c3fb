//! Holds the example to the contract.

use std::{path::PathBuf, sync::Arc};

use async_trait::async_trait;
use cocalc_core::{
    BoxError,
    ids::{ProjectId, SnapshotName},
    storage::Storage,
};
use cocalc_testkit::storage::{Harness, Host, Tree, storage};
use own_storage::Shelves;

struct Mine([Shelves; 2]);

#[async_trait]
impl Harness for Mine {
    fn store(&self, host: Host) -> Arc<dyn Storage> {
        Arc::new(self.0[host as usize].clone())
    }

    async fn write(
        &self,
        host: Host,
        project: ProjectId,
        path: &str,
        content: &[u8],
    ) -> Result<(), BoxError> {
        self.0[host as usize].edit(project, |files| files.insert(path.to_owned(), content.to_vec()))?;
        Ok(())
    }

    async fn remove(&self, host: Host, project: ProjectId, path: &str) -> Result<(), BoxError> {
        let removed = self.0[host as usize].edit(project, |files| files.remove(path))?;
        removed.map(|_| ()).ok_or_else(|| "no such file".into())
    }

    async fn live(&self, host: Host, project: ProjectId) -> Result<Tree, BoxError> {
        Ok(self.0[host as usize].edit(project, |files| files.clone())?)
    }

    async fn path(&self, _: Host, _: ProjectId, _: Option<&SnapshotName>) -> Option<PathBuf> {
        None
    }

    fn has_files(&self) -> bool {
        false
    }

    async fn frozen(&self, host: Host, project: ProjectId, name: &SnapshotName) -> Result<Tree, BoxError> {
        Ok(self.0[host as usize].frozen(project, name)?)
    }
}

#[tokio::test]
async fn my_storage_keeps_the_contract() {
    storage(&Mine([Shelves::default(), Shelves::default()])).await;
}
