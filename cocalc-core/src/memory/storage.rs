//! Volumes in memory.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    io::Cursor,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use cocalc_ids::{ProjectId, SnapshotName, Timestamp, TreePath, VolumeUuid};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncReadExt as _;

use crate::{
    storage::{
        Capabilities, Change, ChangeKind, Changes, CloneOptions, Copied, CopyOptions, Error, Footprint, Hold,
        Holds, NodeKind, Place, Result, SendHeader, SendOptions, SendStream, Snapshot, Staged, Storage,
        Usage, UsageSource, Volume, VolumeOptions,
    },
    stream::BoxRead,
};

const BACKEND: &str = "memory";
/// A stream carries this many bytes of digest and of length before its
/// payload.
const PREFIX: usize = 32 + 8;
/// More than any test sends; a hostile length must not make us allocate.
const PAYLOAD_MAX: u64 = 256 << 20;

/// The files of a volume or snapshot, by path.
pub type Files = BTreeMap<String, Bytes>;

/// What is in a volume or snapshot. Every directory on the way to a file is
/// among the directories; the root is not.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Contents {
    files: Files,
    directories: BTreeSet<String>,
}

impl Default for Contents {
    /// What a new volume has.
    fn default() -> Self {
        let directories = ["home", "system"].map(str::to_owned).into();
        Self { files: Files::new(), directories }
    }
}

impl Contents {
    fn empty() -> Self {
        Self { files: Files::new(), directories: BTreeSet::new() }
    }

    fn has_directory(&self, path: &str) -> bool {
        path.is_empty() || self.directories.contains(path)
    }

    fn has(&self, path: &str) -> bool {
        self.has_directory(path) || self.files.contains_key(path)
    }

    /// Whether every name is one, and in a directory.
    fn is_sound(&self) -> bool {
        self.files.keys().chain(&self.directories).all(|path| {
            let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
            TreePath::from_bytes(path.as_bytes()).is_ok_and(|path| !path.is_root())
                && self.has_directory(parent)
        }) && self.directories.iter().all(|path| !self.files.contains_key(path))
    }

    /// `root` and what is below it, under `to` instead.
    fn moved(&self, root: &str, to: &str) -> Self {
        let moved = |path: &str| {
            let rest = path.strip_prefix(root).unwrap_or_default().trim_start_matches('/');
            if rest.is_empty() { to.to_owned() } else { format!("{to}/{rest}") }
        };
        let files = self.files.iter().filter(|(path, _)| is_within(path, root));
        let mut directories: BTreeSet<_> =
            self.directories.iter().filter(|path| is_within(path, root)).map(|path| moved(path)).collect();
        if root.is_empty() {
            directories.insert(to.to_owned());
        }
        Self { files: files.map(|(path, content)| (moved(path), content.clone())).collect(), directories }
    }

    fn remove_all(&mut self, root: &str) {
        self.files.retain(|path, _| !is_within(path, root));
        self.directories.retain(|path| !is_within(path, root));
    }

    /// Gives each file bytes of its own, for which its owner is charged.
    fn unshare(&mut self) {
        self.files.values_mut().for_each(|content| *content = Bytes::copy_from_slice(content));
    }

    fn bytes(&self) -> u64 {
        self.files.values().map(|content| content.len() as u64).sum()
    }

    fn entries(&self) -> u64 {
        (self.files.len() + self.directories.len()) as u64
    }

    /// What is directly in `directory`; `true` for directories.
    fn names<'a>(&'a self, directory: &str) -> BTreeMap<&'a str, bool> {
        let inside = |path: &'a str| {
            let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
            (parent == directory).then_some(name)
        };
        let files = self.files.keys().filter_map(|path| Some((inside(path)?, false)));
        files.chain(self.directories.iter().filter_map(|path| Some((inside(path)?, true)))).collect()
    }
}

