//! A storage backend of one's own: volumes on shelves in memory.
//!
//! It leans on nothing but the trait. What it cannot do, it says in its
//! capabilities: the contract asks for honesty, not for features.

use std::{
    collections::BTreeMap,
    io::Cursor,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use cocalc_core::{
    ids::{ProjectId, SnapshotName, Timestamp, TreePath, VolumeUuid},
    storage::{
        Capabilities, Changes, CloneOptions, Copied, CopyOptions, Error, Footprint, Hold, Holds, Place,
        Result, SendHeader, SendOptions, SendStream, Snapshot, Staged, Storage, Usage, UsageSource, Volume,
        VolumeOptions,
    },
    stream::BoxRead,
};
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncReadExt as _;

const BACKEND: &str = "shelf";
/// A stream longer than this is refused, whatever it says.
const STREAM_MAX: u64 = 64 << 20;

/// The files of a volume, by path.
pub type Files = BTreeMap<String, Vec<u8>>;

/// Shelves of volumes. Clones are the same shelves.
#[derive(Clone, Debug, Default)]
pub struct Shelves {
    shelves: Arc<Mutex<BTreeMap<ProjectId, Shelf>>>,
    holds: Holds,
}

#[derive(Debug, Default)]
struct Shelf {
    live: Option<Live>,
    snapshots: Vec<(Snapshot, Files)>,
}

#[derive(Debug)]
struct Live {
    uuid: VolumeUuid,
    files: Files,
    /// What the restore that made it was asked, so that a repeated one, after
    /// a lost answer, changes nothing.
    restored: Option<(VolumeUuid, SnapshotName)>,
}

impl Shelf {
    fn find(&self, name: &SnapshotName) -> Option<&(Snapshot, Files)> {
        self.snapshots.iter().find(|(snapshot, _)| snapshot.name == *name)
    }

    fn put(
        &mut self,
        project: ProjectId,
        name: &SnapshotName,
        origin: Option<VolumeUuid>,
        files: Files,
    ) -> Snapshot {
        let uuid = VolumeUuid::random();
        let origin = origin.unwrap_or(uuid);
        let snapshot = Snapshot { project, name: name.clone(), uuid, origin, created: Timestamp::now() };
        self.snapshots.push((snapshot.clone(), files));
        snapshot
    }

    fn bring_to_life(
        &mut self,
        project: ProjectId,
        files: Files,
        restored: Option<(VolumeUuid, SnapshotName)>,
    ) -> Volume {
        let uuid = VolumeUuid::random();
        self.live = Some(Live { uuid, files, restored });
        Volume { project, uuid, path: None }
    }

    /// `Some` if the announced snapshot is here; an error if it may not come.
    fn admit(&self, header: &SendHeader) -> Result<Option<Snapshot>> {
        let project = header.project;
        match self.find(&header.name) {
            Some((snapshot, _)) if snapshot.origin == header.origin => return Ok(Some(snapshot.clone())),
            Some(_) => return Err(taken(project, &header.name)),
            None => {}
        }
        match &header.base {
            None => Ok(None),
            Some((name, origin)) => match self.find(name) {
                None => Err(Error::NoSnapshot { project, name: name.clone() }),
                Some((base, _)) if base.origin == *origin => Ok(None),
                Some(_) => Err(Error::BadStream { project, reason: format!("its base {name} is another") }),
            },
        }
    }
}

fn taken(project: ProjectId, name: &SnapshotName) -> Error {
    Error::AlreadyExists { project, what: format!("a snapshot {name}") }
}

impl Shelves {
    /// Changes the files of a live volume, as its project would.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] without a live volume.
    pub fn edit<T>(&self, project: ProjectId, edit: impl FnOnce(&mut Files) -> T) -> Result<T> {
        let mut shelves = self.lock();
        let live = shelves.get_mut(&project).and_then(|shelf| shelf.live.as_mut());
        Ok(edit(&mut live.ok_or(Error::NotFound { project })?.files))
    }

    /// The files of a snapshot.
    ///
    /// # Errors
    ///
    /// [`Error::NoSnapshot`] if there is none of that name.
    pub fn frozen(&self, project: ProjectId, name: &SnapshotName) -> Result<Files> {
        self.read(project, name).map(|(_, files)| files)
    }

    fn read(&self, project: ProjectId, name: &SnapshotName) -> Result<(Snapshot, Files)> {
        let found = self.lock().get(&project).and_then(|shelf| shelf.find(name)).cloned();
        found.ok_or_else(|| Error::NoSnapshot { project, name: name.clone() })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ProjectId, Shelf>> {
        self.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Storage for Shelves {
    fn capabilities(&self) -> Capabilities {
        let weaknesses = ["nothing survives the process", "no quotas", "every stream is whole"];
        Capabilities {
            backend: BACKEND.to_owned(),
            repeatable_streams: true,
            atomic_snapshots: true,
            detects_no_change: true,
            weaknesses: weaknesses.map(str::to_owned).to_vec(),
            ..Capabilities::default()
        }
    }

    async fn create(&self, project: ProjectId, _options: &VolumeOptions) -> Result<Volume> {
        let mut shelves = self.lock();
        let shelf = shelves.entry(project).or_default();
        match shelf.live {
            Some(_) => Err(Error::AlreadyExists { project, what: "a volume".to_owned() }),
            None => Ok(shelf.bring_to_life(project, Files::new(), None)),
        }
    }

    async fn volume(&self, project: ProjectId) -> Result<Volume> {
        let shelves = self.lock();
        let live = shelves.get(&project).and_then(|shelf| shelf.live.as_ref());
        live.map(|live| Volume { project, uuid: live.uuid, path: None }).ok_or(Error::NotFound { project })
    }

    async fn list(&self) -> Result<Vec<Volume>> {
        let shelves = self.lock();
        let live = shelves.iter().filter_map(|(project, shelf)| Some((*project, shelf.live.as_ref()?.uuid)));
        Ok(live.map(|(project, uuid)| Volume { project, uuid, path: None }).collect())
    }

    async fn delete(&self, project: ProjectId) -> Result<()> {
        let mut shelves = self.lock();
        self.holds.refuse_any(project)?;
        shelves.remove(&project);
        Ok(())
    }

    async fn snapshot(&self, project: ProjectId, name: &SnapshotName) -> Result<Snapshot> {
        let mut shelves = self.lock();
        let shelf = shelves.get_mut(&project).ok_or(Error::NotFound { project })?;
        if let Some((snapshot, _)) = shelf.find(name) {
            return Ok(snapshot.clone());
        }
        let files = shelf.live.as_ref().ok_or(Error::NotFound { project })?.files.clone();
        Ok(shelf.put(project, name, None, files))
    }

    async fn snapshots(&self, project: ProjectId) -> Result<Vec<Snapshot>> {
        let shelves = self.lock();
        let snapshots = shelves.get(&project).into_iter().flat_map(|shelf| &shelf.snapshots);
        Ok(snapshots.map(|(snapshot, _)| snapshot.clone()).collect())
    }

    async fn snapshot_path(&self, project: ProjectId, name: &SnapshotName) -> Result<Option<PathBuf>> {
        let known = self.snapshots(project).await?.iter().any(|snapshot| snapshot.name == *name);
        if known { Ok(None) } else { Err(Error::NoSnapshot { project, name: name.clone() }) }
    }

    async fn delete_snapshot(&self, project: ProjectId, name: &SnapshotName) -> Result<()> {
        let mut shelves = self.lock();
        self.holds.refuse_held(project, name)?;
        if let Some(shelf) = shelves.get_mut(&project) {
            shelf.snapshots.retain(|(snapshot, _)| snapshot.name != *name);
        }
        Ok(())
    }

    async fn hold(&self, project: ProjectId, name: &SnapshotName) -> Result<Hold> {
        let shelves = self.lock();
        let found = shelves.get(&project).and_then(|shelf| shelf.find(name));
        found.ok_or_else(|| Error::NoSnapshot { project, name: name.clone() })?;
        Ok(self.holds.take(project, name))
    }

    async fn changed_since(&self, project: ProjectId, name: &SnapshotName) -> Result<bool> {
        let (_, files) = self.read(project, name)?;
        self.edit(project, |live| *live != files)
    }

    async fn restore(
        &self,
        project: ProjectId,
        name: &SnapshotName,
        former: &SnapshotName,
    ) -> Result<Volume> {
        let (snapshot, files) = self.read(project, name)?;
        let asked = Some((snapshot.uuid, former.clone()));
        let mut shelves = self.lock();
        let shelf = shelves.entry(project).or_default();
        if let Some(live) = &shelf.live {
            if live.restored == asked {
                return Ok(Volume { project, uuid: live.uuid, path: None });
            }
            if shelf.find(former).is_some() {
                return Err(taken(project, former));
            }
            let last = live.files.clone();
            shelf.put(project, former, None, last);
        }
        Ok(shelf.bring_to_life(project, files, asked))
    }

    async fn set_aside(&self, project: ProjectId, keep_as: &SnapshotName) -> Result<Snapshot> {
        let mut shelves = self.lock();
        let shelf = shelves.get_mut(&project).ok_or(Error::NotFound { project })?;
        let kept = shelf.find(keep_as).map(|(snapshot, _)| snapshot.clone());
        match (shelf.live.take(), kept) {
            (None, kept) => kept.ok_or(Error::NotFound { project }),
            (Some(live), None) => Ok(shelf.put(project, keep_as, None, live.files)),
            (live, Some(_)) => {
                shelf.live = live;
                Err(taken(project, keep_as))
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
        let (_, files) = self.read(source, name)?;
        let volume = self.create(target, &options.volume).await?;
        self.edit(target, |live| *live = files)?;
        Ok(volume)
    }

    async fn usage(&self, project: ProjectId) -> Result<Usage> {
        let charged_bytes =
            self.edit(project, |files| files.values().map(|content| content.len() as u64).sum())?;
        Ok(Usage { charged_bytes, limit_bytes: None, source: UsageSource::Walk })
    }

    async fn set_limit(&self, _project: ProjectId, _limit_bytes: Option<u64>) -> Result<()> {
        Err(Error::Unsupported { backend: BACKEND, operation: "limit a project" })
    }

    async fn footprint(&self, _project: ProjectId, _snapshot: Option<&SnapshotName>) -> Result<Footprint> {
        Err(Error::Unsupported { backend: BACKEND, operation: "measure what a project shares" })
    }

    async fn diff(
        &self,
        _project: ProjectId,
        _from: &SnapshotName,
        _to: Option<&SnapshotName>,
        _after: Option<&TreePath>,
        _max: usize,
    ) -> Result<Changes> {
        Err(Error::Unsupported { backend: BACKEND, operation: "compare snapshots" })
    }

    async fn copy(&self, _from: &Place, _to: &Place, _options: &CopyOptions) -> Result<Copied> {
        Err(Error::Unsupported { backend: BACKEND, operation: "copy files" })
    }

    async fn send(
        &self,
        project: ProjectId,
        name: &SnapshotName,
        options: &SendOptions,
    ) -> Result<SendStream> {
        let (snapshot, files) = self.read(project, name)?;
        let base = options.base.as_ref().map(|base| self.read(project, base)).transpose()?;
        let base = base.map(|(base, _)| (base.name, base.origin));
        let held = std::iter::once(name).chain(&options.base).map(|name| self.holds.take(project, name));
        let held = held.collect();
        let body = serde_json::to_vec(&(snapshot.origin, files)).map_err(|error| Error::Backend {
            backend: BACKEND,
            operation: "send",
            project,
            source: error.into(),
        })?;
        // The digest comes last, so that a cut stream has none.
        let stream = [body.as_slice(), Sha256::digest(&body).as_slice()].concat();
        let header = SendHeader {
            backend: BACKEND.to_owned(),
            project,
            name: name.clone(),
            origin: snapshot.origin,
            base,
            extra: String::new(),
            estimated_bytes: stream.len() as u64,
            left_out: Vec::new(),
        };
        Ok(SendStream { header, reader: Hold::during(Box::pin(Cursor::new(stream)), held) })
    }

    async fn stage(&self, _project: ProjectId, _name: &SnapshotName) -> Result<Box<dyn Staged>> {
        Err(Error::Unsupported { backend: BACKEND, operation: "take files: it has none" })
    }

    async fn receive(&self, header: &SendHeader, stream: BoxRead) -> Result<Snapshot> {
        let project = header.project;
        let bad = |reason: &str| Error::BadStream { project, reason: reason.to_owned() };
        if header.backend != BACKEND {
            return Err(bad("it is of another backend"));
        }
        if let Some(snapshot) = self.lock().get(&project).unwrap_or(&Shelf::default()).admit(header)? {
            return Ok(snapshot);
        }
        // Nothing is changed before all of it is here and right.
        let mut bytes = Vec::new();
        let mut limited = stream.take(STREAM_MAX);
        limited.read_to_end(&mut bytes).await.map_err(|error| bad(&format!("it broke off: {error}")))?;
        let (body, digest) = bytes.split_last_chunk::<32>().ok_or_else(|| bad("it is cut off"))?;
        if Sha256::digest(body).as_slice() != digest {
            return Err(bad("its digest is wrong"));
        }
        let (origin, files): (VolumeUuid, Files) =
            serde_json::from_slice(body).map_err(|error| bad(&error.to_string()))?;
        if origin != header.origin {
            return Err(bad("it holds another snapshot than announced"));
        }
        let mut shelves = self.lock();
        // The store was open to others meanwhile.
        if let Some(snapshot) = shelves.get(&project).unwrap_or(&Shelf::default()).admit(header)? {
            return Ok(snapshot);
        }
        Ok(shelves.entry(project).or_default().put(project, &header.name, Some(origin), files))
    }
}
