//! A host's ledger in SQLite.

use std::{fmt, path::Path, sync::Arc};

use async_trait::async_trait;
use cocalc_core::{
    BoxError,
    grant::{Entry, LedgerStore},
};

use crate::{Database, Durability, Error, database};

/// Published migrations never change; new ones go to the end.
const MIGRATIONS: [&str; 1] = [
    // The entry is one JSON value: the host reads all of it when it starts,
    // and nothing ever searches in it.
    "CREATE TABLE ledger (project TEXT PRIMARY KEY, entry TEXT NOT NULL) STRICT, WITHOUT ROWID;",
];

/// Keeps which projects a host was granted, has frozen and expects. A file of
/// its own, with `synchronous=FULL`: what a host may run has to survive a loss
/// of power.
#[derive(Clone)]
pub struct HostLedger(Arc<Database>);

impl fmt::Debug for HostLedger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostLedger").finish_non_exhaustive()
    }
}

impl HostLedger {
    /// Opens `path`, or creates it.
    ///
    /// # Errors
    ///
    /// As [`Database::open`].
    pub fn open(path: &Path) -> Result<Self, Error> {
        Ok(Self(Arc::new(Database::open(path, Durability::Full, &MIGRATIONS)?)))
    }

    /// Runs `work`, which blocks, to its end, also if the caller goes away.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, BoxError> {
        let database = Arc::clone(&self.0);
        Ok(tokio::task::spawn_blocking(move || work(&database)).await??)
    }
}

#[async_trait]
impl LedgerStore for HostLedger {
    async fn load(&self) -> Result<Vec<Entry>, BoxError> {
        let load = |database: &Database| {
            database.read("load the ledger", |connection| {
                let mut rows = connection.prepare("SELECT entry FROM ledger ORDER BY project")?;
                let entries = rows.query_map([], |row| database::json(row, 0))?;
                Ok(entries.collect::<Result<_, _>>()?)
            })
        };
        self.blocking(load).await
    }

    async fn save(&self, entry: &Entry) -> Result<(), BoxError> {
        let (project, entry) = (entry.project.to_string(), serde_json::to_string(entry)?);
        let save = move |database: &Database| {
            database.write("save an entry of the ledger", |transaction| {
                transaction
                    .prepare_cached("INSERT OR REPLACE INTO ledger (project, entry) VALUES (?1, ?2)")?
                    .execute((project, entry))?;
                Ok(())
            })
        };
        self.blocking(save).await
    }
}

#[cfg(test)]
mod tests {
    use cocalc_core::{control::ProjectConfig, grant::Ledger};
    use cocalc_ids::{Epoch, HostId, MoveId, ProjectId};

    use super::*;

    #[tokio::test]
    async fn what_was_granted_and_frozen_is_there_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.db");
        let host = HostId::random();
        let (kept, gone) = (ProjectId::random(), ProjectId::random());
        let config = ProjectConfig { quota_bytes: Some(1 << 30), ..ProjectConfig::default() };
        let before = {
            let ledger = Ledger::open(host, Arc::new(HostLedger::open(&path).unwrap())).await.unwrap();
            ledger.create(kept, Epoch::FIRST, config.clone()).await.unwrap();
            ledger.create(gone, Epoch::FIRST, config).await.unwrap();
            ledger.delete(gone, Epoch::FIRST).await.unwrap();
            ledger.entries()
        };
        let store = HostLedger::open(&path).unwrap();
        let mut frozen = store.load().await.unwrap().into_iter().find(|e| e.project == kept).unwrap();
        frozen.freeze(MoveId::random(), Epoch::FIRST, true).unwrap();
        store.save(&frozen).await.unwrap();
        let ledger = Ledger::open(host, Arc::new(store)).await.unwrap();
        assert_eq!(ledger.entries().len(), before.len());
        assert_eq!(ledger.entry(kept), Some(frozen));
        assert!(ledger.permit(kept, Epoch::FIRST).is_err());
        assert!(ledger.permit(gone, Epoch::FIRST).is_err());
    }

    #[tokio::test]
    async fn a_damaged_entry_is_an_error_and_not_an_empty_ledger() {
        let dir = tempfile::tempdir().unwrap();
        let store = HostLedger::open(&dir.path().join("ledger.db")).unwrap();
        let spoil = |database: &Database| {
            database.write("spoil", |transaction| {
                transaction.execute("INSERT INTO ledger VALUES ('x', '{\"granted\":0}')", [])?;
                Ok::<_, crate::error::Fault<Error>>(())
            })
        };
        store.blocking(spoil).await.unwrap();
        assert!(store.load().await.is_err());
        assert!(Ledger::open(HostId::random(), Arc::new(store)).await.is_err());
    }
}
