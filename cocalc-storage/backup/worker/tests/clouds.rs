//! Repositories in S3 and in Google Cloud Storage, and what clouds do to them.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests report by panicking, in helpers too")]

mod common;

use std::{
    fs,
    path::Path,
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use cocalc_backup::{
    Access, Bounds, Gcs, GcsCredentials, Location, OnePerProject, Place, Places, Repositories, Repository,
    RepositoryName, Rustic, S3, S3Access, S3Keys, S3Place, Secret, WrappingKey, WrappingKeys,
};
use cocalc_core::{
    BoxError,
    backups::{Backups, CheckOptions, Error, PruneOptions},
    ids::{ProjectId, TreePath},
};
use cocalc_testkit::backups::{Subject, differences, essentials, facts, plant};
use common::{
    Memory, by,
    emulators::{self, BUCKET},
    over,
    proxy::{Fault, Proxy, Request, Store},
    rustic, small, worker_after,
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

/// A bucket behind a proxy, and what is given out for a repository in it.
fn bucket(url: String, token: &str) -> S3 {
    S3 {
        bucket: BUCKET.into(),
        prefix: "repository".into(),
        region: "us-east-1".into(),
        endpoint: Some(url),
        access_key_id: "test".into(),
        secret_access_key: Secret::new("test"),
        session_token: Some(Secret::new(token)),
    }
}

/// Gives out the token that is valid now.
#[derive(Debug)]
struct Renewing {
    keys: OnePerProject,
    url: String,
    valid: Arc<AtomicU64>,
    asked: AtomicU64,
}

#[async_trait]
impl Repositories for Renewing {
    async fn repository(&self, project: ProjectId, access: Access) -> Result<Repository, BoxError> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let token = format!("token-{}", self.valid.load(Ordering::Acquire));
        let location = Location::S3(bucket(self.url.clone(), &token));
        Ok(Repository { location, ..self.keys.repository(project, access).await? })
    }

    async fn erased(&self, _: ProjectId) -> Result<(), BoxError> {
        Ok(())
    }
}

#[tokio::test]
async fn credentials_that_run_out_in_the_middle_are_replaced_and_the_call_goes_on() {
    let (root, store) = (tempfile::tempdir().unwrap(), emulators::s3());
    let valid = Arc::new(AtomicU64::new(0));
    let (uses, current) = (Mutex::new(0), valid.clone());
    // Each token is good for five requests.
    let proxy = Proxy::start(Store::S3, store.port, move |request| {
        let mut uses = uses.lock().unwrap();
        if request.token != Some(format!("token-{}", current.load(Ordering::Acquire))) {
            return Fault::Expired;
        }
        *uses += 1;
        if *uses == 5 {
            *uses = 0;
            current.fetch_add(1, Ordering::AcqRel);
        }
        Fault::None
    });
    let wrapping = WrappingKeys::new(WrappingKey::generate("test").unwrap());
    let keys = OnePerProject::in_directory(root.path(), wrapping, "/nonexistent");
    let renewing =
        Arc::new(Renewing { keys, url: proxy.url(), valid: valid.clone(), asked: AtomicU64::new(0) });
    let bounds = Bounds { retry_max: Duration::from_secs(10), ..Bounds::default() };
    let backups = over(renewing.clone(), bounds);
    let (tree, target) = (root.path().join("tree"), root.path().join("target"));
    plant(&tree, 3);
    fs::create_dir(&target).unwrap();
    let subject = Subject::new(&backups, root.path());
    let project = ProjectId::random();
    let backup = backups.back_up(&subject.source(project, &tree, None), &|_| ()).await.unwrap();
    backups.restore(project, &backup.id, &TreePath::root(), &target, &|_| ()).await.unwrap();
    let differences = differences(&facts(&tree), &facts(&target));
    assert!(differences.is_empty(), "{differences:#?}");
    let (asked, tokens) = (renewing.asked.load(Ordering::Relaxed), valid.load(Ordering::Acquire));
    assert!(tokens >= 3 && asked >= tokens, "{asked} questions for {tokens} tokens");

    // When the caller has none that are valid either, that is what it is told, and
    // it was asked twice: once before, once because of the refusal.
    let before = renewing.asked.load(Ordering::Relaxed);
    proxy.plan(|_| Fault::Expired);
    let refused = backups.list(project).await;
    assert!(matches!(refused, Err(Error::Denied { .. })), "{refused:?}");
    assert_eq!(renewing.asked.load(Ordering::Relaxed), before + 2);
}

#[tokio::test]
async fn what_appends_needs_no_right_to_change_or_delete() {
    let (keys, scratch, store) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), emulators::s3());
    let append_only = |request: &Request| match request.method.as_str() {
        "GET" | "HEAD" => Fault::None,
        "PUT" if request.only_new => Fault::None,
        _ => Fault::Forbidden,
    };
    let proxy = Proxy::start(Store::S3, store.port, append_only);
    let backups = s3(&keys, proxy.url(), Bounds::default());
    let subject = Subject::new(&backups, scratch.path());
    let (project, tree) = (ProjectId::random(), scratch.path().join("tree"));
    small(&tree, 1);
    let first = backups.back_up(&subject.source(project, &tree, None), &|_| ()).await.unwrap();
    small(&tree, 2);
    let second = backups.back_up(&subject.source(project, &tree, Some(&first)), &|_| ()).await.unwrap();
    // The same again, all of which is there.
    backups.back_up(&subject.source(project, &tree, None), &|_| ()).await.unwrap();
    let listed = backups.list(project).await.unwrap();
    for refused in [
        backups.forget(project, std::slice::from_ref(&second.id)).await.err(),
        backups.prune(project, &PruneOptions::default()).await.err(),
        backups.erase(project).await.err(),
    ] {
        assert!(matches!(refused, Some(Error::Denied { .. })), "{refused:?}");
    }
    assert_eq!(backups.list(project).await.unwrap(), listed);
    let thorough = CheckOptions { read_data: true, ..CheckOptions::default() };
    assert!(backups.check(project, &thorough).await.unwrap().is_sound());
    proxy.plan(|_| Fault::None);
    backups.erase(project).await.unwrap();
}