/// Project volumes in memory: the strictest reading of [`Storage`], the model
/// that contract suites compare other backends with, and a stand-in for
/// embedders' own tests. Two stores are two hosts; clones are one store.
///
/// ```
/// # use cocalc_core::{ids::ProjectId, memory::storage::MemoryStorage, storage::{Storage, VolumeOptions}};
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), cocalc_core::storage::Error> {
/// let store = MemoryStorage::new();
/// let project = ProjectId::random();
/// store.create(project, &VolumeOptions::default()).await?;
/// store.write(project, "notes.txt", "hello")?;
/// # let Ok(name) = "first".parse() else { unreachable!() };
/// store.snapshot(project, &name).await?;
/// store.write(project, "notes.txt", "changed")?;
/// assert_eq!(store.snapshot_files(project, &name)?["notes.txt"], "hello");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct MemoryStorage {
    projects: Arc<Mutex<BTreeMap<ProjectId, Project>>>,
    holds: Holds,
}

#[derive(Debug, Default)]
struct Project {
    live: Option<Live>,
    /// Oldest first.
    snapshots: Vec<(Snapshot, Contents)>,
    limit_bytes: Option<u64>,
}

#[derive(Clone, Debug)]
struct Live {
    uuid: VolumeUuid,
    contents: Contents,
    /// The snapshot's uuid and the `former` of the restore that made it, by
    /// which a repeated restore is known.
    restored: Option<(VolumeUuid, SnapshotName)>,
}

impl Live {
    fn new(contents: Contents) -> Self {
        Self { uuid: VolumeUuid::random(), contents, restored: None }
    }
}

/// What a stream holds: all files, or what changed since the base.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Payload {
    origin: VolumeUuid,
    base: Option<VolumeUuid>,
    written: BTreeMap<String, String>,
    removed: Vec<String>,
    directories_made: Vec<String>,
    directories_removed: Vec<String>,
}

impl MemoryStorage {
    /// An empty store: one host.
    pub fn new() -> Self {
        Self::default()
    }

    /// Writes a file of the live volume, as the project would, with the
    /// directories it needs.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] without a live volume; [`Error::Path`] where no file
    /// can be; [`Error::NoSpace`] if the limit would be passed. Nothing has
    /// changed then.
    pub fn write(&self, project: ProjectId, path: &str, content: impl Into<Bytes>) -> Result<()> {
        let mut projects = self.lock();
        let entry = projects.get_mut(&project).ok_or(Error::NotFound { project })?;
        let live = entry.live.as_mut().ok_or(Error::NotFound { project })?;
        let refuse = |path, reason: &str| Error::Path { project, path, reason: reason.to_owned() };
        let parsed = TreePath::from_bytes(path.as_bytes())
            .map_err(|error| refuse(TreePath::root(), &format!("{path:?} is no path: {error}")))?;
        let on_the_way = || path.match_indices('/').map(|(at, _)| &path[..at]);
        if on_the_way().any(|directory| live.contents.files.contains_key(directory)) {
            return Err(refuse(parsed, "something on the way is no directory"));
        }
        if live.contents.has_directory(path) {
            return Err(refuse(parsed, "it is a directory"));
        }
        let former = live.contents.clone();
        live.contents.directories.extend(on_the_way().map(str::to_owned));
        live.contents.files.insert(path.to_owned(), content.into());
        if entry.limit_bytes.is_some_and(|limit| entry.charged() > limit) {
            // Only what was just written can be the reason.
            if let Some(live) = &mut entry.live {
                live.contents = former;
            }
            return Err(Error::NoSpace { project, operation: "write to", what: "the project's quota" });
        }
        Ok(())
    }

    /// Removes a file of the live volume; says whether there was one.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] without a live volume.
    pub fn remove(&self, project: ProjectId, path: &str) -> Result<bool> {
        let mut projects = self.lock();
        let live = projects.get_mut(&project).and_then(|entry| entry.live.as_mut());
        Ok(live.ok_or(Error::NotFound { project })?.contents.files.remove(path).is_some())
    }

    /// The files of the live volume.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] without a live volume.
    pub fn files(&self, project: ProjectId) -> Result<Files> {
        let projects = self.lock();
        let live = projects.get(&project).and_then(|entry| entry.live.as_ref());
        Ok(live.ok_or(Error::NotFound { project })?.contents.files.clone())
    }

