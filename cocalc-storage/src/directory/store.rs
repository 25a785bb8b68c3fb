//! Volumes and snapshots as directories. Everything here blocks, and what
//! changes a project runs when it is the project's turn.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Write as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::DirBuilderExt as _,
    },
    path::{Path, PathBuf},
};

use cocalc_core::{
    ids::{ProjectId, SnapshotName, Timestamp, TreePath, VolumeUuid},
    storage::{Copied, CopyOptions, Error, Footprint, Holds, Place, SendHeader, Snapshot, Volume},
};
use rustix::fs::{CWD, FlockOperation, RenameFlags};
use serde::{Deserialize, Serialize};

use super::{pipe::BlockingReader, stream};
use crate::{
    failure::{Doing as _, Failure},
    tree,
};

const LOCK: &str = ".cocalc-directory";
const ABOUT: &str = "about.json";
const INTENT: &str = ".intent";
const COPY: &str = ".copy";

/// What is known of a volume or snapshot.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct About {
    pub(super) uuid: VolumeUuid,
    /// Of a snapshot; a live volume's is what it would have.
    pub(super) origin: VolumeUuid,
    pub(super) created: Timestamp,
    /// Orders the snapshots of a project: clocks go back.
    number: u64,
    /// The snapshot and the `former` of the restore that made a live volume.
    restored: Option<(VolumeUuid, SnapshotName)>,
}

/// What travels beside a stream.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Extra {
    /// When the snapshot was first taken.
    pub(super) created: Timestamp,
}

/// To keep the live volume `live`, once it has been exchanged for the one in
/// staging, as snapshot `kept`.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Intent {
    project: ProjectId,
    live: VolumeUuid,
    kept: SnapshotName,
    staging: VolumeUuid,
}

/// To copy files into a live volume, under this name until they are whole.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct CopyIntent {
    project: ProjectId,
    path: TreePath,
}

#[derive(Debug)]
pub(super) struct Store {
    pub(super) root: PathBuf,
    pub(super) holds: Holds,
    /// Holds the lock that keeps a second process out.
    _lock: File,
}

impl Store {
    pub(super) fn open(root: PathBuf) -> Result<Self, Failure> {
        if !root.exists() {
            let mut directory = DirBuilder::new();
            directory.recursive(true).mode(0o700).create(&root).doing("make the directory")?;
        }
        let root = fs::canonicalize(root).doing("find the directory")?;
        for name in names(&root)? {
            if ![LOCK, "projects", "staging", "trash"].contains(&name.as_str()) {
                return Err(Failure::Wrong(format!("it holds {name:?}, which is not ours")));
            }
        }
        let lock = File::options().create(true).append(true).open(root.join(LOCK)).doing("make the lock")?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .doing("lock the directory, which another process uses")?;
        for name in ["projects", "staging", "trash"] {
            make(&root.join(name)).doing("make a directory")?;
        }
        let store = Self { root, holds: Holds::default(), _lock: lock };
        store.recover()?;
        Ok(store)
    }

    fn project_dir(&self, project: ProjectId) -> PathBuf {
        self.root.join("projects").join(project.to_string())
    }

    fn live_dir(&self, project: ProjectId) -> PathBuf {
        self.project_dir(project).join("live")
    }

    pub(super) fn snapshot_dir(&self, project: ProjectId, name: &SnapshotName) -> PathBuf {
        self.project_dir(project).join("snapshots").join(name.as_str())
    }

    fn staging_dir(&self, id: VolumeUuid) -> PathBuf {
        self.root.join("staging").join(id.to_string())
    }

