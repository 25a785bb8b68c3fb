//! Project volumes on one host.

use std::{fmt, path::PathBuf};

use async_trait::async_trait;
use cocalc_ids::{ProjectId, SnapshotName, Timestamp, VolumeUuid};
use serde::{Deserialize, Serialize};

use crate::{BoxError, stream::BoxRead};

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
///   answer, except [`create`](Self::create) and
///   [`clone_volume`](Self::clone_volume), which say
///   [`AlreadyExists`](Error::AlreadyExists).
/// - Two projects never see each other's files or usage.
/// - Snapshots are read-only for ever, and independent of the live volume.
#[async_trait]
pub trait Storage: fmt::Debug + Send + Sync + 'static {
    /// What this backend can do; constant while the store is open.
    fn capabilities(&self) -> Capabilities;

    /// Makes an empty live volume.
    async fn create(&self, project: ProjectId, options: &VolumeOptions) -> Result<Volume>;

    /// The live volume of `project`, or [`NotFound`](Error::NotFound).
    async fn volume(&self, project: ProjectId) -> Result<Volume>;

    /// All live volumes, ordered by project.
    async fn list(&self) -> Result<Vec<Volume>>;

    /// Deletes the live volume and every snapshot of `project`. Deleting what
    /// is not there is harmless. Space may return later.
    async fn delete(&self, project: ProjectId) -> Result<()>;

    /// Freezes the project's files under `name`. A snapshot that has this name
    /// already is returned unchanged. [`NestedVolumes`](Error::NestedVolumes),
    /// as from [`restore`](Self::restore) and [`set_aside`](Self::set_aside),
    /// if files would be missing in it.
    async fn snapshot(&self, project: ProjectId, name: &SnapshotName) -> Result<Snapshot>;

    /// The snapshots of `project`, oldest first; empty if it has none or is
    /// unknown.
    async fn snapshots(&self, project: ProjectId) -> Result<Vec<Snapshot>>;

    /// Deletes one snapshot. Deleting what is not there is harmless.
    async fn delete_snapshot(&self, project: ProjectId, name: &SnapshotName) -> Result<()>;

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
    async fn clone_volume(
        &self,
        source: ProjectId,
        name: &SnapshotName,
        target: ProjectId,
        options: &VolumeOptions,
    ) -> Result<Volume>;

    /// What the project is charged, and its limit.
    async fn usage(&self, project: ProjectId) -> Result<Usage>;

    /// Changes the limit, in bytes over the live volume and its snapshots;
    /// `None` lifts it. [`Unsupported`](Error::Unsupported) without quotas.
    async fn set_limit(&self, project: ProjectId, limit_bytes: Option<u64>) -> Result<()>;

    /// Streams snapshot `name`: whole, or as a delta to `base`, which the
    /// receiver must have. The reader fails, and does not merely end, if the
    /// sender fails. Dropping it stops the sender.
    async fn send(
        &self,
        project: ProjectId,
        name: &SnapshotName,
        base: Option<&SnapshotName>,
    ) -> Result<SendStream>;

    /// Applies a stream that [`send`](Self::send) of the same backend made on
    /// any host, as snapshot `header.name` of `header.project`. All or
    /// nothing, and durable when it returns. A snapshot of that name which is
    /// the same one (by [`Snapshot::origin`]) is returned without reading the
    /// stream; any other is [`AlreadyExists`](Error::AlreadyExists).
    async fn receive(&self, header: &SendHeader, stream: BoxRead) -> Result<Snapshot>;
}

/// What a [`Storage`] backend can do.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Capabilities {
    /// The backend's name, for instance `btrfs`; streams only pass between
    /// stores with equal names.
    pub backend: String,
    /// Whether a delta is smaller than a full stream.
    pub deltas: bool,
    /// Whether limits are enforced.
    pub quotas: bool,
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
    /// When it was taken or received here.
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

/// Says what a stream holds. Travels before it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct SendHeader {
    /// The backend whose stream this is.
    pub backend: String,
    /// Whose snapshot this is.
    pub project: ProjectId,
    /// Its name, there and here.
    pub name: SnapshotName,
    /// Its [`Snapshot::origin`].
    pub origin: VolumeUuid,
    /// The snapshot it is a delta to, and that one's origin.
    pub base: Option<(SnapshotName, VolumeUuid)>,
    /// What the backend carries beside the stream, opaque to others; at most
    /// 4 KiB.
    pub extra: String,
}

/// A snapshot on its way to another host.
pub struct SendStream {
    /// What it holds.
    pub header: SendHeader,
    /// The bytes.
    pub reader: BoxRead,
}

impl fmt::Debug for SendStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SendStream").field("header", &self.header).finish_non_exhaustive()
    }
}

/// Why a storage call failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The project has no live volume here.
    #[error("project {project} has no volume here")]
    NotFound {
        /// The project.
        project: ProjectId,
    },
    /// The project has no snapshot of that name here.
    #[error("project {project} has no snapshot {name} here")]
    NoSnapshot {
        /// The project.
        project: ProjectId,
        /// The missing snapshot.
        name: SnapshotName,
    },
    /// There is one already.
    #[error("project {project} already has {what}")]
    AlreadyExists {
        /// The project.
        project: ProjectId,
        /// What there is, for instance `a volume`.
        what: String,
    },
    /// The project's limit, or the volume, has no room.
    #[error("no space to {operation} project {project}: {what} is full")]
    NoSpace {
        /// The project.
        project: ProjectId,
        /// What was being done.
        operation: &'static str,
        /// `the project's quota` or `the host's volume`.
        what: &'static str,
    },
    /// The stream was cut, damaged, hostile, or not the announced one.
    #[error("refused the stream for project {project}: {reason}")]
    BadStream {
        /// The project.
        project: ProjectId,
        /// What was wrong with it.
        reason: String,
    },
    /// There are subvolumes among the project's files, which a snapshot would
    /// not hold.
    #[error(
        "project {project} has subvolumes inside its files, which no snapshot holds: {}; move \
         what is in them to ordinary directories, then delete them with `btrfs subvolume delete`",
        .paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
    )]
    NestedVolumes {
        /// The project.
        project: ProjectId,
        /// The first of them, below the volume.
        paths: Vec<PathBuf>,
    },
    /// This backend has no such ability.
    #[error("{backend} storage cannot {operation}")]
    Unsupported {
        /// The backend.
        backend: &'static str,
        /// What was asked.
        operation: &'static str,
    },
    /// The backend failed.
    #[error("{backend} could not {operation} project {project}")]
    Backend {
        /// The backend.
        backend: &'static str,
        /// What was being done.
        operation: &'static str,
        /// The project.
        project: ProjectId,
        /// Why.
        source: BoxError,
    },
}
