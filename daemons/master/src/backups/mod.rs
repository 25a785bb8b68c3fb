//! Backups at the master: where they go, the keys of repositories, and what is
//! done to repositories with credentials that no host gets.

mod access;
mod config;
mod keys;
mod places;
mod tend;

use std::{fmt, path::Path, sync::Arc};

use async_trait::async_trait;
use cocalc_backup::{Access, Location, Repositories, Repository, RepositoryKey, Rustic, Secret};
use cocalc_core::{
    BoxError,
    backups::{self, Policy},
    clock::Clock,
};
use cocalc_ids::{ProjectId, Timestamp};
use cocalc_sqlite::master::{self as store, Store};
use tokio::sync::Semaphore;

pub use self::config::{BackupsConfig, PlaceKind};
use self::keys::Wrapping;
pub(crate) use self::tend::tend;
use crate::shared::on_store;

/// The backups of a federation that has some.
pub(crate) struct Backups {
    pub(crate) config: BackupsConfig,
    repositories: Arc<Own>,
    rustic: Rustic,
    /// How many jobs go on at once.
    places: Arc<Semaphore>,
}

impl fmt::Debug for Backups {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backups").field("place", &places::shown(&self.config)).finish_non_exhaustive()
    }
}

impl Backups {
    /// Reads the wrapping keys, or makes them.
    pub(crate) fn open(
        config: BackupsConfig,
        data_dir: &Path,
        store: Arc<Store>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, BoxError> {
        let wrapping = Wrapping::open(data_dir.join("backup-keys"), clock.wall())?;
        let repositories = Arc::new(Own { config: config.clone(), wrapping, store, clock });
        let mut rustic = Rustic::builder(Arc::clone(&repositories) as Arc<dyn Repositories>);
        if let Some(worker) = &config.worker {
            rustic = rustic.worker(worker);
        }
        let places = Arc::new(Semaphore::new(config.jobs_max.into()));
        Ok(Self { rustic: rustic.build()?, repositories, places, config })
    }

    /// For projects whose owners have said nothing.
    pub(crate) fn policy(&self) -> Policy {
        self.config.policy.clone()
    }

    /// The master's own way to repositories, with every right.
    pub(crate) fn own(&self) -> &dyn backups::Backups {
        &self.rustic
    }

    /// Where all of them are, for people.
    pub(crate) fn shown(&self) -> String {
        places::shown(&self.config)
    }

    /// What stock restic needs to restore a project without this federation,
    /// credentials apart. [`store::Error::NotFound`] if it never had a backup.
    pub(crate) async fn escrow(&self, project: ProjectId) -> Result<Option<Secret>, BoxError> {
        let Some(found) = self.repositories.find(project).await? else { return Ok(None) };
        let key = self.repositories.wrapping.unwrap(project, &found.wrapped)?;
        let place = places::location(&self.config, project, Access::Read).await?;
        Ok(Some(key.escrow(project, &place)))
    }

    /// Wraps all keys of repositories with a new key, and drops those before.
    /// How many there are, and the name of the new one.
    pub(crate) async fn rotate(&self) -> Result<(u64, String), BoxError> {
        let own = &self.repositories;
        let current = own.wrapping.rotate(own.clock.wall())?;
        let (mut after, mut count, mut left) = (None, 0, 0);
        loop {
            let page = on_store(&own.store, move |store| store.backup_repositories(after, 500)).await?;
            let Some(last) = page.last() else { break };
            after = Some(last.project);
            for row in page {
                if Wrapping::wrapped_by(&row.wrapped).as_deref() != Some(&*current) {
                    let key = own.wrapping.unwrap(row.project, &row.wrapped)?;
                    let wrapped = own.wrapping.wrap(row.project, &key)?;
                    let (project, before) = (row.project, row.wrapped);
                    let done = on_store(&own.store, move |store| {
                        store.rewrap_backup_key(project, &before, &wrapped)
                    });
                    left += u64::from(!done.await?);
                }
                count += 1;
            }
        }
        // Only when nothing needs them any more.
        if left == 0 {
            own.wrapping.retire()?;
        }
        Ok((count, current))
    }
}

/// The repositories, as the master opens them itself.
struct Own {
    config: BackupsConfig,
    wrapping: Wrapping,
    store: Arc<Store>,
    clock: Arc<dyn Clock>,
}

impl fmt::Debug for Own {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Own").finish_non_exhaustive()
    }
}

impl Own {
    async fn find(&self, project: ProjectId) -> store::Result<Option<store::BackupRepository>> {
        on_store(&self.store, move |store| store.backup_repository(project)).await
    }

    /// The key of a project's repository; made, and kept, if it has none.
    async fn key(&self, project: ProjectId) -> Result<RepositoryKey, BoxError> {
        let found = match self.find(project).await? {
            Some(found) => found,
            None => {
                let wrapped = self.wrapping.wrap(project, &RepositoryKey::generate()?)?;
                let now: Timestamp = self.clock.wall();
                // Somebody else may be first: what is stored counts.
                on_store(&self.store, move |store| store.make_backup_repository(project, &wrapped, now))
                    .await?
            }
        };
        self.wrapping.unwrap(project, &found.wrapped)
    }

    async fn place(&self, project: ProjectId, access: Access) -> Result<Location, BoxError> {
        places::location(&self.config, project, access).await
    }
}

#[async_trait]
impl Repositories for Own {
    async fn repository(&self, project: ProjectId, access: Access) -> Result<Repository, BoxError> {
        let location = self.place(project, access).await?;
        Ok(Repository { location, key: self.key(project).await? })
    }

    async fn erased(&self, project: ProjectId) -> Result<(), BoxError> {
        Ok(on_store(&self.store, move |store| store.forget_backup_repository(project)).await?)
    }
}
