//! What the master tells a host to do, and what the host answers.

use std::collections::BTreeMap;

use cocalc_ids::{
    Epoch, HostId, ImageDigest, MoveId, OperationId, ProjectAlias, ProjectId, SnapshotName, TreePath,
    VolumeUuid,
};
use serde::{Deserialize, Serialize};

use super::{BackupsCommand, BackupsReply, InsideCommand, InsideReply};
use crate::{
    activity::{IdleReport, IdleSettings},
    router::HostAddress,
    runner::{Applied, Isolation, Limits, Status},
    snapshots::Policy,
    storage::{Changes, Copied, CopyOptions, Footprint, Place, Snapshot, Usage},
};

/// What the master tells a host to do with a project it owns.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub enum HostCommand {
    /// Take a new project: make its volume, and hold the grant.
    Create {
        /// Which project.
        project: ProjectId,
        /// Its epoch.
        epoch: Epoch,
        /// How it is made and run.
        config: ProjectConfig,
    },
    /// Start it, under the grant held.
    Start {
        /// Which project.
        project: ProjectId,
        /// Under which grant.
        epoch: Epoch,
        /// How it is run; replaces what was known.
        config: ProjectConfig,
    },
    /// Stop it.
    Stop {
        /// Which project.
        project: ProjectId,
        /// Under which grant.
        epoch: Epoch,
        /// How long its processes may take to end, in milliseconds.
        grace_ms: u64,
    },
    /// Stop it, and delete its files and snapshots.
    Delete {
        /// Which project.
        project: ProjectId,
        /// Under which grant.
        epoch: Epoch,
    },
    /// Delete what is left of a project that this host once had. It was deleted
    /// at its owner, in this epoch; refused while this host holds a grant.
    Forget {
        /// Which project.
        project: ProjectId,
        /// The last epoch it had.
        epoch: Epoch,
    },
    /// Report what it is doing.
    Report {
        /// Which project.
        project: ProjectId,
    },
    /// Take a snapshot.
    Snapshot {
        /// Which project.
        project: ProjectId,
        /// Under which grant.
        epoch: Epoch,
        /// Its name.
        name: SnapshotName,
    },
    /// List its snapshots.
    Snapshots {
        /// Which project.
        project: ProjectId,
        /// Under which grant.
        epoch: Epoch,
    },
    /// Delete a snapshot.
    DeleteSnapshot {
        /// Which project.
        project: ProjectId,
        /// Under which grant.
        epoch: Epoch,
        /// Its name.
        name: SnapshotName,
    },
    /// Go back to a snapshot; the project must be stopped.
    RestoreSnapshot {
        /// Which project.
        project: ProjectId,
        /// Under which grant.
        epoch: Epoch,
        /// To which.
        name: SnapshotName,
        /// Under which name the present state is kept.
        former: SnapshotName,
    },
    /// Bring one path back from a snapshot, whether the project runs or not.
    RestorePath {
        /// For which operation: it is done once, and not again after the
        /// project's owner has gone on working.
        operation: OperationId,
        /// Which project.
        project: ProjectId,
        /// Under which grant.
        epoch: Epoch,
        /// From which snapshot.
        name: SnapshotName,
        /// Which path.
        path: TreePath,
        /// Under which name the present state is kept.
        former: SnapshotName,
    },
    /// Say what is different between two of its states.
    Diff {
        /// Which project.
        project: ProjectId,
        /// Under which grant.
        epoch: Epoch,
        /// From this snapshot.
        from: SnapshotName,
        /// To this one; to what is live if `None`.
        to: Option<SnapshotName>,
        /// Only what comes after this path.
        after: Option<TreePath>,
        /// At most so many; there may be fewer, so that they fit a frame.
        max: usize,
    },
    /// Copy a path of a project on the same host, or of one of its snapshots,
    /// into this one.
    Copy {
        /// For which operation: it is done once.
        operation: OperationId,
        /// Which project.
        project: ProjectId,
        /// Under which grant.
        epoch: Epoch,
        /// What is copied.
        from: Place,
        /// Under which grant of the project that it is copied from.
        from_epoch: Epoch,
        /// To where.
        to: TreePath,
        /// How.
        options: CopyOptions,
    },
    /// Take a new project that is a copy of another on this host.
    Clone {
        /// Which project is new.
        project: ProjectId,
        /// Its epoch.
        epoch: Epoch,
        /// How it is made and run.
        config: ProjectConfig,
        /// Of which project.
        source: ProjectId,
        /// Under which grant of that one.
        source_epoch: Epoch,
        /// Of which snapshot; of its present state if `None`.
        name: Option<SnapshotName>,
        /// Whether both are charged to one owner.
        same_owner: bool,
    },
    /// Run it otherwise from now on, as far as that needs no start.
    Configure {
        /// Which project.
        project: ProjectId,
        /// Under which grant.
        epoch: Epoch,
        /// How it is run.
        config: ProjectConfig,
    },
    /// Say what it is charged.
    Usage {
        /// Which project.
        project: ProjectId,
        /// Under which grant.
        epoch: Epoch,
        /// Whether its files are counted, too, which takes long.
        count: bool,
    },
    /// Say who uses it, why it runs, and until when.
    Why {
        /// Which project.
        project: ProjectId,
    },
    /// Look inside it, while it runs.
    Inside {
        /// Which project.
        project: ProjectId,
        /// Under which grant.
        epoch: Epoch,
        /// For what.
        what: InsideCommand,
    },
    /// Something about its backups.
    Backups {
        /// Which project.
        project: ProjectId,
        /// Under which grant.
        epoch: Epoch,
        /// What.
        what: BackupsCommand,
    },
    /// A step of a move.
    Move {
        /// Which move; the project's fence.
        move_id: MoveId,
        /// Which project.
        project: ProjectId,
        /// The step.
        step: MoveCommand,
    },
}

