//! How a project stands with its backups, as its host knows and keeps it.

use async_trait::async_trait;
use cocalc_ids::{Epoch, ProjectId, SnapshotName, Timestamp};
use serde::{Deserialize, Serialize};

use super::{Backup, Error};
use crate::{
    BoxError,
    control::{CommandError, ErrorCode},
};

/// How a project stands with its backups, in one epoch.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Status {
    /// Which project.
    pub project: ProjectId,
    /// In which epoch.
    pub epoch: Epoch,
    /// The last backup of this epoch.
    #[serde(default)]
    pub last: Option<Last>,
    /// Since when it is known that there is something that no backup has;
    /// `None` if nothing is known to be.
    #[serde(default)]
    pub pending_since: Option<Timestamp>,
    /// Why the last try failed, if it did.
    #[serde(default)]
    pub failure: Option<Failure>,
    /// Whether all files were written anew since the last backup, by a restore:
    /// their change times say nothing then.
    #[serde(default)]
    pub rewritten: bool,
}

/// A backup that was made.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Last {
    /// What it is.
    pub backup: Backup,
    /// Of which snapshot.
    pub snapshot: SnapshotName,
    /// Whether that snapshot is there for the sake of this only, because no
    /// automatic ones are kept.
    #[serde(default)]
    pub only_for_this: bool,
    /// When it was complete, on the host.
    pub finished: Timestamp,
    /// How long it took, in milliseconds.
    pub millis: u64,
}

/// Why no backup could be made.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Failure {
    /// Since when it has failed.
    pub since: Timestamp,
    /// How often in a row.
    pub times: u32,
    /// The kind, for programs.
    pub code: ErrorCode,
    /// For people.
    pub message: String,
}

impl Status {
    /// Of a project of which nothing is known.
    pub fn new(project: ProjectId, epoch: Epoch) -> Self {
        Self { project, epoch, last: None, pending_since: None, failure: None, rewritten: false }
    }

    /// What the project's owner should know; `None` if all is well.
    pub fn notice(&self) -> Option<String> {
        let failure = self.failure.as_ref()?;
        let message = &failure.message;
        Some(match failure.times {
            0 | 1 => format!("the last backup failed: {message}"),
            times => format!("the last {times} backups failed: {message}"),
        })
    }

    /// Notes that a try failed.
    pub fn failed(&mut self, error: &CommandError, now: Timestamp) {
        let (since, times) = self.failure.as_ref().map_or((now, 0), |failure| (failure.since, failure.times));
        let (code, message) = (error.code, error.message.clone());
        self.failure = Some(Failure { since, times: times.saturating_add(1), code, message });
    }
}

/// Keeps the status of each project where a restart finds it.
#[async_trait]
pub trait StatusStore: std::fmt::Debug + Send + Sync + 'static {
    /// All that was kept.
    async fn load(&self) -> Result<Vec<Status>, BoxError>;

    /// Keeps this, in the place of what was kept for the project. Durable when
    /// it returns.
    async fn save(&self, status: &Status) -> Result<(), BoxError>;

    /// Keeps nothing of the project any more.
    async fn remove(&self, project: ProjectId) -> Result<(), BoxError>;
}

/// What a failed backup call means to the master.
pub fn backup_error(error: &Error) -> CommandError {
    let code = match error {
        Error::NotFound { .. } => ErrorCode::NotFound,
        Error::Invalid { .. } => ErrorCode::Invalid,
        Error::WrongKey { .. } | Error::Denied { .. } => ErrorCode::RepositoryDenied,
        Error::Full { .. } => ErrorCode::NoSpace,
        Error::Unavailable { .. } => ErrorCode::RepositoryUnavailable,
        Error::Damaged { .. } => ErrorCode::RepositoryDamaged,
        Error::Incomplete { .. } | Error::Backend { .. } => ErrorCode::Failed,
    };
    CommandError { code, message: crate::chain(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_counted_from_the_first() {
        let mut status = Status::new(ProjectId::random(), Epoch::FIRST);
        assert_eq!(status.notice(), None);
        let error = CommandError { code: ErrorCode::RepositoryUnavailable, message: "gone".into() };
        status.failed(&error, Timestamp::from_secs(1));
        assert_eq!(status.notice().unwrap(), "the last backup failed: gone");
        status.failed(&error, Timestamp::from_secs(2));
        let failure = status.failure.clone().unwrap();
        assert_eq!((failure.since, failure.times), (Timestamp::from_secs(1), 2));
        assert!(status.notice().unwrap().contains("the last 2 backups"));
        let kept = serde_json::to_string(&status).unwrap();
        assert_eq!(serde_json::from_str::<Status>(&kept).unwrap(), status);
    }
}
