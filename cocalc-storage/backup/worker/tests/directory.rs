//! Repositories in directories: the contract, damage, crashes, and stock
//! restic. Runs as root.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests report by panicking, in helpers too")]

mod common;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::fs::{FileExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Arc,
    time::{Duration, Instant},
};

use cocalc_backup::{Bounds, OnePerProject, Rustic};
use cocalc_core::{
    backups::{Backup, Backups, CheckOptions, Error},
    ids::{ProjectId, TreePath},
};
use cocalc_testkit::backups::{Facts, Subject, backups, differences, facts, plant};
use common::{Memory, files, on_disk, over, run};
use tempfile::TempDir;

/// A backend, a planted tree, and a first backup of it.
struct Kept {
    root: TempDir,
    keys: Arc<OnePerProject>,
    backups: Rustic,
    project: ProjectId,
    tree: PathBuf,
    first: Backup,
}

impl Kept {
    async fn new(seed: u64) -> Self {
        let root = tempfile::tempdir().unwrap();
        let keys = on_disk(root.path());
        let backups = over(keys.clone(), Bounds::default());
        let (project, tree) = (ProjectId::random(), root.path().join("tree"));
        plant(&tree, seed);
        let source = Subject::new(&backups, root.path()).source(project, &tree, None);
        let first = backups.back_up(&source, &|_| ()).await.unwrap();
        Self { root, keys, backups, project, tree, first }
    }

    fn repository(&self) -> PathBuf {
        self.root.path().join("repositories").join(self.project.to_string())
    }

    async fn back_up(&self) -> Result<Backup, Error> {
        let subject = Subject::new(&self.backups, self.root.path());
        self.backups.back_up(&subject.source(self.project, &self.tree, Some(&self.first)), &|_| ()).await
    }

    async fn restore(&self, backup: &Backup) -> Result<BTreeMap<Vec<u8>, Facts>, Error> {
        let target = tempfile::tempdir_in(self.root.path()).unwrap();
        self.backups.restore(self.project, &backup.id, &TreePath::root(), target.path(), &|_| ()).await?;
        Ok(facts(target.path()))
    }

    async fn assert_restores(&self, backup: &Backup, as_was: &BTreeMap<Vec<u8>, Facts>) {
        let differences = differences(as_was, &self.restore(backup).await.unwrap());
        assert!(differences.is_empty(), "{differences:#?}");
    }

    /// The largest pack, which holds data.
    fn pack(&self) -> PathBuf {
        files(&self.repository().join("data"))
            .into_iter()
            .max_by_key(|path| fs::metadata(path).unwrap().len())
            .unwrap()
    }
}

#[tokio::test]
async fn a_directory_keeps_the_contract() {
    // In memory: each restore waits until its file system is on the disk, with
    // all that other tests write there.
    let root = tempfile::tempdir().unwrap();
    let disk = Memory::mount(&root.path().join("memory"), 1024);
    let rustic = over(on_disk(&disk.0), Bounds::default());
    backups(&rustic, &disk.0.join("scratch")).await;
}

#[tokio::test]
async fn stock_restic_restores_with_the_escrow_file_alone() {
    let kept = Kept::new(1).await;
    let escrow = kept.root.path().join("escrow");
    fs::write(&escrow, kept.keys.escrow(kept.project).await.unwrap().expose()).unwrap();
    let target = kept.root.path().join("restored");
    let restic = |command: &str| -> Output {
        let script = format!("set -a; . {}; exec restic --no-cache {command}", escrow.display());
        Command::new("sh")
            .args(["-c", &script])
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("HOME", "/nonexistent")
            .output()
            .unwrap()
    };
    for command in ["check --read-data".to_owned(), format!("restore latest --target {}", target.display())] {
        let done = restic(&command);
        assert!(done.status.success(), "restic {command}: {}", String::from_utf8_lossy(&done.stderr));
    }
    // Debian's restic fills holes, knows no link that is not UTF-8, and does
    // not look where the attributes of the root are.
    let solid = |tree: &Path| {
        let all = facts(tree).into_iter();
        all.filter(|(name, _)| !name.is_empty() && name != b"home/raw link")
            .map(|(name, facts)| (name, facts.solid()))
            .collect()
    };
    let differences = differences(&solid(&kept.tree), &solid(&target.join("project")));
    assert!(differences.is_empty(), "{differences:#?}");
    let listed = String::from_utf8(restic("snapshots").stdout).unwrap();
    assert!(listed.contains(&format!("project={}", kept.project)), "{listed}");
    // And what restic did is no hindrance.
    kept.back_up().await.unwrap();
}