#[tokio::test]
async fn a_store_that_lies_is_caught() {
    let (keys, scratch, store) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), emulators::s3());
    let proxy = Proxy::start(Store::S3, store.port, |_| Fault::None);
    let bounds = Bounds { retry_max: Duration::from_secs(1), ..Bounds::default() };
    let backups = s3(&keys, proxy.url(), bounds);
    let subject = Subject::new(&backups, scratch.path());
    let (project, tree) = (ProjectId::random(), scratch.path().join("tree"));
    small(&tree, 1);
    let first = backups.back_up(&subject.source(project, &tree, None), &|_| ()).await.unwrap();
    let as_was = facts(&tree);
    small(&tree, 2);
    // It says that it has kept what it has not: a pack, or an index.
    for kind in ["/data/", "/index/"] {
        proxy.plan(move |request| if request.path.contains(kind) { Fault::Forgetful } else { Fault::None });
        let failed = backups.back_up(&subject.source(project, &tree, Some(&first)), &|_| ()).await;
        assert!(matches!(failed, Err(Error::Unavailable { .. })), "{kind}: {failed:?}");
        proxy.plan(|_| Fault::None);
        assert_eq!(backups.list(project).await.unwrap(), std::slice::from_ref(&first), "{kind}");
    }
    // It gives out what it was not given. No wrong byte comes out, ever.
    for kind in ["/data/", "/index/", "/snapshots/", "/config"] {
        proxy.plan(move |request| {
            let lies = request.method == "GET" && request.path.contains(kind) && !request.path.contains('?');
            if lies { Fault::Changed } else { Fault::None }
        });
        let target = tempfile::tempdir_in(scratch.path()).unwrap();
        let restored = backups.restore(project, &first.id, &TreePath::root(), target.path(), &|_| ()).await;
        match restored {
            Ok(_) => assert!(differences(&as_was, &facts(target.path())).is_empty(), "{kind}"),
            Err(error) => {
                assert!(matches!(error, Error::Damaged { .. } | Error::WrongKey { .. }), "{kind}: {error:?}")
            }
        }
    }
    proxy.plan(|_| Fault::None);
    let target = tempfile::tempdir_in(scratch.path()).unwrap();
    backups.restore(project, &first.id, &TreePath::root(), target.path(), &|_| ()).await.unwrap();
    assert!(differences(&as_was, &facts(target.path())).is_empty());
}

#[tokio::test]
async fn a_restore_that_fails_at_any_request_says_so_and_is_done_again() {
    let (keys, scratch, store) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), emulators::s3());
    let proxy = Proxy::start(Store::S3, store.port, |_| Fault::None);
    let backups = s3(&keys, proxy.url(), Bounds::default());
    let subject = Subject::new(&backups, scratch.path());
    let (project, tree) = (ProjectId::random(), scratch.path().join("tree"));
    small(&tree, 1);
    let backup = backups.back_up(&subject.source(project, &tree, None), &|_| ()).await.unwrap();
    for failing in 0..100 {
        proxy.plan(move |request| if request.number >= failing { Fault::Forbidden } else { Fault::None });
        let target = tempfile::tempdir_in(scratch.path()).unwrap();
        match backups.restore(project, &backup.id, &TreePath::root(), target.path(), &|_| ()).await {
            Err(error) => assert!(matches!(error, Error::Denied { .. }), "request {failing}: {error:?}"),
            Ok(_) => {
                assert!(failing >= 4, "{failing} requests restore it?");
                assert!(differences(&facts(&tree), &facts(target.path())).is_empty());
                return;
            }
        }
    }
    panic!("a restore has no end");
}

