//! Volumes that fail as a whole, under a store that is open.

use std::{fs, path::Path, time::Duration};

use cocalc_core::{
    ids::ProjectId,
    storage::{CloneOptions, Error, SendOptions, Storage, VolumeOptions},
};
use cocalc_storage::{
    Btrfs, OpenError,
    loopback::{self, Loopback},
};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};
use tokio::time::timeout;

use crate::stores::{self, name};

const LIMIT: Duration = Duration::from_secs(60);

/// Asks for everything that writes; what each has said, which must be soon.
async fn write_all(store: &Btrfs, project: ProjectId) -> Vec<(&'static str, Option<Error>)> {
    let other = ProjectId::random();
    let (s, t, options) = (name("s"), name("t"), VolumeOptions::default());
    let mut said = Vec::new();
    macro_rules! ask {
        ($what:literal, $call:expr) => {
            let answer = timeout(LIMIT, $call).await.unwrap_or_else(|_| panic!("{} hangs", $what));
            said.push(($what, answer.err()));
        };
    }
    ask!("create", store.create(other, &options));
    ask!("snapshot", store.snapshot(project, &t));
    ask!("restore", store.restore(project, &s, &t));
    ask!("set aside", store.set_aside(project, &t));
    ask!(
        "clone",
        store.clone_volume(project, &s, other, &CloneOptions { same_owner: true, ..Default::default() })
    );
    ask!("limit", store.set_limit(project, Some(1 << 30)));
    ask!("delete a snapshot", store.delete_snapshot(project, &s));
    ask!("delete", store.delete(project));
    said
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_turns_read_only_is_told_and_nothing_is_lost() {
    let one = stores::one().await;
    let store = &one.store;
    let project = ProjectId::random();
    let live = store.create(project, &VolumeOptions::default()).await.unwrap().path.unwrap();
    fs::write(live.join("home/f"), "precious").unwrap();
    let snapshot = store.snapshot(project, &name("s")).await.unwrap();
    mount_remount(one.volume.path(), MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV, "")
        .unwrap();
    for (what, error) in write_all(store, project).await {
        let error = error.unwrap_or_else(|| panic!("{what} has worked"));
        assert!(matches!(error, Error::Backend { .. }), "{what}: {error:?}");
        let text = cocalc_core::chain(&error);
        assert!(text.contains("Read-only file system"), "{what}: {text}");
    }
    // What only reads goes on.
    assert_eq!(store.list().await.unwrap().len(), 1);
    assert_eq!(store.snapshots(project).await.unwrap(), std::slice::from_ref(&snapshot));
    assert!(store.usage(project).await.is_ok() && store.trash().await.is_ok());
    assert!(!store.changed_since(project, &name("s")).await.unwrap());
    assert_eq!(store.footprint(project, None).await.unwrap().entries, 3);
    mount_remount(one.volume.path(), MountFlags::NOSUID | MountFlags::NODEV, "").unwrap();
    store.snapshot(project, &name("t")).await.expect("and writing too, when it can be written again");
    drop(one.store);
    let store = Btrfs::open(one.volume.path()).await.unwrap();
    assert_eq!(store.snapshots(project).await.unwrap()[0], snapshot);
    assert_eq!(fs::read_to_string(live.join("home/f")).unwrap(), "precious");
    assert_eq!(fs::read_dir(store.path().join("staging")).unwrap().count(), 0);
}

/// A small file system in memory, which holds the volume's file.
struct Disk<'a>(&'a Path);

