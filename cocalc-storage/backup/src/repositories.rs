//! Which repository holds the backups of a project, and who may open it.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
pub use cocalc_core::backups::Access;
use cocalc_core::{BoxError, ids::ProjectId};
use tokio::{fs, io::AsyncWriteExt as _};

use crate::{
    key::{KeyError, RepositoryKey, WrappedKey, WrappingKeys},
    location::{Location, Repository, Secret},
};

/// Knows the repositories.
///
/// A host implements it by asking its master, which hands out credentials for
/// the repositories of that host's projects only, short-lived where the cloud
/// offers it. Each call asks anew, so that a call that failed because
/// credentials ran out succeeds when it is repeated.
#[async_trait]
pub trait Repositories: fmt::Debug + Send + Sync + 'static {
    /// The repository of `project`, with credentials for `access`. The same
    /// place and key each time, whether or not it has been used before.
    async fn repository(&self, project: ProjectId, access: Access) -> Result<Repository, BoxError>;

    /// Called when the backups of `project` are erased: its key is not needed
    /// any more, and what is left anywhere is beyond reading once it is gone.
    async fn erased(&self, project: ProjectId) -> Result<(), BoxError>;
}

/// A repository for each project, with its own key: nothing is shared, a prune
/// never waits for others, and erasing a project erases its key.
///
/// Wrapped keys are files of a directory, one per project. With the wrapping
/// keys it opens everything: keep it where the master keeps its database.
#[derive(Clone)]
pub struct OnePerProject {
    keys: PathBuf,
    wrapping: WrappingKeys,
    place: Arc<dyn Fn(ProjectId) -> Location + Send + Sync>,
    one_at_a_time: Arc<tokio::sync::Mutex<()>>,
}

impl fmt::Debug for OnePerProject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OnePerProject").field("keys", &self.keys).finish_non_exhaustive()
    }
}

impl OnePerProject {
    /// Keeps wrapped keys in `keys`, a directory that exists, and repositories
    /// where `place` says, which must name another place for each project.
    pub fn new(
        keys: impl Into<PathBuf>,
        wrapping: WrappingKeys,
        place: impl Fn(ProjectId) -> Location + Send + Sync + 'static,
    ) -> Self {
        Self { keys: keys.into(), wrapping, place: Arc::new(place), one_at_a_time: Arc::default() }
    }

    /// Keeps repositories as directories of `root`, which must exist.
    pub fn in_directory(keys: impl Into<PathBuf>, wrapping: WrappingKeys, root: impl Into<PathBuf>) -> Self {
        let root = root.into();
        Self::new(keys, wrapping, move |project| Location::Directory { path: root.join(project.to_string()) })
    }

    /// The escrow file of a project: what stock restic needs.
    ///
    /// # Errors
    ///
    /// If its key cannot be read or opened.
    pub async fn escrow(&self, project: ProjectId) -> Result<Secret, KeyStoreError> {
        Ok(self.key(project).await?.escrow(project, &(self.place)(project)))
    }

    /// Wraps the key of a project with the current wrapping key, if another
    /// wrapped it, so that the former can be retired.
    ///
    /// # Errors
    ///
    /// If its key cannot be read, opened or written. The former file is whole
    /// then.
    pub async fn rewrap(&self, project: ProjectId) -> Result<(), KeyStoreError> {
        let _one = self.one_at_a_time.lock().await;
        if let Some(key) = self.stored(project).await? {
            self.store(project, &key).await?;
        }
        Ok(())
    }

    fn file(&self, project: ProjectId) -> PathBuf {
        self.keys.join(format!("{project}.json"))
    }

    async fn key(&self, project: ProjectId) -> Result<RepositoryKey, KeyStoreError> {
        let _one = self.one_at_a_time.lock().await;
        if let Some(key) = self.stored(project).await? {
            return Ok(key);
        }
        // The key is durable before anything is encrypted with it.
        let key = RepositoryKey::generate()?;
        self.store(project, &key).await?;
        Ok(key)
    }

    async fn stored(&self, project: ProjectId) -> Result<Option<RepositoryKey>, KeyStoreError> {
        let path = self.file(project);
        match fs::read(&path).await {
            Ok(text) => {
                let wrapped: WrappedKey = serde_json::from_slice(&text).map_err(|_| KeyError::Malformed)?;
                Ok(Some(self.wrapping.unwrap(project, &wrapped)?))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(KeyStoreError::File { path, source }),
        }
    }

    async fn store(&self, project: ProjectId, key: &RepositoryKey) -> Result<(), KeyStoreError> {
        let path = self.file(project);
        let wrapped = self.wrapping.wrap(project, key)?;
        let text = serde_json::to_vec_pretty(&wrapped).map_err(|_| KeyError::Malformed)?;
        write_durably(&self.keys, &path, &text).await.map_err(|source| KeyStoreError::File { path, source })
    }
}

/// The key of a repository cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyStoreError {
    /// It does not open.
    #[error("the key of the repository does not open")]
    Key(#[from] KeyError),
    /// Its file cannot be read or written.
    #[error("cannot read or write {}", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

#[async_trait]
impl Repositories for OnePerProject {
    async fn repository(&self, project: ProjectId, _: Access) -> Result<Repository, BoxError> {
        Ok(Repository { location: (self.place)(project), key: self.key(project).await? })
    }

    async fn erased(&self, project: ProjectId) -> Result<(), BoxError> {
        let _one = self.one_at_a_time.lock().await;
        match fs::remove_file(self.file(project)).await {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(fs::File::open(&self.keys).await?.sync_all().await?),
        }
    }
}

async fn write_durably(directory: &Path, path: &Path, text: &[u8]) -> io::Result<()> {
    let staged = path.with_extension("new");
    let mut options = fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&staged).await?;
    file.write_all(text).await?;
    file.sync_all().await?;
    fs::rename(&staged, path).await?;
    fs::File::open(directory).await?.sync_all().await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::WrappingKey;

    #[tokio::test]
    async fn keys_are_kept_rewrapped_and_forgotten() {
        let root = tempfile::tempdir().unwrap();
        let mut wrapping = WrappingKeys::new(WrappingKey::generate("one").unwrap());
        let project = ProjectId::random();
        let open =
            |wrapping: &WrappingKeys| OnePerProject::in_directory(root.path(), wrapping.clone(), "/srv");
        let first = open(&wrapping).repository(project, Access::Append).await.unwrap();
        assert_eq!(open(&wrapping).repository(project, Access::Read).await.unwrap(), first);
        wrapping.rotate(WrappingKey::generate("two").unwrap());
        open(&wrapping).rewrap(project).await.unwrap();
        wrapping.retire("one");
        assert_eq!(open(&wrapping).repository(project, Access::Read).await.unwrap(), first);
        let escrow = open(&wrapping).escrow(project).await.unwrap();
        assert!(escrow.expose().contains(&format!("RESTIC_REPOSITORY='/srv/{project}'")));
        open(&wrapping).erased(project).await.unwrap();
        open(&wrapping).erased(project).await.unwrap();
        assert_ne!(open(&wrapping).repository(project, Access::Read).await.unwrap().key, first.key);
    }
}
