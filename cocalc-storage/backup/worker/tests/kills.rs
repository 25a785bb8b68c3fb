//! The worker killed at every place that matters, in every kind of call: what
//! was listed restores, nothing is listed that does not, and the same call done
//! again succeeds. Runs as root.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests report by panicking, in helpers too")]

mod common;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use cocalc_backup::{Bounds, OnePerProject, Rustic, WrappingKey, WrappingKeys};
use cocalc_core::{
    backups::{Backup, Backups, CheckOptions, Error, PruneOptions},
    ids::{ProjectId, TreePath},
};
use cocalc_testkit::backups::{Facts, Subject, differences, facts};
use common::{by, full, over, small, worker_after};
use tempfile::TempDir;

/// How often one place is met at most, in the small trees of this.
const TIMES_MAX: u32 = 40;

struct Place {
    root: TempDir,
    keys: Arc<OnePerProject>,
    project: ProjectId,
}

impl Place {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        for name in ["keys", "repositories", "mirrors", "tree"] {
            fs::create_dir(root.path().join(name)).unwrap();
        }
        let wrapping = WrappingKeys::new(WrappingKey::generate("test").unwrap());
        let keys =
            OnePerProject::in_directory(root.path().join("keys"), wrapping, root.path().join("repositories"));
        let mirrors = root.path().join("mirrors");
        let keys = keys.mirrored(move |name: cocalc_backup::RepositoryName, _| {
            cocalc_backup::Location::Directory { path: mirrors.join(name.to_string()) }
        });
        small(&root.path().join("tree"), 1);
        Self { root, keys: Arc::new(keys), project: ProjectId::random() }
    }

    fn tree(&self) -> PathBuf {
        self.root.path().join("tree")
    }

    fn sound(&self) -> Rustic {
        over(self.keys.clone(), Bounds::default())
    }

    /// Backups by a worker that dies at the place, at the how manieth time.
    fn dying(&self, point: &str, nth: u32) -> Rustic {
        let before = format!("COCALC_FAIL_POINT={point}:{nth}");
        by(&worker_after(self.root.path(), "dying", &before), self.keys.clone(), Bounds::default())
    }

    async fn back_up(&self, backups: &Rustic, parent: Option<&Backup>) -> Result<Backup, Error> {
        let subject = Subject::new(backups, self.root.path());
        backups.back_up(&subject.source(self.project, &self.tree(), parent), &|_| ()).await
    }

    async fn assert_restores(&self, backup: &Backup, as_was: &BTreeMap<Vec<u8>, Facts>) {
        let target = tempfile::tempdir_in(self.root.path()).unwrap();
        let sound = self.sound();
        sound.restore(self.project, &backup.id, &TreePath::root(), target.path(), &|_| ()).await.unwrap();
        let differences = differences(as_was, &facts(target.path()));
        assert!(differences.is_empty(), "{differences:#?}");
    }

    async fn assert_sound(&self) {
        let thorough = CheckOptions { read_data: true, ..CheckOptions::default() };
        let checked = self.sound().check(self.project, &thorough).await.unwrap();
        assert!(checked.is_sound(), "{checked:?}");
    }
}

/// Whether the worker died of the signal, which is what a call must say of it.
fn was_killed<T: std::fmt::Debug>(done: &Result<T, Error>) -> bool {
    match done {
        Err(Error::Backend { source, .. }) => {
            let words = source.to_string();
            assert!(words.contains("signal: 9"), "{words}");
            true
        }
        Err(other) => panic!("not killed, but {other:?}"),
        Ok(_) => false,
    }
}

/// Every place and time of `points`, or in a short run the first and some others.
fn times(point: &str) -> Vec<u32> {
    let all = 1..=TIMES_MAX;
    if full() || !point.starts_with("store.") { all.collect() } else { all.step_by(2).collect() }
}

