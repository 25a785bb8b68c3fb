//! What is left over of a host's projects goes, in whatever state it was left, and what
//! is somebody else's stays. On real podman; needs root.

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
    runner::{Runner, State},
};
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
    for (slot, after) in (10..).zip(["0.02", "0.04", "0.06", "0.08", "0.1", "0.13", "0.16", "0.2"]) {
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
    assert!(sweep_orphans(&ledger, &podman).await.is_empty(), "once is enough");
    // Their keepers need a moment to end.
    let begun = std::time::Instant::now();
    loop {
        let there = traces(&world, &words);
        if there.is_empty() {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "left over: {there:#?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
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
