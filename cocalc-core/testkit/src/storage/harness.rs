//! What the suite needs beside the trait: to act as the project does.

use std::{
    any::Any,
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
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};

/// Regular files by their path within the volume.
pub type Tree = BTreeMap<String, Vec<u8>>;

/// One of the two stores of a [`Harness`].
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
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

    // What follows not every harness can offer, so it has defaults.

    /// Directories beside the stores, which no call may touch. The suite plants
    /// files in them, compares all of them after each property, and removes
    /// what it planted.
    fn outside(&self) -> Vec<PathBuf> {
        Vec::new()
    }

    /// Bytes that are free on the volume of a store, where nobody else has
    /// files.
    async fn free_bytes(&self, _host: Host) -> Option<u64> {
        None
    }

    /// Whether [`cut_power`](Self::cut_power) can be called.
    fn cuts_power(&self) -> bool {
        false
    }

    /// What comes up after a loss of power at this instant: the first host's
    /// store, opened anew on a copy of its disk. The harness itself goes on as if
    /// nothing had happened.
    async fn cut_power(&self) -> Result<Box<dyn Harness>, BoxError> {
        Err("this harness cannot cut the power".into())
    }
}

type Locate = dyn Fn(Host, ProjectId, &SnapshotName) -> PathBuf + Send + Sync;

type Measure = dyn Fn(Host) -> Option<u64> + Send + Sync;
type Cut = dyn Fn() -> BoxFuture<'static, Result<Box<dyn Harness>, BoxError>> + Send + Sync;

/// For backends whose volumes and snapshots are directories. What it keeps is
/// dropped after the stores.
pub struct FilesHarness {
    stores: [Arc<dyn Storage>; 2],
    snapshot_path: Box<Locate>,
    outside: Vec<PathBuf>,
    free_bytes: Box<Measure>,
    kept: Vec<Box<dyn Any + Send + Sync>>,
    cut: Option<Box<Cut>>,
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
        Self {
            stores: [first, second],
            snapshot_path: Box::new(snapshot_path),
            outside: Vec::new(),
            free_bytes: Box::new(|_| None),
            kept: Vec::new(),
            cut: None,
        }
    }

    /// Keeps something for as long as the stores, for instance their volumes.
    #[must_use]
    pub fn keeping(mut self, thing: impl Any + Send + Sync) -> Self {
        self.kept.push(Box::new(thing));
        self
    }

    /// With a way to cut the power, as [`Harness::cut_power`] says.
    #[must_use]
    pub fn powered(
        mut self,
        cut: impl Fn() -> BoxFuture<'static, Result<Box<dyn Harness>, BoxError>> + Send + Sync + 'static,
    ) -> Self {
        self.cut = Some(Box::new(cut));
        self
    }

    /// With directories beside the stores, as [`Harness::outside`] says.
    #[must_use]
    pub fn outside(mut self, directories: impl IntoIterator<Item = PathBuf>) -> Self {
        self.outside = directories.into_iter().collect();
        self
    }

    /// With stores that are alone on their volumes, which have this many free
    /// bytes.
    #[must_use]
    pub fn measured(mut self, free_bytes: impl Fn(Host) -> Option<u64> + Send + Sync + 'static) -> Self {
        self.free_bytes = Box::new(free_bytes);
        self
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

    fn outside(&self) -> Vec<PathBuf> {
        self.outside.clone()
    }

    async fn free_bytes(&self, host: Host) -> Option<u64> {
        (self.free_bytes)(host)
    }

    fn cuts_power(&self) -> bool {
        self.cut.is_some()
    }

    async fn cut_power(&self) -> Result<Box<dyn Harness>, BoxError> {
        match &self.cut {
            Some(cut) => cut().await,
            None => Err("this harness cannot cut the power".into()),
        }
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
