//! Runs the tenant's own start-up program each time a project starts, so that
//! their services come back after a stop, a move or a reboot.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use cocalc_core::{
    ids::ProjectId,
    runner::{
        Applied, Capabilities, Command, Error, ExecRequest, Limits, Process, ProjectSpec, Result, Runner,
        State, Stats, Status,
    },
    stream::BoxStream,
};

use crate::ran::Ran;

/// What runs: `~/.cocalc/startup`, if it is there and executable, in a session
/// of its own, with its output in `~/.cocalc/startup.log`.
const STARTUP: &str = "test -x ~/.cocalc/startup || exit 0; \
    setsid -f ~/.cocalc/startup >~/.cocalc/startup.log 2>&1 </dev/null";

/// Goes before it in a container, whose memory file system goes with it: a host
/// that dies in the middle of a start runs it when it is back, and once.
const ONCE: &str = "mkdir /dev/shm/.cocalc-started 2>/dev/null || exit 0; ";

/// How long the shell that detaches it may take. It is the tenant's shell.
const LIMIT: Duration = Duration::from_secs(20);

/// For so long after a start, a port on which nothing listens may be that of
/// an app that is still coming up.
const COMING_UP: Duration = Duration::from_secs(15);
/// How long a connection waits for such an app, and how often it tries.
const PATIENCE: Duration = Duration::from_secs(3);
const AGAIN: Duration = Duration::from_millis(25);

/// Something that is done in a project that was just started, before its own
/// programs run. Bounded in time.
#[async_trait]
pub(crate) trait BeforeStartup: std::fmt::Debug + Send + Sync + 'static {
    /// Does it.
    async fn before_startup(&self, project: ProjectId);
}

/// A runner whose projects run their start-up program, and whose users don't
/// notice that its apps take a moment.
#[derive(Debug)]
pub struct Startup {
    runner: Arc<dyn Runner>,
    /// What comes before the start-up program.
    before: OnceLock<Arc<dyn BeforeStartup>>,
    /// Where it is noted what is to run.
    ran: OnceLock<Ran>,
    /// The projects that were started a moment ago.
    fresh: Mutex<BTreeMap<ProjectId, Instant>>,
}

impl Startup {
    /// Wraps a runner.
    pub fn new(runner: Arc<dyn Runner>) -> Self {
        Self { runner, before: OnceLock::new(), ran: OnceLock::new(), fresh: Mutex::default() }
    }

    /// Does this before a start-up program runs; once, for all projects.
    pub(crate) fn before(&self, before: Arc<dyn BeforeStartup>) {
        // A second one would be a mistake of this crate, and is passed over.
        let _ = self.before.set(before);
    }

    /// Notes there what runs and what was stopped, from now on.
    pub(crate) fn note(&self, ran: Ran) {
        let _ = self.ran.set(ran);
    }

    fn fresh(&self) -> MutexGuard<'_, BTreeMap<ProjectId, Instant>> {
        let mut fresh = self.fresh.lock().unwrap_or_else(PoisonError::into_inner);
        fresh.retain(|_, started| started.elapsed() < COMING_UP);
        fresh
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Runner for Startup {
    fn capabilities(&self) -> Capabilities {
        self.runner.capabilities()
    }

    async fn prepare(&self, spec: &ProjectSpec) -> Result<()> {
        self.runner.prepare(spec).await
    }

    async fn start(&self, spec: &ProjectSpec) -> Result<Status> {
        let before = self.runner.status(spec.project).await?;
        let status = match self.ran.get() {
            None => self.runner.start(spec).await?,
            Some(ran) => {
                // At the same time: nobody waits for the disk.
                let noted = ran.note(spec.project, spec.epoch);
                let (status, ()) = tokio::join!(self.runner.start(spec), noted);
                if status.is_err() && before.state != State::Running {
                    ran.forget(spec.project).await;
                }
                status?
            }
        };
        let contained = self.runner.capabilities().isolation;
        let was_down = before.state != State::Running;
        if was_down {
            self.fresh().insert(spec.project, Instant::now());
        }
        if was_down || contained {
            let line = if contained { format!("{ONCE}{STARTUP}") } else { STARTUP.to_owned() };
            let (runner, project) = (Arc::clone(&self.runner), spec.project);
            // Not waited for: the project runs, and its owner may be slow.
            let before = self.before.get().cloned();
            tokio::spawn(async move {
                if let Some(before) = before {
                    before.before_startup(project).await;
                }
                if tokio::time::timeout(LIMIT, run(&*runner, project, line)).await.is_err() {
                    tracing::info!(%project, "the start-up program was not detached in time");
                }
            });
        }
        Ok(status)
    }

    fn start_phases(&self, project: ProjectId) -> Vec<(String, u64)> {
        self.runner.start_phases(project)
    }

    async fn stop(&self, project: ProjectId, grace: Duration) -> Result<Status> {
        let status = self.runner.stop(project, grace).await?;
        if let Some(ran) = self.ran.get() {
            ran.forget(project).await;
        }
        Ok(status)
    }

    async fn remove(&self, project: ProjectId) -> Result<()> {
        self.runner.remove(project).await?;
        if let Some(ran) = self.ran.get() {
            ran.forget(project).await;
        }
        Ok(())
    }

    async fn status(&self, project: ProjectId) -> Result<Status> {
        self.runner.status(project).await
    }

    async fn list(&self) -> Result<Vec<Status>> {
        self.runner.list().await
    }

    async fn exec(&self, project: ProjectId, request: ExecRequest) -> Result<Process> {
        self.runner.exec(project, request).await
    }

    async fn dial(&self, project: ProjectId, port: u16) -> Result<BoxStream> {
        let begun = Instant::now();
        loop {
            match self.runner.dial(project, port).await {
                Err(Error::Refused { .. })
                    if begun.elapsed() < PATIENCE && self.fresh().contains_key(&project) =>
                {
                    tokio::time::sleep(AGAIN).await;
                }
                dialed => return dialed,
            }
        }
    }

    async fn stats(&self, project: ProjectId) -> Result<Stats> {
        self.runner.stats(project).await
    }

    async fn set_limits(&self, project: ProjectId, limits: &Limits) -> Result<Applied> {
        self.runner.set_limits(project, limits).await
    }

    async fn logs(&self, project: ProjectId, lines: usize) -> Result<String> {
        self.runner.logs(project, lines).await
    }
}

async fn run(runner: &dyn Runner, project: ProjectId, line: String) {
    let request = ExecRequest { command: Command::Line(line), ..ExecRequest::default() };
    let outcome = async {
        let mut process = runner.exec(project, request).await?;
        process.handle.wait().await
    };
    if let Err(error) = outcome.await {
        tracing::info!(%project, error = %cocalc_core::chain(&error), "cannot run the start-up program");
    }
}
