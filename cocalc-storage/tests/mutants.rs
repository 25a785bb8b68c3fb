//! Proves that the contract suite bites: deliberately broken backends, each
//! caught by a named property. Which caught which is published in
//! `docs/storage.md`; `COCALC_BLESS=1` writes it anew. Needs root, for owners and
//! devices, and loop devices for a power cut.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests report by panicking, in helpers too")]

mod common;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use cocalc_core::{
    ids::{ProjectId, SnapshotName, TreePath, VolumeUuid},
    storage::{
        Capabilities, ChangeKind, Changes, CloneOptions, Copied, CopyOptions, Error, Footprint, Hold, Holds,
        Place, Result, SendHeader, SendOptions, SendStream, Snapshot, Staged, Storage, Usage, Volume,
        VolumeOptions,
    },
    stream::BoxRead,
};
use cocalc_storage::Directory;
use cocalc_testkit::storage::{FilesHarness, Host, MemoryHarness, PROPERTIES, examine};
use tokio::io::AsyncReadExt as _;

/// A way to break the contract.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Mutant {
    CreateTwice,
    DeleteTwiceFails,
    DeleteForgetsSnapshots,
    SnapshotTakenAgain,
    SnapshotFollowsLive,
    SnapshotsNewestFirst,
    ListReversed,
    RestoreKeepsNothing,
    RestoreOverwritesFormer,
    RestoreAgainAndAgain,
    SetAsideKeepsLive,
    CloneTwice,
    LimitIgnored,
    SendIgnoresBase,
    BrokenStreamLeavesSnapshot,
    BrokenStreamAccepted,
    ReceiveChangesOrigin,
    ReceiveTwiceFails,
    ReceiveReplaces,
    MissingBaseUntyped,
    SenderFailureSwallowed,
    HoldIgnored,
    SendHoldsNothing,
    ChangedNever,
    ChangedAlways,
    DiffMissesRemovals,
    DiffPagesOverlap,
    CopyReplacesUnasked,
    CopySharesBetweenOwners,
    FootprintAllExclusive,
    UsageWithoutSnapshots,
    StreamsDiffer,
    LimitWithoutSnapshots,
    BrokenStreamLeavesVolume,
    RestoreAgainAfterAll,
    SnapshotIsTheLiveTree,
    AttributesLost,
    OwnersLost,
    NanosecondsLost,
    HardLinksBroken,
    HolesFilled,
    SpecialFilesLost,
    EmptyDirectoriesLost,
    ReceivedModesLost,
    CopyFollowsLinks,
    CopyReadsNamesAgain,
    StreamsSpooledOutside,
    StagedReplaces,
    AcknowledgedBeforeDurable,
}

use Mutant as M;

/// On a store in memory.
const IN_MEMORY: &[Mutant] = &[
    M::CreateTwice,
    M::DeleteTwiceFails,
    M::DeleteForgetsSnapshots,
    M::SnapshotTakenAgain,
    M::SnapshotFollowsLive,
    M::SnapshotsNewestFirst,
    M::ListReversed,
    M::RestoreKeepsNothing,
    M::RestoreOverwritesFormer,
    M::RestoreAgainAndAgain,
    M::SetAsideKeepsLive,
    M::CloneTwice,
    M::LimitIgnored,
    M::SendIgnoresBase,
    M::BrokenStreamLeavesSnapshot,
    M::BrokenStreamAccepted,
    M::ReceiveChangesOrigin,
    M::ReceiveTwiceFails,
    M::ReceiveReplaces,
    M::MissingBaseUntyped,
    M::SenderFailureSwallowed,
    M::HoldIgnored,
    M::SendHoldsNothing,
    M::ChangedNever,
    M::ChangedAlways,
    M::DiffMissesRemovals,
    M::DiffPagesOverlap,
    M::CopyReplacesUnasked,
    M::CopySharesBetweenOwners,
    M::FootprintAllExclusive,
    M::UsageWithoutSnapshots,
    M::StreamsDiffer,
    M::LimitWithoutSnapshots,
    M::BrokenStreamLeavesVolume,
    M::RestoreAgainAfterAll,
];

/// On a store of real files.
const ON_FILES: &[Mutant] = &[
    M::SnapshotIsTheLiveTree,
    M::AttributesLost,
    M::OwnersLost,
    M::NanosecondsLost,
    M::HardLinksBroken,
    M::HolesFilled,
    M::SpecialFilesLost,
    M::EmptyDirectoriesLost,
    M::ReceivedModesLost,
    M::CopyFollowsLinks,
    M::CopyReadsNamesAgain,
    M::StreamsSpooledOutside,
    M::StagedReplaces,
];

