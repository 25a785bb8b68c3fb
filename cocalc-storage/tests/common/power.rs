//! A volume of which the power can be cut: its disk is a file on another Btrfs,
//! where a snapshot of it is what a disk holds at that moment.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex},
};

use cocalc_storage::{Btrfs, BtrfsBuilder, loopback::Loopback};
use cocalc_testkit::storage::{FilesHarness, Harness, Host};

const MIB: u64 = 1 << 20;

pub(crate) fn btrfs(arguments: &[&str], path: &Path) {
    let output = Command::new("btrfs").args(arguments).arg(path).output().unwrap();
    assert!(output.status.success(), "btrfs {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Reads all of the volume and compares it with its checksums.
pub(crate) fn scrub(volume: &Path) {
    btrfs(&["scrub", "start", "-B"], volume);
}

pub(crate) fn empty(directory: &Path) {
    let left: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.is_empty(), "{} holds {left:?}", directory.display());
}

fn volume(root: &Path, name: &str, bytes: u64) -> Loopback {
    let made = Loopback::create(&root.join(format!("{name}.img")), bytes, &root.join(name));
    made.unwrap_or_else(|error| {
        panic!("needs root, mkfs.btrfs and loop devices: {}", cocalc_core::chain(&error))
    })
}

/// The volume, its disk, and what that held when the power was cut.
pub(crate) struct Cuts {
    pub(crate) inner: Loopback,
    outer: Loopback,
    pub(crate) root: tempfile::TempDir,
    number: usize,
}

impl Cuts {
    pub(crate) fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let outer = volume(root.path(), "outer", 6144 * MIB);
        btrfs(&["-q", "subvolume", "create"], &outer.path().join("disk"));
        let image = outer.path().join("disk/inner.img");
        let inner = Loopback::create(&image, 1024 * MIB, &root.path().join("inner")).unwrap();
        Self { inner, outer, root, number: 0 }
    }

    /// What is on the disk at this moment.
    pub(crate) fn cut(&mut self) -> PathBuf {
        self.number += 1;
        let copy = self.outer.path().join(format!("cut-{}", self.number));
        let made = Command::new("btrfs")
            .args(["-q", "subvolume", "snapshot"])
            .args([self.outer.path().join("disk"), copy.clone()])
            .status();
        assert!(made.unwrap().success());
        copy
    }

    /// The machine as it comes up again with that disk.
    pub(crate) async fn up(&self, copy: &Path) -> (Btrfs, Loopback) {
        let place = self.root.path().join(copy.file_name().unwrap());
        let disk = Loopback::open(&copy.join("inner.img"), &place).unwrap();
        let store = Btrfs::open(disk.path()).await.unwrap();
        empty(&disk.path().join("staging"));
        (store, disk)
    }

    pub(crate) fn down(&self, store: Btrfs, disk: Loopback, copy: &Path) {
        scrub(disk.path());
        drop(store);
        disk.close().unwrap();
        btrfs(&["-q", "subvolume", "delete"], copy);
    }
}

fn files(first: &Btrfs, second: &Btrfs) -> FilesHarness {
    let roots = [first.path().to_owned(), second.path().to_owned()];
    FilesHarness::new(Arc::new(first.clone()), Arc::new(second.clone()), move |host: Host, project, name| {
        roots[host as usize].join("snapshots").join(project.to_string()).join(name.as_str())
    })
}

/// A harness that cuts the power of its first host, whose store is opened as
/// `with` says.
pub(crate) async fn powered(with: impl FnOnce(BtrfsBuilder) -> BtrfsBuilder) -> FilesHarness {
    let cuts = Cuts::new();
    Btrfs::initialize(cuts.inner.path()).unwrap();
    let first = with(Btrfs::builder(cuts.inner.path())).open().await.unwrap();
    let elsewhere = volume(cuts.root.path(), "elsewhere", 512 * MIB);
    Btrfs::initialize(elsewhere.path()).unwrap();
    let second = Btrfs::open(elsewhere.path()).await.unwrap();
    let cuts = Arc::new(Mutex::new(cuts));
    files(&first, &second).keeping(elsewhere).powered(move || {
        let cuts = Arc::clone(&cuts);
        Box::pin(async move {
            let (copy, place) = {
                let mut cuts = cuts.lock().unwrap();
                let copy = cuts.cut();
                let place = cuts.root.path().join(copy.file_name().unwrap());
                (copy, place)
            };
            let disk = Loopback::open(&copy.join("inner.img"), &place)?;
            scrub(disk.path());
            let store = Btrfs::open(disk.path()).await?;
            empty(&disk.path().join("staging"));
            Ok(Box::new(files(&store, &store).keeping(disk)) as Box<dyn Harness>)
        })
    })
}
