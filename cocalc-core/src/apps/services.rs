//! What runs apps inside a project.

use std::{fmt, time::Duration};

use async_trait::async_trait;
use cocalc_ids::ProjectId;

use crate::runner::{ExecRequest, Exit, Result};

/// Runs processes in projects that outlive the connection, and the daemon, which
/// asked for them.
///
/// # Contract
///
/// - Every call ends within its limit, whatever the project does; what comes from
///   it is bounded, and is not believed in anything that concerns others.
/// - They end with their project.
#[async_trait]
pub trait Services: fmt::Debug + Send + Sync + 'static {
    /// Starts a service; one of that name that runs is left alone.
    async fn start_service(&self, project: ProjectId, name: &str, request: &ExecRequest) -> Result<()>;

    /// What there is, once it is no longer of `generation`, or after `limit`.
    async fn services(&self, project: ProjectId, generation: u64, limit: Duration) -> Result<ServiceList>;

    /// What a service has printed from byte `offset` on, the next piece of it.
    async fn service_output(&self, project: ProjectId, name: &str, offset: u64) -> Result<ServiceOutput>;

    /// Asks a service to end, kills it after `grace`, and forgets it.
    async fn stop_service(&self, project: ProjectId, name: &str, grace: Duration) -> Result<()>;
}

/// The services of a project.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ServiceList {
    /// Changes whenever something is started or ends.
    pub generation: u64,
    /// In the order of their names.
    pub services: Vec<Service>,
}

/// One of them.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Service {
    /// Its name.
    pub name: String,
    /// How it ended; `None` while it runs.
    pub exit: Option<Exit>,
    /// Which start of it this is, from 1.
    pub run: u64,
    /// For how long it has run.
    pub ran: Duration,
}

/// A piece of what a service has printed.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ServiceOutput {
    /// Where it begins: later than asked for, if the rest is no longer kept.
    pub offset: u64,
    /// What was printed.
    pub bytes: Vec<u8>,
}