    /// The files of a snapshot.
    ///
    /// # Errors
    ///
    /// [`Error::NoSnapshot`] if there is none of that name.
    pub fn snapshot_files(&self, project: ProjectId, name: &SnapshotName) -> Result<Files> {
        let projects = self.lock();
        Ok(find(&projects, project, name)?.1.files.clone())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ProjectId, Project>> {
        self.projects.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Project {
    fn find(&self, name: &SnapshotName) -> Option<&(Snapshot, Contents)> {
        self.snapshots.iter().find(|(snapshot, _)| snapshot.name == *name)
    }

    fn keep(&mut self, project: ProjectId, name: &SnapshotName, contents: Contents) -> Snapshot {
        let uuid = VolumeUuid::random();
        let snapshot =
            Snapshot { project, name: name.clone(), uuid, origin: uuid, created: Timestamp::now() };
        self.snapshots.push((snapshot.clone(), contents));
        snapshot
    }

    /// Bytes of all distinct contents: what a snapshot shares is charged once.
    fn charged(&self) -> u64 {
        let mut seen = HashSet::new();
        let snapshots = self.snapshots.iter().flat_map(|(_, contents)| contents.files.values());
        self.live
            .iter()
            .flat_map(|live| live.contents.files.values())
            .chain(snapshots)
            .filter(|content| seen.insert((content.as_ptr() as usize, content.len())))
            .map(|content| content.len() as u64)
            .sum()
    }
}

fn find<'a>(
    projects: &'a BTreeMap<ProjectId, Project>,
    project: ProjectId,
    name: &SnapshotName,
) -> Result<&'a (Snapshot, Contents)> {
    let found = projects.get(&project).and_then(|entry| entry.find(name));
    found.ok_or_else(|| Error::NoSnapshot { project, name: name.clone() })
}

/// Whether `path` is `root` or below it.
fn is_within(path: &str, root: &str) -> bool {
    root.is_empty() || path.strip_prefix(root).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Adds what is different in `directory`, which both have.
fn compare(directory: &str, old: &Contents, new: &Contents, changes: &mut Vec<Change>) {
    let (before, now) = (old.names(directory), new.names(directory));
    let all: BTreeSet<_> = before.keys().chain(now.keys()).collect();
    for name in all {
        let path = if directory.is_empty() { (*name).to_owned() } else { format!("{directory}/{name}") };
        let size = |of: &Contents| of.files.get(&path).map_or(0, |content| content.len() as u64);
        let node = |is_directory: &bool| if *is_directory { NodeKind::Directory } else { NodeKind::File };
        let (kind, node, bytes) = match (before.get(*name), now.get(*name)) {
            (Some(true), Some(true)) => {
                compare(&path, old, new, changes);
                continue;
            }
            (Some(false), Some(false)) if old.files.get(&path) == new.files.get(&path) => continue,
            (Some(_), Some(is)) => (ChangeKind::Modified, node(is), size(new)),
            (None, Some(is)) => (ChangeKind::Added, node(is), size(new)),
            (Some(was), None) => (ChangeKind::Removed, node(was), size(old)),
            (None, None) => continue,
        };
        // Only paths are written.
        if let Ok(path) = TreePath::from_bytes(path.as_bytes()) {
            changes.push(Change { path, kind, node, bytes });
        }
    }
}

fn volume(project: ProjectId, live: &Live) -> Volume {
    Volume { project, uuid: live.uuid, path: None }
}

fn exists(project: ProjectId, name: &SnapshotName) -> Error {
    Error::AlreadyExists { project, what: format!("a snapshot {name}") }
}

#[async_trait]
impl Storage for MemoryStorage {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            backend: BACKEND.to_owned(),
            deltas: true,
            quotas: true,
            constant_usage: true,
            detects_no_change: true,
            shares_bytes: true,
            atomic_snapshots: true,
            full_metadata: false,
            repeatable_streams: true,
            stream_version: 1,
            weaknesses: vec!["everything is lost when the process ends".to_owned()],
        }
    }

    async fn create(&self, project: ProjectId, options: &VolumeOptions) -> Result<Volume> {
        let mut projects = self.lock();
        let entry = projects.entry(project).or_default();
        if entry.live.is_some() {
            return Err(Error::AlreadyExists { project, what: "a volume".to_owned() });
        }
        entry.limit_bytes = options.limit_bytes;
        Ok(volume(project, entry.live.insert(Live::new(Contents::default()))))
    }

    async fn volume(&self, project: ProjectId) -> Result<Volume> {
        let projects = self.lock();
        let live = projects.get(&project).and_then(|entry| entry.live.as_ref());
        live.map(|live| volume(project, live)).ok_or(Error::NotFound { project })
    }

