use cocalc_ids::ProjectId;

use crate::BoxError;

/// Why a call to [`Backups`](super::Backups) failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no such backup, or no such path in it.
    #[error("project {project} has no such backup or path: {what}")]
    NotFound {
        /// Whose backup was asked for.
        project: ProjectId,
        /// What is missing.
        what: String,
    },
    /// What was asked for cannot be done as it was asked.
    #[error("project {project}: {reason}")]
    Invalid {
        /// Whose backup.
        project: ProjectId,
        /// What is wrong, and what to do instead.
        reason: String,
    },
    /// The key at hand does not open the repository.
    #[error("the key at hand does not open the repository of project {project}")]
    WrongKey {
        /// Whose repository.
        project: ProjectId,
        /// What was tried.
        source: BoxError,
    },
    /// The credentials were refused or have expired. What was uploaded stays;
    /// try again with new ones.
    #[error("the repository of project {project} refused the credentials")]
    Denied {
        /// Whose repository.
        project: ProjectId,
        /// What it said.
        source: BoxError,
    },
    /// The repository, or the disk below the target, is full.
    #[error("no space left for project {project}")]
    Full {
        /// Whose backup or restore.
        project: ProjectId,
        /// Where.
        source: BoxError,
    },
    /// The repository cannot be reached, or does not answer in time. Try again
    /// later.
    #[error("the repository of project {project} cannot be reached")]
    Unavailable {
        /// Whose repository.
        project: ProjectId,
        /// What was tried.
        source: BoxError,
    },
    /// The repository lacks something, or it is not what was written.
    #[error("the repository of project {project} is damaged")]
    Damaged {
        /// Whose repository.
        project: ProjectId,
        /// What is damaged.
        source: BoxError,
    },
    /// Some files could not be read or written as they are, so nothing was
    /// listed as a backup, or given out as restored.
    #[error("project {project} is incomplete: {}", what.join("; "))]
    Incomplete {
        /// Whose backup or restore.
        project: ProjectId,
        /// What is missing, the first few.
        what: Vec<String>,
    },
    /// The backend failed.
    #[error("could not {operation} project {project}")]
    Backend {
        /// What was being done.
        operation: &'static str,
        /// For which project.
        project: ProjectId,
        /// Why it failed.
        source: BoxError,
    },
}
