//! What podman has and what the host wants meet again: what is left over goes, in
//! whatever state it was left, what is somebody else's stays, and what is not known is
//! left alone until it is. On real podman; needs root.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

#[path = "world/mod.rs"]
mod world;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use cocalc_core::{
    control::ProjectConfig,
    grant::{Ledger, MemoryLedgerStore, sweep_orphans},
    ids::{Epoch, HostId, ProjectId},
    runner::{Error, ProjectSpec, Runner, State},
};
use cocalc_podman::Podman;
use world::{World, must, until};

/// The containers that podman knows of: their ids and names.
fn containers() -> Vec<(String, String)> {
    let all = must(Command::new("podman").args(["ps", "-a", "--no-trunc", "--format", "{{.ID}} {{.Names}}"]));
    let of = |line: &str| line.split_once(' ').map(|(id, name)| (id.to_owned(), name.to_owned()));
    all.lines().filter_map(of).collect()
}

/// Whatever on this machine has one of these words in its name, its place or its
/// arguments: files of the runner and of podman, mounts, control groups, processes.
fn traces(world: &World, words: &BTreeSet<String>) -> Vec<String> {
    let about = |text: &str| words.iter().any(|word| text.contains(word.as_str()));
    let mut found = Vec::new();
    let places = [
        PathBuf::from("/run/cocalc").join(world.instance.to_string()),
        world.state.path().to_owned(),
        "/sys/fs/cgroup".into(),
        "/run/containers".into(),
        "/run/libpod".into(),
        "/run/runc".into(),
        "/var/lib/containers/storage/overlay-containers".into(),
    ];
    for place in places.iter().filter(|place| place.exists()) {
        // Without what is mounted in it, but for the trees of control groups. Much of
        // it comes and goes.
        let mut find = Command::new("find");
        find.arg(place);
        if !place.starts_with("/sys") {
            find.arg("-xdev");
        }
        let listed = find.output().unwrap();
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        found.extend(listed.lines().filter(|line| about(line)).map(str::to_owned));
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    found.extend(mounts.lines().filter(|line| about(line)).map(|line| format!("mount {line}")));
    for process in std::fs::read_dir("/proc").unwrap().flatten() {
        for file in ["cgroup", "cmdline"] {
            let text = std::fs::read(process.path().join(file)).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            if about(&text) {
                found.push(format!("process {} {text:?}", process.path().display()));
            }
        }
    }
    found.extend(containers().into_iter().map(|(_, name)| name).filter(|name| about(name)));
    found
}

/// A podman each of whose calls is killed after as many seconds as a file says, while
/// it is there: both, in `dir`.
fn podman_that_is_killed(dir: &Path) -> (PathBuf, PathBuf) {
    let (wrapper, secs) = (dir.join("killed-podman"), dir.join("secs"));
    let script = format!(
        "#!/bin/sh\nif test -e {secs}; then exec timeout -s KILL $(cat {secs}) podman \"$@\"; fi\n\
         exec podman \"$@\"\n",
        secs = secs.display()
    );
    cocalc_testkit::executable::write(&wrapper, script);
    (wrapper, secs)
}

async fn ledger(known: &[ProjectId]) -> Ledger {
    let ledger = Ledger::open(HostId::random(), Arc::new(MemoryLedgerStore::default())).await.unwrap();
    for project in known {
        ledger.create(*project, Epoch::FIRST, ProjectConfig::default()).await.unwrap();
    }
    ledger
}

/// Something on the machine that is not a host's, and goes with the test.
struct Foreign {
    container: String,
    copy: String,
    namespace: String,
    link: String,
    table: String,
}

impl Foreign {
    /// A container of somebody who knows nothing of hosts, one with all labels of
    /// `like`'s, as a copy has, and networks.
    fn new(world: &World, like: ProjectId) -> Self {
        let tag = std::process::id();
        let new = Self {
            container: format!("foreign-{tag}"),
            copy: format!("copy-{tag}"),
            namespace: format!("foreign-{tag}"),
            // As cables of hosts begin.
            link: format!("ccx{tag}"),
            table: format!("foreign_{tag}"),
        };
        let image = format!("{}:O", world.volume.root.join("image").display());
        must(Command::new("podman").args(["--runtime", "runc", "run", "-d", "--network", "none"]).args([
            "--ulimit",
            "nofile=1024:1024",
            "--ulimit",
            "nproc=1024:1024",
            "--name",
            &new.container,
            "--rootfs",
            &image,
            "sleep",
            "86400",
        ]));
        let name = format!("cocalc-{}-{like}", world.instance);
        let labels = must(Command::new("podman").args([
            "inspect",
            "--format",
            "{{range $key, $value := .Config.Labels}}{{$key}}={{$value}}\n{{end}}",
            &name,
        ]));
        let mut copy = Command::new("podman");
        copy.args(["--runtime", "runc", "create", "--network", "none", "--name", &new.copy]);
        for label in labels.lines().filter(|line| line.starts_with("cocalc.")) {
            copy.args(["--label", label]);
        }
        must(copy.args(["--rootfs", &image, "sleep", "86400"]));
        must(Command::new("ip").args(["netns", "add", &new.namespace]));
        must(
            Command::new("ip")
                .args(["link", "add", &new.link, "type", "veth", "peer", "name", "eth0"])
                .args(["netns", &new.namespace]),
        );
        must(Command::new("nft").args(["add", "table", "inet", &new.table]));
        new
    }

    /// All of it, as it is now.
    fn seen(&self) -> String {
        let format = "{{.Id}} {{.State.Status}} {{.State.Pid}} {{.State.StartedAt}}";
        let mut seen = must(
            Command::new("podman").args(["inspect", "--format", format]).args([&self.container, &self.copy]),
        );
        seen.push_str(&must(Command::new("ip").args(["-o", "link", "show", "dev", &self.link])));
        let names = must(Command::new("ip").args(["netns", "list"]));
        seen.extend(names.lines().filter(|line| line.contains(&self.namespace)));
        seen.push_str(&must(Command::new("nft").args(["list", "table", "inet", &self.table])));
        seen
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let quietly = |program: &str, args: &[&str]| drop(Command::new(program).args(args).output());
        quietly("podman", &["rm", "-f", "-t", "0", &self.container, &self.copy]);
        quietly("ip", &["link", "del", &self.link]);
        quietly("ip", &["netns", "del", &self.namespace]);
        quietly("nft", &["delete", "table", "inet", &self.table]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_left_over_goes_from_any_state_and_what_is_others_stays() {
    let (world, neighbour) = (World::new().await, World::new().await);
    let (ours, theirs) = (world.started(0).await, neighbour.started(0).await);
    let resting = world.started(1).await;
    world.podman.stop(resting.project, Duration::from_secs(5)).await.unwrap();
    let foreign = Foreign::new(&world, ours.project);

    // Of projects that the ledger has lost, one of which runs; of one that was deleted.
    let (lost, lost_stopped) = (world.started(2).await, world.started(3).await);
    world.podman.stop(lost_stopped.project, Duration::from_secs(5)).await.unwrap();
    let deleted = world.started(4).await;
    // Its container was taken by a removal that was cut off there.
    let emptied = world.started(5).await;
    let container = |project: ProjectId| format!("cocalc-{}-{project}", world.instance);
    let mut words: BTreeSet<String> = BTreeSet::new();
    let mut note = |project: ProjectId| {
        words.insert(project.to_string());
        let name = container(project);
        words.extend(containers().into_iter().filter(|(_, other)| *other == name).map(|(id, _)| id));
    };
    for spec in [&lost, &lost_stopped, &deleted, &emptied] {
        note(spec.project);
    }
    must(Command::new("podman").args(["rm", "-f", "-t", "0", &container(emptied.project)]));
    // Half made, and half removed: podman is killed at some point of it.
    let (wrapper, secs) = podman_that_is_killed(world.state.path());
    let builder = world::builder(world.instance, world.state.path(), world.index, &world.volume);
    let killed = builder.podman(&wrapper).build().await.unwrap();
    let mut halves = Vec::new();
    for (slot, after) in (10..).zip(["0.02", "0.04", "0.06", "0.08", "0.09", "0.1", "0.13", "0.2"]) {
        let spec = world.project(slot);
        std::fs::write(&secs, after).unwrap();
        let started = killed.start(&spec).await;
        note(spec.project);
        std::fs::remove_file(&secs).unwrap();
        eprintln!("start killed after {after} s: {started:?}");
        halves.push(spec.project);
    }
    for (slot, after) in (20..).zip(["0.05", "0.15"]) {
        let spec = world.project(slot);
        killed.start(&spec).await.unwrap();
        note(spec.project);
        std::fs::write(&secs, after).unwrap();
        let removed = killed.remove(spec.project).await;
        std::fs::remove_file(&secs).unwrap();
        eprintln!("removal killed after {after} s: {removed:?}");
        halves.push(spec.project);
    }
    drop(killed);
    let before = (
        world.first_process(ours.project),
        neighbour.first_process(theirs.project),
        cocalc_podman::leftovers(neighbour.instance),
        foreign.seen(),
    );
    assert!(!traces(&world, &words).is_empty());

    // The next daemon finds them, and sweeps.
    let ledger = ledger(&[ours.project, resting.project, deleted.project]).await;
    ledger.delete(deleted.project, Epoch::FIRST).await.unwrap();
    let builder = world::builder(world.instance, world.state.path(), world.index, &world.volume);
    let podman = builder.look_again(Duration::from_secs(1)).build().await.unwrap();
    let mut left: BTreeSet<ProjectId> = sweep_orphans(&ledger, &podman).await.into_iter().collect();
    for spec in [&lost, &lost_stopped, &deleted, &emptied] {
        assert!(left.remove(&spec.project), "{} stays", spec.project);
    }
    assert!(left.iter().all(|project| halves.contains(project)), "{left:?}");
    // Their keepers need a moment to end, and of what podman is busy with it is not known
    // what it does: that goes with a later sweep.
    let begun = std::time::Instant::now();
    loop {
        let there = traces(&world, &words);
        if there.is_empty() {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "left over: {there:#?}");
        tokio::time::sleep(Duration::from_millis(500)).await;
        let late = sweep_orphans(&ledger, &podman).await;
        assert!(late.iter().all(|project| halves.contains(project)), "{late:?}");
    }
    assert!(sweep_orphans(&ledger, &podman).await.is_empty(), "all are gone");
    let interfaces = cocalc_podman::leftovers(world.instance);
    let interfaces = interfaces.iter().filter(|left| left.starts_with("network interface")).count();
    assert_eq!(interfaces, 2, "those of the two that are known");
    let list = podman.list().await.unwrap();
    let states: BTreeMap<_, _> = list.iter().map(|one| (one.project, one.state)).collect();
    assert_eq!(states, [(ours.project, State::Running), (resting.project, State::Stopped)].into());

    // Nobody else noticed.
    let after = (
        world.first_process(ours.project),
        neighbour.first_process(theirs.project),
        cocalc_podman::leftovers(neighbour.instance),
        foreign.seen(),
    );
    assert_eq!(after, before);
    assert_eq!(world::run_in(&podman, ours.project, None, "echo still").await, "still\n");
    assert_eq!(neighbour.run(theirs.project, "echo there").await, "there\n");
    for project in [lost.project, deleted.project] {
        assert!(world.volume.root.join(project.to_string()).join("home").is_dir(), "files stay");
    }

    // One that comes later is found, too: nobody here has made it.
    let late = world.started(6).await;
    until("it is seen", async || {
        podman
            .list()
            .await
            .unwrap()
            .iter()
            .any(|one| one.project == late.project && one.state == State::Running)
    })
    .await;
    assert_eq!(sweep_orphans(&ledger, &podman).await, [late.project]);
    // And what is stopped is not started by others.
    world.podman.start(&resting).await.unwrap();
    until("it is stopped again", async || {
        let format = ["inspect", "--format", "{{.State.Running}}", &container(resting.project)];
        must(Command::new("podman").args(format)).trim() == "false"
            && podman.status(resting.project).await.unwrap().state == State::Stopped
    })
    .await;
    podman.start(&resting).await.unwrap();
    assert_eq!(world::run_in(&podman, resting.project, None, "echo up").await, "up\n");
}

/// A podman that fails as a file says, while it is there: both, in `dir`. The file has
/// `fails`, or one of these words and the name of a container, which is asked about
/// alone: `silent` (it does not say what it is), `odd` (nor does it know it), `begun`
/// (it is started, and then podman fails).
fn podman_that_fails(dir: &Path) -> (PathBuf, PathBuf) {
    let (wrapper, how) = (dir.join("failing-podman"), dir.join("how"));
    let script = format!(
        r#"#!/bin/sh
test -e {how} || exec podman "$@"
read word name <{how}
fail() {{ echo "Error: the database is locked" >&2; exit 125; }}
for last; do :; done
case "$word $*" in
fails\ *) fail;;
silent*inspect*"$name"*) fail;;
odd*" container inspect $name")
  podman "$@" | sed 's/"Status": "[a-z]*"/"Status": "unknown"/; s/"Running": true/"Running": false/; s/"Pid": [0-9]*/"Pid": 0/'
  exit 0;;
odd*inspect*"$name"*) fail;;
begun*" start $name") podman "$@"; fail;;
begun*" stop "*"$name"|begun*" inspect $name") fail;;
esac
exec podman "$@"
"#,
        how = how.display()
    );
    cocalc_testkit::executable::write(&wrapper, script);
    (wrapper, how)
}