    async fn list(&self) -> Result<Vec<Volume>> {
        let projects = self.lock();
        Ok(projects
            .iter()
            .filter_map(|(project, entry)| Some(volume(*project, entry.live.as_ref()?)))
            .collect())
    }

    async fn delete(&self, project: ProjectId) -> Result<()> {
        let mut projects = self.lock();
        self.holds.refuse_any(project)?;
        projects.remove(&project);
        Ok(())
    }

    async fn snapshot(&self, project: ProjectId, name: &SnapshotName) -> Result<Snapshot> {
        let mut projects = self.lock();
        let entry = projects.get_mut(&project).ok_or(Error::NotFound { project })?;
        if let Some((snapshot, _)) = entry.find(name) {
            return Ok(snapshot.clone());
        }
        let contents = entry.live.as_ref().ok_or(Error::NotFound { project })?.contents.clone();
        Ok(entry.keep(project, name, contents))
    }

    async fn snapshots(&self, project: ProjectId) -> Result<Vec<Snapshot>> {
        let projects = self.lock();
        let snapshots = projects.get(&project).map(|entry| entry.snapshots.as_slice());
        Ok(snapshots.unwrap_or_default().iter().map(|(snapshot, _)| snapshot.clone()).collect())
    }

    async fn snapshot_path(&self, project: ProjectId, name: &SnapshotName) -> Result<Option<PathBuf>> {
        let known = self.snapshots(project).await?.iter().any(|snapshot| snapshot.name == *name);
        if known { Ok(None) } else { Err(Error::NoSnapshot { project, name: name.clone() }) }
    }

    async fn delete_snapshot(&self, project: ProjectId, name: &SnapshotName) -> Result<()> {
        let mut projects = self.lock();
        self.holds.refuse_held(project, name)?;
        if let Some(entry) = projects.get_mut(&project) {
            entry.snapshots.retain(|(snapshot, _)| snapshot.name != *name);
            if entry.snapshots.is_empty() && entry.live.is_none() {
                projects.remove(&project);
            }
        }
        Ok(())
    }

    async fn hold(&self, project: ProjectId, name: &SnapshotName) -> Result<Hold> {
        let projects = self.lock();
        find(&projects, project, name)?;
        Ok(self.holds.take(project, name))
    }

    async fn changed_since(&self, project: ProjectId, name: &SnapshotName) -> Result<bool> {
        let projects = self.lock();
        let live = projects.get(&project).and_then(|entry| entry.live.as_ref());
        let live = live.ok_or(Error::NotFound { project })?;
        Ok(find(&projects, project, name)?.1 != live.contents)
    }

    async fn restore(
        &self,
        project: ProjectId,
        name: &SnapshotName,
        former: &SnapshotName,
    ) -> Result<Volume> {
        let missing = || Error::NoSnapshot { project, name: name.clone() };
        let mut projects = self.lock();
        let entry = projects.get_mut(&project).ok_or_else(missing)?;
        let (snapshot, contents) = entry.find(name).ok_or_else(missing)?;
        let restored = Some((snapshot.uuid, former.clone()));
        let new = Live { restored, ..Live::new(contents.clone()) };
        if let Some(live) = &entry.live {
            if live.restored == new.restored {
                return Ok(volume(project, live));
            }
            if entry.find(former).is_some() {
                return Err(exists(project, former));
            }
            let contents = live.contents.clone();
            entry.keep(project, former, contents);
        }
        Ok(volume(project, entry.live.insert(new)))
    }

    async fn set_aside(&self, project: ProjectId, keep_as: &SnapshotName) -> Result<Snapshot> {
        let mut projects = self.lock();
        let entry = projects.get_mut(&project).ok_or(Error::NotFound { project })?;
        let kept = entry.find(keep_as).map(|(snapshot, _)| snapshot.clone());
        match (&entry.live, kept) {
            (Some(_), Some(_)) => Err(exists(project, keep_as)),
            (None, Some(kept)) => Ok(kept),
            (None, None) => Err(Error::NotFound { project }),
            (Some(live), None) => {
                let contents = live.contents.clone();
                entry.live = None;
                Ok(entry.keep(project, keep_as, contents))
            }
        }
    }