#[tokio::test]
async fn a_wrong_key_reads_and_changes_nothing() {
    let kept = Kept::new(2).await;
    let other = on_disk(kept.root.path());
    for file in fs::read_dir(kept.root.path().join("keys")).unwrap() {
        fs::remove_file(file.unwrap().path()).unwrap();
    }
    let before = files(&kept.repository());
    let wrong = over(other, Bounds::default());
    let target = kept.root.path().join("target");
    fs::create_dir(&target).unwrap();
    let subject = Subject::new(&wrong, kept.root.path());
    let source = subject.source(kept.project, &kept.tree, None);
    assert!(matches!(wrong.list(kept.project).await, Err(Error::WrongKey { .. })));
    assert!(matches!(wrong.back_up(&source, &|_| ()).await, Err(Error::WrongKey { .. })));
    let restored = wrong.restore(kept.project, &kept.first.id, &TreePath::root(), &target, &|_| ()).await;
    assert!(matches!(restored, Err(Error::WrongKey { .. })), "{restored:?}");
    assert_eq!(fs::read_dir(&target).unwrap().count(), 0);
    assert_eq!(files(&kept.repository()), before);
}

#[tokio::test]
async fn damage_is_found_and_named_and_never_restored() {
    let kept = Kept::new(3).await;
    // A second backup that needs nothing of the first.
    let small = kept.root.path().join("small");
    fs::create_dir(&small).unwrap();
    fs::write(small.join("alone"), "alone").unwrap();
    let subject = Subject::new(&kept.backups, kept.root.path());
    let second = kept.backups.back_up(&subject.source(kept.project, &small, None), &|_| ()).await.unwrap();
    let thorough = CheckOptions { read_data: true, ..CheckOptions::default() };
    let pack = kept.pack();
    let whole = fs::read(&pack).unwrap();

    // Truncated: seen without reading data.
    File::options().write(true).open(&pack).unwrap().set_len(whole.len() as u64 / 2).unwrap();
    for options in [CheckOptions::default(), thorough] {
        let found = kept.backups.check(kept.project, &options).await.unwrap();
        assert!(!found.damage.is_empty(), "{options:?}");
        assert_eq!(found.affected, std::slice::from_ref(&kept.first.id), "{options:?}: {:?}", found.damage);
    }
    let restored = kept.restore(&kept.first).await;
    assert!(matches!(restored, Err(Error::Damaged { .. })), "{restored:?}");
    kept.assert_restores(&second, &facts(&small)).await;

    // One bit: only reading shows it.
    fs::write(&pack, &whole).unwrap();
    let file = File::options().write(true).open(&pack).unwrap();
    file.write_all_at(&[whole[1000] ^ 1], 1000).unwrap();
    assert!(kept.backups.check(kept.project, &CheckOptions::default()).await.unwrap().is_sound());
    let found = kept.backups.check(kept.project, &thorough).await.unwrap();
    assert_eq!(found.affected, std::slice::from_ref(&kept.first.id), "{:?}", found.damage);
    let restored = kept.restore(&kept.first).await;
    assert!(restored.is_err(), "wrong bytes were given out");

    // Gone.
    fs::remove_file(&pack).unwrap();
    let restored = kept.restore(&kept.first).await;
    assert!(matches!(restored, Err(Error::Damaged { .. })), "{restored:?}");
    // Repaired where there is a copy: the files are still there.
    let repair = CheckOptions { repair: true, ..CheckOptions::default() };
    kept.backups.check(kept.project, &repair).await.unwrap();
    let subject = Subject::new(&kept.backups, kept.root.path());
    kept.backups.back_up(&subject.source(kept.project, &kept.tree, None), &|_| ()).await.unwrap();
    assert!(kept.backups.check(kept.project, &thorough).await.unwrap().is_sound());
    kept.assert_restores(&kept.first, &facts(&kept.tree)).await;
}

#[tokio::test]
async fn a_lost_index_is_damage_and_can_be_rebuilt() {
    let kept = Kept::new(4).await;
    for index in files(&kept.repository().join("index")) {
        fs::remove_file(index).unwrap();
    }
    let restored = kept.restore(&kept.first).await;
    assert!(matches!(restored, Err(Error::Damaged { .. })), "{restored:?}");
    let found = kept.backups.check(kept.project, &CheckOptions::default()).await.unwrap();
    assert_eq!(found.affected, std::slice::from_ref(&kept.first.id), "{:?}", found.damage);
    let repair = CheckOptions { read_data: true, repair: true };
    assert!(kept.backups.check(kept.project, &repair).await.unwrap().is_sound());
    kept.assert_restores(&kept.first, &facts(&kept.tree)).await;
}

