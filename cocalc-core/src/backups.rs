//! Backups of projects: the contract. Backends come with `cocalc-backup`.

use std::{fmt, path::PathBuf};

use async_trait::async_trait;
use cocalc_ids::{Epoch, HostId, ProjectId, SnapshotName, Timestamp};
use serde::{Deserialize, Serialize};

use crate::BoxError;

/// Keeps copies of project snapshots outside their host.
///
/// # Contract
///
/// - A backup that is listed restores: it was complete and durable first.
/// - `restore` writes only below `target`, which must be empty.
/// - `forget` deletes only backups of the named project.
#[async_trait]
pub trait Backups: fmt::Debug + Send + Sync + 'static {
    /// Backs up the files of a read-only snapshot.
    async fn back_up(&self, source: &BackupSource) -> Result<Backup, BoxError>;

    /// The backups of a project, oldest first.
    async fn list(&self, project: ProjectId) -> Result<Vec<Backup>, BoxError>;

    /// Restores a whole backup, or one path of it, into `target`.
    async fn restore(&self, backup: &Backup, path: Option<&str>, target: PathBuf) -> Result<(), BoxError>;

    /// Deletes backups of a project.
    async fn forget(&self, project: ProjectId, backups: &[Backup]) -> Result<(), BoxError>;
}

/// What to back up.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct BackupSource {
    /// Whose files.
    pub project: ProjectId,
    /// The host that makes the backup.
    pub host: HostId,
    /// Under which grant.
    pub epoch: Epoch,
    /// Which snapshot.
    pub snapshot: SnapshotName,
    /// Where it is.
    pub path: PathBuf,
}

/// A complete backup.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Backup {
    /// The repository's own name for it.
    pub id: String,
    /// Whose files.
    pub project: ProjectId,
    /// Which host made it.
    pub host: HostId,
    /// Under which grant.
    pub epoch: Epoch,
    /// When the snapshot was taken.
    pub taken: Timestamp,
}
