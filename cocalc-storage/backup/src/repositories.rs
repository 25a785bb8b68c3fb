//! Which repository holds the backups of a project, and who may open it.

use std::{fmt, path::PathBuf, sync::Arc};

use async_trait::async_trait;
pub use cocalc_core::backups::Access;
use cocalc_core::{BoxError, ids::ProjectId};

use crate::{
    key::WrappingKeys,
    key_files::{KeyFiles, KeyStoreError},
    location::{Repository, Secret},
    mint::Places,
    name::RepositoryName,
    place::{Given, Place},
    rustic::Rustic,
};

/// Knows the repositories.
///
/// A host implements it by asking its master, which hands out credentials for
/// the repositories of that host's projects only, short-lived where the cloud
/// offers it. Each call asks anew, and asks again when the credentials run out
/// in its middle; then it goes on with what it gets.
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
    keys: KeyFiles,
    places: Arc<dyn Places>,
    mirror: Option<Arc<dyn Places>>,
}

impl fmt::Debug for OnePerProject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OnePerProject").field("keys", &self.keys).finish_non_exhaustive()
    }
}

impl OnePerProject {
    /// Keeps wrapped keys in `keys`, a directory that exists, and repositories
    /// where `places` says, which must name another place for each name: a
    /// [`Minter`](crate::Minter), or a function.
    pub fn new(keys: impl Into<PathBuf>, wrapping: WrappingKeys, places: impl Places) -> Self {
        Self { keys: KeyFiles::new(keys, wrapping), places: Arc::new(places), mirror: None }
    }

    /// Keeps repositories as directories of `root`, which must exist.
    pub fn in_directory(keys: impl Into<PathBuf>, wrapping: WrappingKeys, root: impl Into<PathBuf>) -> Self {
        Self::new(keys, wrapping, in_directory(root))
    }

    /// Keeps copies where `places` says. Default: none.
    #[must_use]
    pub fn mirrored(self, places: impl Places) -> Self {
        Self { mirror: Some(Arc::new(places)), ..self }
    }

    /// The escrow file of a project: what stock restic needs.
    ///
    /// # Errors
    ///
    /// If its key cannot be read or opened, or its place is not known.
    pub async fn escrow(&self, project: ProjectId) -> Result<Secret, BoxError> {
        let location = self.places.location(project.into(), Access::Read).await?;
        Ok(self.keys.key(project.into()).await?.escrow(project, &location))
    }

    /// Wraps the key of a project with the current wrapping key, so that a
    /// former one can be retired.
    ///
    /// # Errors
    ///
    /// If its key cannot be read, opened or written. The former file is whole
    /// then.
    pub async fn rewrap(&self, project: ProjectId) -> Result<(), KeyStoreError> {
        self.keys.rewrap(project.into()).await
    }

    /// Gives the project's repository a new password: only the escrow file that
    /// is made afterwards opens it. If this fails or is cut off, the former
    /// escrow file or the new one opens it; then repeat it.
    ///
    /// # Errors
    ///
    /// If the key cannot be read or written, or the repository not changed.
    pub async fn rotate_password(&self, project: ProjectId, backups: &Rustic) -> Result<(), BoxError> {
        self.keys.rotate_password(project.into(), project, backups).await
    }
}

/// A directory of `root` for each repository.
pub(crate) fn in_directory(root: impl Into<PathBuf>) -> impl Places {
    let place = Place::Directory { path: root.into() };
    move |name: RepositoryName, access: Access| match place.give(name, access) {
        Given::Location(location) => location,
        Given::Mint(_) => place.shown(name),
    }
}

#[async_trait]
impl Repositories for OnePerProject {
    async fn repository(&self, project: ProjectId, access: Access) -> Result<Repository, BoxError> {
        let name = project.into();
        let mirror = match &self.mirror {
            Some(places) => Some(places.location(name, access).await?),
            None => None,
        };
        let location = self.places.location(name, access).await?;
        Ok(Repository { mirror, ..Repository::new(location, self.keys.key(name).await?) })
    }

    async fn erased(&self, project: ProjectId) -> Result<(), BoxError> {
        Ok(self.keys.forget(project.into()).await?)
    }
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
