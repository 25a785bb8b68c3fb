//! What a worker may take, and when it ends. Runs as root.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests report by panicking, in helpers too")]

mod common;

use std::{
    fs,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    pin::pin,
    process::Command,
    time::{Duration, Instant},
};

use cocalc_backup::{Bounds, Rustic};
use cocalc_core::{
    backups::{Backups, Error},
    ids::{ProjectId, TreePath},
};
use cocalc_testkit::backups::{Subject, differences, facts};
use common::{noise, on_disk, over, small};

/// Names the directory in which a child of the test makes a backup.
const CHILD: &str = "COCALC_TEST_BACKUP_IN";
/// For what ends by itself, unless it hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// The worker processes of a parent.
fn workers_of(parent: u32) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        let Some((_, rest)) = stat.rsplit_once(") ") else { continue };
        let mut fields = rest.split(' ');
        let is_dead = fields.next() == Some("Z");
        if !is_dead
            && fields.next() == Some(&parent.to_string())
            && fs::read_link(entry.path().join("exe")).is_ok_and(|exe| exe.ends_with("cocalc-backup-worker"))
        {
            found.push(pid);
        }
    }
    found
}

fn is_alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "{what} does not happen");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The directories of a process's groups that are ours.
fn groups_of(pid: u32, name: &str) -> Vec<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let mut found = Vec::new();
    for line in text.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next().unwrap(), fields.next().unwrap());
        if path.contains(name) {
            let tree = match controllers {
                "" if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() => String::new(),
                "" => "unified".to_owned(),
                controllers => controllers.to_owned(),
            };
            found.push(Path::new("/sys/fs/cgroup").join(tree).join(path.trim_start_matches('/')));
        }
    }
    found
}

/// A backup that takes long: its pack passes slowly.
fn slow(group: &str) -> Bounds {
    Bounds {
        bytes_per_sec_max: Some(200_000),
        memory_bytes_max: 512 << 20,
        control_group: Some(PathBuf::from(group)),
        ..Bounds::default()
    }
}

fn plant(root: &Path) -> PathBuf {
    let tree = root.join("tree");
    small(&tree, 1);
    for number in 0..10 {
        fs::write(tree.join(format!("home/noise-{number}")), noise(100 + number, 4 << 20)).unwrap();
    }
    tree
}

async fn back_up(backups: &Rustic, root: &Path, tree: &Path) -> Result<(), Error> {
    let source = Subject::new(backups, root).source(ProjectId::random(), tree, None);
    backups.back_up(&source, &|_| ()).await.map(drop)
}

#[tokio::test]
async fn a_worker_has_its_own_group_and_ends_when_it_is_not_wanted() {
    let root = tempfile::tempdir().unwrap();
    let tree = plant(root.path());
    let name = format!("cocalc-backup-test-{}", std::process::id());
    let backups = over(on_disk(root.path()), slow(&name));
    let here = std::process::id();
    let mut worker = None;
    {
        let mut call = pin!(back_up(&backups, root.path(), &tree));
        let seen = until("a worker", || {
            worker = workers_of(here).into_iter().find(|pid| !groups_of(*pid, &name).is_empty());
            worker.is_some()
        });
        tokio::select! { done = &mut call => panic!("it was not slow: {done:?}"), () = seen => {} }
        let pid = worker.unwrap();
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<_> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
        assert_eq!(fields[2], pid.to_string(), "it leads a process group of its own");
        assert_eq!(fields[16], "10", "niceness");
        let said = Command::new("ionice").args(["-p", &pid.to_string()]).output().unwrap();
        let said = String::from_utf8(said.stdout).unwrap();
        assert!(said.contains("best-effort: prio 7"), "{said}");
        let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        assert!(limits.contains(&(512_u64 << 20).to_string()), "{limits}");
        let groups = groups_of(pid, &name);
        let value = |file: &str| {
            groups.iter().find_map(|group| fs::read_to_string(group.join(file)).ok()).unwrap_or_default()
        };
        let memory = value("memory.max") + &value("memory.limit_in_bytes");
        assert_eq!(memory.trim(), (512_u64 << 20).to_string());
        let weight = value("cpu.weight") + &value("cpu.shares");
        assert!(["20", "204"].contains(&weight.trim()), "{weight}");
    }
    // Dropped: the process is gone, and then its group.
    let pid = worker.unwrap();
    until("the end of the worker", || !is_alive(pid)).await;
    let left = || -> usize {
        let trees = ["", "memory", "cpu", "blkio"];
        let groups = trees.map(|tree| Path::new("/sys/fs/cgroup").join(tree).join(&name));
        groups
            .iter()
            .map(|group| fs::read_dir(group).into_iter().flatten().flatten())
            .map(|entries| entries.filter(|entry| entry.path().is_dir()).count())
            .sum()
    };
    until("the removal of its group", || left() == 0).await;
    for tree in ["", "memory", "cpu", "blkio"] {
        let _ = fs::remove_dir(Path::new("/sys/fs/cgroup").join(tree).join(&name));
    }
}

