//! Commands about files, over memory backends: what the master sends, in the
//! ways in which it may send it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;

use async_trait::async_trait;
use cocalc_core::{
    clock::SystemClock,
    control::{ErrorCode, HostCommand, HostReply, ProjectConfig},
    grant::{Ledger, MemoryLedgerStore},
    ids::{Epoch, HostId, MoveId, OperationId, ProjectId, SnapshotName, TreePath},
    memory::{runner::MemoryRunner, storage::MemoryStorage},
    moves::host::{Delivered, MoveHost, StreamSource, Transfer, TransferError},
    router::HostAddress,
    snapshots::{Keeper, KeeperSettings, Policy, PolicyFields, auto_time},
    storage::{CopyOptions, Place, Storage},
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
    ) -> Result<Delivered, TransferError> {
        Err(TransferError::Cut { host: to, source: "there is nobody".into() })
    }
}

struct World {
    storage: MemoryStorage,
    lifecycle: Lifecycle,
}

impl World {
    async fn new() -> Self {
        let storage = MemoryStorage::new();
        let runner = Arc::new(MemoryRunner::new(Arc::new(SystemClock)));
        let store = Arc::new(MemoryLedgerStore::default());
        let ledger = Ledger::open(HostId::random(), store).await.unwrap();
        let files: Arc<dyn Storage> = Arc::new(storage.clone());
        let moves =
            MoveHost::builder(ledger.clone(), Arc::clone(&files), runner.clone(), Arc::new(NoTransfer))
                .build();
        let settings = KeeperSettings::default();
        let keeper =
            Keeper::new(ledger.clone(), Arc::clone(&files), runner.clone(), Arc::new(SystemClock), settings);
        let lifecycle = Lifecycle::new(ledger, files, runner, moves, keeper, Arc::new(|_| None));
        Self { storage, lifecycle }
    }

    async fn project(&self, config: ProjectConfig) -> ProjectId {
        let project = ProjectId::random();
        let command = HostCommand::Create { project, epoch: Epoch::FIRST, config };
        assert!(matches!(self.lifecycle.execute(command).await, HostReply::Project(_)));
        project
    }

    async fn names(&self, project: ProjectId) -> Vec<SnapshotName> {
        self.storage.snapshots(project).await.unwrap().into_iter().map(|s| s.name).collect()
    }

    async fn refused(&self, command: HostCommand) -> ErrorCode {
        match self.lifecycle.execute(command).await {
            HostReply::Error(error) => error.code,
            other => panic!("it was done: {other:?}"),
        }
    }
}

fn path(text: &str) -> TreePath {
    text.parse().unwrap()
}

fn name(text: &str) -> SnapshotName {
    text.parse().unwrap()
}

fn copy(to: ProjectId, from: ProjectId, options: CopyOptions) -> HostCommand {
    HostCommand::Copy {
        operation: OperationId::random(),
        project: to,
        epoch: Epoch::FIRST,
        from: Place::live(from, path("home/data")),
        from_epoch: Epoch::FIRST,
        to: path("home/data"),
        options,
    }
}

#[tokio::test]
async fn a_command_that_comes_twice_does_not_undo_what_was_done_in_between() {
    let world = World::new().await;
    let (one, two) =
        (world.project(ProjectConfig::default()).await, world.project(ProjectConfig::default()).await);
    world.storage.write(one, "home/data", "old").unwrap();
    world.storage.write(two, "home/other", "x").unwrap();
    let command = copy(two, one, CopyOptions { same_owner: false, replace: true });
    let first = world.lifecycle.execute(command.clone()).await;
    assert!(
        matches!(&first, HostReply::Copied { copied, .. } if copied.bytes == 3 && copied.shared_bytes == 0)
    );
    world.storage.write(two, "home/data", "work that went on").unwrap();
    assert_eq!(world.lifecycle.execute(command).await, first);
    assert_eq!(world.storage.files(two).unwrap()["home/data"], "work that went on");

    world
        .lifecycle
        .execute(HostCommand::Snapshot { project: one, epoch: Epoch::FIRST, name: name("s") })
        .await;
    world.storage.write(one, "home/data", "new").unwrap();
    let restore = HostCommand::RestorePath {
        operation: OperationId::random(),
        project: one,
        epoch: Epoch::FIRST,
        name: name("s"),
        path: path("home/data"),
        former: name("before-restore"),
    };
    let first = world.lifecycle.execute(restore.clone()).await;
    assert_eq!(world.storage.files(one).unwrap()["home/data"], "old");
    world.storage.write(one, "home/data", "newer").unwrap();
    assert_eq!(world.lifecycle.execute(restore).await, first);
    assert_eq!(world.storage.files(one).unwrap()["home/data"], "newer");
    assert_eq!(world.storage.snapshot_files(one, &name("before-restore")).unwrap()["home/data"], "new");
}

