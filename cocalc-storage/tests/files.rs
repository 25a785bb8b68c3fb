//! Comparing and copying files, on real Btrfs and in plain directories: what is
//! kept, what is refused, and what a tenant can do meanwhile. Needs root, loop
//! devices and btrfs-progs.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests report by panicking, in helpers too")]

mod common;

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use cocalc_core::{
    ids::{ProjectId, SnapshotName, TreePath},
    storage::{ChangeKind, CopyOptions, Error, NodeKind, Place, Storage, VolumeOptions},
};
use cocalc_storage::{Btrfs, Directory, fail, loopback::Loopback};

/// A store of each kind. The stores let go of their volumes before these go.
struct Stores {
    all: Vec<Arc<dyn Storage>>,
    _volume: Loopback,
    root: tempfile::TempDir,
}

async fn stores() -> Stores {
    let root = tempfile::tempdir().unwrap();
    let volume = Loopback::create(&root.path().join("a.img"), 1 << 30, &root.path().join("a"));
    let volume = volume.unwrap_or_else(|error| {
        panic!("needs root, mkfs.btrfs and loop devices: {}", cocalc_core::chain(&error))
    });
    Btrfs::initialize(volume.path()).unwrap();
    let btrfs = Btrfs::open(volume.path()).await.unwrap();
    let directory = Directory::open(root.path().join("directory")).await.unwrap();
    Stores { all: vec![Arc::new(btrfs), Arc::new(directory)], _volume: volume, root }
}

fn name(text: &str) -> SnapshotName {
    text.parse().unwrap()
}

fn path(text: &str) -> TreePath {
    text.parse().unwrap()
}

async fn project(store: &Arc<dyn Storage>) -> (ProjectId, PathBuf) {
    let project = ProjectId::random();
    let volume = store.create(project, &VolumeOptions::default()).await.unwrap();
    (project, volume.path.unwrap())
}

fn nothing_left(directory: &Path) {
    let left: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap_or_default())
        .filter(|name| name.starts_with(".cocalc"))
        .collect();
    assert!(left.is_empty(), "{left:?} in {directory:?}");
}

async fn diff(
    store: &Arc<dyn Storage>,
    project: ProjectId,
    page: usize,
) -> Vec<(String, ChangeKind, NodeKind)> {
    let (mut seen, mut after) = (Vec::new(), None);
    loop {
        let got = store.diff(project, &name("before"), None, after.as_ref(), page).await.unwrap();
        assert!(got.changes.len() <= page);
        after = got.changes.last().map(|change| change.path.clone());
        seen.extend(
            got.changes.into_iter().map(|change| (change.path.to_string(), change.kind, change.node)),
        );
        if !got.more {
            return seen;
        }
    }
}

