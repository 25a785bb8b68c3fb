//! What volumes and snapshots take, shared or not.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::Path,
};

use cocalc_core::{
    ids::ProjectId,
    storage::{CloneOptions, Error, Storage, VolumeOptions},
};
use cocalc_storage::Directory;

use crate::stores::{self, name};

const MIB: u64 = 1 << 20;

fn about(found: u64, expected: u64) -> bool {
    found.abs_diff(expected) < 64 << 10
}

fn three_files(home: &Path) {
    for number in 0..3_u8 {
        fs::write(home.join(number.to_string()), vec![number + 1; 1 << 20]).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_shared_is_told_from_what_is_not() {
    let one = stores::one().await;
    let store = &one.store;
    let project = ProjectId::random();
    let live = store.create(project, &VolumeOptions::default()).await.unwrap().path.unwrap();
    three_files(&live.join("home"));
    fs::write(live.join("home/small"), "within metadata").unwrap();
    let alone = store.footprint(project, None).await.unwrap();
    assert_eq!(alone.entries, 6, "home, system and four files");
    assert!(about(alone.total_bytes, 3 * MIB), "{alone:?}");
    assert_eq!(alone.exclusive_bytes, alone.total_bytes, "nobody else has any of it");

    store.snapshot(project, &name("s")).await.unwrap();
    let (now, frozen) = (
        store.footprint(project, None).await.unwrap(),
        store.footprint(project, Some(&name("s"))).await.unwrap(),
    );
    assert_eq!(now, frozen);
    assert_eq!((now.total_bytes, now.exclusive_bytes), (alone.total_bytes, 0));

    fs::write(live.join("home/0"), vec![9; 1 << 20]).unwrap();
    fs::remove_file(live.join("home/1")).unwrap();
    let (now, frozen) = (
        store.footprint(project, None).await.unwrap(),
        store.footprint(project, Some(&name("s"))).await.unwrap(),
    );
    assert!(about(now.total_bytes, 2 * MIB) && about(now.exclusive_bytes, MIB), "{now:?}");
    assert!(about(frozen.total_bytes, 3 * MIB) && about(frozen.exclusive_bytes, 2 * MIB), "{frozen:?}");

    // A clone of the same owner shares; one of another does not.
    let (same, other) = (ProjectId::random(), ProjectId::random());
    let shares = CloneOptions { same_owner: true, ..CloneOptions::default() };
    store.clone_volume(project, &name("s"), same, &shares).await.unwrap();
    store.clone_volume(project, &name("s"), other, &CloneOptions::default()).await.unwrap();
    let (same, other) =
        (store.footprint(same, None).await.unwrap(), store.footprint(other, None).await.unwrap());
    assert!(about(same.total_bytes, 3 * MIB) && same.exclusive_bytes < 64 << 10, "{same:?}");
    assert!(about(other.total_bytes, 3 * MIB) && about(other.exclusive_bytes, 3 * MIB), "{other:?}");
    let missing = store.footprint(project, Some(&name("none"))).await;
    assert!(matches!(missing, Err(Error::NoSnapshot { .. })), "{missing:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn difficult_trees_are_measured_too() {
    let one = stores::one().await;
    let store = &one.store;
    let project = ProjectId::random();
    let live = store.create(project, &VolumeOptions::default()).await.unwrap().path.unwrap();
    let home = live.join("home");
    // A farm of links, which is one file.
    fs::create_dir(home.join("farm")).unwrap();
    fs::write(home.join("farm/0"), vec![1; 1 << 20]).unwrap();
    for number in 1..500 {
        fs::hard_link(home.join("farm/0"), home.join(format!("farm/{number}"))).unwrap();
    }
    // One of many extents, with holes between them, and one with a big hole.
    let sparse = File::create(home.join("extents")).unwrap();
    for number in 0..2000_u64 {
        sparse.write_all_at(&[5; 4096], number * 8192).unwrap();
    }
    File::create(home.join("hole")).unwrap().set_len(1 << 40).unwrap();
    // Deeper than a path can be long.
    let mut at = rustix::fs::open(&home, rustix::fs::OFlags::DIRECTORY, rustix::fs::Mode::empty()).unwrap();
    let component = "d".repeat(250);
    for _ in 0..40 {
        rustix::fs::mkdirat(&at, &component, rustix::fs::Mode::from_raw_mode(0o755)).unwrap();
        let flags = rustix::fs::OFlags::DIRECTORY;
        at = rustix::fs::openat(&at, &component, flags, rustix::fs::Mode::empty()).unwrap();
    }
    let flags = rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY;
    let deep = rustix::fs::openat(&at, "deep", flags, rustix::fs::Mode::from_raw_mode(0o600)).unwrap();
    File::from(deep).write_all_at(&vec![2; 1 << 20], 0).unwrap();
    // What must not be opened, and links to what is not ours.
    let pipe = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, home.join("pipe"), pipe, rustix::fs::Mode::from_raw_mode(0o600), 0)
        .unwrap();
    std::os::unix::fs::symlink("/usr", home.join("link")).unwrap();

    let found = store.footprint(project, None).await.unwrap();
    let entries = 2 + 1 + 500 + 2 + 40 + 1 + 2;
    assert_eq!(found.entries, entries);
    let expected = MIB + 2000 * 4096 + MIB;
    assert!(found.total_bytes.abs_diff(expected) < 256 << 10, "{found:?} for {expected}");
    assert_eq!(found.total_bytes, found.exclusive_bytes);
    store.snapshot(project, &name("s")).await.unwrap();
    let found = store.footprint(project, None).await.unwrap();
    assert!(found.exclusive_bytes < 64 << 10, "every extent is shared: {found:?}");
    sparse.write_all_at(&[6; 4096], 1000 * 8192).unwrap();
    let found = store.footprint(project, None).await.unwrap();
    assert!((4096..64 << 10).contains(&found.exclusive_bytes), "{found:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn directories_tell_what_their_file_system_shares() {
    let one = stores::one().await;
    let on_btrfs = one.root.path().join("v2");
    let volume = stores::volume(one.root.path(), "v2", 512 << 20);
    // The temporary directory shares nothing on ext4 and the like.
    let plain = tempfile::tempdir().unwrap();
    for (place, shares) in [(on_btrfs.join("store"), true), (plain.path().join("store"), false)] {
        let store = Directory::open(&place).await.unwrap();
        let project = ProjectId::random();
        let live = store.create(project, &VolumeOptions::default()).await.unwrap().path.unwrap();
        three_files(&live.join("home"));
        store.snapshot(project, &name("s")).await.unwrap();
        for snapshot in [None, Some(name("s"))] {
            let found = store.footprint(project, snapshot.as_ref()).await.unwrap();
            assert_eq!(found.entries, 5);
            assert!(about(found.total_bytes, 3 * MIB), "{found:?}");
            if shares || store.capabilities().shares_bytes {
                assert!(found.exclusive_bytes < 64 << 10, "{found:?}");
            } else {
                assert_eq!(found.exclusive_bytes, found.total_bytes);
            }
        }
        assert!(store.changed_since(project, &name("s")).await.unwrap(), "it cannot tell, and says yes");
        assert!(!store.capabilities().detects_no_change);
    }
    volume.close().unwrap();
}
