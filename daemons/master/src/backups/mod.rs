//! Backups at the master: where they go, the keys of repositories, and what is
//! done to repositories with credentials that no host gets.

mod access;
mod config;
mod keys;
mod tend;

use std::{fmt, path::Path, sync::Arc};

use async_trait::async_trait;
use cocalc_backup::{
    Access, Bounds, Minter, Place, Places as _, Repositories, Repository, RepositoryKey, RepositoryName,
    Rustic, Secret,
};
use cocalc_core::{
    BoxError,
    backups::{self, Policy},
    clock::Clock,
};
use cocalc_ids::ProjectId;
use cocalc_sqlite::master::{self as store, BackupKey, BackupRepository, Store};
use tokio::sync::Semaphore;

pub use self::config::{BackupsConfig, Layout};
use self::keys::Wrapping;
pub(crate) use self::tend::{LastDrill, Tended, keep_tending, tend};
use crate::shared::on_store;

/// How many questions about what is in repositories are answered at once: each
/// is a process that reads an index.
const QUESTIONS_MAX: usize = 4;

/// The backups of a federation that has some.
pub(crate) struct Backups {
    pub(crate) config: BackupsConfig,
    repositories: Arc<Own>,
    rustic: Rustic,
    /// How many jobs go on at once.
    places: Arc<Semaphore>,
    /// How many questions are answered at once.
    questions: Semaphore,
    /// What was done.
    pub(crate) tended: Tended,
}

impl fmt::Debug for Backups {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backups").field("place", &self.config.place).finish_non_exhaustive()
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
        let minter = |place: &Place| Minter::new(place.clone(), config.worker.clone(), Bounds::default());
        let repositories = Arc::new(Own {
            minter: minter(&config.place)?,
            mirror: config.mirror.as_ref().map(minter).transpose()?,
            config: config.clone(),
            wrapping,
            rotation: tokio::sync::RwLock::default(),
            store,
            clock,
        });
        let mut rustic = Rustic::builder(Arc::clone(&repositories) as Arc<dyn Repositories>);
        if let Some(worker) = &config.worker {
            rustic = rustic.worker(worker);
        }
        let places = Arc::new(Semaphore::new(config.jobs_max.into()));
        let questions = Semaphore::new(QUESTIONS_MAX);
        let rustic = rustic.build()?;
        Ok(Self { rustic, repositories, places, questions, tended: Tended::default(), config })
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
        match &self.config.place {
            Place::Directory { path } => path.display().to_string(),
            Place::S3(s3) => format!("s3:{}/{}", s3.bucket, s3.prefix),
            Place::Gcs(gcs) => format!("gs:{}/{}", gcs.bucket, gcs.prefix),
        }
    }

    /// What stock restic needs to restore a project without this federation,
    /// credentials of a cloud apart. `None` if it never had a backup.
    pub(crate) async fn escrow(&self, project: ProjectId) -> Result<Option<Secret>, BoxError> {
        let own = &self.repositories;
        let Some((_, key)) = own.find(project).await? else { return Ok(None) };
        let name: RepositoryName = key.name.parse()?;
        let opened = own.wrapping.unwrap(name, &key.wrapped)?;
        Ok(Some(opened.escrow(name, &self.config.place.shown(name))))
    }

    /// Wraps all keys of repositories with a new key, and drops those before.
    /// How many there are, and the name of the new one.
    pub(crate) async fn rotate(&self) -> Result<(u64, String), BoxError> {
        let own = &self.repositories;
        let _alone = own.rotation.write().await;
        let current = own.wrapping.rotate(own.clock.wall())?;
        let (mut after, mut count, mut left) = (String::new(), 0, 0);
        loop {
            let begin = after.clone();
            let page = on_store(&own.store, move |store| store.backup_keys(&begin, 500)).await?;
            let Some(last) = page.last() else { break };
            after.clone_from(&last.name);
            for row in page {
                if Wrapping::wrapped_by(&row.wrapped).as_deref() != Some(&*current) {
                    let name: RepositoryName = row.name.parse()?;
                    let key = own.wrapping.unwrap(name, &row.wrapped)?;
                    let wrapped = own.wrapping.wrap(name, &key)?;
                    let done = on_store(&own.store, move |store| store.rewrap_backup_key(&row, &wrapped));
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
    minter: Minter,
    mirror: Option<Minter>,
    wrapping: Wrapping,
    /// Held by who wraps a key until it is stored, and alone by a rotation: what
    /// it retires wraps nothing that it has not seen.
    rotation: tokio::sync::RwLock<()>,
    store: Arc<Store>,
    clock: Arc<dyn Clock>,
}

impl fmt::Debug for Own {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Own").finish_non_exhaustive()
    }
}

impl Own {
    async fn find(&self, project: ProjectId) -> store::Result<Option<(BackupRepository, BackupKey)>> {
        on_store(&self.store, move |store| store.backup_repository(project)).await
    }

    /// The repository of a project and its key; made, and kept, if there is
    /// none.
    async fn key(&self, project: ProjectId) -> Result<(RepositoryName, RepositoryKey), BoxError> {
        let _wraps = self.rotation.read().await;
        let (now, shared) = (self.clock.wall(), self.config.layout == Layout::Shared);
        let per_shard = shared.then_some(self.config.projects_per_shard);
        if self.find(project).await?.is_none() {
            let make = move |store: &Store| store.make_backup_repository(project, per_shard, now);
            on_store(&self.store, make).await?;
        }
        let (row, mut key) = self.find(project).await?.ok_or("the repository was erased just now")?;
        let name: RepositoryName = row.name.parse()?;
        if key.wrapped.is_empty() {
            // Durable before anything is encrypted with it; somebody else may
            // be first: what is stored counts.
            let wrapped = self.wrapping.wrap(name, &RepositoryKey::generate()?)?;
            on_store(&self.store, move |store| store.rewrap_backup_key(&key, &wrapped)).await?;
            key = self.find(project).await?.ok_or("the repository was erased just now")?.1;
        }
        Ok((name, self.wrapping.unwrap(name, &key.wrapped)?))
    }
}

#[async_trait]
impl Repositories for Own {
    async fn repository(&self, project: ProjectId, access: Access) -> Result<Repository, BoxError> {
        let (name, key) = self.key(project).await?;
        let mirror = match &self.mirror {
            Some(minter) => Some(minter.location(name, access).await?),
            None => None,
        };
        let location = self.minter.location(name, access).await?;
        let shared = matches!(name, RepositoryName::Shard(_));
        Ok(Repository { location, key, shared, mirror })
    }

    async fn erased(&self, project: ProjectId) -> Result<(), BoxError> {
        Ok(on_store(&self.store, move |store| store.forget_backup_repository(project)).await?)
    }
}