/// Asserts that nothing is known of a project, that it is told why and what to do, and
/// that nothing is done to it.
async fn is_left_alone(podman: &Podman, spec: &ProjectSpec, why: &str) {
    let project = spec.project;
    // They wait a moment for podman, which is asked at once.
    let (prepared, started, removed) =
        tokio::join!(podman.prepare(spec), podman.start(spec), podman.remove(project));
    let others = (podman.status(project).await, podman.dial(project, 1).await);
    for refused in [prepared, started.map(drop), removed, others.0.map(drop), others.1.map(drop)] {
        let Err(Error::Unknown { reason, .. }) = refused else { panic!("{why}: {refused:?}") };
        assert!(reason.contains(why) && reason.contains("podman ps"), "{reason}");
    }
    let list = podman.list().await.unwrap();
    let one = list.iter().find(|one| one.project == project).unwrap();
    assert!(one.state == State::Unknown && one.reason.is_some(), "{one:?}");
}

async fn is_known(podman: &Podman, project: ProjectId) -> State {
    let begun = std::time::Instant::now();
    loop {
        match podman.status(project).await {
            Ok(status) => return status.state,
            Err(Error::Unknown { reason, .. }) => {
                assert!(begun.elapsed() < Duration::from_secs(300), "podman is not asked again: {reason}");
            }
            Err(error) => panic!("{error}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_podman_does_not_say_is_not_known_and_nothing_is_done_until_it_is() {
    let world = World::new().await;
    let (running, resting, other) = (world.started(0).await, world.started(1).await, world.started(2).await);
    world.podman.stop(resting.project, Duration::from_secs(5)).await.unwrap();
    let pid = world.first_process(running.project);
    let (wrapper, how) = podman_that_fails(world.state.path());
    let name = |spec: &ProjectSpec| format!("cocalc-{}-{}", world.instance, spec.project);
    let says = |text: String| {
        let new = how.with_extension("new");
        std::fs::write(&new, format!("{text}\n")).unwrap();
        std::fs::rename(new, &how).unwrap();
    };
    let daemon = async || {
        let builder = world::builder(world.instance, world.state.path(), world.index, &world.volume);
        builder.podman(&wrapper).build().await.unwrap()
    };
    let runtime = PathBuf::from("/run/cocalc").join(world.instance.to_string());
    let note = runtime.join(format!("running/{}.json", running.project));

    // Of one container nothing is said; the others go on.
    says(format!("silent {}", name(&resting)));
    let podman = daemon().await;
    is_left_alone(&podman, &resting, "the database is locked").await;
    assert_eq!(podman.status(running.project).await.unwrap().state, State::Running);
    podman.stop(other.project, Duration::from_secs(5)).await.unwrap();
    assert_eq!(podman.start(&other).await.unwrap().state, State::Running);
    // What is said is not understood.
    says(format!("odd {}", name(&resting)));
    let begun = std::time::Instant::now();
    loop {
        let Err(Error::Unknown { reason, .. }) = podman.status(resting.project).await else {
            panic!("known")
        };
        if reason.contains("\"unknown\"") {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(300), "podman is not asked again");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    is_left_alone(&podman, &resting, "\"unknown\"").await;
    std::fs::remove_file(&how).unwrap();
    assert_eq!(is_known(&podman, resting.project).await, State::Stopped);
    assert_eq!(podman.start(&resting).await.unwrap().state, State::Running);
    drop(podman);

    // A note that makes no sense, of one that runs, whatever podman says: it is seen.
    std::fs::write(&note, "{").unwrap();
    says(format!("odd {}", name(&running)));
    let podman = daemon().await;
    assert_eq!(podman.status(running.project).await.unwrap().state, State::Running);
    assert!(std::fs::read_to_string(&note).unwrap().contains(&pid), "and noted");
    drop(podman);
    // Without any trace of its first process it is not known; then it is adopted.
    std::fs::write(&note, "{").unwrap();
    std::fs::remove_file(runtime.join(format!("pids/{}", running.project))).unwrap();
    let podman = daemon().await;
    is_left_alone(&podman, &running, "\"unknown\"").await;
    std::fs::remove_file(&how).unwrap();
    assert_eq!(is_known(&podman, running.project).await, State::Running);
    assert_eq!(world.first_process(running.project), pid, "not started again");
    assert_eq!(world::run_in(&podman, running.project, None, "echo still").await, "still\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_broke_off_is_not_tried_again_before_it_is_known_what_came_of_it() {
    let world = World::new().await;
    let spec = world.project(0);
    let (wrapper, how) = podman_that_fails(world.state.path());
    let builder = world::builder(world.instance, world.state.path(), world.index, &world.volume);
    let podman = builder.podman(&wrapper).build().await.unwrap();
    std::fs::write(&how, format!("begun cocalc-{}-{}\n", world.instance, spec.project)).unwrap();
    let started = podman.start(&spec).await;
    assert!(matches!(started, Err(Error::Backend { .. })), "{started:?}");
    // It runs, and nobody here has seen that.
    let pid = world.first_process(spec.project);
    is_left_alone(&podman, &spec, "the database is locked").await;
    // All of podman fails for a while.
    std::fs::write(&how, "fails\n").unwrap();
    is_left_alone(&podman, &spec, "the database is locked").await;
    std::fs::remove_file(&how).unwrap();
    assert_eq!(is_known(&podman, spec.project).await, State::Running);
    assert_eq!(world.first_process(spec.project), pid);
    assert_eq!(podman.start(&spec).await.unwrap().state, State::Running);
    assert_eq!(world::run_in(&podman, spec.project, None, "echo up > ~/x; cat ~/x").await.trim(), "up");
    podman.stop(spec.project, Duration::from_secs(5)).await.unwrap();
    podman.remove(spec.project).await.unwrap();
}