#[tokio::test]
async fn a_backup_that_is_killed_anywhere_leaves_the_others_whole_and_is_done_again() {
    let mut deaths = 0;
    for point in [
        "store.write",
        "store.written",
        "backup.opened",
        "backup.stored",
        "backup.confirmed",
        "backup.listed",
    ] {
        for nth in times(point) {
            // With a backup before it, and as the first, which makes the repository.
            let place = Place::new();
            let died = was_killed(&place.back_up(&place.dying(point, nth), None).await);
            let sound = place.sound();
            let listed = sound.list(place.project).await.unwrap();
            assert_eq!(!listed.is_empty(), !died || point == "backup.listed", "{point}:{nth}: {listed:?}");
            let first = place.back_up(&sound, None).await.unwrap();
            let as_was = facts(&place.tree());
            small(&place.tree(), 2);
            let second = place.back_up(&place.dying(point, nth), Some(&first)).await;
            place.assert_restores(&first, &as_was).await;
            if !was_killed(&second) && !died {
                break;
            }
            deaths += 1;
            let listed = sound.list(place.project).await.unwrap();
            assert!(listed.contains(&first), "{point}:{nth}: {listed:?}");
            let again = place.back_up(&sound, Some(&first)).await.unwrap();
            place.assert_restores(&again, &facts(&place.tree())).await;
            place.assert_sound().await;
        }
    }
    assert!(deaths >= 10, "{deaths} deaths: are there fail points in this build?");
}

#[tokio::test]
async fn a_prune_that_is_killed_anywhere_loses_nothing_and_is_done_again() {
    let at_once = PruneOptions { grace: Duration::ZERO };
    let mut deaths = 0;
    for point in
        ["store.write", "store.written", "store.remove", "store.removed", "prune.planned", "prune.done"]
    {
        for nth in times(point) {
            let place = Place::new();
            let sound = place.sound();
            let first = place.back_up(&sound, None).await.unwrap();
            small(&place.tree(), 2);
            let second = place.back_up(&sound, Some(&first)).await.unwrap();
            let as_was = facts(&place.tree());
            sound.forget(place.project, std::slice::from_ref(&first.id)).await.unwrap();
            // The first prune marks, the second deletes.
            let mut died = false;
            for _ in 0..2 {
                died |= was_killed(&place.dying(point, nth).prune(place.project, &at_once).await);
                place.assert_restores(&second, &as_was).await;
            }
            if !died {
                break;
            }
            deaths += 1;
            for _ in 0..3 {
                sound.prune(place.project, &at_once).await.unwrap();
            }
            place.assert_restores(&second, &as_was).await;
            place.assert_sound().await;
            let third = place.back_up(&sound, Some(&second)).await.unwrap();
            place.assert_restores(&third, &as_was).await;
        }
    }
    assert!(deaths >= 8, "{deaths} deaths");
}

#[tokio::test]
async fn a_restore_that_is_killed_writes_below_its_target_only_and_is_done_again() {
    let place = Place::new();
    let backup = place.back_up(&place.sound(), None).await.unwrap();
    let as_was = facts(&place.tree());
    let beside = place.root.path().join("beside");
    fs::create_dir(&beside).unwrap();
    fs::write(beside.join("precious"), "precious").unwrap();
    for point in
        ["restore.planned", "restore.contents", "restore.written", "restore.compared", "restore.synced"]
    {
        let target = beside.join(point);
        fs::create_dir(&target).unwrap();
        let dying = place.dying(point, 1);
        let done = dying.restore(place.project, &backup.id, &TreePath::root(), &target, &|_| ()).await;
        assert!(was_killed(&done), "{point}");
        // What is there is not empty, and not taken for a target again.
        if fs::read_dir(&target).unwrap().next().is_some() {
            let refused =
                place.sound().restore(place.project, &backup.id, &TreePath::root(), &target, &|_| ()).await;
            assert!(matches!(refused, Err(Error::Invalid { .. })), "{refused:?}");
        }
        fs::remove_dir_all(&target).unwrap();
        place.assert_restores(&backup, &as_was).await;
    }
    assert_eq!(fs::read_dir(&beside).unwrap().count(), 1);
    assert_eq!(fs::read_to_string(beside.join("precious")).unwrap(), "precious");
}