    async fn clone_volume(
        &self,
        source: ProjectId,
        name: &SnapshotName,
        target: ProjectId,
        options: &CloneOptions,
    ) -> Result<Volume> {
        let mut projects = self.lock();
        let mut contents = find(&projects, source, name)?.1.clone();
        if !options.same_owner {
            contents.unshare();
        }
        let options = &options.volume;
        let size = contents.bytes();
        if projects.get(&target).is_some_and(|entry| entry.live.is_some()) {
            return Err(Error::AlreadyExists { project: target, what: "a volume".to_owned() });
        }
        if options.limit_bytes.is_some_and(|limit| size > limit) {
            let what = "the project's quota";
            return Err(Error::NoSpace { project: target, operation: "clone into", what });
        }
        let entry = projects.entry(target).or_default();
        entry.limit_bytes = options.limit_bytes;
        Ok(volume(target, entry.live.insert(Live::new(contents))))
    }

    async fn usage(&self, project: ProjectId) -> Result<Usage> {
        let projects = self.lock();
        let entry = projects.get(&project).ok_or(Error::NotFound { project })?;
        Ok(Usage {
            charged_bytes: entry.charged(),
            limit_bytes: entry.limit_bytes,
            source: UsageSource::Quota,
        })
    }

    async fn set_limit(&self, project: ProjectId, limit_bytes: Option<u64>) -> Result<()> {
        let mut projects = self.lock();
        projects.get_mut(&project).ok_or(Error::NotFound { project })?.limit_bytes = limit_bytes;
        Ok(())
    }

    async fn footprint(&self, project: ProjectId, snapshot: Option<&SnapshotName>) -> Result<Footprint> {
        let projects = self.lock();
        let entry = projects.get(&project).ok_or(Error::NotFound { project })?;
        let contents = match snapshot {
            Some(name) => &find(&projects, project, name)?.1,
            None => &entry.live.as_ref().ok_or(Error::NotFound { project })?.contents,
        };
        // Another owner's clone never shares; one of the same owner may.
        let elsewhere: HashSet<_> = projects
            .values()
            .flat_map(|entry| {
                let live = entry.live.iter().map(|live| &live.contents);
                live.chain(entry.snapshots.iter().map(|(_, contents)| contents))
            })
            .filter(|other| !std::ptr::eq(*other, contents))
            .flat_map(|other| other.files.values().map(|content| content.as_ptr()))
            .collect();
        let mut footprint = Footprint { entries: contents.entries(), ..Footprint::default() };
        for content in contents.files.values() {
            footprint.total_bytes += content.len() as u64;
            if !elsewhere.contains(&content.as_ptr()) {
                footprint.exclusive_bytes += content.len() as u64;
            }
        }
        Ok(footprint)
    }

    async fn diff(
        &self,
        project: ProjectId,
        from: &SnapshotName,
        to: Option<&SnapshotName>,
        after: Option<&TreePath>,
        max: usize,
    ) -> Result<Changes> {
        let projects = self.lock();
        let old = &find(&projects, project, from)?.1;
        let new = match to {
            Some(name) => &find(&projects, project, name)?.1,
            None => {
                let live = projects.get(&project).and_then(|entry| entry.live.as_ref());
                &live.ok_or(Error::NotFound { project })?.contents
            }
        };
        let mut changes = Vec::new();
        compare("", old, new, &mut changes);
        if let Some(after) = after {
            changes.retain(|change| change.path.names().gt(after.names()));
        }
        let more = changes.len() > max;
        changes.truncate(max);
        Ok(Changes { changes, more })
    }

