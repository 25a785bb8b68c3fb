//! Why storage calls fail.

use std::path::PathBuf;

use cocalc_ids::{ProjectId, SnapshotName, TreePath};

use crate::BoxError;

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
    /// The snapshot is held.
    #[error(
        "snapshot {name} of project {project} is in use, for instance by a move or a backup; try again when that has ended"
    )]
    InUse {
        /// The project.
        project: ProjectId,
        /// The snapshot.
        name: SnapshotName,
    },
    /// There is no such path, or what is there cannot be what was asked for.
    #[error("{path:?} of project {project}: {reason}")]
    Path {
        /// The project.
        project: ProjectId,
        /// The path, below its root.
        path: TreePath,
        /// What is wrong with it, for instance `there is nothing`.
        reason: String,
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