#[tokio::test]
async fn mirroring_repairing_and_erasing_go_on_where_they_were_killed() {
    let thorough = CheckOptions { read_data: true, repair: true };
    for point in ["mirror.copied:1", "mirror.copied:3", "repair.fetched", "repair.indexed", "store.write"] {
        let (name, nth) = point.split_once(':').unwrap_or((point, "1"));
        let place = Place::new();
        let sound = place.sound();
        let backup = place.back_up(&sound, None).await.unwrap();
        let as_was = facts(&place.tree());
        let dying = place.dying(name, nth.parse().unwrap());
        if name.starts_with("mirror") {
            assert!(was_killed(&dying.mirror(place.project, &|_| ()).await), "{point}");
        }
        sound.mirror(place.project, &|_| ()).await.unwrap();
        assert_eq!(sound.mirror(place.project, &|_| ()).await.unwrap().files, 0);
        damage(&place.root.path().join("repositories"));
        if !name.starts_with("mirror") {
            let done = dying.check(place.project, &thorough).await;
            assert!(was_killed(&done) || name == "store.write", "{point}");
        }
        let checked = sound.check(place.project, &thorough).await.unwrap();
        assert!(checked.is_sound(), "{point}: {checked:?}");
        place.assert_restores(&backup, &as_was).await;
    }
    let place = Place::new();
    let sound = place.sound();
    for nth in 1..TIMES_MAX {
        place.back_up(&sound, None).await.unwrap();
        let died = was_killed(&place.dying("erase.removed", nth).erase(place.project).await);
        // The keys go first: what is left cannot be read, and goes when it is done again.
        sound.erase(place.project).await.unwrap();
        assert_eq!(sound.list(place.project).await.unwrap(), []);
        assert_eq!(fs::read_dir(place.root.path().join("repositories")).unwrap().count(), 0);
        if !died {
            assert!(nth > 4, "{nth}");
            return;
        }
    }
    panic!("an erase has no end");
}

#[tokio::test]
async fn a_rotation_that_is_killed_leaves_a_password_that_opens_and_is_done_again() {
    for (point, nth) in [("store.write", 1), ("store.written", 1), ("store.remove", 1), ("store.removed", 1)]
    {
        let place = Place::new();
        place.back_up(&place.sound(), None).await.unwrap();
        let before = place.keys.escrow(place.project).await.unwrap();
        let rotated = place.keys.rotate_password(place.project, &place.dying(point, nth)).await;
        assert!(rotated.is_err(), "{point}");
        let after = place.keys.escrow(place.project).await.unwrap();
        assert!(opens(place.root.path(), after.expose()), "{point}: the escrow file of now opens nothing");
        place.keys.rotate_password(place.project, &place.sound()).await.unwrap();
        let last = place.keys.escrow(place.project).await.unwrap();
        assert!(opens(place.root.path(), last.expose()), "{point}");
        assert!(!opens(place.root.path(), before.expose()), "{point}: the first password still opens it");
        assert!(!opens(place.root.path(), after.expose()), "{point}");
    }
}

/// Whether stock restic opens a repository with an escrow file.
fn opens(root: &Path, escrow: &str) -> bool {
    let file = root.join("escrow");
    fs::write(&file, escrow).unwrap();
    let script = format!("set -a; . {}; exec restic --no-cache snapshots", file.display());
    let done = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success() || said.contains("wrong password"), "{said}");
    done.status.success()
}

/// Changes a bit of every pack.
fn damage(repositories: &Path) {
    for file in common::files(repositories) {
        if file.components().any(|part| part.as_os_str() == "data") {
            let mut bytes = fs::read(&file).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            fs::write(&file, bytes).unwrap();
        }
    }
}
