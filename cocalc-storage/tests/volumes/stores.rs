//! Stores on loopback volumes of their own.

use std::path::Path;

use cocalc_core::ids::SnapshotName;
use cocalc_storage::{Btrfs, loopback::Loopback};

/// One store. Fields are dropped in order: the store lets go of its volume,
/// which is unmounted, before the directory is removed.
pub(crate) struct One {
    pub(crate) store: Btrfs,
    pub(crate) volume: Loopback,
    pub(crate) root: tempfile::TempDir,
}

/// A new store on a volume of 1 GiB.
pub(crate) async fn one() -> One {
    let root = tempfile::tempdir().unwrap();
    let volume = volume(root.path(), "v", 1 << 30);
    Btrfs::initialize(volume.path()).unwrap();
    let store = Btrfs::open(volume.path()).await.unwrap();
    One { store, volume, root }
}

/// A new, empty volume.
pub(crate) fn volume(root: &Path, name: &str, bytes: u64) -> Loopback {
    let made = Loopback::create(&root.join(format!("{name}.img")), bytes, &root.join(name));
    made.unwrap_or_else(|error| {
        panic!("needs root, mkfs.btrfs and loop devices: {}", cocalc_core::chain(&error))
    })
}

pub(crate) fn name(text: &str) -> SnapshotName {
    text.parse().unwrap()
}
