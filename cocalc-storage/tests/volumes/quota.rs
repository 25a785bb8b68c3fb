//! Classic quota groups, for those who ask for them.

use std::fs;

use cocalc_core::{
    ids::ProjectId,
    storage::{CloneOptions, Storage, UsageSource, VolumeOptions},
};
use cocalc_storage::{Btrfs, QuotaKind, probe};

use crate::stores::{self, name};

const LIMIT: u64 = 10 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn classic_groups_are_used_only_where_asked_for() {
    let root = tempfile::tempdir().unwrap();
    let volume = stores::volume(root.path(), "v", 1 << 30);
    let enabled = std::process::Command::new("btrfs").args(["quota", "enable"]).arg(volume.path()).status();
    assert!(enabled.unwrap().success());
    assert_eq!(probe(volume.path()).unwrap().quotas, QuotaKind::Classic);
    Btrfs::initialize(volume.path()).unwrap();

    let store = Btrfs::open(volume.path()).await.unwrap();
    assert!(!store.capabilities().quotas && !store.capabilities().constant_usage);
    let weaknesses = store.capabilities().weaknesses;
    assert!(weaknesses.iter().any(|weakness| weakness.contains("btrfs quota disable")), "{weaknesses:?}");
    // It says so, and counts by walking.
    let project = ProjectId::random();
    let live =
        store.create(project, &VolumeOptions { limit_bytes: Some(LIMIT) }).await.unwrap().path.unwrap();
    fs::write(live.join("home/f"), vec![1; 1 << 20]).unwrap();
    fs::hard_link(live.join("home/f"), live.join("home/linked")).unwrap();
    // Not kept open: that would keep the volume from being freed.
    fs::File::open(live.join("home/f")).unwrap().sync_all().unwrap();
    let usage = store.usage(project).await.unwrap();
    assert_eq!((usage.source, usage.limit_bytes), (UsageSource::Walk, None));
    assert_eq!(usage.charged_bytes, 1 << 20, "a file with two names counts once");
    assert!(store.set_limit(project, Some(LIMIT)).await.is_err());
    store.delete(project).await.unwrap();
    assert!(store.wait_trash_empty(std::time::Duration::from_secs(60)).await.unwrap());
    assert_eq!(store.trash().await.unwrap().bytes, None);
    drop(store);

    let store = Btrfs::builder(volume.path()).classic_quotas(true).open().await.unwrap();
    assert!(store.capabilities().quotas);
    let weaknesses = store.capabilities().weaknesses;
    assert!(weaknesses.iter().any(|weakness| weakness.contains("classic")), "{weaknesses:?}");
    let live =
        store.create(project, &VolumeOptions { limit_bytes: Some(LIMIT) }).await.unwrap().path.unwrap();
    let mut written = 0;
    while fs::write(live.join(format!("home/{written}")), vec![written; 1 << 20]).is_ok() {
        written += 1;
        assert!(written < 40, "the limit does not hold");
    }
    assert!(written >= 8, "only {written} MiB could be written");
    store.snapshot(project, &name("s")).await.unwrap();
    store.restore(project, &name("s"), &name("former")).await.unwrap();
    let usage = store.usage(project).await.unwrap();
    assert_eq!((usage.source, usage.limit_bytes), (UsageSource::Quota, Some(LIMIT)));
    assert!(usage.charged_bytes >= u64::from(written) << 20, "{usage:?}");
    store.delete(project).await.expect("at a full quota");
    assert!(store.wait_trash_empty(std::time::Duration::from_secs(60)).await.unwrap());
    assert!(store.list().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_of_the_same_owner_is_charged_for_what_it_writes() {
    let one = stores::one().await;
    let store = &one.store;
    let (source, clone) = (ProjectId::random(), ProjectId::random());
    let live = store.create(source, &VolumeOptions::default()).await.unwrap().path.unwrap();
    fs::write(live.join("home/f"), vec![1; 8 << 20]).unwrap();
    store.snapshot(source, &name("s")).await.unwrap();
    let before = store.usage(source).await.unwrap();
    let options = CloneOptions { volume: VolumeOptions { limit_bytes: Some(LIMIT) }, same_owner: true };
    let live = store.clone_volume(source, &name("s"), clone, &options).await.unwrap().path.unwrap();
    let usage = store.usage(clone).await.unwrap();
    assert!(usage.charged_bytes < 1 << 20, "nothing is written yet: {usage:?}");
    assert_eq!(usage.limit_bytes, Some(LIMIT));
    assert_eq!(store.usage(source).await.unwrap(), before);

    let mut written = 0;
    while fs::write(live.join(format!("home/{written}")), vec![written; 1 << 20]).is_ok() {
        written += 1;
        assert!(written < 40, "the limit does not hold");
    }
    assert!(written >= 8, "only {written} MiB could be written");
    assert_eq!(store.usage(source).await.unwrap(), before, "each pays for its own");

    // The source goes; what the clone has of it does not.
    store.delete(source).await.unwrap();
    assert!(store.wait_trash_empty(std::time::Duration::from_secs(120)).await.unwrap());
    assert_eq!(fs::read(live.join("home/f")).unwrap(), vec![1; 8 << 20]);
    let trash = store.trash().await.unwrap();
    assert!(trash.bytes.unwrap() >= 8 << 20, "charged to nobody who lives: {trash:?}");
    store.delete(clone).await.unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(120);
    while store.trash().await.unwrap().groups > 0 {
        assert!(std::time::Instant::now() < deadline, "{:?}", store.trash().await);
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}