#[tokio::test]
async fn a_clock_that_is_wrong_prunes_nothing() {
    let (root, store) = (tempfile::tempdir().unwrap(), emulators::s3());
    let wrapping = WrappingKeys::new(WrappingKey::generate("test").unwrap());
    let in_bucket = {
        let url = store.url();
        move |name: RepositoryName, _: Access| {
            Location::S3(S3 { prefix: name.to_string(), ..bucket(url.clone(), "token") })
        }
    };
    let on_disk = root.path().join("repositories");
    fs::create_dir(&on_disk).unwrap();
    let places: [Arc<dyn Repositories>; 2] = [
        Arc::new(OnePerProject::new(root.path(), wrapping.clone(), in_bucket)),
        Arc::new(OnePerProject::in_directory(root.path(), wrapping, on_disk)),
    ];
    let tree = root.path().join("tree");
    small(&tree, 1);
    for keys in places {
        let right = over(keys.clone(), Bounds::default());
        for shift in ["+3d", "-3d"] {
            let project = ProjectId::random();
            let before = format!(
                "LD_PRELOAD=$(ls /usr/lib/*/faketime/libfaketime.so.1) FAKETIME={shift} \
                 FAKETIME_DONT_FAKE_MONOTONIC=1"
            );
            let wrong = by(&worker_after(root.path(), "wrong", &before), keys.clone(), Bounds::default());
            let subject = Subject::new(&wrong, root.path());
            let first = wrong.back_up(&subject.source(project, &tree, None), &|_| ()).await.unwrap();
            right.forget(project, std::slice::from_ref(&first.id)).await.unwrap();
            // By the right clock it is marked, unless it is from the future; a wrong
            // one neither marks nor deletes.
            let marked = right.prune(project, &PruneOptions::default()).await.unwrap();
            assert_eq!(marked.freed_bytes, 0, "{shift}");
            assert_eq!(marked.marked_bytes > 0, shift == "-3d", "{shift}: {marked:?}");
            let refused = wrong.prune(project, &PruneOptions::default()).await;
            let Err(Error::Invalid { reason, .. }) = &refused else { panic!("{shift}: {refused:?}") };
            assert!(reason.contains("clock"), "{reason}");
            // What was marked is there for a backup that counts on it.
            let second = right.back_up(&subject.source(project, &tree, None), &|_| ()).await.unwrap();
            right.prune(project, &PruneOptions::default()).await.unwrap();
            let target = tempfile::tempdir_in(root.path()).unwrap();
            let top = TreePath::root();
            wrong.restore(project, &second.id, &top, target.path(), &|_| ()).await.unwrap();
            assert!(differences(&facts(&tree), &facts(target.path())).is_empty());
        }
    }
}

#[tokio::test]
async fn stock_restic_opens_a_bucket_with_the_newest_escrow_file_only() {
    let (root, store) = (tempfile::tempdir().unwrap(), emulators::s3());
    let wrapping = WrappingKeys::new(WrappingKey::generate("test").unwrap());
    let url = store.url();
    let place = move |_: RepositoryName, _: Access| Location::S3(bucket(url.clone(), "token"));
    let keys = Arc::new(OnePerProject::new(root.path(), wrapping, place));
    let backups = over(keys.clone(), Bounds::default());
    let subject = Subject::new(&backups, root.path());
    let (project, tree) = (ProjectId::random(), root.path().join("tree"));
    small(&tree, 1);
    let first = backups.back_up(&subject.source(project, &tree, None), &|_| ()).await.unwrap();
    let former = keys.escrow(project).await.unwrap();
    keys.rotate_password(project, &backups).await.unwrap();
    let escrow = keys.escrow(project).await.unwrap();
    // What is not CoCalc's goes on.
    let second = backups.back_up(&subject.source(project, &tree, Some(&first)), &|_| ()).await.unwrap();
    assert_eq!(second.files_read, 0);
    let target = root.path().join("restored");
    let restic = |escrow: &Secret, command: &str| {
        let file = root.path().join("escrow");
        fs::write(&file, escrow.expose()).unwrap();
        let script = format!("set -a; . {}; exec restic --no-cache {command}", file.display());
        let mut restic = Command::new("sh");
        restic.args(["-c", &script]).env_clear().env("PATH", "/usr/bin:/bin").env("HOME", "/nonexistent");
        restic.env("AWS_ACCESS_KEY_ID", "test").env("AWS_SECRET_ACCESS_KEY", "test").output().unwrap()
    };
    for command in ["check --read-data".into(), format!("restore latest --target {}", target.display())] {
        let done = restic(&escrow, &command);
        assert!(done.status.success(), "restic {command}: {}", String::from_utf8_lossy(&done.stderr));
    }
    let noise = |root: &Path| fs::read(root.join("home/noise")).unwrap();
    assert_eq!(noise(&target.join("project")), noise(&tree));
    let refused = restic(&former, "snapshots");
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("wrong password"), "{said}");
}

