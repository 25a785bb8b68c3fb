//! The server's own idea of a project: a program that listens on this machine.

use std::{collections::BTreeMap, time::Duration};

use async_trait::async_trait;
use cocalc_core::{
    ids::{Epoch, HostId, ProjectId},
    router::{self, Reach, Route, Router},
    runner::{
        self, Applied, Capabilities, Error, ExecRequest, Limits, Process, ProjectSpec, Runner, State, Stats,
        Status,
    },
    stream::BoxStream,
};
use tokio::{net::TcpStream, sync::broadcast};

/// Programs that somebody else starts and stops. The ingress only dials.
#[derive(Debug)]
pub(crate) struct LocalApps {
    /// For each project: the ports its user may name, and where they are.
    pub(crate) ports: BTreeMap<ProjectId, BTreeMap<u16, std::net::SocketAddr>>,
}

impl LocalApps {
    fn state(&self, project: ProjectId) -> Status {
        let state = if self.ports.contains_key(&project) { State::Running } else { State::Stopped };
        Status { project, epoch: None, state, started: None, reason: None }
    }

    fn not_ours<T>(&self, project: ProjectId) -> runner::Result<T> {
        let reason = "programs are not started from here".to_owned();
        Err(Error::Invalid { project, reason })
    }
}

#[async_trait]
impl Runner for LocalApps {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            backend: "local programs".to_owned(),
            isolation: false,
            limits: false,
            weaknesses: vec!["programs share this machine".to_owned()],
            unenforced: vec![],
        }
    }

    async fn dial(&self, project: ProjectId, port: u16) -> runner::Result<BoxStream> {
        let ports = self.ports.get(&project).ok_or(Error::NotRunning { project })?;
        let address = ports.get(&port).ok_or(Error::Refused { project, port })?;
        match TcpStream::connect(address).await {
            Ok(stream) => {
                // What users type arrives at once; a delay is not worth an error.
                let _ = stream.set_nodelay(true);
                Ok(Box::pin(stream))
            }
            Err(_) => Err(Error::Refused { project, port }),
        }
    }

    async fn status(&self, project: ProjectId) -> runner::Result<Status> {
        Ok(self.state(project))
    }

    async fn list(&self) -> runner::Result<Vec<Status>> {
        Ok(self.ports.keys().map(|project| self.state(*project)).collect())
    }

    async fn prepare(&self, spec: &ProjectSpec) -> runner::Result<()> {
        self.not_ours(spec.project)
    }

    async fn start(&self, spec: &ProjectSpec) -> runner::Result<Status> {
        self.not_ours(spec.project)
    }

    async fn stop(&self, project: ProjectId, _: Duration) -> runner::Result<Status> {
        self.not_ours(project)
    }

    async fn remove(&self, project: ProjectId) -> runner::Result<()> {
        self.not_ours(project)
    }

    async fn exec(&self, project: ProjectId, _: ExecRequest) -> runner::Result<Process> {
        self.not_ours(project)
    }

    async fn stats(&self, _: ProjectId) -> runner::Result<Stats> {
        Ok(Stats::default())
    }

    async fn set_limits(&self, project: ProjectId, _: &Limits) -> runner::Result<Applied> {
        self.not_ours(project)
    }

    async fn logs(&self, _: ProjectId, _: usize) -> runner::Result<String> {
        Ok(String::new())
    }
}

/// There is one machine, so every project is here.
#[derive(Debug)]
pub(crate) struct OneMachine {
    pub(crate) host: HostId,
    pub(crate) changes: broadcast::Sender<Route>,
}

#[async_trait]
impl Router for OneMachine {
    async fn route(&self, project: ProjectId) -> Result<Route, router::Error> {
        Ok(Route { project, host: self.host, epoch: Epoch::FIRST, how: Reach::Local })
    }

    fn changes(&self) -> broadcast::Receiver<Route> {
        self.changes.subscribe()
    }
}