    /// Finishes or drops what was begun.
    fn recover(&self) -> Result<(), Failure> {
        let staging = self.root.join("staging");
        for name in names(&staging)?.iter().filter(|name| name.ends_with(INTENT)) {
            let text = fs::read(staging.join(name)).doing("read an intent")?;
            // Intents are durable before anything is done; a cut one is of
            // nothing.
            if let Ok(intent) = serde_json::from_slice::<Intent>(&text) {
                let staged = about(&self.staging_dir(intent.staging))?;
                if staged.is_some_and(|about| about.uuid == intent.live) {
                    self.keep(&intent)?;
                }
            }
        }
        for name in names(&staging)?.iter().filter(|name| name.ends_with(COPY)) {
            let text = fs::read(staging.join(name)).doing("read an intent")?;
            if let Ok(intent) = serde_json::from_slice::<CopyIntent>(&text)
                && self.live(intent.project)?.is_some()
            {
                tree::remove_left(&self.root_of(intent.project, None)?, &intent.path)?;
            }
        }
        for place in [staging, self.root.join("trash")] {
            for name in names(&place)? {
                let path = place.join(name);
                let removed = if path.is_dir() { tree::remove(&path) } else { fs::remove_file(&path) };
                removed.doing("empty staging")?;
            }
        }
        Ok(())
    }

    fn live(&self, project: ProjectId) -> Result<Option<About>, Failure> {
        about(&self.live_dir(project))
    }

    pub(super) fn volume(&self, project: ProjectId) -> Result<Option<Volume>, Failure> {
        let path = Some(self.live_dir(project).join("tree"));
        Ok(self.live(project)?.map(|about| Volume { project, uuid: about.uuid, path }))
    }

    fn live_volume(&self, project: ProjectId) -> Result<Volume, Failure> {
        self.volume(project)?.ok_or_else(|| Failure::Wrong("the live volume has vanished".to_owned()))
    }

    pub(super) fn list(&self) -> Result<Vec<Volume>, Failure> {
        let mut found = Vec::new();
        for name in names(&self.root.join("projects"))? {
            if let Ok(project) = name.parse() {
                found.extend(self.volume(project)?);
            }
        }
        found.sort_by_key(|volume| volume.project);
        Ok(found)
    }

    fn find(&self, project: ProjectId, name: &SnapshotName) -> Result<Option<About>, Failure> {
        about(&self.snapshot_dir(project, name))
    }

    pub(super) fn need(&self, project: ProjectId, name: &SnapshotName) -> Result<About, Failure> {
        self.find(project, name)?.ok_or_else(|| Error::NoSnapshot { project, name: name.clone() }.into())
    }

    pub(super) fn footprint(
        &self,
        project: ProjectId,
        snapshot: Option<&SnapshotName>,
    ) -> Result<Footprint, Failure> {
        let place = match snapshot {
            Some(name) => {
                self.need(project, name)?;
                self.snapshot_dir(project, name)
            }
            None => {
                self.live(project)?.ok_or(Error::NotFound { project })?;
                self.live_dir(project)
            }
        };
        let root = tree::open_root(&place.join("tree")).doing("open the files")?;
        // What is not written out has no extents.
        rustix::fs::syncfs(&root).doing("write the files out")?;
        // Each tree has metadata of its own, and what is within that.
        crate::walk::footprint(root.as_fd(), crate::walk::Inline::Exclusive)
    }

    fn numbered(&self, project: ProjectId) -> Result<Vec<(u64, Snapshot)>, Failure> {
        let mut found = Vec::new();
        for name in names(&self.project_dir(project).join("snapshots"))? {
            let Ok(name) = name.parse::<SnapshotName>() else { continue };
            if let Some(about) = self.find(project, &name)? {
                found.push((about.number, snapshot(project, &name, &about)));
            }
        }
        found.sort_by_key(|(number, _)| *number);
        Ok(found)
    }

    pub(super) fn snapshots(&self, project: ProjectId) -> Result<Vec<Snapshot>, Failure> {
        Ok(self.numbered(project)?.into_iter().map(|(_, snapshot)| snapshot).collect())
    }

    fn next_number(&self, project: ProjectId) -> Result<u64, Failure> {
        Ok(self.numbered(project)?.last().map_or(0, |(number, _)| number.saturating_add(1)))
    }

