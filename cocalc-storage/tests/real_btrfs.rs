//! Btrfs storage on loopback volumes. Needs root, loop devices, btrfs-progs
//! and a kernel with simple quotas (6.7).

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests report by panicking, in helpers too")]

mod common;

use std::{
    fs,
    io::Cursor,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use cocalc_core::{
    ids::{ImageDigest, ProjectId, SnapshotName, VolumeUuid},
    storage::{CloneOptions, Error, SendOptions, Storage, VolumeOptions},
};
use cocalc_storage::{
    Btrfs, ImageError, ImageLimits, OpenError, QuotaKind,
    loopback::{self, Loopback},
    probe,
};
use cocalc_testkit::storage::{FilesHarness, Host, agrees_with_model, regressions, scripts, storage};
use proptest::{prelude::*, test_runner::TestRunner};
use tokio::{
    io::AsyncReadExt as _,
    signal::unix::{SignalKind, signal},
};

/// Stores on loopback volumes. Fields are dropped in order: the stores let go
/// of their volumes, which are unmounted, before the directory is removed.
struct Fixture {
    a: Btrfs,
    b: Btrfs,
    volumes: Vec<Loopback>,
    root: tempfile::TempDir,
}

fn volume(root: &Path, name: &str) -> Loopback {
    let made = Loopback::create(&root.join(format!("{name}.img")), 1 << 30, &root.join(name));
    made.unwrap_or_else(|error| {
        panic!("needs root, mkfs.btrfs and loop devices: {}", cocalc_core::chain(&error))
    })
}

async fn fresh(path: &Path) -> Btrfs {
    Btrfs::initialize(path).unwrap();
    Btrfs::open(path).await.unwrap()
}

async fn fixture() -> Fixture {
    let root = tempfile::tempdir().unwrap();
    let volumes = vec![volume(root.path(), "a"), volume(root.path(), "b")];
    let (a, b) = (fresh(volumes[0].path()).await, fresh(volumes[1].path()).await);
    Fixture { a, b, volumes, root }
}

fn harness(a: &Btrfs, b: &Btrfs) -> FilesHarness {
    let roots = [a.path().to_owned(), b.path().to_owned()];
    FilesHarness::new(Arc::new(a.clone()), Arc::new(b.clone()), move |host: Host, project, name| {
        roots[host as usize].join("snapshots").join(project.to_string()).join(name.as_str())
    })
}

/// What a dropped call left is removed after its child has ended.
fn nothing_staged(store: &Btrfs) {
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        let left: Vec<_> = fs::read_dir(store.path().join("staging")).unwrap().collect();
        if left.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "staging holds {left:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn name(text: &str) -> SnapshotName {
    text.parse().unwrap()
}

fn btrfs(arguments: &[&Path]) {
    let status = Command::new("btrfs").args(["-q", "subvolume"]).args(arguments).status().unwrap();
    assert!(status.success(), "{arguments:?}");
}

async fn stream_of(
    store: &Btrfs,
    project: ProjectId,
    n: &str,
) -> (cocalc_core::storage::SendHeader, Vec<u8>) {
    let mut sent = store.send(project, &name(n), &SendOptions::whole()).await.unwrap();
    let mut bytes = Vec::new();
    sent.reader.read_to_end(&mut bytes).await.unwrap();
    (sent.header, bytes)
}

#[tokio::test(flavor = "multi_thread")]
async fn btrfs_keeps_the_contract() {
    let f = fixture().await;
    assert!(f.a.capabilities().quotas, "needs simple quotas: {:?}", f.a.capabilities().weaknesses);
    assert_eq!(f.a.capabilities().weaknesses, Vec::<String>::new());
    let outside = f.root.path().join("outside");
    fs::create_dir(&outside).unwrap();
    let stores = [f.a.clone(), f.b.clone()];
    let free = move |host: Host| stores[host as usize].free_bytes().ok();
    storage(&harness(&f.a, &f.b).outside([outside]).measured(free)).await;
    nothing_staged(&f.a);
    nothing_staged(&f.b);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_stores_on_one_file_system_keep_the_contract() {
    let root = tempfile::tempdir().unwrap();
    let volume = volume(root.path(), "v");
    for name in ["a", "b"] {
        fs::create_dir(volume.path().join(name)).unwrap();
    }
    let (a, b) = (fresh(&volume.path().join("a")).await, fresh(&volume.path().join("b")).await);
    // On the same file system, where a subvolume could be moved to.
    let outside = volume.path().join("outside");
    fs::create_dir(&outside).unwrap();
    storage(&harness(&a, &b).outside([outside])).await;
    drop((a, b));
    volume.close().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn without_quotas_the_contract_holds_too() {
    let f = fixture().await;
    let Fixture { a, b, volumes, root: _root } = f;
    drop((a, b));
    let open = async |at: usize| Btrfs::builder(volumes[at].path()).quotas(false).open().await.unwrap();
    let (a, b) = (open(0).await, open(1).await);
    assert!(!a.capabilities().quotas);
    assert_eq!(a.capabilities().weaknesses.len(), 1);
    storage(&harness(&a, &b)).await;
}

#[test]
fn btrfs_agrees_with_the_model() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let f = runtime.block_on(fixture());
    let harness = harness(&f.a, &f.b);
    for (about, script) in regressions() {
        println!("{about}");
        runtime.block_on(agrees_with_model(&harness, &script));
    }
    let cases = if std::env::var_os("COCALC_FULL").is_some() { 200 } else { 8 };
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases) };
    TestRunner::new(config)
        .run(&scripts(20), |script| {
            runtime.block_on(agrees_with_model(&harness, &script));
            Ok(())
        })
        .unwrap();
    nothing_staged(&f.a);
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_carry_everything() {
    let f = fixture().await;
    let project = ProjectId::random();
    let live = f.a.create(project, &VolumeOptions::default()).await.unwrap().path.unwrap();
    f.a.snapshot(project, &name("empty")).await.unwrap();
    let sent = f.a.send(project, &name("empty"), &SendOptions::whole()).await.unwrap();
    f.b.receive(&sent.header, sent.reader).await.unwrap();

    common::plant(&live);
    fs::create_dir(live.join("system/moved")).unwrap();
    common::set_time(&live, 987_654_321);
    f.a.snapshot(project, &name("one")).await.unwrap();
    let expected = common::manifest(&live);
    let at = async |store: &Btrfs, n: &str| {
        common::manifest(&store.snapshot_path(project, &name(n)).await.unwrap())
    };
    assert_eq!(at(&f.a, "one").await, expected, "a snapshot");
    let sent = f.a.send(project, &name("one"), &SendOptions::since(Some(&name("empty")))).await.unwrap();
    f.b.receive(&sent.header, sent.reader).await.unwrap();
    assert_eq!(at(&f.b, "one").await, expected, "a delta, the root's own time included");

    // Renames that cross, which the kernel sends by way of orphan names.
    fs::rename(live.join("home/d1"), live.join("system/moved/d1")).unwrap();
    fs::rename(live.join("home/plain"), live.join("home/other")).unwrap();
    fs::rename(live.join("home/odd"), live.join("home/plain")).unwrap();
    fs::rename(live.join("home/other"), live.join("home/odd")).unwrap();
    common::set_time(&live, 1_111_111_111);
    f.a.snapshot(project, &name("two")).await.unwrap();
    let expected = common::manifest(&live);
    let sent = f.a.send(project, &name("two"), &SendOptions::since(Some(&name("one")))).await.unwrap();
    f.b.receive(&sent.header, sent.reader).await.unwrap();
    assert_eq!(at(&f.b, "two").await, expected, "a second delta");
    let volume = f.b.restore(project, &name("two"), &name("former")).await.unwrap();
    assert_eq!(common::manifest(&volume.path.unwrap()), expected, "brought to life");

    let target = ProjectId::random();
    let clone = f.b.clone_volume(project, &name("two"), target, &CloneOptions::default()).await.unwrap();
    assert_eq!(common::manifest(&clone.path.unwrap()), expected, "cloned");
}

/// Rewrites the commands of a stream, with right lengths and checksums.
fn craft(bytes: &[u8], mut edit: impl FnMut(u16, Vec<u8>) -> Vec<(u16, Vec<u8>)>) -> Vec<u8> {
    let (header, mut rest) = bytes.split_at(17);
    let mut crafted = header.to_vec();
    while let Some((head, after)) = rest.split_at_checked(10) {
        let length = u32::from_le_bytes(head[..4].try_into().unwrap()) as usize;
        let command = u16::from_le_bytes(head[4..6].try_into().unwrap());
        let (body, after) = after.split_at(length);
        for (command, body) in edit(command, body.to_vec()) {
            let mut whole = u32::try_from(body.len()).unwrap().to_le_bytes().to_vec();
            whole.extend(command.to_le_bytes());
            whole.extend([0; 4]);
            whole.extend(body);
            let sum = !crc32c::crc32c_append(!0, &whole);
            whole[6..10].copy_from_slice(&sum.to_le_bytes());
            crafted.extend(whole);
        }
        rest = after;
    }
    crafted
}

fn replace(body: Vec<u8>, from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let at = body.windows(from.len()).position(|window| window == from);
    at.map_or(body.clone(), |at| [&body[..at], to, &body[at + to.len()..]].concat())
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_streams_are_refused_and_write_nothing_outside() {
    let f = fixture().await;
    let (project, victim) = (ProjectId::random(), ProjectId::random());
    let live = f.a.create(project, &VolumeOptions::default()).await.unwrap().path.unwrap();
    fs::write(live.join("home/target"), vec![5; 300_000]).unwrap();
    Command::new("cp")
        .arg("--reflink=always")
        .args([live.join("home/target"), live.join("home/copied")])
        .status()
        .unwrap();
    fs::hard_link(live.join("home/target"), live.join("home/linked")).unwrap();
    f.a.snapshot(project, &name("one")).await.unwrap();
    let (header, honest) = stream_of(&f.a, project, "one").await;
    let secret = f.b.create(victim, &VolumeOptions::default()).await.unwrap();
    fs::write(secret.path.unwrap().join("home/target"), vec![6; 300_000]).unwrap();
    let secret = f.b.snapshot(victim, &name("secret")).await.unwrap();
    let (before, elsewhere) = (common::manifest(f.b.path()), header.origin);

    assert_eq!(craft(&honest, |command, body| vec![(command, body)]), honest, "crafting itself is right");
    let swap = |from: &'static [u8], to: &'static [u8]| {
        craft(&honest, |command, body| vec![(command, replace(body, from, to))])
    };
    let mut clones = 0;
    let stolen = craft(&honest, |command, body| {
        // A clone, of which the source is named.
        let body = if command == 16 {
            clones += 1;
            replace(body, elsewhere.as_bytes(), secret.uuid.as_bytes())
        } else {
            body
        };
        vec![(command, body)]
    });
    assert!(clones > 0, "the stream has a clone to be redirected");
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("a path upwards", swap(b"home/target", b"../../../es")),
        ("a path upwards inside", swap(b"home/target", b"home/../../")),
        ("an absolute path", swap(b"home/target", b"/tmp/target")),
        ("a link upwards", swap(b"home/linked", b"../../../es")),
        ("a NUL", swap(b"home/target", b"home/\0arget")),
        ("a clone of another project's file", stolen),
        (
            "two subvolumes",
            craft(&honest, |command, body| {
                let twice = if command == 1 { vec![(command, body.clone())] } else { vec![] };
                [twice, vec![(command, body)]].concat()
            }),
        ),
        (
            "no subvolume",
            craft(&honest, |command, body| if command == 1 { vec![] } else { vec![(command, body)] }),
        ),
        (
            "no end",
            craft(&honest, |command, body| if command == 21 { vec![] } else { vec![(command, body)] }),
        ),
        ("another name", swap(b"one", b"two")),
        (
            "an unknown command",
            craft(&honest, |command, body| vec![(if command == 18 { 99 } else { command }, body)]),
        ),
        (
            "an attribute cut off",
            craft(&honest, |command, mut body| {
                if command == 18 {
                    body.pop();
                }
                vec![(command, body)]
            }),
        ),
        ("two streams", [honest.clone(), honest.clone()].concat()),
        ("garbage", vec![0x5a; 100_000]),
    ];
    for (what, crafted) in cases {
        assert_ne!(crafted, honest, "{what}");
        let got = f.b.receive(&header, Box::pin(Cursor::new(crafted))).await;
        assert!(matches!(got, Err(Error::BadStream { .. })), "{what}: {got:?}");
        assert!(f.b.snapshots(project).await.unwrap().is_empty(), "{what}");
        nothing_staged(&f.b);
        assert!(!Path::new("/tmp/target").exists(), "{what}");
    }
    f.b.delete(project).await.unwrap();
    assert!(f.b.wait_trash_empty(Duration::from_secs(60)).await.unwrap());
    let after = common::manifest(f.b.path());
    let files = |tree: &std::collections::BTreeMap<Vec<u8>, String>| -> Vec<Vec<u8>> {
        tree.keys().filter(|path| !path.starts_with(b"trash/")).cloned().collect()
    };
    assert_eq!(files(&after), files(&before), "nothing was written anywhere");
    f.b.receive(&header, Box::pin(Cursor::new(honest))).await.expect("the honest one is taken");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_quota_stops_writes_and_nothing_else() {
    const LIMIT: u64 = 20 << 20;
    let f = fixture().await;
    let project = ProjectId::random();
    let limited = VolumeOptions { limit_bytes: Some(LIMIT) };
    let live = f.a.create(project, &limited).await.unwrap().path.unwrap();
    // In a subvolume that the project nests, too.
    btrfs(&[Path::new("create"), &live.join("home/nested")]);
    let mut written = 0;
    let refused = loop {
        match fs::write(live.join(format!("home/nested/{written}")), vec![7; 1 << 20]) {
            Ok(()) => written += 1,
            Err(error) => break error,
        }
        assert!(written < 40, "the limit does not hold");
    };
    assert_eq!(refused.kind(), std::io::ErrorKind::QuotaExceeded);
    let usage = f.a.usage(project).await.unwrap();
    assert!(usage.charged_bytes <= LIMIT + (1 << 20), "{usage:?}");
    f.a.set_limit(project, None).await.unwrap();
    btrfs(&[Path::new("delete"), &live.join("home/nested")]);
    f.a.set_limit(project, Some(LIMIT)).await.unwrap();
    fill(&live);
    f.a.snapshot(project, &name("full")).await.expect("a full project can be frozen");
    f.a.restore(project, &name("full"), &name("former")).await.expect("and restored");
    f.a.set_aside(project, &name("aside")).await.expect("and set aside");

    // Receiving into a full project fails cleanly.
    let source = ProjectId::random();
    let live = f.b.create(source, &VolumeOptions::default()).await.unwrap().path.unwrap();
    for number in 0..40 {
        fs::write(live.join(format!("home/{number}")), vec![number; 1 << 20]).unwrap();
    }
    f.b.snapshot(source, &name("big")).await.unwrap();
    let (header, bytes) = stream_of(&f.b, source, "big").await;
    let target = f.a.create(source, &limited).await.unwrap();
    let got = f.a.receive(&header, Box::pin(Cursor::new(bytes.clone()))).await;
    assert!(matches!(got, Err(Error::NoSpace { what: "the project's quota", .. })), "{got:?}");
    assert!(f.a.snapshots(source).await.unwrap().is_empty());
    nothing_staged(&f.a);
    assert_eq!(f.a.volume(source).await.unwrap(), target);
    assert_eq!(f.a.usage(source).await.unwrap().limit_bytes, Some(LIMIT), "the limit is what it was");

    f.a.set_limit(source, Some(100 << 20)).await.unwrap();
    f.a.receive(&header, Box::pin(Cursor::new(bytes))).await.expect("with room it is taken");
    let restored = f.a.restore(source, &name("big"), &name("former")).await.unwrap();
    let usage = f.a.usage(source).await.unwrap();
    assert!(usage.charged_bytes >= 40 << 20, "what was received is charged to its project: {usage:?}");
    let mut more = 0;
    while fs::write(restored.path.as_ref().unwrap().join(format!("home/more{more}")), vec![1; 1 << 20])
        .is_ok()
    {
        more += 1;
        assert!(more < 100, "the limit does not hold after a restore");
    }
    assert!(more > 10, "only {more} of 60 MiB could be written");

    for store in [&f.a, &f.b] {
        store.delete(project).await.expect("a full project can be deleted");
        store.delete(source).await.expect("a full project can be deleted");
        assert!(store.list().await.unwrap().is_empty());
        nothing_staged(store);
    }
}

/// Writes until the quota is full; space of what was deleted returns slowly.
fn fill(live: &Path) {
    let deadline = Instant::now() + Duration::from_secs(60);
    for number in 0.. {
        if let Err(error) = fs::write(live.join(format!("home/{number}")), vec![7; 1 << 20]) {
            assert_eq!(error.kind(), std::io::ErrorKind::QuotaExceeded);
            return;
        }
        assert!(Instant::now() < deadline, "the limit does not hold");
    }
}

/// Everything below the volume, nested subvolumes and trash included.
fn below(store: &Btrfs) -> std::collections::BTreeSet<Vec<u8>> {
    common::manifest(store.path()).into_keys().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_project_nests_is_never_lost() {
    let f = fixture().await;
    let project = ProjectId::random();
    let live = f.a.create(project, &VolumeOptions::default()).await.unwrap().path.unwrap();
    fs::write(live.join("home/f"), "first").unwrap();
    f.a.snapshot(project, &name("before")).await.unwrap();
    fs::create_dir_all(live.join("home/my data")).unwrap();
    let nested = live.join("home/my data/thesis");
    for path in [&live.join("home/top"), &live.join("in-root"), &nested, &nested.join("deeper")] {
        btrfs(&[Path::new("create"), path]);
    }
    btrfs(&[Path::new("create"), &live.join("home/fourth")]);
    fs::write(nested.join("deeper/chapter"), "years of work").unwrap();
    let (files, volume) = (below(&f.a), f.a.volume(project).await.unwrap());

    let refused = |what: &str, error: Error| {
        let text = error.to_string();
        let Error::NestedVolumes { project: whose, paths } = error else { panic!("{what}: {error:?}") };
        assert_eq!(whose, project, "{what}");
        assert_eq!(paths, ["home/top", "in-root", "home/my data/thesis"].map(PathBuf::from), "{what}");
        assert!(text.contains("home/top, in-root, home/my data/thesis; move"), "{text}");
        assert!(text.contains("btrfs subvolume delete"), "{text}");
        assert_eq!(below(&f.a), files, "{what} changes nothing");
    };
    refused("snapshot", f.a.snapshot(project, &name("s")).await.unwrap_err());
    refused("set_aside", f.a.set_aside(project, &name("s")).await.unwrap_err());
    refused("restore", f.a.restore(project, &name("before"), &name("s")).await.unwrap_err());
    assert_eq!(f.a.volume(project).await.unwrap(), volume);
    assert_eq!(fs::read_to_string(nested.join("deeper/chapter")).unwrap(), "years of work");
    assert_eq!(f.a.snapshot(project, &name("before")).await.unwrap().name, name("before"), "it is there");

    // As the error says.
    fs::create_dir(live.join("home/kept")).unwrap();
    fs::copy(nested.join("deeper/chapter"), live.join("home/kept/chapter")).unwrap();
    for path in ["home/my data/thesis/deeper", "home/my data/thesis", "home/top", "in-root", "home/fourth"] {
        btrfs(&[Path::new("delete"), &live.join(path)]);
    }
    f.a.set_aside(project, &name("s")).await.unwrap();
    let kept = f.a.snapshot_path(project, &name("s")).await.unwrap();
    assert_eq!(fs::read_to_string(kept.join("home/kept/chapter")).unwrap(), "years of work");
    // A project with nested volumes can be deleted.
    let live = f.a.restore(project, &name("s"), &name("former")).await.unwrap().path.unwrap();
    btrfs(&[Path::new("create"), &live.join("home/again")]);
    btrfs(&[Path::new("create"), &live.join("home/again/inner")]);
    f.a.delete(project).await.unwrap();
    assert!(!live.exists());
    nothing_staged(&f.a);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_set_aside_does_not_fill_the_quota() {
    const LIMIT: u64 = 40 << 20;
    let Fixture { a, b, volumes, root: _root } = fixture().await;
    let project = ProjectId::random();
    let limited = VolumeOptions { limit_bytes: Some(LIMIT) };
    let live = a.create(project, &limited).await.unwrap().path.unwrap();
    for number in 0..24_u8 {
        fs::write(live.join(format!("home/{number}")), vec![number; 1 << 20]).unwrap();
    }
    // Back and forth: 24 MiB each time, which fit only once.
    let (mut here, mut there) = (&a, &b);
    for turn in 0..6 {
        let (moved, undo) = (name(&format!("move-{turn}")), name(&format!("undo-{turn}")));
        here.snapshot(project, &moved).await.unwrap();
        let sent = here.send(project, &moved, &SendOptions::whole()).await.unwrap();
        there.receive(&sent.header, sent.reader).await.unwrap_or_else(|error| panic!("{turn}: {error:?}"));
        there.restore(project, &moved, &name("former")).await.unwrap();
        there.set_limit(project, Some(LIMIT)).await.unwrap();
        here.set_aside(project, &undo).await.unwrap();
        assert_eq!(here.set_aside(project, &undo).await.unwrap().name, undo, "it can be repeated");
        here.delete_snapshot(project, &moved).await.unwrap();
        there.delete_snapshot(project, &moved).await.unwrap();
        let left = here.usage(project).await.unwrap().charged_bytes;
        assert!(left < 1 << 20, "{turn}: {left} bytes are charged for what was set aside");
        let charged = there.usage(project).await.unwrap().charged_bytes;
        assert!((24 << 20..30 << 20).contains(&charged), "{turn}: {charged} bytes are charged");
        (here, there) = (there, here);
    }
    assert_eq!(a.snapshots(project).await.unwrap().len(), 3, "the undo is still there");
    for store in [&a, &b] {
        store.delete(project).await.unwrap();
    }
    no_groups_are_left(&a).await;
    no_groups_are_left(&b).await;
    drop((a, b, volumes));
}

/// Waits until the kernel has freed what was deleted, and all groups with it.
async fn no_groups_are_left(store: &Btrfs) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let trash = store.trash().await.unwrap();
        if (trash.volumes, trash.groups) == (0, 0) {
            assert_eq!(fs::read_dir(store.path().join("trash")).unwrap().count(), 0);
            return;
        }
        assert!(Instant::now() < deadline, "left in the trash: {trash:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn quota_groups_go_with_their_projects() {
    let f = fixture().await;
    for number in 0..3_u8 {
        let project = ProjectId::random();
        let live = f.a.create(project, &VolumeOptions::default()).await.unwrap().path.unwrap();
        fs::write(live.join("home/f"), vec![number; 1 << 20]).unwrap();
        f.a.snapshot(project, &name("one")).await.unwrap();
        fs::write(live.join("home/f"), vec![number + 1; 1 << 20]).unwrap();
        // What the first volume wrote outlives it, in a snapshot.
        f.a.restore(project, &name("one"), &name("two")).await.unwrap();
        // The first sync wakes the cleaner, the second waits for it.
        for what in ["filesystem", "subvolume"] {
            let synced = Command::new("btrfs").args([what, "sync"]).arg(f.a.path()).output().unwrap();
            assert!(synced.status.success(), "{synced:?}");
        }
        f.a.delete(project).await.unwrap();
    }
    no_groups_are_left(&f.a).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_project_that_did_not_come_leaves_nothing() {
    let f = fixture().await;
    let project = ProjectId::random();
    let live = f.a.create(project, &VolumeOptions::default()).await.unwrap().path.unwrap();
    fs::write(live.join("home/f"), vec![3; 1 << 20]).unwrap();
    f.a.snapshot(project, &name("one")).await.unwrap();
    let (header, bytes) = stream_of(&f.a, project, "one").await;
    let holder = f.b.path().join("snapshots").join(project.to_string());

    let cut = bytes[..bytes.len() / 2].to_vec();
    f.b.receive(&header, Box::pin(Cursor::new(cut))).await.unwrap_err();
    assert!(!holder.exists(), "after a stream that was cut");
    f.b.receive(&header, Box::pin(Cursor::new(bytes.clone()))).await.unwrap();
    f.b.delete_snapshot(project, &name("one")).await.unwrap();
    assert!(!holder.exists(), "after its only snapshot was deleted");
    f.b.receive(&header, Box::pin(Cursor::new(bytes.clone()))).await.unwrap();
    f.b.restore(project, &name("one"), &name("former")).await.unwrap();
    f.b.delete_snapshot(project, &name("one")).await.unwrap();
    assert!(holder.exists(), "there is a live volume");
    f.b.set_aside(project, &name("discarded")).await.unwrap();
    f.b.delete_snapshot(project, &name("discarded")).await.unwrap();
    assert!(!holder.exists(), "after what was staged was discarded");

    // Not from under a stream that comes.
    f.b.receive(&header, Box::pin(Cursor::new(bytes.clone()))).await.unwrap();
    let (mut feed, stream) = tokio::io::duplex(1 << 16);
    let second = cocalc_core::storage::SendHeader { name: name("one"), ..header.clone() };
    f.b.delete_snapshot(project, &name("one")).await.unwrap();
    let (store, expected) = (f.b.clone(), second.clone());
    let coming = tokio::spawn(async move { store.receive(&expected, Box::pin(stream)).await });
    let (first, rest) = bytes.split_at(bytes.len() / 2);
    tokio::io::AsyncWriteExt::write_all(&mut feed, first).await.unwrap();
    f.b.receive(&second, Box::pin(Cursor::new(b"garbage".to_vec()))).await.unwrap_err();
    assert!(holder.exists(), "a stream is coming");
    tokio::io::AsyncWriteExt::write_all(&mut feed, rest).await.unwrap();
    drop(feed);
    assert_eq!(coming.await.unwrap().unwrap().origin, header.origin);
    f.b.delete(project).await.unwrap();
    no_groups_are_left(&f.b).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_volume_takes_back_what_did_not_fit() {
    let root = tempfile::tempdir().unwrap();
    let big = volume(root.path(), "big");
    let small = Loopback::create(&root.path().join("s.img"), 256 << 20, &root.path().join("s")).unwrap();
    let (a, b) = (fresh(big.path()).await, fresh(small.path()).await);
    let (project, kept) = (ProjectId::random(), ProjectId::random());
    let live = a.create(project, &VolumeOptions::default()).await.unwrap().path.unwrap();
    for number in 0..300_u32 {
        fs::write(live.join(format!("home/{number}")), number.to_le_bytes().repeat(1 << 18)).unwrap();
    }
    a.snapshot(project, &name("big")).await.unwrap();
    let there = b.create(kept, &VolumeOptions::default()).await.unwrap().path.unwrap();
    fs::write(there.join("home/precious"), "kept").unwrap();
    let sent = a.send(project, &name("big"), &SendOptions::whole()).await.unwrap();
    let got = b.receive(&sent.header, sent.reader).await;
    assert!(matches!(got, Err(Error::NoSpace { what: "the host's volume", .. })), "{got:?}");
    assert!(b.snapshots(project).await.unwrap().is_empty());
    nothing_staged(&b);
    assert_eq!(fs::read_to_string(there.join("home/precious")).unwrap(), "kept");
    assert_eq!(a.snapshots(project).await.unwrap().len(), 1, "the source has it still");
}

#[tokio::test(flavor = "multi_thread")]
async fn opening_settles_what_was_cut_off() {
    let Fixture { a, b, volumes, root: _root } = fixture().await;
    let path = a.path().to_owned();
    let (undone, deleted) = (ProjectId::random(), ProjectId::random());
    let options = VolumeOptions::default();
    let live = a.create(undone, &options).await.unwrap();
    fs::write(live.path.as_ref().unwrap().join("home/f"), "x").unwrap();
    a.create(deleted, &options).await.unwrap();
    a.snapshot(deleted, &name("s")).await.unwrap();
    drop((a, b));

    let snapshots = path.join("snapshots").join(undone.to_string());
    // Cut between taking the snapshot and exchanging the volumes.
    btrfs(&[Path::new("snapshot"), Path::new("-r"), live.path.as_ref().unwrap(), &snapshots.join("former")]);
    let intent = |text: String| {
        fs::write(path.join("staging").join(format!("{}.intent", VolumeUuid::random())), text).unwrap();
    };
    intent(format!(r#"{{"intent":"replace","project":"{undone}","live":"{}","kept":"former"}}"#, live.uuid));
    // Cut in the middle of deleting.
    intent(format!(r#"{{"intent":"delete","project":"{deleted}"}}"#));
    // Cut while it was being written.
    intent(r#"{"intent":"del"#.to_owned());
    // Cut in the middle of receiving.
    let staging = path.join("staging").join(VolumeUuid::random().to_string());
    btrfs(&[Path::new("create"), &staging]);
    btrfs(&[Path::new("create"), &staging.join("inner")]);
    fs::write(staging.join("inner/f"), "x").unwrap();

    let store = Btrfs::open(&path).await.unwrap();
    nothing_staged(&store);
    assert_eq!(store.list().await.unwrap(), [live], "the live volume is what it was");
    assert!(store.snapshots(undone).await.unwrap().is_empty());
    assert!(!path.join("snapshots").join(deleted.to_string()).exists());
    drop(store);
    drop(volumes);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_survives_a_power_cut() {
    let root = tempfile::tempdir().unwrap();
    let source = volume(root.path(), "source");
    // A snapshot of the file system that holds the volume's file is what a
    // power cut would leave of it.
    let outer = Loopback::create(&root.path().join("o.img"), 3 << 30, &root.path().join("o")).unwrap();
    let disk = outer.path().join("disk");
    btrfs(&[Path::new("create"), &disk]);
    let inner = Loopback::create(&disk.join("inner.img"), 1 << 30, &root.path().join("inner")).unwrap();
    let (a, b) = (fresh(source.path()).await, fresh(inner.path()).await);

    let (project, cloned) = (ProjectId::random(), ProjectId::random());
    let live = a.create(project, &VolumeOptions::default()).await.unwrap().path.unwrap();
    for number in 0..2000_u32 {
        fs::write(live.join(format!("home/{number}")), number.to_le_bytes().repeat(500)).unwrap();
    }
    common::plant(&live);
    a.snapshot(project, &name("one")).await.unwrap();
    let expected = common::manifest(&a.snapshot_path(project, &name("one")).await.unwrap());
    let cut = |n: &str| -> PathBuf {
        let copy = outer.path().join(n);
        btrfs(&[Path::new("snapshot"), &disk, &copy]);
        copy.join("inner.img")
    };

    let sent = a.send(project, &name("one"), &SendOptions::whole()).await.unwrap();
    let received = b.receive(&sent.header, sent.reader).await.unwrap();
    let after_receive = cut("after-receive");
    let volume = b.restore(project, &name("one"), &name("former")).await.unwrap();
    let after_restore = cut("after-restore");
    b.clone_volume(project, &name("one"), cloned, &CloneOptions::default()).await.unwrap();
    let after_clone = cut("after-clone");
    b.delete(project).await.unwrap();
    let after_delete = cut("after-delete");

    for (image, what) in [
        (after_receive, "receive"),
        (after_restore, "restore"),
        (after_clone, "clone"),
        (after_delete, "delete"),
    ] {
        let mounted = Loopback::open(&image, &root.path().join(what)).unwrap();
        let store = Btrfs::open(mounted.path()).await.unwrap();
        if what == "delete" {
            assert!(store.snapshots(project).await.unwrap().is_empty(), "{what}");
            assert!(store.volume(project).await.is_err(), "{what}");
        } else {
            let kept = store.snapshots(project).await.unwrap();
            assert_eq!(kept.as_slice(), std::slice::from_ref(&received), "{what}");
            let path = store.snapshot_path(project, &name("one")).await.unwrap();
            assert_eq!(common::manifest(&path), expected, "{what}");
            assert_eq!(store.volume(project).await.is_ok(), what != "receive", "{what}");
        }
        if what == "restore" {
            assert_eq!(store.volume(project).await.unwrap().uuid, volume.uuid);
        }
        if what == "clone" || what == "delete" {
            let path = store.volume(cloned).await.unwrap().path.unwrap();
            assert_eq!(common::manifest(&path), expected, "{what}");
        }
        drop(store);
        mounted.close().unwrap();
    }
    drop((a, b));
    inner.close().unwrap();
    outer.close().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn only_our_own_volumes_are_opened() {
    let root = tempfile::tempdir().unwrap();
    let shm = tempfile::tempdir_in("/dev/shm").unwrap();
    assert!(matches!(Btrfs::initialize(shm.path()), Err(OpenError::NotBtrfs { .. })));
    assert!(!probe(shm.path()).unwrap().is_btrfs);

    let volume = volume(root.path(), "v");
    let path = volume.path();
    assert!(matches!(Btrfs::open(path).await, Err(OpenError::NotInitialized { .. })));
    assert!(!probe(path).unwrap().is_initialized);
    fs::write(path.join("thesis.tex"), "years of work").unwrap();
    assert!(matches!(Btrfs::initialize(path), Err(OpenError::UnknownData { .. })));
    assert!(matches!(Btrfs::open(path).await, Err(OpenError::UnknownData { .. })));
    assert_eq!(fs::read_dir(path).unwrap().count(), 1, "nothing was changed");
    fs::remove_file(path.join("thesis.tex")).unwrap();

    Btrfs::initialize(path).unwrap();
    Btrfs::initialize(path).expect("it can be repeated");
    let store = Btrfs::open(path).await.unwrap();
    assert!(matches!(Btrfs::open(path).await, Err(OpenError::InUse { .. })));
    let probed = probe(path).unwrap();
    assert!(probed.is_btrfs && probed.is_initialized && probed.free_bytes > 0);
    assert_eq!(probed.quotas, QuotaKind::Simple);
    assert!(store.free_bytes().unwrap() > 500 << 20);
    drop(store);
    fs::write(path.join(".cocalc-volume"), r#"{"layout":2,"id":"x"}"#).unwrap();
    assert!(matches!(Btrfs::open(path).await, Err(OpenError::UnknownLayout { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn images_are_imported_once_and_whole() {
    let f = fixture().await;
    let tree = f.root.path().join("image");
    fs::create_dir_all(tree.join("home")).unwrap();
    common::plant(&tree);
    fs::remove_file(tree.join("home/plain")).unwrap();
    // No archive holds a socket.
    fs::remove_file(tree.join("home/socket")).unwrap();
    let tar = f.root.path().join("image.tar");
    let status = Command::new("tar")
        .args([
            "--create",
            "--xattrs",
            "--xattrs-include=*",
            "--acls",
            "--format=pax",
            "--sparse",
            "--numeric-owner",
        ])
        .arg("--file")
        .arg(&tar)
        .arg("--directory")
        .arg(&tree)
        .arg(".")
        .status();
    assert!(status.unwrap().success());
    let limits = ImageLimits::default();
    let digest = f.a.import_image_file(&tar, &limits).await.unwrap();
    assert_eq!(f.a.import_image_file(&tar, &limits).await.unwrap(), digest, "it can be repeated");
    let stream = tokio::fs::File::open(&tar).await.unwrap();
    assert_eq!(f.a.import_image(Box::pin(stream), &limits).await.unwrap(), digest, "from a stream too");
    let images =
        async || f.a.images().await.unwrap().into_iter().map(|(digest, _)| digest).collect::<Vec<_>>();
    assert_eq!(images().await, [digest]);
    // What has no place in an image is not in it: a device, and what would mean
    // something to the overlay of a project.
    fs::remove_file(tree.join("home/null")).unwrap();
    rustix::fs::removexattr(tree.join("home/a-linked"), "trusted.overlay.opaque").unwrap();
    let path = f.a.image_path(&digest).await.unwrap();
    let (mut got, mut expected) = (common::manifest(&path), common::manifest(&tree));
    // The archive has no holes at its ends, tar keeps no time of the root, which
    // is ours, and a device has been removed from one directory here.
    for directory in [b"".as_slice(), b"home"] {
        got.remove(directory);
        expected.remove(directory);
    }
    assert_eq!(got, expected);
    assert!(fs::write(path.join("f"), "x").is_err(), "an image is read-only");

    let bytes = fs::read(&tar).unwrap();
    let end = bytes.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    for length in [0, 512, 700, end / 2, end, end.next_multiple_of(512)] {
        let cut = f.a.import_image(Box::pin(Cursor::new(bytes[..length].to_vec())), &limits).await;
        assert!(matches!(cut, Err(ImageError::BadArchive { .. })), "cut at {length}: {cut:?}");
    }
    let absent = ImageDigest::from_bytes([0; 32]);
    assert!(matches!(f.a.image_path(&absent).await, Err(ImageError::NotFound { .. })));
    assert_eq!(images().await, [digest]);
    nothing_staged(&f.a);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sender_that_fails_is_heard_and_a_dropped_one_is_ended() {
    let f = fixture().await;
    let project = ProjectId::random();
    let live = f.a.create(project, &VolumeOptions::default()).await.unwrap().path.unwrap();
    for number in 0..64_u8 {
        fs::write(live.join(format!("home/{number}")), vec![number; 1 << 20]).unwrap();
    }
    f.a.snapshot(project, &name("one")).await.unwrap();
    let sent = f.a.send(project, &name("one"), &SendOptions::whole()).await.unwrap();
    drop(sent);
    // While it is being sent, a snapshot cannot go; it must be able to soon.
    let deadline = Instant::now() + Duration::from_secs(120);
    while let Err(error) = f.a.delete_snapshot(project, &name("one")).await {
        assert!(Instant::now() < deadline, "the sender goes on: {error:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    drop(f.volumes);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_does_not_begin_a_stream_again_within_itself() {
    // `tgkill` of the C library, to the threads that send.
    const SIGNALS: &str = "import ctypes, sys, time\n\
        for _ in range(20):\n    \
            for thread in sys.argv[2:]: ctypes.CDLL(None).tgkill(int(sys.argv[1]), int(thread), 12)\n    \
            time.sleep(0.01)\n";
    let f = fixture().await;
    let project = ProjectId::random();
    let live = f.a.create(project, &VolumeOptions::default()).await.unwrap().path.unwrap();
    for number in 0..8_u8 {
        fs::write(live.join(format!("home/{number}")), vec![number; 1 << 20]).unwrap();
    }
    f.a.snapshot(project, &name("one")).await.unwrap();
    let (_, expected) = stream_of(&f.a, project, "one").await;

    let mut sent = f.a.send(project, &name("one"), &SendOptions::whole()).await.unwrap();
    let mut bytes = vec![0; 1 << 20];
    sent.reader.read_exact(&mut bytes).await.unwrap();
    let threads = || {
        let tasks = fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap());
        // Other threads end meanwhile.
        let name = |task: &fs::DirEntry| fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        let senders = tasks.filter(|task| name(task).trim() == "btrfs-send");
        senders.map(|task| task.file_name()).collect::<Vec<_>>()
    };
    let threads = threads();
    assert!(!threads.is_empty(), "it waits for room in the pipe");
    // SIGUSR2, which has a handler from now on.
    let _heard = signal(SignalKind::user_defined2()).unwrap();
    assert_eq!(SignalKind::user_defined2().as_raw_value(), 12);
    let mut child = tokio::process::Command::new("python3");
    let child = child.args(["-c", SIGNALS, &std::process::id().to_string()]).args(threads);
    assert!(child.status().await.unwrap().success());
    sent.reader.read_to_end(&mut bytes).await.unwrap();
    assert!(bytes == expected, "{} bytes, expected {}", bytes.len(), expected.len());
}

#[test]
fn loopback_volumes_are_found_again_by_their_file() {
    let root = tempfile::tempdir().unwrap();
    let (image, at) = (root.path().join("v with blank.img"), root.path().join("mount point"));
    let volume = Loopback::create(&image, 256 << 20, &at).unwrap();
    fs::write(volume.path().join("f"), "kept").unwrap();
    assert!(Loopback::create(&image, 256 << 20, &at).is_err(), "an existing file is not formatted");
    assert_eq!(loopback::devices_of(&image).unwrap().len(), 1);
    // As after kill -9: nobody unmounts.
    volume.keep();
    let again = Loopback::open(&image, &at).unwrap();
    assert_eq!(loopback::devices_of(&image).unwrap().len(), 1, "it is taken over");
    again.keep();
    loopback::release(&image).unwrap();
    loopback::release(&image).expect("it can be repeated");
    assert!(loopback::devices_of(&image).unwrap().is_empty());
    assert!(!at.join("f").exists());
    let volume = Loopback::open_or_create(&image, 256 << 20, &at).unwrap();
    assert_eq!(fs::read_to_string(volume.path().join("f")).unwrap(), "kept");
    let panicked = std::panic::catch_unwind(move || {
        let _volume = volume;
        panic!("with the volume in hand");
    });
    assert!(panicked.is_err());
    let deadline = Instant::now() + Duration::from_secs(10);
    while !loopback::devices_of(&image).unwrap().is_empty() {
        assert!(Instant::now() < deadline, "a panic leaves the device attached");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// An attribute of a command of version 1.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes(), &u16::try_from(value.len()).unwrap().to_le_bytes(), value].concat()
}

/// Streams that first make something of which they then take advantage: what
/// applies them must not follow it, open it or wait for it.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_stream_has_made_leads_it_nowhere() {
    const PATH: u16 = 15;
    let f = fixture().await;
    let outside = tempfile::tempdir().unwrap();
    let canary = outside.path().join("canary");
    fs::write(&canary, "untouched").unwrap();
    let before = common::manifest(outside.path());
    let project = ProjectId::random();
    let live = f.a.create(project, &VolumeOptions::default()).await.unwrap().path.unwrap();
    fs::write(live.join("home/file"), vec![5; 100_000]).unwrap();
    f.a.snapshot(project, &name("one")).await.unwrap();
    let (header, honest) = stream_of(&f.a, project, "one").await;

    let number = |kind, number: u64| attribute(kind, &number.to_le_bytes());
    let path = |path: &str| attribute(PATH, path.as_bytes());
    let link = |at: &str, to: &Path| {
        (8, [path(at), number(3, 900), attribute(17, to.to_str().unwrap().as_bytes())].concat())
    };
    let (to_file, to_directory) = (link("l", &canary), link("d", outside.path()));
    let fifo = (6, [path("p"), number(3, 901), number(8, 0), number(5, 0o010_600)].concat());
    // The first loop device.
    let device = (5, [path("b"), number(3, 902), number(8, 7 << 8), number(5, 0o060_600)].concat());
    let write = |at: &str| (15, [path(at), number(18, 0), attribute(19, b"escaped")].concat());
    let from = |at: &str| {
        let uuid = attribute(20, header.origin.as_bytes());
        let clone = [path("home/file"), number(18, 0), number(24, 4096), uuid, number(21, 0)].concat();
        (16, [clone, attribute(22, at.as_bytes()), number(23, 0)].concat())
    };
    let to = |at: &str| attribute(16, at.as_bytes());
    let cases = vec![
        ("writes through a link", vec![to_file.clone(), write("l")]),
        ("writes below a linked directory", vec![to_directory.clone(), write("d/canary")]),
        ("cuts through a link", vec![to_file.clone(), (17, [path("l"), number(4, 0)].concat())]),
        ("opens a file through a link", vec![to_file.clone(), (18, [path("l"), number(5, 0o777)].concat())]),
        (
            "makes a file in a linked directory",
            vec![to_directory.clone(), (3, [path("d/x"), number(3, 903)].concat())],
        ),
        ("removes from a linked directory", vec![to_directory.clone(), (11, path("d/canary"))]),
        (
            "moves into a linked directory",
            vec![to_directory.clone(), (9, [path("home/file"), to("d/x")].concat())],
        ),
        (
            "links out of a linked directory",
            vec![to_directory.clone(), (10, [path("home/got"), attribute(17, b"d/canary")].concat())],
        ),
        (
            "marks a file in a linked directory",
            vec![
                to_directory.clone(),
                (13, [path("d/canary"), attribute(13, b"user.marked"), attribute(14, b"x")].concat()),
            ],
        ),
        ("clones through a link", vec![to_file.clone(), from("l")]),
        ("clones from a pipe", vec![fifo.clone(), from("p")]),
        ("writes into a pipe", vec![fifo, write("p")]),
        ("writes into a device", vec![device, write("b")]),
        ("removes its root", vec![(12, path("."))]),
        ("names nothing", vec![write("")]),
        (
            "has a time that is none",
            vec![(20, [path("home/file"), attribute(11, &[255; 12]), attribute(10, &[255; 12])].concat())],
        ),
        ("has an attribute too few", vec![(15, [path("home/file"), number(18, 0)].concat())]),
        ("has a number too long", vec![(17, [path("home/file"), attribute(4, &[1; 9])].concat())]),
        ("makes a file twice", vec![(3, [path("home/file"), number(3, 904)].concat())]),
    ];
    for (what, commands) in cases {
        let crafted = craft(&honest, |command, body| {
            let added = if command == 21 { commands.clone() } else { vec![] };
            [added, vec![(command, body)]].concat()
        });
        let got = f.b.receive(&header, Box::pin(Cursor::new(crafted))).await;
        assert!(matches!(got, Err(Error::BadStream { .. })), "{what}: {got:?}");
        assert!(f.b.snapshots(project).await.unwrap().is_empty(), "{what}");
        nothing_staged(&f.b);
        assert_eq!(common::manifest(outside.path()), before, "{what}");
    }
    // What is about a link itself is about nothing else.
    let crafted = craft(&honest, |command, body| {
        let added = if command == 21 {
            let times = [path("l"), attribute(11, &[1; 12]), attribute(10, &[1; 12])].concat();
            let owner = [path("l"), number(6, 4242), number(7, 4242)].concat();
            let mark = [path("l"), attribute(13, b"trusted.marked"), attribute(14, b"x")].concat();
            vec![to_file.clone(), (20, times), (19, owner), (13, mark)]
        } else {
            vec![]
        };
        [added, vec![(command, body)]].concat()
    });
    f.b.receive(&header, Box::pin(Cursor::new(crafted))).await.unwrap();
    assert_eq!(common::manifest(outside.path()), before);
    let got = f.b.snapshot_path(project, &name("one")).await.unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&fs::symlink_metadata(got.join("l")).unwrap()), 4242);
}
