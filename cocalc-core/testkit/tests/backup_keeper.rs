//! The keeper of backups over memory backends and a clock that tests set.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests report by panicking, in helpers too")]

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use cocalc_core::{
    BoxError,
    backups::{
        self, Backup, BackupKind, BackupSource, Backups, CheckOptions, Checked, Entries, Erased, Keeper,
        KeeperParts, Phase, Policy, PolicyFields, Progress, ProgressSink, PruneOptions, Pruned, Restored,
        Status, StatusStore,
    },
    control::{
        BackupsCommand, BackupsOutcome, BackupsReply, BackupsWork, CommandError, ErrorCode, ProjectConfig,
    },
    grant::{Ledger, MemoryLedgerStore},
    ids::{Epoch, HostId, MoveId, OperationId, ProjectId, Timestamp, TreePath},
    memory::{clock::ManualClock, runner::MemoryRunner, storage::MemoryStorage},
    snapshots::{self, KeeperSettings},
    storage::{Change, ChangeKind, Changes, NodeKind, Storage, VolumeOptions},
};
use cocalc_testkit::faults::FaultyStorage;
use tokio::sync::Notify;

/// Repositories in memory, which are slow or out of reach on command.
#[derive(Debug, Default)]
struct Vault {
    lists: Mutex<BTreeMap<ProjectId, Vec<Backup>>>,
    sources: Mutex<Vec<BackupSource>>,
    away: AtomicBool,
    slow: AtomicBool,
    go_on: Notify,
    running: AtomicUsize,
    most: AtomicUsize,
}

/// Counts a backup that goes on.
struct Counted<'a>(&'a Vault);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Vault {
    fn sources(&self) -> Vec<BackupSource> {
        self.sources.lock().unwrap().clone()
    }

    fn made(&self, project: ProjectId) -> Vec<Backup> {
        self.lists.lock().unwrap().get(&project).cloned().unwrap_or_default()
    }
}

#[async_trait]
impl Backups for Vault {
    async fn back_up(&self, source: &BackupSource, progress: ProgressSink<'_>) -> backups::Result<Backup> {
        let project = source.project;
        let running = self.running.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(running, Ordering::SeqCst);
        let _counted = Counted(self);
        progress(Progress { phase: Phase::Storing, bytes: 1, total_bytes: Some(2) });
        if self.slow.load(Ordering::SeqCst) {
            self.go_on.notified().await;
        }
        tokio::task::yield_now().await;
        if self.away.load(Ordering::SeqCst) {
            return Err(backups::Error::Unavailable { project, source: "no way there".into() });
        }
        self.sources.lock().unwrap().push(source.clone());
        let mut lists = self.lists.lock().unwrap();
        let list = lists.entry(project).or_default();
        let backup = Backup {
            id: format!("{project}-{}", list.len()),
            project,
            host: source.host,
            epoch: source.epoch,
            kind: source.kind,
            taken: source.taken,
            bytes: 2,
            added_bytes: 1,
            files: 1,
            files_read: 1,
        };
        list.push(backup.clone());
        Ok(backup)
    }

    async fn list(&self, project: ProjectId) -> backups::Result<Vec<Backup>> {
        Ok(self.made(project))
    }

    async fn ls(
        &self,
        _: ProjectId,
        _: &str,
        _: &TreePath,
        _: Option<&TreePath>,
        _: usize,
    ) -> backups::Result<Entries> {
        Ok(Entries::default())
    }

    async fn find(&self, _: ProjectId, _: &str, _: &str, _: usize) -> backups::Result<Entries> {
        Ok(Entries::default())
    }

    async fn diff(
        &self,
        _: ProjectId,
        backup: &str,
        now: &Path,
        _: &TreePath,
        _: Option<&TreePath>,
        _: usize,
    ) -> backups::Result<Changes> {
        let path = format!("{backup} {}", now.file_name().unwrap().to_str().unwrap()).parse().unwrap();
        let change = Change { path, kind: ChangeKind::Added, node: NodeKind::File, bytes: 1 };
        Ok(Changes { changes: vec![change], more: false })
    }

