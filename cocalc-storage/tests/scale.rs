//! Many of everything, and no room for anything, on real Btrfs. Needs root,
//! loop devices and btrfs-progs. With `COCALC_FULL=1` as many as a host has to
//! stand: 10,000 snapshots, 5,000 projects, a million files.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests report by panicking, in helpers too")]

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use cocalc_core::{
    ids::{ProjectId, SnapshotName},
    storage::{ChangeKind, CloneOptions, CopyOptions, Error, Place, SendOptions, Storage, VolumeOptions},
};
use cocalc_storage::{Btrfs, loopback::Loopback};

const MIB: u64 = 1 << 20;
/// For what ends by itself, unless it hangs.
const PATIENCE: Duration = Duration::from_secs(600);

/// As many as every change is tested with, or as many as there may be.
fn count(short: usize, full: usize) -> usize {
    if std::env::var_os("COCALC_FULL").is_some() { full } else { short }
}

struct Fixture {
    store: Btrfs,
    volume: Loopback,
    root: tempfile::TempDir,
}

fn volume(root: &Path, name: &str, bytes: u64) -> Loopback {
    let made = Loopback::create(&root.join(format!("{name}.img")), bytes, &root.join(name));
    made.unwrap_or_else(|error| {
        panic!("needs root, mkfs.btrfs and loop devices: {}", cocalc_core::chain(&error))
    })
}

async fn fixture(bytes: u64) -> Fixture {
    let root = tempfile::tempdir().unwrap();
    let volume = volume(root.path(), "v", bytes);
    Btrfs::initialize(volume.path()).unwrap();
    let store = Btrfs::open(volume.path()).await.unwrap();
    Fixture { store, volume, root }
}

impl Fixture {
    /// What must hold after anything.
    async fn sound(self) {
        let Self { store, volume, root } = self;
        for listed in store.list().await.unwrap() {
            store.delete(listed.project).await.unwrap();
        }
        assert!(store.wait_trash_empty(PATIENCE).await.unwrap(), "the trash is emptied");
        drop(store);
        let store = Btrfs::open(volume.path()).await.unwrap();
        for place in ["staging", "projects", "snapshots"] {
            let left: Vec<_> = fs::read_dir(volume.path().join(place)).unwrap().collect();
            assert!(left.is_empty(), "{place} holds {left:?}");
        }
        drop(store);
        let scrubbed =
            Command::new("btrfs").args(["scrub", "start", "-B"]).arg(volume.path()).output().unwrap();
        assert!(scrubbed.status.success(), "{}", String::from_utf8_lossy(&scrubbed.stderr));
        volume.close().unwrap();
        drop(root);
    }
}

fn name(text: &str) -> SnapshotName {
    text.parse().unwrap()
}

async fn project(store: &Btrfs) -> (ProjectId, PathBuf) {
    let project = ProjectId::random();
    let made = store.create(project, &VolumeOptions::default()).await.unwrap();
    (project, made.path.unwrap().join("home"))
}

/// Sends the snapshot to another volume, and says what arrived.
async fn carried(fixture: &Fixture, project: ProjectId, n: &str, bytes: u64) -> (Btrfs, PathBuf, Loopback) {
    let other = volume(fixture.root.path(), "other", bytes);
    Btrfs::initialize(other.path()).unwrap();
    let there = Btrfs::open(other.path()).await.unwrap();
    let sent = fixture.store.send(project, &name(n), &SendOptions::whole()).await.unwrap();
    there.receive(&sent.header, sent.reader).await.unwrap();
    let path = there.snapshot_path(project, &name(n)).await.unwrap();
    (there, path, other)
}

