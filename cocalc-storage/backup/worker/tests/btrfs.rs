//! Backups of Btrfs snapshots of a project that is being written to, and their
//! restore onto Btrfs. Needs root, loop devices and btrfs-progs.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests report by panicking, in helpers too")]

mod common;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Write as _,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use cocalc_backup::{Bounds, Rustic};
use cocalc_core::{
    backups::{Backup, BackupSource, Backups, Error},
    ids::{ProjectId, SnapshotName, TreePath},
    storage::{CopyOptions, Place, Storage as _, VolumeOptions},
};
use cocalc_storage::{Btrfs, loopback::Loopback};
use cocalc_testkit::{
    backups::Subject,
    storage::{disturb, manifest, plant},
};
use common::{on_disk, over};
use rustix::fs::{CWD, FileType, Mode, XattrFlags};

fn told(root: &Path) -> BTreeMap<Vec<u8>, String> {
    let mut told = manifest(root);
    // Of use only to the process that made it.
    told.retain(|name, _| !name.ends_with(b"socket"));
    told
}

fn assert_same(as_was: &BTreeMap<Vec<u8>, String>, restored: &BTreeMap<Vec<u8>, String>) {
    let different: Vec<_> = as_was
        .keys()
        .chain(restored.keys())
        .filter(|name| as_was.get(*name) != restored.get(*name))
        .map(|name| (String::from_utf8_lossy(name), as_was.get(name), restored.get(name)))
        .take(10)
        .collect();
    assert!(different.is_empty(), "restored is not what was backed up: {different:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_of_a_running_project_come_back_as_they_were_taken() {
    let root = tempfile::tempdir().unwrap();
    let volume = root.path().join("volume");
    let mounted =
        Loopback::create(&root.path().join("volume.img"), 2 << 30, &volume).unwrap_or_else(|error| {
            panic!("needs root, mkfs.btrfs and loop devices: {}", cocalc_core::chain(&error))
        });
    Btrfs::initialize(&volume).unwrap();
    let store = Btrfs::open(&volume).await.unwrap();
    let project = ProjectId::random();
    let live = store.create(project, &VolumeOptions::default()).await.unwrap().path.unwrap();
    plant(&live);

    // It is written to all the time.
    let ended = Arc::new(AtomicBool::new(false));
    let writer = {
        let (ended, log) = (ended.clone(), live.join("home/log"));
        thread::spawn(move || {
            for number in 0_u64.. {
                if ended.load(Ordering::Acquire) {
                    break;
                }
                let text = format!("{number}\n").repeat(100);
                fs::write(log.with_extension((number % 50).to_string()), &text).unwrap();
                fs::write(&log, text).unwrap();
            }
        })
    };
    let backups = over(on_disk(root.path()), Bounds::default());
    let subject = Subject::new(&backups, root.path());
    let mut made: Vec<(Backup, BTreeMap<Vec<u8>, String>)> = Vec::new();
    for number in 0..3 {
        let name = format!("auto-{number}").parse().unwrap();
        if number == 1 {
            disturb(&live);
        }
        store.snapshot(project, &name).await.unwrap();
        let _hold = store.hold(project, &name).await.unwrap();
        let path = store.snapshot_path(project, &name).await.unwrap();
        let as_was = told(&path);
        let parent = made.last().map(|(backup, _)| backup);
        let backup = backups.back_up(&subject.source(project, &path, parent), &|_| ()).await.unwrap();
        assert_same(&as_was, &told(&path));
        if parent.is_some() {
            let files = as_was.len() as u64;
            assert!(backup.files_read < files, "{} of {files} were read", backup.files_read);
        }
        made.push((backup, as_was));
    }
    ended.store(true, Ordering::Release);
    writer.join().unwrap();

    // Onto Btrfs, as into the staging of a restore: all of it, from each.
    for (number, (backup, as_was)) in made.iter().enumerate() {
        let target = volume.join(format!("restored-{number}"));
        fs::create_dir(&target).unwrap();
        backups.restore(project, &backup.id, &TreePath::root(), &target, &|_| ()).await.unwrap();
        assert_same(as_was, &told(&target));
    }

    // What was restored, or has moved, is another set of files with the same in
    // them: nothing of it is read or sent again.
    let last = &made[2];
    let source =
        BackupSource { moved: true, ..subject.source(project, &volume.join("restored-2"), Some(&last.0)) };
    let after = backups.back_up(&source, &|_| ()).await.unwrap();
    assert_eq!(after.files_read, 0, "{after:?}");
    assert!(after.added_bytes < 100_000, "{after:?}");
    drop(mounted);
}

/// A volume of its own, which is unmounted with the value.
async fn volume(root: &Path, name: &str, bytes: u64) -> (Loopback, Btrfs) {
    let path = root.join(name);
    let mounted = Loopback::create(&root.join(format!("{name}.img")), bytes, &path).unwrap_or_else(|error| {
        panic!("needs root, mkfs.btrfs and loop devices: {}", cocalc_core::chain(&error))
    });
    Btrfs::initialize(&path).unwrap();
    let store = Btrfs::open(&path).await.unwrap();
    (mounted, store)
}

async fn back_up(backups: &Rustic, root: &Path, store: &Btrfs, project: ProjectId, name: &str) -> Backup {
    let name = name.parse().unwrap();
    store.snapshot(project, &name).await.unwrap();
    let path = store.snapshot_path(project, &name).await.unwrap();
    let source = Subject::new(backups, root).source(project, &path, None);
    backups.back_up(&source, &|_| ()).await.unwrap()
}

/// As a host does it: into a place of its own in staging, which becomes a
/// snapshot.
async fn fetch(
    backups: &Rustic,
    store: &Btrfs,
    project: ProjectId,
    backup: &Backup,
    path: &TreePath,
    name: &SnapshotName,
) -> Result<(), Error> {
    let place = store.stage(project, name).await.unwrap();
    backups.restore(project, &backup.id, path, place.path(), &|_| ()).await?;
    place.publish().await.unwrap();
    Ok(())
}

/// What is dropped is removed after a while.
async fn assert_nothing_staged(store: &Btrfs) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let left: Vec<_> = fs::read_dir(store.path().join("staging")).unwrap().collect();
        if left.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "staging holds {left:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Data that nothing makes smaller.
fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    std::iter::repeat_with(|| next().to_le_bytes()).flatten().take(bytes).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_does_not_fit_changes_nothing_and_is_done_when_there_is_room() {
    const MIB: usize = 1 << 20;
    let root = tempfile::tempdir().unwrap();
    let (_mounted, store) = volume(root.path(), "volume", 256 << 20).await;
    let (project, other) = (ProjectId::random(), ProjectId::random());
    let live = store.create(project, &VolumeOptions::default()).await.unwrap().path.unwrap();
    for number in 0..32 {
        fs::write(live.join(format!("home/{number}")), noise(number + 1, MIB)).unwrap();
    }
    let backups = over(on_disk(root.path()), Bounds::default());
    let backup = back_up(&backups, root.path(), &store, project, "first").await;
    let backed_up = told(&live);
    store.delete_snapshot(project, &"first".parse().unwrap()).await.unwrap();
    for number in 0..32 {
        fs::remove_file(live.join(format!("home/{number}"))).unwrap();
    }
    fs::write(live.join("home/newer"), "newer").unwrap();
    let before = told(&live);
    let (all, name) = (TreePath::root(), "restored".parse().unwrap());
    let snapshots = || async { store.snapshots(project).await.unwrap() };

    // The project's own limit.
    store.set_limit(project, Some(12 << 20)).await.unwrap();
    let failed = fetch(&backups, &store, project, &backup, &all, &name).await;
    assert!(matches!(failed, Err(Error::Full { .. })), "{failed:?}");
    assert_nothing_staged(&store).await;
    assert_eq!((snapshots().await.len(), told(&live)), (0, before.clone()));
    // It is charged until the kernel has cleaned up.
    assert!(store.wait_trash_empty(Duration::from_secs(60)).await.unwrap());
    let deadline = Instant::now() + Duration::from_secs(60);
    while let Err(error) = fs::write(live.join("home/more"), noise(7, 4 * MIB)) {
        assert!(Instant::now() < deadline, "what was staged is charged for ever: {error}");
        rustix::fs::syncfs(File::open(&live).unwrap()).unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    fs::remove_file(live.join("home/more")).unwrap();
    let before = told(&live);
    store.set_limit(project, None).await.unwrap();

    // The volume: less is left than comes.
    let full = store.create(other, &VolumeOptions::default()).await.unwrap().path.unwrap();
    let (mut written, block) = (0, noise(1000, MIB));
    while let Ok(()) = File::create(full.join(format!("home/{written}")))
        .and_then(|file| Ok((&file).write_all(&block).and_then(|()| file.sync_all())?))
    {
        written += 1;
        assert!(written < 512, "more fits than there is");
    }
    for number in 0..=16.min(written) {
        fs::remove_file(full.join(format!("home/{}", written - number))).unwrap();
    }
    rustix::fs::syncfs(File::open(&full).unwrap()).unwrap();
    let others = told(&full);
    let failed = fetch(&backups, &store, project, &backup, &all, &name).await;
    assert!(matches!(failed, Err(Error::Full { .. })), "{failed:?}");
    assert_nothing_staged(&store).await;
    assert_eq!((snapshots().await.len(), told(&live)), (0, before.clone()));
    assert_eq!(told(&full), others, "who shares the volume loses nothing");

    // When there is room it is done.
    store.delete(other).await.unwrap();
    assert!(store.wait_trash_empty(Duration::from_secs(60)).await.unwrap());
    fetch(&backups, &store, project, &backup, &all, &name).await.unwrap();
    store.restore(project, &name, &"before".parse().unwrap()).await.unwrap();
    assert_same(&backed_up, &told(&live));
    let former = store.snapshot_path(project, &"before".parse().unwrap()).await.unwrap();
    assert_same(&before, &told(&former));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_root_installed_comes_back_exactly() {
    let root = tempfile::tempdir().unwrap();
    let (_mounted, store) = volume(root.path(), "volume", 512 << 20).await;
    let project = ProjectId::random();
    let live = store.create(project, &VolumeOptions::default()).await.unwrap().path.unwrap();
    let digest = "a".repeat(64);
    let upper = live.join(format!("system/{digest}/upper"));
    for directory in ["usr/bin", "usr/lib/package", "dev", "etc", "var/mail", "tmp", "opt"] {
        fs::create_dir_all(upper.join(directory)).unwrap();
    }
    let set = |path: &str, name: &str, value: &[u8]| {
        rustix::fs::lsetxattr(upper.join(path), name, value, XattrFlags::empty())
            .unwrap_or_else(|error| panic!("{name} of {path}: {error}"));
    };
    let node = |path: &str, kind: FileType, mode: u32, device: (u32, u32)| {
        let device = rustix::fs::makedev(device.0, device.1);
        rustix::fs::mknodat(CWD, upper.join(path), kind, Mode::from_raw_mode(mode), device).unwrap();
    };
    let owned = |path: &str, owner: u32, group: u32, mode: u32| {
        std::os::unix::fs::lchown(upper.join(path), Some(owner), Some(group)).unwrap();
        fs::set_permissions(upper.join(path), fs::Permissions::from_mode(mode)).unwrap();
    };
    // Programs that are more than who runs them, of many owners.
    for (number, (owner, group, mode)) in [
        (0, 0, 0o4755),
        (0, 42, 0o2755),
        (1000, 1000, 0o6711),
        (100_000, 165_535, 0o4755),
        (65_534, 65_534, 0o644),
        (4_000_000_000, 0, 0o755),
    ]
    .into_iter()
    .enumerate()
    {
        let path = format!("usr/bin/program{number}");
        fs::write(upper.join(&path), noise(number as u64 + 1, 5000)).unwrap();
        owned(&path, owner, group, mode);
    }
    fs::hard_link(upper.join("usr/bin/program0"), upper.join("usr/bin/sudo")).unwrap();
    // `linux/capability.h`: revisions 2 (cap_net_raw) and 3, which has a root.
    for (path, revision, owner) in
        [("usr/bin/ping", 0x0200_0001_u32, None), ("usr/bin/nested", 0x0300_0001, Some(100_000))]
    {
        fs::write(upper.join(path), path).unwrap();
        owned(path, 0, 0, 0o755);
        let words = [revision, 1 << 13, 0, 0, 0].into_iter().chain(owner);
        let value: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
        set(path, "security.capability", &value);
    }
    // What an overlay says: taken away, put in place of all of it, moved.
    node("etc/debian_version", FileType::CharacterDevice, 0, (0, 0));
    node("usr/lib/package/gone", FileType::CharacterDevice, 0, (0, 0));
    set("opt", "trusted.overlay.opaque", b"y");
    set("usr/lib/package", "trusted.overlay.redirect", b"/usr/lib/former");
    set("usr/bin/ping", "trusted.overlay.metacopy", b"");
    set("usr/bin/program1", "trusted.overlay.origin", &[0, 0xfb, 0x1d, 0, 1, 0xff]);
    // Devices, queues, and links with all there is to them.
    node("dev/null", FileType::CharacterDevice, 0o666, (1, 3));
    node("dev/large", FileType::CharacterDevice, 0o600, (300, 70_000));
    node("dev/loop0", FileType::BlockDevice, 0o660, (7, 0));
    node("dev/initctl", FileType::Fifo, 0o600, (0, 0));
    symlink("/proc/self/fd", upper.join("dev/fd")).unwrap();
    symlink("../nowhere", upper.join("etc/dangling")).unwrap();
    std::os::unix::fs::lchown(upper.join("dev/fd"), Some(7), Some(8)).unwrap();
    owned("dev/loop0", 0, 6, 0o660);
    owned("var/mail", 0, 8, 0o2775);
    owned("tmp", 0, 0, 0o1777);
    fs::write(upper.join("etc/shadow"), "root:*:").unwrap();
    owned("etc/shadow", 0, 42, 0o000);

    let backups = over(on_disk(root.path()), Bounds::default());
    let backup = back_up(&backups, root.path(), &store, project, "first").await;
    let as_was = told(&store.snapshot_path(project, &"first".parse().unwrap()).await.unwrap());
    assert!(as_was.len() > 30, "{as_was:#?}");
    fs::remove_dir_all(live.join("system")).unwrap();
    let name = "restored".parse().unwrap();
    fetch(&backups, &store, project, &backup, &TreePath::root(), &name).await.unwrap();
    assert_same(&as_was, &told(&store.snapshot_path(project, &name).await.unwrap()));
    store.restore(project, &name, &"before".parse().unwrap()).await.unwrap();
    assert_same(&as_was, &told(&live));

    // One path of it, too.
    let (path, name) = (format!("system/{digest}/upper/etc"), "path".parse().unwrap());
    fetch(&backups, &store, project, &backup, &path.parse().unwrap(), &name).await.unwrap();
    let at = store.snapshot_path(project, &name).await.unwrap();
    let one = told(&at.join("etc"));
    assert_eq!(one.get(&b"debian_version"[..]), as_was.get(format!("{path}/debian_version").as_bytes()));
    assert_eq!(one.len(), 5, "{one:#?}");
}

/// While a project swaps directories and links as fast as it can, what it gets
/// back goes into its own directories or nowhere.
#[tokio::test(flavor = "multi_thread")]
async fn links_that_are_planted_while_a_restore_goes_on_lead_nowhere() {
    let root = tempfile::tempdir().unwrap();
    let (_mounted, store) = volume(root.path(), "volume", 512 << 20).await;
    let canary = root.path().join("canary");
    fs::create_dir_all(canary.join("inner")).unwrap();
    fs::write(canary.join("text"), "secret").unwrap();
    fs::write(canary.join("inner/text"), "secret").unwrap();
    let before = told(&canary);
    let project = ProjectId::random();
    let live = store.create(project, &VolumeOptions::default()).await.unwrap().path.unwrap();
    let home = live.join("home");
    fs::create_dir_all(home.join("outer/inner")).unwrap();
    fs::write(home.join("outer/inner/text"), "mine").unwrap();
    symlink(&canary, home.join("link")).unwrap();
    let backups = over(on_disk(root.path()), Bounds::default());
    let backup = back_up(&backups, root.path(), &store, project, "first").await;

    // A backup has links, and not what they lead to.
    let (link, name) = ("home/link/text".parse().unwrap(), "through".parse().unwrap());
    let through = fetch(&backups, &store, project, &backup, &link, &name).await;
    assert!(matches!(through, Err(Error::NotFound { .. })), "there is nothing below a link: {through:?}");

    let stop = Arc::new(AtomicBool::new(false));
    let swapper = {
        let (stop, home, canary) = (stop.clone(), home.clone(), canary.clone());
        thread::spawn(move || {
            let mut swaps = 0_u64;
            while !stop.load(Ordering::Acquire) {
                for (place, aside) in [("outer", "aside"), ("outer/inner", "outer/aside")] {
                    let (place, aside) = (home.join(place), home.join(aside));
                    if fs::rename(&place, &aside).is_ok() {
                        let _ = symlink(&canary, &place);
                        thread::yield_now();
                        // What a restore put there meanwhile is taken away, as
                        // often as it does.
                        while fs::rename(&aside, &place).is_err() {
                            let _ = fs::remove_file(&place);
                            let _ = fs::remove_dir_all(&place);
                        }
                        swaps += 1;
                    }
                }
            }
            swaps
        })
    };
    let (mut made, mut refused) = (0, 0);
    for round in 0..8 {
        let name: SnapshotName = format!("fetched-{round}").parse().unwrap();
        let path: TreePath = "home/outer/inner".parse().unwrap();
        fetch(&backups, &store, project, &backup, &path, &name).await.unwrap();
        let from = Place::frozen(project, name.clone(), "inner".parse().unwrap());
        for replace in [true, false] {
            for to in ["home/outer/inner", "home/outer/inner/text", "home/outer/new", "home/link/new"] {
                for _ in 0..4 {
                    let options = CopyOptions { same_owner: true, replace };
                    let to = Place::live(project, to.parse().unwrap());
                    match store.copy(&from, &to, &options).await {
                        Ok(_) => made += 1,
                        Err(_) => refused += 1,
                    }
                    assert_eq!(told(&canary), before, "what is outside was changed");
                }
            }
        }
        let restored = store.snapshot_path(project, &name).await.unwrap();
        assert_eq!(fs::read(restored.join("inner/text")).unwrap(), b"mine");
        store.delete_snapshot(project, &name).await.unwrap();
    }
    stop.store(true, Ordering::Release);
    let swaps = swapper.join().unwrap();
    assert!(swaps > 0 && made > 0 && refused > 0, "{swaps} swaps, {made} made, {refused} refused");
    assert_eq!(told(&canary), before);
    for (name, line) in told(&home) {
        let secret = told(&canary)[&b"text"[..]].split(';').next().unwrap().to_owned();
        assert!(!line.starts_with(&secret), "{} is what was outside", String::from_utf8_lossy(&name));
    }
}