    async fn restore(
        &self,
        _: ProjectId,
        _: &str,
        _: &TreePath,
        _: &Path,
        _: ProgressSink<'_>,
    ) -> backups::Result<Restored> {
        Ok(Restored::default())
    }

    async fn forget(&self, project: ProjectId, ids: &[String]) -> backups::Result<()> {
        self.lists.lock().unwrap().entry(project).or_default().retain(|backup| !ids.contains(&backup.id));
        Ok(())
    }

    async fn prune(&self, _: ProjectId, _: &PruneOptions) -> backups::Result<Pruned> {
        Ok(Pruned::default())
    }

    async fn check(&self, _: ProjectId, _: &CheckOptions) -> backups::Result<Checked> {
        Ok(Checked::default())
    }

    async fn erase(&self, _: ProjectId) -> backups::Result<Erased> {
        Ok(Erased::default())
    }
}

#[derive(Debug, Default)]
struct Kept(Mutex<BTreeMap<ProjectId, Status>>);

#[async_trait]
impl StatusStore for Kept {
    async fn load(&self) -> Result<Vec<Status>, BoxError> {
        Ok(self.0.lock().unwrap().values().cloned().collect())
    }

    async fn save(&self, status: &Status) -> Result<(), BoxError> {
        self.0.lock().unwrap().insert(status.project, status.clone());
        Ok(())
    }

    async fn remove(&self, project: ProjectId) -> Result<(), BoxError> {
        self.0.lock().unwrap().remove(&project);
        Ok(())
    }
}

const RPO: Duration = Duration::from_secs(900);
/// How much time passes between two rounds.
const STEP: Duration = Duration::from_secs(10);
/// In which every project is looked at, whatever its phase: the first round,
/// from which the first look counts, is a step after the beginning.
const INTERVAL: Duration = Duration::from_secs(900 + 10);
const JOBS: usize = 2;

struct World {
    clock: ManualClock,
    files: MemoryStorage,
    storage: Arc<dyn Storage>,
    ledger: Ledger,
    snapshots: snapshots::Keeper,
    vault: Arc<Vault>,
    kept: Arc<Kept>,
    told: Arc<Mutex<Vec<Status>>>,
    keeper: Keeper,
}

fn soon() -> Policy {
    Policy::try_from(PolicyFields { rpo_secs: 900, ..PolicyFields::default() }).unwrap()
}

impl World {
    async fn new() -> Self {
        let clock = ManualClock::new(Timestamp::from_secs(1_795_737_088));
        let files = MemoryStorage::new();
        let storage: Arc<dyn Storage> =
            Arc::new(FaultyStorage::new(Arc::new(files.clone())).with_paths("/snapshots"));
        let ledger = Ledger::open(HostId::random(), Arc::new(MemoryLedgerStore::default())).await.unwrap();
        let snapshots = snapshots::Keeper::new(
            ledger.clone(),
            Arc::clone(&storage),
            Arc::new(MemoryRunner::new(Arc::new(clock.clone()))),
            Arc::new(clock.clone()),
            KeeperSettings::default(),
        );
        let (vault, kept, told) = (Arc::default(), Arc::default(), Arc::default());
        let keeper = Self::keeper(&clock, &storage, &ledger, &snapshots, &vault, &kept, &told).await;
        Self { clock, files, storage, ledger, snapshots, vault, kept, told, keeper }
    }

