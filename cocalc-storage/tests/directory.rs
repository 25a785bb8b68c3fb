//! Directory storage: the contract, what it keeps of files, and hostile
//! streams. Runs as any user.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests report by panicking, in helpers too")]

mod common;

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
    sync::Arc,
};

use cocalc_core::{
    ids::{ProjectId, VolumeUuid},
    storage::{Error, SendOptions, Storage, VolumeOptions},
};
use cocalc_storage::Directory;
use cocalc_testkit::storage::{FilesHarness, Host, agrees_with_model, regressions, scripts, storage};
use proptest::{prelude::*, test_runner::TestRunner};
use tokio::io::AsyncReadExt as _;

async fn two(root: &Path) -> (Directory, Directory) {
    (Directory::open(root.join("a")).await.unwrap(), Directory::open(root.join("b")).await.unwrap())
}

fn harness(a: &Directory, b: &Directory) -> FilesHarness {
    let roots = [a.path().to_owned(), b.path().to_owned()];
    FilesHarness::new(Arc::new(a.clone()), Arc::new(b.clone()), move |host: Host, project, name| {
        let project = roots[host as usize].join("projects").join(project.to_string());
        project.join("snapshots").join(name.as_str()).join("tree")
    })
}

#[tokio::test]
async fn directory_keeps_the_contract() {
    let root = tempfile::tempdir().unwrap();
    let (a, b) = two(root.path()).await;
    let outside = root.path().join("outside");
    fs::create_dir(&outside).unwrap();
    storage(&harness(&a, &b).outside([outside])).await;
    for store in [&a, &b] {
        for place in ["staging", "trash", "projects"] {
            let left: Vec<_> = fs::read_dir(store.path().join(place)).unwrap().collect();
            assert!(left.is_empty() || place == "projects", "{place} holds {left:?}");
        }
    }
}

#[test]
fn directory_agrees_with_the_model() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let root = tempfile::tempdir().unwrap();
    let (a, b) = runtime.block_on(two(root.path()));
    let harness = harness(&a, &b);
    for (about, script) in regressions() {
        println!("{about}");
        runtime.block_on(agrees_with_model(&harness, &script));
    }
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(12) };
    TestRunner::new(config)
        .run(&scripts(24), |script| {
            runtime.block_on(agrees_with_model(&harness, &script));
            Ok(())
        })
        .unwrap();
}

#[tokio::test]
async fn a_stream_carries_everything() {
    let root = tempfile::tempdir().unwrap();
    let (a, b) = two(root.path()).await;
    let project = ProjectId::random();
    let volume = a.create(project, &VolumeOptions::default()).await.unwrap();
    let live = volume.path.unwrap();
    common::plant(&live);
    let name = "one".parse().unwrap();
    a.snapshot(project, &name).await.unwrap();
    let expected = common::manifest(&live);
    assert_eq!(common::manifest(&a.snapshot_path(project, &name).await.unwrap()), expected, "a snapshot");
    let sent = a.send(project, &name, &SendOptions::whole()).await.unwrap();
    b.receive(&sent.header, sent.reader).await.unwrap();
    assert_eq!(common::manifest(&b.snapshot_path(project, &name).await.unwrap()), expected, "received");
    let volume = b.restore(project, &name, &"former".parse().unwrap()).await.unwrap();
    assert_eq!(common::manifest(&volume.path.unwrap()), expected, "brought to life");
    // Read-only directories are in nobody's way.
    a.delete(project).await.unwrap();
    b.delete(project).await.unwrap();
}

#[tokio::test]
async fn hostile_streams_write_nothing_outside() {
    let root = tempfile::tempdir().unwrap();
    let (a, b) = two(root.path()).await;
    let project = ProjectId::random();
    let volume = a.create(project, &VolumeOptions::default()).await.unwrap();
    let name = "one".parse().unwrap();
    // Names of equal length are swapped in the stream, and its digest mended.
    let outside = root.path().join("outside");
    fs::create_dir(&outside).unwrap();
    let live = volume.path.unwrap();
    symlink(&outside, live.join("home/aaaa")).unwrap();
    fs::create_dir(live.join("home/bbbb")).unwrap();
    fs::write(live.join("home/bbbb/planted"), "x").unwrap();
    a.snapshot(project, &name).await.unwrap();
    let mut sent = a.send(project, &name, &SendOptions::whole()).await.unwrap();
    let mut bytes = Vec::new();
    sent.reader.read_to_end(&mut bytes).await.unwrap();
    for (from, to) in [
        ("home/bbbb/planted", "home/aaaa/planted"),
        ("home/bbbb/planted", "../../../../planted"),
        ("home/bbbb/planted", "/tmp/coc/pp/planted"),
        ("home/bbbb/planted", "home/../../planted"),
    ] {
        let crafted = mend(&bytes, from, to);
        let got = b.receive(&sent.header, Box::pin(std::io::Cursor::new(crafted))).await;
        assert!(matches!(got, Err(Error::BadStream { .. })), "{to}: {got:?}");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "{to}");
        assert!(b.snapshots(project).await.unwrap().is_empty());
        assert_eq!(fs::read_dir(b.path().join("staging")).unwrap().count(), 0, "{to}");
    }
    b.receive(&sent.header, Box::pin(std::io::Cursor::new(bytes))).await.expect("the honest one is taken");
}

/// Replaces one path in a stream, with its length, and makes the digest right.
fn mend(bytes: &[u8], from: &str, to: &str) -> Vec<u8> {
    use sha2::{Digest as _, Sha256};
    let field = |path: &str| [&u32::try_from(path.len()).unwrap().to_be_bytes(), path.as_bytes()].concat();
    let (from, to) = (field(from), field(to));
    let body = &bytes[..bytes.len() - 32];
    let at = body.windows(from.len()).position(|window| window == from).expect("the path is in the stream");
    let body = [&body[..at], &to, &body[at + from.len()..]].concat();
    let digest = Sha256::digest(&body);
    [body.as_slice(), digest.as_slice()].concat()
}

#[tokio::test]
async fn opening_empties_staging_and_refuses_what_is_not_ours() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("store");
    let project = ProjectId::random();
    {
        let store = Directory::open(&path).await.unwrap();
        store.create(project, &VolumeOptions::default()).await.unwrap();
        let again = Directory::open(&path).await;
        assert!(again.is_err(), "a second opening is refused");
    }
    let cut = path.join("staging").join(VolumeUuid::random().to_string());
    fs::create_dir_all(cut.join("tree/read-only")).unwrap();
    fs::write(cut.join("tree/read-only/f"), "x").unwrap();
    fs::set_permissions(cut.join("tree/read-only"), fs::Permissions::from_mode(0o500)).unwrap();
    let store = Directory::open(&path).await.unwrap();
    assert_eq!(fs::read_dir(path.join("staging")).unwrap().count(), 0);
    assert_eq!(store.list().await.unwrap().len(), 1);
    drop(store);
    fs::write(path.join("somebody's thesis"), "x").unwrap();
    assert!(Directory::open(&path).await.is_err(), "unknown data is refused");
    assert!(path.join("somebody's thesis").exists());
}
