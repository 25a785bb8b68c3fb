//! The keeper over memory backends and a clock that tests set.

use std::collections::BTreeMap;

use cocalc_ids::{Epoch, MoveId};

use super::*;
use crate::{
    grant::MemoryLedgerStore,
    memory::{clock::ManualClock, runner::MemoryRunner, storage::MemoryStorage},
    runner::ProjectSpec,
    snapshots::{PolicyFields, auto_time},
    storage::VolumeOptions,
};

const INTERVAL: Duration = Duration::from_secs(900);

struct World {
    storage: MemoryStorage,
    runner: MemoryRunner,
    clock: ManualClock,
    ledger: Ledger,
    keeper: Keeper,
}

impl World {
    async fn new() -> Self {
        Self::at(Timestamp::from_secs(1_795_737_088)).await
    }

    async fn at(now: Timestamp) -> Self {
        let clock = ManualClock::new(now);
        let runner = MemoryRunner::new(Arc::new(clock.clone()));
        let storage = MemoryStorage::new();
        let host = cocalc_ids::HostId::random();
        let ledger = Ledger::open(host, Arc::new(MemoryLedgerStore::default())).await.unwrap();
        let keeper = Self::keeper(&ledger, &storage, &runner, &clock);
        Self { storage, runner, clock, ledger, keeper }
    }

    fn keeper(
        ledger: &Ledger,
        storage: &MemoryStorage,
        runner: &MemoryRunner,
        clock: &ManualClock,
    ) -> Keeper {
        Keeper::new(
            ledger.clone(),
            Arc::new(storage.clone()),
            Arc::new(runner.clone()),
            Arc::new(clock.clone()),
            KeeperSettings::default(),
        )
    }

    /// Another process, with nothing in memory.
    fn restart(&mut self) {
        self.keeper = Self::keeper(&self.ledger, &self.storage, &self.runner, &self.clock);
    }

    async fn project(&self, config: ProjectConfig) -> ProjectId {
        let project = ProjectId::random();
        let limit_bytes = self.keeper.limit_bytes(&config);
        self.ledger.create(project, Epoch::FIRST, config).await.unwrap();
        self.storage.create(project, &VolumeOptions { limit_bytes }).await.unwrap();
        project
    }

    async fn start(&self, project: ProjectId) {
        let spec = ProjectSpec {
            project,
            epoch: Epoch::FIRST,
            volume: Default::default(),
            image: None,
            slot: 0,
            limits: Default::default(),
            env: BTreeMap::new(),
            isolation: Default::default(),
        };
        self.runner.start(&spec).await.unwrap();
    }

    async fn running(&self, config: ProjectConfig) -> ProjectId {
        let project = self.project(config).await;
        self.start(project).await;
        project
    }

    /// Lets time pass, with rounds all the while.
    async fn pass(&self, time: Duration) {
        let step = Duration::from_secs(10);
        for _ in 0..time.as_secs() / step.as_secs() {
            self.clock.advance(step);
            self.keeper.round().await;
        }
    }

    async fn names(&self, project: ProjectId) -> Vec<SnapshotName> {
        names(self.storage.snapshots(project).await.unwrap())
    }
}

#[tokio::test]
async fn what_changes_is_snapshotted_once_in_each_interval_and_what_does_not_is_not() {
    let world = World::new().await;
    let (busy, idle) =
        (world.running(ProjectConfig::default()).await, world.running(ProjectConfig::default()).await);
    for n in 0..8 {
        world.storage.write(busy, "log", format!("line {n}")).unwrap();
        world.pass(INTERVAL).await;
    }
    // Four intervals, and the hours before.
    let kept = world.names(busy).await;
    assert!((4..=8).contains(&kept.len()), "{kept:?}");
    assert!(kept.iter().all(|name| auto_time(name).is_some()));
    assert_eq!(world.names(idle).await.len(), 1, "nothing has changed since");
    let numbers = world.keeper.numbers();
    assert_eq!((numbers.taken, numbers.failed), (9, 0));
    assert_eq!(numbers.deleted as usize, 8 - kept.len());
    // What was last written is in the last one.
    let last = kept.iter().max().unwrap();
    assert_eq!(world.storage.snapshot_files(busy, last).unwrap()["log"], "line 7");
}

