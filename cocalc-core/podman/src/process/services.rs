//! The services of projects that are plain processes.

use std::time::Duration;

use async_trait::async_trait;
use cocalc_core::{
    apps::{ServiceList, ServiceOutput, Services},
    ids::ProjectId,
    runner::{Error, ExecRequest, Result},
};

use super::{ProcessRunner, backend};
use crate::agent::{self, AgentError, AgentSocket};

impl ProcessRunner {
    fn reach(&self, project: ProjectId) -> Result<AgentSocket> {
        self.shared.running(project)?;
        self.shared.socket(project).map_err(|error| backend("reach", project, error))
    }
}

fn failed(project: ProjectId, error: AgentError) -> Error {
    match error {
        AgentError::Refused(reason) => Error::Invalid { project, reason },
        error => backend("ask the supervisor of", project, error),
    }
}

#[async_trait]
impl Services for ProcessRunner {
    async fn start_service(&self, project: ProjectId, name: &str, request: &ExecRequest) -> Result<()> {
        let socket = self.reach(project)?;
        let (home, env) = self.shared.surroundings(project)?;
        let started = agent::services::start(&socket, name, request, env.iter(), &home).await;
        started.map_err(|error| failed(project, error))
    }

    async fn services(&self, project: ProjectId, generation: u64, limit: Duration) -> Result<ServiceList> {
        let socket = self.reach(project)?;
        agent::services::list(&socket, generation, limit).await.map_err(|error| failed(project, error))
    }

    async fn service_output(&self, project: ProjectId, name: &str, offset: u64) -> Result<ServiceOutput> {
        let socket = self.reach(project)?;
        agent::services::output(&socket, name, offset).await.map_err(|error| failed(project, error))
    }

    async fn stop_service(&self, project: ProjectId, name: &str, grace: Duration) -> Result<()> {
        let socket = self.reach(project)?;
        agent::services::stop(&socket, name, grace).await.map_err(|error| failed(project, error))
    }
}