#[tokio::test]
async fn what_changed_is_said_in_order_and_in_pages() {
    use ChangeKind::{Added, Metadata, Modified, Removed};
    use NodeKind::{Directory as Dir, File, Symlink};
    for store in stores().await.all {
        let (project, root) = project(&store).await;
        let home = root.join("home");
        for directory in ["a/deep/er", "a.b", "gone/with/all", "kind"] {
            fs::create_dir_all(home.join(directory)).unwrap();
        }
        for file in
            ["a/deep/er/same", "a/deep/er/text", "a.b/x", "gone/with/all/y", "length", "mode", "touched", "z"]
        {
            fs::write(home.join(file), file).unwrap();
        }
        symlink("one", home.join("link")).unwrap();
        store.snapshot(project, &name("before")).await.unwrap();
        assert_eq!(diff(&store, project, 100).await, [], "nothing has changed");

        fs::write(home.join("a/deep/er/text"), "A/deep/er/text").unwrap();
        fs::create_dir_all(home.join("a/new/with/more")).unwrap();
        fs::write(home.join("a/new/with/more/file"), "").unwrap();
        fs::remove_dir_all(home.join("gone")).unwrap();
        fs::write(home.join("length"), "longer than it was").unwrap();
        fs::set_permissions(home.join("mode"), std::os::unix::fs::PermissionsExt::from_mode(0o601)).unwrap();
        common::set_time(&home.join("touched"), 77);
        fs::remove_dir(home.join("kind")).unwrap();
        fs::write(home.join("kind"), "a file now").unwrap();
        fs::remove_file(home.join("link")).unwrap();
        symlink("two", home.join("link")).unwrap();
        fs::rename(home.join("z"), home.join("a.b/z")).unwrap();
        // Written again with the same bytes: nothing for people to see.
        let same = home.join("a/deep/er/same");
        let time = fs::metadata(&same).unwrap();
        fs::write(&same, "a/deep/er/same").unwrap();
        fs::File::open(&same).unwrap().set_modified(time.modified().unwrap()).unwrap();

        let expected = [
            ("home/a/deep/er/text", Modified, File),
            ("home/a/new", Added, Dir),
            ("home/a.b/z", Added, File),
            ("home/gone", Removed, Dir),
            ("home/kind", Modified, File),
            ("home/length", Modified, File),
            ("home/link", Modified, Symlink),
            ("home/mode", Metadata, File),
            ("home/touched", Metadata, File),
            ("home/z", Removed, File),
        ];
        let expected: Vec<_> = expected.map(|(path, kind, node)| (path.to_owned(), kind, node)).into();
        for page in [1, 2, 3, 7, 100] {
            assert_eq!(diff(&store, project, page).await, expected, "pages of {page}, {store:?}");
        }
        store.snapshot(project, &name("now")).await.unwrap();
        let between = store.diff(project, &name("before"), Some(&name("now")), None, 100).await.unwrap();
        assert_eq!(between.changes.len(), expected.len());
        let missing = store.diff(project, &name("none"), None, None, 1).await;
        assert!(matches!(missing, Err(Error::NoSnapshot { .. })));
    }
}

#[tokio::test]
async fn a_copy_has_everything() {
    for store in stores().await.all {
        let (one, root) = project(&store).await;
        let (other, other_root) = project(&store).await;
        common::plant(&root);
        store.snapshot(one, &name("s")).await.unwrap();
        let source = common::manifest(&root.join("home"));
        let places = [Place::live(one, path("home")), Place::frozen(one, name("s"), path("home"))];
        for (number, from) in places.iter().enumerate() {
            for same_owner in [false, true] {
                let to = Place::live(other, path(&format!("copy-{number}-{same_owner}")));
                let options = CopyOptions { same_owner, replace: false };
                let copied = store.copy(from, &to, &options).await.unwrap();
                assert_eq!(common::manifest(&other_root.join(to.path.to_string())), source);
                assert_eq!(copied.entries as usize, source.len() - 1, "one line is of the hard links");
                assert!(same_owner || copied.shared_bytes == 0, "between owners nothing is shared");
                let again = store.copy(from, &to, &options).await;
                assert!(matches!(again, Err(Error::AlreadyExists { .. })), "{again:?}");
            }
        }
        nothing_left(&other_root);
        // One file back from a snapshot, in the place of what it became.
        fs::write(root.join("home/plain"), "spoiled").unwrap();
        let to = Place::live(one, path("home/plain"));
        let from = Place::frozen(one, name("s"), path("home/plain"));
        let options = CopyOptions { replace: true, ..CopyOptions::default() };
        store.copy(&from, &to, &options).await.unwrap();
        assert_eq!(fs::read(root.join("home/plain")).unwrap(), b"plain");
        // A directory in the place of a file, and the other way round.
        for _ in 0..2 {
            for source in ["home/d1", "home/plain"] {
                let to = Place::live(one, path("home/odd"));
                let from = Place::frozen(one, name("s"), path(source));
                store.copy(&from, &to, &options).await.unwrap();
                assert_eq!(root.join("home/odd").is_dir(), source == "home/d1");
            }
        }
        nothing_left(&root.join("home"));
    }
}

