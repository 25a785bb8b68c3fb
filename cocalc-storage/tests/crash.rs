//! The process killed at every place that matters, and the power cut at any
//! moment, on real Btrfs: what was acknowledged is there, nothing is half done,
//! and what was cut off can be done again. Needs root, loop devices and
//! btrfs-progs.
//!
//! With `COCALC_FULL=1` more often, and at more moments.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests report by panicking, in helpers too")]

mod common;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use cocalc_core::{
    ids::{ProjectId, SnapshotName},
    storage::{CloneOptions, CopyOptions, Error, Place, SendHeader, SendOptions, Storage, VolumeOptions},
};
use cocalc_storage::{Btrfs, fail, loopback::Loopback};
use cocalc_testkit::storage::examine;
use common::power::{Cuts, empty, powered, scrub};
use tokio::io::AsyncReadExt as _;

const MIB: u64 = 1 << 20;
/// For what ends by itself, unless it hangs.
const PATIENCE: Duration = Duration::from_secs(120);

fn full() -> bool {
    std::env::var_os("COCALC_FULL").is_some()
}

fn volume(root: &Path, name: &str, bytes: u64) -> Loopback {
    let made = Loopback::create(&root.join(format!("{name}.img")), bytes, &root.join(name));
    made.unwrap_or_else(|error| {
        panic!("needs root, mkfs.btrfs and loop devices: {}", cocalc_core::chain(&error))
    })
}

async fn fresh(path: &Path) -> Btrfs {
    Btrfs::initialize(path).unwrap();
    Btrfs::open(path).await.unwrap()
}

fn name(text: &str) -> SnapshotName {
    text.parse().unwrap()
}

/// Regular files below `home`, by path.
fn files(root: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut todo = vec![root.join("home")];
    while let Some(path) = todo.pop() {
        for entry in fs::read_dir(path).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                todo.push(entry.path());
            } else {
                let name = entry.path().strip_prefix(root).unwrap().to_string_lossy().into_owned();
                found.insert(name, fs::read(entry.path()).unwrap());
            }
        }
    }
    found
}

/// The same in few words.
fn told(root: &Path) -> String {
    let told = files(root).into_iter();
    let told: Vec<_> = told
        .map(|(path, text)| format!("{path}: {} bytes, crc {:x}", text.len(), crc32c::crc32c(&text)))
        .collect();
    told.join("; ")
}

/// All that can be seen of some projects.
async fn seen(store: &Btrfs, projects: &[ProjectId]) -> Vec<String> {
    let mut seen = Vec::new();
    for (number, project) in projects.iter().enumerate() {
        match store.volume(*project).await {
            Ok(volume) => seen.push(format!("{number} live {}", told(&volume.path.unwrap()))),
            Err(Error::NotFound { .. }) => seen.push(format!("{number} is not live")),
            Err(error) => panic!("{}", cocalc_core::chain(&error)),
        }
        for snapshot in store.snapshots(*project).await.unwrap() {
            let path = store.snapshot_path(*project, &snapshot.name).await.unwrap();
            seen.push(format!("{number} {} {}", snapshot.name, told(&path)));
        }
    }
    seen
}

// ---- killed at every fail point ----

const CHILD: &str = "COCALC_TEST_CRASH";

/// What a child process is to do: where, with which projects, and what came
/// from elsewhere.
struct Orders {
    volume: PathBuf,
    progress: PathBuf,
    arrived: PathBuf,
    projects: Vec<ProjectId>,
}

impl Orders {
    fn text(&self) -> String {
        let ids: Vec<_> = self.projects.iter().map(ToString::to_string).collect();
        let place = |path: &Path| path.display().to_string();
        format!(
            "{}|{}|{}|{}",
            place(&self.volume),
            place(&self.progress),
            place(&self.arrived),
            ids.join(",")
        )
    }

    fn parse(text: &str) -> Self {
        let mut parts = text.split('|');
        let mut part = || parts.next().unwrap();
        Self {
            volume: part().into(),
            progress: part().into(),
            arrived: part().into(),
            projects: part().split(',').map(|id| id.parse().unwrap()).collect(),
        }
    }
}

