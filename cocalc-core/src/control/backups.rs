//! What master and host say to each other about backups.
//!
//! Work that takes long is begun and then asked after: each repeated command
//! names the operation, and is answered with how far that is. A host that was
//! restarted begins anew, and goes on from the data that are stored already.

use cocalc_ids::{MoveId, OperationId, ProjectId, SnapshotName, TreePath};
use serde::{Deserialize, Serialize};

use crate::{
    backups::{Answer, Backup, Progress, Query, Restored, Status},
    storage::Snapshot,
};

/// What the master tells a host to do about the backups of a project that it
/// owns.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum BackupsCommand {
    /// Begin this work unless it has been begun, and answer how far it is when
    /// there is news, or after a while.
    Work {
        /// For which operation. It is done once.
        operation: OperationId,
        /// What to do.
        work: BackupsWork,
        /// How long to wait for news, in milliseconds.
        wait_ms: u64,
    },
    /// End this work. It leaves nothing behind, and may just have been done.
    Cancel {
        /// Of which operation.
        operation: OperationId,
    },
    /// Answer a question.
    Ask {
        /// Which.
        query: Query,
    },
    /// Say how the project stands.
    Status,
    /// These backups are gone, or all of them if none is named: what only they
    /// had is to be backed up again.
    Gone {
        /// Which.
        backups: Vec<String>,
    },
}

/// Work on backups.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "work", rename_all = "snake_case")]
pub enum BackupsWork {
    /// Back up its present state.
    BackUp,
    /// Bring a backup, or a path of one, here as a snapshot of the project.
    Fetch {
        /// Whose backup: the project's own, or, if the master has an operation
        /// that says so, another's.
        source: ProjectId,
        /// Which.
        backup: String,
        /// What of it; what is not the root comes to the root of the snapshot,
        /// under its own name.
        path: TreePath,
        /// What the snapshot is called.
        name: SnapshotName,
        /// The move under which the host has reserved the project, if it is not
        /// its own yet; the epoch is that of the owner before.
        move_id: Option<MoveId>,
    },
    /// Restore its newest backup beside it, compare, and delete what was
    /// restored.
    Drill,
}

/// What a host answers.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum BackupsReply {
    /// The work goes on.
    Working {
        /// Of which operation.
        operation: OperationId,
        /// How far it is; `None` while it waits for others.
        progress: Option<Progress>,
    },
    /// The work is done.
    Done {
        /// Of which operation.
        operation: OperationId,
        /// What came of it.
        outcome: BackupsOutcome,
    },
    /// There is no such work, or it has ended now.
    Cancelled {
        /// Of which operation.
        operation: OperationId,
    },
    /// An answer.
    Answered {
        /// To the question.
        answer: Answer,
    },
    /// How the project stands; `None` if it has not been looked at yet.
    Status {
        /// That.
        status: Option<Status>,
    },
}

/// What came of work on backups.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum BackupsOutcome {
    /// There is a new backup.
    BackedUp {
        /// Which.
        backup: Backup,
    },
    /// A backup is here as a snapshot.
    Fetched {
        /// Which it is now.
        snapshot: Snapshot,
        /// What was restored; nothing if an earlier try had brought it.
        restored: Restored,
        /// Which it was.
        backup: Backup,
    },
    /// A backup was tried out.
    Drilled {
        /// How that went.
        report: DrillReport,
    },
}

/// How a backup was tried out.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct DrillReport {
    /// Which backup.
    pub backup: Backup,
    /// With what it was compared.
    pub against: DrillAgainst,
    /// How many names were restored.
    pub entries: u64,
    /// The sizes of the files restored.
    pub bytes: u64,
    /// How long the restore took, in milliseconds.
    pub millis: u64,
    /// What is wrong, the first few, in words; empty if all is well.
    pub wrong: Vec<String>,
}

/// With what a restored backup is compared.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DrillAgainst {
    /// The snapshot that it was made of, name by name and byte by byte.
    Snapshot,
    /// What the backup says of itself, because that snapshot is gone.
    Record,
}

/// What a host asks for to do a job at a repository.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct BackupAccess {
    /// For the sake of which project, which the host must own.
    pub project: ProjectId,
    /// In which epoch.
    pub epoch: cocalc_ids::Epoch,
    /// Whose backups; another project's only for an operation on `project`
    /// that restores them.
    pub repository: ProjectId,
    /// To do what. Nobody gets to delete.
    pub access: crate::backups::Access,
}
