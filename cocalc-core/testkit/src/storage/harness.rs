//! What the suite needs beside the trait: to act as the project does.

use std::{
    collections::BTreeMap,
    fmt, fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
use cocalc_core::{
    BoxError,
    ids::{ProjectId, SnapshotName},
    memory::storage::{Files, MemoryStorage},
    storage::Storage,
};

/// Regular files by their path within the volume.
pub type Tree = BTreeMap<String, Vec<u8>>;

/// One of the two stores of a [`Harness`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Host {
    /// Where projects begin.
    First,
    /// Where they are sent.
    Second,
}

impl Host {
    /// The other one.
    pub fn other(self) -> Self {
        match self {
            Self::First => Self::Second,
            Self::Second => Self::First,
        }
    }
}

/// Two stores of one backend, and access to files as a project has it.
#[async_trait]
pub trait Harness: Send + Sync {
    /// A store.
    fn store(&self, host: Host) -> Arc<dyn Storage>;

    /// Writes a file of a live volume, with the directories it needs.
    async fn write(&self, host: Host, project: ProjectId, path: &str, content: &[u8])
    -> Result<(), BoxError>;

    /// Removes a file of a live volume.
    async fn remove(&self, host: Host, project: ProjectId, path: &str) -> Result<(), BoxError>;

    /// The files of a live volume.
    async fn live(&self, host: Host, project: ProjectId) -> Result<Tree, BoxError>;

    /// Where the files of the live volume, or of a snapshot, are on this
    /// machine, for properties of real files; `None` for a backend without.
    async fn path(&self, host: Host, project: ProjectId, snapshot: Option<&SnapshotName>) -> Option<PathBuf>;

    /// Whether [`path`](Self::path) gives paths.
    fn has_files(&self) -> bool;

    /// The files of a snapshot.
    async fn frozen(&self, host: Host, project: ProjectId, name: &SnapshotName) -> Result<Tree, BoxError>;
}

type Locate = dyn Fn(Host, ProjectId, &SnapshotName) -> PathBuf + Send + Sync;

/// For backends whose volumes and snapshots are directories.
pub struct FilesHarness {
    stores: [Arc<dyn Storage>; 2],
    snapshot_path: Box<Locate>,
}

impl fmt::Debug for FilesHarness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FilesHarness").field("stores", &self.stores).finish_non_exhaustive()
    }
}

impl FilesHarness {
    /// Two stores, and where each has its snapshots.
    pub fn new(
        first: Arc<dyn Storage>,
        second: Arc<dyn Storage>,
        snapshot_path: impl Fn(Host, ProjectId, &SnapshotName) -> PathBuf + Send + Sync + 'static,
    ) -> Self {
        Self { stores: [first, second], snapshot_path: Box::new(snapshot_path) }
    }

    async fn root(&self, host: Host, project: ProjectId) -> Result<PathBuf, BoxError> {
        let volume = self.store(host).volume(project).await?;
        volume.path.ok_or_else(|| "the volume has no path".into())
    }
}

#[async_trait]
impl Harness for FilesHarness {
    fn store(&self, host: Host) -> Arc<dyn Storage> {
        Arc::clone(&self.stores[host as usize])
    }

    async fn write(
        &self,
        host: Host,
        project: ProjectId,
        path: &str,
        content: &[u8],
    ) -> Result<(), BoxError> {
        let path = self.root(host, project).await?.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        Ok(fs::write(path, content)?)
    }

    async fn remove(&self, host: Host, project: ProjectId, path: &str) -> Result<(), BoxError> {
        Ok(fs::remove_file(self.root(host, project).await?.join(path))?)
    }

    async fn live(&self, host: Host, project: ProjectId) -> Result<Tree, BoxError> {
        read_tree(&self.root(host, project).await?)
    }

    async fn path(&self, host: Host, project: ProjectId, snapshot: Option<&SnapshotName>) -> Option<PathBuf> {
        match snapshot {
            Some(name) => Some((self.snapshot_path)(host, project, name)),
            None => self.root(host, project).await.ok(),
        }
    }

    fn has_files(&self) -> bool {
        true
    }

    async fn frozen(&self, host: Host, project: ProjectId, name: &SnapshotName) -> Result<Tree, BoxError> {
        read_tree(&(self.snapshot_path)(host, project, name))
    }
}

fn read_tree(root: &Path) -> Result<Tree, BoxError> {
    let mut tree = Tree::new();
    let mut todo = vec![root.to_owned()];
    while let Some(directory) = todo.pop() {
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                todo.push(entry.path());
            } else if kind.is_file() {
                let path = entry.path();
                let name = path.strip_prefix(root)?.to_string_lossy().into_owned();
                tree.insert(name, fs::read(path)?);
            }
        }
    }
    Ok(tree)
}

/// Two [`MemoryStorage`]s.
#[derive(Debug)]
pub struct MemoryHarness {
    memories: [MemoryStorage; 2],
    stores: [Arc<dyn Storage>; 2],
}

impl Default for MemoryHarness {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryHarness {
    /// Two empty stores.
    pub fn new() -> Self {
        Self::wrapping(|store| Arc::new(store))
    }

    /// Two empty stores, each in a wrapper that is to be tested.
    pub fn wrapping(wrap: impl Fn(MemoryStorage) -> Arc<dyn Storage>) -> Self {
        let memories = [MemoryStorage::new(), MemoryStorage::new()];
        let stores = [wrap(memories[0].clone()), wrap(memories[1].clone())];
        Self { memories, stores }
    }
}

fn plain(files: Files) -> Tree {
    files.into_iter().map(|(path, content)| (path, content.to_vec())).collect()
}

#[async_trait]
impl Harness for MemoryHarness {
    fn store(&self, host: Host) -> Arc<dyn Storage> {
        Arc::clone(&self.stores[host as usize])
    }

    async fn write(
        &self,
        host: Host,
        project: ProjectId,
        path: &str,
        content: &[u8],
    ) -> Result<(), BoxError> {
        Ok(self.memories[host as usize].write(project, path, content.to_vec())?)
    }

    async fn remove(&self, host: Host, project: ProjectId, path: &str) -> Result<(), BoxError> {
        if self.memories[host as usize].remove(project, path)? { Ok(()) } else { Err("no such file".into()) }
    }

    async fn live(&self, host: Host, project: ProjectId) -> Result<Tree, BoxError> {
        Ok(plain(self.memories[host as usize].files(project)?))
    }

    async fn path(&self, _: Host, _: ProjectId, _: Option<&SnapshotName>) -> Option<PathBuf> {
        None
    }

    fn has_files(&self) -> bool {
        false
    }

    async fn frozen(&self, host: Host, project: ProjectId, name: &SnapshotName) -> Result<Tree, BoxError> {
        Ok(plain(self.memories[host as usize].snapshot_files(project, name)?))
    }
}
