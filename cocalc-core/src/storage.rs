//! Project volumes on one host.

mod error;
mod files;
mod hold;
mod sending;
mod staged;

use std::{fmt, path::PathBuf};

use async_trait::async_trait;
use cocalc_ids::{ProjectId, SnapshotName, Timestamp, TreePath, VolumeUuid};
use serde::{Deserialize, Serialize};

pub use error::Error;
pub use files::{Change, ChangeKind, Changes, Copied, CopyOptions, Footprint, NodeKind, Place};
pub use hold::{Hold, Holds};
pub use sending::{SendHeader, SendOptions, SendStream};
pub use staged::Staged;

use crate::stream::BoxRead;

/// The result of a storage call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Holds project volumes on one host: live volumes, their snapshots, and what
/// it takes to carry them to another host.
///
/// # Contract
///
/// - Nothing is half done: a call that fails, is cancelled (dropped) or is cut
///   off by a crash leaves either its whole effect or none. What a cut
///   operation left in staging is never listed, and is removed when the store
///   opens.
/// - When a call returns `Ok`, its effect survives a loss of power.
/// - Repeating a call with the same arguments is harmless and gives the same
///   answer, except [`create`](Self::create),
///   [`clone_volume`](Self::clone_volume), and a [`copy`](Self::copy) that does
///   not replace, which say [`AlreadyExists`](Error::AlreadyExists).
/// - What is refused is refused for a reason that is true; where several are,
///   it may be any of them.
/// - A project that has neither a live volume nor a snapshot is unknown: its
///   limit is forgotten.
/// - Two projects never see each other's files or usage.
/// - Snapshots are read-only for ever, and independent of the live volume.
#[async_trait]
pub trait Storage: fmt::Debug + Send + Sync + 'static {
    /// What this backend can do; constant while the store is open.
    fn capabilities(&self) -> Capabilities;

    /// Makes a live volume with nothing in it but the empty directories `home`
    /// and `system`.
    async fn create(&self, project: ProjectId, options: &VolumeOptions) -> Result<Volume>;

    /// The live volume of `project`, or [`NotFound`](Error::NotFound).
    async fn volume(&self, project: ProjectId) -> Result<Volume>;

    /// All live volumes, ordered by project.
    async fn list(&self) -> Result<Vec<Volume>>;

    /// Deletes the live volume and every snapshot of `project`. Deleting what
    /// is not there is harmless. Space may return later.
    /// [`InUse`](Error::InUse) while a snapshot is held.
    async fn delete(&self, project: ProjectId) -> Result<()>;

    /// Freezes the project's files under `name`. A snapshot that has this name
    /// already is returned unchanged. [`NestedVolumes`](Error::NestedVolumes),
    /// as from [`restore`](Self::restore) and [`set_aside`](Self::set_aside),
    /// if files would be missing in it.
    async fn snapshot(&self, project: ProjectId, name: &SnapshotName) -> Result<Snapshot>;

    /// The snapshots of `project`, oldest first; empty if it has none or is
    /// unknown.
    async fn snapshots(&self, project: ProjectId) -> Result<Vec<Snapshot>>;

    /// Where the files of snapshot `name` are on this host, for who reads them
    /// while they are [held](Self::hold); `None` for a backend without files.
    /// [`NoSnapshot`](Error::NoSnapshot) if it is not there.
    async fn snapshot_path(&self, project: ProjectId, name: &SnapshotName) -> Result<Option<PathBuf>>;

    /// Deletes one snapshot. Deleting what is not there is harmless.
    /// [`InUse`](Error::InUse) while it is held.
    async fn delete_snapshot(&self, project: ProjectId, name: &SnapshotName) -> Result<()>;

    /// Keeps a snapshot from being deleted until the hold is dropped: for as
    /// long as a move, a backup or a comparison reads it. Holds end with the
    /// process. A stream holds what it sends by itself.
    async fn hold(&self, project: ProjectId, name: &SnapshotName) -> Result<Hold>;

    /// Whether the live volume may differ from snapshot `name` of it. Answers
    /// in constant time, so it may say yes when nothing has changed; it never
    /// says no when something has, and what was written before the call counts.
    async fn changed_since(&self, project: ProjectId, name: &SnapshotName) -> Result<bool>;

    /// Makes the live volume a writable copy of snapshot `name`, replacing
    /// what was live, whose last state is kept as snapshot `former`. Also
    /// brings a received snapshot to life where no live volume exists; then
    /// nothing is kept. The project must not be running.
    async fn restore(&self, project: ProjectId, name: &SnapshotName, former: &SnapshotName)
    -> Result<Volume>;

    /// Takes the live volume away and keeps its last state as the read-only
    /// snapshot `keep_as`, for which a backend need not charge the project.
    /// Harmless when there is no live volume and `keep_as` exists. The project
    /// must not be running.
    async fn set_aside(&self, project: ProjectId, keep_as: &SnapshotName) -> Result<Snapshot>;

    /// Makes a new live volume for `target` from snapshot `name` of `source`.
    /// At once where the backend can and `options.same_owner` allows it;
    /// otherwise every byte is copied, so that neither is charged for the
    /// other.
    async fn clone_volume(
        &self,
        source: ProjectId,
        name: &SnapshotName,
        target: ProjectId,
        options: &CloneOptions,
    ) -> Result<Volume>;

    /// What the project is charged, and its limit.
    async fn usage(&self, project: ProjectId) -> Result<Usage>;

    /// Changes the limit, in bytes over the live volume and its snapshots;
    /// `None` lifts it. [`Unsupported`](Error::Unsupported) without quotas.
    async fn set_limit(&self, project: ProjectId, limit_bytes: Option<u64>) -> Result<()>;

    /// Bytes of the live volume, or of one snapshot, and how many of them
    /// nothing else shares. Reads every extent: for people who ask, not for a
    /// path that must be fast.
    async fn footprint(&self, project: ProjectId, snapshot: Option<&SnapshotName>) -> Result<Footprint>;

    /// What is different in snapshot `to`, or in the live volume, from snapshot
    /// `from`: at most `max` changes, in the order of their paths (component
    /// by component, by bytes), of those after `after`. What was renamed is
    /// one removed and one added. Of a live volume that is being written, each
    /// change is one that was true at some time during the call.
    async fn diff(
        &self,
        project: ProjectId,
        from: &SnapshotName,
        to: Option<&SnapshotName>,
        after: Option<&TreePath>,
        max: usize,
    ) -> Result<Changes>;

    /// Copies a file, link or directory with all that is below it into a live
    /// volume, with owners, modes, times, attributes, holes and hard links
    /// among what is copied. What is at `to` appears whole, or not at all; its
    /// directory must exist. Follows no link, neither on the way nor at the
    /// end, whatever a running project does meanwhile. From a snapshot of the
    /// same project this restores one path.
    async fn copy(&self, from: &Place, to: &Place, options: &CopyOptions) -> Result<Copied>;

    /// Streams snapshot `name`: whole, or as a delta to `options.base`, which
    /// the receiver must have. The reader fails, and does not merely end, if
    /// the sender fails. Dropping it stops the sender. Sent again with the same
    /// options, a stream is the same byte for byte where
    /// [`Capabilities::repeatable_streams`] says so.
    async fn send(
        &self,
        project: ProjectId,
        name: &SnapshotName,
        options: &SendOptions,
    ) -> Result<SendStream>;

    /// Applies a stream that [`send`](Self::send) of the same backend made on
    /// any host, as snapshot `header.name` of `header.project`. All or
    /// nothing, and durable when it returns. A snapshot of that name which is
    /// the same one (by [`Snapshot::origin`]) is returned without reading the
    /// stream; any other is [`AlreadyExists`](Error::AlreadyExists).
    async fn receive(&self, header: &SendHeader, stream: BoxRead) -> Result<Snapshot>;

    /// Makes an empty place for files that come from elsewhere, and will be
    /// snapshot `name` of `project`, which need not have a live volume. What is
    /// written there is charged to the project.
    /// [`AlreadyExists`](Error::AlreadyExists) if there is a snapshot of that
    /// name, [`Unsupported`](Error::Unsupported) from a backend without files.
    async fn stage(&self, project: ProjectId, name: &SnapshotName) -> Result<Box<dyn Staged>>;
}