    async fn keeper(
        clock: &ManualClock,
        storage: &Arc<dyn Storage>,
        ledger: &Ledger,
        snapshots: &snapshots::Keeper,
        vault: &Arc<Vault>,
        kept: &Arc<Kept>,
        told: &Arc<Mutex<Vec<Status>>>,
    ) -> Keeper {
        let hears = Arc::clone(told);
        let read = Arc::clone(vault) as Arc<dyn Backups>;
        let parts = KeeperParts {
            ledger: ledger.clone(),
            storage: Arc::clone(storage),
            backups: Arc::clone(vault) as Arc<dyn Backups>,
            snapshots: snapshots.clone(),
            clock: Arc::new(clock.clone()),
            statuses: Arc::clone(kept) as Arc<dyn StatusStore>,
            tell: Arc::new(move |status| hears.lock().unwrap().push(status.clone())),
            reading: Arc::new(move |_, _| Arc::clone(&read)),
            free_bytes: Arc::new(|| u64::MAX),
            jobs_max: JOBS,
            trial: None,
        };
        let keeper = Keeper::open(parts).await.unwrap();
        keeper.set_policy(Some(soon()));
        keeper
    }

    /// Another process, with nothing in memory.
    async fn restart(&mut self) {
        let Self { clock, storage, ledger, snapshots, vault, kept, told, .. } = self;
        self.keeper = Self::keeper(clock, storage, ledger, snapshots, vault, kept, told).await;
    }

    async fn project_with(&self, config: ProjectConfig) -> ProjectId {
        let project = ProjectId::random();
        self.ledger.create(project, Epoch::FIRST, config).await.unwrap();
        self.storage.create(project, &VolumeOptions::default()).await.unwrap();
        project
    }

    async fn project(&self) -> ProjectId {
        self.project_with(ProjectConfig::default()).await
    }

    /// Lets time pass, with rounds all the while.
    async fn pass(&self, time: Duration) {
        for _ in 0..time.as_secs().div_ceil(STEP.as_secs()) {
            self.clock.advance(STEP);
            self.keeper.round_to_end().await;
        }
    }

    fn status(&self, project: ProjectId) -> Status {
        self.keeper.status(project).unwrap()
    }

    async fn ask(&self, operation: OperationId, project: ProjectId) -> Result<BackupsReply, CommandError> {
        let work = BackupsWork::BackUp;
        let command = BackupsCommand::Work { operation, work, wait_ms: 50 };
        self.keeper.execute(project, Epoch::FIRST, command).await
    }