    async fn copy(&self, from: &Place, to: &Place, options: &CopyOptions) -> Result<Copied> {
        let refuse = |place: &Place, reason: &str| Error::Path {
            project: place.project,
            path: place.path.clone(),
            reason: reason.to_owned(),
        };
        if to.snapshot.is_some() {
            return Err(refuse(to, "snapshots never change"));
        }
        let mut projects = self.lock();
        let source = match &from.snapshot {
            Some(name) => &find(&projects, from.project, name)?.1,
            None => {
                let live = projects.get(&from.project).and_then(|entry| entry.live.as_ref());
                &live.ok_or(Error::NotFound { project: from.project })?.contents
            }
        };
        let Ok(source_root) = std::str::from_utf8(from.path.as_bytes()) else {
            return Err(refuse(from, "there is nothing"));
        };
        let Ok(target_root) = std::str::from_utf8(to.path.as_bytes()) else {
            return Err(refuse(to, "this storage has only names that are text"));
        };
        if from.snapshot.is_none() && from.project == to.project && to.path.is_within(&from.path) {
            return Err(refuse(to, "it is within what would be copied"));
        }
        if !source.has(source_root) {
            return Err(refuse(from, "there is nothing"));
        }
        let mut taken = source.moved(source_root, target_root);
        let shares = options.same_owner || from.project == to.project;
        if !shares {
            taken.unshare();
        }
        let entry = projects.get_mut(&to.project).ok_or(Error::NotFound { project: to.project })?;
        let live = entry.live.as_mut().ok_or(Error::NotFound { project: to.project })?;
        let Some((directory, _)) = to.path.split_last() else {
            return Err(refuse(to, "the root itself is restored, not copied"));
        };
        if !std::str::from_utf8(directory.as_bytes()).is_ok_and(|path| live.contents.has_directory(path)) {
            return Err(refuse(to, "its directory does not exist"));
        }
        if live.contents.has(target_root) && !options.replace {
            return Err(Error::AlreadyExists { project: to.project, what: format!("{:?}", to.path) });
        }
        let former = live.contents.clone();
        live.contents.remove_all(target_root);
        let bytes = taken.bytes();
        let copied = Copied { entries: taken.entries(), bytes, shared_bytes: if shares { bytes } else { 0 } };
        live.contents.files.append(&mut taken.files);
        live.contents.directories.append(&mut taken.directories);
        if entry.limit_bytes.is_some_and(|limit| entry.charged() > limit) {
            if let Some(live) = &mut entry.live {
                live.contents = former;
            }
            let what = "the project's quota";
            return Err(Error::NoSpace { project: to.project, operation: "copy into", what });
        }
        Ok(copied)
    }

    async fn send(
        &self,
        project: ProjectId,
        name: &SnapshotName,
        options: &SendOptions,
    ) -> Result<SendStream> {
        let projects = self.lock();
        let find = |name: &SnapshotName| find(&projects, project, name);
        let (snapshot, contents) = find(name)?;
        let base = options.base.as_ref().map(find).transpose()?;
        let mut holds = vec![self.holds.take(project, name)];
        holds.extend(options.base.iter().map(|base| self.holds.take(project, base)));
        for source in &options.sources {
            find(source)?;
            holds.push(self.holds.take(project, source));
        }
        let none = Contents::empty();
        let old = base.map_or(&none, |(_, contents)| contents);
        let payload = Payload {
            origin: snapshot.origin,
            base: base.map(|(snapshot, _)| snapshot.origin),
            written: contents
                .files
                .iter()
                .filter(|(path, content)| old.files.get(*path) != Some(content))
                .map(|(path, content)| (path.clone(), STANDARD.encode(content)))
                .collect(),
            removed: old.files.keys().filter(|path| !contents.files.contains_key(*path)).cloned().collect(),
            directories_made: contents.directories.difference(&old.directories).cloned().collect(),
            directories_removed: old.directories.difference(&contents.directories).cloned().collect(),
        };
        let payload = serde_json::to_vec(&payload).map_err(|error| Error::Backend {
            backend: BACKEND,
            operation: "send",
            project,
            source: error.into(),
        })?;
        let length = (payload.len() as u64).to_be_bytes();
        let digest = Sha256::new().chain_update(length).chain_update(&payload).finalize();
        let stream = [digest.as_slice(), &length, &payload].concat();
        let header = SendHeader {
            backend: BACKEND.to_owned(),
            project,
            name: name.clone(),
            origin: snapshot.origin,
            base: base.map(|(snapshot, _)| (snapshot.name.clone(), snapshot.origin)),
            // When it was taken.
            extra: snapshot.created.millis().to_string(),
            estimated_bytes: stream.len() as u64,
            left_out: Vec::new(),
        };
        Ok(SendStream { header, reader: Hold::during(Box::pin(Cursor::new(stream)), holds) })
    }

    async fn stage(&self, _project: ProjectId, _name: &SnapshotName) -> Result<Box<dyn Staged>> {
        Err(Error::Unsupported { backend: BACKEND, operation: "take files: it has none" })
    }

