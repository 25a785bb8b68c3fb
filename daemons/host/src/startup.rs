//! Runs the tenant's own start-up program each time a project starts, so that
//! their services come back after a stop, a move or a reboot.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use cocalc_core::{
    ids::ProjectId,
    runner::{
        Capabilities, Command, ExecRequest, Process, ProjectSpec, Result, Runner, State, Stats, Status,
    },
    stream::BoxStream,
};

/// What runs: `~/.cocalc/startup`, if it is there and executable, in a session
/// of its own, with its output in `~/.cocalc/startup.log`.
const STARTUP: &str = "test -x ~/.cocalc/startup || exit 0; \
    setsid -f ~/.cocalc/startup >~/.cocalc/startup.log 2>&1 </dev/null";

/// How long the shell that detaches it may take. It is the tenant's shell.
const LIMIT: Duration = Duration::from_secs(20);

/// A runner whose projects run their start-up program.
#[derive(Debug)]
pub struct Startup(pub Arc<dyn Runner>);

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Runner for Startup {
    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }

    async fn prepare(&self, spec: &ProjectSpec) -> Result<()> {
        self.0.prepare(spec).await
    }

    async fn start(&self, spec: &ProjectSpec) -> Result<Status> {
        let before = self.0.status(spec.project).await?;
        let status = self.0.start(spec).await?;
        if before.state != State::Running {
            let (runner, project) = (Arc::clone(&self.0), spec.project);
            // Not waited for: the project runs, and its owner may be slow.
            tokio::spawn(async move {
                if tokio::time::timeout(LIMIT, run(&*runner, project)).await.is_err() {
                    tracing::info!(%project, "the start-up program was not detached in time");
                }
            });
        }
        Ok(status)
    }

    async fn stop(&self, project: ProjectId, grace: Duration) -> Result<Status> {
        self.0.stop(project, grace).await
    }

    async fn remove(&self, project: ProjectId) -> Result<()> {
        self.0.remove(project).await
    }

    async fn status(&self, project: ProjectId) -> Result<Status> {
        self.0.status(project).await
    }

    async fn list(&self) -> Result<Vec<Status>> {
        self.0.list().await
    }

    async fn exec(&self, project: ProjectId, request: ExecRequest) -> Result<Process> {
        self.0.exec(project, request).await
    }

    async fn dial(&self, project: ProjectId, port: u16) -> Result<BoxStream> {
        self.0.dial(project, port).await
    }

    async fn stats(&self, project: ProjectId) -> Result<Stats> {
        self.0.stats(project).await
    }

    async fn logs(&self, project: ProjectId, lines: usize) -> Result<String> {
        self.0.logs(project, lines).await
    }
}

async fn run(runner: &dyn Runner, project: ProjectId) {
    let request = ExecRequest { command: Command::Line(STARTUP.to_owned()), ..ExecRequest::default() };
    let outcome = async {
        let mut process = runner.exec(project, request).await?;
        process.handle.wait().await
    };
    if let Err(error) = outcome.await {
        tracing::info!(%project, error = %cocalc_core::chain(&error), "cannot run the start-up program");
    }
}
