//! Repositories that many projects share.

use std::{fmt, io, path::PathBuf, sync::Arc};

use async_trait::async_trait;
use cocalc_core::{BoxError, ids::ProjectId};
use tokio::{fs, sync::Mutex};

use crate::{
    key::WrappingKeys,
    key_files::{KeyFiles, write_durably},
    location::{Repository, Secret},
    mint::Places,
    name::ShardId,
    repositories::{Access, Repositories, in_directory},
    rustic::Rustic,
    shards::{Shards, ShardsError},
};

/// The file that says which project is in which shard.
const FILE: &str = "shards.json";

/// Repositories that are shared by up to a number of projects each, so that what
/// they have in common is stored once.
///
/// The price: whoever may back up one of them holds the key of all in the same
/// shard, a prune tidies the whole shard, and erasing a project frees its space
/// only with the prunes that follow. So this is for projects of people who trust
/// each other, or whose hosts are trusted.
pub struct SharedShards {
    keys: KeyFiles,
    places: Arc<dyn Places>,
    shards: Mutex<Shards>,
}

impl fmt::Debug for SharedShards {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedShards").field("keys", &self.keys).finish_non_exhaustive()
    }
}

/// Shards cannot be read or kept.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SharedShardsError {
    /// The file cannot be read or written.
    #[error("cannot read or write {}", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not such a file.
    #[error("{} does not say which project is in which shard", path.display())]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// It contradicts itself.
    #[error("the shards cannot be")]
    Shards(#[from] ShardsError),
}

impl SharedShards {
    /// Keeps wrapped keys, and which project is where, in `keys`, a directory that
    /// exists, and shards where `places` says. Each is sealed at `projects_max`
    /// projects, as a rule [`Shards::PROJECTS_MAX`].
    ///
    /// # Errors
    ///
    /// If what was kept cannot be read.
    pub async fn open(
        keys: impl Into<PathBuf>,
        wrapping: WrappingKeys,
        places: impl Places,
        projects_max: u32,
    ) -> Result<Self, SharedShardsError> {
        let keys = KeyFiles::new(keys, wrapping);
        let path = keys.directory().join(FILE);
        let mut shards = match fs::read(&path).await {
            Ok(text) => serde_json::from_slice::<Shards>(&text)
                .map_err(|source| SharedShardsError::Malformed { path, source })?
                .checked()?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Shards::new(projects_max)?,
            Err(source) => return Err(SharedShardsError::File { path, source }),
        };
        shards.seal_at(projects_max)?;
        Ok(Self { keys, places: Arc::new(places), shards: Mutex::new(shards) })
    }

    /// Keeps shards as directories of `root`, which must exist.
    ///
    /// # Errors
    ///
    /// If what was kept cannot be read.
    pub async fn in_directory(
        keys: impl Into<PathBuf>,
        wrapping: WrappingKeys,
        root: impl Into<PathBuf>,
        projects_max: u32,
    ) -> Result<Self, SharedShardsError> {
        Self::open(keys, wrapping, in_directory(root), projects_max).await
    }

    /// Which project is where.
    pub async fn shards(&self) -> Shards {
        self.shards.lock().await.clone()
    }

    /// The escrow file of a shard: what stock restic needs for all in it.
    ///
    /// # Errors
    ///
    /// If its key cannot be read or opened, or its place is not known.
    pub async fn escrow(&self, shard: ShardId) -> Result<Secret, BoxError> {
        let location = self.places.location(shard.into(), Access::Read).await?;
        Ok(self.keys.key(shard.into()).await?.escrow(shard, &location))
    }

    /// Wraps the key of a shard with the current wrapping key.
    ///
    /// # Errors
    ///
    /// If its key cannot be read, opened or written.
    pub async fn rewrap(&self, shard: ShardId) -> Result<(), BoxError> {
        Ok(self.keys.rewrap(shard.into()).await?)
    }

    /// Gives the shard that has the project's backups a new password, as
    /// [`OnePerProject::rotate_password`](crate::OnePerProject::rotate_password).
    ///
    /// # Errors
    ///
    /// If the project is in no shard, the key cannot be read or written, or the
    /// repository not changed.
    pub async fn rotate_password(&self, project: ProjectId, backups: &Rustic) -> Result<(), BoxError> {
        let shard = self.shards.lock().await.of(project).ok_or("the project has no backups")?;
        self.keys.rotate_password(shard.into(), project, backups).await
    }

    async fn keep(&self, shards: &Shards) -> Result<(), SharedShardsError> {
        let path = self.keys.directory().join(FILE);
        let text = serde_json::to_vec(shards)
            .map_err(|source| SharedShardsError::Malformed { path: path.clone(), source })?;
        write_durably(self.keys.directory(), &path, &text)
            .await
            .map_err(|source| SharedShardsError::File { path, source })
    }

    async fn shard(&self, project: ProjectId, access: Access) -> Result<ShardId, SharedShardsError> {
        let mut shards = self.shards.lock().await;
        if let Some(shard) = shards.of(project) {
            return Ok(shard);
        }
        if access != Access::Append {
            // It has no backups yet; the shard it would get has none of it.
            return Ok(shards.next());
        }
        let mut next = shards.clone();
        let shard = next.assign(project);
        self.keep(&next).await?;
        *shards = next;
        Ok(shard)
    }
}

#[async_trait]
impl Repositories for SharedShards {
    async fn repository(&self, project: ProjectId, access: Access) -> Result<Repository, BoxError> {
        let shard = self.shard(project, access).await?;
        let key = self.keys.key(shard.into()).await?;
        let location = self.places.location(shard.into(), access).await?;
        Ok(Repository { shared: true, ..Repository::new(location, key) })
    }

    async fn erased(&self, project: ProjectId) -> Result<(), BoxError> {
        let mut shards = self.shards.lock().await;
        let mut next = shards.clone();
        if next.erased(project).is_some() {
            self.keep(&next).await?;
            *shards = next;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::WrappingKey;

    #[tokio::test]
    async fn shards_and_their_keys_outlive_a_restart() {
        let root = tempfile::tempdir().unwrap();
        let wrapping = WrappingKeys::new(WrappingKey::generate("one").unwrap());
        let open = || SharedShards::in_directory(root.path(), wrapping.clone(), "/srv", 2);
        let projects: Vec<_> = (0..5).map(|_| ProjectId::random()).collect();
        let mut first = Vec::new();
        for project in &projects {
            first.push(open().await.unwrap().repository(*project, Access::Append).await.unwrap());
        }
        let shards = open().await.unwrap();
        for (project, repository) in projects.iter().zip(&first) {
            assert_eq!(shards.repository(*project, Access::Read).await.unwrap(), *repository);
        }
        assert!(first[0] == first[1] && first[2] == first[3] && first[0] != first[2]);
        // Whoever only looks gets no place.
        let known = shards.shards().await;
        shards.repository(ProjectId::random(), Access::Read).await.unwrap();
        assert_eq!(shards.shards().await, known);
        shards.erased(projects[0]).await.unwrap();
        let again = open().await.unwrap().repository(projects[0], Access::Append).await.unwrap();
        assert_ne!(again, first[0], "the room of what was erased was given away");
        assert_eq!(again, first[4], "the open shard takes it");
        fs::write(root.path().join(FILE), "{}").await.unwrap();
        assert!(matches!(open().await, Err(SharedShardsError::Malformed { .. })));
    }
}