/// Every kind of call, one after the other. What was acknowledged is noted, and
/// not done again.
async fn script(orders: &Orders) {
    let store = Btrfs::open(&orders.volume).await.unwrap();
    let [p, q, clone, shared, doomed] = orders.projects[..] else { panic!("five projects") };
    let done: usize =
        fs::read_to_string(&orders.progress).unwrap_or_default().trim().parse().unwrap_or_default();
    let options = VolumeOptions::default();
    let live = async |project| store.volume(project).await.unwrap().path.unwrap().join("home");
    let created = |made: Result<_, Error>| match made {
        Ok(_) | Err(Error::AlreadyExists { .. }) => {}
        Err(error) => panic!("{}", cocalc_core::chain(&error)),
    };
    for step in done..STEPS {
        match step {
            0 => created(store.create(p, &options).await),
            1 => {
                fs::create_dir_all(live(p).await.join("d")).unwrap();
                fs::write(live(p).await.join("d/a"), "one").unwrap();
                store.snapshot(p, &name("one")).await.unwrap();
            }
            2 => {
                fs::write(live(p).await.join("d/a"), "two").unwrap();
                fs::write(live(p).await.join("b"), vec![2; 300_000]).unwrap();
                store.snapshot(p, &name("two")).await.unwrap();
            }
            3 => {
                store.restore(p, &name("one"), &name("former")).await.unwrap();
            }
            4 => {
                let place = |path: &str| Place::live(p, path.parse().unwrap());
                let options = CopyOptions { replace: true, ..CopyOptions::default() };
                store.copy(&place("home/d"), &place("home/e"), &options).await.unwrap();
            }
            5 => {
                created(store.clone_volume(p, &name("two"), clone, &CloneOptions::default()).await);
            }
            6 => {
                let options = CloneOptions { same_owner: true, ..CloneOptions::default() };
                created(store.clone_volume(p, &name("two"), shared, &options).await);
            }
            7 => store.delete_snapshot(p, &name("two")).await.unwrap(),
            8 => {
                let header: SendHeader =
                    serde_json::from_slice(&fs::read(orders.arrived.join("header")).unwrap()).unwrap();
                let header = SendHeader { project: q, ..header };
                let stream = tokio::fs::File::open(orders.arrived.join("stream")).await.unwrap();
                store.receive(&header, Box::pin(stream)).await.unwrap();
            }
            9 => {
                store.restore(q, &name("arrived"), &name("former")).await.unwrap();
            }
            10 => {
                store.set_aside(q, &name("aside")).await.unwrap();
            }
            11 => created(store.create(doomed, &options).await),
            12 => {
                if let Ok(volume) = store.volume(doomed).await {
                    fs::write(volume.path.unwrap().join("home/x"), "x").unwrap();
                    store.snapshot(doomed, &name("x")).await.unwrap();
                }
                store.delete(doomed).await.unwrap();
            }
            13 => {
                if store.snapshots(q).await.unwrap().iter().all(|snapshot| snapshot.name != name("staged")) {
                    let place = store.stage(q, &name("staged")).await.unwrap();
                    fs::create_dir(place.path().join("home")).unwrap();
                    fs::write(place.path().join("home/restored"), vec![4; 70_000]).unwrap();
                    place.publish().await.unwrap();
                }
            }
            _ => assert!(store.wait_trash_empty(PATIENCE).await.unwrap(), "the trash is emptied"),
        }
        // The reaper's places are in a thread of its own, which may end the
        // process in the middle of this.
        let whole = orders.progress.with_extension("new");
        fs::write(&whole, (step + 1).to_string()).unwrap();
        fs::rename(whole, &orders.progress).unwrap();
    }
}

const STEPS: usize = 15;

/// Not a test of its own: what the next one runs as another process, in which
/// it dies.
#[tokio::test(flavor = "multi_thread")]
async fn child_that_is_killed() {
    if let Ok(orders) = std::env::var(CHILD) {
        script(&Orders::parse(&orders)).await;
    }
}