#[tokio::test(flavor = "multi_thread")]
async fn many_snapshots() {
    let many = count(150, 10_000);
    let fixture = fixture(4096 * MIB).await;
    let store = &fixture.store;
    let (project, home) = project(store).await;
    for number in 0..many {
        fs::write(home.join("n"), number.to_string()).unwrap();
        store.snapshot(project, &name(&format!("s{number}"))).await.unwrap();
    }
    let listed = store.snapshots(project).await.unwrap();
    assert_eq!(listed.len(), many);
    assert!(
        listed.iter().enumerate().all(|(number, s)| s.name.as_str() == format!("s{number}")),
        "oldest first"
    );
    for number in [0, many / 2, many - 1] {
        let path = store.snapshot_path(project, &name(&format!("s{number}"))).await.unwrap();
        assert_eq!(fs::read_to_string(path.join("home/n")).unwrap(), number.to_string());
    }
    assert!(!store.changed_since(project, &name(&format!("s{}", many - 1))).await.unwrap());
    store.restore(project, &name("s0"), &name("former")).await.unwrap();
    store.delete(project).await.unwrap();
    fixture.sound().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_projects() {
    let many = count(60, 5_000);
    let mut fixture = fixture(8192 * MIB).await;
    let mut projects = Vec::new();
    for number in 0..many {
        let project = ProjectId::random();
        let options = VolumeOptions { limit_bytes: Some(MIB * (1 + number as u64 % 7) * 16) };
        let volume = fixture.store.create(project, &options).await.unwrap();
        fs::write(volume.path.unwrap().join("home/n"), number.to_string()).unwrap();
        projects.push(project);
    }
    for project in projects.iter().step_by(10) {
        fixture.store.snapshot(*project, &name("s")).await.unwrap();
    }
    drop(fixture.store);
    fixture.store = Btrfs::open(fixture.volume.path()).await.unwrap();
    assert_eq!(fixture.store.list().await.unwrap().len(), many);
    for (number, project) in projects.iter().enumerate().step_by(7) {
        let volume = fixture.store.volume(*project).await.unwrap();
        assert_eq!(fs::read_to_string(volume.path.unwrap().join("home/n")).unwrap(), number.to_string());
        let usage = fixture.store.usage(*project).await.unwrap();
        assert_eq!(usage.limit_bytes, Some(MIB * (1 + number as u64 % 7) * 16));
    }
    fixture.sound().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_small_files() {
    let many = count(8_000, 1_000_000);
    let bytes = 1024 * MIB + many as u64 * 8192;
    let fixture = fixture(bytes).await;
    let store = &fixture.store;
    let (project, home) = project(store).await;
    for number in 0..many {
        if number % 1000 == 0 {
            fs::create_dir(home.join((number / 1000).to_string())).unwrap();
        }
        fs::write(home.join(format!("{}/{number}", number / 1000)), number.to_string()).unwrap();
    }
    store.snapshot(project, &name("s")).await.unwrap();
    let footprint = store.footprint(project, None).await.unwrap();
    assert!(footprint.entries >= many as u64, "{footprint:?}");
    let last = many - 1;
    fs::write(home.join(format!("{}/{last}", last / 1000)), "changed").unwrap();
    let changes = store.diff(project, &name("s"), None, None, 10).await.unwrap();
    assert_eq!(changes.changes.len(), 1, "{changes:?}");
    assert_eq!(changes.changes[0].kind, ChangeKind::Modified);
    let (there, arrived, _volume) = carried(&fixture, project, "s", bytes).await;
    let mut found = 0;
    for directory in fs::read_dir(arrived.join("home")).unwrap() {
        found += fs::read_dir(directory.unwrap().path()).unwrap().count();
    }
    assert_eq!(found, many);
    assert_eq!(
        fs::read_to_string(arrived.join(format!("home/{}/{last}", last / 1000))).unwrap(),
        last.to_string()
    );
    drop(there);
    fixture.sound().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_extents_and_many_names() {
    let (extents, links) = (count(3_000, 100_000), count(1_000, 60_000));
    let fixture = fixture(4096 * MIB).await;
    let store = &fixture.store;
    let (project, home) = project(store).await;
    // Every other block: one extent each, and as many holes.
    let file = File::create(home.join("extents")).unwrap();
    for number in 0..extents as u64 {
        file.write_all_at(&[number as u8; 4096], number * 8192).unwrap();
    }
    file.sync_all().unwrap();
    // Open, it would keep its volume from going.
    drop(file);
    fs::write(home.join("linked"), "linked").unwrap();
    for number in 0..links {
        if number % 1000 == 0 {
            fs::create_dir(home.join(format!("d{}", number / 1000))).unwrap();
        }
        fs::hard_link(home.join("linked"), home.join(format!("d{}/{number}", number / 1000))).unwrap();
    }
    store.snapshot(project, &name("s")).await.unwrap();
    let footprint = store.footprint(project, None).await.unwrap();
    let occupied = extents as u64 * 4096;
    assert!((occupied..occupied + 64 * MIB).contains(&footprint.total_bytes), "{footprint:?}");
    let from = Place::frozen(project, name("s"), "home".parse().unwrap());
    let to = Place::live(project, "copy".parse().unwrap());
    store.copy(&from, &to, &CopyOptions::default()).await.unwrap();
    let (there, arrived, _volume) = carried(&fixture, project, "s", 4096 * MIB).await;
    for place in [arrived.join("home"), home.parent().unwrap().join("copy")] {
        use std::os::unix::fs::MetadataExt as _;
        assert_eq!(fs::metadata(place.join("linked")).unwrap().nlink(), links as u64 + 1);
        let about = fs::metadata(place.join("extents")).unwrap();
        assert_eq!(about.len(), (extents as u64 - 1) * 8192 + 4096);
        assert!(about.blocks() * 512 <= occupied + MIB, "its holes are holes");
        let mut block = [0; 4096];
        let sample = File::open(place.join("extents")).unwrap();
        sample.read_exact_at(&mut block, (extents as u64 / 2) * 8192).unwrap();
        assert_eq!(block, [(extents / 2) as u8; 4096]);
    }
    drop(there);
    fixture.sound().await;
}

/// A volume without room, whatever is asked of it: a typed error or a whole
/// answer, nothing half done, and after something was deleted it goes on.
#[tokio::test(flavor = "multi_thread")]
async fn no_room_for_anything() {
    let source = fixture(512 * MIB).await;
    let (sent_project, home) = project(&source.store).await;
    for number in 0..200_u32 {
        let noise: Vec<u8> =
            (0..100_000_u32).map(|i| (i ^ number).wrapping_mul(2_654_435_761).to_le_bytes()[1]).collect();
        fs::write(home.join(number.to_string()), noise).unwrap();
    }
    source.store.snapshot(sent_project, &name("s")).await.unwrap();

    let fixture = fixture(160 * MIB).await;
    let store = &fixture.store;
    let (one, home) = project(store).await;
    fs::write(home.join("small"), "small").unwrap();
    store.snapshot(one, &name("s")).await.unwrap();
    // Less and less room, down to none.
    let mut filler = 0;
    let mut refused = 0;
    for chunk in [8 << 20, 1 << 20, 64 << 10, 4 << 10] {
        let noise: Vec<u8> =
            (0..chunk as u32).map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()[2]).collect();
        loop {
            let path = home.join(format!("filler-{filler}"));
            let written = File::create(&path).and_then(|file| {
                file.write_all_at(&noise, 0)?;
                file.sync_all()
            });
            filler += 1;
            if written.is_err() {
                let _ = fs::remove_file(path);
                break;
            }
        }
        let fresh = ProjectId::random();
        let n = name(&format!("s{chunk}"));
        let place = |path: &str| Place::live(one, path.parse().unwrap());
        let sent = source.store.send(sent_project, &name("s"), &SendOptions::whole()).await.unwrap();
        let answers = [
            store.create(fresh, &VolumeOptions::default()).await.map(drop),
            store.snapshot(one, &n).await.map(drop),
            store
                .clone_volume(one, &name("s"), ProjectId::random(), &CloneOptions::default())
                .await
                .map(drop),
            store
                .copy(&place("home/small"), &place(&format!("home/copy-{chunk}")), &CopyOptions::default())
                .await
                .map(drop),
            store.receive(&sent.header, sent.reader).await.map(drop),
            store.restore(one, &name("s"), &name(&format!("f{chunk}"))).await.map(drop),
        ];
        for (call, answer) in answers.into_iter().enumerate() {
            match answer {
                Ok(()) | Err(Error::AlreadyExists { .. }) => {}
                Err(Error::NoSpace { .. }) => refused += 1,
                Err(other) => panic!("call {call} with {chunk} bytes free: {}", cocalc_core::chain(&other)),
            }
        }
        let staged: Vec<_> = fs::read_dir(fixture.volume.path().join("staging")).unwrap().collect();
        assert!(staged.is_empty(), "with {chunk} bytes free, staging holds {staged:?}");
        for snapshot in store.snapshots(sent_project).await.unwrap() {
            let path = store.snapshot_path(sent_project, &snapshot.name).await.unwrap();
            assert_eq!(fs::read_dir(path.join("home")).unwrap().count(), 200, "what is listed is whole");
        }
    }
    assert!(refused > 0, "a stream of 20 MB does not fit where nothing does");
    store.delete(one).await.expect("a project on a full volume can be deleted");
    for listed in store.list().await.unwrap() {
        store.delete(listed.project).await.unwrap();
    }
    assert!(store.wait_trash_empty(PATIENCE).await.unwrap());
    let sent = source.store.send(sent_project, &name("s"), &SendOptions::whole()).await.unwrap();
    store.receive(&sent.header, sent.reader).await.expect("then there is room again");
    store.delete(sent_project).await.unwrap();
    fixture.sound().await;
}