impl HostCommand {
    /// The project it is about.
    pub fn project(&self) -> ProjectId {
        match self {
            Self::Create { project, .. }
            | Self::Start { project, .. }
            | Self::Stop { project, .. }
            | Self::Delete { project, .. }
            | Self::Forget { project, .. }
            | Self::Report { project }
            | Self::Snapshot { project, .. }
            | Self::Snapshots { project, .. }
            | Self::DeleteSnapshot { project, .. }
            | Self::RestoreSnapshot { project, .. }
            | Self::RestorePath { project, .. }
            | Self::Diff { project, .. }
            | Self::Copy { project, .. }
            | Self::Clone { project, .. }
            | Self::Configure { project, .. }
            | Self::Usage { project, .. }
            | Self::Why { project }
            | Self::Inside { project, .. }
            | Self::Backups { project, .. }
            | Self::Move { project, .. } => *project,
        }
    }
}

/// A step of a move, as one of the two hosts does it. `epoch` is the source's
/// until `Activate`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "step", rename_all = "snake_case")]
pub enum MoveCommand {
    /// Source: say what there is to be moved.
    Survey {
        /// The source's epoch.
        epoch: Epoch,
    },
    /// Destination: check space, image and backend, and expect streams of this
    /// project from `source` only. Repeated with more snapshots, it expects
    /// these too.
    Reserve {
        /// The source's epoch.
        epoch: Epoch,
        /// The only host that may send.
        source: HostId,
        /// What the source is charged for it.
        bytes: u64,
        /// How it is run.
        config: ProjectConfig,
        /// The project's own snapshots, which are to come along.
        #[serde(default)]
        snapshots: Vec<Carried>,
    },
    /// Source: send one of the project's own snapshots, if it is still there,
    /// as a delta to `base` if given and still there.
    Carry {
        /// The source's epoch.
        epoch: Epoch,
        /// Which snapshot.
        snapshot: Carried,
        /// A delta to what.
        base: Option<SnapshotName>,
        /// To whom.
        destination: HostId,
        /// Where that is.
        address: HostAddress,
        /// The highest version of streams that the destination takes.
        version_max: u32,
    },
    /// Source: take snapshot `name` if it is not there, and send it, as a
    /// delta to `base` if given and still there, to the destination.
    Send {
        /// The source's epoch.
        epoch: Epoch,
        /// Which snapshot.
        name: SnapshotName,
        /// A delta to what.
        base: Option<SnapshotName>,
        /// To whom.
        destination: HostId,
        /// Where that is.
        address: HostAddress,
        /// The highest version of streams that the destination takes.
        #[serde(default)]
        version_max: u32,
    },
    /// Source: make new requests wait.
    Park {
        /// The source's epoch.
        epoch: Epoch,
    },
    /// Source: durably record that this epoch is frozen, stop the project, and
    /// take its final snapshot.
    Freeze {
        /// The epoch to freeze.
        epoch: Epoch,
        /// The final snapshot's name.
        name: SnapshotName,
        /// How long the project's processes may take to end, in milliseconds.
        grace_ms: u64,
    },
    /// Destination: make the received snapshot the live volume; do not start.
    Stage {
        /// The source's epoch.
        epoch: Epoch,
        /// The final snapshot.
        name: SnapshotName,
        /// What it must be.
        origin: VolumeUuid,
        /// The snapshots that the project has. Others of it that lie there are
        /// of an earlier stay.
        #[serde(default)]
        snapshots: Vec<Carried>,
    },
    /// Destination: hold the grant of the new epoch, and start if asked.
    Activate {
        /// The new epoch.
        epoch: Epoch,
        /// How it is run.
        config: ProjectConfig,
        /// Whether it was running before.
        start: bool,
    },
    /// Source: the project has moved. Keep the files as undo, and tell
    /// everybody where it is.
    Retire {
        /// The new epoch.
        epoch: Epoch,
        /// The new owner.
        owner: HostId,
        /// Where that is.
        address: HostAddress,
        /// Under which name the files are kept.
        keep_as: SnapshotName,
    },
    /// Source, after an abort: hold the grant of the new epoch, and start
    /// again if it was running.
    Thaw {
        /// The new epoch.
        epoch: Epoch,
        /// How it is run.
        config: ProjectConfig,
        /// Whether it was running before.
        start: bool,
    },
    /// Destination, after an abort: stop expecting streams, and delete what
    /// was received and staged.
    Discard,
    /// Either, at the end: delete the snapshots that only served the move.
    Clean {
        /// Which.
        names: Vec<SnapshotName>,
    },
}

