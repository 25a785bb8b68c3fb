//! What is said between [`Rustic`](crate::Rustic) and its worker: one order, a
//! line of JSON on standard input, which then stays open for as long as the
//! work is wanted; and events, lines of JSON on standard output, of which the
//! last is the outcome. To [`Event::Renew`] the answer is one more line on
//! standard input, a [`Renewed`]. Both ends are of one build; nothing else
//! reads this.

use std::{path::PathBuf, time::Duration};

use cocalc_core::{
    backups::{
        Backup, BackupSource, CheckOptions, Checked, Entries, Erased, Progress, PruneOptions, Pruned,
        Restored,
    },
    ids::{ProjectId, TreePath},
};
use serde::{Deserialize, Serialize};

use crate::{
    bounds::Bounds,
    location::{Location, Repository, Secret},
    mint::Minted,
    place::Mint,
    repositories::Access,
    rustic::Mirrored,
};

/// What a worker is told.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Order {
    /// What it may take.
    pub bounds: Bounds,
    /// The control groups that it joins before anything else, of one tree or of
    /// several.
    pub groups: Vec<PathBuf>,
    /// What to do.
    pub work: Work,
}

/// What a worker does.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    /// Something with a repository.
    Job(Box<Job>),
    /// Makes short-lived credentials.
    Mint(Box<Mint>),
}

/// A job with a repository.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Job {
    /// Whose backups.
    pub project: ProjectId,
    /// Where they are.
    pub repository: Repository,
    /// For what the repository was given out. The worker keeps to it even where
    /// the place cannot tell the difference.
    pub access: Access,
    /// What to do.
    pub task: Task,
}

/// What a worker does with a repository.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "as the calls of `Backups` and `Rustic`")]
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
    Mirror,
    AddPassword { password: Secret },
    KeepPassword,
}

/// What a worker says.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "as the answers of `Backups` and `Rustic`")]
pub enum Event {
    Progress(Progress),
    /// The credentials are refused: it waits for new ones.
    Renew,
    BackedUp(Backup),
    Listed(Vec<Backup>),
    Entries(Entries),
    Restored(Restored),
    Forgotten,
    Pruned(Pruned),
    Checked(Checked),
    Erased(Erased),
    Mirrored(Mirrored),
    PasswordSet,
    Minted(Minted),
    Failed(Failure),
}

/// The answer to [`Event::Renew`]: where the repository is, with credentials
/// that were made since.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Renewed {
    /// Where it is; `None` if there are no other credentials.
    pub location: Option<Location>,
    /// Where its mirror is.
    pub mirror: Option<Location>,
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

/// How long a worker waits for other credentials.
pub const RENEW_MAX: Duration = Duration::from_secs(60);