fn run_child(orders: &Orders, point: Option<&str>) -> std::process::Output {
    let mut child = Command::new("timeout");
    child.args(["-s", "KILL", "300"]).arg(std::env::current_exe().unwrap());
    child.args(["--exact", "child_that_is_killed", "--nocapture"]).env(CHILD, orders.text());
    if let Some(point) = point {
        child.env(fail::VARIABLE, point);
    }
    child.output().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_anywhere_it_goes_on_to_the_same_end() {
    let root = tempfile::tempdir().unwrap();
    let (here, elsewhere) =
        (volume(root.path(), "here", 1024 * MIB), volume(root.path(), "elsewhere", 512 * MIB));
    let arrived = root.path().join("arrived");
    fs::create_dir(&arrived).unwrap();
    {
        let store = fresh(elsewhere.path()).await;
        let project = ProjectId::random();
        let path = store.create(project, &VolumeOptions::default()).await.unwrap().path.unwrap();
        for number in 0..50 {
            fs::write(path.join(format!("home/{number}")), vec![number; 9000]).unwrap();
        }
        store.snapshot(project, &name("arrived")).await.unwrap();
        let mut sent = store.send(project, &name("arrived"), &SendOptions::whole()).await.unwrap();
        let mut bytes = Vec::new();
        sent.reader.read_to_end(&mut bytes).await.unwrap();
        fs::write(arrived.join("stream"), bytes).unwrap();
        fs::write(arrived.join("header"), serde_json::to_vec(&sent.header).unwrap()).unwrap();
    }
    drop(fresh(here.path()).await);

    // What comes of it without any crash.
    let orders = |number: usize| Orders {
        volume: here.path().to_owned(),
        progress: root.path().join(format!("progress-{number}")),
        arrived: arrived.clone(),
        projects: (0..5).map(|_| ProjectId::random()).collect(),
    };
    let first = orders(0);
    let ran = run_child(&first, None);
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let store = Btrfs::open(here.path()).await.unwrap();
    let expected = seen(&store, &first.projects).await;
    assert_eq!(expected.len(), 10, "{expected:?}");
    drop(store);

    let times = if full() { 4 } else { 1 };
    let mut killed = 0;
    for (number, point) in fail::NAMES.iter().enumerate() {
        for nth in 1..=times {
            let orders = orders(1 + number * times + nth);
            let ran = run_child(&orders, Some(&format!("{point}:{nth}")));
            // `timeout` passes the signal on as its own end.
            let signal = ran.status.signal().or(ran.status.code().filter(|code| *code == 137).map(|_| 9));
            if nth == 1 {
                let words = String::from_utf8_lossy(&ran.stderr);
                assert_eq!(signal, Some(9), "{point} is not on the way of any call: {words}");
            }
            killed += usize::from(signal == Some(9));

            // Whoever opens it next finds it whole.
            let store = Btrfs::open(here.path()).await.unwrap();
            empty(&here.path().join("staging"));
            for project in store.list().await.unwrap() {
                store.usage(project.project).await.unwrap();
            }
            drop(store);
            let again = run_child(&orders, None);
            assert!(
                again.status.success(),
                "after {point}:{nth}: {}",
                String::from_utf8_lossy(&again.stderr)
            );
            let store = Btrfs::open(here.path()).await.unwrap();
            assert_eq!(seen(&store, &orders.projects).await, expected, "after {point}:{nth}");
            for project in &orders.projects {
                store.delete(*project).await.unwrap();
            }
        }
    }
    assert!(killed >= fail::NAMES.len());
    let store = Btrfs::open(here.path()).await.unwrap();
    for project in &first.projects {
        store.delete(*project).await.unwrap();
    }
    assert!(store.wait_trash_empty(PATIENCE).await.unwrap(), "all of it goes");
    empty(&here.path().join("staging"));
    empty(&here.path().join("projects"));
    empty(&here.path().join("snapshots"));
    scrub(here.path());
}

// ---- the power is cut ----

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_survives_a_power_cut_at_once() {
    let harness = powered(|builder| builder).await;
    let report = examine(&harness, |property| property.name == "power.cut").await;
    assert!(report.broken.is_empty() && report.kept == ["power.cut"], "{report}");
}

/// What a snapshot of a number holds.
fn content(number: usize) -> Vec<(String, Vec<u8>)> {
    (0..30)
        .map(|file| (format!("home/{file}"), format!("{number} ").repeat(200 + file * 40).into_bytes()))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_power_is_cut_at_any_moment() {
    let mut cuts = Cuts::new();
    let store = fresh(cuts.inner.path()).await;
    let project = ProjectId::random();
    let path = store.create(project, &VolumeOptions::default()).await.unwrap().path.unwrap();
    let acknowledged: Arc<Mutex<Vec<usize>>> = Arc::default();
    let stop = Arc::new(AtomicBool::new(false));
    let worker = tokio::spawn({
        let (store, acknowledged, stop) = (store.clone(), Arc::clone(&acknowledged), Arc::clone(&stop));
        async move {
            let mut number = 0;
            while !stop.load(Ordering::Relaxed) {
                for (file, text) in content(number) {
                    fs::write(path.join(file), text).unwrap();
                }
                store.snapshot(project, &name(&format!("s{number}"))).await.unwrap();
                acknowledged.lock().unwrap().push(number);
                if number >= 8 {
                    store.delete_snapshot(project, &name(&format!("s{}", number - 8))).await.unwrap();
                }
                if number % 3 == 0 {
                    // The path of the live volume stays, whatever is restored.
                    store
                        .restore(project, &name(&format!("s{number}")), &name(&format!("f{number}")))
                        .await
                        .unwrap();
                    store.delete_snapshot(project, &name(&format!("f{number}"))).await.unwrap();
                }
                number += 1;
            }
        }
    });
    for round in 0..if full() { 40 } else { 6 } {
        // Not the same moment of the work each time.
        tokio::time::sleep(Duration::from_millis(150 + 37 * round)).await;
        let before = acknowledged.lock().unwrap().clone();
        let copy = cuts.cut();
        let after = acknowledged.lock().unwrap().len();
        let (up, disk) = cuts.up(&copy).await;
        let mut found = Vec::new();
        for snapshot in up.snapshots(project).await.unwrap() {
            let path = up.snapshot_path(project, &snapshot.name).await.unwrap();
            let Some(number) = snapshot.name.as_str().strip_prefix('s') else { continue };
            let number: usize = number.parse().unwrap();
            let expected: BTreeMap<_, _> = content(number).into_iter().collect();
            assert!(files(&path) == expected, "snapshot {number} is whole, acknowledged or not");
            found.push(number);
        }
        assert!(up.volume(project).await.is_ok(), "the live volume is there at every moment");
        // Those that were deleted on purpose meanwhile may be gone.
        let kept = before.iter().filter(|number| **number + 8 >= after);
        for number in kept {
            assert!(found.contains(number), "acknowledged snapshot {number} is gone: {found:?}");
        }
        cuts.down(up, disk, &copy);
    }
    stop.store(true, Ordering::Relaxed);
    worker.await.unwrap();
    drop(store);
}
