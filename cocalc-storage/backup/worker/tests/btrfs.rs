//! Backups of Btrfs snapshots of a project that is being written to, and their
//! restore onto Btrfs. Needs root, loop devices and btrfs-progs.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests report by panicking, in helpers too")]

mod common;

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use cocalc_backup::Bounds;
use cocalc_core::{
    backups::{Backup, BackupSource, Backups},
    ids::{ProjectId, TreePath},
    storage::{Storage as _, VolumeOptions},
};
use cocalc_storage::{Btrfs, loopback::Loopback};
use cocalc_testkit::{
    backups::Subject,
    storage::{disturb, manifest, plant},
};
use common::{on_disk, over};

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
