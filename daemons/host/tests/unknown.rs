//! Projects of which it is not known whether they run: nothing is done to them, the
//! master is told, and afterwards all goes on. Over memory backends.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use cocalc_core::{
    clock::SystemClock,
    control::{ErrorCode, HostCommand, HostReply, MoveCommand, ProjectConfig},
    grant::{Ledger, MemoryLedgerStore, sweep_orphans},
    ids::{Epoch, HostId, MoveId, ProjectId, SnapshotName},
    memory::{runner::MemoryRunner, storage::MemoryStorage},
    moves::host::{Delivered, MoveHost, StreamSource, Transfer, TransferError},
    router::HostAddress,
    runner::{
        Applied, Capabilities, Error, ExecRequest, Limits, Process, ProjectSpec, Result, Runner, State,
        Stats, Status,
    },
    snapshots::{Keeper, KeeperSettings},
    storage::Storage,
    stream::BoxStream,
};
use cocalc_host::Lifecycle;

/// These tests send nothing to other hosts.
#[derive(Debug)]
struct NoTransfer;

#[async_trait]
impl Transfer for NoTransfer {
    async fn send(
        &self,
        to: HostId,
        _: &HostAddress,
        _: MoveId,
        _: &dyn StreamSource,
        _: &(dyn Fn(u64) + Send + Sync),
    ) -> std::result::Result<Delivered, TransferError> {
        Err(TransferError::Cut { host: to, source: "there is nobody".into() })
    }
}

/// A runner that cannot tell of some projects what they do, and does nothing to them.
#[derive(Clone, Debug)]
struct Doubtful {
    runner: MemoryRunner,
    doubts: Arc<Mutex<BTreeSet<ProjectId>>>,
    /// Those that do not end when they are told to.
    stuck: Arc<Mutex<BTreeSet<ProjectId>>>,
}

impl Doubtful {
    fn certain(&self, project: ProjectId) -> Result<()> {
        if self.doubts.lock().unwrap().contains(&project) {
            return Err(Error::Unknown { project, reason: "nobody says".into() });
        }
        Ok(())
    }

    fn doubt(&self, project: ProjectId) {
        self.doubts.lock().unwrap().insert(project);
    }

    fn settle(&self) {
        self.doubts.lock().unwrap().clear();
        self.stuck.lock().unwrap().clear();
    }

    /// What really is.
    async fn really(&self, project: ProjectId) -> State {
        self.runner.status(project).await.unwrap().state
    }
}

#[async_trait]
impl Runner for Doubtful {
    fn capabilities(&self) -> Capabilities {
        self.runner.capabilities()
    }

    async fn prepare(&self, spec: &ProjectSpec) -> Result<()> {
        self.certain(spec.project)?;
        self.runner.prepare(spec).await
    }

    async fn start(&self, spec: &ProjectSpec) -> Result<Status> {
        self.certain(spec.project)?;
        self.runner.start(spec).await
    }

    async fn stop(&self, project: ProjectId, grace: Duration) -> Result<Status> {
        self.certain(project)?;
        if self.stuck.lock().unwrap().contains(&project) {
            return Err(Error::TimedOut { project, operation: "killing", limit: grace });
        }
        self.runner.stop(project, grace).await
    }

    async fn remove(&self, project: ProjectId) -> Result<()> {
        self.certain(project)?;
        self.runner.remove(project).await
    }

    async fn status(&self, project: ProjectId) -> Result<Status> {
        self.certain(project)?;
        self.runner.status(project).await
    }

    async fn list(&self) -> Result<Vec<Status>> {
        let mut list = self.runner.list().await?;
        for status in &mut list {
            if self.certain(status.project).is_err() {
                status.state = State::Unknown;
            }
        }
        Ok(list)
    }

    async fn exec(&self, project: ProjectId, request: ExecRequest) -> Result<Process> {
        self.runner.exec(project, request).await
    }

