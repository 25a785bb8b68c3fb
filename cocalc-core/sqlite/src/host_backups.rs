//! How the projects of a host stand with their backups, in SQLite.

use std::{fmt, path::Path, sync::Arc};

use async_trait::async_trait;
use cocalc_core::{
    BoxError,
    backups::{Status, StatusStore},
};
use cocalc_ids::ProjectId;

use crate::{Database, Durability, Error, database};

/// Published migrations never change; new ones go to the end.
const MIGRATIONS: [&str; 1] =
    ["CREATE TABLE status (project TEXT PRIMARY KEY, status TEXT NOT NULL) STRICT, WITHOUT ROWID;"];

/// Keeps what was backed up last of each project, and what is still to be. A
/// file of its own: what is lost with the machine's last moments is only done
/// again.
#[derive(Clone)]
pub struct HostBackups(Arc<Database>);

impl fmt::Debug for HostBackups {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostBackups").finish_non_exhaustive()
    }
}

impl HostBackups {
    /// Opens `path`, or creates it.
    ///
    /// # Errors
    ///
    /// As [`Database::open`].
    pub fn open(path: &Path) -> Result<Self, Error> {
        Ok(Self(Arc::new(Database::open(path, Durability::Full, &MIGRATIONS)?)))
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, BoxError> {
        let database = Arc::clone(&self.0);
        Ok(tokio::task::spawn_blocking(move || work(&database)).await??)
    }
}

#[async_trait]
impl StatusStore for HostBackups {
    async fn load(&self) -> Result<Vec<Status>, BoxError> {
        let load = |database: &Database| {
            database.read("load how backups stand", |connection| {
                let mut rows = connection.prepare("SELECT status FROM status ORDER BY project")?;
                let statuses = rows.query_map([], |row| database::json(row, 0))?;
                Ok(statuses.collect::<Result<_, _>>()?)
            })
        };
        self.blocking(load).await
    }

    async fn save(&self, status: &Status) -> Result<(), BoxError> {
        let (project, status) = (status.project.to_string(), serde_json::to_string(status)?);
        let save = move |database: &Database| {
            database.write("save how a project's backups stand", |transaction| {
                transaction
                    .prepare_cached("INSERT OR REPLACE INTO status (project, status) VALUES (?1, ?2)")?
                    .execute((project, status))?;
                Ok(())
            })
        };
        self.blocking(save).await
    }

    async fn remove(&self, project: ProjectId) -> Result<(), BoxError> {
        let remove = move |database: &Database| {
            database.write("forget how a project's backups stood", |transaction| {
                transaction.execute("DELETE FROM status WHERE project = ?1", [project.to_string()])?;
                Ok(())
            })
        };
        self.blocking(remove).await
    }
}

#[cfg(test)]
mod tests {
    use cocalc_ids::{Epoch, Timestamp};

    use super::*;

    #[tokio::test]
    async fn what_is_pending_is_pending_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("backups.db");
        let mut status = Status::new(ProjectId::random(), Epoch::FIRST);
        let store = HostBackups::open(&path).unwrap();
        store.save(&status).await.unwrap();
        status.pending_since = Some(Timestamp::from_secs(7));
        store.save(&status).await.unwrap();
        drop(store);
        let store = HostBackups::open(&path).unwrap();
        assert_eq!(store.load().await.unwrap(), std::slice::from_ref(&status));
        store.remove(status.project).await.unwrap();
        store.remove(status.project).await.unwrap();
        assert!(store.load().await.unwrap().is_empty());
    }
}