/// On a store whose power is cut.
const ON_POWER: &[Mutant] = &[M::AcknowledgedBeforeDurable];

#[derive(Debug)]
struct Mutated {
    inner: Arc<dyn Storage>,
    mutant: Mutant,
    /// Of a directory storage.
    root: PathBuf,
    /// What was asked for, where something else is enforced.
    limits: Mutex<BTreeMap<ProjectId, Option<u64>>>,
}

#[async_trait]
impl Storage for Mutated {
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn create(&self, project: ProjectId, options: &VolumeOptions) -> Result<Volume> {
        match (self.mutant, self.inner.create(project, options).await) {
            (Mutant::CreateTwice, Err(_)) => self.inner.volume(project).await,
            (_, made) => made,
        }
    }

    async fn volume(&self, project: ProjectId) -> Result<Volume> {
        self.inner.volume(project).await
    }

    async fn list(&self) -> Result<Vec<Volume>> {
        let mut volumes = self.inner.list().await?;
        if matches!(self.mutant, Mutant::ListReversed) {
            volumes.reverse();
        }
        Ok(volumes)
    }

    async fn delete(&self, project: ProjectId) -> Result<()> {
        match self.mutant {
            Mutant::DeleteTwiceFails => {
                self.inner.volume(project).await?;
                self.inner.delete(project).await
            }
            Mutant::DeleteForgetsSnapshots => {
                let name: SnapshotName = "left".parse().unwrap();
                if self.inner.snapshot(project, &name).await.is_ok() {
                    self.inner.set_aside(project, &"left-2".parse().unwrap()).await?;
                }
                Ok(())
            }
            _ => self.inner.delete(project).await,
        }
    }

    async fn snapshot(&self, project: ProjectId, name: &SnapshotName) -> Result<Snapshot> {
        if matches!(self.mutant, Mutant::SnapshotTakenAgain) {
            self.inner.delete_snapshot(project, name).await?;
        }
        let known = self.inner.snapshots(project).await?.iter().any(|snapshot| snapshot.name == *name);
        let taken = self.inner.snapshot(project, name).await?;
        if ON_FILES.contains(&self.mutant) && !known {
            self.spoil(project, name);
        }
        self.limit_live(project).await?;
        Ok(taken)
    }

    async fn snapshots(&self, project: ProjectId) -> Result<Vec<Snapshot>> {
        let mut snapshots = self.inner.snapshots(project).await?;
        match self.mutant {
            Mutant::SnapshotsNewestFirst => snapshots.reverse(),
            Mutant::SnapshotFollowsLive => {
                // Looking takes them anew.
                for snapshot in &snapshots {
                    if self.inner.volume(project).await.is_ok() {
                        self.inner.delete_snapshot(project, &snapshot.name).await?;
                        self.inner.snapshot(project, &snapshot.name).await?;
                    }
                }
            }
            _ => {}
        }
        Ok(snapshots)
    }

    async fn snapshot_path(&self, project: ProjectId, name: &SnapshotName) -> Result<Option<PathBuf>> {
        self.inner.snapshot_path(project, name).await
    }

    async fn delete_snapshot(&self, project: ProjectId, name: &SnapshotName) -> Result<()> {
        self.inner.delete_snapshot(project, name).await?;
        self.limit_live(project).await
    }

    async fn hold(&self, project: ProjectId, name: &SnapshotName) -> Result<Hold> {
        let hold = self.inner.hold(project, name).await?;
        match self.mutant {
            Mutant::HoldIgnored => Ok(Holds::default().take(project, name)),
            _ => Ok(hold),
        }
    }

    async fn changed_since(&self, project: ProjectId, name: &SnapshotName) -> Result<bool> {
        let changed = self.inner.changed_since(project, name).await?;
        Ok(match self.mutant {
            Mutant::ChangedNever => false,
            Mutant::ChangedAlways => true,
            _ => changed,
        })
    }