/// What a [`Storage`] backend can do. The contract suite chooses its cases by
/// it, and fails a backend that claims what it does not do.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct Capabilities {
    /// The backend's name, for instance `btrfs`; streams only pass between
    /// stores with equal names.
    pub backend: String,
    /// Whether a delta is smaller than a full stream.
    pub deltas: bool,
    /// Whether limits are enforced.
    pub quotas: bool,
    /// Whether [`Usage`] is found in constant time and covers snapshots.
    pub constant_usage: bool,
    /// Whether [`changed_since`](Storage::changed_since) ever says no.
    pub detects_no_change: bool,
    /// Whether clones and copies of one owner share their bytes, and so take
    /// no space.
    pub shares_bytes: bool,
    /// Whether snapshots of a volume that is being written are of one moment.
    pub atomic_snapshots: bool,
    /// Whether the whole of a Unix file is kept by snapshots, copies and
    /// streams: owners, devices, extended attributes of every class.
    pub full_metadata: bool,
    /// Whether the same snapshot sent again is the same stream, so that one
    /// that was cut can be resumed.
    pub repeatable_streams: bool,
    /// The highest version of its stream format that it takes; a sender goes no
    /// higher ([`SendOptions::version_max`]). 0 and 1 are the same.
    pub stream_version: u32,
    /// What is weaker than in the best backend, for people; empty if nothing.
    pub weaknesses: Vec<String>,
}

/// Options for a new volume.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct VolumeOptions {
    /// Limit in bytes over the live volume and its snapshots; no limit if
    /// `None`. Ignored, with a warning, by backends without quotas.
    pub limit_bytes: Option<u64>,
}

/// Options for a clone.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct CloneOptions {
    /// Of the new volume.
    pub volume: VolumeOptions,
    /// Whether both projects are charged to one owner, so that they may share
    /// bytes, of which only the source is charged for those it wrote.
    pub same_owner: bool,
}

/// A live volume.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Volume {
    /// Whose it is.
    pub project: ProjectId,
    /// Identifies these bytes; a volume created again has another.
    pub uuid: VolumeUuid,
    /// Where its files are on this host; `None` for a backend without files.
    pub path: Option<PathBuf>,
}

/// A read-only snapshot.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Snapshot {
    /// Whose it is.
    pub project: ProjectId,
    /// Its name, unique within the project.
    pub name: SnapshotName,
    /// Identifies it on this host.
    pub uuid: VolumeUuid,
    /// Identifies its content on every host: the uuid of the snapshot that was
    /// first taken, kept when it is sent on. The receipt of a move names it.
    pub origin: VolumeUuid,
    /// When it was taken, on the host where that was, if the backend carries
    /// it along; else when it was received here.
    pub created: Timestamp,
}

/// What a project is charged.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Usage {
    /// Bytes charged, over the live volume and its snapshots.
    pub charged_bytes: u64,
    /// The limit; `None` if there is none.
    pub limit_bytes: Option<u64>,
    /// How `charged_bytes` was found.
    pub source: UsageSource,
}

/// How usage was found.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum UsageSource {
    /// From the file system's quota group, in constant time.
    Quota,
    /// By walking the live volume: slow, and without snapshots.
    Walk,
}