#[tokio::test]
async fn only_under_both_grants() {
    let world = World::new().await;
    let (one, two) =
        (world.project(ProjectConfig::default()).await, world.project(ProjectConfig::default()).await);
    world.storage.write(one, "home/data", "x").unwrap();
    let stale = Epoch::FIRST.next();
    let mut command = copy(two, one, CopyOptions::default());
    if let HostCommand::Copy { from_epoch, .. } = &mut command {
        *from_epoch = stale;
    }
    assert_eq!(world.refused(command).await, ErrorCode::StaleEpoch);
    let elsewhere = copy(two, ProjectId::random(), CopyOptions::default());
    assert_eq!(world.refused(elsewhere).await, ErrorCode::NotFound);
    let usage = HostCommand::Usage { project: one, epoch: stale, count: false };
    assert_eq!(world.refused(usage).await, ErrorCode::StaleEpoch);
    let mut missing = copy(two, one, CopyOptions::default());
    if let HostCommand::Copy { from, .. } = &mut missing {
        from.path = path("home/nothing");
    }
    assert_eq!(world.refused(missing).await, ErrorCode::Invalid);
}

#[tokio::test]
async fn a_clone_has_the_files_the_grant_and_the_limit_and_is_its_own() {
    let world = World::new().await;
    let config = ProjectConfig { quota_bytes: Some(1_000), ..ProjectConfig::default() };
    let source = world.project(config.clone()).await;
    world.storage.write(source, "home/data", "x").unwrap();
    let project = ProjectId::random();
    let command = HostCommand::Clone {
        project,
        epoch: Epoch::FIRST,
        config,
        source,
        source_epoch: Epoch::FIRST,
        name: None,
        same_owner: true,
    };
    let report = world.lifecycle.execute(command.clone()).await;
    assert!(matches!(report, HostReply::Project(report) if report.epoch == Some(Epoch::FIRST)));
    world.storage.write(project, "home/data", "own").unwrap();
    assert_eq!(world.storage.files(source).unwrap()["home/data"], "x");
    assert_eq!(world.storage.usage(project).await.unwrap().limit_bytes, Some(1_500));
    // Repeated, it changes nothing, and takes no further snapshot of the source.
    let before = world.names(source).await;
    assert!(before.len() == 1 && auto_time(&before[0]).is_some(), "{before:?}");
    world.storage.write(source, "home/data", "later").unwrap();
    assert!(matches!(world.lifecycle.execute(command).await, HostReply::Project(_)));
    assert_eq!(world.storage.files(project).unwrap()["home/data"], "own");
    assert_eq!(world.names(source).await, before);
    // Of a snapshot that is not there nothing is left behind.
    let lost = ProjectId::random();
    let command = HostCommand::Clone {
        project: lost,
        epoch: Epoch::FIRST,
        config: ProjectConfig::default(),
        source,
        source_epoch: Epoch::FIRST,
        name: Some(name("nothing")),
        same_owner: true,
    };
    assert_eq!(world.refused(command).await, ErrorCode::NotFound);
    let report = HostCommand::Report { project: lost };
    assert!(matches!(world.lifecycle.execute(report).await, HostReply::Project(r) if r.epoch.is_none()));
}

#[tokio::test]
async fn a_stop_takes_a_snapshot_and_a_policy_changes_the_limit() {
    let world = World::new().await;
    let config = ProjectConfig { quota_bytes: Some(1_000), ..ProjectConfig::default() };
    let project = world.project(config.clone()).await;
    let epoch = Epoch::FIRST;
    world.lifecycle.execute(HostCommand::Start { project, epoch, config: config.clone() }).await;
    world.storage.write(project, "home/data", "x").unwrap();
    world.lifecycle.execute(HostCommand::Stop { project, epoch, grace_ms: 0 }).await;
    let names = world.names(project).await;
    assert_eq!(world.storage.snapshot_files(project, &names[0]).unwrap()["home/data"], "x");
    world.lifecycle.execute(HostCommand::Stop { project, epoch, grace_ms: 0 }).await;
    assert_eq!(world.names(project).await.len(), 1, "nothing has changed since");

    let fields = PolicyFields { allowance_percent: 100, ..PolicyFields::default() };
    let config = ProjectConfig { snapshots: Some(Policy::try_from(fields).unwrap()), ..config };
    world.lifecycle.execute(HostCommand::Configure { project, epoch, config }).await;
    let usage = HostCommand::Usage { project, epoch, count: true };
    let HostReply::Usage(report) = world.lifecycle.execute(usage).await else { panic!() };
    assert_eq!((report.plan_bytes, report.allowance_bytes), (Some(1_000), Some(1_000)));
    assert_eq!(report.usage.limit_bytes, Some(2_000));
    assert_eq!(report.footprint.unwrap().total_bytes, 1);
}