#[tokio::test]
async fn a_stopped_project_gets_its_last_snapshot_even_after_a_crash() {
    let mut world = World::new().await;
    let project = world.running(ProjectConfig::default()).await;
    world.pass(INTERVAL).await;
    world.storage.write(project, "late", "work").unwrap();
    world.runner.stop(project, Duration::ZERO).await.unwrap();
    // The host dies before anybody takes it.
    world.restart();
    world.pass(INTERVAL * 2).await;
    let names = world.names(project).await;
    let newest = names.iter().max().unwrap();
    assert_eq!(world.storage.snapshot_files(project, newest).unwrap()["late"], "work");
    assert!(world.keeper.state().schedule.is_empty(), "and then it is left alone");
}

#[tokio::test]
async fn a_stop_is_complete_with_its_snapshot() {
    let world = World::new().await;
    let project = world.running(ProjectConfig::default()).await;
    let entry = world.ledger.entry(project).unwrap();
    // Twice within a second: each has a name of its own.
    for content in ["one", "two", "two"] {
        world.storage.write(project, "file", content).unwrap();
        world.keeper.stopped(&entry).await;
        let names = world.names(project).await;
        let newest = names.iter().max().unwrap();
        assert_eq!(world.storage.snapshot_files(project, newest).unwrap()["file"], content);
    }
    assert!(world.keeper.numbers().taken == 2, "the third had nothing new");
}

#[tokio::test]
async fn what_a_move_has_frozen_or_taken_away_is_not_touched() {
    let world = World::new().await;
    let project = world.running(ProjectConfig::default()).await;
    world.keeper.round().await;
    let id = MoveId::random();
    world.ledger.change(project, move |entry| entry.freeze(id, Epoch::FIRST, true)).await.unwrap();
    world.storage.write(project, "file", "content").unwrap();
    world.pass(INTERVAL * 3).await;
    assert_eq!(world.names(project).await, []);
}

#[tokio::test]
async fn nothing_happens_out_of_turn() {
    let world = World::new().await;
    let project = world.running(ProjectConfig::default()).await;
    world.storage.write(project, "file", "content").unwrap();
    let turn = world.ledger.turn(project).await;
    world.keeper.look().await;
    assert_eq!(world.keeper.visit(project).await, Outcome::Failed);
    assert_eq!(world.names(project).await, []);
    drop(turn);
    assert_eq!(world.keeper.visit(project).await, Outcome::Done);
    assert_eq!(world.names(project).await.len(), 1);
}

#[tokio::test]
async fn held_snapshots_and_those_of_people_stay() {
    let world = World::new().await;
    let policy = Policy::try_from(PolicyFields {
        frequent: 1,
        hourly: 0,
        daily: 0,
        weekly: 0,
        monthly: 0,
        ..PolicyFields::default()
    });
    let config = ProjectConfig { snapshots: Some(policy.unwrap()), ..ProjectConfig::default() };
    let project = world.running(config).await;
    let own: SnapshotName = "before-the-exam".parse().unwrap();
    world.storage.snapshot(project, &own).await.unwrap();
    world.pass(INTERVAL).await;
    let first = world.names(project).await.into_iter().find(|name| *name != own).unwrap();
    let hold = world.storage.hold(project, &first).await.unwrap();
    for n in 0..4 {
        world.storage.write(project, "log", format!("line {n}")).unwrap();
        world.pass(INTERVAL).await;
    }
    let names = world.names(project).await;
    assert!(names.contains(&own) && names.contains(&first), "{names:?}");
    assert_eq!(names.len(), 3, "and the newest: {names:?}");
    drop(hold);
    world.storage.write(project, "log", "more").unwrap();
    world.pass(INTERVAL).await;
    let names = world.names(project).await;
    assert!(names.contains(&own) && !names.contains(&first) && names.len() == 2, "{names:?}");
}

