//! Starting a stopped project because somebody asks for it.

use std::fmt;

use async_trait::async_trait;
use cocalc_ids::ProjectId;

/// Brings a project up for a user who has been authorized already.
///
/// # Contract
///
/// - `wake` answers at once; the start goes on by itself. Calling it again
///   while the start is under way joins it.
/// - It never starts a project that a move has fenced, or that its owner's
///   host does not hold.
#[async_trait]
pub trait Wake: fmt::Debug + Send + Sync + 'static {
    /// Asks for the project to run, and says how far it is.
    async fn wake(&self, project: ProjectId) -> Awake;
}

/// How far a project is on its way up.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum Awake {
    /// It runs.
    Running,
    /// It is on its way; the phase is for people, for instance `mounting`.
    Starting {
        /// What is being done.
        phase: String,
    },
    /// It cannot be started, for this reason.
    Failed {
        /// Why, for people.
        reason: String,
    },
}