    async fn footprint(&self, project: ProjectId, snapshot: Option<&SnapshotName>) -> Result<Footprint> {
        let mut footprint = self.inner.footprint(project, snapshot).await?;
        if self.mutant == Mutant::FootprintAllExclusive {
            footprint.exclusive_bytes = footprint.total_bytes;
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
        let after = if self.mutant == Mutant::DiffPagesOverlap { None } else { after };
        let mut changes = self.inner.diff(project, from, to, after, max).await?;
        if self.mutant == Mutant::DiffMissesRemovals {
            changes.changes.retain(|change| change.kind != ChangeKind::Removed);
        }
        if self.mutant == Mutant::DiffPagesOverlap && after.is_none() {
            changes.more = false;
        }
        Ok(changes)
    }

    async fn copy(&self, from: &Place, to: &Place, options: &CopyOptions) -> Result<Copied> {
        let mut options = *options;
        options.replace |= self.mutant == Mutant::CopyReplacesUnasked;
        options.same_owner |= self.mutant == Mutant::CopySharesBetweenOwners;
        if self.mutant == Mutant::CopyReadsNamesAgain {
            // `%2E%2E` is a name; read as a text once more, it leads upwards.
            let text = to.path.to_string().replace("%252E", ".").replace("%252e", ".").replace("%252f", "/");
            if text != to.path.to_string() {
                let live = self.root.join("projects").join(to.project.to_string()).join("live/tree");
                let _ = fs::write(live.join(text).join("x"), "x");
            }
        }
        if self.mutant == Mutant::CopyFollowsLinks {
            let live = |place: &Place| {
                let project = self.root.join("projects").join(place.project.to_string());
                let tree = match &place.snapshot {
                    Some(name) => project.join("snapshots").join(name.as_str()),
                    None => project.join("live"),
                };
                tree.join("tree").join(place.path.to_string())
            };
            if live(from).is_file() && !live(to).exists() && fs::copy(live(from), live(to)).is_ok() {
                return Ok(Copied::default());
            }
        }
        self.inner.copy(from, to, &options).await
    }

    async fn restore(
        &self,
        project: ProjectId,
        name: &SnapshotName,
        former: &SnapshotName,
    ) -> Result<Volume> {
        match (self.mutant, self.inner.restore(project, name, former).await) {
            (Mutant::RestoreKeepsNothing, restored) => {
                self.inner.delete_snapshot(project, former).await?;
                restored
            }
            (Mutant::RestoreOverwritesFormer, Err(Error::AlreadyExists { .. })) => {
                self.inner.delete_snapshot(project, former).await?;
                self.inner.restore(project, name, former).await
            }
            (Mutant::RestoreAgainAfterAll, Ok(volume)) => {
                // What was restored is forgotten with the next snapshot.
                let all = self.inner.snapshots(project).await?;
                let is_former = |snapshot: &Snapshot| snapshot.name == *former;
                if all.iter().any(is_former) && !all.last().is_some_and(is_former) {
                    self.inner.delete_snapshot(project, former).await?;
                    let scratch: SnapshotName = "scratch".parse().unwrap();
                    self.inner.restore(project, name, &scratch).await?;
                    self.inner.delete_snapshot(project, &scratch).await?;
                }
                self.inner.volume(volume.project).await
            }
            (Mutant::RestoreAgainAndAgain, Ok(_)) => {
                let scratch: SnapshotName = "scratch".parse().unwrap();
                let again = self.inner.restore(project, name, &scratch).await;
                self.inner.delete_snapshot(project, &scratch).await?;
                again
            }
            (_, restored) => restored,
        }
    }

    async fn set_aside(&self, project: ProjectId, keep_as: &SnapshotName) -> Result<Snapshot> {
        match self.mutant {
            Mutant::SetAsideKeepsLive => self.inner.snapshot(project, keep_as).await,
            _ => self.inner.set_aside(project, keep_as).await,
        }
    }

    async fn clone_volume(
        &self,
        source: ProjectId,
        name: &SnapshotName,
        target: ProjectId,
        options: &CloneOptions,
    ) -> Result<Volume> {
        if matches!(self.mutant, Mutant::CloneTwice) && self.inner.snapshots(source).await?.len() == 1 {
            self.inner.delete(target).await?;
        }
        self.inner.clone_volume(source, name, target, options).await
    }

    async fn usage(&self, project: ProjectId) -> Result<Usage> {
        let mut usage = self.inner.usage(project).await?;
        if self.mutant == Mutant::UsageWithoutSnapshots && !self.inner.snapshots(project).await?.is_empty() {
            usage.charged_bytes = 0;
        }
        if self.mutant == Mutant::LimitWithoutSnapshots {
            // What it shows fits to what it enforces.
            if let Some(limit) = self.limits.lock().unwrap().get(&project) {
                usage.limit_bytes = *limit;
            }
            if let Ok(live) = self.inner.footprint(project, None).await {
                usage.charged_bytes = live.total_bytes;
            }
        }
        Ok(usage)
    }

    async fn set_limit(&self, project: ProjectId, limit_bytes: Option<u64>) -> Result<()> {
        match self.mutant {
            Mutant::LimitIgnored => self.inner.usage(project).await.map(|_| ()),
            Mutant::LimitWithoutSnapshots => {
                self.inner.set_limit(project, limit_bytes).await?;
                self.limits.lock().unwrap().insert(project, limit_bytes);
                self.limit_live(project).await
            }
            _ => self.inner.set_limit(project, limit_bytes).await,
        }
    }

    async fn send(
        &self,
        project: ProjectId,
        name: &SnapshotName,
        options: &SendOptions,
    ) -> Result<SendStream> {
        let whole = SendOptions::whole();
        let options = if matches!(self.mutant, Mutant::SendIgnoresBase) { &whole } else { options };
        let mut sent = self.inner.send(project, name, options).await?;
        if matches!(self.mutant, Mutant::SendHoldsNothing | Mutant::StreamsDiffer) {
            let mut bytes = Vec::new();
            sent.reader.read_to_end(&mut bytes).await.unwrap();
            if self.mutant == Mutant::StreamsDiffer {
                // As if something of the moment were in it.
                bytes.extend(VolumeUuid::random().as_bytes());
            }
            sent.reader = Box::pin(std::io::Cursor::new(bytes));
        }
        Ok(sent)
    }

    async fn stage(&self, project: ProjectId, name: &SnapshotName) -> Result<Box<dyn Staged>> {
        if self.mutant == Mutant::StagedReplaces {
            self.inner.delete_snapshot(project, name).await?;
        }
        self.inner.stage(project, name).await
    }

    async fn receive(&self, header: &SendHeader, mut stream: BoxRead) -> Result<Snapshot> {
        let project = header.project;
        match self.mutant {
            Mutant::ReceiveTwiceFails if !self.inner.snapshots(project).await?.is_empty() => {
                return Err(Error::AlreadyExists { project, what: "something".to_owned() });
            }
            Mutant::StreamsSpooledOutside => {
                let spool = self.root.parent().unwrap().join("outside/spool");
                let mut bytes = Vec::new();
                if stream.read_to_end(&mut bytes).await.is_ok() {
                    fs::write(&spool, &bytes).unwrap();
                    fs::remove_file(&spool).unwrap();
                    stream = Box::pin(std::io::Cursor::new(bytes));
                }
            }
            Mutant::ReceiveReplaces => self.inner.delete_snapshot(project, &header.name).await?,
            Mutant::SenderFailureSwallowed => {
                // Its end is taken for a good one, whatever it was.
                let mut bytes = Vec::new();
                let _ = stream.read_to_end(&mut bytes).await;
                stream = Box::pin(std::io::Cursor::new(bytes));
            }
            _ => {}
        }
        match (self.mutant, self.inner.receive(header, stream).await) {
            (Mutant::BrokenStreamLeavesSnapshot, Err(error @ Error::BadStream { .. })) => {
                self.leave(header).await;
                Err(error)
            }
            (Mutant::BrokenStreamAccepted, Err(Error::BadStream { .. })) => {
                self.leave(header).await;
                self.inner.snapshot(project, &header.name).await
            }
            (Mutant::BrokenStreamLeavesVolume, Err(error @ Error::BadStream { .. })) => {
                let _ = self.inner.create(project, &VolumeOptions::default()).await;
                Err(error)
            }
            (Mutant::ReceivedModesLost, Ok(got)) => {
                self.spoil(project, &header.name);
                Ok(got)
            }
            (Mutant::ReceiveChangesOrigin, Ok(got)) => Ok(Snapshot { origin: got.uuid, ..got }),
            (Mutant::MissingBaseUntyped, Err(error @ Error::NoSnapshot { .. })) => {
                Err(Error::Backend { backend: "mutant", operation: "receive", project, source: error.into() })
            }
            (_, got) => got,
        }
    }
}

impl Mutated {
    /// Has the limit hold for the live volume alone.
    async fn limit_live(&self, project: ProjectId) -> Result<()> {
        let asked = self.limits.lock().unwrap().get(&project).copied().flatten();
        if let (Mutant::LimitWithoutSnapshots, Some(limit)) = (self.mutant, asked) {
            let mut held = 0;
            for snapshot in self.inner.snapshots(project).await? {
                held += self.inner.footprint(project, Some(&snapshot.name)).await?.total_bytes;
            }
            self.inner.set_limit(project, Some(limit + held)).await?;
        }
        Ok(())
    }

