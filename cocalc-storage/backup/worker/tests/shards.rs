//! Repositories that many projects share. Runs as root.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests report by panicking, in helpers too")]

mod common;

use std::{fs, path::Path, sync::Arc, time::Duration};

use cocalc_backup::{
    Access, Bounds, Location, RepositoryName, S3, Secret, SharedShards, WrappingKey, WrappingKeys,
};
use cocalc_core::{
    backups::{Backup, Backups, CheckOptions, PruneOptions},
    ids::{ProjectId, TreePath},
};
use cocalc_testkit::backups::{Subject, backups, differences, facts};
use common::{
    Memory,
    emulators::{self, BUCKET},
    full, over,
    proxy::{Fault, Proxy, Store},
    small,
};
use futures_util::{StreamExt as _, stream};

fn wrapping() -> WrappingKeys {
    WrappingKeys::new(WrappingKey::generate("test").unwrap())
}

async fn in_directory(root: &Path, projects_max: u32) -> Arc<SharedShards> {
    for name in ["keys", "shards", "scratch"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    let shards =
        SharedShards::in_directory(root.join("keys"), wrapping(), root.join("shards"), projects_max).await;
    Arc::new(shards.unwrap())
}

#[tokio::test]
async fn shards_keep_the_contract() {
    let root = tempfile::tempdir().unwrap();
    let disk = Memory::mount(&root.path().join("memory"), 1024);
    // So few that some are sealed, and so many that projects share.
    let shards = in_directory(&disk.0, 4).await;
    backups(&over(shards.clone(), Bounds::default()), &disk.0.join("scratch")).await;
    let known = shards.shards().await;
    assert!(known.shards().count() >= 3, "{known:?}");
}

#[tokio::test]
async fn a_call_on_one_project_looks_at_no_other_in_the_shard() {
    let root = tempfile::tempdir().unwrap();
    let store = emulators::s3();
    let proxy = Proxy::start(Store::S3, store.port, |_| Fault::None);
    let url = proxy.url();
    let place = move |name: RepositoryName, _: Access| {
        Location::S3(S3 {
            bucket: BUCKET.into(),
            prefix: name.to_string(),
            region: "us-east-1".into(),
            endpoint: Some(url.clone()),
            access_key_id: "test".into(),
            secret_access_key: Secret::new("test"),
            session_token: None,
        })
    };
    let shards = SharedShards::open(root.path(), wrapping(), place, 500).await.unwrap();
    let backups = over(Arc::new(shards), Bounds::default());
    let subject = Subject::new(&backups, root.path());
    let tree = root.path().join("tree");
    small(&tree, 1);
    let one = ProjectId::random();
    let first = backups.back_up(&subject.source(one, &tree, None), &|_| ()).await.unwrap();
    let reads = async || {
        proxy.plan(|_| Fault::None);
        assert_eq!(backups.list(one).await.unwrap(), std::slice::from_ref(&first));
        proxy.requests()
    };
    let alone = reads().await;
    let mut others = Vec::new();
    for seed in 0..6 {
        let other = ProjectId::random();
        small(&tree, 10 + seed);
        others.push(backups.back_up(&subject.source(other, &tree, None), &|_| ()).await.unwrap());
    }
    assert_eq!(reads().await, alone, "listing one project reads more when others have come");
    // What they have in common is there once: the sixth has stored its noise only.
    assert!(others[5].added_bytes < 150_000, "{:?}", others[5]);

    // Nothing that is done with one is seen by another.
    backups.forget(one, &others.iter().map(|backup| backup.id.clone()).collect::<Vec<_>>()).await.unwrap();
    let erased = backups.erase(one).await.unwrap();
    assert!(erased.objects >= 1 && erased.marked_bytes > 0, "{erased:?}");
    assert_eq!(backups.list(one).await.unwrap(), []);
    backups.prune(others[0].project, &PruneOptions { grace: Duration::ZERO }).await.unwrap();
    let target = root.path().join("target");
    for (number, other) in others.iter().enumerate() {
        assert_eq!(backups.list(other.project).await.unwrap(), std::slice::from_ref(other));
        let target = target.join(number.to_string());
        fs::create_dir_all(&target).unwrap();
        backups.restore(other.project, &other.id, &TreePath::root(), &target, &|_| ()).await.unwrap();
        small(&tree, 10 + number as u64);
        assert_eq!(fs::read(target.join("home/noise")).unwrap(), fs::read(tree.join("home/noise")).unwrap());
    }
}

/// With `COCALC_FULL=1`, a thousand projects in two shards of 500.
#[tokio::test(flavor = "multi_thread")]
async fn a_repository_of_many_projects() {
    let (count, projects_max) = if full() { (1000, 500) } else { (24, 12) };
    let root = tempfile::tempdir().unwrap();
    let disk = Memory::mount(&root.path().join("memory"), 2048);
    let shards = in_directory(&disk.0, projects_max).await;
    let backups = over(shards.clone(), Bounds::default());
    let subject = Subject::new(&backups, root.path());
    let (backups, subject, disk) = (&backups, &subject, &disk);
    let projects: Vec<_> = (0..count).map(|seed| (seed, ProjectId::random())).collect();
    let tree = |seed: u64| disk.0.join("scratch").join(seed.to_string());
    let back_up = async |seed: u64, project, parent: Option<Backup>| {
        let source = subject.source(project, &tree(seed), parent.as_ref());
        backups.back_up(&source, &|_| ()).await.unwrap()
    };
    let first: Vec<Backup> = stream::iter(&projects)
        .map(async |(seed, project)| {
            small(&tree(*seed), *seed);
            back_up(*seed, *project, None).await
        })
        .buffered(2)
        .collect()
        .await;
    let known = shards.shards().await;
    let sizes: Vec<_> = known.shards().map(|shard| known.projects(shard).count()).collect();
    assert_eq!(sizes, [projects_max as usize; 2]);

    // A second backup of some, with its parent; one that is forgotten, one erased.
    for (seed, project) in projects.iter().step_by(projects.len() / 6) {
        let parent = first[usize::try_from(*seed).unwrap()].clone();
        fs::write(tree(*seed).join("home/notes"), "changed").unwrap();
        let second = back_up(*seed, *project, Some(parent.clone())).await;
        assert_eq!(second.files_read, 1, "the parent was found");
        assert_eq!(backups.list(*project).await.unwrap(), [parent.clone(), second.clone()]);
        backups.forget(*project, &[parent.id]).await.unwrap();
        assert_eq!(backups.list(*project).await.unwrap(), std::slice::from_ref(&second));
        let target = tempfile::tempdir_in(&disk.0).unwrap();
        backups.restore(*project, &second.id, &TreePath::root(), target.path(), &|_| ()).await.unwrap();
        assert!(differences(&facts(&tree(*seed)), &facts(target.path())).is_empty());
    }
    let gone = projects[1].1;
    assert!(backups.erase(gone).await.unwrap().marked_bytes > 0);
    let last = projects[projects.len() - 1].1;
    for project in [projects[2].1, last] {
        backups.prune(project, &PruneOptions { grace: Duration::ZERO }).await.unwrap();
        backups.prune(project, &PruneOptions { grace: Duration::ZERO }).await.unwrap();
        let thorough = CheckOptions { read_data: true, ..CheckOptions::default() };
        assert!(backups.check(project, &thorough).await.unwrap().is_sound());
        assert_eq!(backups.list(project).await.unwrap().len(), 1);
    }
}
