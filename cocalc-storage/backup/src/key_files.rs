//! Wrapped keys as files of a directory, one per repository.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use cocalc_core::{BoxError, ids::ProjectId};
use tokio::{fs, io::AsyncWriteExt as _};

use crate::{
    key::{KeyError, RepositoryKey, WrappedKey, WrappingKeys},
    name::RepositoryName,
    rustic::Rustic,
};

/// The directory. One change at a time.
#[derive(Clone, Debug)]
pub(crate) struct KeyFiles {
    directory: PathBuf,
    wrapping: WrappingKeys,
    one_at_a_time: Arc<tokio::sync::Mutex<()>>,
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

impl KeyFiles {
    pub(crate) fn new(directory: impl Into<PathBuf>, wrapping: WrappingKeys) -> Self {
        Self { directory: directory.into(), wrapping, one_at_a_time: Arc::default() }
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// The key of a repository. A new one is durable before it is given out, so
    /// before anything is encrypted with it.
    pub(crate) async fn key(&self, name: RepositoryName) -> Result<RepositoryKey, KeyStoreError> {
        let _one = self.one_at_a_time.lock().await;
        if let Some(key) = self.stored(name).await? {
            return Ok(key);
        }
        let key = RepositoryKey::generate()?;
        self.store(name, &key).await?;
        Ok(key)
    }

    /// Wraps a key with the current wrapping key.
    pub(crate) async fn rewrap(&self, name: RepositoryName) -> Result<(), KeyStoreError> {
        let _one = self.one_at_a_time.lock().await;
        if let Some(key) = self.stored(name).await? {
            self.store(name, &key).await?;
        }
        Ok(())
    }

    /// Gives a repository, which `project` has backups in, a new password. It
    /// opens the repository before its file says so, and the former one until
    /// after that: at any moment, the password in the file opens it.
    pub(crate) async fn rotate_password(
        &self,
        name: RepositoryName,
        project: ProjectId,
        backups: &Rustic,
    ) -> Result<(), BoxError> {
        let next = self.key(name).await?.with_new_password()?;
        backups.add_password(project, &next.password).await?;
        {
            let _one = self.one_at_a_time.lock().await;
            self.store(name, &next).await?;
        }
        Ok(backups.keep_password(project).await?)
    }

    /// Deletes a key, and with it all that it encrypts.
    pub(crate) async fn forget(&self, name: RepositoryName) -> Result<(), KeyStoreError> {
        let _one = self.one_at_a_time.lock().await;
        let path = self.file(name);
        let removed = async {
            match fs::remove_file(&path).await {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => fs::File::open(&self.directory).await?.sync_all().await,
            }
        };
        removed.await.map_err(|source| KeyStoreError::File { path: path.clone(), source })
    }

    fn file(&self, name: RepositoryName) -> PathBuf {
        self.directory.join(format!("{name}.json"))
    }

    async fn stored(&self, name: RepositoryName) -> Result<Option<RepositoryKey>, KeyStoreError> {
        let path = self.file(name);
        match fs::read(&path).await {
            Ok(text) => {
                let wrapped: WrappedKey = serde_json::from_slice(&text).map_err(|_| KeyError::Malformed)?;
                Ok(Some(self.wrapping.unwrap(name, &wrapped)?))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(KeyStoreError::File { path, source }),
        }
    }

    async fn store(&self, name: RepositoryName, key: &RepositoryKey) -> Result<(), KeyStoreError> {
        let path = self.file(name);
        let wrapped = self.wrapping.wrap(name, key)?;
        let text = serde_json::to_vec_pretty(&wrapped).map_err(|_| KeyError::Malformed)?;
        write_durably(&self.directory, &path, &text)
            .await
            .map_err(|source| KeyStoreError::File { path, source })
    }
}

/// Replaces a file in `directory`, whole or not at all.
pub(crate) async fn write_durably(directory: &Path, path: &Path, text: &[u8]) -> io::Result<()> {
    let staged = path.with_extension("new");
    let mut options = fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&staged).await?;
    file.write_all(text).await?;
    file.sync_all().await?;
    fs::rename(&staged, path).await?;
    fs::File::open(directory).await?.sync_all().await
}