    /// Does to a finished snapshot what a careless backend would have done.
    fn spoil(&self, project: ProjectId, name: &SnapshotName) {
        let place = self.root.join("projects").join(project.to_string());
        let tree = place.join("snapshots").join(name.as_str()).join("tree");
        if self.mutant == Mutant::SnapshotIsTheLiveTree {
            fs::remove_dir_all(&tree).unwrap();
            std::os::unix::fs::symlink(place.join("live/tree"), &tree).unwrap();
            return;
        }
        let mut todo = vec![tree];
        while let Some(path) = todo.pop() {
            let about = fs::symlink_metadata(&path).unwrap();
            if about.is_dir() {
                todo.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            }
            let times = |secs, nanos| {
                let time = rustix::fs::Timespec { tv_sec: secs, tv_nsec: nanos };
                let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
                rustix::fs::utimensat(rustix::fs::CWD, &path, &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)
                    .unwrap();
            };
            let kind = about.file_type();
            match self.mutant {
                Mutant::AttributesLost if kind.is_file() => {
                    let mut names = vec![0; 65536];
                    let length = rustix::fs::llistxattr(&path, &mut names[..]).unwrap();
                    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
                        rustix::fs::lremovexattr(&path, name).unwrap();
                    }
                }
                Mutant::OwnersLost => std::os::unix::fs::lchown(&path, Some(0), Some(0)).unwrap(),
                Mutant::NanosecondsLost => times(about.mtime(), 0),
                Mutant::HardLinksBroken if kind.is_file() && about.nlink() > 1 => {
                    let content = fs::read(&path).unwrap();
                    fs::remove_file(&path).unwrap();
                    fs::write(&path, content).unwrap();
                }
                Mutant::HolesFilled if kind.is_file() && about.len() > 1 << 20 => {
                    let content = fs::read(&path).unwrap();
                    fs::write(&path, content).unwrap();
                    times(about.mtime(), about.mtime_nsec());
                }
                Mutant::SpecialFilesLost if !(kind.is_file() || kind.is_dir() || kind.is_symlink()) => {
                    fs::remove_file(&path).unwrap();
                }
                Mutant::EmptyDirectoriesLost if kind.is_dir() && path.ends_with("empty") => {
                    fs::remove_dir(&path).unwrap();
                }
                Mutant::ReceivedModesLost if kind.is_file() => {
                    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
                }
                _ => {}
            }
        }
    }

