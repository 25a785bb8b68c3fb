//! What storage says of the files in a volume.

use cocalc_ids::{ProjectId, SnapshotName, TreePath};
use serde::{Deserialize, Serialize};

/// A path in a project's live volume or in one of its snapshots.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Place {
    /// The project.
    pub project: ProjectId,
    /// In this snapshot; in the live volume if `None`.
    pub snapshot: Option<SnapshotName>,
    /// Below the root of the volume, for instance `home/notes.txt`.
    pub path: TreePath,
}

impl Place {
    /// A path of the live volume.
    pub fn live(project: ProjectId, path: TreePath) -> Self {
        Self { project, snapshot: None, path }
    }

    /// A path of a snapshot.
    pub fn frozen(project: ProjectId, snapshot: SnapshotName, path: TreePath) -> Self {
        Self { project, snapshot: Some(snapshot), path }
    }
}

/// How a path is copied.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct CopyOptions {
    /// Whether both places are charged to one owner, so that they may share
    /// bytes. Within one project they always may.
    pub same_owner: bool,
    /// Whether what is at the destination is replaced, in one step; otherwise
    /// it is [`AlreadyExists`](super::Error::AlreadyExists).
    pub replace: bool,
}

/// What was copied.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Copied {
    /// Files, links, directories and what else has a name.
    pub entries: u64,
    /// The sizes of the regular files.
    pub bytes: u64,
    /// How many of these bytes are shared with the source.
    pub shared_bytes: u64,
}

/// What a volume or snapshot takes on the disk.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Footprint {
    /// Files, links, directories and what else has a name.
    pub entries: u64,
    /// Bytes that its files occupy, shared or not.
    pub total_bytes: u64,
    /// Those of them that would come back if it were deleted, because nothing
    /// else has them.
    pub exclusive_bytes: u64,
}

impl Footprint {
    /// Bytes that something else has too.
    pub fn shared_bytes(&self) -> u64 {
        self.total_bytes.saturating_sub(self.exclusive_bytes)
    }
}

/// Some changes between two states of a volume, in the order of their paths.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Changes {
    /// The changes.
    pub changes: Vec<Change>,
    /// Whether there are more: ask again, after the last of these.
    pub more: bool,
}

/// One path that is different.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Change {
    /// The path. A directory is followed by what is in it, unless all of it was
    /// added or removed: then it stands for all of that.
    pub path: TreePath,
    /// What happened to it.
    pub kind: ChangeKind,
    /// What is there now, or was if it was removed.
    pub node: NodeKind,
    /// The size of a regular file now, or before if it was removed; 0 for all
    /// else.
    pub bytes: u64,
}

/// What happened to a path.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ChangeKind {
    /// It was not there.
    Added,
    /// It is no longer there.
    Removed,
    /// Its content is another, or it is something else now.
    Modified,
    /// Only its owner, mode, times or attributes are others.
    Metadata,
}

/// What a path leads to.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum NodeKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A device, a FIFO or a socket.
    Special,
}
