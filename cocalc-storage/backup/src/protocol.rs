//! What is said between [`Rustic`](crate::Rustic) and its worker: one job, a
//! line of JSON on standard input, which then stays open for as long as the
//! work is wanted; and events, lines of JSON on standard output, of which the
//! last is the outcome. Both ends are of one build; nothing else reads this.

use std::{path::PathBuf, time::Duration};

use cocalc_core::{
    backups::{
        Backup, BackupSource, CheckOptions, Checked, Entries, Erased, Progress, PruneOptions, Pruned,
        Restored,
    },
    ids::{ProjectId, TreePath},
};
use serde::{Deserialize, Serialize};

use crate::{bounds::Bounds, location::Repository};

/// A job for a worker.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Job {
    /// Whose backups.
    pub project: ProjectId,
    /// Where they are.
    pub repository: Repository,
    /// What the worker may take.
    pub bounds: Bounds,
    /// What to do.
    pub task: Task,
}

/// What a worker does.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "as the calls of `Backups`")]
pub enum Task {
    BackUp(BackupSource),
    List,
    Ls { backup: String, directory: TreePath, after: Option<TreePath>, max: usize },
    Find { backup: String, text: String, max: usize },
    Restore { backup: String, path: TreePath, target: PathBuf },
    Forget { backups: Vec<String> },
    Prune(PruneOptions),
    Check(CheckOptions),
    Erase,
}

/// What a worker says.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "as the answers of `Backups`")]
pub enum Event {
    Progress(Progress),
    BackedUp(Backup),
    Listed(Vec<Backup>),
    Entries(Entries),
    Restored(Restored),
    Forgotten,
    Pruned(Pruned),
    Checked(Checked),
    Erased(Erased),
    Failed(Failure),
}

/// Why a job failed.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Failure {
    /// What the caller can do about it.
    pub kind: FailureKind,
    /// For people. Several, if several files are concerned.
    pub words: Vec<String>,
}

/// The kinds of `cocalc_core::backups::Error`.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "as the errors of `Backups`")]
pub enum FailureKind {
    NotFound,
    Invalid,
    WrongKey,
    Denied,
    Full,
    Unavailable,
    Damaged,
    Incomplete,
    Other,
}

/// The longest line that either side takes.
pub const LINE_BYTES_MAX: usize = 64 << 20;

/// How often progress is told at most.
pub const PROGRESS_EVERY: Duration = Duration::from_millis(200);