impl Disk<'_> {
    fn resize(&self, bytes: u64) {
        mount_remount(self.0, MountFlags::empty(), format!("size={bytes}").as_str()).unwrap();
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        let _ = unmount(self.0, UnmountFlags::DETACH);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_fails_is_told_and_the_volume_opens_when_it_is_back() {
    let root = tempfile::tempdir().unwrap();
    let under = root.path().join("disk");
    fs::create_dir(&under).unwrap();
    mount("disk", &under, "tmpfs", MountFlags::empty(), Some(c"size=1g")).unwrap();
    let disk = Disk(&under);
    let at = root.path().join("v");
    let volume = Loopback::create(&under.join("v.img"), 1 << 30, &at).unwrap();
    Btrfs::initialize(volume.path()).unwrap();
    let store = Btrfs::open(volume.path()).await.unwrap();
    let project = ProjectId::random();
    let live = store.create(project, &VolumeOptions::default()).await.unwrap().path.unwrap();
    fs::write(live.join("home/f"), "precious").unwrap();
    let snapshot = store.snapshot(project, &name("s")).await.unwrap();

    // No block that it has not written yet can be written any more: EIO.
    let used = rustix::fs::statvfs(&under).unwrap();
    disk.resize((used.f_blocks - used.f_bfree + 16) * used.f_frsize);
    let broken = (0..64_u8).any(|number| {
        // Written out by nobody yet, so it need not fail here.
        let _ = fs::write(live.join(format!("home/{number}")), vec![number; 1 << 20]);
        let file = fs::File::open(live.join(format!("home/{number}")));
        file.and_then(|file| file.sync_all()).is_err()
    });
    assert!(broken, "the disk still takes everything");
    let said = write_all(&store, project).await;
    assert!(said.iter().any(|(_, error)| error.is_some()), "{said:?}");
    for (what, error) in said {
        let typed = matches!(
            error,
            None | Some(
                Error::Backend { .. }
                    | Error::NotFound { .. }
                    | Error::NoSnapshot { .. }
                    | Error::NoSpace { .. }
            )
        );
        assert!(typed, "{what}: {error:?}");
    }
    if let Ok(mut sent) = store.send(project, &name("s"), &SendOptions::whole()).await {
        let mut bytes = Vec::new();
        let _ =
            timeout(LIMIT, tokio::io::AsyncReadExt::read_to_end(&mut sent.reader, &mut bytes)).await.unwrap();
    }
    timeout(LIMIT, store.wait_trash_empty(Duration::from_millis(100))).await.unwrap().ok();
    drop(store);
    match timeout(LIMIT, Btrfs::open(&at)).await.unwrap() {
        Ok(store) => drop(store),
        Err(error) => {
            assert!(matches!(error, OpenError::ReadOnly { .. } | OpenError::Io { .. }), "{error:?}")
        }
    }

    // The disk is back.
    volume.close().unwrap();
    disk.resize(2 << 30);
    let volume = Loopback::open(&under.join("v.img"), &at).unwrap();
    let store = Btrfs::open(volume.path()).await.unwrap();
    assert_eq!(fs::read_dir(at.join("staging")).unwrap().count(), 0);
    // Deleted, if that could still be written; else all that was acknowledged.
    let kept = store.snapshots(project).await.unwrap();
    if kept.contains(&snapshot) {
        let path = store.snapshot_path(project, &name("s")).await.unwrap();
        assert_eq!(fs::read_to_string(path.join("home/f")).unwrap(), "precious");
    }
    store.create(ProjectId::random(), &VolumeOptions::default()).await.expect("it is as new");
    drop(store);
    volume.close().unwrap();
}

/// The device is there no more, from one moment to the next: all that is asked
/// of it fails.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_vanishes_is_told_and_what_was_acknowledged_is_on_the_disk() {
    let one = stores::one().await;
    let store = one.store;
    let project = ProjectId::random();
    let live = store.create(project, &VolumeOptions::default()).await.unwrap().path.unwrap();
    fs::write(live.join("home/f"), "precious").unwrap();
    let snapshot = store.snapshot(project, &name("s")).await.unwrap();

    let (image, at) = (one.volume.image().to_owned(), one.volume.path().to_owned());
    let disk = one.root.path().join("disk.img");
    let copied = std::process::Command::new("cp").arg("--sparse=always").args([&image, &disk]).status();
    assert!(copied.unwrap().success());
    let [device] = &loopback::devices_of(&image).unwrap()[..] else { panic!("one device") };
    fs::File::options().write(true).open(&image).unwrap().set_len(0).unwrap();
    let resized = std::process::Command::new("losetup").arg("--set-capacity").arg(device).status();
    assert!(resized.unwrap().success());

    let said = write_all(&store, project).await;
    assert!(said.iter().any(|(_, error)| error.is_some()), "{said:?}");
    for (what, error) in said {
        let typed = matches!(
            error,
            None | Some(Error::Backend { .. } | Error::NotFound { .. } | Error::NoSnapshot { .. })
        );
        assert!(typed, "{what}: {error:?}");
    }
    // What only looks may know it still; it must not hang.
    let _ = timeout(LIMIT, store.list()).await.expect("a listing ends");
    let _ = timeout(LIMIT, store.usage(project)).await.expect("usage ends");
    let _ = timeout(LIMIT, store.changed_since(project, &name("s"))).await.expect("it ends");
    drop(store);
    drop(one.volume);
    timeout(LIMIT, async {
        while !loopback::devices_of(&image).unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("the device can be let go of");

    let volume = Loopback::open(&disk, &at).unwrap();
    let store = Btrfs::open(&at).await.unwrap();
    assert_eq!(
        store.snapshots(project).await.unwrap(),
        [snapshot],
        "it is on the disk, wherever that is now"
    );
    let path = store.snapshot_path(project, &name("s")).await.unwrap();
    assert_eq!(fs::read_to_string(path.join("home/f")).unwrap(), "precious");
    drop(store);
    volume.close().unwrap();
}