#[tokio::test]
async fn a_full_repository_is_told_and_earlier_backups_restore() {
    let root = tempfile::tempdir().unwrap();
    let disk = Memory::mount(&root.path().join("repositories"), 24);
    let kept_root = root.path().to_owned();
    let keys = on_disk(&kept_root);
    let backups = over(keys, Bounds::default());
    let (project, tree) = (ProjectId::random(), kept_root.join("tree"));
    plant(&tree, 5);
    let subject = Subject::new(&backups, &kept_root);
    let first = backups.back_up(&subject.source(project, &tree, None), &|_| ()).await.unwrap();
    let as_was = facts(&tree);
    let mut large = Vec::new();
    for number in 0..5_000_000u64 {
        large.extend_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    }
    fs::write(tree.join("home/larger"), &large).unwrap();
    let failed = backups.back_up(&subject.source(project, &tree, Some(&first)), &|_| ()).await;
    assert!(matches!(failed, Err(Error::Full { .. })), "{failed:?}");
    assert_eq!(backups.list(project).await.unwrap(), std::slice::from_ref(&first));
    let target = kept_root.join("target");
    fs::create_dir(&target).unwrap();
    backups.restore(project, &first.id, &TreePath::root(), &target, &|_| ()).await.unwrap();
    assert!(differences(&as_was, &facts(&target)).is_empty());

    // And a target that is too small.
    let small = Memory::mount(&kept_root.join("small"), 1);
    let failed = backups.restore(project, &first.id, &TreePath::root(), &small.0, &|_| ()).await;
    assert!(matches!(failed, Err(Error::Full { .. })), "{failed:?}");
    drop((small, disk));
}

#[tokio::test]
async fn a_backup_killed_at_any_step_leaves_the_others_whole() {
    let kept = Kept::new(6).await;
    let as_was = facts(&kept.tree);
    for number in 0..200u64 {
        let noise: Vec<u8> = (0..20_000u64)
            .flat_map(|at| (at + number).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
            .collect();
        fs::write(kept.tree.join(format!("home/many/more-{number}")), noise).unwrap();
    }
    // Slow enough that each number of files is a step that can be hit.
    let bounds = Bounds { bytes_per_sec_max: Some(40 << 20), ..Bounds::default() };
    let slow = over(kept.keys.clone(), bounds);
    let subject = Subject::new(&slow, kept.root.path());
    let before = files(&kept.repository()).len();
    for step in 0..5 {
        let source = subject.source(kept.project, &kept.tree, Some(&kept.first));
        // Dropping the call kills the worker with SIGKILL.
        let backup = slow.back_up(&source, &|_| ());
        let reached = async {
            let until = Instant::now() + Duration::from_secs(60);
            while files(&kept.repository()).len() < before + step && Instant::now() < until {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::select! { done = backup => { done.unwrap(); } () = reached => {} }
        kept.assert_restores(&kept.first, &as_was).await;
    }
    let listed = kept.backups.list(kept.project).await.unwrap();
    let second = kept.back_up().await.unwrap();
    kept.assert_restores(&second, &facts(&kept.tree)).await;
    assert!(listed.contains(&kept.first));
    let thorough = CheckOptions { read_data: true, ..CheckOptions::default() };
    assert!(kept.backups.check(kept.project, &thorough).await.unwrap().is_sound());
}

#[tokio::test]
async fn what_cannot_be_read_is_an_error_and_nothing_is_listed() {
    let kept = Kept::new(7).await;
    let bad = kept.tree.join("home/bad");
    fs::write(&bad, "").unwrap();
    // Memory that is not mapped cannot be read by anybody.
    let memory = format!("/proc/{}/mem", std::process::id());
    run("mount", &["--bind", &memory, bad.to_str().unwrap()]);
    let failed = kept.back_up().await;
    run("umount", &[bad.to_str().unwrap()]);
    let Err(Error::Incomplete { what, .. }) = failed else { panic!("{failed:?}") };
    assert!(what.iter().any(|words| words.contains("/project/home")), "{what:?}");
    assert_eq!(kept.backups.list(kept.project).await.unwrap(), std::slice::from_ref(&kept.first));
}

#[tokio::test]
async fn a_disk_that_is_not_mounted_is_an_error_and_not_a_new_repository() {
    let kept = Kept::new(8).await;
    let place = kept.root.path().join("repositories");
    fs::rename(&place, kept.root.path().join("elsewhere")).unwrap();
    let failed = kept.back_up().await;
    assert!(matches!(failed, Err(Error::Unavailable { .. })), "{failed:?}");
    assert!(matches!(kept.backups.list(kept.project).await, Err(Error::Unavailable { .. })));
    assert!(!place.exists());
    // Nobody else may read what is there.
    fs::rename(kept.root.path().join("elsewhere"), &place).unwrap();
    assert_eq!(fs::metadata(kept.repository()).unwrap().permissions().mode() & 0o777, 0o700);
    assert!(
        files(&kept.repository())
            .iter()
            .all(|file| { fs::metadata(file).unwrap().permissions().mode() & 0o077 == 0 })
    );
}
