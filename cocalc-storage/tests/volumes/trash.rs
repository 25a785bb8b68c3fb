//! Deleting: at once for who asks, little by little for the disk.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use cocalc_core::{
    ids::ProjectId,
    storage::{Storage, VolumeOptions},
};
use cocalc_storage::Btrfs;

use crate::stores::{self, name, nested};

/// Long, because the kernel frees when it sees fit.
const LIMIT: Duration = Duration::from_secs(120);

async fn with_snapshots(store: &Btrfs, limit: Option<u64>, snapshots: u8) -> (ProjectId, PathBuf) {
    let project = ProjectId::random();
    let options = VolumeOptions { limit_bytes: limit };
    let live = store.create(project, &options).await.unwrap().path.unwrap();
    for number in 0..snapshots {
        fs::write(live.join("home/f"), vec![number; 1 << 20]).unwrap();
        store.snapshot(project, &name(&format!("s{number}"))).await.unwrap();
    }
    (project, live)
}

async fn is_gone(store: &Btrfs, project: ProjectId) {
    assert!(store.volume(project).await.is_err());
    assert!(store.snapshots(project).await.unwrap().is_empty());
    assert!(store.list().await.unwrap().iter().all(|volume| volume.project != project));
    assert!(!store.path().join("projects").join(project.to_string()).exists());
    assert!(!store.path().join("snapshots").join(project.to_string()).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_deleted_is_gone_at_once_and_its_space_comes_back() {
    let one = stores::one().await;
    let store = &one.store;
    let free = store.free_bytes().unwrap();
    let (project, live) = with_snapshots(store, None, 20).await;
    let (kept, _) = with_snapshots(store, None, 2).await;
    for inner in ["home/one", "home/one/two", "home/three"] {
        nested(&live.join(inner));
    }
    fs::write(live.join("home/one/two/f"), vec![9; 1 << 20]).unwrap();

    store.delete(project).await.unwrap();
    is_gone(store, project).await;
    store.delete(project).await.expect("it can be repeated");
    // It can be made again, with nothing of what it had, while that goes.
    let again = store.create(project, &VolumeOptions { limit_bytes: Some(50 << 20) }).await.unwrap();
    assert!(store.usage(project).await.unwrap().charged_bytes < 1 << 20);
    fs::write(again.path.unwrap().join("home/new"), vec![1; 1 << 20]).unwrap();
    assert!(store.wait_trash_empty(LIMIT).await.unwrap());
    assert_eq!(store.volume(project).await.unwrap().uuid, again.uuid);
    assert_eq!(store.snapshots(kept).await.unwrap().len(), 2);
    store.delete(project).await.unwrap();
    store.delete(kept).await.unwrap();
    assert!(store.wait_trash_empty(LIMIT).await.unwrap());
    let lost = free.saturating_sub(store.free_bytes().unwrap());
    assert!(lost < 16 << 20, "{lost} bytes have not come back");
    assert_eq!(store.trash().await.unwrap().volumes, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_trash_is_seen_and_is_emptied_when_the_store_opens_again() {
    let one = stores::one().await;
    let mut projects = Vec::new();
    for _ in 0..4 {
        projects.push(with_snapshots(&one.store, None, 12).await.0);
    }
    for project in &projects {
        one.store.delete(*project).await.unwrap();
    }
    let trash = one.store.trash().await.unwrap();
    assert!(trash.volumes > 0 && trash.groups > 0, "{trash:?}");
    assert!(trash.bytes.unwrap() > 1 << 20, "{trash:?}");
    assert!(!one.store.wait_trash_empty(Duration::ZERO).await.unwrap(), "48 snapshots take a while");
    // As a restart would, in the middle.
    let path = one.store.path().to_owned();
    drop(one.store);
    assert!(fs::read_dir(path.join("trash")).unwrap().count() > 0);
    let store = Btrfs::open(&path).await.unwrap();
    for project in &projects {
        is_gone(&store, *project).await;
    }
    assert!(store.wait_trash_empty(LIMIT).await.unwrap());
    no_group_is_left(&store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_project_whose_quota_is_full_can_be_deleted() {
    let one = stores::one().await;
    let store = &one.store;
    let (project, live) = with_snapshots(store, Some(8 << 20), 3).await;
    nested(&live.join("home/nested"));
    nested(&live.join("home/nested/inner"));
    let full = (0..64).find_map(|number| {
        fs::write(live.join(format!("home/nested/inner/{number}")), vec![7; 1 << 20]).err()
    });
    assert_eq!(full.expect("the limit holds").kind(), std::io::ErrorKind::QuotaExceeded);
    store.delete(project).await.unwrap();
    is_gone(store, project).await;
    assert!(store.wait_trash_empty(LIMIT).await.unwrap(), "{:?}", store.trash().await);
    no_group_is_left(store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_file_in_what_is_deleted_holds_up_nothing_else() {
    let one = stores::one().await;
    let store = &one.store;
    let (held, live) = with_snapshots(store, None, 1).await;
    let (other, _) = with_snapshots(store, None, 3).await;
    let open = fs::File::open(live.join("home/f")).unwrap();
    store.delete(held).await.unwrap();
    // The kernel has begun with it, and cannot go on.
    assert!(!store.wait_trash_empty(Duration::from_millis(300)).await.unwrap());
    store.delete(other).await.unwrap();
    let deadline = std::time::Instant::now() + LIMIT;
    while store.trash().await.unwrap().volumes > 1 {
        assert!(std::time::Instant::now() < deadline, "{:?}", store.trash().await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    drop(open);
    assert!(store.wait_trash_empty(LIMIT).await.unwrap());
    no_group_is_left(store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_snapshot_keeps_its_project() {
    let one = stores::one().await;
    let store = &one.store;
    let (project, _) = with_snapshots(store, None, 1).await;
    // Whoever wins, a held snapshot is there.
    for _ in 0..20 {
        let s0 = name("s0");
        let (held, deleted) = tokio::join!(store.hold(project, &s0), store.delete(project));
        match held {
            Ok(hold) => {
                assert!(deleted.is_err());
                assert!(store.delete_snapshot(project, &name("s0")).await.is_err());
                assert_eq!(store.snapshots(project).await.unwrap().len(), 1);
                drop(hold);
            }
            Err(_) => {
                deleted.unwrap();
                store.create(project, &VolumeOptions::default()).await.unwrap();
                store.snapshot(project, &name("s0")).await.unwrap();
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_of_what_is_gone_are_removed() {
    let one = stores::one().await;
    let store = &one.store;
    let (project, _) = with_snapshots(store, None, 1).await;
    for turn in 0..3 {
        // The former volume's bytes are in a snapshot, and charged to it.
        let former = name(&format!("former{turn}"));
        let live = store.restore(project, &name("s0"), &former).await.unwrap().path.unwrap();
        fs::write(live.join("home/f"), vec![turn; 1 << 20]).unwrap();
    }
    for turn in 0..3 {
        store.delete_snapshot(project, &name(&format!("former{turn}"))).await.unwrap();
    }
    let members = |store: &Btrfs| groups(store).len();
    let deadline = std::time::Instant::now() + LIMIT;
    // The project's, that of the snapshots' place, of the one snapshot, of the
    // volume that wrote what is in it, and of the live volume.
    while members(store) > 5 {
        assert!(std::time::Instant::now() < deadline, "left: {:?}", groups(store));
        store.remove_stale_groups().await.unwrap();
        // Commits, so that the kernel goes on.
        store.set_limit(project, None).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// The quota groups of the file system, but not that of its own top.
fn groups(store: &Btrfs) -> Vec<String> {
    let fsid = std::process::Command::new("findmnt")
        .args(["--noheadings", "--output", "UUID", "--target"])
        .arg(store.path())
        .output()
        .unwrap();
    let fsid = String::from_utf8(fsid.stdout).unwrap();
    let groups = Path::new("/sys/fs/btrfs").join(fsid.trim()).join("qgroups");
    let names = fs::read_dir(groups).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.contains('_') && name != "0_5" && name.as_bytes()[0].is_ascii_digit()).collect()
}

async fn no_group_is_left(store: &Btrfs) {
    let deadline = std::time::Instant::now() + LIMIT;
    while store.trash().await.unwrap().groups > 0 {
        assert!(std::time::Instant::now() < deadline, "left: {:?}", store.trash().await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(groups(store), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_while_deleting_is_made_up_for() {
    const STORE: &str = "COCALC_TEST_STORE";
    const POINTS: [&str; 8] = [
        "intent.written",
        "delete.live",
        "delete.group",
        "delete.snapshots",
        "intent.done",
        "intent.committed",
        "reaper.destroyed",
        "reaper.committed",
    ];
    let project = ProjectId::from_bytes([7; 16]);
    if let Some(path) = std::env::var_os(STORE) {
        // The process that is killed.
        let store = Btrfs::open(PathBuf::from(path)).await.unwrap();
        store.delete(project).await.unwrap();
        store.wait_trash_empty(LIMIT).await.unwrap();
        return;
    }
    let one = stores::one().await;
    let path = one.store.path().to_owned();
    let (kept, live) = with_snapshots(&one.store, None, 1).await;
    let mut store = one.store;
    for point in POINTS {
        let doomed = store.create(project, &VolumeOptions::default()).await.unwrap().path.unwrap();
        fs::write(doomed.join("home/f"), vec![1; 1 << 20]).unwrap();
        store.snapshot(project, &name("s")).await.unwrap();
        drop(store);
        let killed = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "trash::a_kill_while_deleting_is_made_up_for"])
            .env(STORE, &path)
            .env(cocalc_storage::fail::VARIABLE, point)
            .output()
            .unwrap();
        let signal = std::os::unix::process::ExitStatusExt::signal(&killed.status);
        assert_eq!(signal, Some(9), "{point}: {killed:?}");
        store = Btrfs::open(&path).await.unwrap();
        is_gone(&store, project).await;
        assert!(store.wait_trash_empty(LIMIT).await.unwrap(), "{point}");
        assert_eq!(fs::read_dir(path.join("staging")).unwrap().count(), 0, "{point}");
        assert_eq!(store.snapshots(kept).await.unwrap().len(), 1, "{point}");
        assert_eq!(fs::read(live.join("home/f")).unwrap(), vec![0; 1 << 20], "{point}");
    }
    store.delete(kept).await.unwrap();
    assert!(store.wait_trash_empty(LIMIT).await.unwrap());
    no_group_is_left(&store).await;
}
