//! Repositories in S3 and in Google Cloud Storage, and what clouds do to them.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests report by panicking, in helpers too")]

mod common;

use std::{fs, time::Duration};

use cocalc_backup::{Bounds, Gcs, GcsCredentials, Location, Rustic, S3, Secret};
use cocalc_core::{
    backups::{Backups, Error},
    ids::{ProjectId, TreePath},
};
use cocalc_testkit::backups::{Subject, differences, essentials, facts, plant};
use common::{
    Memory,
    emulators::{self, BUCKET},
    proxy::{Fault, Proxy, Request, Store},
    rustic,
};
use tempfile::TempDir;

fn s3(root: &TempDir, url: String, bounds: Bounds) -> Rustic {
    rustic(root.path(), bounds, move |name, _| {
        Location::S3(S3 {
            bucket: BUCKET.into(),
            prefix: format!("projects/{name}"),
            region: "us-east-1".into(),
            endpoint: Some(url.clone()),
            access_key_id: "test".into(),
            secret_access_key: Secret::new("test"),
            session_token: Some(Secret::new("token")),
        })
    })
}

fn gcs(root: &TempDir, url: String, bounds: Bounds) -> Rustic {
    rustic(root.path(), bounds, move |name, _| {
        Location::Gcs(Gcs {
            bucket: BUCKET.into(),
            prefix: format!("projects/{name}"),
            endpoint: Some(url.clone()),
            credentials: GcsCredentials::Anonymous,
        })
    })
}

#[tokio::test]
async fn s3_keeps_and_returns_what_it_is_given() {
    let (keys, scratch, store) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), emulators::s3());
    let memory = Memory::mount(scratch.path(), 512);
    essentials(&s3(&keys, store.url(), Bounds::default()), &memory.0).await;
}

#[tokio::test]
async fn gcs_keeps_and_returns_what_it_is_given() {
    let (keys, scratch, files) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let store = emulators::gcs(files.path());
    let proxy = Proxy::start(Store::Gcs, store.port, |_| Fault::None);
    let memory = Memory::mount(scratch.path(), 512);
    essentials(&gcs(&keys, proxy.url(), Bounds::default()), &memory.0).await;
}

/// Every other request fails, each in another way.
fn storm(request: &Request) -> Fault {
    use Fault::{Broken, Busy, None, Reset, Slow, Truncated};
    [None, Broken, None, Busy, None, Truncated, None, Slow, None, Reset][request.number % 10]
}

async fn outlives_a_storm(backups: &Rustic, proxy: &Proxy) {
    let scratch = tempfile::tempdir().unwrap();
    let _memory = Memory::mount(scratch.path(), 512);
    let (tree, target) = (scratch.path().join("tree"), scratch.path().join("target"));
    plant(&tree, 1);
    fs::create_dir(&target).unwrap();
    let subject = Subject::new(backups, scratch.path());
    let project = ProjectId::random();
    let backup = backups.back_up(&subject.source(project, &tree, None), &|_| ()).await.unwrap();
    assert_eq!(backups.list(project).await.unwrap(), std::slice::from_ref(&backup));
    backups.restore(project, &backup.id, &TreePath::root(), &target, &|_| ()).await.unwrap();
    let differences = differences(&facts(&tree), &facts(&target));
    assert!(differences.is_empty(), "{differences:#?}");
    assert!(proxy.requests() > 20, "the storm was not met: {} requests", proxy.requests());
}

#[tokio::test]
async fn s3_that_fails_every_other_time_still_keeps_and_returns() {
    let (keys, store) = (tempfile::tempdir().unwrap(), emulators::s3());
    let proxy = Proxy::start(Store::S3, store.port, storm);
    outlives_a_storm(&s3(&keys, proxy.url(), Bounds::default()), &proxy).await;
}

#[tokio::test]
async fn gcs_that_fails_every_other_time_still_keeps_and_returns() {
    let (keys, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let store = emulators::gcs(files.path());
    let proxy = Proxy::start(Store::Gcs, store.port, storm);
    outlives_a_storm(&gcs(&keys, proxy.url(), Bounds::default()), &proxy).await;
}

#[tokio::test]
async fn failures_that_last_are_told_in_time_and_what_was_sent_stays() {
    let (keys, scratch, store) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), emulators::s3());
    let tree = scratch.path().join("tree");
    plant(&tree, 2);
    let proxy = Proxy::start(Store::S3, store.port, |_| Fault::None);
    let bounds = Bounds {
        retry_max: Duration::from_secs(2),
        request_max: Duration::from_millis(1500),
        ..Bounds::default()
    };
    let backups = s3(&keys, proxy.url(), bounds);
    let subject = Subject::new(&backups, scratch.path());
    let project = ProjectId::random();
    let first = backups.back_up(&subject.source(project, &tree, None), &|_| ()).await.unwrap();
    fs::write(tree.join("home/more"), vec![5; 1 << 20]).unwrap();

    for fault in [Fault::Broken, Fault::Busy, Fault::Reset, Fault::Silent, Fault::Expired] {
        // In the middle: the repository is open, and something was written.
        proxy.plan(move |request| if request.number < 6 { Fault::None } else { fault });
        let source = subject.source(project, &tree, Some(&first));
        let failed = backups.back_up(&source, &|_| ()).await;
        match fault {
            Fault::Expired => assert!(matches!(failed, Err(Error::Denied { .. })), "{fault:?}: {failed:?}"),
            _ => assert!(matches!(failed, Err(Error::Unavailable { .. })), "{fault:?}: {failed:?}"),
        }
        proxy.plan(|_| Fault::None);
        assert_eq!(backups.list(project).await.unwrap(), std::slice::from_ref(&first), "{fault:?}");
    }
    // With credentials again, it goes on.
    let second = backups.back_up(&subject.source(project, &tree, Some(&first)), &|_| ()).await.unwrap();
    assert_eq!(backups.list(project).await.unwrap(), [first, second.clone()]);
    let target = scratch.path().join("target");
    fs::create_dir(&target).unwrap();
    backups.restore(project, &second.id, &TreePath::root(), &target, &|_| ()).await.unwrap();
    let differences = differences(&facts(&tree), &facts(&target));
    assert!(differences.is_empty(), "{differences:#?}");
}
