//! Volumes in memory.

use std::{
    collections::{BTreeMap, HashSet},
    io::Cursor,
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
        Holds, NodeKind, Place, Result, SendHeader, SendOptions, SendStream, Snapshot, Storage, Usage,
        UsageSource, Volume, VolumeOptions,
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
    snapshots: Vec<(Snapshot, Files)>,
    limit_bytes: Option<u64>,
}

#[derive(Clone, Debug)]
struct Live {
    uuid: VolumeUuid,
    files: Files,
    /// The snapshot's uuid and the `former` of the restore that made it, by
    /// which a repeated restore is known.
    restored: Option<(VolumeUuid, SnapshotName)>,
}

impl Live {
    fn new(files: Files) -> Self {
        Self { uuid: VolumeUuid::random(), files, restored: None }
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
}

impl MemoryStorage {
    /// An empty store: one host.
    pub fn new() -> Self {
        Self::default()
    }

    /// Writes a file of the live volume, as the project would.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] without a live volume; [`Error::NoSpace`], with
    /// nothing changed, if the limit would be passed.
    pub fn write(&self, project: ProjectId, path: &str, content: impl Into<Bytes>) -> Result<()> {
        let mut projects = self.lock();
        let entry = projects.get_mut(&project).ok_or(Error::NotFound { project })?;
        let live = entry.live.as_mut().ok_or(Error::NotFound { project })?;
        let before = live.files.insert(path.to_owned(), content.into());
        if entry.limit_bytes.is_some_and(|limit| entry.charged() > limit) {
            // Only what was just written can be the reason.
            if let Some(live) = entry.live.as_mut() {
                match before {
                    Some(content) => live.files.insert(path.to_owned(), content),
                    None => live.files.remove(path),
                };
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
        Ok(live.ok_or(Error::NotFound { project })?.files.remove(path).is_some())
    }

    /// The files of the live volume.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] without a live volume.
    pub fn files(&self, project: ProjectId) -> Result<Files> {
        let projects = self.lock();
        let live = projects.get(&project).and_then(|entry| entry.live.as_ref());
        Ok(live.ok_or(Error::NotFound { project })?.files.clone())
    }

    /// The files of a snapshot.
    ///
    /// # Errors
    ///
    /// [`Error::NoSnapshot`] if there is none of that name.
    pub fn snapshot_files(&self, project: ProjectId, name: &SnapshotName) -> Result<Files> {
        let projects = self.lock();
        let found = projects.get(&project).and_then(|entry| entry.find(name));
        Ok(found.ok_or_else(|| Error::NoSnapshot { project, name: name.clone() })?.1.clone())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ProjectId, Project>> {
        self.projects.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Project {
    fn find(&self, name: &SnapshotName) -> Option<&(Snapshot, Files)> {
        self.snapshots.iter().find(|(snapshot, _)| snapshot.name == *name)
    }

    fn keep(&mut self, project: ProjectId, name: &SnapshotName, files: Files) -> Snapshot {
        let uuid = VolumeUuid::random();
        let snapshot =
            Snapshot { project, name: name.clone(), uuid, origin: uuid, created: Timestamp::now() };
        self.snapshots.push((snapshot.clone(), files));
        snapshot
    }

    /// Bytes of all distinct contents: what a snapshot shares is charged once.
    fn charged(&self) -> u64 {
        let mut seen = HashSet::new();
        let snapshots = self.snapshots.iter().flat_map(|(_, files)| files.values());
        self.live
            .iter()
            .flat_map(|live| live.files.values())
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
) -> Result<&'a (Snapshot, Files)> {
    let found = projects.get(&project).and_then(|entry| entry.find(name));
    found.ok_or_else(|| Error::NoSnapshot { project, name: name.clone() })
}

/// Whether `path` is `root` or below it.
fn is_within(path: &str, root: &str) -> bool {
    root.is_empty() || path.strip_prefix(root).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// What is directly in `directory` (empty, or ending with a slash), which
/// exists because there are files in it; `true` for directories.
fn names<'a>(directory: &str, files: &'a Files) -> BTreeMap<&'a str, bool> {
    let inside = files.keys().filter_map(|path| path.strip_prefix(directory));
    inside
        .map(|rest| match rest.split_once('/') {
            Some((name, _)) => (name, true),
            None => (rest, false),
        })
        .collect()
}

/// Adds what is different in `directory`.
fn compare(directory: &str, old: &Files, new: &Files, changes: &mut Vec<Change>) {
    let (before, now) = (names(directory, old), names(directory, new));
    let all: std::collections::BTreeSet<_> = before.keys().chain(now.keys()).collect();
    for name in all {
        let path = format!("{directory}{name}");
        let size = |files: &Files| files.get(&path).map_or(0, |content| content.len() as u64);
        let node = |is_directory: &bool| if *is_directory { NodeKind::Directory } else { NodeKind::File };
        let (kind, node, bytes) = match (before.get(*name), now.get(*name)) {
            (Some(true), Some(true)) => {
                compare(&format!("{path}/"), old, new, changes);
                continue;
            }
            (Some(false), Some(false)) if old.get(&path) == new.get(&path) => continue,
            (Some(_), Some(is)) => (ChangeKind::Modified, node(is), size(new)),
            (None, Some(is)) => (ChangeKind::Added, node(is), size(new)),
            (Some(was), None) => (ChangeKind::Removed, node(was), size(old)),
            (None, None) => continue,
        };
        // Paths of this store are plain text; one that is not is no path.
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
        Ok(volume(project, entry.live.insert(Live::new(Files::new()))))
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
        let files = entry.live.as_ref().ok_or(Error::NotFound { project })?.files.clone();
        Ok(entry.keep(project, name, files))
    }

    async fn snapshots(&self, project: ProjectId) -> Result<Vec<Snapshot>> {
        let projects = self.lock();
        let snapshots = projects.get(&project).map(|entry| entry.snapshots.as_slice());
        Ok(snapshots.unwrap_or_default().iter().map(|(snapshot, _)| snapshot.clone()).collect())
    }

    async fn delete_snapshot(&self, project: ProjectId, name: &SnapshotName) -> Result<()> {
        let mut projects = self.lock();
        self.holds.refuse_held(project, name)?;
        if let Some(entry) = projects.get_mut(&project) {
            entry.snapshots.retain(|(snapshot, _)| snapshot.name != *name);
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
        Ok(find(&projects, project, name)?.1 != live.files)
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
        let (snapshot, files) = entry.find(name).ok_or_else(missing)?;
        let restored = Some((snapshot.uuid, former.clone()));
        let new = Live { restored, ..Live::new(files.clone()) };
        if let Some(live) = &entry.live {
            if live.restored == new.restored {
                return Ok(volume(project, live));
            }
            if entry.find(former).is_some() {
                return Err(exists(project, former));
            }
            let files = live.files.clone();
            entry.keep(project, former, files);
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
                let files = live.files.clone();
                entry.live = None;
                Ok(entry.keep(project, keep_as, files))
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
        let mut files = self.snapshot_files(source, name)?;
        if !options.same_owner {
            // The clone is charged for its own copy, so nothing may be shared.
            files.values_mut().for_each(|content| *content = Bytes::copy_from_slice(content));
        }
        let options = &options.volume;
        let size: u64 = files.values().map(|content| content.len() as u64).sum();
        let mut projects = self.lock();
        if projects.get(&target).is_some_and(|entry| entry.live.is_some()) {
            return Err(Error::AlreadyExists { project: target, what: "a volume".to_owned() });
        }
        if options.limit_bytes.is_some_and(|limit| size > limit) {
            let what = "the project's quota";
            return Err(Error::NoSpace { project: target, operation: "clone into", what });
        }
        let entry = projects.entry(target).or_default();
        entry.limit_bytes = options.limit_bytes;
        Ok(volume(target, entry.live.insert(Live::new(files))))
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
        let files = match snapshot {
            Some(name) => &find(&projects, project, name)?.1,
            None => &entry.live.as_ref().ok_or(Error::NotFound { project })?.files,
        };
        // Another owner's clone never shares; one of the same owner may.
        let elsewhere: HashSet<_> = projects
            .values()
            .flat_map(|entry| {
                let live = entry.live.iter().map(|live| &live.files);
                live.chain(entry.snapshots.iter().map(|(_, files)| files))
            })
            .filter(|other| !std::ptr::eq(*other, files))
            .flat_map(|other| other.values().map(|content| content.as_ptr()))
            .collect();
        let mut footprint = Footprint { entries: files.len() as u64, ..Footprint::default() };
        for content in files.values() {
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
                &live.ok_or(Error::NotFound { project })?.files
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
                &live.ok_or(Error::NotFound { project: from.project })?.files
            }
        };
        let (source_root, target_root) = (from.path.to_string(), to.path.to_string());
        let mut taken: Files = source
            .iter()
            .filter(|(path, _)| is_within(path, &source_root))
            .map(|(path, content)| (format!("{target_root}{}", &path[source_root.len()..]), content.clone()))
            .collect();
        if taken.is_empty() {
            return Err(refuse(from, "there is nothing"));
        }
        let shares = options.same_owner || from.project == to.project;
        if !shares {
            taken.values_mut().for_each(|content| *content = Bytes::copy_from_slice(content));
        }
        let entry = projects.get_mut(&to.project).ok_or(Error::NotFound { project: to.project })?;
        let live = entry.live.as_mut().ok_or(Error::NotFound { project: to.project })?;
        let Some((directory, _)) = to.path.split_last() else {
            return Err(refuse(to, "the root itself is restored, not copied"));
        };
        let directory = directory.to_string();
        let inside = |path: &String| path.len() > directory.len() && is_within(path, &directory);
        if !directory.is_empty() && !live.files.keys().any(inside) {
            return Err(refuse(to, "its directory does not exist"));
        }
        let former = live.files.clone();
        if live.files.keys().any(|path| is_within(path, &target_root)) && !options.replace {
            return Err(Error::AlreadyExists { project: to.project, what: format!("{:?}", to.path) });
        }
        live.files.retain(|path, _| !is_within(path, &target_root));
        let bytes = taken.values().map(|content| content.len() as u64).sum();
        let copied =
            Copied { entries: taken.len() as u64, bytes, shared_bytes: if shares { bytes } else { 0 } };
        live.files.append(&mut taken);
        if entry.limit_bytes.is_some_and(|limit| entry.charged() > limit) {
            if let Some(live) = &mut entry.live {
                live.files = former;
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
        let (snapshot, files) = find(name)?;
        let base = options.base.as_ref().map(find).transpose()?;
        let mut holds = vec![self.holds.take(project, name)];
        holds.extend(options.base.iter().map(|base| self.holds.take(project, base)));
        for source in &options.sources {
            find(source)?;
            holds.push(self.holds.take(project, source));
        }
        let none = Files::new();
        let old = base.map_or(&none, |(_, files)| files);
        let payload = Payload {
            origin: snapshot.origin,
            base: base.map(|(snapshot, _)| snapshot.origin),
            written: files
                .iter()
                .filter(|(path, content)| old.get(*path) != Some(content))
                .map(|(path, content)| (path.clone(), STANDARD.encode(content)))
                .collect(),
            removed: old.keys().filter(|path| !files.contains_key(*path)).cloned().collect(),
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
        let mut files = base.map(|(_, files)| files.clone()).unwrap_or_default();
        for path in payload.removed {
            if files.remove(&path).is_none() {
                return Err(bad("it removes what its base does not have".to_owned()));
            }
        }
        for (path, content) in payload.written {
            let content = STANDARD.decode(content).map_err(|error| bad(error.to_string()))?;
            files.insert(path, content.into());
        }
        let snapshot = Snapshot {
            project,
            name: header.name.clone(),
            uuid: VolumeUuid::random(),
            origin: header.origin,
            created,
        };
        let entry = projects.entry(project).or_default();
        entry.snapshots.push((snapshot.clone(), files));
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