    /// Waits until so many backups go on.
    async fn running(&self, count: usize) {
        for _ in 0..12_000 {
            if self.vault.running.load(Ordering::SeqCst) == count {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("{} backups go on, not {count}", self.vault.running.load(Ordering::SeqCst));
    }
}

#[tokio::test]
async fn what_changes_is_backed_up_in_time_and_what_does_not_is_not() {
    let world = World::new().await;
    let (busy, idle) = (world.project().await, world.project().await);
    world.pass(INTERVAL).await;
    assert_eq!((world.vault.made(busy).len(), world.vault.made(idle).len()), (1, 1), "the first of each");
    for n in 0..5 {
        world.files.write(busy, "log", format!("line {n}")).unwrap();
        let (changed, before) = (world.clock_now(), world.vault.made(busy).len());
        while world.vault.made(busy).len() == before {
            world.pass(STEP).await;
        }
        let waited = world.clock_now().since(changed);
        assert!(waited <= RPO + STEP, "{waited:?}");
    }
    assert_eq!(world.vault.made(idle).len(), 1, "nothing has changed since");
    let status = world.status(busy);
    assert_eq!((status.pending_since, status.failure.clone()), (None, None));
    assert_eq!(status.last.unwrap().backup, world.vault.made(busy)[5]);
    // Each goes on from the one before, on this host and in this epoch.
    let sources: Vec<_> = world.vault.sources().into_iter().filter(|source| source.project == busy).collect();
    assert_eq!((sources[0].parent.clone(), sources[0].moved), (None, false));
    for (source, before) in sources[1..].iter().zip(world.vault.made(busy)) {
        assert_eq!((source.parent.as_ref(), source.moved), (Some(&before.id), false));
        assert_eq!((source.kind, source.host), (BackupKind::Scheduled, world.ledger.host()));
    }
}

impl World {
    fn clock_now(&self) -> Timestamp {
        use cocalc_core::clock::Clock as _;
        self.clock.wall()
    }
}

#[tokio::test]
async fn a_repository_out_of_reach_is_told_tried_again_and_caught_up_with() {
    let mut world = World::new().await;
    let project = world.project().await;
    world.vault.away.store(true, Ordering::SeqCst);
    world.pass(RPO * 3).await;
    let status = world.status(project);
    let failure = status.failure.clone().unwrap();
    assert!(status.pending_since.is_some());
    assert_eq!(failure.code, ErrorCode::RepositoryUnavailable);
    assert!(failure.message.contains("no way there") && failure.times >= 4, "{failure:?}");
    assert!(world.keeper.notice(project).unwrap().contains("no way there"));
    let numbers = world.keeper.numbers();
    assert_eq!((numbers.pending, numbers.failing, numbers.made), (1, 1, 0));
    assert!(numbers.oldest >= RPO, "{numbers:?}");
    // The next process knows it, too, and catches up when it can.
    world.restart().await;
    assert!(world.keeper.notice(project).is_some());
    world.vault.away.store(false, Ordering::SeqCst);
    world.pass(INTERVAL).await;
    let status = world.status(project);
    assert_eq!((status.pending_since, status.failure), (None, None));
    assert_eq!(
        world.told.lock().unwrap().last().unwrap().last.as_ref().unwrap().backup,
        world.vault.made(project)[0]
    );
    assert_eq!(world.keeper.notice(project), None);
}

#[tokio::test]
async fn a_stop_is_backed_up_at_once_and_is_pending_until_then_also_for_the_next_process() {
    let mut world = World::new().await;
    let config = ProjectConfig { backups: Some(Policy::default()), ..ProjectConfig::default() };
    let project = world.project_with(config).await;
    world.pass(Duration::from_secs(86_400) + STEP).await;
    assert_eq!(world.vault.made(project).len(), 1);
    let entry = world.ledger.entry(project).unwrap();
    world.keeper.stopped(&entry).await;
    assert_eq!(world.status(project).pending_since, None, "nothing has changed");
    world.files.write(project, "notes", "new").unwrap();
    world.keeper.stopped(&entry).await;
    let since = world.status(project).pending_since;
    assert_eq!(since, Some(world.clock_now()));
    assert_eq!(world.told.lock().unwrap().last().unwrap().pending_since, since);
    world.restart().await;
    assert_eq!(world.status(project).pending_since, since);
    world.pass(Duration::from_secs(20)).await;
    assert_eq!(world.vault.made(project).len(), 2, "not a day later");
    assert_eq!(world.status(project).pending_since, None);
    world.files.write(project, "notes", "newer").unwrap();
    world.keeper.stopped(&entry).await;
    world.pass(STEP).await;
    assert_eq!(world.vault.sources().last().unwrap().kind, BackupKind::Stop);
}

#[tokio::test]
async fn a_project_that_leaves_takes_its_backup_off_and_goes_on_elsewhere_from_the_newest() {
    let world = World::new().await;
    let project = world.project().await;
    world.pass(INTERVAL).await;
    world.vault.slow.store(true, Ordering::SeqCst);
    world.files.write(project, "notes", "new").unwrap();
    let keeper = world.keeper.clone();
    let rounds = tokio::spawn(keeper.run());
    world.clock.advance(RPO * 2);
    world.running(1).await;
    let held = world.storage.snapshots(project).await.unwrap().pop().unwrap().name;
    assert!(world.storage.delete_snapshot(project, &held).await.is_err(), "it is read");
    // A move freezes it: nobody waits for the backup, which ends.
    let mut entry = world.ledger.entry(project).unwrap();
    entry.freeze(MoveId::random(), Epoch::FIRST, true).unwrap();
    let second = Epoch::FIRST.next();
    world.ledger.observe(project, HostId::random(), second, None).await.unwrap();
    world.running(0).await;
    rounds.abort();
    assert_eq!(world.vault.made(project).len(), 1);
    for _ in 0..12_000 {
        if world.storage.delete_snapshot(project, &held).await.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    world.storage.delete_snapshot(project, &held).await.unwrap();
    assert_eq!(world.keeper.numbers().cancelled, 1);

    // There, nothing is known but the repository.
    let there = World::new().await;
    there.vault.lists.lock().unwrap().insert(project, world.vault.made(project));
    there.ledger.create(project, second, ProjectConfig::default()).await.unwrap();
    there.storage.create(project, &VolumeOptions::default()).await.unwrap();
    there.pass(INTERVAL).await;
    let source = there.vault.sources().pop().unwrap();
    assert_eq!((source.parent.as_deref(), source.moved), (Some(&*world.vault.made(project)[0].id), true));
    assert_eq!((source.epoch, source.host), (second, there.ledger.host()));
    // And the next one is as usual, until all files are written anew.
    there.files.write(project, "notes", "newer").unwrap();
    there.pass(INTERVAL).await;
    assert!(!there.vault.sources().pop().unwrap().moved);
    there.keeper.rewritten(project).await;
    there.files.write(project, "notes", "newest").unwrap();
    there.pass(INTERVAL).await;
    assert!(there.vault.sources().pop().unwrap().moved);
}

#[tokio::test]
async fn few_at_once_and_nobody_is_passed_over() {
    let world = World::new().await;
    let mut projects = BTreeSet::new();
    // So many that more than two are due in the same round, whatever their ids.
    for _ in 0..200 {
        projects.insert(world.project().await);
    }
    for _ in 0..4 {
        for project in &projects {
            world.files.write(*project, "log", format!("{:?}", world.clock_now())).unwrap();
        }
        world.pass(INTERVAL).await;
    }
    assert_eq!(world.vault.most.load(Ordering::SeqCst), JOBS);
    for project in projects {
        assert!(world.vault.made(project).len() >= 3, "{}", world.vault.made(project).len());
    }
}

#[tokio::test]
async fn who_asks_gets_one_backup_for_one_operation_sees_it_go_on_and_can_end_it() {
    let world = World::new().await;
    let project = world.project().await;
    world.vault.slow.store(true, Ordering::SeqCst);
    let operation = OperationId::random();
    let mut reply = world.ask(operation, project).await.unwrap();
    for _ in 0..1_000 {
        if matches!(reply, BackupsReply::Working { progress: Some(_), .. }) {
            break;
        }
        reply = world.ask(operation, project).await.unwrap();
    }
    assert!(
        matches!(reply, BackupsReply::Working { progress: Some(Progress { bytes: 1, .. }), .. }),
        "{reply:?}"
    );
    world.running(1).await;
    // Nothing of the project waits for it.
    let turn = tokio::time::timeout(Duration::from_secs(60), world.ledger.turn(project)).await.unwrap();
    drop(turn);
    world.vault.go_on.notify_one();
    let done = loop {
        match world.ask(operation, project).await.unwrap() {
            BackupsReply::Working { .. } => {}
            done => break done,
        }
    };
    let BackupsReply::Done { outcome: BackupsOutcome::BackedUp { backup }, .. } = done else {
        panic!("{done:?}")
    };
    assert_eq!(
        (world.vault.made(project).as_slice(), backup.kind),
        (&[backup.clone()][..], BackupKind::Manual)
    );
    // The same operation again is not another backup; another one is, though
    // nothing has changed.
    assert!(matches!(world.ask(operation, project).await.unwrap(), BackupsReply::Done { .. }));
    assert_eq!(world.vault.made(project).len(), 1);
    let another = OperationId::random();
    world.ask(another, project).await.unwrap();
    world.running(1).await;
    let cancel = BackupsCommand::Cancel { operation: another };
    world.keeper.execute(project, Epoch::FIRST, cancel).await.unwrap();
    assert_eq!(world.ask(another, project).await.unwrap_err().code, ErrorCode::Cancelled);
    world.running(0).await;
    assert_eq!(world.vault.made(project).len(), 1);
    // Of a project that is another host's, nothing.
    let stale = Epoch::FIRST.next();
    let work =
        BackupsCommand::Work { operation: OperationId::random(), work: BackupsWork::BackUp, wait_ms: 1_000 };
    assert_eq!(world.keeper.execute(project, stale, work).await.unwrap_err().code, ErrorCode::StaleEpoch);
    // A project that is deleted waits for no backup.
    world.ask(OperationId::random(), project).await.unwrap();
    world.running(1).await;
    world.ledger.delete(project, Epoch::FIRST).await.unwrap();
    tokio::time::timeout(Duration::from_secs(60), world.keeper.leave(project)).await.unwrap();
    world.storage.delete(project).await.unwrap();
    world.keeper.forget(project).await;
    assert!(world.kept.0.lock().unwrap().is_empty());
}

#[tokio::test]
async fn what_was_deleted_from_the_repository_is_backed_up_again() {
    let world = World::new().await;
    let project = world.project().await;
    world.pass(INTERVAL).await;
    world.files.write(project, "notes", "new").unwrap();
    world.pass(INTERVAL).await;
    let made = world.vault.made(project);
    assert_eq!(made.len(), 2);
    let gone =
        |backups: Vec<String>| world.keeper.execute(project, Epoch::FIRST, BackupsCommand::Gone { backups });
    gone(vec![made[0].id.clone()]).await.unwrap();
    world.pass(INTERVAL).await;
    assert_eq!(world.vault.made(project).len(), 2, "the newest is there");
    for ids in [vec![made[1].id.clone()], Vec::new()] {
        let before = world.vault.made(project).len();
        gone(ids).await.unwrap();
        assert!(world.status(project).pending_since.is_some());
        world.pass(Duration::from_secs(20)).await;
        assert_eq!(world.vault.made(project).len(), before + 1);
    }
}

#[tokio::test]
async fn without_automatic_snapshots_one_is_left_and_policies_are_obeyed() {
    let world = World::new().await;
    let off = snapshots::PolicyFields { enabled: false, ..Default::default() };
    let config = ProjectConfig {
        snapshots: Some(snapshots::Policy::try_from(off).unwrap()),
        backups: Some(
            Policy::try_from(PolicyFields {
                rpo_secs: 900,
                excludes: vec!["*.tmp".into()],
                ..PolicyFields::default()
            })
            .unwrap(),
        ),
        ..ProjectConfig::default()
    };
    let project = world.project_with(config.clone()).await;
    for n in 0..4 {
        world.files.write(project, "log", format!("{n}")).unwrap();
        world.pass(INTERVAL).await;
        assert_eq!(world.storage.snapshots(project).await.unwrap().len(), 1, "of the last backup");
    }
    assert_eq!(world.vault.made(project).len(), 4);
    assert_eq!(world.vault.sources().pop().unwrap().excludes, ["*.tmp"]);
    let none = PolicyFields { enabled: false, ..PolicyFields::default() };
    let config = ProjectConfig { backups: Some(Policy::try_from(none).unwrap()), ..config };
    world.ledger.configure(project, Epoch::FIRST, config).await.unwrap();
    world.files.write(project, "log", "more").unwrap();
    world.pass(RPO * 3).await;
    assert_eq!(world.vault.made(project).len(), 4);
    // And none at all where the federation has none.
    let other = world.project().await;
    world.keeper.set_policy(None);
    world.pass(RPO * 2).await;
    assert!(world.vault.made(other).is_empty());
    let refused = world.ask(OperationId::random(), other).await;
    assert_eq!(refused.unwrap_err().code, ErrorCode::Invalid);
}