#[tokio::test]
async fn what_leads_elsewhere_is_refused() {
    for store in stores().await.all {
        let (one, root) = project(&store).await;
        let home = root.join("home");
        fs::create_dir_all(home.join("d/inner")).unwrap();
        fs::write(home.join("d/file"), "file").unwrap();
        symlink("/etc", home.join("etc")).unwrap();
        symlink("d", home.join("alias")).unwrap();
        store.snapshot(one, &name("s")).await.unwrap();
        let copy = async |from: Place, to: Place| {
            let before = common::manifest(&root);
            let error = store.copy(&from, &to, &CopyOptions::default()).await.unwrap_err();
            assert_eq!(common::manifest(&root), before, "refused: nothing is changed");
            error
        };
        let (live, d) = (|text: &str| Place::live(one, path(text)), Place::live(one, path("home/d")));
        for from in ["home/etc/passwd", "home/alias/file", "home/none", "home/d/file/x"] {
            let error = copy(live(from), live("home/new")).await;
            assert!(matches!(&error, Error::Path { path, .. } if path.to_string() == from), "{error:?}");
        }
        for to in
            ["home/etc/new", "home/alias/new", "home/none/new", "home/d/inner/new", "home/d/file/new", ""]
        {
            let error = copy(d.clone(), live(to)).await;
            assert!(matches!(&error, Error::Path { path, .. } if path.to_string() == to), "{error:?}");
        }
        let frozen = Place { snapshot: Some(name("s")), ..live("home/new") };
        assert!(matches!(copy(d.clone(), frozen).await, Error::Path { .. }));
        let nobody = Place::live(ProjectId::random(), path("home/new"));
        assert!(matches!(copy(d.clone(), nobody).await, Error::NotFound { .. }));
        // A link itself is copied as one.
        store.copy(&live("home/etc"), &live("home/etc2"), &CopyOptions::default()).await.unwrap();
        assert_eq!(fs::read_link(home.join("etc2")).unwrap(), Path::new("/etc"));
        assert!(!Path::new("/etc/new").exists());
    }
}

/// While a project swaps directories and links as fast as it can, copies give
/// an error or a copy, and nothing outside is read or written.
#[tokio::test(flavor = "multi_thread")]
async fn a_project_that_swaps_links_gains_nothing() {
    let fixture = stores().await;
    let canary = fixture.root.path().join("canary");
    fs::create_dir(&canary).unwrap();
    fs::write(canary.join("secret"), "secret").unwrap();
    let before = common::manifest(&canary);
    for store in &fixture.all {
        let (one, root) = project(store).await;
        let home = root.join("home");
        fs::create_dir(home.join("real")).unwrap();
        fs::write(home.join("real/secret"), "mine").unwrap();
        fs::create_dir(home.join("out")).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let swapper = {
            let (stop, home, canary) = (Arc::clone(&stop), home.clone(), canary.clone());
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    for place in ["real", "out"] {
                        let place = home.join(place);
                        let aside = home.join("aside");
                        if fs::rename(&place, &aside).is_ok() {
                            symlink(&canary, &place).unwrap();
                            fs::remove_file(&place).unwrap();
                            fs::rename(&aside, &place).unwrap();
                        }
                    }
                }
            })
        };
        let mut made = 0;
        for round in 0..200 {
            let from = Place::live(one, path("home/real/secret"));
            let to = Place::live(one, path(&format!("home/out/{round}")));
            match store.copy(&from, &to, &CopyOptions::default()).await {
                Ok(_) => made += 1,
                Err(Error::Path { .. }) => {}
                Err(other) => panic!("{}", cocalc_core::chain(&other)),
            }
        }
        stop.store(true, Ordering::Relaxed);
        swapper.join().unwrap();
        let out: Vec<_> =
            fs::read_dir(home.join("out")).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(out.len(), made, "every copy that was made is there, and no other");
        for copy in out {
            assert_eq!(fs::read(copy).unwrap(), b"mine");
        }
        assert_eq!(common::manifest(&canary), before);
        nothing_left(&home.join("out"));
    }
}