    /// Makes in staging what a volume or snapshot is, with a copy of `from`.
    fn stage(&self, id: VolumeUuid, from: Option<&Path>, about: &About) -> Result<(), Failure> {
        let place = self.staging_dir(id);
        make(&place).doing("make a place in staging")?;
        make(&place.join("tree")).doing("make a place in staging")?;
        let to = tree::open_root(&place.join("tree")).doing("open staging")?;
        match from {
            Some(from) => {
                let from = tree::open_root(&from.join("tree")).doing("open the files")?;
                tree::copy(from, to, tree::Sharing::Allowed, None).doing("copy the files")?;
            }
            None => furnish(&place.join("tree")).doing("furnish a volume")?,
        }
        write_about(&place, about)
    }

    /// Moves from staging into place, durably, or removes it from staging.
    fn place(&self, id: VolumeUuid, staged: Result<(), Failure>, to: &Path) -> Result<(), Failure> {
        let from = self.staging_dir(id);
        let placed = staged.and_then(|()| self.put(&from, to));
        if placed.is_err() {
            // What can't be removed now is removed when the store opens.
            let _ = tree::remove(&from);
        }
        placed
    }

    /// Moves to where nothing is, durably.
    fn put(&self, from: &Path, to: &Path) -> Result<(), Failure> {
        let parent = to.parent().unwrap_or(&self.root);
        fs::create_dir_all(parent).doing("make a directory")?;
        flush(from)?;
        rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE).doing("put it in place")?;
        flush(parent)
    }

    pub(super) fn create(&self, project: ProjectId) -> Result<Volume, Failure> {
        self.refuse_live(project)?;
        let id = VolumeUuid::random();
        self.place(id, self.stage(id, None, &About::new(0, None)), &self.live_dir(project))?;
        self.live_volume(project)
    }

    fn refuse_live(&self, project: ProjectId) -> Result<(), Failure> {
        match self.live(project)? {
            Some(_) => Err(Error::AlreadyExists { project, what: "a volume".to_owned() }.into()),
            None => Ok(()),
        }
    }

    fn refuse_snapshot(&self, project: ProjectId, name: &SnapshotName) -> Result<(), Failure> {
        match self.find(project, name)? {
            Some(_) => Err(Error::AlreadyExists { project, what: format!("a snapshot {name}") }.into()),
            None => Ok(()),
        }
    }

    pub(super) fn delete(&self, project: ProjectId) -> Result<(), Failure> {
        self.holds.refuse_any(project)?;
        self.bury(&self.project_dir(project))
    }

    pub(super) fn delete_snapshot(&self, project: ProjectId, name: &SnapshotName) -> Result<(), Failure> {
        self.holds.refuse_held(project, name)?;
        self.bury(&self.snapshot_dir(project, name))
    }

    /// One rename makes it gone; what is in the trash is removed now or when
    /// the store opens.
    fn bury(&self, path: &Path) -> Result<(), Failure> {
        let trash = self.root.join("trash").join(VolumeUuid::random().to_string());
        match fs::rename(path, &trash) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.doing("put it into the trash")?,
        }
        flush(&self.root)?;
        if let Err(error) = tree::remove(&trash) {
            tracing::warn!(%error, "something is left in the trash until the store opens again");
        }
        Ok(())
    }

    pub(super) fn snapshot(&self, project: ProjectId, name: &SnapshotName) -> Result<Snapshot, Failure> {
        if let Some(about) = self.find(project, name)? {
            return Ok(snapshot(project, name, &about));
        }
        self.live(project)?.ok_or(Error::NotFound { project })?;
        let id = VolumeUuid::random();
        let about = About::new(self.next_number(project)?, None);
        let staged = self.stage(id, Some(&self.live_dir(project)), &about);
        self.place(id, staged, &self.snapshot_dir(project, name))?;
        Ok(snapshot(project, name, &about))
    }

    pub(super) fn restore(
        &self,
        project: ProjectId,
        name: &SnapshotName,
        former: &SnapshotName,
    ) -> Result<Volume, Failure> {
        let restored = Some((self.need(project, name)?.uuid, former.clone()));
        let live = self.live(project)?;
        if let Some(live) = &live {
            if live.restored == restored {
                return self.live_volume(project);
            }
            self.refuse_snapshot(project, former)?;
        }
        let id = VolumeUuid::random();
        let staged = self.stage(id, Some(&self.snapshot_dir(project, name)), &About::new(0, restored));
        let Some(live) = live else {
            self.place(id, staged, &self.live_dir(project))?;
            return self.live_volume(project);
        };
        let exchanged = staged.and_then(|()| {
            flush(&self.staging_dir(id))?;
            self.exchange(&Intent { project, live: live.uuid, kept: former.clone(), staging: id })
        });
        if exchanged.is_err() && about(&self.staging_dir(id))?.is_none_or(|staged| staged.uuid != live.uuid) {
            // Not exchanged: it is only a copy.
            let _ = tree::remove(&self.staging_dir(id));
        }
        exchanged?;
        self.live_volume(project)
    }

    fn exchange(&self, intent: &Intent) -> Result<(), Failure> {
        let path = self.intend(&format!("{}{INTENT}", intent.staging), intent)?;
        let staged = self.staging_dir(intent.staging);
        rustix::fs::renameat_with(CWD, &staged, CWD, self.live_dir(intent.project), RenameFlags::EXCHANGE)
            .doing("exchange the volumes")?;
        flush(&self.root)?;
        self.keep(intent)?;
        fs::remove_file(&path).doing("remove an intent")
    }

    /// Writes down, durably, what is about to be done.
    fn intend(&self, name: &str, intent: &impl Serialize) -> Result<PathBuf, Failure> {
        let text = serde_json::to_vec(intent).map_err(|error| Failure::Wrong(error.to_string()))?;
        let path = self.root.join("staging").join(name);
        let mut file = File::create(&path).doing("write an intent")?;
        file.write_all(&text).and_then(|()| file.sync_all()).doing("write an intent")?;
        flush(&self.root)?;
        Ok(path)
    }

    /// The open root of the files of a snapshot, or of the live volume.
    pub(super) fn root_of(
        &self,
        project: ProjectId,
        snapshot: Option<&SnapshotName>,
    ) -> Result<OwnedFd, Failure> {
        let place = match snapshot {
            Some(name) => {
                self.need(project, name)?;
                self.snapshot_dir(project, name)
            }
            None => {
                self.live(project)?.ok_or(Error::NotFound { project })?;
                self.live_dir(project)
            }
        };
        tree::open_root(&place.join("tree")).doing("open the files")
    }

    pub(super) fn copy_files(
        &self,
        from: &Place,
        to: &Place,
        options: CopyOptions,
    ) -> Result<Copied, Failure> {
        let source = self.root_of(from.project, from.snapshot.as_ref())?;
        let target = self.root_of(to.project, None)?;
        let plan = tree::Plan::new(source, from, &target, to, options)?;
        let intent = CopyIntent { project: to.project, path: plan.temporary()? };
        let path = self.intend(&format!("{}{COPY}", VolumeUuid::random()), &intent)?;
        let copied = plan.build().and_then(|copied| {
            // Whole when it appears, even after a loss of power.
            flush(&self.root)?;
            plan.put()?;
            flush(&self.root)?;
            Ok(copied)
        });
        // What it has replaced, or what has failed.
        plan.clean()?;
        flush(&self.root)?;
        fs::remove_file(&path).doing("remove an intent")?;
        copied
    }

    /// Makes what was live, and is in staging, a snapshot.
    fn keep(&self, intent: &Intent) -> Result<(), Failure> {
        let staged = self.staging_dir(intent.staging);
        let number = self.next_number(intent.project)?;
        write_about(&staged, &About::kept(intent.live, number))?;
        // If this fails, it stays in staging, with its intent, until the store
        // opens: it is the only copy.
        self.put(&staged, &self.snapshot_dir(intent.project, &intent.kept))
    }

    pub(super) fn set_aside(&self, project: ProjectId, keep_as: &SnapshotName) -> Result<Snapshot, Failure> {
        let Some(live) = self.live(project)? else {
            let kept = self.find(project, keep_as)?.ok_or(Error::NotFound { project })?;
            return Ok(snapshot(project, keep_as, &kept));
        };
        self.refuse_snapshot(project, keep_as)?;
        let kept = About::kept(live.uuid, self.next_number(project)?);
        write_about(&self.live_dir(project), &kept)?;
        self.put(&self.live_dir(project), &self.snapshot_dir(project, keep_as))?;
        Ok(snapshot(project, keep_as, &kept))
    }

    pub(super) fn clone_from(
        &self,
        source: ProjectId,
        name: &SnapshotName,
        target: ProjectId,
    ) -> Result<Volume, Failure> {
        self.need(source, name)?;
        self.refuse_live(target)?;
        let id = VolumeUuid::random();
        let staged = self.stage(id, Some(&self.snapshot_dir(source, name)), &About::new(0, None));
        self.place(id, staged, &self.live_dir(target))?;
        self.live_volume(target)
    }

    /// Whether a stream with this header may come; `Some` if what it holds is
    /// here already.
    pub(super) fn admit(&self, header: &SendHeader) -> Result<Option<Snapshot>, Failure> {
        let project = header.project;
        if let Some(about) = self.find(project, &header.name)? {
            if about.origin == header.origin {
                return Ok(Some(snapshot(project, &header.name, &about)));
            }
            return Err(Error::AlreadyExists { project, what: format!("a snapshot {}", header.name) }.into());
        }
        // The stream is whole, but the contract promises the receiver's base.
        if let Some((name, origin)) = &header.base
            && self.need(project, name)?.origin != *origin
        {
            return Err(bad(header, format!("its base {name} is not the snapshot of that name here")));
        }
        Ok(None)
    }

    /// Builds in staging what a stream holds.
    pub(super) fn build(
        &self,
        staging: VolumeUuid,
        header: &SendHeader,
        reader: BlockingReader,
    ) -> Result<(), Failure> {
        let place = self.staging_dir(staging);
        make(&place).doing("make a place in staging")?;
        make(&place.join("tree")).doing("make a place in staging")?;
        let root = tree::open_root(&place.join("tree")).doing("open staging")?;
        stream::read(reader, header.origin, root).map_err(|error| match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Failure::Io { doing: "build what the stream holds", source: error }
            }
            io::ErrorKind::UnexpectedEof => bad(header, "it is cut off".to_owned()),
            _ => bad(header, error.to_string()),
        })
    }

    /// Makes an empty place for the files of a snapshot, and returns its root.
    pub(super) fn stage_files(
        &self,
        staging: VolumeUuid,
        project: ProjectId,
        name: &SnapshotName,
    ) -> Result<PathBuf, Failure> {
        self.refuse_snapshot(project, name)?;
        let place = self.staging_dir(staging);
        make(&place).doing("make a place in staging")?;
        make(&place.join("tree")).doing("make a place in staging")?;
        Ok(place.join("tree"))
    }

    /// Makes what was written there a snapshot, or removes it.
    pub(super) fn publish_files(
        &self,
        staging: VolumeUuid,
        project: ProjectId,
        name: &SnapshotName,
    ) -> Result<Snapshot, Failure> {
        let about = About::new(self.next_number(project)?, None);
        let staged = self
            .refuse_snapshot(project, name)
            .and_then(|()| write_about(&self.staging_dir(staging), &about));
        self.place(staging, staged, &self.snapshot_dir(project, name))?;
        Ok(snapshot(project, name, &about))
    }

    /// Removes a place that nobody wants any more.
    pub(super) fn remove_files(&self, staging: VolumeUuid) -> Result<(), Failure> {
        tree::remove(&self.staging_dir(staging)).doing("empty staging")
    }

    /// Makes what was built a snapshot, or removes it.
    pub(super) fn publish(
        &self,
        staging: VolumeUuid,
        header: &SendHeader,
        built: Result<(), Failure>,
    ) -> Result<Snapshot, Failure> {
        let (project, name) = (header.project, &header.name);
        let mut about = About::new(self.next_number(project)?, None);
        about.origin = header.origin;
        let mut arrived = None;
        let staged = built.and_then(|()| {
            if !header.extra.is_empty() {
                let extra: Extra =
                    serde_json::from_str(&header.extra).map_err(|error| bad(header, error.to_string()))?;
                // A snapshot is as old as it is, not as long here.
                about.created = extra.created;
            }
            // Somebody else may have brought it meanwhile.
            arrived = self.admit(header)?;
            write_about(&self.staging_dir(staging), &about)
        });
        if let (Ok(()), Some(arrived)) = (&staged, arrived) {
            let _ = tree::remove(&self.staging_dir(staging));
            return Ok(arrived);
        }
        self.place(staging, staged, &self.snapshot_dir(project, name))?;
        Ok(snapshot(project, name, &about))
    }
}

