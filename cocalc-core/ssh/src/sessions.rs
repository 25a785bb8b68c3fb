//! What an SSH session needs of the place where a project runs.

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use cocalc_core::{
    ids::ProjectId,
    runner::{Error, ExecRequest, Process, Runner, State},
    stream::BoxStream,
    wake::Awake,
};

/// Processes and connections inside projects, for users who were admitted
/// already.
///
/// # Contract
///
/// - Nothing here checks rights: a [`Gate`](crate::Gate) hands a backend out
///   with the admission that goes with it.
/// - Dropping a returned process or stream ends what it stands for.
#[async_trait]
pub trait Sessions: fmt::Debug + Send + Sync + 'static {
    /// Asks for the project to run, and says how far it is.
    async fn wake(&self, project: ProjectId) -> Awake;

    /// Starts a process in the running project.
    async fn exec(&self, project: ProjectId, request: ExecRequest) -> Result<Process, Error>;

    /// Connects to a TCP port on the project's loopback addresses.
    async fn dial(&self, project: ProjectId, port: u16) -> Result<BoxStream, Error>;
}

/// A runner on this machine. It cannot start what is stopped; give
/// [`LocalGate::wake`](crate::LocalGate::wake) something that can.
#[async_trait]
impl Sessions for Arc<dyn Runner> {
    async fn wake(&self, project: ProjectId) -> Awake {
        match self.status(project).await {
            Ok(status) if status.state == State::Running => Awake::Running,
            Ok(status) if status.state == State::Starting => Awake::Starting { phase: "starting".into() },
            Ok(_) => Awake::Failed { reason: "the project is not running".into() },
            Err(error) => Awake::Failed { reason: error.to_string() },
        }
    }

    async fn exec(&self, project: ProjectId, request: ExecRequest) -> Result<Process, Error> {
        Runner::exec(&**self, project, request).await
    }

    async fn dial(&self, project: ProjectId, port: u16) -> Result<BoxStream, Error> {
        Runner::dial(&**self, project, port).await
    }
}