    async fn dial(&self, project: ProjectId, port: u16) -> Result<BoxStream> {
        self.runner.dial(project, port).await
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

struct World {
    storage: MemoryStorage,
    runner: Doubtful,
    ledger: Ledger,
    moves: MoveHost,
    lifecycle: Lifecycle,
}

impl World {
    async fn new() -> Self {
        let storage = MemoryStorage::new();
        let runner = Doubtful {
            runner: MemoryRunner::new(Arc::new(SystemClock)),
            doubts: Arc::default(),
            stuck: Arc::default(),
        };
        let store = Arc::new(MemoryLedgerStore::default());
        let ledger = Ledger::open(HostId::random(), store).await.unwrap();
        let files: Arc<dyn Storage> = Arc::new(storage.clone());
        let shared: Arc<dyn Runner> = Arc::new(runner.clone());
        let moves =
            MoveHost::builder(ledger.clone(), Arc::clone(&files), Arc::clone(&shared), Arc::new(NoTransfer))
                .build();
        let settings = KeeperSettings::default();
        let clock = Arc::new(SystemClock);
        let keeper = Keeper::new(ledger.clone(), Arc::clone(&files), Arc::clone(&shared), clock, settings);
        let images = Arc::new(|_| None);
        let lifecycle = Lifecycle::new(ledger.clone(), files, shared, moves.clone(), keeper, images);
        Self { storage, runner, ledger, moves, lifecycle }
    }

    async fn project(&self) -> ProjectId {
        let (project, epoch) = (ProjectId::random(), Epoch::FIRST);
        let config = ProjectConfig::default();
        self.done(HostCommand::Create { project, epoch, config }).await;
        project
    }

    async fn started(&self) -> ProjectId {
        let project = self.project().await;
        self.done(start(project)).await;
        project
    }

    async fn done(&self, command: HostCommand) -> HostReply {
        match self.lifecycle.execute(command).await {
            HostReply::Error(error) => panic!("refused: {error:?}"),
            done => done,
        }
    }

    async fn refused(&self, command: HostCommand) -> ErrorCode {
        match self.lifecycle.execute(command).await {
            HostReply::Error(error) => error.code,
            other => panic!("it was done: {other:?}"),
        }
    }
}

fn start(project: ProjectId) -> HostCommand {
    HostCommand::Start { project, epoch: Epoch::FIRST, config: ProjectConfig::default() }
}

fn name(text: &str) -> SnapshotName {
    text.parse().unwrap()
}

#[tokio::test]
async fn what_may_run_is_neither_started_nor_moved_nor_deleted_and_the_master_is_told() {
    let world = World::new().await;
    let epoch = Epoch::FIRST;
    let (running, stopped, other) = (world.started().await, world.project().await, world.started().await);
    let move_id = MoveId::random();
    let freeze = |project| {
        let step =
            MoveCommand::Freeze { epoch, name: name(&format!("move-{move_id}-final")), grace_ms: 1000 };
        HostCommand::Move { move_id, project, step }
    };
    let survey = |project| HostCommand::Move { move_id, project, step: MoveCommand::Survey { epoch } };
    for project in [running, stopped] {
        world.runner.doubt(project);
        let before = world.ledger.entry(project).unwrap();
        world.storage.write(project, "home/kept", "kept").unwrap();
        for command in [
            start(project),
            survey(project),
            freeze(project),
            HostCommand::Delete { project, epoch },
            HostCommand::Stop { project, epoch, grace_ms: 0 },
            HostCommand::Report { project },
            HostCommand::RestoreSnapshot { project, epoch, name: name("a"), former: name("b") },
        ] {
            let said = format!("{command:?}");
            assert_eq!(world.refused(command).await, ErrorCode::StateUnknown, "{said}");
        }
        assert_eq!(world.ledger.entry(project).unwrap(), before, "nothing was begun");
        assert_eq!(world.storage.files(project).unwrap()["home/kept"], "kept");
    }
    assert_eq!(
        (world.runner.really(running).await, world.runner.really(stopped).await),
        (State::Running, State::Stopped)
    );

    // The registration says so, with the reason; of others as ever.
    let held = world.lifecycle.held().await;
    let said = |project| {
        let held = held.iter().find(|held| held.report.project == project).unwrap();
        assert_eq!(held.report.epoch, Some(epoch));
        (held.report.status.state, held.report.status.reason.clone().unwrap_or_default())
    };
    for project in [running, stopped] {
        let (state, reason) = said(project);
        assert!(state == State::Unknown && reason.contains("nobody says"), "{state:?}: {reason}");
    }
    assert_eq!(said(other).0, State::Running);
    assert!(sweep_orphans(&world.ledger, &world.runner).await.is_empty());

    // When it is known, all of it is done.
    world.runner.settle();
    let HostReply::Project(report) = world.done(HostCommand::Report { project: running }).await else {
        panic!("a report")
    };
    assert_eq!(report.status.state, State::Running);
    world.done(start(stopped)).await;
    world.done(freeze(running)).await;
    assert_eq!(world.runner.really(running).await, State::Stopped);
    world.done(HostCommand::Delete { project: stopped, epoch }).await;
    assert_eq!(world.runner.really(stopped).await, State::Stopped);
}

#[tokio::test]
async fn what_could_not_be_stopped_when_its_right_ended_is_stopped_later() {
    let world = World::new().await;
    let (frozen, lost, kept) = (world.started().await, world.started().await, world.started().await);
    let epoch = Epoch::FIRST;
    // A freeze whose stop did not succeed, and news of another owner while nobody could
    // tell what runs.
    world.runner.stuck.lock().unwrap().insert(frozen);
    let move_id = MoveId::random();
    let step = MoveCommand::Freeze { epoch, name: name(&format!("move-{move_id}-final")), grace_ms: 0 };
    let freeze = HostCommand::Move { move_id, project: frozen, step };
    assert_eq!(world.refused(freeze).await, ErrorCode::Unavailable);
    assert!(world.ledger.entry(frozen).unwrap().may_run().is_none());
    assert_eq!(world.runner.really(frozen).await, State::Running);
    world.runner.settle();
    world.runner.doubt(lost);
    let heard = world.moves.observe(lost, HostId::random(), epoch.next(), None).await;
    assert_eq!(heard.unwrap_err().code, ErrorCode::StateUnknown);
    world.moves.stop_what_may_not_run().await;
    assert_eq!(world.runner.really(frozen).await, State::Stopped);
    assert_eq!(world.runner.really(lost).await, State::Running, "nothing is done to it");

    world.runner.settle();
    world.moves.stop_what_may_not_run().await;
    assert_eq!(world.runner.really(lost).await, State::Stopped);
    assert_eq!(world.ledger.entry(lost).unwrap().granted, None, "its files are put aside");
    assert_eq!(world.runner.really(kept).await, State::Running);
}
