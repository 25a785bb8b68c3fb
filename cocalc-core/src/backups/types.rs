//! What goes into a backup call, and what comes out.

use std::{cmp::Ordering, path::PathBuf, time::Duration};

use cocalc_ids::{Epoch, HostId, ProjectId, SnapshotName, Timestamp, TreePath};
use serde::{Deserialize, Serialize};

use crate::storage::NodeKind;

/// What to back up.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct BackupSource {
    /// Whose files.
    pub project: ProjectId,
    /// The host that makes the backup.
    pub host: HostId,
    /// Under which grant.
    pub epoch: Epoch,
    /// Which snapshot.
    pub snapshot: SnapshotName,
    /// When the snapshot was taken.
    pub taken: Timestamp,
    /// Where its files are. Nothing may change below it meanwhile; hold the
    /// snapshot (`Storage::hold`) until the call returns.
    pub path: PathBuf,
    /// Why it is made.
    pub kind: BackupKind,
    /// The backup whose files are taken as known where nothing about them has
    /// changed: the latest of the project, as a rule. Without one, every file
    /// is read; what the repository has already is not stored again.
    pub parent: Option<String>,
    /// Set for the first backup after a move or a restore, which give every
    /// file a new change time: then size and time of modification decide
    /// whether a file is read again.
    pub moved: bool,
    /// Patterns, as in `.gitignore`, of what is left out.
    pub excludes: Vec<String>,
}

/// What a call will do with a repository, so that it gets no more rights. Each
/// includes those before it.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// List, browse and restore.
    Read,
    /// Add backups. What is there can neither be changed nor deleted, where the
    /// place can tell the difference.
    Append,
    /// Forget, prune, repair and erase. Never for a host that runs projects.
    Delete,
}

/// Why a backup was made.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BackupKind {
    /// It was due.
    Scheduled,
    /// Somebody asked for it.
    Manual,
    /// The project stopped.
    Stop,
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
    /// Why it was made.
    pub kind: BackupKind,
    /// When the snapshot was taken.
    pub taken: Timestamp,
    /// The sizes of all that is in it and no directory.
    pub bytes: u64,
    /// How many bytes the repository did not have, as they are stored.
    pub added_bytes: u64,
    /// How many names are in it that are no directories.
    pub files: u64,
    /// How many of them were new or had changed, so that they were read.
    pub files_read: u64,
}

impl Backup {
    /// The order in which the backups of a project were made. A project has one
    /// owner at a time, and each has a higher epoch than the one before; only
    /// the backups of one owner are ordered by a clock, which is that owner's.
    pub fn order(&self, other: &Self) -> Ordering {
        (self.epoch, self.taken, &self.id).cmp(&(other.epoch, other.taken, &other.id))
    }
}

/// How far a call has come. Numbers never go back while the phase is the same.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Progress {
    /// What is being done.
    pub phase: Phase,
    /// Bytes done in this phase.
    pub bytes: u64,
    /// Bytes to do in this phase, once known.
    pub total_bytes: Option<u64>,
}

/// A part of a call that takes time.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The repository is opened and its index read.
    Opening,
    /// Files are read and stored.
    Storing,
    /// Files are written.
    Restoring,
    /// What was written is read back and compared.
    Verifying,
    /// The repository is looked over or tidied up.
    Tending,
}

/// Takes what a call reports of its progress. Called often: it must not block.
pub type ProgressSink<'a> = &'a (dyn Fn(Progress) + Send + Sync);

/// One name in a backup.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Entry {
    /// Below the root of the volume.
    pub path: TreePath,
    /// What it is.
    pub kind: NodeKind,
    /// The size of a regular file; 0 otherwise.
    pub bytes: u64,
    /// When it was last modified.
    pub modified: Option<Timestamp>,
}

/// Entries, and whether there are more.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Entries {
    /// In the order of the tree.
    pub entries: Vec<Entry>,
    /// Whether the limit left some out.
    pub truncated: bool,
}

/// What was restored.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Restored {
    /// Files, links, directories and what else has a name.
    pub entries: u64,
    /// The sizes of the regular files.
    pub bytes: u64,
}

/// How space is reclaimed.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct PruneOptions {
    /// How long what nobody needs is kept after it was marked. A backup that
    /// began before the mark may count on it, so this must be longer than a
    /// backup may take, and than clocks differ. Default: 23 hours.
    pub grace: Duration,
}

impl Default for PruneOptions {
    fn default() -> Self {
        Self { grace: Duration::from_hours(23) }
    }
}

/// What a prune did.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Pruned {
    /// Bytes that were deleted.
    pub freed_bytes: u64,
    /// Bytes that are marked, and go when the grace has passed.
    pub marked_bytes: u64,
    /// Bytes that remain.
    pub kept_bytes: u64,
}

/// How thoroughly a repository is checked.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct CheckOptions {
    /// Reads and verifies all data, not only what leads to it.
    pub read_data: bool,
    /// First puts right what can be: data that are damaged are taken from the
    /// mirror, if there is one; then the index is made to agree with the data
    /// that are there, so that a lost index is rebuilt, and data that are lost
    /// are stored again by the next backup without a parent that has them.
    /// Nothing else may run on the repository meanwhile.
    pub repair: bool,
}

/// What a check found.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Checked {
    /// Damage, in words; empty if every backup listed can be restored, as far
    /// as the check looked.
    pub damage: Vec<String>,
    /// The backups that the damage affects, by id.
    pub affected: Vec<String>,
    /// What in them cannot be restored, the first few of each: a file, or a
    /// directory with all that is below it.
    #[serde(default)]
    pub lost: Vec<Lost>,
    /// How many damaged files of the repository were put right from the mirror.
    #[serde(default)]
    pub repaired: u64,
}

/// A path that cannot be restored from a backup.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Lost {
    /// Which backup.
    pub backup: String,
    /// Which file or directory of it.
    pub path: TreePath,
}

impl Checked {
    /// Whether nothing is damaged.
    pub fn is_sound(&self) -> bool {
        self.damage.is_empty() && self.affected.is_empty()
    }
}

/// What was left of a project's backups, and is gone.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Erased {
    /// How many objects or files were deleted.
    pub objects: u64,
    /// Their bytes.
    pub freed_bytes: u64,
    /// In a repository that others share: bytes that nobody else needs, and that
    /// go with the first prune after its grace.
    #[serde(default)]
    pub marked_bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_backup_is_the_last_owners_whatever_the_clocks_said() {
        let project = ProjectId::random();
        let backup = |id: &str, epoch: u64, secs: i64| Backup {
            id: id.to_owned(),
            project,
            host: HostId::random(),
            epoch: Epoch::new(epoch).unwrap(),
            kind: BackupKind::Scheduled,
            taken: Timestamp::from_secs(secs),
            bytes: 0,
            added_bytes: 0,
            files: 0,
            files_read: 0,
        };
        // The first host's clock was ahead by years.
        let mut all = [backup("c", 1, 9_000), backup("a", 2, 20), backup("b", 2, 10), backup("d", 2, 20)];
        all.sort_by(Backup::order);
        assert_eq!(all.iter().map(|one| one.id.as_str()).collect::<Vec<_>>(), ["c", "b", "a", "d"]);
    }
}