/// A snapshot that is the project's own and moves with it: its name, and what
/// it is on every host.
#[derive(Clone, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Carried {
    /// Its name, on every host.
    pub name: SnapshotName,
    /// Its [`Snapshot::origin`].
    pub origin: VolumeUuid,
}

/// How a project is made and run. Master and hosts keep it.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct ProjectConfig {
    /// The image; `None` for hosts whose runner has no images.
    pub image: Option<ImageDigest>,
    /// What it may use.
    #[serde(default)]
    pub limits: Limits,
    /// Its plan: how many bytes its files may take. What its snapshots may
    /// take beyond that is a matter of the policy.
    pub quota_bytes: Option<u64>,
    /// When automatic snapshots are taken, and which are kept; `None` for what
    /// its host does.
    #[serde(default)]
    pub snapshots: Option<Policy>,
    /// When it is backed up, and which backups are kept; `None` for what the
    /// master's configuration says.
    #[serde(default)]
    pub backups: Option<crate::backups::Policy>,
    /// Extra environment variables.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// When it is stopped for being idle, as its plan and its owner say.
    #[serde(default)]
    pub idle: IdleSettings,
    /// What its owner may ask for at most, as the operator says. What the owner
    /// leaves open is this as well.
    #[serde(default)]
    pub limits_max: Limits,
    /// Under what name SSH reaches it, besides its id. The master sees to it that
    /// no other project has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alias: Option<ProjectAlias>,
    /// How it is kept apart.
    #[serde(default)]
    pub isolation: Isolation,
    /// Whether that is the operator's to change, and not the owner's.
    #[serde(default)]
    pub isolation_fixed: bool,
}

impl ProjectConfig {
    /// What the project may use: what was asked for, and where nothing was, what
    /// its owner may ask for.
    pub fn effective_limits(&self) -> Limits {
        self.limits.or(&self.limits_max)
    }
}

/// What a host answers to a command.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum HostReply {
    /// The state of the project, after the command.
    Project(ProjectReport),
    /// The project and its files are gone.
    Deleted {
        /// Which project.
        project: ProjectId,
        /// Under which grant.
        epoch: Epoch,
    },
    /// Its snapshots.
    Snapshots {
        /// Which project.
        project: ProjectId,
        /// Oldest first.
        snapshots: Vec<Snapshot>,
    },
    /// What is different.
    Changes {
        /// In which project.
        project: ProjectId,
        /// The next of them.
        changes: Changes,
    },
    /// What was copied.
    Copied {
        /// Into which project.
        project: ProjectId,
        /// How much.
        copied: Copied,
    },
    /// What it may use now, while it runs.
    Limits {
        /// Which project.
        project: ProjectId,
        /// What has changed.
        applied: Applied,
    },
    /// What it is charged.
    Usage(UsageReport),
    /// Who uses it.
    Why(IdleReport),
    /// What was found inside.
    Inside {
        /// In which project.
        project: ProjectId,
        /// What.
        answer: InsideReply,
    },
    /// About its backups.
    Backups {
        /// Of which project.
        project: ProjectId,
        /// What.
        answer: BackupsReply,
    },
    /// The receipt of a step of a move.
    Move {
        /// Which move.
        move_id: MoveId,
        /// What was done.
        receipt: MoveReply,
    },
    /// It was not done.
    Error(CommandError),
}