    /// What a broken stream must not leave.
    async fn leave(&self, header: &SendHeader) {
        let _ = self.inner.create(header.project, &VolumeOptions::default()).await;
        let _ = self.inner.set_aside(header.project, &header.name).await;
    }
}

async fn on_files(root: &Path, mutant: Option<Mutant>) -> FilesHarness {
    let places = [root.join("a"), root.join("b")];
    let mut stores: Vec<Arc<dyn Storage>> = Vec::new();
    for place in &places {
        let inner = Arc::new(Directory::open(place).await.unwrap());
        stores.push(match mutant {
            Some(mutant) => {
                Arc::new(Mutated { inner, mutant, root: place.clone(), limits: Mutex::default() })
            }
            None => inner,
        });
    }
    let outside = root.join("outside");
    fs::create_dir(&outside).unwrap();
    FilesHarness::new(stores[0].clone(), stores[1].clone(), move |host: Host, project, name| {
        let project = places[host as usize].join("projects").join(project.to_string());
        project.join("snapshots").join(name.as_str()).join("tree")
    })
    .outside([outside])
}

/// Examines each in a thread of its own, a few at a time, and answers in order.
/// Where time is paused, what a broken backend is given time for is over at
/// once.
fn in_threads<F: Future<Output = Vec<(&'static str, String)>>>(
    mutants: &[Mutant],
    paused: bool,
    examine: impl Fn(Mutant) -> F + Sync,
) -> Vec<(Mutant, Vec<(&'static str, String)>)> {
    let mut all = Vec::new();
    for few in mutants.chunks(4) {
        all.extend(std::thread::scope(|scope| {
            let examine = &examine;
            let running: Vec<_> = few
                .iter()
                .map(|mutant| {
                    scope.spawn(move || {
                        let mut builder = tokio::runtime::Builder::new_current_thread();
                        let runtime = builder.enable_all().start_paused(paused).build();
                        (*mutant, runtime.unwrap().block_on(examine(*mutant)))
                    })
                })
                .collect();
            running.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        }));
    }
    all
}

/// Lines between two marks in a file, or the mark's absence.
const BEGIN: &str = "<!-- written by cocalc-storage/tests/mutants.rs -->\n";
const END: &str = "<!-- until here -->\n";

fn published(section: &str) {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/storage.md");
    let text = fs::read_to_string(path).unwrap();
    let (before, rest) = text.split_once(BEGIN).expect("docs/storage.md has a place for it");
    let (now, after) = rest.split_once(END).expect("docs/storage.md says where that place ends");
    if now == section {
        return;
    }
    if std::env::var_os("COCALC_BLESS").is_some() {
        fs::write(path, format!("{before}{BEGIN}{section}{END}{after}")).unwrap();
        return;
    }
    panic!("docs/storage.md says something else; with COCALC_BLESS=1 this test writes:\n{section}");
}

/// Which properties a store of real files is examined for: those that take
/// long only where they have something to find.
fn of_files(name: &str, mutant: Option<Mutant>) -> bool {
    let roams = matches!(mutant, None | Some(M::CopyFollowsLinks | M::CopyReadsNamesAgain));
    match name {
        "path.hostile" | "files.links-lead-nowhere" => roams,
        // Whether it finds one that follows links is a matter of luck.
        "files.raced" => mutant.is_none(),
        name => ["files.", "snapshot.", "outside."].iter().any(|subject| name.starts_with(subject)),
    }
}

#[tokio::test]
async fn every_broken_backend_is_caught_by_name() {
    assert!(rustix::process::geteuid().is_root(), "needs root: owners and devices are among what is lost");
    let mut section = "\n| property | promise |\n|---|---|\n".to_owned();
    for property in PROPERTIES {
        section += &format!("| `{}` | {} |\n", property.name, property.promise);
    }
    section += "\n| broken on purpose | caught by |\n|---|---|\n";
    let mut survivors = Vec::new();
    let mut row = |mutant: Mutant, broken: Vec<(&'static str, String)>| {
        let names: Vec<_> = broken.iter().map(|(name, _)| format!("`{name}`")).collect();
        section += &format!("| {mutant:?} | {} |\n", names.join(", "));
        if broken.is_empty() {
            survivors.push(mutant);
        }
    };
    // The suite reports by panicking inside; that is no news here.
    std::panic::set_hook(Box::new(|_| ()));
    for (mutant, broken) in in_threads(IN_MEMORY, true, |mutant| async move {
        let harness = MemoryHarness::wrapping(|inner| {
            let limits = Mutex::default();
            Arc::new(Mutated { inner: Arc::new(inner), mutant, root: PathBuf::new(), limits })
        });
        examine(&harness, |_| true).await.broken
    }) {
        row(mutant, broken);
    }
    let root = tempfile::tempdir().unwrap();
    let place = root.path();
    for (mutant, broken) in in_threads(ON_FILES, false, |mutant| async move {
        let harness = on_files(&place.join(format!("{mutant:?}")), Some(mutant)).await;
        examine(&harness, |property| of_files(property.name, Some(mutant))).await.broken
    }) {
        row(mutant, broken);
    }
    for (mutant, broken) in in_threads(ON_POWER, false, |_| async {
        let harness = common::power::powered(|builder| builder.lose_commits()).await;
        examine(&harness, |property| property.name.starts_with("power.")).await.broken
    }) {
        row(mutant, broken);
    }
    // With its commits, the last one is examined in `tests/crash.rs`.
    let sound = on_files(&root.path().join("sound"), None).await;
    let sound = examine(&sound, |property| of_files(property.name, None)).await;
    let _ = std::panic::take_hook();
    assert!(sound.broken.is_empty(), "the backend that is broken on purpose is sound by itself: {sound}");
    assert!(survivors.is_empty(), "not caught: {survivors:?}");
    published(&section);
}