#[tokio::test]
async fn snapshots_make_room_before_the_project_is_full() {
    let world = World::new().await;
    // A plan of 1000, so a limit of 1500.
    let config = ProjectConfig { quota_bytes: Some(1_000), ..ProjectConfig::default() };
    let project = world.running(config).await;
    let own: SnapshotName = "mine".parse().unwrap();
    world.storage.write(project, "mine", vec![0; 100]).unwrap();
    world.storage.snapshot(project, &own).await.unwrap();
    for n in 0..20_u8 {
        // Always within the plan; only the snapshots would fill the limit.
        world.storage.write(project, "big", vec![n; 150]).unwrap();
        world.pass(INTERVAL).await;
        let usage = world.storage.usage(project).await.unwrap();
        assert_eq!(usage.limit_bytes, Some(1_500));
        assert!(usage.charged_bytes < 1_350, "{usage:?}");
    }
    assert_eq!(world.keeper.notice(project), None);
    let names = world.names(project).await;
    assert!(names.contains(&own));
    let newest = names.iter().filter(|name| auto_time(name).is_some()).max().unwrap();
    assert_eq!(world.storage.snapshot_files(project, newest).unwrap()["big"][0], 19);
}

#[tokio::test]
async fn who_is_over_the_plan_is_told_and_the_newest_snapshot_stays() {
    let world = World::new().await;
    let config = ProjectConfig { quota_bytes: Some(1_000), ..ProjectConfig::default() };
    let project = world.running(config).await;
    world.pass(INTERVAL).await;
    world.storage.write(project, "huge", vec![1; 1_400]).unwrap();
    world.pass(INTERVAL + INTERVAL).await;
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    let notice = loop {
        if let Some(notice) = world.keeper.notice(project).filter(|notice| notice.contains("alone")) {
            break notice;
        }
        assert!(std::time::Instant::now() < deadline, "{:?}", world.keeper.notice(project));
        tokio::task::yield_now().await;
    };
    assert!(notice.contains("1.3 KiB") && notice.contains("0.9 KiB"), "{notice}");
    let names = world.names(project).await;
    assert_eq!(names.len(), 1, "{names:?}");
    assert!(world.storage.snapshot_files(project, &names[0]).unwrap().contains_key("huge"));
    world.storage.remove(project, "huge").unwrap();
    world.storage.delete_snapshot(project, &names[0]).await.unwrap();
    world.pass(Duration::from_secs(60)).await;
    assert_eq!(world.keeper.notice(project), None, "and hears when it is over");
}

#[tokio::test]
async fn a_limit_that_is_not_the_plan_s_is_mended() {
    let world = World::new().await;
    let config = ProjectConfig { quota_bytes: Some(1_000), ..ProjectConfig::default() };
    let project = world.running(config).await;
    // As a move leaves it that knows only of the plan.
    world.storage.set_limit(project, Some(1_000)).await.unwrap();
    world.pass(Duration::from_secs(30)).await;
    assert_eq!(world.storage.usage(project).await.unwrap().limit_bytes, Some(1_500));
}

#[tokio::test]
async fn a_clock_that_jumps_loses_nothing() {
    let world = World::new().await;
    let project = world.running(ProjectConfig::default()).await;
    let mut written = 0;
    for jump in [0, 400 * 86_400, -500 * 86_400, 3_600] {
        let wall = world.clock.wall();
        world.clock.jump(Timestamp::from_secs(wall.secs() + jump));
        let before = world.names(project).await;
        for _ in 0..2 {
            written += 1;
            world.storage.write(project, "n", written.to_string()).unwrap();
            world.pass(INTERVAL).await;
        }
        let after = world.names(project).await;
        assert!(after.len() > before.len(), "{before:?} {after:?}");
        let saved = after.iter().any(|name| {
            world
                .storage
                .snapshot_files(project, name)
                .unwrap()
                .get("n")
                .is_some_and(|n| *n == written.to_string())
        });
        assert!(saved, "the last state is in one of them");
    }
}