#[tokio::test]
async fn a_role_is_assumed_for_each_repository() {
    let (root, store) = (tempfile::tempdir().unwrap(), emulators::s3());
    let seen = Arc::new(Mutex::new(Vec::new()));
    let note = seen.clone();
    let proxy = Proxy::start(Store::S3, store.port, move |request| {
        note.lock().unwrap().push(request.clone());
        Fault::None
    });
    let place = Place::S3(S3Place {
        bucket: BUCKET.into(),
        prefix: "cocalc".into(),
        region: "us-east-1".into(),
        endpoint: Some(proxy.url()),
        credentials: S3Access::Role {
            keys: S3Keys { access_key_id: "master".into(), secret_access_key: Secret::new("secret") },
            role_arn: "arn:aws:iam::123456789012:role/backups".into(),
            sts_endpoint: Some(store.url()),
            life_secs: 900,
        },
    });
    let worker = env!("CARGO_BIN_EXE_cocalc-backup-worker").into();
    let minter = cocalc_backup::Minter::new(place, Some(worker), Bounds::default()).unwrap();
    let project = ProjectId::random();
    let (location, expires) = minter.mint(project.into(), Access::Append).await.unwrap();
    let Location::S3(given) = &location else { panic!("{location:?}") };
    assert_eq!(given.prefix, format!("cocalc/{project}"));
    assert_ne!(given.access_key_id, "master");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis();
    let life = expires.unwrap().millis() - i64::try_from(now).unwrap();
    assert!(life > 600_000 && life <= 901_000, "{life} ms");
    // They work, and the master's own key is shown to the store by nobody.
    let wrapping = WrappingKeys::new(WrappingKey::generate("test").unwrap());
    let backups = over(Arc::new(OnePerProject::new(root.path(), wrapping, minter)), Bounds::default());
    let subject = Subject::new(&backups, root.path());
    let tree = root.path().join("tree");
    small(&tree, 1);
    let backup = backups.back_up(&subject.source(project, &tree, None), &|_| ()).await.unwrap();
    assert_eq!(backups.list(project).await.unwrap(), [backup]);
    let seen = seen.lock().unwrap();
    assert!(seen.len() > 5 && seen.iter().all(|request| request.token.is_some()));
}

#[tokio::test]
async fn a_token_service_that_refuses_or_is_silent_is_told() {
    let store = emulators::s3();
    let proxy = Proxy::start(Store::S3, store.port, |_| Fault::Forbidden);
    let place = |url: String| {
        Place::S3(S3Place {
            bucket: BUCKET.into(),
            prefix: String::new(),
            region: "us-east-1".into(),
            endpoint: None,
            credentials: S3Access::Role {
                keys: S3Keys { access_key_id: "master".into(), secret_access_key: Secret::new("secret") },
                role_arn: "arn:aws:iam::123456789012:role/backups".into(),
                sts_endpoint: Some(url),
                life_secs: 900,
            },
        })
    };
    let bounds = Bounds { retry_max: Duration::from_secs(2), ..Bounds::default() };
    let minter = |url: String| {
        let worker = env!("CARGO_BIN_EXE_cocalc-backup-worker").into();
        cocalc_backup::Minter::new(place(url), Some(worker), bounds.clone()).unwrap()
    };
    for (fault, words) in [(Fault::Forbidden, "403"), (Fault::Silent, "no answer in time")] {
        proxy.plan(move |_| fault);
        let failed = minter(proxy.url()).location(ProjectId::random().into(), Access::Read).await;
        let said = cocalc_core::chain(&*failed.unwrap_err());
        assert!(said.contains(words) && !said.contains("secret"), "{fault:?}: {said}");
    }
}
