//! The keeper of snapshots over a storage that counts and fails.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::{sync::Arc, time::Duration};

use cocalc_core::{
    backups::fetched_name,
    control::ProjectConfig,
    grant::{Ledger, MemoryLedgerStore},
    ids::{Epoch, HostId, OperationId, ProjectId, SnapshotName, Timestamp},
    memory::{clock::ManualClock, runner::MemoryRunner, storage::MemoryStorage},
    runner::{ProjectSpec, Runner},
    snapshots::{Keeper, KeeperSettings},
    storage::{Storage, VolumeOptions},
};
use cocalc_testkit::faults::{Call, Fault, FaultyStorage};

const GIB: u64 = 1 << 30;
const DAY: Duration = Duration::from_secs(86_400);

struct World {
    files: MemoryStorage,
    storage: FaultyStorage,
    runner: MemoryRunner,
    clock: ManualClock,
    ledger: Ledger,
    keeper: Keeper,
    project: ProjectId,
    plan: Option<u64>,
}

impl World {
    /// With one project, which does not run.
    async fn new() -> Self {
        let clock = ManualClock::new(Timestamp::now());
        let runner = MemoryRunner::new(Arc::new(clock.clone()));
        let files = MemoryStorage::new();
        let storage = FaultyStorage::new(Arc::new(files.clone()));
        let ledger = Ledger::open(HostId::random(), Arc::new(MemoryLedgerStore::default())).await.unwrap();
        let keeper = Keeper::new(
            ledger.clone(),
            Arc::new(storage.clone()),
            Arc::new(runner.clone()),
            Arc::new(clock.clone()),
            KeeperSettings::default(),
        );
        let config = ProjectConfig { quota_bytes: Some(GIB), ..ProjectConfig::default() };
        let (project, plan) = (ProjectId::random(), keeper.limit_bytes(&config));
        ledger.create(project, Epoch::FIRST, config).await.unwrap();
        files.create(project, &VolumeOptions { limit_bytes: plan }).await.unwrap();
        let world = Self { files, storage, runner, clock, ledger, keeper, project, plan };
        // What is looked at once, after a start of the process, has been looked at.
        world.pass(Duration::from_secs(60)).await;
        world
    }

    async fn start(&self) {
        let spec = ProjectSpec {
            project: self.project,
            epoch: Epoch::FIRST,
            volume: Default::default(),
            image: None,
            slot: 0,
            limits: Default::default(),
            env: Default::default(),
            isolation: Default::default(),
        };
        self.runner.start(&spec).await.unwrap();
    }

    async fn pass(&self, time: Duration) {
        let step = Duration::from_secs(10);
        for _ in 0..time.as_secs().div_ceil(step.as_secs()).min(60) {
            self.clock.advance(step.max(time / 60));
            self.keeper.round().await;
        }
    }

    async fn limit(&self) -> Option<u64> {
        self.files.usage(self.project).await.unwrap().limit_bytes
    }

    async fn raise(&self, bytes: u64) -> (SnapshotName, cocalc_core::snapshots::RaisedRoom) {
        let name = fetched_name(OperationId::random());
        let entry = self.ledger.entry(self.project).unwrap();
        (name.clone(), self.keeper.raise(&entry, name, bytes).await.unwrap())
    }

    async fn has(&self, name: &SnapshotName) -> bool {
        self.files.snapshots(self.project).await.unwrap().iter().any(|snapshot| snapshot.name == *name)
    }

    fn seen(&self, call: Call) -> usize {
        self.storage.seen().into_iter().filter(|seen| *seen == call).count()
    }
}

#[tokio::test(start_paused = true)]
async fn snapshots_are_listed_once_for_each_look_at_a_project() {
    let world = World::new().await;
    world.start().await;
    // The first look, which finds no snapshot to compare the project with: it comes at a
    // time within the interval that the project's id says, before the start or after it.
    world.pass(Duration::from_secs(1800)).await;
    assert!(world.seen(Call::Snapshot) > 0, "it is looked at in every interval");
    let before = (world.seen(Call::Snapshots), world.seen(Call::Snapshot), world.seen(Call::ChangedSince));
    for n in 0..6 {
        world.files.write(world.project, "log", format!("line {n}")).unwrap();
        world.pass(Duration::from_secs(900)).await;
    }
    let (lists, taken, looked) = (
        world.seen(Call::Snapshots) - before.0,
        world.seen(Call::Snapshot) - before.1,
        world.seen(Call::ChangedSince) - before.2,
    );
    assert!(taken >= 5, "{taken}");
    assert_eq!(lists, looked, "in {taken} snapshots");
}

#[tokio::test(start_paused = true)]
async fn a_restore_that_runs_keeps_its_room_whatever_else_happens() {
    let world = World::new().await;
    world.start().await;
    let (name, room) = world.raise(1000).await;
    let raised = world.plan.map(|plan| plan + 1000);
    world.pass(Duration::from_secs(300)).await;
    assert_eq!(world.limit().await, raised);
    // Another plan, and a storage that fails once.
    let config = ProjectConfig { quota_bytes: Some(2 * GIB), ..ProjectConfig::default() };
    world.ledger.configure(world.project, Epoch::FIRST, config.clone()).await.unwrap();
    world.storage.order(Call::SetLimit, Fault::Before);
    world.keeper.set_limit(world.project).await.unwrap_err();
    world.pass(Duration::from_secs(60)).await;
    let plan = world.keeper.limit_bytes(&config);
    assert_eq!(world.limit().await, plan.map(|plan| plan + 1000));
    // For days, too: it has not come yet.
    world.pass(3 * DAY).await;
    assert_eq!(world.limit().await, plan.map(|plan| plan + 1000));
    room.keep();
    let entry = world.ledger.entry(world.project).unwrap();
    world.keeper.end_room(&entry, &name).await.unwrap();
    assert_eq!(world.limit().await, plan);
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_restore_leaves_a_stopped_project_no_room_although_its_limit_cannot_be_set_at_once() {
    let world = World::new().await;
    let (_, room) = world.raise(1000).await;
    assert_eq!(world.limit().await, world.plan.map(|plan| plan + 1000));
    world.pass(Duration::from_secs(60)).await;
    assert_eq!(world.limit().await, world.plan.map(|plan| plan + 1000), "it goes on");
    // Somebody has its turn for long, and then the storage fails.
    drop(room);
    let turn = world.ledger.turn(world.project).await;
    world.pass(Duration::from_secs(60)).await;
    assert_eq!(world.limit().await, world.plan.map(|plan| plan + 1000), "out of turn nothing is done");
    for _ in 0..2 {
        world.storage.order(Call::SetLimit, Fault::Before);
    }
    drop(turn);
    world.pass(Duration::from_secs(120)).await;
    assert_eq!(world.storage.pending(), []);
    assert_eq!(world.limit().await, world.plan);
    // And nobody asks for its usage for ever.
    let before = world.seen(Call::Usage);
    world.pass(Duration::from_secs(120)).await;
    assert_eq!(world.seen(Call::Usage), before);
}

#[tokio::test(start_paused = true)]
async fn what_a_restore_brought_to_a_stopped_project_goes_with_its_room_when_nobody_wants_it() {
    let world = World::new().await;
    let (name, room) = world.raise(1000).await;
    world.files.snapshot(world.project, &name).await.unwrap();
    room.keep();
    world.pass(DAY).await;
    assert_eq!(world.limit().await, world.plan.map(|plan| plan + 1000));
    assert!(world.has(&name).await);
    world.pass(2 * DAY).await;
    assert_eq!(world.limit().await, world.plan);
    assert!(!world.has(&name).await);
}