/// The receipt of a step of a move.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "step", rename_all = "snake_case")]
pub enum MoveReply {
    /// What there is to be moved.
    Surveyed {
        /// What the source is charged for it, in bytes; 0 if unknown.
        bytes: u64,
        /// The project's own snapshots, oldest first.
        snapshots: Vec<Carried>,
    },
    /// The destination is ready.
    Reserved,
    /// The destination acknowledged the snapshot as complete and durable.
    Sent {
        /// Which snapshot.
        name: SnapshotName,
        /// What it is, as the destination saw it.
        origin: VolumeUuid,
        /// Bytes on the wire.
        bytes: u64,
        /// How long it took, in milliseconds.
        millis: u64,
        /// What the snapshot holds and did not arrive, in words for people.
        #[serde(default)]
        left_out: Vec<String>,
    },
    /// The snapshot that was to be carried has been deleted.
    Gone {
        /// Which snapshot.
        snapshot: Carried,
    },
    /// Requests wait.
    Parked,
    /// The source is frozen and stopped.
    Frozen {
        /// The frozen epoch.
        epoch: Epoch,
        /// The final snapshot.
        name: SnapshotName,
        /// What it is.
        origin: VolumeUuid,
        /// Whether the project was running.
        was_running: bool,
        /// The project's own snapshots, oldest first, which are no others until
        /// it has moved.
        #[serde(default)]
        snapshots: Vec<Carried>,
    },
    /// The live volume at the destination is a copy of this snapshot.
    Staged {
        /// What it is.
        origin: VolumeUuid,
    },
    /// The destination holds the grant.
    Activated {
        /// The new epoch.
        epoch: Epoch,
        /// What it is doing.
        report: ProjectReport,
    },
    /// The source has let go.
    Retired,
    /// The source has it again.
    Thawed {
        /// The new epoch.
        epoch: Epoch,
    },
    /// The destination has nothing of it.
    Discarded,
    /// The snapshots are gone.
    Cleaned,
}

/// The state of a project at a host, as state of an epoch.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct ProjectReport {
    /// Which project.
    pub project: ProjectId,
    /// The grant the host holds; `None` if it holds none.
    pub epoch: Option<Epoch>,
    /// What the runner says.
    pub status: Status,
    /// Milliseconds of each phase of the last start, in order.
    #[serde(default)]
    pub phases: Vec<(String, u64)>,
}

/// What a project is charged, and may be.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct UsageReport {
    /// Which project.
    pub project: ProjectId,
    /// What it is charged, with the limit of files and snapshots together.
    pub usage: Usage,
    /// How many bytes its files may take; `None` without a limit.
    pub plan_bytes: Option<u64>,
    /// How many its snapshots may take beyond that.
    pub allowance_bytes: Option<u64>,
    /// How its snapshots are kept.
    pub policy: Policy,
    /// What its owner should know, in words.
    pub notice: Option<String>,
    /// Its files, counted.
    pub footprint: Option<Footprint>,
}

/// Why a command was not done.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize, thiserror::Error)]
#[error("{message}")]
pub struct CommandError {
    /// The kind, for programs.
    pub code: ErrorCode,
    /// For people: what was being done, to which project, and why not.
    pub message: String,
}

/// What a master does differently about a failed command.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ErrorCode {
    /// The host holds another grant, has frozen this one, or none.
    StaleEpoch,
    /// The project is fenced by a move, or another operation is under way.
    Busy,
    /// The project, snapshot or image is not there.
    NotFound,
    /// There is one already.
    Exists,
    /// The snapshot is in use, by a move or a backup.
    InUse,
    /// No space.
    NoSpace,
    /// The command makes no sense.
    Invalid,
    /// It may work later.
    Unavailable,
    /// Whether the project runs cannot be told now, and that has to be known first.
    StateUnknown,
    /// The repository of backups cannot be reached.
    RepositoryUnavailable,
    /// The repository does not open with the key, or refuses the credentials.
    RepositoryDenied,
    /// The repository is damaged.
    RepositoryDamaged,
    /// Somebody ended it.
    Cancelled,
    /// The backend failed.
    Failed,
}