    async fn receive(&self, header: &SendHeader, mut stream: BoxRead) -> Result<Snapshot> {
        let project = header.project;
        let bad = |reason: String| Error::BadStream { project, reason };
        if header.backend != BACKEND {
            return Err(bad(format!("it is of {} storage, this is memory", header.backend)));
        }
        let created = header.extra.parse().map(Timestamp::from_millis);
        let created = created.map_err(|_| bad("it does not say when its snapshot was taken".to_owned()))?;
        // Checked before the stream is read, and again after: in between the
        // store is open to other calls.
        let unknown = Project::default();
        if let Some(snapshot) = self.lock().get(&project).unwrap_or(&unknown).admit(header)? {
            return Ok(snapshot);
        }
        let payload = read_payload(&mut stream).await.map_err(bad)?;
        if payload.origin != header.origin || payload.base != header.base.as_ref().map(|(_, base)| *base) {
            return Err(bad("it holds another snapshot than announced".to_owned()));
        }

        let mut projects = self.lock();
        let entry = projects.get(&project).unwrap_or(&unknown);
        if let Some(snapshot) = entry.admit(header)? {
            return Ok(snapshot);
        }
        let base = header.base.as_ref().and_then(|(name, _)| entry.find(name));
        let mut contents = base.map_or_else(Contents::empty, |(_, contents)| contents.clone());
        let missing = || bad("it removes what its base does not have".to_owned());
        for path in payload.removed {
            contents.files.remove(&path).ok_or_else(missing)?;
        }
        for path in payload.directories_removed {
            if !contents.directories.remove(&path) {
                return Err(missing());
            }
        }
        contents.directories.extend(payload.directories_made);
        for (path, content) in payload.written {
            let content = STANDARD.decode(content).map_err(|error| bad(error.to_string()))?;
            contents.files.insert(path, content.into());
        }
        if !contents.is_sound() {
            return Err(bad("it holds what cannot be a tree of files".to_owned()));
        }
        let snapshot = Snapshot {
            project,
            name: header.name.clone(),
            uuid: VolumeUuid::random(),
            origin: header.origin,
            created,
        };
        let entry = projects.entry(project).or_default();
        entry.snapshots.push((snapshot.clone(), contents));
        if entry.limit_bytes.is_some_and(|limit| entry.charged() > limit) {
            entry.snapshots.pop();
            return Err(Error::NoSpace { project, operation: "receive", what: "the project's quota" });
        }
        Ok(snapshot)
    }
}

impl Project {
    /// Whether a stream with this header may come; `Some` if what it holds is
    /// here already.
    fn admit(&self, header: &SendHeader) -> Result<Option<Snapshot>> {
        let project = header.project;
        if let Some((snapshot, _)) = self.find(&header.name) {
            return if snapshot.origin == header.origin {
                Ok(Some(snapshot.clone()))
            } else {
                Err(exists(project, &header.name))
            };
        }
        if let Some((name, origin)) = &header.base {
            match self.find(name) {
                None => return Err(Error::NoSnapshot { project, name: name.clone() }),
                Some((base, _)) if base.origin != *origin => {
                    let reason = format!("its base {name} is not the snapshot of that name here");
                    return Err(Error::BadStream { project, reason });
                }
                Some(_) => {}
            }
        }
        Ok(None)
    }
}

async fn read_payload(stream: &mut BoxRead) -> Result<Payload, String> {
    let mut prefix = [0; PREFIX];
    stream.read_exact(&mut prefix).await.map_err(|error| error.to_string())?;
    let mut length = [0; 8];
    length.copy_from_slice(&prefix[32..]);
    let announced = u64::from_be_bytes(length);
    if announced > PAYLOAD_MAX {
        return Err("it is too long".to_owned());
    }
    let mut payload = Vec::new();
    // One byte more than announced shows what follows a complete payload.
    stream.take(announced + 1).read_to_end(&mut payload).await.map_err(|error| error.to_string())?;
    if payload.len() as u64 != announced {
        return Err("its length is not the announced one".to_owned());
    }
    if Sha256::new().chain_update(length).chain_update(&payload).finalize().as_slice() != &prefix[..32] {
        return Err("its digest is wrong".to_owned());
    }
    serde_json::from_slice(&payload).map_err(|error| error.to_string())
}