/// Not a test of its own: what the next one runs as another process.
#[tokio::test]
async fn child_that_makes_a_backup() {
    if let Some(root) = std::env::var_os(CHILD) {
        let root = PathBuf::from(root);
        let backups = over(on_disk(&root), slow("cocalc-backup"));
        let _ = back_up(&backups, &root, &root.join("tree")).await;
    }
}

#[tokio::test]
async fn a_worker_ends_with_the_daemon_and_not_with_what_is_sent_to_it() {
    let root = tempfile::tempdir().unwrap();
    plant(root.path());
    let mut daemon = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_that_makes_a_backup"])
        .env(CHILD, root.path())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut worker = None;
    until("a worker", || {
        worker = workers_of(daemon.id()).first().copied();
        worker.is_some()
    })
    .await;
    daemon.kill().unwrap();
    assert_eq!(daemon.wait().unwrap().signal(), Some(9));
    until("the end of the worker", || !is_alive(worker.unwrap())).await;
}

#[tokio::test]
async fn a_worker_that_needs_too_much_memory_fails_alone() {
    let root = tempfile::tempdir().unwrap();
    let tree = plant(root.path());
    let keys = on_disk(root.path());
    let enough = over(keys.clone(), Bounds::default());
    let (project, subject) = (ProjectId::random(), Subject::new(&enough, root.path()));
    let first = enough.back_up(&subject.source(project, &tree, None), &|_| ()).await.unwrap();
    let little = over(keys, Bounds { memory_bytes_max: 24 << 20, ..Bounds::default() });
    fs::write(tree.join("home/noise"), noise(9, 8 << 20)).unwrap();
    let failed = little.back_up(&subject.source(project, &tree, Some(&first)), &|_| ()).await;
    let Err(Error::Backend { source, .. }) = failed else { panic!("{failed:?}") };
    assert!(!source.to_string().is_empty());
    assert_eq!(enough.list(project).await.unwrap(), std::slice::from_ref(&first));
    enough.back_up(&subject.source(project, &tree, Some(&first)), &|_| ()).await.unwrap();
}

/// What is small in the repository and large on the disk, in many packs.
#[tokio::test]
async fn a_restore_takes_no_more_memory_for_a_large_project() {
    let root = tempfile::tempdir().unwrap();
    let tree = root.path().join("tree");
    small(&tree, 1);
    for number in 0..12_u64 {
        // Each 16 bytes of noise become 64: packs hold what becomes 4 times as much.
        let mut content = Vec::new();
        for piece in noise(500 + number, 4 << 20).chunks(16) {
            content.extend_from_slice(&piece.repeat(4));
        }
        fs::write(tree.join(format!("home/large-{number}")), content).unwrap();
    }
    let keys = on_disk(root.path());
    let enough = over(keys.clone(), Bounds::default());
    let (project, subject) = (ProjectId::random(), Subject::new(&enough, root.path()));
    let backup = enough.back_up(&subject.source(project, &tree, None), &|_| ()).await.unwrap();
    assert!(backup.added_bytes < 100 << 20, "it is compressed: {backup:?}");
    let little = over(keys, Bounds { memory_bytes_max: 224 << 20, ..Bounds::default() });
    let target = root.path().join("target");
    fs::create_dir(&target).unwrap();
    little.restore(project, &backup.id, &TreePath::root(), &target, &|_| ()).await.unwrap();
    let differences = differences(&facts(&tree), &facts(&target));
    assert!(differences.is_empty(), "{differences:#?}");
}

#[tokio::test]
async fn bytes_pass_no_faster_than_they_may() {
    let root = tempfile::tempdir().unwrap();
    let tree = root.path().join("tree");
    small(&tree, 1);
    fs::write(tree.join("home/noise"), noise(3, 6 << 20)).unwrap();
    let bounds = Bounds { bytes_per_sec_max: Some(3 << 20), ..Bounds::default() };
    let backups = over(on_disk(root.path()), bounds);
    let begun = Instant::now();
    back_up(&backups, root.path(), &tree).await.unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(1900), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_call_ends_when_its_time_is_over() {
    let root = tempfile::tempdir().unwrap();
    let tree = plant(root.path());
    let bounds = Bounds { time_max: Duration::from_secs(3), ..slow("cocalc-backup") };
    let backups = over(on_disk(root.path()), bounds);
    let failed = back_up(&backups, root.path(), &tree).await;
    assert!(matches!(failed, Err(Error::Unavailable { .. })), "{failed:?}");
}
