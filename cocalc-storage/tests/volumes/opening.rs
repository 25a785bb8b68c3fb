//! Opening a volume: only ours, and only as it is.

use std::{collections::BTreeMap, fs, path::Path};

use cocalc_storage::{Btrfs, OpenError};
use rustix::mount::{MountFlags, mount_remount};

use crate::stores;

const MARKER: &str = ".cocalc-volume";

fn content(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let names = fs::read_dir(path).unwrap().map(|entry| entry.unwrap());
    names
        .map(|entry| {
            let content = if entry.path().is_file() { fs::read(entry.path()).unwrap() } else { Vec::new() };
            (entry.file_name().into_string().unwrap(), content)
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_marker_that_is_not_ours_is_refused_with_nothing_changed() {
    let one = stores::one().await;
    let path = one.volume.path();
    drop(one.store);
    let honest = fs::read(path.join(MARKER)).unwrap();
    let text = String::from_utf8(honest.clone()).unwrap();
    let damaged: [(&str, Vec<u8>); 8] = [
        ("empty, as after a bad crash", vec![]),
        ("cut", honest[..honest.len() / 2].to_vec()),
        ("zeros", vec![0; honest.len()]),
        ("no text", vec![0xff, 0xfe, 0x80]),
        ("very long", vec![b' '; 10 << 20]),
        ("a later layout", text.replace("\"layout\":1", "\"layout\":2").into_bytes()),
        ("an unknown field", text.replace('{', "{\"new\":true,").into_bytes()),
        ("no id", br#"{"layout":1}"#.to_vec()),
    ];
    for (what, marker) in damaged {
        fs::write(path.join(MARKER), &marker).unwrap();
        let before = content(path);
        for opened in [Btrfs::open(path).await.map(drop), Btrfs::initialize(path)] {
            let error = opened.expect_err(what);
            assert!(matches!(error, OpenError::UnknownLayout { .. }), "{what}: {error:?}");
            assert!(error.to_string().len() < 1000, "{what}: {error}");
        }
        assert_eq!(content(path), before, "{what}");
    }
    fs::write(path.join(MARKER), &honest).unwrap();
    fs::write(path.join("lost+found"), "").unwrap();
    assert!(matches!(Btrfs::open(path).await, Err(OpenError::UnknownData { .. })));
    fs::remove_file(path.join("lost+found")).unwrap();
    Btrfs::open(path).await.expect("it is ours again");
    // Without its marker it is nobody's.
    fs::remove_file(path.join(MARKER)).unwrap();
    assert!(matches!(Btrfs::open(path).await, Err(OpenError::NotInitialized { .. })));
    std::os::unix::fs::symlink("/etc/passwd", path.join(MARKER)).unwrap();
    assert!(Btrfs::open(path).await.is_err(), "a link is not followed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_volume_is_refused() {
    let one = stores::one().await;
    drop(one.store);
    let path = one.volume.path();
    mount_remount(path, MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV, "").unwrap();
    let refused = Btrfs::open(path).await.map(drop);
    assert!(matches!(refused, Err(OpenError::ReadOnly { .. })), "{refused:?}");
    Btrfs::initialize(path).expect("it is prepared, which takes no writing");
    mount_remount(path, MountFlags::NOSUID | MountFlags::NODEV, "").unwrap();
    Btrfs::open(path).await.expect("and writable again");

    let empty = stores::volume(one.root.path(), "empty", 256 << 20);
    mount_remount(empty.path(), MountFlags::RDONLY, "").unwrap();
    let refused = Btrfs::initialize(empty.path());
    assert!(matches!(refused, Err(OpenError::ReadOnly { .. })), "{refused:?}");
    let refused = Btrfs::open(empty.path()).await.map(drop);
    assert!(matches!(refused, Err(OpenError::NotInitialized { .. })), "{refused:?}");
    assert_eq!(content(empty.path()).len(), 0);
}