#[tokio::test]
async fn one_that_is_switched_off_is_left_alone() {
    let world = World::new().await;
    let off = Policy::try_from(PolicyFields { enabled: false, ..PolicyFields::default() }).unwrap();
    let config = ProjectConfig { snapshots: Some(off), ..ProjectConfig::default() };
    let project = world.running(config).await;
    let old = auto_name(Timestamp::from_secs(1));
    world.storage.snapshot(project, &old).await.unwrap();
    world.storage.write(project, "file", "content").unwrap();
    world.pass(INTERVAL * 2).await;
    world.keeper.stopped(&world.ledger.entry(project).unwrap()).await;
    assert_eq!(world.names(project).await, [old]);
}

const GIB: u64 = 1 << 30;

impl World {
    async fn limit(&self, project: ProjectId) -> Option<u64> {
        self.storage.usage(project).await.unwrap().limit_bytes
    }

    fn entry(&self, project: ProjectId) -> crate::grant::Entry {
        self.ledger.entry(project).unwrap()
    }
}

fn planned() -> ProjectConfig {
    ProjectConfig { quota_bytes: Some(GIB), ..ProjectConfig::default() }
}

#[tokio::test]
async fn the_room_of_a_restore_stays_as_long_as_it_goes_on() {
    let world = World::new().await;
    let project = world.running(planned()).await;
    let plan = world.limit(project).await.unwrap();
    let name = crate::backups::fetched_name(cocalc_ids::OperationId::random());
    let room = world.keeper.raise(&world.entry(project), name.clone(), 1000).await.unwrap();
    room.keep();
    world.pass(Duration::from_secs(60)).await;
    assert_eq!(world.limit(project).await, Some(plan + 1000), "nobody takes it back meanwhile");
    // Never more than the plan again.
    let other = crate::backups::fetched_name(cocalc_ids::OperationId::random());
    world.keeper.raise(&world.entry(project), other.clone(), u64::MAX).await.unwrap().keep();
    assert_eq!(world.limit(project).await, Some(2 * plan));
    world.keeper.end_room(&world.entry(project), &other).await.unwrap();
    assert_eq!(world.limit(project).await, Some(plan));
}

#[tokio::test]
async fn the_room_of_a_restore_that_failed_goes_by_itself() {
    let mut world = World::new().await;
    // It does not run, so nobody would look at it otherwise.
    let project = world.project(planned()).await;
    let plan = world.limit(project).await.unwrap();
    let name = || crate::backups::fetched_name(cocalc_ids::OperationId::random());
    drop(world.keeper.raise(&world.entry(project), name(), 1000).await.unwrap());
    world.pass(Duration::from_secs(60)).await;
    assert_eq!(world.limit(project).await, Some(plan));
    // Nor does the end of the process leave it.
    world.keeper.raise(&world.entry(project), name(), 1000).await.unwrap().keep();
    assert_eq!(world.limit(project).await, Some(plan + 1000));
    world.restart();
    world.pass(Duration::from_secs(60)).await;
    assert_eq!(world.limit(project).await, Some(plan));
}

#[tokio::test]
async fn what_a_restore_has_left_is_deleted_in_the_end() {
    // The storage goes by the machine's clock.
    let world = World::at(Timestamp::now()).await;
    let project = world.running(ProjectConfig::default()).await;
    let left = crate::backups::fetched_name(cocalc_ids::OperationId::random());
    let own: SnapshotName = "restored-by-hand".parse().unwrap();
    for name in [&left, &own] {
        world.storage.snapshot(project, name).await.unwrap();
    }
    world.pass(Duration::from_secs(3600)).await;
    assert!(world.names(project).await.contains(&left), "an operation may go on");
    world.pass(Duration::from_secs(3 * 24 * 3600)).await;
    let names = world.names(project).await;
    assert!(!names.contains(&left) && names.contains(&own), "{names:?}");
}