impl About {
    fn new(number: u64, restored: Option<(VolumeUuid, SnapshotName)>) -> Self {
        Self { restored, ..Self::kept(VolumeUuid::random(), number) }
    }

    /// Of the snapshot that a live volume becomes.
    fn kept(uuid: VolumeUuid, number: u64) -> Self {
        Self { uuid, origin: uuid, created: Timestamp::now(), number, restored: None }
    }
}

fn bad(header: &SendHeader, reason: String) -> Failure {
    Error::BadStream { project: header.project, reason }.into()
}

fn snapshot(project: ProjectId, name: &SnapshotName, about: &About) -> Snapshot {
    Snapshot { project, name: name.clone(), uuid: about.uuid, origin: about.origin, created: about.created }
}

/// What is known of the volume or snapshot at `path`; `None` if nothing is
/// there.
fn about(path: &Path) -> Result<Option<About>, Failure> {
    match fs::read(path.join(ABOUT)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => {
            let text = other.doing("read about a volume")?;
            serde_json::from_slice(&text).map(Some).map_err(|error| Failure::Wrong(error.to_string()))
        }
    }
}

fn write_about(place: &Path, about: &About) -> Result<(), Failure> {
    let text = serde_json::to_vec(about).map_err(|error| Failure::Wrong(error.to_string()))?;
    let new = place.join("about.json.new");
    let mut file = File::create(&new).doing("write about a volume")?;
    file.write_all(&text).and_then(|()| file.sync_all()).doing("write about a volume")?;
    fs::rename(new, place.join(ABOUT)).doing("write about a volume")
}

/// Makes what was done below survive a loss of power.
fn flush(path: &Path) -> Result<(), Failure> {
    let directory = File::open(path).doing("open a directory")?;
    rustix::fs::syncfs(&directory).doing("write the files out")
}

fn make(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Makes what a new volume has.
fn furnish(volume: &Path) -> io::Result<()> {
    use std::os::unix::fs::{PermissionsExt as _, chown};
    for name in ["", "home", "system"] {
        make(&volume.join(name))?;
        fs::set_permissions(volume.join(name), fs::Permissions::from_mode(0o755))?;
    }
    if rustix::process::geteuid().is_root() {
        chown(volume.join("home"), Some(1000), Some(1000))?;
    }
    Ok(())
}

/// The names in a directory; none if there is none.
fn names(path: &Path) -> Result<Vec<String>, Failure> {
    let directory = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.doing("list a directory")?,
    };
    let mut names = Vec::new();
    for entry in directory {
        names.push(entry.doing("list a directory")?.file_name().to_string_lossy().into_owned());
    }
    Ok(names)
}