#[tokio::test]
async fn a_full_quota_leaves_no_half_copy() {
    let fixture = stores().await;
    let store = &fixture.all[0];
    assert!(store.capabilities().quotas, "this kernel has no simple quotas");
    let (one, root) = project(store).await;
    let noise: Vec<u8> = (0..3_u32 << 20).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    fs::create_dir(root.join("home/big")).unwrap();
    fs::write(root.join("home/big/noise"), &noise).unwrap();
    let (two, other) = project(store).await;
    store.set_limit(two, Some(8 << 20)).await.unwrap();
    let (from, to) = (Place::live(one, path("home/big")), Place::live(two, path("home/big")));
    let error = store.copy(&from, &to, &CopyOptions::default()).await.unwrap_err();
    assert!(matches!(error, Error::NoSpace { project, .. } if project == two), "{error:?}");
    assert!(!other.join("home/big").exists());
    nothing_left(&other.join("home"));
    // Shared bytes are charged to who wrote them first.
    let copied = store.copy(&from, &to, &CopyOptions { same_owner: true, replace: false }).await.unwrap();
    assert_eq!(copied.shared_bytes, noise.len() as u64);
    assert_eq!(fs::metadata(other.join("home/big/noise")).unwrap().size(), noise.len() as u64);
}

const CHILD: &str = "COCALC_TEST_COPY_INTO";

/// Not a test of its own: what [`a_copy_that_is_killed_is_whole_or_not_there`]
/// runs as another process, in which it dies.
#[tokio::test]
async fn child_that_copies() {
    let Ok(into) = std::env::var(CHILD) else { return };
    let (store, project) = into.split_once(',').unwrap();
    let project: ProjectId = project.parse().unwrap();
    let store = Btrfs::open(store).await.unwrap();
    let (from, to) = (Place::live(project, path("home/d")), Place::live(project, path("home/new")));
    store.copy(&from, &to, &CopyOptions { replace: true, ..CopyOptions::default() }).await.unwrap();
}

#[tokio::test]
async fn a_copy_that_is_killed_is_whole_or_not_there() {
    let root = tempfile::tempdir().unwrap();
    let volume = Loopback::create(&root.path().join("a.img"), 1 << 30, &root.path().join("a")).unwrap();
    Btrfs::initialize(volume.path()).unwrap();
    let points: Vec<_> = fail::NAMES
        .iter()
        .filter(|point| point.starts_with("copy.") || point.starts_with("intent."))
        .collect();
    assert!(points.len() >= 8);
    for existing in [false, true] {
        for point in &points {
            let store: Arc<dyn Storage> = Arc::new(Btrfs::open(volume.path()).await.unwrap());
            let (project, files) = project(&store).await;
            fs::create_dir_all(files.join("home/d/e")).unwrap();
            fs::write(files.join("home/d/e/f"), "new").unwrap();
            if existing {
                fs::write(files.join("home/new"), "old").unwrap();
            }
            drop(store);
            let child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "child_that_copies", "--nocapture"])
                .env(CHILD, format!("{},{project}", volume.path().display()))
                .env(fail::VARIABLE, point)
                .output()
                .unwrap();
            let killed = std::os::unix::process::ExitStatusExt::signal(&child.status);
            assert_eq!(killed, Some(9), "{point}: {}", String::from_utf8_lossy(&child.stderr));

            let store: Arc<dyn Storage> = Arc::new(Btrfs::open(volume.path()).await.unwrap());
            nothing_left(&files.join("home"));
            let new = files.join("home/new");
            if new.is_dir() {
                assert_eq!(fs::read(new.join("e/f")).unwrap(), b"new", "{point}");
            } else if existing {
                assert_eq!(fs::read(&new).unwrap(), b"old", "{point}");
            } else {
                assert!(!new.exists(), "{point}");
            }
            let staged: Vec<_> = fs::read_dir(volume.path().join("staging")).unwrap().collect();
            assert!(staged.is_empty(), "{point}: {staged:?}");
            let (from, to) = (Place::live(project, path("home/d")), Place::live(project, path("home/new")));
            let options = CopyOptions { replace: true, ..CopyOptions::default() };
            store.copy(&from, &to, &options).await.unwrap();
            assert_eq!(fs::read(new.join("e/f")).unwrap(), b"new", "{point}: tried again");
            store.delete(project).await.unwrap();
        }
    }
}
